"""The life of a sequence: acquire, ensure, slide, retire, reclaim, close, and what each of them may not do."""

from __future__ import annotations

import pytest

from vmem_kv.cache import KVCache
from vmem_kv.driver.base import PASSED
from vmem_kv.errors import (
    ConfigError,
    DriverError,
    OutOfAddressSpace,
    OutOfMappings,
    OutOfPages,
    OutOfSlots,
    UsageError,
)
from vmem_kv.growth import SlotId
from vmem_kv.layout import LAYOUT_KINDS
from vmem_kv.testing import ManualFence, driver_error, fail_from, fail_kind

from .bench import PAGE, Bench, OpenBench, books, make_layout
from .subprocesses import output_of


def test_acquire_maps_nothing_and_ensure_maps_what_the_tokens_need(open_bench: OpenBench) -> None:
    bench = open_bench()
    slot_id = bench.cache.acquire()
    assert bench.physical_bytes() == 0
    bench.cache.ensure({slot_id: 1})
    bench.check()
    assert bench.physical_bytes() == 4 * PAGE  # one page in each of the four planes
    bench.cache.ensure({slot_id: 40})
    bench.check()
    assert bench.physical_bytes() == bench.layout.n_pages(40) * PAGE
    bench.fill(slot_id, 40)
    bench.cache.retire(slot_id)
    bench.close()


@pytest.mark.parametrize("kind", LAYOUT_KINDS)
def test_every_layout_keeps_every_token_while_sequences_grow(kind: str, open_bench: OpenBench) -> None:
    bench = open_bench(kind, max_pages=200)
    slots = [bench.cache.acquire() for _ in range(4)]
    for n_tokens in (1, 7, 20, 48):
        bench.cache.ensure(dict.fromkeys(slots, n_tokens))
        for slot_id in slots:
            for plane_index in range(len(bench.layout.planes)):
                for token in range(n_tokens):
                    row = bench.row(slot_id, plane_index, token)
                    if any(row):
                        assert set(row) == {slot_id * 48 + token + 1}
                    bench.write_row(slot_id, plane_index, token, bytes([slot_id * 48 + token + 1]))
        bench.check()
    bench.retire_all()
    bench.close()


def test_a_sequence_that_shrinks_keeps_its_pages_and_grows_again_without_the_driver(open_bench: OpenBench) -> None:
    bench = open_bench()
    slot_id = bench.grown(40)
    calls = dict(bench.driver.calls)
    bench.cache.ensure({slot_id: 3})
    assert bench.cache.n_tokens(slot_id) == 3
    bench.cache.ensure({slot_id: 40})
    assert bench.driver.calls == calls
    bench.retire_all()
    bench.close()


def test_a_warm_slot_is_adopted_as_it_is_without_the_driver(open_bench: OpenBench) -> None:
    bench = open_bench()
    bench.cache.retire(bench.grown(40))
    calls = dict(bench.driver.calls)
    slot_id = bench.cache.acquire(expected_tokens=40)
    bench.cache.ensure({slot_id: 40})
    assert bench.driver.calls == calls
    bench.retire_all()
    bench.close()


def test_a_slot_with_just_the_pages_that_are_needed_fits_better_than_one_with_fewer(open_bench: OpenBench) -> None:
    bench = open_bench("token_major")
    fewer = bench.layout.capacity_of(1)
    needed = bench.layout.capacity_of(fewer + 1)
    bench.cache.retire([bench.grown(needed), bench.grown(fewer)])
    calls = dict(bench.driver.calls)
    slot_id = bench.cache.acquire(expected_tokens=fewer + 1)  # in tokens the smaller one is nearer
    bench.cache.ensure({slot_id: fewer + 1})
    assert bench.driver.calls == calls
    bench.retire_all()
    bench.close()


def test_a_slot_of_more_than_twice_the_pages_is_left_warm_unless_nothing_is_said(open_bench: OpenBench) -> None:
    bench = open_bench("token_major")
    assert 2 * bench.layout.capacity_of(1) < 48
    large = bench.grown(48)
    bench.cache.retire(large)
    assert bench.cache.acquire(expected_tokens=1) != large
    assert bench.cache.acquire() == large
    bench.retire_all()
    bench.close()


def test_running_out_of_pages_reclaims_the_longest_retired_first_and_then_raises(open_bench: OpenBench) -> None:
    bench = open_bench(max_pages=12)
    first, second, third = (bench.grown(1) for _ in range(3))
    bench.cache.retire(second)
    bench.cache.retire(first)
    fourth = bench.cache.acquire(expected_tokens=0)
    assert fourth == 3  # nothing is expected, so a cold slot fits better than a warm one
    bench.cache.ensure({fourth: 1})
    states = [state.value for state in bench.cache._slots.state]
    assert states == ["warm", "cold", "active", "active"]
    bench.cache.ensure({fourth: 20})  # takes the other warm slot as well
    before = books(bench.cache)
    with pytest.raises(OutOfPages, match="retire sequences"):
        bench.cache.ensure({fourth: 48})
    assert books(bench.cache) == before
    bench.check()
    bench.cache.retire([third, fourth])
    bench.close()


def test_a_length_beyond_the_slot_is_refused_and_changes_nothing(open_bench: OpenBench) -> None:
    bench = open_bench()
    slot_id = bench.grown(5)
    before = books(bench.cache)
    with pytest.raises(OutOfAddressSpace, match="max_tokens"):
        bench.cache.ensure({slot_id: 49})
    assert books(bench.cache) == before
    bench.retire_all()
    bench.close()


def test_misuse_is_a_usage_error_and_changes_nothing(open_bench: OpenBench) -> None:
    bench = open_bench()
    slot_id = bench.grown(5)
    before = books(bench.cache)
    cold = SlotId(3)
    for call in (
        lambda: bench.cache.ensure({cold: 1}),
        lambda: bench.cache.ensure({SlotId(99): 1}),
        lambda: bench.cache.ensure({SlotId(-1): 1}),
        lambda: bench.cache.ensure({slot_id: -1}),
        lambda: bench.cache.ensure({slot_id: 9, cold: 1}),
        lambda: bench.cache.retire(cold),
        lambda: bench.cache.retire([slot_id, cold]),
        lambda: bench.cache.retire([slot_id, slot_id]),
        lambda: bench.cache.slide(slot_id, 6),
        lambda: bench.cache.slide(slot_id, -1),
        lambda: bench.cache.slide(cold, 0),
        lambda: bench.cache.n_tokens(cold),
        lambda: bench.cache.token_capacity(cold),
        lambda: bench.cache.acquire_adjacent(0),
        bench.cache.close,
    ):
        with pytest.raises(UsageError):
            call()
        assert books(bench.cache) == before
    bench.retire_all()
    with pytest.raises(UsageError, match="retire it once"):
        bench.cache.retire(slot_id)
    bench.close()


def test_every_slot_in_use_is_out_of_slots(open_bench: OpenBench) -> None:
    bench = open_bench()
    for _ in range(4):
        bench.cache.acquire()
    before = books(bench.cache)
    with pytest.raises(OutOfSlots):
        bench.cache.acquire()
    assert books(bench.cache) == before
    bench.retire_all()
    bench.close()


def test_neighbouring_slots_come_in_a_row_or_not_at_all(open_bench: OpenBench) -> None:
    bench = open_bench()
    slots = [bench.cache.acquire() for _ in range(4)]
    bench.cache.retire([slots[0], slots[2], slots[3]])
    assert list(bench.cache.acquire_adjacent(2)) == [2, 3]
    with pytest.raises(OutOfSlots, match="2 neighbouring"):
        bench.cache.acquire_adjacent(2)
    with pytest.raises(OutOfSlots):
        bench.cache.acquire_adjacent(5)
    bench.retire_all()
    bench.close()


def test_a_closed_cache_refuses_and_closes_again(open_bench: OpenBench) -> None:
    bench = open_bench()
    bench.close()
    bench.cache.close()
    with pytest.raises(UsageError, match="closed"):
        bench.cache.acquire()


def test_a_cache_whose_pages_differ_from_the_pools_is_refused(open_bench: OpenBench) -> None:
    bench = open_bench()
    with pytest.raises(UsageError, match="page"):
        KVCache(bench.pool, make_layout(page_bytes=2 * PAGE))
    bench.close()


def test_a_region_larger_than_the_address_space_is_refused_before_the_driver_is_asked(open_bench: OpenBench) -> None:
    bench = open_bench()
    calls = dict(bench.driver.calls)
    with pytest.raises(OutOfAddressSpace, match="lower max_tokens or n_slots"):
        KVCache(bench.pool, make_layout(n_slots=1 << 20, max_tokens=1 << 30))
    assert bench.driver.calls == calls
    bench.close()


# Fences


def test_a_retired_slot_is_not_touched_before_its_fence_has_passed(open_bench: OpenBench) -> None:
    bench = open_bench(max_pages=8)
    fence = ManualFence()
    slot_id = bench.grown(20)
    bench.cache.retire(slot_id, fence)
    mapped = bench.mapped_addresses()
    other = bench.cache.acquire()
    assert other != slot_id
    with pytest.raises(OutOfPages):
        bench.cache.ensure({other: 20})
    assert bench.cache.reclaim(100) == 0
    assert bench.mapped_addresses() == mapped
    assert bench.cache.stats().n_pending_pages == len(mapped)
    bench.check()
    with pytest.raises(UsageError, match="fence"):
        bench.cache.close()
    fence.pass_()
    bench.cache.ensure({other: 20})
    bench.check()
    bench.retire_all()
    bench.close()


def test_what_slid_out_of_a_window_is_unmapped_once_its_fence_has_passed(open_bench: OpenBench) -> None:
    bench = open_bench()
    fence = ManualFence()
    slot_id = bench.grown(48)
    mapped = bench.mapped_addresses()
    bench.cache.slide(slot_id, 30, fence)
    assert bench.mapped_addresses() == mapped
    fence.pass_()
    bench.cache.reclaim(0)
    gone = mapped - bench.mapped_addresses()
    expected = {
        bench.address(slot_id, i, 0) + page * PAGE
        for i, plane in enumerate(bench.layout.planes)
        for page in range(30 * plane.token_bytes // PAGE)
    }
    assert gone == expected
    assert all(set(bench.row(slot_id, i, 30)) == {0xA5} for i in range(4))
    with pytest.raises(UsageError, match="slide gave up"):
        bench.cache.ensure({slot_id: 29})
    bench.check()
    bench.retire_all()
    bench.close()


def test_a_slide_fence_outlives_the_retirement_of_its_slot(open_bench: OpenBench) -> None:
    bench = open_bench()
    fence = ManualFence()
    slot_id = bench.grown(48)
    bench.cache.slide(slot_id, 30, fence)
    bench.cache.retire(slot_id)  # this fence has passed, the slide's has not
    mapped = bench.mapped_addresses()
    assert bench.cache.reclaim(100) == 0
    assert bench.mapped_addresses() == mapped
    fence.pass_()
    assert bench.cache.reclaim(1000) == len(mapped)
    bench.check()
    bench.close()


def test_a_slot_that_slid_is_unmapped_before_its_next_sequence(open_bench: OpenBench) -> None:
    bench = open_bench(n_slots=1)
    slot_id = bench.grown(48, domain="same")
    bench.cache.slide(slot_id, 40)
    bench.cache.retire(slot_id)
    again = bench.grown(48, domain="same")
    assert again == slot_id
    bench.check()
    bench.retire_all()
    bench.close()


@pytest.mark.parametrize("kind", ["token_major", "per_layer"])
def test_a_window_may_slide_over_everything_that_is_mapped(open_bench: OpenBench, kind: str) -> None:
    bench = open_bench(kind, max_tokens=4096, max_pages=400, n_slots=1)
    # 1,024 tokens end exactly at a page in every plane, whose rows have 336, 96, 320, 448 bytes, or their sum.
    slot_id = bench.cache.acquire()
    bench.cache.ensure({slot_id: 1024})
    assert bench.cache.token_capacity(slot_id) == 1024
    bench.cache.slide(slot_id, 1024)
    assert bench.mapped_addresses() == set()
    bench.check()
    bench.cache.ensure({slot_id: 1030})
    bench.check()
    assert len(bench.mapped_addresses()) == len(bench.layout.planes) * 1 + (kind == "token_major")
    for plane_index in range(len(bench.layout.planes)):
        bench.write_row(slot_id, plane_index, 1029, b"z")
    bench.cache.slide(slot_id, 1030)
    bench.cache.retire(slot_id)
    bench.check()
    again = bench.grown(10)  # the next sequence starts at the front
    assert again == slot_id
    bench.check()
    bench.retire_all()
    bench.close()


def test_a_slot_whose_window_slid_over_everything_starts_at_the_front_again(open_bench: OpenBench) -> None:
    bench = open_bench("token_major", max_tokens=4096, max_pages=400, n_slots=1)
    slot_id = bench.cache.acquire()
    bench.cache.ensure({slot_id: 1024})
    bench.cache.slide(slot_id, 1024)
    bench.cache.retire(slot_id)
    assert bench.cache._slots.state[slot_id].value == "cold"
    assert bench.grown(3) == slot_id
    bench.check()
    bench.retire_all()
    bench.close()


def test_growth_gets_the_pages_that_a_window_gave_up_behind_a_passed_fence(open_bench: OpenBench) -> None:
    bench = open_bench(max_pages=18)
    fence = ManualFence()
    slot_id = bench.grown(48)
    assert bench.pool.n_available == 2
    bench.cache.slide(slot_id, 40, fence)
    other = bench.cache.acquire()
    with pytest.raises(OutOfPages):
        bench.cache.ensure({other: 8})
    fence.pass_()
    bench.cache.ensure({other: 8})
    bench.check()
    bench.retire_all()
    bench.close()


def test_a_fence_that_passes_during_growth_does_not_make_the_slot_wait_for_itself(
    open_bench: OpenBench,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vmem_kv.claims.STALL_TIMEOUT_S", 0.5)
    bench = open_bench(max_pages=10)

    class PassesWhenAskedTwice(ManualFence):
        def passed(self) -> bool:
            self.n_asked += 1
            return self.n_asked > 2

    slot_id = bench.grown(20)
    bench.cache.slide(slot_id, 20, PassesWhenAskedTwice())  # asked once
    before = bench.cache.n_tokens(slot_id)
    try:
        bench.cache.ensure({slot_id: 48})  # asked before growing, and again by the reclaim inside
    except OutOfPages:
        assert bench.cache.n_tokens(slot_id) == before
    bench.check()
    bench.cache.ensure({slot_id: 30})
    bench.check()
    bench.retire_all()
    bench.close()


def test_pages_that_a_slide_frees_count_as_reclaimed(open_bench: OpenBench) -> None:
    bench = open_bench(max_pages=18)
    fence = ManualFence()
    slot_id = bench.grown(48)
    bench.cache.slide(slot_id, 40, fence)
    other = KVCache(bench.pool, make_layout())
    fence.pass_()
    elsewhere = other.acquire()
    other.ensure({elsewhere: 8})
    other.check()
    other.retire(elsewhere)
    other.close()
    bench.retire_all()
    bench.close()


# Failures


def test_close_unmaps_the_rest_when_one_unmap_fails_and_tries_again_when_called_again(open_bench: OpenBench) -> None:
    bench = open_bench()
    slots = [bench.grown(20) for _ in range(3)]
    bench.cache.retire(slots)
    with bench.faulty.failing(fail_kind("unmap", 2)), pytest.raises(DriverError):
        bench.cache.close()
    bench.check()
    assert bench.pool.n_quarantined == 1
    assert len(bench.mapped_addresses()) == 1
    bench.close()
    assert bench.pool.n_quarantined == 0


def test_a_slot_that_broke_is_not_handed_out_again(open_bench: OpenBench) -> None:
    bench = open_bench(n_slots=2)
    bench.cache.retire(bench.grown(5))
    with bench.faulty.failing(fail_kind("unmap", 1)), pytest.raises(DriverError):
        bench.cache.reclaim(100)
    bench.check()
    assert bench.cache.acquire() == 1
    with pytest.raises(OutOfSlots):
        bench.cache.acquire()
    bench.retire_all()
    bench.close()


def test_after_a_failed_close_broken_slots_are_not_handed_out(open_bench: OpenBench) -> None:
    bench = open_bench(n_slots=2)
    bench.cache.retire([bench.grown(5), bench.grown(5)])
    with bench.faulty.failing(fail_kind("unmap", 1)), pytest.raises(DriverError):
        bench.cache.close()
    slot_id = bench.grown(5)
    assert slot_id == 1
    bench.retire_all()
    bench.close()


def test_a_slot_whose_undo_failed_says_so_and_can_be_retired(open_bench: OpenBench) -> None:
    bench = open_bench()
    slot_id = bench.grown(5)
    plan = fail_kind("set_access", None, driver_error())
    with (
        bench.faulty.failing(lambda point: plan(point) or fail_kind("unmap", 1)(point)),
        pytest.raises(DriverError, match="set_access"),
    ):
        bench.cache.ensure({slot_id: 48})
    bench.check()
    assert bench.cache.n_tokens(slot_id) == 5
    assert set(bench.row(slot_id, 0, 4)) == {0xA5}
    with pytest.raises(UsageError, match="retire them"):
        bench.cache.ensure({slot_id: 48})
    bench.check()
    bench.cache.retire(slot_id)
    bench.check()
    assert bench.grown(5) != slot_id
    bench.retire_all()
    bench.close()


def test_a_dead_driver_leaves_consistent_books(open_bench: OpenBench) -> None:
    bench = open_bench(keep_freed=True)
    first, second = bench.grown(30), bench.grown(10)
    with bench.faulty.failing(fail_from(1, driver_error())):
        for call in (
            lambda: bench.cache.ensure({second: 48}),
            lambda: bench.cache.slide(first, 25),
            lambda: bench.cache.reclaim(100),
            lambda: bench.pool.trim(),
        ):
            try:
                call()
            except DriverError:
                bench.cache.check()
        with pytest.raises(DriverError):
            bench.cache.retire([first, second])  # no fence can be recorded
        assert bench.cache.active_slots() == [first, second]
        bench.cache.retire([first, second], PASSED)
        assert bench.cache.active_slots() == []
        with pytest.raises(DriverError):
            bench.cache.close()
        bench.cache.check()
    bench.close()


# Mappings


def test_the_mapping_budget_is_checked_before_the_driver_is_asked(open_bench: OpenBench) -> None:
    bench = open_bench("per_head")
    first = bench.grown(48)
    object.__setattr__(bench.driver.info, "max_mappings", bench.pool.n_mappings)
    second = bench.cache.acquire(expected_tokens=0)
    n_maps = bench.driver.calls["map"]
    before = books(bench.cache)
    with pytest.raises(OutOfMappings, match=r"use larger pages, a layout with fewer planes, or raise"):
        bench.cache.ensure({second: 1})
    assert bench.driver.calls["map"] == n_maps
    assert books(bench.cache) == before
    bench.cache.ensure({first: 48})
    bench.cache.retire(first)
    bench.cache.ensure({second: 1})  # the warm slot's mappings are worth as much as its pages
    bench.check()
    bench.retire_all()
    bench.close()


def test_growing_a_row_of_neighbours_costs_no_further_mapping_where_they_merge() -> None:
    bench = Bench()
    slot_id = bench.grown(1)
    assert bench.pool.n_mappings == 2 * 4
    for n_tokens in range(2, 49):
        bench.cache.ensure({slot_id: n_tokens})
    assert bench.pool.n_mappings == 2 * 4
    bench.cache.slide(slot_id, 40)
    assert bench.pool.n_mappings == 2 * 4
    bench.retire_all()
    bench.cache.reclaim(1000)
    assert bench.pool.n_mappings == 0
    bench.close()


def test_every_page_costs_a_mapping_where_neighbours_do_not_merge() -> None:
    bench = Bench(backend="cuda")
    slot_id = bench.grown(48)
    assert bench.pool.n_mappings == bench.layout.n_pages(48) > 4
    bench.cache.slide(slot_id, 40)
    assert bench.pool.n_mappings == bench.cache.stats().n_live_pages
    bench.retire_all()
    bench.cache.reclaim(1000)
    assert bench.pool.n_mappings == 0
    bench.close()


# Forks


def test_every_call_of_a_cache_is_refused_in_a_forked_child_even_while_its_lock_is_held(
    backend: str,
) -> None:
    output = output_of(
        f"""
        import os, signal
        from tests.core.bench import *
        from vmem_kv.errors import UsageError
        bench = Bench(backend={backend!r})
        slot_id = bench.grown(5)
        cache = bench.cache
        calls = [
            lambda: cache.acquire(),
            lambda: cache.ensure({{slot_id: 5}}),
            lambda: cache.ensure({{slot_id: 48}}),
            lambda: cache.premap({{slot_id: 48}}),
            lambda: cache.slide(slot_id, 1),
            lambda: cache.retire(slot_id),
            lambda: cache.reclaim(1),
            lambda: cache.n_tokens(slot_id),
            lambda: cache.token_capacity(slot_id),
            lambda: cache.active_slots(),
            lambda: cache.stats(),
            lambda: cache.check(),
            lambda: cache.close(),
            lambda: bench.pool.trim(),
            lambda: bench.pool.resize(10),
        ]
        with bench.pool.lock:  # as if another thread was in the middle of something when we forked
            pid = os.fork()
            if pid == 0:
                signal.alarm(20)
                n_refused = 0
                for call in calls:
                    try:
                        call()
                    except UsageError as error:
                        n_refused += "child" in str(error)
                os._exit(n_refused)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), len(calls))
        bench.check()
        cache.retire(slot_id)
        bench.close()
        """
    )
    n_refused, n_calls = output.split()
    assert n_refused == n_calls


def test_a_budget_below_one_page_is_a_config_error(open_bench: OpenBench) -> None:
    bench = open_bench()
    with pytest.raises(ConfigError):
        bench.pool.resize(0)
    bench.close()
