"""Every order of {grow, premap, retire, pass fence, reclaim} and of {grow, fork, truncate, share, ...}.

As sequences, and each call in the middle of each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import NamedTuple

import pytest

from vmem_kv.claims import Claims
from vmem_kv.driver.base import Driver
from vmem_kv.growth import SlotId
from vmem_kv.sharing import tail_copies
from vmem_kv.testing import ManualFence
from vmem_kv.testing.explorer import CallHook, Explored, Path, explore, walk
from vmem_kv.testing.operations import MAX_TOKENS, Run

from .conftest import Record
from .drivers import open_driver
from .exploring import Middle, arrangement, overlap, show
from .mistakes import unmaps_too_early

pytestmark = [pytest.mark.usefixtures("never_wait"), pytest.mark.timeout(900)]  # of a busy machine

DEPTH = 10
SHARING_DEPTH = 7
STATES_DEPTH = 4
SHARED: tuple[Path, ...] = (
    ("grow the first", "fork the first"),
    ("grow the first", "fork the first", "fork the first"),
    ("grow the first", "fork the first", "retire"),
)
"""To two sequences on the same pages, to three, and to one whose other owner waits for a fence."""
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
        waiting = tuple(self.run.fences[number][0] for number in sorted(self.run.fences))
        return arrangement(self.run.model), tuple(self.live), waiting


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


def make_every_sequence_of_sharing_moves(driver: Driver, driver_name: str, depth: int, record: Record) -> None:
    """Every order of so many moves with forks."""
    explored = explore_on(driver, depth, SHARING_MOVES, n_slots=3)
    assert explored.n_schedules > 10_000
    show(record, f"every sequence of {depth} moves with forks and truncations", driver_name, explored)


def test_every_sequence_of_sharing_moves_agrees_with_the_model(
    driver: Driver, driver_name: str, record: Record
) -> None:
    make_every_sequence_of_sharing_moves(driver, driver_name, SHARING_DEPTH, record)


def test_the_explorer_finds_what_is_unmapped_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    unmaps_too_early(monkeypatch)
    with pytest.raises(AssertionError, match="->"):
        explore_on(open_driver("native"), 5)


def make_every_sequence_of_moves(driver: Driver, driver_name: str, depth: int, record: Record) -> None:
    """Every order of so many moves."""
    explored = explore_on(driver, depth)
    assert explored.n_schedules > 1_000_000
    show(record, f"every sequence of {depth} moves", driver_name, explored)


def test_every_sequence_of_moves_agrees_with_the_model(driver: Driver, driver_name: str, record: Record) -> None:
    make_every_sequence_of_moves(driver, driver_name, DEPTH, record)


# Each call in the middle of each other, from every state.


class Two(Middle):
    """A lab whose next two calls overlap. Sequences are those that there were before the first of them."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab.run, STEP)
        self.first, self.second, *_ = [*lab.live, None, None]
        self.last = lab.live[-1] if len(lab.live) > 1 else None
        self.fences = [fence for _, fence, _ in self.run.fences.values()]

    def premap(self, slots: Iterable[int | None], n_tokens: int) -> None:
        there = [slot for slot in slots if slot in self.lengths]
        self.cache.premap({SlotId(slot): min(MAX_TOKENS, self.lengths[slot] + n_tokens) for slot in there})

    def retire(self, slot: int | None) -> None:
        if slot in self.lengths:
            del self.lengths[slot]
            self.fences.append(ManualFence())
            self.cache.retire(SlotId(slot), self.fences[-1])

    def share(self) -> None:
        """The last goes on from the first one's tokens, as many as it has: a beam that changes its place."""
        first, last = self.first, self.last
        if first in self.lengths and last in self.lengths and self.lengths[first] >= self.lengths[last]:
            n_tokens = self.lengths[last]
            self.cache.share({SlotId(last): SlotId(first)}, n_tokens)
            base = self.cache.region.reservation.base
            self.run.base.copy(tail_copies(self.run.layout, base, SlotId(first), SlotId(last), n_tokens))
            self.run.tags.fork(first, last, n_tokens)

    def pass_fence(self) -> None:
        if self.fences:
            self.fences.pop(0).pass_()
        self.cache.reclaim(0)

    def reclaim(self) -> None:
        self.cache.reclaim(3)

    def verify(self) -> None:
        for fence in self.fences:
            fence.pass_()
        super().verify()


class Call(NamedTuple):
    """A call, and whose steps it makes: the contract leaves those of one sequence to one thread."""

    make: Callable[[Two], None]
    steps: frozenset[str] = frozenset()


ALONE: dict[str, Call] = {
    "grow the first": Call(lambda two: two.grow(two.first), frozenset({"first"})),
    "retire the first": Call(lambda two: two.retire(two.first), frozenset({"first"})),
    "pass a fence": Call(Two.pass_fence),
    "reclaim": Call(Two.reclaim),
}

CALLS: dict[str, Call] = ALONE | {
    "grow the second": Call(lambda two: two.grow(two.second), frozenset({"second"})),
    "retire the second": Call(lambda two: two.retire(two.second), frozenset({"second"})),
    "premap": Call(lambda two: two.premap([*two.lengths], 2 * STEP)),
    "acquire": Call(lambda two: two.acquire("c")),
}

SHARING_CALLS: dict[str, Call] = ALONE | {
    "fork the first": Call(lambda two: two.fork(two.first)),
    "truncate the first": Call(lambda two: two.truncate(two.first), frozenset({"first"})),
    "grow the last": Call(lambda two: two.grow(two.last), frozenset({"last"})),
    "truncate the last": Call(lambda two: two.truncate(two.last), frozenset({"last"})),
    "premap the last": Call(lambda two: two.premap([two.last], STEP)),
    "vacate the last": Call(lambda two: two.vacate(two.last), frozenset({"last"})),
    "share": Call(Two.share, frozenset({"first", "last"})),
    "adopt": Call(lambda two: two.acquire("a")),
}


def overlap_all(
    driver: Driver,
    paths: Iterable[Path],
    calls: dict[str, Call] = CALLS,
    moves: dict[str, Callable[[Lab], bool]] = MOVES,
    n_slots: int = N_SLOTS,
) -> Counter[str]:
    """Try each call at every moment of each other, after every path; see `overlap`."""
    hook, counts = CallHook(driver), Counter[str]()
    for path in paths:

        def begin(path: Path = path) -> Two:
            return Two(walk(lambda: Lab(hook, n_slots), moves, path))

        for (outer_name, outer), (inner_name, inner) in product(calls.items(), repeat=2):
            if not outer.steps & inner.steps:
                what = f"{inner_name!r} in the middle of {outer_name!r}, after {' -> '.join(path)}"
                counts += overlap(hook, begin, outer.make, inner.make, what)
    return counts


def make_every_call_in_the_middle(driver: Driver, driver_name: str, depth: int, record: Record) -> None:
    """Every call at every moment of every other, from every state of so many moves at most."""
    states = explore_on(driver, depth).states
    counts = overlap_all(driver, states.values())
    assert counts["overlaps"] > 2000
    assert 0 < counts["had_to_wait"] < counts["overlaps"]
    record("each call at each moment of each other", driver_name, states=len(states), **counts)


def test_every_call_may_come_in_the_middle_of_every_other(driver: Driver, driver_name: str, record: Record) -> None:
    make_every_call_in_the_middle(driver, driver_name, STATES_DEPTH, record)


def make_every_call_where_pages_are_shared(
    driver: Driver, driver_name: str, paths: Collection[Path], record: Record
) -> None:
    """Every call at every moment of every other, after these paths."""
    counts = overlap_all(driver, paths, SHARING_CALLS, SHARING_MOVES, n_slots=3)
    assert counts["overlaps"] > 2000
    assert 0 < counts["had_to_wait"] < counts["overlaps"]
    record("each call at each moment of each other, of which some share", driver_name, states=len(paths), **counts)


def test_every_call_may_come_in_the_middle_of_what_shares(driver: Driver, driver_name: str, record: Record) -> None:
    make_every_call_where_pages_are_shared(driver, driver_name, SHARED, record)


def paths_that_share(driver: Driver, depth: int) -> list[Path]:
    """To every state of so many moves at most in which a sequence was forked."""
    states = explore_on(driver, depth, SHARING_MOVES, n_slots=3).states
    return [path for path in states.values() if "fork the first" in path]


def test_the_paths_to_what_shares_are_some_of_all() -> None:
    assert set(SHARED) < set(paths_that_share(open_driver("native"), 3))


SHARING_RACE = {name: SHARING_CALLS[name] for name in ("fork the first", "truncate the first")}


@pytest.mark.parametrize(
    ("path", "calls", "moves"),
    [(("grow the first",), CALLS, MOVES), (SHARED[0], SHARING_RACE, SHARING_MOVES)],
    ids=["any", "what shares"],
)
def test_the_explorer_finds_a_planted_race(
    path: Path, calls: dict[str, Call], moves: dict[str, Callable[[Lab], bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two calls that work on one slot at a time, because nobody says that it is busy."""

    @contextmanager
    def careless(claims: Claims, slot_ids: object) -> Iterator[None]:
        yield

    monkeypatch.setattr(Claims, "exclusive", careless)
    with pytest.raises(AssertionError, match="in the middle of"):
        overlap_all(open_driver("native"), [path], calls, moves, n_slots=3)


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
