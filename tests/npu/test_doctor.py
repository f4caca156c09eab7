"""`steepest doctor` where there is an NPU: the stand-in, or a real card."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.npu.jobs import ON_STAND_IN, needs_stand_in
from tests.support.installs import Ran, doctor

pytestmark = pytest.mark.npu


def look(folder: Path, **variables: str) -> Ran:
    """In the environment of this process, which finds the device."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HCCL_", "VLLM_", "PYTORCH_"))}
    return doctor(folder, **(kept | variables))


def test_the_npu_is_chosen_and_described(tmp_path: Path) -> None:
    ran = look(tmp_path)
    assert ran.json["device"] == "npu" and "Traceback" not in ran.err
    facts, lines = ran.json["devices"]["npu"], ran.lines("device")
    told = ("available", "distributed_backend", "ray_resource", "sleep_level", "visible_devices_variable", "dtype")
    assert [facts[name] for name in told] == [
        True, "cpu:gloo,npu:hccl", "NPU", 1, "ASCEND_RT_VISIBLE_DEVICES", "bfloat16",
    ]  # fmt: skip
    assert 0 < facts["memory_available"] <= facts["memory_total"]
    assert lines["npu"]["status"] == "ok" and facts["hardware"] in lines["npu"]["text"]
    assert lines["npu attention"]["text"] == "flash_attention_2: torch-npu has a fused attention"
    assert lines["npu environment"]["text"] == "HCCL_HOST_SOCKET_PORT_RANGE=auto, HCCL_NPU_SOCKET_PORT_RANGE=auto"
    assert lines["npu rollout"]["text"] == "VLLM_ASCEND_ENABLE_NZ=0"
    assert lines["npu sleep mode"]["text"] == "vLLM's sleep level 1"
    assert lines["npu allocator"]["text"] == "PYTORCH_NPU_ALLOC_CONF is unset"
    assert "npu" in ran.lines("engines")["builtin"]["text"]
    assert {"torch-npu", "CANN", "Ascend set"} <= set(ran.lines("versions"))
    if ON_STAND_IN:
        assert (ran.code, ran.faults("device", "versions")) == (0, {"CANN": "warning"})


def test_settings_that_break_a_run_are_problems(tmp_path: Path) -> None:
    ran = look(
        tmp_path,
        VLLM_ASCEND_ENABLE_NZ="1",
        PYTORCH_NPU_ALLOC_CONF="expandable_segments:True",
        ASCEND_LAUNCH_BLOCKING="1",
        HCCL_HOST_SOCKET_PORT_RANGE="60000-60015",
    )
    assert ran.code == 1
    faults, lines = ran.faults("device"), ran.lines("device")
    assert (faults["npu rollout"], faults["npu environment"]) == ("problem", "warning")
    assert faults["npu allocator"] in ("problem", "warning") and faults["ASCEND_LAUNCH_BLOCKING"] == "warning"
    assert lines["npu rollout"]["remedy"] == "unset VLLM_ASCEND_ENABLE_NZ"
    assert lines["npu allocator"]["remedy"] == "take expandable_segments out of PYTORCH_NPU_ALLOC_CONF"


@needs_stand_in
def test_cards_that_are_hidden_or_out_of_order(tmp_path: Path) -> None:
    ran = look(tmp_path, ASCEND_RT_VISIBLE_DEVICES="")
    assert ran.json["device"] == "cpu" and ran.faults("device") == {"npu": "warning"}
    assert "ASCEND_RT_VISIBLE_DEVICES='' hides every card" in ran.lines("device")["npu"]["text"]
    ran = look(tmp_path, ASCEND_RT_VISIBLE_DEVICES="1,0")
    assert ran.lines("device")["ASCEND_RT_VISIBLE_DEVICES"]["remedy"] == "export ASCEND_RT_VISIBLE_DEVICES=0,1"
    assert ran.code == 1
