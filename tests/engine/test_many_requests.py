"""Hundreds of requests with random options, arriving, ending and aborted at random, in far too little memory."""

from __future__ import annotations

import random
from typing import Any

import pytest

from vmem_kv.engine.request import Request, SequenceUpdate
from vmem_kv.engine.sampling_params import SamplingParams

from .harness import MAX_STEPS, engine_on, prompt_of, run
from .tokenizers import word_tokenizer

pytestmark = pytest.mark.slow


def random_request(rng: random.Random, seed: int) -> Request:
    params = SamplingParams(
        n=rng.choice([1, 1, 2]),
        max_tokens=rng.randrange(1, 120),
        temperature=rng.choice([0.0, 0.7, 1.3]),
        top_k=rng.choice([0, 5, 40]),
        top_p=rng.choice([1.0, 0.8]),
        min_p=rng.choice([0.0, 0.05]),
        repetition_penalty=rng.choice([1.0, 1.2]),
        presence_penalty=rng.choice([0.0, 0.3]),
        frequency_penalty=rng.choice([0.0, 0.5]),
        logit_bias=rng.choice([{}, {7: 2.0, 8: -5.0}]),
        seed=seed,
        stop=rng.choice([(), ("w5 w", "w77"), ("w1",)]),
        stop_token_ids=rng.choice([(), (9,)]),
        ignore_eos=rng.random() < 0.5,
        logprobs=rng.choice([None, 0, 3]),
    )
    prompt = prompt_of(rng.randrange(1, 90), seed)
    return Request(prompt, params, priority=rng.randrange(3), domain=str(rng.randrange(3)))


def summary(updates: list[SequenceUpdate]) -> list[Any]:
    return [(u.token_ids, u.text, u.finish_reason, u.stop_reason) for u in updates]


@pytest.mark.parametrize(("architecture", "n_requests"), [("llama", 250), ("falcon_h1", 60)])
def test_everybody_gets_what_he_would_get_alone(architecture: str, n_requests: int) -> None:
    rng = random.Random(2)
    requests = [random_request(rng, seed) for seed in range(n_requests)]
    with engine_on(architecture, tokenizer=word_tokenizer()) as engine:
        alone = {r.request_id: summary(run(engine, [r])[r.request_id]) for r in requests}
        max_bytes = engine.memory.n_pages(230) * engine.memory.pool.page_bytes
    answers: dict[str, dict[int, SequenceUpdate]] = {}
    aborted: set[str] = set()
    waiting = requests[::-1]
    with engine_on(
        architecture, tokenizer=word_tokenizer(), max_num_seqs=10, max_batch_tokens=64, max_bytes=max_bytes
    ) as engine:
        n_steps = 0
        while waiting or engine.has_work:
            for _ in range(min(len(waiting), rng.randrange(9))):
                engine.add(waiting.pop())
            for update in engine.step():
                parts = answers.setdefault(update.request_id, {})
                if update.index in parts:
                    parts[update.index].append(update)
                else:
                    parts[update.index] = update
            unfinished = [r.request_id for r in requests if engine.is_unfinished(r.request_id)]
            if unfinished and rng.random() < 0.01:
                aborted.add(victim := rng.choice(unfinished))
                engine.abort(victim)
            if rng.random() < 0.01:
                engine.memory.cache.check()
            n_steps += 1
            assert n_steps < 3 * MAX_STEPS, "no progress"
        assert engine.snapshot().n_preempted > 0
        assert engine.snapshot().n_finished["error"] == 0
        assert engine.memory.cache.active_slots() == []
    kept = [r.request_id for r in requests if r.request_id not in aborted]
    assert len(kept) > n_requests // 2
    for request_id in kept:
        assert summary([part for _, part in sorted(answers[request_id].items())]) == alone[request_id]
