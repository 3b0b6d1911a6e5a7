"""A reservation and its mappings: the only file that maps and unmaps.

Guarantees
  * `map` maps every run of a plan or none. It owns the handles it is given: mapped at the end, or back in the pool.
  * The table (which handle lies where) changes only under the pool's lock, after the driver call succeeded.
  * A page whose unmap fails goes to quarantine, and its slot into `broken`, so that nobody uses that range again;
    `close` tries such pages once more.

Assumptions: the cache above lets no two calls work on one slot at a time, and calls `unmap` only behind a fence.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from itertools import pairwise

from vmem_kv.driver.base import Handle, Span
from vmem_kv.errors import InvariantError, VmemError
from vmem_kv.growth import GrowthPlan, PageRange, SlotId
from vmem_kv.layout import Layout
from vmem_kv.pages import PagePool

_Chunk = tuple[Span, list[Handle]]


class Region:
    """The virtual range of one layout, and what is mapped in it."""

    def __init__(self, pool: PagePool, layout: Layout) -> None:
        self.pool = pool
        self.layout = layout
        self.reservation = pool.driver.reserve(layout.virtual_bytes)
        self.broken: set[SlotId] = set()
        self.mapped: dict[SlotId, list[PageRange]] = {}
        self._handles: dict[SlotId, list[list[Handle]]] = {}
        self._stuck: list[_Chunk] = []
        for index in range(layout.n_slots):
            self.mapped[SlotId(index)] = [PageRange(0, 0)] * len(layout.planes)
            self._handles[SlotId(index)] = [[] for _ in layout.planes]

    def n_pages(self, slot_id: SlotId) -> int:
        """Pages mapped under a slot, over all planes."""
        return sum(end - first for first, end in self.mapped[slot_id])

    def token_capacity(self, slot_id: SlotId) -> int:
        """Tokens, counted from the slot's start, that end inside its mapped pages."""
        return self.layout.token_capacity([end for _, end in self.mapped[slot_id]])

    def map(self, plan: GrowthPlan, handles: list[Handle], n_used: int) -> None:
        """Map `handles` over the plan's runs. The first `n_used` hold old bytes and are scrubbed.

        Raises:
            OutOfMappings: Nothing changed; the handles are back in the pool.
            DriverError: Undone; the handles are back in the pool, but for those that had to be quarantined.
        """
        driver, places = self.pool.driver, plan.places
        n_mappings = self._count_new_mappings(plan, handles)
        n_mapped = 0
        try:
            self.pool.charge_mappings(n_mappings)
            try:
                driver.map(plan.page_bytes, places, handles)
                n_mapped = len(handles)
                driver.set_access([(run.address, run.n_pages * plan.page_bytes) for run in plan.runs])
                if n_used:
                    driver.scrub([(place, plan.page_bytes) for place in places[:n_used]])
            except VmemError as error:
                n_mapped = n_mapped or error.n_done
                self.pool.refund_mappings(n_mappings)
                raise
        except VmemError:
            chunks = _chunks_of_plan(plan, handles, n_mapped)
            # The first error is the one to report; what failed while undoing it is in the quarantine count.
            with contextlib.suppress(VmemError):
                self._unmap_chunks(chunks, handles[n_mapped:])
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
        chunks: list[_Chunk] = []
        with self.pool.lock:
            for plane_index, (first, end) in enumerate(self.mapped[slot_id]):
                cut = end if keep_from is None else min(max(keep_from[plane_index], first), end)
                # A window keeps its place even where nothing is left of it: the slot grows behind it.
                self.mapped[slot_id][plane_index] = PageRange(0, 0) if keep_from is None else PageRange(cut, end)
                if cut == first:
                    continue
                handles = self._handles[slot_id][plane_index]
                gone, kept = handles[: cut - first], handles[cut - first :]
                self.pool.n_mappings -= self._count_mappings(handles) - self._count_mappings(kept)
                self._handles[slot_id][plane_index] = kept
                chunks.append((self._span(slot_id, plane_index, first, cut), gone))
            n_pages = sum(len(handles) for _, handles in chunks)
            self.pool.n_mapped -= n_pages
            self.pool.n_in_flight += n_pages
        self._unmap_chunks(chunks, [])
        return n_pages

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
            DriverError: Something could not be unmapped; the rest was. Calling again tries again.
        """
        failure: VmemError | None = None
        for slot_id in self.mapped:
            try:
                self.unmap(slot_id)
            except VmemError as error:
                failure = failure or error
        if failure is not None:
            raise failure
        while self._stuck:
            span, handles = self._stuck[-1]
            self.pool.driver.unmap([span])
            self._stuck.pop()
            self.pool.readmit(handles)
        self.pool.driver.free_reservation(self.reservation)

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

    def _span(self, slot_id: SlotId, plane_index: int, first: int, end: int) -> Span:
        plane, page_bytes = self.layout.planes[plane_index], self.layout.page_bytes
        start = self.reservation.base + plane.base_bytes + slot_id * plane.span_bytes
        return start + first * page_bytes, (end - first) * page_bytes

    def _unmap_chunks(self, chunks: Sequence[_Chunk], unmapped: list[Handle]) -> None:
        """Unmap chunks of in-flight pages and give their handles, and the `unmapped` ones, to the pool.

        A chunk that fails is quarantined and its slot marked; the others go on. Raises the first failure at the end.
        """
        failure: VmemError | None = None
        freed, rest = list(unmapped), list(chunks)
        while rest:
            try:
                self.pool.driver.unmap([span for span, _ in rest])
                n_done = len(rest)
            except VmemError as error:
                failure, n_done = failure or error, error.n_done
            for _, handles in rest[:n_done]:
                freed += handles
            for span, handles in rest[n_done : n_done + 1]:
                self.pool.quarantine(handles)
                self._stuck.append((span, handles))
                self.broken.add(self._slot_at(span[0]))
            rest = rest[n_done + 1 :]
        try:
            self.pool.give(freed)
        except VmemError as error:
            failure = failure or error
        if failure is not None:
            raise failure

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


def _chunks_of_plan(plan: GrowthPlan, handles: Sequence[Handle], n_mapped: int) -> list[_Chunk]:
    """The first `n_mapped` pages of a plan as contiguous chunks, for undoing a map that broke off there."""
    chunks: list[_Chunk] = []
    first = 0
    for run in plan.runs:
        n_pages = min(run.n_pages, n_mapped - first)
        if n_pages > 0:
            chunks.append(((run.address, n_pages * plan.page_bytes), list(handles[first : first + n_pages])))
            first += n_pages
    return chunks
