"""Claims: a slot under a driver call is *busy*, and only who needs that slot waits.

Guarantees: nobody holds the pool's lock while he waits or works; whoever waits is woken when a claim ends.
Assumptions: nobody claims a slot that he holds already. Who chooses slots and claims them in one step puts them into
`SlotTable.busy` himself, under the lock under which he chose them, and ends that claim here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from vmem_kv.errors import DriverError
from vmem_kv.growth import SlotId
from vmem_kv.slots import SlotTable

STALL_TIMEOUT_S = 60.0
"""How long a call waits for another thread's driver call on the same slot before it gives up."""


class Claims:
    """Who works on which slots of one cache.

    Args:
        lock: The pool's.
        slots: Whose `busy` slots these are.
    """

    def __init__(self, lock: threading.Condition, slots: SlotTable) -> None:
        self._lock = lock
        self._slots = slots

    @contextmanager
    def exclusive(self, slot_ids: Iterable[SlotId]) -> Iterator[None]:
        """Keep other threads off these slots while the driver works on them.

        Raises:
            DriverError: They stayed busy for `STALL_TIMEOUT_S`. Nothing is claimed.
        """
        wanted = set(slot_ids)
        with self._lock:
            if not self._lock.wait_for(lambda: not wanted & self._slots.busy, STALL_TIMEOUT_S):
                raise DriverError("wait", 110, "ETIMEDOUT", detail=f"slots {sorted(wanted)} stayed busy")
            self._slots.busy |= wanted
        try:
            yield
        finally:
            self.end(wanted)

    def end(self, slot_ids: Iterable[SlotId]) -> None:
        """Let others have slots that were claimed."""
        with self._lock:
            self._slots.busy.difference_update(slot_ids)
            self._lock.notify_all()
