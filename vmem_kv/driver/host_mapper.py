"""How the host driver reaches the kernel: one batch of pages per call, by native code or by ctypes.

Both classes do the same, and the driver cannot tell them apart: a call returns (errno or 0, n_done). Neighbours
(consecutive addresses and offsets) are joined into one system call. `NativeMapper` runs the loop in C
(`native/host_mapper.c`); `SyscallMapper` runs it here and needs no compiler.
"""

from __future__ import annotations

import ctypes
import errno
from array import array
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Protocol

ABI = 3

PROT_NONE, PROT_READ_WRITE = 0, 3
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS = 0x01, 0x02, 0x10, 0x20
MAP_NORESERVE = 0x4000
MADV_DONTFORK, MADV_POPULATE_READ, MADV_POPULATE_WRITE = 10, 22, 23
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 0x01, 0x02

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
MAP_FAILED = ctypes.c_void_p(-1).value


class Mapper(Protocol):
    """Batched page operations on one memfd. Every call returns (errno or 0, items done)."""

    name: str

    def create(self, fd: int, offsets: Sequence[int], page_bytes: int) -> tuple[int, int]:
        """Back file pages with zeroed memory."""

    def release(self, fd: int, offsets: Sequence[int], page_bytes: int) -> tuple[int, int]:
        """Give file pages back to the system."""

    def map(self, fd: int, addresses: Sequence[int], offsets: Sequence[int], page_bytes: int) -> tuple[int, int]:
        """Map file pages over reserved addresses, readable and writable."""

    def unmap(self, addresses: Sequence[int], lengths: Sequence[int]) -> tuple[int, int]:
        """Turn ranges back into plain reservation."""


class SyscallMapper:
    """One ctypes call per system call."""

    name = "python"

    def create(self, fd: int, offsets: Sequence[int], page_bytes: int) -> tuple[int, int]:
        return _fallocate_runs(fd, 0, offsets, page_bytes)

    def release(self, fd: int, offsets: Sequence[int], page_bytes: int) -> tuple[int, int]:
        return _fallocate_runs(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offsets, page_bytes)

    def map(self, fd: int, addresses: Sequence[int], offsets: Sequence[int], page_bytes: int) -> tuple[int, int]:
        first, n = 0, len(addresses)
        while first < n:
            end = first + 1
            while (
                end < n
                and addresses[end] == addresses[end - 1] + page_bytes
                and offsets[end] == offsets[end - 1] + page_bytes
            ):
                end += 1
            n_bytes = (end - first) * page_bytes
            code = _map_over(addresses[first], n_bytes, fd, offsets[first])
            if code:
                _map_nothing_over(addresses[first], n_bytes)  # a run counts as done or it is not there
                return code, first
            _fill_page_tables(addresses[first], n_bytes)
            first = end
        return 0, n

    def unmap(self, addresses: Sequence[int], lengths: Sequence[int]) -> tuple[int, int]:
        for n_done, (address, n_bytes) in enumerate(zip(addresses, lengths, strict=True)):
            if code := _map_nothing_over(address, n_bytes):
                return code, n_done
        return 0, len(addresses)


def _fill_page_tables(address: int, n_bytes: int) -> None:
    """Enter a shared mapping's pages: those that hold something by reading, which goes many at a time."""
    holds_something = ctypes.create_string_buffer(1)
    libc.mincore(address, 1, holds_something)
    is_used = holds_something.raw[0] & 1
    # An older kernel knows neither, and fills at the first touch.
    libc.madvise(address, n_bytes, MADV_POPULATE_READ if is_used else MADV_POPULATE_WRITE)


def _map_over(address: int, n_bytes: int, fd: int, offset: int) -> int:
    """Map file pages over a reserved range; return errno or 0.

    A new mapping does not inherit MADV_DONTFORK from what it replaces: without it a forked child could write into
    the pages, and the range would no longer merge with the reservation around it.
    """
    if libc.mmap(address, n_bytes, PROT_READ_WRITE, MAP_SHARED | MAP_FIXED, fd, offset) == MAP_FAILED:
        return ctypes.get_errno()
    return ctypes.get_errno() if libc.madvise(address, n_bytes, MADV_DONTFORK) else 0


def _map_nothing_over(address: int, n_bytes: int) -> int:
    """Turn a range back into reservation; return errno or 0.

    Without the advice an empty range is merely not merged with its surroundings: a child inherits nothing to touch.
    """
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED
    if libc.mmap(address, n_bytes, PROT_NONE, flags, -1, 0) == MAP_FAILED:
        return ctypes.get_errno()
    libc.madvise(address, n_bytes, MADV_DONTFORK)
    return 0


def _fallocate_runs(fd: int, mode: int, offsets: Sequence[int], page_bytes: int) -> tuple[int, int]:
    first, n = 0, len(offsets)
    while first < n:
        end = first + 1
        while end < n and offsets[end] == offsets[end - 1] + page_bytes:
            end += 1
        while libc.fallocate(fd, mode, offsets[first], (end - first) * page_bytes) != 0:
            if ctypes.get_errno() != errno.EINTR:
                return ctypes.get_errno(), first
        first = end
    return 0, n


class NativeMapper:
    """The same through `native/host_mapper.c`. Raises OSError where that was not built or does not fit."""

    name = "native"

    def __init__(self) -> None:
        self._lib = ctypes.CDLL(str(find_native_library()))
        if self._lib.vmem_host_abi() != ABI:
            raise OSError(f"the native part has ABI {self._lib.vmem_host_abi()}, this package needs {ABI}")
        fd, items, n, page_bytes = ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
        n_done = ctypes.POINTER(ctypes.c_size_t)
        self._lib.vmem_host_create.argtypes = [fd, items, n, page_bytes, n_done]
        self._lib.vmem_host_release.argtypes = [fd, items, n, page_bytes, n_done]
        self._lib.vmem_host_map.argtypes = [fd, items, items, n, page_bytes, n_done]
        self._lib.vmem_host_unmap.argtypes = [items, items, n, n_done]

    def create(self, fd: int, offsets: Sequence[int], page_bytes: int) -> tuple[int, int]:
        n_done, offset_items = ctypes.c_size_t(), array("q", offsets)
        code = self._lib.vmem_host_create(
            fd, offset_items.buffer_info()[0], len(offsets), page_bytes, ctypes.byref(n_done)
        )
        return code, n_done.value

    def release(self, fd: int, offsets: Sequence[int], page_bytes: int) -> tuple[int, int]:
        n_done, offset_items = ctypes.c_size_t(), array("q", offsets)
        code = self._lib.vmem_host_release(
            fd, offset_items.buffer_info()[0], len(offsets), page_bytes, ctypes.byref(n_done)
        )
        return code, n_done.value

    def map(self, fd: int, addresses: Sequence[int], offsets: Sequence[int], page_bytes: int) -> tuple[int, int]:
        n_done, address_items, offset_items = ctypes.c_size_t(), array("q", addresses), array("q", offsets)
        code = self._lib.vmem_host_map(
            fd,
            address_items.buffer_info()[0],
            offset_items.buffer_info()[0],
            len(addresses),
            page_bytes,
            ctypes.byref(n_done),
        )
        return code, n_done.value

    def unmap(self, addresses: Sequence[int], lengths: Sequence[int]) -> tuple[int, int]:
        n_done, address_items, length_items = ctypes.c_size_t(), array("q", addresses), array("q", lengths)
        code = self._lib.vmem_host_unmap(
            address_items.buffer_info()[0],
            length_items.buffer_info()[0],
            len(addresses),
            ctypes.byref(n_done),
        )
        return code, n_done.value


def find_native_library() -> Path:
    """Return the path of the built native part.

    Raises:
        OSError: It was not built.
    """
    folder = Path(__file__).parent.parent
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"_host{suffix}"
        if path.exists():
            return path
    raise OSError("the native part was not built (no C compiler at install time?)")


def open_mapper(path: str) -> Mapper:
    """Return the mapper called `path`: "native", "python", or "auto" (native where it was built).

    Raises:
        OSError: "native" was asked for and is not there.
    """
    if path == "python":
        return SyscallMapper()
    try:
        return NativeMapper()
    except OSError:
        if path == "native":
            raise
        return SyscallMapper()
