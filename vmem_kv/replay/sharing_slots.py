"""Who maps the pages of sequences that share: the real cache, or rules that count what it would do.

Both are told the same by `SharingMemory`, which knows how many pages there are and who shares them. `CacheSlots` does
it with a `KVCache` over a driver. `BookSlots` only counts, which is far faster: for studies of many budgets.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Protocol

from vmem_kv.cache import KVCache
from vmem_kv.driver.base import Driver
from vmem_kv.errors import InvariantError
from vmem_kv.growth import SlotId
from vmem_kv.layout import Layout
from vmem_kv.pages import PagePool
from vmem_kv.replay.memory import Key
from vmem_kv.units import ceil_div


class Slots(Protocol):
    """Slots by their sequences' numbers. There is room for all that is asked."""

    @property
    def calls(self) -> Counter[str]:
        """Calls of a device's driver by kind, one for each page or span; copies are counted by the caller."""

    @property
    def n_batches(self) -> int:
        """Calls of our driver; each may be for many pages."""

    @property
    def allocator_ns(self) -> int | None:
        """Nanoseconds in the allocator and its driver so far; None where there is none."""

    def begin(self, key: int) -> None:
        """Begin a sequence without tokens."""

    def fork(self, source: int, key: int, n_tokens: int) -> None:
        """Begin a sequence with the first tokens of another one: full pages aliased, the rest copied."""

    def hold(self, lengths: Mapping[Key, int], short: Mapping[Key, int], n_pages: int) -> None:
        """Make room for these lengths, in tokens; `short` are those that need pages, and then `n_pages` are mapped."""

    def drop(self, key: int) -> None:
        """Unmap a sequence; its slot is nobody's again."""

    def check(self, n_pages: int) -> None:
        """Hold the books against themselves, and against the number of distinct pages that are mapped.

        Raises:
            InvariantError: They contradict each other.
        """

    def close(self) -> None:
        """Give everything back."""


class BookSlots:
    """Counts by rules: a call for each page that is created or mapped, and for each plane's span that is made
    accessible, scrubbed or unmapped.

    Args:
        layout: The geometry; all planes have rows of the same size.
    """

    def __init__(self, layout: Layout) -> None:
        self.calls: Counter[str] = Counter(reserve=1)
        self.n_batches = 1
        self.allocator_ns: int | None = None
        self._layout = layout
        self._n_planes = len(layout.planes)
        self._row_bytes = layout.planes[0].token_bytes
        self._n_stripes: dict[int, int] = {}

    def begin(self, key: int) -> None:
        self._n_stripes[key] = 0

    def fork(self, source: int, key: int, n_tokens: int) -> None:
        n_full = n_tokens * self._row_bytes // self._layout.page_bytes
        n_all = ceil_div(n_tokens * self._row_bytes, self._layout.page_bytes)
        self._n_stripes[key] = n_all
        if n_all:
            self.calls["map"] += n_all * self._n_planes
            self.calls["set_access"] += self._n_planes
            self.n_batches += 2
        if n_all > n_full:
            self.calls["scrub"] += self._n_planes
            self.n_batches += 2  # and a copy

    def hold(self, lengths: Mapping[Key, int], short: Mapping[Key, int], n_pages: int) -> None:
        n_grown = 0
        for key, n_tokens in short.items():
            n_more = ceil_div(n_tokens * self._row_bytes, self._layout.page_bytes) - self._n_stripes[key]
            if n_more > 0:
                n_grown += 1
                self._n_stripes[key] += n_more
                self.calls["map"] += n_more * self._n_planes
        self.calls["set_access"] += n_grown * self._n_planes
        self.calls["scrub"] += n_grown * self._n_planes
        self.n_batches += 3 if n_grown else 0
        if n_pages > self.calls["create"]:  # the pool keeps what it has
            self.calls["create"] = n_pages
            self.n_batches += 1

    def drop(self, key: int) -> None:
        if self._n_stripes.pop(key):
            self.calls["unmap"] += self._n_planes
            self.n_batches += 1

    def check(self, n_pages: int) -> None:
        """Nothing is known here of which pages are shared."""

    def close(self) -> None:
        self._n_stripes.clear()


class CacheSlots:
    """The real cache. A cached prompt keeps its slot active until it is dropped.

    Args:
        driver: Who hands out pages; closed with this object.
        layout: The geometry.
        max_pages: The budget.
        items: Where the driver counts calls of a device's own driver by kind.
    """

    def __init__(self, driver: Driver, layout: Layout, max_pages: int, items: Counter[str]) -> None:
        self.cache = KVCache(PagePool(driver, layout.page_bytes, max_pages), layout)
        self.allocator_ns: int | None = 0
        self._driver = driver
        self._items = items
        self._slot_of: dict[int, SlotId] = {}

    @property
    def calls(self) -> Counter[str]:
        """By kind, copies left out."""
        return Counter({kind: n for kind, n in self._items.items() if kind != "copy"})

    @property
    def n_batches(self) -> int:
        """Calls of all kinds; a batch counts once."""
        return self._driver.calls.total()

    def begin(self, key: int) -> None:
        with self._timed():
            self._slot_of[key] = self.cache.acquire(expected_tokens=0)

    def fork(self, source: int, key: int, n_tokens: int) -> None:
        with self._timed():
            self._slot_of[key] = self.cache.fork(self._slot_of[source], n_tokens)

    def hold(self, lengths: Mapping[Key, int], short: Mapping[Key, int], n_pages: int) -> None:
        wanted = {self._slot_of[key]: n_tokens for key, n_tokens in lengths.items()}
        with self._timed():
            self.cache.ensure(wanted)

    def drop(self, key: int) -> None:
        slot_id = self._slot_of.pop(key)
        with self._timed():
            self.cache.vacate(slot_id)
            self.cache.retire(slot_id)

    def check(self, n_pages: int) -> None:
        self.cache.check()
        if self.cache.pool.n_mapped != n_pages:
            raise InvariantError(f"{self.cache.pool.n_mapped} pages are mapped, the books of stripes say {n_pages}")

    def close(self) -> None:
        self.cache.retire(self.cache.active_slots())
        self.cache.close()
        self.cache.pool.trim()
        self._driver.close()

    def _timed(self) -> _Timer:
        return _Timer(self)


class _Timer:
    """Adds the time of a block to `allocator_ns`."""

    def __init__(self, slots: CacheSlots) -> None:
        self._slots = slots

    def __enter__(self) -> None:
        self._began = time.perf_counter_ns()

    def __exit__(self, *exception: object) -> None:
        self._slots.allocator_ns = (self._slots.allocator_ns or 0) + time.perf_counter_ns() - self._began
