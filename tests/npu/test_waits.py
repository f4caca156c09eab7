"""How often the host waits for the device: once a mini-batch and once in some tokens, never once a token.

Each wait empties the device's queue. The stand-in counts them (`sync` of its transfer_counts).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from steepest.core.batch import Batch
from steepest.data.sft import SFTExample
from steepest.learner.actor import ActorLossSettings
from steepest.learner.micro_batches import MicroBatches
from steepest.learner.optim import OptimSettings
from steepest.learner.supervised import Supervised
from steepest.learner.trainable import ComputeSettings
from steepest.rollout.api import SamplingParams
from steepest.rollout.builtin.engine import BuiltinEngine
from tests.npu.jobs import needs_stand_in
from tests.support.learner_parts import VOCABULARY, make_actor, make_critic, policy, with_log_probs
from tests.support.rollout_requests import loaded, requests_of
from tests.support.tiny_models import tiny_lm

pytestmark = [pytest.mark.npu, needs_stand_in]

NPU = ComputeSettings(device="npu")


def waits(call: Callable[[], object]) -> int:
    """How often the host waits during `call`, after one call that fills what is kept (Adam's moments, buffers)."""
    call()
    torch.npu.reset_counts()
    call()
    return torch.npu.transfer_counts().get("sync", 0)


def batch_of(num_rows: int, length: int) -> Batch:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (num_rows, length), generator=g).tolist()
    shape = (num_rows, length)
    batch = Batch.from_sequences(
        [[1, 2]] * num_rows, ids, group_ids=list(range(num_rows)), truncated=[False] * num_rows
    )
    return replace(batch, advantages=torch.randn(shape), returns=torch.randn(shape), values=torch.randn(shape))


@pytest.mark.parametrize("length", [4, 20])
def test_an_update_waits_twice_a_mini_batch_however_long_its_micro_batches(length: int) -> None:
    """For the metrics, and for the gradient norm that decides whether the step is taken."""
    micro, loss = MicroBatches(rows=2), ActorLossSettings(use_kl_loss=True, entropy_coeff=0.01)
    for num_rows, mini, want in ((8, 8, 2), (8, 4, 4), (16, 8, 4)):
        actor, critic = (
            make_actor(mini=mini, micro=micro, compute=NPU, loss=loss),
            make_critic(mini=mini, micro=micro, compute=NPU),
        )
        batch = with_log_probs(batch_of(num_rows, length), actor)
        assert waits(lambda actor=actor, batch=batch: actor.update(batch, step=1)) == want
        assert waits(lambda critic=critic, batch=batch: critic.update(batch, step=1)) == want


def test_passes_without_gradient_wait_for_their_results_only() -> None:
    """Log-probs and entropies, values and final values: two results a micro-batch."""
    micro = MicroBatches(rows=2)
    actor, critic = make_actor(micro=micro, compute=NPU), make_critic(micro=micro, compute=NPU)
    for num_rows in (4, 8):
        batch = batch_of(num_rows, 12)
        assert waits(lambda batch=batch: actor.log_probs(batch)) == num_rows // 2 * 2
        assert waits(lambda batch=batch: critic.values(batch)) == num_rows // 2 * 2


def test_supervised_training_waits_twice_a_step() -> None:
    model = Supervised(policy(), compute=NPU, optim=OptimSettings(lr=1e-3), micro=MicroBatches(rows=2))
    examples = [SFTExample(str(i), (1, 2, 3, 4 + i), (False, True, True, True)) for i in range(8)]
    assert waits(lambda: model.update(examples)) == 2


@pytest.mark.parametrize(("options", "each_step"), [({}, 0), ({"top_k": 5}, 0), ({"top_p": 0.9}, 1)])
def test_decoding_waits_every_eighth_step(options: dict[str, float], each_step: int) -> None:
    """Only top_p asks a question of the host in every step: whether the likeliest words it looked at are enough."""
    model = tiny_lm(vocab_size=300).to("npu")  # more words than top_p looks at first
    engine = loaded(BuiltinEngine, model, end_token_ids=(), pad_token_id=0, max_model_len=64)
    found = {}
    for tokens in (9, 17, 33):
        sampling = SamplingParams(max_tokens=tokens, n=2, **options)
        found[tokens] = waits(lambda sampling=sampling: engine.generate(requests_of([[1, 2], [3, 4, 5]], sampling)))
        assert engine.stats.decode_steps == tokens - 1
    looks = {a: found[b] - found[a] - each_step * (b - a) for a, b in ((9, 17), (17, 33))}
    assert looks == {9: 1, 17: 2}, found
    assert found[9] <= 12 + 9 * each_step
