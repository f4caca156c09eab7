"""Every benchmark says what it does, tells what is missing before it starts, and runs in small."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import limits
from bench.compare import parse_line
from bench.flops import Shape
from bench.inputs import merged
from bench.run import DEFAULT, MODULES

ROOT = Path(__file__).parents[2]


def run(*words: str, code: int = 0) -> str:
    """What a benchmark prints; both streams."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("module", sorted({words[0] for words in MODULES.values()} | {"bench.table", "bench.rollout"}))
def test_help(module: str):
    assert f"python -m {module}" in run(module, "--help") or "usage:" in run(module, "--help")


@pytest.mark.parametrize(
    "file",
    [
        pytest.param("bench/rollout.py", marks=pytest.mark.slow),
        pytest.param("bench/limits.py", marks=pytest.mark.slow),
        "bench/table.py",
        "bench/peers/environment.py",
    ],
)
def test_run_as_a_file_it_says_what_to_run_instead(file: str):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, file, "--help"], cwd=ROOT, capture_output=True, text=True, env=env)
    module = file.removesuffix(".py").replace("/", ".")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"bench: not a file to run: say `python -m {module}`, which sets what waiting threads do\n"


def test_every_script_imports_what_refuses_a_file():
    texts = {file.name: file.read_text() for file in (ROOT / "bench").rglob("*.py")}
    scripts = {name: text for name, text in texts.items() if '__name__ == "__main__"' in text}
    assert "rollout.py" in scripts and len(scripts) > 10
    assert [name for name, text in scripts.items() if "\nimport bench" not in text and "\nfrom bench" not in text] == []


def test_what_is_missing_is_told_before_anything_runs(tmp_path: Path):
    said = run("bench.run", "ppo", "--out", str(tmp_path), code=2)
    assert said.startswith("bench: MODEL and DATA not given: a benchmark needs a real model and real problems.")
    assert "steepest prepare gsm8k" in said and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_name_is_refused():
    assert "no benchmark 'rolout'; there are limits, rollout, ppo, grpo" in run("bench.run", "rolout", code=2)


def test_the_default_benchmarks_exist():
    assert set(DEFAULT) < set(MODULES)


def test_rates_are_those_of_the_products_that_were_timed():
    shape = Shape(hidden=64, layers=2, heads=2, kv_heads=1, head_size=32, intermediate=128, vocab=500)
    rates = limits.measure(shape, torch.get_num_threads(), seconds=0.01, dtypes=("float32",))
    assert set(rates) == {"copy_gb_s", "training_float32", "decoding_float32", "others_share"}
    assert 0.1 < rates["decoding_float32"] < 10_000 and 0.1 < rates["copy_gb_s"] < 10_000
    assert [row["dtype"] for row in limits.rows_of(rates)] == ["float32"]


def test_of_disturbed_limits_the_higher_ones_count():
    old = {"training_float32": 40.0, "copy_gb_s": 9.0, "others_share": 0.3}
    new = {"training_float32": 80.0, "copy_gb_s": 8.0, "others_share": 0.4}
    assert merged(old, new) == {"training_float32": 80.0, "copy_gb_s": 9.0, "others_share": 0.3}


@pytest.mark.slow
def test_the_limits_and_a_rollout_beside_transformers_run_in_small(tmp_path: Path):
    words = ["--tiny", "--threads", "1", "--out", str(tmp_path), "--peers", "hf"]
    lines = run("bench.run", "rollout", *words).splitlines()
    found = [parse_line(line) for line in lines if line.startswith("bench: ")]
    assert [line["name"] for line in found] == ["rollout_vs_hf"] * 2  # where it was measured, and at the end
    assert found[0]["ours"] > 0 and found[0]["peer"] > 0 and 0 < found[0]["limit_share"] < 1
    page = run("bench.table", str(tmp_path))
    assert "| fixed | ours |" in page and "| fixed | transformers generate |" in page
    assert "| float32 |" in page and "| processor |" in page


@pytest.mark.slow
def test_the_step_the_scaling_and_the_memory_run_in_small(tmp_path: Path):
    from bench.flops import Group
    from bench.inputs import Inputs, tiny_inputs, write_prompts
    from bench.ours import operations, overrides, ppo, run_ours

    said = run("bench.run", "scaling", "memory", "--tiny", "--threads", "1", "--out", str(tmp_path))
    assert "scaling: batch x8 costs" in said and "| full |" in said and "GiB without activations" in said
    model, data = tiny_inputs(tmp_path / "tiny")
    inputs = Inputs(model, data, tmp_path, 1, "float32", True, 1, 1)
    prompts = write_prompts(tmp_path / "rows.parquet", inputs.questions(4))
    for kind in ("full", "adapter", "head"):
        keys = overrides(
            inputs, prompts, tmp_path / kind, prompts=4, group=1, response=8, prompt_limit=128, steps=2
        )  # fmt: skip
        made = run_ours(inputs, [*keys, *ppo(kind)], tmp_path / kind, tmp_path / f"{kind}.log")
        assert len(made.steps) == 1 and made.parts["update_actor"] > 0 and made.peak > 2**27
        needed = operations(inputs, made, [Group(60, (8,))] * 4, critic=kind, lora=kind != "full")
        assert needed["gen"] > 0 and (needed["update_critic"] > 0) == (kind != "head")
