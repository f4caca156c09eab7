"""The amount of memory for vLLM on a CPU, where it has no card to measure."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

_BLOCK = 128
"""Tokens of a KV block on the CPU; the last block of a sequence may be nearly empty."""


def cpu_kv_bytes(
    config: PretrainedConfig, dtype: torch.dtype, rows: int, max_model_len: int, limit: int | None
) -> int:  # fmt: skip
    """The size in bytes of a KV cache for `rows` sequences of max_model_len tokens, at most `limit`."""
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * size * dtype.itemsize
    blocks = -(-max_model_len // _BLOCK) + 1
    wanted = per_token * rows * blocks * _BLOCK
    return wanted if limit is None else min(wanted, limit)
