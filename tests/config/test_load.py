"""From command line and files to a Config: what is accepted, what it becomes, where it came from."""

from __future__ import annotations

import dataclasses
import io
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import yaml

from steepest.config import tree
from steepest.config.checks import ROLLOUT
from steepest.config.describe import IMPORTANT
from steepest.config.load import config_dict, load_config, load_sft_config, save_config
from steepest.config.schema import Config, SFTConfig
from steepest.errors import ConfigError
from tests.support.commands import GRPO, REFERENCE, REQUIRED

REPOSITORY = Path(__file__).parents[2]

PRESET_NAMES = ["cispo", "dapo", "dr_grpo", "grpo", "gspo", "reinforce_plus_plus", "rloo"]


def load(*words: str) -> Config:
    return load_config([*REQUIRED, *words])


def problems(*words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config([*REQUIRED, *words])
    return caught.value.problems


def printed(*words: str) -> tuple[str, str]:
    """What a command prints that ends in SystemExit(0): stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.raises(SystemExit) as caught, redirect_stdout(out), redirect_stderr(err):
        load_config(list(words))
    assert caught.value.code == 0
    return out.getvalue(), err.getvalue()


def test_only_three_keys_are_required() -> None:
    config = load()
    assert config.data.train_files == ("train.parquet",)
    assert config.actor_rollout_ref.model.path == "model"
    assert config.provenance.warnings == ()
    with pytest.raises(ConfigError) as caught:
        load_config([])
    assert caught.value.problems == [
        "data.train_files: missing. It has no default; give data.train_files=FILE.parquet.",
        "data.val_files: missing. It has no default; give data.val_files=FILE.parquet.",
        "actor_rollout_ref.model.path: missing. It has no default; give "
        "actor_rollout_ref.model.path=Qwen/Qwen2.5-0.5B-Instruct.",
    ]


def test_the_reference_command_is_read_as_it_stands() -> None:
    config = load_config(REFERENCE)
    assert config.provenance.warnings == ()
    arr = config.actor_rollout_ref
    assert (arr.rollout.name, arr.rollout.tensor_model_parallel_size) == ("vllm", 1)
    assert (config.data.train_batch_size, arr.actor.ppo_mini_batch_size, arr.actor.optim.lr) == (256, 64, 1e-6)
    assert (arr.rollout.gpu_memory_utilization, config.critic.optim.lr, config.trainer.device) == (0.4, 1e-5, "npu")
    assert (arr.actor.ppo_micro_batch_size_per_gpu, arr.rollout.log_prob_micro_batch_size_per_gpu) == (4, 8)
    assert (arr.ref.log_prob_micro_batch_size_per_gpu, config.critic.ppo_micro_batch_size_per_gpu) == (4, 4)
    assert config.trainer.logger == ("console",) and not config.trainer.val_before_train
    assert config.algorithm.use_kl_in_reward is True and config.algorithm.kl_ctrl.kl_coef == 0.001


def test_the_reference_command_loads_without_what_is_slow_to_import() -> None:
    code = (
        "import sys; from steepest.config.load import load_config\n"
        f"load_config({[*REFERENCE, f'{ROLLOUT}.name=builtin']!r})\n"
        "assert not {'torch', 'transformers', 'pyarrow'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


@pytest.mark.parametrize(
    ("word", "key", "want"),
    [
        ("actor_rollout_ref.actor.optim.lr=1e-6", "actor_rollout_ref.actor.optim.lr", 1e-6),
        ("actor_rollout_ref.actor.optim.lr=3", "actor_rollout_ref.actor.optim.lr", 3.0),
        ("data.train_batch_size=1e3", "data.train_batch_size", 1000),
        ("+data.train_batch_size=8", "data.train_batch_size", 8),
        ("++data.train_batch_size=8", "data.train_batch_size", 8),
        ("data.train_files=a.parquet", "data.train_files", ("a.parquet",)),
        ("data.train_files=[a.parquet,b.jsonl]", "data.train_files", ("a.parquet", "b.jsonl")),
        ("data.train_files=['a.parquet','b c.jsonl']", "data.train_files", ("a.parquet", "b c.jsonl")),
        ("data.train_files=a b (1).parquet", "data.train_files", ("a b (1).parquet",)),
        ("trainer.logger=['console','wandb']", "trainer.logger", ("console", "wandb")),
        ("trainer.experiment_name=lr=1e-6", "trainer.experiment_name", "lr=1e-6"),
        ("trainer.experiment_name=7", "trainer.experiment_name", "7"),
        ("trainer.total_training_steps=null", "trainer.total_training_steps", None),
        ("trainer.val_only=true", "trainer.val_only", True),
        ("actor_rollout_ref.actor.optim.betas=[0.9,0.95]", "actor_rollout_ref.actor.optim.betas", (0.9, 0.95)),
        ("algorithm.kl_ctrl={type:adaptive,target_kl:0.2}", "algorithm.kl_ctrl.target_kl", 0.2),
        (
            "+data.apply_chat_template_kwargs.enable_thinking=False",
            "data.apply_chat_template_kwargs",
            {"enable_thinking": False},
        ),
        (
            "actor_rollout_ref.model.override_config={a:{b:1}}",
            "actor_rollout_ref.model.override_config",
            {"a": {"b": 1}},
        ),
        ("critic.model.path=${actor_rollout_ref.model.path}/x", "critic.model.path", "model/x"),
        (
            "actor_rollout_ref.actor.optim.lr=${actor_rollout_ref.actor.clip_ratio}",
            "actor_rollout_ref.actor.optim.lr",
            0.2,
        ),
        (
            "actor_rollout_ref.actor.optim.betas=['${actor_rollout_ref.actor.clip_ratio}',0.95]",
            "actor_rollout_ref.actor.optim.betas",
            (0.2, 0.95),
        ),
        ("data.shuffle='0'", "data.shuffle", False),
        ("data.seed='7'", "data.seed", 7),
        (
            "actor_rollout_ref.model.custom_chat_template={% for m in messages %}{{ m['content'] }}{% endfor %}",
            "actor_rollout_ref.model.custom_chat_template",
            "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        ),
        ("reward.custom_reward_function.path=score.py", "custom_reward_function.path", "score.py"),
        ("algorithm.adv_estimator=my.module:estimate", "algorithm.adv_estimator", "my.module:estimate"),
    ],
)
def test_values_are_read(word: str, key: str, want: object) -> None:
    value: object = load(word)
    for part in key.split("."):
        value = getattr(value, part)
    assert value == want and type(value) is type(want)


def test_tilde_in_paths_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    config = load("data.train_files=~/x.parquet", "data.val_files=[~/a,b]", "trainer.default_local_dir=~/run")
    assert config.data.train_files == ("/home/ada/x.parquet",)
    assert config.data.val_files == ("/home/ada/a", "b")
    assert config.trainer.default_local_dir == "/home/ada/run"


def test_the_last_of_two_settings_wins_and_tilde_goes_back_to_the_default() -> None:
    assert load("data.seed=1", "data.seed=2").data.seed == 2
    assert load("data.seed=1", "~data.seed").data.seed == 42
    assert load("data.seed=1", "~data.seed").provenance.sources["data.seed"] == "default"
    assert problems("data.seed=1", "~data.seed=3") == ["~data.seed=3: the value is 1."]


def test_critic_follows_the_actor_unless_told_otherwise() -> None:
    config = load(
        "actor_rollout_ref.model.hub=modelscope",
        "actor_rollout_ref.model.enable_gradient_checkpointing=True",
        "data.train_batch_size=32",
        "actor_rollout_ref.actor.ppo_mini_batch_size=16",
        "actor_rollout_ref.actor.ppo_epochs=2",
        "actor_rollout_ref.actor.loss_agg_mode=token-sum",
        "actor_rollout_ref.actor.fsdp_config.dtype=float32",
        "critic.shuffle=True",
    )
    critic = config.critic
    assert (critic.model.path, critic.model.hub, critic.model.enable_gradient_checkpointing) == (
        "model",
        "modelscope",
        True,
    )
    assert (critic.ppo_mini_batch_size, critic.ppo_epochs, critic.loss_agg_mode) == (16, 2, "token-sum")
    assert (critic.fsdp.dtype, config.actor_rollout_ref.rollout.dtype) == ("float32", "float32")
    assert critic.shuffle is True and config.actor_rollout_ref.actor.shuffle is False
    assert critic.enable is True and critic.optim.lr == 1e-5


@pytest.mark.parametrize(("batch", "want"), [(1024, 256), (256, 256), (64, 64), (300, 300), (512, 256)])
def test_mini_batch_by_default_is_256_where_that_divides(batch: int, want: int) -> None:
    assert load(f"data.train_batch_size={batch}").actor_rollout_ref.actor.ppo_mini_batch_size == want


def test_clip_ratio_sets_both_sides_that_are_not_given() -> None:
    actor = load("actor_rollout_ref.actor.clip_ratio=0.1").actor_rollout_ref.actor
    assert (actor.clip_ratio_low, actor.clip_ratio_high) == (0.1, 0.1)
    actor = load("actor_rollout_ref.actor.clip_ratio_high=0.28").actor_rollout_ref.actor
    assert (actor.clip_ratio_low, actor.clip_ratio_high) == (0.2, 0.28)


def test_micro_batches_are_rows_or_a_token_budget() -> None:
    prefix = "actor_rollout_ref.actor"
    actor = load().actor_rollout_ref.actor
    got = actor.ppo_micro_batch_size_per_gpu, actor.use_dynamic_bsz, actor.ppo_max_token_len_per_gpu
    assert got == (None, True, 4096)
    actor = load(f"{prefix}.ppo_micro_batch_size_per_gpu=4").actor_rollout_ref.actor
    assert (actor.ppo_micro_batch_size_per_gpu, actor.use_dynamic_bsz) == (4, False)
    config = load(f"{prefix}.ppo_micro_batch_size_per_gpu=4", f"{prefix}.use_dynamic_bsz=True")
    assert config.actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu is None
    assert config.provenance.warnings == (
        f"{prefix}.ppo_micro_batch_size_per_gpu has no effect: {prefix}.use_dynamic_bsz=True fills micro-batches to "
        f"{prefix}.ppo_max_token_len_per_gpu.",
    )
    # one longest sequence must fit
    assert load("data.max_response_length=8000").critic.forward_max_token_len_per_gpu == 8512


@pytest.mark.parametrize(
    ("words", "want"),
    [
        ([], True),
        (["algorithm.use_kl_in_reward=False"], False),
        (["algorithm.kl_ctrl.kl_coef=0"], False),
        (["algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=4"], False),
        (["algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=4", "algorithm.kl_ctrl.kl_coef=0.001"], True),
        (["algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=4", "algorithm.use_kl_in_reward=True"], True),
        (["algorithm.adv_estimator=my:own"], False),
    ],
)
def test_kl_in_the_reward_is_on_for_gae_or_when_a_coefficient_is_given(words: list[str], want: bool) -> None:
    assert load(*words).algorithm.use_kl_in_reward is want


def test_config_is_frozen() -> None:
    config = load()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.data.seed = 1  # type: ignore[misc]


def test_sources_tell_default_derived_preset_and_command_line() -> None:
    sources = load("--config-name=grpo", "data.seed=1").provenance.sources
    assert sources["data.seed"] == "command line"
    assert sources["data.shuffle"] == "default"
    assert sources["actor_rollout_ref.rollout.n"] == "preset grpo"
    assert sources["critic.model.path"] == "derived from actor_rollout_ref.model.path"
    assert set(sources) == set(tree.leaves(Config))


def test_cfg_job_prints_effective_values_that_load_again(tmp_path: Path) -> None:
    out, err = printed(*GRPO, "actor_rollout_ref.actor.optim.lr=1e-5", "--cfg", "job")
    values = yaml.safe_load(out)
    assert values["actor_rollout_ref"]["actor"]["optim"]["lr"] == 1e-5
    assert values["critic"]["model"]["path"] == "model" and values["critic"]["enable"] is False
    assert err == ""
    (tmp_path / "again.yaml").write_text(out)
    again = load_config(["--config-path", str(tmp_path), "--config-name", "again"])
    assert config_dict(again) == values == config_dict(load_config([*GRPO, "actor_rollout_ref.actor.optim.lr=1e-5"]))


def test_cfg_job_shows_defaults_and_warnings_without_the_required_keys() -> None:
    out, err = printed("--cfg=job", "trainer.max_actor_ckpt_to_keep=3", "trainer.save_freq=0")
    assert yaml.safe_load(out)["data"]["train_files"] == "???"
    assert err == "warning: trainer.max_actor_ckpt_to_keep has no effect: no checkpoint is written.\n"


def test_a_saved_configuration_tells_where_values_came_from_and_loads_again_in_silence(tmp_path: Path) -> None:
    words = [*GRPO, "trainer.save_freq=5", "actor_rollout_ref.model.custom_chat_template='{{ a }}\n: \"b\"'"]
    config = load_config(words)
    file = tmp_path / "run" / "config.yaml"
    save_config(config, file)
    lines = file.read_text().splitlines()
    assert "  save_freq: 5  # command line" in lines
    assert "  test_freq: -1" in lines
    assert "    path: model  # derived from actor_rollout_ref.model.path" in lines
    again = load_config(["--config-name", str(file)])
    assert config_dict(again) == config_dict(config)
    # it repeats critic.* keys, which do nothing with grpo; nobody asked for them
    assert again.provenance.warnings == ()
    assert again.provenance.notes == (f"Settings come from file {file}; the command line wins over them.",)
    assert [p.name for p in file.parent.iterdir()] == ["config.yaml"]


def test_a_file_of_verls_form_is_merged_below_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "defaults: [ppo_trainer, more, _self_]\n"
        "data: {train_files: ~/t.parquet, val_files: [v.parquet], seed: 7}\n"
        "actor_rollout_ref: {model: {path: m}, actor: {optim: {lr: 1e-5}}}\n"
        "trainer: {experiment_name: 'lr_${actor_rollout_ref.actor.optim.lr}', total_epochs: 3}\n"
    )
    (tmp_path / "more.yaml").write_text("data: {seed: 5, shuffle: false}\n")
    config = load_config([f"--config-path={tmp_path}", "--config-name=mine", "trainer.total_epochs=4"])
    assert (config.data.seed, config.data.shuffle, config.trainer.total_epochs) == (7, False, 4)
    assert config.trainer.experiment_name == "lr_1e-05"
    assert config.data.train_files[0].startswith("/")


def test_a_file_is_checked_like_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(
        "data: {train_batchsize: 4}\ntrainer: {total_epochs: many}\nreward_model: {num_workers: 8}\n"
    )
    file = tmp_path / "bad.yaml"
    assert problems(f"--config-path={tmp_path}", "--config-name=bad") == [
        f"data.train_batchsize: no such key. Did you mean data.train_batch_size? (in file {file})",
        f"trainer.total_epochs='many': expected a whole number. (in file {file})",
        f"reward_model.num_workers: verl has this key, Steepest has not. Use reward.num_workers. (in file {file})",
    ]


def test_files_that_are_not_there_or_cannot_be_read(tmp_path: Path) -> None:
    assert problems("--config-name=grop") == [
        f"--config-name=grop: no file {REPOSITORY / 'steepest/config/presets/grop.yaml'}. "
        f"There are: {', '.join(PRESET_NAMES)}."
    ]
    assert problems(f"--config-path={tmp_path}") == [
        "--config-path: needs --config-name NAME, the file NAME.yaml in that folder."
    ]
    assert problems(f"--config-path={tmp_path}", "--config-name=x") == [
        f"--config-name=x: no file {tmp_path / 'x.yaml'}. The folder has no .yaml file, or is not there."
    ]
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    (message,) = problems(f"--config-path={tmp_path}", "--config-name=broken")
    assert message.startswith(f"--config-name=broken: {tmp_path / 'broken.yaml'} cannot be read: ")


@pytest.mark.parametrize("name", ["my.yaml", "my run.yml", "settings"])
def test_a_file_is_given_by_config(tmp_path: Path, name: str) -> None:
    """Whatever its name; a preset may lie below it, the command line lies above it."""
    file = tmp_path / name
    file.write_text("data: {train_batch_size: 4}\nactor_rollout_ref: {rollout: {n: 3}}\n")
    for words in (["--config", str(file)], [f"--config={file}"]):
        config = load("--config-name=grpo", *words, "data.seed=5")
        assert (config.data.train_batch_size, config.data.seed, config.actor_rollout_ref.rollout.n) == (4, 5, 3)
        assert config.algorithm.adv_estimator == "grpo"
        assert config.provenance.sources["data.train_batch_size"] == f"file {file}"
    sft = load_sft_config(["data.train_files=a", "model.path=m", "--config", str(_written(tmp_path / "sft.yaml"))])
    assert sft.optim.lr == 0.5


def _written(file: Path) -> Path:
    file.write_text("optim: {lr: 0.5}\n")
    return file


def test_a_file_with_defaults_and_a_preset_are_given_by_config(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("data: {seed: 7}\n")
    (tmp_path / "mine.yaml").write_text("defaults: [ppo_trainer, base, _self_]\ndata: {train_batch_size: 4}\n")
    config = load("--config", str(tmp_path / "mine.yaml"))
    assert (config.data.seed, config.data.train_batch_size) == (7, 4)
    assert load("--config=rloo").provenance.sources["algorithm.adv_estimator"] == "preset rloo"


def test_a_file_of_config_that_is_not_there_or_cannot_be_read(tmp_path: Path) -> None:
    presets = f"Give a YAML file, or the name of a preset: {', '.join(PRESET_NAMES)}."
    assert problems("--config=my.yaml") == [f"--config=my.yaml: there is no such file. {presets}"]
    assert problems("--config", str(tmp_path)) == [f"--config={tmp_path}: this is a folder. {presets}"]
    assert problems("--config") == ["--config: needs a value, e.g. --config my.yaml."]
    assert problems("my.yaml") == ["'my.yaml': not a setting. A file of settings is given by --config my.yaml."]
    (tmp_path / "list.yaml").write_text("[1]\n")
    (message,) = problems("--config", str(tmp_path / "list.yaml"))
    assert message.endswith("the file is not a mapping of keys")


def test_loading_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    monkeypatch.chdir(tmp_path)
    handlers = list(logging.getLogger().handlers)
    load("--config-name=grpo")
    assert list(tmp_path.iterdir()) == [] and Path.cwd() == tmp_path
    assert logging.getLogger().handlers == handlers


def help_of(load_job: Callable[[list[str]], object], option: str) -> str:
    out = io.StringIO()
    with redirect_stdout(out), pytest.raises(SystemExit) as caught:
        load_job([option])
    assert caught.value.code == 0
    return out.getvalue()


@pytest.mark.parametrize(("load_job", "schema", "command"), [(load_config, Config, "steepest ppo"),
                                                            (load_sft_config, SFTConfig, "steepest sft")])  # fmt: skip
def test_help_explains_the_important_keys_and_help_all_lists_every_one(
    load_job: Callable[[list[str]], object], schema: type, command: str
) -> None:
    short, full = help_of(load_job, "--help"), help_of(load_job, "--help-all")
    keys = tree.leaves(schema)
    assert short.startswith(f"usage: {command} ") and f"of {len(keys)} keys; --help-all lists all." in short
    shown = _keys_shown(short)
    assert sorted(shown) == sorted(key for key in keys if key in IMPORTANT.split()) and len(shown) > 15
    assert sorted(_keys_shown(full)) == sorted(keys)
    for text in (short, full):
        assert max(len(line) for line in text.splitlines()) <= 200
    assert re.search(r"^  train_files: required +What to train on, one", short, re.MULTILINE)


def _keys_shown(text: str) -> list[str]:
    """The keys under the sections' headings."""
    section, keys = "", []
    for line in text[text.index("settings: ") :].splitlines()[2:]:
        if found := re.match(r"([a-z_.]+):$", line):
            section = found[1]
        elif found := re.match(r"  ([a-z_]\w*): ", line):
            keys.append(f"{section}.{found[1]}")
    return keys


def test_every_important_key_is_one_of_a_job() -> None:
    assert set(IMPORTANT.split()) <= {*tree.leaves(Config), *tree.leaves(SFTConfig)}


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_a_preset_loads_without_a_warning(name: str) -> None:
    """With nothing else given: it states what its algorithm needs, and nothing without effect."""
    config = load("--config-name", name)
    assert config.provenance.warnings == ()
    assert config.algorithm.adv_estimator != "gae" and not config.critic.enable
    assert (config.actor_rollout_ref.rollout.n == 8) == (name != "reinforce_plus_plus")


def test_presets_say_what_their_papers_do() -> None:
    dr_grpo, dapo, gspo, cispo, rloo = (
        load("--config-name", name) for name in ("dr_grpo", "dapo", "gspo", "cispo", "rloo")
    )
    assert not dr_grpo.algorithm.norm_adv_by_std_in_grpo and not dr_grpo.actor_rollout_ref.actor.use_kl_loss
    actor = dapo.actor_rollout_ref.actor
    assert (actor.clip_ratio_low, actor.clip_ratio_high, actor.loss_agg_mode) == (0.2, 0.28, "token-mean")
    assert dapo.algorithm.filter_groups.enable and not dapo.algorithm.use_kl_in_reward
    assert gspo.actor_rollout_ref.actor.policy_loss.loss_mode == "gspo"
    assert gspo.actor_rollout_ref.actor.clip_ratio_high == 4e-4
    assert cispo.actor_rollout_ref.actor.clip_ratio_low == 1.0
    assert rloo.algorithm.adv_estimator == "rloo" and rloo.algorithm.use_kl_in_reward


def test_the_grpo_preset_loads_without_a_warning() -> None:
    config = load("--config-name", "grpo")
    assert config.algorithm.adv_estimator == "grpo" and config.actor_rollout_ref.rollout.n == 8
    assert config.actor_rollout_ref.actor.use_kl_loss and not config.algorithm.use_kl_in_reward
    assert config.provenance.warnings == ()


def test_sft_configuration() -> None:
    config = load_sft_config(["data.train_files=a.jsonl", "model.path=m", "+data.max_length=5000"])
    assert isinstance(config, SFTConfig)
    assert config.optim.lr == 1e-5 and config.model.tokenizer_path == "m"
    assert config.data.val_files == () and config.data.max_token_len_per_gpu == 5000
    assert config.trainer.default_local_dir == "checkpoints/steepest/sft"
    with pytest.raises(ConfigError) as caught:
        load_sft_config(["model.external_lib=m", "data.train_batch_siz=3", "trainer.nnodes=2", "data.train_files=a"])
    assert caught.value.problems == [
        "model.external_lib=m: must be null. No foreign import at start; see model.trust_remote_code.",
        "data.train_batch_siz: no such key. Did you mean data.train_batch_size?",
        "model.path: missing. It has no default; give model.path=Qwen/Qwen2.5-0.5B-Instruct.",
        "trainer.nnodes=2 times trainer.n_gpus_per_node=1 is 2: one process in this version. Set both to 1.",
    ]
