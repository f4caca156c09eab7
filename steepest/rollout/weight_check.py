"""Checks, bit for bit, that an engine with its own, repacked weights holds the policy's weights.

An engine fuses projections (q, k, v into one), packs matrices into a kernel's layout and may not keep the original
matrices. So its weights are read by computing: a row of zeros with a single 1, sent through a linear layer, gives
exactly one column of its matrix, in any layout. The bit patterns of some columns are added up over the layers of a
block, because the sum stays the same if matrices are fused or rows are reordered.

Each version checks other columns, so that after some updates all have been checked. In bf16, log-probs cannot
distinguish a small update (learning rate 1e-6) from no update; the bits can.
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
"""Number of columns of each matrix that one check compares."""

Digest = dict[str, int]
"""Block ("layers.3", "embedding", "head", "rest") -> sum of bit patterns."""


def columns(width: int, version: int) -> list[int]:
    """The columns that the check of `version` compares, in a matrix with `width` inputs."""
    step = max(1, width // NUM_COLUMNS)
    return [(version + i * step) % width for i in range(min(NUM_COLUMNS, width))]


def bits(values: Tensor) -> int:
    """The sum of the bit patterns of `values` as float32. -0.0 and numbers below the smallest normal one count as 0,
    because a product may change both to 0 (bf16 units of processors do). NaN counts like any other pattern."""
    plain = values.detach().float()
    plain = plain.masked_fill(plain.abs() < torch.finfo(torch.float32).tiny, 0.0)
    return int(plain.contiguous().view(torch.int32).to(torch.int64).sum())


def block_of(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `layers.3`; everything outside of the layers -> `rest`."""
    found = re.search(r"\b(?:layers|h|blocks)\.(\d+)\.", name)
    return f"layers.{found.group(1)}" if found else "rest"


class PolicyDigest:
    """Computes the digest of the policy's weights in `dtype` while they are sent to the engine, so that a source is
    iterated once. A tied head counts as embedding and as head."""

    def __init__(self, description: ModelDescription, dtype: torch.dtype, version: int) -> None:
        self._description, self._dtype, self._version = description, dtype, version
        self.found: Digest = {"embedding": 0, "head": 0}

    def passing(self, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the same pairs; each is added to `found` first."""
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
    """The digest of a vLLM model. Linear layers and the head are read by computing, vectors and the embedding directly.
    Layers are recognised by their attributes, because only one file may import vLLM."""
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
    """(embedding, head) of a vLLM model; the same module twice if the model uses one module for both."""
    vocabularies = {name: m for name, m in model.named_modules() if hasattr(m, "num_embeddings_per_partition")}
    heads = [m for name, m in vocabularies.items() if name.rpartition(".")[2] == "lm_head"]
    embeddings = [m for name, m in vocabularies.items() if name.rpartition(".")[2] != "lm_head"]
    if not embeddings or len(embeddings) > 1 or len(heads) > 1:
        raise LookupError(f"an embedding and at most one lm_head are expected, found: {', '.join(vocabularies)}")
    return embeddings[0], heads[0] if heads else embeddings[0]


def _probe(layer: Any, width: int, version: int) -> Tensor:
    """Columns of the layer's matrix, read by computing: (columns, outputs)."""
    reference = next(p for p in layer.parameters(recurse=False))
    picked = columns(width, version)
    one_hot = torch.zeros(len(picked), width, dtype=reference.dtype, device=reference.device)
    one_hot[torch.arange(len(picked)), picked] = 1
    columns_out: Tensor = layer.quant_method.apply(layer, one_hot, None)
    return columns_out


def _vectors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield norms and biases. A packed matrix leaves an empty vector, which adds nothing to a digest."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            yield name, parameter


def differences(policy: Digest, engine: Digest) -> list[str]:
    """The blocks that differ, in the policy's order."""
    return [key for key in {**policy, **engine} if policy.get(key, 0) != engine.get(key, 0)]
