"""dtype=auto: what a step asks of a layer, which dtype it is faster in, and what the run says about it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from steepest.assembly.dtype_choice import Work, choose_dtype, ppo_work, sft_work
from steepest.assembly.layer_trial import Cost, Shape, time_layer
from steepest.config.load import load_config, load_sft_config
from steepest.config.sections.model import ModelConfig
from steepest.devices.backends.cpu import CPUDevice
from steepest.errors import ModelError
from steepest.models.tiny import build_tiny_model
from tests.support.commands import REQUIRED

WORK = Work(Shape(944, 236, 32, 172), updates=8.0, passes={"float32": 4.0, "bfloat16": 6.0}, token_steps=127)


def processor(folder: Path, flags: str) -> CPUDevice:
    (folder / "proc").mkdir(exist_ok=True)
    (folder / "proc" / "cpuinfo").write_text(f"flags\t\t: {flags}\n")
    return CPUDevice(folder)


@pytest.fixture
def amx(tmp_path) -> CPUDevice:
    return processor(tmp_path, "fpu avx2 amx_bf16")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("tiny"), ["say 1 2 3"], hidden_size=32, num_layers=3)


def test_the_faster_for_the_whole_step_wins_and_both_figures_are_said(amx):
    costs = {"float32": Cost(0.05, 0.1, 0.002), "bfloat16": Cost(0.03, 0.06, 0.003)}
    # float32: 12 x 50 + 8 x 100 + 127 x 2 = 1654 ms; bfloat16, with 2 more passes: 14 x 30 + 8 x 60 + 127 x 3 = 1281
    assert choose_dtype(amx, lambda: WORK, lambda shape: costs) == (
        "bfloat16",
        "bfloat16: a layer's micro-batch of 944 tokens 90 ms (float32 150 ms), its token step of 32 row(s) 3 ms "
        "(float32 2 ms): a step takes 0.77 of float32's time",
    )
    costs["bfloat16"] = Cost(0.03, 0.06, 0.006)  # 900 + 762 = 1662 ms
    dtype, said = choose_dtype(amx, lambda: WORK, lambda shape: costs)
    assert dtype == "float32" and said is not None and said.endswith(": a step takes 1.00 of bfloat16's time")


def test_equal_times_are_float32s(amx):
    cost = Cost(0.05, 0.1, 0.002)
    work = Work(WORK.shape, updates=1.0)
    assert choose_dtype(amx, lambda: work, lambda shape: {"float32": cost, "bfloat16": cost})[0] == "float32"


def test_only_what_was_timed_is_said(amx):
    work = Work(Shape(0, 0, 40, 100), token_steps=64)
    costs = {"float32": Cost(token_step=0.0005), "bfloat16": Cost(token_step=1.2345)}
    assert choose_dtype(amx, lambda: work, lambda shape: costs)[1] == (
        "float32: its token step of 40 row(s) 0.5 ms (bfloat16 1234 ms): a step takes 0.00 of bfloat16's time"
    )


def nothing(*_: object) -> object:
    raise AssertionError("timed")


def test_without_instructions_nothing_is_timed(tmp_path):
    device = processor(tmp_path, "fpu avx2 avx512f")
    assert choose_dtype(device, nothing, nothing) == ("float32", None)
    assert "; float32 by default: this CPU has neither AVX512-BF16 nor AMX, so fp32 is" in device.describe()


def test_a_card_is_not_timed(amx):
    class Card(CPUDevice):
        measures_dtype = False

        def supports_bf16(self):
            return True, "Card 9 has bf16 arithmetic"

    assert choose_dtype(Card(), nothing, nothing) == ("bfloat16", None)
    assert Card().describe().endswith("; bfloat16 by default: Card 9 has bf16 arithmetic")
    assert amx.describe().endswith("; bfloat16 where it is faster: this CPU has AMX-BF16")


def test_a_model_that_cannot_be_cut_down_is_said(amx):
    def fails(shape: Shape) -> object:
        raise ModelError("its layers\nare odd")

    assert choose_dtype(amx, lambda: WORK, fails) == (
        "bfloat16",
        "bfloat16: this CPU has AMX-BF16; a layer of this model cannot be timed alone (ModelError: its layers)",
    )


@pytest.mark.parametrize(
    ("words", "want"),
    [
        # 16 rows of 72 + 128 tokens in micro-batches of 800: 4 of them. One update a step, so values have no pass of
        # their own; the reference has one, and in bfloat16 the old log-probs, which the KL in the reward reads.
        (
            ["data.train_batch_size=16", "actor_rollout_ref.actor.ppo_mini_batch_size=16"],
            Work(Shape(800, 200, 16, 136), 8.0, {"float32": 4.0, "bfloat16": 8.0}, 127),
        ),
        # two updates: the values have a pass
        (
            ["data.train_batch_size=16", "actor_rollout_ref.actor.ppo_mini_batch_size=8"],
            Work(Shape(800, 200, 16, 136), 8.0, {"float32": 8.0, "bfloat16": 12.0}, 127),
        ),
        # 4 prompts of 4 responses, of which each prompt counts once: 4 x (72 + 4 x 128) = 2336 tokens. No critic.
        (
            ["--config-name", "grpo", "data.train_batch_size=4", "actor_rollout_ref.rollout.n=4",
             "actor_rollout_ref.actor.ppo_mini_batch_size=4", "actor_rollout_ref.actor.use_kl_loss=True",
             "actor_rollout_ref.rollout.max_num_seqs=12"],
            Work(Shape(800, 200, 12, 136), 2.92, {"float32": 2.92, "bfloat16": 2.92}, 254),
        ),
        # a critic that is a head on the actor's base reads what the reference computes
        (
            ["data.train_batch_size=16", "actor_rollout_ref.actor.ppo_mini_batch_size=16", "critic.share_base=head",
             "actor_rollout_ref.model.lora_rank=4", "actor_rollout_ref.rollout.name=hf"],
            Work(Shape(800, 200, 0, 136), 4.0, {"float32": 4.0, "bfloat16": 8.0}, 0),
        ),
        (
            ["trainer.val_only=True"],
            Work(Shape(0, 200, 100, 136), token_steps=127),
        ),
    ],
)  # fmt: skip
def test_the_work_of_a_step(words, want):
    common = ["data.max_response_length=128", "data.max_prompt_length=100", "trainer.device=cpu",
              "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=800", "algorithm.use_kl_in_reward=True"]  # fmt: skip
    if "--config-name" in words:
        common[-1] = "algorithm.use_kl_in_reward=False"
    found = ppo_work(load_config([*words, *common, *REQUIRED]), 72.0, 1000, 100, None, CPUDevice())
    assert found == want


def test_the_work_of_an_sft_step():
    config = load_sft_config(["data.train_files=x.jsonl", "model.path=m", "data.train_batch_size=32",
                              "data.max_length=96", "data.max_token_len_per_gpu=400"])  # fmt: skip
    # 32 samples of 50 tokens: 1600, in 4 micro-batches
    assert sft_work(config, 50.0) == Work(Shape(400, 50, 0, 0), updates=4.0)


class Products(TorchDispatchMode):
    """The dtypes of the matrix products in its `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "mm" in func.__name__ or "linear" in func.__name__:
            self.dtypes.add(out.dtype)
        return out


def timed(tiny: Path, shape: Shape, rank: int = 0) -> dict[str, Cost]:
    """The costs by a clock that moves by one at each look: there is time for one repetition of 16 tokens."""
    now, before = iter(range(1000)), torch.get_rng_state()
    with Products() as products:
        costs = time_layer(ModelConfig(lora_rank=rank), tiny, shape, CPUDevice(), lambda: float(next(now)))
    assert torch.equal(torch.get_rng_state(), before)
    assert products.dtypes == {torch.float32, torch.bfloat16}
    assert list(costs) == ["float32", "bfloat16"]
    return dict(costs)


@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_micro_batch_is_timed_in_both_dtypes(tiny, rank):
    for cost in timed(tiny, Shape(64, 20, 0, 9), rank).values():
        assert cost == Cost(forward=4.0, backward=4.0)  # one a pass of 16 tokens, for 64


@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_token_step_is_timed_in_both_dtypes(tiny, rank):
    for cost in timed(tiny, Shape(0, 20, 6, 9), rank).values():
        assert cost.token_step > 0 and cost.forward == cost.backward == 0.0
