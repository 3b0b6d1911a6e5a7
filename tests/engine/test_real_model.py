"""The real model with its real tokenizer: tokens and texts are those of `generate`, in company and under pressure."""

from __future__ import annotations

import pytest
import torch

from vmem_kv import LLM, SamplingParams
from vmem_kv.models import load

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(600)]

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a land far away,",
    "def fibonacci(n):",
    "Water boils at",
    "The three primary colours are",
    "Write a list of animals:\n1.",
]
N_TOKENS = 24


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[list[int], str]]:
    model, tokenizer = load()
    answers: dict[str, tuple[list[int], str]] = {}
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=N_TOKENS, do_sample=False)
        token_ids = output[0, inputs.input_ids.shape[1] :].tolist()
        answers[prompt] = token_ids, tokenizer.decode(token_ids, skip_special_tokens=True)
    return answers


@pytest.mark.parametrize("route", ["packed", "rows"])
def test_tokens_and_texts_are_those_of_generate(route: str, expected: dict[str, tuple[list[int], str]]) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=N_TOKENS)
    with LLM(route=route, max_num_seqs=4, max_batch_tokens=16) as llm:
        outputs = llm.generate(PROMPTS, params, progress=False)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert (list(output.answers[0].token_ids), output.text) == expected[prompt]


def test_with_far_too_little_memory(expected: dict[str, tuple[list[int], str]]) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=N_TOKENS)
    with LLM(page_bytes=4096, max_bytes=1_500 * 4096, premap_tokens=0) as llm:
        outputs = llm.generate(PROMPTS, params, progress=False)
        assert llm.stats().cache.n_peak_owned_pages <= 1_500
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert list(output.answers[0].token_ids) == expected[prompt][0]


def test_streamed_text_of_emoji_is_whole() -> None:
    with LLM() as llm:
        [output] = llm.chat(
            [{"role": "user", "content": "Answer with many emoji."}],
            SamplingParams(temperature=0.8, seed=1, n=3, max_tokens=40),
            progress=False,
        )
        assert llm.tokenizer is not None
        for answer in output.answers:
            assert answer.text == llm.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
