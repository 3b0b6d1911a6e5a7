"""Sharing prefixes in a replay: books of stripes against lists, hits against the bound, and pressure."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import count

import pytest

from vmem_kv.driver.accounting import AccountingDriver
from vmem_kv.errors import (
    ConfigError,
    InvariantError,
    OutOfAddressSpace,
    OutOfMappings,
    OutOfPages,
    OutOfSlots,
    UsageError,
)
from vmem_kv.layout import LayerSpec, Layout, TensorSpec
from vmem_kv.prefix import Entry, EvictionPolicy, History
from vmem_kv.prefix.policy import FreedBy
from vmem_kv.replay.memory import Key
from vmem_kv.replay.schedule import Replay
from vmem_kv.replay.sharing import PREFIX_POLICIES, SharingMemory
from vmem_kv.replay.sharing_slots import BookSlots, CacheSlots
from vmem_kv.replay.statistics import Report
from vmem_kv.replay.stripes import StripeBooks
from vmem_kv.traces import Request
from vmem_kv.traces.prefixes import known_tokens, unbounded_hits
from vmem_kv.units import KIB

BLOCK = 8  # tokens in a block of a trace
LAYERS = [LayerSpec.uniform(1, 64, 2)] * 2  # 512 bytes a token: 8 tokens to a page of 4 KiB, token-major
PAGE = 4 * KIB


def real_slots(layout: Layout, n_pages: int) -> CacheSlots:
    driver = AccountingDriver(2 * n_pages * layout.page_bytes, PAGE // 2, zeroes_new_pages=False)
    return CacheSlots(driver, layout, n_pages, driver.items)


def memory(n_pages: int, *, kind: str = "token_major", **options: object) -> SharingMemory:
    layout = Layout.build(kind, LAYERS, n_slots=200, max_tokens=4096, page_bytes=PAGE)
    defaults: dict[str, object] = {"headroom": 0.0, **options}
    return SharingMemory("x", layout, real_slots(layout, n_pages), n_pages * PAGE, BLOCK, **defaults)  # type: ignore[arg-type]


def ask(n_prompt: int, *blocks: int, outputs: int = 1) -> Request:
    return Request(None, n_prompt, outputs, tuple(range(block, block + 1) for block in blocks))


def go(shared: SharingMemory, request: Request, n_more: int = 0) -> int:
    """Begin, compute and end a sequence; return how many tokens were cached."""
    before = shared.n_cached_tokens
    key = shared.begin(request.prompt_tokens, 0, request)
    for n_tokens in range(request.prompt_tokens, request.prompt_tokens + n_more):
        shared.grow({key: n_tokens + 1})
    shared.end([key])
    shared.check()
    return shared.n_cached_tokens - before


def family(seed: int, n_requests: int = 80) -> list[Request]:
    """Requests whose prompts branch off each other at random."""
    rng = random.Random(seed)
    ids = count()
    known: list[list[int]] = [[]]
    requests = []
    for _ in range(n_requests):
        parent = rng.choice(known[-8:] if rng.random() < 0.8 else known)
        blocks = parent[: rng.randint(0, len(parent))] + [next(ids) for _ in range(rng.randint(0, 6))]
        known.append(blocks)
        n_prompt = len(blocks) * BLOCK + rng.randint(0 if blocks else 1, BLOCK - 1)
        requests.append(ask(n_prompt, *blocks, outputs=rng.randint(1, 20)))
    return requests


class Lists:
    """Stripes under sequences, as plainly as it can be said."""

    def __init__(self) -> None:
        self.ids = count()
        self.under: dict[int, list[int]] = {}
        self.live: set[int] = set()

    def figures(self) -> tuple[int, int, int]:
        distinct = {stripe for row in self.under.values() for stripe in row}
        live = {stripe for key in self.live for stripe in self.under[key]}
        return len(distinct), len(live), sum(map(len, self.under.values()))

    def freed_by(self, key: int) -> int:
        others = {stripe for each, row in self.under.items() if each != key for stripe in row}
        return len(set(self.under[key]) - others)


@pytest.mark.parametrize("seed", range(20))
def test_runs_of_stripes_are_what_lists_of_stripes_are(seed: int) -> None:
    rng = random.Random(seed)
    books, lists, keys = StripeBooks(3), Lists(), count()
    for _ in range(200):
        resting = [key for key in lists.under if key not in lists.live]
        choice = rng.random()
        if choice < 0.3:
            key, source = next(keys), rng.choice(list(lists.under) or [-1])
            books.begin(key)
            lists.live.add(key)
            lists.under[key] = []
            if source >= 0:
                n_shared = rng.randint(0, len(lists.under[source]))
                books.fork(source, key, n_shared)
                lists.under[key] = lists.under[source][:n_shared]
        elif choice < 0.6 and lists.live:
            key, n_more = rng.choice(sorted(lists.live)), rng.randint(0, 5)
            books.grow(key, n_more)
            lists.under[key] += [next(lists.ids) for _ in range(n_more)]
        elif choice < 0.75 and lists.live:
            key = rng.choice(sorted(lists.live))
            books.rest(key)
            lists.live.remove(key)
        elif choice < 0.85 and resting:
            key = rng.choice(resting)
            books.wake(key)
            lists.live.add(key)
        elif resting:
            key = rng.choice(resting)
            assert books.freed_by(key) == 3 * lists.freed_by(key)
            assert books.drop(key) == 3 * lists.freed_by(key)
            del lists.under[key]
        books.check()
        n_distinct, n_live, n_mapped = lists.figures()
        assert (books.n_stripes, books.n_live_stripes, books.n_mapped_stripes) == (n_distinct, n_live, n_mapped)
        assert books.held() == 3 * (n_distinct - n_live)
        for key, row in lists.under.items():
            assert books.length(key) == len(row)
            live = {stripe for each in lists.live for stripe in lists.under[each]}
            assert books.n_live_of(key, len(row) // 2) == sum(stripe in live for stripe in row[: len(row) // 2])


def test_wrong_books_of_stripes_are_noticed() -> None:
    for attribute in ("n_stripes", "n_live_stripes", "n_mapped_stripes"):
        books = StripeBooks(1)
        books.begin(1)
        books.grow(1, 4)
        books.check()
        setattr(books, attribute, 3)
        with pytest.raises(InvariantError):
            books.check()
    books = StripeBooks(1)
    books.begin(1)
    books.grow(1, 4)
    books._runs[1][0].owners.add(2)
    books.n_mapped_stripes += 4
    with pytest.raises(InvariantError):
        books.check()


def test_breaches_of_the_books_are_refused() -> None:
    books = StripeBooks(1)
    books.begin(1)
    books.grow(1, 4)
    with pytest.raises(UsageError):
        books.begin(1)
    with pytest.raises(UsageError):
        books.drop(1)
    books.begin(2)
    with pytest.raises(UsageError):
        books.fork(1, 2, 5)


def test_tokens_are_known_as_far_as_blocks_stand_for_them() -> None:
    request = ask(20, 3, 7, 9)
    assert list(known_tokens(request, BLOCK)) == [*range(24, 32), *range(56, 64), *range(72, 76)]
    assert list(known_tokens(ask(20, 3), BLOCK)) == list(range(24, 32))
    assert not known_tokens(ask(20), BLOCK)


def test_the_bound_counts_leading_blocks_that_were_seen() -> None:
    requests = [ask(20, 1, 2), ask(24, 1, 2, 3), ask(24, 4, 2, 3), ask(20, 1, 2, 3), ask(3)]
    assert unbounded_hits(requests, BLOCK) == (91, 16 + 20)


def test_a_prompt_that_extends_a_cached_one_goes_on_in_its_slot() -> None:
    shared = memory(100)
    assert go(shared, ask(16, 1, 2)) == 0
    calls = dict(shared.slots.calls)
    assert go(shared, ask(32, 1, 2, 3, 4)) == 16
    assert shared.counts.n_adopted == 1
    assert shared.stripes.n_stripes == 4
    assert shared.slots.calls["map"] - calls["map"] == 2
    assert shared.counts.n_copies == 0


def test_a_branch_shares_full_stripes_and_copies_the_rest() -> None:
    # Stripes of 8 tokens hold a block each; in pages of 6 KiB they hold 12, so that a branch at 16 shares one of them.
    layout = Layout.build("token_major", LAYERS, n_slots=8, max_tokens=4096, page_bytes=12 * 512)
    shared = SharingMemory("x", layout, real_slots(layout, 100), 100 * 12 * 512, BLOCK)
    go(shared, ask(32, 1, 2, 3, 4))
    assert shared.stripes.n_stripes == 3
    assert go(shared, ask(32, 1, 2, 8, 9)) == 16
    assert shared.stripes.n_stripes == 5
    assert shared.stripes.n_mapped_stripes == 6
    assert (shared.counts.n_device_copies, shared.counts.device_copy_bytes) == (1, 4 * 512)
    assert shared.counts.n_forked == 1


class Notes(EvictionPolicy[int]):
    """Notes what it is told of uses."""

    def __init__(self) -> None:
        self.ages: list[float] = []
        self.n_hits: list[int] = []

    def added(self, entry: Entry[int]) -> None:
        self.n_hits.append(entry.n_hits)

    def withdrawn(self, entry: Entry[int]) -> None: ...

    def used(self, entry: Entry[int], before: History, is_own: bool) -> None:
        self.ages.append(before.age)

    def evicted(self, entry: Entry[int], now: float) -> None: ...

    def changed(self, entry: Entry[int]) -> None: ...

    def victim(self, now: float, freed_by: FreedBy[int]) -> Entry[int] | None:
        return None


def test_a_policy_learns_how_old_a_fork_s_source_is_and_the_fork_goes_on_with_its_hits() -> None:
    notes = Notes()
    shared = memory(100, make_policy=lambda: notes)
    go(shared, ask(24, 1, 2, 3))
    for other in range(4):
        go(shared, ask(16, 10 * other + 10, 10 * other + 11))
    go(shared, ask(32, 1, 2, 8, 9))
    assert notes.ages == [4.0], "four others began since: sparing the source meanwhile was no use"
    assert shared.counts.n_forked == 1
    assert notes.n_hits[-1] == 1


def test_planes_share_alike() -> None:
    shared = memory(400, kind="per_layer")  # four planes of 32 tokens to a page
    go(shared, ask(80, *range(10)))
    assert go(shared, ask(80, *range(5), *range(20, 25))) == 40
    assert shared.stripes.n_stripes * 4 == 5 * 4  # 3, one of which is shared, and 2
    assert (shared.counts.n_device_copies, shared.counts.device_copy_bytes) == (4, 8 * 512)


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    shared = memory(100)
    go(shared, ask(16, 1, 2))
    assert go(shared, ask(16, 1, 2)) == 15


def test_prompts_of_one_step_do_not_find_each_other() -> None:
    shared = memory(100)
    first = shared.begin(16, 0, ask(16, 1, 2))
    second = shared.begin(24, 0, ask(24, 1, 2, 3))
    assert shared.n_cached_tokens == 0
    shared.grow({first: 17, second: 25})
    shared.begin(24, 0, ask(24, 1, 2, 4))
    assert shared.n_cached_tokens == 16


@pytest.mark.parametrize("kind", ["token_major", "group:1", "per_layer"])
@pytest.mark.parametrize("seed", range(6))
def test_one_after_another_without_a_bound_all_that_is_shared_is_hit(seed: int, kind: str) -> None:
    requests = family(seed)
    shared = memory(100_000, kind=kind)
    for request in requests:
        go(shared, request, request.output_tokens)
    n_prompt, n_cached = unbounded_hits(requests, BLOCK)
    # A prompt that was seen in full leaves its last token to be computed, which the bound counts.
    seen: set[int] = set()
    n_whole = 0
    for request in requests:
        blocks = [run.start for run in request.blocks]
        n_whole += seen.issuperset(blocks) and len(blocks) * BLOCK == request.prompt_tokens
        seen.update(blocks)
    assert shared.counts.n_prompt_tokens == n_prompt
    assert shared.counts.n_hit_tokens == n_cached - n_whole
    assert n_cached > n_prompt / 4


class Checked(SharingMemory):
    """Holds its books against each other, and against those of the real cache, whenever somebody ends."""

    def grow(self, lengths: Mapping[Key, int]) -> None:
        super().grow(lengths)
        assert all(self._capacity[key] >= n_tokens for key, n_tokens in lengths.items())

    def end(self, keys: Sequence[Key]) -> None:
        super().end(keys)
        self.check()


def replay(
    requests: list[Request], n_pages: int, make: type[SharingMemory] = Checked, **options: object
) -> tuple[SharingMemory, Report]:
    layout = Layout.build("token_major", LAYERS, n_slots=500, max_tokens=4096, page_bytes=PAGE)
    slots = real_slots(layout, n_pages) if make is Checked else BookSlots(layout)
    shared = make("x", layout, slots, n_pages * PAGE, BLOCK, headroom=0.0, **options)  # type: ignore[arg-type]
    report = Replay(shared, requests, n_max_running=12).run()
    return shared, report


@pytest.mark.parametrize("policy", PREFIX_POLICIES)
@pytest.mark.parametrize("n_pages", [30, 60, 120, 10_000])
def test_under_pressure_everybody_is_served_and_the_budget_kept(policy: str, n_pages: int) -> None:
    n_evicted = 0
    for seed in range(2):
        requests = family(seed)
        shared, report = replay(requests, n_pages, make_policy=PREFIX_POLICIES[policy])
        counts = report.counts
        assert counts.n_done + counts.n_rejected == len(requests)
        assert counts.rejected.keys() <= {"OutOfPages"}
        assert counts.n_rejected == sum(
            shared.obstacle(r.prompt_tokens + r.output_tokens - 1) is not None for r in requests
        )
        assert report.peak_owned_bytes <= n_pages * PAGE
        assert shared.stripes.n_live_stripes == 0
        n_evicted += shared.counts.n_evicted
        lookups = shared.counts.n_adopted + shared.counts.n_forked + shared.counts.n_fresh
        assert lookups == counts.n_done + counts.n_preemptions
    assert (n_evicted > 0) == (n_pages < 10_000)


@pytest.mark.parametrize("kind", ["token_major", "per_layer"])
@pytest.mark.parametrize("n_pages", [64, 200, 10_000])
def test_the_rules_count_what_the_real_cache_does(n_pages: int, kind: str) -> None:
    layout = Layout.build(kind, LAYERS, n_slots=500, max_tokens=4096, page_bytes=PAGE)
    found = []
    for slots in (real_slots(layout, n_pages), BookSlots(layout)):
        shared = SharingMemory("x", layout, slots, n_pages * PAGE, BLOCK, headroom=0.0)
        report = Replay(shared, family(7, 200), n_max_running=12).run()
        shared.check()
        found.append((shared.counts, report.counts, shared.n_peak_mappings, shared.slots.calls))
        shared.close()
    (counts, done, peak, real), (*same, rules) = found
    assert [counts, done, peak] == same
    assert counts.n_forked > 20
    for kind in ("create", "map", "unmap"):
        assert real[kind] == rules[kind], kind
    for kind in ("set_access", "scrub"):
        assert real[kind] == pytest.approx(rules[kind], rel=0.25), kind


class LosesAPage(CacheSlots):
    """Grows one sequence further than it was told."""

    def hold(self, lengths: Mapping[Key, int], short: Mapping[Key, int], n_pages: int) -> None:
        super().hold({key: n_tokens + 8 for key, n_tokens in lengths.items()}, short, n_pages)


def test_a_cache_that_does_something_else_than_the_books_is_noticed() -> None:
    layout = Layout.build("token_major", LAYERS, n_slots=4, max_tokens=4096, page_bytes=PAGE)
    driver = AccountingDriver(200 * PAGE, PAGE)
    shared = SharingMemory("x", layout, LosesAPage(driver, layout, 100, driver.items), 100 * PAGE, BLOCK)
    shared.begin(16, 0, ask(16, 1, 2))
    with pytest.raises(InvariantError, match="3 pages are mapped, the books of stripes say 2"):
        shared.check()


def test_more_memory_spares_more() -> None:
    rates = [replay(family(3, 400), n_pages, SharingMemory)[0].counts.hit_rate or 0.0 for n_pages in (40, 120, 10_000)]
    assert rates == sorted(rates)
    assert rates[0] < rates[-1]


def test_what_the_device_gives_up_comes_back_from_the_host() -> None:
    shared = memory(12, host_bytes=100 * PAGE)
    go(shared, ask(64, *range(8)))
    go(shared, ask(64, *range(20, 28)))  # 16 pages in all: the first goes
    assert (shared.counts.n_evicted, shared.counts.n_park_copies) == (1, 1)
    assert go(shared, ask(72, *range(9))) == 64
    assert (shared.counts.n_restored_tokens, shared.counts.restore_bytes) == (64, 64 * 512)
    assert shared.n_restored_tokens == 64
    go(shared, ask(64, *range(30, 38)))  # and again: one block is new
    assert shared.counts.park_bytes == (8 + 8 + 1) * PAGE
    assert go(memory(12), ask(64, *range(8))) == 0


def test_the_host_keeps_to_its_budget_too() -> None:
    shared, _ = replay(family(5, 300), 30, SharingMemory, host_bytes=25 * PAGE)
    assert 0 < shared.counts.n_peak_host_pages <= 25
    assert shared.counts.n_restore_copies > 0
    none, _ = replay(family(5, 300), 30, SharingMemory)
    assert none.counts.n_peak_host_pages == none.counts.n_restored_tokens == 0
    assert (shared.counts.hit_rate or 0) > (none.counts.hit_rate or 0)


def test_mappings_run_out_before_pages_where_much_is_shared() -> None:
    # Three slots of eight stripes each, seven of them shared: ten pages, 24 mappings.
    requests = [ask(64, *range(7), n) for n in (100, 200, 300)]
    free, tight = memory(100), memory(100, max_mappings=20)
    for request in requests:
        go(free, request)
        go(tight, request)
    assert (free.stripes.n_stripes, free.stripes.n_mapped_stripes, free.counts.n_evicted) == (10, 24, 0)
    assert tight.stripes.n_mapped_stripes <= 20
    assert tight.counts.n_evicted == 1
    assert tight.obstacle(8 * 20) is None
    assert tight.obstacle(8 * 21) is OutOfMappings


def test_slots_run_out_before_pages_where_prompts_are_short() -> None:
    layout = Layout.build("token_major", LAYERS, n_slots=3, max_tokens=4096, page_bytes=PAGE)
    shared = SharingMemory("x", layout, real_slots(layout, 100), 100 * PAGE, BLOCK)
    for first in range(5):
        go(shared, ask(16, 10 * first, 10 * first + 1))
    assert (len(shared.index), shared.counts.n_evicted) == (3, 2)
    for first in range(5, 8):
        shared.begin(16, 0, ask(16, 10 * first))
    assert shared.lack(8, ask(8, 99)) is OutOfSlots
    with pytest.raises(OutOfSlots):
        shared.begin(8, 0, ask(8, 99))
    shared.check()


def test_what_cannot_run_says_what_is_lacking() -> None:
    shared = memory(10)
    assert shared.obstacle(80) is None
    assert shared.obstacle(81) is OutOfPages
    assert shared.obstacle(4097) is OutOfAddressSpace
    key = shared.begin(48, 0, ask(48, *range(6)))
    assert shared.lack(40, ask(40, *range(50, 55))) is OutOfPages
    shared.grow({key: 49})
    assert shared.lack(72, ask(72, *range(6), 60, 61, 62)) is None  # six of its nine pages are there
    with pytest.raises(OutOfPages):
        shared.begin(40, 0, ask(40, *range(50, 55)))
    shared.check()


def test_a_source_that_takes_too_much_room_is_given_up_itself() -> None:
    shared = memory(10)
    go(shared, ask(72, *range(9)))
    assert go(shared, ask(64, 0, *range(50, 57))) == 0  # 1 page shared, 7 new: with all nine of the source 16
    assert shared.counts.n_evicted == 1


def test_models_with_unlike_planes_are_refused_with_the_remedy() -> None:
    latent = [LayerSpec(TensorSpec(1, 64, 2), TensorSpec(1, 512, 2))]
    layout = Layout.build("per_layer", latent, n_slots=4, max_tokens=100, page_bytes=PAGE)
    with pytest.raises(ConfigError, match="use token_major"):
        SharingMemory("x", layout, BookSlots(layout), 100 * PAGE, BLOCK)
    with pytest.raises(ConfigError, match="needs each sequence's request"):
        memory(10).begin(5, 5)


def test_sequences_without_blocks_share_nothing_and_leave_nothing() -> None:
    shared = memory(10)
    assert go(shared, ask(40)) == 0
    assert shared.stripes.n_stripes == 0
    assert len(shared.index) == 0
