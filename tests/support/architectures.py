"""Tiny random models of every causal language model that transformers has, and what becomes of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from steepest.core.batch import Batch
from steepest.errors import ModelError
from steepest.models.architectures import text_config
from steepest.models.causal_lm import CausalLM
from steepest.models.load import load_causal_lm, load_value_model
from steepest.models.lora import LoraSettings, adapter_parameters
from steepest.models.lora_models import ACTOR, FrozenValueModel, LoraCausalLM
from steepest.models.packing import pack_batch
from steepest.models.rows import rows_reason
from steepest.rollout.api import GenerationRequest, SamplingParams
from steepest.rollout.builtin.engine import BuiltinEngine
from steepest.rollout.weights import LocalWeights, ModelDescription

VOCABULARY, WINDOW = 97, 8
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "moe_num_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "shared_expert_intermediate_size": 16,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "ffn_hidden_size": 48, "ffn_dim": 48, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_model": 32,
    "word_embed_proj_dim": 32, "sliding_window": WINDOW, "n_group": 1,
    "topk_group": 1, "chunk_size": 8, "mamba_chunk_size": 8, "first_k_dense_replace": 1,
}  # fmt: skip
"""Sizes by the names that families use; each family gets those that its config has."""
_MLA = {"num_key_value_heads": 4, "head_dim": 8}
_OF_MLA = (
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "minicpm3", "youtu", "axk1", "axk2",
    "sarvam_mla",
)  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": 1}
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 1},
    "codegen": {"rotary_dim": 4}, "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "cwm": {"bos_token_id": 0}, 
    "modernbert-decoder": {"pad_token_id": 0, "bos_token_id": 0, "cls_token_id": 0, "sep_token_id": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]}, "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "zaya": {"num_experts_per_tok": 1}, "xlnet": {"d_head": 8},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention"]},
    "gemma2": {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "bert": {"is_decoder": False}, "roberta": {"pad_token_id": 1},
    **dict.fromkeys(_OF_MLA, _MLA),
}  # fmt: skip
"""What a family needs besides: sizes that have to fit each other, and the features that are to be tried."""
TOO_SLOW = {"kimi_linear", "nemotron_h"}
MODEL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

DECODER, PACKED = "packed; rollouts on the engine's own decoder", "packed; rollouts on the model's own layers"
ROWS, REFUSED, NOT_TRIED = "rows", "refused", "not tried: the sweep makes no tiny model of it"
ORDER = (DECODER, PACKED, ROWS, REFUSED, NOT_TRIED)
REASONS = {
    "attention interface": "attention of its own (ALiBi and others)",
    "does not pass keyword arguments": "keyword arguments do not reach its attention",
    "of its 2 layers": "recurrent or other layers without attention",
    "layers of the kind": "another kind of attention in some layers",
    "more than once": "a layer attends more than once",
    "mask of its own": "a mask of its own",
    "passes the window": "a window that its attention function does not get",
    "do not take packed": "layers that do not take packed sequences",
    "differ": "other numbers when packed",
}
"""A part of the reason -> words of the table."""
REFUSALS = {
    "encoder-decoder": "encoder-decoder",
    "more than text": "more than text",
    "other parts": "more than text",
    "see the tokens after": "reads in both directions",
    "forward pass fails": "does not run on token ids alone",
    "output projection": "more than a product between last hidden state and logits",
    "backbone": "no backbone apart from the head",
    "generation": "its generation differs from its forward pass",
}


@dataclass
class Verdict:
    """What became of a family."""

    model_type: str
    name: str = ""
    """transformers' class."""
    way: str = ""
    """"packed", "rows", "refused", or "not built" if no tiny model could be made."""
    reason: str = ""
    """Why it is not packed, or refused, or not built."""
    decoder: bool = False
    """The rollout engine's own decoder runs it."""
    without: dict[str, str] = field(default_factory=dict)
    """"critic" or "LoRA" -> the message that refuses it."""
    numbers: dict[str, float] = field(default_factory=dict)
    """Largest differences of log-probs."""

    @property
    def row(self) -> str:
        """The row of the table in docs/models.md."""
        if self.way == "packed":
            return DECODER if self.decoder else PACKED
        if self.way == "rows":
            return f"{ROWS}: {next((words for part, words in REASONS.items() if part in self.reason), 'see the note')}"
        if self.way == "refused":
            why = next((words for part, words in REFUSALS.items() if part in self.reason), "see the message")
            return f"{REFUSED}: {why}"
        return NOT_TRIED


def tiny_config(model_type: str) -> Any:
    """A configuration of two small layers. The families' own checks raise for sizes that do not fit."""
    known_type = type(AutoConfig.for_model(model_type))
    known = set(known_type().to_dict()) | set(known_type.attribute_map)
    sizes = {name: value for name, value in SIZES.items() if name in known}
    ids = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": None}
    config = AutoConfig.for_model(model_type, **{**sizes, **ids, **CHANGES.get(model_type, {})})
    return config


@torch.no_grad()
def tiny_model(config: Any) -> PreTrainedModel:
    """Random weights, large enough that the distributions are far from uniform."""
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > 4_000_000:
        raise ValueError(f"{size / 1e6:.0f} million weights with the sizes of SIZES")
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in hf.parameters():
        if parameter.dim() > 1:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return hf


@torch.no_grad()
def plain_log_probs(hf: PreTrainedModel, sequence: list[int]) -> Tensor:
    """(n - 1,) log-probs of the tokens by transformers: one row, no padding, no cache, eager attention."""
    hf.set_attn_implementation("eager")
    logits = hf(input_ids=torch.tensor([sequence]), use_cache=False).logits[0, :-1].float()
    return F.log_softmax(logits, -1).gather(1, torch.tensor(sequence)[1:, None])[:, 0]


def tokens(length: int, seed: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [tokens(11, 1), tokens(4, 2), tokens(11, 3)]
"""Prompts longer and shorter than the window, two of equal length."""


def generated(model: CausalLM, *, source: Any = None) -> tuple[BuiltinEngine, Batch]:
    engine = BuiltinEngine(ModelDescription.of(model), end_token_ids=[1], pad_token_id=0, max_model_len=24)
    engine.load_weights(source or LocalWeights(model), 0)
    return engine, again(engine)


def again(engine: BuiltinEngine) -> Batch:
    sampling = SamplingParams(7, n=2, seed=5)
    made = engine.generate([GenerationRequest(prompt, sampling, str(i)) for i, prompt in enumerate(PROMPTS)])
    rows = [(PROMPTS[i], completion) for i, group in enumerate(made) for completion in group]
    return Batch.from_sequences(
        [prompt for prompt, _ in rows],
        [completion.token_ids for _, completion in rows],
        group_ids=[i // 2 for i in range(len(rows))],
        truncated=[False] * len(rows),
        rollout_log_probs=[completion.log_probs for _, completion in rows],
    )


@torch.no_grad()
def mismatch(model: CausalLM, batch: Batch) -> float:
    """The largest difference of a token's log-prob between rollout and trainer, over all rows in one pass."""
    found, _ = model.log_probs(pack_batch(batch, batch.response_mask))
    assert batch.rollout_log_probs is not None
    return float((found - batch.rollout_log_probs[batch.response_mask]).abs().max())


class Stream:
    """The weights as another process would send them."""

    def __init__(self, model: CausalLM) -> None:
        self.named_weights = model.named_weights


def verdict(model_type: str, folder: Path, *, thorough: bool = True) -> Verdict:
    """Load a tiny model of the family from a folder and run it through rollout, passes, an update, critic and LoRA."""
    found = Verdict(model_type)
    if model_type in TOO_SLOW:
        found.way, found.reason = "not built", "its recurrent layers take minutes on a processor"
        return found
    try:
        config = tiny_config(model_type)
        text_config(folder, config)
    except ModelError as error:
        found.way, found.reason = "refused", str(error)
        return found
    except Exception as error:
        found.way, found.reason = "not built", _first_line(error)
        return found
    hf = None
    try:
        hf = tiny_model(config)
        found.name = type(hf).__name__
        hf.save_pretrained(folder)
    except Exception as error:
        found.way, found.reason = "not built", _first_line(error)
        config.save_pretrained(folder)
    try:
        model = load_causal_lm(folder)
    except ModelError as error:
        if hf is not None or "cannot be trained" in str(error):
            found.way, found.reason = "refused", str(error)
        return found
    assert hf is not None
    try:
        run(model, hf, found)
    except ModelError as error:
        found.way, found.reason = "refused", str(error)
        return found
    if thorough:
        try:
            critic(folder, found)
        except ModelError as error:
            found.without["critic"] = str(error)
        try:
            lora(load_causal_lm(folder), found)
        except ModelError as error:
            found.without["LoRA"] = str(error)
    return found


def run(model: CausalLM, hf: PreTrainedModel, found: Verdict) -> None:
    """Rollout, passes and one update."""
    model.eval()  # as the trainer runs it
    reason = rows_reason(model.hf)
    found.way, found.reason = ("packed", "") if reason is None else ("rows", reason)
    engine, batch = generated(model)
    found.decoder = not engine.notes
    found.reason = found.reason or " ".join(engine.notes)
    found.numbers["rollout"] = mismatch(model, batch)
    packed = pack_batch(batch, batch.response_mask)
    before, _ = model.log_probs(packed)
    plain = [
        plain_log_probs(hf, row)[-int(length) :]
        for row, length in zip(rows_of(batch), batch.response_lengths, strict=True)
    ]
    found.numbers["plain"] = float((before.detach() - torch.cat(plain)).abs().max())
    with torch.no_grad():
        once, _ = model.log_probs(packed)
    found.numbers["ratio"] = float((before.detach() - once).exp().sub(1).abs().max())
    streamed, other = generated(model, source=Stream(model))
    found.numbers["stream"] = mismatch(model, other)
    before.sum().backward()
    with torch.no_grad():
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.stack([grad.norm() for grad in grads]).norm()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.add_(parameter.grad / norm)
    engine.load_weights(LocalWeights(model), 1)
    streamed.load_weights(Stream(model), 1)
    changed = again(engine)
    with torch.no_grad():
        now, _ = model.log_probs(packed)
    assert float((now - once).abs().max()) > 1e-6, "the update changed nothing"
    found.numbers["updated"] = max(mismatch(model, changed), mismatch(model, again(streamed)))


def rows_of(batch: Batch) -> list[list[int]]:
    return [row[mask].tolist() for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]


def critic(folder: Path, found: Verdict) -> None:
    """The first values are 0, and a gradient reaches the backbone."""
    model = load_value_model(folder)
    sequence = [*PROMPTS[0], *PROMPTS[1]]
    batch = Batch.from_sequences(
        [PROMPTS[0], PROMPTS[1]], [PROMPTS[1], PROMPTS[0]], group_ids=[0, 1], truncated=[False] * 2
    )
    packed = pack_batch(batch, batch.response_mask)
    values, final = model.values(packed, with_final=True)
    assert final is not None and float(values.detach().abs().max()) == 0.0, f"{sequence}: the first values are not 0"
    with torch.no_grad():
        torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    values, _ = model.values(packed)
    values.sum().backward()
    embedding = model.hf.get_input_embeddings().weight
    assert embedding.grad is not None and float(embedding.grad.abs().max()) > 0


def lora(model: CausalLM, found: Verdict) -> None:
    """Rollout and trainer agree on the adapter, in place and merged, and every part of it is trained."""
    adapted = LoraCausalLM(model.hf, LoraSettings(rank=2))
    with torch.no_grad():
        for name, parameter in adapter_parameters(adapted.hf, ACTOR):
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))
    _, batch = generated(adapted)
    _, other = generated(adapted, source=Stream(adapted))
    found.numbers["lora"] = max(mismatch(adapted, batch), mismatch(adapted, other))
    log_probs, _ = adapted.log_probs(pack_batch(batch, batch.response_mask))
    log_probs.sum().backward()
    idle = [n for n, p in adapter_parameters(adapted.hf, ACTOR) if p.grad is None or not bool(p.grad.any())]
    assert len(idle) < len(list(adapter_parameters(adapted.hf, ACTOR))), "no part of the adapter is trained"
    shared = FrozenValueModel(adapted.hf, None)
    with torch.no_grad():
        assert torch.isfinite(shared.values(pack_batch(batch, batch.response_mask))[0]).all()


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:160]
    return f"{type(error).__name__}: {text}"
