"""Where the processor has bf16, ours is measured in both dtypes, and the ratio of the two is a line of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import limits
from bench.compare import write_results
from bench.inputs import Inputs, dtypes
from bench.ours import Run, Step
from bench.steps import Workload, results
from steepest.models.tiny import build_tiny_model


def processor(folder: Path, flags: str) -> Path:
    (folder / "proc").mkdir()
    (folder / "proc" / "cpuinfo").write_text(f"flags\t\t: {flags}\n")
    return folder


def test_both_dtypes_are_measured_where_the_processor_has_bf16(tmp_path):
    assert dtypes("auto", processor(tmp_path, "avx2 amx_bf16")) == (
        "bfloat16",
        True,
        "ours is measured in bfloat16 and in float32, the peer in bfloat16: this CPU has AMX-BF16",
    )


def test_without_it_the_reason_is_said(tmp_path):
    assert dtypes("auto", processor(tmp_path, "avx2")) == (
        "float32",
        False,
        "only float32 is measured: this CPU has neither AVX512-BF16 nor AMX, so fp32 is faster than bf16",
    )
    assert dtypes("bfloat16") == ("bfloat16", False, "bfloat16 alone is measured, as --dtype=bfloat16 asks")


@pytest.fixture
def inputs(tmp_path) -> Inputs:
    """Both dtypes of a tiny model, with limits that somebody has measured today."""
    model = build_tiny_model(tmp_path / "model", ["a b"], hidden_size=16, num_layers=1)
    rates = {"training_float32": 100.0, "training_bfloat16": 400.0, "others_share": 0.0}
    about = {**limits.machine(1), "model": "model", "limits": rates}
    write_results(tmp_path, "limits", machine=about, about={})
    return Inputs(model, tmp_path, tmp_path, 1, "bfloat16", True, 1, 1, both=True)


def run_of(seconds: float) -> Run:
    return Run((Step(seconds, seconds, 0.0, {"gen": 1.0, "update_actor": 2.0}),), 2**30, Path("log"))


def test_the_ratio_to_float32_is_a_line(inputs):
    half, full = inputs.variants
    assert (half, full.dtype) == (inputs, "float32")
    work = Workload("grpo", 4, 4, 16, ("full",), lengths=(10, 10, 10, 10))
    lines, table = results(inputs, work, {("full", half): [run_of(4.0)], ("full", full): [run_of(6.0)]}, [run_of(12.0)])
    assert [line.line().rpartition(" ")[0] for line in lines] == [
        "bench: grpo_w2_vs_trl ours=4 peer=12 ratio=3",
        "bench: grpo_w2_bf16_vs_float32 ours=4 peer=6 ratio=1.5",
    ]
    assert [(row["run"], row["s a step"]) for row in table] == [
        ("ours, bfloat16", 4.0), ("ours, float32", 6.0), ("TRL 1.16.0", 12.0),
    ]  # fmt: skip
    # the same arithmetic, at a quarter of the rate, in 6 instead of 4 seconds
    assert table[0]["limit share"] / table[1]["limit share"] == pytest.approx(0.25 * 6 / 4)


def test_one_dtype_has_no_name_in_the_table(inputs):
    only = Inputs(inputs.model, inputs.data, inputs.out, 1, "float32", True, 1, 1)
    work = Workload("ppo", 4, 1, 16, ("full",), lengths=(10, 10, 10, 10))
    lines, table = results(only, work, {("full", only): [run_of(4.0)]}, [run_of(6.0)])
    assert [line.name for line in lines] == ["ppo_w1_vs_trl"]
    assert [row["run"] for row in table] == ["ours", "TRL 1.12.0"]
