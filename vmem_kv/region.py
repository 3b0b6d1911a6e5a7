"""A reservation and its mappings: what maps and unmaps for one cache.

    map     ─▶ `mapping.py`: take, map, scrub, enter            table   ─▶ `page_table.py`: which page lies where
    unmap   ─▶ `unmapping.py`: unmap, give, or leave stuck      rewirer ─▶ `rewiring.py`: replace, keep or take back

Guarantees
  * `map` maps every run of a plan or none. The pages that it takes are mapped at the end, or back in the pool.
  * A page enters the table when it is mapped, and leaves it before it is unmapped, under the pool's lock.
  * A page whose unmap fails goes to quarantine, and its slot is `broken`: nobody uses that range. What can pass is
    tried again on request (`unmapper.retry`), and everything in `close`.

Assumptions: the cache above lets no two calls work on one slot at a time, and calls `unmap` only behind a fence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vmem_kv.driver.base import Handle
from vmem_kv.errors import DriverError, UsageError, VmemError
from vmem_kv.growth import GrowthPlan, SlotId
from vmem_kv.layout import Layout
from vmem_kv.mapping import PageMapper
from vmem_kv.page_table import PageTable
from vmem_kv.pages import PagePool
from vmem_kv.rewiring import Rewirer
from vmem_kv.unmapping import Unmapper


class Region:
    """The virtual range of one layout, and what is mapped in it."""

    def __init__(self, pool: PagePool, layout: Layout) -> None:
        self.pool = pool
        self.layout = layout
        self.reservation = pool.driver.reserve(layout.virtual_bytes)
        self.table = PageTable(pool, layout, self.reservation.base)
        self.unmapper = Unmapper(pool, self.table)
        self._mapper = PageMapper(pool, self.table, self.unmapper)
        self.rewirer = Rewirer(pool, self.table, self._mapper, self.unmapper)
        self._may_be_freed = False

    @property
    def broken(self) -> set[SlotId]:
        """Slots with a range that could not be unmapped, or that lost pages they should have."""
        return self.unmapper.broken

    def require_whole(self, slot_ids: Iterable[SlotId]) -> None:
        """Raise UsageError if a slot is broken."""
        broken = self.broken.intersection(slot_ids)
        if broken:
            raise UsageError(f"an unmap failed under slots {sorted(broken)}; retire them, they cannot grow any more")

    def map(self, plan: GrowthPlan) -> None:
        """Take pages for the plan's runs and map them. Those that hold old bytes are scrubbed.

        Raises:
            OutOfMappings: Nothing changed. By our own count it is known before any driver call, unless pages had to
                be created apart from their places.
            OutOfPages: Nothing changed.
            DriverError: Undone; the pages are back in the pool, but for those that had to be quarantined.
        """
        self._mapper.grow(plan)

    def unmap(self, slot_id: SlotId, keep_from: Sequence[int] | None = None) -> int:
        """Unmap a slot's pages and give them to the pool; with `keep_from`, per plane, only those before that page.

        Returns:
            How many pages went back.

        Raises:
            DriverError: Some pages are quarantined and the slot is broken; all the others went back.
        """
        with self.pool.lock:
            ranges = self.table.take_out(slot_id, keep_from)
            if keep_from is None:
                self.unmapper.damaged.discard(slot_id)
        return self.unmapper.unmap(ranges)

    def reset(self, slot_id: SlotId) -> None:
        """Let a slot with nothing mapped begin at its front again. The caller holds the pool's lock."""
        self.table.reset(slot_id)
        self.unmapper.damaged.discard(slot_id)

    def scrub(self, slot_id: SlotId) -> None:
        """Fill a slot's mapped pages with zeros.

        Raises:
            DriverError: The slot's bytes are undefined, its mappings unchanged.
        """
        self.pool.driver.scrub(self.table.spans(slot_id))

    def mapped_handles(self) -> list[Handle]:
        """Every page mapped here, once, whatever its slots' states. The caller holds the pool's lock."""
        return list(self.table.distinct_pages(self.table.handles))

    def n_mappings(self) -> int:
        """What the mapped pages cost of the driver's mappings. The caller holds the pool's lock."""
        return self.table.n_mappings()

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
            self.unmapper.forget()

    def _close(self) -> None:
        failure: VmemError | None = None
        for slot_id in self.table.mapped:
            try:
                self.unmap(slot_id)
            except VmemError as error:
                failure = failure or error
        if failure is not None:
            raise failure
        self.unmapper.retry(lambda stuck: True)
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
