"""The engine as a script sees it."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest

import vmem_kv
from tests.hf.architectures import build_model
from vmem_kv import LLM, SamplingParams
from vmem_kv.engine.request import FinishReason
from vmem_kv.errors import ConfigError, InvalidRequest

from .harness import greedy, greedy_alone, prompt_of, slots_in_use
from .tokenizers import word_tokenizer


@pytest.fixture
def llm() -> Iterator[LLM]:
    with LLM(copy.deepcopy(build_model("llama")), tokenizer=word_tokenizer(), max_bytes="8MiB", max_num_seqs=2) as it:
        yield it
        it.engine.memory.cache.check()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("progress", [True, False])
def test_prompts_are_answered_in_order(llm: LLM, progress: bool) -> None:
    prompts = [prompt_of(n) for n in (9, 4, 20, 7)]
    outputs = llm.generate(prompts, greedy(8), progress=progress)
    assert [o.prompt_token_ids for o in outputs] == prompts
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = greedy_alone("llama", prompt, 8)
        assert list(output.answers[0].token_ids) == expected
        assert output.text.split() == [f"w{t}" for t in expected]


def test_more_prompts_than_the_queue_holds_are_fed_as_there_is_place() -> None:
    with LLM(copy.deepcopy(build_model("llama")), max_queued=2, max_num_seqs=2) as llm:
        outputs = llm.generate([prompt_of(3, i) for i in range(12)], greedy(4), progress=False)
    assert all(o.answers[0].finish_reason in (FinishReason.LENGTH, FinishReason.STOP) for o in outputs)


def test_texts_one_prompt_and_parameters_for_each(llm: LLM) -> None:
    [alone] = llm.generate("w5 w6 w7", greedy(4), progress=False)
    assert alone.prompt_token_ids == (5, 6, 7)
    [by_tokens] = llm.generate([5, 6, 7], greedy(4), progress=False)
    assert by_tokens.answers == alone.answers
    both = llm.generate(["w5 w6 w7", "w9"], [greedy(4), SamplingParams(n=2, max_tokens=3, seed=1)], progress=False)
    assert both[0].answers == alone.answers
    assert len(both[1].answers) == 2


def test_what_is_wrong_is_said_before_anything_is_computed(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="2 parameters"):
        llm.generate(["w5"], [greedy(1)] * 2, progress=False)
    with pytest.raises(InvalidRequest, match="empty"):
        llm.generate(["w5", []], greedy(1), progress=False)
    with pytest.raises(ConfigError, match="chat template"):
        llm.chat([{"role": "user", "content": "w5"}])
    assert llm.stats().n_requests == 0


def test_an_interruption_ends_all_requests(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, n_steps = llm.engine.step, 0

    def interrupted() -> object:
        nonlocal n_steps
        n_steps += 1
        if n_steps == 3:
            raise KeyboardInterrupt
        return stock()

    monkeypatch.setattr(llm.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([prompt_of(9)] * 3, greedy(20), progress=False)
    assert not llm.engine.has_work
    assert not slots_in_use(llm.engine)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"max_seqs": 3}, "max_seqs"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_batch_tokens": 8}, "max_batch_tokens"),
        ({"max_model_len": 1_000}, "256"),
        ({"route": "fast"}, "route"),
        ({"premap_tokens": -1}, "premap_tokens"),
        ({"max_bytes": 10}, "max_bytes"),
        ({"kernel": "none"}, "none"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(options: dict[str, object], why: str) -> None:
    model = copy.deepcopy(build_model("llama"))
    attention = model.config._attn_implementation
    with pytest.raises(ConfigError, match=why):
        LLM(model, **options)
    assert model.config._attn_implementation == attention


def test_the_names_are_exported() -> None:
    assert {"LLM", "SamplingParams"} <= set(vmem_kv.__all__)
