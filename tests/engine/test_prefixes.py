"""What is cached changes no token, is exact to the token, stays in its domain, and gives way to everybody."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import pytest

from vmem_kv.engine.engine import Engine
from vmem_kv.engine.prefixes import PrefixSlots
from vmem_kv.engine.request import FinishReason, Request, SequenceUpdate
from vmem_kv.engine.sampling_params import SamplingParams
from vmem_kv.engine.slot_source import FreshSlots
from vmem_kv.errors import ConfigError, InvariantError, UsageError
from vmem_kv.prefix import PrefixIndex, PrefixStats
from vmem_kv.sharing import plan_fork

from .harness import backend, engine_on, greedy, greedy_alone, n_pages_in_use, prompt_of, run, slots_in_use

PAGE_TOKENS = 16
"""Of a page of 4 KiB in each plane of the tiny llama."""
OPTIONS: dict[str, Any] = {"page_bytes": 4096, "layout": "per_head"}


def stats_of(engine: Engine) -> PrefixStats:
    stats = engine.slots.stats()
    assert stats is not None
    return stats


def slots_of(engine: Engine) -> PrefixSlots:
    assert isinstance(engine.slots, PrefixSlots)
    return engine.slots


def answer(engine: Engine, request: Request) -> SequenceUpdate:
    return run(engine, [request])[request.request_id][0]


def check(request: Request, update: SequenceUpdate) -> None:
    expected = greedy_alone("llama", request.prompt_token_ids, request.params.max_tokens or 0)
    n_expected = len(expected) if request.params.ignore_eos else None  # where `generate` ends
    assert update.token_ids[:n_expected] == expected


@pytest.mark.parametrize("driver", ["python", "native", "cuda"])
def test_a_prompt_that_goes_on_takes_the_slot_over(driver: str) -> None:
    first = Request(prompt_of(40), greedy(10, ignore_eos=True))
    with engine_on(driver=backend(driver), premap_tokens=0, **OPTIONS) as engine:
        said = answer(engine, first)
        (slot_id,) = engine.slots.cached_slots()
        n_calls = dict(engine.memory.pool.driver.calls)
        second = Request((*first.prompt_token_ids, *said.token_ids, *prompt_of(5, 1)), greedy(4))
        update = answer(engine, second)
        assert update.n_cached_tokens == 40 + 10 - 1  # the K and V of what was sampled last were never computed
        check(second, update)
        assert engine.slots.cached_slots() == {slot_id}
        n_planes = len(engine.memory.cache.layout.planes)
        assert engine.memory.pool.driver.calls["map"] - n_calls["map"] <= n_planes  # what the tokens need, and no more
        assert stats_of(engine).n_whole_hits == 1


@pytest.mark.parametrize("driver", ["python", "native", "cuda"])
@pytest.mark.parametrize("n_same", [16, 17, 31, 32, 33, 59])
def test_a_hit_is_exact_to_the_token(driver: str, n_same: int) -> None:
    first = Request(prompt_of(60), greedy(10, ignore_eos=True))
    other = prompt_of(30, 9)
    with engine_on(driver=backend(driver), **OPTIONS) as engine:
        check(first, answer(engine, first))
        ends = [t for t in other if t != first.prompt_token_ids[n_same]]
        second = Request((*first.prompt_token_ids[:n_same], *ends), greedy(10, ignore_eos=True))
        n_before = engine.snapshot().n_prompt_tokens
        update = answer(engine, second)
        assert update.n_cached_tokens == n_same
        assert engine.snapshot().n_prompt_tokens - n_before == len(second.prompt_token_ids) - n_same
        check(second, update)
        for request in (first, second):  # neither has harmed the other
            again = Request(request.prompt_token_ids, request.params)
            update = answer(engine, again)
            assert update.n_cached_tokens == len(request.prompt_token_ids) - 1
            check(again, update)
        engine.memory.cache.check()


def test_less_than_the_least_prefix_is_computed() -> None:
    first = Request(prompt_of(40), greedy(2, ignore_eos=True))
    with engine_on(prefix_min_tokens=20) as engine:
        answer(engine, first)
        for n_same, n_cached in ((19, 0), (20, 20)):
            ends = [t for t in prompt_of(30, 9) if t != first.prompt_token_ids[n_same]]
            second = Request((*first.prompt_token_ids[:n_same], *ends), greedy(1))
            assert answer(engine, second).n_cached_tokens == n_cached
        answer(engine, Request(prompt_of(18, 3), greedy(2, ignore_eos=True)))
        assert stats_of(engine).n_entries == 3  # not the one of 19 tokens
        assert slots_in_use(engine) == set()


def seeded(n_tokens: int, **params: Any) -> SamplingParams:
    return SamplingParams(temperature=1.1, seed=5, top_k=20, max_tokens=n_tokens, ignore_eos=True, **params)


@pytest.mark.parametrize("params", [greedy(12, n=4), seeded(12, n=4)], ids=["greedy", "seeded"])
def test_of_n_answers_one_computes_the_prompt(params: SamplingParams) -> None:
    def answers(**options: Any) -> list[SequenceUpdate]:
        with engine_on(**OPTIONS, **options) as engine:
            request = Request(prompt_of(60), params)
            updates = run(engine, [request])[request.request_id]
            n_computed.append(engine.snapshot().n_prompt_tokens)
            return updates

    n_computed: list[int] = []
    without, shared = answers(prefix_caching=False), answers()
    assert [u.token_ids for u in shared] == [u.token_ids for u in without]
    assert n_computed == [4 * 60, 60 + 3]  # each of the others needs the logits of the last token
    assert [u.n_cached_tokens for u in shared] == [0, 59, 59, 59]
    assert [u.n_cached_tokens for u in without] == [0] * 4


def test_who_arrives_together_computes_what_is_common_once() -> None:
    common = prompt_of(64)
    requests = [Request((*common, *prompt_of(5, i)), greedy(6)) for i in range(8)]
    other = Request(prompt_of(20, 50), greedy(6))
    with engine_on(max_batch_tokens=48, **OPTIONS) as engine:
        answers = run(engine, [*requests, other])
        assert engine.snapshot().n_prompt_tokens == 64 + 8 * 5 + 20
        for request in (*requests, other):
            check(request, answers[request.request_id][0])


@pytest.mark.parametrize(("priority", "n_running"), [(0, 2), (9, 1)])
def test_who_is_more_urgent_waits_for_nobodys_prompt(priority: int, n_running: int) -> None:
    first, second = (Request(prompt_of(100), greedy(2), priority=p) for p in (9, priority))
    with engine_on(max_batch_tokens=40, max_num_seqs=4) as engine:
        engine.add(first)
        engine.step()
        engine.step()
        engine.add(second)
        engine.step()  # which has room for more than the rest of the first prompt
        assert engine.snapshot().n_running == n_running
        (update,) = run(engine)[second.request_id]
        assert update.n_cached_tokens == (99 if n_running == 1 else 0)
        check(second, update)


def check_isolation(engine: Engine) -> None:
    """What one domain has computed is nothing to another, whether it runs or is cached."""
    for i, domain in enumerate(("a", "b", "a/b")):
        request = Request(prompt_of(60), greedy(8, n=2), domain=domain)
        updates = run(engine, [request])[request.request_id]
        assert [u.n_cached_tokens for u in updates] == [0, 59]
        check(request, updates[0])
        assert stats_of(engine).n_entries == i + 1
    together = [Request(prompt_of(50, 7), greedy(8), domain=domain) for domain in ("a", "b")]
    answers = run(engine, together)
    assert [answers[r.request_id][0].n_cached_tokens for r in together] == [0, 0]
    again = Request(prompt_of(60), greedy(8), domain="b")
    assert answer(engine, again).n_cached_tokens == 59


def test_domains_share_nothing() -> None:
    with engine_on() as engine:
        check_isolation(engine)


def test_an_index_that_ignores_domains_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    stock_match, stock_insert = PrefixIndex.match, PrefixIndex.insert
    monkeypatch.setattr(PrefixIndex, "match", lambda self, domain, ids: stock_match(self, "", ids))
    monkeypatch.setattr(PrefixIndex, "insert", lambda self, domain, *args, **kw: stock_insert(self, "", *args, **kw))
    with engine_on() as engine, pytest.raises(AssertionError):
        check_isolation(engine)


def conversations(rng: random.Random, n: int) -> list[Request]:
    """Requests that begin alike in many ways: a few beginnings, and prompts that go on where others ended."""
    beginnings = [prompt_of(rng.randrange(20, 60), 100 + i) for i in range(3)]
    prompts: list[tuple[int, ...]] = []
    for i in range(n):
        base = rng.choice([*beginnings, *prompts[-6:]])
        prompts.append(
            (*base[: rng.randrange(len(base) // 2, len(base) + 1)], *prompt_of(rng.randrange(1, 25), i))[:110]
        )
    return [
        Request(
            prompt,
            SamplingParams(
                n=rng.choice([1, 1, 1, 2, 3]),
                max_tokens=rng.choice([1, 5, 20, 60]),
                temperature=rng.choice([0.0, 0.0, 0.9]),
                top_k=rng.choice([0, 10]),
                repetition_penalty=rng.choice([1.0, 1.2]),
                ignore_eos=rng.random() < 0.7,
                seed=i,
            ),
            priority=rng.randrange(3),
            domain=rng.choice(["a", "a", "a", "b"]),
        )
        for i, prompt in enumerate(prompts)
    ]


def token_ids(answers: dict[str, list[SequenceUpdate]]) -> dict[str, list[list[int]]]:
    return {request_id: [u.token_ids for u in updates] for request_id, updates in answers.items()}


@functools.cache
def without_sharing() -> tuple[list[Request], dict[str, list[list[int]]]]:
    """Requests, and what they are answered where nothing is cached."""
    requests = conversations(random.Random(4), 24)
    with engine_on(max_num_seqs=6, max_batch_tokens=64, prefix_caching=False, **OPTIONS) as engine:
        return requests, token_ids(run(engine, requests, every=2))


@pytest.mark.parametrize("policy", ["lru", "cost"])
@pytest.mark.parametrize("n_pages", [12 * 13, 12 * 48])
def test_no_token_changes_under_churn_and_pressure(policy: str, n_pages: int) -> None:
    requests, without = without_sharing()
    options = {"max_num_seqs": 6, "max_batch_tokens": 64, "max_bytes": n_pages * 4096, "prefix_slots": 6, **OPTIONS}
    with engine_on(prefix_policy=policy, **options) as engine:
        stock_step = engine.step
        n_steps = 0

        def checked() -> list[SequenceUpdate]:
            nonlocal n_steps
            updates = stock_step()
            n_steps += 1
            if n_steps % 5 == 0:
                engine.slots.check()
                engine.memory.cache.check()
            return updates

        engine.step = checked  # type: ignore[method-assign]
        answers = run(engine, requests, every=2)
        assert token_ids(answers) == without
        stats = stats_of(engine)
        assert stats.n_hit_tokens > 0
        assert stats.n_evicted > 0
        assert n_pages_in_use(engine) == 0
        if n_pages == 12 * 13:
            assert engine.snapshot().n_preempted > 0


def alias_tails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Share the page in which a fork's tokens end, too."""

    def planned(layout: Any, source: Any, target: Any, n_tokens: int) -> Any:
        return plan_fork(layout, source, target, -(-n_tokens // PAGE_TOKENS) * PAGE_TOKENS)

    monkeypatch.setattr("vmem_kv.exchange.plan_fork", planned)


def copy_no_tails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the copy of what does not fill a page."""
    monkeypatch.setattr("vmem_kv.driver.host.HostDriver.copy", lambda self, copies: None)


@pytest.mark.parametrize("plant", [alias_tails, copy_no_tails])
def test_a_tail_that_is_not_copied_is_found(
    monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    plant(monkeypatch)
    with pytest.raises((AssertionError, InvariantError, UsageError)):
        test_a_hit_is_exact_to_the_token("python", 31)


def test_cached_prefixes_block_nobodys_pages() -> None:
    """A pool full of what nobody uses serves a request that needs all of it, at once and without preempting anybody."""
    with engine_on(max_bytes=12 * 12 * 4096, max_num_seqs=4, **OPTIONS) as engine:
        for i in range(8):
            answer(engine, Request(prompt_of(30, i), greedy(2, ignore_eos=True)))
        assert stats_of(engine).n_held_pages > 12 * 8
        needy = Request(prompt_of(100, 40), greedy(90, ignore_eos=True))
        assert engine.memory.n_pages(190) == engine.memory.pool.max_pages
        check(needy, answer(engine, needy))
        stats = engine.snapshot()
        assert stats.n_preempted == 0
        assert stats_of(engine).n_evicted == 8
        engine.slots.check()


@pytest.mark.parametrize("prefix_slots", [0, 1, None])
def test_cached_prefixes_block_nobodys_slot(prefix_slots: int | None) -> None:
    options: dict[str, Any] = {} if prefix_slots is None else {"prefix_slots": prefix_slots}
    with engine_on(max_num_seqs=2, **options) as engine:
        n_slots = engine.memory.cache.layout.n_slots
        assert n_slots == 2 + (6 if prefix_slots is None else prefix_slots)
        requests = [Request(prompt_of(30, i), greedy(3, ignore_eos=True)) for i in range(12)]
        answers = run(engine, requests)
        for request in requests:
            check(request, answers[request.request_id][0])
        assert stats_of(engine).n_entries == n_slots


def test_with_no_slot_beside_its_source_a_match_is_computed() -> None:
    """Where the only slots are those that run and the source itself."""
    with engine_on(max_num_seqs=1, prefix_slots=0) as engine:
        first = Request(prompt_of(40), greedy(3, ignore_eos=True))
        check(first, answer(engine, first))
        again = Request(first.prompt_token_ids, greedy(3, ignore_eos=True))
        update = answer(engine, again)
        assert update.n_cached_tokens == 0
        check(again, update)


def test_the_share_of_the_budget_bounds_what_nobody_uses() -> None:
    with engine_on(max_bytes=100 * 12 * 4096, prefix_share=0.05, **OPTIONS) as engine:
        for i in range(8):
            answer(engine, Request(prompt_of(30, i), greedy(2, ignore_eos=True)))
            assert stats_of(engine).n_held_pages <= 5 * 12
        assert stats_of(engine).n_entries == 2
        answer(engine, Request(prompt_of(120, 60), greedy(2, ignore_eos=True)))  # which is more than that
        assert stats_of(engine).n_held_pages == 0


def test_what_a_preempted_sequence_computed_is_found_again() -> None:
    requests = [Request(prompt_of(40, i), greedy(20, ignore_eos=True)) for i in range(2)]
    with engine_on() as engine:
        for request in requests:
            engine.add(request)
        for _ in range(6):
            engine.step()
        scheduler = engine._scheduler
        scheduler.preempt(scheduler.running()[-1])
        assert len(engine.slots.cached_slots()) == 1
        answers = run(engine)
        stats = engine.snapshot()
        assert (stats.n_preempted, stats.n_recomputed_tokens) == (1, 0)
        assert stats.n_prompt_tokens == 80
    with engine_on() as engine:
        alone = [answer(engine, Request(r.prompt_token_ids, r.params)).token_ids for r in requests]
    assert [answers[r.request_id][-1].token_ids[-5:] for r in requests] == [ids[-5:] for ids in alone]


def test_pages_that_are_counted_come_free() -> None:
    """What is said to be held is what lies under cached slots only, and comes free with them, whoever shares."""
    with engine_on(max_num_seqs=6, max_batch_tokens=64, **OPTIONS) as engine:
        slots, memory = slots_of(engine), engine.memory
        pages_under = memory.cache.region.table.distinct_pages
        n_shared = 0
        for round_index in range(6):
            for request in conversations(random.Random(round_index), 12):
                engine.add(request)
            for _ in range(30 + 5 * round_index):
                engine.step()
            cached, used = engine.slots.cached_slots(), slots_in_use(engine)
            memory.reclaim()
            n_shared += memory.cache.stats().n_saved_pages
            n_held = slots.n_available_pages() - memory.n_available_pages()
            assert n_held == len(pages_under(cached) - pages_under(used)) > 0
            for one in cached:
                others = pages_under((cached | used) - {one})
                assert slots._pages.freed_by(one) == len(pages_under([one]) - others)
                n_live = slots._pages.n_live(one, PAGE_TOKENS)
                first_pages = {handles[0] for handles in memory.cache.region.table.handles[one]}
                assert n_live == len(first_pages & pages_under(used))
            n_before = memory.n_available_pages()
            assert slots.give_way(1 << 30)
            assert memory.n_available_pages() == slots.n_available_pages() == n_before + n_held
            engine.slots.check()
            run(engine)
        assert n_shared > 0


def test_a_slot_that_is_gone_and_still_indexed_is_found() -> None:
    with engine_on() as engine:
        answer(engine, Request(prompt_of(40), greedy(2, ignore_eos=True)))
        (slot_id,) = engine.slots.cached_slots()
        engine.slots.check()
        engine.memory.retire([slot_id])
        with pytest.raises(InvariantError, match="belong to nobody"):
            engine.slots.check()
        slots = slots_of(engine)
        slots._index.remove(slot_id)
        slots._pages.slot_ids.remove(slot_id)
        slots._show()


def test_what_failed_is_not_cached_and_what_was_aborted_is() -> None:
    failing, aborted = (Request(prompt_of(40, i), greedy(20, ignore_eos=True)) for i in range(2))
    with engine_on(max_batch_tokens=512) as engine:
        engine.add(failing)
        engine.step()
        engine.step()
        assert stats_of(engine).n_entries == 1
        sequence = engine._scheduler.running()[0]
        updates: list[SequenceUpdate] = []
        engine._fail([sequence], ValueError("planted"), updates)
        assert updates[0].finish_reason is FinishReason.ERROR
        assert stats_of(engine).n_entries == 0
        engine.add(aborted)
        engine.step()
        engine.abort(aborted.request_id)
        assert answer(engine, Request(aborted.prompt_token_ids, greedy(2))).n_cached_tokens == 39
        assert answer(engine, Request(failing.prompt_token_ids, greedy(2))).n_cached_tokens == 0


@pytest.mark.parametrize("architecture", ["mistral", "falcon_h1"])
def test_where_a_slot_is_not_all_that_is_kept_nothing_is_cached(architecture: str) -> None:
    with engine_on(architecture, max_num_seqs=3) as engine:
        assert isinstance(engine.slots, FreshSlots)
        assert engine.memory.cache.layout.n_slots == 3
        request = Request(prompt_of(30), greedy(5))
        first, second = (answer(engine, Request(request.prompt_token_ids, request.params)) for _ in range(2))
        assert first.token_ids == second.token_ids
        assert second.n_cached_tokens == 0
        assert engine.snapshot().prefixes is None


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "deepseek_v3"])
def test_the_rows_route_shares_too(architecture: str) -> None:
    first = Request(prompt_of(60), greedy(10, ignore_eos=True))
    with engine_on(architecture, route="rows", page_bytes=4096) as engine:
        assert isinstance(engine.slots, PrefixSlots)
        said = answer(engine, first)
        fork = Request((*first.prompt_token_ids[:45], *prompt_of(10, 3)), greedy(10))
        on = Request((*first.prompt_token_ids, *said.token_ids, 9, 8), greedy(10))
        for request, n_cached in ((fork, 45), (on, 69)):
            update = answer(engine, request)
            assert update.n_cached_tokens == n_cached
            assert update.token_ids == greedy_alone(architecture, request.prompt_token_ids, 10)


@pytest.mark.parametrize(
    "wrong",
    [
        {"prefix_policy": "best"},
        {"prefix_share": 1.5},
        {"prefix_share": -0.1},
        {"prefix_slots": -1},
        {"prefix_slots": True},
        {"prefix_min_tokens": 0},
    ],
)
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))), engine_on(**wrong):
        pass
