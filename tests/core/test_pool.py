"""The pool: budget, reuse, giving back, several caches, and books that are seen to be checked."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

import pytest

from vmem_kv.cache import KVCache
from vmem_kv.driver.base import Handle
from vmem_kv.errors import ConfigError, DriverError, InvariantError, OutOfPages
from vmem_kv.growth import SlotId
from vmem_kv.slots import SlotState
from vmem_kv.testing import ManualFence, fail_kind, fail_once

from .bench import PAGE, Bench, OpenBench, books, make_layout


def test_pages_that_come_back_are_released_or_kept_as_the_pool_was_told(open_bench: OpenBench) -> None:
    for keep_freed in (False, True):
        bench = open_bench(keep_freed=keep_freed)
        bench.cache.retire(bench.grown(20))
        n_pages = bench.cache.reclaim(1000)
        assert bench.pool.n_free == (n_pages if keep_freed else 0)
        assert bench.physical_bytes() == bench.pool.n_free * PAGE
        assert bench.pool.trim(3) == (3 if keep_freed else 0)
        assert bench.physical_bytes() == bench.pool.n_free * PAGE
        bench.check()
        bench.close()


@pytest.mark.parametrize("n_first", [1, 4, 30])
def test_a_reused_page_never_shows_the_bytes_of_its_last_owner(open_bench: OpenBench, n_first: int) -> None:
    bench = open_bench(keep_freed=True)
    bench.cache.retire(bench.grown(n_first, b"s", domain="secret"))
    bench.cache.reclaim(1000)
    slot_id = bench.cache.acquire(domain="other")
    bench.cache.ensure({slot_id: 48})  # more pages than were freed: used ones and new ones
    for address in bench.mapped_addresses():
        assert not any(bench.memory.read(address, PAGE))
    bench.retire_all()
    bench.close()


def test_a_warm_slot_never_shows_the_bytes_of_another_domain(open_bench: OpenBench) -> None:
    bench = open_bench(n_slots=1)
    bench.cache.retire(bench.grown(48, b"s", domain="secret"))
    bench.cache.acquire(domain="other")
    for address in bench.mapped_addresses():
        assert not any(bench.memory.read(address, PAGE))
    bench.retire_all()
    bench.close()


def test_a_warm_slot_of_the_same_domain_is_not_scrubbed(open_bench: OpenBench) -> None:
    bench = open_bench(n_slots=1)
    bench.cache.retire(bench.grown(48, domain="same"))
    n_scrubs = bench.driver.calls["scrub"]
    bench.cache.acquire(domain="same")
    assert bench.driver.calls["scrub"] == n_scrubs
    bench.retire_all()
    bench.close()


def test_a_slot_that_could_not_be_scrubbed_is_not_handed_out(open_bench: OpenBench) -> None:
    bench = open_bench(n_slots=1)
    bench.cache.retire(bench.grown(48, b"s", domain="secret"))
    before = books(bench.cache)
    with bench.faulty.failing(fail_kind("scrub", 2)), pytest.raises(DriverError):
        bench.cache.acquire(domain="other")
    assert books(bench.cache) == before
    slot_id = bench.cache.acquire(domain="other")
    assert not any(bench.row(slot_id, 0, 0))
    bench.retire_all()
    bench.close()


def test_the_budget_can_shrink_and_grow_while_running(open_bench: OpenBench) -> None:
    bench = open_bench(max_pages=40, keep_freed=True)
    live, warm = bench.grown(10), bench.grown(30)
    bench.cache.retire(warm)
    bench.pool.resize(40)
    n_live = bench.cache.stats().n_live_pages
    before = books(bench.cache)
    with pytest.raises(OutOfPages, match="retire"):
        bench.pool.resize(n_live - 1)
    assert books(bench.cache) == before
    bench.pool.resize(n_live)
    bench.check()
    assert bench.physical_bytes() == n_live * PAGE
    with pytest.raises(OutOfPages):
        bench.cache.ensure({live: 48})
    bench.pool.resize(60)
    bench.cache.ensure({live: 48})
    with pytest.raises(ConfigError):
        bench.pool.resize(0)
    with pytest.raises(ConfigError, match="does not fit"):
        bench.pool.resize(1 << 50)
    bench.check()
    bench.retire_all()
    bench.close()


def test_the_budget_can_shrink_onto_slots_whose_fence_has_passed_since(open_bench: OpenBench) -> None:
    bench = open_bench(max_pages=40)
    fence = ManualFence()
    bench.cache.retire(bench.grown(30), fence)
    with pytest.raises(OutOfPages):
        bench.pool.resize(1)
    fence.pass_()
    bench.pool.resize(1)
    bench.check()
    bench.close()


def test_a_budget_that_shrinks_while_others_take_pages_is_never_exceeded(open_bench: OpenBench) -> None:
    bench = open_bench(max_pages=40)
    slot_id = bench.cache.acquire()

    class Interrupted(threading.Condition):
        """Lets another call in before the lock is taken, once: what a second thread could do."""

        n_before = -1

        def __enter__(self) -> bool:
            self.n_before -= 1
            if self.n_before == 0:
                bench.cache.ensure({slot_id: 40})
            return super().__enter__()

    for n_before in range(1, 7):
        bench.pool.lock = lock = Interrupted(threading.Lock())
        lock.n_before = n_before
        with contextlib.suppress(OutOfPages):
            bench.pool.resize(2)
        lock.n_before = -1
        bench.check()
        assert bench.pool.n_owned <= bench.pool.max_pages
        bench.pool.resize(40)
        bench.cache.ensure({slot_id: 0})
        bench.retire_all()
        bench.cache.reclaim(1000)
        slot_id = bench.cache.acquire()
    bench.retire_all()
    bench.close()


def test_creating_pages_that_failed_does_not_raise_the_peak(open_bench: OpenBench) -> None:
    bench = open_bench(max_pages=40)
    slot_id = bench.grown(1)
    assert bench.cache.stats().n_peak_owned_pages == 4
    with bench.faulty.failing(fail_kind("create", 3)), pytest.raises(OutOfPages):
        bench.cache.ensure({slot_id: 48})
    assert bench.cache.stats().n_peak_owned_pages == 4
    bench.retire_all()
    bench.close()


def test_a_page_whose_release_failed_is_quarantined_and_the_others_are_released(open_bench: OpenBench) -> None:
    bench = open_bench()
    bench.cache.retire(bench.grown(48))
    with bench.faulty.failing(fail_once(6)), pytest.raises(DriverError):
        bench.cache.reclaim(1000)
    bench.check()
    assert bench.pool.n_quarantined == bench.pool.n_owned == 1
    bench.close()


# Several caches


def test_caches_on_one_pool_reclaim_from_each_other(open_bench: OpenBench) -> None:
    bench = open_bench(max_pages=20)
    other = KVCache(bench.pool, make_layout("token_major", n_slots=2))
    bench.cache.retire(bench.grown(40))
    slot_id = other.acquire()
    other.ensure({slot_id: 48})
    assert bench.cache.stats().n_warm_pages == 0
    stats = bench.cache.stats()
    assert stats.n_elsewhere_pages == other.stats().n_live_pages == stats.n_owned_pages
    other.check()
    bench.cache.check()
    with pytest.raises(OutOfPages):
        bench.grown(48)
    other.retire(slot_id)
    bench.cache.ensure({bench.cache.active_slots()[0]: 48})
    assert other.stats().n_warm_pages == 0
    bench.retire_all()
    other.close()
    bench.close()


def test_a_cache_reclaims_its_own_warm_slots_before_those_of_others(open_bench: OpenBench) -> None:
    bench = open_bench(max_pages=14)
    other = KVCache(bench.pool, make_layout("token_major", n_slots=2))
    theirs = other.acquire()
    other.ensure({theirs: 3})
    other.retire(theirs)
    bench.cache.retire(bench.grown(20))
    slot_id = bench.cache.acquire(expected_tokens=0)
    bench.cache.ensure({slot_id: 20})
    assert other.stats().n_warm_pages == 1
    assert bench.cache.stats().n_warm_pages == 0
    bench.retire_all()
    other.close()
    bench.close()


def test_pages_kept_by_a_closed_cache_serve_the_next_one_scrubbed(open_bench: OpenBench) -> None:
    bench = open_bench(keep_freed=True, page_bytes=2 * PAGE)
    for n_slots in (3, 5, 2, 4):
        other = KVCache(bench.pool, make_layout("per_layer", n_slots=n_slots, page_bytes=2 * PAGE))
        slots = [other.acquire() for _ in range(n_slots)]
        for slot_id in slots:
            other.ensure({slot_id: 24})
        for i, slot_id in enumerate(slots):
            for plane in other.layout.planes:
                start = other.region.reservation.base + plane.base_bytes + slot_id * plane.span_bytes
                assert not any(bench.memory.read(start, 24 * plane.token_bytes)), "bytes of an earlier cache"
                bench.memory.write(start, bytes([i + 1]) * 24 * plane.token_bytes)
        for i, slot_id in enumerate(slots):
            for plane in other.layout.planes:
                start = other.region.reservation.base + plane.base_bytes + slot_id * plane.span_bytes
                assert set(bench.memory.read(start, 24 * plane.token_bytes)) == {i + 1}, "two pages share memory"
        other.retire(slots)
        other.close()
    bench.close()


# Statistics


def test_states_are_disjoint_and_add_up_to_what_is_owned(open_bench: OpenBench) -> None:
    bench = open_bench(max_pages=100, keep_freed=True)
    other = KVCache(bench.pool, make_layout("token_major"))
    elsewhere = other.acquire()
    other.ensure({elsewhere: 4})
    live, warm, pending = bench.grown(10), bench.grown(20), bench.grown(30)
    fence = ManualFence()
    bench.cache.retire(warm)
    bench.cache.retire(pending, fence)
    more = bench.grown(48)
    bench.cache.retire(more)
    with bench.faulty.failing(fail_kind("unmap", 1)), pytest.raises(DriverError):
        bench.cache.reclaim(1)
    stats = bench.cache.stats()
    layout = bench.layout
    assert stats.n_live_pages == layout.n_pages(10)
    assert stats.n_pending_pages == layout.n_pages(30)
    assert stats.n_elsewhere_pages == 2
    assert stats.n_quarantined_pages > 0
    assert stats.n_owned_pages == bench.driver.n_live_handles
    assert stats.owned_bytes == bench.physical_bytes()
    assert stats.mapped_bytes == (stats.n_live_pages + stats.n_warm_pages + stats.n_pending_pages) * PAGE
    assert stats.virtual_bytes == layout.virtual_bytes
    assert stats.live_bytes == 10 * layout.token_bytes
    assert stats.peak_bytes >= stats.owned_bytes
    assert stats.max_pages == 100
    bench.cache.slide(live, 4)
    assert bench.cache.stats().live_bytes == 6 * layout.token_bytes
    fence.pass_()
    other.retire(elsewhere)
    other.close()
    bench.retire_all()
    bench.close()


# `check` is seen to fail


def lose_a_free_page(bench: Bench) -> None:
    bench.pool._free.pop()


def count_a_page_twice(bench: Bench) -> None:
    bench.pool._free.append(bench.pool._free[0])
    bench.pool.n_owned += 1


def own_more_than_the_budget(bench: Bench) -> None:
    bench.pool.max_pages = bench.pool.n_owned - 1


def lose_count_of_mappings(bench: Bench) -> None:
    bench.pool.n_mappings = -1


def forget_a_mapped_page(bench: Bench) -> None:
    ranges = bench.cache.region.table.mapped[SlotId(0)]
    ranges[0] = ranges[0]._replace(end=ranges[0].end - 1)


def lose_a_handle(bench: Bench) -> None:
    bench.cache.region.table.handles[SlotId(0)][0].pop()


def map_a_page_twice(bench: Bench) -> None:
    handles = bench.cache.region.table.handles[SlotId(0)][0]
    handles[1] = handles[0]


def map_one_page_into_two_slots(bench: Bench) -> None:
    table = bench.cache.region.table.handles
    table[SlotId(1)][0][0] = table[SlotId(0)][0][0]


def map_a_page_that_is_free(bench: Bench) -> None:
    bench.cache.region.table.handles[SlotId(0)][0][0] = bench.pool._free[0]


def grow_past_the_slot(bench: Bench) -> None:
    region = bench.cache.region
    end = bench.layout.planes[0].span_bytes // PAGE + 1
    n_more = end - region.table.mapped[SlotId(0)][0].end
    region.table.mapped[SlotId(0)][0] = region.table.mapped[SlotId(0)][0]._replace(end=end)
    region.table.handles[SlotId(0)][0] += [Handle(i) for i in range(n_more)]
    bench.pool.n_mapped += n_more
    bench.pool.n_owned += n_more


def free_a_slot_with_pages(bench: Bench) -> None:
    bench.cache._slots.cool(SlotId(1))


def lose_a_slot(bench: Bench) -> None:
    bench.cache._slots.state[2] = SlotState.ACTIVE


def promise_more_tokens_than_are_mapped(bench: Bench) -> None:
    bench.cache._slots.capacity[SlotId(0)] += 1


def write_more_tokens_than_are_mapped(bench: Bench) -> None:
    bench.cache._slots.n_tokens[SlotId(0)] = 1000


@pytest.mark.parametrize(
    "mistake",
    [
        lose_a_free_page,
        count_a_page_twice,
        own_more_than_the_budget,
        lose_count_of_mappings,
        forget_a_mapped_page,
        lose_a_handle,
        map_a_page_twice,
        map_one_page_into_two_slots,
        map_a_page_that_is_free,
        grow_past_the_slot,
        free_a_slot_with_pages,
        lose_a_slot,
        promise_more_tokens_than_are_mapped,
        write_more_tokens_than_are_mapped,
    ],
)
def test_check_finds_books_that_are_wrong(open_bench: OpenBench, mistake: Callable[[Bench], None]) -> None:
    bench = open_bench(keep_freed=True)
    slot_id, warm, freed = bench.grown(20), bench.grown(20), bench.grown(20)
    bench.cache.retire(freed)
    bench.cache.reclaim(1)
    bench.cache.retire(warm)
    assert (slot_id, warm) == (0, 1)
    bench.check()
    mistake(bench)
    with pytest.raises(InvariantError):
        bench.cache.check()
