"""With far too little memory everything still ends, with the same tokens; what can never fit is refused at once."""

from __future__ import annotations

import random

import pytest

from vmem_kv.engine.request import FinishReason, Request
from vmem_kv.engine.sampling_params import SamplingParams
from vmem_kv.errors import InvalidRequest, QueueFull, RequestTooLong

from .harness import backend, engine_on, greedy, greedy_alone, prompt_of, run, slots_in_use, tokens

PAGES_OF_60_TOKENS = 48 * 4096
"""What the tiny llama needs for 60 tokens: 12 planes, 16 tokens a page."""


@pytest.mark.parametrize("driver", ["python", "native", "cuda"])
def test_a_pool_at_a_third_of_the_demand_gives_the_same_tokens(driver: str) -> None:
    requests = [Request(prompt_of(n, n), greedy(40)) for n in (10, 30, 17, 25, 8, 40, 33, 21)]
    options = {"max_num_seqs": 8, "max_batch_tokens": 32, "layout": "per_head"}
    options |= {"max_bytes": 2 * PAGES_OF_60_TOKENS, "page_bytes": 4096}
    with engine_on(driver=backend(driver), **options) as engine:
        answers = run(engine, requests)
        assert engine.snapshot().n_preempted > 0
        assert engine.snapshot().cache.n_peak_owned_pages <= engine.memory.pool.max_pages
        assert engine.snapshot().n_finished["length"] + engine.snapshot().n_finished["stop"] == len(requests)
    for request in requests:
        assert tokens(answers, request) == greedy_alone("llama", request.prompt_token_ids, 40)


def test_random_requests_under_churn_are_answered_as_alone() -> None:
    rng = random.Random(1)
    requests = [
        Request(
            prompt_of(rng.randrange(1, 60), i),
            SamplingParams(
                max_tokens=rng.randrange(20, 80),
                temperature=rng.choice([0.0, 0.7, 1.3]),
                top_k=rng.choice([0, 5]),
                top_p=rng.choice([1.0, 0.8]),
                repetition_penalty=rng.choice([1.0, 1.2]),
                frequency_penalty=rng.choice([0.0, 0.5]),
                ignore_eos=rng.random() < 0.5,
                seed=i,
            ),
            priority=rng.randrange(3),
        )
        for i in range(40)
    ]
    with engine_on() as engine:
        alone = {r.request_id: run(engine, [r])[r.request_id][0].token_ids for r in requests}
    with engine_on(max_num_seqs=6, max_batch_tokens=40, max_bytes=3 * PAGES_OF_60_TOKENS, page_bytes=4096) as engine:
        answers = run(engine, requests)
        assert engine.snapshot().n_preempted > 0
    assert {r.request_id: tokens(answers, r) for r in requests} == alone


@pytest.mark.parametrize("priorities", [(0, 0), (1, 0), (0, 1)])
def test_who_came_last_of_the_lowest_priority_is_preempted(priorities: tuple[int, int]) -> None:
    requests = [Request(prompt_of(20, i), greedy(90, ignore_eos=True), priority=p) for i, p in enumerate(priorities)]
    with engine_on(max_bytes=2 * PAGES_OF_60_TOKENS, page_bytes=4096) as engine:
        for request in requests:
            engine.add(request)
        ended: list[str] = []
        while engine.has_work:
            ended += [u.request_id for u in engine.step() if u.is_finished]
        assert engine.snapshot().n_preempted > 0
    first = requests[priorities.index(0)]
    assert ended[0] == first.request_id


def test_a_waiting_urgent_request_starts_before_earlier_ones() -> None:
    requests = [Request(prompt_of(5, i), greedy(5), priority=5 - i) for i in range(5)]
    with engine_on(max_num_seqs=1) as engine:
        for request in requests:
            engine.add(request)
        ended = []
        while engine.has_work:
            ended += [u.request_id for u in engine.step() if u.is_finished]
    assert ended == [r.request_id for r in reversed(requests)]


def test_what_can_never_fit_is_refused_and_what_just_fits_is_served() -> None:
    with engine_on(max_bytes=PAGES_OF_60_TOKENS, page_bytes=4096) as engine:
        assert engine.max_tokens_alone == 64
        with pytest.raises(RequestTooLong, match="memory budget"):
            engine.add(Request(prompt_of(30), greedy(35)))
        with pytest.raises(RequestTooLong, match="memory budget"):
            engine.add(Request(prompt_of(64), SamplingParams()))
        with pytest.raises(RequestTooLong, match="the prompt has 1 token, and max_tokens asks for 64 more"):
            engine.add(Request(prompt_of(1), greedy(64)))
        assert not engine.has_work
        fits = Request(prompt_of(30), greedy(34, ignore_eos=True))
        others = [Request(prompt_of(9, i), SamplingParams(temperature=0.0, ignore_eos=True)) for i in range(3)]
        answers = run(engine, [fits, *others])
    assert len(tokens(answers, fits)) == 34
    assert all(answers[r.request_id][0].finish_reason is FinishReason.LENGTH for r in (fits, *others))
    assert all(len(tokens(answers, r)) == 64 - 9 for r in others)


def test_what_is_longer_than_the_model_is_refused_in_the_words_that_clients_know() -> None:
    with engine_on() as engine:
        with pytest.raises(
            RequestTooLong, match=r"maximum context length is 256 tokens; the prompt has 256 tokens, and"
        ):
            engine.add(Request(prompt_of(256), SamplingParams()))
        with pytest.raises(RequestTooLong, match=r"maximum context length is 256 tokens.*max_tokens asks for 57 more"):
            engine.add(Request(prompt_of(200), greedy(57)))


def test_who_waits_takes_nobodys_slot_however_urgent() -> None:
    late, urgent = Request(prompt_of(5), greedy(30, ignore_eos=True), priority=9), Request(prompt_of(6), greedy(2))
    with engine_on(max_num_seqs=1) as engine:
        engine.add(late)
        engine.step()
        engine.add(urgent)
        assert tokens(run(engine), late)
        assert engine.snapshot().n_preempted == 0


def test_the_queue_is_bounded_and_free_slots_do_not_count() -> None:
    with engine_on(max_num_seqs=2, max_queued=3) as engine:
        for i in range(5):
            engine.add(Request(prompt_of(3, i), greedy(2)))
        with pytest.raises(QueueFull):
            engine.add(Request(prompt_of(3), greedy(2)))
        engine.step()
        engine.step()
        engine.add(Request(prompt_of(3), greedy(2, n=2)))
        run(engine)


def test_more_answers_than_can_run_and_wait_are_refused_for_good() -> None:
    with engine_on(max_num_seqs=1, max_queued=1) as engine:
        with pytest.raises(InvalidRequest, match="at most 2 answers can be given"):
            engine.check(Request(prompt_of(3), greedy(2, n=3)))
        run(engine, [Request(prompt_of(3), greedy(2, n=2))])


def test_an_aborted_request_frees_its_pages_at_once() -> None:
    with engine_on() as engine:
        running, waiting = Request(prompt_of(50), greedy(50, n=2)), Request(prompt_of(5), greedy(5))
        engine.add(running)
        engine.step()
        engine.add(waiting)
        assert [u.finish_reason for u in engine.abort(running.request_id)] == [FinishReason.ABORT] * 2
        assert not slots_in_use(engine)
        assert engine.abort(running.request_id) == []
        engine.abort(waiting.request_id)
        assert not engine.has_work


def test_memory_stays_within_what_the_tokens_need() -> None:
    """Nothing is mapped that no token needs, but for the page ahead that the next step needs."""
    with engine_on(page_bytes=4096) as engine:
        request = Request(prompt_of(100), greedy(60, ignore_eos=True))
        engine.add(request)
        n_peak = 0
        while engine.has_work:
            engine.step()
            n_peak = max(n_peak, engine.snapshot().cache.n_owned_pages)
        assert n_peak == engine.memory.n_pages(160)


def test_what_ended_sequences_leave_is_used_before_new_pages_are_created() -> None:
    """Two sequences end at about 100 tokens; a third one grows past them with what both have left."""
    short = [Request(prompt_of(96, i), greedy(4, ignore_eos=True)) for i in range(2)]
    long = Request(prompt_of(10), greedy(170, ignore_eos=True))
    with engine_on(page_bytes=4096, max_num_seqs=2, prefix_caching=False) as engine:
        run(engine, short)
        n_needed = engine.snapshot().cache.n_peak_owned_pages
        assert n_needed == 2 * engine.memory.n_pages(100) > engine.memory.n_pages(180)
        run(engine, [long])
        assert engine.snapshot().cache.n_peak_owned_pages == n_needed


def test_a_model_whose_every_layer_has_a_window_keeps_the_window_only() -> None:
    request = Request(prompt_of(60), greedy(120, ignore_eos=True))
    with engine_on("mistral", page_bytes=4096, max_batch_tokens=32) as engine:
        engine.add(request)
        n_most = 0
        tokens_of: list[int] = []
        while engine.has_work:
            for update in engine.step():
                tokens_of += update.token_ids
            n_most = max(n_most, engine.snapshot().cache.n_live_pages)
        assert n_most <= engine.memory.n_pages(64)
        assert engine.memory.n_pages(180) > 2 * n_most
    with engine_on("mistral", route="rows") as engine:  # which keeps everything
        again = Request(request.prompt_token_ids, request.params)
        assert tokens(run(engine, [again]), again) == tokens_of
