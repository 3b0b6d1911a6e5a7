"""However many tokens are kept, and whoever shares the step, the sampler keeps and draws what it should."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from vmem_kv.engine import sampler as module
from vmem_kv.engine.request import Request, Sequence
from vmem_kv.engine.sampler import Sampler
from vmem_kv.engine.sampling_params import SamplingParams

from .harness import engine_on, greedy, prompt_of, run

N_TOKENS = 9_000  # more than every prefix
PROMPT = (5, 7, 7, 9)
SLOPES = (4.0, 1.0, 0.3, 0.001)  # from a few likely tokens to almost all alike


def sequence(seed: int = 0, **params: Any) -> Sequence:
    return Sequence(Request(PROMPT, SamplingParams(seed=seed, **params)), 0, 0, 1_000)


def logits_of(slope: float, seed: int = 0, n_tokens: int = N_TOKENS) -> torch.Tensor:
    return torch.randn(n_tokens, generator=torch.Generator().manual_seed(seed)) * slope


def sample(sequences: list[Sequence], logits: torch.Tensor) -> list[int | None]:
    return [sampled.token_id for sampled in Sampler(frozenset()).sample(sequences, logits)]


def test_what_is_kept_is_what_transformers_keeps() -> None:
    """All rows at once, so that every prefix is passed by some."""
    asks = [(slope, k, p) for slope in SLOPES for k in (0, 1, 40, 500, 5_000) for p in (1.0, 0.95, 0.5)]
    logits = torch.stack([logits_of(slope, i) for i, (slope, _, _) in enumerate(asks)])
    weights = logits.softmax(1)
    least = module._least_kept(weights, [k for _, k, _ in asks], [p for _, _, p in asks])
    assert least is not None
    for row, (_, k, p) in enumerate(asks):
        stock = LogitsProcessorList([TopPLogitsWarper(p)] if p < 1.0 else [])
        if k:
            stock.insert(0, TopKLogitsWarper(k))
        expected = int(torch.isfinite(stock(torch.tensor([PROMPT]), logits[row : row + 1])).sum())
        kept = int((weights[row] >= least[row]).sum())
        rounding = expected // 500 + (p < 1.0)  # of sums, and of neighbours that become alike
        assert abs(kept - expected) <= rounding, asks[row]


def test_nothing_is_looked_for_where_nobody_asks() -> None:
    assert module._least_kept(logits_of(1.0).softmax(0).unsqueeze(0), [0], [1.0]) is None
    assert module._least_kept(logits_of(1.0).softmax(0).unsqueeze(0), [N_TOKENS], [1.0]) is None


@pytest.mark.parametrize("n_tokens", [1, 63, 64, 65, 200])
def test_every_token_has_its_chance_in_whatever_block(n_tokens: int) -> None:
    logits = logits_of(1.0, n_tokens=n_tokens)
    n = 6_000
    counts = Counter(sample([sequence(i) for i in range(n)], logits.expand(n, -1)))
    assert set(counts) <= set(range(n_tokens))
    expected = logits.softmax(0) * n
    observed = torch.tensor([float(counts[i]) for i in range(n_tokens)])
    often = expected > 5
    chi_square = float(((observed - expected)[often] ** 2 / expected[often]).sum())
    n_often = int(often.sum())
    assert chi_square < n_often + 4 * (2 * n_often) ** 0.5 + 1  # four standard deviations, of fixed seeds


def test_a_biased_race_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: with times for the blocks that are not their own."""
    stock = Sampler._arrivals

    def same_for_all(self: Sampler, sequences: list[Sequence], n_times: int) -> torch.Tensor:
        times = stock(self, sequences, n_times)
        times[:, module._BLOCK_TOKENS :] = times[:, module._BLOCK_TOKENS : module._BLOCK_TOKENS + 1]
        return times

    monkeypatch.setattr(Sampler, "_arrivals", same_for_all)
    with pytest.raises(AssertionError):
        test_every_token_has_its_chance_in_whatever_block(200)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_p": 0.9},
    {"top_k": 300},
    {"temperature": 0.0},
    {"min_p": 0.1, "repetition_penalty": 1.2},
    {"top_k": 50, "top_p": 0.95, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"logprobs": 2, "logit_bias": {3: 5.0}},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_drawn_alike_in_any_company(dtype: torch.dtype) -> None:
    """More rows than are drawn for together."""
    n_rows = 2 * module._CPU_ROWS + 3
    logits = torch.stack([logits_of(SLOPES[i % 3], i, 700) for i in range(n_rows)]).to(dtype)
    before = logits.clone()

    def tokens(rows: list[int]) -> list[int | None]:
        return sample([sequence(row, **OPTIONS[row % len(OPTIONS)]) for row in rows], logits[rows])

    alone = [tokens([row])[0] for row in range(n_rows)]
    assert tokens(list(range(n_rows))) == alone
    assert tokens(list(reversed(range(n_rows)))) == alone[::-1]
    assert torch.equal(logits, before)


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf])
def test_rows_that_are_no_numbers_harm_nobody_whatever_is_asked(bad: float) -> None:
    logits = torch.stack([logits_of(1.0, 0, 700), torch.full((700,), bad), logits_of(0.001, 2, 700)])
    for options in [*OPTIONS, {"top_p": 0.999}]:
        token_ids = sample([sequence(row, **options) for row in range(3)], logits)
        assert token_ids[1] is None
        assert token_ids[::2] == sample([sequence(row, **options) for row in (0, 2)], logits[::2])


def test_penalties_are_those_of_the_definition() -> None:
    """Over many steps, for several rows, against a formula over the whole vocabulary."""
    n_tokens, n_steps = 40, 60
    values = [(1.3, 0.5, 0.2), (0.8, -1.0, 0.0), (1.0, 0.0, 1.5)]
    rows = [
        sequence(i, repetition_penalty=r, presence_penalty=p, frequency_penalty=f) for i, (r, p, f) in enumerate(values)
    ]
    sampler = Sampler(frozenset())
    answers: list[list[int]] = [[], [], []]
    for step in range(n_steps):
        logits = torch.stack([logits_of(2.0, 10 * step + i, n_tokens) for i in range(3)])
        changed = sampler._change(rows, logits)
        for row, ((repetition, presence, frequency), said) in enumerate(zip(values, answers, strict=True)):
            for token in range(n_tokens):
                score = float(logits[row, token])
                if token in PROMPT or token in said:
                    score = score * repetition if score < 0 else score / repetition
                score -= frequency * said.count(token) + presence * (token in said)
                assert float(changed[row, token]) == pytest.approx(score, abs=1e-5)
        for said, sampled in zip(answers, sampler.sample(rows, logits), strict=True):
            assert sampled.token_id is not None
            said.append(sampled.token_id)


def test_who_ignores_ends_may_say_them_before_min_tokens() -> None:
    with engine_on() as engine:
        [end] = engine.end_token_ids
        bias = {end: 100.0}
        free = Request(prompt_of(5), greedy(6, ignore_eos=True, min_tokens=6, logit_bias=bias))
        bound = Request(prompt_of(5), greedy(6, min_tokens=4, logit_bias=bias))
        stopped = Request(
            prompt_of(5), greedy(6, ignore_eos=True, min_tokens=4, logit_bias=bias, stop_token_ids=(end,))
        )
        answers = run(engine, [free, bound, stopped])
    assert answers[free.request_id][0].token_ids == [end] * 6
    for request in (bound, stopped):
        token_ids = answers[request.request_id][0].token_ids
        assert end not in token_ids[:4]
        assert token_ids[4:] == [end]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-38])
def test_temperatures_next_to_zero_are_greedy(temperature: float) -> None:
    logits = logits_of(1.0).unsqueeze(0)
    assert sample([sequence(temperature=temperature)], logits) == [int(logits.argmax())]


def test_a_draw_takes_few_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Far fewer than there are tokens."""
    stock, seen = Sampler._arrivals, []

    def watched(self: Sampler, sequences: list[Sequence], n_times: int) -> torch.Tensor:
        seen.append(n_times)
        return stock(self, sequences, n_times)

    monkeypatch.setattr(Sampler, "_arrivals", watched)
    sample([sequence()], logits_of(1.0).unsqueeze(0))
    assert seen == [-(-N_TOKENS // module._BLOCK_TOKENS) + module._BLOCK_TOKENS]
