"""The same attention over PagedAttention's blocks, for comparison: block tables where a kernel takes them, else copies.

Blocks are dealt out in random order, as they lie after a while of serving.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
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


def paged_calls(kernel: BoundKernel, blocks: Blocks, batch: RaggedBatch, query: torch.Tensor) -> dict[str, Call]:
    """Return the ways of a kernel to attend over blocks, by name."""
    calls: dict[str, Call] = {"blocks, gathered first": _gathered(kernel, blocks, batch, query)}
    if kernel.name == "torch_flash" and (call := _torch_block_table(kernel, blocks, batch, query)):
        calls["blocks, by table"] = call
    if kernel.name == "flash_attn" and query.is_cuda and batch.max_query_tokens == 1:
        calls["blocks, by table"] = _flash_attn_block_table(kernel, blocks, batch, query)
    return calls


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


def _torch_block_table(kernel: BoundKernel, blocks: Blocks, batch: RaggedBatch, query: torch.Tensor) -> Call | None:
    """Use torch's FlashAttention, which takes block tables from 2.12 on, and on CUDA only."""
    from torch.nn.attention.varlen import varlen_attn

    if not query.is_cuda or "block_table" not in inspect.signature(varlen_attn).parameters:
        return None
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
