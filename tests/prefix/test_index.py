"""What the index promises, one promise a test."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vmem_kv.errors import ConfigError, InvariantError, UsageError
from vmem_kv.prefix import Entry, History, Match, PrefixIndex, Use
from vmem_kv.testing.clock import ManualClock

from .reference import Spy, pair


@pytest.fixture
def index() -> PrefixIndex[int]:
    return PrefixIndex(100, ManualClock())


def test_a_conversation_is_adopted_turn_by_turn(index: PrefixIndex[int]) -> None:
    index.insert("a", [1, 2, 3], 7, 1)
    match = index.match("a", [1, 2, 3, 4, 5])
    assert (match.n_tokens, match.entry, match.whole) == (3, index[7], index[7])
    assert index.record(match, match.whole) == Use(3, 1)
    index.pin(7)
    assert index.match("a", [1, 2, 3, 4, 5]).whole is None
    assert index.match("a", [1, 2, 3, 4, 5]).entry is index[7]
    index.extend(7, [4, 5, 6], 2)
    index.unpin(7)
    assert index.match("a", [1, 2, 3, 4, 5, 6, 7]).whole is index[7]
    stats = index.stats()
    assert (stats.n_lookups, stats.n_hits, stats.n_whole_hits) == (1, 1, 1)
    assert (stats.n_looked_up_tokens, stats.n_hit_tokens) == (5, 3)


def test_a_longer_match_does_not_hide_what_could_be_adopted(index: PrefixIndex[int]) -> None:
    index.insert("a", [1, 2, 3], 1, 1)
    index.insert("a", [1, 2, 3, 4, 9], 2, 1)
    match = index.match("a", [1, 2, 3, 4, 5])
    assert (match.n_tokens, match.entry, match.whole) == (4, index[2], index[1])
    assert index.record(match, match.whole).n_tokens == 3
    assert index.record(match, match.entry).n_tokens == 4
    assert index.stats().n_whole_hits == 1


def test_of_equals_the_free_one_and_then_the_last_used(index: PrefixIndex[int]) -> None:
    for key in (1, 2, 3):
        index.insert("a", [1, 2], key, 1)
    assert index.match("a", [1, 2, 3]).whole is index[3]
    index.pin(3)
    match = index.match("a", [1, 2, 3])
    assert match.entry is match.whole is index[2]
    index.insert("a", [1, 2, 8], 4, 1)
    index.insert("a", [1, 2, 9], 5, 1)
    assert index.match("a", [1, 2]).entry is index[2], "it ends there"
    for key in (1, 2, 3):
        index.remove(key)
    assert index.match("a", [1, 2]).entry is index[5], "the last used"
    index.record(index.match("a", [1, 2, 8]), index[4])
    assert index.match("a", [1, 2]).entry is index[4]


def test_looking_up_changes_nothing() -> None:
    spy = Spy()
    index = PrefixIndex[int](10, ManualClock(), spy)
    index.insert("a", [1, 2], 1, 1)
    before = index.stats(), list(spy.told)
    index.match("a", [1, 2, 3])
    index.match("b", [1])
    assert (index.stats(), spy.told) == before
    assert "b" not in index._roots


def test_domains_share_nothing(index: PrefixIndex[int]) -> None:
    index.insert("a", [1, 2, 3], 1, 1)
    assert index.match("b", [1, 2, 3]) == Match(3, 0, None, None)
    index.insert("b", [1, 2, 3], 2, 1)
    assert index.match("a", [1, 2, 3]).entry is index[1]
    assert index[1].n_covered_tokens == 0
    index.remove(1)
    assert index.match("a", [1, 2, 3]).entry is None
    assert list(index._roots) == ["b"], "an empty domain leaves nothing behind"


def test_a_cut_entry_is_found_no_further(index: PrefixIndex[int]) -> None:
    index.insert("a", [1, 2, 3, 4], 1, 4)
    index.truncate(1, 2, 2)
    assert index.match("a", [1, 2, 3, 4]).n_tokens == 2
    assert (index[1].n_tokens, index[1].n_pages, index.stats().n_held_pages) == (2, 2, 2)


def test_token_ids_in_every_form(index: PrefixIndex[int]) -> None:
    tokens = [0, 1, 2**31, 2**32 - 1]
    index.insert("a", tokens, 1, 1)
    forms: list[Any] = [tokens, tuple(tokens), array("I", tokens), array("Q", tokens)]
    forms += [np.array(tokens, dtype=np.uint32), np.array(tokens, dtype=np.int64), np.array(tokens * 2)[:4]]
    forms += [np.repeat(np.array(tokens, dtype=np.uint32), 2)[::2]]
    for form in forms:
        assert index.match("a", form).n_tokens == 4, form


WRONG_TOKENS: list[Any] = [[-1], [2**32], [1.5], ["1"], [None], "12", b"1234", 5, None, np.array([[1, 2]], np.uint32)]


@pytest.mark.parametrize("tokens", WRONG_TOKENS, ids=repr)
def test_what_is_no_token_id_is_refused(index: PrefixIndex[int], tokens: Any) -> None:
    index.insert("a", [1], 1, 1)
    calls: list[Callable[[], object]] = [
        lambda: index.match("a", tokens),
        lambda: index.insert("a", tokens, 2, 1),
        lambda: index.extend(1, tokens, 1),
    ]
    for call in calls:
        with pytest.raises(UsageError, match="token ids"):
            call()
    assert index[1].n_tokens == 1
    assert len(index) == 1
    index.check()


def test_misuse_is_refused_and_changes_nothing(index: PrefixIndex[int]) -> None:
    index.insert("a", [1, 2, 3], 1, 1)
    other = index.insert("a", [5], 2, 1)
    match = index.match("a", [1, 2])
    before = index.stats()
    calls: list[tuple[str, Callable[[], object]]] = [
        ("already", lambda: index.insert("a", [4], 1, 1)),
        ("no tokens", lambda: index.insert("new", [], 3, 1)),
        ("-1 pages", lambda: index.insert("new", [4], 3, -1)),
        ("-1 pages", lambda: index.extend(1, [4], -1)),
        ("-1 pages", lambda: index.truncate(1, 1, -1)),
        ("cut to 0", lambda: index.truncate(1, 0, 1)),
        ("cut to 4", lambda: index.truncate(1, 4, 1)),
        ("not pinned", lambda: index.unpin(1)),
        ("not what was matched", lambda: index.record(match, other)),
        *[
            ("no entry 9", call)
            for call in (
                lambda: index[9],
                lambda: index.extend(9, [1], 1),
                lambda: index.truncate(9, 1, 1),
                lambda: index.remove(9),
                lambda: index.pin(9),
                lambda: index.unpin(9),
            )
        ],
    ]
    for message, call in calls:
        with pytest.raises(UsageError, match=message):
            call()
    assert index.stats() == before
    assert list(index._roots) == ["a"]
    index.check()
    with pytest.raises(ConfigError, match="-1 pages"):
        PrefixIndex(-1, ManualClock())


def test_a_match_that_is_out_of_date_is_refused(index: PrefixIndex[int]) -> None:
    entry = index.insert("a", [1, 2, 3], 1, 1)
    match = index.match("a", [1, 2, 3])
    index.truncate(1, 2, 1)
    with pytest.raises(UsageError, match="match again"):
        index.record(match, entry)
    match = index.match("a", [1, 2])
    index.remove(1)
    index.insert("a", [1, 2, 3], 1, 1)
    with pytest.raises(UsageError, match="match again"):
        index.record(match, entry)
    assert index.stats().n_lookups == 0


def test_pins_count() -> None:
    spy = Spy()
    index = PrefixIndex[int](10, ManualClock(), spy)
    index.insert("a", [1], 1, 3, is_pinned=True)
    index.pin(1)
    index.unpin(1)
    assert "added" not in {what for what, *_ in spy.told}
    assert index.stats().n_held_pages == 0
    index.unpin(1)
    assert spy.told[-1] == ("added", 1)
    assert index.stats().n_held_pages == 3


@pytest.mark.parametrize(("was_used", "age"), [(True, 0.0), (False, 5.0)])
def test_sparing_an_entry_is_no_use_of_it(was_used: bool, age: float) -> None:
    ages: list[float] = []

    class Learns(Spy):
        def used(self, entry: Entry[int], before: object, is_own: bool) -> None:
            assert isinstance(before, History)
            ages.append(before.age)

    clock = ManualClock()
    index = PrefixIndex[int](10, clock, Learns())
    entry = index.insert("a", [1, 2], 1, 3)
    clock.advance(5)
    match = index.match("a", [1, 2])
    index.pin(1)
    index.unpin(1, was_used=was_used)
    index.record(match, entry)
    assert ages == [age]
    assert entry.last_used_at == clock()


def test_a_policy_that_names_what_is_in_use_is_stopped() -> None:
    spy = Spy()
    index = PrefixIndex[int](10, ManualClock(), spy)
    spy.choice = index.insert("a", [1], 1, 3)
    assert index.victim() is index[1]
    index.pin(1)
    with pytest.raises(InvariantError, match="in use"):
        index.evict(1, lambda key: 3)
    assert 1 in index
    index.remove(1)
    with pytest.raises(InvariantError, match="not in the index"):
        index.victim()


def test_evict_gives_up_as_much_as_is_needed(index: PrefixIndex[int]) -> None:
    for key in range(4):
        index.insert("a", [key], key, 2)
    gone: list[int] = []

    def give_up(key: int) -> int:
        assert key not in index
        gone.append(key)
        return 2

    assert index.evict(0, give_up) == 0
    assert index.evict(3, give_up) == 4
    assert gone == [0, 1]
    index.pin(2)
    assert index.evict(100, give_up) == 2, "what is in use stays"
    assert gone == [0, 1, 3]
    assert (index.stats().n_evicted, index.stats().n_evicted_pages) == (3, 6)


def test_what_cannot_be_given_up_is_not_found_again(index: PrefixIndex[int]) -> None:
    index.insert("a", [1], 1, 2)

    def give_up(key: int) -> int:
        raise OSError("stuck")

    with pytest.raises(OSError, match="stuck"):
        index.evict(1, give_up)
    assert 1 not in index
    index.check()


class Stripes:
    """An owner of memory whose sequences share pages: pages by key, each page with its number of owners."""

    def __init__(self) -> None:
        self.pages: dict[int, set[int]] = {}

    def held(self) -> int:
        return len(set().union(*self.pages.values()))

    def freed_by(self, key: int) -> int:
        return len(self.pages[key].difference(*(p for k, p in self.pages.items() if k != key)))

    def give_up(self, key: int) -> int:
        n_freed = self.freed_by(key)
        del self.pages[key]
        return n_freed


def test_shared_pages_are_bounded_once_and_freed_with_their_last_owner() -> None:
    stripes, clock = Stripes(), ManualClock()
    index = PrefixIndex[int](10, clock, pages=stripes)
    for key in range(3):
        clock.advance(1)
        stripes.pages[key] = {1, 2, 3, 4, 10 + key}
        index.insert("a", [1, 2, 3, 4, 10 + key], key, 5)
    assert (index.stats().n_pages, index.stats().n_held_pages) == (15, 7)
    assert index.fit(stripes.give_up) == 0
    assert len(index) == 3, "15 pages are 7 distinct ones, and these fit"
    assert index.fit(stripes.give_up, 4) == 1
    assert index.evict(2, stripes.give_up) == 6, "one from the first, and then all that the last one has"
    assert len(index) == 0


def test_a_fork_goes_on_with_the_hits(index: PrefixIndex[int]) -> None:
    old = index.insert("a", [1, 2, 3, 4], 1, 1)
    match = index.match("a", [1, 2, 3, 5])
    use = index.record(match, match.entry)
    assert use == Use(3, 1)
    assert (old.n_hits, old.is_forked) == (0, True)
    new = index.insert("a", [1, 2, 3, 5, 6], 2, 1, built_on=use)
    assert (new.n_hits, new.is_forked) == (1, False)
    match = index.match("a", [1, 2, 3, 7])
    assert index.record(match, match.entry) == Use(3, 0), "both have these three, so neither is worth more for it"
    assert (new.n_hits, new.is_forked) == (1, False)


def test_the_policy_hears_of_neighbours() -> None:
    spy = Spy()
    index = PrefixIndex[int](10, ManualClock(), spy)
    index.insert("a", [1, 2, 3], 1, 1)
    steps: list[Callable[[], object]] = [
        lambda: index.insert("a", [1, 2, 4], 2, 1),
        lambda: index.insert("a", [1, 2, 4, 5], 3, 1),
        lambda: index.extend(3, [6], 1),
        lambda: index.truncate(3, 1, 1),
        lambda: index.remove(2),
        lambda: index.insert("a", [1, 2, 3], 4, 1),
        lambda: index.remove(4),
        lambda: index.remove(3),
    ]
    for step in steps:
        before = {key: index[key].n_covered_tokens for key in (1, 2, 3, 4) if key in index}
        del spy.told[:]
        step()
        after = {key: index[key].n_covered_tokens for key in before if key in index}
        heard = {key for what, key, *_ in spy.told if what in ("changed", "added")}
        assert {key for key in after if after[key] != before[key]} <= heard


def test_very_deep_and_very_wide_trees() -> None:
    both = pair(max_pages=10**6)
    index = both.index
    for n in range(1, 3000):
        index.insert("deep", [1] * n, n, 1)
    assert index.match("deep", [1] * 2500 + [2]).n_tokens == 2500
    for n in range(3000, 6000):
        index.insert("wide", [n, 1], n, 1)
    index.check()
    assert index.evict(10**6, lambda key: 1) == 5999
    assert index.stats().n_distinct_tokens == 0
