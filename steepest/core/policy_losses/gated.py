"""SAPO: a soft gate in the place of PPO's clip."""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.core.policy_losses.inputs import POLICY_LOSSES, LossInputs, ratio_stats


@POLICY_LOSSES.register("sapo")
def soft_gate(x: LossInputs, *, tau_pos: float, tau_neg: float) -> tuple[Tensor, dict[str, Tensor]]:
    """SAPO: a sigmoid of the ratio, with which the gradient of a token decreases smoothly instead of being cut to 0.

        ratio = exp(log_prob - old_log_prob)
        tau   = tau_pos where A > 0, tau_neg elsewhere
        loss  = -A * 4 / tau * sigmoid(tau * (ratio - 1))

    The gradient is -A * ratio * 4 * sigmoid' there, and 4 * sigmoid'(0) = 1: at ratio 1 it is the plain policy
    gradient, whatever tau is. The value at ratio 1 is -A * 2 / tau, so losses with different tau are not comparable. A
    larger tau decreases faster; tau_neg above tau_pos restrains tokens of negative advantage more, because they change
    the probabilities of all other tokens.

    Returns (loss, stats), everything (b, T) f32; masked positions hold 0. stats, without gradient: `ppo_kl`, `ratio`.

    Gao et al. 2025, https://arxiv.org/abs/2511.20347, which averages over the tokens of a row and then over rows.
    """
    log_ratio, advantages = x.log_ratio(), x.true_advantages()
    taus = torch.where(advantages > 0, advantages.new_tensor(tau_pos), advantages.new_tensor(tau_neg))
    gate = 4.0 / taus * torch.sigmoid(taus * (log_ratio.exp() - 1.0))
    return -advantages * gate, ratio_stats(log_ratio)
