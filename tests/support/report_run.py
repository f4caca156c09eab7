"""A run folder as report.html reads it: written by the writers of a run, with numbers and texts that a test knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steepest.loggers.jsonl import SampleLog
from steepest.loggers.rows import RowFile

HOSTILE = (
    "<script>document.title = 'owned'</script>",
    "</script><img src=x onerror=\"document.title = 'owned'\">",
    "<!-- {{script}} {{data}}",
    "\u202eoverride\u202c \u200f\ufeff",
    "\ud83d half of a character, NUL \x00, escape \x1b[31m",
    "\u05e9\u05dc\u05d5\u05dd \u4f60\u597d \U0001f468\u200d\U0001f469",
)
"""Texts that a model may write and that a page must show as texts."""

CONFIG = """\
data:
  train_files: [a.parquet, "b # c.parquet"]  # command line
  train_batch_size: 32  # preset grpo
  hub: huggingface  # derived from actor_rollout_ref.model.hub
  val_batch_size: null
  apply_chat_template_kwargs: {a: 1}
actor_rollout_ref:
  model:
    path: some/model  # command line
algorithm:
  adv_estimator: grpo  # preset grpo
"""


def make_run(folder: Path, *, steps: int = 12, config: str = CONFIG) -> Path:
    """A run of `steps` steps: score k / steps at step k, validated every third, an event in steps 4 and 5, two groups
    of four answers of every second step."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config)
    metrics = RowFile(folder / "metrics.jsonl")
    tokens = RowFile(folder / "token_samples.jsonl")
    answers = SampleLog(folder / "samples.jsonl")
    for step in range(1, steps + 1):
        metrics.write({"step": step, "time": 1000.0 + 2 * step, **training_row(step, steps)})
        if step % 3 == 0:
            found = {"val/accuracy": 0.5, "val-aux/accuracy_low": 0.4, "val-aux/accuracy_high": 0.6}
            metrics.write({"step": step, "time": 1001.0 + 2 * step, **found, "timing_s/testing": 1.0})
            answers.extend(step, "val", [validation_answer(step, number) for number in range(2)])
        if step % 2 == 0:
            for number in range(2):
                tokens.write(group(step, number))
    for file in (metrics, tokens, answers):
        file.close()
    return folder


def training_row(step: int, steps: int) -> dict[str, float]:
    return {
        "critic/score/mean": step / steps,
        "critic/rewards/mean": step / steps,
        "actor/entropy": float("nan") if step == 2 else 1.0 / step,
        "actor/grad_norm": 0.5,
        "response_length/mean": 10.0,
        "response_length/min": 5.0,
        "response_length/max": 15.0,
        "health/entropy_collapse": float(step in (4, 5)),
        "health/nan": 0.0,
        "timing_s/step": 2.0,
        "timing_s/gen": 1.0,
        "timing_s/update_actor": 0.75,
    }


def validation_answer(step: int, number: int) -> dict[str, Any]:
    return {
        "id": f"val:{number}",
        "data_source": "sums",
        "prompt": [{"role": "user", "content": f"validation {number}"}],
        "response": f"at step {step}: {HOSTILE[step % len(HOSTILE)]}",
        "score": float(step > 6),
        "ground_truth": "4",
        "reward/acc": float(step > 6),
        "truncated": False,
    }


def group(step: int, number: int) -> dict[str, Any]:
    """Answer 0 is right, 1 wrong, 2 cut and wrong, and the reward of 3 failed, so that it has no advantages."""
    answers = []
    for place in range(4):
        texts = ["The", " answer", "\n", HOSTILE[(step + number) % len(HOSTILE)], f" {place}"]
        failed = place == 3
        answers.append(
            {
                "score": None if failed else float(place == 0),
                "parts": {} if failed else {"acc": float(place == 0), "<b>": 1.0},
                **({"error": "<b>boom</b>"} if failed else {}),
                "truncated": place == 2,
                "status": "reward_failed" if failed else "trained",
                "length": len(texts),
                "tokens": texts,
                "advantage": [None if failed else 1.0 - place] * len(texts),
                "value": [None if failed else 0.25 * at for at in range(len(texts))],
                "ratio": [None if failed else 1.5] * len(texts),
            }
        )
    return {
        "step": step,
        "id": f"train:{number}",
        "data_source": ("sums", "<i>words</i>")[number],
        "prompt": [{"role": "user", "content": f"prompt {number} {HOSTILE[0]}"}],
        "ground_truth": "4",
        "num_responses": 4,
        "responses": answers,
    }
