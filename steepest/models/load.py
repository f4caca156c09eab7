"""Loads models and tokenizers from local folders and GGUF files: fp32 weights, no dropout, end tokens."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING

from steepest.errors import ModelError, setting
from steepest.hub import local_model
from steepest.models.architectures import parts_besides_text, text_config
from steepest.models.causal_lm import CausalLM, check_length, longest_length
from steepest.models.file_weights import (
    LANGUAGE_HEAD,
    VALUE_HEAD,
    check_finite,
    check_gguf,
    check_names,
    check_tied,
)
from steepest.models.hf_logging import quiet_transformers
from steepest.models.self_check import check_backbone, check_causal_lm
from steepest.models.value_head import ValueModel, find_head
from steepest.registry import nearest
from steepest.versions import pip_install

__all__ = [
    "as_model_error",
    "check_pad_id",
    "check_vocabulary",
    "check_window",
    "end_token_ids",
    "load_causal_lm",
    "load_tokenizer",
    "load_value_model",
    "longest_sequence_of",
    "one_layer",
    "text_ids",
]

_QUANTISED = ("bitsandbytes", "gptq", "awq", "hqq", "aqlm", "compressed-tensors")
_OVERRIDE_KEY = setting("override_config")
SOURCE_DTYPE = "source_dtype"
"""Entry of a checkpoint's config.json: the dtype that the start model's had. Checkpoints themselves are float32."""
SMALL_VOCABULARY = 256
"""Rows of the embedding of `one_layer`."""
_HEADS_HERE = ("score.", "classifier.")
"""Prefixes of the head that a value model of transformers has."""


def load_tokenizer(
    path: Path | str, *, trust_remote_code: bool = False, custom_chat_template: str | None = None
) -> Any:
    """The tokenizer of a model folder or GGUF file, with a pad token.

    A tokenizer without a pad token gets its end token as pad token. That is safe, because lengths come from the engine
    and are never computed from the padding. `custom_chat_template` replaces the template. Raises ModelError.
    """
    where, extra = _source(Path(path))
    # For some families (qwen2) AutoTokenizer replaces a generic tokenizer by the family's own, and so would silently
    # read another vocabulary than the one in the folder.
    auto = PreTrainedTokenizerFast if _is_generic(Path(where)) else AutoTokenizer
    with as_model_error(path, "tokenizer"), quiet_transformers():
        tokenizer = auto.from_pretrained(where, trust_remote_code=trust_remote_code, **extra)
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        # for some families transformers makes an empty tokenizer if the folder has no tokenizer file
        raise ModelError(
            f"{path}: no tokenizer: text becomes no tokens. The folder lacks its files (tokenizer.json, or what the "
            f"family has instead). Copy them there, or name another folder with {setting('tokenizer_path')}."
        )
    if custom_chat_template is not None:
        tokenizer.chat_template = custom_chat_template
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"{path}: the tokenizer has neither a pad nor an end token. Set eos_token in its config.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_token_ids(path: Path | str, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends a response: eos_token_id of the generation config (one or a list) and of the tokenizer.

    Without a generation config, eos_token_id of config.json is used. The result is sorted. Raises ModelError without
    any end token, and for one that the model does not have.
    """
    where, extra = _source(Path(path))
    config, generation = Path(where) / "config.json", Path(where) / "generation_config.json"
    rows, found = None, set[int]()
    if not extra and config.is_file():
        with as_model_error(path, "config"):
            entries = PretrainedConfig.get_config_dict(where)[0]
        rows = {**entries, **(entries.get("text_config") or {})}.get("vocab_size")
        if not generation.is_file():
            for part in (entries, entries.get("text_config") or {}):
                found |= _as_ids(part.get("eos_token_id"), config, rows)
    if not extra and generation.is_file():
        with as_model_error(path, "generation config"):
            given = GenerationConfig.from_pretrained(where).eos_token_id
        found |= _as_ids(given, generation, rows)
    found |= _as_ids(tokenizer.eos_token_id, f"{path}: the tokenizer", rows)
    if not found:
        raise ModelError(
            f"{path}: no end token, neither in generation_config.json nor in the tokenizer, so no response could end. "
            "Set eos_token_id in generation_config.json."
        )
    return tuple(sorted(found))


def load_causal_lm(
    path: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    override_config: Mapping[str, Any] | None = None,
) -> CausalLM:
    """Load a policy or reference from a folder or GGUF file (de-quantised), on the CPU, in training mode.

    Weights are in `dtype`: keep fp32 for a model that is trained, since bf16 loses updates of the size of lr 1e-6.
    Every dropout is 0; tied embeddings stay tied. `override_config` sets existing entries of the model's config.
    Raises ModelError: missing or unreadable folder, missing weights, an architecture that cannot be packed.
    """
    source, extra = _source(Path(path))
    config, whole = _load_config(path, source, extra, trust_remote_code, override_config or {})
    with as_model_error(path, "causal language model"), quiet_transformers():
        hf, info = AutoModelForCausalLM.from_pretrained(
            source, config=config, trust_remote_code=trust_remote_code, output_loading_info=True, dtype=dtype,
            ignore_mismatched_sizes=True, **_names_in(config, whole), **_dequantised(extra),
        )  # fmt: skip
    check_names(path, hf, info, other_heads=VALUE_HEAD, other_parts=_other_parts(config, whole, info))
    check_tied(path, hf)
    _check_file(path, source, extra, hf)
    model = CausalLM(_finish(hf))
    check_causal_lm(model)
    return model.train()


def one_layer(
    path: Path | str, *, trust_remote_code: bool = False, override_config: Mapping[str, Any] | None = None
) -> CausalLM:
    """The first layer of the model of a folder, between a small embedding and head, with random weights: measurements
    need the shapes alone. Raises ModelError as `load_causal_lm`, and what the model's own code raises for a model so
    small (`TRIAL_ERRORS`)."""
    source, extra = _source(Path(path))
    config, _ = _load_config(path, source, extra, trust_remote_code, override_config or {})
    text = config.get_text_config()
    layers = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == layers:  # an entry for each layer
            setattr(text, name, value[:1])
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)
    text.num_hidden_layers, text.vocab_size = 1, SMALL_VOCABULARY
    with quiet_transformers():
        hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    model = CausalLM(_finish(hf))
    check_causal_lm(model)
    return model


def load_value_model(
    path: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    override_config: Mapping[str, Any] | None = None,
) -> ValueModel:
    """Load a critic: the backbone of any checkpoint of the family, with a value head.

    The head is the checkpoint's own if that has one label (a saved critic, a reward model), else it is zero. Everything
    else is as in `load_causal_lm`.
    """
    source, extra = _source(Path(path))
    config, whole = _load_config(path, source, extra, trust_remote_code, override_config or {})
    config.num_labels = 1
    has_class = type(config) in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING
    auto = AutoModelForTokenClassification if has_class else AutoModel
    with as_model_error(path, "value model"), quiet_transformers():
        hf, info = auto.from_pretrained(
            source, config=config, trust_remote_code=trust_remote_code, output_loading_info=True, dtype=dtype,
            ignore_mismatched_sizes=True, **_names_in(config, whole), **_dequantised(extra),
        )  # fmt: skip
    check_names(
        path, hf, info, other_heads=(*LANGUAGE_HEAD, *VALUE_HEAD), fresh_head=_HEADS_HERE,
        other_parts=_other_parts(config, whole, info),
    )  # fmt: skip
    fresh = set(info["missing_keys"]) | {key[0] for key in info["mismatched_keys"]}
    _check_file(path, source, extra, hf, but=fresh)
    model = ValueModel(_finish(hf)).to(dtype)
    head = find_head(hf)
    for name in fresh if head is not None else ():
        torch.nn.init.zeros_(hf.get_parameter(name))
    model.load_own_head(Path(source))
    check_backbone(hf)
    return model.train()


def check_vocabulary(model: CausalLM | ValueModel, tokenizer: Any) -> str | None:
    """Compare the tokens of the tokenizer with the rows of the embedding. A sentence for the user if there are more
    rows: the policy can sample ids that have no text, which is usual for a vocabulary that was padded.

    Raises ModelError when the tokenizer can produce ids that the model has no embedding for.
    """
    rows = model.hf.get_input_embeddings().weight.shape[0]
    known = text_ids(tokenizer)
    largest = max(int(known[-1]), tokenizer.pad_token_id)
    if largest >= rows:
        raise ModelError(
            f"{setting('path')}: the tokenizer has {len(tokenizer)} tokens, with ids up to {largest}, but the model "
            f"embeds {rows}: they do not fit."
        )
    if (spare := rows - len(known)) == 0:
        return None
    return (
        f"the model has {rows} token ids and the tokenizer {len(known)}: {spare} have no text. Should the policy "
        "sample one, a reward does not see it; rollout/no_text_ratio counts them."
    )


def text_ids(tokenizer: Any) -> Tensor:
    """The ids that the tokenizer has a text for, sorted."""
    return torch.tensor(sorted(set(tokenizer.get_vocab().values())))


def _is_generic(folder: Path) -> bool:
    """True if, by the folder's config, its tokenizer.json is the complete tokenizer."""
    file = folder / "tokenizer_config.json"
    if not file.is_file() or not (folder / "tokenizer.json").is_file():
        return False
    with as_model_error(folder, f"tokenizer ({file.name})"):
        settings = json.loads(file.read_text(encoding="utf-8"))
        return settings.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")


def _source(path: Path) -> tuple[str, dict[str, str]]:
    """(folder, extra arguments of from_pretrained) for a folder or a GGUF file."""
    path = local_model(path)
    return (str(path.parent), {"gguf_file": path.name}) if path.is_file() else (str(path), {})


def _check_file(
    path: Path | str, source: str, extra: dict[str, str], hf: PreTrainedModel, but: Collection[str] = ()
) -> None:
    """What transformers does not look at: numbers that are not finite, and tensors of a GGUF file that it passes over.
    `but`: weights that are not from the file."""
    check_finite(path, ((name, tensor) for name, tensor in hf.state_dict().items() if name not in but))
    if extra:
        check_gguf(Path(source) / extra["gguf_file"], hf, but)


def _refuse_quantised(path: Path | str, settings: Mapping[str, Any]) -> None:
    """Raises ModelError for files of integers with scales, which only the library that made them can read."""
    method = "bitsandbytes" if "load_in_4bit" in settings else settings.get("quant_method")
    if (name := str(getattr(method, "value", method))) in _QUANTISED:
        raise ModelError(
            f"{path}: its weights are quantised ({name}), and models are trained in 16 or 32 bit. Take the release of "
            f"the model that is not quantised; {setting('lora_rank')}=16 trains an adapter, which needs less memory."
        )


def _dequantised(extra: dict[str, str]) -> dict[str, Any]:
    config = getattr(transformers, "GgufConfig", None)  # older releases always de-quantise
    return {**extra, "quantization_config": config(dequantize=True)} if extra and config else dict(extra)


def _load_config(
    path: Path | str, source: str, extra: dict[str, str], trust_remote_code: bool, override: Mapping[str, Any]
) -> tuple[PretrainedConfig, PretrainedConfig]:
    """The configuration of the language model, and the one of the whole, which may have other parts besides."""
    with as_model_error(path, "config"), quiet_transformers():
        whole = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **extra)
    config = text_config(path, whole)
    known = config.to_dict()
    if not extra:
        _refuse_quantised(path, known.get("quantization_config") or {})
    for name, value in override.items():
        if name not in known:
            guess = nearest(name, known)
            hint = f" Did you mean {guess!r}?" if guess else ""
            raise ModelError(f"{_OVERRIDE_KEY}.{name}: {type(config).__name__} has no such entry.{hint}")
        setattr(config, name, value)
    check_pad_id(path, config)
    held = getattr(config, "dtype", None) or getattr(whole, "dtype", None)
    if held is not None and getattr(config, SOURCE_DTYPE, None) is None:
        setattr(config, SOURCE_DTYPE, str(held).removeprefix("torch."))
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for name, value in part.to_dict().items():
            if _is_dropout(name) and isinstance(value, (int, float)):
                setattr(part, name, 0.0)
    return config, whole


def _names_in(config: PretrainedConfig, whole: PretrainedConfig) -> dict[str, Any]:
    """Arguments of from_pretrained: how the files of a larger model call the weights of its language model, where
    transformers' text class alone does not know it (a critic of Llama 4)."""
    names = {r"^language_model\.model\.": "model.", r"^language_model\.lm_head\.": "lm_head."}
    return {} if config is whole else {"key_mapping": names}


def _other_parts(config: PretrainedConfig, whole: PretrainedConfig, info: Mapping[str, Any]) -> list[str]:
    """The parts that the files may hold besides the language model: towers and projectors of a larger model."""
    return [] if config is whole or not info["unexpected_keys"] else parts_besides_text(whole)


def longest_sequence_of(
    path: Path | str, wanted: int, *, trust_remote_code: bool = False, override_config: Mapping[str, Any] | None = None
) -> int:
    """The longest sequence, up to `wanted` tokens, that the model of a folder takes, by its configuration alone.

    Raises ModelError for a configuration that cannot be read.
    """
    source, extra = _source(Path(path))
    return longest_length(_load_config(path, source, extra, trust_remote_code, override_config or {})[0], wanted)


def check_window(
    path: Path | str, length: int, *, trust_remote_code: bool = False, override_config: Mapping[str, Any] | None = None
) -> None:
    """`check_length` of the model of a folder, by its configuration alone: before its weights are loaded."""
    source, extra = _source(Path(path))
    check_length(_load_config(path, source, extra, trust_remote_code, override_config or {})[0], length)


def _is_dropout(name: str) -> bool:
    return "dropout" in name or name.endswith("_pdrop") or name == "layerdrop"


def _finish(hf: PreTrainedModel) -> PreTrainedModel:
    """Set dropout to 0 in every module, give every weight its own memory and remove settings of a quantised file."""
    for parameter in hf.parameters():
        # Weights may still be views into the file, with the alignment they have there. On a CPU the alignment decides
        # the kernel and so the last bits of a product: two files with the same weights would train differently.
        if not _owns_memory(parameter.data):
            parameter.data = parameter.data.clone()
    for module in hf.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    hf.config.__dict__.pop("quantization_config", None)
    return hf


def _owns_memory(weight: Tensor) -> bool:
    """True if a weight fills its storage and torch has allocated it: a storage that is mapped from a file cannot be
    resized."""
    storage = weight.untyped_storage()
    return storage.resizable() and storage.nbytes() == weight.numel() * weight.element_size()


def _as_ids(value: Any, place: Path | str, rows: Any) -> set[int]:
    """The ids of an entry eos_token_id. Raises ModelError for what is no id of a model with `rows` embeddings (None:
    not known): the model could never produce it, so no response would end with it."""
    ids = [] if value is None else value if isinstance(value, (list, tuple)) else [value]
    for token in ids:
        known = isinstance(token, int) and not isinstance(token, bool) and token >= 0
        if not known or (isinstance(rows, int) and token >= rows):
            allowed = "0 or more" if not isinstance(rows, int) else f"0 to {rows - 1}"
            raise ModelError(
                f"{place}: eos_token_id={value}: {token!r} is no token of the model, whose ids are {allowed} "
                "(vocab_size of config.json). Correct the entry."
            )
    return set(ids)


def check_pad_id(path: Path | str, config: PretrainedConfig) -> None:
    """Raises ModelError for a pad id that the model has not: torch's own error for it has no file and no name."""
    text = config.get_text_config()
    pad, rows = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if isinstance(pad, int) and isinstance(rows, int) and not -rows <= pad < rows:
        raise ModelError(
            f"{path}: pad_token_id={pad} in its config.json is no token of the model, whose ids are 0 to {rows - 1} "
            "(vocab_size). Correct the entry, or set it to null."
        )


@contextmanager
def as_model_error(path: Path | str, what: str) -> Iterator[None]:
    """Turn the errors that transformers raises about a user's files into one ModelError."""
    try:
        yield
    except ImportError as error:
        if str(path).endswith(".gguf"):
            raise ModelError(f"{path}: reading GGUF needs more packages: {pip_install('gguf')} ({error})") from error
        raise ModelError(f"{path}: loading the {what} needs a package that is missing: {error}") from error
    except SafetensorError as error:  # a plain Exception
        raise ModelError(
            f"{path}: cannot load a {what}: a .safetensors file is damaged or cut off ({error}). Download or copy it "
            "again."
        ) from error
    except (IndexError, AttributeError, TypeError) as error:  # errors of transformers for unusual values in a config
        raise ModelError(
            f"{path}: cannot load a {what}: {type(error).__name__}: {error}. Do the entries of its config.json fit "
            f"each other and the weights, those of {_OVERRIDE_KEY} included?"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, ModelError):
            raise
        text = str(error).strip()
        if "trust_remote_code" in text:
            text = f"the model brings code of its own. Read it, then allow it with {setting('trust_remote_code=true')}."
        if "ignore_mismatched_sizes" in text:  # transformers' report is not shown, and its option is not ours
            text = "the weights have other shapes than its config.json (and override_config) says."
        raise ModelError(f"{path}: cannot load a {what}: {text}") from error
