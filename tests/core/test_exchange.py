"""Changes that are taken back: what several caches begin together, all of them or none of them keep."""

from __future__ import annotations

from typing import Any

import pytest

from vmem_kv.cache import Exchange, KVCache
from vmem_kv.errors import DriverError, UsageError, VmemError
from vmem_kv.growth import SlotId
from vmem_kv.layout import LayerSpec, Layout, TensorSpec
from vmem_kv.testing import driver_error, fail_kind, fail_once, interruption, no_faults

from .bench import PAGE, Bench, OpenBench, books

KINDS = ("per_head", "per_layer", "group:2", "token_major")
FILLS = (b"\x01", b"\x02", b"\x03")
N_TOKENS = 40


def three_sequences(bench: Bench) -> list[SlotId]:
    """Sequences of 40 tokens, each of one byte; the third has some pages of the first."""
    slots = list(bench.cache.acquire_adjacent(2))
    bench.cache.ensure(dict.fromkeys(slots, N_TOKENS))
    for slot_id, fill in zip(slots, FILLS, strict=False):
        bench.fill(slot_id, N_TOKENS, fill)
    return [*slots, bench.cache.fork(slots[0])]


def contents(bench: Bench, slots: list[SlotId]) -> list[bytes]:
    planes = range(len(bench.layout.planes))
    return [bench.row(s, i, t) for s in slots for i in planes for t in range(bench.cache.n_tokens(s))]


def tables(bench: Bench) -> dict[str, Any]:
    """The books but for the pages' names that are kept as free ones."""
    return {name: value for name, value in books(bench.cache).items() if name != "warm"}


def check(bench: Bench) -> None:
    """The cache's own check, and its books against the driver's."""
    bench.cache.check()
    stats = bench.cache.stats()
    assert stats.n_live_pages + stats.n_saved_pages == len(bench.mapped_addresses())
    assert bench.physical_bytes() == stats.owned_bytes


def begin_share(bench: Bench, slots: list[SlotId]) -> Exchange:
    a, b, c = slots
    return bench.cache.begin_share({a: b, b: c, c: b}, N_TOKENS)


def begin_truncate(bench: Bench, slots: list[SlotId]) -> Exchange:
    return bench.cache.begin_truncate(slots, 17)


BEGINNINGS = {"share": begin_share, "truncate": begin_truncate}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", BEGINNINGS)
def test_what_is_undone_is_as_it_was(open_bench: OpenBench, kind: str, what: str) -> None:
    bench = open_bench(kind)
    slots = three_sequences(bench)
    before, state = contents(bench, slots), tables(bench)
    exchange = BEGINNINGS[what](bench, slots)
    assert bench.cache.is_busy()
    assert bench.cache.region.table.handles != state["handles"]
    exchange.undo()
    assert not bench.cache.is_busy()
    assert tables(bench) == state
    assert contents(bench, slots) == before
    check(bench)
    bench.cache.ensure(dict.fromkeys(slots, 48))
    bench.retire_all()
    bench.close()


@pytest.mark.parametrize("what", BEGINNINGS)
def test_to_undo_needs_no_mappings_that_others_could_have_taken(open_bench: OpenBench, what: str) -> None:
    bench = open_bench("per_head")
    slots = three_sequences(bench)
    before, state = contents(bench, slots), tables(bench)
    exchange = BEGINNINGS[what](bench, slots)
    ledger = bench.driver.ledger
    n_left = bench.driver.info.max_mappings - ledger.n_mappings
    assert ledger.charge_mappings(n_left, bench.driver.info.max_mappings)
    exchange.undo()
    ledger.refund_mappings(n_left)
    assert tables(bench) == state
    assert contents(bench, slots) == before
    check(bench)
    bench.retire_all()
    bench.close()


@pytest.mark.parametrize("what", BEGINNINGS)
@pytest.mark.parametrize("make_error", [driver_error(), interruption], ids=["error", "interruption"])
def test_whatever_fails_in_beginning_or_undoing_nobody_writes_what_another_reads(
    open_bench: OpenBench, what: str, make_error: Any
) -> None:
    """A call that cannot even be undone leaves slots that refuse to grow, and books that add up."""
    n_whole = n_broken = 0
    for n in range(1, 300):
        bench = open_bench("group:2")
        slots = three_sequences(bench)
        before, state = contents(bench, slots), tables(bench)
        bench.faulty.begin_count()
        bench.faulty.plan = fail_once(n, make_error)
        try:
            BEGINNINGS[what](bench, slots).undo()
        except (VmemError, KeyboardInterrupt):
            pass
        else:
            assert not bench.faulty.faults or bench.faulty.faults[0].operation == "release"
        bench.faulty.plan = no_faults
        is_last = not bench.faulty.faults
        bench.cache.check()
        assert not bench.cache.is_busy()
        if bench.cache.region.broken:
            n_broken += 1
            with pytest.raises(UsageError, match="retire"):
                bench.cache.ensure(dict.fromkeys(slots, 48))
        else:
            n_whole += 1
            assert contents(bench, slots) == before
            assert {s: bench.cache.n_tokens(s) for s in slots} == state["lengths"]
        bench.retire_all()
        bench.close()
        if is_last:
            break
    assert is_last
    assert n_whole > 5
    assert n_broken > 0


@pytest.mark.parametrize("kind", KINDS)
def test_several_sequences_are_truncated_together(open_bench: OpenBench, kind: str) -> None:
    bench = open_bench(kind)
    slots = three_sequences(bench)
    exchange = bench.cache.begin_truncate(slots, 17)
    exchange.commit()
    assert [bench.cache.n_tokens(s) for s in slots] == [17] * 3
    for slot_id, fill in zip(slots, (FILLS[0], FILLS[1], FILLS[0]), strict=True):
        assert {byte for row in contents(bench, [slot_id]) for byte in row} == set(fill)
    check(bench)
    bench.cache.ensure(dict.fromkeys(slots, 48))
    bench.retire_all()
    bench.close()


@pytest.mark.parametrize("failing", [("map", "unmap"), ("map",)], ids=["both", "map"])
def test_a_broken_undo_is_told(open_bench: OpenBench, failing: tuple[str, ...]) -> None:
    bench = open_bench("token_major")
    slots = three_sequences(bench)
    exchange = begin_share(bench, slots)
    bench.faulty.plan = lambda point: driver_error()(point) if point.operation in failing else None
    with pytest.raises(DriverError) as caught:
        exchange.undo()
    if "unmap" not in failing:  # then nothing of the driver's is left to be told
        told = caught.value
        assert (told.operation, told.code, told.name, told.n_done) == ("map", 0, "STUCK", 0)
        assert "could not be put back" in str(told)
    bench.faulty.plan = no_faults
    assert bench.cache.region.broken
    bench.cache.check()
    bench.retire_all()
    bench.close()


@pytest.mark.parametrize("make_error", [driver_error(), interruption], ids=["error", "interruption"])
def test_no_slot_that_shares_stays_adoptable_because_another_could_not_be_unmapped(
    open_bench: OpenBench, make_error: Any
) -> None:
    bench = open_bench("token_major")
    slots = three_sequences(bench)
    before = contents(bench, slots[:1])
    forks = [bench.cache.fork(slots[0]), slots[2]]
    with bench.faulty.failing(fail_kind("unmap", 1, make_error)), pytest.raises((DriverError, KeyboardInterrupt)):
        bench.cache.retire(forks)
    bench.cache.check()
    for _ in range(2):
        other = bench.grown(48, b"\x11")
        assert contents(bench, slots[:1]) == before
        bench.cache.retire(other)
    bench.retire_all()
    bench.close()


class WatchingFence:
    """Takes down what the books say and how often the driver was called, whenever somebody waits for it."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.seen: list[Any] = []

    def look(self) -> tuple[Any, dict[str, int]]:
        state = books(self.bench.cache)
        return (state["handles"], state["lengths"]), dict(self.bench.faulty.calls)

    def passed(self) -> bool:
        return bool(self.seen)

    def wait(self) -> None:
        self.seen.append(self.look())


def test_nothing_is_exchanged_before_who_may_read_it_has_ended(open_bench: OpenBench) -> None:
    bench = open_bench("per_head")
    a, b, c = three_sequences(bench)
    cache = bench.cache

    def share(fence: WatchingFence) -> None:
        cache.share({a: b, b: c, c: b}, N_TOKENS, fence)

    def change_nothing(fence: WatchingFence) -> None:
        cache.share({a: c, c: a}, N_TOKENS, fence)  # the same pages
        cache.truncate(b, N_TOKENS, fence)  # nothing behind its end

    def truncate(fence: WatchingFence) -> None:
        cache.truncate(a, 17, fence)

    for call, n_waits in ((share, 1), (change_nothing, 0), (truncate, 1)):
        fence = WatchingFence(bench)
        before = fence.look()
        call(fence)
        assert fence.seen == [before] * n_waits
        assert (fence.look() != before) == bool(n_waits)
    check(bench)
    bench.retire_all()
    bench.close()


def test_a_fork_reclaims_as_many_pages_as_are_new(open_bench: OpenBench) -> None:
    bench = open_bench(n_slots=10)
    source = bench.grown(N_TOKENS)
    bench.cache.retire([bench.grown(1) for _ in range(8)])  # of four pages each
    bench.pool.resize(bench.pool.n_owned)
    fork = bench.cache.fork(source)  # the end of each of four planes is new, ten pages are not
    assert bench.cache.stats().n_saved_pages == 10
    assert bench.cache.stats().n_warm_pages == 7 * 4
    assert contents(bench, [fork]) == contents(bench, [source])
    bench.cache.check()
    bench.retire_all()
    bench.close()


def test_a_fork_leaves_the_shortest_warm_slot_to_who_can_adopt_it(open_bench: OpenBench) -> None:
    """A fork unmaps what it finds in its slot: even one token's page is of no use to it."""
    bench = open_bench(n_slots=1)
    layer = LayerSpec(TensorSpec(1, PAGE // 4, 2), TensorSpec(1, PAGE // 4, 2))
    cache = KVCache(bench.pool, Layout.build("token_major", (layer,), n_slots=3, max_tokens=4, page_bytes=PAGE))
    short, source = cache.acquire(), cache.acquire()
    cache.ensure({short: 1, source: 4})
    cache.retire(short)
    assert cache.slot_stats()[short].n_mapped_pages == 1
    assert cache.fork(source) not in (short, source)
    assert cache.stats().n_warm_pages == 1
    cache.retire(cache.active_slots())
    cache.close()
    bench.close()
