"""Make any driver fail on demand: which call, of which kind, how often, with which error.

A `FaultyDriver` hands batches to the driver inside one item at a time, so that every item is an *injection point*:
failing point N for N = 1, 2, ... walks through every place in which a batch can break off. An injected failure
happens before its item takes effect, and `n_done` says how many items of the batch did, as the contract demands.

    driver = FaultyDriver(HostDriver())
    run(CheckedDriver(driver))                 # once without faults, to count
    for n in range(1, driver.n_points + 1):
        run(CheckedDriver(FaultyDriver(HostDriver(), fail_once(n))))

Assumptions: a plan is a function of the point (`fail_next` alone remembers that it has hit). Points are numbered over
all threads in the order of arrival. `available_bytes`, `current_stream` and `close` are no points.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from vmem_kv.driver.base import Copy, Driver, Fence, Handle, Reservation, Span
from vmem_kv.errors import DriverError, OutOfAddressSpace, OutOfHostMemory, OutOfMappings, OutOfPages, VmemError
from vmem_kv.testing.adaptor import Adaptor

if TYPE_CHECKING:
    from collections.abc import Iterator


class Point(NamedTuple):
    """One place in which a driver call can fail."""

    operation: str
    n: int  # counts all points, from 1
    n_of_kind: int  # counts the points of this operation, from 1


MakeError = Callable[[Point], BaseException]
Plan = Callable[[Point], BaseException | None]
"""What goes wrong at a point; None for nothing."""


def driver_error(code: int = errno.EIO) -> MakeError:
    """Errors of the driver itself, with an errno as the code."""
    return lambda point: DriverError(
        point.operation, code, errno.errorcode.get(code, "?"), 0, f"injected at point {point.n}"
    )


def natural_error(point: Point) -> BaseException:
    """What running out of something looks like in this operation, else a DriverError."""
    if point.operation == "reserve":
        return OutOfAddressSpace(f"injected at point {point.n}")
    if point.operation == "create":
        return OutOfPages(f"injected at point {point.n}")
    if point.operation == "pin":
        return OutOfHostMemory(f"injected at point {point.n}")
    if point.operation in ("map", "set_access"):
        return OutOfMappings(f"injected at point {point.n}")
    return driver_error()(point)


def interruption(point: Point) -> BaseException:
    """The user's Ctrl-C. It carries `n_done` for `CheckedDriver` only; the allocator must not look at it."""
    return KeyboardInterrupt(f"injected at point {point.n}")


def no_faults(point: Point) -> BaseException | None:
    """Let everything pass."""
    return None


def fail_once(n: int, make_error: MakeError = natural_error) -> Plan:
    """Fail point `n` only."""
    return lambda point: make_error(point) if point.n == n else None


def fail_from(n: int, make_error: MakeError = natural_error) -> Plan:
    """Fail point `n` and everything after it, as a dead device would."""
    return lambda point: make_error(point) if point.n >= n else None


def fail_kind(operation: str, n_of_kind: int | None = None, make_error: MakeError = natural_error) -> Plan:
    """Fail the `n_of_kind`-th point of one operation; every one of them without a number."""
    return lambda point: (
        make_error(point) if point.operation == operation and n_of_kind in (None, point.n_of_kind) else None
    )


def fail_any(*plans: Plan) -> Plan:
    """Compound faults: what the first plan with an opinion says. The second one can hit while the first is undone."""
    return lambda point: next((error for plan in plans if (error := plan(point)) is not None), None)


def fail_next(operation: str, behind: int, make_error: MakeError = natural_error) -> Plan:
    """Fail the first point of `operation` behind point number `behind`, once: the plan is for one run.

    With `fail_any`, it hits the undoing of a failure: `fail_any(fail_once(n), fail_next("unmap", behind=n))`.
    """
    hits: list[int] = []

    def plan(point: Point) -> BaseException | None:
        if point.n <= behind or point.operation != operation or hits:
            return None
        hits.append(point.n)
        return make_error(point)

    return plan


def slow(operation: str, seconds: float, sleep: Callable[[float], None] = time.sleep) -> Plan:
    """Let every item of one operation take so much longer. Nothing fails.

    Args:
        operation: Which one.
        seconds: How much longer.
        sleep: How to wait; a test hands in `ManualClock.advance`.
    """
    return lambda point: sleep(seconds) if point.operation == operation else None


class FaultyDriver(Adaptor):
    """Wrap `inner` so that `plan` decides at every item of every call whether it fails.

    Args:
        inner: Does the work.
        plan: May be exchanged while running, through `plan`.
    """

    def __init__(self, inner: Driver, plan: Plan = no_faults) -> None:
        super().__init__(inner)
        self.plan = plan
        self.points: list[Point] = []
        """Every point that was passed, failed or not."""
        self.faults: list[Point] = []
        """The points that failed."""
        self._n_of_kind: Counter[str] = Counter()
        self._calls: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def calls(self) -> Counter[str]:  # type: ignore[override]
        """The calls as they were made; the driver inside counts an item each."""
        return self._calls

    @property
    def n_points(self) -> int:
        """Injection points so far."""
        return len(self.points)

    @contextmanager
    def failing(self, plan: Plan) -> Iterator[None]:
        """Follow `plan` inside the block, with points counted from its beginning; no faults after it."""
        self.begin_count()
        self.plan = plan
        try:
            yield
        finally:
            self.plan = no_faults

    def begin_count(self) -> None:
        """Count points from here on, as if none had been passed."""
        with self._lock:
            self.points, self.faults = [], []
            self._n_of_kind.clear()

    def reserve(self, n_bytes: int) -> Reservation:
        """See `Driver.reserve`; one point."""
        self._call("reserve")
        self._point("reserve", 0)
        return self.inner.reserve(n_bytes)

    def free_reservation(self, reservation: Reservation) -> None:
        """See `Driver.free_reservation`; one point."""
        self._call("free_reservation")
        self._point("free_reservation", 0)
        self.inner.free_reservation(reservation)

    def create(self, page_bytes: int, places: Sequence[int], created: list[Handle]) -> None:
        """See `Driver.create`; a point per page."""
        self._call("create")
        for n_done, place in enumerate(places):
            self._point("create", n_done)
            self.inner.create(page_bytes, [place], created)

    def map(self, page_bytes: int, addresses: Sequence[int], handles: Sequence[Handle]) -> None:
        """See `Driver.map`; a point per page."""
        self._call("map")
        for n_done, (address, handle) in enumerate(zip(addresses, handles, strict=True)):
            self._point("map", n_done)
            with _continuing(n_done):
                self.inner.map(page_bytes, [address], [handle])

    def set_access(self, spans: Sequence[Span]) -> None:
        """See `Driver.set_access`; a point per span."""
        self._call("set_access")
        for n_done, span in enumerate(spans):
            self._point("set_access", n_done)
            with _continuing(n_done):
                self.inner.set_access([span])

    def unmap(self, spans: Sequence[Span]) -> None:
        """See `Driver.unmap`; a point per span."""
        self._call("unmap")
        for n_done, span in enumerate(spans):
            self._point("unmap", n_done)
            with _continuing(n_done):
                self.inner.unmap([span])

    def release(self, page_bytes: int, handles: Sequence[Handle]) -> None:
        """See `Driver.release`; a point per page."""
        self._call("release")
        for n_done, handle in enumerate(handles):
            self._point("release", n_done)
            with _continuing(n_done):
                self.inner.release(page_bytes, [handle])

    def scrub(self, spans: Sequence[Span]) -> None:
        """See `Driver.scrub`; a point per span."""
        self._call("scrub")
        for n_done, span in enumerate(spans):
            self._point("scrub", n_done)
            with _continuing(n_done):
                self.inner.scrub([span])

    def copy(self, copies: Sequence[Copy]) -> None:
        """See `Driver.copy`; a point per copy."""
        self._call("copy")
        for n_done, one in enumerate(copies):
            self._point("copy", n_done)
            with _continuing(n_done):
                self.inner.copy([one])

    def copy_to_host(self, address: int, buffer: memoryview) -> Fence:
        """See `Driver.copy_to_host`; one point."""
        self._call("copy_to_host")
        self._point("copy_to_host", 0)
        return self.inner.copy_to_host(address, buffer)

    def copy_from_host(self, buffer: memoryview, address: int) -> Fence:
        """See `Driver.copy_from_host`; one point."""
        self._call("copy_from_host")
        self._point("copy_from_host", 0)
        return self.inner.copy_from_host(buffer, address)

    def pin(self, address: int, n_bytes: int) -> None:
        """See `Driver.pin`; one point."""
        self._call("pin")
        self._point("pin", 0)
        self.inner.pin(address, n_bytes)

    def unpin(self, address: int) -> None:
        """See `Driver.unpin`; one point."""
        self._call("unpin")
        self._point("unpin", 0)
        self.inner.unpin(address)

    def bind_thread(self) -> None:
        """See `Driver.bind_thread`; one point."""
        self._point("bind_thread", 0)
        self.inner.bind_thread()

    def fence(self, streams: Collection[int] = ()) -> Fence:
        """See `Driver.fence`; one point."""
        self._point("fence", 0)
        return self.inner.fence(streams)

    def _call(self, operation: str) -> None:
        with self._lock:
            self._calls[operation] += 1

    def _point(self, operation: str, n_done: int) -> None:
        with self._lock:
            self._n_of_kind[operation] += 1
            point = Point(operation, len(self.points) + 1, self._n_of_kind[operation])
            self.points.append(point)
        error = self.plan(point)  # without the lock: a plan may wait for something
        if error is not None:
            with self._lock:
                self.faults.append(point)
            error.n_done = n_done  # type: ignore[attr-defined]
            raise error


@contextmanager
def _continuing(n_done: int) -> Iterator[None]:
    """Count the items that went through before in an error of the inner driver."""
    try:
        yield
    except VmemError as error:
        error.n_done += n_done
        raise
