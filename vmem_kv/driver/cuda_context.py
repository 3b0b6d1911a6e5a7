"""Where CUDA is called from: a device's primary context, in the process and the threads that may use it.

Guarantees
  * The primary context, which torch uses as well, is current inside `current`, and behind it the one that was before.
  * After a sticky error (an illegal address, a failed launch) the device is `lost`: nobody calls it any more.

Assumptions: one process (a forked child is refused).

Source: CUDA driver API, "Primary Context Management" and "Context Management" (cuda.h 13.0).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from vmem_kv.driver.cuda_calls import Batch
from vmem_kv.driver.cuda_device import answer
from vmem_kv.driver.cuda_errors import LOST_CODES, SUCCESS
from vmem_kv.errors import DriverError, UsageError


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


class CudaContext:
    """The primary context of one device, retained for one driver.

    Args:
        cuda: cuda-python's driver bindings.
        device: A CUdevice.
        runtime: Who else uses it here.

    Raises:
        DriverError: It cannot be retained.
    """

    def __init__(self, cuda: Any, device: Any, runtime: Runtime) -> None:
        self.cuda = cuda
        self.runtime = runtime
        self.pid = os.getpid()
        self.is_closed = False
        self.lost: DriverError | None = None
        """The sticky error that ended the device for this process."""
        self._device = device
        self._threads = threading.local()  # .stream: of a thread that works for us
        self.handle = answer("cuDevicePrimaryCtxRetain", cuda.cuDevicePrimaryCtxRetain(device))

    @property
    def own_stream(self) -> Any:
        """The stream that the calling thread has for its work for us; None in everybody else's threads."""
        return getattr(self._threads, "stream", None)

    @own_stream.setter
    def own_stream(self, stream: Any) -> None:
        self._threads.stream = stream

    def require_open(self, operation: str) -> None:
        """Raise UsageError in a forked child and after `close`, a fatal DriverError after the device was lost."""
        if os.getpid() != self.pid:
            raise UsageError(
                f"{operation} in a forked child: the cache belongs to process {self.pid}, and CUDA does not survive a "
                "fork; spawn the process instead"
            )
        if self.is_closed:
            raise UsageError(f"{operation} on a closed driver")
        if self.lost is not None:
            lost = DriverError(operation, self.lost.code, self.lost.name, 0, "not tried: the device was lost before")
            lost.is_fatal = True
            raise lost

    @contextmanager
    def current(self) -> Iterator[None]:
        """Work in the device's primary context; afterwards the one is current that was before, or none.

        torch makes another one current as it goes from device to device, and takes its device from it.

        Raises:
            DriverError: The context cannot be made current.
        """
        code, current = self.cuda.cuCtxGetCurrent()
        is_ours = current is not None and int(current) == int(self.handle)
        if code == SUCCESS and not is_ours:
            (code,) = self.cuda.cuCtxPushCurrent(self.handle)
        if code != SUCCESS:
            raise self.failure("context", code, "the primary context")
        try:
            yield
        finally:
            if not is_ours:
                self.cuda.cuCtxPopCurrent()

    def batch(self) -> Batch:
        """The calls of one operation."""
        return Batch(self.cuda.cuCtxSynchronize, self._runtime_gave_memory)

    def failure(self, operation: str, code: Any, what: str, n_done: int = 0) -> DriverError:
        """Describe a failed call. It may be an earlier launch that failed, which only the device can tell."""
        detail = f"{what} on cuda:{int(self._device)}"
        reported = code
        if int(code) not in LOST_CODES:
            reported = self.batch().call(self.cuda.cuCtxSynchronize)
        if reported not in (SUCCESS, code):
            detail += f"; the device reports {reported.name} ({int(reported)}) from earlier work"
        error = DriverError(operation, int(code), code.name, n_done, detail)
        if int(code) in LOST_CODES or int(reported) in LOST_CODES:
            error.is_fatal = True
            self.lost = self.lost or error
        return error

    def release(self) -> None:
        """Let go of the primary context. What fails here has nobody left to hear of it."""
        self.cuda.cuDevicePrimaryCtxRelease(self._device)

    def _runtime_gave_memory(self) -> bool:
        """Ask whoever keeps memory for it, but not from a mapper: to answer, torch waits for the whole device."""
        if self.own_stream is not None:
            return False
        try:
            self.runtime.free_cached_memory()
        except RuntimeError:  # not while a graph is being captured, for one
            return False
        return True
