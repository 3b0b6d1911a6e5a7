"""The driver contract: the few calls through which vmem_kv touches virtual and physical memory.

The rules are those of CUDA's virtual memory management, the strictest device that we target, so an allocator
that is correct here is correct there. Each rule stands once, in the docstring of its call.

Guarantees that hold for every call:
  * A call that raises says how far it came: ``error.n_done`` items of the batch took effect, in order, and the
    rest did not. ``create`` reports through its out-list instead.
  * Running out of something raises a ``CapacityError``, everything else a ``DriverError``.
  * Calls may come from any thread, one at a time or together; the driver keeps no lock of ours.

Assumptions on the caller (``driver/checked.py`` enforces them): sizes and addresses are multiples of
``info.granularity_bytes``; a range is unmapped exactly as it was mapped, whole pages and no holes; a handle is
mapped nowhere when it is released; a reservation is empty when it is freed; nothing reads or writes a page
between ``map`` and ``set_access``, nor from the moment its ``unmap`` begins.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType, Protocol

Handle = NewType("Handle", int)
"""Opaque name of one physical page (a memfd offset; a CUmemGenericAllocationHandle)."""

Span = tuple[int, int]
"""(address, n_bytes) of a contiguous virtual range."""


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
    device: str  # as torch names it: "cpu", "cuda:0"
    granularity_bytes: int  # smallest mappable size; every size and address is a multiple of it
    max_mappings: int  # live mappings that we may hold
    neighbours_merge: bool  # consecutive handles at consecutive addresses are one mapping to the system
    mappings_per_run: int  # what a run that does not merge costs of max_mappings, at worst
    keeps_pay: bool  # create and release cost so much that freed handles are worth keeping
    memory_bytes: int  # physical memory that could be handed out when the driver was opened
    max_reservation_bytes: int  # the largest single reservation worth trying
    path: str  # how the calls are made, for people: "native", "python", "cuda-python"


class Fence(Protocol):
    """A point in time on the device: nothing launched before it can still touch the range once it has passed."""

    def passed(self) -> bool:
        """Whether the point lies in the past. Must not block."""


class PassedFence:
    """The fence of a synchronous device, where a call that returned has finished."""

    def passed(self) -> bool:
        """Return True: there is never anything in flight."""
        return True


PASSED: Fence = PassedFence()


class Driver(ABC):
    """Reserve, create, map, set_access, unmap, release, free: the whole life of a page."""

    info: DriverInfo
    calls: Counter[str]
    """How often each operation was called since the driver was opened; a batch counts once."""

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
        """Create one physical page of ``page_bytes`` per place, filled with zeros, and append its handle.

        A place is the address at which the page will be mapped first. It is a hint: a driver whose neighbouring
        mappings merge names the page such that it merges there; others ignore it. ``created`` holds the new
        handles in order, also after a failure, when it is shorter than ``places``.

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
            DriverError: ``n_done`` spans are accessible.
        """

    @abstractmethod
    def unmap(self, spans: Sequence[Span]) -> None:
        """Turn ranges back into plain reservation. A span covers whole mappings without holes.

        Not ordered behind anything that runs on the device: the caller has waited for a fence.

        Raises:
            DriverError: ``n_done`` spans are unmapped; the others are still mapped.
        """

    @abstractmethod
    def release(self, page_bytes: int, handles: Sequence[Handle]) -> None:
        """Give physical pages that are mapped nowhere back to the system, each handle once.

        Raises:
            DriverError: ``n_done`` handles are released; the others still own their memory.
        """

    @abstractmethod
    def scrub(self, spans: Sequence[Span]) -> None:
        """Fill accessible ranges with zeros, visible to all work that starts after the call.

        Raises:
            DriverError: ``n_done`` spans are zero.
        """

    def bind_thread(self) -> None:  # noqa: B027 - a device without contexts has nothing to do
        """Make the calling thread able to use the device. Every thread of ours calls it first."""

    @abstractmethod
    def fence(self) -> Fence:
        """Return a fence behind everything launched on the device so far."""

    @abstractmethod
    def close(self) -> None:
        """Free what the driver itself holds. Idempotent.

        Raises:
            UsageError: Reservations are left; nothing changed.
        """
