"""What kind of model a configuration describes, before its weights are read."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from steepest.errors import ModelError, setting

TRAINED = (
    "Trained are decoder-only models of text, such as Qwen2, Qwen3, Llama, Mistral, Gemma, Phi-3, OLMo and GPT-NeoX; "
    "docs/models.md has a table"
)

TRIAL_ERRORS = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, NotImplementedError, AssertionError)
"""What a model's own code raises for a call that it was not written for."""
_OTHER_PARTS = ("audio", "vision", "image", "vq", "encoder")
"""In the names of sub-configurations: parts for something else than text."""


def text_config(path: Path | str, config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the language model. Raises ModelError for one that is no decoder-only model of text."""
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(refusal(path, config.model_type, "it is an encoder-decoder model"))
    if own_code:
        return config
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(refusal(path, config.model_type, "transformers has no causal language model of this type"))
    try:
        text = config.get_text_config()
    except ValueError:  # there are several
        text = None
    held = {*config.sub_configs, *(name for name, part in vars(config).items() if isinstance(part, PretrainedConfig))}
    parts = ", ".join(sorted(name for name in held if any(word in name for word in _OTHER_PARTS)))
    if text is config and not parts:
        return config
    accepted = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].config_class
    if text is not None and text is not config and accepted is type(text):
        return text
    other = f"it reads or writes more than text ({parts})" if parts else "it has other parts around its text model"
    raise ModelError(refusal(path, config.model_type, other))


def refusal(path: Path | str, kind: str, why: str) -> str:
    """The message about a model that cannot be trained, in one sentence, and what to do."""
    return (
        f"{path}: a {kind} model cannot be trained here: {why}. Name another model with {setting('path')}. {TRAINED}."
    )


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of its text, for the middle of a sentence."""
    text = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {text}".rstrip(": ")
