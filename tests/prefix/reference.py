"""The index beside a reference that is too simple to be wrong: a dictionary of token lists, searched in full."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from vmem_kv.errors import InvariantError
from vmem_kv.prefix import Entry, EvictionPolicy, Match, PrefixIndex
from vmem_kv.testing.clock import ManualClock

KINDS = (
    *("insert", "insert", "insert", "match", "match", "use", "use", "extend", "truncate", "remove", "pin", "unpin"),
    *("evict", "fit"),
)
DOMAINS = ("a", "b")


class Operation(NamedTuple):
    """Something to do. `pick` chooses among the keys there are; `n` is a length, a count or a number of pages."""

    kind: str
    domain: str
    tokens: tuple[int, ...]
    pick: int
    n: int


class Mismatch(AssertionError):
    """The index and the reference disagree."""


def require(is_so: bool, what: str) -> None:
    if not is_so:
        raise Mismatch(what)


def common(left: Sequence[int], right: Sequence[int]) -> int:
    n = 0
    while n < min(len(left), len(right)) and left[n] == right[n]:
        n += 1
    return n


@dataclass
class Known:
    """What the reference knows of one entry."""

    domain: str
    tokens: list[int]
    n_pages: int
    n_pins: int = 0


@dataclass
class Pair:
    """An index and its reference, which do everything together and are compared after each step."""

    index: PrefixIndex[int]
    clock: ManualClock
    known: dict[int, Known] = field(default_factory=dict)
    n_keys: int = 0

    def run(self, operations: Sequence[Operation]) -> None:
        for operation in operations:
            self.clock.advance(1 + operation.n)
            getattr(self, operation.kind)(operation)
            self.compare()

    def insert(self, op: Operation) -> None:
        if op.tokens:
            self.n_keys += 1
            self.known[self.n_keys] = Known(op.domain, list(op.tokens), op.n, op.pick % 2)
            self.index.insert(op.domain, op.tokens, self.n_keys, op.n, is_pinned=bool(op.pick % 2))

    def match(self, op: Operation) -> Match[int]:
        match = self.index.match(op.domain, op.tokens)
        shared = {k: common(e.tokens, op.tokens) for k, e in self.known.items() if e.domain == op.domain}
        longest = max(shared.values(), default=0)
        require(match.n_query_tokens == len(op.tokens), "the query's length")
        require(match.n_tokens == longest, f"{match} for {op}, but {longest} tokens are shared")
        require((match.entry is None) == (longest == 0), f"{match} names an entry, or does not")
        if match.entry is not None:
            require(shared.get(match.entry.key) == longest, f"{match} names an entry that does not share so much")
            ends_free = {k for k in self.free() if shared.get(k) == longest == len(self.known[k].tokens)}
            require(not ends_free or match.entry.key in ends_free, f"{match} names none that could be adopted")
        free = [len(self.known[k].tokens) for k in self.free() if shared.get(k) == len(self.known[k].tokens)]
        require((match.whole is None) == (not free), f"{match}: whole ones have {free} tokens")
        if match.whole is not None:
            tokens = self.known[match.whole.key].tokens
            require(shared.get(match.whole.key) == len(tokens) == max(free), f"{match}: whole ones have {free} tokens")
            require(match.whole.key in self.free(), f"{match} offers one in use")
        return match

    def use(self, op: Operation) -> None:
        match = self.match(op)
        used = (match.entry, match.whole, None)[op.pick % 3]
        use = self.index.record(match, used)
        expected = 0 if used is None else common(self.known[used.key].tokens, op.tokens)
        require(use.n_tokens == expected, f"{use} of {expected} tokens")

    def extend(self, op: Operation) -> None:
        if (key := self.picked(op)) is not None:
            self.known[key].tokens += op.tokens
            self.known[key].n_pages = op.n
            self.index.extend(key, op.tokens, op.n)

    def truncate(self, op: Operation) -> None:
        if (key := self.picked(op)) is not None:
            tokens = self.known[key].tokens
            del tokens[1 + op.n % len(tokens) :]
            self.known[key].n_pages = op.n
            self.index.truncate(key, len(tokens), op.n)

    def remove(self, op: Operation) -> None:
        if (key := self.picked(op)) is not None:
            del self.known[key]
            self.index.remove(key)

    def pin(self, op: Operation) -> None:
        if (key := self.picked(op)) is not None:
            self.known[key].n_pins += 1
            self.index.pin(key)

    def unpin(self, op: Operation) -> None:
        pinned = [key for key, e in self.known.items() if e.n_pins]
        if pinned:
            key = pinned[op.pick % len(pinned)]
            self.known[key].n_pins -= 1
            self.index.unpin(key, was_used=bool(op.n % 2))

    def evict(self, op: Operation) -> None:
        n_freed = self.index.evict(op.n, self.give_up)
        require(n_freed >= op.n or not self.free(), f"{n_freed} pages of {op.n} came free, and more could")

    def fit(self, op: Operation) -> None:
        self.index.fit(self.give_up, op.n)
        n_held = sum(self.known[key].n_pages for key in self.free())
        require(n_held + op.n <= self.index.max_pages or not self.free(), f"{n_held} pages are held")

    def give_up(self, key: int) -> int:
        require(key in self.free(), f"{key} was evicted, but is in use or not there")
        require(key not in self.index, "it can still be found while it is given up")
        return self.known.pop(key).n_pages

    def free(self) -> set[int]:
        return {key for key, e in self.known.items() if e.n_pins == 0}

    def picked(self, op: Operation) -> int | None:
        keys = list(self.known)
        return keys[op.pick % len(keys)] if keys else None

    def compare(self) -> None:
        try:
            self.index.check()
        except InvariantError as error:
            raise Mismatch(str(error)) from error
        stats = self.index.stats()
        require(stats.n_entries == len(self.index) == len(self.known), "the number of entries")
        require(stats.n_pinned == len(self.known) - len(self.free()), "the number in use")
        require(stats.n_tokens == sum(len(e.tokens) for e in self.known.values()), "the number of tokens")
        prefixes = {(e.domain, *e.tokens[:n]) for e in self.known.values() for n in range(1, len(e.tokens) + 1)}
        require(stats.n_distinct_tokens == len(prefixes), "the number of distinct tokens")
        require(stats.n_pages == sum(e.n_pages for e in self.known.values()), "the number of pages")
        require(stats.n_held_pages == sum(self.known[key].n_pages for key in self.free()), "the pages held")
        for key, e in self.known.items():
            others = [o.tokens for k, o in self.known.items() if k != key and o.domain == e.domain]
            n_covered = max((common(e.tokens, tokens) for tokens in others), default=0)
            entry = self.index[key]
            require(entry.n_tokens == len(e.tokens) and entry.n_pins == e.n_pins, f"{entry} is {e}")
            require(entry.n_covered_tokens == n_covered, f"{entry}: {n_covered} of {e} are covered")


def random_operations(seed: int, n_operations: int) -> list[Operation]:
    """Operations over few tokens and short sequences, so that they share, branch and end in all ways."""
    rng = random.Random(seed)
    return [
        Operation(
            rng.choice(KINDS),
            rng.choice(DOMAINS),
            tuple(rng.choices((0, 1, 7), k=rng.randrange(9))),
            rng.randrange(100),
            rng.randrange(12),
        )
        for _ in range(n_operations)
    ]


class Spy:
    """A policy that notes what it is told, and names the entry it was told to name."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []
        self.choice: Entry[int] | None = None

    def added(self, entry: Entry[int]) -> None:
        self.told.append(("added", entry.key))

    def withdrawn(self, entry: Entry[int]) -> None:
        self.told.append(("withdrawn", entry.key))

    def used(self, entry: Entry[int], before: object, is_own: bool) -> None:
        self.told.append(("used", entry.key, is_own))

    def evicted(self, entry: Entry[int], now: float) -> None:
        self.told.append(("evicted", entry.key))

    def changed(self, entry: Entry[int]) -> None:
        self.told.append(("changed", entry.key))

    def victim(self, now: float, freed_by: object) -> Entry[int] | None:
        return self.choice


def pair(policy: EvictionPolicy[int] | None = None, max_pages: int = 30) -> Pair:
    clock = ManualClock()
    return Pair(PrefixIndex(max_pages, clock, policy), clock)
