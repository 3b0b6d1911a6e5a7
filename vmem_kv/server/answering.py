"""From engine requests to responses: whole answers, or event streams.

    await encoded(codec.encode(text), ...)     its tokens
    asked = Asked(service, requests, ...)      all of its prompts are queued, or none
    await whole(asked, request.receive)        every answer, complete
    EventStream(asked, shape)                  every piece, as it comes

Guarantees: a request whose client goes, whose time is up or that fails is aborted, so that its memory is free within
two steps. Nothing is buffered here: what a client does not read stays with the engine's stream, which has a bound.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from contextlib import aclosing
from time import monotonic
from typing import Any, Protocol, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vmem_kv.engine.async_engine import AnswerStream
from vmem_kv.engine.request import FinishReason, Request, SequenceUpdate
from vmem_kv.errors import ReaderTooSlow, RequestFailed, ShuttingDown, VmemError
from vmem_kv.server.body import ClientGone
from vmem_kv.server.errors import SERVER, ApiError, failure, from_engine
from vmem_kv.server.limits import Limits
from vmem_kv.server.service import Record, Service

T = TypeVar("T")


class Shape(Protocol):
    """How one endpoint writes its stream's events."""

    def begin(self) -> Iterable[dict[str, Any]]:
        """What comes before any token."""

    def piece(self, prompt_index: int, update: SequenceUpdate) -> dict[str, Any] | None:
        """One update; None where there is nothing to say yet."""

    def end(self) -> Iterable[dict[str, Any]]:
        """What comes after the last token."""


class Asked:
    """Requests that the engine has, belonging to one HTTP request.

    Args:
        service: Whose engine.
        requests: One for each prompt.
        record: Of the HTTP request.
        param: What the endpoint calls its prompt.

    Raises:
        ApiError: The engine refuses one of them. Then it has none.
    """

    def __init__(self, service: Service, requests: Sequence[Request], record: Record, param: str) -> None:
        self.service = service
        self.record = record
        self._param = param
        self._streams: list[AnswerStream] = []
        self._first_s: float | None = None
        self._begun: set[int] = set()  # prompts whose first answer has begun
        self._n_answers = sum(r.params.n for r in requests)
        try:
            for request in requests:
                self._streams.append(service.engine.submit(request))
            service.streams.update(self._streams)
        except VmemError as error:
            self.close()
            raise from_engine(error, param) from error
        record.n_prompt_tokens = sum(len(r.prompt_token_ids) for r in requests)

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens so far, as OpenAI counts them."""
        n_prompt, n_generated = self.record.n_prompt_tokens, self.record.n_generated_tokens
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_generated,
            "total_tokens": n_prompt + n_generated,
            "prompt_tokens_details": {"cached_tokens": self.record.n_cached_tokens},
        }

    def close(self) -> None:
        """Abort what is unfinished. Idempotent."""
        for stream in self._streams:
            stream.close()
        self.service.streams.difference_update(self._streams)

    async def updates(self) -> AsyncGenerator[tuple[int, SequenceUpdate] | None, None]:
        """Yield updates with the index of their prompt, and None whenever nothing happened for a while.

        Raises:
            ApiError: An answer failed, the engine ended, or the time is up.
        """
        limits = self.service.limits
        end_s = self.record.arrived_s + limits.request_timeout_s
        waiting = {asyncio.create_task(_next(stream)): i for i, stream in enumerate(self._streams)}
        try:
            while waiting:
                left_s = end_s - monotonic()
                if left_s <= 0:
                    raise _too_long(self.record)
                done, _ = await asyncio.wait(
                    waiting, timeout=min(left_s, limits.ping_s), return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    yield None
                for task in done:
                    i = waiting.pop(task)
                    update = self._result(task)
                    if update is not None:
                        if update.index == 0 and i not in self._begun:
                            self._begun.add(i)
                            self.record.n_cached_tokens += update.n_cached_tokens
                        waiting[asyncio.create_task(_next(self._streams[i]))] = i
                        yield i, update
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            self.close()
            self._observe()

    def _result(self, task: asyncio.Task[SequenceUpdate | None]) -> SequenceUpdate | None:
        try:
            update = task.result()
        except VmemError as error:
            self.record.ended_early = "slow_reader" if isinstance(error, ReaderTooSlow) else "engine_death"
            raise from_engine(error, self._param) from error
        if update is None:
            return None
        if update.finish_reason is FinishReason.ERROR:
            self.record.ended_early = "failure"
            raise from_engine(update.error or RequestFailed("no reason is known"), self._param)
        if update.finish_reason is FinishReason.ABORT:
            self.record.ended_early = "shutdown"
            raise from_engine(ShuttingDown("The server is shutting down and ended this answer."), self._param)
        if self._first_s is None:
            self._first_s = monotonic()
            self.service.metrics.saw_first_token(self._first_s - self.record.arrived_s)
        self.record.n_generated_tokens += len(update.token_ids)
        return update

    def _observe(self) -> None:
        n_later = self.record.n_generated_tokens - self._n_answers
        if self._first_s is not None and n_later > 0:
            per_answer = n_later / self._n_answers
            self.service.metrics.between_tokens_s.observe((monotonic() - self._first_s) / per_answer)


async def _next(stream: AnswerStream) -> SequenceUpdate | None:
    return await anext(stream, None)


async def whole(asked: Asked, receive: Receive) -> list[dict[int, SequenceUpdate]]:
    """Return, for each prompt, its complete answers by index.

    Raises:
        ApiError: See `Asked.updates`.
        ClientGone: The client left. Nothing is computed any more.
    """
    try:
        return await unless_gone(_collect(asked), receive, asked.record)
    finally:
        asked.close()


async def _collect(asked: Asked) -> list[dict[int, SequenceUpdate]]:
    answers: list[dict[int, SequenceUpdate]] = [{} for _ in asked._streams]
    async with aclosing(asked.updates()) as updates:
        async for item in updates:
            if item is None:
                continue
            i, update = item
            if update.index in answers[i]:
                answers[i][update.index].append(update)
            else:
                answers[i][update.index] = update
    return answers


async def encoded(work: Coroutine[Any, Any, T], http: HttpRequest, limits: Limits) -> T:
    """Do the work that comes before a request's submission: its text is encoded behind that of others.

    Raises:
        ApiError: What the work raises, or the time is up.
        ClientGone: The client left. What had not begun is not done.
    """
    record: Record = http.state.record
    try:
        async with asyncio.timeout(record.arrived_s + limits.request_timeout_s - monotonic()):
            return await unless_gone(work, http.receive, record)
    except TimeoutError:
        raise _too_long(record) from None


def _too_long(record: Record) -> ApiError:
    record.ended_early = "timeout"
    return ApiError(504, "The answer took too long and was ended.", kind=SERVER, code="timeout")


async def unless_gone(work: Coroutine[Any, Any, T], receive: Receive, record: Record) -> T:
    """Do work for a client as long as it is there.

    Raises:
        ClientGone: It left, and the work was cancelled.
    """
    gone = asyncio.create_task(_until_gone(receive))
    working = asyncio.create_task(work)
    try:
        await asyncio.wait((gone, working), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            record.ended_early = "disconnect"
            raise ClientGone
        return working.result()
    finally:
        gone.cancel()
        working.cancel()
        await asyncio.gather(gone, working, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events, ended by [DONE], or by an error's body where the answer ends early."""

    media_type = "text/event-stream"

    def __init__(self, asked: Asked, shape: Shape) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._asked = asked
        self._shape = shape
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything."""
        try:
            await unless_gone(self._send_all(send), receive, self._asked.record)
        except ClientGone:
            return
        finally:
            self._asked.close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            for event in self._shape.begin():
                await _send_event(send, event)
            async with aclosing(self._asked.updates()) as updates:
                async for item in updates:
                    if item is None:
                        await _send_bytes(send, b": ping\n\n")
                    elif (event_or_none := self._shape.piece(*item)) is not None:
                        await _send_event(send, event_or_none)
            for event in self._shape.end():
                await _send_event(send, event)
            await _send_bytes(send, b"data: [DONE]\n\n")
        except ApiError as error:
            await _send_event(send, error.body())
        except Exception:  # our bug: the client learns that, and whoever is outside writes it down
            await _send_event(send, failure().body())
            await _end(send)
            raise
        await _end(send)


async def _end(send: Send) -> None:
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_event(send: Send, event: dict[str, Any]) -> None:
    await _send_bytes(send, b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n")


async def _send_bytes(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})
