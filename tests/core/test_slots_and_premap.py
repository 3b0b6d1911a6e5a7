"""Which slot is chosen, and the worker that maps ahead."""

from __future__ import annotations

import errno
import itertools
import random
import threading
import time

import pytest

from vmem_kv.claims import Claims
from vmem_kv.driver.base import PASSED
from vmem_kv.errors import DriverError, OutOfPages, OutOfSlots, UsageError
from vmem_kv.growth import SlotId
from vmem_kv.premap import Premapper
from vmem_kv.slots import SlotState, SlotTable
from vmem_kv.testing import Point, fail_kind

from ..held import Held
from .bench import OpenBench, books

# Best fit


def table_of(capacities: list[int | None]) -> SlotTable:
    """A table with warm slots of these capacities; None is cold, -1 is active."""
    table = SlotTable(len(capacities))
    for index, capacity in enumerate(capacities):
        slot_id = SlotId(index)
        if capacity is None:
            continue
        table.activate(slot_id, max(capacity, 0), "")
        if capacity >= 0:
            table.retire([slot_id], PASSED)
            table.settle(slot_id, capacity)
    return table


@pytest.mark.parametrize(
    ("capacities", "wanted_tokens", "chosen"),
    [
        ([None, None], 10, 0),
        ([None, 10, 20], 10, 1),  # the exact fit
        ([None, 8, 13], 10, 1),  # two to map beat three that lie idle
        ([None, 6, 13], 10, 2),  # three that lie idle beat four to map
        ([None, 8, 12], 10, 2),  # equals: more reuse
        ([None, 20], 10, 1),  # likewise: all of the memory would lie idle, or all be mapped
        ([None, 21], 10, 0),  # more than twice the size is left to somebody who needs it
        ([30, 21, 40], 10, 1),  # nothing else is left: the least idle
        ([5, 9, 7], 100, 1),  # none is long enough: the longest
        ([None, 1], 100, 1),  # a little is better than nothing
        ([20, None], 0, 1),  # nothing wanted: leave the warm one
        ([-1, 20, 20], 10, 1),  # equals: the front
        ([0, None], 10, 1),  # a slot whose front is gone is the last resort
        ([0, 100], 10, 1),
        ([-1, 0], 10, 1),
    ],
)
def test_the_best_fitting_slot_is_chosen(capacities: list[int | None], wanted_tokens: int, chosen: int) -> None:
    assert table_of(capacities).choose(1, wanted_tokens) == [chosen]


def test_two_slots_that_each_fit_beat_one_that_fits_exactly_beside_a_bad_one() -> None:
    assert table_of([10, 40, -1, 12, 9]).choose(2, 10) == [3, 4]


def test_the_best_run_of_neighbours_is_the_one_that_trying_all_finds() -> None:
    choose = random.Random(1)
    for _ in range(2000):
        capacities = [choose.choice([None, -1, 0, 3, 8, 20]) for _ in range(choose.randint(1, 7))]
        n_slots, wanted = choose.randint(1, 4), choose.choice([0, 5, 30])
        table = table_of(capacities)
        best = None
        for first in range(len(capacities) - n_slots + 1):
            run = capacities[first : first + n_slots]
            if -1 in run:
                continue
            off = sum(1 << 62 if c == 0 else abs((c or 0) - wanted) for c in run)
            reused = sum(min(c or 0, wanted) for c in run)
            best = min(best or (1 << 65, 0, 0), (off, -reused, first))
        if best is None:
            with pytest.raises(OutOfSlots):
                table.choose(n_slots, wanted)
        else:
            assert list(table.choose(n_slots, wanted)) == list(range(best[2], best[2] + n_slots))


def test_busy_and_broken_slots_are_passed_over() -> None:
    table = table_of([20, 20, None, None])
    table.busy.add(SlotId(0))
    table.cool(SlotId(1))
    table.break_([SlotId(1)])
    assert table.choose(1, 20) == [2]
    assert table.choose(2, 20) == [2, 3]
    assert table.state[1] is SlotState.BROKEN


def test_only_what_nobody_owns_can_break() -> None:
    table = table_of([-1, 20])
    table.break_([SlotId(0), SlotId(1)])
    assert table.state == [SlotState.ACTIVE, SlotState.WARM]


# Mapping ahead


def test_premapping_maps_and_keeps_the_length(open_bench: OpenBench) -> None:
    bench = open_bench()
    slot_id = bench.grown(5)
    n_pages = bench.cache.premap({slot_id: 30})
    assert n_pages == bench.layout.n_pages(30) - bench.layout.n_pages(5)
    assert bench.cache.n_tokens(slot_id) == 5
    assert bench.cache.premap({slot_id: 30}) == 0
    calls = dict(bench.driver.calls)
    bench.cache.ensure({slot_id: 30})
    assert bench.driver.calls == calls
    bench.check()
    bench.retire_all()
    bench.close()


def test_premapping_stops_at_the_end_of_the_slot_and_passes_over_slots_that_are_gone(open_bench: OpenBench) -> None:
    bench = open_bench()
    slot_id = bench.grown(5)
    bench.cache.premap({slot_id: 10_000, SlotId(3): 20, SlotId(77): 3})
    assert bench.cache.token_capacity(slot_id) == 48
    bench.check()
    bench.retire_all()
    bench.close()


def test_premapping_never_reclaims_what_somebody_left_warm(open_bench: OpenBench) -> None:
    bench = open_bench(max_pages=12)
    bench.cache.retire(bench.grown(1))
    slot_id = bench.cache.acquire(expected_tokens=0)
    bench.cache.ensure({slot_id: 1})
    before = books(bench.cache)
    with pytest.raises(OutOfPages):
        bench.cache.premap({slot_id: 48})
    assert books(bench.cache) == before
    bench.retire_all()
    bench.close()


def test_a_slot_retired_while_its_premapping_waited_is_passed_over(
    open_bench: OpenBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = open_bench()
    first, second = bench.grown(5), bench.grown(5)
    exclusive = Claims.exclusive

    def retired_meanwhile(claims: Claims, slots: dict[SlotId, int]) -> object:
        monkeypatch.undo()
        bench.cache.retire(first)
        return exclusive(claims, slots)

    monkeypatch.setattr(Claims, "exclusive", retired_meanwhile)
    n_pages = bench.cache.premap({first: 48, second: 48})
    assert n_pages == bench.layout.n_pages(48) - bench.layout.n_pages(5)
    bench.check()
    bench.retire_all()
    bench.close()


def test_the_worker_maps_ahead_of_what_it_is_told(open_bench: OpenBench) -> None:
    bench = open_bench()
    slot_id = bench.grown(5)
    before = Held.now()
    with Premapper(bench.cache, 20) as premapper:
        (worker,) = Held.now().beyond(before)
        assert isinstance(worker, threading.Thread)
        assert worker.daemon  # whoever forgets to stop it can end
        premapper.request({slot_id: 5})
        assert premapper.wait_idle()
        assert premapper.n_pages == bench.layout.n_pages(25) - bench.layout.n_pages(5)
        assert bench.cache.token_capacity(slot_id) >= 25
        premapper.request({slot_id: 48})
        assert premapper.wait_idle()
        bench.check()
        assert premapper.is_alive
    assert not premapper.is_alive
    assert not Held.now().beyond(before)
    assert bench.cache.token_capacity(slot_id) == 48
    bench.retire_all()
    bench.close()


def test_the_worker_counts_what_it_had_no_room_for_and_goes_on(open_bench: OpenBench) -> None:
    bench = open_bench(max_pages=6)
    slot_id = bench.grown(5)
    with Premapper(bench.cache, 48) as premapper:
        premapper.request({slot_id: 5})
        assert premapper.wait_idle()
        assert (premapper.n_skipped, premapper.is_alive) == (1, True)
        bench.pool.resize(64)
        premapper.request({slot_id: 5})
        assert premapper.wait_idle()
        assert bench.cache.token_capacity(slot_id) == 48
    bench.retire_all()
    bench.close()


@pytest.mark.parametrize("operation", ["bind_thread", "map", "create", "set_access"])
def test_a_worker_that_died_says_why_and_mapping_goes_on_without_it(
    open_bench: OpenBench, operation: str, caplog: pytest.LogCaptureFixture
) -> None:
    bench = open_bench()
    slot_id = bench.grown(5)

    def broken(point: object) -> DriverError | None:
        return DriverError(operation, 5, "EIO") if point.operation == operation else None  # type: ignore[attr-defined]

    premapper = Premapper(bench.cache, 20)
    with bench.faulty.failing(broken):
        premapper.start()
        premapper.request({slot_id: 5})
        assert premapper.wait_idle()
    assert isinstance(premapper.error, DriverError)
    assert not premapper.is_alive
    assert "synchronous from now on" in caplog.text
    premapper.request({slot_id: 5})  # harmless
    assert premapper.wait_idle(0.001)
    bench.check()
    bench.cache.ensure({slot_id: 48})
    bench.check()
    premapper.stop()
    bench.retire_all()
    bench.close()


@pytest.mark.parametrize("dies", [False, True], ids=["is done", "dies with a request open"])
def test_whoever_waits_for_the_worker_is_woken_when_it(open_bench: OpenBench, dies: bool) -> None:
    bench = open_bench()
    slot_id = bench.grown(5)
    inside, go_on = threading.Event(), threading.Event()

    def works(lengths: dict[SlotId, int]) -> int:
        if dies:
            premapper.request(lengths)  # one more comes in meanwhile
        inside.set()
        go_on.wait(60)
        if dies:
            raise DriverError("map", 5, "EIO")
        return 0

    bench.cache.premap = works  # type: ignore[method-assign, assignment]
    premapper = Premapper(bench.cache, 20)
    premapper.start()
    premapper.request({slot_id: 5})
    assert inside.wait(60)
    assert not premapper.wait_idle(0)
    waiting = threading.Thread(target=premapper.wait_idle, args=[1e6], daemon=True)  # unwoken, it never looks again
    waiting.start()
    while not premapper._wake._waiters:  # type: ignore[attr-defined]
        assert waiting.is_alive()
        time.sleep(0.001)
    go_on.set()
    waiting.join(60)
    assert not waiting.is_alive()
    assert isinstance(premapper.error, DriverError) is dies
    premapper.stop()
    bench.retire_all()
    bench.close()


def test_a_worker_starts_once_and_stops_as_often_as_you_like(open_bench: OpenBench) -> None:
    bench = open_bench()
    premapper = Premapper(bench.cache, 1)
    premapper.stop()
    premapper = Premapper(bench.cache, 1)
    premapper.start()
    with pytest.raises(UsageError, match="starts once"):
        premapper.start()
    premapper.stop()
    premapper.stop()
    with pytest.raises(UsageError, match="premap_tokens"):
        Premapper(bench.cache, 0)
    bench.close()


def test_nobody_waits_for_a_worker_that_was_asked_for_nothing_even_while_it_begins(open_bench: OpenBench) -> None:
    bench = open_bench()
    slot_id = bench.grown(5)
    go_on = threading.Event()

    def blocks(point: Point) -> None:
        if point.operation == "bind_thread":
            go_on.wait(60)

    premapper = Premapper(bench.cache, 20)
    with bench.faulty.failing(blocks):
        premapper.start()
        assert premapper.wait_idle(0)
        premapper.request({slot_id: 5})
        assert not premapper.wait_idle(0)
        go_on.set()
        assert premapper.wait_idle()
    premapper.stop()
    bench.retire_all()
    bench.close()


def test_a_worker_inside_a_driver_call_is_not_left_behind_silently(open_bench: OpenBench) -> None:
    bench = open_bench()
    slot_id = bench.grown(5)
    inside, go_on = threading.Event(), threading.Event()

    def blocks(point: object) -> None:
        inside.set()
        go_on.wait(60)

    premapper = Premapper(bench.cache, 20)
    premapper.start()
    bench.faulty.plan = lambda point: blocks(point) if point.operation == "set_access" else None
    premapper.request({slot_id: 5})
    assert inside.wait(60)
    with pytest.raises(UsageError, match="did not stop"):
        premapper.stop(0.001)
    with pytest.raises(UsageError):
        bench.cache.close()  # the slot is in use
    go_on.set()
    premapper.stop()
    bench.check()
    bench.retire_all()
    bench.close()


def test_growth_waits_for_the_worker_on_the_same_slot_and_only_there(
    open_bench: OpenBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = open_bench()
    slot_id, other = bench.grown(5), bench.grown(5)
    inside, go_on = threading.Event(), threading.Event()
    main = threading.get_ident()

    def blocks(point: object) -> None:
        if point.operation == "map" and threading.get_ident() != main:  # type: ignore[attr-defined]
            inside.set()
            go_on.wait(60)

    with Premapper(bench.cache, 20) as premapper:
        bench.faulty.plan = blocks  # type: ignore[assignment]
        premapper.request({slot_id: 5})
        assert inside.wait(60)
        bench.cache.ensure({other: 40})  # passes
        monkeypatch.setattr("vmem_kv.claims.STALL_TIMEOUT_S", 0.001)
        with pytest.raises(DriverError, match="stayed busy") as caught:
            bench.cache.ensure({slot_id: 40})
        assert (caught.value.operation, caught.value.code) == ("wait", errno.ETIMEDOUT)
        monkeypatch.undo()
        go_on.set()
        bench.cache.ensure({slot_id: 40})
    bench.check()
    bench.retire_all()
    bench.close()


def test_failing_once_in_the_worker_leaves_nothing_behind(open_bench: OpenBench) -> None:
    for operation, n in itertools.product(("create", "map", "set_access"), (1, 2, 3)):
        bench = open_bench()
        slot_id = bench.grown(5)
        before = books(bench.cache)
        with bench.faulty.failing(fail_kind(operation, n)), Premapper(bench.cache, 40) as premapper:
            premapper.request({slot_id: 5})
            assert premapper.wait_idle()
        assert books(bench.cache) == before
        bench.check()
        bench.retire_all()
        bench.close()


def test_whoever_waits_for_a_slot_is_woken_when_it_is_free(
    open_bench: OpenBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmem_kv.claims.STALL_TIMEOUT_S", 1e6)  # who is not woken never looks again
    bench = open_bench()
    slot_id = bench.grown(5)
    inside, go_on = threading.Event(), threading.Event()

    def blocks(point: object) -> None:
        if point.operation == "map" and not inside.is_set():  # type: ignore[attr-defined]
            inside.set()
            go_on.wait(60)

    bench.faulty.plan = blocks  # type: ignore[assignment]
    first, second = (
        threading.Thread(target=bench.cache.ensure, args=[{slot_id: n_tokens}], daemon=True) for n_tokens in (40, 48)
    )
    first.start()
    assert inside.wait(60)
    second.start()
    while not bench.pool.lock._waiters:  # type: ignore[attr-defined]
        time.sleep(0.001)
    go_on.set()
    for thread in (first, second):
        thread.join(60)
        assert not thread.is_alive()
    assert bench.cache.n_tokens(slot_id) == 48
    bench.check()
    bench.retire_all()
    bench.close()
