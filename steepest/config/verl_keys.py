"""verl's keys that Steepest does not have, each with the reason and the nearest thing that it has.

Three kinds:
- `REFUSED`: the key, or everything below it, is answered by name. A value that asks for what Steepest does anyway
  (`agrees`: `use_remove_padding=True`, `param_offload=False`) is let through, so that verl's commands run.
- Those of them that are `harmless`: they say where or how fast the same numbers are computed. Any other value is let
  through with one printed warning.
- `NO_EFFECT`: keys that are let through with a warning whatever their value.
`ALIASES` are second names of keys that Steepest has.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any

from steepest.config.checks import ACTOR, MODEL, REF, ROLLOUT


@dataclass(frozen=True)
class Refusal:
    """Why a key is not here, what to use instead, and the values that ask for nothing else than Steepest does."""

    reason: str
    agrees: tuple[Any, ...] = ()
    harmless: bool = False
    """Another value would change where or how fast numbers are computed, and not the numbers."""

    def accepts(self, value: Any) -> bool:
        """Whether the value asks for what is so anyway. True and 1 are not the same."""
        return any(value == one and type(value) is type(one) for one in self.agrees)


ALIASES = {
    "reward.custom_reward_function.path": "custom_reward_function.path",
    "reward.custom_reward_function.name": "custom_reward_function.name",
    "reward.custom_reward_function.reward_kwargs": "custom_reward_function.reward_kwargs",
    "reward_model.enable": "reward.reward_model.enable",
    "reward_model.model.path": "reward.reward_model.model_path",
    "reward_model.model.trust_remote_code": "reward.reward_model.trust_remote_code",
    "reward_model.micro_batch_size_per_gpu": "reward.reward_model.micro_batch_size_per_gpu",
    "reward_model.micro_batch_size": "reward.reward_model.micro_batch_size_per_gpu",
    # verl's older form counts the sequences of all cards; with one card, the only case here, that is the same number
    **{
        f"{section}_micro_batch_size": f"{section}_micro_batch_size_per_gpu"
        for section in (f"{ACTOR}.ppo", f"{REF}.log_prob", f"{ROLLOUT}.log_prob", "critic.ppo", "critic.forward")
    },
    **{
        f"{section}.{name}": f"reward.overlong_buffer.{name}"
        for section in ("reward_model.overlong_buffer", "reward.reward_kwargs.overlong_buffer_cfg")
        for name in ("enable", "len", "penalty_factor", "log")
    },
}

_ONE_PROCESS = "This version runs in one process"
_ONE = "this version runs in one process"
_FSDP = f"{{{ACTOR}.fsdp_config,{REF}.fsdp_config,critic.fsdp,critic.model.fsdp_config}}"
"""The sections of sharding; the last is what the critic's was called before."""
_ONE_CARD = "Models are trained whole on one device: leave the section out."
_OFF = (False, None)
_CHOSEN = "Rewards are chosen by data source, reward.functions or custom_reward_function."
_RM = "The reward model runs in the trainer's process, on its device, in batches of micro_batch_size_per_gpu"
_MULTI_TURN = "Conversations with tools are not part of this version; a response is one turn"
_TRACE = "There is no profiler; timing_s/* and perf/* are logged each step"
_FROM_ADAPTER = (
    "The reference of a run with LoRA is the model without its adapter, so a run cannot begin in the middle of one: "
    "merge it first (steepest export ADAPTER --to FOLDER) and begin from that folder"
)
_LENGTHS = "One length for data and rollout: data.max_prompt_length and data.max_response_length"
_CKPT_CONTENTS = tuple(
    list(names)
    for size in (3, 4)
    for names in itertools.permutations(("model", "optimizer", "extra", "hf_model"), size)
    if {"model", "optimizer", "extra"} <= set(names)
)
_CKPT = "A checkpoint always holds weights (Hugging Face layout), optimizer and random states, so that resume is exact"


def expand(pattern: str) -> list[str]:
    """`a.{b,c}.d` -> [a.b.d, a.c.d]."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    return [
        name
        for part in found.group(1).split(",")
        for name in expand(pattern[: found.start()] + part.strip() + pattern[found.end() :])
    ]


_TABLE: list[tuple[str, str, tuple[Any, ...]]] = [
    # data
    ("data.gen_batch_size", "Prompts are generated a step at a time: use data.train_batch_size.", (None,)),
    ("data.{tool_config_path,function_tool_path}", f"{_MULTI_TURN}.", (None,)),
    (
        "data.{return_raw_input_ids,return_full_prompt,return_multi_modal_inputs}",
        "Each response carries its data row.",
        _OFF,
    ),
    ("data.return_raw_chat", "Each response carries its data row, the messages included.", (True, False)),
    ("data.validation_shuffle", "Validation always takes the file's order, so that answers can be compared.", _OFF),
    ("data.{image_key,video_key,audio_key,image_patch_size,mm_processor_kwargs}", "Text only in this version.", ()),
    (
        "data.custom_cls",
        "Data is read from files or a hub; docs/own_data.md has the columns (data.train_files).",
        (None,),
    ),
    ("data.sampler", "The order is data.shuffle with data.seed.", (None,)),
    # actor, reference, critic
    (f"{{{ACTOR},{REF},critic}}.strategy", f"{_ONE_PROCESS}; nothing is sharded. Leave it out.", ("fsdp", "fsdp2")),
    (f"{{{ACTOR},critic}}.grad_clip", "Dead in verl: use optim.clip_grad.", ()),
    (f"{ACTOR}.policy_loss.dro_beta", "The DRO loss is not part of this version.", (None,)),
    (f"{ACTOR}.calculate_entropy", "Entropy is always computed and logged as actor/entropy.", (True, False)),
    (f"{ACTOR}.calculate_sum_pi_squared", "This statistic is not computed.", _OFF),
    (f"{ACTOR}.freeze_vision_tower", "Not read by verl's default path either.", _OFF),
    (f"{{{ACTOR},{REF},critic}}.rollout_n", f"A mirror of {ROLLOUT}.n: use that.", ()),
    (
        f"{{{ACTOR},{REF},critic}}.ulysses_sequence_parallel_size",
        f"{_ONE_PROCESS}; no sequence parallelism. Use 1.",
        (1,),
    ),
    (f"{_FSDP}.ulysses_sequence_parallel_size", f"{_ONE_PROCESS}; no sequence parallelism. Use 1.", (1,)),
    (
        f"{{{ACTOR},{REF}}}.{{entropy_from_logits_with_chunking,entropy_from_logits_chunk_size,entropy_checkpointing}}",
        "Entropy and log-probs are always computed in chunks and recomputed in the backward pass.",
        (True, False),
    ),
    (f"{{{ACTOR},critic}}.checkpoint.{{save_contents,load_contents}}", f"{_CKPT}.", _CKPT_CONTENTS),
    (
        f"{{{ACTOR},critic}}.checkpoint.async_save",
        "A checkpoint is written and checked before the next step.",
        (False,),
    ),
    (f"{{{ACTOR},critic}}.checkpoint.strict", "A checkpoint is always read strictly.", (True,)),
    (f"{{{ACTOR},critic}}.checkpoint", "See trainer.save_freq and trainer.max_actor_ckpt_to_keep.", ()),
    (f"{{{ACTOR},{ROLLOUT}}}.qat", "Quantisation-aware training is not part of this version.", _OFF),
    (f"{{{ACTOR},{REF},{ROLLOUT},critic}}.profiler", f"{_TRACE}.", _OFF),
    (f"{REF}.model", f"The reference is the frozen copy of {MODEL}.", (None,)),
    # optimizer
    (f"{{{ACTOR},critic}}.optim.total_training_steps", "Derived: use trainer.total_training_steps.", (-1, None)),
    (f"{{{ACTOR},critic}}.optim.warmup_style", "Deprecated: use lr_scheduler_type=constant|cosine.", (None,)),
    (f"{{{ACTOR},critic}}.optim.optimizer", "The optimizer is AdamW.", ("AdamW",)),
    (f"{{{ACTOR},critic}}.optim.optimizer_impl", "The optimizer is torch's AdamW.", ("torch.optim",)),
    (f"{{{ACTOR},critic}}.optim.override_optimizer_config", "AdamW's options are lr, betas, weight_decay.", (None,)),
    # sharding
    (
        f"{_FSDP}.model_dtype",
        "Master weights are float32: an update of lr 1e-6 is lost when it is added to a bfloat16 weight. "
        f"Leave it out; the dtype of compute is {ACTOR}.fsdp_config.dtype.",
        ("fp32", "float32"),
    ),
    (f"{_FSDP}.strategy", f"{_ONE_PROCESS}; no sharding. Leave it out.", ("fsdp", "fsdp2")),
    (f"{REF}.fsdp_config.dtype", f"The reference computes as the actor does: {ACTOR}.fsdp_config.dtype.", ()),
    (_FSDP, f"{_ONE_PROCESS}; nothing is sharded. Leave it out.", ()),
    ("critic.fsdp_config", "The critic's section is called critic.fsdp.", ()),
    (f"{{{ACTOR},{REF},critic}}.megatron", f"Megatron is not part of this version. {_ONE_CARD}", ()),
    (
        f"{{{ACTOR},{REF},critic}}.{{deepspeed,deepspeed_config}}",
        f"DeepSpeed is not part of this version. {_ONE_CARD}",
        (),
    ),
    ("critic.model.fsdp_config.dtype", "Use critic.fsdp.dtype.", ()),
    # model
    (f"{{{MODEL},critic.model}}.hf_config_path", "The config.json next to the weights: override_config.", (None,)),
    (f"{{{MODEL},critic.model}}.external_lib", "No foreign import at start; see trust_remote_code.", (None,)),
    (f"{{{MODEL},critic.model}}.lora_adapter_path", f"{_FROM_ADAPTER}.", (None,)),
    (f"{{{MODEL},critic.model}}.lora.rank", "Megatron's key: use model.lora_rank.", (0,)),
    (f"{{{MODEL},critic.model}}.lora", "Megatron's keys: use model.lora_rank, lora_alpha, target_modules.", _OFF),
    (f"{{{MODEL},critic.model,{ROLLOUT}}}.mtp", "Multi-token prediction is not part of this version.", _OFF),
    ("actor_rollout_ref.hybrid_engine", "Rollout and training share the process.", (True,)),
    ("actor_rollout_ref.nccl_timeout", f"{_ONE_PROCESS}; read by nothing in verl either.", ()),
    # rollout
    (f"{ROLLOUT}.mode", "Generation runs in the step; every response is on-policy.", ("async", "sync")),
    (
        f"{ROLLOUT}.{{data_parallel_size,expert_parallel_size,pipeline_model_parallel_size}}",
        f"{_ONE_PROCESS}: the engine is not split.",
        (1,),
    ),
    (f"{ROLLOUT}.do_sample", "Training samples; a greedy policy cannot be trained. Validation: val_kwargs.", (True,)),
    (f"{ROLLOUT}.full_determinism", "The same seed gives the same tokens without it.", (True, False)),
    (f"{ROLLOUT}.{{prompt_length,response_length}}", f"{_LENGTHS}.", ()),
    (f"{ROLLOUT}.nnodes", f"{_ONE_PROCESS}; no rollout pool of its own.", (0,)),
    (f"{ROLLOUT}.n_gpus_per_node", f"{_ONE_PROCESS}; no rollout pool of its own.", ()),
    (f"{ROLLOUT}.logprobs_mode", "Log-probs are those of the distribution sampled from.", ("processed_logprobs",)),
    (f"{ROLLOUT}.calculate_log_probs", "The engine always returns log-probs.", (True,)),
    (f"{ROLLOUT}.over_sample_rate", "Read by nothing in verl either.", (0, None)),
    (
        f"{ROLLOUT}.partial",
        "Responses end in the step they began in. Going on with long ones in the next step could save a tenth of "
        "generation at most, less than it costs; docs/long_tail.md has the figures.",
        _OFF,
    ),
    (
        f"{ROLLOUT}.reuse_responses",
        "Responses of the last epoch are not used as drafts: measured, that was hardly faster, and repeating an "
        "epoch's noise harms learning; docs/long_tail.md has the figures.",
        _OFF,
    ),
    (f"{ROLLOUT}.engine_kwargs.{{sglang,trtllm}}", f"{ROLLOUT}.name is builtin, hf or vllm.", (None, {})),
    (f"{ROLLOUT}.router_config_path", "There is no server to route to.", (None,)),
    (f"{ROLLOUT}.multi_turn", f"{_MULTI_TURN}.", _OFF),
    (f"{ROLLOUT}.agent", f"{_MULTI_TURN}.", (None,)),
    (f"{ROLLOUT}.trace", "Responses are written by trainer.rollout_data_dir.", _OFF),
    (f"{ROLLOUT}.{{enable_rollout_routing_replay,moe_load_balance_metrics_interval}}", "Not for MoE yet.", (False, 0)),
    (f"{ROLLOUT}.prometheus", "Metrics go to trainer.logger.", _OFF),
    (f"{ROLLOUT}.layered_summon", "Weights go to vLLM tensor by tensor.", (True, False)),
    (f"{ROLLOUT}.multi_stage_wake_up", "Weights wake before they are replaced, the KV cache after.", (True, False)),
    (f"{ROLLOUT}.skip_tokenizer_init", "Token ids go in and out; the engine needs no tokenizer.", (True, False)),
    (f"{ROLLOUT}.scheduling_policy", "A batch is generated whole.", ("fcfs",)),
    (f"{ROLLOUT}.cudagraph_capture_sizes", f"An entry of {ROLLOUT}.engine_kwargs.vllm: compilation_config.", (None,)),
    (f"{ROLLOUT}.{{quantization,quantization_config_file}}", "Generation runs in rollout.dtype.", (None,)),
    (f"{ROLLOUT}.disaggregation", "Prefill and decoding run together.", _OFF),
    # critic, algorithm
    (
        "algorithm.filter_groups.max_inflight_gen_batches",
        "Rounds are generated one after the other, so that no response is ever older than the weights.",
        (1,),
    ),
    # trainer
    ("trainer.default_hdfs_dir", "Checkpoints go to trainer.default_local_dir.", (None,)),
    ("trainer.del_local_ckpt_after_load", "Checkpoints are pruned by trainer.max_actor_ckpt_to_keep.", _OFF),
    ("trainer.checkpoint_callback_class", "There is no hook; checkpoints lie in trainer.default_local_dir.", (None,)),
    ("trainer.{use_v1,use_legacy_worker_impl}", "There is one trainer.", (True, False, "auto", "enable", "disable")),
    ("trainer.v1.trainer_mode", "Training is synchronous.", ("sync",)),
    ("trainer.v1", "There is one trainer, and it is synchronous.", ()),
    ("trainer.{esi_redundant_time,ray_wait_register_center_timeout}", "Read by nothing in verl either.", (0, 300)),
    # other groups
    ("reward.reward_manager.name", _CHOSEN, ("naive", "dapo", "gdpo")),
    ("reward.reward_manager", _CHOSEN, ("register", None)),
    (
        "{reward.reward_model,reward_model}.{enable_resource_pool,n_gpus_per_node,nnodes}",
        f"{_RM}.",
        (False, None, 0, 8),
    ),
    ("{reward.reward_model,reward_model}.rollout", f"{_RM}; there is no server of its own.", (None,)),
    ("{reward.sandbox_fusion,sandbox_fusion}", "There is no sandbox service: custom_reward_function.path.", (None,)),
    ("reward.reward_kwargs.max_resp_len", "The longest response is data.max_response_length.", ()),
    ("reward_model.reward_manager", _CHOSEN, ("naive", "dapo", "gdpo")),
    ("reward_model.num_workers", "Use reward.num_workers.", ()),
    ("reward_model", "The reward model's keys are reward.reward_model.*.", _OFF),
    ("distillation", "Distillation is not part of this version.", _OFF),
    ("transfer_queue", "Data stays in the process; there is no queue service.", _OFF),
    ("global_profiler", f"{_TRACE}.", _OFF),
    ("skip", "Rollouts are not cached.", _OFF),
    ("model_engine", f"{_ONE_PROCESS} with torch.", ("dp",)),
    (
        "hydra",
        "Steepest writes no outputs folder and starts no sweeps; the run folder is trainer.default_local_dir.",
        (),
    ),
]
_PLACE_AND_SPEED: list[tuple[str, str, tuple[Any, ...]]] = [
    ("data.use_shm", "files are read once, before the first step, and nothing is copied to /dev/shm", _OFF),
    (f"{{{MODEL},critic.model}}.use_shm", "weights are read once, and nothing is copied to /dev/shm", _OFF),
    (f"{_FSDP}.{{param_offload,optimizer_offload,grad_offload,offload_policy}}",
     f"{_ONE}, and models stay where they compute", _OFF),
    (f"{_FSDP}.fsdp_size", f"{_ONE}, and nothing is sharded", (-1, 1)),
    (f"{_FSDP}.{{wrap_policy,forward_prefetch,reshard_after_forward,use_orig_params,forward_only}}",
     f"{_ONE}, and nothing is sharded", ()),
    (f"{{{ACTOR},{REF},{ACTOR}.fsdp_config,{REF}.fsdp_config,critic.fsdp}}.use_torch_compile",
     "nothing is compiled; docs/passes.md has the measurement", _OFF),
    (f"{{{ACTOR},{MODEL},critic.model}}.use_fused_kernels", "log-probs are computed in chunks without it", _OFF),
    (f"{{{MODEL},critic.model}}.{{fused_kernel_options,tiled_mlp}}", "there are no such kernels", _OFF),
    (f"{{{ACTOR},{MODEL},critic.model}}.use_liger", "Liger kernels are not used", _OFF),
    (f"{{{ACTOR},{MODEL},critic.model}}.{{use_remove_padding,use_rmpad}}",
     "sequences are always packed without padding", (True,)),
    (f"{{{ACTOR},{REF},{ACTOR}.fsdp_config,{REF}.fsdp_config,critic.fsdp}}.pad_to_length",
     "sequences are packed without padding", _OFF),
    (f"{ACTOR}.use_prefix_grouper", f"verl's old trainer reads it alone; {ACTOR}.use_prefix_sharing is on", _OFF),
    (f"{{{MODEL},critic.model}}.enable_activation_offload",
     "activations stay on the device; enable_gradient_checkpointing saves their memory", _OFF),
    (f"{ROLLOUT}.checkpoint_engine", "rollout and actor share their weights, and nothing is sent", ("naive",)),
    (f"{ROLLOUT}.disable_log_stats", "metrics go to trainer.logger", (True,)),
    (f"{ROLLOUT}.load_format", "vLLM starts empty and gets the actor's weights from memory",
     ("dummy", "auto", "safetensors")),
    ("{ray_kwargs,ray_init}", f"{_ONE}, without Ray", (None,)),
    ("{reward.reward_model,reward_model}.model.{use_rmpad,use_remove_padding,use_fused_kernels,fsdp_config,use_shm}",
     "the reward model runs whole in the trainer's process", _OFF),
]  # fmt: skip
REFUSED = {key: Refusal(reason, agrees) for pattern, reason, agrees in _TABLE for key in expand(pattern)}
REFUSED |= {
    key: Refusal(reason, agrees, True) for pattern, reason, agrees in _PLACE_AND_SPEED for key in expand(pattern)
}

NO_EFFECT = {
    "data.dataloader_num_workers": "prompts are tokenised once, before the first step",
    "data.filter_overlong_prompts_workers": "prompts are measured in the main process",
    "trainer.balance_batch": "there is one process, so there is nothing to balance",
    f"{ROLLOUT}.agent.num_workers": "there are no agent processes",
    "critic.model.tokenizer_path": "the critic reads the policy's token ids",
    "critic.model.custom_chat_template": "the critic reads the policy's token ids",
}

SFT_ALIASES = {"model.partial_pretrain": "model.path"}
SFT_REFUSED = {
    key: Refusal(reason, agrees)
    for pattern, reason, agrees in [
        ("model.lora_adapter_path", f"{_FROM_ADAPTER}.", (None,)),
        ("model.lora", "Use model.lora_rank, lora_alpha, target_modules.", (0, None)),
        ("model.external_lib", "No foreign import at start; see model.trust_remote_code.", (None,)),
        ("model.strategy", f"{_ONE_PROCESS}; nothing is sharded. Leave it out.", ("fsdp", "fsdp2", None)),
        (
            "{ulysses_sequence_parallel_size,engine.ulysses_sequence_parallel_size}",
            f"{_ONE_PROCESS}; no sequence parallelism. Use 1.",
            (1,),
        ),
        ("data.micro_batch_size", "The global form: use data.micro_batch_size_per_gpu.", (None,)),
        ("data.multiturn.messages_key", "Use data.messages_key.", ()),
        ("data.multiturn", "A file with data.messages_key is read as conversations.", (True, False)),
        (
            "data.{prompt_dict_keys,response_dict_keys,custom_cls}",
            "Name plain columns: prompt_key, response_key.",
            (None,),
        ),
        ("data.use_dynamic_bsz", "On unless data.micro_batch_size_per_gpu is given.", (True,)),
        ("data.pad_mode", "Sequences are packed without padding.", ("no_padding",)),
        ("optim.warmup_style", "Use optim.lr_scheduler_type.", (None,)),
        ("optim.{warmup_steps_ratio,lr_scheduler}", "Use optim.lr_warmup_steps_ratio, optim.lr_scheduler_type.", ()),
        ("optim.total_training_steps", "Use trainer.total_training_steps.", (-1, None)),
        (
            "engine.model_dtype",
            "Master weights are float32; the dtype of compute is engine.dtype.",
            ("fp32", "float32"),
        ),
        ("engine", f"{_ONE_PROCESS}; nothing is sharded. Leave it out.", ("fsdp", "fsdp2")),
        ("checkpoint", f"{_CKPT}.", ()),
        ("trainer.{max_actor_ckpt_to_keep}", "Use trainer.max_ckpt_to_keep.", ()),
        ("trainer.default_hdfs_dir", "Checkpoints go to trainer.default_local_dir.", (None,)),
        ("trainer.seed", "Use data.seed.", ()),
        ("{profiler,global_profiler}", f"{_TRACE}.", ()),
        ("hydra", "Steepest writes no outputs folder; the run folder is trainer.default_local_dir.", ()),
    ]
    for key in expand(pattern)
}
SFT_REFUSED |= {
    key: Refusal(reason, agrees, True)
    for pattern, reason, agrees in [
        ("model.use_shm", "weights are read once, and nothing is copied to /dev/shm", _OFF),
        ("{model.fsdp_config,engine}.{param_offload,optimizer_offload,offload_policy,cpu_offload,offload_params}",
         f"{_ONE}, and models stay where they compute", _OFF),
        ("{model.fsdp_config,engine}.{wrap_policy,fsdp_size,forward_prefetch,reshard_after_forward,use_orig_params}",
         f"{_ONE}, and nothing is sharded", (-1, 1)),
        ("model.fsdp_config", f"{_ONE}, and nothing is sharded", (None,)),
        ("engine.use_torch_compile", "nothing is compiled", _OFF),
        ("model.use_liger", "Liger kernels are not used", _OFF),
        ("model.use_fused_kernels", "log-probs are computed in chunks without it", _OFF),
        ("{use_remove_padding,model.use_remove_padding}", "sequences are always packed without padding", (True,)),
        ("ray_init", f"{_ONE}, without Ray", (None,)),
    ]
    for key in expand(pattern)
}  # fmt: skip
SFT_NO_EFFECT = {
    "trainer.balance_batch": "there is one process",
    "data.balance_dp_token": "there is one process",
    "data.num_workers": "samples are tokenised once, before the first step",
}


def find(table: dict[str, Any], key: str) -> str | None:
    """The entry that speaks about `key`: the key itself or the longest section above it."""
    parts = key.split(".")
    return next((name for i in range(len(parts), 0, -1) if (name := ".".join(parts[:i])) in table), None)
