"""Drivers that do too little, but only where one has to look: each with the rule of the contract that names it.

What they keep from the process goes back at the end of `Wrong.opening`, so that the tests behind it find none missing.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from vmem_kv.driver.accounting import AccountingDriver
from vmem_kv.driver.base import Copy, Driver, Fence, Handle, Reservation, Span
from vmem_kv.driver.host import HostDriver
from vmem_kv.driver.host_mapper import libc
from vmem_kv.errors import DriverError, OutOfPages, UsageError, VmemError
from vmem_kv.units import GIB, KIB

PAGE = mmap.PAGESIZE


class UnmapsNothing(HostDriver):
    def unmap(self, spans: Sequence[Span]) -> None:
        self._enter("unmap")


class UnmapsThreeSpans(HostDriver):
    def unmap(self, spans: Sequence[Span]) -> None:
        super().unmap(spans[:3])


class NeverReturnsMemory(HostDriver):
    """Its pages keep their bytes behind places that are never used again."""

    def release(self, page_bytes: int, handles: Sequence[Handle]) -> None:
        self._enter("release")
        for n_done, handle in enumerate(handles):
            if self._pages.pop(handle, None) is None:
                error = UsageError(f"{handle} is no live page")
                error.n_done = n_done
                raise error
            self._orphans = sorted([*self._orphans, (handle, page_bytes)])


class ReturnsMemoryNowAndThen(HostDriver):
    """One page of every release stays behind, where nobody meets it."""

    def create(self, page_bytes: int, places: Sequence[int], created: list[Handle]) -> None:
        super().create(page_bytes, places, created)
        reservation = super().reserve(page_bytes)
        super().create(page_bytes, [reservation.base], [])
        super().free_reservation(reservation)
        self.calls["reserve"] -= 1
        self.calls["free_reservation"] -= 1
        self.calls["create"] -= 1


class HidesItsMemory(HostDriver):
    def physical_bytes(self) -> int:
        return 0


class KeepsForGood(HostDriver):
    """What its own calls do not give back."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.kept: list[Reservation] = []
        self.left_open: list[int] = []

    def give_back(self) -> None:
        """Give it back after all."""
        for reservation in self.kept:
            libc.munmap(reservation.base, reservation.n_bytes)
        for fd in self.left_open:
            os.close(fd)


class NeverReturnsAddresses(KeepsForGood):
    def free_reservation(self, reservation: Reservation) -> None:
        self._enter("free_reservation")
        if reservation not in self._reservations:
            raise UsageError(f"{reservation} is not reserved")
        self._reservations.remove(reservation)
        self.kept.append(reservation)


class ReservesMemory(HostDriver):
    def reserve(self, n_bytes: int) -> Reservation:
        reservation = super().reserve(n_bytes)
        libc.mprotect(ctypes.c_void_p(reservation.base), ctypes.c_size_t(PAGE), mmap.PROT_READ)
        return reservation


class CreatesThirtyTwoPages(HostDriver):
    def create(self, page_bytes: int, places: Sequence[int], created: list[Handle]) -> None:
        super().create(page_bytes, places[:32], created)


class AliasesTheFirstPage(HostDriver):
    """From the 65th page of a batch on."""

    def map(self, page_bytes: int, addresses: Sequence[int], handles: Sequence[Handle]) -> None:
        super().map(page_bytes, addresses, [*handles[:64], *[handles[0]] * len(handles[64:])])


class AliasesTheFirstPageEver(HostDriver):
    """From the 65th page that is ever mapped on."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._seen: list[Handle] = []

    def map(self, page_bytes: int, addresses: Sequence[int], handles: Sequence[Handle]) -> None:
        shown = []
        for handle in handles:
            self._seen.append(handle)
            shown.append(handle if len(self._seen) < 65 else self._seen[0])
        super().map(page_bytes, addresses, shown)


class ReleasesThirtyTwoPages(HostDriver):
    def release(self, page_bytes: int, handles: Sequence[Handle]) -> None:
        super().release(page_bytes, handles[:32])


class ScrubsSixtyFourKib(HostDriver):
    def scrub(self, spans: Sequence[Span]) -> None:
        super().scrub([(address, min(n_bytes, 64 * KIB)) for address, n_bytes in spans])


class ScrubsThirtyTwoSpans(HostDriver):
    def scrub(self, spans: Sequence[Span]) -> None:
        super().scrub(spans[:32])


class ReadsSixtyFourKib(HostDriver):
    def copy_to_host(self, address: int, buffer: memoryview) -> Fence:
        return super().copy_to_host(address, buffer[: 64 * KIB])


class WritesSixtyFourKib(HostDriver):
    def copy_from_host(self, buffer: memoryview, address: int) -> Fence:
        return super().copy_from_host(buffer[: 64 * KIB], address)


class CopiesFourKib(HostDriver):
    def copy(self, copies: Sequence[Copy]) -> None:
        super().copy([Copy(source, target, min(n_bytes, 4 * KIB)) for source, target, n_bytes in copies])


class CopiesWholeWords(HostDriver):
    def copy(self, copies: Sequence[Copy]) -> None:
        super().copy([Copy(source, target, n if n < 200 else n // 8 * 8) for source, target, n in copies])


class LeavesAFileOpen(KeepsForGood):
    def close(self) -> None:
        if self._close_fd.alive and not self._reservations:
            self.left_open.append(os.dup(self._fd))
        super().close()


class ClosesWhenForgotten(HostDriver):
    """The garbage collector closes its file."""

    def close(self) -> None:
        if self._reservations:
            raise UsageError("reservations are open")
        self._is_closed = True

    def _enter(self, operation: str) -> None:
        if getattr(self, "_is_closed", False):
            raise UsageError("closed")
        super()._enter(operation)


class OwesMemory(HostDriver):
    def available_bytes(self) -> int:
        return -PAGE


class SaysHalfAByte(HostDriver):
    def available_bytes(self) -> int:
        return super().available_bytes() / 2  # type: ignore[return-value]


class HasNoLedger(HostDriver):
    def __init__(self, path: str) -> None:
        super().__init__(path)
        del self.ledger


class BreaksOff(HostDriver):
    """A bug of its own shows as an exception that the contract knows nothing of."""

    def reserve(self, n_bytes: int) -> Reservation:
        raise KeyError(n_bytes)


class OwesMemoryLater(HostDriver):
    """Once pages were created."""

    def available_bytes(self) -> int:
        return super().available_bytes() * (-1 if self.calls["create"] else 1)


class BooksLoseMemory(AccountingDriver):
    def release(self, page_bytes: int, handles: Sequence[Handle]) -> None:
        super().release(page_bytes, handles)
        self.n_created_bytes += len(handles) * page_bytes


class CallsFullMemoryAnError(AccountingDriver):
    def create(self, page_bytes: int, places: Sequence[int], created: list[Handle]) -> None:
        try:
            super().create(page_bytes, places, created)
        except OutOfPages as error:
            raise DriverError("create", 12, "ENOMEM", error.n_done, "full") from error


class MisstatesHowFarMapCame(HostDriver):
    def map(self, page_bytes: int, addresses: Sequence[int], handles: Sequence[Handle]) -> None:
        try:
            super().map(page_bytes, addresses, handles)
        except VmemError as error:
            error.n_done = 0
            raise


class CallsFullHostMemoryAnError(HostDriver):
    def create(self, page_bytes: int, places: Sequence[int], created: list[Handle]) -> None:
        try:
            super().create(page_bytes, places, created)
        except OutOfPages as error:
            raise DriverError("create", 12, "ENOMEM", error.n_done, "full") from error


class Wrong(NamedTuple):
    """A driver that breaks a rule."""

    kind: type[Driver]
    rule: str  # how the rule begins that must name it

    @contextmanager
    def opening(self) -> Iterator[Callable[[], Driver]]:
        """What opens it, inside the block."""
        opened: list[Driver] = []

        def open_driver() -> Driver:
            has_books = issubclass(self.kind, AccountingDriver)
            opened.append(self.kind(GIB, PAGE) if has_books else self.kind("python"))  # type: ignore[call-arg]
            return opened[-1]

        try:
            yield open_driver
        finally:
            for driver in opened:
                if isinstance(driver, KeepsForGood):
                    driver.give_back()


WRONG = (
    Wrong(OwesMemory, "ledger, calls, available_bytes: are there"),
    Wrong(SaysHalfAByte, "ledger, calls, available_bytes: are there"),
    Wrong(HasNoLedger, "ledger, calls, available_bytes: are there"),
    Wrong(BreaksOff, "reserve: ranges are aligned"),
    Wrong(OwesMemoryLater, "release: memory comes back"),
    Wrong(AliasesTheFirstPageEver, "map: a page that is mapped, unmapped and mapped again"),
    Wrong(CreatesThirtyTwoPages, "create: a batch of hundreds"),
    Wrong(AliasesTheFirstPage, "map, set_access: a batch of hundreds"),
    Wrong(UnmapsNothing, "unmap: every span of a call goes"),
    Wrong(UnmapsThreeSpans, "unmap: every span of a call goes"),
    Wrong(ReleasesThirtyTwoPages, "release: a batch of hundreds"),
    Wrong(ReadsSixtyFourKib, "copy_from_host, copy_to_host: a megabyte"),
    Wrong(WritesSixtyFourKib, "copy_from_host, copy_to_host: a megabyte"),
    Wrong(ScrubsSixtyFourKib, "scrub: spans of more than a megabyte"),
    Wrong(ScrubsThirtyTwoSpans, "scrub: spans of more than a megabyte"),
    Wrong(CopiesFourKib, "copy: hundreds in one call"),
    Wrong(CopiesWholeWords, "copy: hundreds in one call"),
    Wrong(CallsFullMemoryAnError, "create: a page for which there is no memory"),
    Wrong(ReservesMemory, "reserve: nothing can be touched"),
    Wrong(NeverReturnsAddresses, "free_reservation: addresses come back"),
    Wrong(NeverReturnsMemory, "release: memory comes back"),
    Wrong(ReturnsMemoryNowAndThen, "release: memory comes back"),
    Wrong(HidesItsMemory, "release: memory comes back"),
    Wrong(BooksLoseMemory, "release: memory comes back"),
    Wrong(LeavesAFileOpen, "close: gives back the files"),
    Wrong(ClosesWhenForgotten, "close: gives back the files"),
)

UNSEEN: tuple[Callable[[], Driver], ...] = (
    lambda: MisstatesHowFarMapCame("python"),
    lambda: CallsFullHostMemoryAnError("python"),
)
"""What docs/testing-a-driver.md says that the verdict does not see."""
