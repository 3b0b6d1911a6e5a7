"""How often each driver call is made, for how many items, how often it fails and how long it takes.

Counted are the calls that make, change, copy and pin memory, not those that ask (fences, streams, what is available).

Guarantees: counts what took effect, also of calls that failed half way. A snapshot is consistent.
Assumptions: the clock is monotonic. Calls of several threads at a time add up their times.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from vmem_kv.driver.base import Copy, Driver, Fence, Handle, Reservation, Span
from vmem_kv.testing.adaptor import Adaptor, Effect
from vmem_kv.testing.clock import Clock


@dataclass(frozen=True, slots=True)
class Operation:
    """One kind of call: see the field names."""

    n_calls: int = 0
    n_items: int = 0  # that took effect
    n_failed: int = 0
    seconds: float = 0.0


class StatisticsDriver(Adaptor):
    """Wrap `inner`; see this file's first lines.

    Attributes:
        n_live_bytes: Memory of the pages that are live now.
        n_peak_bytes: The most that it ever was.
        n_live_reserved_bytes: Addresses reserved now.
    """

    def __init__(self, inner: Driver, clock: Clock = time.perf_counter) -> None:
        super().__init__(inner)
        self.n_live_bytes = self.n_peak_bytes = self.n_live_reserved_bytes = 0
        self._clock = clock
        self._operations: dict[str, Operation] = {}
        self._lock = threading.Lock()

    def operations(self) -> dict[str, Operation]:
        """Return a snapshot, by operation."""
        with self._lock:
            return dict(self._operations)

    def reserve(self, n_bytes: int) -> Reservation:
        with self._measured("reserve", 1):
            reservation = self.inner.reserve(n_bytes)
        with self._lock:
            self.n_live_reserved_bytes += n_bytes
        return reservation

    def free_reservation(self, reservation: Reservation) -> None:
        with self._measured("free_reservation", 1):
            self.inner.free_reservation(reservation)
        with self._lock:
            self.n_live_reserved_bytes -= reservation.n_bytes

    def create(self, page_bytes: int, places: Sequence[int], created: list[Handle]) -> None:
        n_before = len(created)
        try:
            with self._measured("create", 0):
                self.inner.create(page_bytes, places, created)
        finally:
            self._count("create", n_items=len(created) - n_before)
            with self._lock:
                self.n_live_bytes += (len(created) - n_before) * page_bytes
                self.n_peak_bytes = max(self.n_peak_bytes, self.n_live_bytes)

    def map(self, page_bytes: int, addresses: Sequence[int], handles: Sequence[Handle]) -> None:
        with self._measured("map", len(handles)):
            self.inner.map(page_bytes, addresses, handles)

    def set_access(self, spans: Sequence[Span]) -> None:
        with self._measured("set_access", len(spans)):
            self.inner.set_access(spans)

    def unmap(self, spans: Sequence[Span]) -> None:
        with self._measured("unmap", len(spans)):
            self.inner.unmap(spans)

    def release(self, page_bytes: int, handles: Sequence[Handle]) -> None:
        effect = Effect(len(handles))
        try:
            with self._measured("release", len(handles)), effect:
                self.inner.release(page_bytes, handles)
        finally:
            with self._lock:
                self.n_live_bytes -= effect.n_done * page_bytes

    def scrub(self, spans: Sequence[Span]) -> None:
        with self._measured("scrub", len(spans)):
            self.inner.scrub(spans)

    def copy(self, copies: Sequence[Copy]) -> None:
        with self._measured("copy", len(copies)):
            self.inner.copy(copies)

    def copy_to_host(self, address: int, buffer: memoryview) -> Fence:
        with self._measured("copy_to_host", 1):
            return self.inner.copy_to_host(address, buffer)

    def copy_from_host(self, buffer: memoryview, address: int) -> Fence:
        with self._measured("copy_from_host", 1):
            return self.inner.copy_from_host(buffer, address)

    def pin(self, address: int, n_bytes: int) -> None:
        with self._measured("pin", 1):
            self.inner.pin(address, n_bytes)

    def unpin(self, address: int) -> None:
        with self._measured("unpin", 1):
            self.inner.unpin(address)

    @contextmanager
    def _measured(self, operation: str, n_items: int) -> Iterator[None]:
        begin, effect, n_failed = self._clock(), Effect(n_items), 1
        try:
            with effect:
                yield
            n_failed = 0
        finally:
            self._count(operation, 1, effect.n_done, n_failed, self._clock() - begin)

    def _count(
        self, operation: str, n_calls: int = 0, n_items: int = 0, n_failed: int = 0, seconds: float = 0.0
    ) -> None:
        with self._lock:
            old = self._operations.get(operation, Operation())
            self._operations[operation] = replace(
                old,
                n_calls=old.n_calls + n_calls,
                n_items=old.n_items + n_items,
                n_failed=old.n_failed + n_failed,
                seconds=old.seconds + seconds,
            )
