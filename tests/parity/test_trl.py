"""Advantages and losses beside those of TRL's GRPOTrainer and RLOOTrainer.

TRL has no public functions for them. So its trainers are built on a tiny model, asked to generate and score for the
advantages, and given random log-probs for the loss.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steepest.core.advantages import ADVANTAGE_ESTIMATORS, AdvantageInputs
from steepest.core.aggregation import LossDenominators, aggregate
from steepest.core.policy_losses import POLICY_LOSSES, LossInputs
from tests.parity import trl_side
from tests.parity.batches import Rows, padded_batches
from tests.parity.conftest import Parity

pytestmark = pytest.mark.parity

REWARDS = [0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.5]
WIDTH = 12.0


def scored(made: Any) -> list[float]:
    """TRL's advantages of two groups of four with REWARDS."""
    prompts = [{"prompt": word} for word in ("one", "two") for _ in range(4)]
    return made._generate_and_score_completions(prompts)["advantages"].tolist()


def ours(name: str, **options: Any) -> list[float]:
    """Ours of the same: one token a response."""
    mask = torch.ones(8, 1, dtype=torch.bool)
    groups = torch.arange(2).repeat_interleave(4)
    x = AdvantageInputs(torch.tensor(REWARDS)[:, None], mask, group_ids=groups)
    return ADVANTAGE_ESTIMATORS.get(name).value(x, **options)[0][:, 0].tolist()


def test_grpo_advantages(parity: Parity, tmp_path: Path) -> None:
    plain = trl_side.trainer("grpo", tmp_path, REWARDS, scale_rewards="none")
    parity.same(
        "TRL grpo advantages without std", torch.tensor(ours("grpo", norm_by_std=False)), torch.tensor(scored(plain))
    )
    theirs = scored(trl_side.trainer("grpo", tmp_path, REWARDS))
    # the same but for the number beside the std: 1e-4 there, 1e-6 here
    parity.same("TRL grpo advantages at eps 1e-4", torch.tensor(ours("grpo", eps=1e-4)), torch.tensor(theirs))
    found = ours("grpo")
    assert found[1] == pytest.approx(0.75 / (0.5 + 1e-6)) and theirs[1] == pytest.approx(0.75 / (0.5 + 1e-4))
    parity.differs("TRL grpo advantages", "1e-4 beside the std there, 1e-6 here as in verl: 0.02 % at a std of 0.5")


def test_rloo_advantages(parity: Parity, tmp_path: Path) -> None:
    made = trl_side.trainer("rloo", tmp_path, REWARDS)
    parity.same("TRL rloo advantages", torch.tensor(ours("rloo")), torch.tensor(scored(made)))


GRPO_LOSSES = {
    # TRL's loss_type and level -> our loss, its options, our aggregation
    ("grpo", "token"): ("vanilla", {"clip_ratio_c": 1e9}, "seq-mean-token-mean"),
    ("bnpo", "token"): ("vanilla", {"clip_ratio_c": 1e9}, "token-mean"),
    ("dapo", "token"): ("vanilla", {"clip_ratio_c": 1e9}, "token-mean"),
    ("dr_grpo", "token"): ("vanilla", {"clip_ratio_c": 1e9}, "seq-mean-token-sum-norm"),
    ("grpo", "sequence"): ("gspo", {}, "seq-mean-token-mean"),
    # TRL's epsilon_high is the bound itself, and there is none below
    ("cispo", "token"): ("cispo", {"clip_ratio_low": 1.0, "clip_ratio_high": -1 + 1.28}, "token-mean"),
    ("sapo", "token"): ("sapo", {"tau_pos": 1.0, "tau_neg": 1.05}, "seq-mean-token-mean"),
}
CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}


def our_loss(r: Rows, name: str, options: dict[str, Any], mode: str) -> tuple[float, torch.Tensor]:
    log_probs = r.log_probs.clone().requires_grad_()
    per_token, _ = POLICY_LOSSES.get(name).value(
        LossInputs(log_probs, r.old_log_probs, r.advantages, r.mask), **options
    )
    loss = aggregate(per_token, r.mask, mode, LossDenominators.of(r.mask), scale_factor=WIDTH)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    return float(loss.detach()), gradient


def by_row(r: Rows) -> Rows:
    """One advantage a row, as TRL has them."""
    return replace(r, advantages=r.advantages[:, :1].expand_as(r.advantages))


@pytest.mark.parametrize(("loss_type", "level"), list(GRPO_LOSSES))
def test_grpo_losses(parity: Parity, tmp_path: Path, loss_type: str, level: str) -> None:
    high = 1.28 if loss_type == "cispo" else 0.28
    made = trl_side.trainer("grpo", tmp_path, REWARDS, loss_type=loss_type, importance_sampling_level=level,
                            epsilon=0.2, epsilon_high=high)  # fmt: skip
    made.max_completion_length = int(WIDTH)
    name, options, mode = GRPO_LOSSES[loss_type, level]
    for r in map(by_row, padded_batches()):
        loss, gradient = our_loss(r, name, options if name == "sapo" else {**CLIP, **options}, mode)
        theirs, theirs_gradient = trl_side.loss_of(made, r, r.advantages[:, 0], old_per_token_logps=r.old_log_probs)
        parity.same(f"TRL {loss_type} {level} loss", loss, theirs)
        parity.same(f"TRL {loss_type} {level} gradient", gradient, theirs_gradient)


def test_rloo_loss_at_the_first_update(parity: Parity, tmp_path: Path) -> None:
    """Before the policy moves, every clip and ratio is 1, and only the gradient is left to compare."""
    made = trl_side.trainer("rloo", tmp_path, REWARDS)
    for r in map(by_row, padded_batches()):
        r = replace(r, old_log_probs=r.log_probs)
        _, gradient = our_loss(r, "vanilla", {**CLIP, "clip_ratio_c": 3.0}, "seq-mean-token-sum")
        old = (r.log_probs * r.ones).sum(1)
        _, theirs = trl_side.loss_of(made, r, r.advantages[:, 0], old_logps=old)
        parity.same("TRL rloo gradient of the first update", gradient, theirs)


def test_rloo_has_one_ratio_a_response_in_trl(parity: Parity, tmp_path: Path) -> None:
    made = trl_side.trainer("rloo", tmp_path, REWARDS)
    for r in map(by_row, padded_batches()):
        old = (r.old_log_probs * r.ones).sum(1)
        ratio, advantage = ((r.log_probs * r.ones).sum(1) - old).exp(), r.advantages[:, 0]
        by_response = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
        theirs, _ = trl_side.loss_of(made, r, advantage, old_logps=old)
        assert theirs == pytest.approx(float(by_response))
        loss, _ = our_loss(
            r, "vanilla", {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": 1e9}, "seq-mean-token-sum"
        )
        assert abs(loss - theirs) > 1e-3
    why = "later updates: the ratio of a whole response there, a product that leaves the clip at once; a token's here"
    parity.differs("TRL rloo loss", why)
