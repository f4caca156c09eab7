"""How much arithmetic a model's pass does: the numerator of `perf/mfu`. The answer to each pass carries its number.

A product of (m, k) and (k, n) is 2mkn operations. Counted are the linear layers for each packed token, attention's
scores and values for each pair of a token and one it sees, and the heads where they are computed. A backward pass costs
a forward one for the gradient of the inputs and one for that of the weights; frozen weights have none. Left out are the
embedding, which is a look-up, and norms, activations, softmax, sampling and the optimizer, which memory bounds. What is
computed a second time to save memory (gradient checkpointing, logits in the backward pass) and what padding costs is no
work of the model and is not counted either: such a pass reaches a smaller share of the machine's limit.
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
    """One product that a token goes through."""

    module: nn.Module
    name: str = "weight"
    layer: nn.Module | None = None
    """The LoRA layer that the module is an adapter's part of, if it is one."""
    adapter: str = ""
    share: float = 1.0
    """Of the weight, what one token meets: of a mixture's experts, those it is sent to."""

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
    """Operations of a token in the linear layers, adapters that are off left out."""
    if backbone not in _matrices:
        _matrices[backbone] = list(_find_matrices(backbone))
    total = 0.0
    for matrix in _matrices[backbone]:
        if matrix.runs:
            times = 1 if not backward else 2 + matrix.weight.requires_grad
            total += 2.0 * times * matrix.share * matrix.weight.numel()
    return total


def forget(backbone: nn.Module) -> None:
    """The model's layers have been changed: look at them again before the next pass is counted."""
    _matrices.pop(backbone, None)


def attention_flops(config: PretrainedConfig, pairs: int) -> float:
    """Scores and values of `pairs` of a token and one it sees, in all layers."""
    text = config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 4.0 * pairs * text.num_hidden_layers * text.num_attention_heads * size


def causal_pairs(lengths: Sequence[int]) -> int:
    """Each token sees itself and those before it in its sequence."""
    return sum(length * (length + 1) for length in lengths) // 2


def generation_flops(model: Any, batch: Batch) -> float:
    """What a rollout with a KV cache cannot do without: each prompt read once, however many responses it has; each
    response token but the last fed back; logits for each response token. `model` is a CausalLM."""
    backbone, head = model.hf.base_model, model.hf.get_output_embeddings().weight
    prompts = dict(zip(batch.group_ids.tolist(), batch.prompt_lengths.tolist(), strict=True)).values()
    fed = [length - 1 for length in batch.lengths.tolist()]
    tokens = sum(prompts) + int((batch.response_lengths - 1).sum())
    pairs = causal_pairs(list(prompts)) + causal_pairs(fed) - causal_pairs(batch.prompt_lengths.tolist())
    scored = int(batch.response_lengths.sum())
    return linear_flops(backbone) * tokens + attention_flops(model.config, pairs) + 2.0 * scored * head.numel()


def _find_matrices(backbone: Any) -> Iterator[_Matrix]:
    text = backbone.config.get_text_config()
    experts = max(getattr(text, key, None) or 0 for key in _EXPERTS)
    for name, module in backbone.named_modules():
        owner, lora, rest = name.partition(".lora_")
        if isinstance(module, (nn.Linear, Conv1D)):
            layer = backbone.get_submodule(owner) if lora else None
            yield _Matrix(module, layer=layer, adapter=rest.partition(".")[2])
        elif experts:
            for key, weight in module.named_parameters(recurse=False):
                if weight.dim() == 3 and weight.shape[0] == experts:
                    yield _Matrix(module, key, share=text.num_experts_per_tok / experts)
