"""Every order of parks, restores and sessions: as moves, as halves, and with calls in the middle of each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import suppress
from itertools import product

import pytest

from vmem_kv.cache import KVCache
from vmem_kv.driver.base import Driver, Handle
from vmem_kv.driver.checked import CheckedDriver
from vmem_kv.driver.ledger import Ledger
from vmem_kv.errors import CapacityError, UsageError
from vmem_kv.growth import SlotId
from vmem_kv.pages import PagePool
from vmem_kv.testing.explorer import CallHook, Explored, explore
from vmem_kv.testing.late import LateDriver
from vmem_kv.testing.operations import MAX_TOKENS, odd_layout
from vmem_kv.testing.session_operations import STAY_S, SessionRun
from vmem_kv.testing.shadow import ShadowTags, words_of
from vmem_kv.tiers.host import HostTier, Parking, Restoring
from vmem_kv.tiers.memory import FramePool, PinnedMemory

from .conftest import Record
from .drivers import open_driver
from .exploring import Middle, arrangement, overlap, show
from .tier_mistakes import (
    Mistake,
    cancels_without_waiting,
    does_not_wait,
    forgets_the_tail,
    lets_sessions_stay,
    restores_a_stale_copy,
    restores_behind_its_back,
    vacates_before_it_has_read,
)

pytestmark = [pytest.mark.usefixtures("never_wait"), pytest.mark.timeout(900)]  # of a busy machine

DEPTH = 5
HALVES_DEPTH = 6
SESSION_DEPTH = 6
STEP = 16

# Every order of whole moves, held against the models.


class Lab:
    """A sequence that is parked and comes back, its fork, and another one that wants its pages."""

    def __init__(self, driver: Driver) -> None:
        self.run = SessionRun(driver, "token_major", n_slots=3, max_pages=20, keep_freed=True, n_frames=12)
        self.one = self.run.acquire(0, "a")
        self.other = self.run.acquire(0, "b")

    def n_tokens(self, slot: int | None) -> int:
        return 0 if slot is None else self.run.model.slots[slot].n_tokens

    def grow(self, slot: int | None) -> bool:
        if slot is None or self.n_tokens(slot) + STEP > MAX_TOKENS:
            return False
        self.run.ensure({slot: self.n_tokens(slot) + STEP})
        return True

    def cut(self) -> bool:
        if self.one is None or self.n_tokens(self.one) <= 5:
            return False
        self.run.truncate(self.one, self.n_tokens(self.one) - 5)
        return True

    def park(self, slot: int | None, copy: int) -> bool:
        if slot not in self.run.parkable():
            return False
        self.run.park(slot, copy)
        return True

    def copy_out(self) -> bool:
        if self.one not in self.run.parkable():
            return False
        self.run.copy_out(self.one, 0)
        return True

    def restore(self, slot: int | None, copy: int) -> bool:
        if slot not in self.run.empty() or copy not in self.run.tier.copies:
            return False
        self.run.restore(copy, slot, 0, len(self.run.tier.copies[copy].rows))
        return True

    def fork(self) -> bool:
        if not self.n_tokens(self.one) or len(self.run.live()) == 3:
            return False
        self.run.fork(self.one, self.n_tokens(self.one))  # type: ignore[arg-type]
        return True

    def retire(self) -> bool:
        """The sequence ends; another one takes up its copy."""
        if self.one is None:
            return False
        self.run.retire(self.one, None)
        self.one = self.run.acquire(0, "a")
        return True

    def retain(self) -> bool:
        """The sequence becomes a session, and another one begins."""
        if self.one not in self.run.parkable() or self.run.kept:
            return False
        self.run.retain(self.one, 0)
        self.one = self.run.acquire(0, "a")
        return True

    def expire(self) -> bool:
        if not self.run.kept:
            return False
        self.run.expire(STAY_S)
        return True

    def resume(self) -> bool:
        """The session comes back in the place of the sequence that began behind it."""
        if not self.run.kept:
            return False
        before = set(self.run.live())
        self.run.resume(0)
        for slot in set(self.run.live()) - before:
            if self.one is not None:
                self.run.retire(self.one, None)
            self.one = slot
        return True

    def fingerprint(self) -> Hashable:
        tier = self.run.tier
        # Which rows are the same matters, not whose they are.
        rows = [self.run._rows(slot) for slot in self.run.live()] + [kept.rows for kept in self.run.kept.values()]
        where = tuple((kept.level, kept.slot, kept.due_s - self.run.clock()) for kept in self.run.kept.values())
        names: dict[int, int] = {}
        for row in (row for each in (*rows, *(copy.rows for copy in tier.copies.values())) for row in each):
            names.setdefault(row, len(names))
        copies = tuple(
            (n, tuple(c.parts), c.is_spare, tuple(names[row] for row in c.rows)) for n, c in tier.copies.items()
        )
        named = tuple(tuple(names[row] for row in each) for each in rows)
        return arrangement(self.run.model), copies, named, where, self.one, self.other


MOVES: dict[str, Callable[[Lab], bool]] = {
    "grow": lambda lab: lab.grow(lab.one),
    "cut": Lab.cut,
    "park": lambda lab: lab.park(lab.one, 0),
    "restore": lambda lab: lab.restore(lab.one, 0),
    "copy out": Lab.copy_out,
    "fork": Lab.fork,
    "retire": Lab.retire,
    "grow the other": lambda lab: lab.grow(lab.other),
    "park the other": lambda lab: lab.park(lab.other, 1),
    "restore the other": lambda lab: lab.restore(lab.other, 1),
}


SESSION_MOVES: dict[str, Callable[[Lab], bool]] = {
    "grow": lambda lab: lab.grow(lab.one),
    "retain": Lab.retain,
    "let time pass": Lab.expire,
    "resume": Lab.resume,
    "grow the other": lambda lab: lab.grow(lab.other),
    "park the other": lambda lab: lab.park(lab.other, 1),
    "restore the other": lambda lab: lab.restore(lab.other, 1),
}


def explore_moves(driver: Driver, depth: int, moves: dict[str, Callable[[Lab], bool]] = MOVES) -> Explored:
    return explore(lambda: Lab(driver), moves, Lab.fingerprint, lambda lab: lab.run.finish(), depth)


def make_every_sequence_of_session_moves(driver: Driver, driver_name: str, depth: int, record: Record) -> None:
    """Every order of so many moves with sessions."""
    explored = explore_moves(driver, depth, SESSION_MOVES)
    assert explored.n_schedules > 1000
    what = f"every sequence of {depth} moves with sessions that expire and come back"
    show(record, what, driver_name, explored)


def test_every_sequence_of_session_moves_agrees_with_the_models(
    driver: Driver, driver_name: str, record: Record
) -> None:
    make_every_sequence_of_session_moves(driver, driver_name, SESSION_DEPTH, record)


def make_every_sequence_of_parking_moves(driver: Driver, driver_name: str, depth: int, record: Record) -> None:
    """Every order of so many moves with parks and restores."""
    explored = explore_moves(driver, depth)
    assert explored.n_schedules > 2000
    show(record, f"every sequence of {depth} moves with parks and restores", driver_name, explored)


def test_every_sequence_of_parking_moves_agrees_with_the_models(
    driver: Driver, driver_name: str, record: Record
) -> None:
    make_every_sequence_of_parking_moves(driver, driver_name, DEPTH, record)


@pytest.mark.parametrize("mistake", [restores_a_stale_copy, forgets_the_tail])
def test_the_explorer_finds_a_mistake_of_the_tiers(mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    mistake(monkeypatch)
    with pytest.raises(AssertionError, match="->"):
        explore_moves(open_driver("native"), DEPTH)


def test_the_explorer_finds_sessions_that_do_not_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    lets_sessions_stay(monkeypatch)
    with pytest.raises(AssertionError, match="retain"):
        explore_moves(open_driver("native"), SESSION_DEPTH, SESSION_MOVES)


# Calls of the cache in the middle of a park or a restore and the other way round, as another thread could make them: at
# every moment before and behind every driver call.


class Moving(Middle):
    """A lab of which one sequence is moved while something happens to the other one.

    Args:
        hook: What every driver call passes.
        is_away: Whether the one is in host memory.
        other: What the other one is: "active"; "warm"; or "a fork", which has pages of the one.
    """

    def __init__(self, hook: CallHook, *, is_away: bool, other: str) -> None:
        lab = Lab(hook)
        assert lab.one is not None
        self.one, self.other = lab.one, lab.other
        lab.grow(lab.one)
        lab.grow(lab.other)
        lab.copy_out()
        lab.grow(lab.one)
        if other == "a fork":
            lab.run.retire(lab.other, None)  # type: ignore[arg-type]
            lab.fork()
            (self.other,) = set(lab.run.live()) - {lab.one}
        rows = lab.run._rows(lab.one)
        if is_away:
            lab.park(lab.one, 0)
        if other == "warm":
            lab.run.retire(lab.other, None)  # type: ignore[arg-type]
        super().__init__(lab.run, STEP)
        self.host, self.copy, self.rows = lab.run.host, lab.run.copies[0], rows
        del self.lengths[self.one]

    def park(self) -> None:
        self.host.park(self.copy, self.cache, SlotId(self.one), self.rows)

    def restore(self) -> None:
        self.host.restore(self.copy, self.cache, SlotId(self.one))

    def retire(self) -> None:
        if self.lengths.pop(self.other, None) is not None:  # type: ignore[call-overload]
            self.cache.retire(SlotId(self.other))  # type: ignore[arg-type]

    def verify(self) -> None:
        self.host.check()
        one = SlotId(self.one)
        if not self.cache.n_tokens(one):
            with suppress(CapacityError):
                self.host.restore(self.copy, self.cache, one)
        if self.cache.n_tokens(one):
            self.run.tags.expect(one, 0, self.rows)
            self.run.tags.verify(one, 0, len(self.rows))
        else:
            assert list(self.copy.tokens) == self.rows
        self.host.close()
        super().verify()


MOVING: dict[bool, dict[str, Callable[[Moving], None]]] = {
    False: {"a park": Moving.park},
    True: {"a restore": Moving.restore},
}
"""What may be done to the one, by whether it is away."""

BESIDE: dict[str, Callable[[Moving], None]] = {
    "grow the other": lambda moving: moving.grow(moving.other),
    "fork the other": lambda moving: moving.fork(moving.other),
    "truncate the other": lambda moving: moving.truncate(moving.other),
    "retire the other": Moving.retire,
    "reclaim": lambda moving: moving.cache.reclaim(3) and None,
    "acquire": lambda moving: moving.acquire("c"),
    "adopt": lambda moving: moving.acquire("b"),
}


def overlap_moves(driver: Driver) -> Counter[str]:
    """Try each call at every moment of a park and of a restore, and each of these at every moment of each call."""
    hook, counts = CallHook(driver), Counter[str]()
    for (is_away, moving), other in product(MOVING.items(), ("active", "warm", "a fork")):

        def begin(is_away: bool = is_away, other: str = other) -> Moving:
            return Moving(hook, is_away=is_away, other=other)

        for (move_name, move), (name, beside) in product(moving.items(), BESIDE.items()):
            where = f", where the other is {other}"
            counts += overlap(hook, begin, move, beside, f"{name!r} in the middle of {move_name}{where}")
            counts += overlap(hook, begin, beside, move, f"{move_name} in the middle of {name!r}{where}")
    return counts


def test_calls_and_moves_may_come_in_the_middle_of_each_other(driver: Driver, driver_name: str, record: Record) -> None:
    counts = overlap_moves(driver)
    assert counts["overlaps"] > 500
    record("cache calls and parks and restores at each moment of each other", driver_name, **counts)


def test_an_overlap_finds_a_park_that_vacates_first(monkeypatch: pytest.MonkeyPatch) -> None:
    vacates_before_it_has_read(monkeypatch)
    with pytest.raises(AssertionError, match="of a park"):
        overlap_moves(open_driver("native"))


# Parks and restores that are begun and finished in different moves, on a device whose copies run as late as they may.


class Halves:
    """Two sequences, of which one goes out and comes back by halves."""

    def __init__(self, driver: Driver) -> None:
        self.late = LateDriver(driver)
        self.driver = CheckedDriver(self.late)
        page_bytes = driver.info.granularity_bytes
        self.pool = PagePool(self.driver, page_bytes, 22, keep_freed=True)
        self.layout = odd_layout("token_major", page_bytes, n_slots=2)
        self.cache = KVCache(self.pool, self.layout)
        memory = PinnedMemory(self.driver)
        self.host = HostTier(
            FramePool(12 * page_bytes, memory, frame_bytes=page_bytes, buffer_bytes=4 * page_bytes, ledger=Ledger())
        )
        self.tags = ShadowTags(self.layout, words_of(driver, self.cache.region.reservation))
        self.slots = [self.cache.acquire(expected_tokens=0, domain=name) for name in "ab"]
        self.copies = [self.host.new_copy(self.layout) for _ in self.slots]
        self.lengths = [0, 0]
        self.half: Parking | Restoring | None = None

    def grow(self, index: int) -> bool:
        n_tokens = self.lengths[index] + STEP
        is_away = self.lengths[index] and not self.cache.n_tokens(self.slots[index])
        if is_away or (index == 0 and self.half) or n_tokens > MAX_TOKENS:
            return False
        try:
            self.cache.ensure({self.slots[index]: n_tokens})
        except CapacityError:
            return True
        self.late.catch_up()
        self.tags.write(self.slots[index], self.lengths[index], n_tokens, index + 1)
        self.lengths[index] = n_tokens
        return True

    def begin_park(self) -> bool:
        if self.half or not self.cache.n_tokens(self.slots[0]):
            return False
        try:
            self.half = self.host.begin_park(self.copies[0], self.cache, self.slots[0], self.tokens(0))
        except CapacityError:
            return False
        return True

    def begin_restore(self) -> bool:
        if self.half or self.cache.n_tokens(self.slots[0]) or not self.lengths[0]:
            return False
        try:
            self.half = self.host.begin_restore(self.copies[0], self.cache, self.slots[0])
        except CapacityError:
            return True  # warm slots may have gone cold
        return True

    def finish(self) -> bool:
        if self.half is None:
            return False
        self.half.finish()
        self.half = None
        return True

    def cancel(self) -> bool:
        if not isinstance(self.half, Parking):
            return False
        self.half.cancel()
        self.half = None
        return True

    def ask(self) -> bool:
        if self.half is None:
            return False
        self.half.passed()
        return True

    def park_other(self) -> bool:
        if not self.cache.n_tokens(self.slots[1]):
            return False
        try:
            self.host.park(self.copies[1], self.cache, self.slots[1], self.tokens(1))
        except CapacityError:
            return False
        return True

    def restore_other(self) -> bool:
        if self.cache.n_tokens(self.slots[1]) or not self.lengths[1]:
            return False
        try:
            self.host.restore(self.copies[1], self.cache, self.slots[1])
        except CapacityError:
            return True
        return True

    def drop(self) -> bool:
        """What is under way is not dropped; what nobody needs is, also what a restore has read already."""
        if isinstance(self.half, Parking):
            with pytest.raises(UsageError, match="under way"):
                self.host.drop(self.copies[0])
        elif isinstance(self.half, Restoring):
            with suppress(UsageError):
                self.host.drop(self.copies[0])
                assert not self.late.n_pending
        elif self.cache.n_tokens(self.slots[0]) and self.copies[0].n_tokens:
            self.host.drop(self.copies[0])
        else:
            return False
        return True

    def tokens(self, index: int) -> list[int]:
        return self.tags.identities(self.slots[index], self.lengths[index])

    def check(self) -> None:
        self.cache.check()
        self.host.check()
        for index, slot in enumerate(self.slots):
            if index == 1 or self.half is None:
                n_tokens = self.cache.n_tokens(slot)
                assert n_tokens in (0, self.lengths[index])
                self.tags.verify(slot, 0, n_tokens)

    def fingerprint(self) -> Hashable:
        where = tuple(self.cache.n_tokens(slot) for slot in self.slots)
        held = tuple(
            (copy.n_tokens, copy.extents, tuple(copy.frames), copy.is_spare, copy.n_readers) for copy in self.copies
        )
        half = type(self.half).__name__ if self.half is not None else ""
        mapped = tuple(self.cache.token_capacity(slot) for slot in self.slots)
        return tuple(self.lengths), where, held, half, mapped, self.late.n_pending, self.pool.n_free

    def end(self) -> None:
        self.check()
        self.finish()
        self.check()
        away = [i for i, slot in enumerate(self.slots) if self.lengths[i] and not self.cache.n_tokens(slot)]
        for index in away:
            for slot in self.slots:  # room; what was here was verified
                self.cache.vacate(slot)
            self.host.restore(self.copies[index], self.cache, self.slots[index])
            self.tags.verify(self.slots[index], 0, self.lengths[index])
        self.host.close()
        self.cache.retire(self.cache.active_slots())
        self.cache.settle()
        self.cache.close()
        self.pool.trim()
        driver = self.driver
        left = (driver.n_live_mappings, driver.n_live_reservations, driver.n_live_handles, driver.n_pinned)
        assert left == (0, 0, 0, 0)


HALVES: dict[str, Callable[[Halves], bool]] = {
    "grow": lambda halves: halves.grow(0),
    "begin to park": Halves.begin_park,
    "begin to restore": Halves.begin_restore,
    "finish": Halves.finish,
    "cancel": Halves.cancel,
    "ask": Halves.ask,
    "drop": Halves.drop,
    "grow the other": lambda halves: halves.grow(1),
    "park the other": Halves.park_other,
    "restore the other": Halves.restore_other,
}


def explore_halves(driver: Driver, depth: int) -> Explored:
    def checked(move: Callable[[Halves], bool]) -> Callable[[Halves], bool]:
        def make(halves: Halves) -> bool:
            is_possible = move(halves)
            halves.check()
            return is_possible

        return make

    moves = {name: checked(move) for name, move in HALVES.items()}
    return explore(lambda: Halves(driver), moves, Halves.fingerprint, Halves.end, depth)


def make_every_sequence_of_halves(driver: Driver, driver_name: str, depth: int, record: Record) -> None:
    """Every order of so many halves of parks and restores."""
    explored = explore_halves(driver, depth)
    assert explored.n_schedules > 800
    show(record, f"every sequence of {depth} halves of parks and restores", driver_name, explored)


def test_every_order_of_half_parks_and_half_restores(driver: Driver, driver_name: str, record: Record) -> None:
    make_every_sequence_of_halves(driver, driver_name, HALVES_DEPTH, record)


@pytest.mark.parametrize("mistake", [does_not_wait, cancels_without_waiting, restores_behind_its_back])
def test_halves_find_who_does_not_wait(mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    mistake(monkeypatch)
    with pytest.raises(AssertionError, match="begin to"):
        explore_halves(open_driver("native"), HALVES_DEPTH)


def test_a_late_device_says_who_uses_what_a_copy_still_needs() -> None:
    driver = open_driver("native")
    late = LateDriver(driver)
    page = driver.info.granularity_bytes
    reservation = late.reserve(page)
    handles: list[Handle] = []
    late.create(page, [reservation.base], handles)
    late.map(page, [reservation.base], handles)
    late.set_access([(reservation.base, page)])
    buffer = bytearray(b"rows")
    fence = late.copy_from_host(memoryview(buffer), reservation.base)
    assert not fence.passed()
    with pytest.raises(UsageError, match="unmap at"):
        late.unmap([(reservation.base, page)])
    buffer[:] = b"late"  # before it was read
    assert fence.passed()
    found = bytearray(4)
    late.copy_to_host(reservation.base, memoryview(found))
    assert late.n_pending == 1
    late.scrub([(reservation.base, page)])  # behind it
    assert found == b"late"
    late.unmap([(reservation.base, page)])
    late.release(page, handles)
    late.free_reservation(reservation)
    late.close()
