"""Sharing where something else happens too: slots that are warm or slid, pages that are stuck, too few mappings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from vmem_kv.driver.base import PASSED, Handle
from vmem_kv.errors import DriverError, InvariantError, OutOfAddressSpace, OutOfMappings, UsageError
from vmem_kv.growth import SlotId
from vmem_kv.shares import Shares
from vmem_kv.sharing import Row, plan_fork, plan_share
from vmem_kv.testing import ManualFence, Point, driver_error, fail_any, fail_kind, interruption, no_faults
from vmem_kv.testing.faults import MakeError

from .bench import Bench, OpenBench, books, make_layout


def rows(bench: Bench, slot_id: SlotId, first: int, end: int) -> list[bytes]:
    """Some rows of a sequence, plane by plane."""
    return [bench.row(slot_id, i, t) for i in range(len(bench.layout.planes)) for t in range(first, end)]


def refused(point: Point) -> BaseException:
    return OutOfMappings(f"injected at point {point.n}")


@contextlib.contextmanager
def mappings_left(bench: Bench, n_left: int) -> Iterator[None]:
    """Somebody else has all mappings but so many."""
    ledger, limit = bench.driver.ledger, bench.driver.info.max_mappings
    n_taken = limit - ledger.n_mappings - n_left
    assert ledger.charge_mappings(n_taken, limit)
    yield
    ledger.refund_mappings(n_taken)


def test_a_fork_takes_a_warm_slot_where_no_other_is_free(open_bench: OpenBench) -> None:
    bench = open_bench("group:2", n_slots=2)
    source, other = bench.grown(40), bench.grown(48, b"\x11")
    bench.cache.retire(other)
    fork = bench.cache.fork(source)
    assert fork == other
    assert rows(bench, fork, 0, 40) == rows(bench, source, 0, 40)
    bench.cache.ensure({fork: 48})
    assert {byte for row in rows(bench, fork, 40, 48) for byte in row} == {0}  # nothing of who had the slot
    bench.cache.check()
    bench.retire_all()
    bench.close()


def test_a_fork_begins_where_its_source_does(open_bench: OpenBench) -> None:
    bench = open_bench("token_major")
    source = bench.grown(40)
    bench.cache.slide(source, 20)
    fork = bench.cache.fork(source, 33)
    assert bench.cache.first_token(fork) == 20
    assert rows(bench, fork, 20, 33) == rows(bench, source, 20, 33)
    with pytest.raises(UsageError, match="slide gave up"):
        bench.cache.ensure({fork: 19})
    state = books(bench.cache)
    for n_tokens in (19, 41):
        with pytest.raises(UsageError, match=r"which has \[20, 40\)"):
            bench.cache.fork(source, n_tokens)
    assert books(bench.cache) == state
    bench.cache.check()
    bench.retire_all()
    bench.close()


def test_sequences_of_another_length_are_not_exchanged(open_bench: OpenBench) -> None:
    bench = open_bench()
    target, source = bench.grown(40), bench.grown(40)
    state = books(bench.cache)
    with pytest.raises(UsageError, match="has 40 tokens, not 39; truncate it first"):
        bench.cache.share({target: source}, 39)
    assert books(bench.cache) == state
    bench.retire_all()
    bench.close()


def test_a_truncation_that_exchanges_nothing_is_undone_without_a_driver_call(open_bench: OpenBench) -> None:
    bench = open_bench()
    slots = [bench.grown(40), bench.grown(30)]
    state, calls = books(bench.cache), dict(bench.faulty.calls)
    exchange = bench.cache.begin_truncate(slots, 7)
    assert [bench.cache.n_tokens(s) for s in slots] == [7, 7]
    exchange.undo()
    assert books(bench.cache) == state
    assert dict(bench.faulty.calls) == calls
    bench.retire_all()
    bench.close()


def test_what_a_length_would_map_is_known_before(open_bench: OpenBench) -> None:
    bench = open_bench()
    slot_id, other = bench.grown(5), bench.grown(20)
    wanted = {slot_id: 48, other: 10}
    n_missing = bench.cache.n_missing_pages(wanted)
    assert n_missing == bench.layout.n_pages(48) - bench.layout.n_pages(5)
    n_owned = bench.pool.n_owned
    bench.cache.ensure(wanted)
    assert bench.pool.n_owned - n_owned == n_missing
    assert bench.cache.n_missing_pages(wanted) == 0
    with pytest.raises(OutOfAddressSpace):
        bench.cache.n_missing_pages({slot_id: 49})
    with pytest.raises(UsageError, match="cold"):
        bench.cache.n_missing_pages({SlotId(3): 1})
    bench.retire_all()
    bench.close()


def test_a_fork_without_mappings_gives_its_new_pages_back(open_bench: OpenBench) -> None:
    """At worst no page merges with its neighbour: mappings for that are demanded before anything is changed."""
    bench = open_bench("per_head")
    source = bench.grown(17)
    state, n_owned = books(bench.cache), bench.pool.n_owned
    n_worst = bench.layout.n_pages(17) * bench.driver.info.mappings_per_run
    for n_left in (0, n_worst - 1):
        with mappings_left(bench, n_left), pytest.raises(OutOfMappings):
            bench.cache.fork(source)
        assert books(bench.cache) == state
        assert bench.pool.n_owned == n_owned + bench.pool.n_free
    with mappings_left(bench, n_worst):
        bench.cache.fork(source)
    bench.cache.check()
    bench.retire_all()
    bench.close()


def test_pages_with_a_stuck_mapping_are_not_promised_to_anybody(open_bench: OpenBench) -> None:
    """They are lost with their last good mapping: what can be reclaimed is less than what is mapped."""
    bench = open_bench("token_major")
    source = bench.grown(40)
    fork = bench.cache.fork(source)
    with bench.faulty.failing(fail_kind("unmap", None, driver_error())), pytest.raises(DriverError):
        bench.cache.retire(fork)
    bench.cache.retire(source)
    n_pages = bench.layout.n_pages(40)
    n_full = 40 * bench.layout.token_bytes // bench.layout.page_bytes
    assert bench.cache.stats().n_warm_pages == n_pages
    with bench.pool.lock:
        assert bench.cache.n_warm_pages() == n_pages - n_full
    n_lost = bench.pool.n_quarantined
    assert bench.cache.reclaim(1000) == n_pages - n_full
    assert bench.pool.n_quarantined == n_lost + n_full
    bench.cache.check()
    bench.close()


def test_a_refused_unmap_of_a_fork_is_tried_again_while_its_source_lives(open_bench: OpenBench) -> None:
    bench = open_bench("group:2")
    source = bench.grown(40)
    fork = bench.cache.fork(source)
    before = rows(bench, source, 0, 40)
    with bench.faulty.failing(fail_kind("unmap", None, refused)), pytest.raises(OutOfMappings):
        bench.cache.retire(fork)
    n_full = sum(40 * plane.token_bytes // bench.layout.page_bytes for plane in bench.layout.planes)
    n_tail = bench.layout.n_pages(40) - n_full
    assert bench.pool.n_quarantined == n_tail  # of the others, the source has a mapping that works
    assert bench.cache.slot_stats()[fork].state == "broken"
    bench.cache.check()
    assert bench.cache.reclaim(0) == n_tail
    assert (bench.pool.n_quarantined, bench.cache.slot_stats()[fork].state) == (0, "cold")
    assert rows(bench, source, 0, 40) == before
    bench.check()
    bench.retire_all()
    bench.close()


@pytest.mark.parametrize("fence_error", [driver_error(6), interruption], ids=["error", "interruption"])
def test_pages_stay_where_they_are_for_good_if_nobody_can_say_that_a_copy_has_ended(
    open_bench: OpenBench, fence_error: MakeError
) -> None:
    bench = open_bench("per_layer")
    source = bench.grown(17)
    before = rows(bench, source, 0, 17)
    n_pages, n_mapped = bench.layout.n_pages(17), len(bench.mapped_addresses())
    n_new = n_pages - sum(17 * plane.token_bytes // bench.layout.page_bytes for plane in bench.layout.planes)
    fails = fail_any(fail_kind("copy", 2, driver_error(5)), fail_kind("fence", None, fence_error))
    with bench.faulty.failing(fails), pytest.raises((DriverError, KeyboardInterrupt)) as caught:
        bench.cache.fork(source)
    # The first failure is the one that is told, but for an interruption.
    assert isinstance(caught.value, KeyboardInterrupt) or caught.value.code == 5
    assert len(bench.mapped_addresses()) == n_mapped + n_pages
    assert bench.pool.n_quarantined == n_new
    assert bench.cache.reclaim(1000) == 0  # the copy may be writing: this is no refusal that passes
    assert bench.pool.n_quarantined == n_new
    assert [stats.state for stats in bench.cache.slot_stats()].count("broken") == 1
    bench.check()
    assert rows(bench, source, 0, 17) == before
    bench.retire_all()
    bench.cache.reclaim(1000)
    denied = fail_kind("unmap", 1, lambda point: UsageError("nothing is mapped there"))
    with bench.faulty.failing(denied), pytest.raises(UsageError, match="nothing is mapped there"):
        bench.cache.close()  # not believed: it is certain that these pages are mapped
    assert bench.pool.n_quarantined > 0
    bench.close()
    assert bench.pool.n_quarantined == 0  # closing tries once more, behind all fences


@pytest.mark.parametrize("kind", ["per_head", "token_major"])
def test_what_was_mapped_where_nothing_was_is_taken_back(open_bench: OpenBench, kind: str) -> None:
    """Of the region alone: the cache never takes a fork back."""
    bench = open_bench(kind)
    source, target = bench.grown(40), bench.cache.acquire()
    region, state = bench.cache.region, books(bench.cache)
    bench.cache.slide(source, 20)
    ranges = list(region.table.mapped[target])
    changes = plan_fork(bench.layout, region.table.rows(source), target, 40)
    assert any(change.first for change in changes)
    slid = books(bench.cache)
    rewired = region.rewirer.begin(changes, lambda: None, lambda: None)
    assert region.table.n_pages(target) == region.table.n_pages(source)
    assert region.table.mapped[target] != ranges
    region.rewirer.take_back(rewired)
    assert region.table.mapped[target] == ranges
    assert books(bench.cache) == slid
    assert {name for name in state if state[name] != slid[name]} >= {"first_tokens", "mapped"}
    bench.check()
    bench.retire_all()
    bench.close()


@pytest.mark.parametrize("behind", [interruption, driver_error()], ids=["interrupted again", "failed"])
def test_where_something_is_stuck_nothing_is_mapped_over_it(open_bench: OpenBench, behind: MakeError) -> None:
    """Interrupted while cutting off, and cutting off fails for good: what was cut off before is not mapped again."""
    bench = open_bench("per_head")
    source = bench.grown(40)
    fork = bench.cache.fork(source)
    before = rows(bench, source, 0, 40)
    fails = fail_any(
        fail_kind("unmap", 2, interruption),
        fail_kind("unmap", 3, behind),
        fail_kind("unmap", 4, behind),
    )
    with bench.faulty.failing(fails), pytest.raises(KeyboardInterrupt):
        bench.cache.truncate(fork, 1)
    n_behind = bench.faulty.faults[-1].n
    assert not [point for point in bench.faulty.points[n_behind:] if point.operation == "map"]
    assert bench.cache.region.broken == {fork}
    assert bench.cache.n_tokens(fork) == bench.cache.token_capacity(fork) < 40
    bench.cache.check()
    assert rows(bench, source, 0, 40) == before
    bench.retire_all()
    bench.cache.check()
    bench.close()


def test_interrupted_while_closing_later_slots_are_as_they_were(open_bench: OpenBench) -> None:
    bench = open_bench()
    slots = [bench.grown(20), bench.grown(40)]
    bench.cache.retire(slots)
    with bench.faulty.failing(fail_kind("unmap", 1, interruption)), pytest.raises(KeyboardInterrupt):
        bench.cache.close()
    assert [stats.state for stats in bench.cache.slot_stats()[:2]] == ["cold", "warm"]
    bench.check()
    assert bench.cache.acquire() == slots[1]
    assert bench.cache.token_capacity(slots[1]) >= 40
    bench.retire_all()
    bench.close()


def test_check_sees_a_warm_slot_that_shares(open_bench: OpenBench) -> None:
    bench = open_bench("token_major")
    source = bench.grown(40)
    fork = bench.cache.fork(source)
    fence = ManualFence()
    bench.cache.retire(fork, fence)
    bench.cache.check()
    slots = bench.cache._slots
    slots.settle(fork, bench.cache.region.table.token_capacity(fork))  # as if nobody had looked whether it shares
    with pytest.raises(InvariantError, match="is to be adopted, and shares pages"):
        bench.cache.check()
    bench.cache.reclaim(1000)
    bench.cache.check()
    assert bench.cache.slot_stats()[fork].state == "cold"
    bench.cache.retire(source, PASSED)
    bench.close()


def test_who_holds_a_page_is_counted_by_kind() -> None:
    shares, page, other = Shares(), Handle(7), Handle(8)
    assert not shares.is_shared(page)
    assert not shares.is_doomed(page)
    shares.alias([page])
    assert shares.is_shared(page)  # of the two mappings one is being made
    assert shares.enter([page, other]) == 1  # what nobody aliased is nobody else's
    assert not shares.is_doomed(page)
    assert shares.leave([page]) == 0
    assert shares.is_shared(page)
    assert shares.get_stuck([page, other]) == [other]
    assert (shares.is_doomed(page), shares.is_doomed(other)) == (True, False)
    assert shares.retry([page, other]) == [other]  # the table has the other one still
    assert shares.drop([page, other]) == ([other], [])
    assert not shares


def test_a_page_that_somebody_is_about_to_map_is_not_lost() -> None:
    shares, page = Shares(), Handle(7)
    shares.alias([page, page])
    assert shares.get_stuck([page]) == []  # one in a table, one on its way
    assert shares.retry([page]) == []
    assert shares.drop([page]) == ([], [])
    assert shares.enter([page]) == 0
    assert shares.n_tables(page) == 2
    assert shares.leave([page]) == 0
    assert shares.drop([page]) == ([], [])
    assert not shares


def test_what_is_shared_behind_windows_is_planned_by_the_pages_indices() -> None:
    layout = make_layout("token_major")
    end = 40 * layout.token_bytes // layout.page_bytes
    assert end == 11
    source = Row(2, [Handle(100 + i) for i in range(2, 13)])
    own = {i: Handle(200 + i) for i in range(3, 13)} | {3: Handle(103), 4: Handle(104)}
    target = Row(3, [own[i] for i in range(3, 13)])
    changes = plan_share(layout, [source], SlotId(1), [target], 40)
    assert changes == [(1, 0, 5, [*range(105, 111), 211, 212])]
    back = plan_share(layout, [target], SlotId(0), [source], 40)
    assert back == [(0, 0, 5, [*range(205, 211), 111, 112])]
    assert plan_share(layout, [source], SlotId(1), [source], 40) == []


def test_each_call_is_refused_in_another_process(open_bench: OpenBench) -> None:
    bench = open_bench()
    source = bench.grown(40)
    fork, cache = bench.cache.fork(source), bench.cache
    state = books(cache)
    pid, bench.pool._pid = bench.pool._pid, -1
    for call in (
        lambda: cache.acquire(),
        lambda: cache.ensure({source: 40}),
        lambda: cache.premap({source: 40}),
        lambda: cache.slide(source, 0),
        lambda: cache.retire(source, PASSED),
        lambda: cache.settle(),
        lambda: cache.reclaim(0),
        lambda: cache.active_slots(),
        lambda: cache.n_tokens(source),
        lambda: cache.first_token(source),
        lambda: cache.token_capacity(source),
        lambda: cache.slot_stats(),
        lambda: cache.stats(),
        lambda: cache.check(),
        lambda: cache.close(),
        lambda: cache.fork(source),
        lambda: cache.truncate(fork, 7),
        lambda: cache.share({fork: source}, 40),
        lambda: cache.vacate(fork, PASSED),
        lambda: cache.spans(fork, 0, 1),
        lambda: cache.shared_tokens(fork),
        lambda: cache.n_missing_pages({fork: 48}),
    ):
        with pytest.raises(UsageError, match="belongs to process -1"):
            call()
    bench.pool._pid = pid
    assert books(cache) == state
    bench.retire_all()
    bench.close()


def test_a_slot_that_is_being_scrubbed_is_nobody_elses(open_bench: OpenBench) -> None:
    bench = open_bench()
    slot_id = bench.grown(48, domain="a")
    bench.cache.retire(slot_id)
    others: list[SlotId] = []

    def acquires(point: Point) -> None:
        if point.operation == "scrub" and not others:
            assert bench.cache.is_busy()
            others.append(bench.cache.acquire(domain="b"))

    bench.faulty.plan = acquires  # type: ignore[assignment]
    assert bench.cache.acquire(domain="b") == slot_id
    assert others
    assert slot_id not in others
    bench.faulty.plan = no_faults
    bench.check()
    bench.retire_all()
    bench.close()


def test_a_slot_that_is_being_forked_into_is_nobody_elses(open_bench: OpenBench) -> None:
    bench = open_bench()
    source = bench.grown(17)
    others: list[SlotId] = []

    def acquires(point: Point) -> None:
        if point.operation == "copy" and not others:
            others.append(bench.cache.acquire(expected_tokens=0))

    bench.faulty.plan = acquires  # type: ignore[assignment]
    fork = bench.cache.fork(source)
    bench.faulty.plan = no_faults
    assert others
    assert fork not in others
    bench.cache.check()
    bench.retire_all()
    bench.close()


def test_a_slot_that_is_being_mended_is_nobody_elses(open_bench: OpenBench) -> None:
    bench = open_bench()
    slot_id = bench.grown(20)
    bench.cache.retire(slot_id)
    with bench.faulty.failing(fail_kind("unmap", None, refused)), pytest.raises(OutOfMappings):
        bench.cache.reclaim(1)
    busy: list[set[SlotId]] = []

    def looks(point: Point) -> None:
        busy.append(set(bench.cache._slots.busy))

    bench.faulty.plan = looks  # type: ignore[assignment]
    bench.cache.reclaim(0)
    bench.faulty.plan = no_faults
    assert busy
    assert all(slots == {slot_id} for slots in busy)
    bench.check()
    bench.close()


def test_where_free_pages_are_taken_too_few_mappings_are_known_before_any_driver_call(open_bench: OpenBench) -> None:
    bench = open_bench("token_major", keep_freed=True)
    bench.cache.retire(bench.grown(10))
    bench.cache.reclaim(1000)
    slot_id = bench.cache.acquire()
    assert 2 < bench.pool.n_free < bench.layout.n_pages(48)
    calls, info = dict(bench.faulty.calls), bench.driver.info
    n_worst = bench.pool.n_free + 1 if info.neighbours_merge else bench.layout.n_pages(48)
    for n_left in (1, n_worst - 1):  # one is enough, did the free pages cost none
        with mappings_left(bench, n_left * info.mappings_per_run), pytest.raises(OutOfMappings):
            bench.cache.ensure({slot_id: 48})
        assert dict(bench.faulty.calls) == calls
    with mappings_left(bench, n_worst * info.mappings_per_run):
        bench.cache.ensure({slot_id: 48})
    bench.check()
    bench.retire_all()
    bench.close()


class EndingFence:
    """While somebody waits for it, another thread ends the sequence."""

    def __init__(self, bench: Bench, slot_id: SlotId) -> None:
        self.bench = bench
        self.slot_id = slot_id
        self.n_waits = 0

    def passed(self) -> bool:
        return True

    def wait(self) -> None:
        self.n_waits += 1
        self.bench.cache.retire(self.slot_id, PASSED)


def test_a_sequence_that_ends_while_it_waits_is_not_vacated(open_bench: OpenBench) -> None:
    bench = open_bench()
    slot_id = bench.grown(20)
    fence = EndingFence(bench, slot_id)
    with pytest.raises(UsageError, match="is warm"):
        bench.cache.vacate(slot_id, fence)
    with pytest.raises(UsageError, match="is warm"):
        bench.cache.vacate(slot_id, fence)  # at once: who waits would end it twice
    assert fence.n_waits == 1
    for call in (
        lambda: bench.cache.shared_tokens(slot_id),
        lambda: bench.cache.spans(slot_id, 0, 0),
        lambda: bench.cache.truncate(slot_id, 0),
        lambda: bench.cache.fork(slot_id),
    ):
        with pytest.raises(UsageError, match="is warm"):
            call()
    assert bench.cache.stats().n_warm_pages == bench.layout.n_pages(20)
    bench.check()
    bench.close()


def test_a_broken_sequence_is_not_changed_any_more(open_bench: OpenBench) -> None:
    bench = open_bench()
    slot_id, other = bench.grown(40), bench.grown(40)
    with bench.faulty.failing(fail_kind("unmap", None, driver_error())), pytest.raises(DriverError):
        bench.cache.slide(slot_id, 30)
    state = books(bench.cache)
    for call in (
        lambda: bench.cache.truncate(slot_id, 35),
        lambda: bench.cache.fork(slot_id),
        lambda: bench.cache.share({slot_id: other}, 40),
        lambda: bench.cache.ensure({slot_id: 48}),
    ):
        with pytest.raises(UsageError, match="an unmap failed under slots"):
            call()
    assert books(bench.cache) == state
    bench.cache.check()
    bench.retire_all()
    bench.close()


@pytest.mark.parametrize("n_left", [17, 1])
def test_a_slot_that_lost_pages_is_whole_again_once_nobody_has_it(open_bench: OpenBench, n_left: int) -> None:
    bench = open_bench("token_major", n_slots=2)
    source = bench.grown(40)
    fork = bench.cache.fork(source)
    with bench.faulty.failing(fail_kind("map", None, driver_error())), pytest.raises(DriverError):
        bench.cache.truncate(fork, n_left)
    assert bench.cache.region.broken == {fork}
    assert bench.pool.n_quarantined == 0  # nothing is stuck: pages are missing
    assert (bench.cache.region.table.n_pages(fork) == 0) == (n_left == 1)
    bench.cache.retire(fork)
    assert bench.cache.region.broken == set()
    assert bench.cache.slot_stats()[fork].state == "cold"
    assert bench.grown(48) == fork
    bench.check()
    bench.retire_all()
    bench.close()


def test_a_window_that_stays_is_noted_once(open_bench: OpenBench) -> None:
    bench = open_bench("token_major")
    slot_id = bench.grown(40)
    fence = ManualFence()
    for _ in range(3):
        bench.cache.slide(slot_id, 20, fence)
    assert len(bench.cache._pending.slides) == 1
    fence.pass_()
    bench.cache.reclaim(0)
    assert not bench.cache._pending.slides
    bench.check()
    bench.retire_all()
    bench.close()
