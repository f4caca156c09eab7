"""Every policy loss with options, and inputs to try them on. For the tests of policy losses."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from steepest.core.policy_losses import POLICY_LOSSES, LossInputs

OPTIONS: dict[str, dict[str, float]] = {
    "vanilla": {"clip_ratio_low": 0.2, "clip_ratio_high": 0.3, "clip_ratio_c": 3.0},
    "gspo": {"clip_ratio_low": 0.1, "clip_ratio_high": 0.2},
    "sapo": {"tau_pos": 1.0, "tau_neg": 1.5},
    "gpg": {},
    "clip_cov": {
        "clip_ratio_low": 0.2,
        "clip_ratio_high": 0.3,
        "clip_cov_ratio": 0.2,
        "clip_cov_lb": 0.1,
        "clip_cov_ub": 2.0,
    },
    "kl_cov": {"kl_cov_ratio": 0.2, "ppo_kl_coef": 0.7},
    "geo_mean": {"clip_ratio_low": 0.3, "clip_ratio_high": 0.4},
    "cispo": {"clip_ratio_low": 0.3, "clip_ratio_high": 0.2},
    "dppo_tv": {"clip_ratio_low": 0.1, "clip_ratio_high": 0.15, "clip_ratio_c": 2.0},
    "dppo_kl": {"clip_ratio_low": 0.03, "clip_ratio_high": 0.05, "clip_ratio_c": 2.0},
}
NAMES = sorted(OPTIONS)


def loss_of(name: str, **options: float) -> Any:
    """A registered loss with the options above, some replaced."""
    return partial(POLICY_LOSSES.get(name).value, **{**OPTIONS[name], **options})


def tokens(ratios: list[float], advantages: list[float], *, old: float = -1.0) -> LossInputs:
    """One row of tokens with these ratios; each had log-prob `old` before the update."""
    log_probs = torch.tensor([[math.log(ratio) + old for ratio in ratios]], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, len(ratios), dtype=torch.bool)
    return LossInputs(log_probs, torch.full_like(log_probs, old), torch.tensor([advantages], dtype=torch.float64), mask)


def gradient(loss: Tensor, x: LossInputs) -> Tensor:
    """d loss / d log_probs."""
    (found,) = torch.autograd.grad(loss, x.log_probs)
    return found


def random_inputs(seed: int, *, size: tuple[int, int] = (5, 6), spread: float = 0.4) -> LossInputs:
    """float64, log-probs below 0, ratios around 1; NaN, inf and numbers whose exp() overflows at every masked position,
    and the last row masked as a whole."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(size, generator=g) < 0.7
    mask[0, 0], mask[-1] = True, False
    junk = torch.tensor([math.nan, math.inf, 1e4])[torch.randint(0, 3, size, generator=g)].double()
    old = -torch.rand(size, generator=g).double() * 3 - 0.01
    new = (old + spread * torch.randn(size, generator=g).double()).clamp(max=-1e-3)
    # one advantage a row, as the losses of whole responses are defined
    advantages = torch.randn(size[0], 1, generator=g).double().expand(size)
    fields = [torch.where(mask, value, junk) for value in (new, old, advantages)]
    return LossInputs(fields[0].requires_grad_(), fields[1], fields[2], mask)
