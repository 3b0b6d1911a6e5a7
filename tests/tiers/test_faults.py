"""Every driver call while sequences are parked and restored fails: once, and from then on.

After each failure: the books add up, every sequence is whole where the contract says, and the same call, made again
without faults, succeeds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from tempfile import gettempdir

import pytest

from vmem_kv.errors import CapacityError, DriverError
from vmem_kv.growth import SlotId
from vmem_kv.testing import (
    ManualClock,
    Plan,
    Point,
    driver_error,
    fail_from,
    fail_kind,
    fail_once,
    interruption,
    natural_error,
    no_faults,
)
from vmem_kv.tiers.copies import HostCopy, end_of
from vmem_kv.tiers.disk import DiskTier
from vmem_kv.tiers.host import HostTier, Parking, Restoring
from vmem_kv.tiers.sessions import Level, Sessions, Stay

from .bench import TierBench

FAILURES = (CapacityError, DriverError, KeyboardInterrupt)


def in_the_way(point: Point) -> BaseException:
    """What does not let a session go for want of host memory, as a pin that finds none does."""
    return (driver_error() if point.operation == "pin" else natural_error)(point)


PLANS: dict[str, Callable[[int], Plan]] = {
    "once": fail_once,
    "from then on": lambda n: fail_from(n, driver_error()),
    "interrupted": lambda n: fail_once(n, interruption),
}
SESSION_PLANS = PLANS | {"once": lambda n: fail_once(n, in_the_way)}


@dataclass
class Sequence:
    """What a sequence is to its owner."""

    slot: SlotId
    copy: HostCopy
    tokens: list[int]


class Life:
    """Two sequences that go out and come back, one of them often, and by another way."""

    def __init__(self, backend: str, kind: str, plan: Plan) -> None:
        self.bench = TierBench(kind, backend=backend, n_slots=8, max_pages=200)
        self.cache, self.host = self.bench.cache, self.bench.host
        self.bench.faulty.begin_count()
        self.bench.faulty.plan = plan
        self.n_failed = self.n_points = 0
        self.left_behind: list[SlotId] = []
        """Broken slots that their sequences have left."""

    def attempt(self, call: Callable[[], object], check: Callable[[], None]) -> None:
        """Call; where that fails, everything must add up, and `call` must succeed without faults."""
        try:
            call()
            return
        except FAILURES:
            self.n_failed += 1
        self.bench.faulty.plan = no_faults
        self.bench.check()
        check()
        call()
        self.bench.check()

    def begin(self) -> Sequence:
        slots: list[SlotId] = []
        self.attempt(lambda: slots.append(self.cache.acquire(expected_tokens=0)), lambda: None)
        return Sequence(slots[0], self.host.new_copy(self.bench.layout), [])

    def move(self, sequence: Sequence) -> None:
        """Go on in another slot where an unmap failed under this one."""
        if sequence.slot in self.cache.region.broken:
            old, sequence.slot = sequence.slot, self.cache.acquire(expected_tokens=0)
            self.left_behind.append(old)
            if self.cache.n_tokens(old):
                self.bench.append(sequence.slot, [], sequence.tokens)

    def append(self, sequence: Sequence, n_kept: int, tokens: list[int]) -> None:
        """Cut the sequence after `n_kept` tokens and go on with others."""
        before = sequence.tokens[:]

        def call() -> None:
            self.move(sequence)
            sequence.tokens = self.bench.append(sequence.slot, sequence.tokens[:n_kept], tokens)

        def whole() -> None:
            assert sequence.tokens == before
            assert self.bench.holds(sequence.slot, before)

        self.attempt(call, whole)

    def park(self, sequence: Sequence) -> None:
        slot_id, copy, tokens, held = sequence.slot, sequence.copy, sequence.tokens, list(sequence.copy.tokens)

        def call() -> None:
            if self.cache.n_tokens(slot_id):
                self.host.park(copy, self.cache, slot_id, tokens)

        def whole() -> None:
            if self.cache.n_tokens(slot_id):
                assert self.bench.holds(slot_id, tokens)
                assert self.bench.copy_holds(copy, held) or self.bench.copy_holds(copy, tokens)
            else:  # the pages went back, but for some whose unmap failed
                assert self.bench.faulty.faults[-1].operation in ("unmap", "release")
                assert self.bench.copy_holds(copy, tokens)

        self.attempt(call, whole)
        assert self.bench.copy_holds(copy, tokens)
        assert not self.cache.n_tokens(slot_id)

    def restore(self, sequence: Sequence) -> None:
        copy, tokens = sequence.copy, sequence.tokens

        def call() -> None:
            self.move(sequence)
            self.host.restore(copy, self.cache, sequence.slot)

        def empty() -> None:
            assert self.bench.copy_holds(copy, tokens)
            assert not self.cache.n_tokens(sequence.slot)

        self.attempt(call, empty)
        assert self.bench.holds(sequence.slot, tokens)
        assert self.bench.copy_holds(copy, tokens)

    def live(self) -> None:
        one, other = self.begin(), self.begin()
        self.append(one, 0, list(range(30)))
        self.append(other, 0, [5] * 17)
        self.park(one)
        self.park(other)
        self.restore(one)
        self.append(one, 30, list(range(100, 111)))
        self.park(one)
        self.restore(one)
        self.append(one, 30, list(range(200, 214)))  # all that was added goes, and something else comes in its place
        self.park(one)
        self.restore(one)
        self.append(one, 33, [7, 8, 9])
        self.park(one)
        self.restore(one)
        self.restore(other)
        assert self.bench.holds(one.slot, one.tokens)
        assert self.bench.holds(other.slot, other.tokens)
        self.n_points = self.bench.faulty.n_points
        self.bench.faulty.plan = no_faults
        self.bench.end()


class KeptLife(Life):
    """A sequence that is kept as a session, expires down to every level, and is resumed from there."""

    def __init__(self, backend: str, kind: str, plan: Plan) -> None:
        super().__init__(backend, kind, plan)
        self.clock = ManualClock()
        self.disk = DiskTier(gettempdir(), 1 << 20)
        self.sessions = Sessions(self.cache, self.host, self.disk, self.clock)

    def keep(self, sequence: Sequence) -> None:
        self.sessions.retain("one", sequence.slot, sequence.tokens, Stay(1, 1, 1))

    def sink(self, sequence: Sequence) -> None:
        level = self.sessions.level("one")
        self.clock.advance(1)

        def same() -> None:
            assert self.sessions.level("one") is level
            if level is Level.DEVICE:
                assert self.bench.holds(sequence.slot, sequence.tokens)

        self.attempt(self.sessions.poll, same)
        assert self.sessions.level("one") is not level

    def resume(self, sequence: Sequence) -> None:
        level = self.sessions.level("one")

        def call() -> None:
            sequence.slot, tokens = self.sessions.resume("one")
            assert list(tokens) == sequence.tokens

        def same() -> None:
            assert self.sessions.level("one") is level

        self.attempt(call, same)
        assert self.bench.holds(sequence.slot, sequence.tokens)

    def live(self) -> None:
        one = self.begin()
        self.append(one, 0, list(range(20)))
        for n_levels in (0, 1, 2, 1):
            self.keep(one)
            for _ in range(n_levels):
                self.sink(one)
            self.resume(one)
            self.append(one, 15 if n_levels == 2 else len(one.tokens), [n_levels] * 6)
        self.keep(one)
        self.sink(one)
        self.sink(one)
        self.sink_to_the_end()
        self.n_points = self.bench.faulty.n_points
        self.bench.faulty.plan = no_faults
        assert self.sessions.stats().n_gone == 1
        assert self.cache.active_slots() == self.left_behind
        self.sessions.close()
        self.disk.close()
        self.bench.end()

    def sink_to_the_end(self) -> None:
        self.clock.advance(1)
        self.attempt(self.sessions.poll, lambda: None)


def sweep(
    backend: str,
    kind: str,
    plan: str,
    lives: type[Life] = Life,
    plans: dict[str, Callable[[int], Plan]] = PLANS,
) -> int:
    calm = lives(backend, kind, no_faults)
    calm.live()
    assert calm.n_failed == 0
    for n in range(1, calm.n_points + 1):
        life = lives(backend, kind, plans[plan](n))
        try:
            life.live()
            assert life.bench.faulty.faults
        except BaseException as error:
            raise AssertionError(f"{kind}, {plan}, point {n}: {error!r}") from error
    return calm.n_points


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", ["per_layer", "token_major"])
def test_any_call_may_fail(backend: str, kind: str, plan: str) -> None:
    assert sweep(backend, kind, plan) > 50


def test_a_session_that_no_memory_can_be_pinned_for_is_gone_and_nothing_else() -> None:
    life = KeptLife("native", "group:2", no_faults)
    one = life.begin()
    life.append(one, 0, list(range(20)))
    life.keep(one)
    life.clock.advance(1)
    with life.bench.faulty.failing(fail_kind("pin")):
        life.sessions.poll()
    assert life.sessions.stats().n_gone == 1
    assert life.cache.active_slots() == []
    life.bench.check()
    life.sessions.close()
    life.disk.close()
    life.bench.end()


@pytest.mark.parametrize("plan", PLANS)
def test_any_call_may_fail_while_sessions_come_and_go(backend: str, plan: str) -> None:
    assert sweep(backend, "group:2", plan, KeptLife, SESSION_PLANS) > 50


# The sweep is seen to fail.


def loses_the_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """A park that gives the slot's pages back before the rows have been moved."""
    begin = HostTier.begin_park

    def planted(tier: HostTier, copy: HostCopy, cache: object, slot_id: SlotId, tokens: object) -> Parking:
        try:
            return begin(tier, copy, cache, slot_id, tokens)
        except DriverError:
            cache.ensure({slot_id: 0})
            raise

    monkeypatch.setattr(HostTier, "begin_park", planted)


def keeps_half_a_restore(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed restore that leaves its length."""
    monkeypatch.setattr(Restoring, "_give_up", Restoring._settle_if_quiet)


def leaks_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed park whose memory nobody has any more."""
    monkeypatch.setattr(Parking, "_give_up", Parking._close)


def commits_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed park that has changed the copy."""
    monkeypatch.setattr(Parking, "_give_up", Parking._commit)


def writes_over_what_is_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """A park that writes where rows are that the copy has to keep if it fails."""
    monkeypatch.setattr(HostTier, "_free_from", lambda tier, copy, extents: end_of(extents, copy.layout))


def forgets_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that is counted as moved before it has."""
    move = Sessions._to_host

    def planted(sessions: Sessions, session: object, *, waits: bool) -> bool:
        session.level = Level.HOST
        return move(sessions, session, waits=waits)

    monkeypatch.setattr(Sessions, "_to_host", planted)


def keeps_the_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed resume that does not give its slot back."""
    monkeypatch.setattr(Sessions, "_retire_unwanted", lambda sessions: None)


@pytest.mark.parametrize("mistake", [forgets_too_early, keeps_the_slot])
def test_the_sweep_of_sessions_finds_a_planted_mistake(
    mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake(monkeypatch)
    with pytest.raises(AssertionError):
        sweep("native", "group:2", "once", KeptLife, SESSION_PLANS)


@pytest.mark.parametrize(
    "mistake",
    [loses_the_slot, keeps_half_a_restore, leaks_frames, commits_first, writes_over_what_is_to_go],
)
def test_the_sweep_finds_a_planted_mistake(
    mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake(monkeypatch)
    with pytest.raises(AssertionError):
        sweep("native", "per_layer", "once")
