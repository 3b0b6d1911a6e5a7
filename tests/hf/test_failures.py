"""A call that fails leaves the cache as it was; what outlives its cache, or runs at an odd moment, harms nobody."""

from __future__ import annotations

import copy
import gc
import os
import pickle

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from vmem_kv import VmemCache
from vmem_kv.config import CacheConfig
from vmem_kv.errors import ConfigError, OutOfAddressSpace, OutOfPages, UsageError
from vmem_kv.integrations.hf import dynamic_caches_on_vmem
from vmem_kv.layout import LayerSpec
from vmem_kv.rows import RowStore

from .architectures import ARCHITECTURES, build_model, random_tokens

N_LAYERS = 3
PAGE = 4096

CPU = torch.device("cpu")


@pytest.fixture
def config():
    config = copy.deepcopy(build_model("llama").config)
    config.num_hidden_layers = N_LAYERS
    return config


def states(n_rows, n_tokens, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n_rows, 2, n_tokens, 16, generator=generator).to(dtype) for _ in "kv"]


def forward(cache, n_rows, n_tokens, seed=0, dtype=torch.float32, layers=range(N_LAYERS)):
    for layer_index in layers:
        cache.update(*states(n_rows, n_tokens, seed + layer_index, dtype), layer_index)


def contents(cache):
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]


def assert_holds(cache, expected):
    cache.check()
    for layer, (keys, values) in zip(cache.layers, expected, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


# One token is 16 floats per head, 64 bytes: a page of 4 KiB holds 64 tokens of one of 4 planes per row and layer.
PAGES_PER_ROW = 4 * N_LAYERS


class TestRunningOutLeavesEverythingAsItWas:
    def test_of_pages_in_a_later_layer(self, config, new_cache):
        cache = new_cache(config, page_bytes=PAGE, max_bytes=PAGE * (2 * PAGES_PER_ROW + 9))
        forward(cache, 2, 60)
        before = contents(cache)
        with pytest.raises(OutOfPages, match="max_bytes"):
            forward(cache, 2, 10, seed=9)  # the first layer finds its 8 pages, the second does not
        assert [layer.get_seq_length() for layer in cache.layers] == [60] * N_LAYERS
        assert_holds(cache, before)
        forward(cache, 2, 4, seed=9)  # less than that goes well
        assert cache.get_seq_length() == 64

    def test_of_pages_in_the_first_pass(self, config, new_cache):
        cache = new_cache(config, page_bytes=PAGE, max_bytes=PAGE * (2 * PAGES_PER_ROW - 1))
        with pytest.raises(OutOfPages):
            forward(cache, 2, 5)
        assert cache.get_seq_length() == 0
        assert [layer.keys for layer in cache.layers] == [None] * N_LAYERS  # nobody can take them for computed
        forward(cache, 1, 5, dtype=torch.bfloat16)  # a smaller batch, even of another dtype, begins anew
        assert cache.get_seq_length() == 5
        cache.check()

    def test_of_addresses(self, config, new_cache):
        cache = new_cache(config, max_tokens=20)
        forward(cache, 2, 18)
        before = contents(cache)
        with pytest.raises(OutOfAddressSpace, match="max_tokens"):
            forward(cache, 2, 3)
        assert_holds(cache, before)
        forward(cache, 2, 2)

    def test_of_pages_for_more_rows(self, config, new_cache):
        cache = new_cache(config, page_bytes=PAGE, max_bytes=PAGE * 40)
        forward(cache, 2, 5)
        before = contents(cache)
        with pytest.raises(OutOfPages):
            cache.batch_repeat_interleave(2)  # 4 rows of 12 pages beside the 24: the first layer has room
        assert_holds(cache, before)
        forward(cache, 2, 1)

    def test_through_generate(self, new_cache):
        model = build_model("llama")
        cache = new_cache(model.config, page_bytes=PAGE, max_bytes=PAGE * 48)
        tokens = random_tokens(8, 40, seed=1)
        with pytest.raises(OutOfPages):
            model.generate(tokens, past_key_values=cache, max_new_tokens=4, do_sample=False)
        cache.check()
        expected = model.generate(tokens[:1], past_key_values=DynamicCache(config=model.config), max_new_tokens=4)
        actual = model.generate(tokens[:1], past_key_values=cache, max_new_tokens=4)
        assert torch.equal(actual, expected)


class TestARefusedUpdate:
    def test_takes_nothing_from_layers_that_this_pass_did_not_write(self, config, new_cache):
        cache = new_cache(config)
        cache.update(*states(1, 5), 0)
        cache.update(*states(1, 100), 1)
        cache.update(*states(1, 5), 2)
        with pytest.raises(UsageError):
            cache.update(*states(2, 1), 0)
        assert [layer.get_seq_length() for layer in cache.layers] == [5, 100, 5]

    @pytest.mark.parametrize(
        ("wrong", "remedy"),
        [
            (lambda: states(3, 1), "reset"),
            (lambda: states(2, 1, dtype=torch.bfloat16), "new cache"),
            (lambda: [t[..., :8] for t in states(2, 1)], "another model"),
            (lambda: [t.to("meta") for t in states(2, 1)], "meta"),
            (lambda: [states(2, 1)[0], states(2, 2)[1]], "as many"),
        ],
    )
    def test_names_the_remedy(self, config, new_cache, wrong, remedy):
        cache = new_cache(config)
        forward(cache, 2, 5)
        before = contents(cache)
        for layer_index in (0, 2):
            with pytest.raises(UsageError, match=remedy):
                cache.update(*wrong(), layer_index)
            assert_holds(cache, before)
        forward(cache, 2, 1)


class TestClosing:
    def test_a_closed_cache_refuses_everything_in_the_same_words(self, config, new_cache):
        cache = new_cache(config)
        forward(cache, 1, 3)
        cache.close()
        cache.close()
        calls = [
            lambda: forward(cache, 1, 1),
            lambda: cache.crop(-1),
            cache.reset,
            lambda: cache.reorder_cache(torch.tensor([0])),
            lambda: cache.batch_select_indices(torch.tensor([0])),
            lambda: cache.batch_repeat_interleave(2),
            lambda: copy.deepcopy(cache),
        ]
        for call in calls:
            with pytest.raises(UsageError, match="closed"):
                call()

    def test_waits_for_the_last_view_and_loses_nothing_meanwhile(self, config, new_cache):
        cache = new_cache(config)
        forward(cache, 2, 5)
        before, view = contents(cache), cache.layers[1].keys
        with pytest.raises(UsageError, match="still alive"):
            cache.close()
        assert_holds(cache, before)
        forward(cache, 2, 1)
        del view
        cache.close()
        assert cache.stats().n_owned_pages == 0

    def test_an_error_inside_with_frees_the_memory_once_its_views_are_dead(self, config):
        views, cache = [], VmemCache(config)

        def use_and_fail():
            with cache:
                forward(cache, 1, 5)
                views.append(cache.layers[0].keys)
                raise RuntimeError("planted")

        with pytest.raises(RuntimeError, match="planted"):
            use_and_fail()
        assert cache.stats().n_owned_pages > 0
        expected = states(1, 5)[0]
        assert torch.equal(views[0], expected)  # still readable
        views.clear()
        assert cache.stats().n_owned_pages == 0

    def test_a_dropped_cache_frees_its_memory_at_once(self, config):
        cache = VmemCache(config)
        forward(cache, 1, 5)
        store = cache._store
        gc.disable()
        try:
            del cache
            assert store.stats().n_owned_pages == 0
        finally:
            gc.enable()

    def test_copies_close_in_either_order(self, config):
        for first in (0, 1):
            caches = [VmemCache(config)]
            forward(caches[0], 2, 5)
            caches.append(copy.deepcopy(caches[0]))
            forward(caches[1], 2, 1)
            expected = contents(caches[1 - first])
            caches[first].close()
            assert_holds(caches[1 - first], expected)
            forward(caches[1 - first], 2, 1)
            caches[1 - first].close()

    @pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # other tests may have left threads
    def test_in_a_forked_child_is_refused_and_harms_nobody(self, config, new_cache):
        cache = new_cache(config)
        forward(cache, 1, 5)
        before = contents(cache)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                cache.close()
                said = "nothing"
            except UsageError as error:
                said = str(error)
            os.write(writer, said.encode())
            os._exit(0)
        os.close(writer)
        assert os.waitpid(child, 0)[1] == 0
        with os.fdopen(reader) as pipe:
            assert "forked child" in pipe.read()
        assert_holds(cache, before)
        forward(cache, 1, 1)


def test_a_cache_cannot_be_pickled_and_says_so(config, new_cache):
    cache = new_cache(config)
    forward(cache, 1, 3)
    for what in (cache, cache.layers[0]):
        with pytest.raises(UsageError, match="clones"):
            pickle.dumps(what)


@pytest.mark.parametrize("first_in_inference_mode", [True, False])
def test_inference_mode_may_come_and_go(config, new_cache, first_in_inference_mode):
    cache = new_cache(config)
    with torch.inference_mode(first_in_inference_mode):
        forward(cache, 2, 5)
    with torch.inference_mode(not first_in_inference_mode):
        forward(cache, 2, 5, seed=4)
        cache.reorder_cache(torch.tensor([1, 1]))
        cache.crop(-2)
    assert cache.layers[0].keys.shape == (2, 2, 8, 16)


def test_an_encoder_decoder_cache_is_clean_after_reset():
    model = build_model("bart")
    source, target = random_tokens(2, 30, seed=1), random_tokens(2, 3, seed=2)
    kwargs = {"decoder_input_ids": target, "use_cache": True}
    ours = [VmemCache(model.config, page_bytes=PAGE, max_bytes=b) for b in (2 << 20, PAGE * 18)]
    cache = EncoderDecoderCache(*ours)
    with torch.no_grad():
        with pytest.raises(OutOfPages):
            model(source, past_key_values=cache, **kwargs)
        cache.reset()
        expected = model(source[:1, :5], decoder_input_ids=target[:1], use_cache=False).logits
        actual = model(source[:1, :5], decoder_input_ids=target[:1], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(actual, expected)
    for half in ours:
        half.close()


class TestTheStoreBelow:
    SPEC = LayerSpec.uniform(2, 16, 4)

    def test_the_layout_is_chosen_again_for_a_batch_that_needs_fewer_mappings(self):
        store = RowStore(CacheConfig(max_tokens=4096), n_layers=30)
        small = store.open_rows(self.SPEC, torch.float32, 1, CPU)
        assert store.choice.kind == "per_head"
        limit = small.cache.pool.driver.info.max_mappings
        large = store.open_rows(self.SPEC, torch.float32, limit // (30 * 4 * 2) + 1, CPU)
        assert store.choice.kind == "per_layer"
        large.close()
        small.close()

    def test_rows_that_die_while_others_are_opened_do_not_close_the_pool_under_them(self, monkeypatch):
        store = RowStore(CacheConfig())
        doomed = [store.open_rows(self.SPEC, torch.float32, 1, CPU)]
        opened = store._open_pool

        def open_pool_and_lose_the_others(*args):
            result = opened(*args)
            doomed.clear()
            return result

        monkeypatch.setattr(store, "_open_pool", open_pool_and_lose_the_others)
        rows = store.open_rows(self.SPEC, torch.float32, 1, CPU)
        rows.append(*states(1, 3))
        store.check()
        assert store.stats().n_live_pages == 4
        rows.close()

    def test_rows_that_die_while_the_pool_is_locked_are_closed_by_the_next_call(self):
        store = RowStore(CacheConfig())
        kept, doomed = (store.open_rows(self.SPEC, torch.float32, 1, CPU) for _ in "12")
        doomed.append(*states(1, 3))
        with kept.cache.pool.lock:
            del doomed
        assert store.stats().n_owned_pages == 0
        kept.close()


class TestContextManager:
    def test_caches_made_inside_are_ours_and_the_mapping_is_put_back(self):
        model = build_model("llama")
        tokens = random_tokens(2, 9, seed=3)
        expected = model.generate(tokens, max_new_tokens=8, past_key_values=DynamicCache(config=model.config))
        stores = []

        def use_and_fail():
            with dynamic_caches_on_vmem() as store:
                stores.append(store)
                cache = DynamicCache(config=model.config)
                actual = model.generate(tokens, max_new_tokens=8, past_key_values=cache)
                assert torch.equal(actual, expected)
                assert store.stats().n_live_pages > 0
                raise RuntimeError("planted")

        with pytest.raises(RuntimeError, match="planted"):
            use_and_fail()
        (store,) = stores
        assert store.stats().n_owned_pages == 0
        assert type(DynamicCache(config=model.config).layers[0]).__module__ == "transformers.cache_utils"


def test_options_are_given_in_one_place(config):
    with pytest.raises(ConfigError, match="options"):
        VmemCache(config, max_tokens=7, options=CacheConfig())
    cache = VmemCache(config, options=CacheConfig(page_bytes=PAGE))
    assert cache._store.max_tokens == max(config.max_position_embeddings, 32_768)


def test_windows_give_their_pages_back_and_keep_their_addresses(new_cache):
    model = build_model("mistral")
    assert ARCHITECTURES["mistral"].has_window
    cache = new_cache(model.config, page_bytes=PAGE)
    n_pages = []
    tokens = random_tokens(2, 1, seed=1)
    with torch.no_grad():
        for _ in range(200):
            model(tokens, past_key_values=cache)
            n_pages.append(cache.stats().n_live_pages)
    assert max(n_pages) <= 2 * n_pages[0]
    assert cache.get_seq_length() == 200
    cache.check()
