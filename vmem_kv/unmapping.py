"""Unmapping, and what becomes of ranges that cannot be unmapped.

Guarantees
  * A page goes back to the pool with its last mapping (`shares.py`), and not before.
  * A page whose unmap fails goes to quarantine, and its slot is *broken*: nobody uses that range. What was refused for
    lack of mappings, or interrupted, `retry` tries again, and the slot is whole when it succeeds.
  * Where one range fails, or Ctrl-C comes in between, the others go on.

Assumptions: nothing on the device touches what is unmapped, and it is in no table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from vmem_kv.driver.base import Handle
from vmem_kv.errors import CapacityError, UsageError, VmemError
from vmem_kv.growth import GrowthPlan, SlotId
from vmem_kv.page_table import MappedRange, PageTable
from vmem_kv.pages import PagePool


class Stuck(NamedTuple):
    """A range that could not be unmapped; its pages are in quarantine."""

    slot_id: SlotId
    range: MappedRange
    may_pass: bool  # the refusal can end: worth another try before the region is closed
    is_certain: bool  # whether it is mapped at all


class Unmapper:
    """Unmaps for one region, and knows what is stuck in it."""

    def __init__(self, pool: PagePool, table: PageTable) -> None:
        self._pool = pool
        self._table = table
        self.stuck: list[Stuck] = []
        self.damaged: set[SlotId] = set()
        """Slots that lost pages they should have. They are whole again when they are unmapped."""

    @property
    def broken(self) -> set[SlotId]:
        """Slots with a range that could not be unmapped, or that lost pages they should have."""
        return {stuck.slot_id for stuck in self.stuck} | self.damaged

    @property
    def may_mend(self) -> set[SlotId]:
        """Broken slots for which `retry` may help."""
        return {stuck.slot_id for stuck in self.stuck if stuck.may_pass}

    def unmap(self, ranges: Sequence[MappedRange], unmapped: Sequence[Handle] = (), *, is_certain: bool = True) -> int:
        """Unmap ranges that are in no table and let go of their pages, and of the `unmapped` ones.

        A range that fails is quarantined and its slot broken; the others go on. Raises the first failure at the end.
        After an interruption, which does not say how far the driver came, the rest goes one by one; after a second one
        it is stuck, to be tried again. Returns how many pages went back to the pool.

        Args:
            ranges: What to unmap.
            unmapped: Pages that are mapped nowhere.
            is_certain: Whether the ranges are known to be mapped. If not, they go one by one, and a driver that
                answers that nothing is mapped there is believed.
        """
        failure: BaseException | None = None
        freed, rest, was_interrupted = list(unmapped), list(ranges), False
        while rest:
            batch = rest if is_certain else rest[:1]
            n_stuck = 0
            try:
                self._pool.driver.unmap([span for span, _ in batch])
                n_done = len(batch)
            except VmemError as error:
                if is_certain or not isinstance(error, UsageError):
                    failure, n_done, n_stuck = failure or error, error.n_done, 1
                    may_pass = isinstance(error, CapacityError)
                    self.leave_stuck(batch[n_done : n_done + 1], may_pass=may_pass, is_certain=is_certain)
                else:
                    n_done = 1
            except BaseException as error:
                n_done = 0
                if was_interrupted:
                    n_stuck = len(rest)
                    self.leave_stuck(rest, may_pass=True, is_certain=False)
                failure, was_interrupted, is_certain = error, True, False
            for _, handles in rest[:n_done]:
                freed += handles
            rest = rest[n_done + n_stuck :]
        n_freed = 0
        try:
            n_freed = self.let_go(freed)
        except VmemError as error:
            failure = failure or error
        if failure is not None:
            raise failure
        return n_freed

    def let_go(self, handles: Sequence[Handle]) -> int:
        """Let go of pages that are mapped nowhere by us; return how many went back to the pool.

        Raises:
            DriverError: As `PagePool.give`.
        """
        shares = self._table.shares
        if not shares:
            self._pool.give(handles)
            return len(handles)
        with self._pool.lock:
            free, lost = shares.drop(handles)
        self._pool.quarantine(lost)
        self._pool.give(free)
        return len(free)

    def leave_stuck(self, ranges: Sequence[MappedRange], *, may_pass: bool, is_certain: bool) -> None:
        """Leave ranges where they are, their pages in quarantine and their slots broken."""
        for span, handles in ranges:
            with self._pool.lock:
                lost = self._table.shares.get_stuck(handles)
            self._pool.quarantine(lost)
            with self._pool.lock:
                self.stuck.append(Stuck(self._table.slot_at(span[0]), (span, handles), may_pass, is_certain))

    def retry(self, is_worth: Callable[[Stuck], bool]) -> int:
        """Try once more to unmap stuck ranges; return how many pages went back. Nobody else works on their slots.

        Raises:
            DriverError: Some are stuck still; the others went back.
        """
        with self._pool.lock:
            again = [stuck for stuck in self.stuck if is_worth(stuck)]
            self.stuck = [stuck for stuck in self.stuck if stuck not in again]
            for stuck in again:
                self._pool.unquarantine(self._table.shares.retry(stuck.range[1]))
        n_freed = 0
        try:
            n_freed += self.unmap([stuck.range for stuck in again if stuck.is_certain])
        finally:
            unsure = [stuck.range for stuck in again if not stuck.is_certain]
            n_freed += self.unmap(unsure, is_certain=False)
        return n_freed

    def forget(self) -> None:
        """Count what is stuck as gone: the device is lost, and its pages with it."""
        with self._pool.lock:
            for stuck in self.stuck:
                self._pool.forget(self._table.shares.retry(stuck.range[1]))
            self.stuck = []


def ranges_of(plan: GrowthPlan, handles: Sequence[Handle], n_mapped: int) -> list[MappedRange]:
    """The first `n_mapped` pages of a plan as contiguous ranges, for undoing a map that broke off there."""
    ranges: list[MappedRange] = []
    first = 0
    for run in plan.runs:
        n_pages = min(run.n_pages, n_mapped - first)
        if n_pages > 0:
            ranges.append(((run.address, n_pages * plan.page_bytes), list(handles[first : first + n_pages])))
            first += n_pages
    return ranges


def pages_of(plan: GrowthPlan, handles: Sequence[Handle]) -> list[MappedRange]:
    """The pages of a plan one by one, where nobody knows which of them are mapped."""
    return [((place, plan.page_bytes), [handle]) for place, handle in zip(plan.places, handles, strict=False)]
