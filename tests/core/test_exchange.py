"""Changes that are taken back: what several caches begin together, all of them or none of them keep."""

from __future__ import annotations

from typing import Any

import pytest

from vmem_kv.cache import Exchange
from vmem_kv.errors import DriverError, UsageError, VmemError
from vmem_kv.growth import SlotId
from vmem_kv.testing import driver_error, fail_kind, fail_once, interruption, no_faults

from .bench import Bench, OpenBench, books

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
    assert bench.cache.region.handles() != state["handles"]
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


def test_a_broken_undo_is_told(open_bench: OpenBench) -> None:
    bench = open_bench("token_major")
    slots = three_sequences(bench)
    exchange = begin_share(bench, slots)
    bench.faulty.plan = lambda point: driver_error()(point) if point.operation in ("map", "unmap") else None
    with pytest.raises(DriverError):
        exchange.undo()
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
