"""Random operations against the reference; and faults that the reference must see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmem_kv.errors import InvariantError
from vmem_kv.prefix import Entry, EvictionPolicy, Match, PrefixIndex, cost_aware, lru, tree
from vmem_kv.prefix import index as index_module
from vmem_kv.testing.clock import ManualClock

from ..steady import STEADY
from .reference import DOMAINS, KINDS, Mismatch, Operation, Pair, common, pair, random_operations

POLICIES: dict[str, Callable[[], EvictionPolicy[int]]] = {
    "lru": lru,
    "lru, nothing protected": lambda: lru(0),
    "cost": cost_aware,
    "cost, all protected": lambda: cost_aware(1),
}

OPERATIONS = st.lists(
    st.builds(
        Operation,
        st.sampled_from(KINDS),
        st.sampled_from(DOMAINS),
        st.lists(st.sampled_from((0, 1, 2**32 - 1)), max_size=8).map(tuple),
        st.integers(0, 99),
        st.integers(0, 11),
    ),
    max_size=40,
)


@pytest.mark.parametrize("policy", POLICIES)
@settings(STEADY, max_examples=60)
@given(operations=OPERATIONS)
def test_any_operations(policy: str, operations: list[Operation]) -> None:
    pair(POLICIES[policy]()).run(operations)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(4))
def test_many_operations(policy: str, seed: int) -> None:
    pair(POLICIES[policy]()).run(random_operations(seed, 400))


@STEADY
@given(
    left=st.lists(st.integers(0, 3), max_size=40),
    right=st.lists(st.integers(0, 3), max_size=40),
    n_shared=st.integers(0, 300),
    n_before=st.integers(0, 3),
)
def test_the_first_difference(left: list[int], right: list[int], n_shared: int, n_before: int) -> None:
    left, right = [5] * n_shared + left, [5] * n_shared + right
    query = tree.encode([9] * n_before + right)
    assert tree.n_common_tokens(tree.encode(left), query, n_before * tree.TOKEN_BYTES) == common(left, right)


def test_tokens_that_differ_in_one_byte_only() -> None:
    for byte in range(4):
        index = PrefixIndex[int](10, ManualClock())
        index.insert("a", [1, 2, 3, 4], 1, 1)
        assert index.match("a", [1, 2, 3 ^ (1 << 8 * byte), 4]).n_tokens == 2


# Planted faults


class WithoutDomains(PrefixIndex[int]):
    def match(self, domain: str, token_ids: Any) -> Match[int]:
        matches = [super(WithoutDomains, self).match(other, token_ids) for other in DOMAINS]
        return max(matches, key=lambda match: match.n_tokens)


class WithoutPins(PrefixIndex[int]):
    """Does not withdraw what is pinned, and does not look at what it gives up."""

    def pin(self, key: int) -> None:
        self[key].n_pins += 1

    def victim(self) -> Entry[int] | None:
        return next(iter(self._entries.values()), None)


def caught(make: Callable[[], Pair]) -> bool:
    for seed in range(5):
        try:
            make().run(random_operations(seed, 300))
        except Mismatch:
            return True
    return False


def of(kind: type[PrefixIndex[int]]) -> Pair:
    clock = ManualClock()
    return Pair(kind(30, clock), clock)


def test_the_reference_finds_nothing_wrong_with_the_index_itself() -> None:
    assert not caught(lambda: of(PrefixIndex))


def test_a_domain_that_is_ignored_is_caught() -> None:
    assert caught(lambda: of(WithoutDomains))


def test_evicting_what_is_in_use_is_caught() -> None:
    assert caught(lambda: of(WithoutPins))


def trusted(label: bytes, query: bytes, offset: int) -> int:
    """Take the whole edge for equal because its key was found."""
    return min(len(label), len(query) - offset) // tree.TOKEN_BYTES


def test_trusting_the_key_of_an_edge_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "n_common_tokens", trusted)
    assert caught(pair)


def test_a_cascade_left_unmerged_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "vacate", lambda node: 0)
    assert caught(pair)


class Colliding(dict[bytes, Any]):
    """Edges by a hash that is the same for all tokens, and believed: any key finds the one edge that came last."""

    def get(self, key: object, default: Any = None) -> Any:
        return next(reversed(self.values()), default)


def wrong_matches() -> int:
    """Build an index, let all of its look-ups collide, and count matches that are not there."""
    n_wrong = 0
    for seed in range(20):
        operations = random_operations(seed, 60)
        index = PrefixIndex[int](100, ManualClock())
        sequences = [op.tokens for op in operations[:30] if op.tokens]
        for key, tokens in enumerate(sequences):
            index.insert("a", tokens, key, 1)
        nodes = [index._roots["a"]]
        while nodes:
            node = nodes.pop()
            nodes += node.children.values()
            node.children = Colliding(node.children)
        for op in operations:
            match = index.match("a", op.tokens)
            if match.entry is not None:
                n_wrong += common(sequences[match.entry.key], op.tokens) < match.n_tokens
            if match.whole is not None:
                n_wrong += sequences[match.whole.key] != op.tokens[: match.whole.n_tokens]
    return n_wrong


def test_a_hash_forced_to_a_constant_matches_nothing_wrong() -> None:
    assert wrong_matches() == 0


def test_a_hash_forced_to_a_constant_and_trusted_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "n_common_tokens", trusted)
    assert wrong_matches() > 0


def test_the_index_checks_its_own_books() -> None:
    index = PrefixIndex[int](10, ManualClock())
    entry = index.insert("a", [1, 2, 3], 1, 1)
    index.insert("a", [1, 2, 4], 2, 1)
    index.check()

    entry.node.label += b"\0"
    with pytest.raises(InvariantError, match="not sound"):
        index.check()
    entry.node.label = entry.node.label[:-1]
    entry.n_pages += 1
    with pytest.raises(InvariantError, match="hold 3 pages"):
        index.check()
    entry.n_pages -= 1
    entry.domain = "b"
    with pytest.raises(InvariantError, match="not in its domain"):
        index.check()
    entry.domain = "a"
    index.check()
