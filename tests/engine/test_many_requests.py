"""A thousand requests with random options, arriving, ending and aborted at random, in a third of the memory they want.

Everybody gets what he would get alone, nobody waits forever, and nothing is left: no page, no thread, no file.
"""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest

from vmem_kv.engine.engine import Engine
from vmem_kv.engine.request import Request, SequenceUpdate
from vmem_kv.engine.sampling_params import SamplingParams

from ..held import Held
from .harness import MAX_STEPS, engine_on, n_pages_in_use, prompt_of, run, slots_in_use
from .tokenizers import word_tokenizer

N_SLOTS = 10
MAX_IDLE_STEPS = 100
"""Steps in which at least one token must come: the promise of progress."""


def random_request(rng: random.Random, seed: int) -> Request:
    is_long = rng.random() < 0.15
    params = SamplingParams(
        n=rng.choice([1, 1, 2]),
        max_tokens=rng.randrange(70, 110) if is_long else rng.randrange(1, 10),
        min_tokens=rng.choice([0, 1]),
        temperature=rng.choice([0.0, 0.7, 1.3]),
        top_k=rng.choice([0, 5, 40]),
        top_p=rng.choice([1.0, 0.8]),
        min_p=rng.choice([0.0, 0.05]),
        repetition_penalty=rng.choice([1.0, 1.2]),
        presence_penalty=rng.choice([0.0, 0.3]),
        frequency_penalty=rng.choice([0.0, 0.5]),
        logit_bias=rng.choice([{}, {7: 2.0, 8: -5.0}]),
        seed=seed,
        stop=() if is_long else rng.choice([(), ("w5 w", "w77"), ("w1",)]),
        stop_token_ids=() if is_long else rng.choice([(), (9,)]),
        ignore_eos=is_long or rng.random() < 0.5,
        include_stop=rng.random() < 0.3,
        logprobs=rng.choice([None, 0, 3]),
        skip_special_tokens=rng.random() < 0.5,
    )
    prompt = prompt_of(rng.randrange(1, 90), seed)
    return Request(prompt, params, priority=rng.randrange(3), domain=str(rng.randrange(3)))


def summary(updates: list[SequenceUpdate]) -> list[Any]:
    return [
        (u.token_ids, u.text, u.finish_reason, u.stop_reason, [t.chosen.token_id for t in u.logprobs]) for u in updates
    ]


def churn(engine: Engine, requests: list[Request], rng: random.Random) -> tuple[dict[str, list[Any]], set[str]]:
    """Add requests a few at a time, abort some; return the summaries of the answers, and who was aborted."""
    answers: dict[str, dict[int, SequenceUpdate]] = {}
    aborted: set[str] = set()
    waiting = requests[::-1]
    n_steps = n_idle_steps = 0
    while waiting or engine.has_work:
        for _ in range(rng.randrange(9)):
            if waiting and engine.has_place(waiting[-1].params.n):
                engine.add(waiting.pop())
        updates = engine.step()
        n_idle_steps = 0 if updates else n_idle_steps + 1
        assert n_idle_steps < MAX_IDLE_STEPS, "no progress"
        for update in updates:
            parts = answers.setdefault(update.request_id, {})
            if update.index in parts:
                parts[update.index].append(update)
            else:
                parts[update.index] = update
        if rng.random() < 0.01:
            unfinished = [r.request_id for r in requests if engine.is_unfinished(r.request_id)]
            if unfinished:
                aborted.add(victim := rng.choice(unfinished))
                engine.abort(victim)
            engine.memory.cache.check()
        n_steps += 1
        assert n_steps < 3 * MAX_STEPS, "no end"
    return {
        request_id: summary([part for _, part in sorted(parts.items())]) for request_id, parts in answers.items()
    }, aborted


def third_of_the_demand(engine: Engine, alone: dict[str, list[Any]], requests: list[Request]) -> int:
    """Bytes that all slots would use at once with answers of average length, by three; the longest must fit alone."""
    n_pages = [
        engine.memory.n_pages(len(r.prompt_token_ids) + len(answer[0]))
        for r in requests
        for answer in alone[r.request_id]
    ]
    longest = max(engine.memory.n_pages(len(r.prompt_token_ids) + (r.params.max_tokens or 0)) for r in requests)
    return max(N_SLOTS * sum(n_pages) // len(n_pages) // 3, longest) * engine.memory.pool.page_bytes


@pytest.mark.timeout(600)  # half a minute on two idle cores
@pytest.mark.parametrize(("architecture", "n_requests"), [("llama", 1_000), ("falcon_h1", 80)])
def test_everybody_gets_what_he_would_get_alone(architecture: str, n_requests: int) -> None:
    rng = random.Random(2)
    requests = [random_request(rng, seed) for seed in range(n_requests)]
    with engine_on(architecture, tokenizer=word_tokenizer(), page_bytes=4096) as engine:
        alone = {r.request_id: summary(run(engine, [r])[r.request_id]) for r in requests}
        max_bytes = third_of_the_demand(engine, alone, requests)
    gc.collect()
    before = Held.now()
    with engine_on(
        architecture,
        tokenizer=word_tokenizer(),
        max_num_seqs=N_SLOTS,
        max_batch_tokens=64,
        max_queued=30,
        max_bytes=max_bytes,
        page_bytes=4096,
    ) as engine:
        answers, aborted = churn(engine, requests, rng)
        stats = engine.snapshot()
        assert stats.n_preempted > 0
        assert stats.n_finished["error"] == 0
        assert n_pages_in_use(engine) == 0
        assert not slots_in_use(engine)
    gc.collect()
    assert not Held.now().beyond(before)
    kept = [r.request_id for r in requests if r.request_id not in aborted]
    assert len(kept) > n_requests // 2
    for request_id in kept:
        assert answers[request_id] == alone[request_id]
