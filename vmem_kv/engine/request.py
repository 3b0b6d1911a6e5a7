"""What is asked of the engine, and what it answers.

A `Request` asks for `params.n` answers; each of them is a `Sequence` inside the engine, and is reported by
`SequenceUpdate`s that follow each other: all texts of one index, one after another, are the answer.
"""

from __future__ import annotations

import random
import secrets
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from vmem_kv.engine.sampling_params import SamplingParams
from vmem_kv.errors import RequestError
from vmem_kv.growth import SlotId

MAX_SESSION_CHARACTERS = 256
"""Of a session's name."""


def is_session_id(name: object) -> bool:
    """Whether a session can be called so."""
    return isinstance(name, str) and 0 < len(name) <= MAX_SESSION_CHARACTERS


def new_request_id() -> str:
    """Return a name that nobody else has: 128 random bits. Clients never choose it."""
    return secrets.token_hex(16)


@dataclass(frozen=True, slots=True)
class Request:
    """One ask.

    Attributes:
        prompt_token_ids: At least one token.
        params: How to answer.
        priority: Lower goes first; equal ones go by arrival. It decides who starts next and who loses its slot last,
            where memory runs short; nobody's work is thrown away only because somebody more urgent waits for a slot.
        domain: Whose request it is. Nothing that is cached is shared across domains, and memory that changes its domain
            is scrubbed. What stands before a NUL in it says whose it is: sessions are shared out by that.
        session_id: The name of a conversation. Its sequence is kept when the request has ended, and the next request
            of that name and domain goes on in it, as far as its prompt begins with the same tokens. Without host memory
            (`EngineConfig.host_bytes`) it means nothing.
        session_ttl_s: How long the session keeps its slot after this request, where nobody asks for it: at most
            `EngineConfig.max_session_ttl_s`; default: `EngineConfig.session_ttl_s`. In host memory it stays for ten
            times that, on disk for sixty times, and nowhere there for less than by default: 0 gives the slot back at
            once, and its rows wait as usual.
        request_id: Made by us, never by a client.
    """

    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    domain: str = ""
    session_id: str | None = None
    session_ttl_s: float | None = None
    request_id: str = field(default_factory=new_request_id)


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP = "stop"  # an end-of-sequence token, a stop token or a stop text
    LENGTH = "length"  # max_tokens, or the model's length
    ABORT = "abort"  # somebody called abort
    ERROR = "error"  # see SequenceUpdate.error


class TokenLogprob(NamedTuple):
    """A token with its log probability in the model's own distribution."""

    token_id: int
    logprob: float


class TokenLogprobs(NamedTuple):
    """The chosen token, and the likeliest ones, likeliest first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(slots=True)
class SequenceUpdate:
    """What is new of one answer.

    Attributes:
        request_id: Whose answer.
        index: Which of the request's n answers.
        text: Text to append. Whole characters only; may be empty while text is held back.
        token_ids: Tokens to append, stop tokens included.
        logprobs: One entry a token, where they were asked for.
        finish_reason: None while the answer goes on.
        stop_reason: The stop text or stop token id that ended it, where one did.
        n_cached_tokens: Tokens of the prompt that were not computed for this answer, because others, or its session,
            had them.
        error: Why it ended, where `finish_reason` is ERROR.
    """

    request_id: str
    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    n_cached_tokens: int = 0
    error: RequestError | None = None

    @property
    def is_finished(self) -> bool:
        """Whether this is the answer's last update."""
        return self.finish_reason is not None

    def append(self, later: SequenceUpdate) -> None:
        """Take in the update that follows."""
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.finish_reason = later.finish_reason
        self.stop_reason = later.stop_reason
        self.n_cached_tokens = max(self.n_cached_tokens, later.n_cached_tokens)
        self.error = later.error


class Rank(NamedTuple):
    """Who goes first: the smaller one."""

    priority: int
    arrival: int
    answer_index: int


class Sequence:
    """One answer while it is computed. The engine's own; nobody else sees it.

        [0, n_computed)               K and V are in the slot
        [n_computed, len(token_ids))  to be computed: the rest of the prompt, or the token sampled last

    Attributes:
        token_ids: Prompt and answer.
        n_prompt: Tokens of the prompt.
        n_computed: Tokens whose K and V are in the slot; 0 without one.
        n_cached: Tokens of the prompt that were in the slot when it started first.
        n_lost: Tokens that it had computed when it was preempted, until it starts again.
        slot_id: Its memory while it runs.
        max_length: The most tokens that it may come to.
        rng: Its own random numbers: nothing that other sequences do changes them.
    """

    def __init__(self, request: Request, index: int, arrival: int, max_length: int) -> None:
        self.request = request
        self.index = index
        self.rank = Rank(request.priority, arrival, index)
        self.token_ids = list(request.prompt_token_ids)
        self.n_prompt = len(self.token_ids)
        self.n_computed = 0
        self.slot_id: SlotId | None = None
        self.max_length = max_length
        seed = request.params.seed
        self.rng = random.Random(None if seed is None else f"{seed}/{index}")
        self.n_preemptions = 0
        self.n_cached = 0
        self.n_lost = 0

    @property
    def params(self) -> SamplingParams:
        """How it is sampled."""
        return self.request.params

    @property
    def n_to_compute(self) -> int:
        """Tokens whose K and V are missing. 1 while it decodes."""
        return len(self.token_ids) - self.n_computed

    @property
    def n_generated(self) -> int:
        """Tokens of the answer."""
        return len(self.token_ids) - self.n_prompt

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request.request_id[:8]}/{self.index}, {self.n_computed} of {len(self.token_ids)} tokens)"
        )
