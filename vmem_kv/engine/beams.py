"""Beam search over an engine that answers one token at a time: which continuations live on, and which are done.

A round asks for the likeliest next tokens of every live beam. The beams of a prompt begin with the same tokens, so
their slots are adopted from the round before, or forked: full pages are shared, and a round computes one token a beam.

    running beams ──one token each──▶ candidates ──▶ the best `width` that go on ──▶ running beams
                                           └───────▶ those that end, if among the best `width` ──▶ finished beams

Guarantees: the same beams as transformers' `generate(num_beams=width, early_stopping=False)`, up to rounding.
Assumes: prefixes are cached (`EngineConfig.prefix_caching`); without that the tokens are the same, and every round
computes every beam from its beginning.
Source: the heuristic end is that of transformers: no running beam could beat the worst finished one at its length now.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vmem_kv.engine.request import FinishReason, TokenLogprobs
from vmem_kv.engine.sampling_params import MAX_LOGPROBS, SamplingParams
from vmem_kv.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class BeamParams:
    """How to search.

    Attributes:
        width: Beams that are kept, and returned.
        max_tokens: The most tokens of an answer.
        length_penalty: A finished beam's score is the sum of its log probabilities over its length to this power: above
            0 favours long ones.
        ignore_eos: Do not end at the model's end-of-sequence tokens.

    Raises:
        InvalidRequest: A value is out of its range; `param` names it.
    """

    width: int = 4
    max_tokens: int = 64
    length_penalty: float = 1.0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, most in (("width", MAX_LOGPROBS), ("max_tokens", 2**63 - 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise InvalidRequest(f"{name} is {value!r:.40}; expected a whole number from 1 to {most}", name)
        if not isinstance(self.length_penalty, (int, float)) or not math.isfinite(self.length_penalty):
            raise InvalidRequest(f"length_penalty is {self.length_penalty!r:.40}; expected a number", "length_penalty")


@dataclass(frozen=True, slots=True)
class Beam:
    """One continuation of a prompt.

    Attributes:
        token_ids: Its tokens, an end token included.
        logprob: The sum of their log probabilities.
        score: That over the length to the power of the length penalty.
        finish_reason: STOP at an end token, LENGTH at the most tokens.
        text: What it says, where there is a tokenizer.
    """

    token_ids: tuple[int, ...]
    logprob: float
    score: float
    finish_reason: FinishReason
    text: str = ""


class BeamSearch:
    """The search for one prompt's best continuations.

    Args:
        prompt_token_ids: At least one token.
        params: How to search.
        end_token_ids: Those that end an answer.

    Raises:
        InvalidRequest: The beams would need more of the likeliest tokens than can be asked for.
    """

    def __init__(self, prompt_token_ids: Sequence[int], params: BeamParams, end_token_ids: frozenset[int]) -> None:
        self._prompt = tuple(prompt_token_ids)
        self._params = params
        self._ends = frozenset() if params.ignore_eos else end_token_ids
        self._running: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
        self._finished: list[Beam] = []
        # Of one beam's best continuations so many may end, and `width` must be left.
        n_likeliest = params.width + len(self._ends)
        if n_likeliest > MAX_LOGPROBS:
            raise InvalidRequest(f"width is {params.width}; at most {MAX_LOGPROBS - len(self._ends)} here", "width")
        self.step_params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, logprobs=n_likeliest)
        """How each of the asks is to be answered."""

    def asks(self) -> list[tuple[int, ...]]:
        """Return the tokens of which the likeliest next ones are wanted; none when the search is over."""
        return [self._prompt + token_ids for token_ids, _ in self._running]

    def take(self, likeliest: Sequence[TokenLogprobs]) -> None:
        """Go on with the likeliest next tokens, an entry for each of `asks()`; with none where the search is over."""
        if not self._running:
            return
        width = self._params.width
        candidates = [
            ((*token_ids, next_token.token_id), logprob + next_token.logprob)
            for (token_ids, logprob), tokens in zip(self._running, likeliest, strict=True)
            for next_token in tokens.top
        ]
        candidates.sort(key=lambda candidate: -candidate[1])  # stable: equal ones in the order of their beams
        is_last = len(candidates[0][0]) >= self._params.max_tokens
        for token_ids, logprob in candidates[:width]:
            if token_ids[-1] in self._ends:
                self._finish(token_ids, logprob, FinishReason.STOP)
            elif is_last:
                self._finish(token_ids, logprob, FinishReason.LENGTH)
        self._running = [] if is_last else [c for c in candidates if c[0][-1] not in self._ends][:width]
        if self._running and len(self._finished) == width:
            token_ids, logprob = self._running[0]
            if self._score(token_ids, logprob) <= self._finished[-1].score:
                self._running = []

    def beams(self) -> tuple[Beam, ...]:
        """Return the beams found, best first."""
        return tuple(self._finished)

    def _finish(self, token_ids: tuple[int, ...], logprob: float, reason: FinishReason) -> None:
        self._finished.append(Beam(token_ids, logprob, self._score(token_ids, logprob), reason))
        self._finished.sort(key=lambda beam: -beam.score)
        del self._finished[self._params.width :]

    def _score(self, token_ids: tuple[int, ...], logprob: float) -> float:
        return float(logprob / len(token_ids) ** self._params.length_penalty)
