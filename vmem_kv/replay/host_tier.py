"""The second tier in books: prompts that the device gave up, as far as host memory holds them.

A prompt is parked by copying the stripes that the host does not have yet: those of a prefix that is there already are
shared, and a prompt that comes back to the device stays here, so that parking it again copies what is new.

Guarantees: no more pages than the budget; which prompt goes is the policy's choice, as on the device.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable

from vmem_kv.prefix import EvictionPolicy, PrefixIndex
from vmem_kv.replay.stripes import StripeBooks


class HostTier:
    """Parked prompts.

    Args:
        max_pages: The budget, in pages of the device.
        pages_per_stripe: As on the device.
        n_stripes: Stripes behind so many tokens.
        n_full_stripes: Stripes that so many tokens fill.
        clock: That of the device's index.
        policy: Which prompt goes first.
    """

    def __init__(
        self,
        max_pages: int,
        pages_per_stripe: int,
        *,
        n_stripes: Callable[[int], int],
        n_full_stripes: Callable[[int], int],
        clock: Callable[[], float],
        policy: EvictionPolicy[int],
    ) -> None:
        self.stripes = StripeBooks(pages_per_stripe)
        self.index: PrefixIndex[int] = PrefixIndex(max_pages, clock, policy, self.stripes)
        self._pages_per_stripe = pages_per_stripe
        self._n_stripes = n_stripes
        self._n_full_stripes = n_full_stripes
        self._next_key = 0

    @property
    def n_pages(self) -> int:
        """Distinct pages that are parked."""
        return self.stripes.n_stripes * self._pages_per_stripe

    def find(self, token_ids: array[int]) -> int:
        """Return how many leading tokens are parked here. Changes nothing."""
        return self.index.match("", token_ids).n_tokens

    def use(self, token_ids: array[int]) -> None:
        """Note that the longest prefix of these tokens was copied back."""
        match = self.index.match("", token_ids)
        self.index.record(match, match.entry)

    def park(self, token_ids: array[int]) -> int:
        """Take over a prompt that the device gives up; return how many stripes are copied for it.

        None are where it is here already, or where there is no room for it even if everything else goes.
        """
        match = self.index.match("", token_ids)
        if match.n_tokens == len(token_ids):
            return 0
        source = match.entry
        n_shared = self._n_full_stripes(match.n_tokens)
        n_new = self._n_stripes(len(token_ids)) - n_shared
        if source is not None:
            self.index.pin(source.key)
        n_short = self.n_pages + n_new * self._pages_per_stripe - self.index.max_pages
        n_freed = self.index.evict(max(0, n_short), self.stripes.drop)
        if source is not None:
            self.index.unpin(source.key)
        if n_freed < n_short:
            return 0
        key = self._next_key
        self._next_key += 1
        self.stripes.begin(key)
        if source is not None:
            self.stripes.fork(source.key, key, n_shared)
        self.stripes.grow(key, n_new)
        self.stripes.rest(key)
        self.index.insert("", token_ids, key, self.stripes.length(key) * self._pages_per_stripe)
        return n_new
