"""Supervised fine-tuning: the log-likelihood of the tokens that a loss mask marks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.data.sft import SFTExample
from steepest.learner.metrics import Means, Metrics, Sums
from steepest.learner.micro_batches import MicroBatches
from steepest.learner.optim import OptimSettings
from steepest.learner.trainable import ComputeSettings, Trainable
from steepest.learner.update_plan import Cut, plan_sequences
from steepest.models.causal_lm import CausalLM
from steepest.models.packing import Packed, pack_nothing, pack_sequences
from steepest.models.passes import LogProbs


def plan_examples(examples: Sequence[SFTExample], micro: MicroBatches, *, ranks: int = 1) -> tuple[Cut, ...]:
    """The passes of each rank over examples, by their index; those without a marked token are left out."""
    used = [i for i, example in enumerate(examples) if any(example.loss_mask[1:])]
    cuts = plan_sequences([len(examples[i].token_ids) for i in used], micro, ranks=ranks)
    return tuple(tuple(tuple(used[i] for i in part) for part in cut) for cut in cuts)


class Supervised(Trainable[CausalLM]):
    """A language model learning sequences.

        loss = - sum of log p(token | tokens before it) over the marked tokens / number of marked tokens

    The number is that of the whole batch, so the loss does not depend on the micro-batches.
    """

    role = "model"

    def __init__(
        self,
        model: CausalLM,
        *,
        compute: ComputeSettings,
        optim: OptimSettings,
        micro: MicroBatches | None = None,
    ) -> None:
        super().__init__(model, compute=compute, optim=optim)
        self.micro = micro or MicroBatches()

    def update(self, examples: Sequence[SFTExample], cut: Cut | None = None) -> Metrics:
        """One optimizer step, and one step of the schedule, on all the examples together.

        `cut` is this rank's plan of the passes (`plan_examples` by `micro` over all examples); None: one process.
        Every rank has all examples and gets the same metrics.

        Metrics: `train/loss` (before the step), `train/grad_norm` (before clipping), `train/lr`,
        `train/num_target_tokens`, `train/skipped_steps`. Raises ValueError when no token is marked.
        """
        num_targets = self._count(examples)
        means = Means()
        means.add(self.accumulate(self._packed(examples, cut), _Loss(self, num_targets), self.micro))
        self.step("train", means)
        return means.read() | {"train/num_target_tokens": float(num_targets)} | self.finish_iteration("train")

    @torch.no_grad()
    def evaluate(self, examples: Sequence[SFTExample], cut: Cut | None = None) -> Metrics:
        """`val/loss`: the mean over all marked tokens, without gradient; `cut` is as in `update`.

        Raises ValueError when no token is marked.
        """
        sums, loss = Sums(), _Loss(self, self._count(examples))
        for part in self._packed(examples, cut):
            with self.memory("validation", part, self.micro):
                loss(part, sums)
        found = sums.read(self.reducer)
        return {name.replace("train/", "val/"): value for name, value in found.items()}

    def _packed(self, examples: Sequence[SFTExample], cut: Cut | None) -> Iterator[Packed]:
        if cut is None:
            (cut,) = plan_examples(examples, self.micro)
        for picks in cut:
            part = [examples[i] for i in picks]
            masks = [[False, *example.loss_mask[1:]] for example in part]
            packed = pack_sequences([list(example.token_ids) for example in part], masks) if part else pack_nothing()
            yield self.moved(packed)

    @staticmethod
    def _count(examples: Sequence[SFTExample]) -> int:
        num_targets = sum(sum(example.loss_mask[1:]) for example in examples)  # the first token follows nothing
        if num_targets == 0:
            raise ValueError(f"none of the {len(examples)} sequences marks a token to be learned")
        return num_targets


@dataclass
class _Loss:
    supervised: Supervised
    num_targets: int

    def __call__(self, packed: Packed, sums: Sums) -> Tensor:
        with self.supervised.autocast():
            log_probs = self.supervised.run(LogProbs(packed)).log_probs
        loss = -log_probs.sum() / self.num_targets
        sums.add("train/loss", loss)
        return loss
