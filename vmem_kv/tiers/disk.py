"""The third tier: sequences on disk, in one file without a name.

Guarantees
  * The budget is never passed, and room is taken from the file system before a byte is written: a full disk is
    OutOfDiskSpace, and nothing has changed.
  * What is dropped is punched out of the file. The file has no name, so that nothing is left of it when the tier is
    closed, or the process ends in whatever way.
  * What is read back is checked; a sequence that was damaged is refused, not used.

Assumptions: one thread calls. Reads and writes are done when the call returns; the page cache makes them fast while it
lasts, and nothing is forced to the disk: what is here need not survive the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import tempfile
from array import array
from dataclasses import dataclass
from pathlib import Path

from vmem_kv.driver.host_mapper import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, libc
from vmem_kv.errors import ConfigError, OutOfDiskSpace, UsageError
from vmem_kv.layout import Layout
from vmem_kv.tiers.copies import HostCopy
from vmem_kv.tiers.host import HostTier
from vmem_kv.tiers.streams import checksums, file_error, read_rows, write_rows
from vmem_kv.units import format_bytes, round_up


@dataclass(frozen=True, slots=True, eq=False)
class DiskCopy:
    """What the tier holds of one sequence."""

    layout: Layout
    tokens: array[int]
    offset: int
    n_bytes: int  # in whole OS pages
    sums: tuple[int, ...]  # a checksum per plane


class DiskTier:
    """Stores host copies in a file. See this file's first lines.

    Args:
        directory: On which file system; it must be able to punch holes (ext4, xfs, btrfs and tmpfs are).
        max_bytes: The budget.

    Raises:
        ConfigError: There can be no such file.
    """

    def __init__(self, directory: str | Path, max_bytes: int) -> None:
        if max_bytes < 1:
            raise ConfigError(f"max_bytes is {max_bytes}; a tier on disk needs at least one byte")
        self.max_bytes = max_bytes
        self.n_bytes = 0
        """Bytes on disk."""
        self._copies: list[DiskCopy] = []  # in the order of their offsets
        self._pid = os.getpid()
        try:
            self._fd = _open_unnamed(Path(directory))
            try:
                os.posix_fallocate(self._fd, 0, mmap.PAGESIZE)
                _punch(self._fd, 0, mmap.PAGESIZE)
            except BaseException:
                os.close(self._fd)
                raise
        except OSError as error:
            raise ConfigError(f"no tier on disk in {directory}: {error}; choose a directory on a local disk") from error

    def n_bytes_for(self, copy: HostCopy) -> int:
        """What a copy takes on disk. More than `max_bytes` never fit."""
        return round_up(copy.n_tokens * copy.layout.token_bytes, mmap.PAGESIZE)

    def store(self, host: HostTier, copy: HostCopy) -> DiskCopy:
        """Write a copy to disk. It stays as it is.

        Raises:
            OutOfDiskSpace: The budget or the disk does not hold it. Nothing changed.
            UsageError: The copy is empty, or being written. Nothing changed.
            FileError: The system failed to write. Nothing changed.
        """
        self._require_open()
        if copy.is_written or not copy.n_tokens:
            raise UsageError("only a copy that holds tokens, and is not being written, can be stored")
        n_bytes = self.n_bytes_for(copy)
        if self.n_bytes + n_bytes > self.max_bytes:
            raise OutOfDiskSpace(
                f"{format_bytes(n_bytes)} are needed, {format_bytes(self.max_bytes - self.n_bytes)} of "
                f"{format_bytes(self.max_bytes)} are free; drop sequences, or open the tier with a larger budget"
            )
        place, offset = self._find_gap(n_bytes)
        try:
            os.posix_fallocate(self._fd, offset, n_bytes)
            write_rows(self._fd, offset, host, copy)
            stored = DiskCopy(copy.layout, copy.tokens[:], offset, n_bytes, tuple(checksums(host, copy)))
        except BaseException as error:
            self._clear(offset, n_bytes)
            if isinstance(error, OSError):
                raise file_error("write to the disk tier", n_bytes, error) from error
            raise
        self._copies.insert(place, stored)
        self.n_bytes += n_bytes
        return stored

    def load(self, stored: DiskCopy, host: HostTier) -> HostCopy:
        """Read a sequence back into a new host copy. It stays on disk.

        Raises:
            OutOfHostMemory: The host tier has no room for it. Nothing changed but spare copies that went.
            FileRefused: It was damaged. Nothing changed; it is of no use any more.
            FileError: The system failed to read. Nothing changed.
            UsageError: It was dropped. Nothing changed.
        """
        self._require_open()
        self._require_held(stored)
        with host.filling(stored.layout, stored.tokens) as copy:
            try:
                read_rows(self._fd, stored.offset, host, copy, stored.layout.kind, stored.sums)
            except OSError as error:
                raise file_error("read from the disk tier", stored.n_bytes, error) from error
        return copy

    def drop(self, stored: DiskCopy) -> None:
        """Forget a sequence; its room is free.

        Raises:
            UsageError: It was dropped before. Nothing changed.
        """
        self._require_open()
        self._require_held(stored)
        self._copies.remove(stored)
        self.n_bytes -= stored.n_bytes
        self._clear(stored.offset, stored.n_bytes)

    def close(self) -> None:
        """Forget everything. Idempotent."""
        if self._fd >= 0 and os.getpid() == self._pid:
            os.close(self._fd)
            self._fd = -1
            self._copies, self.n_bytes = [], 0

    def _find_gap(self, n_bytes: int) -> tuple[int, int]:
        """The first gap of that size: at which place of the list, and its offset."""
        end = 0
        for place, stored in enumerate(self._copies):
            if stored.offset - end >= n_bytes:
                return place, end
            end = stored.offset + stored.n_bytes
        return len(self._copies), end

    def _clear(self, offset: int, n_bytes: int) -> None:
        with contextlib.suppress(OSError):  # then the room is used again, and goes with the file at the latest
            _punch(self._fd, offset, n_bytes)

    def _require_held(self, stored: DiskCopy) -> None:
        if stored not in self._copies:
            raise UsageError("this sequence is not on this disk any more; it was dropped")

    def _require_open(self) -> None:
        if os.getpid() != self._pid:
            raise UsageError(f"this tier belongs to process {self._pid}; a forked child must open its own")
        if self._fd < 0:
            raise UsageError("the tier on disk is closed; open a new one")


def _open_unnamed(directory: Path) -> int:
    """Open a new file that no name leads to."""
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):  # of a file system that knows no unnamed files
            raise
        fd, name = tempfile.mkstemp(prefix=".vmem_kv-", dir=directory)
        os.unlink(name)
        return fd


def _punch(fd: int, offset: int, n_bytes: int) -> None:
    if libc.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, n_bytes):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
