"""Sequences that come, grow and go, while every row of K and V says whose it is and whole sequences are verified.

Every head of every row begins with one number, made from the sequence, the position and the tensor. Whatever wrong
mapping, alias, early unmap or late write there is, some head begins with another number than it should.
"""

from __future__ import annotations

import random

import torch

from benchmarks.gpu.bench import Bench
from vmem_kv.cache import KVCache
from vmem_kv.errors import OutOfSlots
from vmem_kv.growth import SlotId
from vmem_kv.layout import LayerSpec, Layout
from vmem_kv.tensors import RegionTensors

_N_LAYERS = 2
_N_TAGS = 8  # at the beginning of every head
_MASK = 0x7FFFFFFF


class TagChurn:
    """A cache under churn.

    Args:
        bench: Where.
        n_slots: Sequences that may live at one time.
        max_tokens: The longest a sequence gets.
        choices: What happens next.
    """

    def __init__(self, bench: Bench, *, n_slots: int, max_tokens: int, choices: random.Random) -> None:
        self.n_checked = 0
        """Rows verified so far."""
        self.n_sequences = 0
        """Sequences begun so far."""
        self._bench = bench
        self._choices = choices
        self._max_tokens = max_tokens
        layer = LayerSpec.uniform(8, 128, 4)
        page_bytes = bench.granularity_bytes
        self._layout = Layout.build(
            "per_layer", [layer] * _N_LAYERS, n_slots=n_slots, max_tokens=max_tokens, page_bytes=page_bytes
        )
        self._cache = KVCache(bench.pool(page_bytes), self._layout)
        self._tensors = RegionTensors(self._cache, lambda: None)
        # The row a slot's token lies in, for each K and V of each layer, seen as whole numbers.
        stores = [self._tensors.layer(i, torch.float32) for i in range(_N_LAYERS)]
        self._span_tokens = stores[0].span_tokens
        self._rows = [rows.view(torch.int32) for kv in stores for rows in (kv.keys, kv.values)]
        self._rows = [rows[..., :_N_TAGS] for rows in self._rows]
        self._live: dict[SlotId, tuple[int, int]] = {}  # slot -> (number of the sequence, its length)
        self._n_wrong = torch.zeros((), dtype=torch.int64, device=bench.device)
        self._positions = torch.arange(max_tokens, dtype=torch.int64, device=bench.device)

    def run(self, n_checks: int) -> int:
        """Churn until that many rows were verified; return how many were wrong."""
        while self.n_checked < n_checks:
            self._step()
        return int(self._n_wrong)

    def plant(self) -> int:
        """Write one wrong number into a live row, and return how many rows are found wrong then."""
        if not self._live:
            self._begin()
        slot, (_, length) = next(iter(self._live.items()))
        self._rows[0][slot * self._span_tokens + length // 2, 0, 0] += 1
        before = int(self._n_wrong)
        self._verify(slot)
        return int(self._n_wrong) - before

    def n_pages_mapped(self) -> int:
        """Pages mapped so far, one after the other."""
        return int(self._cache.pool.driver.calls["map"])

    def close(self) -> None:
        """Give everything back."""
        self._bench.clock.synchronize()
        self._rows.clear()
        self._cache.retire(self._cache.active_slots())
        self._cache.settle()
        self._cache.check()
        if not self._tensors.let_go():
            raise RuntimeError("tensors look into the cache still")
        self._cache.close()

    def _step(self) -> None:
        kind = self._choices.random()
        if len(self._live) < self._layout.n_slots and (kind < 0.3 or not self._live):
            self._begin()
        slot = self._choices.choice(list(self._live))
        if kind < 0.8:
            self._grow(slot, self._choices.randint(1, self._max_tokens // 4))
        self._verify(slot)
        if kind > 0.85:
            del self._live[slot]
            self._cache.retire(slot)
        if kind > 0.95:
            self._cache.reclaim(self._choices.randint(1, 64))

    def _begin(self) -> None:
        try:
            slot = self._cache.acquire()
        except OutOfSlots:  # those that ended still wait for the device
            self._cache.settle()
            slot = self._cache.acquire()
        self.n_sequences += 1
        self._live[slot] = (self.n_sequences, 0)
        self._grow(slot, self._choices.randint(1, self._max_tokens // 4))

    def _grow(self, slot: SlotId, n_more: int) -> None:
        number, length = self._live[slot]
        end = min(length + n_more, self._max_tokens)
        self._cache.ensure({slot: end})
        first = slot * self._span_tokens
        for index, rows in enumerate(self._rows):
            rows[first + length : first + end] = self._tags(number, index, length, end)
        self._live[slot] = (number, end)

    def _verify(self, slot: SlotId) -> None:
        number, length = self._live[slot]
        first = slot * self._span_tokens
        for index, rows in enumerate(self._rows):
            wrong = (rows[first : first + length] != self._tags(number, index, 0, length)).flatten(1).any(1)
            self._n_wrong += wrong.sum()
            self.n_checked += length

    def _tags(self, number: int, index: int, first: int, end: int) -> torch.Tensor:
        tags = self._positions[first:end] * 31 + (number * 1_000_003 + index * 7_919)
        return (tags & _MASK).to(torch.int32).view(-1, 1, 1)
