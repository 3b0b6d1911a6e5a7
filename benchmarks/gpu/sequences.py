"""Sequences in demand-mapped slots and in plain tensors, filled with random K and V, ready for a kernel.

Guarantees of the mapped ones: exactly `length + slack` tokens of each slot are covered by pages, the page behind them
is not mapped, and mapped rows behind the slack are NaN: a kernel that looks where it must not faults or answers NaN.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.plan import Shape
from vmem_kv.attention.base import AttentionSpec, BoundKernel
from vmem_kv.attention.batch import RaggedBatch
from vmem_kv.cache import KVCache
from vmem_kv.errors import ConfigError, VmemError
from vmem_kv.layout import LayerSpec, Layout
from vmem_kv.tensors import RegionTensors, SlotKV

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Store:
    """K and V of one layer, and where the sequences are in them."""

    kv: SlotKV
    slot_starts: tuple[int, ...]
    lengths: tuple[int, ...]

    def batch(self, n_queries: Sequence[int]) -> RaggedBatch:
        """Return a batch in which sequence s brings its last `n_queries[s]` tokens."""
        starts = [0]
        for n in n_queries:
            starts.append(starts[-1] + n)
        return RaggedBatch.build(
            starts,
            self.slot_starts,
            self.lengths,
            span_tokens=self.kv.span_tokens,
            n_rows=self.kv.keys.shape[0],
            device=self.kv.keys.device,
        )


class MappedSequences:
    """A cache with one sequence per slot. Made by `mapped`."""

    def __init__(self, cache: KVCache, lengths: Sequence[int], slack_tokens: int, dtype: torch.dtype) -> None:
        self.cache = cache
        self.slots = cache.acquire_adjacent(len(lengths))
        self.lengths = tuple(lengths)
        self._dtype = dtype
        self._slack_tokens = slack_tokens
        self._tensors = RegionTensors(cache, lambda: None)
        cache.ensure({slot: n + slack_tokens for slot, n in zip(self.slots, lengths, strict=True)})

    def store(self, layer: int) -> Store:
        """Return one layer."""
        kv = self._tensors.layer(layer, self._dtype)
        return Store(kv, tuple(slot * kv.span_tokens for slot in self.slots), self.lengths)

    def fill(self, layer: int, *, poison: bool = True) -> None:
        """Fill a layer's tokens with random numbers, its slack with zeros, and what else is mapped with NaN."""
        kv = self._tensors.layer(layer, self._dtype)
        for rows in (kv.keys, kv.values):
            if len(set(self.lengths)) == 1 and not poison:
                _, n_heads, head_dim = rows.shape
                slots = rows.view(-1, kv.span_tokens, n_heads, head_dim).narrow(0, self.slots[0], len(self.slots))
                slots.narrow(1, 0, self.lengths[0]).normal_()
                slots.narrow(1, self.lengths[0], self._slack_tokens).zero_()
                continue
            for slot, length in zip(self.slots, self.lengths, strict=True):
                own = rows.narrow(0, slot * kv.span_tokens, self.cache.token_capacity(slot))
                own[:length].normal_()
                own[length : length + self._slack_tokens] = 0
                if poison:
                    own[length + self._slack_tokens :] = float("nan")

    def tokens_mapped(self) -> list[int]:
        """Return how many tokens of each slot pages hold."""
        return [self.cache.token_capacity(slot) for slot in self.slots]

    def close(self) -> None:
        """Give everything back. Stores must be gone.

        Raises:
            RuntimeError: Tensors look into it still; it stays open.
        """
        if not self._tensors.let_go():
            gc.collect()
            if not self._tensors.let_go():
                raise RuntimeError("tensors look into the cache still")
        self.cache.retire(self.cache.active_slots())
        self.cache.settle()
        self.cache.close()


@contextmanager
def mapped(
    bench: Bench,
    shape: Shape,
    kind: str,
    lengths: Sequence[int],
    *,
    dtype: torch.dtype,
    page_bytes: int,
    span_tokens: int,
    slack_tokens: int = 0,
    n_slots: int | None = None,
) -> Iterator[MappedSequences]:
    """Open a cache of the shape in a layout with these sequences, for as long as the context lasts."""
    layer = LayerSpec.uniform(shape.n_kv_heads, shape.head_dim, dtype.itemsize)
    layout = Layout.build(
        kind,
        [layer] * shape.n_layers,
        n_slots=n_slots or len(lengths),
        max_tokens=span_tokens + slack_tokens,
        page_bytes=page_bytes,
    )
    cache = KVCache(bench.pool(page_bytes), layout)
    try:
        sequences = MappedSequences(cache, lengths, slack_tokens, dtype)
    except VmemError:  # there was no room: others go on in this process
        cache.retire(cache.active_slots())
        cache.settle()
        cache.close()
        raise
    yield sequences
    # Not after an exception: its traceback holds tensors. The process goes, and the memory with it.
    bench.clock.synchronize()
    sequences.close()


def plain(bench: Bench, shape: Shape, lengths: Sequence[int], dtype: torch.dtype) -> Store:
    """Return the same in tensors of torch's own, one sequence behind the other, without room to grow."""
    span_tokens = max(lengths)
    rows = (len(lengths) * span_tokens, shape.n_kv_heads, shape.head_dim)
    keys, values = (torch.empty(rows, dtype=dtype, device=bench.device).normal_() for _ in "kv")
    return Store(SlotKV(keys, values, span_tokens), tuple(i * span_tokens for i in range(len(lengths))), tuple(lengths))


def spec_of(shape: Shape, dtype: torch.dtype) -> AttentionSpec:
    """Return causal attention of a shape."""
    return AttentionSpec(shape.n_q_heads, shape.n_kv_heads, shape.head_dim, shape.head_dim, dtype, shape.head_dim**-0.5)


def bind(bench: Bench, name: str, spec: AttentionSpec) -> BoundKernel | str:
    """Return a kernel of that name, or why there is none."""
    for kernel in bench.kernels:
        if kernel.name == name:
            try:
                return kernel.bind(spec, bench.device)
            except ConfigError as error:
                return str(error)
    return f"there is no kernel {name!r}"


def reference(query: torch.Tensor, store: Store, n_queries: Sequence[int]) -> torch.Tensor:
    """Attend in float64, one sequence after the other.

    Args:
        query: `[n_tokens, n_q_heads, head_dim]`.
        store: K and V.
        n_queries: How many tokens each sequence brings, its last ones.

    Returns:
        `[n_tokens, n_q_heads, head_dim]` in float64.
    """
    outputs = []
    first = 0
    for start, length, n in zip(store.slot_starts, store.lengths, n_queries, strict=True):
        keys, values = (rows[start : start + length].double() for rows in (store.kv.keys, store.kv.values))
        own = query[first : first + n].double()
        grouped = own.view(n, keys.shape[1], -1, own.shape[-1])
        scores = torch.einsum("mhgd,nhd->hgmn", grouped, keys) * own.shape[-1] ** -0.5
        seen = torch.arange(length, device=own.device) <= torch.arange(length - n, length, device=own.device)[:, None]
        weights = scores.masked_fill_(~seen, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hgmn,nhd->mhgd", weights, values).reshape(n, *query.shape[1:]))
        first += n
    return torch.cat(outputs)


def relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Return |output - expected| / |expected|; NaN or infinity where the output has any."""
    return float((output.double() - expected).norm() / expected.norm())
