"""VERL_USE_MODELSCOPE and STEEPEST_USE_MODELSCOPE choose the default hub; a key that is given wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from steepest.config.environment import SWITCHES, default_hub, hub_from_environment
from steepest.config.load import load_config, load_sft_config
from steepest.errors import ConfigError

PPO = ["data.train_files=a.parquet", "data.val_files=b.parquet", "actor_rollout_ref.model.path=owner/tiny"]
SFT = ["data.train_files=a.parquet", "model.path=owner/tiny"]


@pytest.fixture(autouse=True)
def no_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize(
    ("value", "hub"),
    [("True", "modelscope"), ("1", "modelscope"), (" yes ", "modelscope"), ("on", "modelscope")]
    + [(word, "huggingface") for word in ("False", "0", "no", "off", "")],
)
def test_each_switch_in_each_spelling(name: str, value: str, hub: str) -> None:
    assert default_hub({name: value}) == hub
    assert hub_from_environment({name: value})[1] == (f"{name}={value}" if hub == "modelscope" else None)


@pytest.mark.parametrize("name", SWITCHES)
def test_the_default_hub_of_both_jobs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "True")
    config = load_config(PPO)
    assert config.actor_rollout_ref.model.hub == config.critic.model.hub == "modelscope"
    key = "actor_rollout_ref.model.hub"
    assert config.provenance.sources[key] == f"derived from {name}=True"
    assert config.provenance.notes == (f"{key}=modelscope: chosen by {name}=True in the environment.",)
    sft = load_sft_config(SFT)
    assert sft.model.hub == "modelscope"
    assert sft.provenance.notes == (f"model.hub=modelscope: chosen by {name}=True in the environment.",)


def test_a_key_that_is_given_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_USE_MODELSCOPE", "True")
    config = load_config([*PPO, "actor_rollout_ref.model.hub=huggingface"])
    assert config.actor_rollout_ref.model.hub == config.critic.model.hub == "huggingface"
    assert config.provenance.notes == ()
    assert load_sft_config([*SFT, "model.hub=huggingface"]).model.hub == "huggingface"


def test_without_a_switch_nothing_is_said() -> None:
    config = load_config(PPO)
    assert config.actor_rollout_ref.model.hub == "huggingface" and config.provenance.notes == ()
    assert config.provenance.sources["actor_rollout_ref.model.hub"] == "default"


def test_wrong_and_contradicting_switches_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_USE_MODELSCOPE", "ture")
    wrong = "VERL_USE_MODELSCOPE='ture' in the environment: expected True or False (also 1, yes, on; 0, no, off)."
    for load, words in ((load_config, PPO), (load_sft_config, SFT)):
        with pytest.raises(ConfigError) as caught:
            load(words)
        assert caught.value.problems == [wrong]
    monkeypatch.setenv("VERL_USE_MODELSCOPE", "True")
    monkeypatch.setenv("STEEPEST_USE_MODELSCOPE", "False")
    with pytest.raises(ConfigError, match="STEEPEST_USE_MODELSCOPE=False and VERL_USE_MODELSCOPE=True .*contradict"):
        load_config(PPO)
    with pytest.raises(ConfigError, match="Unset one of them"):
        default_hub()
    monkeypatch.setenv("STEEPEST_USE_MODELSCOPE", "1")
    assert default_hub() == "modelscope"


def test_a_revision_is_also_that_of_a_critic_from_the_same_model() -> None:
    revision = "actor_rollout_ref.model.revision=v1"
    assert load_config([*PPO, revision]).critic.model.revision == "v1"
    assert load_config([*PPO, revision, "critic.model.path=owner/other"]).critic.model.revision is None
    assert load_config([*PPO, revision, "critic.model.hub=modelscope"]).critic.model.revision is None
    assert load_config([*PPO, revision, "critic.model.revision=v2"]).critic.model.revision == "v2"


def test_hub_and_revision_of_a_local_model_are_said_to_have_no_effect(tmp_path: Path) -> None:
    here = f"actor_rollout_ref.model.path={tmp_path}"
    given = ["actor_rollout_ref.model.revision=v1", "actor_rollout_ref.model.hub=modelscope"]
    reason = "no effect: actor_rollout_ref.model.path is on this machine."
    assert load_config([*PPO[:2], here, *given]).provenance.warnings == (
        f"actor_rollout_ref.model.revision has {reason}",
        f"actor_rollout_ref.model.hub has {reason}",
    )
    elsewhere = "actor_rollout_ref.model.tokenizer_path=owner/tiny"  # which is fetched from that hub
    assert load_config([*PPO[:2], here, *given, elsewhere]).provenance.warnings == (
        f"actor_rollout_ref.model.revision has {reason}",
    )
    assert load_config([*PPO, *given]).provenance.warnings == ()
