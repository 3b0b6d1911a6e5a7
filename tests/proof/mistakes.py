"""Mistakes that an allocator could make, planted one at a time to see each detector fail.

Each is a function that changes the package under test through a `MonkeyPatch`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from vmem_kv.cache import KVCache
from vmem_kv.driver.base import Handle
from vmem_kv.growth import SlotId
from vmem_kv.pages import PagePool
from vmem_kv.region import Region
from vmem_kv.slots import SlotTable
from vmem_kv.testing import FaultyDriver

Mistake = Callable[[pytest.MonkeyPatch], None]


def leaks_one_page(patch: pytest.MonkeyPatch) -> None:
    give = PagePool.give
    patch.setattr(PagePool, "give", lambda pool, handles: give(pool, handles[: len(handles) - (len(handles) == 3)]))


def maps_one_page_for_two(patch: pytest.MonkeyPatch) -> None:
    original = FaultyDriver.map

    def alias(driver: FaultyDriver, page_bytes: int, addresses: Sequence[int], handles: Sequence[Handle]) -> None:
        original(driver, page_bytes, addresses, [handles[0] if i == 2 else h for i, h in enumerate(handles)])

    patch.setattr(FaultyDriver, "map", alias)


def does_not_scrub(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FaultyDriver, "scrub", lambda driver, spans: driver._point("scrub", 0))


def unmaps_too_early(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("vmem_kv.testing.memory.ManualFence.passed", lambda fence: True)


def unmaps_a_page_too_many(patch: pytest.MonkeyPatch) -> None:
    original = Region.unmap

    def eager(region: Region, slot_id: SlotId, keep_from: Sequence[int] | None = None) -> int:
        return original(region, slot_id, keep_from if keep_from is None else [n + 1 for n in keep_from])

    patch.setattr(Region, "unmap", eager)


def loses_the_undo_of_a_map(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("vmem_kv.region._ranges_of_plan", lambda plan, handles, n_mapped, **keywords: [])


def does_not_refund_mappings(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PagePool, "refund_mappings", lambda pool, n_mappings: None)


def reuses_pages_whose_unmap_failed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PagePool, "quarantine", lambda pool, handles: pool.give(list(handles)))


def commits_before_it_maps(patch: pytest.MonkeyPatch) -> None:
    ensure = KVCache.ensure

    def early(cache: KVCache, lengths: dict[Any, int]) -> None:
        cache._slots.require_active(lengths)
        cache._slots.n_tokens.update(lengths)
        ensure(cache, lengths)

    patch.setattr(KVCache, "ensure", early)


def adopts_the_first_warm_slot(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SlotTable, "_off", lambda table, index, wanted_tokens: -(SlotId(index) in table.warm))
    patch.setattr(SlotTable, "_reused", lambda table, index, wanted_tokens: 0)


def exceeds_the_budget(patch: pytest.MonkeyPatch) -> None:
    original = PagePool.take

    def generous(pool: PagePool, places: Sequence[int]) -> tuple[list[Handle], int]:
        budget, pool.max_pages = pool.max_pages, 1000
        try:
            return original(pool, places)
        finally:
            pool.max_pages = budget

    patch.setattr(PagePool, "take", generous)


IN_ANY_RUN: tuple[Mistake, ...] = (
    leaks_one_page,
    maps_one_page_for_two,
    does_not_scrub,
    unmaps_too_early,
    unmaps_a_page_too_many,
    loses_the_undo_of_a_map,
    does_not_refund_mappings,
    reuses_pages_whose_unmap_failed,
    commits_before_it_maps,
    adopts_the_first_warm_slot,
    exceeds_the_budget,
)
"""What random operations with faults must find."""

IN_A_SWEEP: tuple[Mistake, ...] = (
    leaks_one_page,
    maps_one_page_for_two,
    does_not_scrub,
    loses_the_undo_of_a_map,
    does_not_refund_mappings,
    reuses_pages_whose_unmap_failed,
    commits_before_it_maps,
)
"""What a sweep over two scenarios must find."""
