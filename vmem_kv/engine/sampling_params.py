"""How a request's tokens are chosen and when it ends, as one frozen, validated value.

Guarantees: an object of this class is valid in itself, and everything that it makes the engine allocate is bounded by
the limits below. What depends on the model (token ids, lengths) is checked where the request meets it (engine.py).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from vmem_kv.errors import InvalidRequest

MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1_000
MAX_STOP_TOKENS = 64
MAX_BIASES = 1_024
_INT64 = 2**63


class Biases(Mapping[int, float]):
    """A bias for each token id, which nobody can change. Can be hashed, copied and pickled."""

    __slots__ = ("_biases",)

    def __init__(self, biases: Mapping[int, float]) -> None:
        self._biases = dict(biases)

    def __getitem__(self, token_id: int) -> float:
        return self._biases[token_id]

    def __iter__(self) -> Iterator[int]:
        return iter(self._biases)

    def __len__(self) -> int:
        return len(self._biases)

    def __hash__(self) -> int:
        return hash(frozenset(self._biases.items()))

    def __repr__(self) -> str:
        return repr(self._biases)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What a user may ask of sampling. The defaults sample from the model's own distribution; None is a default, too.

    The order is transformers': penalties and biases, then temperature, top-k, top-p, min-p.

    Attributes:
        n: How many answers, each from its own random numbers.
        max_tokens: The most tokens of an answer; None for as many as the model's length leaves.
        min_tokens: An answer does not end by a token before it has so many.
        temperature: 0 takes the likeliest token.
        top_k: Sample from the k likeliest tokens; 0 for all.
        top_p: Sample from the fewest likeliest tokens that have this probability together.
        min_p: Leave out tokens less likely than this share of the likeliest one's probability.
        repetition_penalty: Above 1, tokens of prompt and answer become less likely.
        presence_penalty: Taken from the logits of every token in the answer.
        frequency_penalty: Taken once for every time that a token is in the answer.
        logit_bias: Added to the logits, per token id.
        seed: The same seed gives the same text, whatever else runs. None for a new one each time.
        stop: Texts that end the answer; they are not part of it.
        stop_token_ids: Tokens that end the answer; they are not part of its text.
        ignore_eos: Do not end at the model's end-of-sequence tokens.
        include_stop: Keep the stop text in the answer.
        logprobs: How many of the likeliest tokens' log probabilities to return beside the chosen one's, by the model's
            own distribution; None for none at all.
        skip_special_tokens: Leave special tokens out of the text.

    Raises:
        InvalidRequest: A value is out of its range; `param` names it.
    """

    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for one in fields(self):
            if getattr(self, one.name) is None:
                value = one.default if one.default_factory is MISSING else one.default_factory()
                object.__setattr__(self, one.name, value)
        _check_int("n", self.n, 1, MAX_N)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, _INT64 - 1)
        _check_int("min_tokens", self.min_tokens, 0, _INT64 - 1 if self.max_tokens is None else self.max_tokens)
        _check_number("temperature", self.temperature, 0.0, 100.0)
        _check_int("top_k", self.top_k, 0, _INT64 - 1)
        _check_number("top_p", self.top_p, 0.0, 1.0, is_above=True)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, is_above=True)
        _check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _check_int("seed", self.seed, -_INT64, _INT64 - 1)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        self._check_stops()
        self._check_biases()

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether what was said before changes the logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def _check_stops(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else _members("stop", self.stop)
        if len(stop) > MAX_STOPS:
            raise InvalidRequest(f"stop has {len(stop)} texts; at most {MAX_STOPS} are allowed", "stop")
        for text in stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_CHARACTERS:
                raise InvalidRequest(f"stop holds texts of 1 to {MAX_STOP_CHARACTERS} characters", "stop")
        object.__setattr__(self, "stop", stop)
        token_ids = _members("stop_token_ids", self.stop_token_ids)
        if len(token_ids) > MAX_STOP_TOKENS:
            raise InvalidRequest(
                f"stop_token_ids has {len(token_ids)} tokens; at most {MAX_STOP_TOKENS} are allowed", "stop_token_ids"
            )
        for token_id in token_ids:
            _check_int("stop_token_ids", token_id, 0, _INT64 - 1)
        object.__setattr__(self, "stop_token_ids", token_ids)

    def _check_biases(self) -> None:
        if not isinstance(self.logit_bias, Mapping):
            raise InvalidRequest(f"logit_bias is {self.logit_bias!r:.40}; expected a bias for each token", "logit_bias")
        if len(self.logit_bias) > MAX_BIASES:
            raise InvalidRequest(
                f"logit_bias has {len(self.logit_bias)} entries; at most {MAX_BIASES} are allowed", "logit_bias"
            )
        for token_id, bias in self.logit_bias.items():
            _check_int("logit_bias", token_id, 0, _INT64 - 1)
            _check_number("logit_bias", bias, -100.0, 100.0)
        object.__setattr__(self, "logit_bias", Biases(self.logit_bias))


def _members(param: str, value: object) -> tuple[Any, ...]:
    if not isinstance(value, Collection) or isinstance(value, (str, bytes, Mapping)):
        raise InvalidRequest(f"{param} is {value!r:.40}; expected a list", param)
    return tuple(value)


def _check_int(param: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{param} is {value!r:.40}; expected a whole number", param)
    if not least <= value <= most:
        raise InvalidRequest(f"{param} is {value}; expected {least} to {most}", param)


def _check_number(param: str, value: object, least: float, most: float, *, is_above: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidRequest(f"{param} is {value!r:.40}; expected a number", param)
    if not least <= value <= most or (is_above and value == least):
        above = "above " if is_above else ""
        raise InvalidRequest(f"{param} is {value:g}; expected {above}{least:g} to {most:g}", param)
