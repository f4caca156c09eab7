"""The actor: log-probs of a batch, and the policy update."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from steepest.core.aggregation import LossDenominators, aggregate
from steepest.core.batch import Batch
from steepest.core.kl import kl_estimate
from steepest.core.masked import masked_mean
from steepest.core.policy_losses import LossInputs
from steepest.learner.metrics import Means, Metrics, Sums
from steepest.learner.micro_batches import MicroBatches
from steepest.learner.mini_batches import UpdateSettings
from steepest.learner.optim import OptimSettings
from steepest.learner.trainable import ComputeSettings, MicroBatch, Trainable
from steepest.learner.update_plan import Cut, MiniBatch, UpdatePlan, plan_update
from steepest.models.causal_lm import CausalLM
from steepest.models.packing import scatter
from steepest.models.passes import DistributionsFound, ExactKL, LogProbs, Scores

PolicyLoss = Callable[[LossInputs], tuple[Tensor, dict[str, Tensor]]]
Choice = Callable[[LossInputs], Tensor]
"""Which tokens (b, T) bool of a whole mini-batch a loss treats otherwise."""


class KLReference(Protocol):
    """A reference whose distributions the exact KL is taken to."""

    def distributions(self, part: MicroBatch) -> DistributionsFound: ...
    def take_flops(self) -> float: ...


@dataclass(frozen=True)
class ActorLossSettings:
    """What is minimised: pg_loss - entropy_coeff * entropy + kl_loss_coef * kl, each aggregated by `loss_agg_mode`."""

    loss_agg_mode: str = "token-mean"
    loss_scale_factor: float | None = None
    """Divisor of seq-mean-token-sum-norm."""
    entropy_coeff: float = 0.0
    use_kl_loss: bool = False
    """Add the KL to the reference to the loss; needs batch.ref_log_probs, or `Actor.reference` where it is exact."""
    kl_loss_coef: float = 0.001
    kl_loss_type: str = "low_var_kl"
    """An estimator of `core.kl`, or "full": the exact KL over the vocabulary at each token."""

    @property
    def exact_kl(self) -> bool:
        return self.use_kl_loss and self.kl_loss_type == "full"


class PolicyPasses(Trainable[CausalLM]):
    """Log-probs of a batch's responses: what actor and reference have in common."""

    temperature: float
    forward: MicroBatches

    def _scores(self, part: MicroBatch, request: LogProbs | ExactKL) -> Scores:
        """The answer to `request` for one micro-batch, each tensor as (b, T) f32; 0 where a token is no target."""
        with self.autocast():
            found: Scores = self.run(request)
        entropies, squares, kl = (None if x is None else scatter(x, part.packed, part.shape) for x in found[1:4])
        return Scores(scatter(found.log_probs, part.packed, part.shape), entropies, squares, kl, found.flops)

    @torch.no_grad()
    def _batch_scores(
        self, batch: Batch, cut: Cut | None, *, with_entropy: bool, with_squares: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(log-probs, entropies, squares), each (B, T) f32 on the CPU; 0 where they were not asked for."""
        log_probs, entropies, squares = (torch.zeros(batch.responses.shape, dtype=torch.float32) for _ in range(3))
        mask = batch.trained_mask
        for part in self.micro_batches(batch, self.cut(batch, self.forward, mask) if cut is None else cut, mask):
            with self.memory("log-probs", part, self.forward):
                found = self._scores(part, LogProbs(part.packed, self.temperature, with_entropy, with_squares))
            for target, value in zip((log_probs, entropies, squares), found[:3], strict=True):
                if value is not None:
                    part.write(value, target)
        return log_probs, entropies, squares


class Actor(PolicyPasses):
    """The policy in training.

    `policy_loss` is an entry of core's POLICY_LOSSES with its options bound; `choose` is the same entry's function that
    picks tokens over the whole mini-batch, if it has one. `temperature` is the one that responses were sampled with.
    `forward` cuts the pass without gradient, `update.micro` the one with.
    """

    role = "actor"
    reference: KLReference | None = None
    """Reference for the exact KL in the update; set by `assembly.roles`, which builds both."""

    def __init__(
        self,
        model: CausalLM,
        policy_loss: PolicyLoss,
        *,
        compute: ComputeSettings,
        optim: OptimSettings,
        update: UpdateSettings,
        loss: ActorLossSettings | None = None,
        forward: MicroBatches | None = None,
        temperature: float = 1.0,
        choose: Choice | None = None,
    ) -> None:
        super().__init__(model, compute=compute, optim=optim)
        self.policy_loss, self.choose = policy_loss, choose
        self.loss, self.settings = loss or ActorLossSettings(), update
        self.forward, self.temperature = forward or update.micro, temperature

    def log_probs(self, batch: Batch, cut: Cut | None = None) -> tuple[Tensor, Tensor]:
        """(log_probs, entropies), both (B, T) f32 on the CPU, without gradient; 0 where trained_mask is false.

        Reads tokens, lengths and trained_mask. The code path is that of `update`, so the ratio of the first
        mini-batch is 1 up to float32 rounding (exactly 1 when both passes are cut alike). `cut` is this rank's plan of
        the passes (`plan_passes` by `forward` over trained_mask); 0 in rows that it does not name. None: one process.
        """
        return self._batch_scores(batch, cut, with_entropy=True)[:2]

    def log_probs_and_squares(self, batch: Batch, cut: Cut | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """`log_probs`, and of the same distributions the sum of the squared probabilities, all (B, T) f32."""
        return self._batch_scores(batch, cut, with_entropy=True, with_squares=True)

    def take_flops(self) -> float:
        """See Trainable; the passes of the reference in the update count too."""
        return super().take_flops() + (0.0 if self.reference is None else self.reference.take_flops())

    def may_skip_log_probs(self, num_rows: int) -> bool:
        """Whether the pass before the update is redundant: with one optimizer step a batch, the log-probs of the
        update itself are the old ones."""
        return self.settings.num_updates(num_rows) == 1

    def update(self, batch: Batch, *, step: int) -> Metrics:
        """`update_by` with the plan of one process for training step `step`."""
        (plan,) = plan_update(batch, self.settings, step, shares_prompts=self.compute.shares_prompts)
        return self.update_by(batch, plan)

    def update_by(self, batch: Batch, plan: UpdatePlan) -> Metrics:
        """One PPO update: epochs x mini-batches, an optimizer step each, as the plan says.

        Reads tokens, loss_mask, advantages, old_log_probs, ref_log_probs (with use_kl_loss, unless it is exact),
        entropies, rollout_is_weights (factors of the policy loss, where there are any). With old_log_probs None
        (allowed when `may_skip_log_probs`) the update's own log-probs stand in for them, and are written there: those
        of the rows in the plan, 0 elsewhere.

        Metrics: first the mean over a mini-batch, then over mini-batches. `pg_loss`, `entropy_loss`, `kl_loss` are
        aggregated by loss_agg_mode, without their coefficients; `pg_clipfrac`, `pg_clipfrac_lower`, `ppo_kl` and
        other stats of the loss are means over the tokens of loss_mask. `grad_norm` is before clipping, over steps
        taken; `skipped_steps` counts the others. `entropy` is that of the policy before the update, over the batch's
        loss_mask; without batch.entropies the update measures it, over that of its first mini-batch. `lr` is the rate
        of this step. `ratio_max_dev_first` = max |ratio - 1| before the first step.

        On several ranks each has the whole batch, its own plan, and gets the same metrics. A mini-batch without any
        token of loss_mask is in no plan: no step, no metric. Raises ValueError when a field that is needed is None.
        """
        self._require_fields(batch)
        means, metrics = Means(), self._old_entropy(batch)
        own = torch.zeros(batch.responses.shape) if batch.old_log_probs is None else None
        for mini in plan.mini_batches:
            loss = _MiniBatchLoss(self, mini.denominators, first=_RATIO not in metrics, seed=mini.seed, own=own)
            parts = self._parts_and_choice(batch, mini, loss, alone=plan.ranks == 1 and len(mini.micro) == 1)
            found = self.accumulate(parts, loss, self.settings.micro)
            metrics |= {name: found.pop(name) for name in _ONCE if name in found}
            means.add(found)
            self.step("actor", means)
        if own is not None:
            batch.old_log_probs = own
        if self.loss.use_kl_loss:
            metrics["actor/kl_coef"] = self.loss.kl_loss_coef
        return metrics | means.read() | self.finish_iteration("actor")

    def _parts_and_choice(
        self, batch: Batch, mini: MiniBatch, loss: _MiniBatchLoss, *, alone: bool
    ) -> Iterable[MicroBatch]:
        """The micro-batches of a mini-batch. A loss that picks tokens gets its choice over the whole mini-batch: by a
        pass of its own that reads the log-probs of the policy as it is now, unless one micro-batch is `alone`."""
        made = self.micro_batches(batch, mini.micro, batch.loss_mask)
        if self.choose is None:
            return made
        parts, rows = list(made), torch.tensor(mini.rows)
        if not alone:
            whole = batch.select(rows)
            log_probs = self.reducer.sum(self._log_probs_of(parts, batch)[rows])
            old = log_probs if whole.old_log_probs is None else whole.old_log_probs
            assert whole.advantages is not None
            loss.chosen = torch.zeros_like(batch.loss_mask)
            loss.chosen[rows] = self.choose(
                LossInputs(log_probs, old, whole.advantages, whole.loss_mask, seed=loss.seed)
            )
        return parts

    @torch.no_grad()
    def _log_probs_of(self, parts: Sequence[MicroBatch], batch: Batch) -> Tensor:
        found = torch.zeros(batch.responses.shape, dtype=torch.float32)
        for part in parts:
            with self.memory("log-probs", part, self.settings.micro):
                part.write(self._scores(part, LogProbs(part.packed, self.temperature)).log_probs, found)
        return found

    def _scores_and_kl(self, part: MicroBatch, *, with_entropy: bool) -> Scores:
        """Log-probs, and the exact KL where the loss has it: all from one pass, and one of the reference."""
        if not self.loss.exact_kl:
            return self._scores(part, LogProbs(part.packed, self.temperature, with_entropy))
        assert self.reference is not None
        reference = self.reference.distributions(part)
        return self._scores(part, ExactKL(part.packed, reference, self.temperature, with_entropy))

    def _old_entropy(self, batch: Batch) -> Metrics:
        if batch.entropies is None or not batch.loss_mask.any():
            return {}
        return {"actor/entropy": float(masked_mean(batch.entropies, batch.loss_mask))}

    def _require_fields(self, batch: Batch) -> None:
        if batch.advantages is None:
            raise ValueError("actor update: batch.advantages is None; estimate advantages first")
        if batch.old_log_probs is None and not self.may_skip_log_probs(len(batch)):
            raise ValueError(
                f"actor update: batch.old_log_probs is None, but {self.settings.num_updates(len(batch))} optimizer "
                "steps follow from this batch; from the second on the old log-probs are needed"
            )
        if self.loss.exact_kl and self.reference is None:
            raise ValueError("actor update: Actor.reference is None, but the exact KL (kl_loss_type full) reads it")
        if self.loss.use_kl_loss and not self.loss.exact_kl and batch.ref_log_probs is None:
            raise ValueError("actor update: batch.ref_log_probs is None, but the KL loss needs them")


_RATIO = "actor/ratio_max_dev_first"
_ONCE = (_RATIO, "actor/entropy")


@dataclass
class _MiniBatchLoss:
    """The loss of one micro-batch, scaled so that the sum over micro-batches is the mini-batch's loss."""

    actor: Actor
    denominators: LossDenominators
    first: bool
    """The mini-batch before whose step the policy is still the old one."""
    seed: int
    """Of the loss's random choices."""
    own: Tensor | None
    """(B, T) f32 on the CPU, takes the log-probs where the batch has no old ones; None where it has."""
    loss: ActorLossSettings = field(init=False)
    chosen: Tensor | None = None
    """(B, T) bool on the CPU, the tokens that the loss picked over the mini-batch; None: it picks none, or the
    mini-batch is one micro-batch."""

    def __post_init__(self) -> None:
        self.loss = self.actor.loss

    def __call__(self, part: MicroBatch, sums: Sums) -> Tensor:
        batch, mask = part.batch, part.batch.loss_mask
        measures_entropy = self.first and batch.entropies is None
        with_entropy = measures_entropy or self.loss.entropy_coeff != 0.0
        log_probs, entropies, _, kl, _ = self.actor._scores_and_kl(part, with_entropy=with_entropy)
        old_log_probs = log_probs.detach() if batch.old_log_probs is None else batch.old_log_probs
        if self.own is not None:
            part.write(old_log_probs, self.own)
        assert batch.advantages is not None
        chosen = self._chosen(part)
        inputs = LossInputs(log_probs, old_log_probs, batch.advantages, mask, chosen, self.seed)
        per_token, stats = self.actor.policy_loss(inputs)
        if batch.rollout_is_weights is not None:  # of old over rollout; the loss's own ratio is training over old
            per_token = per_token * batch.rollout_is_weights
        total = self._aggregate("actor/pg_loss", per_token, mask, sums)
        for name, values in stats.items():
            if name != "ratio":
                self._token_mean(f"actor/{name}", values, mask, sums)
        if self.first:
            ratio = (log_probs.detach() - old_log_probs).masked_fill(~mask, 0.0).exp()
            sums.take_max(_RATIO, (ratio - 1.0).abs().max())
        if entropies is not None:
            if measures_entropy:
                self._token_mean("actor/entropy", entropies, mask, sums)
            if self.loss.entropy_coeff != 0.0:
                entropy = self._aggregate("actor/entropy_loss", entropies, mask, sums)
                total = total - self.loss.entropy_coeff * entropy
        if self.loss.use_kl_loss:
            if kl is None:
                assert batch.ref_log_probs is not None
                kl = kl_estimate(log_probs, batch.ref_log_probs, self.loss.kl_loss_type, response_mask=mask)
            total = total + self.loss.kl_loss_coef * self._aggregate("actor/kl_loss", kl, mask, sums)
        return total

    def _chosen(self, part: MicroBatch) -> Tensor | None:
        if self.chosen is None:
            return None
        if len(part.rows) == 0:
            return torch.zeros_like(part.batch.loss_mask)
        return self.chosen[part.rows].to(part.batch.loss_mask.device)

    def _aggregate(self, name: str, per_token: Tensor, mask: Tensor, sums: Sums) -> Tensor:
        value = aggregate(
            per_token, mask, self.loss.loss_agg_mode, self.denominators, scale_factor=self.loss.loss_scale_factor
        )
        sums.add(name, value)
        return value

    def _token_mean(self, name: str, values: Tensor, mask: Tensor, sums: Sums) -> None:
        sums.add_token_mean(name, values, mask, self.denominators.num_tokens)
