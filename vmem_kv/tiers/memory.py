"""Host memory for parked sequences: large buffers, cut into frames that are taken, given back and taken again.

    n_free + n_taken == n_frames owned <= max_bytes // frame_bytes

Guarantees
  * The budget is never passed. Memory is taken from the system when it is first needed, a buffer at a time, and kept:
    to write to memory that the system has just handed out costs several times a copy.
  * The lowest free frame is taken first, so that most sequences lie in a few contiguous ranges, each of them one copy.
  * After an exception nothing has changed, but for buffers that came and stay free.

Where buffers come from is an object (`HostMemory`): anonymous memory by default. Memory that a device can reach
directly (pinned) is another one; a buffer is pinned once, when it comes, and a copy never crosses two buffers.

Assumptions: one thread calls. A forked child has no part in it: the memory is not inherited.
"""

from __future__ import annotations

import contextlib
import ctypes
import heapq
import mmap
import os
from bisect import bisect_right
from collections.abc import Sequence
from typing import Protocol

from vmem_kv.driver.ledger import PROCESS, Ledger
from vmem_kv.errors import ConfigError, DriverError, OutOfHostMemory, UsageError, VmemError
from vmem_kv.machine import describe_memory
from vmem_kv.units import MIB, ceil_div, format_bytes

FRAME_BYTES = 2 * MIB
"""A huge page of most machines. The last frame of a sequence is half empty on average."""

BUFFER_BYTES = 64 * MIB
"""What is asked of the system at a time."""

MEMORY_SHARE = 0.9
"""Share of the memory that is available at the start which a tier may promise; the rest is the system's."""


class HostBuffer(Protocol):
    """Contiguous host memory."""

    @property
    def view(self) -> memoryview:
        """All of it, writable."""

    def close(self) -> None:
        """Give it back. Nobody uses the view any more. Idempotent.

        Raises:
            DriverError: A device does not let go of it. It is there still; close it again.
        """


class HostMemory(Protocol):
    """Where buffers come from."""

    def allocate(self, n_bytes: int) -> HostBuffer:
        """Return a buffer of exactly `n_bytes`, a multiple of the OS page.

        Raises:
            OutOfHostMemory: The system has no memory for it. Nothing changed.
            DriverError: It could not be made reachable for the device. Nothing changed.
        """


class PlainBuffer:
    """Anonymous private memory, in huge pages where the system has them. It goes when the last view has gone."""

    def __init__(self, n_bytes: int) -> None:
        try:
            memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise OutOfHostMemory(f"the system has no {format_bytes(n_bytes)} left: {error}") from error
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        memory.madvise(mmap.MADV_DONTFORK)
        self._view = memoryview(memory)

    @property
    def view(self) -> memoryview:
        """All of it, writable."""
        return self._view

    def close(self) -> None:
        """Let go of it."""
        self._view = memoryview(b"")


class PlainMemory:
    """Anonymous memory of this process."""

    def allocate(self, n_bytes: int) -> HostBuffer:
        """Return a new buffer; see `HostMemory.allocate`."""
        return PlainBuffer(n_bytes)


class Pinner(Protocol):
    """The part of a driver that pins host memory; see `Driver.pin` and `Driver.unpin`."""

    def pin(self, address: int, n_bytes: int) -> None:
        """Let the device reach a range of host memory directly."""

    def unpin(self, address: int) -> None:
        """Undo it."""


class PinnedMemory:
    """Buffers that a device can reach directly: copies run at the speed of the link, and beside the caller.

    Works over every driver: one that has no use for pinning pins nothing. A buffer that cannot be pinned is no buffer:
    where the system keeps no more memory in place the tier is full (OutOfHostMemory) and sequences go on down as if it
    were, and any other failure is an error. A tier that went on with ordinary memory instead would let every park wait
    for the device in the caller's thread, with nobody told; who wants that gives `PlainMemory`.

    Args:
        pinner: The driver. It is closed after the tier.
        memory: Where buffers come from before they are pinned.
    """

    def __init__(self, pinner: Pinner, memory: HostMemory | None = None) -> None:
        self._pinner = pinner
        self._memory = memory or PlainMemory()

    def allocate(self, n_bytes: int) -> HostBuffer:
        """Return a new pinned buffer; see `HostMemory.allocate`."""
        buffer = self._memory.allocate(n_bytes)
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer.view))
        try:
            self._pinner.pin(address, n_bytes)
        except BaseException as error:
            if not isinstance(error, VmemError):  # interrupted: nobody says whether it is pinned
                with contextlib.suppress(VmemError):
                    self._pinner.unpin(address)
            buffer.close()
            raise
        return _PinnedBuffer(buffer, address, self._pinner)


class _PinnedBuffer:
    """A buffer that is unpinned before it goes."""

    def __init__(self, buffer: HostBuffer, address: int, pinner: Pinner) -> None:
        self._buffer = buffer
        self._address = address
        self._pinner = pinner
        self._is_pinned = True

    @property
    def view(self) -> memoryview:
        """All of it, writable."""
        return self._buffer.view

    def close(self) -> None:
        """Unpin it and give it back; where the device refuses, it stays, and may be closed again."""
        if self._is_pinned:
            try:
                self._pinner.unpin(self._address)
            except DriverError as error:
                if not error.is_fatal:  # a device that is lost reaches nothing any more
                    raise
            self._is_pinned = False
        self._buffer.close()


class Runs:
    """Bytes that lie in frames, as few ranges that are contiguous in one buffer each."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._views: list[memoryview] = []

    def add(self, first_byte: int, view: memoryview) -> None:
        """Go on with a range, which begins with this byte."""
        self._starts.append(first_byte)
        self._views.append(view)

    def views(self, first_byte: int, n_bytes: int) -> list[memoryview]:
        """The bytes `[first_byte, first_byte + n_bytes)`, in order: a view for each range that they touch."""
        found: list[memoryview] = []
        at, end = first_byte, first_byte + n_bytes
        index = bisect_right(self._starts, at) - 1
        while at < end:
            start = self._starts[index]
            view = self._views[index][at - start : end - start]
            found.append(view)
            at += len(view)
            index += 1
        return found


class FramePool:
    """Frames of one size, numbered through all buffers. See this file's first lines.

    Args:
        max_bytes: The budget; what is beyond a whole frame is not used.
        memory: Where buffers come from.
        frame_bytes: A multiple of the OS page.
        buffer_bytes: What to ask of the system at a time; rounded down to whole frames, at least one.
        ledger: Where the memory is counted, with what the host driver's pools own.

    Raises:
        ConfigError: The sizes do not fit each other, or the machine (or its cgroup) cannot hold the budget.
    """

    def __init__(
        self,
        max_bytes: int,
        memory: HostMemory | None = None,
        *,
        frame_bytes: int = FRAME_BYTES,
        buffer_bytes: int = BUFFER_BYTES,
        ledger: Ledger = PROCESS,
    ) -> None:
        if frame_bytes < 1 or frame_bytes % mmap.PAGESIZE:
            raise ConfigError(f"frame_bytes is {frame_bytes}; it must be a multiple of {mmap.PAGESIZE}")
        if max_bytes < frame_bytes:
            raise ConfigError(f"max_bytes is {max_bytes}; a tier needs at least a frame of {format_bytes(frame_bytes)}")
        usable_bytes = describe_memory().usable_memory_bytes
        if max_bytes > usable_bytes * MEMORY_SHARE:
            raise ConfigError(
                f"{format_bytes(max_bytes)} for parked sequences are more than {MEMORY_SHARE:.0%} of the "
                f"{format_bytes(usable_bytes)} that are available here; lower max_bytes"
            )
        self.frame_bytes = frame_bytes
        self.max_frames = max_bytes // frame_bytes
        self.n_taken = 0
        self._memory = memory or PlainMemory()
        self._frames_per_buffer = max(1, buffer_bytes // frame_bytes)
        self._buffers: dict[int, HostBuffer] = {}
        self._free: list[int] = []
        self._ledger = ledger
        self._limit_bytes = int((usable_bytes + ledger.n_bytes) * MEMORY_SHARE)
        self._pid = os.getpid()

    @property
    def n_available(self) -> int:
        """Frames that `take` could hand out now, if the system has the memory."""
        return self.max_frames - self.n_taken

    @property
    def n_bytes(self) -> int:
        """Memory that is owned, taken or free."""
        return sum(self._n_frames_in(index) for index in self._buffers) * self.frame_bytes

    def take(self, n_frames: int) -> list[int]:
        """Return the numbers of free frames in rising order. They hold anybody's old bytes.

        Raises:
            OutOfHostMemory: The budget or the system's memory is spent. No frame was taken.
            DriverError: A new buffer could not be made reachable for the device. No frame was taken.
        """
        self.require_owner()
        if n_frames > self.n_available:
            raise OutOfHostMemory(
                f"{n_frames} frames of {format_bytes(self.frame_bytes)} are needed, {self.n_available} of "
                f"{self.max_frames} are available; drop parked sequences, or open the tier with more memory"
            )
        while len(self._free) < n_frames:
            self._add_buffer()
        self.n_taken += n_frames
        return [heapq.heappop(self._free) for _ in range(n_frames)]

    def give(self, frames: Sequence[int]) -> None:
        """Take frames back that nobody reads or writes any more."""
        for frame in frames:
            heapq.heappush(self._free, frame)
        self.n_taken -= len(frames)

    def runs(self, frames: Sequence[int]) -> Runs:
        """Where the bytes of what lies in `frames` are. Good until one of them is given back."""
        frame_bytes, per_buffer = self.frame_bytes, self._frames_per_buffer
        runs = Runs()
        index = 0
        while index < len(frames):
            behind = index + 1
            while behind < len(frames) and self._follows(frames[behind - 1], frames[behind]):
                behind += 1
            offset = frames[index] % per_buffer * frame_bytes
            view = self._buffers[frames[index] // per_buffer].view
            runs.add(index * frame_bytes, view[offset : offset + (behind - index) * frame_bytes])
            index = behind
        return runs

    def views(self, frames: Sequence[int], first_byte: int, n_bytes: int) -> list[memoryview]:
        """The bytes `[first_byte, first_byte + n_bytes)` of what lies in `frames`; see `Runs.views`."""
        return self.runs(frames).views(first_byte, n_bytes)

    def trim(self) -> int:
        """Give buffers of which no frame is taken back to the system; return how many bytes that freed.

        Raises:
            DriverError: A device does not let go of one. It and those not reached are free frames still.
        """
        self.require_owner()
        n_before = self.n_bytes
        free_of: dict[int, int] = {}
        for frame in self._free:
            buffer_index = frame // self._frames_per_buffer
            free_of[buffer_index] = free_of.get(buffer_index, 0) + 1
        for buffer_index, n_free in free_of.items():
            if n_free == self._n_frames_in(buffer_index):
                self._drop_buffer(buffer_index)
        return n_before - self.n_bytes

    def close(self) -> None:
        """Give everything back. Idempotent.

        Raises:
            UsageError: Frames are still taken. Nothing changed.
            DriverError: A device does not let go of a buffer; close again.
        """
        if os.getpid() != self._pid:
            return
        if self.n_taken:
            raise UsageError(f"{self.n_taken} frames of host memory are still in use; drop the copies in them first")
        self.trim()

    def require_owner(self) -> None:
        """Raise UsageError in a forked child, which has not inherited the memory."""
        if os.getpid() != self._pid:
            raise UsageError(f"this memory belongs to process {self._pid}; a forked child must open its own")

    def _add_buffer(self) -> None:
        index = next(i for i in range(len(self._buffers) + 1) if i not in self._buffers)
        n_frames = self._n_frames_in(index)
        n_bytes = n_frames * self.frame_bytes
        if not self._ledger.charge_bytes(n_bytes, self._limit_bytes):
            raise OutOfHostMemory(
                f"{format_bytes(n_bytes)} more would pass {format_bytes(self._limit_bytes)}, {MEMORY_SHARE:.0%} of "
                f"the memory here, of which {format_bytes(self._ledger.n_bytes)} are in use; close other caches"
            )
        try:
            self._buffers[index] = self._memory.allocate(n_bytes)
        except BaseException:
            self._ledger.refund_bytes(n_bytes)
            raise
        first = index * self._frames_per_buffer
        self._free += range(first, first + n_frames)
        heapq.heapify(self._free)

    def _drop_buffer(self, index: int) -> None:
        self._buffers[index].close()
        self._free = [frame for frame in self._free if frame // self._frames_per_buffer != index]
        heapq.heapify(self._free)
        n_bytes = self._n_frames_in(index) * self.frame_bytes
        del self._buffers[index]
        self._ledger.refund_bytes(n_bytes)

    def _n_frames_in(self, buffer_index: int) -> int:
        first = buffer_index * self._frames_per_buffer
        return min(self._frames_per_buffer, self.max_frames - first)

    def _follows(self, frame: int, other: int) -> bool:
        return other == frame + 1 and other % self._frames_per_buffer != 0

    def n_frames_for(self, n_bytes: int) -> int:
        """Frames that hold `n_bytes`."""
        return ceil_div(n_bytes, self.frame_bytes)
