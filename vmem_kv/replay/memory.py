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
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, NewType, Protocol

from vmem_kv.cache import KVCache
from vmem_kv.driver.base import Driver
from vmem_kv.errors import CapacityError, OutOfAddressSpace, OutOfMappings, OutOfPages, OutOfSlots, UsageError
from vmem_kv.growth import SlotId
from vmem_kv.layout import Layout
from vmem_kv.pages import PagePool
from vmem_kv.traces.formats import Request

Key = NewType("Key", int)
"""A running sequence, as its memory calls it."""

Shortage = type[CapacityError]
"""What there is too little of, as the error that says so."""


class Fit(NamedTuple):
    """What a budget holds side by side."""

    n_sequences: int = 0
    is_full: bool = False  # whether the next one did not fit; else there were no more


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
    def n_batches(self) -> int:
        """Calls of our driver so far; each may be for many pages."""

    @property
    def n_driver_calls(self) -> int | None:
        """Calls that these batches come to on a device, one for each page or span; None where nobody counts them."""

    @property
    def n_peak_mappings(self) -> int:
        """The most mappings that were charged at once; 0 where nothing is mapped."""

    @property
    def max_mappings(self) -> int | None:
        """The limit on mappings; None where there is none."""

    @property
    def allocator_ns(self) -> int | None:
        """Nanoseconds spent in the allocator and its driver so far; None where there is none to measure."""

    def obstacle(self, n_tokens: int) -> Shortage | None:
        """What keeps a sequence of so many tokens from running, even if it were alone; None if nothing does."""

    @property
    def n_cached_tokens(self) -> int:
        """Prompt tokens that were there already when a sequence began, of all so far; 0 where nothing is shared."""

    @property
    def n_restored_tokens(self) -> int:
        """Of `n_cached_tokens`, those that were copied back from a slower tier."""

    def lack(self, n_tokens: int, request: Request | None = None) -> Shortage | None:
        """What keeps it from beginning now, such that the running ones have room to grow; None if nothing does."""

    def begin(self, n_tokens: int, expected_tokens: int, request: Request | None = None) -> Key:
        """Start a sequence with so many tokens, which may become `expected_tokens` long.

        Args:
            n_tokens: Of the prompt, and of what was made before a preemption.
            expected_tokens: A guess.
            request: Whose prompt it is, for a memory that shares prefixes.

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


class StudiedMemory(Memory, Protocol):
    """One whose sequences need what their lengths say and nothing else, so that it is known what fits."""

    def n_at_once(self, lengths: Iterable[int]) -> Fit:
        """How many sequences of these lengths, in this order, the budget holds side by side.

        Nothing is left free for growth. One that could not run alone is passed over; the first other that does not fit
        ends it. What runs now does not matter, and nothing changes.
        """


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
        items: Where the driver counts calls of a device's own driver by kind; None if it does not.
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
        items: Counter[str] | None = None,
    ) -> None:
        self.name = name
        self.layout = layout
        self.cache = KVCache(PagePool(driver, layout.page_bytes, budget_bytes // layout.page_bytes), layout)
        self.token_bytes = layout.token_bytes
        self.allocator_ns = 0
        self.n_cached_tokens = self.n_restored_tokens = 0
        self.n_peak_mappings = 0
        self.max_mappings: int | None = driver.info.max_mappings
        self._driver = driver
        self._items = items
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
    def n_batches(self) -> int:
        """Calls of all kinds; a batch counts once."""
        return self._driver.calls.total()

    @property
    def batches(self) -> dict[str, int]:
        """The same by kind."""
        return dict(self._driver.calls)

    @property
    def n_driver_calls(self) -> int | None:
        """Calls of all kinds; each page or span counts."""
        return None if self._items is None else self._items.total()

    @property
    def driver_calls(self) -> dict[str, int] | None:
        """The same by kind."""
        return None if self._items is None else dict(self._items)

    def obstacle(self, n_tokens: int) -> Shortage | None:
        if n_tokens > self.layout.max_tokens:
            return OutOfAddressSpace
        n_pages = self.layout.n_pages(n_tokens)
        if n_pages > self._pool.max_pages:
            return OutOfPages
        return OutOfMappings if self._mappings(n_pages, 1) > self._driver.info.max_mappings else None

    def lack(self, n_tokens: int, request: Request | None = None) -> Shortage | None:
        n_running = len(self._capacity)
        if n_running >= self.layout.n_slots:
            return OutOfSlots
        # Warm pages count as free: growth reclaims them.
        headroom = self._headroom_pages if n_running else 0
        n_pages = self._n_active_pages + self._pool.n_quarantined + headroom + self.layout.n_pages(n_tokens)
        if n_pages > self._pool.max_pages:
            return OutOfPages
        if self._mappings(n_pages, n_running + 1) > self._driver.info.max_mappings:
            return OutOfMappings
        return None

    def n_at_once(self, lengths: Iterable[int]) -> Fit:
        """How many sequences of these lengths, in this order, the budget and the limit on mappings hold side by side.

        Slots do not count: there can be as many as are asked for.
        """
        fit, n_pages = Fit(), 0
        for n_tokens in lengths:
            if self.obstacle(n_tokens) is None:
                n_pages += self.layout.n_pages(n_tokens)
                n_mappings = self._mappings(n_pages, fit.n_sequences + 1)
                if n_pages > self._pool.max_pages or n_mappings > self._driver.info.max_mappings:
                    return Fit(fit.n_sequences, is_full=True)
                fit = Fit(fit.n_sequences + 1)
        return fit

    def begin(self, n_tokens: int, expected_tokens: int, request: Request | None = None) -> Key:
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

    def _mappings(self, n_pages: int, n_sequences: int) -> int:
        """What so many pages of so many sequences cost of the limit, if neighbours merge where they can."""
        info = self._driver.info
        n_runs = n_sequences * len(self.layout.planes) if info.neighbours_merge else n_pages
        return n_runs * info.mappings_per_run

    def _note(self, slot_id: SlotId) -> None:
        """Take over what a slot holds now."""
        n_pages = self.cache.region.table.n_pages(slot_id)
        self._n_active_pages += n_pages - self._n_pages.get(slot_id, 0)
        self._n_pages[slot_id] = n_pages
        self._capacity[slot_id] = self.cache.token_capacity(slot_id)
        self.n_peak_mappings = max(self.n_peak_mappings, self._pool.n_mappings)
