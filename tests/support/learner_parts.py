"""Two-layer models and hand-made batches for the tests of the learner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForTokenClassification

from steepest.core.batch import Batch, RowStatus
from steepest.core.policy_losses import ppo_clip
from steepest.core.reducer import Reducer
from steepest.learner.actor import Actor
from steepest.learner.critic import Critic
from steepest.learner.micro_batches import MicroBatches
from steepest.learner.mini_batches import UpdateSettings
from steepest.learner.optim import OptimSettings
from steepest.learner.trainable import ComputeSettings
from steepest.models.causal_lm import CausalLM
from steepest.models.tiny import init_weights
from steepest.models.value_head import ValueModel

ActorT = TypeVar("ActorT", bound=Actor)
CriticT = TypeVar("CriticT", bound=Critic)

VOCABULARY = 23
CPU = ComputeSettings()
VANILLA = partial(ppo_clip, clip_ratio_low=0.2, clip_ratio_high=0.2, clip_ratio_c=3.0)


def config(**changes: Any) -> Qwen2Config:
    base: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    return Qwen2Config(**{**base, **changes})


def policy(seed: int = 0) -> CausalLM:
    hf = Qwen2ForCausalLM(config())
    init_weights(hf, seed)
    return CausalLM(hf)


def value_model(seed: int = 0, *, zero_head: bool = True) -> ValueModel:
    """Head at zero as after loading; with zero_head=False a random head, so that gradients reach the backbone."""
    torch.manual_seed(seed)
    model = ValueModel(Qwen2ForTokenClassification(config(num_labels=1)))
    if zero_head:
        model.reset_head()
    else:
        torch.nn.init.normal_(model.score.weight, std=0.3)
    return model


def make_batch(seed: int = 0) -> Batch:
    """8 rows, unequal lengths; row 2 is left out of the training, row 4 has two tool tokens inside its response."""
    g = torch.Generator().manual_seed(seed)
    prompt_lengths, response_lengths = [3, 5, 2, 4, 6, 1, 3, 2], [7, 2, 5, 9, 8, 1, 4, 6]

    def ids(n: int) -> list[int]:
        return torch.randint(VOCABULARY, (n,), generator=g).tolist()

    batch = Batch.from_sequences(
        [ids(n) for n in prompt_lengths],
        [ids(n) for n in response_lengths],
        group_ids=list(range(8)),
        truncated=[False] * 8,
        response_mask=[[not (row == 4 and t in (3, 4)) for t in range(n)] for row, n in enumerate(response_lengths)],
    )
    batch.leave_out(torch.arange(8) == 2, RowStatus.REWARD_FAILED)

    def noise(scale: float) -> Tensor:
        return torch.randn(batch.loss_mask.shape, generator=g).mul(scale).masked_fill(~batch.loss_mask, 0.0)

    return replace(batch, advantages=noise(1.0), returns=noise(1.0), values=noise(0.3))


def left_out(batch: Batch) -> Batch:
    """The same batch, of which no row is trained."""
    batch = replace(batch)
    batch.leave_out(torch.ones(len(batch), dtype=torch.bool), RowStatus.TRUNCATED)
    return batch


def with_log_probs(batch: Batch, actor: Actor, *, shift: float = 0.0) -> Batch:
    """old and reference log-probs: the actor's, moved by seeded noise of size `shift`."""
    log_probs, entropies = actor.log_probs(batch)
    g = torch.Generator().manual_seed(99)

    def moved() -> Tensor:
        return (log_probs + shift * torch.randn(log_probs.shape, generator=g)).masked_fill(~batch.trained_mask, 0.0)

    return replace(batch, old_log_probs=moved(), ref_log_probs=moved(), entropies=entropies)


def make_actor(
    *, kind: Callable[..., ActorT] = Actor, lr: float = 1e-3, mini: int = 8, micro: MicroBatches | None = None,
    seed: int = 0, epochs: int = 1, **more: Any,
) -> ActorT:  # fmt: skip
    optim = more.pop("optim", None) or OptimSettings(lr=lr)
    update = UpdateSettings(mini_batch_rows=mini, micro=micro or MicroBatches(), epochs=epochs)
    return kind(
        policy(seed),
        more.pop("policy_loss", VANILLA),
        compute=more.pop("compute", CPU),
        optim=optim,
        update=more.pop("update", update),
        **more,
    )


def make_critic(
    *, kind: Callable[..., CriticT] = Critic, lr: float = 1e-3, mini: int = 8, micro: MicroBatches | None = None,
    **more: Any,
) -> CriticT:  # fmt: skip
    update = UpdateSettings(mini_batch_rows=mini, micro=micro or MicroBatches())
    return kind(
        value_model(zero_head=more.pop("zero_head", True)),
        compute=more.pop("compute", CPU),
        optim=OptimSettings(lr=lr),
        update=update,
        **more,
    )


def record_gradients(trainable: Actor | Critic) -> list[dict[str, Tensor]]:
    """Every later optimizer step first leaves a copy of its gradients in the list."""
    found: list[dict[str, Tensor]] = []
    step = trainable.optimizer.step

    def recording(reducer: Reducer) -> tuple[float, bool]:
        found.append({n: p.grad.clone() for n, p in trainable.model.named_parameters() if p.grad is not None})
        return step(reducer)

    trainable.optimizer.step = recording
    return found


def weights(trainable: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainable.model.named_parameters()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
