"""Whatever `generate` does with a cache, the tokens are those of `DynamicCache`.

Every scenario runs on every architecture with the model's own attention, and a part of them with other attention
functions, dtypes, layouts and page sizes. Both sides always use the same attention function.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vmem_kv import VmemCache
from vmem_kv.errors import ConfigError

from .architectures import ARCHITECTURES, Architecture, build_model, random_tokens
from .harness import Outcome, Run, assert_same_outcome, execute, make_ours, make_stock
from .scenarios import SCENARIOS

_WINDOWED = {"mistral", "gemma2", "gemma3", "gpt_oss", "llama4", "gemma3n"}
_RECURRENT = {"qwen3_next", "jamba", "bamba", "falcon_h1", "mamba"}

REFUSED_BY_TRANSFORMERS: dict[str, set[str]] = {
    # "Cannot use prefill chunking without a cache": it looks for `past_key_values` only.
    "chunked_prefill": {"mamba"},
    # "assisted generation is not supported with stateful models"
    "prompt_lookup": _RECURRENT,
    "assisted": _RECURRENT,
    # Layers of recurrent state have no such operation; layers that have both forget about the state.
    "rows_selected_and_repeated": _RECURRENT | {"lfm2"},
    # "the current layer does not track past states"
    "cropped_without_preparation": _WINDOWED | _RECURRENT | {"lfm2"},
}
"""Where the stock cache raises. Ours must raise the same type; anywhere else neither may raise."""


def _compare(
    scenario: str,
    architecture: Architecture,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    tolerance: float = 1e-4,
    **options: Any,
) -> Outcome:
    model = build_model(architecture.name, dtype, attention)
    expected = execute(SCENARIOS[scenario], architecture, model, make_stock)
    actual = execute(SCENARIOS[scenario], architecture, model, partial(make_ours, **options))
    is_refusal_expected = architecture.name in REFUSED_BY_TRANSFORMERS.get(scenario, ())
    if (expected.error is not None) != is_refusal_expected:
        raise AssertionError(f"{REFUSED_BY_TRANSFORMERS=} is out of date") from expected.error
    assert_same_outcome(expected, actual, tolerance)
    return actual


def _named(*names: str) -> Any:
    return pytest.mark.parametrize("architecture", [ARCHITECTURES[name] for name in names], ids=names)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_results_are_those_of_the_stock_cache(scenario: str, architecture: Architecture) -> None:
    _compare(scenario, architecture)


def test_each_architecture_has_the_layers_that_it_stands_for(architecture: Architecture) -> None:
    config = architecture.build_config().get_text_config(decoder=True)
    kinds = set(get_layer_types_and_kwargs(config)[0])
    # Before 5.18 shared layers were not listed; the model does not touch their entries in either case.
    assert kinds in (architecture.layer_kinds, architecture.layer_kinds - {"dummy"})


@pytest.mark.parametrize("scenario", ["greedy", "beam_search", "left_padded", "prompt_lookup", "continued"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "vmem_kv"])
@_named("llama", "qwen3", "gpt2", "mistral", "gemma3", "llama4", "gemma3n", "deepseek_v3", "qwen3_next", "lfm2")
def test_results_are_those_of_the_stock_cache_with_other_attention(
    attention: str, scenario: str, architecture: Architecture
) -> None:
    _compare(scenario, architecture, attention=attention)


@pytest.mark.parametrize("scenario", ["greedy", "beam_search", "sampling", "left_padded", "cropped"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_results_are_those_of_the_stock_cache_in_half_precision(
    dtype: torch.dtype, scenario: str, architecture: Architecture
) -> None:
    _compare(scenario, architecture, dtype=dtype, tolerance=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@_named("llama", "mistral", "deepseek_v3")
def test_results_are_those_of_the_stock_cache_with_our_attention_in_half_precision(
    dtype: torch.dtype, architecture: Architecture
) -> None:
    _compare("left_padded", architecture, dtype=dtype, attention="vmem_kv", tolerance=2e-2)


@pytest.mark.parametrize(
    "scenario", ["beam_search", "continued", "prefix_reused", "emptied_and_used_again", "rows_reordered", "cropped"]
)
@pytest.mark.parametrize("page_bytes", [None, 4096, 1 << 16], ids=["auto", "4k", "64k"])
@pytest.mark.parametrize("layout", ["per_head", "per_layer", "token_major"])
@_named("llama", "gemma3", "deepseek_v3", "t5")
def test_results_do_not_depend_on_layout_or_page_size(
    layout: str, page_bytes: int | None, scenario: str, architecture: Architecture
) -> None:
    _compare(scenario, architecture, layout=layout, page_bytes=page_bytes)


@_named("llama", "qwen3", "mistral", "gemma3", "llama4", "deepseek_v3", "qwen3_next")
def test_our_attention_says_what_the_stock_one_says(architecture: Architecture) -> None:
    for scenario in ("greedy", "left_padded"):
        stock, ours = (
            execute(SCENARIOS[scenario], architecture, build_model(architecture.name, attention=name), make_ours)
            for name in ("sdpa", "vmem_kv")
        )
        assert stock.error is None
        # Packed heads are summed in another order: close, not identical; tokens are identical all the same.
        assert_same_outcome(stock, ours, tolerance=2e-3)


def test_our_attention_works_on_a_stock_cache() -> None:
    architecture = ARCHITECTURES["llama"]
    on_stock, on_ours = (
        execute(SCENARIOS["beam_search"], architecture, build_model("llama", attention="vmem_kv"), make)
        for make in (make_stock, make_ours)
    )
    assert on_stock.error is None
    assert_same_outcome(on_stock, on_ours)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_our_attention_refuses_what_it_cannot_compute(name: str) -> None:
    outcome = execute(SCENARIOS["greedy"], ARCHITECTURES[name], build_model(name, attention="vmem_kv"), make_ours)
    assert isinstance(outcome.error, ConfigError)
    assert "eager" in str(outcome.error)


def test_our_cache_is_accepted_where_a_dynamic_cache_is_asked_for() -> None:
    cache = VmemCache(build_model("llama").config)
    assert isinstance(cache, DynamicCache)
    # A compileable cache would make `generate` prepare dense masks and compile the model on a GPU.
    assert not cache.is_compileable
    assert cache.is_croppable


_seen_by_attention: list[tuple[int, torch.Tensor]] = []


def _spying_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    _seen_by_attention.append((module.layer_idx, torch.tensor([key.data_ptr(), value.data_ptr(), key.shape[-2]])))
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


def _addresses_seen_by_attention(make: Any, name: str) -> dict[int, torch.Tensor]:
    """Return for every layer the addresses of K and V and the length, `[call, 3]`, of a greedy generation."""
    AttentionInterface.register("spying", _spying_attention)
    AttentionMaskInterface.register("spying", sdpa_mask)
    _seen_by_attention.clear()
    outcome = execute(SCENARIOS["greedy"], ARCHITECTURES[name], build_model(name, attention="spying"), make)
    assert outcome.error is None
    calls: dict[int, list[torch.Tensor]] = {}
    for layer_index, seen in _seen_by_attention:
        calls.setdefault(layer_index, []).append(seen)
    return {layer_index: torch.stack(seen) for layer_index, seen in calls.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2_moe"])
def test_attention_receives_views_at_one_address_of_exactly_the_used_length(name: str) -> None:
    for seen in _addresses_seen_by_attention(make_ours, name).values():
        assert len(seen) == 24
        assert len(seen[:, :2].unique(dim=0)) == 1
        assert seen[:, 2].tolist() == list(range(11, 11 + 24))


def test_attention_in_a_window_receives_views_that_move_with_the_window() -> None:
    for seen in _addresses_seen_by_attention(make_ours, "mistral").values():
        first_visible = [max(0, n_before - 7) for n_before in [0, *range(11, 11 + 23)]]
        token_bytes = (seen[2, :2] - seen[1, :2]).tolist()
        assert token_bytes[0] == token_bytes[1] > 0
        expected = torch.tensor(first_visible)[:, None] * token_bytes[0] + seen[0, :2]
        assert torch.equal(seen[:, :2], expected)


def test_the_address_check_would_notice_a_cache_that_copies() -> None:
    for seen in _addresses_seen_by_attention(make_stock, "llama").values():
        assert len(seen[:, :2].unique(dim=0)) > 1


# A test that cannot fail proves nothing: each of these caches has one fault, and the harness has to see it.


class _ReorderSkipped(DynamicCache):
    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        pass


class _CropOneTooMany(DynamicCache):
    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove - 1 if tokens_to_remove else 0)


class _CropNothing(DynamicCache):
    def crop(self, tokens_to_remove: int) -> None:
        pass


class _CopySharesEverything(DynamicCache):
    def __deepcopy__(self, memo: dict[int, Any]) -> _CopySharesEverything:
        return self


class _FirstRowsSelected(DynamicCache):
    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(torch.arange(len(indices)))


class _RepeatedAsBlocks(DynamicCache):
    def batch_repeat_interleave(self, repeats: int) -> None:
        n_rows = self.layers[0].keys.shape[0]
        super().batch_select_indices(torch.arange(n_rows).repeat(repeats))


class _OneTokenRotten(DynamicCache):
    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any) -> Any:
        keys, values = super().update(key_states, value_states, layer_idx, *args)
        if values.shape[-2] == 30:
            values[0, 0, 3] *= 1.5
        return keys, values


class _WindowOneTooShort(DynamicCache):
    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any) -> Any:
        keys, values = super().update(key_states, value_states, layer_idx, *args)
        if keys.shape[-2] == 8:  # the oldest visible token reads as zeros
            keys, values = keys.clone(), values.clone()
            keys[:, :, 0] = values[:, :, 0] = 0
        return keys, values


class _RefusesCrop(DynamicCache):
    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("faulty", "scenario", "name"),
    [
        (_ReorderSkipped, "beam_search", "llama"),
        (_ReorderSkipped, "beam_sampling", "mistral"),
        (_ReorderSkipped, "rows_reordered", "deepseek_v3"),
        (_CropOneTooMany, "assisted", "llama"),
        (_CropOneTooMany, "cropped", "qwen3"),
        (_CropNothing, "prompt_lookup", "gpt2"),
        (_CropNothing, "cropped_without_preparation", "t5"),
        (_CopySharesEverything, "prefix_reused", "llama"),
        (_FirstRowsSelected, "rows_selected_and_repeated", "gemma3"),
        (_RepeatedAsBlocks, "rows_selected_and_repeated", "llama"),
        (_OneTokenRotten, "greedy", "llama"),
        (_OneTokenRotten, "chunked_prefill", "jamba"),
        (_WindowOneTooShort, "greedy", "mistral"),
        (_RefusesCrop, "cropped_without_preparation", "mistral"),
        (_RefusesCrop, "cropped_without_preparation", "llama"),
    ],
)
def test_a_planted_fault_is_caught(faulty: type[DynamicCache], scenario: str, name: str) -> None:
    architecture, model = ARCHITECTURES[name], build_model(name)
    expected = execute(SCENARIOS[scenario], architecture, model, make_stock)
    actual = execute(SCENARIOS[scenario], architecture, model, lambda config: faulty(config=config))
    with pytest.raises(AssertionError):
        assert_same_outcome(expected, actual)


def test_a_fault_of_our_own_cache_is_caught() -> None:
    """The same harness, one wrong row in a reorder of ours."""

    class FaultyCache(VmemCache):
        def reorder_cache(self, beam_idx: torch.Tensor) -> None:
            super().reorder_cache(beam_idx.flip(0))

    architecture, model = ARCHITECTURES["llama"], build_model("llama")
    expected = execute(SCENARIOS["beam_search"], architecture, model, make_stock)
    actual = execute(SCENARIOS["beam_search"], architecture, model, FaultyCache)
    with pytest.raises(AssertionError):
        assert_same_outcome(expected, actual)


def test_two_caches_in_use_at_once_do_not_see_each_other() -> None:
    def interleaved(run: Run) -> dict[str, torch.Tensor]:
        caches = [run.make_cache(), run.make_cache()]
        tensors = {}
        for step in range(20):
            for index, cache in enumerate(caches):
                tokens = random_tokens(1 + index, 3 if step == 0 else 1, seed=10 * step + index)
                with torch.no_grad():
                    tensors[f"{index}.{step}"] = run.model(tokens, past_key_values=cache).logits
        return tensors

    architecture, model = ARCHITECTURES["gemma3"], build_model("gemma3")
    expected = execute(interleaved, architecture, model, make_stock)
    assert expected.error is None
    assert_same_outcome(expected, execute(interleaved, architecture, model, make_ours))
