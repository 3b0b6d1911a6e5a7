"""What a schedule asks of memory, and the real allocator as the one who answers.

Terms, in bytes, from the inside to the outside:

    live      the tokens in running sequences
    active    memory set aside for running sequences; active - live is their unused tails
    mapped    active, and what stays mapped under slots that wait for their next owner (warm)
    owned     mapped, and free pages that the pool keeps; all of the memory that nobody else can have

Guarantees: `grow` and `begin` either do all or raise a CapacityError and change no sequence.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NewType, Protocol

from vmem_kv.cache import KVCache
from vmem_kv.driver.base import Driver
from vmem_kv.errors import CapacityError, UsageError
from vmem_kv.growth import SlotId
from vmem_kv.layout import Layout
from vmem_kv.pages import PagePool

Key = NewType("Key", int)
"""A running sequence, as its memory calls it."""


class Memory(Protocol):
    """Somewhere sequences can live. The schedule knows nothing else about it."""

    @property
    def name(self) -> str:
        """What tables call it."""

    @property
    def token_bytes(self) -> int:
        """Bytes that one token needs."""

    @property
    def active_bytes(self) -> int:
        """Memory set aside for running sequences."""

    @property
    def mapped_bytes(self) -> int:
        """`active_bytes`, and what is kept ready for the next ones."""

    @property
    def owned_bytes(self) -> int:
        """All memory that is held."""

    @property
    def n_driver_calls(self) -> int:
        """Calls of the driver so far."""

    @property
    def allocator_ns(self) -> int | None:
        """Nanoseconds spent in the allocator so far; None where there is none to measure."""

    def fits(self, n_tokens: int) -> bool:
        """Whether a sequence of so many tokens could run, if it were alone."""

    def can_admit(self, n_tokens: int) -> bool:
        """Whether a sequence of so many tokens could begin now, such that the running ones have room to grow."""

    def begin(self, n_tokens: int, expected_tokens: int) -> Key:
        """Start a sequence with so many tokens, which may become `expected_tokens` long.

        Raises:
            CapacityError: There is no room. Nothing changed but memory that was kept ready.
        """

    def grow(self, lengths: Mapping[Key, int]) -> None:
        """Make room for these lengths, which name all running sequences.

        Raises:
            CapacityError: There is no room. Nothing changed but memory that was kept ready.
        """

    def end(self, keys: Sequence[Key]) -> None:
        """End sequences."""

    def close(self) -> None:
        """Give everything back."""


class AllocatorMemory:
    """A `KVCache` that is timed and counted.

    Args:
        name: What tables call it.
        driver: Who hands out pages; closed with this object.
        layout: The geometry.
        budget_bytes: The most that may be owned.
        headroom: Share of the budget that admission leaves to the running sequences.
        keeps_warm: Whether ended sequences leave their pages mapped for the next ones, until somebody needs them; else
            they are unmapped at once.
    """

    def __init__(
        self,
        name: str,
        driver: Driver,
        layout: Layout,
        budget_bytes: int,
        *,
        headroom: float = 0.01,
        keeps_warm: bool = True,
    ) -> None:
        self.name = name
        self.layout = layout
        self.cache = KVCache(PagePool(driver, layout.page_bytes, budget_bytes // layout.page_bytes), layout)
        self.token_bytes = layout.token_bytes
        self.allocator_ns = 0
        self.n_peak_mappings = 0
        self._driver = driver
        self._pool = self.cache.pool
        self._headroom_pages = int(self._pool.max_pages * headroom)
        self._keeps_warm = keeps_warm
        self._capacity: dict[SlotId, int] = {}  # per running sequence, in tokens
        self._n_pages: dict[SlotId, int] = {}  # likewise
        self._n_active_pages = 0
        self._n_maps_seen = 0

    @property
    def active_bytes(self) -> int:
        """Pages mapped under slots that belong to sequences."""
        return self._n_active_pages * self.layout.page_bytes

    @property
    def mapped_bytes(self) -> int:
        """All mapped pages."""
        return self._pool.n_mapped * self.layout.page_bytes

    @property
    def owned_bytes(self) -> int:
        """All pages of the pool."""
        return self._pool.n_owned * self.layout.page_bytes

    @property
    def n_driver_calls(self) -> int:
        """Calls of all kinds; a batch counts once."""
        return sum(self._driver.calls.values())

    @property
    def driver_calls(self) -> dict[str, int]:
        """Calls by kind."""
        return dict(self._driver.calls)

    def fits(self, n_tokens: int) -> bool:
        return n_tokens <= self.layout.max_tokens and self.layout.n_pages(n_tokens) <= self._pool.max_pages

    def can_admit(self, n_tokens: int) -> bool:
        # Warm pages count as free: growth reclaims them.
        headroom = self._headroom_pages if self._capacity else 0
        n_taken = self._n_active_pages + self._pool.n_quarantined + headroom
        n_running = len(self._capacity)
        return n_running < self.layout.n_slots and n_taken + self.layout.n_pages(n_tokens) <= self._pool.max_pages

    def begin(self, n_tokens: int, expected_tokens: int) -> Key:
        began = time.perf_counter_ns()
        slot_id = self.cache.acquire(expected_tokens=expected_tokens)
        try:
            self.cache.ensure({slot_id: n_tokens})
        except CapacityError:
            self.cache.retire(slot_id)
            raise
        finally:
            self.allocator_ns += time.perf_counter_ns() - began
        self._note(slot_id)
        self._n_maps_seen = self._driver.calls["map"]
        return Key(slot_id)

    def grow(self, lengths: Mapping[Key, int]) -> None:
        wanted: Mapping[SlotId, int] = lengths  # type: ignore[assignment]  # a key is a slot
        began = time.perf_counter_ns()
        try:
            self.cache.ensure(wanted)
        finally:
            self.allocator_ns += time.perf_counter_ns() - began
        n_maps = self._driver.calls["map"]
        if n_maps != self._n_maps_seen:
            self._n_maps_seen = n_maps
            for slot_id in [s for s, n in wanted.items() if n > self._capacity[s]]:
                self._note(slot_id)

    def end(self, keys: Sequence[Key]) -> None:
        slot_ids = [SlotId(key) for key in keys]
        for slot_id in slot_ids:
            del self._capacity[slot_id]
            self._n_active_pages -= self._n_pages.pop(slot_id)
        began = time.perf_counter_ns()
        self.cache.retire(slot_ids)
        if not self._keeps_warm:
            self.cache.reclaim(self._pool.n_mapped - self._n_active_pages)
        self.allocator_ns += time.perf_counter_ns() - began

    def check(self) -> None:
        """Hold the allocator's books against themselves and against ours.

        Raises:
            InvariantError: The allocator's books contradict each other.
            UsageError: They contradict ours.
        """
        self.cache.check()
        n_live_pages = self.cache.stats().n_live_pages
        if n_live_pages != self._n_active_pages:
            raise UsageError(f"{n_live_pages} pages under running sequences, {self._n_active_pages} in our books")

    def close(self) -> None:
        self.cache.retire(self.cache.active_slots())
        self.cache.close()
        self._pool.trim()
        self._driver.close()

    def _note(self, slot_id: SlotId) -> None:
        """Take over what a slot holds now."""
        n_pages = self.cache.region.n_pages(slot_id)
        self._n_active_pages += n_pages - self._n_pages.get(slot_id, 0)
        self._n_pages[slot_id] = n_pages
        self._capacity[slot_id] = self.cache.token_capacity(slot_id)
        self.n_peak_mappings = max(self.n_peak_mappings, self._pool.n_mappings)
