"""Mapping what a plan says: take pages, map them, make them accessible, scrub them, enter them; or undo all of it.

    take ─▶ driver.map ─▶ driver.set_access ─▶ scrub what holds old bytes ─▶ table.enter

Guarantees
  * Every run of a plan is mapped or none. Its pages are in the table at the end, or back in the pool, but for those
    that had to be quarantined.
  * The table changes last, in one step under the pool's lock; it cannot fail.

Assumptions: nobody else works on the plan's slots.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from vmem_kv.driver.base import Handle, Span
from vmem_kv.errors import VmemError
from vmem_kv.growth import GrowthPlan
from vmem_kv.page_table import PageTable
from vmem_kv.pages import PagePool
from vmem_kv.unmapping import Unmapper, pages_of, ranges_of


class PageMapper:
    """Maps for one region."""

    def __init__(self, pool: PagePool, table: PageTable, unmapper: Unmapper) -> None:
        self._pool = pool
        self._table = table
        self._unmapper = unmapper

    def grow(self, plan: GrowthPlan) -> None:
        """Take pages for the plan's runs and map them. Those that hold old bytes are scrubbed. See `Region.map`."""
        handles, n_used, n_mappings = self._take(plan)
        try:
            self.map(plan, handles, plan.places[:n_used])
        except BaseException:
            self._pool.refund_mappings(n_mappings)
            raise

    def map(
        self,
        plan: GrowthPlan,
        handles: list[Handle],
        dirty: Sequence[int],
        fill: Callable[[], object] | None = None,
        commit: Callable[[], object] = lambda: None,
    ) -> None:
        """Map pages that are in no table yet, scrub the `dirty` places, let `fill` write, and put them in the table.

        Args:
            plan: Where they go.
            handles: The pages, in the order of its places.
            dirty: Places of pages that hold old bytes.
            fill: Writes to them before they count.
            commit: Called with the pool's lock held, in the moment from which on they count.

        Raises:
            VmemError: All of it is undone, and the pages are let go.
        """
        driver = self._pool.driver
        n_mapped: int | None = None  # unknown while the driver is at it
        may_be_writing = False
        try:
            if plan.runs:
                try:
                    driver.map(plan.page_bytes, plan.places, handles)
                except VmemError as error:
                    n_mapped = error.n_done
                    raise
                n_mapped = len(handles)
                driver.set_access([(run.address, run.n_pages * plan.page_bytes) for run in plan.runs])
            may_be_writing = bool(dirty) or fill is not None
            if dirty:
                driver.scrub(_adjacent(dirty, plan.page_bytes))
            if fill is not None:
                fill()
        except BaseException as failure:
            must_wait = may_be_writing and (fill is not None or not isinstance(failure, VmemError))
            # The first error is the one to report; what failed while undoing it is in the quarantine count.
            with contextlib.suppress(VmemError):
                self._undo(plan, handles, n_mapped, must_wait=must_wait)
            raise
        with self._pool.lock:
            self._table.enter(plan, handles)
            commit()

    def _take(self, plan: GrowthPlan) -> tuple[list[Handle], int, int]:
        """Return pages for a plan, how many of them hold old bytes, and the mappings charged for them."""
        pool, table = self._pool, self._table
        # Free pages have any name and merge with nothing, at worst; new ones are named by their places.
        n_free = min(pool.n_free, plan.n_pages)
        expected = [*map(Handle, range(-2, -2 - 2 * n_free, -2)), *map(Handle, plan.places[n_free:])]
        n_charged = table.count_new_mappings(plan, expected)
        pool.charge_mappings(n_charged)
        try:
            handles, n_used = pool.take(plan.places)
        except BaseException:
            pool.refund_mappings(n_charged)
            raise
        n_mappings = table.count_new_mappings(plan, handles)
        try:
            pool.charge_mappings(n_mappings - n_charged)
        except BaseException:
            pool.refund_mappings(n_charged)
            pool.give(handles)
            raise
        return handles, n_used, n_mappings

    def _undo(self, plan: GrowthPlan, handles: list[Handle], n_mapped: int | None, *, must_wait: bool) -> None:
        """Unmap the first `n_mapped` pages of a plan, or whichever of them are mapped, and let go of all.

        Args:
            plan: What was to be mapped.
            handles: Its pages.
            n_mapped: None where nobody knows.
            must_wait: Whether the device may be writing there: an unmap waits for nothing. Where it cannot be waited
                for, the pages stay where they are, for good.

        Raises:
            VmemError: Pages are quarantined, and their slots broken.
        """
        if n_mapped is None:
            self._unmapper.unmap(pages_of(plan, handles), is_certain=False)
            return
        ranges = ranges_of(plan, handles, n_mapped)
        if must_wait:
            try:
                self._pool.driver.fence().wait()
            except BaseException:
                self._unmapper.leave_stuck(ranges, may_pass=False, is_certain=True)
                raise
        self._unmapper.unmap(ranges, handles[n_mapped:])


def _adjacent(places: Sequence[int], page_bytes: int) -> list[Span]:
    """Pages in order of their places, neighbours joined."""
    spans: list[Span] = []
    for place in places:
        if spans and sum(spans[-1]) == place:
            spans[-1] = (spans[-1][0], spans[-1][1] + page_bytes)
        else:
            spans.append((place, page_bytes))
    return spans
