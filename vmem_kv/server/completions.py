"""POST /v1/completions: prompts in, continuations out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from time import time
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from vmem_kv.engine.request import Request, SequenceUpdate
from vmem_kv.server.answering import Asked, EventStream, encoded, whole
from vmem_kv.server.body import read_model
from vmem_kv.server.logprobs import TextOffsets, for_completion, of_text
from vmem_kv.server.schemas import CompletionAsk
from vmem_kv.server.service import Record, Service
from vmem_kv.server.text import TextCodec


async def complete(service: Service, http: HttpRequest) -> Response:
    """Answer a completion request.

    Raises:
        ApiError: It is refused, or it failed.
        ClientGone: Nobody waits for the answer.
    """
    record: Record = http.state.record
    ask = await read_model(http, CompletionAsk, service.limits)
    service.check_model(ask.model)
    service.check_n(ask.n or 1)
    service.check_session_ttl(ask.session_ttl)
    params = ask.sampling_params()
    domain = ask.sharing_domain(record.domain)
    with service.place(params.n * len(ask.prompts())):
        prompts, echoes = await encoded(_prompts(service.codec, ask), http, service.limits)
        requests = [
            Request(tokens, params, domain=domain, session_id=ask.session_id, session_ttl_s=ask.session_ttl)
            for tokens in prompts
        ]
        asked = Asked(service, requests, record, "prompt")
    shape = _Shape(asked, ask, requests, echoes)
    if ask.stream:
        return EventStream(asked, shape)
    answers = await whole(asked, http.receive)
    choices = [choice for i, by_index in enumerate(answers) for choice in shape.choices(i, by_index)]
    return JSONResponse({**shape.head, "choices": choices, "usage": asked.usage})


async def _prompts(codec: TextCodec, ask: CompletionAsk) -> tuple[list[tuple[int, ...]], list[str]]:
    """Return each prompt's tokens, and the texts to begin the answers with, where they are asked for."""
    prompts = ask.prompts()
    tokens = [await codec.encode(p) if isinstance(p, str) else tuple(p) for p in prompts]
    if not ask.echo:
        return tokens, []
    return tokens, [p if isinstance(p, str) else await codec.decode(p, "prompt") for p in prompts]


class _Shape:
    """Writes answers as text completions. Choice `n * i + j` is the answer j to the prompt i."""

    def __init__(self, asked: Asked, ask: CompletionAsk, requests: Sequence[Request], echoes: list[str]) -> None:
        self.head = {
            "id": f"cmpl-{asked.record.request_id}",
            "object": "text_completion",
            "created": int(time()),
            "model": ask.model,
        }
        self._asked = asked
        self._ask = ask
        self._requests = requests
        self._echoes = echoes
        self._has_usage = bool(ask.stream_options and ask.stream_options.include_usage)
        self._begun: set[int] = set()
        self._offsets: dict[int, TextOffsets] = {}

    def choices(self, prompt_index: int, answers: dict[int, SequenceUpdate]) -> Iterable[dict[str, Any]]:
        """Write the answers to a prompt."""
        return [self._choice(prompt_index, update) for _, update in sorted(answers.items())]

    def begin(self) -> Iterable[dict[str, Any]]:
        return ()

    def piece(self, prompt_index: int, update: SequenceUpdate) -> dict[str, Any] | None:
        if not (update.text or update.logprobs or update.is_finished):
            return None
        event = {**self.head, "choices": [self._choice(prompt_index, update)]}
        return {**event, "usage": None} if self._has_usage else event

    def end(self) -> Iterable[dict[str, Any]]:
        return [{**self.head, "choices": [], "usage": self._asked.usage}] if self._has_usage else ()

    def _choice(self, prompt_index: int, update: SequenceUpdate) -> dict[str, Any]:
        index = prompt_index * (self._ask.n or 1) + update.index
        text = update.text
        if self._echoes and index not in self._begun:
            text = self._echoes[prompt_index] + text
        self._begun.add(index)
        logprobs = None
        if self._ask.logprobs is not None:
            codec = self._asked.service.codec
            if index not in self._offsets:
                prompt = self._requests[prompt_index].prompt_token_ids
                self._offsets[index] = TextOffsets(codec, prompt, self._ask.skip_special_tokens)
            logprobs = for_completion(codec, of_text(update), self._offsets[index])
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": update.finish_reason and update.finish_reason.value,
        }
