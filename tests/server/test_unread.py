"""Whoever leaves anything unread is cut off: also what is less than asyncio holds back by itself before it says so."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from vmem_kv.engine.async_engine import MAX_UNREAD_CHARACTERS, AnswerStream, AsyncEngine
from vmem_kv.engine.request import Request, SequenceUpdate, TokenLogprob, TokenLogprobs
from vmem_kv.errors import ReaderTooSlow
from vmem_kv.server.limits import Limits
from vmem_kv.server.metrics import Metrics
from vmem_kv.server.protocol import protocol_with

from .harness import WAIT_S

PIECE = b"x" * 4_096


async def left_unread(limits: Limits, n_bytes: int) -> bool:
    """Let a whole response leave so much unread, wait until its connection is gone, and return whether it was cut."""
    state = ServerState()
    is_cut = False

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        transport = protocol.transport
        while not transport.get_write_buffer_size():  # until the kernel takes no more
            await send({"type": "http.response.body", "body": PIECE, "more_body": True})
        left = n_bytes - transport.get_write_buffer_size()
        # Straight to the transport: `send` would wait for the reader.
        transport.write(b"x" * left)
        assert transport.get_write_buffer_size() == n_bytes
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    config = uvicorn.Config(app, log_config=None, lifespan="off", ws="none", timeout_keep_alive=0)
    protocol: Any = protocol_with(limits, Metrics(AsyncEngine.__new__(AsyncEngine)))(
        config=config, server_state=state, app_state={}
    )  # type: ignore[call-arg]
    cut = protocol._cut

    def noted(cause: str) -> None:
        nonlocal is_cut
        is_cut = cause == "slow_reader"
        cut(cause)

    protocol._cut = noted
    ours, theirs = socket.socketpair()
    with theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096)
        await asyncio.get_running_loop().connect_accepted_socket(lambda: protocol, ours)
        theirs.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
        async with asyncio.timeout(WAIT_S / 2):
            while not protocol.cycle or protocol in state.connections:
                await asyncio.sleep(0.01)
    return is_cut


@pytest.mark.parametrize("n_bytes", [8_192, 20_000, 64 * 1024])
def test_what_is_left_unread_ends_the_connection(n_bytes: int) -> None:
    assert asyncio.run(left_unread(Limits(send_timeout_s=0.05), n_bytes))


async def n_delivered(update: SequenceUpdate) -> int:
    """Deliver what nobody reads; return after how many times its reader is given up."""
    aborted: list[str] = []
    engine: Any = SimpleNamespace(abort=aborted.append)
    stream = AnswerStream(engine, Request((1,)), MAX_UNREAD_CHARACTERS)
    for n in range(1, 10_000):
        stream.deliver(replace(update, logprobs=list(update.logprobs)))
        if aborted:
            with pytest.raises(ReaderTooSlow):
                await anext(stream)
            return n
    raise AssertionError("its reader is never given up")


def test_what_is_unread_is_more_than_text() -> None:
    top = tuple(TokenLogprob(token_id, -1.0) for token_id in range(20))
    bare = SequenceUpdate("", 0, logprobs=[TokenLogprobs(top[0], ())])
    full = SequenceUpdate("", 0, logprobs=[TokenLogprobs(top[0], top)])
    assert asyncio.run(n_delivered(SequenceUpdate("", 0, text="x" * 1_000))) == 66
    assert asyncio.run(n_delivered(full)) < 1_000 < asyncio.run(n_delivered(replace(bare, text="word ")))
