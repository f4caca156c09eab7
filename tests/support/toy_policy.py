"""A task with a known optimum for the functions of core, without model or trainer: a table of logits learns to answer
with the digit that it is asked for.

Eight prompts, nine words (eight digits and the end), answers of at most three words. The reward is 1 where the first
word is the prompt's digit, whatever follows, so answers are ragged and later words are noise. An untrained table has an
accuracy of 1 in 9; it is computed from the table, not sampled. `shuffled` deals the same rewards out to other rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steepest.config.algorithms import EXTRAS
from steepest.core.advantages import ADVANTAGE_ESTIMATORS, AdvantageInputs
from steepest.core.aggregation import LossDenominators, aggregate
from steepest.core.masked import whiten
from steepest.core.policy_losses import POLICY_LOSSES, LossInputs
from steepest.core.rollout_correction import Rejection, Weighting, bypass_reinforce, correct
from steepest.core.row_selection import draw_rows, in_varied_groups, pf_ppo_weights
from steepest.core.value_losses import clipped_value_loss

DIGITS, END, WIDTH, ROLLOUTS = 8, 8, 3, 8
LEARNING_RATE, EPOCHS = 0.1, 2


@dataclass(frozen=True)
class Case:
    """An algorithm: an estimator, its usual loss, and what is done to the batch between the two."""

    name: str
    estimator: str = "grpo"
    loss: str = "vanilla"
    mode: str = "token-mean"
    estimate: dict[str, Any] = field(default_factory=dict)
    bound: dict[str, Any] = field(default_factory=dict)
    whitened: bool = False
    varied_only: bool = False
    """Groups of equal rewards are left out (DAPO's dynamic sampling)."""
    drawn_by: str | None = None
    """PF-PPO's method of drawing rows."""
    best_of: int = 1
    """The accuracy is that one of so many answers is right: what pass@k is after."""
    correction: str | None = None
    """The engine samples from a table with noise in it: "decoupled" corrects old against it, "bypass" needs no old."""


@dataclass
class Rows:
    """A step's samples; (B,) and (B, T)."""

    prompts: Tensor
    tokens: Tensor
    mask: Tensor
    rewards: Tensor
    ended: Tensor


class Table:
    """Logits of (prompt, place, word) and values of (prompt, place); the word before does not matter."""

    def __init__(self, seed: int, best_of: int = 1) -> None:
        self.best_of = best_of
        self.generator = torch.Generator().manual_seed(seed)
        self.logits = torch.zeros(DIGITS, WIDTH, END + 1, requires_grad=True)
        self.values = torch.zeros(DIGITS, WIDTH, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.logits, self.values], lr=LEARNING_RATE)

    def accuracy(self) -> float:
        """Mean probability of the right first word, in one of `best_of` answers."""
        right = self.logits[:, 0].detach().softmax(-1)[torch.arange(DIGITS), torch.arange(DIGITS)]
        return float((1.0 - (1.0 - right) ** self.best_of).mean())

    def log_probs(self, rows: Rows) -> Tensor:
        return self.logits.log_softmax(-1)[rows.prompts].gather(2, rows.tokens[:, :, None])[:, :, 0]

    def sample(self, *, noise: float, shuffled: bool) -> tuple[Rows, Tensor]:
        """ROLLOUTS answers a prompt, and the log-probs they were sampled with."""
        prompts = torch.arange(DIGITS).repeat_interleave(ROLLOUTS)
        logits = self.logits.detach()
        if noise:
            logits = logits + noise * torch.randn(logits.shape, generator=self.generator)
        probs = logits.softmax(-1)[prompts]
        tokens = torch.multinomial(probs.flatten(0, 1), 1, generator=self.generator).view(-1, WIDTH)
        ends = tokens == END
        mask = (ends.cumsum(1) - ends.long()) == 0  # up to the first end, which counts
        hit = (tokens[:, 0] == prompts).float()
        if shuffled:
            hit = hit[torch.randperm(len(hit), generator=self.generator)]
        ended = (ends & mask).any(1).float()
        rows = Rows(prompts, tokens, mask, _on_last_token(hit, mask), ended)
        return rows, probs.log().gather(2, tokens[:, :, None])[:, :, 0]

    def greedy_rewards(self, prompts: Tensor) -> Tensor:
        """(B,) the reward of each prompt's likeliest answer."""
        return (self.logits[:, 0].detach().argmax(-1)[prompts] == prompts).float()

    def sum_pi_squared(self, prompts: Tensor) -> Tensor:
        return (self.logits.detach().softmax(-1) ** 2).sum(-1)[prompts]


def _on_last_token(reward: Tensor, mask: Tensor) -> Tensor:
    last = torch.arange(WIDTH) == mask.sum(1, keepdim=True) - 1
    return torch.where(last, reward[:, None], 0.0)


def estimate(case: Case, table: Table, rows: Rows, old: Tensor) -> tuple[Tensor, Tensor]:
    """Advantages and returns of the case's estimator."""
    fields: dict[str, Callable[[], Tensor]] = {
        "values": lambda: table.values.detach()[rows.prompts],
        "group_ids": lambda: rows.prompts,
        "old_log_probs": lambda: old,
        "sum_pi_squared": lambda: table.sum_pi_squared(rows.prompts),
        "reward_baselines": lambda: table.greedy_rewards(rows.prompts),
        "named_rewards": lambda: torch.stack([rows.rewards.sum(1), rows.ended], dim=1),
    }
    entry = ADVANTAGE_ESTIMATORS.get(case.estimator)
    given = {name: fields[name]() for name in entry.spec.needs if name not in EXTRAS}
    extras = {name: fields[name]() for name in entry.spec.needs if name in EXTRAS}
    x = AdvantageInputs(rows.rewards, rows.mask, **given, extras=extras)
    advantages, returns = entry.value(x, **case.estimate)
    whitened = case.whitened or entry.spec.whitened
    return (whiten(advantages, rows.mask) if whitened else advantages), returns


def train(case: Case, *, steps: int, seed: int = 0, shuffled: bool = False) -> list[float]:
    """The accuracy before the first and after every step."""
    table = Table(seed, case.best_of)
    curve = [table.accuracy()]
    for step in range(steps):
        rows, sampled_with = table.sample(noise=0.5 if case.correction else 0.0, shuffled=shuffled)
        old = sampled_with if case.correction == "bypass" else table.log_probs(rows).detach()
        advantages, returns = estimate(case, table, rows, old)
        kept, weights = rows.mask, torch.ones_like(old)
        if case.varied_only:
            kept = kept & in_varied_groups(rows.rewards.sum(1), rows.prompts, rows.mask.any(1))[:, None]
        if case.correction == "decoupled":
            made = correct(
                sampled_with, old, kept, weighting=Weighting("token"), rejections=[Rejection("seq_sum_k3", 2.0)]
            )
            assert made.weights is not None
            kept, weights = made.kept, made.weights
        drawn = slice(None) if case.drawn_by is None else _drawn(case.drawn_by, rows, step)
        part = Rows(rows.prompts[drawn], rows.tokens[drawn], kept[drawn], rows.rewards[drawn], rows.ended[drawn])
        values = table.values.detach()[part.prompts]
        for _ in range(EPOCHS):
            update(case, table, part, old[drawn], advantages[drawn], weights[drawn], values, returns[drawn])
        curve.append(table.accuracy())
    return curve


def _drawn(method: str, rows: Rows, step: int) -> Tensor:
    weights = pf_ppo_weights(rows.rewards.sum(1), rows.mask.any(1), method=method)
    return draw_rows(weights, step)


def update(case: Case, table: Table, rows: Rows, old: Tensor, advantages: Tensor, weights: Tensor, old_values: Tensor,
           returns: Tensor) -> None:  # fmt: skip
    """One step of Adam on policy loss and, where there is a critic, value loss."""
    x = LossInputs(table.log_probs(rows), old, advantages, rows.mask)
    if case.correction == "bypass":
        per_token, _ = bypass_reinforce(x, weighting=Weighting("sequence", high=5.0))
    else:
        per_token, _ = POLICY_LOSSES.get(case.loss).value(x, **case.bound)
    counts = LossDenominators.of(rows.mask)
    loss = aggregate(per_token * weights, rows.mask, case.mode, counts, scale_factor=float(WIDTH))
    if ADVANTAGE_ESTIMATORS.get(case.estimator).spec.needs_critic:
        of_values, _ = clipped_value_loss(
            table.values[rows.prompts], old_values, returns, cliprange_value=0.5, response_mask=rows.mask
        )
        loss = loss + aggregate(of_values, rows.mask, "token-mean", counts)
    table.optimizer.zero_grad()
    loss.backward()
    table.optimizer.step()


CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2}
PPO = {**CLIP, "clip_ratio_c": 3.0}
GAE = {"gamma": 1.0, "lam": 0.95}
ROW = "seq-mean-token-mean"

CASES = [
    Case("ppo", "gae", bound=PPO, estimate=GAE, whitened=True),
    Case("grpo", bound=PPO, mode=ROW),
    Case("dr_grpo", bound=PPO, estimate={"norm_by_std": False}, mode="seq-mean-token-sum-norm"),
    Case("dapo", bound={**PPO, "clip_ratio_high": 0.28}, varied_only=True),
    Case("gspo", loss="gspo", bound={"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}, mode=ROW),
    Case("sapo", loss="sapo", bound={"tau_pos": 1.0, "tau_neg": 1.05}, mode=ROW),
    Case("clip_cov", loss="clip_cov", bound={**CLIP, "clip_cov_ratio": 0.02, "clip_cov_lb": 0.5, "clip_cov_ub": 5.0}),
    Case("kl_cov", loss="kl_cov", bound={"kl_cov_ratio": 0.02, "ppo_kl_coef": 0.1}),
    Case("gmpo", loss="geo_mean", bound={"clip_ratio_low": 0.4, "clip_ratio_high": 0.4}, mode=ROW),
    Case("cispo", loss="cispo", bound={"clip_ratio_low": 1.0, "clip_ratio_high": 0.2}),
    Case("dppo_tv", loss="dppo_tv", bound={"clip_ratio_low": 0.15, "clip_ratio_high": 0.15, "clip_ratio_c": 20.0}),
    Case("dppo_kl", loss="dppo_kl", bound={"clip_ratio_low": 0.05, "clip_ratio_high": 0.05, "clip_ratio_c": 20.0}),
    Case("rloo", "rloo", bound=PPO),
    Case("reinforce_plus_plus", "reinforce_plus_plus", bound=PPO, estimate={"gamma": 1.0}),
    Case("reinforce_plus_plus_baseline", "reinforce_plus_plus_baseline", bound=PPO),
    Case("opo", "opo", bound=PPO),
    Case("remax", "remax", bound=PPO),
    Case("gdpo", "gdpo", bound=PPO),
    Case("gpg", "gpg", "gpg"),
    Case("grpo_passk", "grpo_passk", bound=PPO, best_of=ROLLOUTS),
    Case("optimal_token_baseline", "optimal_token_baseline", bound=PPO),
    Case("vapo", "gae", bound={**PPO, "clip_ratio_high": 0.28}, whitened=True,
         estimate={"gamma": 1.0, "lam": 1.0, "lam_critic": 1.0, "length_adaptive_alpha": 0.5}),
    Case("pf_ppo", bound=PPO, drawn_by="max_random"),
    Case("rollout_correction", bound=PPO, correction="decoupled"),
    Case("rollout_correction_bypass", correction="bypass"),
]  # fmt: skip
