"""Which entry goes first: two rankings, and two segments of them that keep a share for what has proved useful.

    lru()         least recently used first
    cost_aware()  least (work to compute it again x chance that it is used again) for each page that comes free

Both are a `Segmented` policy: an entry begins on probation, and is protected once tokens that only it has were used.
While the protected ones hold no more than their share of the pages, victims come from the others alone: a flood of
prompts that never come back flushes the rest, and not them. Beyond the share all are ranked together.

Guarantees: decides, and changes no entry; the same calls at the same times give the same victims.
Assumptions: the index calls, and names candidates only: an entry in use was withdrawn.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeAlias

from vmem_kv.errors import ConfigError
from vmem_kv.prefix.entry import Entry, History, K
from vmem_kv.prefix.value import Group, RecomputeCost, ReuseEstimate, group_of

FreedBy: TypeAlias = Callable[[K], int]
"""Pages that come free if the entry with this key is given up now."""


class EvictionPolicy(Protocol[K]):
    """Chooses among the entries that nobody uses. `now` is the index's clock, and never goes back."""

    def added(self, entry: Entry[K]) -> None:
        """An entry is a candidate from now on: it is new, or its last user left, or its length changed."""

    def withdrawn(self, entry: Entry[K]) -> None:
        """A candidate is none any more: a request uses it, or it left the index."""

    def used(self, entry: Entry[K], before: History, is_own: bool) -> None:
        """A request was built on an entry, candidate or not. The entry says so already; `before` is what it said.

        `is_own` says whether it used tokens that no other entry has: had this one been given up, they were computed.
        """

    def evicted(self, entry: Entry[K], now: float) -> None:
        """A candidate is given up; `withdrawn` follows."""

    def changed(self, entry: Entry[K]) -> None:
        """What others hold of an entry, candidate or not, may have changed: `n_covered_tokens`."""

    def victim(self, now: float, freed_by: FreedBy[K]) -> Entry[K] | None:
        """The candidate to give up first, or None if there is none. It stays a candidate."""


class Ranking(Protocol[K]):
    """The candidates of one segment, in the order in which they should go."""

    def add(self, entry: Entry[K]) -> None:
        """Put in an entry that is not there, as the most recently used."""

    def discard(self, entry: Entry[K]) -> None:
        """Take out an entry that is there."""

    def changed(self, entry: Entry[K]) -> None:
        """Look again at an entry that is there: `n_covered_tokens` may have changed."""

    def least(self, now: float, freed_by: FreedBy[K]) -> tuple[float, Entry[K]] | None:
        """The one to go first, and a value that compares it with those of other segments; None if there is none."""


class RecencyRanking(Ranking[K]):
    """Least recently used first."""

    def __init__(self) -> None:
        self._entries: dict[Hashable, Entry[K]] = {}

    def add(self, entry: Entry[K]) -> None:
        self._entries[entry.key] = entry

    def discard(self, entry: Entry[K]) -> None:
        del self._entries[entry.key]

    def changed(self, entry: Entry[K]) -> None:
        """Nothing to look at: only its use counts."""

    def least(self, now: float, freed_by: FreedBy[K]) -> tuple[float, Entry[K]] | None:
        for entry in self._entries.values():
            return entry.last_used_at, entry
        return None


class ValueRanking(Ranking[K]):
    """Least expected saving for each page first.

    Entries of one kind (how used, how long by powers of two) are kept in the order of their last use, and only the
    oldest of each kind are compared, with their values as of now: no younger one has less of a chance. So the choice
    takes time in proportion to the kinds and not to the entries, though every value changes as time passes.
    """

    def __init__(self, estimate: ReuseEstimate, cost: RecomputeCost) -> None:
        self._estimate = estimate
        self._cost = cost
        self._kinds: dict[Hashable, dict[Hashable, Entry[K]]] = {}
        self._kind_of: dict[Hashable, Hashable] = {}

    def add(self, entry: Entry[K]) -> None:
        kind = self._kind(entry)
        self._kinds.setdefault(kind, {})[entry.key] = entry
        self._kind_of[entry.key] = kind

    def discard(self, entry: Entry[K]) -> None:
        kind = self._kind_of.pop(entry.key)
        del self._kinds[kind][entry.key]
        if not self._kinds[kind]:
            del self._kinds[kind]

    def changed(self, entry: Entry[K]) -> None:
        if self._kind(entry) != self._kind_of[entry.key]:
            self.discard(entry)
            self.add(entry)

    def least(self, now: float, freed_by: FreedBy[K]) -> tuple[float, Entry[K]] | None:
        oldest = [next(iter(entries.values())) for entries in self._kinds.values()]
        values = [(self._value(entry, now, freed_by), entry) for entry in oldest]
        return min(values, key=lambda pair: (pair[0], pair[1].last_used_at), default=None)

    def _kind(self, entry: Entry[K]) -> tuple[Group, int]:
        return group_of(entry.history(entry.last_used_at)), entry.n_own_tokens.bit_length()

    def _value(self, entry: Entry[K], now: float, freed_by: FreedBy[K]) -> float:
        """Work that keeping it is expected to save, for each page that giving it up would free. Only ratios matter."""
        chance = self._estimate.chance(entry.history(now))
        return chance * self._cost(entry.n_covered_tokens, entry.n_tokens) / max(freed_by(entry.key), 1)


class Segmented(EvictionPolicy[K]):
    """Two rankings of one kind: on probation, and protected.

    Args:
        probation: Where entries begin.
        protected: Where they are once their own tokens were used.
        protected_share: The part, from 0 to 1, of the candidates' pages up to which the protected ones are spared.
        estimate: Learns from what is used and what is given up.

    Raises:
        ConfigError: The share is not from 0 to 1.
    """

    def __init__(
        self,
        probation: Ranking[K],
        protected: Ranking[K],
        protected_share: float,
        estimate: ReuseEstimate | None = None,
    ) -> None:
        if not 0 <= protected_share <= 1:
            raise ConfigError(f"the protected share is {protected_share}; give a part from 0 to 1")
        self._share = protected_share
        self._estimate = estimate
        self._probation = _Segment(probation)
        self._protected = _Segment(protected)
        self._segment_of: dict[Hashable, _Segment[K]] = {}

    def added(self, entry: Entry[K]) -> None:
        segment = self._protected if entry.n_hits else self._probation
        segment.add(entry)
        self._segment_of[entry.key] = segment

    def withdrawn(self, entry: Entry[K]) -> None:
        self._segment_of.pop(entry.key).discard(entry)

    def used(self, entry: Entry[K], before: History, is_own: bool) -> None:
        if self._estimate is not None:
            self._estimate.saw_end(before, is_hit=is_own)
        if entry.key in self._segment_of:
            self.withdrawn(entry)
            self.added(entry)

    def evicted(self, entry: Entry[K], now: float) -> None:
        if self._estimate is not None:
            self._estimate.saw_end(entry.history(now), is_hit=False)

    def changed(self, entry: Entry[K]) -> None:
        segment = self._segment_of.get(entry.key)
        if segment is not None:
            segment.ranking.changed(entry)

    def victim(self, now: float, freed_by: FreedBy[K]) -> Entry[K] | None:
        first = self._probation.ranking.least(now, freed_by)
        n_all_pages = self._probation.n_pages + self._protected.n_pages
        if first is not None and self._protected.n_pages <= self._share * n_all_pages:
            return first[1]
        found = [least for least in (first, self._protected.ranking.least(now, freed_by)) if least is not None]
        return min(found, key=lambda least: least[0])[1] if found else None


class _Segment(Generic[K]):
    """A ranking, and the pages of what is in it."""

    def __init__(self, ranking: Ranking[K]) -> None:
        self.ranking = ranking
        self.n_pages = 0
        self._n_pages_of: dict[Hashable, int] = {}

    def add(self, entry: Entry[K]) -> None:
        self.ranking.add(entry)
        self._n_pages_of[entry.key] = entry.n_pages
        self.n_pages += entry.n_pages

    def discard(self, entry: Entry[K]) -> None:
        self.ranking.discard(entry)
        self.n_pages -= self._n_pages_of.pop(entry.key)


def lru(protected_share: float = 0.25) -> Segmented[K]:
    """Return the policy that gives up the least recently used entry first.

    Raises:
        ConfigError: The share is not from 0 to 1.
    """
    return Segmented(RecencyRanking(), RecencyRanking(), protected_share)


def cost_aware(
    protected_share: float = 0.25, cost: RecomputeCost | None = None, estimate: ReuseEstimate | None = None
) -> Segmented[K]:
    """Return the policy that gives up first what is expected to save the least work for each page.

    Args:
        protected_share: See `Segmented`.
        cost: Of the model, if its shape is known.
        estimate: What is known of reuse at the start, if anything.

    Raises:
        ConfigError: The share is not from 0 to 1.
    """
    cost = RecomputeCost() if cost is None else cost
    estimate = ReuseEstimate() if estimate is None else estimate
    return Segmented(ValueRanking(estimate, cost), ValueRanking(estimate, cost), protected_share, estimate)
