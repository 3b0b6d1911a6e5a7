"""What is asked of the engines: prompts, answers of fixed lengths, and when they arrive. Standard library only.

Guarantees: the same arguments give the same workload, on every machine and in every process. Prompts share no prefix
beyond chance. Times are seconds from the beginning and ascend.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

FIRST_TOKEN_ID = 100
"""Below it many models have their special tokens."""
LAST_TOKEN_ID = 40_000


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: a prompt of tokens, and how many are to be generated, no fewer and no more."""

    arrival_s: float
    prompt: tuple[int, ...]
    n_output: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in the order in which they arrive."""

    name: str
    asks: tuple[Ask, ...]

    @property
    def n_output_tokens(self) -> int:
        """Tokens that every engine generates."""
        return sum(ask.n_output for ask in self.asks)

    @property
    def n_prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(ask.prompt) for ask in self.asks)

    @property
    def longest_tokens(self) -> int:
        """The longest prompt with its answer."""
        return max(len(ask.prompt) + ask.n_output for ask in self.asks)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Workload:
        """Undo `to_json`."""
        asks = (Ask(float(a["arrival_s"]), tuple(a["prompt"]), int(a["n_output"])) for a in data["asks"])
        return cls(str(data["name"]), tuple(asks))


def at_once(n: int, prompts: Sequence[int], outputs: Sequence[int], vocabulary: int, seed: int) -> Workload:
    """Make requests that all arrive at the beginning; lengths are drawn from `prompts` and `outputs` (least, most)."""
    rng = random.Random(seed)
    lengths = [(rng.randint(*prompts), rng.randint(*outputs)) for _ in range(n)]
    return Workload("at_once", _asks([0.0] * n, lengths, vocabulary, rng))


def poisson(
    n: int, prompts: Sequence[int], outputs: Sequence[int], rate: float, vocabulary: int, seed: int
) -> Workload:
    """Make the same, arriving at random, `rate` a second on average."""
    rng = random.Random(seed)
    lengths = [(rng.randint(*prompts), rng.randint(*outputs)) for _ in range(n)]
    arrivals = [0.0]
    while len(arrivals) < n:
        arrivals.append(arrivals[-1] + rng.expovariate(rate))
    return Workload("poisson", _asks(arrivals, lengths, vocabulary, rng))


def replay(
    name: str,
    rows: Sequence[tuple[float, int, int]],
    prompts: Sequence[int],
    outputs: Sequence[int],
    rate: float,
    vocabulary: int,
    seed: int,
) -> Workload:
    """Make requests of a trace's rows (arrival in seconds, prompt tokens, output tokens), scaled to a small model.

    Lengths are multiplied so that their mean is that of `prompts` and `outputs`, and cut to their most; times are
    stretched so that `rate` requests arrive a second on average. What is left of the trace is the shape of both.
    """
    rng = random.Random(seed)
    span_s = rows[-1][0] - rows[0][0]
    stretch = (len(rows) - 1) / rate / span_s if span_s else 0.0
    arrivals = [(row[0] - rows[0][0]) * stretch for row in rows]
    n_prompts = _scaled([n for _, n, _ in rows], prompts)
    n_outputs = _scaled([n for _, _, n in rows], outputs)
    return Workload(name, _asks(arrivals, zip(n_prompts, n_outputs, strict=True), vocabulary, rng))


def _scaled(lengths: Sequence[int], bounds: Sequence[int]) -> list[int]:
    factor = (bounds[0] + bounds[1]) / 2 * len(lengths) / sum(lengths)
    return [min(max(1, round(n * factor)), bounds[1]) for n in lengths]


def _asks(
    arrivals: Sequence[float], lengths: Iterable[tuple[int, int]], vocabulary: int, rng: random.Random
) -> tuple[Ask, ...]:
    end = min(vocabulary, LAST_TOKEN_ID)
    first = min(FIRST_TOKEN_ID, end // 2)
    return tuple(
        Ask(arrival_s, tuple(rng.randrange(first, end) for _ in range(n_prompt)), n_output)
        for arrival_s, (n_prompt, n_output) in zip(arrivals, lengths, strict=True)
    )
