"""Every order of {grow, premap, retire, pass fence, reclaim}: as sequences, and each in the middle of each other."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import pytest

from vmem_kv.cache import KVCache
from vmem_kv.driver.base import Driver
from vmem_kv.errors import CapacityError, DriverError, VmemError
from vmem_kv.growth import SlotId
from vmem_kv.testing import ManualFence
from vmem_kv.testing.explorer import CallHook, Explored, explore, walk
from vmem_kv.testing.operations import MAX_TOKENS, Run

from .conftest import Record
from .drivers import open_driver
from .mistakes import unmaps_too_early

pytestmark = pytest.mark.timeout(900)  # of a busy machine

DEPTH = 10
SHARING_DEPTH = 7
STATES_DEPTH = 4
STEP = 24
N_SLOTS, MAX_PAGES = 2, 24


class Lab:
    """A run with moves that need no arguments. Two sequences at most, of a domain each."""

    def __init__(self, hook: CallHook, n_slots: int = N_SLOTS) -> None:
        self.hook = hook
        self.run = Run(hook, "token_major", n_slots=n_slots, max_pages=MAX_PAGES, keep_freed=True)
        self.live: list[int] = []  # slots, oldest first

    def grow(self, index: int) -> bool:
        if len(self.live) <= index:
            if len(self.live) < index:
                return False
            slot = self.run.acquire(20, "ab"[index])
            if slot is None:
                return False
            self.live.append(slot)
        slot = self.live[index]
        n_tokens = min(MAX_TOKENS, self.run.model.slots[slot].n_tokens + STEP)
        self.run.ensure({slot: n_tokens})
        return True

    def fork(self) -> bool:
        slots = self.run.model.slots
        if not self.live or len(self.live) == len(slots) or not slots[self.live[0]].n_tokens:
            return False
        before = set(self.run.live())
        self.run.fork(self.live[0], slots[self.live[0]].n_tokens - 1)
        self.live += set(self.run.live()) - before
        return len(self.run.live()) > len(before)

    def truncate(self) -> bool:
        if not self.live or not self.run.model.slots[self.live[-1]].n_tokens:
            return False
        self.run.truncate(self.live[-1], self.run.model.slots[self.live[-1]].n_tokens // 2)
        return True

    def premap(self) -> bool:
        wanted = {s: min(MAX_TOKENS, self.run.model.slots[s].n_tokens + STEP) for s in self.live}
        if wanted:
            self.run.premap(wanted)
        return bool(wanted)

    def retire(self) -> bool:
        if not self.live:
            return False
        self.run.retire(self.live.pop(0), self.run.n_ops)
        return True

    def pass_fence(self) -> bool:
        if not self.run.fences:
            return False
        self.run.pass_fence(min(self.run.fences))
        return True

    def reclaim(self) -> bool:
        self.run.reclaim(3)
        return True

    def fingerprint(self) -> Hashable:
        model = self.run.model
        slots = tuple((s.state, s.n_tokens, tuple(s.ends), s.domain if any(s.ends) else "") for s in model.slots)
        first_home = {frame: page for page, frame in sorted(model.pages.items(), reverse=True)}
        shared = tuple(
            sorted((page, first_home[frame]) for page, frame in model.pages.items() if page != first_home[frame])
        )
        waiting = tuple(self.run.fences[number][0] for number in sorted(self.run.fences))
        return slots, shared, tuple(self.live), waiting, tuple(model.reclaim_order()), model.n_free


MOVES: dict[str, Callable[[Lab], bool]] = {
    "grow the first": lambda lab: lab.grow(0),
    "grow the second": lambda lab: lab.grow(1),
    "premap": Lab.premap,
    "retire": Lab.retire,
    "pass a fence": Lab.pass_fence,
    "reclaim": Lab.reclaim,
}


SHARING_MOVES: dict[str, Callable[[Lab], bool]] = {
    "grow the first": lambda lab: lab.grow(0),
    "fork the first": Lab.fork,
    "truncate the last": Lab.truncate,
    "retire": Lab.retire,
    "pass a fence": Lab.pass_fence,
    "reclaim": Lab.reclaim,
}


def explore_on(
    driver: Driver, depth: int, moves: dict[str, Callable[[Lab], bool]] = MOVES, n_slots: int = N_SLOTS
) -> Explored:
    hook = CallHook(driver)
    return explore(lambda: Lab(hook, n_slots), moves, Lab.fingerprint, lambda lab: lab.run.finish(), depth)


def test_every_sequence_of_sharing_moves_agrees_with_the_model(
    driver: Driver, driver_name: str, record: Record
) -> None:
    explored = explore_on(driver, SHARING_DEPTH, SHARING_MOVES, n_slots=3)
    assert explored.n_schedules > 10_000
    record(
        f"every sequence of {SHARING_DEPTH} moves with forks and truncations",
        driver_name,
        schedules=explored.n_schedules,
        states=len(explored.states),
        runs=explored.n_runs,
    )


def test_the_explorer_finds_what_is_unmapped_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    unmaps_too_early(monkeypatch)
    with pytest.raises(AssertionError, match="->"):
        explore_on(open_driver("native"), 5)


def test_every_sequence_of_moves_agrees_with_the_model(driver: Driver, driver_name: str, record: Record) -> None:
    explored = explore_on(driver, DEPTH)
    assert explored.n_schedules > 1_000_000
    record(
        f"every sequence of {DEPTH} moves",
        driver_name,
        schedules=explored.n_schedules,
        states=len(explored.states),
        runs=explored.n_runs,
    )


# Each move in the middle of each other, from every state. What happens in the middle goes past the model, which knows
# no half calls: bare calls on the cache, tags for what sequences hold, and the books.


class Middle:
    """A lab whose next two calls overlap."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.run, self.cache = lab, lab.run, lab.run.cache
        self.lengths = {s: self.run.model.slots[s].n_tokens for s in lab.live}
        self.fences = [fence for _, fence, _ in self.run.fences.values()]
        self.n_blocked = 0

    def grow(self, index: int) -> None:
        if index >= len(self.lab.live):
            return
        slot = self.lab.live[index]
        longer = min(MAX_TOKENS, self.lengths[slot] + STEP)
        self.cache.ensure({SlotId(slot): longer})
        self.run.tags.write(slot, self.lengths[slot], longer, slot + 1000)
        self.lengths[slot] = longer

    def premap(self) -> None:
        self.cache.premap({SlotId(s): min(MAX_TOKENS, n + 2 * STEP) for s, n in self.lengths.items()})

    def retire(self) -> None:
        if self.lab.live:
            slot = self.lab.live.pop(0)
            del self.lengths[slot]
            self.fences.append(ManualFence())
            self.cache.retire(SlotId(slot), self.fences[-1])

    def pass_fence(self) -> None:
        if self.fences:
            self.fences.pop(0).pass_()
        self.cache.reclaim(0)

    def reclaim(self) -> None:
        self.cache.reclaim(3)

    def acquire(self) -> None:
        slot = self.cache.acquire(expected_tokens=20, domain="c")
        self.lengths[slot] = 0

    def tolerant(self, call: Callable[[], None]) -> None:
        """Running out, or finding a slot busy that another call holds, is no error: nothing may have changed."""
        try:
            call()
        except CapacityError:
            pass
        except DriverError as error:
            if error.name != "ETIMEDOUT":
                raise
            self.n_blocked += 1

    def verify(self) -> None:
        self.cache.check()
        for slot, n_tokens in self.lengths.items():
            assert self.cache.n_tokens(SlotId(slot)) == n_tokens
            self.run.tags.verify(slot, 0, n_tokens)
        for fence in self.fences:
            fence.pass_()
        self.cache.retire(self.cache.active_slots())
        self.cache.close()
        self.run.pool.trim()
        driver = self.run.driver
        assert (driver.n_live_mappings, driver.n_live_reservations, driver.n_live_handles) == (0, 0, 0)


CALLS: dict[str, Callable[[Middle], None]] = {
    "grow the first": lambda middle: middle.grow(0),
    "grow the second": lambda middle: middle.grow(1),
    "premap": Middle.premap,
    "retire": Middle.retire,
    "pass a fence": Middle.pass_fence,
    "reclaim": Middle.reclaim,
    "acquire": Middle.acquire,
}

ONE_THREAD = {
    ("grow the first", "grow the first"),
    ("grow the second", "grow the second"),
    ("grow the first", "retire"),
}
"""Pairs that the contract leaves to one thread: a sequence's own steps."""


def overlap(driver: Driver, states: dict[Hashable, tuple[str, ...]]) -> tuple[int, int]:
    """Try each call at every moment of each other, from every state; return how many overlaps, and how many blocked."""
    n_overlaps = n_blocked = 0
    hook = CallHook(driver)
    for path in states.values():
        for outer in CALLS:
            for inner in CALLS:
                if (outer, inner) in ONE_THREAD or (inner, outer) in ONE_THREAD:
                    continue
                at = 1
                while True:
                    middle = Middle(walk(lambda: Lab(hook), MOVES, path))
                    hook.arm(at, lambda middle=middle, inner=inner: middle.tolerant(lambda: CALLS[inner](middle)))  # type: ignore[misc]
                    middle.tolerant(lambda middle=middle, outer=outer: CALLS[outer](middle))  # type: ignore[misc]
                    has_overlapped = hook.n_moments >= at
                    hook.arm(0, lambda: None)
                    try:
                        middle.verify()
                    except (AssertionError, VmemError) as error:
                        where = f"{inner!r} at moment {at} of {outer!r}, after {' -> '.join(path)}"
                        raise AssertionError(f"{where}: {error!r}") from error
                    if not has_overlapped:
                        break
                    n_overlaps += 1
                    n_blocked += middle.n_blocked
                    at += 1
    return n_overlaps, n_blocked


@pytest.fixture(autouse=True)
def _never_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one thread nobody can end what a call waits for: it gives up at once, and nothing may have changed."""
    monkeypatch.setattr("vmem_kv.cache.STALL_TIMEOUT_S", 0)


def test_every_call_may_come_in_the_middle_of_every_other(driver: Driver, driver_name: str, record: Record) -> None:
    states = explore_on(driver, STATES_DEPTH).states
    n_overlaps, n_blocked = overlap(driver, states)
    assert n_overlaps > 2000
    assert 0 < n_blocked < n_overlaps
    record(
        "each call at each moment of each other",
        driver_name,
        states=len(states),
        overlaps=n_overlaps,
        that_had_to_wait=n_blocked,
    )


def test_the_explorer_finds_a_planted_race(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls that work on one slot at a time, because nobody says that it is busy."""

    @contextmanager
    def careless(cache: KVCache, slot_ids: object) -> Iterator[None]:
        yield

    monkeypatch.setattr(KVCache, "_exclusive", careless)
    with pytest.raises((AssertionError, VmemError)):
        overlap(open_driver("native"), {0: ("grow the first",)})


def test_the_explorer_finds_a_move_that_goes_wrong_late() -> None:
    moves: dict[str, Callable[[list[str]], bool]] = {
        "a": lambda done: done.append("a") is None,
        "b": lambda done: done[-3:] != ["a", "a", "b"] and done.append("b") is None,
    }

    def finish(done: list[str]) -> None:
        assert done != ["b", "a", "b", "b"]

    whole = explore(list, moves, tuple, lambda done: None, 4)
    assert whole.n_schedules == 2**4 - 1
    assert len(whole.states) == 1 + 2 + 4 + 8 + 15
    counted = explore(list, {"a": moves["a"], "b": lambda done: done.append("b") is None}, len, lambda done: None, 10)
    assert (counted.n_schedules, counted.n_runs) == (2**10, 20)
    with pytest.raises(AssertionError, match="b -> a -> b -> b"):
        explore(list, moves, tuple, finish, 4)
