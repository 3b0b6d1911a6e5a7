"""What clients may send, field by field. Types are strict, bounds are stated, and anything else is refused.

Guarantees: whatever passes is bounded in every dimension, before a token of it is computed. What is wrong costs no more
than what is right: a list ends at its first wrong item, and of a body's unknown names the first one counts.
"""

from __future__ import annotations

from itertools import islice
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from vmem_kv.engine.request import MAX_SESSION_CHARACTERS
from vmem_kv.engine.sampling_params import (
    MAX_BIASES,
    MAX_LOGPROBS,
    MAX_STOP_CHARACTERS,
    MAX_STOP_TOKENS,
    SamplingParams,
)
from vmem_kv.server.errors import UNSUPPORTED, invalid
from vmem_kv.server.session_folder import MAX_SAVED_NAME, is_saved_name

T = TypeVar("T")
INT64_MAX = 2**63 - 1
MAX_COMPLETION_LOGPROBS = 5
MAX_MESSAGES = 2_048
MAX_METADATA = 16
MAX_NAME = 256
MAX_PROMPTS = 32
MAX_STOP_TEXTS = 4


def _kind(value: object) -> str:
    """Name a value's JSON type, as the tags of unions below do. Of arrays, the first item decides."""
    if isinstance(value, str):
        return "<string>"
    if not isinstance(value, list):
        return "<other>"
    first = value[0] if value else None
    if isinstance(first, list):
        return "<array of token arrays>"
    return "<array of tokens>" if isinstance(first, (int, float)) else "<array of strings>"


def _string_or_array(value: object) -> str:
    return "<string>" if isinstance(value, str) else "<array>" if isinstance(value, list) else "<other>"


def _not_too_many(value: object) -> object:
    """Refuse a large object before its members are looked at."""
    if isinstance(value, dict) and len(value) > MAX_METADATA:
        raise invalid(f"Invalid 'metadata': at most {MAX_METADATA} keys are accepted.", "metadata")
    return value


Listed = Annotated[list[T], Field(fail_fast=True)]
"""A list that is read up to its first wrong item, and no further than its `max_length`."""

Text = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field()]
Tokens = Annotated[Listed[TokenId], Field(min_length=1)]
Prompt = Annotated[
    Annotated[Text, Tag("<string>")]
    | Annotated[Listed[Text], Field(min_length=1, max_length=MAX_PROMPTS), Tag("<array of strings>")]
    | Annotated[Tokens, Tag("<array of tokens>")]
    | Annotated[Listed[Tokens], Field(max_length=MAX_PROMPTS), Tag("<array of token arrays>")],
    Discriminator(_kind),
]
SessionName = Annotated[str, Field(min_length=1, max_length=MAX_SESSION_CHARACTERS)]
SessionTtl = Annotated[float, Field(ge=0.0)]  # how much is too much is the engine's to say
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stop = Annotated[
    Annotated[StopText, Tag("<string>")]
    | Annotated[Listed[StopText], Field(max_length=MAX_STOP_TEXTS), Tag("<array>")],
    Discriminator(_string_or_array),
]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, data: object) -> object:
        """Drop what others offer and this client did not ask for: null says so. Keep one unknown name, to refuse it."""
        if not isinstance(data, dict):
            return data
        known = {k: v for k, v in data.items() if k in cls.model_fields}
        unknown = ((k, v) for k, v in data.items() if k not in known and (v is not None or k not in UNSUPPORTED))
        return known | dict(islice(unknown, 1))


class StreamOptions(_Strict):
    """Of an event stream."""

    include_usage: bool = False


class _Sharing(_Strict):
    """What says, beside a client's key, which cached prefixes and sessions are meant."""

    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_NAME)] | None = None

    def sharing_domain(self, domain: str) -> str:
        """Return within whom cached prefixes and sessions are found: one client's requests of the same salt.

        Args:
            domain: Whose request it is. Ours, and without NUL: so that no salt makes one domain look like another.
        """
        return domain if self.cache_salt is None else f"{domain}\0{self.cache_salt}"


class SessionAsk(_Sharing):
    """A session, by what stands in a path and in its query."""

    session_id: SessionName


class ListAsk(_Sharing):
    """Saved sessions, by what stands in a query."""


class SavedAsk(ListAsk):
    """A saved session, by what stands in a path and in its query."""

    name: str

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not is_saved_name(name):
            text = f"expected 1 to {MAX_SAVED_NAME} letters, digits, '-' or '_', the first of them a letter or a digit."
            raise invalid(f"Invalid 'name': {text}", "name")
        return name


class SaveAsk(SavedAsk):
    """POST /v1/saved_sessions."""

    session_id: SessionName


class LoadAsk(SaveAsk):
    """POST /v1/saved_sessions/load."""

    session_ttl: SessionTtl | None = None


class Asking(_Sharing):
    """What both endpoints take."""

    model: Annotated[str, Field(max_length=MAX_NAME)]
    n: Annotated[int, Field(ge=1, le=INT64_MAX)] | None = None  # how many are too many is the engine's to say
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT64_MAX)] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0.0, le=100.0)] | None = None
    logit_bias: dict[str, Any] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=INT64_MAX)] | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[Listed[TokenId], Field(max_length=MAX_STOP_TOKENS)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=INT64_MAX)] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    session_id: SessionName | None = None
    session_ttl: SessionTtl | None = None
    user: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    metadata: Annotated[
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None,
        BeforeValidator(_not_too_many),
    ] = None

    @field_validator("logit_bias")
    @classmethod
    def _check_biases(cls, biases: dict[str, Any] | None) -> dict[int, float] | None:
        if biases is None:
            return None
        if len(biases) > MAX_BIASES:
            raise invalid(f"Invalid 'logit_bias': at most {MAX_BIASES} tokens are accepted.", "logit_bias")
        for key, bias in biases.items():
            is_number = isinstance(bias, (int, float)) and not isinstance(bias, bool)
            if not (key.isascii() and key.isdigit() and len(key) < 20) or not is_number or not -100 <= bias <= 100:
                text = "Invalid 'logit_bias': expected token ids with biases from -100 to 100."
                raise invalid(text, "logit_bias")
        return {int(key): float(bias) for key, bias in biases.items()}

    @model_validator(mode="after")
    def _check_together(self) -> Asking:
        if self.session_ttl is not None and self.session_id is None:
            raise invalid("'session_ttl' is only allowed when 'session_id' is specified.", "session_ttl")
        if self.stream_options is not None and not self.stream:
            text = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
            raise invalid(text, "stream_options")
        if self.min_tokens and self.max_new_tokens is None:
            raise invalid("Invalid 'min_tokens': it needs a maximum, and none was given.", "min_tokens")
        if self.min_tokens and self.min_tokens > (self.max_new_tokens or 0):
            raise invalid("Invalid 'min_tokens': it is above the maximum of tokens.", "min_tokens")
        return self

    @property
    def max_new_tokens(self) -> int | None:
        """The most tokens of an answer; None for as many as fit."""
        raise NotImplementedError

    @property
    def n_logprobs(self) -> int | None:
        """How many likeliest tokens to report beside each chosen one; None for no log probabilities."""
        raise NotImplementedError

    def sampling_params(self) -> SamplingParams:
        """Return what the engine is to do."""
        stop = () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        given = {
            "n": self.n,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": self.logit_bias,
            "min_tokens": self.min_tokens,
        }
        return SamplingParams(
            max_tokens=self.max_new_tokens,
            seed=self.seed,
            stop=stop,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            include_stop=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            logprobs=self.n_logprobs,
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
        )


class CompletionAsk(Asking):
    """POST /v1/completions."""

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=1, le=INT64_MAX)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_COMPLETION_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Any = None

    @model_validator(mode="after")
    def _check_completion(self) -> CompletionAsk:
        if self.best_of is not None and (isinstance(self.best_of, bool) or self.best_of != (self.n or 1)):
            raise invalid("Invalid 'best_of': only the value of 'n' is supported.", "best_of")
        if self.session_id is not None and len(self.prompts()) > 1:
            text = f"Invalid 'session_id': a session goes on with one prompt, and {len(self.prompts())} were given."
            raise invalid(text, "session_id")
        if self.echo and self.logprobs is not None:
            text = (
                "Unsupported value: 'echo' cannot be combined with 'logprobs': log probabilities are given of answers, "
                "not of prompts."
            )
            raise invalid(text, "echo", "unsupported_value")
        return self

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def n_logprobs(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """Return each prompt, as text or tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TextPart(_Strict):
    """Part of a message."""

    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[Listed[TextPart], Field(min_length=1, max_length=MAX_MESSAGES), Tag("<array>")],
    Discriminator(_string_or_array),
]


class Message(_Strict):
    """One turn. What a client sends back of our answers (refusal: null) is accepted."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: Annotated[str, Field(max_length=64)] | None = None
    refusal: None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out_more_nulls(cls, data: object) -> object:
        optional = ("tool_calls", "annotations", "audio", "function_call")
        return {k: v for k, v in data.items() if v or k not in optional} if isinstance(data, dict) else data

    @property
    def text(self) -> str:
        """What is said."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatAsk(Asking):
    """POST /v1/chat/completions."""

    messages: Annotated[Listed[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1, le=INT64_MAX)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT64_MAX)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: Any = None
    tools: Any = None
    tool_choice: Any = None
    # What clients send by default, and what means here what is done anyway.
    parallel_tool_calls: bool | None = None
    prompt_cache_key: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    reasoning_effort: Literal["none"] | None = None
    safety_identifier: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> ChatAsk:
        if self.tools == []:
            text = "empty array. Expected an array with minimum length 1, but got an empty array instead."
            raise invalid(f"Invalid 'tools': {text}", "tools", "empty_array")
        if self.tools is not None:
            text = "Unsupported parameter: 'tools' is not supported here."
            raise invalid(text, "tools", "unsupported_parameter")
        if self.tool_choice is not None:
            raise invalid("'tool_choice' is only allowed when 'tools' are specified.", "tool_choice", None)
        if self.response_format is not None and self.response_format != {"type": "text"}:
            text = "Unsupported parameter: 'response_format' is supported with the type 'text' only."
            raise invalid(text, "response_format", "unsupported_parameter")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            text = "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported."
            raise invalid(text, "max_completion_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            text = "Invalid 'top_logprobs': 'logprobs' must be true to use it."
            raise invalid(text, "top_logprobs")
        return self

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def n_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeAsk(_Strict):
    """POST /tokenize: a prompt or messages."""

    model: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    prompt: str | None = None
    messages: Annotated[Listed[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check_one(self) -> TokenizeAsk:
        if (self.prompt is None) == (self.messages is None):
            text = "Missing required parameter: give either 'prompt' or 'messages'."
            raise invalid(text, "prompt", "missing_required_parameter")
        return self


class DetokenizeAsk(_Strict):
    """POST /detokenize."""

    model: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    tokens: Listed[TokenId]
