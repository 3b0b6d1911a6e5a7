"""What the FlashAttention kernels have in common: what they lack, how they are told of a window."""

from __future__ import annotations

import torch

from vmem_kv.attention.base import AttentionSpec
from vmem_kv.attention.batch import RaggedBatch

MAX_HEAD_DIM = 256
ALIGNMENT_BYTES = 16
"""Of addresses and strides: they load 16 bytes at once. Head sizes that they take are always multiples of it."""

NO_WINDOW = (-1, -1)


def flash_lacks(spec: AttentionSpec, dtypes: tuple[torch.dtype, ...]) -> str:
    """Say what of `spec` a FlashAttention kernel for `dtypes` lacks, or return an empty text."""
    if spec.dtype not in dtypes:
        return f"{spec.dtype}; use {' or '.join(str(dtype) for dtype in dtypes)}"
    if spec.head_dim != spec.value_dim:
        return f"keys of another size than values ({spec.head_dim} and {spec.value_dim})"
    if spec.head_dim > MAX_HEAD_DIM or spec.head_dim % 8:
        return f"head size {spec.head_dim}; it takes multiples of 8 up to {MAX_HEAD_DIM}"
    if spec.has_sinks:
        return "attention sinks"
    return ""


def flash_window(spec: AttentionSpec, batch: RaggedBatch) -> tuple[int, int]:
    """Return how many keys before and behind its own a query sees, or `NO_WINDOW`.

    A window that no sequence is longer than is none. Passed nevertheless it would cost: with an edge set, a decode is
    neither split over the keys nor packs the query heads of a K/V head.
    """
    return NO_WINDOW if spec.window is None or spec.window >= batch.max_length else (spec.window - 1, 0)
