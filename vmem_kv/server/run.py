"""A server's life: bind, serve, drain, end.

    SIGTERM or SIGINT     nothing new is taken on; unfinished answers have `grace_s`; then they are ended
    a second one          everything is ended at once, and the process with it
    the engine dies       everyone is answered, and the exit code is 1

Assumes: the main thread, because signals are handled.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NoReturn

import uvicorn

from vmem_kv.errors import ConfigError, ShuttingDown
from vmem_kv.server.app import build_app
from vmem_kv.server.auth import is_loopback
from vmem_kv.server.dashboard import History, keep_history
from vmem_kv.server.log import note
from vmem_kv.server.protocol import protocol_with
from vmem_kv.server.service import Service

_LOOK_S = 0.1
_SPARE_DESCRIPTORS = 32
_SEND_BUFFER_BYTES = 64 << 10
_LAST_WORDS_S = 2.0
"""For the answers to requests that were ended, on their way out."""
_STOP_S = 2.0
"""For the engine's step, before it is left behind."""


def check_exposure(host: str, has_keys: bool) -> None:
    """Refuse to serve everybody.

    Raises:
        ConfigError: The server would be reached from outside without a key.
    """
    if not is_loopback(host) and not has_keys:
        raise ConfigError(
            f"--host {host} can be reached from other machines, and there is no API key; "
            "set VMEM_KV_API_KEY or --api-key-file, or listen on 127.0.0.1"
        )


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens there. Port 0 takes any that is free.

    Raises:
        ConfigError: That is not possible here.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}: {error.strerror}; choose another --host") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit it. Left alone, Linux keeps megabytes for a client that does not read.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        listener.bind(address)
        listener.listen(2_048)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from error
    listener.setblocking(False)
    return listener


def affordable_connections(at_most: int) -> int:
    """Return how many connections the process's descriptors allow, beside those that it has open and some to spare."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return at_most
    n_open = len(os.listdir("/proc/self/fd"))
    return max(1, min(at_most, soft - n_open - _SPARE_DESCRIPTORS))


def leave_at_once(code: int) -> NoReturn:
    """End the process, after a second signal.

    Everyone has an answer by then, and nothing of ours would outlive the process: the kernel takes memory, sockets and
    files without names back. What is left out is the interpreter's own teardown, which takes seconds with torch.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whoever read it has gone
            stream.flush()
    os._exit(code)


class Server:
    """Serves a model on a socket until it is told to end.

    Args:
        service: What to serve. Its engine is started; `run` stops it.
        listener: A bound socket; `run` closes it.
    """

    def __init__(self, service: Service, listener: socket.socket) -> None:
        self._service = service
        self._listener = listener
        self._history = History(service.metrics)
        limits = replace(service.limits, max_connections=affordable_connections(service.limits.max_connections))
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                build_app(service, self._history),
                http=protocol_with(limits, service.metrics),
                ws="none",
                lifespan="off",
                log_config=None,
                log_level=logging.WARNING,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=limits.max_header_bytes,
                timeout_keep_alive=int(limits.head_timeout_s) or 1,
                timeout_graceful_shutdown=1,
            )
        )
        self._n_signals = 0

    def end(self) -> None:
        """Drain and end; called again: end at once. In the server's event loop."""
        self._n_signals += 1
        note("asked to end", at_once=self._n_signals > 1)

    @property
    def is_hurried(self) -> bool:
        """Whether it was told to end at once."""
        return self._n_signals > 1

    async def run(self, on_started: Callable[[], None] = lambda: None) -> int:
        """Serve; return the exit code: 0, or 1 where the engine died.

        Args:
            on_started: Called once connections are accepted.
        """
        loop = asyncio.get_running_loop()
        handled = (signal.SIGINT, signal.SIGTERM)
        for number in handled:
            loop.add_signal_handler(number, self.end)
        try:
            return await self.serve(on_started)
        finally:
            for number in handled:
                loop.remove_signal_handler(number)

    async def serve(self, on_started: Callable[[], None] = lambda: None) -> int:
        """Serve as `run` does, and leave signals alone: for threads that are not the main one."""
        engine = self._service.engine
        keeping = asyncio.create_task(keep_history(self._service, self._history))
        serving = asyncio.create_task(self._uvicorn.serve([self._listener]))
        try:
            while not (self._uvicorn.started or serving.done()):
                await asyncio.sleep(0.01)
            on_started()
            while not (self._n_signals or serving.done()) and engine.health().is_alive:
                await asyncio.sleep(_LOOK_S)
            is_dead = not engine.health().is_alive
            if is_dead:
                note("the engine has ended; the server ends", logging.ERROR)
            else:
                await self._drain()
            is_stopped = await asyncio.to_thread(engine.stop, _STOP_S if self._n_signals < 2 else 0.5)
            if not is_stopped:
                note("the engine's step does not end; it is left behind", logging.WARNING)
                for stream in list(self._service.streams):
                    stream.fail(ShuttingDown("The server is shutting down and ended this answer."))
            await self._last_words()
            self._uvicorn.should_exit = True
            self._uvicorn.force_exit = self._n_signals > 1
            await serving
            return 1 if is_dead else 0
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
            self._service.codec.close()

    async def _drain(self) -> None:
        """Let unfinished answers end by themselves, as long as there is grace and patience."""
        engine = self._service.engine
        engine.drain()
        draining = asyncio.create_task(engine.wait_drained(self._service.limits.grace_s))
        while not draining.done() and self._n_signals < 2:
            await asyncio.sleep(0.02)
        draining.cancel()
        note("drained", n_left=engine.health().n_open)

    async def _last_words(self) -> None:
        """Wait until every request that is open has its answer, or its client is too slow."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S if self._n_signals < 2 else 0.3):
                while self._service.metrics.n_open > 0:
                    await asyncio.sleep(0.02)


class _Uvicorn(uvicorn.Server):
    """uvicorn without its own idea of signals: `Server` above decides when to end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
