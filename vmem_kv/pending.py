"""What waits for a fence, and how its pages come back.

    retire ─▶ retired ──fence──▶ warm ──reclaim──▶ cold        slide ─▶ a window ──fence──▶ the pages before it

`poll` moves on whatever has a fence that has passed; everything that may need memory polls first. A slot that cannot be
adopted (it shares pages, so that its next owner would write them, or an unmap failed under it) goes cold at once.

Guarantees
  * Nothing is unmapped before its fence has passed.
  * Where an unmap fails the others go on, and the first failure is raised at the end; the books say what is mapped.
  * Warm slots are reclaimed longest retired first.

Assumptions: nobody calls `poll` or `reclaim` with the pool's lock held, or within a claim of his own that somebody else
could be waiting for in here: a slot that is busy is passed over, its turn comes at a later poll.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from vmem_kv.claims import Claims
from vmem_kv.driver.base import Fence
from vmem_kv.errors import CapacityError, UsageError
from vmem_kv.growth import SlotId
from vmem_kv.pages import PagePool
from vmem_kv.region import Region
from vmem_kv.slots import SlotTable


class Slide(NamedTuple):
    """A window that moved on; what lies before it is unmapped behind the fence."""

    slot_id: SlotId
    first_token: int
    fence: Fence


class Pending:
    """The retired and warm slots of one cache, and what its windows gave up: a `Reclaimer` on the pool."""

    def __init__(self, pool: PagePool, region: Region, slots: SlotTable, claims: Claims) -> None:
        self._pool = pool
        self._region = region
        self._table = region.table
        self._slots = slots
        self._claims = claims
        self.slides: list[Slide] = []

    def comes_free(self, slot_ids: Sequence[SlotId], first_token: int) -> list[SlotId]:
        """The slots of which pages come free if they slide. The caller holds the lock.

        Raises:
            UsageError: A slot is not active, or `first_token` lies behind its length.
        """
        slots = self._slots
        slots.require_active(slot_ids)
        shortest = min((slots.n_tokens[slot_id] for slot_id in slot_ids), default=first_token)
        if not 0 <= first_token <= shortest:
            raise UsageError(f"slide to token {first_token} in a sequence of {shortest} tokens")
        kept = self._first_kept_pages(first_token)
        return [
            slot_id
            for slot_id in slot_ids
            if first_token > slots.first_token.get(slot_id, 0)
            and any(first < min(cut, end) for cut, (first, end) in zip(kept, self._table.mapped[slot_id], strict=True))
        ]

    def slide(self, slot_ids: Sequence[SlotId], first_token: int, fence: Fence | None) -> bool:
        """Let windows begin at `first_token`, and give up what lies before it behind `fence`.

        Returns:
            Whether pages wait for the fence now. Without one nothing waits: it can be None where nothing came free.

        Raises:
            UsageError: As `comes_free`. Nothing changed.
        """
        with self._pool.lock:
            giving = self.comes_free(slot_ids, first_token)
            for slot_id in slot_ids:
                if first_token > self._slots.first_token.get(slot_id, 0):
                    self._slots.first_token[slot_id] = first_token
            if fence is not None:
                self.slides += [Slide(slot_id, first_token, fence) for slot_id in giving]
        return bool(giving)

    def forget(self, slot_id: SlotId) -> None:
        """Expect nothing of a slot's window any more: the slot is unmapped as a whole. The caller holds the lock."""
        self.slides = [slide for slide in self.slides if slide.slot_id != slot_id]

    def fences(self) -> list[Fence]:
        """What there is to wait for."""
        with self._pool.lock:
            return [*self._slots.retired.values(), *(slide.fence for slide in self.slides)]

    def poll(self) -> int:
        """Move on whatever waited for a fence that has passed meanwhile; return how many pages that gave back.

        Raises:
            DriverError: An unmap failed; its pages are quarantined, and everything else moved on.
        """
        n_freed = self._mend() if self._region.unmapper.may_mend else 0
        with self._pool.lock:
            if not self._slots.retired and not self.slides:
                return n_freed
            retired = list(self._slots.retired.items())
            slides = list(self.slides)
        passed = [(slot_id, fence) for slot_id, fence in retired if fence.passed()]
        n_freed += sum(self._finish(slide) for slide in slides if slide.fence.passed())
        with self._pool.lock:
            self._settle(passed)
            self._slots.break_(self._region.broken)
            unusable = self._unusable()
            self._slots.busy.update(unusable)
        return n_freed + self._unmap_all(unusable)

    def reclaim(self, n_pages: int) -> int:
        """Unmap warm slots, longest retired first, until `n_pages` pages went back to the pool; return how many did.

        Raises:
            DriverError: An unmap or release failed; those pages are quarantined, the others went back.
        """
        self._pool.require_owner()
        n_freed = self.poll()
        while n_freed < n_pages:
            with self._pool.lock:
                victim = next((s for s in self._slots.warm if s not in self._slots.busy), None)
                if victim is None:
                    break
                self._slots.busy.add(victim)
            try:
                n_freed += self.unmap_warm(victim)
            finally:
                self._claims.end([victim])
        return n_freed

    def unmap_warm(self, slot_id: SlotId) -> int:
        """Turn a warm slot cold that the caller has claimed; return how many pages went back.

        Raises:
            DriverError: Pages are quarantined, and the slot is broken; the books say what is mapped.
        """
        try:
            return self._region.unmap(slot_id)
        finally:
            with self._pool.lock:
                self._slots.cool(slot_id)
                self._slots.break_(self._region.broken & {slot_id})

    def n_warm_pages(self) -> int:
        """Pages that `reclaim` could give back now. The caller holds the lock."""
        return sum(self._table.n_givable_pages(s) for s in self._slots.warm if s not in self._slots.busy)

    def is_busy(self) -> bool:
        """Whether a driver call of this cache is under way. The caller holds the lock."""
        return bool(self._slots.busy)

    def _mend(self) -> int:
        """Try again to unmap what was refused for a reason that passes; return how many pages went back."""
        with self._pool.lock:
            mending = self._region.unmapper.may_mend - self._slots.busy
            self._slots.busy |= mending
        try:
            return self._region.unmapper.retry(lambda stuck: stuck.may_pass and stuck.slot_id in mending)
        except CapacityError:
            return 0  # still refused, and stuck as before
        finally:
            with self._pool.lock:
                self._slots.mend(mending - self._region.broken)
            self._claims.end(mending)

    def _finish(self, slide: Slide) -> int:
        """Unmap the pages in front of a window whose fence has passed; return how many.

        A busy slot's turn comes at a later poll: to wait here could be to wait for ourselves, in the middle of
        growing that slot.
        """
        with self._pool.lock:
            if slide not in self.slides or slide.slot_id in self._slots.busy:
                return 0
            self.slides.remove(slide)
            self._slots.busy.add(slide.slot_id)
        try:
            return self._region.unmap(slide.slot_id, self._first_kept_pages(slide.first_token))
        finally:
            self._claims.end([slide.slot_id])

    def _settle(self, passed: Iterable[tuple[SlotId, Fence]]) -> None:
        """Make slots warm, or cold where nothing is mapped, that were retired behind these fences, and are still.

        The caller holds the lock.
        """
        table, slots = self._table, self._slots
        waiting = {slide.slot_id for slide in self.slides}
        for slot_id, fence in passed:
            if slots.retired.get(slot_id) is fence and slot_id not in waiting | slots.busy:
                n_pages = table.n_pages(slot_id)
                if not n_pages:
                    self._region.reset(slot_id)
                capacity = table.token_capacity(slot_id) if table.has_front(slot_id) else 0
                slots.settle(slot_id, capacity if n_pages else -1)

    def _unusable(self) -> list[SlotId]:
        """Warm slots that nobody can adopt. The caller holds the lock."""
        table, slots = self._table, self._slots
        warm = [s for s in slots.warm if s not in slots.busy] if table.shares else ()
        sharing = {s for s in warm if table.is_shared(s)}
        return [s for s in self._region.broken | sharing if s in slots.warm and s not in slots.busy]

    def _unmap_all(self, slot_ids: Sequence[SlotId]) -> int:
        """Unmap warm slots that were claimed, all of them even if one fails: what is left warm can be adopted."""
        n_freed = 0
        failure: BaseException | None = None
        try:
            for slot_id in slot_ids:
                try:
                    n_freed += self.unmap_warm(slot_id)
                except BaseException as error:
                    failure = failure or error
        finally:
            self._claims.end(slot_ids)
        if failure is not None:
            raise failure
        return n_freed

    def _first_kept_pages(self, first_token: int) -> list[int]:
        """Per plane, the page in which a window begins."""
        layout = self._table.layout
        return [first_token * plane.token_bytes // layout.page_bytes for plane in layout.planes]
