"""A device whose copies to and from host memory run as late as the contract lets them.

A copy is launched and then nothing happens, until somebody waits for a fence behind it, asks that fence for the second
time, or launches something that must come behind it. Whoever unmaps or unpins memory, or uses it again, without having
waited, is caught: a late copy reads what is there now and writes over it.

    driver = LateDriver(HostDriver())
    ...
    driver.catch_up()                  # what a kernel of the same stream would do before it touches memory

Guarantees: copies run in the order in which they were launched. An unmap or unpin of what a copy that has not run
still touches raises UsageError and changes nothing.
Assumptions: one thread. Who touches the memory of mapped pages directly calls `catch_up` first.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from vmem_kv.driver.base import Copy, Driver, Fence, Span
from vmem_kv.errors import UsageError
from vmem_kv.testing.adaptor import Adaptor


class _Pending(NamedTuple):
    """A copy that was launched and has not run."""

    number: int
    run: Callable[[], Fence]
    spans: tuple[Span, Span]  # on the device and on the host


class LateDriver(Adaptor):
    """Wrap `inner`; see this file's first lines."""

    def __init__(self, inner: Driver) -> None:
        super().__init__(inner)
        self._pending: deque[_Pending] = deque()
        self._n_launched = 0
        self._pinned: dict[int, int] = {}  # bytes, by address

    @property
    def n_pending(self) -> int:
        """Copies that were launched and have not run."""
        return len(self._pending)

    def catch_up(self, number: int | None = None) -> None:
        """Run what was launched, all of it or up to a copy of this number."""
        while self._pending and (number is None or self._pending[0].number <= number):
            self._pending.popleft().run().wait()

    def copy_to_host(self, address: int, buffer: memoryview) -> Fence:
        return self._launch(address, buffer, lambda: self.inner.copy_to_host(address, buffer))

    def copy_from_host(self, buffer: memoryview, address: int) -> Fence:
        return self._launch(address, buffer, lambda: self.inner.copy_from_host(buffer, address))

    def scrub(self, spans: Sequence[Span]) -> None:
        self.catch_up()
        self.inner.scrub(spans)

    def copy(self, copies: Sequence[Copy]) -> None:
        self.catch_up()
        self.inner.copy(copies)

    def unmap(self, spans: Sequence[Span]) -> None:
        for address, n_bytes in spans:
            self._require_unused("unmap", address, n_bytes)
        self.inner.unmap(spans)

    def pin(self, address: int, n_bytes: int) -> None:
        self.inner.pin(address, n_bytes)
        self._pinned[address] = n_bytes

    def unpin(self, address: int) -> None:
        self._require_unused("unpin", address, self._pinned.get(address, 1))
        self.inner.unpin(address)
        self._pinned.pop(address, None)

    def fence(self, streams: Collection[int] = ()) -> Fence:
        return _LateFence(self, self._n_launched)

    def _launch(self, address: int, buffer: memoryview, run: Callable[[], Fence]) -> Fence:
        host = ctypes.addressof((ctypes.c_char * buffer.nbytes).from_buffer(buffer))
        self._n_launched += 1
        spans = ((address, buffer.nbytes), (host, buffer.nbytes))
        self._pending.append(_Pending(self._n_launched, run, spans))
        return _LateFence(self, self._n_launched)

    def _require_unused(self, operation: str, address: int, n_bytes: int) -> None:
        for _, _, spans in self._pending:
            if any(first < address + n_bytes and address < first + n for first, n in spans):
                raise UsageError(f"{operation} at {address:#x}, which a copy that was launched still touches")


class _LateFence:
    """A fence behind the first `number` copies."""

    def __init__(self, driver: LateDriver, number: int) -> None:
        self._driver = driver
        self._number = number
        self._n_asked = 0

    def passed(self) -> bool:
        """Whether they have run; the first who asks is told that they have not."""
        self._n_asked += 1
        if self._n_asked > 1:
            self.wait()
        return not self._driver._pending or self._driver._pending[0].number > self._number

    def wait(self) -> None:
        """Run them."""
        self._driver.catch_up(self._number)
