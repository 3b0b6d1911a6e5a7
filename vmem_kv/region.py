"""A reservation and its mappings: the only file that maps and unmaps.

Guarantees
  * `map` maps every run of a plan or none. The pages that it takes are mapped at the end, or back in the pool.
  * The table (which handle lies where) changes only under the pool's lock, after the driver call succeeded.
  * A page whose unmap fails goes to quarantine, and its slot is `broken`: nobody uses that range. What was refused for
    lack of mappings, or interrupted, `retry` tries again, and the slot is whole when it succeeds; `close` tries all.

Assumptions: the cache above lets no two calls work on one slot at a time, and calls `unmap` only behind a fence.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from vmem_kv.driver.base import Handle, Span
from vmem_kv.errors import CapacityError, DriverError, InvariantError, UsageError, VmemError
from vmem_kv.growth import GrowthPlan, PageRange, SlotId
from vmem_kv.layout import Layout
from vmem_kv.pages import PagePool

_Range = tuple[Span, list[Handle]]
"""A contiguous virtual range and the pages in it."""


class _Stuck(NamedTuple):
    """A range that could not be unmapped; its pages are in quarantine."""

    slot_id: SlotId
    range: _Range
    may_pass: bool  # the refusal can end: worth another try before the region is closed
    is_certain: bool  # whether it is mapped at all


class Region:
    """The virtual range of one layout, and what is mapped in it."""

    def __init__(self, pool: PagePool, layout: Layout) -> None:
        self.pool = pool
        self.layout = layout
        self.reservation = pool.driver.reserve(layout.virtual_bytes)
        self.mapped: dict[SlotId, list[PageRange]] = {}
        self._handles: dict[SlotId, list[list[Handle]]] = {}
        self._stuck: list[_Stuck] = []
        self._may_be_freed = False
        for index in range(layout.n_slots):
            self.mapped[SlotId(index)] = [PageRange(0, 0)] * len(layout.planes)
            self._handles[SlotId(index)] = [[] for _ in layout.planes]

    @property
    def broken(self) -> set[SlotId]:
        """Slots with a range that could not be unmapped."""
        return {stuck.slot_id for stuck in self._stuck}

    @property
    def may_mend(self) -> set[SlotId]:
        """Broken slots for which `retry` may help."""
        return {stuck.slot_id for stuck in self._stuck if stuck.may_pass}

    def n_pages(self, slot_id: SlotId) -> int:
        """Pages mapped under a slot, over all planes."""
        return sum(end - first for first, end in self.mapped[slot_id])

    def token_capacity(self, slot_id: SlotId) -> int:
        """Tokens, counted from the slot's start, that end inside its mapped pages."""
        return self.layout.token_capacity([end for _, end in self.mapped[slot_id]])

    def has_front(self, slot_id: SlotId) -> bool:
        """Whether no plane's first pages were given up."""
        return all(first == 0 for first, _ in self.mapped[slot_id])

    def map(self, plan: GrowthPlan) -> None:
        """Take pages for the plan's runs and map them. Those that hold old bytes are scrubbed.

        Raises:
            OutOfMappings: Nothing changed. By our own count it is known before any driver call, unless pages had to
                be created apart from their places.
            OutOfPages: Nothing changed.
            DriverError: Undone; the pages are back in the pool, but for those that had to be quarantined.
        """
        handles, n_used, n_mappings = self._take(plan)
        driver, places = self.pool.driver, plan.places
        n_mapped: int | None = None  # unknown while the driver is at it
        may_be_scrubbing = False
        try:
            try:
                driver.map(plan.page_bytes, places, handles)
            except VmemError as error:
                n_mapped = error.n_done
                raise
            n_mapped = len(handles)
            driver.set_access([(run.address, run.n_pages * plan.page_bytes) for run in plan.runs])
            if n_used:
                may_be_scrubbing = True
                driver.scrub(_adjacent(places[:n_used], plan.page_bytes))
        except BaseException as failure:
            self.pool.refund_mappings(n_mappings)
            # The first error is the one to report; what failed while undoing it is in the quarantine count.
            with contextlib.suppress(VmemError):
                if may_be_scrubbing and not isinstance(failure, VmemError):
                    driver.fence().wait()  # queued before the interruption, and an unmap waits for nothing
                if n_mapped is None:
                    pages = _ranges_of_plan(plan, handles, len(handles), page_by_page=True)
                    self._unmap_ranges(pages, [], is_certain=False)
                else:
                    self._unmap_ranges(_ranges_of_plan(plan, handles, n_mapped), handles[n_mapped:])
            raise
        first = 0
        with self.pool.lock:
            for slot_id, plane_index, _, n_pages in plan.runs:
                old = self.mapped[slot_id][plane_index]
                self.mapped[slot_id][plane_index] = PageRange(old.first, old.end + n_pages)
                self._handles[slot_id][plane_index] += handles[first : first + n_pages]
                first += n_pages
            self.pool.n_in_flight -= plan.n_pages
            self.pool.n_mapped += plan.n_pages

    def unmap(self, slot_id: SlotId, keep_from: Sequence[int] | None = None) -> int:
        """Unmap a slot's pages and give them to the pool; with `keep_from`, per plane, only those before that page.

        Returns:
            How many pages went back.

        Raises:
            DriverError: Some pages are quarantined and the slot is broken; all the others went back.
        """
        ranges: list[_Range] = []
        with self.pool.lock:
            for plane_index, (first, end) in enumerate(self.mapped[slot_id]):
                cut = end if keep_from is None else min(max(keep_from[plane_index], first), end)
                # A window keeps its place even where nothing is left of it: the slot grows behind it.
                self.mapped[slot_id][plane_index] = PageRange(0, 0) if keep_from is None else PageRange(cut, end)
                if cut == first:
                    continue
                handles = self._handles[slot_id][plane_index]
                gone, kept = handles[: cut - first], handles[cut - first :]
                self.pool.forget_mappings(self._count_mappings(handles) - self._count_mappings(kept))
                self._handles[slot_id][plane_index] = kept
                ranges.append((self._span(slot_id, plane_index, first, cut), gone))
            n_pages = sum(len(handles) for _, handles in ranges)
            self.pool.n_mapped -= n_pages
            self.pool.n_in_flight += n_pages
        self._unmap_ranges(ranges, [])
        return n_pages

    def retry(self, is_worth: Callable[[_Stuck], bool]) -> int:
        """Try once more to unmap stuck ranges; return how many pages went back. Nobody else works on their slots.

        Raises:
            DriverError: Some are stuck still; the others went back.
        """
        with self.pool.lock:
            again = [stuck for stuck in self._stuck if is_worth(stuck)]
            self._stuck = [stuck for stuck in self._stuck if stuck not in again]
            for stuck in again:
                self.pool.unquarantine(stuck.range[1])
        try:
            self._unmap_ranges([stuck.range for stuck in again if stuck.is_certain], [])
        finally:
            self._unmap_ranges([stuck.range for stuck in again if not stuck.is_certain], [], is_certain=False)
        return sum(len(stuck.range[1]) for stuck in again)

    def reset(self, slot_id: SlotId) -> None:
        """Let a slot with nothing mapped begin at its front again. The caller holds the pool's lock."""
        self.mapped[slot_id] = [PageRange(0, 0)] * len(self.layout.planes)

    def scrub(self, slot_id: SlotId) -> None:
        """Fill a slot's mapped pages with zeros.

        Raises:
            DriverError: The slot's bytes are undefined, its mappings unchanged.
        """
        ranges = enumerate(self.mapped[slot_id])
        spans = [self._span(slot_id, i, first, end) for i, (first, end) in ranges if first < end]
        self.pool.driver.scrub(spans)

    def close(self) -> None:
        """Unmap everything and free the reservation. Slots must be idle and behind their fences.

        Raises:
            DriverError: Something could not be unmapped; the rest was. Calling again tries again. After a fatal error
                everything here is forgotten instead.
        """
        try:
            self._close()
        except DriverError as error:
            if not error.is_fatal:
                raise
            with self.pool.lock:
                for stuck in self._stuck:
                    self.pool.forget(stuck.range[1])
                self._stuck = []

    def _close(self) -> None:
        failure: VmemError | None = None
        for slot_id in self.mapped:
            try:
                self.unmap(slot_id)
            except VmemError as error:
                failure = failure or error
        if failure is not None:
            raise failure
        self.retry(lambda stuck: True)
        try:
            self.pool.driver.free_reservation(self.reservation)
        except UsageError:
            if not self._may_be_freed:
                raise
        except VmemError:
            raise
        except BaseException:  # nobody says whether it was freed before the interruption; the next try will tell
            self._may_be_freed = True
            raise

    def check(self) -> None:
        """Verify that table and layout agree. The caller holds the pool's lock.

        Raises:
            InvariantError: They do not.
        """
        for slot_id, ranges in self.mapped.items():
            for plane, (first, end), handles in zip(self.layout.planes, ranges, self._handles[slot_id], strict=True):
                if not 0 <= first <= end <= plane.span_bytes // self.layout.page_bytes:
                    raise InvariantError(f"slot {slot_id}: pages [{first}, {end}) lie outside of its plane")
                if end - first != len(handles) or len(set(handles)) != len(handles):
                    raise InvariantError(f"slot {slot_id}: {end - first} pages, handles {handles}")

    def handles(self) -> Mapping[SlotId, list[list[Handle]]]:
        """The table: per slot and plane, the handles of the mapped pages in order. For checks; do not change."""
        return self._handles

    def mapped_handles(self) -> list[Handle]:
        """Every page mapped here, whatever its slot's state. The caller holds the pool's lock."""
        return [handle for planes in self._handles.values() for handles in planes for handle in handles]

    def n_mappings(self) -> int:
        """What the mapped pages cost of the driver's mappings. The caller holds the pool's lock."""
        return sum(self._count_mappings(handles) for planes in self._handles.values() for handles in planes)

    def _span(self, slot_id: SlotId, plane_index: int, first: int, end: int) -> Span:
        plane, page_bytes = self.layout.planes[plane_index], self.layout.page_bytes
        start = self.reservation.base + plane.base_bytes + slot_id * plane.span_bytes
        return start + first * page_bytes, (end - first) * page_bytes

    def _take(self, plan: GrowthPlan) -> tuple[list[Handle], int, int]:
        """Return pages for a plan, how many of them hold old bytes, and the mappings charged for them."""
        pool = self.pool
        # Free pages have any name and merge with nothing, at worst; new ones are named by their places.
        n_free = min(pool.n_free, plan.n_pages)
        expected = [*map(Handle, range(-2, -2 - 2 * n_free, -2)), *map(Handle, plan.places[n_free:])]
        n_charged = self._count_new_mappings(plan, expected)
        pool.charge_mappings(n_charged)
        try:
            handles, n_used = pool.take(plan.places)
        except BaseException:
            pool.refund_mappings(n_charged)
            raise
        n_mappings = self._count_new_mappings(plan, handles)
        try:
            pool.charge_mappings(n_mappings - n_charged)
        except BaseException:
            pool.refund_mappings(n_charged)
            pool.give(handles)
            raise
        return handles, n_used, n_mappings

    def _unmap_ranges(self, ranges: Sequence[_Range], unmapped: list[Handle], *, is_certain: bool = True) -> None:
        """Unmap ranges of in-flight pages and give their handles, and the `unmapped` ones, to the pool.

        A range that fails is quarantined and its slot broken; the others go on. Raises the first failure at the end.
        After an interruption, which does not say how far the driver came, the rest goes one by one; after a second one
        it is stuck, to be tried again.

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
                self.pool.driver.unmap([span for span, _ in batch])
                n_done = len(batch)
            except VmemError as error:
                if is_certain or not isinstance(error, UsageError):
                    failure, n_done, n_stuck = failure or error, error.n_done, 1
                    may_pass = isinstance(error, CapacityError)
                    self._get_stuck(batch[n_done : n_done + 1], may_pass=may_pass, is_certain=is_certain)
                else:
                    n_done = 1
            except BaseException as error:
                n_done = 0
                if was_interrupted:
                    n_stuck = len(rest)
                    self._get_stuck(rest, may_pass=True, is_certain=False)
                failure, was_interrupted, is_certain = error, True, False
            for _, handles in rest[:n_done]:
                freed += handles
            rest = rest[n_done + n_stuck :]
        try:
            self.pool.give(freed)
        except VmemError as error:
            failure = failure or error
        if failure is not None:
            raise failure

    def _get_stuck(self, ranges: Sequence[_Range], *, may_pass: bool, is_certain: bool) -> None:
        for span, handles in ranges:
            self.pool.quarantine(handles)
            with self.pool.lock:
                self._stuck.append(_Stuck(self._slot_at(span[0]), (span, handles), may_pass, is_certain))

    def _slot_at(self, address: int) -> SlotId:
        offset = address - self.reservation.base
        plane = next(p for p in reversed(self.layout.planes) if p.base_bytes <= offset)
        return SlotId((offset - plane.base_bytes) // plane.span_bytes)

    def _count_new_mappings(self, plan: GrowthPlan, handles: Sequence[Handle]) -> int:
        """What mapping `handles` adds to the system's count, given what each run continues."""
        info, step = self.pool.driver.info, plan.page_bytes
        if not info.neighbours_merge:
            return plan.n_pages * info.mappings_per_run
        n_runs, first = 0, 0
        for slot_id, plane_index, _, n_pages in plan.runs:
            mapped = self._handles[slot_id][plane_index]
            previous = mapped[-1] if mapped else -1  # no page lies one step behind -1
            for handle in handles[first : first + n_pages]:
                n_runs += handle - previous != step
                previous = handle
            first += n_pages
        return n_runs * info.mappings_per_run

    def _count_mappings(self, handles: Sequence[Handle]) -> int:
        """What a contiguous row of pages costs of the driver's `max_mappings`."""
        info, step = self.pool.driver.info, self.layout.page_bytes
        n_runs = len(handles)
        if info.neighbours_merge:
            n_runs -= sum(b - a == step for a, b in pairwise(handles))
        return n_runs * info.mappings_per_run


def _adjacent(places: Sequence[int], page_bytes: int) -> list[Span]:
    """Pages in order of their places, neighbours joined."""
    spans: list[Span] = []
    for place in places:
        if spans and sum(spans[-1]) == place:
            spans[-1] = (spans[-1][0], spans[-1][1] + page_bytes)
        else:
            spans.append((place, page_bytes))
    return spans


def _ranges_of_plan(
    plan: GrowthPlan, handles: Sequence[Handle], n_mapped: int, *, page_by_page: bool = False
) -> list[_Range]:
    """The first `n_mapped` pages of a plan as contiguous ranges, for undoing a map that broke off there."""
    if page_by_page:
        pages = zip(plan.places[:n_mapped], handles, strict=False)
        return [((place, plan.page_bytes), [handle]) for place, handle in pages]
    ranges: list[_Range] = []
    first = 0
    for run in plan.runs:
        n_pages = min(run.n_pages, n_mapped - first)
        if n_pages > 0:
            ranges.append(((run.address, n_pages * plan.page_bytes), list(handles[first : first + n_pages])))
            first += n_pages
    return ranges
