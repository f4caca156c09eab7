"""Every natural way to write `reward.functions`, what a shell makes of it, and verl's keywords for a function."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from steepest.config.load import load_config, load_sft_config, save_config
from steepest.config.schema import Config
from steepest.config.sections.reward import reads_data_source, reads_ground_truth
from steepest.errors import ConfigError

NEEDED = [
    "data.train_files=a.csv",
    "data.val_files=a.csv",
    "actor_rollout_ref.model.path=m",
    "critic.model.path=m",
]


def load(*words: str) -> Config:
    return load_config([*NEEDED, *words])


def problems(*words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(*words)
    return caught.value.problems


@pytest.mark.parametrize(
    ("text", "functions"),
    [
        ("my_reward.py:compute_score", {"my_reward.py:compute_score": 1.0}),
        ("my.package:score", {"my.package:score": 1.0}),
        ("math", {"math": 1.0}),
        ("[my_reward.py:compute_score]", {"my_reward.py:compute_score": 1.0}),
        ("[my_reward.py:f, ./x/other-1.py:g, format]", {"my_reward.py:f": 1.0, "./x/other-1.py:g": 1.0, "format": 1.0}),
        ("[{math: 0.5}, {my_reward.py:f: 2}, format]", {"math": 0.5, "my_reward.py:f": 2, "format": 1.0}),
        ("{my_reward.py:compute_score: 1.0}", {"my_reward.py:compute_score": 1.0}),
        ("{my_reward.py:compute_score:1e-3}", {"my_reward.py:compute_score": 1e-3}),
        ("{'my_reward.py:f': 1.0}", {"my_reward.py:f": 1.0}),
        ('{"my reward.py:f": 1.0}', {"my reward.py:f": 1.0}),
        ("{r.py:f: 1, r.py:g: {weight: 2e-1, form: a}}", {"r.py:f": 1, "r.py:g": {"weight": 0.2, "form": "a"}}),
        ("{math: 1.0, format: {weight: 0.2, form: boxed}}", {"math": 1.0, "format": {"weight": 0.2, "form": "boxed"}}),
        ("{}", {}),
    ],
)
def test_names_lists_and_mappings(text: str, functions: dict[str, Any]) -> None:
    assert load(f"reward.functions={text}").reward.functions == functions


def test_a_file_of_yaml_may_have_each_form_too(tmp_path: Path) -> None:
    for text, functions in (
        ("[math, my.py:f]", {"math": 1.0, "my.py:f": 1.0}),
        ("{my.py:f: 0.5}", {"my.py:f": 0.5}),
        ("my.py:f", {"my.py:f": 1.0}),
    ):
        (tmp_path / "c.yaml").write_text(f"reward:\n  functions: {text}\n")
        config = load("--config-path", str(tmp_path), "--config-name", "c")
        assert config.reward.functions == functions
        save_config(config, tmp_path / "saved.yaml")
        assert load_config(["--config-path", str(tmp_path), "--config-name", "saved"]).reward.functions == functions


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            "reward.functions={math: 1.0, my_reward.py:f: 0.5}",
            "reward.functions: the shell has cut this setting at its spaces. Write "
            "'reward.functions={math: 1.0, my_reward.py:f: 0.5}'",
        ),
        (
            "reward.functions={math:1.0,my_reward.py:f:0.5}",
            "reward.functions: given 2 times, which is what a shell makes of braces without quotes. Write "
            "'reward.functions={math: 1.0, my_reward.py:f: 0.5}'",
        ),
        (
            "reward.functions=my_reward.py:f:0.5",
            "reward.functions: weights are given in a mapping, with quotes around the setting: "
            "'reward.functions={my_reward.py:f: 0.5}'.",
        ),
        (
            "reward.functions=[math:1.0,my_reward.py:f:0.5]",
            "reward.functions: weights are given in a mapping, with quotes around the setting: "
            "'reward.functions={math: 1.0, my_reward.py:f: 0.5}'.",
        ),
        (
            "reward.functions.my_reward.py:f=0.5",
            "reward.functions.my_reward.py:f: the name of a file cannot be a part of a key. Write "
            "'reward.functions={my_reward.py:f: 0.5}'.",
        ),
    ],
)
def test_what_a_shell_leaves_of_a_setting_shows_the_command_that_works(command: str, said: str, tmp_path: Path) -> None:
    # the words are those that bash itself makes of the command
    done = subprocess.run(["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True)
    assert problems(*done.stdout.splitlines()) == [said]
    shown = next(word for word in shlex.split(said.replace("'.", "'")) if word.startswith("reward.functions={"))
    assert load(shown).reward.functions["my_reward.py:f"] == 0.5


def test_a_file_without_a_function_shows_how_it_is_named() -> None:
    assert "'reward.functions={my_reward.py:compute_score: 1.0}'" in problems("reward.functions=my_reward.py")[0]
    assert problems("reward.functions=[math,math]") == [
        "reward.functions=[math,math]: expected a name, a list of names or a mapping {name: weight} (found math twice)."
    ]


def test_a_setting_given_twice_is_no_mapping_of_a_shell() -> None:
    assert load("trainer.experiment_name=a:b", "trainer.experiment_name=c:d").trainer.experiment_name == "c:d"


def test_verls_keywords_of_a_function_under_both_names() -> None:
    for name in ("custom_reward_function", "reward.custom_reward_function"):
        words = (f"+{name}.reward_kwargs.threshold=0.5", f"++{name}.reward_kwargs.mode=soft", f"{name}.path=my.py:f")
        custom = load(*words).custom_reward_function
        assert (custom.path, custom.name, custom.reward_kwargs) == ("my.py", "f", {"threshold": 0.5, "mode": "soft"})
        assert load(f"{name}.reward_kwargs={{a: 1}}", f"{name}.path=my.py").custom_reward_function.reward_kwargs == {
            "a": 1
        }
    assert load("custom_reward_function.reward_kwargs.a=1").provenance.warnings == (
        "custom_reward_function.reward_kwargs has no effect: no custom_reward_function.path.",
    )


@pytest.mark.parametrize(
    ("words", "source", "truth"),
    [
        ([], True, True),
        (["reward.functions={grader: 1.0, format: {weight: 1, form: boxed}}"], True, True),
        (["reward.functions=math"], False, True),
        (["reward.functions=my.py:f"], False, False),
        (["custom_reward_function.path=my.py"], False, False),
        (["reward.functions={length: {weight: 1, soft: 1, hard: 2}}"], False, False),
    ],
)
def test_what_rows_must_have_follows_from_the_rewards(words: list[str], source: bool, truth: bool) -> None:
    config = load(*words)
    assert (reads_data_source(config), reads_ground_truth(config)) == (source, truth)


def test_data_sets_come_from_the_hub_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load().data.hub == "huggingface"
    assert load("actor_rollout_ref.model.hub=modelscope").data.hub == "modelscope"
    assert load("data.hub=modelscope").actor_rollout_ref.model.hub == "huggingface"
    assert load_sft_config(["data.train_files=a/b", "model.path=m", "model.hub=modelscope"]).data.hub == "modelscope"
