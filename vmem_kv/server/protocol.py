"""uvicorn's HTTP/1.1 protocol, with deadlines for clients that send or read too slowly.

Guarantees: a connection that has not sent a whole request head in time is closed, and so is one whose reader leaves
something in the send buffer for too long. What is no HTTP, and what comes on a connection too many, gets an error in
the form of all others.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from vmem_kv.server.errors import SERVER, ApiError, invalid
from vmem_kv.server.limits import Limits
from vmem_kv.server.log import note
from vmem_kv.server.metrics import Metrics
from vmem_kv.server.service import Record


def protocol_with(limits: Limits, metrics: Metrics) -> type[asyncio.Protocol]:
    """Return the protocol with these deadlines, as uvicorn takes it: a class.

    Args:
        limits: The deadlines.
        metrics: Where responses are counted of which no application knows.
    """

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        """The application of a connection too many."""
        headers = {"Retry-After": "1", "Connection": "close"}
        error = ApiError(503, "Too many connections are open; try again later.", kind=SERVER, headers=headers)
        error.headers["X-Request-Id"] = seen(error)
        await error.response()(scope, receive, send)

    def seen(error: ApiError) -> str:
        """Count a refusal and write its line; return its id."""
        record = Record()
        metrics.responses.labels("other", str(error.status)).inc()
        note("request", request_id=record.request_id, method="other", route="other", status=error.status)
        return record.request_id

    class Protocol(H11Protocol):
        """One connection."""

        _head_timer: asyncio.TimerHandle | None = None
        _send_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            # Whatever is left unread starts the timer. Below asyncio's own mark of 64 KiB nobody would be told of it,
            # and a connection that is to be closed would wait for its reader for ever.
            transport.set_write_buffer_limits(high=0)
            if len(self.connections) > limits.max_connections:
                self.app = refuse
            self._head_timer = self.loop.call_later(limits.head_timeout_s, self._cut, "head_timeout")

        def connection_lost(self, exc: Exception | None) -> None:
            _cancel(self._head_timer)
            _cancel(self._send_timer)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            super().data_received(data)
            if self.cycle is not before:  # a head is complete
                _cancel(self._head_timer)
                self._head_timer = None
            elif self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
                self._head_timer = self.loop.call_later(limits.head_timeout_s, self._cut, "head_timeout")

        def pause_writing(self) -> None:
            super().pause_writing()
            self._send_timer = self.loop.call_later(limits.send_timeout_s, self._cut, "slow_reader")

        def resume_writing(self) -> None:
            _cancel(self._send_timer)
            super().resume_writing()

        def send_400_response(self, msg: str) -> None:
            error = invalid("Invalid HTTP request.", None, None)
            error.headers |= {"X-Request-Id": seen(error), "Connection": "close"}
            response = error.response()
            events: tuple[Any, ...] = (
                h11.Response(status_code=400, headers=response.raw_headers, reason=b"Bad Request"),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            )
            for event in events:
                self.transport.write(self.conn.send(event))
            self.transport.close()

        def _unsupported_upgrade_warning(self) -> None:
            """Say nothing. uvicorn advises to install a WebSocket library, of which we have no use."""

        def _cut(self, cause: str) -> None:
            note("connection cut", cause=cause)
            self.transport.abort()

    return Protocol


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
