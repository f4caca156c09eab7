"""How much arithmetic a model's pass does: the numerator of `perf/mfu`. The answer to each pass carries its number.

A product of (m, k) and (k, n) is 2mkn operations. These are counted: the linear layers for each packed token, the
scores and values of attention for each pair of a token and a token it attends to, and the heads where they are
computed. A backward pass costs a forward pass for the gradient of the inputs and another for that of the weights;
frozen weights have no gradient. These are not counted: the embedding, which is a look-up; norms, activations, softmax,
sampling and the optimizer, which are limited by memory; and work that the model itself does not need, that is padding
and everything computed a second time to save memory (gradient checkpointing, logits in the backward pass). A pass with
such work reaches a smaller share of the machine's limit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from steepest.core.batch import Batch


@dataclass(frozen=True)
class _Matrix:
    """One matrix product that is computed for every token."""

    module: nn.Module
    name: str = "weight"
    layer: nn.Module | None = None
    """The LoRA layer of which the module is a part, if it is one."""
    adapter: str = ""
    share: float = 1.0
    """Share of the weight that one token uses; in a mixture of experts, the share of the experts it is sent to."""

    @property
    def weight(self) -> Tensor:
        found: Tensor = getattr(self.module, self.name)
        return found

    @property
    def runs(self) -> bool:
        layer: Any = self.layer
        return layer is None or (not layer.disable_adapters and self.adapter in layer.active_adapters)


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_matrices: WeakKeyDictionary[nn.Module, list[_Matrix]] = WeakKeyDictionary()


def backbone_flops(backbone: Any, tokens: int, context: Any, *, backward: bool) -> float:
    """A packed pass through a transformers base model; `backward` says that its gradient will be taken."""
    linear = linear_flops(backbone, backward=backward)
    return linear * tokens + attention_flops(backbone.config, context.num_pairs) * (3 if backward else 1)


def head_flops(weight: Tensor, hidden: Tensor) -> float:
    """A product of (n, hidden) states and a head's weight, and its gradients where they are recorded."""
    grad = torch.is_grad_enabled()
    times = 1 + (grad and weight.requires_grad) + (grad and hidden.requires_grad)
    return 2.0 * times * hidden.shape[0] * weight.numel()


def linear_flops(backbone: Any, *, backward: bool = False) -> float:
    """Operations per token in the linear layers, without adapters that are switched off."""
    if backbone not in _matrices:
        _matrices[backbone] = list(_find_matrices(backbone))
    total = 0.0
    for matrix in _matrices[backbone]:
        if matrix.runs:
            times = 1 if not backward else 2 + matrix.weight.requires_grad
            total += 2.0 * times * matrix.share * matrix.weight.numel()
    return total


def forget(backbone: nn.Module) -> None:
    """Forget the known layers of a model whose layers have changed; the next counted pass reads them again."""
    _matrices.pop(backbone, None)


def attention_flops(config: PretrainedConfig, pairs: int) -> float:
    """Operations of attention in all layers; `pairs` counts pairs of a token and a token it attends to."""
    text = config.get_text_config()
    heads, size = attention_heads(text)
    layers = number(text, "num_hidden_layers") or 0
    return 4.0 * pairs * layers * heads * size


def number(config: PretrainedConfig, name: str) -> int | None:
    """A number of a config; None if the family has none of that name, or one for each layer."""
    try:
        found = getattr(config, name, None)
    except RuntimeError:  # transformers' answer where layers differ
        return None
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def attention_heads(config: PretrainedConfig) -> tuple[int, int]:
    """(query heads, numbers of each); (0, 0) if the family names no heads, as those without attention do."""
    heads, width = number(config, "num_attention_heads"), number(config, "hidden_size")
    if not heads or not width:
        return 0, 0
    return heads, number(config, "head_dim") or width // heads


def key_value_numbers(config: PretrainedConfig) -> int:
    """Keys and values of one token in all layers, as numbers, by the config; 0 if the family names no heads."""
    text = config.get_text_config()
    heads, size = attention_heads(text)
    return 2 * (number(text, "num_hidden_layers") or 0) * (number(text, "num_key_value_heads") or heads) * size


def causal_pairs(lengths: Sequence[int]) -> int:
    """Number of such pairs in causal sequences: each token attends to itself and to the earlier ones."""
    return sum(length * (length + 1) for length in lengths) // 2


def generation_flops(model: Any, batch: Batch) -> float:
    """The operations that a rollout with a KV cache needs at least: each prompt once, for any number of responses; one
    pass for each response token except the last; logits for each response token. `model` is a CausalLM."""
    backbone, head = model.hf.base_model, model.hf.get_output_embeddings().weight
    prompts = dict(zip(batch.group_ids.tolist(), batch.prompt_lengths.tolist(), strict=True)).values()
    fed = [length - 1 for length in batch.lengths.tolist()]
    tokens = sum(prompts) + int((batch.response_lengths - 1).sum())
    pairs = causal_pairs(list(prompts)) + causal_pairs(fed) - causal_pairs(batch.prompt_lengths.tolist())
    scored = int(batch.response_lengths.sum())
    return linear_flops(backbone) * tokens + attention_flops(model.config, pairs) + 2.0 * scored * head.numel()


def _find_matrices(backbone: Any) -> Iterator[_Matrix]:
    text = backbone.config.get_text_config()
    experts = max(number(text, key) or 0 for key in _EXPERTS)
    for name, module in backbone.named_modules():
        owner, lora, rest = name.partition(".lora_")
        if isinstance(module, (nn.Linear, Conv1D)):
            layer = backbone.get_submodule(owner) if lora else None
            yield _Matrix(module, layer=layer, adapter=rest.partition(".")[2])
        elif experts:
            for key, weight in module.named_parameters(recurse=False):
                if weight.dim() == 3 and weight.shape[0] == experts:
                    yield _Matrix(module, key, share=(number(text, "num_experts_per_tok") or experts) / experts)
