"""What the clients of a soak do: ask well, ask badly, leave in the middle, stop reading, send half a request.

    traffic = Traffic(url, model, seed)
    await traffic.pin()                      every good request once, alone: what it must answer from then on
    await traffic.run(until_s, n_clients)    all kinds, at random, from several clients at once

Guarantees: every answer is held against what is expected of its kind; whatever differs is a finding, with its request.
Assumes: the server is alone on its machine's address, and may refuse good requests with 429 where its queue is full.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MAX_FINDINGS = 50
TIMEOUT_S = 300.0
SLOW_READER_S = 20.0
HALF_REQUEST_S = 60.0
_TEXT = "the sky is blue because light of short waves scatters most in clear air and we look up to see it"

BAD_FIELDS: tuple[dict[str, Any], ...] = (
    {"model": "x\r\nINFO forged"}, {"n": 0}, {"n": 10**9}, {"n": True}, {"max_tokens": 0}, {"max_tokens": 2**63},
    {"max_tokens": 10**6}, {"temperature": -1}, {"temperature": "hot"}, {"top_p": 0}, {"seed": 2**64},
    {"stop": ["a"] * 5}, {"stop": ""}, {"stream": "yes"}, {"logit_bias": {"x": 1}}, {"logit_bias": {"99999999": 1}},
    {"foo": 1}, {"tools": [{}]}, {"guided_regex": "(a+)+$"}, {"prompt": []}, {"prompt": [-1]}, {"messages": []},
    {"prompt": "a" * 500_000}, {"stop_token_ids": [10**7]}, {"min_tokens": 99, "max_tokens": 3}, {"user": "u" * 9_000},
)  # fmt: skip
BAD_BODIES = (
    b"", b"{", b"[]", b"null", b'{"model": "\xff"}', b'{"a":' * 5_000 + b"1" + b"}" * 5_000, b'{"n": ' + b"9" * 6_000,
    b'{"temperature": NaN}', b'{"prompt": "\\ud800"}',
)  # fmt: skip
WEIGHTS = {
    "good": 30, "bad fields": 12, "bad body": 4, "operation": 8, "leaves": 16, "half a request": 1, "slow reader": 1,
    "burst": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ask:
    """A good request: where it goes, and its body."""

    path: str
    body: dict[str, Any]


@dataclass(slots=True)
class Tally:
    """What came of the traffic.

    Attributes:
        n_of_kind: Requests, by kind.
        n_of_status: Responses, by status; 0 where the connection ended without one, on our account.
        n_compared: Answers that were held against the pinned ones.
        findings: What differed from what was expected, the first `MAX_FINDINGS`.
        n_findings: All of it.
    """

    n_of_kind: Counter[str] = field(default_factory=Counter)
    n_of_status: Counter[int] = field(default_factory=Counter)
    n_compared: int = 0
    findings: list[str] = field(default_factory=list)
    n_findings: int = 0

    def as_data(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "n_of_kind": dict(sorted(self.n_of_kind.items())),
            "n_of_status": {str(status): n for status, n in sorted(self.n_of_status.items())},
            "n_compared": self.n_compared,
            "n_findings": self.n_findings,
            "findings": self.findings,
        }

    def find(self, text: str) -> None:
        """Note something unexpected."""
        self.n_findings += 1
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(text)


class Traffic:
    """Clients of one server.

    Args:
        url: Where it listens.
        model: What it calls its model.
        seed: Of everything random here.
        max_tokens: Of the longest good answer.
        pause_s: How long a client rests between two requests, on average.
    """

    def __init__(self, url: str, model: str, seed: int, *, max_tokens: int, pause_s: float) -> None:
        self._url = url
        parts = urlsplit(url)
        self._address = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._model = model
        self._rng = random.Random(seed)
        self._max_tokens = max_tokens
        self._pause_s = pause_s
        self._asks = [self._good(i) for i in range(24)]
        self._pinned: list[list[str]] = []
        self.tally = Tally()

    async def pin(self) -> None:
        """Ask every good request once, alone, and remember the answers.

        Raises:
            httpx.HTTPError: The server does not answer.
        """
        async with self._client() as client:
            for ask in self._asks:
                response = await client.post(ask.path, json={**ask.body, "stream": False})
                response.raise_for_status()
                self._pinned.append(_texts(response.json()))

    async def meet_sizes(self, max_len: int) -> None:
        """Send prompts of many lengths, one at a time: the libraries below keep something for each size they meet.

        Raises:
            httpx.HTTPError: The server does not answer.
        """
        async with self._client() as client:
            for n_tokens in (*range(1, 64), *range(64, 513, 8)):
                if n_tokens >= max_len:
                    break
                body = {"model": self._model, "prompt": [5] * n_tokens, "max_tokens": 1, "cache_salt": str(n_tokens)}
                response = await client.post("/v1/completions", json=body)
                if response.status_code == 400:
                    break  # longer than what the pool holds
                response.raise_for_status()

    async def run(self, seconds: float, n_clients: int) -> None:
        """Let clients do what they do, for a while."""
        end_s = time.monotonic() + seconds
        await asyncio.gather(*(self._be_a_client(end_s) for _ in range(n_clients)))

    @contextlib.asynccontextmanager
    async def _client(self) -> AsyncIterator[httpx.AsyncClient]:
        async with httpx.AsyncClient(base_url=self._url, timeout=TIMEOUT_S, trust_env=False) as client:
            yield client

    async def _be_a_client(self, end_s: float) -> None:
        rng = random.Random(self._rng.random())
        kinds, weights = list(WEIGHTS), list(WEIGHTS.values())
        do = {
            "good": self._ask_well, "bad fields": self._ask_badly, "bad body": self._send_garbage,
            "operation": self._look_around, "leaves": self._leave, "half a request": self._send_half,
            "slow reader": self._read_slowly, "burst": self._burst,
        }  # fmt: skip
        async with self._client() as client:
            while time.monotonic() < end_s:
                [kind] = rng.choices(kinds, weights)
                self.tally.n_of_kind[kind] += 1
                try:
                    await do[kind](client, rng)
                except (httpx.HTTPError, OSError) as error:
                    self.tally.find(f"{kind}: {error!r}")
                await asyncio.sleep(rng.expovariate(1.0) * self._pause_s)

    def _good(self, index: int) -> Ask:
        """The good request of a number: both endpoints, greedy and drawn, one answer or two."""
        rng = random.Random(index)
        words = " ".join(rng.choices(_TEXT.split(), k=rng.randrange(3, 40)))
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": rng.randrange(4, self._max_tokens),
            "temperature": index // 2 % 2 * 1.1,
            "seed": index,
            "n": 1 + (index % 5 == 0),
        }
        if index % 2:
            return Ask(CHAT, {**body, "messages": [{"role": "user", "content": words}]})
        return Ask(COMPLETIONS, {**body, "prompt": words})

    async def _ask_well(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        index = rng.randrange(len(self._asks))
        ask = self._asks[index]
        if rng.random() < 0.5:
            response = await client.post(ask.path, json=ask.body)
            self._note(response.status_code, ask, (200, 429), response.text)
            if response.status_code == 200:
                self._compare(index, _texts(response.json()))
            return
        async with client.stream("POST", ask.path, json={**ask.body, "stream": True}) as response:
            lines = [line async for line in response.aiter_lines()]
            self._note(response.status_code, ask, (200, 429), "".join(lines))
        if response.status_code == 200:
            self._compare(index, _streamed_texts(lines, ask.body["n"]))

    async def _ask_badly(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        fields = rng.choice(BAD_FIELDS)
        # A wrong prompt goes where prompts do.
        path = COMPLETIONS if "prompt" in fields else CHAT if "messages" in fields else rng.choice((COMPLETIONS, CHAT))
        good = {"prompt": "the sky"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "the sky"}]}
        body = {"model": self._model, "max_tokens": 4, "stream": rng.random() < 0.5, **good, **fields}
        response = await client.post(path, json=body)
        # A full queue is looked at before tokens and lengths are.
        self._note(response.status_code, Ask(path, fields), (400, 404, 429), response.text)
        if "error" not in response.json():
            self.tally.find(f"no error object for {fields!r:.80}")

    async def _send_garbage(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        body = rng.choice(BAD_BODIES)
        path = rng.choice((COMPLETIONS, CHAT, "/tokenize", "/detokenize"))
        response = await client.post(path, content=body, headers={"Content-Type": "application/json"})
        self._note(response.status_code, Ask(path, {"body": repr(body[:40])}), (400,), response.text)

    async def _look_around(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        path, status = rng.choice(
            (("/metrics", 200), ("/dashboard/data", 200), ("/dashboard", 200), ("/ready", 200), ("/health", 200),
             ("/v1/models", 200), ("/openapi.json", 200), ("/nowhere", 404))
        )  # fmt: skip
        response = await client.get(path)
        self._note(response.status_code, Ask(path, {}), (status,), response.text)

    async def _leave(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        ask = rng.choice(self._asks)
        body = {**ask.body, "max_tokens": 4 * self._max_tokens, "stream": rng.random() < 0.7}
        async with self._connection(ask.path, json.dumps(body).encode()) as (reader, writer):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rng.random() * 2):
                    await reader.read(rng.randrange(1, 4_000))
            if rng.random() < 0.5:  # a reset instead of an orderly end
                link = writer.get_extra_info("socket")
                link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.tally.n_of_status[0] += 1

    async def _send_half(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        """Send the beginning of a head, or of a body, and wait to be cut off."""
        async with self._connection(COMPLETIONS, b'{"mod', n_bytes=500, is_whole_head=rng.random() < 0.5) as (
            reader,
            _,
        ):
            try:
                async with asyncio.timeout(HALF_REQUEST_S):
                    await reader.read()
            except TimeoutError:
                self.tally.find("half a request was not cut off")
        self.tally.n_of_status[0] += 1

    async def _read_slowly(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        ask = next(a for a in self._asks if a.path == CHAT)
        fields = {"n": 8, "stream": True, "logprobs": True, "top_logprobs": 20, "max_tokens": 4 * self._max_tokens}
        body = json.dumps({**ask.body, **fields}).encode()
        async with self._connection(ask.path, body, receive_bytes=4_096) as (reader, _):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SLOW_READER_S * rng.random()):
                    while await reader.read(1):
                        await asyncio.sleep(0.5)
        self.tally.n_of_status[0] += 1

    async def _burst(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        """More at once than running and waiting may be."""
        await asyncio.gather(*(self._ask_well(client, random.Random(rng.random())) for _ in range(40)))

    @contextlib.asynccontextmanager
    async def _connection(
        self, path: str, body: bytes, *, n_bytes: int = 0, is_whole_head: bool = True, receive_bytes: int = 0
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A bare connection on which a request was sent, `n_bytes` long by its own account; always closed."""
        link = socket.socket()
        link.setblocking(False)
        if receive_bytes:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        try:
            await asyncio.get_running_loop().sock_connect(link, self._address)
            # A limit below the buffer's: nobody here reads ahead for a client that wants to be slow.
            reader, writer = await asyncio.open_connection(sock=link, limit=1_024)
        except BaseException:
            link.close()
            raise
        try:
            head = (
                f"POST {path} HTTP/1.1\r\nHost: {self._address[0]}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {n_bytes or len(body)}\r\n"
            )
            writer.write(head.encode() + (b"\r\n" + body if is_whole_head else b""))
            await writer.drain()
            with contextlib.suppress(ConnectionError):
                yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _note(self, status: int, ask: Ask, expected: tuple[int, ...], text: str) -> None:
        self.tally.n_of_status[status] += 1
        if status not in expected:
            self.tally.find(f"status {status} for {ask.path} {str(ask.body)[:120]}: {text[:200]}")

    def _compare(self, index: int, texts: list[str]) -> None:
        self.tally.n_compared += 1
        if texts != self._pinned[index]:
            self.tally.find(f"good request {index} answered {texts!r:.200} instead of {self._pinned[index]!r:.200}")


def _texts(data: dict[str, Any]) -> list[str]:
    """The texts of a whole answer's choices."""
    return [c["text"] if "text" in c else c["message"]["content"] for c in data["choices"]]


def _streamed_texts(lines: list[str], n: int) -> list[str]:
    """The texts of a stream's choices. What an error event says stands among them, and so differs from any answer."""
    texts = [""] * n
    for line in lines:
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            texts.append(str(event["error"]))
            continue
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
    return texts
