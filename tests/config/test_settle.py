"""Keys that the user left open get values that suit device, rows and model; what the user gave is kept."""

from __future__ import annotations

import pytest

from steepest.config.describe import help_text
from steepest.config.load import load_config, load_sft_config, save_config
from steepest.config.schema import Config
from steepest.config.settle import (
    PPO_DTYPES,
    SFT_DTYPES,
    settle_batch,
    settle_dtype,
    settle_lengths,
    settle_sft_batch,
    settle_sft_length,
)
from tests.support.commands import REFERENCE, REQUIRED

ACTOR, N = "actor_rollout_ref.actor", "actor_rollout_ref.rollout.n"


def sizes(config: Config) -> tuple[int, int, int]:
    return (
        config.data.train_batch_size,
        config.actor_rollout_ref.actor.ppo_mini_batch_size,
        config.critic.ppo_mini_batch_size,
    )


@pytest.mark.parametrize(
    ("words", "rows", "on_card", "want"),
    [
        ([], 7473, True, (512, 128, 128)),  # 512 responses, 4 updates
        ([], 7473, False, (128, 32, 32)),
        ([f"{N}=8"], 7473, True, (64, 16, 16)),  # 64 x 8 responses
        ([f"{N}=300"], 7473, False, (1, 1, 1)),
        ([], 100, True, (100, 25, 25)),  # no more than there are rows
        ([], 101, True, (100, 25, 25)),
        ([], 3, True, (3, 3, 3)),
        ([f"{ACTOR}.ppo_mini_batch_size=48"], 7473, True, (480, 48, 48)),  # the mini-batch divides it
        ([f"{ACTOR}.ppo_mini_batch_size=600"], 7473, True, (600, 600, 600)),
        (["critic.ppo_mini_batch_size=48"], 7473, True, (480, 120, 48)),
        ([f"{ACTOR}.ppo_mini_batch_size=32", "critic.ppo_mini_batch_size=48"], 7473, True, (480, 32, 48)),
        (["data.train_batch_size=1024"], 7473, True, (1024, 256, 256)),
    ],
)
def test_the_batch_follows_device_rows_and_mini_batches(
    words: list[str], rows: int, on_card: bool, want: tuple[int, int, int]
) -> None:
    config, notes = settle_batch(load_config([*REQUIRED, *words]), rows, on_card=on_card)
    assert sizes(config) == want
    assert len(notes) == (0 if "data.train_batch_size=1024" in words else 1)
    assert want[0] % want[1] == 0 and want[0] % want[2] == 0


def test_a_chosen_batch_is_told_and_stands_in_the_saved_configuration(tmp_path) -> None:
    config, notes = settle_batch(load_config([*REQUIRED, f"{N}=8"]), 7473, on_card=True)
    assert notes == [
        "data.train_batch_size=64 was chosen: about 512 responses a step on a card (8 a prompt, 7473 rows), 16 prompts "
        "an update. Give the key for another size."
    ]
    save_config(config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert "  train_batch_size: 64  # derived from device and rows\n" in text
    again = load_config([f"--config={tmp_path / 'config.yaml'}"])
    assert sizes(again) == (64, 16, 16)
    assert settle_batch(again, 7473, on_card=False) == (again, [])  # of the file: the user's


MINI, CRITIC_MINI = f"{ACTOR}.ppo_mini_batch_size", "critic.ppo_mini_batch_size"
OF_A_CARD = {"data.train_batch_size": 512, MINI: 128, CRITIC_MINI: 128}


@pytest.mark.parametrize(
    ("words", "rows", "earlier", "want"),
    [
        ([], 7473, OF_A_CARD, (512, 128, 128)),  # begun on a card, goes on on a CPU
        ([f"{N}=8"], 7473, OF_A_CARD, (512, 128, 128)),
        ([f"{MINI}=64"], 7473, OF_A_CARD, (512, 64, 128)),
        ([f"{MINI}=48"], 7473, OF_A_CARD, (96, 48, 48)),  # 48 does not divide 512: chosen afresh
        ([], 300, OF_A_CARD, (128, 32, 32)),  # fewer rows than a batch has
        (["data.train_batch_size=256"], 7473, OF_A_CARD, (256, 256, 256)),
        ([], 7473, {"data.train_batch_size": 512}, (128, 32, 32)),  # a damaged file
        ([], 7473, {**OF_A_CARD, "data.train_batch_size": "many"}, (128, 32, 32)),
        ([], 7473, {**OF_A_CARD, MINI: 0}, (128, 32, 32)),
    ],
)
def test_a_run_that_goes_on_keeps_its_batch(
    words: list[str], rows: int, earlier: dict[str, object], want: tuple[int, int, int]
) -> None:
    config, notes = settle_batch(load_config([*REQUIRED, *words]), rows, on_card=False, earlier=earlier)
    assert sizes(config) == want
    if not words and want[0] == 512:
        assert notes == [f"data.train_batch_size=512, {MINI}=128, {CRITIC_MINI}=128: as at the run's last start."]


def test_the_help_says_that_the_run_chooses_the_batch() -> None:
    text = " ".join(help_text(Config, "steepest.trainer.main_ppo").split())
    assert "Prompts a step; where it is not given, the run chooses it by device and rows and says so" in text


def test_the_reference_command_keeps_its_sizes() -> None:
    config = load_config(REFERENCE)
    assert settle_batch(config, 7473, on_card=False) == (config, [])
    assert settle_lengths(config, 1024, 512) == (config, [])


@pytest.mark.parametrize("words", [[f"{ACTOR}.ppo_mini_batch_size=48"], ["data.train_max_samples=100"]])
def test_the_default_batch_is_no_error_beside_other_keys(words: list[str]) -> None:
    assert load_config([*REQUIRED, *words]).data.train_batch_size == 1024  # until the run settles it


@pytest.mark.parametrize(
    ("words", "limit", "longest", "want"),
    [
        ([], 4096, 67, (512, 512)),
        ([], 512, 67, (67, 445)),  # a response gets what the longest prompt leaves
        ([], 600, 67, (88, 512)),
        (["data.max_response_length=100"], 512, 67, (412, 100)),
        (["data.max_prompt_length=200"], 512, 67, (200, 312)),
        (["data.max_prompt_length=400", "data.max_response_length=400"], 512, 67, (400, 400)),  # refused later
        (["data.max_prompt_length=512"], 512, 67, (512, 512)),
        (["data.max_response_length=500"], 512, 67, (512, 500)),  # the data do not fit beside it
        ([], 60, 67, (512, 512)),
    ],
)
def test_lengths_follow_the_model_where_they_were_left_open(
    words: list[str], limit: int, longest: int, want: tuple[int, int]
) -> None:
    before = load_config([*REQUIRED, *words])
    config, notes = settle_lengths(before, limit, longest)
    assert (config.data.max_prompt_length, config.data.max_response_length) == want
    given = (before.data.max_prompt_length, before.data.max_response_length)
    assert bool(notes) == (want != given)
    if notes:
        assert config.actor_rollout_ref.rollout.max_model_len == limit


def test_chosen_lengths_are_told() -> None:
    _, notes = settle_lengths(load_config([*REQUIRED, "data.max_prompt_length=100"]), 512, 67)
    assert notes == [
        "data.max_response_length=412 was chosen: the model takes sequences of at most 512 tokens, prompt and response "
        "together."
    ]


def test_supervised_training_fits_the_model_and_the_rows() -> None:
    config = load_sft_config(["data.train_files=a", "model.path=m"])
    shorter, notes = settle_sft_length(config, 512, 67)
    assert shorter.data.max_length == 512
    assert notes == ["data.max_length=512 was chosen: the model takes no longer sequences (the default is 1024)."]
    assert settle_sft_length(config, 512, 600) == (config, [])  # refused later, with what to do
    smaller, notes = settle_sft_batch(config, 100)
    assert smaller.data.train_batch_size == 100
    assert notes == ["data.train_batch_size=100 was chosen: there are no more rows. Give the key for a smaller size."]
    given = load_sft_config(["data.train_files=a", "model.path=m", "data.max_length=700", "data.train_batch_size=200"])
    assert settle_sft_length(given, 512, 67) == (given, []) and settle_sft_batch(given, 100) == (given, [])


DTYPE = f"{ACTOR}.fsdp_config.dtype"


def dtypes(config: Config) -> list[str]:
    roles = config.actor_rollout_ref
    return [roles.actor.fsdp_config.dtype, roles.rollout.dtype, config.critic.fsdp.dtype,
            config.reward.reward_model.dtype]  # fmt: skip


def chosen() -> tuple[str, str]:
    return "bfloat16", "bfloat16: it is faster"


@pytest.mark.parametrize(
    ("words", "earlier", "want", "said"),
    [
        ([], None, ["bfloat16"] * 4, "bfloat16: it is faster"),
        ([f"{DTYPE}=float32"], None, ["float32"] * 4, None),  # forced, and nothing is timed
        ([f"{DTYPE}=float32", "critic.fsdp.dtype=auto"], None, ["float32"] * 4, None),  # all roles have one dtype
        (
            ["critic.fsdp.dtype=float32"],
            None,
            ["bfloat16", "bfloat16", "float32", "bfloat16"],
            "bfloat16: it is faster",
        ),
        ([], {DTYPE: "float32"}, ["float32"] * 4, f"float32: as at the run's last start. {DTYPE} gives another."),
        ([], {DTYPE: "auto"}, ["bfloat16"] * 4, "bfloat16: it is faster"),  # a run by an older version
        ([f"{DTYPE}=bfloat16"], {DTYPE: "float32"}, ["bfloat16"] * 4, None),  # the user gives another
    ],
)
def test_all_roles_get_one_dtype_which_a_run_keeps(words, earlier, want, said) -> None:
    config, text = settle_dtype(load_config([*REQUIRED, *words]), PPO_DTYPES, chosen, earlier)
    assert (dtypes(config), text) == (want, said)
    assert config.provenance.sources["actor_rollout_ref.rollout.dtype"].startswith("derived from ")


def test_supervised_training_settles_its_dtype_too() -> None:
    config, text = settle_dtype(load_sft_config(["data.train_files=a", "model.path=m"]), SFT_DTYPES, chosen)
    assert (config.engine.dtype, text) == chosen()
