"""A trace of driver calls that can be read, kept and replayed on another driver.

    driver = LoggingDriver(HostDriver(), calls := [])
    ...
    replay(calls, CudaDriver(0, NoRuntime()))            # the same calls, in the same order, on another device

A call is a line of JSON (`Call.to_json`). Addresses and handles are those of the driver that was recorded; `replay`
translates them: an address by the reservation around it, a handle by the order of creation.

Guarantees: a call is recorded when it has returned, with what took effect, so that a failed call is replayed as far as
it came. Contents of copies are not kept, only their sizes: a replay moves zeros.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, MutableSequence, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vmem_kv.driver.base import Copy, Driver, Fence, Handle, Reservation, Span
from vmem_kv.errors import UsageError, VmemError
from vmem_kv.testing.adaptor import Adaptor

UNKNOWN = -1
"""How far a call came that was interrupted: nobody can say."""


@dataclass(frozen=True, slots=True)
class Call:
    """One driver call and what became of it.

    Attributes:
        operation: The contract's name.
        arguments: Flat integers: `[n_bytes]`, `[base, n_bytes]`, `[page_bytes, ...]`, or `[address, n_bytes, ...]`.
        result: Handles of `create`, the base of `reserve`; else empty.
        n_done: Items that took effect, or `UNKNOWN`.
        error: The type of what was raised, or "".
        thread: The name of the calling thread.
    """

    operation: str
    arguments: tuple[int, ...]
    result: tuple[int, ...] = ()
    n_done: int = 0
    error: str = ""
    thread: str = field(default_factory=lambda: threading.current_thread().name)

    def to_json(self) -> str:
        """Return one line without its end."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Call:
        """Read what `to_json` wrote.

        Raises:
            UsageError: The line is no call.
        """
        try:
            items: dict[str, Any] = json.loads(line)
            return cls(
                str(items["operation"]),
                tuple(items["arguments"]),
                tuple(items["result"]),
                int(items["n_done"]),
                str(items["error"]),
                str(items["thread"]),
            )
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise UsageError(f"{line[:80]!r} is no recorded driver call: {error}") from error


class LoggingDriver(Adaptor):
    """Wrap `inner` and append every call to `calls`; see this file's first lines."""

    def __init__(self, inner: Driver, calls: MutableSequence[Call]) -> None:
        super().__init__(inner)
        self.recorded = calls

    def reserve(self, n_bytes: int) -> Reservation:
        try:
            reservation = self.inner.reserve(n_bytes)
        except BaseException as error:
            self._note("reserve", [n_bytes], error, 0)
            raise
        self._note("reserve", [n_bytes], None, 1, [reservation.base])
        return reservation

    def free_reservation(self, reservation: Reservation) -> None:
        error: BaseException | None = None
        try:
            self.inner.free_reservation(reservation)
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._note("free_reservation", [reservation.base, reservation.n_bytes], error, 1)

    def create(self, page_bytes: int, places: Sequence[int], created: list[Handle]) -> None:
        n_before, error = len(created), None
        try:
            self.inner.create(page_bytes, places, created)
        except BaseException as raised:
            error = raised
            raise
        finally:
            new = created[n_before:]
            self._note("create", [page_bytes, *places], error, len(new), new, is_certain=True)

    def map(self, page_bytes: int, addresses: Sequence[int], handles: Sequence[Handle]) -> None:
        error: BaseException | None = None
        try:
            self.inner.map(page_bytes, addresses, handles)
        except BaseException as raised:
            error = raised
            raise
        finally:
            pairs = [x for pair in zip(addresses, handles, strict=True) for x in pair]
            self._note("map", [page_bytes, *pairs], error, len(handles))

    def set_access(self, spans: Sequence[Span]) -> None:
        self._over("set_access", spans, lambda: self.inner.set_access(spans))

    def unmap(self, spans: Sequence[Span]) -> None:
        self._over("unmap", spans, lambda: self.inner.unmap(spans))

    def scrub(self, spans: Sequence[Span]) -> None:
        self._over("scrub", spans, lambda: self.inner.scrub(spans))

    def release(self, page_bytes: int, handles: Sequence[Handle]) -> None:
        error: BaseException | None = None
        try:
            self.inner.release(page_bytes, handles)
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._note("release", [page_bytes, *handles], error, len(handles))

    def copy(self, copies: Sequence[Copy]) -> None:
        self._over("copy", copies, lambda: self.inner.copy(copies))

    def copy_to_host(self, address: int, buffer: memoryview) -> Fence:
        fence = self.inner.copy_to_host(address, buffer)
        self._note("copy_to_host", [address, buffer.nbytes], None, 1)
        return fence

    def copy_from_host(self, buffer: memoryview, address: int) -> Fence:
        fence = self.inner.copy_from_host(buffer, address)
        self._note("copy_from_host", [address, buffer.nbytes], None, 1)
        return fence

    def close(self) -> None:
        self.inner.close()
        self._note("close", [], None, 1)

    def _over(self, operation: str, items: Sequence[tuple[int, ...]], call: Callable[[], None]) -> None:
        error: BaseException | None = None
        try:
            call()
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._note(operation, [x for item in items for x in item], error, len(items))

    def _note(
        self,
        operation: str,
        arguments: Sequence[int],
        error: BaseException | None,
        n_items: int,
        result: Sequence[int] = (),
        *,
        is_certain: bool = False,
    ) -> None:
        n_done = n_items
        if error is not None and not is_certain:
            n_done = error.n_done if isinstance(error, VmemError) else UNKNOWN
        name = type(error).__name__ if error is not None else ""
        self.recorded.append(Call(operation, tuple(arguments), tuple(result), n_done, name))


class _Replay:
    """One replay: what addresses and handles of the record are called on this driver."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._reservations: dict[int, Reservation] = {}  # by the base in the record
        self._handles: dict[int, Handle] = {}

    def make(self, call: Call) -> None:
        """Make one call as far as it came when it was recorded."""
        driver, numbers, n = self._driver, call.arguments, call.n_done
        if n == UNKNOWN:
            raise UsageError(f"nobody knows how far an interrupted {call.operation} came; it cannot be replayed")
        if n == 0 and call.operation != "close":
            return
        match call.operation:
            case "reserve":
                self._reservations[call.result[0]] = driver.reserve(numbers[0])
            case "free_reservation":
                driver.free_reservation(self._reservations.pop(numbers[0]))
            case "create":
                created: list[Handle] = []
                driver.create(numbers[0], [self._address(a) for a in numbers[1 : n + 1]], created)
                self._handles.update(zip(call.result, created, strict=True))
            case "map":
                places, handles = numbers[1 : 2 * n : 2], numbers[2 : 2 * n + 1 : 2]
                driver.map(numbers[0], [self._address(a) for a in places], [self._handles[h] for h in handles])
            case "release":
                driver.release(numbers[0], [self._handles.pop(handle) for handle in numbers[1 : n + 1]])
            case "set_access":
                driver.set_access(self._spans(numbers, n))
            case "unmap":
                driver.unmap(self._spans(numbers, n))
            case "scrub":
                driver.scrub(self._spans(numbers, n))
            case "copy":
                triples = zip(numbers[: 3 * n : 3], numbers[1 : 3 * n : 3], numbers[2 : 3 * n : 3], strict=True)
                driver.copy([Copy(self._address(source), self._address(to), size) for source, to, size in triples])
            case "copy_to_host":
                driver.copy_to_host(self._address(numbers[0]), memoryview(bytearray(numbers[1]))).wait()
            case "copy_from_host":
                driver.copy_from_host(memoryview(bytes(numbers[1])), self._address(numbers[0])).wait()
            case "close":
                driver.close()
            case _:
                raise UsageError(f"a trace cannot hold {call.operation!r}")

    def _address(self, recorded: int) -> int:
        for base, reservation in self._reservations.items():
            if base <= recorded < base + reservation.n_bytes:
                return reservation.base + recorded - base
        raise UsageError(f"address {recorded:#x} lies in nothing that the trace reserved before")

    def _spans(self, numbers: Sequence[int], n: int) -> list[Span]:
        return [(self._address(a), size) for a, size in zip(numbers[: 2 * n : 2], numbers[1 : 2 * n : 2], strict=True)]


def replay(calls: Iterable[Call], driver: Driver) -> int:
    """Make recorded calls again, on `driver`; return how many were made.

    Raises:
        UsageError: The trace does not make sense: a call of an unknown kind, an address outside of every reservation,
            or a call that was interrupted.
        VmemError: A call failed that had succeeded when it was recorded.
    """
    player, n_calls = _Replay(driver), 0
    for call in calls:
        player.make(call)
        n_calls += 1
    return n_calls
