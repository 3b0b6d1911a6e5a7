"""Greedy tokens are those of transformers' own `generate`, alone and in company, for every architecture served."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.hf.architectures import ARCHITECTURES, VOCABULARY, build_model
from vmem_kv.engine.engine import Engine
from vmem_kv.engine.request import Request
from vmem_kv.errors import ConfigError

from .harness import engine_on, greedy, greedy_alone, prompt_of, run, tokens

PACKED = ["llama", "qwen3", "gpt2", "qwen2_moe", "mistral", "gemma2", "gemma3", "gpt_oss", "deepseek_v3"]
ROWS = [*PACKED, "llama4", "gemma3n", "qwen3_next", "jamba", "bamba", "falcon_h1", "lfm2"]
LENGTHS = [1, 5, 13, 40, 20, 33, 2, 29]


def check(architecture: str, *, every: int, n_tokens: int = 25, **options: object) -> None:
    requests = [Request(prompt_of(n), greedy(n_tokens)) for n in LENGTHS]
    with engine_on(architecture, **options) as engine:
        answers = run(engine, requests, every=every)
    for request in requests:
        expected = greedy_alone(architecture, request.prompt_token_ids, n_tokens)
        assert tokens(answers, request) == expected


@pytest.mark.parametrize("architecture", PACKED)
def test_all_at_once_with_prompts_in_chunks(architecture: str) -> None:
    check(architecture, every=0, route="packed", max_num_seqs=4, max_batch_tokens=24)


@pytest.mark.parametrize("architecture", PACKED)
def test_arriving_while_others_decode(architecture: str) -> None:
    check(architecture, every=7, route="packed", max_num_seqs=3, max_batch_tokens=64)


@pytest.mark.parametrize("architecture", ROWS)
def test_by_rows_all_at_once_with_prompts_in_chunks(architecture: str) -> None:
    check(architecture, every=0, route="rows", max_num_seqs=4, max_batch_tokens=24)


@pytest.mark.parametrize("architecture", ROWS)
def test_by_rows_arriving_while_others_decode(architecture: str) -> None:
    check(architecture, every=7, route="rows", max_num_seqs=3, max_batch_tokens=64)


@pytest.mark.parametrize("architecture", ["llama4", "deepseek_v3", "jamba", "bamba", "falcon_h1"])
def test_by_rows_with_far_too_little_memory(architecture: str) -> None:
    requests = [Request(prompt_of(n), greedy(60, ignore_eos=True)) for n in LENGTHS]
    with engine_on(architecture, route="rows") as engine:
        alone = {r.request_id: run(engine, [r])[r.request_id][0].token_ids for r in requests}
        max_bytes = engine.memory.n_pages(150) * engine.memory.pool.page_bytes
    with engine_on(architecture, route="rows", max_bytes=max_bytes, max_num_seqs=8) as engine:
        answers = run(engine, requests)
        assert engine.snapshot().n_preempted > 0
    assert {r.request_id: tokens(answers, r) for r in requests} == alone


@pytest.mark.parametrize(
    ("architecture", "route"),
    [("llama", "packed"), ("gpt_oss", "packed"), ("deepseek_v3", "rows"), ("qwen3_next", "rows"), ("gemma3n", "rows")],
)
def test_auto_takes_the_packed_route_where_it_fits(architecture: str, route: str) -> None:
    with engine_on(architecture) as engine:
        assert engine.route.name == route


@pytest.mark.parametrize(
    ("architecture", "why"), [("mamba", "past_key_values"), ("t5", "encoder"), ("bart", "encoder")]
)
def test_what_fits_no_route_is_refused_with_the_reasons(architecture: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why), engine_on(architecture):
        pass


@pytest.mark.parametrize("layout", ["per_head", "per_layer", "group:2", "token_major"])
def test_every_layout(layout: str) -> None:
    check("llama", every=3, layout=layout, max_num_seqs=4)


def test_a_token_that_is_written_to_the_wrong_place_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests can fail: K and V shifted by a token change the answers."""
    stock = torch.Tensor.index_put_

    def shifted(self: torch.Tensor, rows: tuple[torch.Tensor], values: torch.Tensor) -> torch.Tensor:
        return stock(self, rows, values.roll(1, 0))

    monkeypatch.setattr(torch.Tensor, "index_put_", shifted)
    with pytest.raises(AssertionError):
        check("llama", every=0)


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - set(PACKED)))
def test_what_the_packed_route_would_compute_wrongly_is_refused(architecture: str) -> None:
    model = copy.deepcopy(build_model(architecture))
    attention = model.config._attn_implementation
    with pytest.raises(ConfigError, match=type(model).__name__), engine_on(architecture, route="packed"):
        pass
    assert model.config._attn_implementation == attention


def test_close_leaves_the_model_as_it_was() -> None:
    model = copy.deepcopy(build_model("llama"))
    prompt = torch.randint(3, VOCABULARY, (1, 9))
    before = model(prompt).logits
    engine = Engine(model)
    engine.close()
    engine.close()
    assert torch.equal(model(prompt).logits, before)
