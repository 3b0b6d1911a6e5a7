"""What all pools under one limit hold together: mappings and bytes.

The limits are not a pool's. The kernel counts the mappings of a process, whoever made them, and memory is one for all
of it; so every host driver of a process charges one ledger, `PROCESS`, and pools on different drivers see each other.
A test that wants to be alone passes a ledger of its own.

Guarantees: a charge that does not fit changes nothing. What is refunded leaves no trace, so that any number of caches
may be opened and closed. Memory that nobody closed stays charged: it is there still.
"""

from __future__ import annotations

import threading

MAX_DEVICE_MAPPINGS = 500_000
"""Live mappings per CUDA device. On an H100 others met a ceiling of 523,404, whatever the pages' size."""


class Ledger:
    """Counts with a lock of its own, taken last and never held across anything."""

    def __init__(self) -> None:
        self.n_mappings = 0
        """Mappings charged by all pools, at worst case."""
        self.n_bytes = 0
        """Physical memory owned by all pools."""
        self._n_other_mappings = 0
        # A garbage collection in the middle of a call may close a cache on this ledger, from the same thread.
        self._lock = threading.RLock()

    def other_mappings(self, n_mappings_now: int) -> int:
        """How many of the process's mappings are not ours, given how many it has now.

        Ours are charged at worst case, so that what is left over may be too few; a number measured while nothing
        was charged stands until nothing is charged again.
        """
        with self._lock:
            seen = max(0, n_mappings_now - self.n_mappings)
            self._n_other_mappings = max(seen, self._n_other_mappings if self.n_mappings else 0)
            return self._n_other_mappings

    def charge_mappings(self, n_mappings: int, limit: int) -> bool:
        """Count mappings unless `limit` would be passed; return whether they were counted."""
        with self._lock:
            if n_mappings > 0 and self.n_mappings + n_mappings > limit:
                return False
            self.n_mappings += n_mappings
            return True

    def charge_bytes(self, n_bytes: int, limit: int) -> bool:
        """Count memory unless `limit` would be passed; return whether it was counted."""
        with self._lock:
            if n_bytes > 0 and self.n_bytes + n_bytes > limit:
                return False
            self.n_bytes += n_bytes
            return True

    def refund_mappings(self, n_mappings: int) -> None:
        """Take back a charge."""
        with self._lock:
            self.n_mappings -= n_mappings

    def refund_bytes(self, n_bytes: int) -> None:
        """Take back a charge."""
        with self._lock:
            self.n_bytes -= n_bytes


PROCESS = Ledger()
"""The ledger of this process's host memory."""

_DEVICES: dict[str, Ledger] = {}


def ledger_of_device(uuid: str) -> Ledger:
    """The ledger of one device's memory in this process."""
    return _DEVICES.setdefault(uuid, Ledger())
