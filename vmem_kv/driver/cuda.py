"""Demand mapping on NVIDIA GPUs: CUDA's virtual memory management, through cuda-python.

    `cuda_device.py` what there is ─▶ `cuda_context.py` where it is called from ─▶ `cuda_streams.py` when work is over
      ─▶ this file: the contract, call by call, and the books that keep wrong calls from the driver

Guarantees
  * One handle is one page: the driver demands that the offset inside a handle is zero. One `cuMemSetAccess` and one
    `cuMemUnmap` for each contiguous run, since these two are the expensive calls.
  * The device's primary context is current during every call, and afterwards the one that was current before.
  * A double release never reaches the driver, which would not survive it; nor does an unmap of what is not mapped, nor
    an unpin of what is not pinned. An interruption (Ctrl-C) cannot part our books from the device: answers are kept as
    they arrive (`cuda_calls.py`), and where one was lost the device is asked.
  * After a sticky error CUDA is not called any more: every call raises the same fatal error, and `close` forgets.
  * Nothing runs when the interpreter exits: tensors may be alive, and the process takes its memory with it.

Assumptions: one process per driver (a forked child is refused). Whoever else uses the device's memory in this process
is known as the `runtime`.

Source: CUDA driver API, "Virtual Memory Management" and "Memory Management" (cuda.h 13.0).
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any, Concatenate, ParamSpec, TypeVar

from vmem_kv.driver.base import Copy, Driver, DriverInfo, Fence, Handle, Reservation, Span
from vmem_kv.driver.cuda_context import CudaContext
from vmem_kv.driver.cuda_context import NoRuntime as NoRuntime
from vmem_kv.driver.cuda_context import Runtime as Runtime
from vmem_kv.driver.cuda_device import CudaDevice as CudaDevice
from vmem_kv.driver.cuda_device import CudaMachine as CudaMachine
from vmem_kv.driver.cuda_device import answer, find_device, load_cuda, page_properties, read_write, uuid_of
from vmem_kv.driver.cuda_device import describe_cuda as describe_cuda
from vmem_kv.driver.cuda_errors import MISSING_CODES, OUT_OF_MEMORY, SUCCESS
from vmem_kv.driver.cuda_streams import CudaStreams
from vmem_kv.driver.ledger import MAX_DEVICE_MAPPINGS, Ledger, ledger_of_device
from vmem_kv.errors import (
    ConfigError,
    DriverError,
    OutOfAddressSpace,
    OutOfHostMemory,
    OutOfMappings,
    OutOfPages,
    UsageError,
    VmemError,
)
from vmem_kv.units import format_bytes

_MAX_RESERVATION_BYTES = 1 << 46
P = ParamSpec("P")
R = TypeVar("R")


def _operation(method: Callable[Concatenate[CudaDriver, P], R]) -> Callable[Concatenate[CudaDriver, P], R]:
    """A call of the contract: refused where it cannot work, counted, and made in the primary context."""

    @functools.wraps(method)
    def call(driver: CudaDriver, /, *args: P.args, **kwargs: P.kwargs) -> R:
        driver._context.require_open(method.__name__)
        driver.calls[method.__name__] += 1
        with driver.in_context():
            return method(driver, *args, **kwargs)

    return call


class CudaDriver(Driver):
    """The driver contract over one CUDA device. `vmem_kv.open_driver` opens it with torch as the runtime.

    Args:
        index: The device's number, as CUDA_VISIBLE_DEVICES leaves it.
        runtime: Whose streams our work is ordered with, and who can spare memory.
        max_mappings: Limit on live mappings, over all drivers of this device in this process.
        tensor_device: What torch calls the device of this memory; by default "cuda:<index>".
        ledger: Where mappings and memory are counted; by default with the device's other drivers in this process.

    Raises:
        ConfigError: CUDA or the device cannot be used; the message says what is missing.
    """

    def __init__(
        self,
        index: int,
        runtime: Runtime,
        *,
        max_mappings: int = MAX_DEVICE_MAPPINGS,
        tensor_device: str | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self._cuda = cuda = load_cuda()
        # A garbage collection in the middle of a call may close a cache on this driver, from the same thread.
        self._lock = threading.RLock()
        self._reservations: set[Reservation] = set()
        self._pages: dict[Handle, int] = {}  # live handles and their sizes
        self._mapped: dict[int, int] = {}  # addresses of mappings and their sizes
        self._pinned: set[int] = set()  # where ranges of pinned host memory begin
        self.calls = Counter()
        try:
            device = find_device(cuda, index)
            self.uuid = uuid_of(cuda, device)
            """Names the device itself, whatever its number."""
            self.ledger = ledger or ledger_of_device(self.uuid)
            self._properties = page_properties(cuda, index)
            self._access = read_write(cuda, index)
            self._context = CudaContext(cuda, device, runtime)
            try:
                self._streams = CudaStreams(self._context)
                self.info = DriverInfo(
                    name="cuda",
                    device=tensor_device or f"cuda:{index}",
                    granularity_bytes=self._granularity_bytes(),
                    max_mappings=max_mappings,
                    neighbours_merge=False,
                    mappings_per_run=1,
                    keeps_pay=True,
                    memory_bytes=self.available_bytes(),
                    max_reservation_bytes=_MAX_RESERVATION_BYTES,
                    path="cuda-python",
                    reads_best="per_layer",
                    zeroes_new_pages=False,  # seen zero on some devices, promised nowhere
                )
            except BaseException:
                self._context.release()
                raise
        except DriverError as error:
            advice = MISSING_CODES.get(error.code, "check nvidia-smi")
            raise ConfigError(f"cuda:{index} cannot be used, {error}; {advice}") from error

    def available_bytes(self) -> int:
        self._context.require_open("available_bytes")
        with self.in_context():
            free, _ = answer("cuMemGetInfo", self._cuda.cuMemGetInfo())
        return int(free) + self._context.runtime.spare_bytes()

    @_operation
    def reserve(self, n_bytes: int) -> Reservation:
        if n_bytes > _MAX_RESERVATION_BYTES:
            raise OutOfAddressSpace(f"{n_bytes} bytes of addresses are more than {_MAX_RESERVATION_BYTES}")
        batch = self._context.batch()
        try:
            code = batch.call(self._cuda.cuMemAddressReserve, n_bytes, self.info.granularity_bytes, 0, 0)
            if code == OUT_OF_MEMORY:
                raise OutOfAddressSpace(
                    f"{self.info.device} has no free range of {format_bytes(n_bytes)}; lower max_tokens or the number "
                    "of slots"
                )
            if code != SUCCESS:
                raise self._context.failure("reserve", code, f"{n_bytes} bytes")
            reservation = Reservation(int(batch.values[0]), n_bytes)
            with self._lock:
                self._reservations.add(reservation)
        except BaseException:
            for base in batch.values:
                self._cuda.cuMemAddressFree(base, n_bytes)
            raise
        return reservation

    @_operation
    def free_reservation(self, reservation: Reservation) -> None:
        with self._lock:  # before the call: from then on another thread may reserve the same addresses
            if reservation not in self._reservations:
                raise UsageError(f"{reservation} is not a live reservation of this driver")
            self._reservations.remove(reservation)
        batch = self._context.batch()
        try:
            code = batch.call(self._cuda.cuMemAddressFree, reservation.base, reservation.n_bytes)
            if code != SUCCESS:
                raise self._context.failure("free_reservation", code, _range(reservation.base, reservation.n_bytes))
        finally:
            if not batch.n_done and not batch.is_unsure:
                with self._lock:
                    self._reservations.add(reservation)

    @_operation
    def create(self, page_bytes: int, places: Sequence[int], created: list[Handle]) -> None:
        batch = self._context.batch()
        try:
            for _ in places:
                code = batch.call(self._cuda.cuMemCreate, page_bytes, self._properties, 0)
                if code == OUT_OF_MEMORY:
                    raise OutOfPages(f"{self.info.device} has no memory for another page of {format_bytes(page_bytes)}")
                if code != SUCCESS:
                    raise self._context.failure("create", code, f"a page of {page_bytes} bytes")
        finally:
            handles = [Handle(int(handle)) for handle in batch.values]
            self._pages.update(dict.fromkeys(handles, page_bytes))
            created.extend(handles)

    @_operation
    def map(self, page_bytes: int, addresses: Sequence[int], handles: Sequence[Handle]) -> None:
        batch = self._context.batch()
        try:
            for address, handle in zip(addresses, handles, strict=True):
                code = batch.call(self._cuda.cuMemMap, address, page_bytes, 0, handle, 0)
                if code != SUCCESS:
                    raise self._mapping_failure("map", code, (address, page_bytes), batch.n_done)
        finally:
            n_done = batch.n_done
            self._mapped.update(dict.fromkeys(addresses[:n_done], page_bytes))
            if batch.is_unsure and self._is_mapped(addresses[n_done]):
                self._mapped[addresses[n_done]] = page_bytes

    @_operation
    def set_access(self, spans: Sequence[Span]) -> None:
        batch = self._context.batch()
        for address, n_bytes in spans:
            code = batch.call(self._cuda.cuMemSetAccess, address, n_bytes, self._access, 1)
            if code != SUCCESS:
                raise self._mapping_failure("set_access", code, (address, n_bytes), batch.n_done)

    @_operation
    def unmap(self, spans: Sequence[Span]) -> None:
        pages_of_spans = [self._pages_in(span) for span in spans]
        batch = self._context.batch()
        try:
            for address, n_bytes in spans:
                code = batch.call(self._cuda.cuMemUnmap, address, n_bytes)
                if code != SUCCESS:
                    raise self._mapping_failure("unmap", code, (address, n_bytes), batch.n_done)
        finally:
            n_done = batch.n_done
            if batch.is_unsure and not self._is_mapped(pages_of_spans[n_done][0]):
                n_done += 1
            for pages in pages_of_spans[:n_done]:
                for page in pages:
                    self._mapped.pop(page, None)

    @_operation
    def release(self, page_bytes: int, handles: Sequence[Handle]) -> None:
        with self._lock:
            if any(self._pages.get(handle) != page_bytes for handle in handles) or len(set(handles)) < len(handles):
                raise UsageError(
                    f"release of a handle that is not a live page of {page_bytes} bytes of this driver, or of one twice"
                )
            for handle in handles:  # before the calls: CUDA may give their numbers to another thread's pages
                del self._pages[handle]
        batch = self._context.batch()
        try:
            for handle in handles:
                code = batch.call(self._cuda.cuMemRelease, handle)
                if code != SUCCESS:
                    raise self._context.failure("release", code, f"handle {handle:#x}", batch.n_done)
        finally:
            # A handle of which nobody knows counts as gone: to release it again could be its second time.
            self._pages.update(dict.fromkeys(handles[batch.n_done + batch.is_unsure :], page_bytes))

    @_operation
    def scrub(self, spans: Sequence[Span]) -> None:
        self._streams.launch("scrub", self._cuda.cuMemsetD8Async, [(address, 0, n_bytes) for address, n_bytes in spans])

    @_operation
    def copy(self, copies: Sequence[Copy]) -> None:
        self._streams.launch(
            "copy", self._cuda.cuMemcpyDtoDAsync, [(target, source, n) for source, target, n in copies]
        )

    @_operation
    def copy_to_host(self, address: int, buffer: memoryview) -> Fence:
        target = (ctypes.c_char * buffer.nbytes).from_buffer(buffer)
        arguments = (ctypes.addressof(target), address, buffer.nbytes)
        self._streams.launch("copy_to_host", self._cuda.cuMemcpyDtoHAsync, [arguments])
        return self._streams.fence([self.current_stream()], keep=target)

    @_operation
    def copy_from_host(self, buffer: memoryview, address: int) -> Fence:
        given = ctypes.c_char * buffer.nbytes
        # ctypes takes no address of read-only memory
        source = given.from_buffer_copy(buffer) if buffer.readonly else given.from_buffer(buffer)
        arguments = (address, ctypes.addressof(source), buffer.nbytes)
        self._streams.launch("copy_from_host", self._cuda.cuMemcpyHtoDAsync, [arguments])
        return self._streams.fence([self.current_stream()], keep=source)

    @_operation
    def pin(self, address: int, n_bytes: int) -> None:
        # Portable: whatever device of this process copies to or from it.
        batch, flags = self._context.batch(), self._cuda.CU_MEMHOSTREGISTER_PORTABLE
        try:
            code = batch.call(self._cuda.cuMemHostRegister, address, n_bytes, flags)
            if code == OUT_OF_MEMORY:
                raise OutOfHostMemory(
                    f"the system keeps no more than what is pinned now in place for {self.info.device}: "
                    f"{format_bytes(n_bytes)} were refused; use a smaller host tier"
                )
            if code != SUCCESS:
                raise self._context.failure("pin", code, _range(address, n_bytes))
        finally:
            if batch.n_done or (batch.is_unsure and self._is_pinned(address)):
                with self._lock:
                    self._pinned.add(address)

    @_operation
    def unpin(self, address: int) -> None:
        with self._lock:
            if address not in self._pinned:
                raise UsageError(f"unpin at {address:#x}: no range that this driver pinned begins there")
            self._pinned.remove(address)  # before the call: another thread may pin what is freed behind it
        batch = self._context.batch()
        try:
            code = batch.call(self._cuda.cuMemHostUnregister, address)
            if code != SUCCESS:
                raise self._context.failure("unpin", code, f"host memory at {address:#x}")
        finally:
            if not batch.n_done and (not batch.is_unsure or self._is_pinned(address)):
                with self._lock:
                    self._pinned.add(address)

    def bind_thread(self) -> None:
        self._context.require_open("bind_thread")
        self._streams.bind_thread()

    def current_stream(self) -> int:
        return self._streams.current()

    @_operation
    def fence(self, streams: Collection[int] = ()) -> Fence:
        return self._streams.fence({self.current_stream(), *streams})

    def close(self) -> None:
        context = self._context
        if context.is_closed or os.getpid() != context.pid:
            return
        if self._reservations and context.lost is None:
            raise UsageError(f"{len(self._reservations)} reservations are still open; close their caches first")
        if self._pinned and context.lost is None:
            raise UsageError(f"{len(self._pinned)} ranges of host memory are still pinned; close their tiers first")
        context.is_closed = True
        if context.lost is not None:
            return
        # What fails here has nobody left to hear of it, and goes with the process.
        with context.current():
            self._streams.close()
            for handle in self._pages:
                self._cuda.cuMemRelease(handle)
        context.release()

    def in_context(self) -> AbstractContextManager[None]:
        """Work in the device's primary context; afterwards the one is current that was before, or none."""
        return self._context.current()

    def _granularity_bytes(self) -> int:
        smallest = self._cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        with self.in_context():
            result = self._cuda.cuMemGetAllocationGranularity(self._properties, smallest)
        return int(answer("cuMemGetAllocationGranularity", result))

    def _is_mapped(self, address: int) -> bool:
        """Ask the device, where an interruption has left our books behind."""
        code, handle = self._cuda.cuMemRetainAllocationHandle(address)
        if code == SUCCESS:
            self._cuda.cuMemRelease(handle)
        return bool(code == SUCCESS)

    def _is_pinned(self, address: int) -> bool:
        """Ask the device, as above."""
        kind = self._cuda.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE
        code, _ = self._cuda.cuPointerGetAttribute(kind, address)
        return bool(code == SUCCESS)

    def _pages_in(self, span: Span) -> list[int]:
        """The addresses of the mappings that fill a range exactly."""
        address, n_bytes = span
        pages, end = [], address + n_bytes
        while address < end:
            pages.append(address)
            page_bytes = self._mapped.get(address)
            if page_bytes is None:
                raise UsageError(f"unmap of {_range(*span)}: nothing is mapped at {address:#x}")
            address += page_bytes
        if address != end:
            raise UsageError(f"unmap of {_range(*span)} cuts the mapping at {pages[-1]:#x}")
        return pages

    def _mapping_failure(self, operation: str, code: Any, span: Span, n_done: int) -> VmemError:
        if code != OUT_OF_MEMORY:
            return self._context.failure(operation, code, _range(*span), n_done)
        error = OutOfMappings(
            f"{self.info.device} refuses another mapping in {operation} of {_range(*span)}; use larger pages"
        )
        error.n_done = n_done
        return error


def _range(address: int, n_bytes: int) -> str:
    return f"[{address:#x}, {address + n_bytes:#x})"
