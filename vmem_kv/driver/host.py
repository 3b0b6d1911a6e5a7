"""Demand mapping on any Linux machine: one sealed, sparse memfd, mapped piecewise over PROT_NONE reservations.

Guarantees
  * A page is backed (fallocate) before anybody can touch it, so a full file system is an error and never SIGBUS.
  * A page is placed at the file offset that equals the address where it will be mapped first: neighbours merge
    into one kernel mapping, and a slot's plane costs two mappings however many pages it has.
  * Inside a reservation nothing is ever munmapped: PROT_NONE is mapped over it, so no other thread's mmap can
    slip in.
  * A forked child has neither the ranges nor the file and is refused by every call; the parent does not notice.

Assumptions: Linux, 64 bit. Addresses lie below 2^47, so that the file's upper half is free for pages that cannot
have their own address as offset because another page has it (a handle that was moved or shared).
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import threading
import weakref
from collections import Counter
from collections.abc import Collection, Sequence
from typing import NoReturn

from vmem_kv.driver.base import PASSED, Copy, Driver, DriverInfo, Fence, Handle, Reservation, Span
from vmem_kv.driver.host_mapper import (
    MAP_ANONYMOUS,
    MAP_FAILED,
    MAP_NORESERVE,
    MAP_PRIVATE,
    PROT_NONE,
    libc,
    open_mapper,
)
from vmem_kv.driver.ledger import PROCESS, Ledger
from vmem_kv.errors import (
    ConfigError,
    DriverError,
    OutOfAddressSpace,
    OutOfMappings,
    OutOfPages,
    UsageError,
)
from vmem_kv.machine import Machine, Memory, describe_machine, describe_memory
from vmem_kv.units import format_bytes, round_up

_UPPER_HALF = 1 << 47
_FILE_BYTES = 1 << 48
_SEALS = 0x0001 | 0x0002 | 0x0004  # F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW
_F_ADD_SEALS = 1033
_MFD_HUGETLB = 0x0004

HEADROOM_MAPPINGS = 4096
"""Mappings left to the rest of the process: at the kernel's limit even freeing and starting a thread fail."""


class HostDriver(Driver):
    """The driver contract over memfd and mmap.

    Args:
        path: "native", "python", or "auto" for native where it was built.
        huge_pages: Take memory from hugetlbfs, in units of its page size.
        headroom_mappings: How many of the process's mappings to leave alone.
        ledger: Where mappings and memory are counted; by default with those of the process's other host drivers.

    Raises:
        ConfigError: The machine cannot offer what was asked; the message names the setting to change.
    """

    def __init__(
        self,
        path: str = "auto",
        *,
        huge_pages: bool = False,
        headroom_mappings: int = HEADROOM_MAPPINGS,
        ledger: Ledger = PROCESS,
    ) -> None:
        machine = describe_machine()
        try:
            self._mapper = open_mapper(path)
        except OSError as error:
            raise ConfigError(f"host driver path {path!r}: {error}; use path='python' or 'auto'") from error
        self._huge_pages = huge_pages
        self._fd = _open_memfd(machine, huge_pages)
        self._pid = os.getpid()
        self._close_fd = weakref.finalize(self, _close_quietly, self._fd)
        _open_drivers.add(self)
        self._reservations: set[Reservation] = set()
        self._pages: dict[Handle, int] = {}  # live handles and their sizes
        self._orphans: list[Span] = []  # live pages whose place is no longer reserved, by offset
        self._next_upper = _UPPER_HALF
        # A garbage collection in the middle of a call may close a cache on this driver, from the same thread.
        self._lock = threading.RLock()
        self.calls = Counter()
        self.ledger = ledger
        n_other_mappings = ledger.other_mappings(machine.n_mappings_now)
        self.info = DriverInfo(
            name="host",
            device="cpu",
            granularity_bytes=machine.huge_page_bytes if huge_pages else machine.os_page_bytes,
            max_mappings=max(0, machine.max_map_count - n_other_mappings - headroom_mappings),
            neighbours_merge=True,
            # An isolated run splits its surroundings: one mapping for itself, one for what is behind it.
            mappings_per_run=2,
            # Zeroing dominates, and a page kept for another owner must be zeroed as well.
            keeps_pay=False,
            memory_bytes=_available_bytes(machine, huge_pages),
            max_reservation_bytes=1 << 46,
            path=self._mapper.name,
            reads_best="per_head",  # torch reads one head's tokens in a row as fast as contiguous memory
            mappings_advice="raise vm.max_map_count",
        )

    def available_bytes(self) -> int:
        return _available_bytes(describe_memory(), self._huge_pages)

    def reserve(self, n_bytes: int) -> Reservation:
        self._enter("reserve")
        # Reserve one granularity more than asked and give the unaligned edges back before anybody knows the range.
        granularity = self.info.granularity_bytes
        if n_bytes > self.info.max_reservation_bytes:
            raise OutOfAddressSpace(f"{n_bytes} bytes of addresses are more than {self.info.max_reservation_bytes}")
        extra = 0 if granularity == mmap.PAGESIZE else granularity
        flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
        start = libc.mmap(None, n_bytes + extra, PROT_NONE, flags, -1, 0)
        if start == MAP_FAILED:
            code = ctypes.get_errno()
            if code == errno.ENOMEM:
                raise OutOfAddressSpace(
                    f"cannot reserve {format_bytes(n_bytes)} of addresses; lower max_tokens or the number of slots, "
                    "or raise the limit on virtual memory (ulimit -v)"
                )
            _raise("reserve", code)
        base = round_up(start, granularity)
        if base > start:
            libc.munmap(start, base - start)
        if start + extra > base:
            libc.munmap(base + n_bytes, start + extra - base)
        libc.madvise(base, n_bytes, mmap.MADV_DONTFORK)
        reservation = Reservation(base, n_bytes)
        self._reservations.add(reservation)
        return reservation

    def free_reservation(self, reservation: Reservation) -> None:
        self._enter("free_reservation")
        if reservation not in self._reservations:
            raise UsageError(f"{reservation} is not a live reservation of this driver")
        gone = range(reservation.base, reservation.end)
        with self._lock:  # before the call: from then on another thread may reserve the same addresses
            self._reservations.remove(reservation)
            orphans = {(h, n) for h, n in self._pages.items() if h in gone}
            self._orphans = sorted(orphans.union(self._orphans))
        if libc.munmap(reservation.base, reservation.n_bytes) != 0:
            self._reservations.add(reservation)
            _raise("free_reservation", ctypes.get_errno())

    def create(self, page_bytes: int, places: Sequence[int], created: list[Handle]) -> None:
        self._enter("create")
        wanted = [Handle(place) for place in places]
        if self._orphans or not self._pages.keys().isdisjoint(wanted) or len(set(wanted)) < len(wanted):
            seen: set[Handle] = set()
            for i, place in enumerate(wanted):
                if place in seen or self._is_taken(place, page_bytes):
                    wanted[i] = self._elsewhere(page_bytes)
                seen.add(place)
        code, n_done = self._mapper.create(self._fd, wanted, page_bytes)
        with self._lock:
            self._pages.update(dict.fromkeys(wanted[:n_done], page_bytes))
        created.extend(wanted[:n_done])
        if code in (errno.ENOSPC, errno.ENOMEM):
            raise OutOfPages(f"the system has no memory for another page of {format_bytes(page_bytes)}")
        if code:
            _raise("create", code, n_done)

    def map(self, page_bytes: int, addresses: Sequence[int], handles: Sequence[Handle]) -> None:
        self._enter("map")
        code, n_done = self._mapper.map(self._fd, addresses, handles, page_bytes)
        _raise_from_mapping("map", code, n_done)

    def set_access(self, spans: Sequence[Span]) -> None:
        # mmap grants access at once; the contract only forbids relying on that.
        self._enter("set_access")

    def unmap(self, spans: Sequence[Span]) -> None:
        self._enter("unmap")
        code, n_done = self._mapper.unmap([address for address, _ in spans], [n_bytes for _, n_bytes in spans])
        _raise_from_mapping("unmap", code, n_done)

    def release(self, page_bytes: int, handles: Sequence[Handle]) -> None:
        self._enter("release")
        if not self._pages.keys() >= set(handles):
            raise UsageError("a handle was released that is not a live page of this driver")
        code, n_done = self._mapper.release(self._fd, handles, page_bytes)
        with self._lock:
            for handle in handles[:n_done]:
                del self._pages[handle]
            if self._orphans:
                self._orphans = [span for span in self._orphans if span[0] in self._pages]
        if code:
            _raise("release", code, n_done)

    def scrub(self, spans: Sequence[Span]) -> None:
        self._enter("scrub")
        for address, n_bytes in spans:
            ctypes.memset(address, 0, n_bytes)

    def copy(self, copies: Sequence[Copy]) -> None:
        self._enter("copy")
        for source, target, n_bytes in copies:
            ctypes.memmove(target, source, n_bytes)

    def copy_to_host(self, address: int, buffer: memoryview) -> Fence:
        self._enter("copy_to_host")
        ctypes.memmove((ctypes.c_char * buffer.nbytes).from_buffer(buffer), address, buffer.nbytes)
        return PASSED

    def copy_from_host(self, buffer: memoryview, address: int) -> Fence:
        self._enter("copy_from_host")
        # ctypes takes no address of read-only memory
        source = bytes(buffer) if buffer.readonly else (ctypes.c_char * buffer.nbytes).from_buffer(buffer)
        ctypes.memmove(address, source, buffer.nbytes)
        return PASSED

    def pin(self, address: int, n_bytes: int) -> None:
        self._enter("pin")  # the processor copies, which reaches all memory

    def unpin(self, address: int) -> None:
        self._enter("unpin")

    def fence(self, streams: Collection[int] = ()) -> Fence:
        return PASSED

    def close(self) -> None:
        if os.getpid() != self._pid:
            return
        if self._reservations:
            raise UsageError(f"{len(self._reservations)} reservations are still open; close their caches first")
        self._close_fd()

    def physical_bytes(self) -> int:
        """Memory behind the memfd now, by the kernel's own count."""
        self._enter("physical_bytes")
        return os.fstat(self._fd).st_blocks * 512

    def _enter(self, operation: str) -> None:
        if os.getpid() != self._pid:
            raise UsageError(
                f"{operation} in a forked child: the cache belongs to process {self._pid}; open one of your own"
            )
        if not self._close_fd.alive:
            raise UsageError(f"{operation} on a closed driver")
        self.calls[operation] += 1

    def _is_taken(self, place: Handle, page_bytes: int) -> bool:
        """Whether a live page has bytes at this offset: the one of this place, or one of an older reservation.

        Pages of one reservation stand on one grid, so among themselves only equal offsets can meet.
        """
        orphans = self._orphans  # once: another thread may put another list there
        behind = bisect.bisect_left(orphans, (place + page_bytes,))
        before = orphans[behind - 1] if behind else (0, 0)
        return place in self._pages or sum(before) > place

    def _elsewhere(self, page_bytes: int) -> Handle:
        """An offset in the file's upper half; never reused, there is room for decades of pages."""
        with self._lock:
            offset = round_up(self._next_upper, page_bytes)
            if offset + page_bytes > _FILE_BYTES:
                raise OutOfPages("the memfd has no free offsets left; reopen the cache")
            self._next_upper = offset + page_bytes
        return Handle(offset)


def _available_bytes(memory: Memory, huge_pages: bool) -> int:
    return memory.n_huge_pages_free * memory.huge_page_bytes if huge_pages else memory.usable_memory_bytes


def _open_memfd(machine: Machine, huge_pages: bool) -> int:
    if huge_pages and machine.n_huge_pages_free == 0:
        raise ConfigError("huge_pages=True, but no huge page is free; set vm.nr_hugepages or use huge_pages=False")
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | (_MFD_HUGETLB if huge_pages else 0)
    try:
        fd = os.memfd_create("vmem_kv", flags)
    except OSError as error:
        raise ConfigError(f"cannot create a memfd: {error}; raise ulimit -n if too many files are open") from error
    try:
        os.ftruncate(fd, _FILE_BYTES)
        fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)
    except OSError as error:
        os.close(fd)
        raise ConfigError(f"cannot size and seal a sparse memfd: {error}; raise ulimit -f") from error
    return fd


def _close_quietly(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.close(fd)


_open_drivers: weakref.WeakSet[HostDriver] = weakref.WeakSet()


def _close_in_child() -> None:
    """A child that kept the file would keep the parent's memory after the parent has gone."""
    for driver in list(_open_drivers):
        driver._close_fd()


os.register_at_fork(after_in_child=_close_in_child)


def _raise_from_mapping(operation: str, code: int, n_done: int) -> None:
    """Raise what a batch of mmap calls ended with, if anything."""
    if code in (errno.ENOMEM, errno.EAGAIN):  # madvise says EAGAIN where mmap says ENOMEM
        error = OutOfMappings(
            f"the kernel refuses another mapping in {operation}; raise vm.max_map_count or use larger pages"
        )
        error.n_done = n_done
        raise error
    if code:
        _raise(operation, code, n_done)


def _raise(operation: str, code: int, n_done: int = 0) -> NoReturn:
    raise DriverError(operation, code, errno.errorcode.get(code, "?"), n_done, os.strerror(code))
