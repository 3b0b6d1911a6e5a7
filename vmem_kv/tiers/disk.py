"""The third tier: sequences on disk, in one file without a name.

Guarantees
  * The budget is never passed, and room is taken from the file system before a byte is written: a full disk is
    OutOfDiskSpace, and nothing has changed.
  * What is dropped is punched out of the file. The file has no name, so that nothing is left of it when the tier is
    closed, or the process ends in whatever way.
  * What is read back is checked; a sequence that was damaged is refused, not used.

`begin_store` and `begin_load` return at once; with a `MoverThread` the file is written and read on that thread. What is
begun is finished, or abandoned: then it goes by itself once it has passed, at a later `poll`.

Assumptions: one thread calls. The page cache makes reads and writes fast while it lasts, and nothing is forced to the
disk: what is here need not survive the process.
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
from typing import Any

from vmem_kv.driver.base import PASSED
from vmem_kv.driver.host_mapper import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, libc
from vmem_kv.errors import ConfigError, OutOfDiskSpace, UsageError
from vmem_kv.layout import Layout
from vmem_kv.tiers.copies import HostCopy
from vmem_kv.tiers.host import HostTier
from vmem_kv.tiers.moving import InlineMover, Mover, Task
from vmem_kv.tiers.streams import checksums, file_error, read_rows, write_rows
from vmem_kv.units import format_bytes, round_up


@dataclass(slots=True, eq=False)
class DiskCopy:
    """What the tier holds of one sequence."""

    layout: Layout
    tokens: array[int]
    offset: int
    n_bytes: int  # in whole OS pages
    sums: tuple[int, ...] = ()  # a checksum per plane; none while it is being written


class DiskTier:
    """Stores host copies in a file. See this file's first lines.

    Args:
        directory: On which file system; it must be able to punch holes (ext4, xfs, btrfs and tmpfs are).
        max_bytes: The budget.
        mover: Who reads and writes; by default the calling thread.

    Raises:
        ConfigError: There can be no such file.
    """

    def __init__(self, directory: str | Path, max_bytes: int, mover: Mover | None = None) -> None:
        if max_bytes < 1:
            raise ConfigError(f"max_bytes is {max_bytes}; a tier on disk needs at least one byte")
        self.max_bytes = max_bytes
        self.n_bytes = 0
        """Bytes on disk."""
        self._copies: list[DiskCopy] = []  # in the order of their offsets
        self._mover = mover or InlineMover()
        self._under_way: set[Storing | Loading] = set()
        self._abandoned: list[Storing | Loading] = []
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
        """Write a copy to disk; returns when that is done. See `begin_store`."""
        return self.begin_store(host, copy).finish()

    def begin_store(self, host: HostTier, copy: HostCopy) -> Storing:
        """Begin to write a copy to disk. It stays as it is, and nobody writes to it until that has passed.

        Raises:
            OutOfDiskSpace: The budget or the disk does not hold it. Nothing changed.
            UsageError: The copy is empty, or being written. Nothing changed.
            FileError: The system failed to write. Nothing changed.
        """
        self._require_open()
        self.poll()
        if copy.is_written or not copy.n_tokens:
            raise UsageError("only a copy that holds tokens, and is not being written, can be stored")
        n_bytes = self.n_bytes_for(copy)
        if self.n_bytes + n_bytes > self.max_bytes:
            raise OutOfDiskSpace(
                f"{format_bytes(n_bytes)} are needed, {format_bytes(self.max_bytes - self.n_bytes)} of "
                f"{format_bytes(self.max_bytes)} are free; drop sequences, or open the tier with a larger budget"
            )
        place, offset = self._find_gap(n_bytes)

        def write() -> tuple[int, ...]:
            os.posix_fallocate(self._fd, offset, n_bytes)
            write_rows(self._fd, offset, host, copy)
            return tuple(checksums(host, copy))

        stored = DiskCopy(copy.layout, copy.tokens[:], offset, n_bytes)
        storing = Storing(self, host, copy, stored, Task(write))
        host.hold(copy)
        self._copies.insert(place, stored)
        self.n_bytes += n_bytes
        self._start(storing)
        return storing

    def load(self, stored: DiskCopy, host: HostTier) -> HostCopy:
        """Read a sequence back into a new host copy; returns when that is done. See `begin_load`."""
        return self.begin_load(stored, host).finish()

    def begin_load(self, stored: DiskCopy, host: HostTier) -> Loading:
        """Begin to read a sequence back into a new host copy. It stays on disk.

        Raises:
            OutOfHostMemory: The host tier has no room for it. Nothing changed but spare copies that went.
            FileRefused: It was damaged. Nothing changed; it is of no use any more.
            FileError: The system failed to read. Nothing changed.
            UsageError: It was dropped, or is still being written. Nothing changed.
        """
        self._require_open()
        self.poll()
        self._require_held(stored)
        if not stored.sums:
            raise UsageError("this sequence is being written still; finish that first")
        copy = host.begin_filling(stored.layout, stored.tokens)

        def read() -> None:
            read_rows(self._fd, stored.offset, host, copy, stored.layout.kind, stored.sums)

        loading = Loading(self, host, copy, stored, Task(read))
        self._start(loading)
        return loading

    def drop(self, stored: DiskCopy) -> None:
        """Forget a sequence; its room is free.

        Raises:
            UsageError: It was dropped before. Nothing changed.
        """
        self._require_open()
        self._require_held(stored)
        self._forget(stored)

    def poll(self) -> None:
        """Let go of what was abandoned and has passed meanwhile."""
        for work in [work for work in self._abandoned if work.passed()]:
            self._abandoned.remove(work)
            work.undo()

    def close(self) -> None:
        """Forget everything. What is under way is waited for. Idempotent."""
        if self._fd >= 0 and os.getpid() == self._pid:
            for work in list(self._under_way):
                work.undo()
            os.close(self._fd)
            self._fd = -1
            self._copies, self.n_bytes, self._abandoned = [], 0, []

    def _start(self, work: Storing | Loading) -> None:
        self._under_way.add(work)
        try:
            self._mover.start(work.task, PASSED)
        except OSError:
            pass  # `finish` says it
        except BaseException:
            work.undo()
            raise

    def _abandon(self, work: Storing | Loading) -> None:
        self._require_under_way(work)
        self._abandoned.append(work)
        self.poll()

    def _require_under_way(self, work: Storing | Loading) -> None:
        if work not in self._under_way or work in self._abandoned:
            raise UsageError("this was finished or abandoned before, or the tier on disk was closed")

    def _forget(self, stored: DiskCopy) -> None:
        self._copies.remove(stored)
        self.n_bytes -= stored.n_bytes
        self._clear(stored.offset, stored.n_bytes)

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


class _UnderWay:
    """What both ways have in common: a task that passes by itself."""

    task: Task[Any]

    def passed(self) -> bool:
        """Whether it is over, well or not."""
        return self.task.passed()

    def passes_within(self, timeout_s: float) -> bool:
        """See `Passing`."""
        return self.task.passes_within(timeout_s)


class Storing(_UnderWay):
    """A sequence on its way to disk: `finish` or `abandon` it, once."""

    def __init__(
        self, tier: DiskTier, host: HostTier, copy: HostCopy, stored: DiskCopy, task: Task[tuple[int, ...]]
    ) -> None:
        self.task = task
        self._tier = tier
        self._host = host
        self._copy = copy
        self._stored = stored

    def finish(self) -> DiskCopy:
        """Wait until it is written; return what holds it.

        Raises:
            OutOfDiskSpace: The disk is full. The sequence is not on disk.
            FileError: The system failed to write. Likewise.
            UsageError: It was finished before, or the tier was closed. Nothing changed.
        """
        self._tier._require_under_way(self)
        try:
            self._stored.sums = self.task.result()
        except BaseException as error:
            self.undo()
            if isinstance(error, OSError):
                raise file_error("write to the disk tier", self._stored.n_bytes, error) from error
            raise
        self._tier._under_way.discard(self)
        self._host.release(self._copy)
        return self._stored

    def abandon(self) -> None:
        """Let it go by itself: what it holds is free at the first `poll` after it has passed."""
        self._tier._abandon(self)

    def undo(self) -> None:
        """Wait until it is over, and let go of what it holds on disk and in host memory."""
        self.task.wait()
        self._tier._under_way.discard(self)
        self._tier._forget(self._stored)
        self._host.release(self._copy)


class Loading(_UnderWay):
    """A sequence on its way from disk: `finish` or `abandon` it, once."""

    def __init__(self, tier: DiskTier, host: HostTier, copy: HostCopy, stored: DiskCopy, task: Task[None]) -> None:
        self.task = task
        self._tier = tier
        self._host = host
        self._copy = copy
        self._stored = stored

    def finish(self) -> HostCopy:
        """Wait until it is read; return the copy in host memory.

        Raises:
            FileRefused: It was damaged, or dropped meanwhile; it is of no use any more. There is no copy.
            FileError: The system failed to read. There is no copy.
            UsageError: It was finished before, or the tier was closed. Nothing changed.
        """
        self._tier._require_under_way(self)
        try:
            self.task.result()
        except BaseException as error:
            self.undo()
            if isinstance(error, OSError):
                raise file_error("read from the disk tier", self._stored.n_bytes, error) from error
            raise
        self._tier._under_way.discard(self)
        self._host.end_filling(self._copy)
        return self._copy

    def abandon(self) -> None:
        """Let it go by itself: its host memory is free at the first `poll` after it has passed."""
        self._tier._abandon(self)

    def undo(self) -> None:
        """Wait until it is over, and let go of its host memory."""
        self.task.wait()
        self._tier._under_way.discard(self)
        self._host.end_filling(self._copy, is_good=False)


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
