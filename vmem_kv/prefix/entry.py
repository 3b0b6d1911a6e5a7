"""What the index speaks in: entries, matches, page counts and the snapshot of its figures.

Guarantees: plain data. Assumes that only the index writes to an `Entry`; everybody may read it.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeAlias, TypeVar

from vmem_kv.prefix.tree import Node

TokenIds: TypeAlias = "Sequence[int] | array[int]"
"""Token ids from 0 to 2**32 - 1. An `array("I")`, or whatever has such a buffer, is taken over without a loop."""

K = TypeVar("K", bound=Hashable)
"""The caller's name of a cached sequence: a `SlotId`, for example."""

K_contra = TypeVar("K_contra", contravariant=True)


class Entry(Generic[K]):
    """A cached sequence: the K and V of its first `n_tokens` tokens exist.

    The same object lives as long as its key is in the index, while its attributes change.
    """

    __slots__ = ("domain", "is_forked", "key", "last_used_at", "n_hits", "n_pages", "n_pins", "node")

    def __init__(self, key: K, domain: str, node: Node[Entry[K]], n_pages: int, now: float) -> None:
        self.key = key
        self.domain = domain
        self.node = node  # where its tokens end
        self.n_pages = n_pages  # as the caller last gave them: all pages under it, shared ones included
        self.n_pins = 0  # live requests that use it
        self.n_hits = 0  # uses of tokens that no other entry had, by requests that went on in it or that it forked from
        self.is_forked = False  # whether the last of these went on in a fork: then only its tail is its own
        self.last_used_at = now  # in the clock's units

    @property
    def n_tokens(self) -> int:
        """Tokens that it holds."""
        return self.node.depth

    @property
    def n_covered_tokens(self) -> int:
        """Leading tokens that other entries hold as well: what would still be cached if this entry were gone."""
        node = self.node
        if node.children or len(node.ends) > 1:
            return node.depth
        return node.depth - node.n_label_tokens

    @property
    def n_own_tokens(self) -> int:
        """Tokens that would have to be computed again if this entry were gone."""
        return self.n_tokens - self.n_covered_tokens

    def history(self, now: float) -> History:
        """Return what is known of its use at a time."""
        return History(self.n_hits, self.is_forked, self.n_own_tokens, now - self.last_used_at)

    def __repr__(self) -> str:
        return f"Entry(key={self.key!r}, domain={self.domain!r}, n_tokens={self.n_tokens}, n_pins={self.n_pins})"


@dataclass(frozen=True, slots=True)
class Match(Generic[K]):
    """What the index knows of a prompt. Good until the index changes."""

    n_query_tokens: int
    """Tokens that were looked up."""
    n_tokens: int
    """The longest common prefix of the prompt with any entry of its domain; 0 if nothing is shared."""
    entry: Entry[K] | None
    """An entry that begins with those tokens: fork it at `n_tokens`. None if `n_tokens` is 0.

    Of several, one that ends there and that nobody uses comes first, then the most recently used: hits gather at one
    entry, and the others age.
    """
    whole: Entry[K] | None
    """The longest entry that the prompt begins with and that nobody uses: it can be adopted as it is.

    It may be shorter than `n_tokens`: then the caller weighs computing the difference against copying a tail.
    """


class Use(NamedTuple):
    """What a request was built on."""

    n_tokens: int  # that need not be computed
    n_hits: int  # uses so far of what it goes on with, this one included; 0 if others have the same tokens


class History(NamedTuple):
    """What was known of an entry just before it was used or given up."""

    n_hits: int
    is_forked: bool
    n_own_tokens: int  # that no other entry had
    age: float  # since its last use


class PageCounts(Protocol[K_contra]):
    """What the owner of the memory knows of pages, since entries may share them.

    The index calls it while it looks for a victim, and never keeps what it answered.
    """

    def held(self) -> int:
        """Distinct pages that only the index keeps: under entries, and under nothing that a live request uses."""

    def freed_by(self, key: K_contra) -> int:
        """Pages that would come free if this entry alone were given up now; 0 if others share all of them."""


@dataclass(frozen=True, slots=True)
class PrefixStats:
    """One snapshot of the index. Counters run since it was built."""

    n_entries: int  # now
    n_pinned: int  # of them, in use by live requests
    n_tokens: int  # over all entries, each in full
    n_distinct_tokens: int  # in the tree: a prefix that several entries share counts once
    n_pages: int  # over all entries as the caller gave them, each in full
    n_held_pages: int  # distinct, under entries that nobody uses, as `PageCounts.held` says
    max_pages: int  # the bound on `n_held_pages`
    n_lookups: int  # recorded ones
    n_hits: int  # lookups whose match was used
    n_whole_hits: int  # of them, those whose entry the prompt began with, in full
    n_looked_up_tokens: int
    n_hit_tokens: int  # of them, those that were found and used
    n_inserted: int
    n_evicted: int
    n_evicted_pages: int  # that came free by eviction
