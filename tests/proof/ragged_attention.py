"""Calls of the attention kernel in C, built under a sanitizer: every tile, block, head size and option, ragged.

Every tensor is exactly as long as it must be. Where the address sanitizer runs, the rows of K and V between sequences
are poisoned besides: a load of any row that is not a sequence's own is a report.

Assumptions: run in a process of its own with the sanitizer's library in front; `tests/proof/test_sanitizers.py` does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise, product
from pathlib import Path

import torch

from tests.attention.harness import Seq, build_batch, spec
from vmem_kv.attention.base import AttentionSpec
from vmem_kv.attention.native import Native
from vmem_kv.tensors import SlotKV

SPAN = 200

# The first begins at the first row, the last ends with the last one.
MIXES = [
    [Seq(1, 1, 0)],
    [Seq(1, 7, 0), Seq(1, 64, 1, 3), Seq(1, 65, 2, 90), Seq(1, 130, 3)],
    [Seq(17, 17, 0), Seq(0, 50, 1), Seq(49, 113, 2, 60), Seq(2, 15, 3, 185)],
    [Seq(3, 16, 0), Seq(100, 100, 1), Seq(1, 5, 2, 7)],
]
HEADS = [(4, 2), (3, 1), (2, 2), (50, 1)]
SIZES = [(16, 16), (48, 32), (80, 80), (256, 16)]
EXTRAS: list[dict[str, object]] = [
    {},
    {"window": 1},
    {"window": 70, "softcap": 2.5, "has_sinks": True},
    {"is_causal": False},
]


def attend_all(library: str, n_threads: int) -> int:
    """Call the kernel in `library` for everything above; return how often."""
    n_calls = 0
    kernel = Native(Path(library))
    for number, (mix, extras, dtype) in enumerate(product(MIXES, EXTRAS, (torch.float32, torch.bfloat16))):
        for heads, sizes in zip(HEADS, SIZES[number % 4 :] + SIZES[: number % 4], strict=True):
            asked = spec(*heads, *sizes, dtype=dtype, **extras)
            attend = kernel.build(asked)
            query, kv, sinks = tensors(asked, mix, seed=number)
            batch = build_batch(mix, span=SPAN, n_slots=len(mix))
            with poisoned(kv, mix):
                torch.set_num_threads(n_threads)
                output = attend(query, kv, batch, sinks)
                torch.set_num_threads(1)
            assert output.isfinite().all()
            n_calls += 1
    return n_calls


def tensors(asked: AttentionSpec, mix: list[Seq], seed: int) -> tuple[torch.Tensor, SlotKV, torch.Tensor | None]:
    """Random queries, K, V and sinks for sequences in neighbouring slots."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(asked.dtype)

    n_rows = mix[-1].slot * SPAN + mix[-1].offset + mix[-1].length
    keys, values = (random(n_rows, asked.n_kv_heads, dim) for dim in (asked.head_dim, asked.value_dim))
    sinks = torch.randn(asked.n_q_heads, generator=generator) if asked.has_sinks else None
    query = random(sum(s.n_queries for s in mix), asked.n_q_heads, asked.head_dim)
    return query, SlotKV(keys, values, SPAN), sinks


@contextmanager
def poisoned(kv: SlotKV, mix: list[Seq]) -> Iterator[None]:
    """Forbid to touch the rows between sequences, where the address sanitizer is there to see it."""
    runtime = ctypes.CDLL(None)
    gaps: list[tuple[ctypes.c_void_p, ctypes.c_size_t]] = []
    if hasattr(runtime, "__asan_poison_memory_region"):
        for rows in (kv.keys, kv.values):
            row_bytes = rows.stride(0) * rows.element_size()
            for one, next_one in pairwise(mix):
                first = one.slot * SPAN + one.offset + one.length
                n_rows = next_one.slot * SPAN + next_one.offset - first
                start = ctypes.c_void_p(rows.data_ptr() + first * row_bytes)
                gaps.append((start, ctypes.c_size_t(n_rows * row_bytes)))
    for gap in gaps:
        runtime.__asan_poison_memory_region(*gap)
    try:
        yield
    finally:
        for gap in gaps:
            runtime.__asan_unpoison_memory_region(*gap)
