"""A small cache with everything around it visible: the driver's own books, faults on demand, bytes, leaks."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

from vmem_kv.cache import KVCache
from vmem_kv.driver.checked import CheckedDriver
from vmem_kv.driver.ledger import Ledger
from vmem_kv.growth import SlotId
from vmem_kv.layout import LayerSpec, Layout, TensorSpec
from vmem_kv.pages import PagePool
from vmem_kv.testing import FaultyDriver, HostMemory

from .backends import open_backend, physical_bytes

PAGE = mmap.PAGESIZE

OpenBench = Callable[..., "Bench"]
"""Opens a `Bench` on one of the backends, with a `Bench`'s arguments."""

MIXED = (
    LayerSpec(TensorSpec(3, 56, 2), TensorSpec(1, 24, 4)),
    LayerSpec(TensorSpec(2, 80, 2), TensorSpec(2, 112, 2)),
)
"""Two layers of odd sizes, K and V of different shapes: 336 + 96 + 320 + 448 bytes per token."""


def make_layout(kind: str = "per_layer", *, n_slots: int = 4, max_tokens: int = 48, page_bytes: int = PAGE) -> Layout:
    """Lay out `MIXED`."""
    return Layout.build(kind, MIXED, n_slots=n_slots, max_tokens=max_tokens, page_bytes=page_bytes)


class Bench:
    """A driver that can fail, under one that checks, under a pool and a cache."""

    def __init__(
        self,
        kind: str = "per_layer",
        *,
        backend: str = "python",
        max_pages: int = 64,
        keep_freed: bool = False,
        n_slots: int = 4,
        max_tokens: int = 48,
        page_bytes: int = PAGE,
    ) -> None:
        self.device = open_backend(backend, Ledger())
        self.faulty = FaultyDriver(self.device)
        self.driver = CheckedDriver(self.faulty)
        self.pool = PagePool(self.driver, page_bytes, max_pages, keep_freed=keep_freed)
        self.layout = make_layout(kind, n_slots=n_slots, max_tokens=max_tokens, page_bytes=page_bytes)
        self.cache = KVCache(self.pool, self.layout)
        self.memory = HostMemory()

    def address(self, slot_id: int, plane_index: int, token: int) -> int:
        """The address of a token's row, by the formula of the documentation."""
        plane = self.layout.planes[plane_index]
        base = self.cache.region.reservation.base
        return base + plane.base_bytes + slot_id * plane.span_bytes + token * plane.token_bytes

    def row(self, slot_id: int, plane_index: int, token: int) -> bytes:
        """The bytes of a token's row."""
        return self.memory.read(self.address(slot_id, plane_index, token), self.layout.planes[plane_index].token_bytes)

    def write_row(self, slot_id: int, plane_index: int, token: int, fill: bytes) -> None:
        """Fill a token's row with one byte."""
        n_bytes = self.layout.planes[plane_index].token_bytes
        self.memory.write(self.address(slot_id, plane_index, token), fill * n_bytes)

    def fill(self, slot_id: int, n_tokens: int, fill: bytes = b"\xa5") -> None:
        """Fill the rows of the first tokens in every plane."""
        for plane_index in range(len(self.layout.planes)):
            for token in range(n_tokens):
                self.write_row(slot_id, plane_index, token, fill)

    def grown(self, n_tokens: int, fill: bytes = b"\xa5", **keywords: object) -> SlotId:
        """A new sequence of so many tokens, all rows filled."""
        slot_id = self.cache.acquire(**keywords)  # type: ignore[arg-type]
        self.cache.ensure({slot_id: n_tokens})
        self.fill(slot_id, n_tokens, fill)
        return slot_id

    def physical_bytes(self) -> int:
        """Memory behind the driver now, by the count of whoever is below it."""
        return physical_bytes(self.device)

    def mapped_addresses(self) -> set[int]:
        """What the driver has mapped in this cache's region, by its own books."""
        reservation = self.cache.region.reservation
        return {a for a in self.driver._mapped if reservation.base <= a < reservation.end}

    def check(self) -> None:
        """The cache's own check, and its books against the driver's."""
        self.cache.check()
        stats = self.cache.stats()
        # A stuck page is mapped still; the books call it quarantined.
        n_stuck = sum(len(stuck.range[1]) for stuck in self.cache.region.unmapper.stuck)
        assert stats.n_live_pages + stats.n_warm_pages + stats.n_pending_pages + n_stuck == len(self.mapped_addresses())
        assert stats.n_owned_pages == self.driver.n_live_handles
        assert self.physical_bytes() == stats.owned_bytes
        assert stats.n_in_flight_pages == 0

    def retire_all(self) -> None:
        """Retire every active slot."""
        self.cache.retire(self.cache.active_slots())

    def close(self) -> None:
        """Close everything; nothing may be left but what was quarantined by failed releases."""
        self.cache.close()
        self.pool.trim()
        n_lost = self.pool.n_quarantined
        assert (self.driver.n_live_mappings, self.driver.n_live_reservations) == (0, 0)
        assert self.driver.n_live_handles == n_lost == self.pool.n_owned
        assert self.physical_bytes() == n_lost * self.pool.page_bytes
        assert self.pool.n_mappings == 0
        self.device.close()


def books(cache: KVCache) -> dict[str, Any]:
    """All that a call which "changed nothing" must leave alone: states, lengths, tables, counts. No driver calls."""
    slots, pool, region = cache._slots, cache.pool, cache.region
    return {
        "states": list(slots.state),
        "lengths": dict(slots.n_tokens),
        "capacities": dict(slots.capacity),
        "first_tokens": dict(slots.first_token),
        "warm": list(slots.warm.items()),
        "retired": dict(slots.retired),
        "slides": list(cache._pending.slides),
        "busy": set(slots.busy),
        "domains": dict(slots.domain),
        "mapped": {slot_id: list(ranges) for slot_id, ranges in region.table.mapped.items()},
        "handles": {slot_id: [list(h) for h in planes] for slot_id, planes in region.table.handles.items()},
        "broken": set(region.broken),
        "stuck": len(region.unmapper.stuck),
        "budget": pool.max_pages,
        "n_in_flight": pool.n_in_flight,
        "n_mapped": pool.n_mapped,
        "n_mappings": pool.n_mappings,
        "n_quarantined": pool.n_quarantined,
    }
