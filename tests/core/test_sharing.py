"""Pages under several slots: forked, truncated, exchanged, given back; and what must be refused."""

from __future__ import annotations

import pytest

from vmem_kv.driver.base import PASSED
from vmem_kv.errors import DriverError, InvariantError, OutOfPages, OutOfSlots, UsageError
from vmem_kv.growth import SlotId
from vmem_kv.shares import Shares
from vmem_kv.testing import ManualFence, driver_error, fail_from, fail_once, no_faults

from .bench import Bench, OpenBench, books

KINDS = ("per_head", "per_layer", "group:2", "token_major")


def rows(bench: Bench, slot_id: SlotId, n_tokens: int) -> list[bytes]:
    """The rows of a sequence's first tokens, plane by plane."""
    return [bench.row(slot_id, i, t) for i in range(len(bench.layout.planes)) for t in range(n_tokens)]


def n_full_pages(bench: Bench, n_tokens: int) -> int:
    """Pages that the first tokens of a slot fill from end to end."""
    return sum(n_tokens * plane.token_bytes // bench.layout.page_bytes for plane in bench.layout.planes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_tokens", [0, 1, 17, 40, 48])
def test_a_fork_has_the_same_bytes_and_only_its_tail_is_new(open_bench: OpenBench, kind: str, n_tokens: int) -> None:
    bench = open_bench(kind)
    source = bench.grown(48)
    before, n_owned = rows(bench, source, 48), bench.pool.n_owned
    fork = bench.cache.fork(source, n_tokens)
    assert rows(bench, fork, n_tokens) == [
        row for i in range(len(bench.layout.planes)) for row in before[i * 48 : i * 48 + n_tokens]
    ]
    n_full = n_full_pages(bench, n_tokens)
    assert bench.pool.n_owned - n_owned == bench.layout.n_pages(n_tokens) - n_full
    stats = bench.cache.stats()
    assert stats.n_saved_pages == n_full
    assert stats.n_live_pages == bench.pool.n_mapped
    assert bench.cache.n_tokens(fork) == n_tokens
    bench.cache.check()
    # Both go on, and neither sees the other.
    bench.cache.ensure({fork: 48})
    for i in range(len(bench.layout.planes)):
        for token in range(n_tokens, 48):
            bench.write_row(fork, i, token, b"\x3c")
    assert rows(bench, source, 48) == before
    bench.retire_all()
    bench.cache.check()
    bench.close()


@pytest.mark.parametrize("first", ["source", "fork"])
def test_pages_live_as_long_as_anybody_who_has_them(open_bench: OpenBench, first: str) -> None:
    bench = open_bench("group:2", n_slots=5)
    source = bench.grown(40)
    forks = [bench.cache.fork(source) for _ in range(3)]
    before = rows(bench, source, 40)
    order = [source, *forks] if first == "source" else [*forks, source]
    for slot_id in order[:-1]:
        bench.cache.retire(slot_id)
        bench.cache.check()
        assert rows(bench, order[-1], 40) == before
    assert bench.cache.stats().n_saved_pages == 0
    bench.cache.retire(order[-1])
    assert bench.cache.stats().n_warm_pages == bench.layout.n_pages(40)  # alone again, it can be adopted
    bench.cache.reclaim(1000)
    bench.pool.trim()
    assert bench.pool.n_owned == 0
    bench.close()


def test_a_slot_that_shares_is_never_adopted(open_bench: OpenBench) -> None:
    bench = open_bench("token_major")
    source = bench.grown(40)
    fork = bench.cache.fork(source)
    before = rows(bench, source, 40)
    fence = ManualFence()
    bench.cache.retire(fork, fence)
    assert bench.cache.stats().n_saved_pages > 0  # behind its fence it is mapped still
    fence.pass_()
    assert bench.cache.reclaim(0) >= 0
    assert bench.cache.slot_stats()[fork].state == "cold"
    for _ in range(3):
        other = bench.grown(48, b"\x11")
        assert rows(bench, source, 40) == before
        assert other != source
    bench.retire_all()
    bench.close()


def test_a_sequence_cannot_be_made_to_write_what_it_shares(open_bench: OpenBench) -> None:
    bench = open_bench("group:2")
    source = bench.grown(48)
    bench.cache.fork(source, 40)
    n_shared = bench.cache.shared_tokens(source)
    assert 0 < n_shared <= 40
    state = books(bench.cache)
    with pytest.raises(UsageError, match="truncate"):
        bench.cache.ensure({source: n_shared - 1})
    assert books(bench.cache) == state
    bench.cache.ensure({source: n_shared})
    bench.cache.ensure({source: 48})
    bench.retire_all()
    bench.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_tokens", [0, 1, 16, 39])
def test_truncate_gives_the_sequence_a_tail_of_its_own(open_bench: OpenBench, kind: str, n_tokens: int) -> None:
    bench = open_bench(kind)
    source = bench.grown(40)
    fork = bench.cache.fork(source)
    before = rows(bench, source, 40)
    bench.cache.truncate(fork, n_tokens)
    bench.cache.check()
    assert bench.cache.n_tokens(fork) == n_tokens
    assert bench.cache.shared_tokens(fork) <= n_tokens
    assert rows(bench, fork, n_tokens) == rows(bench, source, n_tokens)
    bench.cache.ensure({fork: 48})
    for i in range(len(bench.layout.planes)):
        for token in range(n_tokens, 48):
            bench.write_row(fork, i, token, b"\x77")
    assert rows(bench, source, 40) == before
    bench.retire_all()
    bench.close()


def test_truncate_of_what_is_not_shared_makes_no_driver_call(open_bench: OpenBench) -> None:
    bench = open_bench()
    slot_id = bench.grown(40)
    calls = dict(bench.faulty.calls)
    bench.cache.truncate(slot_id, 7)
    assert dict(bench.faulty.calls) == calls
    assert bench.cache.n_tokens(slot_id) == 7
    for wrong in (-1, 8):
        with pytest.raises(UsageError, match=rf"truncate to {wrong} tokens of a sequence that has 7 \(from 0 on\)"):
            bench.cache.truncate(slot_id, wrong)
    bench.retire_all()
    bench.close()


def test_a_fork_without_room_changes_nothing(open_bench: OpenBench) -> None:
    bench = open_bench("per_head", n_slots=2)
    source = bench.grown(17)
    bench.pool.resize(bench.pool.n_owned)
    state = books(bench.cache)
    with pytest.raises(OutOfPages):
        bench.cache.fork(source)
    assert books(bench.cache) == state
    bench.pool.resize(64)
    bench.cache.fork(source)
    with pytest.raises(OutOfSlots):
        bench.cache.fork(source)
    bench.retire_all()
    bench.close()


def test_a_fork_takes_the_room_of_warm_slots(open_bench: OpenBench) -> None:
    bench = open_bench("per_head", n_slots=3)
    source, other = bench.grown(17), bench.grown(48)
    bench.cache.retire(other)
    bench.pool.resize(bench.pool.n_owned)
    fork = bench.cache.fork(source)
    assert rows(bench, fork, 17) == rows(bench, source, 17)
    bench.retire_all()
    bench.close()


@pytest.mark.parametrize("kind", KINDS)
def test_beams_that_change_places_share_their_full_pages(open_bench: OpenBench, kind: str) -> None:
    bench = open_bench(kind)
    slots = bench.cache.acquire_adjacent(3)
    bench.cache.ensure(dict.fromkeys(slots, 40))
    for slot_id, fill in zip(slots, (b"\x01", b"\x02", b"\x03"), strict=True):
        bench.fill(slot_id, 40, fill)
    a, b, c = slots
    n_owned = bench.pool.n_owned
    bench.cache.share({a: b, b: a, c: a}, 40)
    bench.cache.check()
    for slot_id, fill in ((a, b"\x02"), (b, b"\x01"), (c, b"\x01")):
        for i, plane in enumerate(bench.layout.planes):
            n_full_bytes = 40 * plane.token_bytes // bench.layout.page_bytes * bench.layout.page_bytes
            assert bench.memory.read(bench.address(slot_id, i, 0), n_full_bytes) == fill * n_full_bytes
            tail = bench.memory.read(bench.address(slot_id, i, 0) + n_full_bytes, 40 * plane.token_bytes - n_full_bytes)
            assert set(tail) <= {slots.index(slot_id) + 1}  # its own, for the caller to move
    assert bench.pool.n_owned <= n_owned
    calls = dict(bench.faulty.calls)
    bench.cache.share({b: c, c: b}, 40)  # the same pages: nothing to do
    assert dict(bench.faulty.calls) == calls
    bench.retire_all()
    bench.close()


def test_nothing_is_shared_across_domains(open_bench: OpenBench) -> None:
    bench = open_bench("token_major")
    ours, theirs = bench.grown(40, domain="a"), bench.grown(40, domain="b")
    state = books(bench.cache)
    with pytest.raises(UsageError, match="domain"):
        bench.cache.share({ours: theirs}, 40)
    assert books(bench.cache) == state
    fork = bench.cache.fork(theirs)
    with pytest.raises(UsageError, match="domain"):
        bench.cache.share({ours: fork}, 40)
    bench.retire_all()
    bench.close()


def test_vacate_gives_pages_back_and_keeps_the_slot(open_bench: OpenBench) -> None:
    bench = open_bench("per_layer")
    source = bench.grown(40)
    fork = bench.cache.fork(source)
    before = rows(bench, source, 40)
    assert bench.cache.vacate(fork, PASSED) == bench.layout.n_pages(40) - n_full_pages(bench, 40)
    assert bench.cache.n_tokens(fork) == bench.cache.token_capacity(fork) == 0
    assert rows(bench, source, 40) == before
    bench.cache.ensure({fork: 5})
    assert set(rows(bench, fork, 5)[0]) == {0}
    bench.retire_all()
    bench.close()


def test_spans_are_where_the_tokens_are(open_bench: OpenBench) -> None:
    bench = open_bench("group:2")
    slot_id = bench.grown(40)
    spans = bench.cache.spans(slot_id, 3, 11)
    for i, (plane, (address, n_bytes)) in enumerate(zip(bench.layout.planes, spans, strict=True)):
        assert address == bench.address(slot_id, i, 3)
        assert n_bytes == 8 * plane.token_bytes
    with pytest.raises(UsageError, match="tokens"):
        bench.cache.spans(slot_id, 3, 41)
    bench.retire_all()
    bench.close()


def test_a_truncation_that_cannot_be_undone_breaks_the_slot_and_says_what_is_left(open_bench: OpenBench) -> None:
    bench = open_bench("token_major")
    source = bench.grown(40)
    fork = bench.cache.fork(source)
    before = rows(bench, source, 40)
    for n in range(1, 20):  # every call from the n-th on fails; what nothing was cut for is as it was
        bench.faulty.begin_count()
        bench.faulty.plan = fail_from(n, driver_error())
        with pytest.raises(DriverError):
            bench.cache.truncate(fork, 17)
        bench.faulty.plan = no_faults
        bench.cache.check()
        n_left = bench.cache.n_tokens(fork)
        if n_left < 40:
            break
    assert 1 < n < 19
    assert rows(bench, fork, n_left) == rows(bench, source, n_left)
    with pytest.raises(UsageError, match="retire"):
        bench.cache.ensure({fork: 48})
    with pytest.raises(UsageError, match="retire"):
        bench.cache.fork(fork)
    bench.cache.retire(fork)
    bench.cache.check()
    assert rows(bench, source, 40) == before
    bench.cache.retire(source)
    bench.close()


def test_a_fork_whose_copy_fails_leaves_nothing(open_bench: OpenBench) -> None:
    bench = open_bench("per_layer")
    source = bench.grown(17)
    state = books(bench.cache)
    bench.faulty.begin_count()
    bench.cache.retire(bench.cache.fork(source))
    bench.cache.reclaim(1000)
    point = next(p.n for p in bench.faulty.points if p.operation == "copy")
    bench.faulty.begin_count()
    bench.faulty.plan = fail_once(point, driver_error())
    with pytest.raises(DriverError):
        bench.cache.fork(source)
    assert bench.faulty.faults
    bench.faulty.plan = no_faults
    bench.cache.check()
    assert books(bench.cache)["lengths"] == state["lengths"]
    assert bench.cache.stats().n_saved_pages == 0
    bench.retire_all()
    bench.close()


def test_check_sees_a_page_at_two_places_and_a_count_that_is_wrong(open_bench: OpenBench) -> None:
    bench = open_bench("token_major")
    source = bench.grown(40)
    fork = bench.cache.fork(source)
    handles = bench.cache.region.table.handles[fork][0]
    handles[0], handles[1] = handles[1], handles[0]
    with pytest.raises(InvariantError, match="lies at"), bench.pool.lock:
        bench.cache.region.table.check()
    handles[0], handles[1] = handles[1], handles[0]
    bench.cache.check()
    holders = bench.cache.region.table.shares._holders[handles[0]]
    holders.n_tables += 1
    with pytest.raises(InvariantError, match="slots, not"):
        bench.cache.check()
    holders.n_tables -= 1
    bench.cache._slots.n_tokens[fork] = 3  # as if a shared page were the tail
    with pytest.raises(InvariantError, match="shares"):
        bench.cache.check()
    bench.cache._slots.n_tokens[fork] = 40
    bench.retire_all()
    bench.close()


def test_a_page_with_a_stuck_mapping_is_lost_with_its_last_other_one() -> None:
    from vmem_kv.driver.base import Handle

    shares, page = Shares(), Handle(7)
    shares.alias([page])
    assert shares.enter([page]) == 0
    assert shares.n_tables(page) == 2
    assert shares.leave([page]) == 0
    assert shares.get_stuck([page]) == []
    assert not shares.is_shared(page)
    assert shares.leave([page]) == 1
    assert shares.drop([page]) == ([], [page])
    assert shares.retry([page]) == [page]
    assert shares.drop([page]) == ([page], [])
    assert not shares
