"""The quickstart's whole path in small; what it reaches at full size is measured by `make quickstart` itself."""

from __future__ import annotations

import re

import pytest

from steepest.config.load import load_config
from steepest.errors import ConfigError
from steepest.trainer.jobs.quickstart import (
    PPO,
    RESPONSES,
    Settings,
    algorithms,
    job_overrides,
    main,
    next_steps,
    ppo_overrides,
    run_quickstart,
    story,
    telling_pairs,
)

SMALL = {"sft_steps": 3, "ppo_steps": 2, "num_train": 256, "num_test": 64, "num_sft": 256}
LAST_LINE = r"quickstart: before_sft=\d\.\d{4} before_ppo=\d\.\d{4} after_ppo=\d\.\d{4} seconds=\d+"


def sample(number: int, response: str, score: float) -> dict:
    return {"prompt": [{"content": f"q{number}"}], "response": response, "ground_truth": "1", "score": score}


@pytest.mark.slow
def test_the_whole_path_in_small(tmp_path, capsys):
    folder = tmp_path / "quickstart"
    for _ in range(2):  # the second start moves the first one's folder aside
        assert run_quickstart(Settings(folder=str(folder), **SMALL)) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert re.fullmatch(LAST_LINE, lines[-1])
    text = "\n".join(lines)
    for words in ("steepest prepare arithmetic", "steepest sft", "steepest ppo", "Accuracy on 64 held-out problems"):
        assert words in text
    assert text.count("before: ") == text.count("after:  ") == 6
    assert (tmp_path / "quickstart.old-1" / "ppo" / "global_step_2" / "actor" / "model.safetensors").is_file()
    assert (folder / "ppo" / "global_step_2" / "critic" / "model.safetensors").is_file()


def test_the_story_shows_what_was_learned_and_what_is_still_wrong():
    before = [sample(n, "First 1\n#### 0", 0.0) for n in range(5)]
    after = [sample(n, "right" if n in (1, 2, 3) else "wrong", float(n in (1, 2, 3))) for n in range(5)]
    pairs = telling_pairs(before, after)
    assert [new["prompt"][0]["content"] for _, new in pairs] == ["q1", "q2", "q0"]
    text = story(0.0, {0: 0.25, 5: 0.75}, before, after)
    assert "before PPO          0.250" in text and "after PPO           0.750" in text
    assert "step   5  0.750  " + "#" * 30 in text
    assert "before: First 1 | #### 0   score 0" in text


def test_fewer_than_three_problems_are_all_shown():
    assert len(telling_pairs([sample(0, "a", 0.0)], [sample(0, "b", 1.0)])) == 1


@pytest.mark.parametrize("name", algorithms())
def test_every_algorithm_has_as_many_responses_a_step(name, tmp_path):
    settings = Settings(folder=str(tmp_path), algorithm=name)
    words = [*job_overrides(settings, "run", tmp_path / "model"), *ppo_overrides(settings)]
    config = load_config(words)
    n = config.actor_rollout_ref.rollout.n
    assert config.data.train_batch_size * n == RESPONSES
    assert config.actor_rollout_ref.actor.ppo_mini_batch_size * n == RESPONSES // 2
    assert config.provenance.warnings == ()
    assert (config.algorithm.adv_estimator == "gae") == (name == PPO)


@pytest.mark.slow
def test_another_algorithm_runs_from_its_preset(tmp_path, capsys):
    folder = tmp_path / "quickstart"
    assert run_quickstart(Settings(folder=str(folder), algorithm="rloo", **SMALL)) == 0
    text = capsys.readouterr().out
    assert "--config-name rloo" in text and re.fullmatch(LAST_LINE, text.strip().splitlines()[-1])
    assert not (folder / "ppo" / "global_step_2" / "critic").exists()


def test_an_algorithm_without_a_preset_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--algorithm rlo: there is no such preset. Did you mean rloo"):
        main(folder=tmp_path / "quickstart", algorithm="rlo")
    assert not (tmp_path / "quickstart").exists()


@pytest.mark.parametrize("name", algorithms())
def test_the_advice_at_the_end_is_about_what_was_chosen(name):
    text = next_steps(name)
    command, _, others = text.partition("trainer.save_freq=10\n")
    assert (f"--config-name {name} " in command) == (name != "ppo")
    assert name not in re.split(r"[ ,;:]+", others.replace("it is PPO", "").replace("of PPO", ""))
    assert ("GRPO" in text) == (name == "ppo")
