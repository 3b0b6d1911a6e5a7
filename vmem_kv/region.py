"""A reservation and its mappings: the only file that maps and unmaps.

Guarantees
  * `map` maps every run of a plan or none. The pages that it takes are mapped at the end, or back in the pool.
  * The table (which handle lies where) changes only under the pool's lock, after the driver call succeeded.
  * A page whose unmap fails goes to quarantine, and its slot is `broken`: nobody uses that range. What was refused for
    lack of mappings, or interrupted, `retry` tries again, and the slot is whole when it succeeds; `close` tries all.
  * A page may lie under several slots, at the same place of each (`begin_rewire`). It goes back to the pool with its
    last mapping (`shares.py`).

Assumptions: the cache above lets no two calls work on one slot at a time, and calls `unmap` only behind a fence.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from vmem_kv.driver.base import Handle, Span
from vmem_kv.errors import CapacityError, DriverError, InvariantError, UsageError, VmemError
from vmem_kv.growth import GrowthPlan, PageRange, Run, SlotId
from vmem_kv.layout import Layout
from vmem_kv.pages import PagePool
from vmem_kv.shares import Shares
from vmem_kv.sharing import Rewiring, Row

_Range = tuple[Span, list[Handle]]
"""A contiguous virtual range and the pages in it."""


class _Stuck(NamedTuple):
    """A range that could not be unmapped; its pages are in quarantine."""

    slot_id: SlotId
    range: _Range
    may_pass: bool  # the refusal can end: worth another try before the region is closed
    is_certain: bool  # whether it is mapped at all


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


class Region:
    """The virtual range of one layout, and what is mapped in it."""

    def __init__(self, pool: PagePool, layout: Layout) -> None:
        self.pool = pool
        self.layout = layout
        self.reservation = pool.driver.reserve(layout.virtual_bytes)
        self.mapped: dict[SlotId, list[PageRange]] = {}
        self._handles: dict[SlotId, list[list[Handle]]] = {}
        self.shares = Shares()
        self._stuck: list[_Stuck] = []
        self._damaged: set[SlotId] = set()
        self._may_be_freed = False
        for index in range(layout.n_slots):
            self.mapped[SlotId(index)] = [PageRange(0, 0)] * len(layout.planes)
            self._handles[SlotId(index)] = [[] for _ in layout.planes]

    @property
    def broken(self) -> set[SlotId]:
        """Slots with a range that could not be unmapped, or that lost pages they should have."""
        return {stuck.slot_id for stuck in self._stuck} | self._damaged

    @property
    def may_mend(self) -> set[SlotId]:
        """Broken slots for which `retry` may help."""
        return {stuck.slot_id for stuck in self._stuck if stuck.may_pass}

    def n_pages(self, slot_id: SlotId) -> int:
        """Pages mapped under a slot, over all planes."""
        return sum(end - first for first, end in self.mapped[slot_id])

    def n_givable_pages(self, slot_id: SlotId) -> int:
        """Pages that come back when a slot that shares none is unmapped. The caller holds the pool's lock."""
        if not self.shares:
            return self.n_pages(slot_id)
        return sum(not self.shares.is_doomed(handle) for handles in self._handles[slot_id] for handle in handles)

    def token_capacity(self, slot_id: SlotId) -> int:
        """Tokens, counted from the slot's start, that end inside its mapped pages."""
        return self.layout.token_capacity([end for _, end in self.mapped[slot_id]])

    def rows(self, slot_id: SlotId) -> list[Row]:
        """The pages under a slot, per plane; do not change them."""
        ranges = zip(self.mapped[slot_id], self._handles[slot_id], strict=True)
        return [Row(first, handles) for (first, _), handles in ranges]

    def has_front(self, slot_id: SlotId) -> bool:
        """Whether no plane's first pages were given up."""
        return all(first == 0 for first, _ in self.mapped[slot_id])

    def shared_ends(self, slot_id: SlotId) -> list[int]:
        """Per plane, the page behind the last one that also lies under another slot; 0 if none does.

        The caller holds the pool's lock.
        """
        ends = []
        for first, handles in self.rows(slot_id):
            n_pages = len(handles)
            while n_pages and not self.shares.is_shared(handles[n_pages - 1]):
                n_pages -= 1
            ends.append(first + n_pages if n_pages else 0)
        return ends

    def is_shared(self, slot_id: SlotId) -> bool:
        """Whether a slot has pages that also lie under another. The caller holds the pool's lock."""
        return bool(self.shares) and any(self.shared_ends(slot_id))

    def distinct_pages(self, slot_ids: Iterable[SlotId]) -> set[Handle]:
        """The pages under some slots, each of them once. The caller holds the pool's lock."""
        return {handle for slot_id in slot_ids for handles in self._handles[slot_id] for handle in handles}

    def map(self, plan: GrowthPlan) -> None:
        """Take pages for the plan's runs and map them. Those that hold old bytes are scrubbed.

        Raises:
            OutOfMappings: Nothing changed. By our own count it is known before any driver call, unless pages had to
                be created apart from their places.
            OutOfPages: Nothing changed.
            DriverError: Undone; the pages are back in the pool, but for those that had to be quarantined.
        """
        handles, n_used, n_mappings = self._take(plan)
        try:
            self._map_pages(plan, handles, _adjacent(plan.places[:n_used], plan.page_bytes))
        except BaseException:
            self.pool.refund_mappings(n_mappings)
            raise

    def begin_rewire(
        self, changes: Sequence[Rewiring], fill: Callable[[], object], commit: Callable[[], object]
    ) -> Rewired:
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
        given = [handle for change in changes for handle in change.handles]
        plan = self._plan_of(changes)
        new_places = [place for place, handle in zip(plan.places, given, strict=True) if handle is None]
        new, n_used = self.pool.take(new_places) if new_places else ([], 0)
        unused = iter(new)
        handles = [next(unused) if handle is None else handle for handle in given]
        n_mappings = self._count_mappings_of(changes)
        # At worst, and before anything is cut: to undo that, what it freed is needed again.
        n_charged = len(handles) * self.pool.driver.info.mappings_per_run
        try:
            self.pool.charge_mappings(n_charged)
        except BaseException:
            self._let_go(new)
            raise
        n_needed = 0
        try:
            rewired = self._exchange(changes, plan, handles, new_places[:n_used], fill, commit)
            n_needed = n_mappings
        finally:
            with self.pool.lock:
                n_needed = max(n_needed, self._count_mappings_of(changes))
                self.pool.forget_mappings(n_charged + n_mappings - n_needed)
        return rewired._replace(n_mappings=n_needed)

    def keep(self, rewired: Rewired) -> None:
        """Let go of what was replaced. A page that cannot be released is counted as lost."""
        self._refund_spare(rewired)
        with contextlib.suppress(VmemError):  # it is done
            self._let_go(rewired.old_handles)

    def take_back(self, rewired: Rewired) -> None:
        """Put back what was replaced. Nothing on the device may touch what replaced it.

        Raises:
            DriverError: The slots are broken: they have neither, or each other's pages.
        """
        changes, plan, handles, old_plan, old_handles, empty, _ = rewired
        slot_ids = {change.slot_id for change in changes}
        with self.pool.lock:
            self.shares.alias(handles)  # so that they stay ours while they are cut off
        try:
            try:
                self._cut(changes, plan, handles)
            except BaseException:
                with self.pool.lock:
                    self._damaged |= slot_ids
                with contextlib.suppress(VmemError):
                    self._let_go(old_handles)
                raise
            try:
                self._put_back(old_plan, old_handles)
            finally:
                with self.pool.lock:
                    for change, pages in empty:
                        self.mapped[change.slot_id][change.plane_index] = pages
                with contextlib.suppress(VmemError):  # a page that could not be released is counted as lost
                    self._let_go(handles)
            if slot_ids & self.broken:
                n_bytes = old_plan.n_pages * old_plan.page_bytes
                raise DriverError("map", 0, "STUCK", n_bytes, "what was exchanged could not be put back")
        finally:
            self._refund_spare(rewired)

    def _refund_spare(self, rewired: Rewired) -> None:
        with self.pool.lock:
            self.pool.forget_mappings(rewired.n_mappings - self._count_mappings_of(rewired.changes))

    def _exchange(
        self,
        changes: Sequence[Rewiring],
        plan: GrowthPlan,
        handles: list[Handle],
        dirty: list[int],
        fill: Callable[[], object],
        commit: Callable[[], object],
    ) -> Rewired:
        """Cut off what the changes replace, map `handles` instead; see `begin_rewire`."""
        as_it_is = [self._as_it_is(change) for change in changes]
        old = self._plan_of(as_it_is)
        old_handles = [handle for change in as_it_is for handle in change.handles if handle is not None]
        with self.pool.lock:
            self.shares.alias(handle for change in changes for handle in change.handles if handle is not None)
            self.shares.alias(old_handles)  # so that they stay ours, to be put back
            without = [change for change in changes if not self._handles[change.slot_id][change.plane_index]]
            empty = [(change, self.mapped[change.slot_id][change.plane_index]) for change in without]
            for slot_id, plane_index, first, _ in without:
                self.mapped[slot_id][plane_index] = PageRange(first, first)
        try:
            try:
                self._cut(changes, old, old_handles)
            except BaseException:
                self._let_go(handles)
                raise
            try:
                self._map_pages(plan, handles, _adjacent(dirty, plan.page_bytes), fill, commit)
            except BaseException:
                self._put_back(old, old_handles)
                raise
        except BaseException:
            with self.pool.lock:
                for change, pages in empty:
                    self.mapped[change.slot_id][change.plane_index] = pages
            raise
        return Rewired(changes, plan, handles, old, old_handles, empty, 0)

    def _cut(self, changes: Sequence[Rewiring], old: GrowthPlan, handles: list[Handle]) -> None:
        """Unmap what changes replace; they hold its pages still. After a failure it is mapped again, and not held."""
        if not handles:
            return
        with self.pool.lock:
            for slot_id, plane_index, first, _ in changes:
                mapped = self.mapped[slot_id][plane_index]
                self.mapped[slot_id][plane_index] = PageRange(mapped.first, first)
                del self._handles[slot_id][plane_index][first - mapped.first :]
            n_left = self.shares.leave(handles)
            self.pool.n_mapped -= n_left
            self.pool.n_in_flight += n_left
        try:
            self.pool.driver.unmap([(run.address, run.n_pages * old.page_bytes) for run in old.runs])
        except VmemError as error:
            n_runs = error.n_done
            n_done = sum(run.n_pages for run in old.runs[:n_runs])
            with self.pool.lock:
                self._enter(GrowthPlan(old.runs[n_runs:], [], 0, old.page_bytes), handles[n_done:])
                self.shares.drop(handles)  # in the table again, or held
            done = GrowthPlan(old.runs[:n_runs], old.places[:n_done], n_done, old.page_bytes)
            self._put_back(done, handles[:n_done])
            raise
        except BaseException:  # says nothing about how far it came
            try:
                with contextlib.suppress(VmemError):
                    pages = _ranges_of_plan(old, handles, len(handles), page_by_page=True)
                    self._unmap_ranges(pages, [], is_certain=False)
            finally:  # interrupted again
                self._put_back(old, handles)
            raise
        with self.pool.lock:
            self.shares.drop(handles)  # held

    def _put_back(self, plan: GrowthPlan, handles: list[Handle]) -> None:
        """Map again what was cut off; its pages are held. Where that fails, they go, and their slots are broken."""
        if not handles:
            return
        slot_ids = {run.slot_id for run in plan.runs}
        try:
            if slot_ids & self.broken:  # something else may be stuck in these places
                self._let_go(handles)
                raise DriverError("map", 0, "STUCK", plan.n_pages * plan.page_bytes, "the place is not free")
            self._map_pages(plan, handles, [])
        except BaseException as failure:
            with self.pool.lock:
                self._damaged |= slot_ids
            if not isinstance(failure, VmemError):
                raise

    def _map_pages(
        self,
        plan: GrowthPlan,
        handles: list[Handle],
        dirty: list[Span],
        fill: Callable[[], object] | None = None,
        commit: Callable[[], object] = lambda: None,
    ) -> None:
        """Map pages that are in no table yet, scrub the `dirty` places, let `fill` write, and put them in the table.

        After a failure all of it is undone, and the pages are let go.
        """
        driver = self.pool.driver
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
                driver.scrub(dirty)
            if fill is not None:
                fill()
        except BaseException as failure:
            must_wait = may_be_writing and (fill is not None or not isinstance(failure, VmemError))
            # The first error is the one to report; what failed while undoing it is in the quarantine count.
            with contextlib.suppress(VmemError):
                self._undo_map(plan, handles, n_mapped, must_wait=must_wait)
            raise
        with self.pool.lock:
            self._enter(plan, handles)
            commit()

    def _undo_map(self, plan: GrowthPlan, handles: list[Handle], n_mapped: int | None, *, must_wait: bool) -> None:
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
            pages = _ranges_of_plan(plan, handles, len(handles), page_by_page=True)
            self._unmap_ranges(pages, [], is_certain=False)
            return
        ranges = _ranges_of_plan(plan, handles, n_mapped)
        if must_wait:
            try:
                self.pool.driver.fence().wait()
            except BaseException:
                self._get_stuck(ranges, may_pass=False, is_certain=True)
                raise
        self._unmap_ranges(ranges, handles[n_mapped:])

    def _enter(self, plan: GrowthPlan, handles: Sequence[Handle]) -> None:
        """Put pages that are mapped into the table, behind what is there. The caller holds the pool's lock."""
        first = 0
        for slot_id, plane_index, _, n_pages in plan.runs:
            old = self.mapped[slot_id][plane_index]
            self.mapped[slot_id][plane_index] = PageRange(old.first, old.end + n_pages)
            self._handles[slot_id][plane_index] += handles[first : first + n_pages]
            first += n_pages
        n_entered = self.shares.enter(handles) if self.shares else len(handles)
        self.pool.n_in_flight -= n_entered
        self.pool.n_mapped += n_entered

    def _plan_of(self, changes: Sequence[Rewiring]) -> GrowthPlan:
        """The runs and places of what changes map."""
        runs: list[Run] = []
        places: list[int] = []
        for slot_id, plane_index, first, handles in changes:
            if handles:
                address, n_bytes = self._span(slot_id, plane_index, first, first + len(handles))
                runs.append(Run(slot_id, plane_index, address, len(handles)))
                places += range(address, address + n_bytes, self.layout.page_bytes)
        return GrowthPlan(tuple(runs), places, len(places), self.layout.page_bytes)

    def _as_it_is(self, change: Rewiring) -> Rewiring:
        """The change that would put back what a change replaces."""
        n_before = change.first - self.mapped[change.slot_id][change.plane_index].first
        return change._replace(handles=self._handles[change.slot_id][change.plane_index][n_before:])

    def _count_mappings_of(self, changes: Sequence[Rewiring]) -> int:
        """What the rows of changes cost now of the driver's mappings."""
        return sum(self._count_mappings(self._handles[change.slot_id][change.plane_index]) for change in changes)

    def _let_go(self, handles: Sequence[Handle]) -> int:
        """Let go of pages that are mapped nowhere by us; return how many went back to the pool.

        Raises:
            DriverError: As `PagePool.give`.
        """
        if not self.shares:
            self.pool.give(handles)
            return len(handles)
        with self.pool.lock:
            free, lost = self.shares.drop(handles)
        self.pool.quarantine(lost)
        self.pool.give(free)
        return len(free)

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
            if keep_from is None:
                self._damaged.discard(slot_id)
            n_pages = sum(self.shares.leave(handles) if self.shares else len(handles) for _, handles in ranges)
            self.pool.n_mapped -= n_pages
            self.pool.n_in_flight += n_pages
        return self._unmap_ranges(ranges, [])

    def retry(self, is_worth: Callable[[_Stuck], bool]) -> int:
        """Try once more to unmap stuck ranges; return how many pages went back. Nobody else works on their slots.

        Raises:
            DriverError: Some are stuck still; the others went back.
        """
        with self.pool.lock:
            again = [stuck for stuck in self._stuck if is_worth(stuck)]
            self._stuck = [stuck for stuck in self._stuck if stuck not in again]
            for stuck in again:
                self.pool.unquarantine(self.shares.retry(stuck.range[1]))
        n_freed = 0
        try:
            n_freed += self._unmap_ranges([stuck.range for stuck in again if stuck.is_certain], [])
        finally:
            unsure = [stuck.range for stuck in again if not stuck.is_certain]
            n_freed += self._unmap_ranges(unsure, [], is_certain=False)
        return n_freed

    def reset(self, slot_id: SlotId) -> None:
        """Let a slot with nothing mapped begin at its front again. The caller holds the pool's lock."""
        self.mapped[slot_id] = [PageRange(0, 0)] * len(self.layout.planes)
        self._damaged.discard(slot_id)

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
                    self.pool.forget(self.shares.retry(stuck.range[1]))
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
        self._check_shares()

    def _check_shares(self) -> None:
        """Verify that a page lies at one place of every slot that has it, under as many as the books say."""
        places: dict[Handle, tuple[int, int]] = {}
        n_tables: Counter[Handle] = Counter()
        for slot_id, rows in self._handles.items():
            for plane_index, handles in enumerate(rows):
                n_tables.update(handles)
                for index, handle in enumerate(handles, self.mapped[slot_id][plane_index].first):
                    if places.setdefault(handle, (plane_index, index)) != (plane_index, index):
                        raise InvariantError(f"page {handle} lies at {places[handle]} and {(plane_index, index)}")
        for handle, n in n_tables.items():
            if n != self.shares.n_tables(handle):
                raise InvariantError(f"page {handle} lies under {n} slots, not {self.shares.n_tables(handle)}")

    def handles(self) -> Mapping[SlotId, list[list[Handle]]]:
        """The table: per slot and plane, the handles of the mapped pages in order. For checks; do not change."""
        return self._handles

    def mapped_handles(self) -> list[Handle]:
        """Every page mapped here, once, whatever its slots' states. The caller holds the pool's lock."""
        return list(self.distinct_pages(self._handles))

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

    def _unmap_ranges(self, ranges: Sequence[_Range], unmapped: list[Handle], *, is_certain: bool = True) -> int:
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
        n_freed = 0
        try:
            n_freed = self._let_go(freed)
        except VmemError as error:
            failure = failure or error
        if failure is not None:
            raise failure
        return n_freed

    def _get_stuck(self, ranges: Sequence[_Range], *, may_pass: bool, is_certain: bool) -> None:
        for span, handles in ranges:
            with self.pool.lock:
                lost = self.shares.get_stuck(handles)
            self.pool.quarantine(lost)
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
