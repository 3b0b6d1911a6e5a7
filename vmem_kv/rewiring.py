"""Replacing what lies under slots: by pages that lie under others too, or by new ones. It can be taken back.

    alias what is mapped once more ─▶ cut off what is replaced, and hold it ─▶ map instead ─▶ keep, or take back

Guarantees
  * What was cut off stays ours until `keep`: to put it back needs no page, and no mapping that was not charged before.
  * Where even that fails, the slots are broken, and what could not be mapped again is missing at their ends.

Assumptions: nobody else works on these slots, and nothing on the device touches what is replaced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vmem_kv.driver.base import Handle
from vmem_kv.errors import DriverError, VmemError
from vmem_kv.growth import GrowthPlan, PageRange, Run
from vmem_kv.mapping import PageMapper
from vmem_kv.page_table import PageTable
from vmem_kv.pages import PagePool
from vmem_kv.sharing import Rewiring
from vmem_kv.unmapping import Unmapper, pages_of


class Rewired(NamedTuple):
    """What was exchanged, and what it replaced, which is kept to be put back. `keep` or `take_back` ends it."""

    changes: Sequence[Rewiring]
    plan: GrowthPlan
    handles: list[Handle]
    old_plan: GrowthPlan
    old_handles: list[Handle]
    empty: list[tuple[Rewiring, PageRange]]
    """Changes of what had no pages, and where it had them last."""
    n_mappings: int
    """What is charged for these rows: enough for either."""


class Rewirer:
    """Rewires the slots of one region."""

    def __init__(self, pool: PagePool, table: PageTable, mapper: PageMapper, unmapper: Unmapper) -> None:
        self._pool = pool
        self._table = table
        self._mapper = mapper
        self._unmapper = unmapper

    def begin(self, changes: Sequence[Rewiring], fill: Callable[[], object], commit: Callable[[], object]) -> Rewired:
        """Replace what lies under slots from some page on, by pages that lie under others or by new ones.

        Nothing on the device may touch what is replaced. `keep` or `take_back` must follow, with nothing in between
        that uses these slots.

        Args:
            changes: At most one per slot and plane.
            fill: Called when everything is mapped, before it counts: it writes the new pages. If it raises, all of
                this is undone; what it launched is waited for.
            commit: Called in the moment from which on it counts, with the pool's lock held; it cannot fail.

        Raises:
            CapacityError: Nothing changed.
            DriverError: Undone. Where that failed as well, the slot is broken, and what could not be mapped again is
                missing at its end.
        """
        pool = self._pool
        given = [handle for change in changes for handle in change.handles]
        plan = self._plan_of(changes)
        new_places = [place for place, handle in zip(plan.places, given, strict=True) if handle is None]
        new, n_used = pool.take(new_places) if new_places else ([], 0)
        unused = iter(new)
        handles = [next(unused) if handle is None else handle for handle in given]
        n_mappings = self._count_mappings(changes)
        # At worst, and before anything is cut: to undo that, what it freed is needed again.
        n_charged = len(handles) * pool.driver.info.mappings_per_run
        try:
            pool.charge_mappings(n_charged)
        except BaseException:
            self._unmapper.let_go(new)
            raise
        n_needed = 0
        try:
            rewired = self._exchange(changes, plan, handles, new_places[:n_used], fill, commit)
            n_needed = n_mappings
        finally:
            with pool.lock:
                n_needed = max(n_needed, self._count_mappings(changes))
                pool.forget_mappings(n_charged + n_mappings - n_needed)
        return rewired._replace(n_mappings=n_needed)

    def keep(self, rewired: Rewired) -> None:
        """Let go of what was replaced. A page that cannot be released is counted as lost."""
        self._refund_spare(rewired)
        with contextlib.suppress(VmemError):  # it is done
            self._unmapper.let_go(rewired.old_handles)

    def take_back(self, rewired: Rewired) -> None:
        """Put back what was replaced. Nothing on the device may touch what replaced it.

        Raises:
            DriverError: The slots are broken: they have neither, or each other's pages.
        """
        changes, plan, handles, old_plan, old_handles, empty, _ = rewired
        slot_ids = {change.slot_id for change in changes}
        with self._pool.lock:
            self._table.shares.alias(handles)  # so that they stay ours while they are cut off
        try:
            try:
                self._cut(changes, plan, handles)
            except BaseException:
                with self._pool.lock:
                    self._unmapper.damaged |= slot_ids
                with contextlib.suppress(VmemError):
                    self._unmapper.let_go(old_handles)
                raise
            try:
                self._put_back(old_plan, old_handles)
            finally:
                self._restore_places(empty)
                with contextlib.suppress(VmemError):  # a page that could not be released is counted as lost
                    self._unmapper.let_go(handles)
            if slot_ids & self._unmapper.broken:
                raise DriverError("map", 0, "STUCK", detail="what was exchanged could not be put back")
        finally:
            self._refund_spare(rewired)

    def _exchange(
        self,
        changes: Sequence[Rewiring],
        plan: GrowthPlan,
        handles: list[Handle],
        dirty: Sequence[int],
        fill: Callable[[], object],
        commit: Callable[[], object],
    ) -> Rewired:
        """Cut off what the changes replace, map `handles` instead; see `begin`."""
        table = self._table
        as_it_is = [self._as_it_is(change) for change in changes]
        old = self._plan_of(as_it_is)
        old_handles = [handle for change in as_it_is for handle in change.handles if handle is not None]
        with self._pool.lock:
            table.shares.alias(handle for change in changes for handle in change.handles if handle is not None)
            table.shares.alias(old_handles)  # so that they stay ours, to be put back
            without = [change for change in changes if not table.handles[change.slot_id][change.plane_index]]
            empty = [(change, table.mapped[change.slot_id][change.plane_index]) for change in without]
            for slot_id, plane_index, first, _ in without:
                table.place(slot_id, plane_index, PageRange(first, first))
        try:
            try:
                self._cut(changes, old, old_handles)
            except BaseException:
                self._unmapper.let_go(handles)
                raise
            try:
                self._mapper.map(plan, handles, dirty, fill, commit)
            except BaseException:
                self._put_back(old, old_handles)
                raise
        except BaseException:
            self._restore_places(empty)
            raise
        return Rewired(changes, plan, handles, old, old_handles, empty, 0)

    def _cut(self, changes: Sequence[Rewiring], old: GrowthPlan, handles: list[Handle]) -> None:
        """Unmap what changes replace; they hold its pages still. After a failure it is mapped again, and not held."""
        if not handles:
            return
        pool, table = self._pool, self._table
        with pool.lock:
            table.cut_off(changes, handles)
        try:
            pool.driver.unmap([(run.address, run.n_pages * old.page_bytes) for run in old.runs])
        except VmemError as error:
            n_runs = error.n_done
            n_done = sum(run.n_pages for run in old.runs[:n_runs])
            with pool.lock:
                table.enter(GrowthPlan(old.runs[n_runs:], [], 0, old.page_bytes), handles[n_done:])
                table.shares.drop(handles)  # in the table again, or held
            done = GrowthPlan(old.runs[:n_runs], old.places[:n_done], n_done, old.page_bytes)
            self._put_back(done, handles[:n_done])
            raise
        except BaseException:  # says nothing about how far it came
            try:
                with contextlib.suppress(VmemError):
                    self._unmapper.unmap(pages_of(old, handles), is_certain=False)
            finally:  # interrupted again
                self._put_back(old, handles)
            raise
        with pool.lock:
            table.shares.drop(handles)  # held

    def _put_back(self, plan: GrowthPlan, handles: list[Handle]) -> None:
        """Map again what was cut off; its pages are held. Where that fails, they go, and their slots are broken."""
        if not handles:
            return
        slot_ids = {run.slot_id for run in plan.runs}
        try:
            if slot_ids & self._unmapper.broken:  # something else may be stuck in these places
                self._unmapper.let_go(handles)
                raise DriverError("map", 0, "STUCK", detail="the place is not free")
            self._mapper.map(plan, handles, [])
        except BaseException as failure:
            with self._pool.lock:
                self._unmapper.damaged |= slot_ids
            if not isinstance(failure, VmemError):
                raise

    def _restore_places(self, empty: Sequence[tuple[Rewiring, PageRange]]) -> None:
        """Let planes that had no pages begin where they began before."""
        with self._pool.lock:
            for change, pages in empty:
                self._table.place(change.slot_id, change.plane_index, pages)

    def _refund_spare(self, rewired: Rewired) -> None:
        with self._pool.lock:
            self._pool.forget_mappings(rewired.n_mappings - self._count_mappings(rewired.changes))

    def _plan_of(self, changes: Sequence[Rewiring]) -> GrowthPlan:
        """The runs and places of what changes map."""
        page_bytes = self._table.layout.page_bytes
        runs: list[Run] = []
        places: list[int] = []
        for slot_id, plane_index, first, handles in changes:
            if handles:
                address, n_bytes = self._table.span(slot_id, plane_index, first, first + len(handles))
                runs.append(Run(slot_id, plane_index, address, len(handles)))
                places += range(address, address + n_bytes, page_bytes)
        return GrowthPlan(tuple(runs), places, len(places), page_bytes)

    def _as_it_is(self, change: Rewiring) -> Rewiring:
        """The change that would put back what a change replaces."""
        n_before = change.first - self._table.mapped[change.slot_id][change.plane_index].first
        return change._replace(handles=self._table.handles[change.slot_id][change.plane_index][n_before:])

    def _count_mappings(self, changes: Sequence[Rewiring]) -> int:
        """What the rows of changes cost now of the driver's mappings."""
        table = self._table
        return sum(table.count_mappings(table.handles[change.slot_id][change.plane_index]) for change in changes)
