"""Does an engine that keeps its own, repacked weights hold the policy's, bit for bit?

An engine fuses projections (q, k, v into one), packs matrices into a kernel's layout and may leave nothing of the
original behind. What it cannot hide is what its layers compute. A row of zeros with a single 1 through a linear layer
gives one column of its matrix, exactly, in whatever layout it lies. The bit patterns of some columns are added up over
the layers of a block: a sum does not mind that matrices were fused or their rows reordered.

The columns move with the version, so that in time all are looked at. Log-probs could not tell a small update (learning
rate 1e-6) from no update in bf16; the bits can.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from steepest.rollout.weights import ModelDescription

NUM_COLUMNS = 4
"""Columns of each matrix that one check looks at."""

Digest = dict[str, int]
"""Block ("layers.3", "embedding", "head", "rest") -> sum of bit patterns."""


def columns(width: int, version: int) -> list[int]:
    """The columns of a matrix with `width` inputs that the check of `version` looks at; a function of both alone."""
    step = max(1, width // NUM_COLUMNS)
    return [(version + i * step) % width for i in range(min(NUM_COLUMNS, width))]


def bits(values: Tensor) -> int:
    """The sum of the bit patterns of `values` as float32. A product may turn -0.0 into 0.0, the same number, and
    numbers below the smallest normal one into 0 (as bf16 units of processors do), so these count as 0. NaN counts like
    any other pattern."""
    plain = values.detach().float()
    plain = plain.masked_fill(plain.abs() < torch.finfo(torch.float32).tiny, 0.0)
    return int(plain.contiguous().view(torch.int32).to(torch.int64).sum())


def block_of(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `layers.3`; everything outside of the layers -> `rest`."""
    found = re.search(r"\b(?:layers|h|blocks)\.(\d+)\.", name)
    return f"layers.{found.group(1)}" if found else "rest"


class PolicyDigest:
    """The digest of the policy's weights as they would be in `dtype`, made while they pass to the engine, so that a
    source is iterated once. A tied head is counted as embedding and as head."""

    def __init__(self, description: ModelDescription, dtype: torch.dtype, version: int) -> None:
        self._description, self._dtype, self._version = description, dtype, version
        self.found: Digest = {"embedding": 0, "head": 0}

    def passing(self, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same pairs, each added to `found` before it is handed on."""
        for name, weight in weights:
            self._add(name, weight)
            yield name, weight

    @torch.no_grad()
    def _add(self, name: str, weight: Tensor) -> None:
        description = self._description
        if name in description.buffers:
            return
        number = _matrix(weight, self._dtype, self._version) if weight.dim() == 2 else bits(weight.to(self._dtype))
        if name == description.embedding:
            blocks = ["embedding", "head"] if description.head is None else ["embedding"]
        else:
            blocks = ["head" if name == description.head else block_of(name)]
        for block in blocks:
            self.found[block] = self.found.get(block, 0) + number


def _matrix(weight: Tensor, dtype: torch.dtype, version: int) -> int:
    return bits(weight[:, columns(weight.shape[1], version)].to(dtype))


@torch.no_grad()
def engine_digest(model: nn.Module, version: int) -> Digest:
    """The digest of a vLLM model. Linear layers and the head are asked by computing; vectors and the embedding lie
    open. Layers are told by what they have, since vLLM may be imported in one file only."""
    digest: Digest = defaultdict(int)
    for name, module in model.named_modules():
        width = getattr(module, "input_size_per_partition", None)
        if width is not None and not hasattr(module, "num_embeddings_per_partition"):
            digest[block_of(f"{name}.")] += bits(_probe(module, int(width), version))
    embedding, head = find_ends(model)
    rows = int(embedding.org_vocab_size)
    width = int(embedding.embedding_dim)
    digest["embedding"] += bits(embedding.weight[:rows, columns(width, version)])
    digest["head"] += bits(_probe(head, width, version)[:, :rows])
    for name, vector in _vectors(model):
        digest[block_of(name)] += bits(vector)
    return dict(digest)


def find_ends(model: nn.Module) -> tuple[Any, Any]:
    """(embedding, head) of a vLLM model; the same module twice where the model ties them by using one."""
    vocabularies = {name: m for name, m in model.named_modules() if hasattr(m, "num_embeddings_per_partition")}
    heads = [m for name, m in vocabularies.items() if name.rpartition(".")[2] == "lm_head"]
    embeddings = [m for name, m in vocabularies.items() if name.rpartition(".")[2] != "lm_head"]
    if not embeddings or len(embeddings) > 1 or len(heads) > 1:
        raise LookupError(f"an embedding and at most one lm_head are expected, found: {', '.join(vocabularies)}")
    return embeddings[0], heads[0] if heads else embeddings[0]


def _probe(layer: Any, width: int, version: int) -> Tensor:
    """(columns, outputs): columns of the layer's matrix, by computing."""
    reference = next(p for p in layer.parameters(recurse=False))
    picked = columns(width, version)
    one_hot = torch.zeros(len(picked), width, dtype=reference.dtype, device=reference.device)
    one_hot[torch.arange(len(picked)), picked] = 1
    columns_out: Tensor = layer.quant_method.apply(layer, one_hot, None)
    return columns_out


def _vectors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Norms and biases. A packed matrix leaves an empty vector behind, which adds nothing."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            yield name, parameter


def differences(policy: Digest, engine: Digest) -> list[str]:
    """The blocks that differ, in the policy's order."""
    return [key for key in {**policy, **engine} if policy.get(key, 0) != engine.get(key, 0)]
