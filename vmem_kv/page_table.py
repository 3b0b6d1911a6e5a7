"""The table: which page lies where under the slots of one region, and what that costs.

Guarantees
  * Bookkeeping only: no driver call, no waiting. What changes here changes in the pool's counts at once, so that
    `Σ distinct pages of all tables == pool.n_mapped`.
  * A page may lie under several slots, at the same place of each (`shares.py`).

Assumptions: who changes the table, or reads more than one number off it, holds the pool's lock. Pages enter when they
are mapped; who takes pages out unmaps them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

from vmem_kv.driver.base import Handle, Span
from vmem_kv.errors import InvariantError
from vmem_kv.growth import GrowthPlan, PageRange, SlotId
from vmem_kv.layout import Layout
from vmem_kv.pages import PagePool
from vmem_kv.shares import Shares
from vmem_kv.sharing import Rewiring, Row, shared_tokens

MappedRange = tuple[Span, list[Handle]]
"""A contiguous virtual range and the pages in it."""


class PageTable:
    """The pages under every slot.

    Args:
        pool: Whose pages they are.
        layout: The geometry.
        base: The region's first address.
    """

    def __init__(self, pool: PagePool, layout: Layout, base: int) -> None:
        self.pool = pool
        self.layout = layout
        self.base = base
        self.mapped: dict[SlotId, list[PageRange]] = {}
        """Per slot and plane, the indices of its pages."""
        self.handles: dict[SlotId, list[list[Handle]]] = {}
        """Per slot and plane, their handles, in order."""
        self.shares = Shares()
        for index in range(layout.n_slots):
            self.mapped[SlotId(index)] = [PageRange(0, 0)] * len(layout.planes)
            self.handles[SlotId(index)] = [[] for _ in layout.planes]

    def n_pages(self, slot_id: SlotId) -> int:
        """Pages mapped under a slot, over all planes."""
        return sum(end - first for first, end in self.mapped[slot_id])

    def n_givable_pages(self, slot_id: SlotId) -> int:
        """Pages that come back when a slot that shares none is unmapped."""
        if not self.shares:
            return self.n_pages(slot_id)
        return sum(not self.shares.is_doomed(handle) for handles in self.handles[slot_id] for handle in handles)

    def token_capacity(self, slot_id: SlotId) -> int:
        """Tokens, counted from the slot's start, that end inside its mapped pages."""
        return self.layout.token_capacity([end for _, end in self.mapped[slot_id]])

    def has_front(self, slot_id: SlotId) -> bool:
        """Whether no plane's first pages were given up."""
        return all(first == 0 for first, _ in self.mapped[slot_id])

    def rows(self, slot_id: SlotId) -> list[Row]:
        """The pages under a slot, per plane; do not change them."""
        ranges = zip(self.mapped[slot_id], self.handles[slot_id], strict=True)
        return [Row(first, handles) for (first, _), handles in ranges]

    def shared_ends(self, slot_id: SlotId) -> list[int]:
        """Per plane, the page behind the last one that also lies under another slot; 0 if none does."""
        ends = []
        for first, handles in self.rows(slot_id):
            n_pages = len(handles)
            while n_pages and not self.shares.is_shared(handles[n_pages - 1]):
                n_pages -= 1
            ends.append(first + n_pages if n_pages else 0)
        return ends

    def is_shared(self, slot_id: SlotId) -> bool:
        """Whether a slot has pages that also lie under another."""
        return bool(self.shares) and any(self.shared_ends(slot_id))

    def n_shared_tokens(self, slot_id: SlotId) -> int:
        """Tokens of which any byte lies in a page that another slot has too."""
        return shared_tokens(self.layout, self.shared_ends(slot_id)) if self.shares else 0

    def distinct_pages(self, slot_ids: Iterable[SlotId]) -> set[Handle]:
        """The pages under some slots, each of them once."""
        return {handle for slot_id in slot_ids for handles in self.handles[slot_id] for handle in handles}

    def span(self, slot_id: SlotId, plane_index: int, first: int, end: int) -> Span:
        """The addresses of some pages of one slot's share of one plane."""
        plane, page_bytes = self.layout.planes[plane_index], self.layout.page_bytes
        start = self.base + plane.base_bytes + slot_id * plane.span_bytes
        return start + first * page_bytes, (end - first) * page_bytes

    def spans(self, slot_id: SlotId) -> list[Span]:
        """The addresses of all pages of a slot: a range in each plane that has any."""
        ranges = enumerate(self.mapped[slot_id])
        return [self.span(slot_id, i, first, end) for i, (first, end) in ranges if first < end]

    def slot_at(self, address: int) -> SlotId:
        """The slot to which an address belongs."""
        offset = address - self.base
        plane = next(p for p in reversed(self.layout.planes) if p.base_bytes <= offset)
        return SlotId((offset - plane.base_bytes) // plane.span_bytes)

    def count_mappings(self, handles: Sequence[Handle]) -> int:
        """What a contiguous row of pages costs of the driver's `max_mappings`."""
        info, step = self.pool.driver.info, self.layout.page_bytes
        n_runs = len(handles)
        if info.neighbours_merge:
            n_runs -= sum(b - a == step for a, b in pairwise(handles))
        return n_runs * info.mappings_per_run

    def count_new_mappings(self, plan: GrowthPlan, handles: Sequence[Handle]) -> int:
        """What mapping `handles` adds to the system's count, given what each run continues."""
        info, step = self.pool.driver.info, plan.page_bytes
        if not info.neighbours_merge:
            return plan.n_pages * info.mappings_per_run
        n_runs, first = 0, 0
        for slot_id, plane_index, _, n_pages in plan.runs:
            mapped = self.handles[slot_id][plane_index]
            previous = mapped[-1] if mapped else -1  # no page lies one step behind -1
            for handle in handles[first : first + n_pages]:
                n_runs += handle - previous != step
                previous = handle
            first += n_pages
        return n_runs * info.mappings_per_run

    def n_mappings(self) -> int:
        """What all pages here cost of the driver's mappings."""
        return sum(self.count_mappings(handles) for planes in self.handles.values() for handles in planes)

    def enter(self, plan: GrowthPlan, handles: Sequence[Handle]) -> None:
        """Record pages that are mapped, behind what is there."""
        first = 0
        for slot_id, plane_index, _, n_pages in plan.runs:
            old = self.mapped[slot_id][plane_index]
            self.mapped[slot_id][plane_index] = PageRange(old.first, old.end + n_pages)
            self.handles[slot_id][plane_index] += handles[first : first + n_pages]
            first += n_pages
        n_entered = self.shares.enter(handles) if self.shares else len(handles)
        self.pool.n_in_flight -= n_entered
        self.pool.n_mapped += n_entered

    def cut_off(self, changes: Sequence[Rewiring], handles: Sequence[Handle]) -> None:
        """Take out what lies behind the places at which changes begin: these `handles`."""
        for slot_id, plane_index, first, _ in changes:
            mapped = self.mapped[slot_id][plane_index]
            self.mapped[slot_id][plane_index] = PageRange(mapped.first, first)
            del self.handles[slot_id][plane_index][first - mapped.first :]
        n_left = self.shares.leave(handles)
        self.pool.n_mapped -= n_left
        self.pool.n_in_flight += n_left

    def take_out(self, slot_id: SlotId, keep_from: Sequence[int] | None = None) -> list[MappedRange]:
        """Take out a slot's pages; with `keep_from`, per plane, only those before that page. Return what to unmap."""
        ranges: list[MappedRange] = []
        for plane_index, (first, end) in enumerate(self.mapped[slot_id]):
            cut = end if keep_from is None else min(max(keep_from[plane_index], first), end)
            # A window keeps its place even where nothing is left of it: the slot grows behind it.
            self.mapped[slot_id][plane_index] = PageRange(0, 0) if keep_from is None else PageRange(cut, end)
            if cut == first:
                continue
            handles = self.handles[slot_id][plane_index]
            gone, kept = handles[: cut - first], handles[cut - first :]
            self.pool.forget_mappings(self.count_mappings(handles) - self.count_mappings(kept))
            self.handles[slot_id][plane_index] = kept
            ranges.append((self.span(slot_id, plane_index, first, cut), gone))
        n_pages = sum(self.shares.leave(handles) if self.shares else len(handles) for _, handles in ranges)
        self.pool.n_mapped -= n_pages
        self.pool.n_in_flight += n_pages
        return ranges

    def place(self, slot_id: SlotId, plane_index: int, pages: PageRange) -> None:
        """Let a plane of a slot that has no pages there begin elsewhere: at an empty range."""
        self.mapped[slot_id][plane_index] = pages

    def reset(self, slot_id: SlotId) -> None:
        """Let a slot with nothing mapped begin at its front again."""
        self.mapped[slot_id] = [PageRange(0, 0)] * len(self.layout.planes)

    def check(self) -> None:
        """Verify that table and layout agree.

        Raises:
            InvariantError: They do not.
        """
        for slot_id, ranges in self.mapped.items():
            for plane, (first, end), handles in zip(self.layout.planes, ranges, self.handles[slot_id], strict=True):
                if not 0 <= first <= end <= plane.span_bytes // self.layout.page_bytes:
                    raise InvariantError(f"slot {slot_id}: pages [{first}, {end}) lie outside of its plane")
                if end - first != len(handles) or len(set(handles)) != len(handles):
                    raise InvariantError(f"slot {slot_id}: {end - first} pages, handles {handles}")
        self._check_shares()

    def _check_shares(self) -> None:
        """Verify that a page lies at one place of every slot that has it, under as many as the books say."""
        places: dict[Handle, tuple[int, int]] = {}
        n_tables: Counter[Handle] = Counter()
        for slot_id, rows in self.handles.items():
            for plane_index, handles in enumerate(rows):
                n_tables.update(handles)
                for index, handle in enumerate(handles, self.mapped[slot_id][plane_index].first):
                    if places.setdefault(handle, (plane_index, index)) != (plane_index, index):
                        raise InvariantError(f"page {handle} lies at {places[handle]} and {(plane_index, index)}")
        for handle, n in n_tables.items():
            if n != self.shares.n_tables(handle):
                raise InvariantError(f"page {handle} lies under {n} slots, not {self.shares.n_tables(handle)}")
