"""The memory files of another process, and which of them outlive it. Exact, and nobody else's memory counts.

Memory that survives a process has a file behind it: a memfd, a file of a tmpfs, a System V segment. `look_at` finds
those of a process among its descriptors and shared mappings and watches them (inotify). The kernel tells of a file
without a name when its last user is gone, and with it its memory; a file that keeps a name or a user is never told of.

Assumptions: Linux with /proc. The process is stopped while it is looked at.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
import time
from collections.abc import Iterator
from typing import NamedTuple

IN_DELETE_SELF = 0x400
EVENT = struct.Struct("iIII")


class File(NamedTuple):
    """A file, whatever it is called."""

    device: int
    inode: int


class MemoryFiles:
    """Files that were seen, and which of them are alive."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._add_watch = libc.inotify_add_watch
        self._descriptor = libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self._descriptor < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        self.alive: dict[int, str] = {}
        """Names by watch."""
        self.n_seen = 0
        self.n_bytes = 0
        """Memory of all that were seen, when they were."""

    def look_at(self, process_id: int) -> int:
        """Watch the memory files that a stopped process has and this one has not; return their bytes.

        Raises:
            AssertionError: It shares memory that no descriptor of its own names, so that it cannot be watched.
        """
        ours, theirs = dict(_open_files(os.getpid())), dict(_open_files(process_id))
        found = {file: path for file, path in theirs.items() if file not in ours}
        unknown = set(_shared_mappings(process_id)) - found.keys() - ours.keys() - set(_shared_mappings(os.getpid()))
        assert not unknown, f"shared memory without a descriptor: {unknown}"
        n_bytes = 0
        for path in found.values():
            name = os.readlink(path)
            if name.startswith(("/memfd:", "/dev/shm/")):
                n_bytes += os.stat(path).st_blocks * 512
                watch = self._add_watch(self._descriptor, path.encode(), IN_DELETE_SELF)
                if watch < 0:
                    raise OSError(ctypes.get_errno(), "inotify_add_watch")
                self.alive[watch] = name
                self.n_seen += 1
        self.n_bytes += n_bytes
        return n_bytes

    def wait(self, seconds: float) -> int:
        """Wait until none is alive, but no longer than that; return how many are."""
        deadline = time.monotonic() + seconds
        while self.alive and select.select([self._descriptor], [], [], max(0, deadline - time.monotonic()))[0]:
            self._read()
        return len(self.alive)

    def _read(self) -> None:
        data = os.read(self._descriptor, 1 << 16)
        while data:
            watch, mask, _, n_name = EVENT.unpack_from(data)
            if mask & IN_DELETE_SELF:
                del self.alive[watch]
            data = data[EVENT.size + n_name :]


def _open_files(process_id: int) -> Iterator[tuple[File, str]]:
    """The files that a process has open, each with a path under /proc."""
    folder = f"/proc/{process_id}/fd"
    for name in os.listdir(folder):
        path = f"{folder}/{name}"
        try:
            seen = os.stat(path)
        except OSError as error:
            if error.errno != errno.ENOENT:  # the listing itself, closed by now
                raise
        else:
            yield File(seen.st_dev, seen.st_ino), path


def _shared_mappings(process_id: int) -> Iterator[File]:
    with open(f"/proc/{process_id}/maps") as lines:
        for line in lines:
            _, access, _, device, inode = line.split(maxsplit=5)[:5]
            if access[3] == "s":
                major, minor = (int(part, 16) for part in device.split(":"))
                yield File(os.makedev(major, minor), int(inode))
