"""TRL's trainers, built for real on a tiny model, and asked for one loss of log-probs that the caller gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.parity.batches import Rows
from tests.support.tiny_models import tiny_folder

WORDS = "one two three four"


def trainer(name: str, folder: Path, rewards: list[float], **options: Any) -> Any:
    """GRPOTrainer or RLOOTrainer with groups of 4; its reward function hands out `rewards` in order."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.trainer import grpo_config, grpo_trainer, rloo_config, rloo_trainer

    base, config = {
        "grpo": (grpo_trainer.GRPOTrainer, grpo_config.GRPOConfig),
        "rloo": (rloo_trainer.RLOOTrainer, rloo_config.RLOOConfig),
    }[name]

    class Given(base):  # type: ignore[misc, valid-type]
        """The log-probs of the loss are those of `given`, not the model's."""

        given: Tensor | None = None

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            if self.given is None:
                return super()._get_per_token_logps_and_entropies(*args, **kwargs)
            return self.given, torch.zeros_like(self.given), None

    model = tiny_folder(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    args = config(output_dir=str(folder), num_generations=4, per_device_train_batch_size=8, max_completion_length=6,
                  use_cpu=True, bf16=False, report_to="none", beta=0.0, **options)  # fmt: skip
    return Given(
        model=str(model),
        reward_funcs=lambda completions, **_: rewards[: len(completions)],
        args=args,
        train_dataset=Dataset.from_list([{"prompt": word} for word in WORDS.split()]),
        processing_class=tokenizer,
    )


def loss_of(made: Any, r: Rows, advantages: Tensor, **fields: Tensor) -> tuple[float, Tensor]:
    """The trainer's own `_compute_loss` on this batch, and its gradient for the log-probs."""
    made.given = r.log_probs.clone().requires_grad_()
    made.current_gradient_accumulation_steps = 1
    ids = torch.zeros(r.mask.shape, dtype=torch.int64)
    given = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids,
             "completion_mask": r.ones, "advantages": advantages, "num_items_in_batch": r.ones.sum()}  # fmt: skip
    loss = made._compute_loss(made.model, {**given, **fields})
    (gradient,) = torch.autograd.grad(loss, made.given)
    return float(loss.detach()), gradient
