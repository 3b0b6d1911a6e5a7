"""Demand mapping on NVIDIA GPUs: CUDA's virtual memory management, through cuda-python. The only file that imports it.

Guarantees
  * One handle is one page: the driver demands that the offset inside a handle is zero. One `cuMemSetAccess` and one
    `cuMemUnmap` for each contiguous run, since these two are the expensive calls.
  * The device's primary context, which torch uses as well, is current during every call, and afterwards the one that
    was current before.
  * A double release never reaches the driver, which would not survive it; nor does an unmap of what is not mapped, nor
    an unpin of what is not pinned. An interruption (Ctrl-C) cannot part our books from the device: answers are kept as
    they arrive (`cuda_calls.py`), and where one was lost the device is asked.
  * After a sticky error (an illegal address, a failed launch) CUDA is not called any more: every call raises the same
    fatal error, and `close` forgets.
  * Nothing runs when the interpreter exits: tensors may be alive, and the process takes its memory with it.

Assumptions: one process per driver (a forked child is refused). Whoever else uses the device's memory in this process
is known as the `runtime`.

Source: CUDA driver API, "Virtual Memory Management", "Memory Management", "Stream Management" and "Event Management"
(cuda.h 13.0).
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

from vmem_kv.driver.base import Copy, Driver, DriverInfo, Fence, Handle, Reservation, Span
from vmem_kv.driver.cuda_calls import Batch
from vmem_kv.driver.cuda_errors import (
    CONTEXT_IS_DESTROYED,
    INVALID_HANDLE,
    LOST_CODES,
    MISSING_CODES,
    NOT_READY,
    OUT_OF_MEMORY,
    SUCCESS,
)
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
_LEGACY_STREAM = 1  # CU_STREAM_LEGACY


class Runtime(Protocol):
    """Who launches work on the device in this process, and keeps memory of it: torch, as a rule (`devices.py`)."""

    def current_stream(self) -> int:
        """The stream (a cudaStream_t) on which the calling thread launches; 0 for the legacy default stream."""

    def spare_bytes(self) -> int:
        """Memory that `free_cached_memory` would give back, at most."""

    def free_cached_memory(self) -> None:
        """Give memory that is kept for later back to the driver. May raise RuntimeError where it cannot just now."""


class NoRuntime:
    """Nobody but us: work goes to the legacy default stream. Wrong where torch launches on streams of its own."""

    def current_stream(self) -> int:
        """Return the legacy default stream."""
        return 0

    def spare_bytes(self) -> int:
        """Return 0: nobody keeps any."""
        return 0

    def free_cached_memory(self) -> None:
        """Do nothing."""


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """A device as the NVIDIA driver describes it."""

    index: int
    name: str
    uuid: str
    memory_bytes: int
    has_virtual_memory: bool


class CudaMachine(NamedTuple):
    """What the NVIDIA driver of this machine offers to this process."""

    driver_version: str  # of CUDA, as "13.0"
    devices: tuple[CudaDevice, ...]


def describe_cuda() -> CudaMachine:
    """Ask the NVIDIA driver what there is, without beginning to use a device.

    Raises:
        ConfigError: CUDA cannot be used; the message says what is missing.
    """
    cuda = _load_cuda()
    version = int(_answer("cuDriverGetVersion", cuda.cuDriverGetVersion()))
    supported = cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
    devices = []
    for index in range(int(_answer("cuDeviceGetCount", cuda.cuDeviceGetCount()))):
        device = _answer("cuDeviceGet", cuda.cuDeviceGet(index))
        devices.append(
            CudaDevice(
                index,
                _answer("cuDeviceGetName", cuda.cuDeviceGetName(128, device)).split(b"\0")[0].decode(errors="replace"),
                bytes(_answer("cuDeviceGetUuid", cuda.cuDeviceGetUuid(device)).bytes).hex(),
                int(_answer("cuDeviceTotalMem", cuda.cuDeviceTotalMem(device))),
                bool(_answer("cuDeviceGetAttribute", cuda.cuDeviceGetAttribute(supported, device))),
            )
        )
    return CudaMachine(f"{version // 1000}.{version % 1000 // 10}", tuple(devices))


P = ParamSpec("P")
R = TypeVar("R")


def _operation(method: Callable[Concatenate[CudaDriver, P], R]) -> Callable[Concatenate[CudaDriver, P], R]:
    """A call of the contract: refused where it cannot work, counted, and made in the primary context."""

    @functools.wraps(method)
    def call(driver: CudaDriver, /, *args: P.args, **kwargs: P.kwargs) -> R:
        driver._require_open(method.__name__)
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
        self._cuda = cuda = _load_cuda()
        self._runtime = runtime
        self._pid = os.getpid()
        # A garbage collection in the middle of a call may close a cache on this driver, from the same thread.
        self._lock = threading.RLock()
        self._closed = False
        self._lost: DriverError | None = None
        self._reservations: set[Reservation] = set()
        self._pages: dict[Handle, int] = {}  # live handles and their sizes
        self._mapped: dict[int, int] = {}  # addresses of mappings and their sizes
        self._pinned: set[int] = set()  # where ranges of pinned host memory begin
        self._threads = threading.local()  # .stream: of a thread that called bind_thread
        self._idle_streams: list[Any] = []
        self._streams: list[Any] = []
        self._idle_events: list[Any] = []
        self._events: list[Any] = []
        self.calls = Counter()
        try:
            self._device = _find_device(cuda, index)
            self.uuid = bytes(_answer("cuDeviceGetUuid", cuda.cuDeviceGetUuid(self._device)).bytes).hex()
            """Names the device itself, whatever its number."""
            self.ledger = ledger or ledger_of_device(self.uuid)
            self._properties = _page_properties(cuda, index)
            self._access = _read_write(cuda, index)
            self._context = _answer("cuDevicePrimaryCtxRetain", cuda.cuDevicePrimaryCtxRetain(self._device))
            try:
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
                cuda.cuDevicePrimaryCtxRelease(self._device)
                raise
        except DriverError as error:
            advice = MISSING_CODES.get(error.code, "check nvidia-smi")
            raise ConfigError(f"cuda:{index} cannot be used, {error}; {advice}") from error

    def available_bytes(self) -> int:
        self._require_open("available_bytes")
        with self.in_context():
            free, _ = _answer("cuMemGetInfo", self._cuda.cuMemGetInfo())
        return int(free) + self._runtime.spare_bytes()

    @_operation
    def reserve(self, n_bytes: int) -> Reservation:
        if n_bytes > _MAX_RESERVATION_BYTES:
            raise OutOfAddressSpace(f"{n_bytes} bytes of addresses are more than {_MAX_RESERVATION_BYTES}")
        batch = self._batch()
        try:
            code = batch.call(self._cuda.cuMemAddressReserve, n_bytes, self.info.granularity_bytes, 0, 0)
            if code == OUT_OF_MEMORY:
                raise OutOfAddressSpace(
                    f"{self.info.device} has no free range of {format_bytes(n_bytes)}; lower max_tokens or the number "
                    "of slots"
                )
            if code != SUCCESS:
                raise self._failure("reserve", code, f"{n_bytes} bytes")
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
        batch = self._batch()
        try:
            code = batch.call(self._cuda.cuMemAddressFree, reservation.base, reservation.n_bytes)
            if code != SUCCESS:
                raise self._failure("free_reservation", code, _range(reservation.base, reservation.n_bytes))
        finally:
            if not batch.n_done and not batch.is_unsure:
                with self._lock:
                    self._reservations.add(reservation)

    @_operation
    def create(self, page_bytes: int, places: Sequence[int], created: list[Handle]) -> None:
        batch = self._batch()
        try:
            for _ in places:
                code = batch.call(self._cuda.cuMemCreate, page_bytes, self._properties, 0)
                if code == OUT_OF_MEMORY:
                    raise OutOfPages(f"{self.info.device} has no memory for another page of {format_bytes(page_bytes)}")
                if code != SUCCESS:
                    raise self._failure("create", code, f"a page of {page_bytes} bytes")
        finally:
            handles = [Handle(int(handle)) for handle in batch.values]
            self._pages.update(dict.fromkeys(handles, page_bytes))
            created.extend(handles)

    @_operation
    def map(self, page_bytes: int, addresses: Sequence[int], handles: Sequence[Handle]) -> None:
        batch = self._batch()
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
        batch = self._batch()
        for address, n_bytes in spans:
            code = batch.call(self._cuda.cuMemSetAccess, address, n_bytes, self._access, 1)
            if code != SUCCESS:
                raise self._mapping_failure("set_access", code, (address, n_bytes), batch.n_done)

    @_operation
    def unmap(self, spans: Sequence[Span]) -> None:
        pages_of_spans = [self._pages_in(span) for span in spans]
        batch = self._batch()
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
        batch = self._batch()
        try:
            for handle in handles:
                code = batch.call(self._cuda.cuMemRelease, handle)
                if code != SUCCESS:
                    raise self._failure("release", code, f"handle {handle:#x}", batch.n_done)
        finally:
            # A handle of which nobody knows counts as gone: to release it again could be its second time.
            self._pages.update(dict.fromkeys(handles[batch.n_done + batch.is_unsure :], page_bytes))

    @_operation
    def scrub(self, spans: Sequence[Span]) -> None:
        self._launch("scrub", self._cuda.cuMemsetD8Async, [(address, 0, n_bytes) for address, n_bytes in spans])

    @_operation
    def copy(self, copies: Sequence[Copy]) -> None:
        self._launch("copy", self._cuda.cuMemcpyDtoDAsync, [(target, source, n) for source, target, n in copies])

    @_operation
    def copy_to_host(self, address: int, buffer: memoryview) -> Fence:
        target = (ctypes.c_char * buffer.nbytes).from_buffer(buffer)
        arguments = (ctypes.addressof(target), address, buffer.nbytes)
        self._launch("copy_to_host", self._cuda.cuMemcpyDtoHAsync, [arguments])
        return self._fence_on([self.current_stream()], keep=target)

    @_operation
    def copy_from_host(self, buffer: memoryview, address: int) -> Fence:
        given = ctypes.c_char * buffer.nbytes
        # ctypes takes no address of read-only memory
        source = given.from_buffer_copy(buffer) if buffer.readonly else given.from_buffer(buffer)
        arguments = (address, ctypes.addressof(source), buffer.nbytes)
        self._launch("copy_from_host", self._cuda.cuMemcpyHtoDAsync, [arguments])
        return self._fence_on([self.current_stream()], keep=source)

    @_operation
    def pin(self, address: int, n_bytes: int) -> None:
        # Portable: whatever device of this process copies to or from it.
        batch, flags = self._batch(), self._cuda.CU_MEMHOSTREGISTER_PORTABLE
        try:
            code = batch.call(self._cuda.cuMemHostRegister, address, n_bytes, flags)
            if code == OUT_OF_MEMORY:
                raise OutOfHostMemory(
                    f"the system keeps no more than what is pinned now in place for {self.info.device}: "
                    f"{format_bytes(n_bytes)} were refused; use a smaller host tier"
                )
            if code != SUCCESS:
                raise self._failure("pin", code, _range(address, n_bytes))
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
        batch = self._batch()
        try:
            code = batch.call(self._cuda.cuMemHostUnregister, address)
            if code != SUCCESS:
                raise self._failure("unpin", code, f"host memory at {address:#x}")
        finally:
            if not batch.n_done and (not batch.is_unsure or self._is_pinned(address)):
                with self._lock:
                    self._pinned.add(address)

    def bind_thread(self) -> None:
        self._require_open("bind_thread")
        if getattr(self._threads, "stream", None) is not None:
            return
        cuda = self._cuda
        (code,) = cuda.cuCtxSetCurrent(self._context)
        if code == SUCCESS:
            # What a mapper does must not end a graph capture that another thread has begun.
            code, _ = cuda.cuThreadExchangeStreamCaptureMode(cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
        if code == SUCCESS:
            try:
                stream = self._idle_streams.pop()
            except IndexError:
                code, stream = cuda.cuStreamCreate(cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)
                if code == SUCCESS:
                    self._streams.append(stream)
        if code != SUCCESS:
            raise self._failure("bind_thread", code, "this thread's context and stream")
        self._threads.stream = stream
        weakref.finalize(threading.current_thread(), self._idle_streams.append, stream).atexit = False

    def current_stream(self) -> int:
        own = getattr(self._threads, "stream", None)
        # By its own name: cuda-python can be told to take 0 for another stream than torch does.
        return (self._runtime.current_stream() or _LEGACY_STREAM) if own is None else int(own)

    @_operation
    def fence(self, streams: Collection[int] = ()) -> Fence:
        return self._fence_on({self.current_stream(), *streams})

    def close(self) -> None:
        if self._closed or os.getpid() != self._pid:
            return
        if self._reservations and self._lost is None:
            raise UsageError(f"{len(self._reservations)} reservations are still open; close their caches first")
        if self._pinned and self._lost is None:
            raise UsageError(f"{len(self._pinned)} ranges of host memory are still pinned; close their tiers first")
        self._closed = True
        if self._lost is not None:
            return
        # What fails here has nobody left to hear of it, and goes with the process.
        with self.in_context():
            for event in self._events:
                self._cuda.cuEventDestroy(event)
            for stream in self._streams:
                self._cuda.cuStreamDestroy(stream)
            for handle in self._pages:
                self._cuda.cuMemRelease(handle)
        self._cuda.cuDevicePrimaryCtxRelease(self._device)

    @contextmanager
    def in_context(self) -> Iterator[None]:
        """Work in the device's primary context; afterwards the one is current that was before, or none.

        torch makes another one current as it goes from device to device, and takes its device from it.
        """
        code, current = self._cuda.cuCtxGetCurrent()
        is_ours = current is not None and int(current) == int(self._context)
        if code == SUCCESS and not is_ours:
            (code,) = self._cuda.cuCtxPushCurrent(self._context)
        if code != SUCCESS:
            raise self._failure("context", code, "the primary context")
        try:
            yield
        finally:
            if not is_ours:
                self._cuda.cuCtxPopCurrent()

    def _granularity_bytes(self) -> int:
        smallest = self._cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        with self.in_context():
            answer = self._cuda.cuMemGetAllocationGranularity(self._properties, smallest)
        return int(_answer("cuMemGetAllocationGranularity", answer))

    def _batch(self) -> Batch:
        return Batch(self._cuda.cuCtxSynchronize, self._runtime_gave_memory)

    def _require_open(self, operation: str) -> None:
        if os.getpid() != self._pid:
            raise UsageError(
                f"{operation} in a forked child: the cache belongs to process {self._pid}, and CUDA does not survive a "
                "fork; spawn the process instead"
            )
        if self._closed:
            raise UsageError(f"{operation} on a closed driver")
        if self._lost is not None:
            lost = DriverError(operation, self._lost.code, self._lost.name, 0, "not tried: the device was lost before")
            lost.is_fatal = True
            raise lost

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

    def _launch(self, operation: str, call: Callable[..., Any], items: Sequence[tuple[int, ...]]) -> None:
        """Queue a call per item on the current stream.

        Waits for the stream in a thread of ours, and where something failed: then nothing of it may still run.
        """
        stream, batch = self.current_stream(), self._batch()
        try:
            for arguments in items:
                code = batch.call(call, *arguments, stream)
                if code != SUCCESS:
                    raise self._failure(operation, code, f"({', '.join(map(hex, arguments))})", batch.n_done)
        except BaseException:
            if self._lost is None:
                self._cuda.cuStreamSynchronize(stream)
            raise
        if getattr(self._threads, "stream", None) is not None:
            (code,) = self._cuda.cuStreamSynchronize(stream)
            if code != SUCCESS:
                raise self._failure(operation, code, "waiting for the stream")

    def _fence_on(self, streams: Collection[int], keep: object = None) -> Fence:
        fence = _EventFence(self, keep)
        for stream in streams:
            self._record(fence, stream)
        return fence

    def _record(self, fence: _EventFence, stream: int) -> None:
        code, status = self._cuda.cuStreamIsCapturing(stream)
        if code == SUCCESS and int(status) != 0:
            raise UsageError(
                "a CUDA graph is being captured on this stream, and what it touches may run again at any time; end the "
                "capture first, and hold a step open for as long as the graph lives (vmem_kv.steps)"
            )
        try:
            event = self._idle_events.pop()
        except IndexError:
            event = self._new_event()
        fence.events.append(event)
        if code == SUCCESS:
            (code,) = self._cuda.cuEventRecord(event, stream)
        if code in (INVALID_HANDLE, CONTEXT_IS_DESTROYED):
            # The stream is gone. What ran on it has finished when everything has.
            (code,) = self._cuda.cuCtxSynchronize()
        if code != SUCCESS:
            raise self._failure("fence", code, f"stream {stream:#x}")

    def _new_event(self) -> Any:
        code, event = self._cuda.cuEventCreate(self._cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        if code != SUCCESS:
            raise self._failure("fence", code, "a new event")
        self._events.append(event)
        return event

    def _runtime_gave_memory(self) -> bool:
        """Ask whoever keeps memory for it, but not from a mapper: to answer, torch waits for the whole device."""
        if getattr(self._threads, "stream", None) is not None:
            return False
        try:
            self._runtime.free_cached_memory()
        except RuntimeError:  # not while a graph is being captured, for one
            return False
        return True

    def _mapping_failure(self, operation: str, code: Any, span: Span, n_done: int) -> VmemError:
        if code != OUT_OF_MEMORY:
            return self._failure(operation, code, _range(*span), n_done)
        error = OutOfMappings(
            f"{self.info.device} refuses another mapping in {operation} of {_range(*span)}; use larger pages"
        )
        error.n_done = n_done
        return error

    def _failure(self, operation: str, code: Any, what: str, n_done: int = 0) -> DriverError:
        """Describe a failed call. It may be an earlier launch that failed, which only the device can tell."""
        detail = f"{what} on cuda:{int(self._device)}"
        reported = code
        if int(code) not in LOST_CODES:
            batch = self._batch()
            reported = batch.call(self._cuda.cuCtxSynchronize)
        if reported not in (SUCCESS, code):
            detail += f"; the device reports {reported.name} ({int(reported)}) from earlier work"
        error = DriverError(operation, int(code), code.name, n_done, detail)
        if int(code) in LOST_CODES or int(reported) in LOST_CODES:
            error.is_fatal = True
            self._lost = self._lost or error
        return error


class _EventFence:
    """Events, one per stream. They go back to their driver when nobody holds the fence any more."""

    def __init__(self, driver: CudaDriver, keep: object) -> None:
        self.events: list[Any] = []
        self._driver = driver
        self._keep = keep  # memory of the host that the device still reads or writes
        self._has_passed = False

    def passed(self) -> bool:
        """Whether all streams have come past their event."""
        return self._has_passed or self._ask(self._driver._cuda.cuEventQuery)

    def wait(self) -> None:
        """Block until then."""
        if not self._has_passed:
            self._ask(self._driver._cuda.cuEventSynchronize)

    def _ask(self, call: Callable[..., Any]) -> bool:
        driver = self._driver
        for event in self.events:
            if driver._lost is not None or driver._closed:
                break  # a device that is lost runs nothing
            with driver.in_context():
                (code,) = call(event)
            if code == NOT_READY:
                return False
            if code != SUCCESS:
                raise driver._failure("fence", code, "an event")
        self._has_passed = True
        self._keep = None
        return True

    def __del__(self) -> None:
        self._driver._idle_events.extend(self.events)


def _load_cuda() -> Any:
    try:
        from cuda.bindings import driver as cuda
    except ImportError as error:
        raise ConfigError(f"cuda-python is missing ({error}); pip install cuda-bindings") from error
    try:
        (code,) = cuda.cuInit(0)
    except RuntimeError as error:
        raise ConfigError(
            "no NVIDIA driver: libcuda.so.1 was not found; install the driver on a machine with an NVIDIA GPU, or use "
            "device 'cpu'"
        ) from error
    if code != SUCCESS:
        advice = MISSING_CODES.get(int(code), "check nvidia-smi")
        raise ConfigError(f"CUDA cannot be used: cuInit answers {code.name} ({int(code)}); {advice}")
    return cuda


def _find_device(cuda: Any, index: int) -> Any:
    n_devices = int(_answer("cuDeviceGetCount", cuda.cuDeviceGetCount()))
    if not 0 <= index < n_devices:
        raise ConfigError(
            f"there is no device cuda:{index}: the NVIDIA driver sees {n_devices}; check CUDA_VISIBLE_DEVICES"
        )
    device = _answer("cuDeviceGet", cuda.cuDeviceGet(index))
    supported = cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
    if not _answer("cuDeviceGetAttribute", cuda.cuDeviceGetAttribute(supported, device)):
        raise ConfigError(f"cuda:{index} has no virtual memory management, which vmem_kv is built on; use another GPU")
    return device


def _page_properties(cuda: Any, index: int) -> Any:
    properties = cuda.CUmemAllocationProp()
    properties.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = index
    return properties


def _read_write(cuda: Any, index: int) -> list[Any]:
    access = cuda.CUmemAccessDesc()
    access.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access.location.id = index
    access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    return [access]


def _answer(call: str, result: Any) -> Any:
    """The value of a call that asks something and cannot break off half-way."""
    code, *values = result
    if code != SUCCESS:
        error = DriverError(call, int(code), code.name)
        error.is_fatal = int(code) in LOST_CODES
        raise error
    return values[0] if len(values) == 1 else values


def _range(address: int, n_bytes: int) -> str:
    return f"[{address:#x}, {address + n_bytes:#x})"
