"""Inside `dynamic_caches_on_vmem()`, caches that other code makes for itself are ours; outside, nothing has changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING

from vmem_kv.config import CacheConfig
from vmem_kv.errors import OutOfPages
from vmem_kv.integrations.hf import dynamic_caches_on_vmem

from .architectures import Architecture, build_assistant, build_model, random_tokens


def _generate(architecture: Architecture, **settings: Any) -> torch.Tensor:
    """Generate without passing a cache: `generate` makes one itself."""
    settings = {"max_new_tokens": 20, "do_sample": False, **settings}
    n_rows = 1 if "assistant_model" in settings else 2
    model = build_model(architecture.name)  # before the seed: the first to ask for it draws its weights
    torch.manual_seed(0)
    tokens: torch.Tensor = model.generate(random_tokens(n_rows, 11, seed=2), **settings)
    return tokens


def _modules_of_layers(cache: Any) -> set[str]:
    return {type(layer).__module__ for layer in cache.layers}


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_models_that_make_their_own_cache_say_the_same(architecture: Architecture, settings: dict[str, Any]) -> None:
    expected = _generate(architecture, **settings)
    with dynamic_caches_on_vmem() as store:
        actual = _generate(architecture, **settings)
        store.check()
        # Equal tokens alone would not show that the caches were ours.
        assert (store.stats().peak_bytes > 0) == architecture.has_kv
    assert torch.equal(actual, expected)
    assert store.stats().n_owned_pages == 0


def test_an_assistant_that_makes_its_own_cache_is_on_ours_too(architecture: Architecture) -> None:
    if architecture.has_state and architecture.name != "lfm2":  # of recurrent states only convolutions can be undone
        with dynamic_caches_on_vmem() as store, pytest.raises(ValueError, match="stateful"):
            _generate(architecture, assistant_model=build_assistant(architecture.name))
        assert store.stats().n_owned_pages == 0
        return
    expected = _generate(architecture, assistant_model=build_assistant(architecture.name))
    with dynamic_caches_on_vmem():
        actual = _generate(architecture, assistant_model=build_assistant(architecture.name))
    assert torch.equal(actual, expected)


def test_a_plain_forward_pass_makes_a_cache_of_ours(architecture: Architecture) -> None:
    model = build_model(architecture.name)
    tokens = random_tokens(2, 5, seed=0)
    inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if architecture.is_encoder_decoder else {})
    with dynamic_caches_on_vmem() as store, torch.no_grad():
        cache = model(**inputs, use_cache=True)[architecture.cache_argument]
        cache = getattr(cache, "self_attention_cache", cache)
        assert ("vmem_kv.integrations.hf_layers" in _modules_of_layers(cache)) == architecture.has_kv
        assert (store.stats().live_bytes > 0) == architecture.has_kv
        del cache
        assert store.stats().n_owned_pages == 0


def test_the_mapping_is_put_back_also_after_an_error() -> None:
    before = dict(DYNAMIC_LAYER_TYPE_MAPPING)
    config = build_model("gemma3").config

    def fail() -> None:
        with dynamic_caches_on_vmem():
            assert _modules_of_layers(DynamicCache(config=config)) == {"vmem_kv.integrations.hf_layers"}
            assert before != DYNAMIC_LAYER_TYPE_MAPPING
            raise KeyError("planted")

    with pytest.raises(KeyError):
        fail()
    assert dict(DYNAMIC_LAYER_TYPE_MAPPING) == before
    assert _modules_of_layers(DynamicCache(config=config)) == {"transformers.cache_utils"}


def test_contexts_may_be_nested() -> None:
    before, config = dict(DYNAMIC_LAYER_TYPE_MAPPING), build_model("llama").config
    keys = torch.randn(1, 2, 5, 64)
    with dynamic_caches_on_vmem() as outer:
        with dynamic_caches_on_vmem() as inner:
            cache = DynamicCache(config=config)
            cache.update(keys, keys, 0)
            assert (inner.stats().live_bytes > 0, outer.stats().live_bytes) == (True, 0)
        other = DynamicCache(config=config)
        other.update(keys, keys, 0)
        assert outer.stats().live_bytes > 0
    assert dict(DYNAMIC_LAYER_TYPE_MAPPING) == before
    del cache, other
    assert inner.stats().n_owned_pages == outer.stats().n_owned_pages == 0


def test_a_cache_made_inside_goes_on_outside() -> None:
    model, config = build_model("gemma3"), build_model("gemma3").config
    first, second = random_tokens(2, 20, seed=0), random_tokens(2, 3, seed=1)
    stock = DynamicCache(config=config)
    with dynamic_caches_on_vmem() as store:
        ours = DynamicCache(config=config)
        with torch.no_grad():
            model(first, past_key_values=ours)
    duplicate = copy.deepcopy(ours)
    with torch.no_grad():
        model(first, past_key_values=stock)
        expected, actual, copied = (model(second, past_key_values=cache).logits for cache in (stock, ours, duplicate))
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(copied, expected)
    store.check()
    del ours, duplicate
    assert store.stats().n_owned_pages == 0


def test_a_cache_made_before_stays_what_it_was() -> None:
    model = build_model("llama")
    cache = DynamicCache(config=model.config)
    with dynamic_caches_on_vmem() as store, torch.no_grad():
        model(random_tokens(2, 5, seed=0), past_key_values=cache)
        assert store.stats().live_bytes == 0
    assert _modules_of_layers(cache) == {"transformers.cache_utils"}


def test_a_cache_without_a_configuration_stays_a_stock_one() -> None:
    keys = torch.randn(1, 2, 5, 64)
    with dynamic_caches_on_vmem():
        cache = DynamicCache()
        cache.update(keys, keys, 0)
    assert _modules_of_layers(cache) == {"transformers.cache_utils"}


def test_the_options_hold_for_all_caches_made_inside() -> None:
    model = build_model("llama")
    options = CacheConfig(page_bytes=4096, max_bytes=4096 * 60)
    with dynamic_caches_on_vmem(options) as store:
        assert model.generate(random_tokens(1, 9, seed=0), max_new_tokens=4).shape == (1, 13)
        with pytest.raises(OutOfPages, match="max_bytes"):
            model.generate(random_tokens(8, 90, seed=0), max_new_tokens=4)
        store.check()
        assert store.stats().page_bytes == 4096
        assert model.generate(random_tokens(1, 9, seed=0), max_new_tokens=4).shape == (1, 13)
