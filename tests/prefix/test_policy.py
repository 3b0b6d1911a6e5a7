"""Who goes first, under either policy, and what is protected."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from vmem_kv.errors import ConfigError
from vmem_kv.prefix import (
    EvictionPolicy,
    History,
    PrefixIndex,
    RecomputeCost,
    ReuseEstimate,
    cost_aware,
    lru,
)
from vmem_kv.testing.clock import ManualClock

POLICIES: list[Callable[[float], EvictionPolicy[int]]] = [lru, cost_aware]


class Cache:
    """An index whose entries are one page for each 10 tokens, and a clock that goes on by itself."""

    def __init__(self, policy: EvictionPolicy[int], max_pages: int = 1000) -> None:
        self.clock = ManualClock()
        self.index = PrefixIndex[int](max_pages, self.clock, policy)
        self.gone: list[int] = []

    def add(self, key: int, n_tokens: int = 10) -> None:
        self.clock.advance(1)
        self.index.insert("a", [key] * n_tokens, key, n_tokens // 10)

    def use(self, key: int) -> None:
        self.clock.advance(1)
        match = self.index.match("a", [key] * self.index[key].n_tokens)
        self.index.record(match, self.index[key])

    def evict(self, n_pages: int = 1) -> list[int]:
        del self.gone[:]
        self.index.evict(n_pages, self.give_up)
        return list(self.gone)

    def fit(self) -> None:
        self.index.fit(self.give_up)

    def give_up(self, key: int) -> int:
        self.gone.append(key)
        return 1


def test_lru_gives_up_the_least_recently_used() -> None:
    cache = Cache(lru(0))
    for key in (1, 2, 3, 4, 5):
        cache.add(key)
    cache.use(1)
    cache.index.pin(2)
    cache.clock.advance(1)
    cache.index.unpin(2)
    cache.clock.advance(1)
    cache.index.extend(3, [3], 1)
    assert cache.evict(5) == [4, 5, 1, 2, 3]


@pytest.mark.parametrize("policy", POLICIES)
def test_nobody_is_given_up_while_in_use(policy: Callable[[float], EvictionPolicy[int]]) -> None:
    cache = Cache(policy(0.5))
    for key in range(6):
        cache.add(key)
        cache.use(key)
    for key in (0, 1, 4):
        cache.index.pin(key)
    assert sorted(cache.evict(100)) == [2, 3, 5]
    assert cache.index.victim() is None


@pytest.mark.parametrize("policy", POLICIES)
def test_a_flood_of_unique_prompts_leaves_the_protected_share(
    policy: Callable[[float], EvictionPolicy[int]],
) -> None:
    def survivors(share: float) -> int:
        cache = Cache(policy(share), max_pages=100)
        for key in range(40):
            cache.add(key)
            cache.use(key)
        for key in range(1000, 1500):
            cache.add(key)
            cache.fit()
        assert len(cache.index) == 100
        return sum(key in cache.index for key in range(40))

    assert survivors(0.25) == 25
    assert survivors(1) == 40
    assert survivors(0) < 5, "without a share the flood wins, so the test can fail"


def test_the_protected_may_not_hold_more_than_their_share() -> None:
    cache = Cache(lru(0.25), max_pages=100)
    for key in range(100):
        cache.add(key)
        cache.use(key)
    for key in range(1000, 1060):
        cache.add(key)
        cache.fit()
    assert [key for key in range(100) if key in cache.index] == list(range(60, 100)), "oldest first, as all are ranked"


def test_a_share_that_is_none_is_refused() -> None:
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="protected share"):
            lru(share)
        with pytest.raises(ConfigError, match="protected share"):
            cost_aware(share)


def test_late_tokens_cost_more() -> None:
    cost = RecomputeCost(1000)
    assert cost(0, 2000) == 2000 * 2
    assert cost(1000, 2000) > cost(0, 1000)
    assert cost(0, 500) + cost(500, 2000) == pytest.approx(cost(0, 2000))
    assert RecomputeCost(float("inf"))(5, 25) == 20
    with pytest.raises(ConfigError, match="even_at_tokens"):
        RecomputeCost(0)


def test_cost_aware_keeps_what_is_dear_to_compute_for_each_page() -> None:
    cache = Cache(cost_aware(0, RecomputeCost(100)))
    cache.add(1, 1000)  # a page of this one costs six times as much
    cache.add(2, 10)
    cache.clock.advance(100)
    assert cache.evict(2) == [2, 1]
    cache = Cache(cost_aware(0, RecomputeCost(float("inf"))))
    cache.add(1, 1000)
    cache.add(2, 10)
    cache.clock.advance(100)
    assert cache.evict(2) == [1, 2]


def test_cost_aware_gives_up_first_what_others_hold_too() -> None:
    clock = ManualClock()
    index = PrefixIndex[int](100, clock, cost_aware(0))
    index.insert("a", [5] * 50, 1, 5)
    clock.advance(10)
    index.insert("a", [6] * 50, 2, 5)
    index.insert("a", [6] * 80, 3, 8)
    assert index.victim() is index[2]
    index.remove(3)
    assert index.victim() is index[1]


def test_cost_aware_gives_up_first_what_frees_more_for_the_same_work() -> None:
    class Pages:
        def held(self) -> int:
            return 0

        def freed_by(self, key: int) -> int:
            return {1: 0, 2: 9}[key]

    clock = ManualClock()
    index = PrefixIndex[int](100, clock, cost_aware(0), Pages())
    index.insert("a", [5] * 50, 1, 9)
    index.insert("a", [6] * 70, 2, 9)
    assert index.victim() is index[2]


def test_what_was_seen_is_believed() -> None:
    estimate = ReuseEstimate()
    never, often = History(0, False, 100, 30.0), History(3, False, 100, 30.0)
    assert estimate.chance(never) == estimate.chance(often)
    for _ in range(300):
        estimate.saw_end(never, is_hit=False)
        estimate.saw_end(often, is_hit=True)
    assert estimate.chance(often) > 20 * estimate.chance(never)
    assert estimate.chance(often._replace(age=1e9)) < estimate.chance(never)
    assert estimate.chance(often._replace(age=0.0)) > estimate.chance(often)

    for _ in range(20_000):  # times change
        estimate.saw_end(never, is_hit=True)
        estimate.saw_end(often, is_hit=False)
    assert estimate.chance(never) > estimate.chance(often)


def test_before_anything_is_seen_the_chance_falls_with_age() -> None:
    estimate = ReuseEstimate()
    chances = [estimate.chance(History(0, False, 10, 2.0**n)) for n in range(12)]
    assert chances == pytest.approx([chances[0] / 2**n for n in range(12)])


def test_ages_at_which_nobody_comes_back_are_learnt() -> None:
    """Sessions come back after 64 to 128, or not at all: who is older is worth little, who is younger is waited for."""

    def at(age: float) -> float:
        return estimate.chance(History(0, False, 10, age))

    estimate = ReuseEstimate()
    for n in range(400):
        estimate.saw_end(History(0, False, 10, 70.0 + n % 50), is_hit=True)
        estimate.saw_end(History(0, False, 10, 500.0), is_hit=False)
    assert at(16) == at(100), "an entry on its way there has no less"
    assert at(100) > 100 * at(200), "before anything was seen this was twice"
    assert at(200) >= at(400)


def test_no_older_entry_of_a_group_has_a_greater_chance() -> None:
    rng = random.Random(3)
    estimate = ReuseEstimate()
    for _ in range(2000):
        estimate.saw_end(History(rng.randrange(5), False, 10, rng.lognormvariate(3, 3)), is_hit=rng.random() < 0.3)
        if rng.random() < 0.05:
            ages = sorted(rng.lognormvariate(3, 4) for _ in range(20))
            chances = [estimate.chance(History(1, False, 10, age)) for age in ages]
            assert chances == sorted(chances, reverse=True)


def test_groups_and_ages_that_nobody_saw_are_like_all() -> None:
    estimate = ReuseEstimate()
    for _ in range(64):
        estimate.saw_end(History(0, False, 10, 5.0), is_hit=True)
    assert estimate.chance(History(0, True, 10**6, 4.0)) == pytest.approx(estimate.chance(History(0, False, 10, 4.0)))
    for age in (0.0, 1e-9, 1e30):
        estimate.saw_end(History(0, False, 10, age), is_hit=False)
        assert estimate.chance(History(0, False, 10, age)) > 0
    for wrong in ({"half_life": 0}, {"prior_hits": 0.0}):
        with pytest.raises(ConfigError, match="above 0"):
            ReuseEstimate(**wrong)


def tokens_reused(policy: EvictionPolicy[int]) -> int:
    """Conversations that go on, between single long prompts that never do, in a cache that cannot hold all of them."""
    clock = ManualClock()
    index = PrefixIndex[int](60, clock, policy)
    n_reused = key = 0

    def give_up(key: int) -> int:
        return n_pages.pop(key)

    n_pages: dict[int, int] = {}
    for turn in range(1, 40):
        for talk in range(8):
            clock.advance(1)
            tokens = [talk] * 10 * turn
            match = index.match("a", tokens)
            use = index.record(match, match.entry)
            n_reused += use.n_tokens
            if match.whole is None:
                key += 1
                n_pages[key] = 1 + turn // 10
                index.insert("a", tokens, key, n_pages[key], built_on=use)
            else:
                n_pages[match.whole.key] = 1 + turn // 10
                index.extend(match.whole.key, tokens[use.n_tokens :], 1 + turn // 10)
            index.fit(give_up)
        for single in range(6):
            clock.advance(1)
            key += 1
            n_pages[key] = 8
            index.insert("a", [1000 + turn * 8 + single] * 80, key, 8)
            index.fit(give_up)
    return n_reused


def test_cost_aware_beats_lru_where_some_come_back_and_some_never_do() -> None:
    plain = tokens_reused(lru(0))
    assert plain > 0
    assert tokens_reused(cost_aware(0)) > 2 * plain
    assert tokens_reused(lru(0.5)) > 2 * plain, "the protected share alone helps as well"
