"""`LLM(model).generate(prompts)`: the engine for a script, one call at a time.

llm = LLM()                                          the default model
for output in llm.generate(["The sky is"], SamplingParams(temperature=0, max_tokens=20)):
    print(output.text)
llm.close()
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vmem_kv.config import CacheConfig
from vmem_kv.engine.beams import Beam, BeamParams, BeamSearch
from vmem_kv.engine.config import EngineConfig
from vmem_kv.engine.conversation import ChatWriter
from vmem_kv.engine.engine import Engine
from vmem_kv.engine.progress import open_progress
from vmem_kv.engine.request import FinishReason, Request, SequenceUpdate, TokenLogprobs, new_request_id
from vmem_kv.engine.sampling_params import SamplingParams
from vmem_kv.engine.stats import EngineStats
from vmem_kv.errors import ConfigError, InvalidRequest, RequestError, UnknownSession
from vmem_kv.models import load
from vmem_kv.tiers.sessions import Level
from vmem_kv.units import count, parse_bytes

Prompt = str | Sequence[int]
Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class AnswerOutput:
    """One finished answer.

    Attributes:
        text: What the model wrote, without the stop text.
        token_ids: Its tokens, stop tokens included.
        finish_reason: Why it ended.
        stop_reason: The stop text or stop token that ended it.
        logprobs: One entry a token, where asked for.
        error: What went wrong, where `finish_reason` is ERROR.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    error: RequestError | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The answers to one prompt."""

    prompt_token_ids: tuple[int, ...]
    answers: tuple[AnswerOutput, ...] = field(default=())
    n_cached_tokens: int = 0
    """Tokens of the prompt that were not computed for the first answer, because earlier ones had them."""

    @property
    def text(self) -> str:
        """The first answer's text."""
        return self.answers[0].text


class LLM:
    """A model with its engine.

    Args:
        model: A folder, a GGUF file, a name on the hub, a model in memory, or None for the default model.
        tokenizer: With a model in memory: its tokenizer, or None for tokens without text.
        dtype: "float32", "bfloat16" or "float16", for a model to be loaded.
        device: Where to load it.
        options: Fields of `EngineConfig`, and of `CacheConfig` without `max_tokens`; `max_bytes`,
            `host_bytes` and `disk_bytes` may be "2GiB".

    Raises:
        ConfigError: The model cannot be loaded or served, or an option is unknown or makes no sense.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        **options: Any,
    ) -> None:
        config = make_config(**options)
        if isinstance(model, PreTrainedModel):
            self.tokenizer = tokenizer
        else:
            model, self.tokenizer = load(model, dtype=dtype, device=device)
        self.engine = Engine(model, self.tokenizer, config)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        session_ids: Sequence[str | None] | None = None,
        session_ttl_s: float | None = None,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Answer prompts, as many at once as fit.

        Args:
            prompts: Texts or lists of tokens; or one of them. Tokens may also be in arrays of numpy or in tensors.
            params: For all prompts, or for each.
            session_ids: For each prompt the conversation that it goes on with (`Request.session_id`), or None.
            session_ttl_s: How long these keep their slots (`Request.session_ttl_s`).
            progress: Draw a progress bar on standard error's terminal.

        Returns:
            An output for each prompt, in order. An answer that failed says so; it harms no other.

        Raises:
            InvalidRequest: A prompt or its parameters make no sense, and nothing was computed.
            DriverError, InvariantError: The engine is of no more use.
        """
        requests = self._requests(_each(prompts), params, session_ids, session_ttl_s)
        collected: dict[str, dict[int, SequenceUpdate]] = {request.request_id: {} for request in requests}
        waiting = list(reversed(requests))
        try:
            with open_progress(sum(r.params.n for r in requests), is_shown=progress) as bar:
                while waiting or self.engine.has_work:
                    while waiting and self.engine.has_place(waiting[-1].params.n):
                        self.engine.add(waiting.pop())
                    for update in self.engine.step():
                        _collect(collected[update.request_id], update)
                        bar.see(update)
        finally:
            for request in requests:  # those that an interruption left unfinished
                self.engine.abort(request.request_id)
        return [_output(request, collected[request.request_id]) for request in requests]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        session_ids: Sequence[str | None] | None = None,
        session_ttl_s: float | None = None,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Answer conversations, written as the model's own chat template says. See `generate`.

        What a turn says cannot forge another one: see `conversation`.

        Raises:
            ConfigError: The model has no chat template.
        """
        conversations: Any = [messages] if messages and isinstance(messages[0], dict) else messages
        prompts = self._chat_tokens(conversations)
        return self.generate(prompts, params, session_ids=session_ids, session_ttl_s=session_ttl_s, progress=progress)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamParams | None = None
    ) -> list[tuple[Beam, ...]]:
        """Search each prompt's best continuations, of all prompts at once. See `beams`.

        Args:
            prompts: As for `generate`.
            params: For all prompts.

        Returns:
            For each prompt, in order, its beams, best first.

        Raises:
            InvalidRequest: A prompt or a parameter makes no sense, and nothing was computed.
            RequestError: A beam could not be computed; the search is over.
            DriverError, InvariantError: The engine is of no more use.
        """
        params = params or BeamParams()
        searches = [BeamSearch(self._tokens(prompt), params, self.engine.end_token_ids) for prompt in _each(prompts)]
        longest = SamplingParams(max_tokens=params.max_tokens)
        for search in searches:
            self.engine.check(Request(search.asks()[0], longest))
        while asks := [token_ids for search in searches for token_ids in search.asks()]:
            outputs = self.generate(asks, searches[0].step_params, progress=False)
            answers = iter([output.answers[0] for output in outputs])
            for search in searches:
                search.take([_only_token(next(answers)) for _ in search.asks()])
        return [tuple(self._with_text(beam) for beam in search.beams()) for search in searches]

    def park_session(self, session_id: str) -> Level | None:
        """Move a session one level down before its time. See `Engine.park_session`."""
        return self.engine.park_session(session_id)

    def forget_session(self, session_id: str) -> None:
        """End a session, wherever it is. See `Engine.forget_session`."""
        self.engine.forget_session(session_id)

    def save_session(self, session_id: str, path: str | Path) -> None:
        """Write a session to a file, wherever it is. See `Engine.save_session`."""
        self.engine.save_session(session_id, path)

    def load_session(self, session_id: str, path: str | Path, *, ttl_s: float | None = None) -> None:
        """Begin a session with what a file holds. See `Engine.load_session`."""
        self.engine.load_session(session_id, path, ttl_s=ttl_s)

    def save_prompt(self, prompt: Prompt | Sequence[Message], path: str | Path) -> int:
        """Compute a prompt and write it to a file, from which `load_prompt` takes it: a system prompt, most often.

        Here it is a cached prefix then, like that of any other request.

        Args:
            prompt: A text, tokens, or the messages that a conversation begins with, written as `chat` writes them.
            path: The file; one of that name is replaced.

        Returns:
            How many tokens it has.

        Raises:
            InvalidRequest: It makes no sense, or it has fewer tokens than are worth keeping (`prefix_min_tokens`).
            ConfigError: No sessions are kept here (set `host_bytes`), or the model has no chat template.
            RequestError: It could not be computed.
            OutOfHostMemory, OutOfDiskSpace, FileError, DriverError: As `Engine.save_session`.
            UnknownSession: It was computed, and its rows could not be kept until they were written.
            DriverError, InvariantError: The engine is of no more use.
        """
        self.engine.saved.require()
        is_chat = bool(prompt) and isinstance(prompt[0], dict)
        tokens = self._chat_tokens([prompt])[0] if is_chat else self._tokens(prompt)  # type: ignore[list-item, arg-type]
        least = self.engine.config.prefix_min_tokens
        if len(tokens) < least:
            raise InvalidRequest(f"the prompt has {count(len(tokens), 'token')}; at least {least} are kept", "prompt")
        session_id = new_request_id()
        params = SamplingParams(temperature=0.0, max_tokens=1)
        answer = self.generate([tokens], params, session_ids=[session_id], progress=False)[0].answers[0]
        if answer.error is not None:
            raise answer.error
        try:
            self.engine.save_session(session_id, path)
        finally:
            with suppress(UnknownSession):
                self.engine.saved.forget_prompt(session_id)
        return len(tokens)

    def load_prompt(self, path: str | Path) -> int:
        """Let every prompt that begins as a saved one does begin with its rows. See `Engine.load_prompt`."""
        return self.engine.load_prompt(path)

    def stats(self) -> EngineStats:
        """Return one snapshot of the engine."""
        return self.engine.snapshot()

    def close(self) -> None:
        """Leave the model as it was found, and give the memory back. Idempotent."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _requests(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        session_ids: Sequence[str | None] | None,
        session_ttl_s: float | None,
    ) -> list[Request]:
        if params is None or isinstance(params, SamplingParams):
            each = [params or SamplingParams()] * len(prompts)
        else:
            each = list(_require_list(params, "params"))
        if len(each) != len(prompts):
            raise InvalidRequest(f"{len(each)} parameters were given for {len(prompts)} prompts", "params")
        for one in each:
            if not isinstance(one, SamplingParams):
                raise InvalidRequest(f"params holds {one!r:.40}; expected SamplingParams", "params")
        names = [None] * len(prompts) if session_ids is None else list(_require_list(session_ids, "session_ids"))
        if len(names) != len(prompts):
            raise InvalidRequest(f"{len(names)} sessions were named for {len(prompts)} prompts", "session_ids")
        requests = [
            Request(self._tokens(prompt), p, session_id=name, session_ttl_s=None if name is None else session_ttl_s)
            for prompt, p, name in zip(prompts, each, names, strict=True)
        ]
        for request in requests:
            self.engine.check(request)
        return requests

    def _chat_tokens(self, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
        """Write conversations as the chat template does, each up to where its answer begins."""
        tokenizer = self.tokenizer
        if tokenizer is None or not tokenizer.chat_template:
            raise ConfigError("the model has no chat template; use generate")
        writer = ChatWriter(tokenizer)
        prompts: list[list[int]] = []
        for conversation in conversations:
            prompts.append([])
            for piece in writer.pieces(conversation):
                prompts[-1] += tokenizer(piece, add_special_tokens=False).input_ids if isinstance(piece, str) else piece
        return prompts

    def _with_text(self, beam: Beam) -> Beam:
        if self.tokenizer is None:
            return beam
        return replace(beam, text=str(self.tokenizer.decode(list(beam.token_ids), skip_special_tokens=True)))

    def _tokens(self, prompt: Prompt) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return tuple(_plain(token_id) for token_id in _require_list(prompt, "prompt"))
        if self.tokenizer is None:
            raise InvalidRequest("a prompt is a text, and there is no tokenizer; give tokens", "prompt")
        return tuple(self.tokenizer(prompt).input_ids)


def make_config(**options: Any) -> EngineConfig:
    """Return an `EngineConfig` from its own fields and those of `CacheConfig` (all but `max_tokens`).

    Raises:
        ConfigError: A name is unknown, or a value makes no sense.
    """
    cache_names = {f.name for f in fields(CacheConfig)} - {"max_tokens"}
    names = {f.name for f in fields(EngineConfig)} - {"cache"} | cache_names
    unknown = sorted(set(options) - names)
    if unknown:
        raise ConfigError(f"there is no option {', '.join(unknown)}; there are {', '.join(sorted(names))}")
    for name in ("max_bytes", "host_bytes", "disk_bytes"):
        if isinstance(options.get(name), str):
            options[name] = parse_bytes(options[name])
    cache = CacheConfig(**{name: value for name, value in options.items() if name in cache_names})
    return EngineConfig(cache=cache, **{name: value for name, value in options.items() if name not in cache_names})


def _each(prompts: Any) -> Sequence[Prompt]:
    """Return the prompts, where one may stand for itself."""
    if isinstance(prompts, str):
        return [prompts]
    several: Sequence[Any] = _require_list(prompts, "prompt")
    return [several] if several and isinstance(_plain(several[0]), int) else several


def _require_list(value: Any, param: str) -> Sequence[Any]:
    value = _plain(value)
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise InvalidRequest(f"{param} is {value!r:.40}; expected a list", param)
    return value


def _plain(value: Any) -> Any:
    """Return lists and numbers for what numpy and torch hold."""
    return value.tolist() if hasattr(value, "tolist") else value


def _only_token(answer: AnswerOutput) -> TokenLogprobs:
    if answer.error is not None:
        raise answer.error
    return answer.logprobs[0]


def _collect(answers: dict[int, SequenceUpdate], update: SequenceUpdate) -> None:
    if update.index in answers:
        answers[update.index].append(update)
    else:
        answers[update.index] = update


def _output(request: Request, answers: dict[int, SequenceUpdate]) -> RequestOutput:
    return RequestOutput(
        request.prompt_token_ids,
        tuple(
            AnswerOutput(
                update.text,
                tuple(update.token_ids),
                update.finish_reason or FinishReason.ABORT,
                update.stop_reason,
                tuple(update.logprobs),
                update.error,
            )
            for _, update in sorted(answers.items())
        ),
        answers[0].n_cached_tokens if 0 in answers else 0,
    )
