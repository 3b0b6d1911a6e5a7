"""The same attention over PagedAttention's blocks, for comparison: block tables where a kernel takes them, else copies.

Blocks are dealt out in random order, as they lie after a while of serving.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.sequences import Store
from vmem_kv.attention.base import BoundKernel
from vmem_kv.attention.batch import RaggedBatch
from vmem_kv.tensors import SlotKV
from vmem_kv.units import ceil_div

BLOCK_TOKENS = 256
"""What flash-attn's paged kernel asks for; vLLM's usual 16 has more blocks to look up."""

BY_TABLE, GATHERED = "blocks, by table", "blocks, gathered first"

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Blocks:
    """K and V in blocks, and which block holds which tokens."""

    keys: torch.Tensor  # [n_blocks, BLOCK_TOKENS, n_heads, head_dim]
    values: torch.Tensor
    table: torch.Tensor  # int32 [n_seqs, n]


def into_blocks(store: Store) -> Blocks:
    """Copy sequences of equal length from plain tensors into blocks."""
    n_seqs, n_per_seq = len(store.lengths), ceil_div(max(store.lengths), BLOCK_TOKENS)
    device = store.kv.keys.device
    table = torch.randperm(n_seqs * n_per_seq, device=device).view(n_seqs, n_per_seq)
    keys, values = (_copied(rows, store, table) for rows in (store.kv.keys, store.kv.values))
    return Blocks(keys, values, table.to(torch.int32))


def _copied(rows: torch.Tensor, store: Store, table: torch.Tensor) -> torch.Tensor:
    n_seqs, n_per_seq = table.shape
    padded = rows.new_zeros(n_seqs, n_per_seq * BLOCK_TOKENS, *rows.shape[1:])
    padded[:, : max(store.lengths)] = rows.view(n_seqs, -1, *rows.shape[1:])
    blocks = torch.empty_like(padded).view(n_seqs * n_per_seq, BLOCK_TOKENS, *rows.shape[1:])
    blocks[table.flatten()] = padded.view_as(blocks)
    return blocks


def paged_calls(
    kernel: BoundKernel, blocks: Blocks, batch: RaggedBatch, query: torch.Tensor
) -> tuple[dict[str, Call], str | None]:
    """Return the ways of a kernel to attend over blocks, by name, and why none of them takes a block table."""
    calls: dict[str, Call] = {GATHERED: _gathered(kernel, blocks, batch, query)}
    if why := why_no_table(kernel.name, is_cuda=query.is_cuda, is_decode=batch.max_query_tokens == 1):
        return calls, why
    with_table = _torch_block_table if kernel.name == "torch_flash" else _flash_attn_block_table
    calls[BY_TABLE] = with_table(kernel, blocks, batch, query)
    return calls, None


def why_no_table(name: str, *, is_cuda: bool, is_decode: bool) -> str | None:
    """Return why a kernel is not called with a block table, or None where it is."""
    if name not in ("torch_flash", "flash_attn"):
        return f"{name} is called without block tables here"
    if not is_cuda:
        return "block tables need a GPU"
    if name == "flash_attn":
        return None if is_decode else "flash-attn's call with a block table is made for decode only"
    if "block_table" in _parameters_of_varlen_attn():
        return None
    return f"torch {torch.__version__} takes no block table (2.12 and later do), and it needs flash-attn otherwise"


def _parameters_of_varlen_attn() -> Collection[str]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return ()
    return inspect.signature(varlen_attn).parameters


def _gathered(kernel: BoundKernel, blocks: Blocks, batch: RaggedBatch, query: torch.Tensor) -> Call:
    n_per_seq = blocks.table.shape[1]
    order = blocks.table.flatten()
    span_tokens = n_per_seq * BLOCK_TOKENS
    packed = RaggedBatch.build(
        [s.query_start for s in batch.sequences] + [batch.n_tokens],
        [index * span_tokens for index in range(batch.n_seqs)],
        [s.length for s in batch.sequences],
        span_tokens=span_tokens,
        n_rows=batch.n_seqs * span_tokens,
        device=batch.device,
    )

    def call() -> torch.Tensor:
        keys, values = (rows.index_select(0, order).flatten(0, 1) for rows in (blocks.keys, blocks.values))
        return kernel(query, SlotKV(keys, values, span_tokens), packed)

    return call


def _torch_block_table(kernel: BoundKernel, blocks: Blocks, batch: RaggedBatch, query: torch.Tensor) -> Call:
    """Use torch's FlashAttention."""
    from torch.nn.attention.varlen import varlen_attn

    cumulated = torch.zeros(batch.n_seqs + 1, dtype=torch.int32, device=query.device)
    cumulated[1:] = batch.lengths.cumsum(0)

    def call() -> torch.Tensor:
        output: Any = varlen_attn(
            query,
            blocks.keys,
            blocks.values,
            batch.query_starts,
            cumulated,
            batch.max_query_tokens,
            batch.max_length,
            scale=kernel.spec.scale,
            window_size=(-1, 0) if batch.max_query_tokens > 1 else (-1, -1),
            enable_gqa=True,
            seqused_k=batch.lengths,
            block_table=blocks.table,
        )
        tensor: torch.Tensor = output
        return tensor

    return call


def _flash_attn_block_table(kernel: BoundKernel, blocks: Blocks, batch: RaggedBatch, query: torch.Tensor) -> Call:
    with_kvcache = importlib.import_module("flash_attn").flash_attn_with_kvcache

    def call() -> torch.Tensor:
        output: torch.Tensor = with_kvcache(
            query.unsqueeze(1),
            blocks.keys,
            blocks.values,
            cache_seqlens=batch.lengths,
            block_table=blocks.table,
            softmax_scale=kernel.spec.scale,
            causal=True,
        )
        return output.squeeze(1)

    return call
