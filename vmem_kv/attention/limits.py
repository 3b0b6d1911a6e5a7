"""What all FlashAttention kernels lack."""

from __future__ import annotations

import torch

from vmem_kv.attention.base import AttentionSpec

MAX_HEAD_DIM = 256


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
