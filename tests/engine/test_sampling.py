"""Tokens are drawn from the distribution that transformers' own processors make, and depend on nobody else."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vmem_kv.engine.request import FinishReason, Request, Sequence
from vmem_kv.engine.sampler import Sampler
from vmem_kv.engine.sampling_params import SamplingParams
from vmem_kv.errors import InvalidRequest

from .harness import engine_on, greedy, prompt_of, run
from .tokenizers import word_tokenizer

PROMPT = (5, 7, 7, 9)


def sequence(seed: int | None = 0, **params: Any) -> Sequence:
    return Sequence(Request(PROMPT, SamplingParams(seed=seed, **params)), 0, 0, 1_000)


def logits_of(n_tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, n_tokens, generator=torch.Generator().manual_seed(seed)) * 2


def drawn(params: dict[str, Any], logits: torch.Tensor, n: int = 4_000) -> torch.Tensor:
    """How often each token comes."""
    sampler = Sampler(frozenset())
    sequences = [sequence(i, **params) for i in range(n)]
    counts = Counter(s.token_id for s in sampler.sample(sequences, logits.expand(n, -1)))
    return torch.tensor([counts[i] / n for i in range(logits.shape[1])])


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"temperature": 1.5, "top_k": 8, "top_p": 0.8, "min_p": 0.1},
        {"repetition_penalty": 1.7, "top_p": 0.95},
    ],
    ids=str,
)
def test_the_distribution_is_transformers_own(params: dict[str, Any]) -> None:
    logits = logits_of(20)
    stock = LogitsProcessorList()
    if "repetition_penalty" in params:
        stock.append(RepetitionPenaltyLogitsProcessor(params["repetition_penalty"]))
    stock.append(TemperatureLogitsWarper(params.get("temperature", 1.0)))
    if "top_k" in params:
        stock.append(TopKLogitsWarper(params["top_k"]))
    if "top_p" in params:
        stock.append(TopPLogitsWarper(params["top_p"]))
    if "min_p" in params:
        stock.append(MinPLogitsWarper(params["min_p"]))
    expected = torch.softmax(stock(torch.tensor([PROMPT]), logits), 1)[0]
    shares = drawn(params, logits)
    assert torch.equal(shares > 0, (expected > 0) & (shares > 0))  # nothing that was cut off
    assert ((shares > 0) | (expected < 0.005)).all()
    assert (shares - expected).abs().max() < 0.03


def test_top_p_over_a_flat_distribution_sorts_everything() -> None:
    """More tokens are needed than the prefix that is looked at first."""
    logits = torch.cat([torch.zeros(1, 1_500), torch.full((1, 500), -5.0)], 1)
    shares = drawn({"top_p": 0.9}, logits, 500)
    assert shares[1_500:].sum() == 0
    assert (shares[:1_500] > 0).sum() > 300


def test_a_row_depends_on_itself_alone() -> None:
    logits = torch.cat([logits_of(300, i) for i in range(6)])
    options: list[dict[str, Any]] = [
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 0.0},
        {"top_k": 5, "presence_penalty": 1.0},
        {"min_p": 0.05, "logit_bias": {3: 5.0}},
        {"repetition_penalty": 1.3, "temperature": 0.0},
        {"logprobs": 2, "top_p": 0.5},
    ]

    def tokens(rows: list[int]) -> list[int | None]:
        sequences = [sequence(7, **options[row]) for row in rows]
        return [s.token_id for s in Sampler(frozenset()).sample(sequences, logits[rows])]

    together = tokens(list(range(6)))
    assert [tokens([row])[0] for row in range(6)] == together
    assert tokens(list(reversed(range(6)))) == together[::-1]


def test_rounding_errors_of_another_batch_do_not_change_what_is_drawn() -> None:
    """Of 200 draws from a long flat tail, to invert the distribution would change about 60."""
    logits = logits_of(50_000)
    shaken = logits + torch.linspace(-1e-4, 1e-4, 50_000)

    def draw(logits: torch.Tensor) -> list[int | None]:
        sequences = [sequence(i, temperature=1.5) for i in range(200)]
        return [s.token_id for s in Sampler(frozenset()).sample(sequences, logits.expand(200, -1))]

    tokens = draw(logits)
    assert len(set(tokens)) > 150
    assert draw(shaken) == tokens


def test_penalties_count_what_was_said() -> None:
    sampler = Sampler(frozenset())
    logits = torch.tensor([[0.0, 1.0, 1.1, 0.9, *[-9.0] * 6]])
    said = sequence(temperature=0.0, frequency_penalty=0.25)
    tokens = [sampler.sample([said], logits)[0].token_id for _ in range(6)]
    assert tokens == [2, 1, 3, 2, 1, 3]
    sampler.drop(said)
    present = sequence(temperature=0.0, presence_penalty=2.0)
    assert [sampler.sample([present], logits)[0].token_id for _ in range(5)] == [2, 1, 3, 0, 2]


def test_bias_and_logprobs_of_the_models_own_distribution() -> None:
    logits = logits_of(50)
    biased = sequence(temperature=0.0, logit_bias={11: 100.0}, logprobs=3)
    sampled = Sampler(frozenset()).sample([biased], logits)[0]
    assert sampled.token_id == 11
    expected = torch.log_softmax(logits[0], 0)
    assert sampled.logprobs is not None
    assert sampled.logprobs.chosen.logprob == pytest.approx(float(expected[11]))
    assert [t.token_id for t in sampled.logprobs.top] == expected.topk(3).indices.tolist()
    assert [t.logprob for t in sampled.logprobs.top] == pytest.approx(expected.topk(3).values.tolist())


def test_logits_that_are_no_numbers_give_no_token_and_harm_nobody() -> None:
    logits = torch.cat([logits_of(9), torch.full((1, 9), torch.nan), logits_of(9)])
    for params in ({"temperature": 0.0}, {"temperature": 1.0}):
        sampled = Sampler(frozenset()).sample([sequence(**params) for _ in range(3)], logits)
        assert [s.token_id is None for s in sampled] == [False, True, False]
        assert sampled[0].token_id == sampled[2].token_id


def test_the_smallest_temperature_is_as_greedy() -> None:
    logits = logits_of(100)
    assert Sampler(frozenset()).sample([sequence(temperature=1e-30)], logits)[0].token_id == int(logits.argmax())


def test_the_same_seed_gives_the_same_answer_in_any_company() -> None:
    params = SamplingParams(temperature=1.2, seed=42, max_tokens=30, ignore_eos=True, n=2)
    with engine_on() as engine:
        request = Request(prompt_of(9), params)
        alone = [a.token_ids for a in run(engine, [request])[request.request_id]]
        others = [
            Request(prompt_of(n), SamplingParams(temperature=0.9, max_tokens=20 + n, ignore_eos=True))
            for n in range(3, 12)
        ]
        request = Request(prompt_of(9), params)
        together = run(engine, [*others[:4], request, *others[4:]], every=2)[request.request_id]
    assert [a.token_ids for a in together] == alone
    assert alone[0] != alone[1]


def test_without_a_seed_answers_differ() -> None:
    with engine_on() as engine:
        params = SamplingParams(max_tokens=100, temperature=2.0, ignore_eos=True)
        requests = [Request(prompt_of(9), params) for _ in range(2)]
        answers = run(engine, requests)
    assert answers[requests[0].request_id][0].token_ids != answers[requests[1].request_id][0].token_ids


def answer(params: SamplingParams) -> Any:
    with engine_on(tokenizer=word_tokenizer()) as engine:
        request = Request(prompt_of(12), params)
        return run(engine, [request])[request.request_id][0]


def test_stops_end_an_answer_and_min_tokens_delays_them() -> None:
    whole = answer(greedy(20, ignore_eos=True))
    assert whole.finish_reason is FinishReason.LENGTH
    assert whole.text.split() == [f"w{t}" for t in whole.token_ids]
    token = whole.token_ids[4]
    first = whole.token_ids.index(token)

    by_token = answer(greedy(20, ignore_eos=True, stop_token_ids=(token,)))
    assert (by_token.finish_reason, by_token.stop_reason) == (FinishReason.STOP, token)
    assert by_token.token_ids == whole.token_ids[: first + 1]

    words = whole.text.split()
    stop = f"{words[3]} {words[4]}"
    by_text = answer(greedy(20, ignore_eos=True, stop=(stop,)))
    assert (by_text.finish_reason, by_text.stop_reason) == (FinishReason.STOP, stop)
    assert by_text.text == whole.text[: whole.text.index(stop)]
    assert answer(greedy(20, ignore_eos=True, stop=(stop,), include_stop=True)).text.endswith(stop)

    after = answer(greedy(20, ignore_eos=True, stop=(stop,), min_tokens=8))
    assert after.text.split()[:8] == words[:8]  # nothing is lost where a stop text does not count yet
    assert len(after.token_ids) >= 8

    later = answer(greedy(20, ignore_eos=True, stop_token_ids=(token,), min_tokens=first + 3))
    assert len(later.token_ids) >= first + 3
    assert token not in later.token_ids[: first + 3]


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("n", "2"),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("min_tokens", -1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", float("inf")),
        ("logit_bias", {3: 101.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", dict.fromkeys(range(2_000), 1.0)),
        ("seed", 2**63),
        ("stop", ("",)),
        ("stop", ("x",) * 17),
        ("stop", (1,)),
        ("stop_token_ids", (-1,)),
        ("logprobs", 21),
    ],
)
def test_values_out_of_range_are_refused_by_name(param: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{param: value})  # type: ignore[arg-type]
    assert caught.value.param == param


def test_what_depends_on_the_model_is_checked_when_a_request_comes() -> None:
    bad = [
        (Request((), SamplingParams()), "prompt"),
        (Request((3, 128), SamplingParams()), "prompt"),
        (Request((3, -1), SamplingParams()), "prompt"),
        (Request((3, True), SamplingParams()), "prompt"),
        (Request((3,), SamplingParams(stop_token_ids=(128,))), "stop_token_ids"),
        (Request((3,), SamplingParams(logit_bias={128: 1.0})), "logit_bias"),
        (Request((3,), SamplingParams(n=9)), "n"),
        (Request((3,), SamplingParams(stop=("x",))), "stop"),
        (Request((3,), SamplingParams(min_tokens=256)), "min_tokens"),
    ]
    with engine_on() as engine:
        for request, param in bad:
            with pytest.raises(InvalidRequest) as caught:
                engine.add(request)
            assert caught.value.param == param
        assert not engine.has_work
