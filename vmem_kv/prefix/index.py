"""The prefix index: which cached sequence begins as this prompt does, who uses it, and which one goes first.

    match ─▶ record ─▶ pin ─▶ (the request runs) ─▶ extend, or insert ─▶ unpin
    on need ─▶ evict, fit: the policy's victims, never one in use, until enough pages came free

Guarantees: a match is exact to the token, since tokens are compared and no hash is trusted. Nothing is found across
sharing domains, which have nothing in common here but the bound. A call that raises `UsageError` changed nothing. Time
is the clock's that was passed in, and with a counter as clock everything repeats.
Assumptions: one thread at a time. The caller owns the memory, and tells the truth about which tokens' K and V it holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic

from vmem_kv.errors import ConfigError, InvariantError, UsageError
from vmem_kv.prefix.entry import Entry, K, Match, PageCounts, PrefixStats, TokenIds, Use
from vmem_kv.prefix.policy import EvictionPolicy, lru
from vmem_kv.prefix.tree import TOKEN_BYTES, Node, check, encode, place, split, vacate, walk

Clock = Callable[[], float]
"""Returns the time in any unit; never goes back. A counter of steps will do."""


class PrefixIndex(Generic[K]):
    """Cached sequences by their tokens, one radix tree for each sharing domain.

    Args:
        max_pages: What entries that nobody uses may hold; `fit` enforces it.
        clock: The time, for the policy.
        policy: Which entry goes first; least recently used with a protected share, if None.
        pages: The owner of the memory, who knows which pages are shared. If None, entries share none: each holds the
            `n_pages` that it was given.

    Raises:
        ConfigError: `max_pages` is negative.
    """

    def __init__(
        self,
        max_pages: int,
        clock: Clock,
        policy: EvictionPolicy[K] | None = None,
        pages: PageCounts[K] | None = None,
    ) -> None:
        if max_pages < 0:
            raise ConfigError(f"the prefix index's bound is {max_pages} pages; give 0 or more")
        self.max_pages = max_pages
        self._clock = clock
        self._policy: EvictionPolicy[K] = lru() if policy is None else policy
        self._pages: PageCounts[K] = _Unshared(self) if pages is None else pages
        self._roots: dict[str, Node[Entry[K]]] = {}
        self._entries: dict[K, Entry[K]] = {}
        self._n_unused_pages = 0  # sum of `n_pages` over entries without pins
        self._n_distinct_tokens = 0
        self._n_lookups = self._n_hits = self._n_whole_hits = 0
        self._n_looked_up_tokens = self._n_hit_tokens = 0
        self._n_inserted = self._n_evicted = self._n_evicted_pages = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __getitem__(self, key: K) -> Entry[K]:
        """Return an entry by its key; `UsageError` if there is none."""
        entry = self._entries.get(key)
        if entry is None:
            raise UsageError(f"no entry {key!r} is in the prefix index; insert it first, and remove it once")
        return entry

    # Looking up

    def match(self, domain: str, token_ids: TokenIds) -> Match[K]:
        """Find the longest common prefix of `token_ids` with any entry of `domain`. Changes nothing, counts nothing.

        A prompt that must leave its last token to be computed is given without it.

        Raises:
            UsageError: `token_ids` are no integers from 0 to 2**32 - 1.
        """
        query = encode(token_ids)
        root = self._roots.get(domain)
        if root is None:
            return Match(_n_tokens(query), 0, None, None)
        node, child, n_common = walk(root, query)
        n_tokens = node.depth + n_common
        whole = next((free for above in node.path() if (free := _free_end(above)) is not None), None)
        if n_tokens == 0:
            entry = None
        elif child is not None:
            entry = child.last_used()
        else:
            entry = _free_end(node) or node.last_used()
        return Match(_n_tokens(query), n_tokens, entry, whole)

    def record(self, match: Match[K], used: Entry[K] | None) -> Use:
        """Count a look-up, once for each request that was admitted, and tell the policy what was used.

        Used as a whole, an entry is taken to be adopted. Used in part, it is taken to be forked: its hits go to the
        fork, which goes on with those tokens, and what only the old entry has is left to age.

        Args:
            match: What `match` returned.
            used: `match.entry` or `match.whole`, whichever was built on; None if the request starts from nothing.

        Returns:
            What need not be computed. Give it to `insert` for a fork.

        Raises:
            UsageError: `used` is neither of them, or has left the index since.
        """
        if used is None:
            n_tokens = 0
        elif used is match.entry:
            n_tokens = match.n_tokens
        elif used is match.whole:
            n_tokens = used.n_tokens
        else:
            raise UsageError(f"{used!r} is not what was matched; give the match's entry or its whole, or None")
        n_hits = 0
        if used is not None:
            if self._entries.get(used.key) is not used or used.n_tokens < n_tokens:
                raise UsageError(f"{used!r} has left the index or shrunk since it was matched; match again")
            n_hits = self._use(used, n_tokens)
            self._n_hits += 1
            self._n_whole_hits += n_tokens == used.n_tokens
        self._n_lookups += 1
        self._n_looked_up_tokens += match.n_query_tokens
        self._n_hit_tokens += n_tokens
        return Use(n_tokens, n_hits)

    def _use(self, entry: Entry[K], n_tokens: int) -> int:
        """Note a use, and return the hits that a fork goes on with."""
        now = self._clock()
        is_own = n_tokens > entry.n_covered_tokens
        is_fork = n_tokens < entry.n_tokens
        before = entry.history(now)
        n_hits = entry.n_hits + 1 if is_own else 0
        if is_own:
            entry.n_hits = 0 if is_fork else n_hits
            entry.is_forked = is_fork
        entry.last_used_at = now
        entry.node.used(entry.key)
        self._policy.used(entry, before, is_own)
        return n_hits

    # What is cached

    def insert(
        self,
        domain: str,
        token_ids: TokenIds,
        key: K,
        n_pages: int,
        *,
        built_on: Use | None = None,
        is_pinned: bool = False,
    ) -> Entry[K]:
        """Register a sequence whose K and V exist, as the most recently used of its domain.

        Args:
            domain: Only look-ups in the same domain find it.
            token_ids: All of its tokens, at least one.
            key: The caller's name for it: its slot.
            n_pages: All pages under it, shared ones included.
            built_on: What `record` returned for the request that wrote it, if that was built on a fork.
            is_pinned: Whether a live request uses it; then it goes in with one pin.

        Raises:
            UsageError: The key is in the index, there is no token, or a value is out of range.
        """
        if key in self._entries:
            raise UsageError(f"entry {key!r} is in the prefix index already; extend it, or remove it first")
        tokens = encode(token_ids)
        if not tokens:
            raise UsageError(f"entry {key!r} has no tokens; insert a sequence once it has some")
        _require_pages(n_pages)
        root = self._roots.setdefault(domain, Node())
        node, n_new = place(root, tokens)
        entry = Entry(key, domain, node, n_pages, self._clock())
        entry.n_hits = 0 if built_on is None else built_on.n_hits
        self._entries[key] = entry
        self._n_distinct_tokens += n_new
        self._n_inserted += 1
        self._join(entry, node)
        if is_pinned:
            entry.n_pins = 1
        else:
            self._release(entry)
        return entry

    def extend(self, key: K, token_ids: TokenIds, n_pages: int) -> None:
        """Append tokens to an entry: the conversation went on in its slot. If nobody uses it, it was used just now.

        Args:
            key: The entry.
            token_ids: The new tokens only; none of them is fine.
            n_pages: All pages under it now.

        Raises:
            UsageError: There is no such entry, or a value is out of range.
        """
        entry = self[key]
        tokens = encode(token_ids)
        _require_pages(n_pages)
        node, n_new = place(entry.node, tokens)
        self._n_distinct_tokens += n_new
        self._move(entry, node, n_pages)

    def truncate(self, key: K, n_tokens: int, n_pages: int) -> None:
        """Keep only the first `n_tokens` tokens of an entry, because its K and V of the others are gone or will be.

        Call it before they are overwritten, so that no look-up finds them in between. If nobody uses the entry, it was
        used just now.

        Args:
            key: The entry.
            n_tokens: From 1 to what it has.
            n_pages: All pages under it then.

        Raises:
            UsageError: There is no such entry, or a value is out of range.
        """
        entry = self[key]
        if not 0 < n_tokens <= entry.n_tokens:
            raise UsageError(f"{entry!r} cannot be cut to {n_tokens} tokens; keep at least one, or remove it")
        _require_pages(n_pages)
        node = next(above for above in entry.node.path() if above.depth - above.n_label_tokens < n_tokens)
        if n_tokens < node.depth:
            node = split(node, n_tokens - (node.depth - node.n_label_tokens))
        self._move(entry, node, n_pages)

    def remove(self, key: K) -> Entry[K]:
        """Forget an entry, used or not: from now on nobody finds it. Its memory is the caller's business.

        Raises:
            UsageError: There is no such entry.
        """
        entry = self[key]
        if entry.n_pins == 0:
            self._withdraw(entry)
        del self._entries[key]
        self._leave(entry)
        root = self._roots[entry.domain]
        if not root.children:
            del self._roots[entry.domain]
        return entry

    # Use by live requests

    def pin(self, key: K) -> None:
        """Note that a live request uses an entry: it is no victim, and is not offered for adoption. Pins count.

        Raises:
            UsageError: There is no such entry.
        """
        entry = self[key]
        if entry.n_pins == 0:
            self._withdraw(entry)
        entry.n_pins += 1

    def unpin(self, key: K, *, was_used: bool = True) -> None:
        """Take one pin back. Without any left, the entry may be evicted and adopted again.

        Args:
            key: The entry.
            was_used: Whether it was used until now. False for one that was pinned only to be spared meanwhile: the time
                of its last use stays, and what is recorded next finds the age that it had.

        Raises:
            UsageError: There is no such entry, or it has no pin.
        """
        entry = self[key]
        if entry.n_pins == 0:
            raise UsageError(f"{entry!r} is not pinned; unpin once for each pin")
        entry.n_pins -= 1
        if entry.n_pins == 0:
            self._release(entry, was_used=was_used)

    # Giving up

    def victim(self) -> Entry[K] | None:
        """Return the entry that the policy would give up first; None if all are in use. Changes no entry.

        Raises:
            InvariantError: The policy named an entry that is in use or not in the index.
        """
        entry = self._policy.victim(self._clock(), self._pages.freed_by)
        if entry is not None and (entry.n_pins > 0 or self._entries.get(entry.key) is not entry):
            raise InvariantError(f"the eviction policy chose {entry!r}, which is in use or not in the index")
        return entry

    def evict(self, n_pages: int, give_up: Callable[[K], int]) -> int:
        """Give up entries until `n_pages` came free or none is left that nobody uses.

        Args:
            n_pages: How many are needed; with 0 nothing happens.
            give_up: Frees what lies under a key, and returns how many pages that freed. The entry has left the index by
                then, so that nobody finds it; if `give_up` raises, it stays out, and the exception goes to the caller.

        Returns:
            How many pages came free.
        """
        n_freed = 0
        while n_freed < n_pages and (entry := self.victim()) is not None:
            n_freed += self._give_up(entry, give_up)
        return n_freed

    def fit(self, give_up: Callable[[K], int], n_more_pages: int = 0) -> int:
        """Evict until entries that nobody uses hold at most `max_pages`, with `n_more_pages` to come. See `evict`.

        Returns:
            How many pages came free.
        """
        n_freed = 0
        while self._pages.held() + n_more_pages > self.max_pages and (entry := self.victim()) is not None:
            n_freed += self._give_up(entry, give_up)
        return n_freed

    def _give_up(self, entry: Entry[K], give_up: Callable[[K], int]) -> int:
        self._policy.evicted(entry, self._clock())
        self.remove(entry.key)
        self._n_evicted += 1
        n_freed = give_up(entry.key)
        self._n_evicted_pages += n_freed
        return n_freed

    # Figures

    def stats(self) -> PrefixStats:
        """Return a snapshot; takes time in proportion to the entries."""
        return PrefixStats(
            n_entries=len(self._entries),
            n_pinned=sum(entry.n_pins > 0 for entry in self._entries.values()),
            n_tokens=sum(entry.n_tokens for entry in self._entries.values()),
            n_distinct_tokens=self._n_distinct_tokens,
            n_pages=sum(entry.n_pages for entry in self._entries.values()),
            n_held_pages=self._pages.held(),
            max_pages=self.max_pages,
            n_lookups=self._n_lookups,
            n_hits=self._n_hits,
            n_whole_hits=self._n_whole_hits,
            n_looked_up_tokens=self._n_looked_up_tokens,
            n_hit_tokens=self._n_hit_tokens,
            n_inserted=self._n_inserted,
            n_evicted=self._n_evicted,
            n_evicted_pages=self._n_evicted_pages,
        )

    def check(self) -> None:
        """Walk everything and compare the books.

        Raises:
            InvariantError: A tree is not sound, or an entry is not where it says it is.
        """
        n_ends = n_distinct_tokens = 0
        for domain, root in self._roots.items():
            n_distinct_tokens += check(root)
            if not root.children or root.ends:
                raise InvariantError(f"domain {domain!r} is kept without entries, or has one without tokens")
            nodes = [root]
            while nodes:
                node = nodes.pop()
                nodes.extend(node.children.values())
                n_ends += len(node.ends)
        for key, entry in self._entries.items():
            *_, root = entry.node.path()
            if entry.node.ends.get(key) is not entry or self._roots.get(entry.domain) is not root:
                raise InvariantError(f"{entry!r} is not in its domain's tree")
        if n_ends != len(self._entries):
            raise InvariantError(f"the trees have {n_ends} ends for {len(self._entries)} entries")
        if n_distinct_tokens != self._n_distinct_tokens:
            raise InvariantError(f"the trees hold {n_distinct_tokens} tokens, the books say {self._n_distinct_tokens}")
        n_unused_pages = sum(entry.n_pages for entry in self._entries.values() if entry.n_pins == 0)
        if n_unused_pages != self._n_unused_pages:
            raise InvariantError(f"unused entries hold {n_unused_pages} pages, the books say {self._n_unused_pages}")

    # Below: an entry's place in its tree, and in the policy's ranking

    def _join(self, entry: Entry[K], node: Node[Entry[K]]) -> None:
        entry.node = node
        node.ends[entry.key] = entry
        node.used(entry.key)
        self._tell(node)

    def _leave(self, entry: Entry[K]) -> None:
        node = entry.node
        del node.ends[entry.key]
        self._n_distinct_tokens -= vacate(node)
        self._tell(node)

    def _move(self, entry: Entry[K], node: Node[Entry[K]], n_pages: int) -> None:
        is_unused = entry.n_pins == 0
        if is_unused:
            self._withdraw(entry)
        if node is not entry.node:
            node.ends[entry.key] = entry  # first, so that leaving does not vacate where it goes
            self._leave(entry)
            self._join(entry, node)
        entry.n_pages = n_pages
        if is_unused:
            self._release(entry)

    def _tell(self, node: Node[Entry[K]]) -> None:
        """Tell the policy whose `n_covered_tokens` may have changed, after something began or ceased to end at `node`.

        With three ends or three children, one more or less changes nothing: so this is quick at the busiest node.
        """
        for near in (node, node.parent):
            if near is None:
                continue
            for one in (near, *(near.children.values() if len(near.children) < 3 else ())):
                if len(one.ends) < 3:
                    for entry in one.ends.values():
                        self._policy.changed(entry)

    def _release(self, entry: Entry[K], *, was_used: bool = True) -> None:
        if was_used:
            entry.last_used_at = self._clock()
        self._n_unused_pages += entry.n_pages
        self._policy.added(entry)

    def _withdraw(self, entry: Entry[K]) -> None:
        self._n_unused_pages -= entry.n_pages
        self._policy.withdrawn(entry)


class _Unshared(PageCounts[K]):
    """Page counts where every entry has its pages for itself."""

    def __init__(self, index: PrefixIndex[K]) -> None:
        self._index = index

    def held(self) -> int:
        return self._index._n_unused_pages

    def freed_by(self, key: K) -> int:
        return self._index[key].n_pages


def _n_tokens(tokens: bytes) -> int:
    return len(tokens) // TOKEN_BYTES


def _free_end(node: Node[Entry[K]]) -> Entry[K] | None:
    """The last used of the entries that end at a node and that nobody uses."""
    return next((entry for entry in reversed(node.ends.values()) if entry.n_pins == 0), None)


def _require_pages(n_pages: int) -> None:
    if n_pages < 0:
        raise UsageError(f"an entry cannot hold {n_pages} pages; give 0 or more")
