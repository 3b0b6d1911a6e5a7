"""Mistakes that an allocator could make, planted one at a time to see each detector fail.

Each is a function that changes the package under test through a `MonkeyPatch`.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import pytest

from vmem_kv import growth
from vmem_kv.cache import KVCache
from vmem_kv.claims import Claims
from vmem_kv.driver.base import Handle
from vmem_kv.driver.host import HostDriver
from vmem_kv.growth import SlotId
from vmem_kv.page_table import PageTable
from vmem_kv.pages import PagePool
from vmem_kv.region import Region
from vmem_kv.slots import SlotTable
from vmem_kv.testing import FaultyDriver
from vmem_kv.unmapping import Unmapper

Mistake = Callable[[pytest.MonkeyPatch], None]


def rewritten(function: FunctionType, old: str, new: str) -> Any:
    """A function with a piece of its source replaced; the piece must be there, once."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{function.__qualname__} has another text now; plant this mistake anew"
    made = dict(function.__globals__)
    exec(source.replace(old, new), made)
    return made[function.__name__]


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
    patch.setattr("vmem_kv.mapping.ranges_of", lambda plan, handles, n_mapped: [])
    patch.setattr("vmem_kv.mapping.pages_of", lambda plan, handles: [])


def does_not_refund_mappings(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PagePool, "refund_mappings", lambda pool, n_mappings: None)


def reuses_pages_whose_unmap_failed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PagePool, "quarantine", lambda pool, handles: pool.give(list(handles)))


def hands_out_lost_pages(patch: pytest.MonkeyPatch) -> None:
    """A page of the quarantine changes places with one that is handed out: all counts stay right."""
    take = PagePool.take

    def take_lost(pool: PagePool, places: Sequence[int]) -> tuple[list[Handle], int]:
        handles, n_used = take(pool, places)
        if pool._quarantined and handles:
            handles[0], pool._quarantined[0] = pool._quarantined[0], handles[0]
        return handles, n_used

    patch.setattr(PagePool, "take", take_lost)


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


def maps_a_page_too_many(patch: pytest.MonkeyPatch) -> None:
    """Where rows end with a page, it maps the next one too."""
    ceil, wrong = "-(-n_tokens * plane.token_bytes // page_bytes)", "n_tokens * plane.token_bytes // page_bytes + 1"
    patch.setattr("vmem_kv.cache.plan_growth", rewritten(growth.plan_growth, ceil, wrong))  # type: ignore[arg-type]


def scrubs_as_the_first_neighbour_needs(patch: pytest.MonkeyPatch) -> None:
    wrong = rewritten(KVCache.acquire_adjacent, "slots.domain[slot_id]", "slots.domain.get(chosen[0])")  # type: ignore[arg-type]
    patch.setattr(KVCache, "acquire_adjacent", wrong)


def does_not_refund_memory(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PagePool, "_disown", lambda pool, n_pages: setattr(pool, "n_owned", pool.n_owned - n_pages))


def shows_stale_pages(patch: pytest.MonkeyPatch) -> None:
    take = PagePool.take
    patch.setattr(PagePool, "take", lambda pool, places: (take(pool, places)[0], 0))


def shows_stale_warm_slots(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Region, "scrub", lambda region, slot_id: None)


def maps_one_page_twice(patch: pytest.MonkeyPatch) -> None:
    """Below everything that keeps books: all of them say that each page is mapped once."""
    original = HostDriver.map

    def alias(driver: HostDriver, page_bytes: int, addresses: Sequence[int], handles: Sequence[Handle]) -> None:
        first = min(driver._pages)
        original(driver, page_bytes, addresses, [first if h % (page_bytes * 7) == 0 else h for h in handles])

    patch.setattr(HostDriver, "map", alias)


def miscounts_mappings(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PageTable, "count_mappings", lambda table, handles: len(handles) // 3)


def maps_a_page_too_few(patch: pytest.MonkeyPatch) -> None:
    """It stops short of the last tokens."""
    original = KVCache.ensure

    def stingy(cache: KVCache, lengths: dict[SlotId, int]) -> None:
        n_most = cache.layout.max_tokens - 8
        original(cache, {slot_id: min(n, n_most) for slot_id, n in lengths.items()})

    patch.setattr(KVCache, "ensure", stingy)


def reclaims_the_newest_first(patch: pytest.MonkeyPatch) -> None:
    original = SlotTable.settle

    def settle(table: SlotTable, slot_id: SlotId, capacity: int) -> None:
        original(table, slot_id, capacity)
        table.warm = dict(sorted(table.warm.items(), key=lambda item: item[0] != slot_id))

    patch.setattr(SlotTable, "settle", settle)


def forgets_what_create_made_before_it_failed(patch: pytest.MonkeyPatch) -> None:
    release = PagePool._release

    def forget(pool: PagePool, handles: Sequence[Handle], *, raise_error: bool = False) -> None:
        if raise_error:
            release(pool, handles, raise_error=True)

    patch.setattr(PagePool, "_release", forget)


def leaves_a_slot_busy(patch: pytest.MonkeyPatch) -> None:
    """A claim on several slots ends for one of them."""
    end = Claims.end
    patch.setattr(Claims, "end", lambda claims, slot_ids: end(claims, list(slot_ids)[:1]))
    patch.setattr("vmem_kv.claims.STALL_TIMEOUT_S", 0.01)  # or whoever meets it waits for a minute


def waits_for_its_own_stream_only(patch: pytest.MonkeyPatch) -> None:
    """It forgets the streams on which others grew their sequences, and launched their kernels."""
    patch.setattr(KVCache, "fence", lambda cache: cache.pool.driver.fence())


def truncates_under_kernels(patch: pytest.MonkeyPatch) -> None:
    """It does not wait before it takes away what is truncated and shared."""
    wrong = rewritten(KVCache.begin_truncate, "partial(self._wait_for, fence)", "lambda: None")  # type: ignore[arg-type]
    patch.setattr(KVCache, "begin_truncate", wrong)


def shares_under_kernels(patch: pytest.MonkeyPatch) -> None:
    wrong = rewritten(KVCache.begin_share, "partial(self._wait_for, fence)", "lambda: None")  # type: ignore[arg-type]
    patch.setattr(KVCache, "begin_share", wrong)


def vacates_under_kernels(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KVCache, "vacate", rewritten(KVCache.vacate, "self._wait_for(fence)", "pass"))  # type: ignore[arg-type]


def forgets_streams_of_forks(patch: pytest.MonkeyPatch) -> None:
    """A fence does not cover the streams on which forks copy."""
    piece = "self._streams.add(self.pool.driver.current_stream())"
    patch.setattr(KVCache, "fork_adjacent", rewritten(KVCache.fork_adjacent, piece, "pass"))  # type: ignore[arg-type]


def is_certain_after_a_second_interruption(patch: pytest.MonkeyPatch) -> None:
    """Whatever a second Ctrl-C left, it takes for mapped."""
    wrong = rewritten(Unmapper.unmap, "may_pass=True, is_certain=False", "may_pass=True, is_certain=True")  # type: ignore[arg-type]
    patch.setattr(Unmapper, "unmap", wrong)


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
    maps_a_page_too_many,
    scrubs_as_the_first_neighbour_needs,
    does_not_refund_memory,
    shows_stale_pages,
    shows_stale_warm_slots,
    maps_one_page_twice,
    miscounts_mappings,
    maps_a_page_too_few,
    reclaims_the_newest_first,
    forgets_what_create_made_before_it_failed,
    leaves_a_slot_busy,
    truncates_under_kernels,
    shares_under_kernels,
    vacates_under_kernels,
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
    maps_a_page_too_many,
    scrubs_as_the_first_neighbour_needs,
    does_not_refund_memory,
    shows_stale_pages,
    shows_stale_warm_slots,
    maps_one_page_twice,
    miscounts_mappings,
    maps_a_page_too_few,
    forgets_what_create_made_before_it_failed,
    leaves_a_slot_busy,
)
"""What a sweep over three scenarios must find."""
