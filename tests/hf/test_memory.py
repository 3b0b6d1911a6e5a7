"""Memory comes as the tokens come and goes back, by the operating system's own count; running out of it is harmless.

The counters are the kernel's (`/proc/self`): memory files in residence, open files, mappings of memory files. What
our own statistics say is compared with them.
"""

from __future__ import annotations

import copy
import gc
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, PreTrainedModel

from vmem_kv import VmemCache
from vmem_kv.errors import CapacityError, OutOfAddressSpace, OutOfPages, UsageError

from ..held import open_files
from .architectures import ARCHITECTURES, build_model, random_tokens
from .harness import cached_states, simple_caches

NewCache = Callable[..., VmemCache]
PAGE = 4096
WITH_KV = [name for name, architecture in ARCHITECTURES.items() if architecture.has_kv]


class Held(NamedTuple):
    """What this process holds of the kernel, as far as caches can be the cause."""

    shared_bytes: int
    files: Counter[str]
    n_memory_file_mappings: int

    def grew_since(self, before: Held) -> bool:
        """Whether something was added. What earlier tests left behind may go meanwhile, and is no finding."""
        return bool(
            self.shared_bytes > before.shared_bytes
            or self.files - before.files
            or self.n_memory_file_mappings > before.n_memory_file_mappings
        )


def _held() -> Held:
    """Look now. By the pages of each mapping: the sum in /proc/self/status is off by some pages on many kernels."""
    shared_kib = n_mappings = 0
    is_memory_file = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "memfd:" in line:
            n_mappings += 1
            is_memory_file = True
        elif line.startswith("Rss:"):
            shared_kib += int(line.split()[1]) if is_memory_file else 0
            is_memory_file = False
    return Held(shared_kib * 1024, open_files(), n_mappings)


def _held_after_collecting() -> Held:
    """Look when what earlier tests left behind is gone: nothing may vanish between this look and another one."""
    gc.collect()
    return _held()


@contextmanager
def _nothing_left_behind() -> Iterator[Held]:
    """Assert that after the block the process holds what it held before it."""
    before = _held_after_collecting()
    yield before
    assert not _held().grew_since(before)


def _fill(cache: Any, model: PreTrainedModel, n_rows: int = 2, n_tokens: int = 40) -> None:
    with torch.no_grad():
        model(random_tokens(n_rows, n_tokens, seed=0), past_key_values=cache, use_cache=True)


def _generate(model: PreTrainedModel, cache: Any, n_rows: int = 2, n_tokens: int = 11, n_new: int = 40) -> torch.Tensor:
    # No end of sequence: every run has the same shape.
    settings = GenerationConfig(max_new_tokens=n_new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    tokens: torch.Tensor = model.generate(
        random_tokens(n_rows, n_tokens, seed=1), generation_config=settings, past_key_values=cache
    )
    return tokens


def _end_with_close(model: PreTrainedModel) -> None:
    cache = VmemCache(model.config)
    _fill(cache, model)
    cache.close()


def _end_with_statement(model: PreTrainedModel) -> None:
    with VmemCache(model.config) as cache:
        _fill(cache, model)


def _end_with_error(model: PreTrainedModel) -> None:
    def fail() -> None:
        with VmemCache(model.config) as cache:
            _fill(cache, model)
            raise KeyError("planted")

    with pytest.raises(KeyError):
        fail()


def _end_by_dropping(model: PreTrainedModel) -> None:
    cache = VmemCache(model.config)
    _fill(cache, model)
    del cache


def _end_by_collecting_a_cycle(model: PreTrainedModel) -> None:
    cache = VmemCache(model.config)
    _fill(cache, model)
    cache.myself = [cache]
    del cache
    gc.collect()


def _end_after_copying(model: PreTrainedModel) -> None:
    with VmemCache(model.config) as cache:
        _fill(cache, model)
        with copy.deepcopy(cache) as duplicate:
            _fill(duplicate, model)
        dropped = copy.deepcopy(cache)
        del dropped


def _end_after_refusal(model: PreTrainedModel) -> None:
    with VmemCache(model.config, page_bytes=PAGE, max_bytes=20 * PAGE) as cache, pytest.raises(OutOfPages):
        _fill(cache, model, n_rows=8, n_tokens=100)


def _end_of_changing_rows(model: PreTrainedModel) -> None:
    with VmemCache(model.config) as cache:
        _fill(cache, model)
        cache.batch_repeat_interleave(4)
        cache.batch_select_indices([0, 5, 3])
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        cache.reset()
        _fill(cache, model, n_rows=5)
        cache.reset()


def _end_unused(model: PreTrainedModel) -> None:
    VmemCache(model.config).close()


@pytest.mark.parametrize(
    "use",
    [
        _end_with_close,
        _end_with_statement,
        _end_with_error,
        _end_by_dropping,
        _end_by_collecting_a_cycle,
        _end_after_copying,
        _end_after_refusal,
        _end_of_changing_rows,
        _end_unused,
    ],
)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_memory_files_and_mappings_go_back_to_the_system(use: Callable[[PreTrainedModel], None], name: str) -> None:
    use(build_model(name))  # what torch and transformers allocate once
    with _nothing_left_behind():
        use(build_model(name))


def test_the_counters_see_a_cache_that_is_in_use() -> None:
    model = build_model("llama")
    before = _held_after_collecting()
    with VmemCache(model.config, page_bytes=PAGE) as cache:
        _fill(cache, model, n_rows=8, n_tokens=200)
        during, stats = _held(), cache.stats()
        assert during.shared_bytes - before.shared_bytes >= 0.95 * stats.live_bytes
        assert during.shared_bytes - before.shared_bytes <= stats.owned_bytes + 64 * PAGE
        assert during.files > before.files
        assert during.n_memory_file_mappings > before.n_memory_file_mappings
        assert stats.live_bytes == 8 * 200 * 3 * 2 * 2 * 64 * 4


def test_an_encoder_decoder_pair_goes_back_to_the_system() -> None:
    def use() -> None:
        model = build_model("bart")
        with VmemCache(model.config) as own, VmemCache(model.config) as cross:
            cache = EncoderDecoderCache(own, cross)
            model.generate(random_tokens(2, 9, seed=0), past_key_values=cache, num_beams=3, max_new_tokens=9)

    use()
    with _nothing_left_behind():
        use()


@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon_h1"])
@pytest.mark.parametrize("how", ["closed", "dropped", "reset"])
def test_generating_over_and_over_does_not_grow(name: str, how: str) -> None:
    model = build_model(name)
    kept = VmemCache(model.config)
    held, owned = [], []
    for _ in range(20):
        if how == "reset":
            _generate(model, kept, n_new=24)
            owned.append(kept.stats().owned_bytes)
            kept.reset()
        else:
            cache = VmemCache(model.config)
            _generate(model, cache, n_new=24)
            owned.append(cache.stats().owned_bytes)
            if how == "closed":
                cache.close()
            del cache
        held.append(_held())
    kept.check()
    kept.close()
    assert len(set(owned[2:])) == 1
    assert not any(later.grew_since(earlier) for earlier, later in itertools.pairwise(held[2:]))


def test_the_growth_check_would_notice_a_cache_that_is_kept() -> None:
    model, kept, held = build_model("llama"), [], []
    gc.collect()
    for _ in range(3):
        kept.append(VmemCache(model.config))
        _generate(model, kept[-1])
        held.append(_held())
    assert held[1].grew_since(held[0])
    assert held[2].grew_since(held[1])
    for cache in kept:
        cache.close()


@pytest.mark.parametrize("page_bytes", [PAGE, None], ids=["small pages", "chosen pages"])
@pytest.mark.parametrize("name", [name for name in WITH_KV if not ARCHITECTURES[name].has_window])
def test_a_second_generation_on_a_reset_cache_makes_no_driver_calls(
    new_cache: NewCache, name: str, page_bytes: int | None
) -> None:
    model = build_model(name)
    decoder_config = model.config.get_text_config(decoder=True)
    cache: Any = new_cache(decoder_config, page_bytes=page_bytes)
    if ARCHITECTURES[name].is_encoder_decoder:
        cache = EncoderDecoderCache(cache, new_cache(decoder_config, page_bytes=page_bytes))
    first = _generate(model, cache)
    calls = [dict(half.stats().driver_calls) for half in simple_caches(cache)]
    assert all(half["map"] > 0 for half in calls)
    # The same, shorter, differently divided (but an encoder's prompt is all that its half of the cache ever holds).
    divided = (8, 43) if ARCHITECTURES[name].is_encoder_decoder else (30, 21)
    for n_tokens, n_new in ((11, 40), (5, 20), divided):
        cache.reset()
        again = _generate(model, cache, n_tokens=n_tokens, n_new=n_new)
        assert n_tokens != 11 or torch.equal(again, first)
        assert [dict(half.stats().driver_calls) for half in simple_caches(cache)] == calls


@pytest.mark.parametrize("name", [name for name in WITH_KV if ARCHITECTURES[name].has_window])
def test_a_second_generation_through_windows_needs_no_more_than_the_first(new_cache: NewCache, name: str) -> None:
    """Pages behind a window went back, so some have to be mapped again; never more than in the run before."""
    model = build_model(name)
    cache = new_cache(model.config, page_bytes=PAGE)
    owned, n_maps = [], [0]
    for _ in range(5):
        _generate(model, cache)
        owned.append(cache.stats().peak_bytes)
        n_maps.append(cache.stats().driver_calls["map"])
        cache.reset()
    assert owned[0] == owned[-1]
    per_run = [later - earlier for earlier, later in itertools.pairwise(n_maps)]
    assert max(per_run[1:]) <= per_run[0]


def test_memory_is_mapped_as_the_tokens_come(new_cache: NewCache) -> None:
    cache = new_cache(build_model("llama").config, page_bytes=PAGE, layout="per_head")
    n_planes = 3 * 2 * 2 * 2  # layers, K and V, heads, rows
    for n_tokens in range(1, 100):
        _fill(cache, build_model("llama"), n_tokens=1)
        stats = cache.stats()
        assert stats.live_bytes == n_tokens * n_planes * 64 * 4
        assert stats.n_live_pages == n_planes * -(-n_tokens * 64 * 4 // PAGE)
        assert stats.mapped_bytes <= stats.owned_bytes <= stats.peak_bytes
    assert stats.virtual_bytes > 100 * stats.mapped_bytes
    assert stats.n_quarantined_pages == 0


def test_views_that_a_user_keeps_hold_the_cache_open_and_stay_right(new_cache: NewCache) -> None:
    model = build_model("llama")
    cache = VmemCache(model.config)
    _fill(cache, model)
    view = cache.layers[2].values
    copied = view.clone()
    for _ in range(2):
        with pytest.raises(UsageError, match="alive"):
            cache.close()
    assert torch.equal(view, copied)
    cache.check()
    _fill(cache, model, n_tokens=3)  # still open
    part = view[1, :, 3:5]
    del view
    with pytest.raises(UsageError, match="alive"):
        cache.close()
    del part
    with _nothing_left_behind_of(cache):
        cache.close()
    cache.close()


@contextmanager
def _nothing_left_behind_of(cache: VmemCache) -> Iterator[None]:
    before, stats = _held_after_collecting(), cache.stats()
    yield
    assert _held().shared_bytes <= before.shared_bytes - 0.95 * stats.live_bytes
    assert cache.stats().n_owned_pages == cache.stats().n_mappings == 0


def test_views_outlive_a_cache_that_was_dropped() -> None:
    model = build_model("llama")
    with _nothing_left_behind():
        cache = VmemCache(model.config)
        _fill(cache, model)
        view, copied = cache.layers[0].keys, cache.layers[0].keys.clone()
        del cache
        gc.collect()
        assert torch.equal(view, copied)
        del view
    assert copied.isfinite().all()


def _states(cache: Any) -> dict[str, torch.Tensor]:
    lengths = {
        f"{half}.{index}.length": torch.tensor(layer.get_seq_length())
        for half, simple in enumerate(simple_caches(cache))
        for index, layer in enumerate(simple.layers)
        if hasattr(layer, "get_seq_length")
    }
    return cached_states(cache) | lengths


def _assert_unchanged(cache: Any, before: dict[str, torch.Tensor]) -> None:
    for half in simple_caches(cache):
        half.check()
    after = _states(cache)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def _forward(model: PreTrainedModel, cache: Any, n_rows: int, n_tokens: int, seed: int) -> torch.Tensor:
    inputs = {"input_ids": random_tokens(n_rows, n_tokens, seed)}
    if model.config.is_encoder_decoder:
        inputs = {"input_ids": random_tokens(n_rows, 9, seed=3), "decoder_input_ids": inputs["input_ids"]}
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs, past_key_values=cache, use_cache=True).logits
    return logits


# Recurrent layers keep what the failed pass wrote (they are transformers' own), and an encoder-decoder pair has two
# budgets: both are tested apart from these.
_RESTORABLE = [n for n in WITH_KV if not ARCHITECTURES[n].has_state and not ARCHITECTURES[n].is_encoder_decoder]


@pytest.mark.parametrize("name", _RESTORABLE)
def test_whatever_the_budget_a_pass_succeeds_or_changes_nothing(new_cache: NewCache, name: str) -> None:
    """Budgets from a single page to all that is needed: the failure walks through steps and layers."""
    model = build_model(name)
    steps = ((2, 10), (2, 20), (2, 1), (2, 30), (2, 2))
    unlimited = new_cache(model.config, page_bytes=PAGE)
    for step, (n_rows, n_tokens) in enumerate(steps):
        _forward(model, unlimited, n_rows, n_tokens, step)
    n_pages = unlimited.stats().peak_bytes // PAGE
    n_refused = n_whole = 0
    for budget in {*range(1, n_pages, max(1, n_pages // 25)), n_pages}:
        cache = new_cache(model.config, page_bytes=PAGE, max_bytes=budget * PAGE)
        stock = DynamicCache(config=model.config)
        for step, (n_rows, n_tokens) in enumerate(steps):
            before = _states(cache)
            try:
                actual = _forward(model, cache, n_rows, n_tokens, step)
            except OutOfPages:
                n_refused += 1
                _assert_unchanged(cache, before)
                break
            torch.testing.assert_close(actual, _forward(model, stock, n_rows, n_tokens, step), rtol=1e-4, atol=1e-4)
        else:
            n_whole += 1
            continue
        if cache.get_seq_length() == 0:
            continue
        # One token more fits beside a prefix, or it does not: either way what follows is right.
        before = _states(cache)
        try:
            actual = _forward(model, cache, 2, 1, 99)
        except OutOfPages:
            _assert_unchanged(cache, before)
        else:
            torch.testing.assert_close(actual, _forward(model, stock, 2, 1, 99), rtol=1e-4, atol=1e-4)
        cache.close()
    assert n_refused > 5
    assert n_whole >= 1


@pytest.mark.parametrize("name", WITH_KV)
def test_a_generation_that_ran_out_of_pages_can_be_followed_by_a_smaller_one(new_cache: NewCache, name: str) -> None:
    model = build_model(name)
    config = model.config.get_text_config(decoder=True)
    probe = [new_cache(config, page_bytes=PAGE) for _ in range(2)]
    is_pair = ARCHITECTURES[name].is_encoder_decoder
    _generate(model, EncoderDecoderCache(*probe) if is_pair else probe[0], n_rows=1, n_tokens=9, n_new=30)
    # What one row needs, which is less than four rows do.
    budget = [half.stats().peak_bytes for half in probe]
    halves = [new_cache(config, page_bytes=PAGE, max_bytes=n_bytes or PAGE) for n_bytes in budget]
    cache = EncoderDecoderCache(*halves) if is_pair else halves[0]
    with pytest.raises(OutOfPages, match="max_bytes"):
        _generate(model, cache, n_rows=4, n_tokens=9, n_new=90)
    for half in simple_caches(cache):
        half.check()
    if ARCHITECTURES[name].has_state:
        cache = new_cache(config, page_bytes=PAGE, max_bytes=budget[0])  # recurrent layers keep their batch size
    cache.reset()
    stock: Any = DynamicCache(config=config)
    stock = EncoderDecoderCache(stock, DynamicCache(config=config)) if is_pair else stock
    expected = _generate(model, stock, n_rows=1, n_tokens=9, n_new=30)
    assert torch.equal(_generate(model, cache, n_rows=1, n_tokens=9, n_new=30), expected)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "deepseek_v3"])
def test_a_context_beyond_max_tokens_is_refused_and_the_last_token_that_fits_is_not(
    new_cache: NewCache, name: str
) -> None:
    model = build_model(name)
    cache, stock = new_cache(model.config, max_tokens=32), DynamicCache(config=model.config)
    for each in (cache, stock):
        _forward(model, each, 2, 30, 0)
    before = _states(cache)
    with pytest.raises(OutOfAddressSpace, match="max_tokens"):
        _forward(model, cache, 2, 3, 1)
    _assert_unchanged(cache, before)
    expected, actual = (_forward(model, each, 2, 2, 2) for each in (stock, cache))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(CapacityError):
        _forward(model, cache, 2, 1, 3)
    assert cache.get_seq_length() == 32


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_a_changed_batch_or_dtype_is_refused_and_the_cache_goes_on(new_cache: NewCache, name: str) -> None:
    model = build_model(name)
    cache, stock = new_cache(model.config), DynamicCache(config=model.config)
    for each in (cache, stock):
        _forward(model, each, 2, 12, 0)
    before = _states(cache)
    for n_rows in (1, 3):
        with pytest.raises(UsageError, match="reset"):
            _forward(model, cache, n_rows, 1, 1)
        _assert_unchanged(cache, before)
    with pytest.raises(UsageError, match="dtype"):
        _forward(build_model(name, torch.bfloat16), cache, 2, 1, 1)
    _assert_unchanged(cache, before)
    expected, actual = (_forward(model, each, 2, 5, 2) for each in (stock, cache))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_states_on_another_device_are_refused(new_cache: NewCache) -> None:
    model = build_model("llama")
    cache = new_cache(model.config)
    _fill(cache, model)
    before = _states(cache)
    keys = torch.empty(2, 2, 1, 64, device="meta")
    with pytest.raises(UsageError, match="meta"):
        cache.update(keys, keys, 0)
    _assert_unchanged(cache, before)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_closed_cache_is_refused_by_generate(name: str) -> None:
    model = build_model(name)
    cache = VmemCache(model.config)
    _generate(model, cache)
    cache.close()
    with pytest.raises(UsageError, match="closed"):
        _generate(model, cache)
    cache.check()
    cache.close()
