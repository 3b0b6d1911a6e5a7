"""The driver contract: the few calls through which vmem_kv touches virtual and physical memory.

The rules are those of CUDA's virtual memory management, the strictest device that we target, so an allocator
that is correct here is correct there. Each rule stands once, in the docstring of its call.

Guarantees that hold for every call:
  * A call that raises says how far it came: ``error.n_done`` items of the batch took effect, in order, and the
    rest did not. ``create`` reports through its out-list instead.
  * Running out of something raises a ``CapacityError``, everything else a ``DriverError``.
  * An exception that is no ``VmemError`` (KeyboardInterrupt) says nothing about how far the call came.
  * After a ``DriverError`` with ``is_fatal`` no call succeeds any more, but ``close``: the device took its memory and
    its mappings back, or will when the process ends. Callers forget what they held; they do not try to give it back.
  * A driver refuses with a ``VmemError``, and changes nothing for that item: a handle that is not live or has another
    size in ``release`` (so a second release), a reservation that is not live or only part of one, and every call but
    ``close`` after ``close``.
  * Calls may come from any thread, one at a time or together; the driver keeps no lock of ours.
  * ``scrub``, ``copy`` and the copies to and from host memory run *in stream order*: behind what the calling thread
    launched on its current stream, before what it launches there next, and the call does not wait for them. In a
    thread that called ``bind_thread`` nobody's work is ordered behind such a stream, so there the call returns when
    the work is done. A call that raises waits as well: nothing of it is still running. On a device without streams
    everything is done when the call returns.

Assumptions on the caller (``driver/checked.py`` enforces them): sizes and addresses are multiples of
``info.granularity_bytes``; a range is unmapped exactly as it was mapped, whole pages and no holes; a handle is
mapped nowhere when it is released; a reservation is empty when it is freed; nothing reads or writes a page
between ``map`` and ``set_access``, nor from the moment its ``unmap`` begins; host memory is pinned in whole OS pages,
none of them twice, stays where it is until it is unpinned, and no copy to or from it is under way then.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NewType, Protocol

from vmem_kv.driver.ledger import Ledger

Handle = NewType("Handle", int)
"""Opaque name of one physical page (a memfd offset; a CUmemGenericAllocationHandle)."""

Span = tuple[int, int]
"""(address, n_bytes) of a contiguous virtual range."""


class Copy(NamedTuple):
    """One copy between ranges of a device."""

    source: int
    target: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Reservation:
    """A virtual address range with no memory behind it."""

    base: int
    n_bytes: int

    @property
    def end(self) -> int:
        """The first address behind the range."""
        return self.base + self.n_bytes


@dataclass(frozen=True, slots=True)
class DriverInfo:
    """What a driver offers, as data: algorithms read it and never ask which driver it is."""

    name: str
    device: str  # what torch calls the device of tensors over this memory: "cpu", "cuda:0"
    granularity_bytes: int  # smallest mappable size; every size and address is a multiple of it
    max_mappings: int  # live mappings that all users of the driver's ledger may hold together
    neighbours_merge: bool  # consecutive handles at consecutive addresses are one mapping to the system
    mappings_per_run: int  # what a run that does not merge costs of max_mappings, at worst
    keeps_pay: bool  # create and release cost so much that freed handles are worth keeping
    memory_bytes: int  # physical memory that could be handed out when the driver was opened
    max_reservation_bytes: int  # the largest single reservation worth trying
    path: str  # how the calls are made, for people: "native", "python", "cuda-python"
    reads_best: str = "per_layer"  # the layout that this device's kernels read fastest
    mappings_advice: str = "raise the driver's max_mappings"  # for people
    zeroes_new_pages: bool = True  # where not, whoever maps a created page scrubs it before anybody reads it


class Fence(Protocol):
    """A point in time on the device: nothing launched before it can still touch the range once it has passed."""

    def passed(self) -> bool:
        """Whether the point lies in the past. Must not block. Once True, always True.

        Raises:
            DriverError: The device cannot say. The caller counts the fence as not passed: whatever waits for it
                stays mapped, and the error goes to whoever asked. Asking again is allowed.
        """

    def wait(self) -> None:
        """Block until it has passed. For the beginnings and ends of things, never for a step.

        Raises:
            DriverError: The device cannot say; as above.
        """


class PassedFence:
    """The fence of a synchronous device, where a call that returned has finished."""

    def passed(self) -> bool:
        """Return True: there is never anything in flight."""
        return True

    def wait(self) -> None:
        """Return at once."""


PASSED: Fence = PassedFence()


class Driver(ABC):
    """Reserve, create, map, set_access, unmap, release, free: the whole life of a page."""

    info: DriverInfo
    calls: Counter[str]
    """How often each operation was called since the driver was opened; a batch counts once."""
    ledger: Ledger
    """Where everybody under the same limits is counted: one per process on the host, one per device elsewhere."""

    def available_bytes(self) -> int:
        """Physical memory that could be handed out now."""
        return self.info.memory_bytes

    @abstractmethod
    def reserve(self, n_bytes: int) -> Reservation:
        """Reserve a range of addresses, aligned to the granularity. No memory is behind it; touching it faults.

        Raises:
            OutOfAddressSpace: No range of that size is free. Nothing changed.
            DriverError: Any other failure. Nothing changed.
        """

    @abstractmethod
    def free_reservation(self, reservation: Reservation) -> None:
        """Give a range back, exactly as ``reserve`` returned it, with nothing mapped in it.

        Raises:
            DriverError: The range is still reserved.
        """

    @abstractmethod
    def create(self, page_bytes: int, places: Sequence[int], created: list[Handle]) -> None:
        """Create one physical page of ``page_bytes`` per place and append its handle.

        The page is filled with zeros if ``info.zeroes_new_pages``, else with anything.

        A place is the address at which the page will be mapped first. It is a hint: a driver whose neighbouring
        mappings merge names the page by its place, or otherwise where that name is taken; others ignore it.
        ``created`` holds the new handles in order, also after a failure of any kind, when it is shorter than
        ``places``.

        Raises:
            OutOfPages: The device has no memory left for the next page.
            DriverError: Any other failure.
        """

    @abstractmethod
    def map(self, page_bytes: int, addresses: Sequence[int], handles: Sequence[Handle]) -> None:
        """Map whole pages: ``handles[i]`` at ``addresses[i]``, which is reserved and free.

        A handle may be mapped at several addresses (an alias). The memory may be used after ``set_access`` only.

        Raises:
            OutOfMappings: The system refuses another mapping; ``n_done`` pages are mapped.
            DriverError: Any other failure; ``n_done`` pages are mapped.
        """

    @abstractmethod
    def set_access(self, spans: Sequence[Span]) -> None:
        """Make ranges readable and writable on ``info.device``. A span covers whole mappings without holes.

        Raises:
            OutOfMappings: The system refuses another mapping (where a limit shows here only); as below.
            DriverError: ``n_done`` spans are accessible; all of them are still mapped.
        """

    @abstractmethod
    def unmap(self, spans: Sequence[Span]) -> None:
        """Turn ranges back into plain reservation. A span covers whole mappings without holes.

        Not ordered behind anything that runs on the device: the caller has waited for a fence.

        Raises:
            OutOfMappings: To unmap a part would split a mapping, and the system refuses one more. ``n_done`` spans
                are unmapped; the others are still mapped, and may be tried again later.
            DriverError: ``n_done`` spans are unmapped; the others are still mapped.
            UsageError: Nothing is mapped there (of a driver that keeps count). Nothing changed.
        """

    @abstractmethod
    def release(self, page_bytes: int, handles: Sequence[Handle]) -> None:
        """Give physical pages that are mapped nowhere back to the system, each handle once.

        Raises:
            DriverError: ``n_done`` handles are released; the others still own their memory.
        """

    @abstractmethod
    def scrub(self, spans: Sequence[Span]) -> None:
        """Fill accessible ranges with zeros, in stream order.

        Raises:
            DriverError: ``n_done`` spans are zero, the others undefined.
        """

    @abstractmethod
    def copy(self, copies: Sequence[Copy]) -> None:
        """Copy between accessible ranges that do not overlap, in stream order. A range may cross pages and runs.

        Raises:
            DriverError: ``n_done`` copies were made, the other targets are undefined.
        """

    @abstractmethod
    def copy_to_host(self, address: int, buffer: memoryview) -> Fence:
        """Copy ``len(buffer)`` accessible bytes from ``address`` on into writable host memory, in stream order.

        Returns:
            A fence behind the copy: the bytes are there, and the buffer may go, when it has passed.

        Raises:
            DriverError: The buffer is undefined.
        """

    @abstractmethod
    def copy_from_host(self, buffer: memoryview, address: int) -> Fence:
        """Copy host memory into the ``len(buffer)`` accessible bytes from ``address`` on, in stream order.

        Returns:
            A fence behind the copy: the buffer may change or go when it has passed.

        Raises:
            DriverError: The target is undefined.
        """

    def pin(self, address: int, n_bytes: int) -> None:  # noqa: B027 - a device that the processor copies for needs none
        """Let the device reach a range of host memory directly: copies to and from it need no detour, nor the caller.

        Host memory that is not pinned can be copied to and from as well, only slower. A device that has no use for
        pinning does nothing.

        Raises:
            OutOfHostMemory: The system keeps no more memory in place. Nothing changed.
            DriverError: Any other failure. Nothing changed.
        """

    def unpin(self, address: int) -> None:  # noqa: B027 - as above
        """Undo ``pin`` of the range that begins here. Not ordered behind copies: the caller waited for their fences.

        Raises:
            DriverError: The range is still pinned.
            UsageError: Nothing is pinned there (of a driver that keeps count). Nothing changed.
        """

    def bind_thread(self) -> None:  # noqa: B027 - a device without contexts has nothing to do
        """Make the calling thread able to use the device, on its own. Every thread of ours calls it first."""

    def current_stream(self) -> int:
        """The calling thread's current stream, for `fence`; 0 where there are no streams."""
        return 0

    @abstractmethod
    def fence(self, streams: Collection[int] = ()) -> Fence:
        """Return a fence behind everything launched so far on the calling thread's current stream and on ``streams``.

        Raises:
            DriverError: The device cannot record one. Nothing changed.
        """

    @abstractmethod
    def close(self) -> None:
        """Free what the driver itself holds. Idempotent; after a fatal error it forgets what it cannot free.

        Handles that are live still are tolerated: their memory goes back with the driver. (It is how pages go whose
        release failed.)

        Raises:
            UsageError: Reservations or pinned ranges are left, and no fatal error took them; nothing changed.
        """
