"""`data`: the prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from steepest.config.checks import MODEL, Deriver, IsSet, Section
from steepest.config.types import DERIVED, File, Hub, Mapping, MinusOneOr, Positive, RequiredFiles, Seed

if TYPE_CHECKING:
    from steepest.config.schema import Config, SFTConfig

SECTION = Section()


@dataclass(frozen=True)
class DataConfig:
    """`data`: the prompts."""

    train_files: RequiredFiles = ()
    """What to train on, one name or a list: a file (parquet, jsonl, json, csv, tsv), or a data set on a hub
    (`OWNER/NAME:CONFIG:SPLIT`)."""
    val_files: RequiredFiles = ()
    """What to validate on, as `train_files`."""
    train_batch_size: Positive = 1024
    """Prompts a step; where it is not given, the run chooses it by device and rows and says so: about 512 responses on
    a card, 128 on a CPU. The last incomplete batch of an epoch is left out."""
    val_batch_size: Positive | None = None
    """Prompts generated at once in validation; null: the whole set. The last partial batch is scored too."""
    max_prompt_length: Positive = 512
    """Longest prompt in tokens, chat template included; see `truncation` and `filter_overlong_prompts`."""
    max_response_length: Positive = 512
    """Longest response in tokens; a response that reaches it is cut and counts as truncated."""
    train_max_samples: Annotated[int, MinusOneOr(1)] = -1
    """Random subset of this many training rows (seeded by `seed`); -1: all."""
    val_max_samples: Annotated[int, MinusOneOr(1)] = -1
    """Random subset of this many validation rows (seeded by `seed`); -1: all."""
    prompt_key: str = "prompt"
    """Column with the prompt: a text, which becomes one message of the user, or a list of messages."""
    answer_key: str | None = None
    """Column with the ground truth; null: `reward_model.ground_truth`, else the column `ground_truth` or `answer`.
    Ours, not verl's."""
    reward_fn_key: str = "data_source"
    """Column that names the reward function; needed only where each row chooses its own."""
    ignored_columns: tuple[str, ...] = ()
    """Columns, such as `tools` or `images`, whose content need not reach the model; otherwise it stops the run. Ours,
    not verl's."""
    hub: Hub = DERIVED
    """Hub of data sets that are no local files; null: the policy's. Ours, not verl's."""
    shuffle: bool = True
    """A new order of the training rows each epoch; off: the order of the file."""
    seed: Seed = 42
    """Seed of order and subset. verl: null, a different order each run."""
    filter_overlong_prompts: bool = False
    """Leave out prompts longer than `max_prompt_length`, counted and printed."""
    truncation: Literal["error", "left", "right", "middle"] = "error"
    """An overlong prompt that is not filtered: stop the run, or cut tokens at its left, right or middle."""
    tokenizer: File | None = None
    """Folder or hub id of another tokenizer than the model's; null: the model's."""
    trust_remote_code: bool = DERIVED
    """Run Python code that comes with the tokenizer; null: `actor_rollout_ref.model.trust_remote_code`."""
    apply_chat_template_kwargs: Mapping = field(default_factory=dict)
    """Arguments for the chat template, e.g. `{enable_thinking: false}`."""


@SECTION.null
def resolve(d: Deriver) -> None:
    d.copy(f"{MODEL}.trust_remote_code", "data.trust_remote_code")


@SECTION.rule("data.tokenizer", "actor_rollout_ref.model.tokenizer_path")
def one_tokenizer(c: Config, is_set: IsSet) -> Iterator[str]:
    mine, other = c.data.tokenizer, c.actor_rollout_ref.model.tokenizer_path
    if mine and mine != other:
        yield f"data.tokenizer={mine} and actor_rollout_ref.model.tokenizer_path={other}: two tokenizers. Give one."


@SECTION.rule("data.train_max_samples", "data.train_batch_size")
def a_batch_is_full(c: Config | SFTConfig, is_set: IsSet) -> Iterator[str]:
    rows, batch = c.data.train_max_samples, c.data.train_batch_size
    if 0 < rows < batch and is_set("data.train_batch_size"):
        yield (
            f"data.train_max_samples={rows}: fewer than data.train_batch_size={batch}, so no batch is ever full. "
            f"Use data.train_batch_size <= {rows}."
        )
