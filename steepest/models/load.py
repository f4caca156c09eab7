"""Loads models and tokenizers from local folders and GGUF files: fp32 weights, no dropout, end tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
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
from steepest.models.architectures import text_config
from steepest.models.causal_lm import CausalLM
from steepest.models.hf_logging import quiet_transformers
from steepest.models.self_check import check_backbone, check_causal_lm
from steepest.models.value_head import ValueModel, find_head
from steepest.registry import nearest
from steepest.versions import pip_install

__all__ = ["check_vocabulary", "end_token_ids", "load_causal_lm", "load_tokenizer", "load_value_model"]

_OVERRIDE_KEY = setting("override_config")
_HEAD_PREFIXES = ("score.", "classifier.")


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
    with _as_model_error(path, "tokenizer"), quiet_transformers():
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
    any end token.
    """
    where, extra = _source(Path(path))
    found: set[int] = set()
    if not extra and (Path(where) / "generation_config.json").is_file():
        with _as_model_error(path, "generation config"):
            found |= _as_ids(GenerationConfig.from_pretrained(where).eos_token_id)
    elif not extra and (Path(where) / "config.json").is_file():
        with _as_model_error(path, "config"):
            found |= _as_ids(PretrainedConfig.get_config_dict(where)[0].get("eos_token_id"))
    found |= _as_ids(tokenizer.eos_token_id)
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
    config = _load_config(path, source, extra, trust_remote_code, override_config or {})
    with _as_model_error(path, "causal language model"), quiet_transformers():
        hf, info = AutoModelForCausalLM.from_pretrained(
            source, config=config, trust_remote_code=trust_remote_code, output_loading_info=True, dtype=dtype,
            **_dequantised(extra),
        )  # fmt: skip
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:5])
        raise ModelError(f"{path}: {len(info['missing_keys'])} weights are not in the checkpoint: {names}")
    model = CausalLM(_finish(hf))
    check_causal_lm(model)
    return model.train()


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
    config = _load_config(path, source, extra, trust_remote_code, override_config or {})
    config.num_labels = 1
    has_class = type(config) in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING
    auto = AutoModelForTokenClassification if has_class else AutoModel
    with _as_model_error(path, "value model"), quiet_transformers():
        hf, info = auto.from_pretrained(
            source, config=config, trust_remote_code=trust_remote_code, output_loading_info=True, dtype=dtype,
            ignore_mismatched_sizes=True, **_dequantised(extra),
        )  # fmt: skip
    fresh = set(info["missing_keys"]) | {key[0] for key in info["mismatched_keys"]}
    if strange := sorted(k for k in fresh if not k.startswith(_HEAD_PREFIXES)):
        raise ModelError(f"{path}: {len(strange)} weights are not in the checkpoint or of another shape: {strange[:5]}")
    model = ValueModel(_finish(hf)).to(dtype)
    head = find_head(hf)
    for name in fresh if head is not None else ():
        torch.nn.init.zeros_(hf.get_parameter(name))
    model.load_own_head(Path(source))
    check_backbone(hf)
    return model.train()


def check_vocabulary(model: CausalLM | ValueModel, tokenizer: Any) -> None:
    """Raises ModelError when the tokenizer can produce ids that the model has no embedding for."""
    rows = model.hf.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"{setting('path')}: the tokenizer has {len(tokenizer)} tokens, but the model embeds {rows}: "
            "they do not fit."
        )


def _is_generic(folder: Path) -> bool:
    """True if, by the folder's config, its tokenizer.json is the complete tokenizer."""
    file = folder / "tokenizer_config.json"
    if not file.is_file() or not (folder / "tokenizer.json").is_file():
        return False
    with _as_model_error(folder, f"tokenizer ({file.name})"):
        settings = json.loads(file.read_text(encoding="utf-8"))
        return settings.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")


def _source(path: Path) -> tuple[str, dict[str, str]]:
    """(folder, extra arguments of from_pretrained) for a folder or a GGUF file."""
    path = local_model(path)
    return (str(path.parent), {"gguf_file": path.name}) if path.is_file() else (str(path), {})


def _dequantised(extra: dict[str, str]) -> dict[str, Any]:
    config = getattr(transformers, "GgufConfig", None)  # older releases always de-quantise
    return {**extra, "quantization_config": config(dequantize=True)} if extra and config else dict(extra)


def _load_config(
    path: Path | str, source: str, extra: dict[str, str], trust_remote_code: bool, override: Mapping[str, Any]
) -> PretrainedConfig:
    with _as_model_error(path, "config"), quiet_transformers():
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **extra)
    known = config.to_dict()
    for name, value in override.items():
        if name not in known:
            guess = nearest(name, known)
            hint = f" Did you mean {guess!r}?" if guess else ""
            raise ModelError(f"{_OVERRIDE_KEY}.{name}: {type(config).__name__} has no such entry.{hint}")
        setattr(config, name, value)
    config = text_config(path, config)
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for name, value in part.to_dict().items():
            if _is_dropout(name) and isinstance(value, (int, float)):
                setattr(part, name, 0.0)
    return config


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


def _as_ids(value: int | list[int] | None) -> set[int]:
    if value is None:
        return set()
    return {value} if isinstance(value, int) else set(value)


@contextmanager
def _as_model_error(path: Path | str, what: str) -> Iterator[None]:
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
