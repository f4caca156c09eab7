"""What the configuration knows of the policy losses: their options, and what is null's meaning for each of them."""

from __future__ import annotations

CLIP_RANGES: dict[str, tuple[float, float]] = {
    "gspo": (3e-4, 4e-4),
    "geo_mean": (0.4, 0.4),
    "dppo_tv": (0.15, 0.15),
    "dppo_kl": (0.05, 0.05),
}
"""(clip_ratio_low, clip_ratio_high) of the papers, where the numbers are no bounds of a token's ratio. verl keeps PPO's
0.2, which with gspo never acts and with the others is another thing than it seems."""

RATIO_BOUNDS: dict[str, float] = {"dppo_tv": 20.0, "dppo_kl": 20.0}
"""clip_ratio_c where it bounds an importance weight, which is to be large; elsewhere it is the dual clip's 3."""
DUAL_CLIP = 3.0

MEANS_OF_ROWS = ("gspo", "geo_mean", "sapo")
"""Losses whose papers average over the tokens of a row, then over rows."""

_CLIPPED = ("vanilla", "gspo", "cispo", "clip_cov", "geo_mean", "dppo_tv", "dppo_kl")
TAKES: dict[str, tuple[str, ...]] = {
    "clip_ratio": _CLIPPED,
    "clip_ratio_low": _CLIPPED,
    "clip_ratio_high": _CLIPPED,
    "clip_ratio_c": ("vanilla", "dppo_tv", "dppo_kl"),
    "tau_pos": ("sapo",),
    "tau_neg": ("sapo",),
    "policy_loss.clip_cov_ratio": ("clip_cov",),
    "policy_loss.clip_cov_lb": ("clip_cov",),
    "policy_loss.clip_cov_ub": ("clip_cov",),
    "policy_loss.kl_cov_ratio": ("kl_cov",),
    "policy_loss.ppo_kl_coef": ("kl_cov",),
}
"""Option of `actor_rollout_ref.actor` -> the losses that take it."""


def takes(loss_mode: str, option: str) -> bool:
    """Whether a loss takes an option of TAKES. One of the user's own may take any."""
    return ":" in loss_mode or loss_mode in TAKES[option]
