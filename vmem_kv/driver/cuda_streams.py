"""Streams and events of one device: on which stream work goes, how one knows that it is over.

Guarantees
  * Work is launched on the stream on which the calling thread launches its kernels, so that nothing waits for it. A
    thread of ours, which nobody's work is ordered behind, has a stream of its own and waits for it, to its end.
  * Where a launch fails, nothing of what was launched with it still runs.
  * A fence on a device that was lost or closed has passed: nothing runs there.

Assumptions: the device's context is current (`CudaContext.current`). `bind_thread` and fences see to that themselves.

Source: CUDA driver API, "Stream Management" and "Event Management" (cuda.h 13.0).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

from vmem_kv.driver.base import Fence
from vmem_kv.driver.cuda_context import CudaContext
from vmem_kv.driver.cuda_errors import CONTEXT_IS_DESTROYED, INVALID_HANDLE, NOT_READY, SUCCESS
from vmem_kv.errors import UsageError

_LEGACY_STREAM = 1  # CU_STREAM_LEGACY


class CudaStreams:
    """The streams of our threads, and the events of our fences; both are used again."""

    def __init__(self, context: CudaContext) -> None:
        self._context = context
        self._streams: list[Any] = []
        self._idle_streams: list[Any] = []
        self._events: list[Any] = []
        self._idle_events: list[Any] = []

    def bind_thread(self) -> None:
        """Make the calling thread one of ours: the context is current in it for good, and it has a stream.

        Raises:
            DriverError: It cannot have them. Calling again tries again.
        """
        context = self._context
        if context.own_stream is not None:
            return
        cuda = context.cuda
        (code,) = cuda.cuCtxSetCurrent(context.handle)
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
            raise context.failure("bind_thread", code, "this thread's context and stream")
        context.own_stream = stream
        weakref.finalize(threading.current_thread(), self._idle_streams.append, stream).atexit = False

    def current(self) -> int:
        """The stream on which the calling thread's work goes."""
        own = self._context.own_stream
        # By its own name: cuda-python can be told to take 0 for another stream than torch does.
        return (self._context.runtime.current_stream() or _LEGACY_STREAM) if own is None else int(own)

    def launch(self, operation: str, call: Callable[..., Any], items: Sequence[tuple[int, ...]]) -> None:
        """Queue a call per item on the current stream.

        Waits for the stream in a thread of ours, and where something failed: then nothing of it may still run.

        Raises:
            DriverError: A call failed.
        """
        context = self._context
        stream, batch = self.current(), context.batch()
        try:
            for arguments in items:
                code = batch.call(call, *arguments, stream)
                if code != SUCCESS:
                    raise context.failure(operation, code, f"({', '.join(map(hex, arguments))})", batch.n_done)
        except BaseException:
            if context.lost is None:
                context.cuda.cuStreamSynchronize(stream)
            raise
        if context.own_stream is not None:
            (code,) = context.cuda.cuStreamSynchronize(stream)
            if code != SUCCESS:
                raise context.failure(operation, code, "waiting for the stream")

    def fence(self, streams: Collection[int], keep: object = None) -> Fence:
        """Return a fence behind all that was launched on some streams so far.

        Args:
            streams: Which; one that is gone counts as every stream.
            keep: What must live until the fence has passed.

        Raises:
            UsageError: A graph is being captured on one of them.
            DriverError: An event could not be recorded.
        """
        fence = _EventFence(self._context, self._idle_events, keep)
        for stream in streams:
            self._record(fence, stream)
        return fence

    def close(self) -> None:
        """Destroy all of them. What fails here has nobody left to hear of it, and goes with the process."""
        for event in self._events:
            self._context.cuda.cuEventDestroy(event)
        for stream in self._streams:
            self._context.cuda.cuStreamDestroy(stream)

    def _record(self, fence: _EventFence, stream: int) -> None:
        cuda = self._context.cuda
        code, status = cuda.cuStreamIsCapturing(stream)
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
            (code,) = cuda.cuEventRecord(event, stream)
        if code in (INVALID_HANDLE, CONTEXT_IS_DESTROYED):
            # The stream is gone. What ran on it has finished when everything has.
            (code,) = cuda.cuCtxSynchronize()
        if code != SUCCESS:
            raise self._context.failure("fence", code, f"stream {stream:#x}")

    def _new_event(self) -> Any:
        cuda = self._context.cuda
        code, event = cuda.cuEventCreate(cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        if code != SUCCESS:
            raise self._context.failure("fence", code, "a new event")
        self._events.append(event)
        return event


class _EventFence:
    """Events, one per stream. They go back to `idle_events` when nobody holds the fence any more."""

    def __init__(self, context: CudaContext, idle_events: list[Any], keep: object) -> None:
        self.events: list[Any] = []
        self._context = context
        self._idle_events = idle_events
        self._keep = keep  # memory of the host that the device still reads or writes
        self._has_passed = False

    def passed(self) -> bool:
        """Whether all streams have come past their event."""
        return self._has_passed or self._ask(self._context.cuda.cuEventQuery)

    def wait(self) -> None:
        """Block until then."""
        if not self._has_passed:
            self._ask(self._context.cuda.cuEventSynchronize)

    def _ask(self, call: Callable[..., Any]) -> bool:
        context = self._context
        for event in self.events:
            if context.lost is not None or context.is_closed:
                break  # a device that is lost runs nothing
            with context.current():
                (code,) = call(event)
            if code == NOT_READY:
                return False
            if code != SUCCESS:
                raise context.failure("fence", code, "an event")
        self._has_passed = True
        self._keep = None
        return True

    def __del__(self) -> None:
        self._idle_events.extend(self.events)
