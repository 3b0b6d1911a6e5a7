"""Parameters and prompts as people write them: what makes sense is taken, the rest is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.hf.architectures import build_model
from vmem_kv import LLM, SamplingParams
from vmem_kv.errors import InvalidRequest

from .harness import greedy
from .tokenizers import word_tokenizer


@pytest.fixture
def llm() -> Iterator[LLM]:
    with LLM(copy.deepcopy(build_model("llama")), tokenizer=word_tokenizer(), max_bytes="8MiB", max_num_seqs=2) as it:
        yield it


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("stop", 5),
        ("stop", {"x": 1}),
        ("stop", b"x"),
        ("stop_token_ids", 5),
        ("stop_token_ids", "5"),
        ("stop_token_ids", ["5"]),
        ("logit_bias", [1]),
        ("logit_bias", 1),
        ("logit_bias", {"x": 1.0}),
        ("logit_bias", {1: None}),
    ],
)
def test_values_of_another_type_are_refused_by_name(param: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=param) as caught:
        SamplingParams(**{param: value})  # type: ignore[arg-type]
    assert caught.value.param == param


def test_none_is_the_default() -> None:
    nothing: dict[str, Any] = {field.name: None for field in dataclasses.fields(SamplingParams)}
    assert SamplingParams(**nothing) == SamplingParams()
    for param in nothing:
        one: dict[str, Any] = {param: None}
        assert SamplingParams(**one) == SamplingParams()


def test_parameters_can_be_copied_and_compared() -> None:
    given: dict[str, Any] = {"stop": ["x"], "stop_token_ids": [3], "logit_bias": {5: 1.0, 6: 2.0}, "seed": 1}
    params = SamplingParams(**given)
    for twin in (
        copy.copy(params),
        copy.deepcopy(params),
        pickle.loads(pickle.dumps(params)),
        SamplingParams(**dataclasses.asdict(params)),
        dataclasses.replace(params),
        SamplingParams(**{**given, "logit_bias": {6: 2.0, 5: 1.0}}),
    ):
        assert twin == params
        assert hash(twin) == hash(params)
        assert dict(twin.logit_bias) == {5: 1.0, 6: 2.0}
    assert params != dataclasses.replace(params, logit_bias={5: 1.0})


def test_nobody_changes_biases() -> None:
    given = {5: 1.0}
    params = SamplingParams(logit_bias=given)
    given[5] = 1_000.0
    assert params.logit_bias == {5: 1.0}
    with pytest.raises(TypeError):
        params.logit_bias[5] = 1_000.0  # type: ignore[index]


@pytest.mark.parametrize(
    "prompt",
    [
        (5, 6, 7),
        np.array([5, 6, 7]),
        [np.int64(5), np.int64(6), np.int64(7)],
        torch.tensor([5, 6, 7]),
        list(torch.tensor([5, 6, 7])),
    ],
    ids=["tuple", "array", "numbers_of_numpy", "tensor", "tensors"],
)
def test_tokens_may_be_arrays(llm: LLM, prompt: Any) -> None:
    expected = llm.generate([5, 6, 7], greedy(4), progress=False)
    assert llm.generate(prompt, greedy(4), progress=False)[0].answers == expected[0].answers
    [one, other] = llm.generate([prompt, "w5 w6 w7"], greedy(4), progress=False)
    assert one.answers == other.answers == expected[0].answers


def test_rows_of_an_array_are_prompts(llm: LLM) -> None:
    rows: Any = np.array([[5, 6], [7, 8]])
    outputs = llm.generate(rows, greedy(2), progress=False)
    assert [o.prompt_token_ids for o in outputs] == [(5, 6), (7, 8)]
    assert llm.generate([], greedy(2), progress=False) == []


@pytest.mark.parametrize(
    ("prompts", "param"),
    [
        (None, "prompt"),
        (5, "prompt"),
        ([None], "prompt"),
        ([5, "x"], "prompt"),
        (["w5", 5], "prompt"),
        ({"prompt_token_ids": [5]}, "prompt"),
        ([{"prompt_token_ids": [5]}], "prompt"),
        (np.array([1.5, 2.0]), "prompt"),
        (torch.tensor(5), "prompt"),
        (b"w5", "prompt"),
    ],
    ids=repr,
)
def test_prompts_that_are_none_are_refused(llm: LLM, prompts: Any, param: str) -> None:
    with pytest.raises(InvalidRequest, match=param) as caught:
        llm.generate(prompts, greedy(2), progress=False)
    assert caught.value.param == param
    assert llm.stats().n_requests == 0


@pytest.mark.parametrize(
    "options",
    [{"params": {"max_tokens": 3}}, {"params": 3}, {"params": [{"max_tokens": 3}]}, {"params": [None]}],
    ids=repr,
)
def test_parameters_of_another_type_are_refused(llm: LLM, options: Any) -> None:
    with pytest.raises(InvalidRequest, match="params") as caught:
        llm.generate("w5", progress=False, **options)
    assert caught.value.param == "params"


def test_names_of_sessions_are_a_list(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="session_ids"):
        llm.generate("w5", greedy(2), session_ids="a", progress=False)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_is_on_standard_errors_terminal(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    llm.generate("w5", greedy(2))
    assert "Generating" in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_without_a_terminal_there_is_no_bar(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate("w5", greedy(2))
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
