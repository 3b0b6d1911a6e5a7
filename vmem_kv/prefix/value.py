"""What an entry is worth: the work that it saves, and the chance that it is used again, learnt from what was seen.

Guarantees: plain arithmetic on what it is told; nothing random, no time of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

from vmem_kv.errors import ConfigError
from vmem_kv.prefix.entry import History

_N_AGES = 64
"""Ages are told apart by their power of two, from 2**-16 units of time on."""

_LEAST_EXPONENT = -16

_ENDS_PER_LOOK = 64
"""Rates and weights are computed again after so many ends."""


@dataclass(frozen=True, slots=True)
class RecomputeCost:
    """The work of computing tokens again, in units of one token's work without attention.

    A token's attention reads all tokens before it, so that its work grows with its position.
    """

    even_at_tokens: float = 30_000.0
    """The position at which attending costs as much as all else; infinity makes all tokens equal.

    A model of 8e9 weights in 32 layers, 4096 wide, gives 8e9 / (2 * 32 * 4096).
    """

    def __post_init__(self) -> None:
        if not self.even_at_tokens > 0:
            raise ConfigError(f"even_at_tokens is {self.even_at_tokens}; give a position above 0")

    def __call__(self, first: int, end: int) -> float:
        """Return the work of tokens `[first, end)` behind the `first` ones before them."""
        return (end - first) * (1 + (first + end) / 2 / self.even_at_tokens)


Group: TypeAlias = tuple[int, int]
"""How an entry was used, and how long it is."""


def group_of(history: History) -> Group:
    """Return the group of entries that are alike in how they were used, and in how long they are.

    Left behind by a fork, never used, used once or twice, three to six times, more often; and lengths by powers of 4.
    """
    used = -1 if history.is_forked else min((history.n_hits + 1).bit_length() - 1, 3)
    return used, history.n_own_tokens.bit_length() // 2


class ReuseEstimate:
    """The chance that an entry is used soon, by what is known of its use, its length, and how long ago it was used.

    Two factors, both learnt from what is seen.

    Age: hits over time spent, at each age (by powers of two), of all entries. Where an age has more than the younger
    ones, those are given as much: an entry on its way there is kept until it has been there.
    Group (see `group_of`): the hits that its entries had, over those that they would have had if they were like all
    entries at the same ages. One number a group is learnt from few events, where a curve for each would be noise.

    Before anything is seen the chance falls with age, so that the least recently used entry has the least.

    Args:
        half_life: After so many ends everything seen before counts half.
        prior_hits: How many hits, as likely as everybody's, a group is taken to have had before anything was seen.

    Raises:
        ConfigError: One of them is not above 0.
    """

    def __init__(self, half_life: int = 4096, prior_hits: float = 4.0) -> None:
        if half_life <= 0 or prior_hits <= 0:
            raise ConfigError(f"half_life is {half_life} and prior_hits is {prior_hits}; give values above 0")
        self._half_life = half_life
        self._prior_hits = prior_hits
        self._n_ends = 0
        self._all = _Seen()
        self._seen: dict[Group, _Seen] = {}
        self._rates: list[float] = []  # by age; computed when asked for, and forgotten now and then
        self._weights: dict[Group, float] = {}  # likewise

    def saw_end(self, history: History, *, is_hit: bool) -> None:
        """Learn that an entry with this history was used again, or was not until then: it was given up, for example."""
        self._seen.setdefault(group_of(history), _Seen()).add(history.age, is_hit)
        self._all.add(history.age, is_hit)
        self._n_ends += 1
        if self._n_ends % self._half_life == 0:
            for seen in (self._all, *self._seen.values()):
                seen.halve()
        if self._n_ends % _ENDS_PER_LOOK == 0:
            self._rates = []
            self._weights.clear()

    def chance(self, history: History) -> float:
        """Return a number in proportion to the chance that such an entry is used in the next moment.

        Of two entries in one group the younger one has no less.
        """
        if not self._rates:
            self._rates = self._all.rates()
        group = group_of(history)
        weight = self._weights.get(group)
        if weight is None:
            weight = self._weights[group] = self._weight(self._seen.get(group))
        return weight * self._rates[_age_index(history.age)]

    def _weight(self, seen: _Seen | None) -> float:
        if seen is None:
            return 1.0
        ages = zip(seen.time, self._all.time, self._all.hits, strict=True)
        n_usual_hits = sum(time / time_of_all * hits for time, time_of_all, hits in ages if time_of_all > 0)
        return (sum(seen.hits) + self._prior_hits) / (n_usual_hits + self._prior_hits)


class _Seen:
    """Hits, and time spent, by age."""

    def __init__(self) -> None:
        self.hits = [0.0] * _N_AGES
        self.time = [0.0] * _N_AGES

    def add(self, age: float, is_hit: bool) -> None:
        last = _age_index(age)
        self.hits[last] += is_hit
        for index in range(last):
            self.time[index] += _width(index)
        self.time[last] += age - _begin(last)

    def halve(self) -> None:
        self.hits = [value / 2 for value in self.hits]
        self.time = [value / 2 for value in self.time]

    def rates(self) -> list[float]:
        """Return hits for each unit of time, by age, that do not rise with it.

        One hit is added at every age, in the time that it takes if rates are as 1 / age: this decides where little was
        seen.
        """
        n_hits = sum(self.hits)
        spent = sum(time / age for time, age in zip(self.time, _MIDDLES, strict=True))
        scale = n_hits / spent if n_hits > 0 and spent > 0 else 1.0
        seen = zip(self.hits, self.time, _MIDDLES, strict=True)
        rates = [(hits + 1) / (time + age / scale) for hits, time, age in seen]
        return list(accumulate(reversed(rates), max))[::-1]


def _age_index(age: float) -> int:
    if age < _end(0):
        return 0
    return min(math.frexp(age)[1] - 1 - _LEAST_EXPONENT, _N_AGES - 1)


def _begin(index: int) -> float:
    return math.ldexp(1.0, index + _LEAST_EXPONENT) if index else 0.0


def _end(index: int) -> float:
    return math.ldexp(1.0, index + 1 + _LEAST_EXPONENT)


def _width(index: int) -> float:
    return _end(index) - _begin(index)


_MIDDLES = [(_begin(index) + _end(index)) / 2 for index in range(_N_AGES)]
