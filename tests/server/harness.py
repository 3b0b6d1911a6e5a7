"""A real server in a thread, on an ephemeral port of loopback, with an engine on a tiny model."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.engine.harness import backend, n_pages_in_use, slots_in_use
from vmem_kv.devices import OpenDriver
from vmem_kv.engine.async_engine import AsyncEngine
from vmem_kv.engine.engine import Engine
from vmem_kv.engine.llm import make_config
from vmem_kv.models import load
from vmem_kv.server.auth import Hosts, Keys
from vmem_kv.server.limits import Limits
from vmem_kv.server.metrics import Metrics
from vmem_kv.server.run import Server, bind
from vmem_kv.server.service import Service
from vmem_kv.server.session_folder import SessionFolder
from vmem_kv.server.text import TextCodec

MODEL = "tiny"
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
WAIT_S = 120.0
"""For what must come true, on however busy a machine."""
Data = dict[str, Any]
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass
class Running:
    """A server that answers."""

    service: Service
    server: Server
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread
    url: str
    port: int
    client: httpx.Client
    exit_codes: list[int]

    @property
    def engine(self) -> Engine:
        return self.service.engine.engine

    def let_it_accept(self) -> None:
        """Return when the server has seen every connection that was made before, and what was sent on it.

        A connection that is made now comes behind them, and a second one behind the turn of the loop of the first.
        """
        for _ in range(2):
            assert httpx.get(f"{self.url}/health", timeout=WAIT_S, trust_env=False).status_code == 200

    def post(self, endpoint: str, **fields: Any) -> httpx.Response:
        return self.client.post(PATHS[endpoint], json=good(endpoint, **fields))

    def end(self) -> None:
        """What a signal does."""
        self.loop.call_soon_threadsafe(self.server.end)

    def is_idle(self) -> bool:
        """Nothing that was submitted is unfinished.

        By the streams first: a sequence between waiting and running is neither to whoever looks from outside.
        """
        return not self.service.engine.health().n_open and not self.engine.has_work and not slots_in_use(self.engine)

    def check_idle(self) -> None:
        """Every response is complete, no page belongs to a sequence, and the books add up."""
        until(lambda: not self.service.metrics.n_open and self.is_idle())
        assert n_pages_in_use(self.engine) == 0
        self.engine.memory.cache.check()


def good(endpoint: str, **fields: Any) -> Data:
    """A greedy request that any of these servers answers; fields set to `...` are left out."""
    ask: Data = {"model": MODEL, "temperature": 0, "max_tokens": 8}
    if endpoint == "completions":
        ask["prompt"] = "the sky is blue"
    else:
        ask["messages"] = [{"role": "user", "content": "the sky is blue"}]
    return {k: v for k, v in (ask | fields).items() if v is not ...}


def text_of(endpoint: str, data: Data, index: int = 0) -> str:
    choice = data["choices"][index]
    text: str = choice["text"] if endpoint == "completions" else choice["message"]["content"]
    return text


def events(body: str) -> list[Data | str]:
    """The data of a stream's events, comments left out."""
    found: list[Data | str] = []
    for line in body.splitlines():
        if line.startswith("data: "):
            found.append("[DONE]" if line == "data: [DONE]" else json.loads(line[6:]))
        else:
            assert not line or line.startswith(":"), line
    return found


def until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end_s, "it never came true"
        time.sleep(0.005)


@contextmanager
def serving(
    folder: Path,
    *,
    limits: Limits | None = None,
    keys: tuple[str, ...] = (),
    driver: OpenDriver | None = None,
    saves_in: SessionFolder | None = None,
    **options: Any,
) -> Iterator[Running]:
    """Serve the model in a folder. Afterwards the server has ended by itself, and no memory is left."""
    model, tokenizer = load(str(folder))
    tokenizer.chat_template = TEMPLATE
    inner = Engine(model, tokenizer, make_config(**{"max_num_seqs": 4, **options}), driver or backend())
    engine = AsyncEngine(inner)
    service = Service(
        engine,
        TextCodec(tokenizer, inner.max_tokens_alone),
        MODEL,
        limits or Limits(grace_s=5.0),
        Keys(keys),
        Hosts("127.0.0.1"),
        Metrics(engine),
        saves_in,
    )
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    server = Server(service, listener)
    started = threading.Event()
    exit_codes: list[int] = []
    loops: list[asyncio.AbstractEventLoop] = []

    async def run() -> None:
        loops.append(asyncio.get_running_loop())
        exit_codes.append(await server.serve(started.set))

    engine.start()
    thread = threading.Thread(target=lambda: asyncio.run(run()), name="server")
    thread.start()
    assert started.wait(WAIT_S)
    url = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=url, timeout=WAIT_S, trust_env=False) as client:
        running = Running(service, server, loops[0], thread, url, port, client, exit_codes)
        try:
            yield running
        finally:
            if thread.is_alive():
                running.end()
            thread.join(WAIT_S)
    assert not thread.is_alive()
    assert engine.stop(WAIT_S)
    assert inner.memory.pool.n_owned == 0
