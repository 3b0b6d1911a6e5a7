"""The engine in a thread of its own, for asyncio.

    answers = engine.submit(request)       checked and queued; raises at once
    async for update in answers:           SequenceUpdate, until each of the n answers has finished
        ...
    await answers.aclose()                 or leave the loop early: the request is aborted

The engine's thread never waits for a reader: it hands updates over to the reader's event loop, where unread ones of an
answer are joined into one. A reader that leaves too much unread is cut off.

Guarantees: every stream ends: with its answers' last updates, or by raising EngineDead where the engine died. Once a
stream is closed, its memory is free within two steps. Nothing outside the thread touches the engine but `check` and
`snapshot`, which allow it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from vmem_kv.engine.engine import Engine
from vmem_kv.engine.request import FinishReason, Request, SequenceUpdate
from vmem_kv.engine.stats import EngineStats
from vmem_kv.errors import (
    DriverError,
    EngineDead,
    InvalidRequest,
    InvariantError,
    QueueFull,
    ReaderTooSlow,
    RequestError,
    ShuttingDown,
    UsageError,
    VmemError,
)
from vmem_kv.tiers.moving import Task
from vmem_kv.tiers.sessions import Level

MAX_UNREAD_CHARACTERS = 64 * 1024
_LOGPROB_CHARACTERS = 4
"""What a log probability counts as: of a token without text there can be many."""
HEARTBEAT_S = 0.25
"""How often an idle engine shows that it is alive."""
_LOG = logging.getLogger("vmem_kv")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the engine can be relied on.

    Attributes:
        is_alive: Its thread runs.
        silent_s: Seconds since it last showed life: after each step, and while idle every `HEARTBEAT_S`.
        is_mapper_alive: Whether memory is mapped ahead; where not, mapping is synchronous. None: not asked for.
        is_draining: Whether it takes on nothing new.
        n_open: Requests unfinished.
        death: Why it is dead, in words; empty while it is not.
    """

    is_alive: bool
    silent_s: float
    is_mapper_alive: bool | None
    is_draining: bool
    n_open: int
    death: str


class AnswerStream:
    """One request's updates, in the event loop that submitted it."""

    def __init__(self, engine: AsyncEngine, request: Request, max_unread_characters: int) -> None:
        self.request = request
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._max_unread_characters = max_unread_characters
        self._unread: dict[int, SequenceUpdate] = {}
        self._n_left = request.params.n
        self._failure: Exception | None = None
        self._news = asyncio.Event()

    def __aiter__(self) -> AnswerStream:
        return self

    async def __anext__(self) -> SequenceUpdate:
        """Return what is new of one answer.

        Raises:
            ReaderTooSlow: Too much lay unread; the request was aborted.
            EngineDead: The engine ended.
        """
        while not self._unread:
            if self._failure is not None:
                raise self._failure
            if not self._n_left:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        update = self._unread.pop(next(iter(self._unread)))
        self._n_left -= update.is_finished
        return update

    async def aclose(self) -> None:
        """Abort the request, if it is unfinished. Idempotent."""
        self.close()

    def close(self) -> None:
        """`aclose` for code that cannot wait."""
        if self._n_left:
            self._n_left = 0
            self._unread.clear()
            self._engine.abort(self.request.request_id)
            self._news.set()

    async def __aenter__(self) -> AnswerStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Where it is read."""
        return self._loop

    def deliver(self, update: SequenceUpdate) -> None:
        """Take an update in; in the stream's own loop."""
        if not self._n_left or self._failure is not None:
            return
        unread = self._unread.get(update.index)
        if unread is None:
            self._unread[update.index] = update
        else:
            unread.append(update)
        n_characters = sum(
            len(u.text) + _LOGPROB_CHARACTERS * sum(1 + len(entry.top) for entry in u.logprobs)
            for u in self._unread.values()
        )
        if n_characters > self._max_unread_characters:
            self._unread.clear()
            self.fail(ReaderTooSlow(f"{n_characters} characters of the answer were not read; the request was ended"))
            self._engine.abort(self.request.request_id)
        self._news.set()

    def fail(self, error: Exception) -> None:
        """End the stream by an error, behind what is unread; in the stream's own loop."""
        self._failure = self._failure or error
        self._news.set()


class AsyncEngine:
    """Runs an engine in a thread.

    Args:
        engine: Nobody else uses it from now on; `stop` closes it.
        max_unread_characters: How much text of a request may lie unread before its reader is cut off.
    """

    def __init__(self, engine: Engine, *, max_unread_characters: int = MAX_UNREAD_CHARACTERS) -> None:
        self.engine = engine
        self._max_unread_characters = max_unread_characters
        self._wake = threading.Condition()
        self._to_add: deque[Request] = deque()
        self._to_abort: deque[str] = deque()
        self._to_do: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        """What others want the thread to do between two steps."""
        self._streams: dict[str, AnswerStream] = {}
        self._is_draining = False
        self._stopping = False
        self._death: EngineDead | None = None
        self._seen_alive_s = time.monotonic()
        self._thread: threading.Thread | None = None
        self.n_rejected = 0
        """Requests refused because too many waited."""

    def start(self) -> None:
        """Start the thread.

        Raises:
            UsageError: It was started before.
        """
        if self._thread is not None:
            raise UsageError("an AsyncEngine starts once; make a new one")
        self._thread = threading.Thread(target=self._run, name="vmem_kv-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> AnswerStream:
        """Queue a request and return its answers. Call it in the event loop that will read them.

        Raises:
            InvalidRequest, RequestTooLong: See `Engine.check`.
            QueueFull: Too many requests wait.
            ShuttingDown: `drain` or `stop` was called.
            EngineDead: The engine ended.
            UsageError: A request of that id is unfinished.
            Nothing was queued after any of these.
        """
        self.engine.check(request)
        stream = AnswerStream(self, request, self._max_unread_characters)
        with self._wake:
            if request.request_id in self._streams:
                raise UsageError(f"request {request.request_id} is unfinished; every request needs an id of its own")
            self.require_place(request.params.n)
            self._streams[request.request_id] = stream
            self._to_add.append(request)
            self._wake.notify_all()
        return stream

    def require_place(self, n_answers: int, n_coming: int = 0) -> None:
        """Check that so many more answers would be taken on now: before anything is done for a request.

        Args:
            n_answers: Of the request.
            n_coming: Of requests before it that will be submitted soon.

        Raises:
            InvalidRequest: So many never have a place here.
            QueueFull, ShuttingDown, EngineDead: See `submit`.
        """
        config = self.engine.config
        if n_answers > config.max_queued + config.max_num_seqs:
            raise InvalidRequest(
                f"{n_answers} answers were asked for at once; at most {config.max_queued + config.max_num_seqs} can "
                "run and wait",
                "n",
            )
        with self._wake:
            if self._death is not None:
                raise self._death
            if self._is_draining or self._stopping:
                raise ShuttingDown("the engine is shutting down and takes on no new requests")
            if not self.engine.has_place(sum(r.params.n for r in self._to_add) + n_coming + n_answers):
                self.n_rejected += 1
                raise QueueFull("too many requests wait already; try again later")

    def abort(self, request_id: str) -> None:
        """End a request soon. Unknown ids are fine. May be called from any thread."""
        with self._wake:
            self._to_abort.append(request_id)
            self._wake.notify_all()

    def park_session(self, session_id: str, domain: str = "", timeout_s: float = 60.0) -> Level | None:
        """Let the engine's thread move a session one level down, between two steps; see `Engine.park_session`.

        Blocks; not for an event loop that requests wait for.

        Raises:
            EngineDead: The engine ended, or is not started.
            TimeoutError: It took longer than `timeout_s`; it may still happen.
        """
        return self._queue(lambda: self.engine.park_session(session_id, domain)).result(timeout_s)

    def forget_session(self, session_id: str, domain: str = "", timeout_s: float = 60.0) -> None:
        """Let the engine's thread end a session that waits, between two steps; see `Engine.forget_session`.

        Blocks; not for an event loop that requests wait for.

        Raises:
            EngineDead: The engine ended, or is not started.
            TimeoutError: It took longer than `timeout_s`; it may still happen.
        """
        self.ending_session(session_id, domain).result(timeout_s)

    def ending_session(self, session_id: str, domain: str = "") -> Future[None]:
        """As `forget_session`, for event loops (`asyncio.wrap_future`): return what is done when that is.

        Raises:
            EngineDead: The engine ended, or is not started.
        """
        return self._queue(lambda: self.engine.forget_session(session_id, domain))

    def save_session(self, session_id: str, path: str | Path, domain: str = "", timeout_s: float = 600.0) -> None:
        """Write a session to a file, while the engine goes on; see `Engine.save_session`.

        Blocks; not for an event loop that requests wait for.

        Raises:
            EngineDead: The engine ended, or is not started.
            TimeoutError: It took longer than `timeout_s`; it may still happen.
        """
        end_s = time.monotonic() + timeout_s
        saving = self.beginning_to_save(session_id, path, domain).result(timeout_s)
        if not saving.passes_within(max(0.0, end_s - time.monotonic())):
            raise TimeoutError(f"session {session_id!r} is not written after {timeout_s} seconds, and may still be")
        saving.result()

    def beginning_to_save(self, session_id: str, path: str | Path, domain: str = "") -> Future[Task[None]]:
        """As `save_session`, for event loops (`asyncio.wrap_future`): return what gives what says when it is written.

        Raises:
            EngineDead: The engine ended, or is not started.
        """
        return self._queue(lambda: self.engine.begin_save_session(session_id, path, domain))

    def load_session(
        self,
        session_id: str,
        path: str | Path,
        domain: str = "",
        *,
        ttl_s: float | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        """Let the engine's thread begin a session with a file, between two steps; see `Engine.load_session`.

        Blocks; not for an event loop that requests wait for. Other requests wait until the file is read.

        Raises:
            EngineDead: The engine ended, or is not started.
            TimeoutError: It took longer than `timeout_s`; it may still happen.
        """
        self.loading_session(session_id, path, domain, ttl_s=ttl_s).result(timeout_s)

    def loading_session(
        self, session_id: str, path: str | Path, domain: str = "", *, ttl_s: float | None = None
    ) -> Future[None]:
        """As `load_session`, for event loops (`asyncio.wrap_future`): return what is done when that is.

        Raises:
            EngineDead: The engine ended, or is not started.
        """
        return self._queue(lambda: self.engine.load_session(session_id, path, domain, ttl_s=ttl_s))

    def load_prompt(self, path: str | Path, domain: str | None = "", timeout_s: float = 600.0) -> int:
        """Let the engine's thread take in a saved prompt, between two steps; see `Engine.load_prompt`.

        Raises:
            EngineDead: The engine ended, or is not started.
            TimeoutError: It took longer than `timeout_s`; it may still happen.
        """
        return self._queue(lambda: self.engine.load_prompt(path, domain)).result(timeout_s)

    def snapshot(self) -> EngineStats:
        """Return what there is to know just now."""
        return self.engine.snapshot()

    def health(self) -> Health:
        """Say whether the engine can be relied on. Takes no lock that a step holds."""
        thread, mapper = self._thread, self.engine.memory.premapper
        return Health(
            is_alive=thread is not None and thread.is_alive() and self._death is None,
            silent_s=time.monotonic() - self._seen_alive_s,
            is_mapper_alive=None if mapper is None else mapper.is_alive,
            is_draining=self._is_draining,
            n_open=len(self._streams),
            death="" if self._death is None else str(self._death),
        )

    def drain(self) -> None:
        """Take on nothing new from now on; what there is goes on."""
        self._is_draining = True

    async def wait_drained(self, grace_s: float) -> bool:
        """Wait until nothing is unfinished; return whether that came true in time."""
        end_s = time.monotonic() + grace_s
        while self._streams and self._death is None and time.monotonic() < end_s:
            await asyncio.sleep(0.02)
        return not self._streams

    def stop(self, timeout_s: float = 10.0) -> bool:
        """Abort what is unfinished, end the thread and close the engine, a dead one too. Idempotent.

        Returns:
            False: the thread is inside a step that does not end; nothing was closed.
        """
        with self._wake:
            self._is_draining = self._stopping = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                return False
        try:
            self.engine.close()
        except VmemError as error:
            if self._death is None:
                raise
            _LOG.warning("closing a dead engine: %s", error)
        return True

    def _queue(self, job: Callable[[], T]) -> Future[T]:
        """Let the engine's thread do something, and return what will come of it."""
        done: Future[T] = Future()
        with self._wake:
            if self._death is not None or self._stopping or self._thread is None:
                raise self._death or EngineDead("the engine does not run")
            self._to_do.append((done, job))
            self._wake.notify_all()
        return done

    def _run(self) -> None:
        try:
            self.engine.memory.pool.driver.bind_thread()
            while self._take_in():
                if self.engine.has_work:
                    self._hand_out(self.engine.step())
                else:
                    self.engine.tend()
                self._seen_alive_s = time.monotonic()
            for request_id in list(self._streams):
                self._hand_out(self.engine.abort(request_id))
        except BaseException as error:  # whatever ends the thread must reach those who wait
            _LOG.exception("the engine ended")
            self._die(error)

    def _take_in(self) -> bool:
        """Wait for work, hand it to the engine, and return whether to go on."""
        with self._wake:
            if not (self._stopping or self._to_add or self._to_abort or self._to_do or self.engine.has_work):
                self._wake.wait(HEARTBEAT_S)
            # Under the lock, so that `require_place` counts every request once: here or there.
            while self._to_add:
                self._add(self._to_add.popleft())
            aborting = list(self._to_abort)
            self._to_abort.clear()
            n_jobs = len(self._to_do)
            stopping = self._stopping
        for request_id in aborting:
            self._hand_out(self.engine.abort(request_id))
            with self._wake:
                self._streams.pop(request_id, None)
        for _ in range(n_jobs):
            _do(*self._to_do.popleft())  # one by one: where a job ends the engine, those behind it learn that
        return not stopping

    def _add(self, request: Request) -> None:
        try:
            self.engine.add(request)
        except RequestError as error:
            self._hand_out(
                SequenceUpdate(request.request_id, i, finish_reason=FinishReason.ERROR, error=error)
                for i in range(request.params.n)
            )

    def _hand_out(self, updates: Iterable[SequenceUpdate]) -> None:
        """Give updates to the loops that read them, one call a loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[AnswerStream, SequenceUpdate]]] = defaultdict(list)
        ended: list[str] = []
        for update in updates:
            stream = self._streams.get(update.request_id)
            if stream is None:
                continue
            by_loop[stream.loop].append((stream, update))
            if update.is_finished and not self.engine.is_unfinished(update.request_id):
                ended.append(update.request_id)  # not yet: more of its answers may have ended in this step
        with self._wake:
            for request_id in ended:
                self._streams.pop(request_id, None)
        for loop, deliveries in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, deliveries)
            except RuntimeError:  # the loop is closed, and nobody reads any more
                self._to_abort.extend({update.request_id for _, update in deliveries})

    def _die(self, cause: BaseException) -> None:
        death = EngineDead(f"the engine ended: {type(cause).__name__}: {cause}")
        death.__cause__ = cause
        with self._wake:
            self._death = death
            streams, self._streams = list(self._streams.values()), {}
            undone, self._to_do = list(self._to_do), deque()
        for done, _ in undone:
            if done.set_running_or_notify_cancel():
                done.set_exception(death)
        for stream in streams:
            try:
                stream.loop.call_soon_threadsafe(stream.fail, death)
            except RuntimeError:  # the loop is closed, and nobody reads any more
                continue


def _do(done: Future[T], job: Callable[[], T]) -> None:
    """Do what somebody waits for, if he does; a failure that ends the engine ends his waiting, too."""
    if not done.set_running_or_notify_cancel():  # nobody waits any more
        return
    try:
        done.set_result(job())
    except BaseException as error:
        done.set_exception(error)
        is_lost = isinstance(error, DriverError) and error.is_fatal
        if is_lost or isinstance(error, InvariantError) or not isinstance(error, VmemError):
            raise


def _deliver(deliveries: list[tuple[AnswerStream, SequenceUpdate]]) -> None:
    for stream, update in deliveries:
        stream.deliver(update)
