"""Random two-layer models of several families, and one on disk, for the whole suite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification, PreTrainedModel

from steepest.models.causal_lm import CausalLM
from steepest.models.tiny import build_tiny_model
from steepest.models.value_head import ValueModel

VOCABULARY = 61
END, OTHER_END = 1, 2
FAMILIES = ("qwen2", "llama", "qwen3", "mistral", "gemma")
_OF_FAMILY: dict[str, dict[str, Any]] = {
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": None},
    "gemma": {"head_dim": 8},
}


def tiny_config(family: str = "qwen2", **changes: Any) -> Any:
    """Two layers, four query heads on two key heads, 61 words, 128 positions."""
    base: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": END,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    return AutoConfig.for_model(family, **{**base, **_OF_FAMILY.get(family, {}), **changes})


def tiny_hf(family: str = "qwen2", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random transformers model, with weights large enough that its distributions are far from uniform."""
    hf = AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=torch.float32)
    randomise(hf, seed)
    return hf


def tiny_lm(family: str = "qwen2", seed: int = 0, **changes: Any) -> CausalLM:
    return CausalLM(tiny_hf(family, seed, **changes))


def tiny_critic(family: str = "qwen2", seed: int = 0, *, zero_head: bool = False, **changes: Any) -> ValueModel:
    """A random critic; its head is random too unless `zero_head`."""
    hf = AutoModelForTokenClassification.from_config(tiny_config(family, num_labels=1, **changes), dtype=torch.float32)
    randomise(hf, seed)
    model = ValueModel(hf)
    if zero_head:
        model.reset_head()
    return model


@torch.no_grad()
def randomise(hf: nn.Module, seed: int) -> None:
    """Matrices normal with std 2/sqrt(inputs), vectors normal around what they were with std 0.1."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in hf.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(2 * noise * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else parameter + 0.1 * noise)


def random_ids(lengths: list[int], seed: int = 0, vocab: int = VOCABULARY) -> list[list[int]]:
    """Token lists of the given lengths, without the ids below 3 (end tokens)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in lengths]


def tiny_folder(folder: Path, **options: Any) -> Path:
    """A model folder with tokenizer and chat template, whose words are those of small sums."""
    texts = [f"What is {i} + {i}?\n#### {i}" for i in range(30)]
    return build_tiny_model(folder, texts, **{"hidden_size": 32, "num_layers": 2, "max_length": 128, **options})
