"""Tensors of a step come from memory that the process keeps."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from steepest.process.malloc import keep_freed_memory
kept = keep_freed_memory() if {keep} else None
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(16 * 2**20)
before = faults()
for _ in range(10):
    torch.ones(16 * 2**20)  # 64 MiB
print(kept, faults() - before)
"""


def run(keep: bool, **variables: str) -> tuple[str, int]:
    script = FAULTS.format(keep=keep)
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **variables}, capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_tensors_of_64_mib_fault_once_and_not_for_each_operation():
    _, plain = run(False)
    kept, faults = run(True)
    assert kept == "True" and plain > 1000 and faults < plain / 10


GIVEN_BACK = """
import torch
from contextlib import nullcontext
from steepest.process.malloc import given_back_when_freed, keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) // 256

keep_freed_memory()
before = resident()
with given_back_when_freed() if {apart} else nullcontext():
    held = [torch.ones(2**20) for _ in range(50)]  # 4 MiB each
after = torch.ones(2**20)  # keeps the heap from ending with what is freed
made = resident() - before
del held
print(made, resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
@pytest.mark.parametrize("apart", [True, False])
def test_what_is_given_up_as_a_whole_goes_back_to_the_system(apart):
    script = GIVEN_BACK.format(apart=apart)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    made, left = map(int, done.stdout.split())
    assert made > 190
    assert (left < 20) == apart


TRIMMED = """
import torch
from steepest.devices.backends.cpu import CPUDevice
from steepest.process.malloc import keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) // 256

keep_freed_memory()
before = resident()
held = [torch.ones(2**20) for _ in range(100)]  # 4 MiB each
held = [x if i % 2 else x.bfloat16() for i, x in enumerate(held)]
left = resident() - before
CPUDevice().empty_cache()
print(left, resident() - before, all(bool((x == 1).all()) for x in held))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="malloc_trim is glibc's")
def test_what_is_free_between_what_is_not_goes_back_when_asked_for():
    done = subprocess.run([sys.executable, "-c", TRIMMED], capture_output=True, text=True, check=True)
    left, after, same = done.stdout.split()
    assert int(left) > 390 and int(after) < 320 and same == "True"


def test_an_environment_that_sets_the_allocator_is_left_alone():
    assert run(True, MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"


def test_a_job_on_the_cpu_keeps_its_memory(monkeypatch, tmp_path):
    from steepest.config.load import load_config
    from steepest.devices.backends import cpu
    from steepest.trainer.run.folder import begin
    from tests.support.commands import REQUIRED

    called = []
    monkeypatch.setattr(cpu, "keep_freed_memory", lambda: called.append("kept"))
    begin(load_config([*REQUIRED, "trainer.device=cpu", f"trainer.default_local_dir={tmp_path}"]), seed=1)
    assert called == ["kept"]
