"""Losses with one ratio for a whole response: GSPO and GMPO. Their rows must be whole, as they are in micro-batches.

Both are meant for `loss_agg_mode=seq-mean-token-mean`, where the mean over a row's equal values is the row's value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.core.policy_losses.inputs import MAX_LOG_RATIO, POLICY_LOSSES, LossInputs, ratio_stats


@POLICY_LOSSES.register("gspo")
def sequence_clip(x: LossInputs, *, clip_ratio_low: float, clip_ratio_high: float) -> tuple[Tensor, dict[str, Tensor]]:
    """GSPO: the ratio of the response to the power of 1 / its length is clipped, for all its tokens together.

        s    = exp(mean over the row's tokens of (log_prob - old_log_prob))
        s_t  = stop_gradient(s) * exp(log_prob_t - stop_gradient(log_prob_t))
        loss = max(-A_t * s_t, -A_t * clip(s_t, 1 - clip_ratio_low, 1 + clip_ratio_high))

    s_t has the value s and the gradient of its own token. So advantages may differ from token to token (the paper's
    GSPO-token), and with one advantage a row the mean over the row has value and gradient of the paper's sequence
    objective: d s / d log_prob_t = s / |row|. A mean over all tokens (token-mean) would weigh a row by its length.

    s lies very near 1, since it is a geometric mean: the paper clips at 3e-4 and 4e-4, where 0.2 never acts.

    Returns (loss, stats), everything (b, T) f32; masked positions hold 0. stats, without gradient: `pg_clipfrac` 1 on
    the tokens of clipped rows, `ppo_kl`, `ratio` (of tokens).

    Zheng et al. 2025, https://arxiv.org/abs/2507.18071. The mean log-ratio is held within +-20 (verl: at most 10).
    """
    token_log_ratio = torch.where(x.response_mask, x.log_probs - x.old_log_probs, 0.0)
    shared = x.row_mean(token_log_ratio.detach())
    # Exactly 0 in value; in this order, so that the sum with `shared` does not round.
    own = token_log_ratio - token_log_ratio.detach()
    log_ratio = torch.where(x.response_mask, shared + own, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio, advantages = log_ratio.exp(), x.true_advantages()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_ratio_low, 1.0 + clip_ratio_high)
    with torch.no_grad():
        stats = ratio_stats(x.log_ratio()) | {"pg_clipfrac": (clipped > unclipped).to(ratio.dtype)}
    return torch.maximum(unclipped, clipped), stats


@POLICY_LOSSES.register("geo_mean")
def geometric_mean(x: LossInputs, *, clip_ratio_low: float, clip_ratio_high: float) -> tuple[Tensor, dict[str, Tensor]]:
    """GMPO: the geometric mean of the tokens' ratios, each clipped on the side that its advantage pushes to.

        A    = mean over the row's tokens of their advantages
        l_t  = log_prob_t - old_log_prob_t
        l_t  = min(l_t, clip_ratio_high)  where A > 0,        max(l_t, -clip_ratio_low)  where A <= 0
        loss = -A * exp(mean over the row's tokens of l_t)                    the same number on each token of the row

    The bounds are of the log-ratio, unlike elsewhere; the paper's are 0.4, ratios of 0.67 and 1.49. A clipped token has
    no gradient, and the others of its row keep theirs. The loss is defined for one advantage a row; where they differ
    (gae), their mean stands for all, in weight and sign. (verl takes each token's own sign, so that the tokens of one
    row are clipped in opposite directions around one advantage.)

    Returns (loss, stats), everything (b, T) f32; masked positions hold 0. stats, without gradient: `pg_clipfrac` 1
    where a token's clip acts, `ppo_kl`, `ratio` (of tokens).

    Zhao et al. 2025, https://arxiv.org/abs/2507.20673.
    """
    log_ratio = x.log_ratio()
    advantage = x.row_mean(x.true_advantages())
    held = torch.where(advantage > 0, log_ratio.clamp(max=clip_ratio_high), log_ratio.clamp(min=-clip_ratio_low))
    loss = -advantage * x.row_mean(held).exp()
    with torch.no_grad():
        acts = (held != log_ratio) & (advantage != 0)
        stats = ratio_stats(log_ratio) | {"pg_clipfrac": acts.to(log_ratio.dtype)}
    return torch.where(x.response_mask, loss, 0.0), stats
