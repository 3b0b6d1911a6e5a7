"""What others would hold for the same sequences: rules, not implementations.

    maximum length   every sequence takes room for the longest one, as a static cache does
    power of two     a sequence takes the next power of two of its length, as a buffer does that doubles
    blocks of n      PagedAttention: the length, rounded up to n tokens

All of them take the whole budget when they open, in one allocation, and call no driver afterwards. The models favour
them: no memory of their own for tables, no copy while a buffer doubles (old and new side by side), no external
fragmentation between buffers of different sizes; the longest sequence is known ahead, to the token, and where nobody
grows nothing is left free for it. Prefixes are shared by none of the schemes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from vmem_kv.errors import OutOfAddressSpace, OutOfPages
from vmem_kv.replay.memory import Fit, Key, Shortage
from vmem_kv.traces.formats import Request
from vmem_kv.units import round_up

Rule = Callable[[int], int]
"""Tokens that are held for a sequence of so many tokens."""


def maximum_length(max_tokens: int) -> Rule:
    """Always room for `max_tokens`."""
    return lambda n_tokens: max_tokens


def power_of_two(n_tokens: int) -> int:
    """The next power of two, at least 16."""
    return max(16, 1 << (n_tokens - 1).bit_length())


def blocks_of(block_tokens: int) -> Rule:
    """Whole blocks."""
    return lambda n_tokens: round_up(n_tokens, block_tokens)


class RivalMemory:
    """A budget of tokens, held by a rule.

    Args:
        name: What tables call it.
        rule: How many tokens are held for a length.
        token_bytes: Bytes of one token.
        budget_bytes: What is taken at the start.
        max_tokens: The longest sequence that is served.
        headroom: Share of the budget that admission leaves to the running sequences; 0 where they never take more.
    """

    def __init__(
        self, name: str, rule: Rule, token_bytes: int, budget_bytes: int, *, max_tokens: int, headroom: float = 0.01
    ) -> None:
        self.name = name
        self.token_bytes = token_bytes
        self.allocator_ns: int | None = None
        self.n_batches = 1  # the allocation at the start
        self.n_driver_calls: int | None = 1
        self.n_peak_mappings = 0
        self.n_cached_tokens = self.n_restored_tokens = 0
        self.max_mappings: int | None = None
        self._rule = rule
        self._max_tokens = max_tokens
        self._budget_tokens = budget_bytes // token_bytes
        self._headroom_tokens = int(self._budget_tokens * headroom)
        self._held: dict[Key, int] = {}  # tokens per running sequence
        self._n_held = 0
        self._n_begun = 0

    @property
    def active_bytes(self) -> int:
        """What running sequences hold."""
        return self._n_held * self.token_bytes

    @property
    def mapped_bytes(self) -> int:
        """All of the budget."""
        return self.owned_bytes

    @property
    def owned_bytes(self) -> int:
        """All of the budget."""
        return self._budget_tokens * self.token_bytes

    def obstacle(self, n_tokens: int) -> Shortage | None:
        if n_tokens > self._max_tokens:
            return OutOfAddressSpace
        return OutOfPages if self._rule(n_tokens) > self._budget_tokens else None

    def lack(self, n_tokens: int, request: Request | None = None) -> Shortage | None:
        headroom = self._headroom_tokens if self._held else 0
        n_held = self._n_held + headroom + self._rule(n_tokens)
        return OutOfPages if n_held > self._budget_tokens else None

    def begin(self, n_tokens: int, expected_tokens: int, request: Request | None = None) -> Key:
        self._n_begun += 1
        key = Key(self._n_begun)
        self._take({key: self._rule(n_tokens)})
        return key

    def grow(self, lengths: Mapping[Key, int]) -> None:
        held = self._held
        short = {key: self._rule(n) for key, n in lengths.items() if n > held[key]}
        if short:
            self._take(short)

    def end(self, keys: Sequence[Key]) -> None:
        for key in keys:
            self._n_held -= self._held.pop(key)

    def n_at_once(self, lengths: Iterable[int]) -> Fit:
        """How many sequences of these lengths, in this order, the budget holds side by side."""
        fit, n_held = Fit(), 0
        for n_tokens in lengths:
            if self.obstacle(n_tokens) is None:
                n_held += self._rule(n_tokens)
                if n_held > self._budget_tokens:
                    return Fit(fit.n_sequences, is_full=True)
                fit = Fit(fit.n_sequences + 1)
        return fit

    def close(self) -> None:
        self._held.clear()

    def _take(self, wanted: Mapping[Key, int]) -> None:
        n_more = sum(wanted.values()) - sum(self._held.get(key, 0) for key in wanted)
        if self._n_held + n_more > self._budget_tokens:
            raise OutOfPages(f"{n_more} tokens more than {self._budget_tokens - self._n_held} that are free")
        self._held.update(wanted)
        self._n_held += n_more
