"""Running out is normal: reclaim warm slots and try again, for as long as that helps.

Guarantees: what is called again has changed nothing before; a shortage that warm slots cannot end is raised as it is.
Assumptions: the call raises CapacityError with nothing changed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeVar

from vmem_kv.errors import CapacityError, OutOfPages
from vmem_kv.growth import SlotId
from vmem_kv.pages import PagePool, Reclaimer
from vmem_kv.region import Region

_Result = TypeVar("_Result")


class Room:
    """The warm slots of every cache on a pool, as seen by one of them.

    Args:
        pool: The pool.
        region: Whose slots the pages are for.
        own: Whose warm slots go first.
    """

    def __init__(self, pool: PagePool, region: Region, own: Reclaimer) -> None:
        self._pool = pool
        self._region = region
        self._own = own

    def having(self, call: Callable[[], _Result], slot_ids: Collection[SlotId], n_pages: int) -> _Result:
        """Make a call that takes so many pages for some slots; reclaim where it finds too few, and make it again.

        Raises:
            CapacityError: There is nothing left to reclaim, or undoing the call broke one of the slots.
            DriverError: The call's own, or of reclaiming.
        """
        while True:
            try:
                return call()
            except CapacityError as error:
                if not self._region.broken.isdisjoint(slot_ids):  # broken by undoing just now
                    raise
                # Mappings come free with pages, nobody knows how many: as many pages as are mapped will do.
                n_short = n_pages - self._pool.n_available if isinstance(error, OutOfPages) else n_pages
                if not self._pool.make_room(max(1, n_short), first=self._own):
                    raise
