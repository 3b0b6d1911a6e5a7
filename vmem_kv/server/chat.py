"""POST /v1/chat/completions: a conversation in, the next turn out."""

from __future__ import annotations

from collections.abc import Iterable
from time import time
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from vmem_kv.engine.request import Request, SequenceUpdate
from vmem_kv.server.answering import Asked, EventStream, encoded, whole
from vmem_kv.server.body import read_model
from vmem_kv.server.logprobs import for_chat, of_text
from vmem_kv.server.schemas import ChatAsk
from vmem_kv.server.service import Record, Service


async def chat(service: Service, http: HttpRequest) -> Response:
    """Answer a chat request.

    Raises:
        ApiError: It is refused, or it failed.
        ClientGone: Nobody waits for the answer.
    """
    record: Record = http.state.record
    ask = await read_model(http, ChatAsk, service.limits)
    service.check_model(ask.model)
    service.check_n(ask.n or 1)
    service.check_session_ttl(ask.session_ttl)
    params = ask.sampling_params()
    with service.place(params.n):
        tokens = await encoded(service.codec.encode_chat(ask.messages), http, service.limits)
        domain = ask.sharing_domain(record.domain)
        request = Request(tokens, params, domain=domain, session_id=ask.session_id, session_ttl_s=ask.session_ttl)
        asked = Asked(service, [request], record, "messages")
    shape = _Shape(asked, ask)
    if ask.stream:
        return EventStream(asked, shape)
    [answers] = await whole(asked, http.receive)
    choices = [shape.choice(update) for _, update in sorted(answers.items())]
    return JSONResponse({**shape.head("chat.completion"), "choices": choices, "usage": asked.usage})


class _Shape:
    """Writes answers as turns."""

    def __init__(self, asked: Asked, ask: ChatAsk) -> None:
        self._asked = asked
        self._ask = ask
        self._created_s = int(time())
        self._has_usage = bool(ask.stream_options and ask.stream_options.include_usage)

    def head(self, kind: str) -> dict[str, Any]:
        """Return what every object of an answer begins with."""
        request_id = self._asked.record.request_id
        return {"id": f"chatcmpl-{request_id}", "object": kind, "created": self._created_s, "model": self._ask.model}

    def choice(self, update: SequenceUpdate) -> dict[str, Any]:
        """Write a whole answer."""
        return {
            "index": update.index,
            "message": {"role": "assistant", "content": update.text, "refusal": None},
            **self._rest(update),
        }

    def begin(self) -> Iterable[dict[str, Any]]:
        for index in range(self._ask.n or 1):
            delta = {"role": "assistant", "content": ""}
            yield self._event([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def piece(self, prompt_index: int, update: SequenceUpdate) -> dict[str, Any] | None:
        if not (update.text or update.logprobs or update.is_finished):
            return None
        delta = {"content": update.text} if update.text else {}
        return self._event([{"index": update.index, "delta": delta, **self._rest(update)}])

    def end(self) -> Iterable[dict[str, Any]]:
        if self._has_usage:
            yield {**self._event([]), "usage": self._asked.usage}

    def _event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        event = {**self.head("chat.completion.chunk"), "choices": choices}
        return {**event, "usage": None} if self._has_usage else event

    def _rest(self, update: SequenceUpdate) -> dict[str, Any]:
        codec = self._asked.service.codec
        return {
            "logprobs": for_chat(codec, of_text(update)) if self._ask.logprobs else None,
            "finish_reason": update.finish_reason and update.finish_reason.value,
        }
