"""Every text that a wrong configuration gives, and that all of them come at once."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.config import load as load_module
from steepest.config import tree, verl_keys
from steepest.config.algorithms import LOSSES, LossSpec
from steepest.config.arguments import OPTIONS
from steepest.config.checks import Deriver, Section
from steepest.config.load import PPO_JOB, SFT_JOB, load_config, load_sft_config
from steepest.config.schema import Config
from steepest.errors import ConfigError
from tests.support.commands import GRPO, REQUIRED

ACTOR, ROLLOUT, MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.model"

CORRECTION = "algorithm.rollout_correction"
GDPO = ("algorithm.adv_estimator=gdpo", f"{ROLLOUT}.n=4")


def problems(*words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config([*REQUIRED, *words])
    return caught.value.problems


def warnings(*words: str) -> list[str]:
    return list(load_config([*REQUIRED, *words]).provenance.warnings)


UNREADABLE = [
    ("data.seed", "'data.seed': not a setting. Write key=value, e.g. trainer.device=cpu."),
    ("=3", "'=3': no key before the equals sign. Write key=value, without spaces around it."),
    ("a.b.=3", "'a.b.=3': 'a.b.' is not a key. Keys look like trainer.device; write key=value."),
    (
        "--trainer.device=cpu",
        f"--trainer.device=cpu: no such option. There are {', '.join(OPTIONS)}. "
        "Keys are written without dashes: trainer.device=cpu",
    ),
    ("-v", f"-v: no such option. There are {', '.join(OPTIONS)}."),
    ("--multirun", "--multirun: Steepest makes one run a command. `steepest sweep` takes several values."),
    ("--cfg=hydra", "--cfg hydra: must be job."),
    (
        "data.seed=1,2",
        "data.seed=1,2: several values for one key make a sweep: that is `steepest sweep`, and this is one run. "
        "A list is written 'data.seed=[1,2]'.",
    ),
    (
        "data.train_files=[a",
        "data.train_files=[a: cannot be read. Lists are written '[a,b]', mappings '{a: b}', and the whole setting goes "
        "in single quotes in the shell.",
    ),
]
WRONG_VALUES = [
    ("data.train_batch_size=many", "data.train_batch_size='many': expected a whole number."),
    ("data.train_batch_size=2.5", "data.train_batch_size=2.5: expected a whole number."),
    ("data.train_batch_size=[2]", "data.train_batch_size=[2]: expected a whole number (found a list)."),
    ("data.train_batch_size=True", "data.train_batch_size=True: expected a whole number (found true or false)."),
    ("data.train_batch_size=null", "data.train_batch_size=null: expected a whole number."),
    ("data.train_batch_size=0", "data.train_batch_size=0: must be at least 1."),
    ("data.val_batch_size=x", "data.val_batch_size='x': expected a whole number or null."),
    (
        "data.val_batch_size=None",
        "data.val_batch_size='None': expected a whole number or null (nothing is written null).",
    ),
    ("data.train_max_samples=-2", "data.train_max_samples=-2: must be -1 or at least 1."),
    ("data.shuffle=1", "data.shuffle=1: expected true or false (found a number)."),
    ("data.shuffle=maybe", "data.shuffle='maybe': expected true or false."),
    ("data.prompt_key={a:1}", "data.prompt_key={'a': 1}: expected text (found a mapping)."),
    ("critic=3", None),
    (
        "data.truncation=lef",
        "data.truncation=lef: must be one of error, left, right, middle. Did you mean left?",
    ),
    ("trainer.resume_mode=x", "trainer.resume_mode=x: must be one of auto, disable, resume_path."),
    (
        "trainer.logger=[console,tensorbord]",
        "trainer.logger=[console,tensorbord]: must be one of brief, console, jsonl, mlflow, swanlab, "
        "tensorboard, wandb, alone or in a list. Did you mean tensorboard?",
    ),
    (f"{ACTOR}.optim.lr=fast", f"{ACTOR}.optim.lr='fast': expected a number."),
    (f"{ACTOR}.optim.lr=nan", f"{ACTOR}.optim.lr=nan: expected a number (not a number at all)."),
    (f"{ACTOR}.optim.lr=inf", f"{ACTOR}.optim.lr=inf: expected a number (not finite)."),
    ("data.seed=4294967296", "data.seed=4294967296: must be at most 4294967295."),
    (f"{ACTOR}.optim.lr=-1", f"{ACTOR}.optim.lr=-1.0: must be at least 0."),
    (f"{ACTOR}.optim.betas=[0.9]", f"{ACTOR}.optim.betas=[0.9]: expected a list of 2 numbers (found 1 of them)."),
    (f"{ACTOR}.optim.betas=[0.9,1.0]", f"{ACTOR}.optim.betas=[0.9,1.0]: must be below 1."),
    (f"{ACTOR}.optim.clip_grad=0", f"{ACTOR}.optim.clip_grad=0.0: must be above 0."),
    (f"{ACTOR}.clip_ratio_c=1", f"{ACTOR}.clip_ratio_c=1.0: must be above 1."),
    (f"{ROLLOUT}.top_p=1.5", f"{ROLLOUT}.top_p=1.5: must be at most 1."),
    (f"{ROLLOUT}.name=sglang", f"{ROLLOUT}.name=sglang: must be one of builtin, hf, vllm."),
    (
        "algorithm.adv_estimator=gpro",
        "algorithm.adv_estimator=gpro: no such advantage estimator. Did you mean grpo? Known: gae, gdpo, gpg, grpo, "
        "grpo_passk, opo, optimal_token_baseline, reinforce_plus_plus, reinforce_plus_plus_baseline, remax, rloo, "
        "or module:function of your own.",
    ),
    (
        f"{ACTOR}.policy_loss.loss_mode=gsp",
        f"{ACTOR}.policy_loss.loss_mode=gsp: no such policy loss. Did you mean gspo? Known: vanilla, gspo, sapo, gpg, "
        "clip_cov, kl_cov, geo_mean, cispo, dppo_tv, dppo_kl, or module:function of your own.",
    ),
    (
        "trainer.experiment_name=${algorithm.nme}",
        "trainer.experiment_name: its ${...} cannot be followed: Interpolation key 'algorithm.nme' not found.",
    ),
    ("data.seed=${data.prompt_key}", "data.seed='prompt': expected a whole number."),
    (
        f"{MODEL}.override_config={{1:2}}",
        f"{MODEL}.override_config={{1: 2}}: expected a mapping {{a: b}}.",
    ),
    ("data.shuffle='2'", "data.shuffle='2': expected true or false."),
    ("data.train_files=[a,null]", "data.train_files=[a,null]: expected text, alone or in a list."),
]
DERIVED_VALUES = [
    (
        f"{ACTOR}.clip_ratio=1.5",
        f"{ACTOR}.clip_ratio=1.5: {ACTOR}.clip_ratio_low=1.5 is derived from it, and must be at most 1.",
    ),
]
UNKNOWN = [
    (f"{ACTOR}.optim.lrr=1", f"{ACTOR}.optim.lrr: no such key. Did you mean {ACTOR}.optim.lr?"),
    ("optim.lr=1", f"optim.lr: no such key. Did you mean {ACTOR}.optim.lr?"),
    ("actor.optim.lr=1", f"actor.optim.lr: no such key. Did you mean {ACTOR}.optim.lr?"),
    ("data.train_file=x", "data.train_file: no such key. Did you mean data.train_files?"),
    ("+trainer.total_epoch=1", "trainer.total_epoch: no such key. Did you mean trainer.total_epochs?"),
    ("~trainer.total_epoch", "trainer.total_epoch: no such key. Did you mean trainer.total_epochs?"),
    ("zzz.qqq=1", "zzz.qqq: no such key. --help-all lists all keys."),
    ("data.seed.x=1", "data.seed.x: no such key. --help-all lists all keys."),
]
REFUSED = [
    (
        f"{ACTOR}.fsdp_config.model_dtype=bf16",
        f"{ACTOR}.fsdp_config.model_dtype=bf16: must be fp32 or float32. Master weights are float32: an update of lr "
        f"1e-6 is lost when it is added to a bfloat16 weight. Leave it out; the dtype of compute is "
        f"{ACTOR}.fsdp_config.dtype.",
    ),
    (
        f"{ROLLOUT}.data_parallel_size=2",
        f"{ROLLOUT}.data_parallel_size=2: must be 1. This version runs in one process: the engine is not split.",
    ),
    (
        f"{ACTOR}.grad_clip=1.0",
        f"{ACTOR}.grad_clip: verl has this key, Steepest has not. Dead in verl: use optim.clip_grad.",
    ),
    (
        f"{ROLLOUT}.multi_turn.max_user_turns=3",
        f"{ROLLOUT}.multi_turn.max_user_turns: verl has this key, Steepest has not. Conversations with tools are not "
        "part of this version; a response is one turn.",
    ),
    (
        "algorithm.filter_groups.max_inflight_gen_batches=2",
        "algorithm.filter_groups.max_inflight_gen_batches=2: must be 1. Rounds are generated one after the other, so "
        "that no response is ever older than the weights.",
    ),
    (
        "reward.reward_kwargs.max_resp_len=99",
        "reward.reward_kwargs.max_resp_len: verl has this key, Steepest has not. The longest response is "
        "data.max_response_length.",
    ),
    (
        f"{ACTOR}.checkpoint.save_contents=[model]",
        f"{ACTOR}.checkpoint.save_contents=[model]: must be [model,optimizer,extra]",
    ),
    ("hydra.run.dir=x", "hydra.run.dir: verl has this key, Steepest has not. Steepest writes no outputs folder"),
]


@pytest.mark.parametrize(("word", "text"), [*UNREADABLE, *WRONG_VALUES, *DERIVED_VALUES, *UNKNOWN, *REFUSED])
def test_text(word: str, text: str | None) -> None:
    # a misspelt required key is not also told as missing, since REQUIRED holds it
    (message,) = problems(word)
    if text is None:
        assert message.startswith(word.partition("=")[0])
    else:
        assert message == text or ((word, text) in REFUSED[-2:] and message.startswith(text))


def test_a_derived_value_out_of_bounds_is_reported_with_the_key_and_the_file_that_gave_it(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"{MODEL.split('.')[0]}: {{actor: {{clip_ratio: 2}}}}\n")
    words = [f"--config-path={tmp_path}", "--config-name=mine"]
    text = f"{ACTOR}.clip_ratio=2.0: {ACTOR}.clip_ratio_low=2.0 is derived from it, and must be at most 1."
    assert problems(*words) == [f"{text} (in file {file})"]
    # what is given is checked as given, and the derived side is within its bounds
    assert problems(*words, f"{ACTOR}.clip_ratio_low=1.1") == [f"{ACTOR}.clip_ratio_low=1.1: must be at most 1."]
    with LOSSES.temporarily(LossSpec("wide", clip_range=(3.0, 0.2))):
        assert problems(f"{ACTOR}.policy_loss.loss_mode=wide") == [
            f"{ACTOR}.policy_loss.loss_mode=wide: {ACTOR}.clip_ratio_low=3.0 is derived from it, and must be at most 1."
        ]


def test_a_derived_value_out_of_bounds_is_reported_with_the_first_key_of_the_chain() -> None:
    section = Section()

    @section.null
    def chain(d: Deriver) -> None:
        d.replace("trainer.log_val_generations", 1, "data.seed")
        d.replace("data.max_prompt_length", 0, "trainer.log_val_generations")
        d.replace("data.max_response_length", 0, "data.max_prompt_length")

    job = dataclasses.replace(PPO_JOB, sections=(section,))
    _, found = load_module._Loading(job, load_module.read_arguments([*REQUIRED, "data.seed=7"])).run()
    # the third is wrong because the second is
    assert found == ["data.seed=7: data.max_prompt_length=0 is derived from it, and must be at least 1."]


def test_a_section_is_not_a_value() -> None:
    (message,) = problems("algorithm.kl_ctrl=0.1")
    assert message == "algorithm.kl_ctrl=0.1: a section, not a value. Its keys: type, kl_coef, horizon, target_kl."


def test_all_problems_come_in_one_error() -> None:
    words = [
        "data.train_batch_siz=4",
        f"{ACTOR}.optim.lr=abc",
        f"{ROLLOUT}.temperature=0",
        "reward_model.enable=True",
        "trainer.device=tpu",
        "trainer.nnodes=2",
        "oops",
    ]
    found = problems(*words)
    assert len(found) == len(words)
    for fragment in ("train_batch_siz", "optim.lr", "temperature 0", "reward_model", "device=tpu", "nnodes=2", "oops"):
        assert sum(fragment in text for text in found) == 1, fragment


def test_a_rule_is_passed_over_when_a_key_it_reads_is_wrong() -> None:
    # without the wrong batch size, the mini-batch would be told not to divide its default, 1024
    assert problems("data.train_batch_size=x", f"{ACTOR}.ppo_mini_batch_size=300") == [
        "data.train_batch_size='x': expected a whole number."
    ]
    assert problems(f"{ACTOR}.ppo_mini_batch_size=x", "data.train_batch_size=10") == [
        f"{ACTOR}.ppo_mini_batch_size='x': expected a whole number or null."
    ]


def test_a_misspelt_required_key_is_told_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(["data.train_file=a", *REQUIRED[1:]])
    assert caught.value.problems == ["data.train_file: no such key. Did you mean data.train_files?"]


RULES = [
    (["data.train_batch_size=64", f"{ACTOR}.ppo_mini_batch_size=24"],
     f"{ACTOR}.ppo_mini_batch_size=24: must divide data.train_batch_size=64, e.g. 16."),
    (["data.train_batch_size=64", f"{ACTOR}.ppo_mini_batch_size=128"],
     f"{ACTOR}.ppo_mini_batch_size=128: must divide data.train_batch_size=64, e.g. 64."),
    (["data.train_batch_size=64", "critic.ppo_mini_batch_size=48"],
     "critic.ppo_mini_batch_size=48: must divide data.train_batch_size=64, e.g. 32."),
    (["algorithm.adv_estimator=grpo"],
     f"{ROLLOUT}.n=1 with algorithm.adv_estimator=grpo: a group of one has no baseline, so every advantage is zero. "
     f"Use {ROLLOUT}.n >= 2."),
    *(([f"algorithm.adv_estimator={name}"],
       f"{ROLLOUT}.n=1 with algorithm.adv_estimator={name}: a group of one has no baseline, so every advantage is "
       f"zero. Use {ROLLOUT}.n >= 2.")
      for name in ("rloo", "opo", "gpg", "grpo_passk", "reinforce_plus_plus_baseline", "optimal_token_baseline")),
    (["algorithm.adv_estimator=reinforce_plus_plus", "critic.enable=True"],
     "critic.enable=True with algorithm.adv_estimator=reinforce_plus_plus: nothing would read the values. Remove it."),
    ([f"{MODEL}.custom_chat_template=./chat_template.jinja"],
     f"{MODEL}.custom_chat_template=./chat_template.jinja: not a Jinja template, it has no {{{{ ... }}}}, so every "
     "prompt would become this text. Give the template itself, not its file: "
     f'{MODEL}.custom_chat_template="$(cat FILE)".'),
    ([f"{ROLLOUT}.temperature=0"],
     f"{ROLLOUT}.temperature=0: temperature 0 is not a policy one can train. Use a value above 0, e.g. 1.0; "
     f"{ROLLOUT}.val_kwargs.temperature is the one for validation."),
    ([f"{ROLLOUT}.tensor_model_parallel_size=2"],
     f"{ROLLOUT}.tensor_model_parallel_size=2: the run has 1 card (trainer.nnodes times trainer.n_gpus_per_node). Use "
     "at most 1."),
    ([f"{ROLLOUT}.name=vllm", f"{ROLLOUT}.max_num_batched_tokens=128"],
     f"{ROLLOUT}.max_num_batched_tokens=128: each of {ROLLOUT}.max_num_seqs=256 sequences takes a token of a pass. "
     "Raise the one or lower the other."),
    ([f"{ROLLOUT}.name=vllm", f"{ROLLOUT}.max_num_batched_tokens=512", f"{ROLLOUT}.enable_chunked_prefill=False"],
     f"{ROLLOUT}.max_num_batched_tokens=512 with {ROLLOUT}.enable_chunked_prefill=False: a sequence of 1024 tokens "
     "(data.max_prompt_length + data.max_response_length) does not fit. Use at least 1024."),
    ([f"{ROLLOUT}.name=vllm", f"{ROLLOUT}.engine_kwargs.vllm={{dtype:half}}"],
     f"{ROLLOUT}.engine_kwargs.vllm.dtype: use {ROLLOUT}.dtype."),
    ([f"{ROLLOUT}.name=vllm", f"{ROLLOUT}.engine_kwargs.vllm={{load_format:auto}}"],
     f"{ROLLOUT}.engine_kwargs.vllm.load_format: Steepest sets it. Remove it."),
    ([f"{ROLLOUT}.name=vllm", f"{ROLLOUT}.engine_kwargs.vllm={{disable_log_stats:false}}"],
     f"{ROLLOUT}.engine_kwargs.vllm.disable_log_stats: Steepest sets it. Remove it."),
    (["trainer.n_gpus_per_node=8"],
     "trainer.nnodes=1 times trainer.n_gpus_per_node=8 is 8: one process in this version. Set both to 1."),
    (["trainer.resume_mode=resume_path"],
     "trainer.resume_mode=resume_path: needs trainer.resume_from_path=.../global_step_N, or use "
     "trainer.resume_mode=auto."),
    ([f"{ACTOR}.use_dynamic_bsz=False"],
     f"{ACTOR}.use_dynamic_bsz=False: needs {ACTOR}.ppo_micro_batch_size_per_gpu, or remove it and micro-batches are "
     "filled to a token budget."),
    (["actor_rollout_ref.ref.log_prob_use_dynamic_bsz=False"],
     "actor_rollout_ref.ref.log_prob_use_dynamic_bsz=False: needs "
     "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu, or remove it and micro-batches are filled to a token "
     "budget."),
    ([f"{ACTOR}.ppo_max_token_len_per_gpu=512"],
     f"{ACTOR}.ppo_max_token_len_per_gpu=512: one sequence may have data.max_prompt_length + data.max_response_length "
     "= 1024 tokens. Use at least 1024."),
    ([f"{ROLLOUT}.max_model_len=1000"],
     f"{ROLLOUT}.max_model_len=1000: one sequence may have data.max_prompt_length + data.max_response_length = 1024 "
     "tokens. Use at least 1024."),
    ([f"{ACTOR}.loss_agg_mode=seq-mean-token-sum-norm"],
     f"{ACTOR}.loss_agg_mode=seq-mean-token-sum-norm: needs {ACTOR}.loss_scale_factor, the fixed length to divide by, "
     "e.g. 512 (data.max_response_length)."),
    ([f"{ACTOR}.policy_loss.loss_mode=clip_cov", f"{ACTOR}.policy_loss.clip_cov_lb=5"],
     f"{ACTOR}.policy_loss.clip_cov_lb=5: must be below clip_cov_ub=5, else no token has a covariance between the "
     "two."),
    (["critic.loss_agg_mode=seq-mean-token-sum-norm"],
     "critic.loss_agg_mode=seq-mean-token-sum-norm: needs critic.loss_scale_factor, the fixed length to divide by, "
     "e.g. 512 (data.max_response_length)."),
    (["critic.enable=False"],
     "critic.enable=False with algorithm.adv_estimator=gae: gae needs values. Remove it."),
    (["algorithm.adv_estimator=grpo", f"{ROLLOUT}.n=2", "critic.enable=True"],
     "critic.enable=True with algorithm.adv_estimator=grpo: nothing would read the values. Remove it."),
    (["algorithm.adv_estimator=grpo", f"{ROLLOUT}.n=2", "trainer.critic_warmup=3"],
     "trainer.critic_warmup=3 without a critic (adv_estimator=grpo): nothing would be trained in those steps. "
     "Remove it."),
    (["trainer.critic_warmup=5", "trainer.total_training_steps=5"],
     "trainer.critic_warmup=5: the actor would never be trained in trainer.total_training_steps=5. Use less."),
    (["algorithm.kl_ctrl.type=adaptive", "algorithm.kl_ctrl.kl_coef=0"],
     "algorithm.kl_ctrl.type=adaptive with kl_coef=0: it is multiplied, so it stays 0. Start above 0."),
    ([f"{ROLLOUT}.val_kwargs.do_sample=True"],
     f"{ROLLOUT}.val_kwargs.do_sample=True with {ROLLOUT}.val_kwargs.temperature=0: greedy. Set a temperature, or "
     "do_sample=False."),
    ([f"{ROLLOUT}.val_kwargs.do_sample=False", f"{ROLLOUT}.val_kwargs.temperature=0.6"],
     f"{ROLLOUT}.val_kwargs.do_sample=False with {ROLLOUT}.val_kwargs.temperature=0.6: greedy is temperature=0."),
    ([f"{ROLLOUT}.val_kwargs.n=4"],
     f"{ROLLOUT}.val_kwargs.n=4 with {ROLLOUT}.val_kwargs.temperature=0: the same answer 4 times. Set a temperature."),
    (["data.tokenizer=a", f"{MODEL}.tokenizer_path=b"],
     f"data.tokenizer=a and {MODEL}.tokenizer_path=b: two tokenizers. Give one."),
    (["trainer.val_only=True", "trainer.val_before_train=False"],
     "trainer.val_only=True with trainer.val_before_train=False: nothing to do. Remove one of them."),
    (["trainer.max_actor_ckpt_to_keep=2", "trainer.max_critic_ckpt_to_keep=3"],
     "trainer.max_actor_ckpt_to_keep=2 and trainer.max_critic_ckpt_to_keep=3: a checkpoint holds actor and critic "
     "together. Give one of them, or the same number."),
    (["data.train_max_samples=8", "data.train_batch_size=1024"],
     "data.train_max_samples=8: fewer than data.train_batch_size=1024, so no batch is ever full. "
     "Use data.train_batch_size <= 8."),
    (["critic.share_base=head"],
     f"critic.share_base=head: the actor's base is frozen with LoRA only. Set {MODEL}.lora_rank, e.g. 16, or "
     "remove it."),
    (["critic.share_base=adapter", f"{MODEL}.lora_rank=4", "critic.model.lora_rank=0"],
     "critic.share_base=adapter with critic.model.lora_rank=0: an adapter of rank 0 is none. Remove the rank."),
    (["critic.share_base=head", f"{MODEL}.lora_rank=4", "critic.model.lora_rank=8"],
     "critic.share_base=head with critic.model.lora_rank=8: a head has no adapter. Remove the rank, or use "
     "critic.share_base=adapter."),
    (["critic.share_base=adapter", f"{MODEL}.lora_rank=4", f"{MODEL}.path=a", "critic.model.path=b"],
     "critic.model.path=b: with critic.share_base=adapter the critic runs on the actor's base, where it is a. "
     "Remove it, or give the critic a model of its own (critic.share_base=null)."),
    (["critic.share_base=head", f"{MODEL}.lora_rank=4", f"{MODEL}.revision=v1", "critic.model.revision=v2"],
     "critic.model.revision=v2: with critic.share_base=head the critic runs on the actor's base, where it is v1. "
     "Remove it, or give the critic a model of its own (critic.share_base=null)."),
    (["critic.share_base=adapter", f"{MODEL}.lora_rank=4", f"{ACTOR}.fsdp_config.dtype=bfloat16",
      "critic.fsdp.dtype=float32"],
     "critic.fsdp.dtype=float32: with critic.share_base=adapter the critic runs on the actor's base, where it is "
     "bfloat16. Remove it, or give the critic a model of its own (critic.share_base=null)."),
    ([f"{MODEL}.lora_rank=4", f"{MODEL}.target_modules=[all-linear,q_proj]"],
     f"{MODEL}.target_modules=[all-linear,q_proj]: all-linear stands alone, for all linear layers. Give it, or names "
     "of layers."),
    ([f"{MODEL}.lora_rank=4", f"{MODEL}.target_modules=[]"],
     f"{MODEL}.target_modules=[]: no layer would be trained. Give names of layers, or all-linear."),
    (["critic.model.lora_rank=4", "critic.model.exclude_modules=all-linear", "critic.model.target_modules=[q_proj]"],
     "critic.model.exclude_modules=[all-linear]: nothing would be left. Give names of layers."),
    (["reward.overlong_buffer.enable=True"],
     "reward.overlong_buffer.len=null: must be at most data.max_response_length=512, the tokens before that limit in "
     "which the penalty grows, e.g. 102."),
    (["reward_model.overlong_buffer.enable=True", "reward_model.overlong_buffer.len=513"],
     "reward.overlong_buffer.len=513: must be at most data.max_response_length=512, the tokens before that limit in "
     "which the penalty grows, e.g. 102."),
    (["algorithm.filter_groups.enable=True"],
     f"algorithm.filter_groups.enable=True with {ROLLOUT}.n=1: a group of one never differs, so nothing would be left. "
     f"Use {ROLLOUT}.n >= 2."),
    (["algorithm.mask_equal_groups=True"],
     f"algorithm.mask_equal_groups=True with {ROLLOUT}.n=1: a group of one never differs, so nothing would be left. "
     f"Use {ROLLOUT}.n >= 2."),
    (["trainer.experiment_name=a/../b"],
     "trainer.experiment_name='a/../b': has an empty part, . or .. between slashes, and it names a folder. Choose "
     "another."),
    (["trainer.project_name=~/runs"],
     "trainer.project_name='~/runs': begins with ~/, which a shell takes for a home folder, and it names a folder. "
     "Choose another."),
    (["trainer.project_name="],
     "trainer.project_name='': is empty, and it names a folder. Choose another."),
    ([f"trainer.project_name={'n' * 250}"],
     f"trainer.project_name='{'n' * 60}': is longer than 242 bytes, and it names a folder. Choose another."),
    ([f"{CORRECTION}.rollout_is=token", f"{CORRECTION}.rollout_is_threshold=0.5_0.9"],
     f"{CORRECTION}.rollout_is_threshold=0.5_0.9: 1, the ratio of two policies that agree, must be within."),
    ([f"{CORRECTION}.rollout_is=token", f"{CORRECTION}.rollout_is_threshold=0.5_2_0"],
     f"{CORRECTION}.rollout_is_threshold=0.5_2_0: must be a number, or low_high, e.g. 0.5_2.0."),
    ([f"{CORRECTION}.rollout_is=sequence", f"{CORRECTION}.rollout_is_threshold=high"],
     f"{CORRECTION}.rollout_is_threshold=high: must be a number, or low_high, e.g. 0.5_2.0."),
    ([f"{CORRECTION}.rollout_rs=token_k1"],
     f"{CORRECTION}.rollout_rs=[token_k1]: needs {CORRECTION}.rollout_rs_threshold, one each or one for all: a band of "
     "ratios for k1, e.g. 0.5_2.0, a divergence in nats for k2 and k3, e.g. 0.01."),
    ([f"{CORRECTION}.rollout_rs=[token_k1,seq_max_k3]", f"{CORRECTION}.rollout_rs_threshold=0.5_2"],
     f"{CORRECTION}.rollout_rs_threshold: 0.5_2 for seq_max_k3: must be one number, a divergence in nats, "
     "e.g. 0.01."),
    ([f"{CORRECTION}.rollout_rs=[token_k1,seq_max_k3]", f"{CORRECTION}.rollout_rs_threshold=[0.5_2.0,1,2]"],
     f"{CORRECTION}.rollout_rs_threshold: 3 thresholds for 2 rejections: give one each, or one for all."),
    ([f"{CORRECTION}.rollout_rs=[token_k2,token_k2]", f"{CORRECTION}.rollout_rs_threshold=1"],
     f"{CORRECTION}.rollout_rs=[token_k2,token_k2]: one of them twice. Give it once."),
    ([f"{CORRECTION}.bypass_mode=True", f"{CORRECTION}.rollout_is=token"],
     f"{CORRECTION}.bypass_mode=True with {CORRECTION}.rollout_is=token: the loss's ratio is training over rollout "
     f"there, so the weight would be applied twice. Remove rollout_is, or use {CORRECTION}.loss_type=reinforce."),
    ([f"{CORRECTION}.bypass_mode=True", f"{CORRECTION}.rollout_is=token", f"{CORRECTION}.loss_type=reinforce",
      f"{CORRECTION}.rollout_is_batch_normalize=True"],
     f"{CORRECTION}.bypass_mode=True with {CORRECTION}.rollout_is_batch_normalize=True: weights are made in the update "
     "there, a micro-batch at a time, so there is no batch to take a mean of. Remove one of them."),
    ([f"{CORRECTION}.bypass_mode=True", f"{CORRECTION}.rollout_rs=token_k2", f"{CORRECTION}.rollout_rs_threshold=1"],
     f"{CORRECTION}.bypass_mode=True with {CORRECTION}.rollout_rs: rejection compares the rollout's log-probs with "
     "those of the pass that bypass mode leaves out. Remove one of them."),
    ([f"{CORRECTION}.bypass_mode=True", f"{ACTOR}.old_log_probs=recompute"],
     f"{CORRECTION}.bypass_mode=True with {ACTOR}.old_log_probs=recompute: one leaves the pass out, the other asks for "
     "it. Remove one."),
    ([f"{CORRECTION}.rollout_is=token", f"{ROLLOUT}.top_p=0.9"],
     f"{CORRECTION}.rollout_is with {ROLLOUT}.top_p=0.9, top_k=-1: the engine's log-probs are those of the filtered "
     "choice, which never draws some tokens, so no weight can correct it. Use top_p=1 and top_k=-1."),
    ([f"{CORRECTION}.bypass_mode=True", f"{ROLLOUT}.top_k=20"],
     f"{CORRECTION}.bypass_mode with {ROLLOUT}.top_p=1, top_k=20: the engine's log-probs are those of the filtered "
     "choice, which never draws some tokens, so no weight can correct it. Use top_p=1 and top_k=-1."),
    (["reward.functions={mth: 1}"],
     "reward.functions: no such reward: mth. Did you mean math? Known: grader, exact, format, gsm8k, length, math, "
     "multiple_choice, numeric, reward_model, judge, or file.py:function of your own."),
    (["reward.functions={math: {weigth: 2}}"],
     "reward.functions.math={weigth: 2}: expected its weight, a number, or a mapping with it: "
     "'reward.functions={math: {weight: 1.0, option: value}}'."),
    (["reward.functions={math: yes}"],
     "reward.functions.math=yes: expected its weight, a number, or a mapping with it: "
     "'reward.functions={math: {weight: 1.0, option: value}}'."),
    (["reward.functions={math: 0}"],
     "reward.functions.math: weight 0 changes nothing. Remove it, or give another weight."),
    (["reward.functions={grader: {weight: 1, mode: flexible}}"],
     "reward.functions.grader: takes no option (mode). What can be set is reward.mode."),
    (["reward.functions={'a.py:mine': 1, 'b.py:mine': 1}"],
     "reward.functions: two rewards are called mine, so their scores could not be distinguished. Rename one."),
    (["custom_reward_function.path=/tmp/mine.py", "reward.functions={math: 1}"],
     "custom_reward_function.path=/tmp/mine.py: it scores every row, and reward.functions says otherwise. Remove one; "
     "in a sum your function is 'reward.functions={/tmp/mine.py:compute_score: 1.0}'."),
    (["reward_model.enable=True"],
     "reward.functions names reward_model: set reward.reward_model.model_path, the folder or hub id of the model."),
    (["reward.reward_model.enable=False", "reward.functions={reward_model: 1}"],
     "reward.reward_model.enable=False: reward.functions names reward_model. Make the two agree, or leave enable out."),
    (["reward.reward_model.enable=True", "reward.functions={math: 1}"],
     "reward.reward_model.enable=True: reward.functions names no reward_model. Make the two agree, or leave enable "
     "out."),
    (["reward.functions={judge: 1}", "reward.judge.base_url=http://127.0.0.1:1/v1"],
     "reward.functions names judge: set reward.judge.model."),
    (["reward.functions={judge: 1}", "reward.judge.base_url=127.0.0.1:1", "reward.judge.model=m"],
     "reward.judge.base_url=127.0.0.1:1: expected an address that begins with http:// or https://."),
    ([*GDPO],
     "algorithm.gdpo_reward_keys=null with algorithm.adv_estimator=gdpo: it scales several rewards, each in its group, "
     "and there is none. Name two or more in reward.functions or here, or use algorithm.adv_estimator=grpo for one."),
    ([*GDPO, "reward.functions={exact: 1}"],
     "algorithm.gdpo_reward_keys=null with algorithm.adv_estimator=gdpo: it scales several rewards, each in its group, "
     "and there is 1. Name two or more in reward.functions or here, or use algorithm.adv_estimator=grpo for one."),
    ([*GDPO, "algorithm.gdpo_reward_keys=[acc,acc]"],
     "algorithm.gdpo_reward_keys=[acc,acc]: one of them twice. Give it once, with its whole weight in "
     "algorithm.gdpo_reward_weights."),
    ([*GDPO, "algorithm.gdpo_reward_keys=[acc,format]", "algorithm.gdpo_reward_weights=[1.0]"],
     "algorithm.gdpo_reward_weights has 1 numbers for the 2 rewards acc, format. Give one each."),
    ([*GDPO, "algorithm.gdpo_reward_keys=[acc,format]", "algorithm.gdpo_reward_weights=[1.0,0.0]"],
     "algorithm.gdpo_reward_weights: weight 0 changes nothing. Remove format from algorithm.gdpo_reward_keys."),
    ([*GDPO, "algorithm.gdpo_reward_keys=[acc,format]", "algorithm.use_kl_in_reward=True"],
     "algorithm.use_kl_in_reward=True with algorithm.adv_estimator=gdpo: it reads rewards by name, and the KL penalty "
     "is in none of them, so it would change nothing. Use actor_rollout_ref.actor.use_kl_loss=True."),
    ([*GDPO, "algorithm.gdpo_reward_keys=[acc,overlong_reward]", "reward.overlong_buffer.enable=True",
      "reward.overlong_buffer.len=8", "reward.overlong_buffer.log=False"],
     "reward.overlong_buffer.enable=True with algorithm.adv_estimator=gdpo: it reads rewards by name, so the penalty "
     "would change nothing. Name it in algorithm.gdpo_reward_keys as overlong_reward, with "
     "reward.overlong_buffer.log=True."),
    ([*GDPO, "algorithm.gdpo_reward_keys=[acc,format]", "algorithm.mask_equal_groups=True"],
     "algorithm.mask_equal_groups=True with algorithm.adv_estimator=gdpo: responses whose scores are equal in sum may "
     "differ in every reward, and gdpo learns from that. Remove it."),
]  # fmt: skip


@pytest.mark.parametrize(("words", "text"), RULES)
def test_rule(words: list[str], text: str) -> None:
    _, found = _loaded(tuple(words))
    assert found == [text]


def test_every_rule_has_a_case() -> None:
    seen = set()
    for words, _ in RULES:
        for rule in PPO_JOB.rules:
            config, _ = _loaded(tuple(words))
            if list(rule.check(config, lambda key, words=words: any(w.startswith(f"{key}=") for w in words))):
                seen.add(rule.check.__name__)
    seen.add("hub_switches_are_clear")  # reads the environment: test_environment.py
    assert seen == {rule.check.__name__ for rule in PPO_JOB.rules}


@functools.cache
def _loaded(words: tuple[str, ...]) -> tuple[Config, list[str]]:
    """The Config as the rules see it, and what they find."""
    return load_module._Loading(PPO_JOB, load_module.read_arguments([*REQUIRED, *words])).run()


def test_sft_rules() -> None:
    with pytest.raises(ConfigError) as caught:
        load_sft_config(
            ["data.train_files=a", "model.path=m", "data.max_token_len_per_gpu=100", "trainer.resume_mode=resume_path",
             "model.lora_rank=2", "model.target_modules=[]"]
        )  # fmt: skip
    assert sorted(text.split(":")[0] for text in caught.value.problems) == [
        "data.max_token_len_per_gpu=100",
        "model.target_modules=[]",
        "trainer.resume_mode=resume_path",
    ]


LORA = (f"{MODEL}.lora_rank=8", f"{ACTOR}.optim.lr=1e-5", "critic.optim.lr=1e-4")
REFERENCE_OFF = "no reference is needed: algorithm.use_kl_in_reward and actor.use_kl_loss are off"
WARNINGS = [
    (["critic.optim.lr=1e-5", "critic.cliprange_value=0.2", "algorithm.lam=0.9", *GRPO[3:]],
     ["critic.optim.lr, critic.cliprange_value have no effect: this run has no critic (algorithm.adv_estimator).",
      "algorithm.lam has no effect: algorithm.adv_estimator is not gae."]),
    (["algorithm.adv_estimator=rloo", f"{ROLLOUT}.n=4", "algorithm.gamma=0.9",
      "algorithm.norm_adv_by_std_in_grpo=False"],
     ["algorithm.gamma has no effect: algorithm.adv_estimator is none of gae and reinforce_plus_plus.",
      "algorithm.norm_adv_by_std_in_grpo has no effect: algorithm.adv_estimator is none of gdpo, grpo and "
      "grpo_passk."]),
    (["algorithm.adv_estimator=reinforce_plus_plus", "algorithm.gamma=0.9", "algorithm.lam=0.9"],
     ["algorithm.lam has no effect: algorithm.adv_estimator is not gae."]),
    (["algorithm.adv_estimator=grpo_passk", f"{ROLLOUT}.n=4", "algorithm.norm_adv_by_std_in_grpo=False"], []),
    (["algorithm.use_kl_in_reward=False", "algorithm.kl_ctrl.kl_coef=0.01"],
     ["algorithm.kl_ctrl.kl_coef has no effect: algorithm.use_kl_in_reward is off."]),
    (["algorithm.use_kl_in_reward=False", "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4"],
     [f"actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu has no effect: {REFERENCE_OFF}."]),
    ([f"{ACTOR}.kl_loss_coef=0.01"],
     [f"{ACTOR}.kl_loss_coef has no effect: {ACTOR}.use_kl_loss is off "
      "(for the reward: algorithm.use_kl_in_reward)."]),
    (["algorithm.kl_ctrl.target_kl=0.2"],
     ["algorithm.kl_ctrl.target_kl has no effect: algorithm.kl_ctrl.type is fixed."]),
    (["algorithm.use_kl_in_reward=True", "algorithm.kl_ctrl.kl_coef=0"],
     ["algorithm.use_kl_in_reward=True with kl_ctrl.kl_coef=0: the KL is measured, and the reward is unchanged."]),
    ([f"{ROLLOUT}.name=hf", f"{ROLLOUT}.gpu_memory_utilization=0.3", f"{ROLLOUT}.max_num_seqs=4"],  # the last acts
     [f"{ROLLOUT}.gpu_memory_utilization has no effect: {ROLLOUT}.name=hf keeps no KV cache of its own; "
      f"{ROLLOUT}.max_num_seqs bounds its memory."]),
    ([f"{ROLLOUT}.max_model_len=5000"],
     [f"{ROLLOUT}.max_model_len has no effect: no sequence is longer than data.max_prompt_length + "
      "data.max_response_length."]),
    ([f"{ROLLOUT}.top_p=0.9"],
     [f"{ROLLOUT}.top_p=0.9, top_k=-1: responses are drawn from a filtered distribution, the losses use the whole one, "
      "so the samples are not quite the policy's, and mismatch/* is not measured. For training use top_p=1 and "
      f"top_k=-1; filters for validation are {ROLLOUT}.val_kwargs."]),
    ([f"{ACTOR}.use_kl_loss=True", f"{ACTOR}.kl_loss_type=k1"],
     [f"{ACTOR}.kl_loss_type=k1: the expected gradient of this estimator as a loss is zero. Use low_var_kl, or k1+ "
      "for its value with a true gradient."]),
    ([f"{ACTOR}.clip_ratio=0.1", f"{ACTOR}.clip_ratio_low=0.2", f"{ACTOR}.clip_ratio_high=0.28"],
     [f"{ACTOR}.clip_ratio has no effect: clip_ratio_low and clip_ratio_high are both given."]),
    (["trainer.max_actor_ckpt_to_keep=3", "trainer.save_freq=0"],
     ["trainer.max_actor_ckpt_to_keep has no effect: no checkpoint is written."]),
    ([f"{ROLLOUT}.enforce_eager=True", f"{ROLLOUT}.engine_kwargs.vllm={{x:1}}"],
     [f"{ROLLOUT}.enforce_eager, {ROLLOUT}.engine_kwargs.vllm have no effect: they are vLLM's, and {ROLLOUT}.name is "
      "another engine."]),
    ([f"{ROLLOUT}.name=hf", f"{ROLLOUT}.free_cache_engine=True"],
     [f"{ROLLOUT}.free_cache_engine has no effect: {ROLLOUT}.name=hf holds nothing between rollouts."]),
    (["trainer.balance_batch=True"],
     ["trainer.balance_batch has no effect: there is one process, so there is nothing to balance."]),
    (["trainer.log_val_generations=3", "trainer.val_before_train=False"],
     ["trainer.log_val_generations has no effect: there is no validation: trainer.val_before_train is off and "
      "trainer.test_freq is -1."]),
    (["trainer.resume_from_path=x"], ["trainer.resume_from_path has no effect: resume_mode is not resume_path."]),
    (["reward.mode=flexible", "custom_reward_function.path=x.py"],
     ["reward.mode has no effect: custom_reward_function scores."]),
    ([f"{ACTOR}.optim.min_lr_ratio=0.1"],
     [f"{ACTOR}.optim.min_lr_ratio has no effect: {ACTOR}.optim.lr_scheduler_type is constant."]),
    (["critic.forward_micro_batch_size_per_gpu=4"],
     ["critic.forward_micro_batch_size_per_gpu has no effect: the critic fills micro-batches to a token budget; "
      "critic.ppo_micro_batch_size_per_gpu is null."]),
    (["algorithm.norm_adv_by_std_in_grpo=False"],
     ["algorithm.norm_adv_by_std_in_grpo has no effect: algorithm.adv_estimator is none of gdpo, grpo and "
      "grpo_passk."]),
    ([f"{ACTOR}.data_loader_seed=1"], [f"{ACTOR}.data_loader_seed has no effect: {ACTOR}.shuffle is off."]),
    ([f"{MODEL}.lora_alpha=32", f"{MODEL}.target_modules=[q_proj]"],
     [f"{MODEL}.lora_alpha, {MODEL}.target_modules have no effect: {MODEL}.lora_rank=0 trains all weights, without an "
      "adapter."]),
    ([*LORA, "critic.model.exclude_modules=[q_proj]"],
     ["critic.model.exclude_modules has no effect: critic.model.lora_rank=0 trains all weights, without an adapter."]),
    ([*LORA, "critic.share_base=head", "critic.model.lora_alpha=8", "critic.fsdp.dtype=auto"],
     ["critic.model.lora_alpha, critic.fsdp.dtype have no effect: critic.share_base=head trains a value head alone, on "
      "hidden states that are there already."]),
    ([*LORA, "critic.share_base=head", "critic.forward_max_token_len_per_gpu=9999"],
     ["critic.forward_max_token_len_per_gpu has no effect: critic.share_base=head reads its values in the reference's "
      "own pass."]),
    ([*LORA, "critic.share_base=head", "critic.forward_max_token_len_per_gpu=9999", "algorithm.use_kl_in_reward=False"],
     []),
    ([f"{MODEL}.lora_rank=8", "critic.share_base=adapter"],
     [f"{ACTOR}.optim.lr=1e-06 is the default for all weights; with so few of them trained, about 1e-5 is usual: see "
      "docs/lora.md.",
      "critic.optim.lr=1e-05 is the default for all weights; with so few of them trained, about 1e-4 is usual: see "
      "docs/lora.md."]),
    ([f"{MODEL}.lora_rank=8", "critic.share_base=head", f"{ACTOR}.optim.lr=1e-5"],
     ["critic.optim.lr=1e-05 is the default for all weights; with so few of them trained, about 1e-3 is usual: see "
      "docs/lora.md."]),
    ([*GRPO, "algorithm.lam_critic=1.0", "algorithm.length_adaptive_alpha=0.05"],
     ["algorithm.lam_critic, algorithm.length_adaptive_alpha have no effect: algorithm.adv_estimator is not gae."]),
    ([*GRPO, "algorithm.gdpo_reward_keys=[acc,format]", "algorithm.gdpo_reward_weights=[1.0,0.5]"],
     ["algorithm.gdpo_reward_keys, algorithm.gdpo_reward_weights have no effect: algorithm.adv_estimator is not "
      "gdpo."]),
    (["algorithm.lam=0.9", "algorithm.lam_critic=1.0", "algorithm.length_adaptive_alpha=0.05"],
     ["algorithm.lam has no effect: length_adaptive_alpha gives the advantages' lambda and lam_critic the returns'."]),
    (["algorithm.filter_groups.max_num_gen_batches=3", "algorithm.filter_groups.max_inflight_gen_batches=1"],
     ["algorithm.filter_groups.max_num_gen_batches has no effect: algorithm.filter_groups.enable is off."]),
    (["algorithm.pf_ppo.reweight_method=max_min"],
     ["algorithm.pf_ppo.reweight_method has no effect: algorithm.use_pf_ppo is off."]),
    (["algorithm.use_pf_ppo=True", "algorithm.pf_ppo.reweight_method=max_min", "algorithm.pf_ppo.weight_pow=3"],
     ["algorithm.pf_ppo.weight_pow has no effect: algorithm.pf_ppo.reweight_method is not pow."]),
    (["algorithm.mask_truncated=True", "algorithm.bootstrap_truncated=True"],
     ["algorithm.bootstrap_truncated has no effect: algorithm.mask_truncated leaves truncated responses out."]),
    (["reward.reward_kwargs.overlong_buffer_cfg.penalty_factor=2"],
     ["reward.overlong_buffer.penalty_factor has no effect: reward.overlong_buffer.enable is off."]),
    (["trainer.critic_warmup_returns=monte_carlo"],
     ["trainer.critic_warmup_returns has no effect: trainer.critic_warmup is 0."]),
    ([f"{CORRECTION}.rollout_is_threshold=3", f"{CORRECTION}.rollout_is_batch_normalize=True"],
     [f"{CORRECTION}.rollout_is_threshold, {CORRECTION}.rollout_is_batch_normalize have no effect: "
      f"{CORRECTION}.rollout_is is null."]),
    ([f"{CORRECTION}.rollout_rs_threshold=3"],
     [f"{CORRECTION}.rollout_rs_threshold has no effect: {CORRECTION}.rollout_rs is null."]),
    ([f"{CORRECTION}.loss_type=reinforce"],
     [f"{CORRECTION}.loss_type has no effect: {CORRECTION}.bypass_mode is off."]),
    ([f"{CORRECTION}.bypass_mode=True", f"{CORRECTION}.loss_type=reinforce", f"{ACTOR}.clip_ratio_high=0.3"],
     [f"{ACTOR}.clip_ratio_high has no effect: {CORRECTION}.loss_type=reinforce stands for the policy loss in bypass "
      "mode."]),
    (["reward.functions={math: 1}", "reward.mode=flexible"],
     ["reward.mode has no effect: no reward of reward.functions has modes."]),
    (["reward.functions={reward_model: 1}", "reward.reward_model.model_path=/", "reward.timeout_s=3",
      "reward.reward_model.revision=x"],
     ["reward.timeout_s has no effect: no reward of reward.functions runs in worker processes.",
      "reward.reward_model.revision has no effect: reward.reward_model.model_path is on this machine."]),
    (["reward_model.micro_batch_size_per_gpu=4", "reward.judge.max_retries=1"],
     ["reward.reward_model.micro_batch_size_per_gpu has no effect: reward.functions names no reward_model, and "
      "reward.reward_model.enable is off.",
      "reward.judge.max_retries has no effect: reward.functions names no judge."]),
]  # fmt: skip


def test_a_value_that_asks_for_nothing_is_no_warning() -> None:
    assert warnings(*GRPO[3:], "trainer.critic_warmup=0") == []


@pytest.mark.parametrize(("words", "texts"), WARNINGS)
def test_a_key_without_effect_is_told_once(words: list[str], texts: list[str]) -> None:
    assert warnings(*words) == texts


@pytest.mark.parametrize(
    "word",
    [
        f"{MODEL}.use_remove_padding=True",
        f"{ACTOR}.fsdp_config.param_offload=False",
        f"{ACTOR}.fsdp_config.model_dtype=fp32",
        f"{ACTOR}.strategy=fsdp2",
        f"{ACTOR}.checkpoint.save_contents=['model','optimizer','extra','hf_model']",
        f"{ROLLOUT}.mode=async",
        f"{ROLLOUT}.calculate_log_probs=True",
        f"{ROLLOUT}.multi_turn.enable=False",
        f"{MODEL}.lora_rank=0",
        "reward_model.enable=False",
        "algorithm.use_pf_ppo=False",
    ],
)
def test_verls_keys_that_ask_for_what_is_so_anyway_are_let_through(word: str) -> None:
    assert warnings(word) == []


def test_true_is_not_one() -> None:
    assert len(problems(f"{ROLLOUT}.data_parallel_size=True")) == 1


def test_every_key_of_verl_is_ours_or_answered_by_name() -> None:
    lines = Path(__file__).with_name("verl_keys.txt").read_text().splitlines()
    keys = [key for line in lines if line and not line.startswith("#") for key in verl_keys.expand(line)]
    assert len(keys) > 400 and len(set(keys)) == len(keys)
    book = PPO_JOB.book
    strangers = []
    for key in keys:
        known = book.leaf_of(book.aliases.get(key, key))[0] is not None or book.is_ignored(key)
        if not known and verl_keys.find(verl_keys.REFUSED, key) is None:
            strangers.append(key)
    assert strangers == []


def test_no_key_is_both_ours_and_refused_and_every_pointer_exists() -> None:
    for job in (PPO_JOB, SFT_JOB):
        book = job.book
        assert not set(book.leaves) & (set(book.refused) | set(book.no_effect))
        assert set(book.aliases.values()) <= set(book.leaves)
        for refusal in book.refused.values():
            for key in re.findall(
                r"\b(?:data|trainer|actor_rollout_ref|algorithm|reward|engine)\.[a-z_.]+\w", refusal.reason
            ):
                assert key in book.leaves or key in tree.sections(job.schema), (key, refusal.reason)


def _typos() -> list[tuple[str, str]]:
    """(misspelt key, key): for every key of five letters or more, one letter doubled or left out, by turns."""
    out: list[tuple[str, str]] = []
    for key in tree.leaves(Config):
        section, _, name = key.rpartition(".")
        if len(name) < 5:
            continue
        at = len(name) // 2
        typo = name[:at] + name[at] + name[at:] if len(out) % 2 else name[:at] + name[at + 1 :]
        out.append((f"{section}.{typo}", key))
    return out


def test_typos_are_answered_with_the_key_that_was_meant() -> None:
    book, typos = PPO_JOB.book, _typos()
    assert len(typos) > 100
    assert [(typo, book.suggest(typo)) for typo, key in typos if book.suggest(typo) != key] == []


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(tree.leaves(Config))), st.integers(0, 200), st.sampled_from("abcdefgxyz_"))
def test_a_key_with_one_wrong_letter_is_never_accepted(key: str, at: int, letter: str) -> None:
    at %= len(key)
    typo = key[:at] + letter + key[at + 1 :]
    book = PPO_JOB.book
    if typo != key and typo not in book.leaves and not typo.startswith("."):
        text = book.problem_of(typo, 1)
        assert text is not None and text.startswith(typo)
