"""`attn_implementation="vmem_kv"`: torch's attention, with grouped-query heads packed when one token is decoded.

With fewer K/V heads than query heads, the query heads that share a K/V head become rows of one small query block:
`[B, Hq, 1, D] -> [B, Hkv, Hq / Hkv, D]`. K and V are then read once per K/V head instead of once per query head.
Recent stock code does the same where there is a mask; without one (a batch that is not padded) it leaves grouping to
torch, whose CPU kernel is several times slower that way in bf16 (`python -m benchmarks.generate` measures it).
Everything else is handed to the stock function.

Guarantees: same mathematics as the stock `sdpa`; nothing is expanded or copied. What torch's kernel lacks
(soft capping, sinks) is refused, never ignored.
Slack: 0 tokens; torch's kernels read exactly what the views cover.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vmem_kv.errors import ConfigError

NAME = "vmem_kv"
_UNSUPPORTED = {"softcap": "soft capping", "s_aux": "attention sinks", "indices": "sparse attention by index"}
_STOCK_ONLY = ("position_bias", "cache")
"""Arguments that only the stock function understands: additive biases, and continuous batching's paged cache."""


def packed_sdpa_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend as transformers' attention interface asks.

    Args:
        module: The attention module; its `num_key_value_groups` is not needed, the shapes say it.
        query: `[B, Hq, S, D]`.
        key: `[B, Hkv, L, D]`, any strides with the last one 1.
        value: `[B, Hkv, L, Dv]`, likewise.
        attention_mask: None, or boolean or additive, broadcastable to `[B, Hq, S, L]`.
        dropout: Probability, as in the stock function.
        scaling: Factor on the scores; None for `D ** -0.5`.

    Returns:
        The output `[B, S, Hq, Dv]`, and None for the weights, which torch does not return.

    Raises:
        ConfigError: The model asks for what this kernel lacks.
    """
    for name, what in _UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise ConfigError(
                f"attn_implementation='{NAME}' has no {what}, which this model needs; use attn_implementation='eager'"
            )
    n_groups = query.shape[1] // key.shape[1]
    if query.shape[2] != 1 or n_groups == 1 or dropout or any(kwargs.get(name) is not None for name in _STOCK_ONLY):
        stock: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return stock
    batch, n_heads, _, head_dim = query.shape
    packed = query.reshape(batch, key.shape[1], n_groups, head_dim)
    if attention_mask is not None and attention_mask.shape[1] != 1:
        attention_mask = attention_mask.reshape(-1, key.shape[1], n_groups, attention_mask.shape[-1])
    output = torch.nn.functional.scaled_dot_product_attention(
        packed, key, value, attn_mask=attention_mask, scale=scaling
    )
    return output.reshape(output.shape[0], 1, n_heads, output.shape[-1]), None


def register() -> None:
    """Make the name known to transformers. Idempotent."""
    AttentionInterface.register(NAME, packed_sdpa_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
