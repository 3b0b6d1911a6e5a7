"""What the explorers share: when two states are equal, one call in the middle of another, and how it is recorded.

A *lab* is a run with moves that need no arguments. A *middle* is a lab two of whose calls overlap, as those of two
threads could: what happens there goes past the model, which knows no half calls. The books, the tags and the rows must
be right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from typing import TypeVar

from vmem_kv.errors import CapacityError, DriverError, VmemError
from vmem_kv.growth import SlotId
from vmem_kv.testing.explorer import CallHook, Explored
from vmem_kv.testing.model import ReferenceModel
from vmem_kv.testing.operations import MAX_TOKENS, Run

from .conftest import Record

M = TypeVar("M", bound="Middle")


def arrangement(model: ReferenceModel) -> Hashable:
    """What lies where, which pages lie under two slots, who is reclaimed first, and how many pages are free."""
    slots = tuple((s.state, s.n_tokens, tuple(s.ends), s.domain if any(s.ends) else "") for s in model.slots)
    first_home = {frame: page for page, frame in sorted(model.pages.items(), reverse=True)}
    shared = tuple(
        sorted((page, first_home[frame]) for page, frame in model.pages.items() if page != first_home[frame])
    )
    return slots, shared, tuple(model.reclaim_order()), model.n_free


class Middle:
    """A run two of whose calls overlap.

    Args:
        run: The run. Its driver calls pass a `CallHook`.
        step_tokens: How far a sequence grows at a time.
    """

    def __init__(self, run: Run, step_tokens: int) -> None:
        self.run, self.cache, self.step_tokens = run, run.cache, step_tokens
        self.lengths = {slot: run.model.slots[slot].n_tokens for slot in run.live()}
        self.n_blocked = 0

    def grow(self, slot: int | None) -> None:
        """Let a sequence grow and write its new rows, if it is there still."""
        if slot in self.lengths:
            longer = min(MAX_TOKENS, self.lengths[slot] + self.step_tokens)
            self.cache.ensure({SlotId(slot): longer})
            self.run.tags.write(slot, self.lengths[slot], longer, slot + 1000)
            self.lengths[slot] = longer

    def acquire(self, domain: str) -> None:
        """Begin a sequence, maybe in a slot that is warm, and let it grow."""
        slot = self.cache.acquire(expected_tokens=self.step_tokens, domain=domain)
        self.lengths[slot] = 0
        self.grow(slot)

    def fork(self, slot: int | None) -> None:
        """Begin a sequence with all but the last token of another one."""
        if self.lengths.get(slot, 0) > 1:  # type: ignore[arg-type]
            n_tokens = self.lengths[slot] - 1  # type: ignore[index]
            target = self.cache.fork(SlotId(slot), n_tokens)  # type: ignore[arg-type]
            self.run.tags.fork(slot, target, n_tokens)  # type: ignore[arg-type]
            self.lengths[target] = n_tokens

    def truncate(self, slot: int | None) -> None:
        """Cut a sequence in half, also within what it shares."""
        if slot in self.lengths:
            self.cache.truncate(SlotId(slot), self.lengths[slot] // 2)
            self.lengths[slot] //= 2

    def vacate(self, slot: int | None) -> None:
        """Give back a sequence's pages, as a park does when it has read them."""
        if slot in self.lengths:
            self.cache.vacate(SlotId(slot))
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
        """Everything adds up, every sequence has its rows, and in the end nothing is left."""
        self.cache.check()
        for slot, n_tokens in self.lengths.items():
            assert self.cache.n_tokens(SlotId(slot)) == n_tokens
            self.run.tags.verify(slot, 0, n_tokens)
        self.cache.retire(self.cache.active_slots())
        self.cache.settle()
        self.cache.close()
        self.run.pool.trim()
        nothing_is_left(self.run)


def nothing_is_left(run: Run) -> None:
    """The driver has nothing of a run that was closed."""
    driver = run.driver
    left = (driver.n_live_mappings, driver.n_live_reservations, driver.n_live_handles, driver.n_pinned)
    assert left == (0, 0, 0, 0), left


def overlap(
    hook: CallHook, begin: Callable[[], M], outer: Callable[[M], None], inner: Callable[[M], None], what: str
) -> Counter[str]:
    """Make the inner call at every moment of the outer one, in a life of its own each time.

    Args:
        hook: What the driver calls of every life pass.
        begin: Begins a life.
        outer: The call that is interrupted.
        inner: The call that comes in between.
        what: Their names, for the message.

    Returns:
        How many `overlaps`, and how many times one `had_to_wait` for the other.

    Raises:
        AssertionError: Something is wrong; the message says at which moment.
    """
    counts: Counter[str] = Counter()
    at = 1
    while True:
        middle = begin()
        hook.arm(at, lambda middle=middle: middle.tolerant(lambda: inner(middle)))  # type: ignore[misc]
        try:
            middle.tolerant(lambda middle=middle: outer(middle))  # type: ignore[misc]
            has_overlapped = hook.n_moments >= at
            hook.arm(0, lambda: None)
            middle.verify()
        except (AssertionError, VmemError) as error:
            raise AssertionError(f"{what}, at moment {at}: {error!r}") from error
        if not has_overlapped:
            return counts
        counts.update(overlaps=1, had_to_wait=middle.n_blocked)
        at += 1


def show(record: Record, what: str, driver_name: str, explored: Explored) -> None:
    """Record what was explored."""
    record(
        what,
        driver_name,
        schedules=explored.n_schedules,
        states=len(explored.states),
        runs=explored.n_runs,
    )
