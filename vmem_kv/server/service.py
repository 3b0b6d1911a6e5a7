"""What all routes share, built once: the engine with its text, and the rules."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic, time

from vmem_kv.engine.async_engine import AnswerStream, AsyncEngine
from vmem_kv.engine.request import new_request_id
from vmem_kv.errors import QueueFull, VmemError
from vmem_kv.server.auth import Hosts, Keys
from vmem_kv.server.errors import ApiError, from_engine, invalid
from vmem_kv.server.limits import Limits
from vmem_kv.server.metrics import Metrics
from vmem_kv.server.session_folder import SessionFolder
from vmem_kv.server.text import TextCodec


@dataclass(slots=True)
class Record:
    """One HTTP request, for the log and the metrics.

    Attributes:
        request_id: Ours; what a client sends as such is ignored.
        domain: Whose it is; see `auth.Keys`.
        arrived_s: On `time.monotonic`'s clock.
        n_prompt_tokens: Of all its prompts.
        n_cached_tokens: Of its prompts, those that others had computed: of several answers to one, the first counts.
        n_generated_tokens: Of all its answers so far.
        ended_early: Why it ended before its answer did; empty where it did not.
    """

    request_id: str = field(default_factory=lambda: f"req_{new_request_id()}")
    domain: str = ""
    arrived_s: float = field(default_factory=monotonic)
    n_prompt_tokens: int = 0
    n_cached_tokens: int = 0
    n_generated_tokens: int = 0
    ended_early: str = ""


@dataclass(slots=True)
class Coming:
    """Answers whose prompts are on their way to tokens. The engine knows nothing of them yet."""

    n_answers: int = 0

    @contextmanager
    def counted(self, n_answers: int) -> Iterator[None]:
        """Count so many more as long as the context lasts."""
        self.n_answers += n_answers
        try:
            yield
        finally:
            self.n_answers -= n_answers


@dataclass(frozen=True, slots=True)
class Service:
    """A served model.

    Attributes:
        engine: Started; whoever built it stops it.
        codec: The model's text.
        model_name: What clients call it.
        limits: What they may ask.
        keys: Who may ask.
        hosts: By which names.
        metrics: What is counted.
        folder: Where clients may save sessions; None for nowhere.
        streams: Those that are being read.
        coming: What will be submitted soon.
        created_s: When it began to serve, as OpenAI's models have it.
    """

    engine: AsyncEngine
    codec: TextCodec
    model_name: str
    limits: Limits
    keys: Keys
    hosts: Hosts
    metrics: Metrics
    folder: SessionFolder | None = None
    streams: set[AnswerStream] = field(default_factory=set)
    coming: Coming = field(default_factory=Coming)
    created_s: int = field(default_factory=lambda: int(time()))

    @contextmanager
    def place(self, n_answers: int) -> Iterator[None]:
        """Keep places for answers as long as the context lasts: while their prompts are encoded, to their submission.

        Raises:
            ApiError: 429, 503, or 400 where the engine never takes on so many. No work was done for them.
        """
        try:
            self.engine.require_place(n_answers, self.coming.n_answers)
        except VmemError as error:
            raise from_engine(error, "n") from error
        with self.coming.counted(n_answers):
            yield

    @contextmanager
    def turn_to_encode(self) -> Iterator[None]:
        """Count what is encoded for its own sake beside what is encoded for the engine; not more than that takes on.

        Raises:
            ApiError: 429.
        """
        config = self.engine.engine.config
        if self.coming.n_answers >= config.max_queued + config.max_num_seqs:
            raise from_engine(QueueFull("too many requests wait already; try again later"), "n")
        with self.coming.counted(1):
            yield

    def check_n(self, n: int) -> None:
        """Check that so many answers to one prompt are given here.

        Raises:
            ApiError: 400.
        """
        max_n = self.engine.engine.config.max_n
        if n > max_n:
            text = f"integer above maximum value. Expected a value <= {max_n}, but got {n} instead."
            raise invalid(f"Invalid 'n': {text}", "n", "integer_above_max_value")

    def check_session_ttl(self, ttl_s: float | None) -> None:
        """Check that a session may keep its slot for so long.

        Raises:
            ApiError: 400.
        """
        longest_s = self.engine.engine.config.longest_session_ttl_s
        if ttl_s is not None and not ttl_s <= longest_s:
            text = f"decimal above maximum value. Expected a value <= {longest_s:g}, but got {ttl_s:g} instead."
            raise invalid(f"Invalid 'session_ttl': {text}", "session_ttl", "decimal_above_max_value")

    def check_model(self, name: str | None) -> None:
        """Check that a client means this model. None means: whichever there is.

        Raises:
            ApiError: 404.
        """
        if name is not None and name != self.model_name:
            shown = re.sub(r"[^\w./:-]", "?", name[:64], flags=re.ASCII)
            text = f"The model `{shown}` does not exist or you do not have access to it."
            raise ApiError(404, text, code="model_not_found")
