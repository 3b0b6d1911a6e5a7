"""The base of every driver around a driver: it hands each call on to the driver inside.

Guarantees: does nothing of its own; a subclass overrides the calls that it is about. Adaptors stack in any order:

    driver = CheckedDriver(FaultyDriver(LimitingDriver(HostDriver(), max_bytes=1 << 20)))

Assumptions: whoever wraps a driver makes all calls through the outermost one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from vmem_kv.driver.base import Copy, Driver, DriverInfo, Fence, Handle, Reservation, Span
from vmem_kv.driver.ledger import Ledger


class Adaptor(Driver):
    """Wrap `inner`; see this file's first lines.

    Args:
        inner: Does the work.
        info: What to say of oneself, where that differs from what `inner` says.
    """

    def __init__(self, inner: Driver, info: DriverInfo | None = None) -> None:
        self.inner = inner
        self.info = info or inner.info

    @property
    def calls(self) -> Counter[str]:  # type: ignore[override]
        """The inner driver's counts."""
        return self.inner.calls

    @property
    def ledger(self) -> Ledger:  # type: ignore[override]
        """The inner driver's ledger."""
        return self.inner.ledger

    def available_bytes(self) -> int:
        return self.inner.available_bytes()

    def reserve(self, n_bytes: int) -> Reservation:
        return self.inner.reserve(n_bytes)

    def free_reservation(self, reservation: Reservation) -> None:
        self.inner.free_reservation(reservation)

    def create(self, page_bytes: int, places: Sequence[int], created: list[Handle]) -> None:
        self.inner.create(page_bytes, places, created)

    def map(self, page_bytes: int, addresses: Sequence[int], handles: Sequence[Handle]) -> None:
        self.inner.map(page_bytes, addresses, handles)

    def set_access(self, spans: Sequence[Span]) -> None:
        self.inner.set_access(spans)

    def unmap(self, spans: Sequence[Span]) -> None:
        self.inner.unmap(spans)

    def release(self, page_bytes: int, handles: Sequence[Handle]) -> None:
        self.inner.release(page_bytes, handles)

    def scrub(self, spans: Sequence[Span]) -> None:
        self.inner.scrub(spans)

    def copy(self, copies: Sequence[Copy]) -> None:
        self.inner.copy(copies)

    def copy_to_host(self, address: int, buffer: memoryview) -> Fence:
        return self.inner.copy_to_host(address, buffer)

    def copy_from_host(self, buffer: memoryview, address: int) -> Fence:
        return self.inner.copy_from_host(buffer, address)

    def pin(self, address: int, n_bytes: int) -> None:
        self.inner.pin(address, n_bytes)

    def unpin(self, address: int) -> None:
        self.inner.unpin(address)

    def bind_thread(self) -> None:
        self.inner.bind_thread()

    def current_stream(self) -> int:
        return self.inner.current_stream()

    def fence(self, streams: Collection[int] = ()) -> Fence:
        return self.inner.fence(streams)

    def close(self) -> None:
        self.inner.close()
