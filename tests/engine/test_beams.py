"""Beam search gives transformers' own beams, and its rounds compute what is new."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.hf.architectures import build_model
from vmem_kv import LLM
from vmem_kv.engine.beams import BeamParams, BeamSearch
from vmem_kv.engine.request import FinishReason, TokenLogprob, TokenLogprobs
from vmem_kv.errors import InvalidRequest

from .harness import prompt_of, slots_in_use
from .tokenizers import word_tokenizer


def beams_of_generate(
    model: Any, prompt: tuple[int, ...], params: BeamParams, end: int
) -> list[tuple[list[int], float]]:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=params.max_tokens,
            do_sample=False,
            num_beams=params.width,
            num_return_sequences=params.width,
            length_penalty=params.length_penalty,
            early_stopping=False,
            eos_token_id=end,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    found = []
    for row, score in zip(output.sequences[:, len(prompt) :].tolist(), output.sequences_scores.tolist(), strict=True):
        found.append((row[: row.index(end) + 1] if end in row else row[: params.max_tokens], score))
    return found


@pytest.mark.parametrize(
    ("architecture", "width", "length_penalty"),
    [("llama", 2, 1.0), ("llama", 3, 1.0), ("llama", 4, 0.0), ("gemma2", 4, 2.0), ("llama", 5, -1.0)],
)
def test_the_beams_of_generate(architecture: str, width: int, length_penalty: float) -> None:
    model = copy.deepcopy(build_model(architecture))
    params = BeamParams(width, 12, length_penalty)
    prompts = [prompt_of(n, n) for n in (3, 18, 40)]
    # A token that the models say soon, or no beam would end early.
    with LLM(model, max_num_seqs=6) as llm:
        end = llm.generate([prompts[1]], progress=False)[0].answers[0].token_ids[0]
        llm.engine.end_token_ids = frozenset([end])
        found = llm.beam_search(prompts, params)
        assert not slots_in_use(llm.engine)
        llm.engine.memory.cache.check()
    for prompt, beams in zip(prompts, found, strict=True):
        expected = beams_of_generate(model, prompt, params, end)
        assert [list(beam.token_ids) for beam in beams] == [token_ids for token_ids, _ in expected]
        assert [beam.score for beam in beams] == pytest.approx([score for _, score in expected], rel=1e-5)


def test_a_round_computes_one_token_a_beam() -> None:
    with LLM(copy.deepcopy(build_model("llama")), tokenizer=word_tokenizer(), max_num_seqs=4) as llm:
        [beams] = llm.beam_search("w5 " * 60, BeamParams(width=4, max_tokens=10, ignore_eos=True))
        stats = llm.stats()
    assert [len(beam.token_ids) for beam in beams] == [10] * 4
    assert {beam.finish_reason for beam in beams} == {FinishReason.LENGTH}
    assert [beam.text.split() for beam in beams] == [[f"w{t}" for t in beam.token_ids] for beam in beams]
    assert stats.n_prompt_tokens == 60 + 4 * 9


def likeliest(*pairs: tuple[int, float]) -> TokenLogprobs:
    top = tuple(TokenLogprob(token_id, logprob) for token_id, logprob in pairs)
    return TokenLogprobs(top[0], top)


def test_an_end_behind_the_best_is_no_finished_beam() -> None:
    """As in transformers: an end counts only among the best `width` candidates."""
    search = BeamSearch((1,), BeamParams(width=2, max_tokens=2), frozenset([9]))
    search.take([likeliest((3, -0.1), (4, -0.2), (9, -0.3))])
    assert search.beams() == ()
    assert search.asks() == [(1, 3), (1, 4)]
    search.take([likeliest((9, -0.1), (5, -3.0), (6, -4.0)), likeliest((7, -0.1), (9, -9.0), (5, -9.5))])
    assert [(beam.token_ids, beam.finish_reason) for beam in search.beams()] == [
        ((3, 9), FinishReason.STOP),
        ((4, 7), FinishReason.LENGTH),
    ]
    assert search.asks() == []


def test_it_ends_when_nobody_can_become_better() -> None:
    search = BeamSearch((1,), BeamParams(width=1, max_tokens=50), frozenset([9]))
    search.take([likeliest((9, -0.1), (3, -0.2))])
    assert search.asks() == []
    assert [beam.token_ids for beam in search.beams()] == [(9,)]


@pytest.mark.parametrize(
    "wrong", [{"width": 0}, {"width": 21}, {"width": True}, {"max_tokens": 0}, {"length_penalty": float("nan")}]
)
def test_nonsense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(wrong))):
        BeamParams(**wrong)


def test_what_cannot_be_asked_is_refused_before_anything_is_computed() -> None:
    with LLM(copy.deepcopy(build_model("llama"))) as llm:
        llm.engine.end_token_ids = frozenset(range(5))
        with pytest.raises(InvalidRequest, match="at most 15"):
            llm.beam_search([(1, 2)], BeamParams(width=16))
        with pytest.raises(InvalidRequest, match="context length"):
            llm.beam_search([(1, 2)], BeamParams(max_tokens=1 << 40))
        assert llm.stats().n_requests == 0
