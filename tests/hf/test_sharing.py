"""Copies of rows share their full pages: forks, beams, repetitions, crops. The numbers are those of `DynamicCache`.

K and V are stored, never computed, so whatever is done to both caches they hold the same bits. Memory is the memory
file's, by the kernel's count, which counts a page once however often it is mapped.
"""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, LlamaConfig

from tests.core.backends import emulated_device
from vmem_kv import VmemCache
from vmem_kv.cache import Exchange
from vmem_kv.config import CacheConfig
from vmem_kv.driver.base import Driver
from vmem_kv.driver.host import HostDriver
from vmem_kv.errors import InvariantError, OutOfMappings, OutOfPages, UsageError, VmemError
from vmem_kv.rows import LayerRows
from vmem_kv.sharing import plan_fork
from vmem_kv.tensors import RegionTensors
from vmem_kv.testing import FaultyDriver, driver_error, fail_once, interruption, natural_error
from vmem_kv.testing.emulator import NOTHING

from .architectures import ARCHITECTURES, build_model, random_tokens
from .harness import cached_states, simple_caches
from .test_cuda_driver import open_cuda
from .test_layer_contract import SHAPES, WINDOW, NewCache, Pair, Shape

PAGE = 4096
LAYOUTS = ("per_head", "per_layer", "token_major")


@pytest.fixture(params=["host", "cuda"])
def open_driver(request: pytest.FixtureRequest) -> Iterator[Callable[..., Driver]]:
    """Opens drivers of one kind; on the emulated device, everything is given back in the end and no rule was broken."""
    if request.param == "host":
        yield lambda device, config: HostDriver()
        return
    emulator = emulated_device()
    yield open_cuda
    gc.collect()
    assert emulator.live() == NOTHING
    assert emulator.violations() == []


def fork_of(pair: Pair, new_caches: list[VmemCache]) -> Pair:
    """An independent copy of both caches."""
    fork = Pair.__new__(Pair)
    fork.__dict__ = dict(pair.__dict__, stock=copy.deepcopy(pair.stock), ours=pair.ours.fork())
    new_caches.append(fork.ours)
    fork.compare()
    return fork


def walk(pair: Pair, seed: int, forks: list[VmemCache], n_steps: int = 30) -> None:
    """Do random operations on a pair and on forks of it; every one compares all bits, and all of them at the end."""
    draw = random.Random(seed)
    pairs = [pair]
    pair.update(draw.randint(1, 3), draw.randint(1, 40))
    for step in range(n_steps):
        chosen = draw.choice(pairs)
        n_rows, what = chosen.n_rows, draw.random()
        chosen._seed = 1000 * seed + step
        if what < 0.45:
            chosen.update(n_rows, draw.choice((1, 1, 2, 7, 19)))
        elif what < 0.7:
            chosen.apply("reorder_cache", torch.tensor([draw.randrange(n_rows) for _ in range(n_rows)]))
        elif what < 0.8:
            kept = [draw.randrange(n_rows) for _ in range(draw.randint(1, n_rows))]
            chosen.apply("batch_select_indices", torch.tensor(kept))
        elif what < 0.85 and n_rows <= 3:
            chosen.apply("batch_repeat_interleave", draw.randint(2, 3))
        elif what < 0.93 and chosen.window is None:
            chosen.apply("crop", -draw.randint(0, chosen.ours.get_seq_length() - 1))
        elif len(pairs) < 4:
            pairs.append(fork_of(chosen, forks))
        elif chosen is not pair:
            pairs.remove(chosen)
            chosen.ours.close()
    for each in pairs:
        each.compare()
        each.update(each.n_rows, 1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [None, WINDOW, 40])
def test_random_changes_of_rows_keep_every_bit(
    new_cache: NewCache, open_driver: Callable[..., Driver], window: int | None, layout: str, seed: int
) -> None:
    shape = list(SHAPES.values())[seed % len(SHAPES)] if seed else SHAPES["odd"]
    forks: list[VmemCache] = []
    pair = Pair(new_cache, window, shape, page_bytes=PAGE, layout=layout, open_driver=open_driver)
    walk(pair, seed, forks)
    for cache in [*forks, pair.ours]:
        cache.close()
    assert pair.ours.stats().n_owned_pages == 0


class Memory:
    """Opens host drivers, and tells how much memory is behind the last one."""

    def __init__(self) -> None:
        self.driver: HostDriver | None = None

    def open(self, device: torch.device, config: CacheConfig) -> Driver:
        self.driver = HostDriver()
        return self.driver

    @property
    def n_bytes(self) -> int:
        assert self.driver is not None
        return self.driver.physical_bytes()


N_LAYERS, N_HEADS, HEAD_DIM = 3, 2, 64
N_PLANES = N_LAYERS * N_HEADS * 2  # per row, with one plane per head of K and of V
TOKENS_PER_PAGE = PAGE // (HEAD_DIM * 4)
ROW_BYTES_PER_TOKEN = N_PLANES * HEAD_DIM * 4


def filled(memory: Memory, n_rows: int, n_tokens: int, **options: Any) -> VmemCache:
    """A cache of random states, a page and a plane for every head."""
    config = LlamaConfig(num_hidden_layers=N_LAYERS, hidden_size=128, num_attention_heads=2)
    options = {"page_bytes": PAGE, "layout": "per_head", "open_driver": memory.open, **options}
    cache = VmemCache(config, **options)
    append(cache, n_rows, n_tokens, seed=0)
    return cache


def append(cache: VmemCache, n_rows: int, n_tokens: int, seed: int) -> None:
    for layer_index in range(N_LAYERS):
        cache.update(*Shape(N_HEADS, HEAD_DIM, N_HEADS, HEAD_DIM).states(n_rows, n_tokens, seed), layer_index)


def pages(n_bytes: int) -> int:
    assert n_bytes % PAGE == 0
    return n_bytes // PAGE


def test_a_fork_of_a_long_cache_takes_its_tails() -> None:
    memory = Memory()
    n_tokens = 50 * TOKENS_PER_PAGE + 3
    cache = filled(memory, 2, n_tokens)
    before = memory.n_bytes
    assert pages(before) == 2 * N_PLANES * 51
    forks = [cache.fork() for _ in range(3)]
    assert pages(memory.n_bytes - before) == 3 * 2 * N_PLANES
    forks.append(copy.deepcopy(forks[-1]))
    assert pages(memory.n_bytes - before) == 4 * 2 * N_PLANES
    assert cache.stats().n_saved_pages == 4 * 2 * N_PLANES * 50
    for fork in forks[:-1]:
        fork.close()
    assert pages(memory.n_bytes - before) == 2 * N_PLANES  # what the last one has for itself
    cache.close()
    assert pages(memory.n_bytes) == 2 * N_PLANES * 51
    forks[-1].check()
    forks[-1].close()
    assert forks[-1].stats().n_owned_pages == 0


def test_a_fork_at_the_end_of_a_page_takes_nothing() -> None:
    memory = Memory()
    cache = filled(memory, 1, 10 * TOKENS_PER_PAGE)
    before = memory.n_bytes
    fork = cache.fork()
    assert memory.n_bytes == before
    append(fork, 1, 1, seed=1)
    assert pages(memory.n_bytes - before) == N_PLANES
    fork.close()
    cache.close()


def test_a_fork_that_is_dropped_gives_its_tails_back() -> None:
    memory = Memory()
    cache = filled(memory, 1, 50)
    before = memory.n_bytes
    fork = cache.fork()
    view = fork.layers[0].keys
    expected = cache.layers[0].keys.clone()
    del fork
    gc.collect()
    assert torch.equal(view, expected)
    assert memory.n_bytes > before
    del view
    assert memory.n_bytes == before
    cache.close()


def test_repeated_rows_take_one_row_and_tails() -> None:
    memory = Memory()
    cache = filled(memory, 1, 20 * TOKENS_PER_PAGE + 1)
    before = memory.n_bytes
    cache.batch_repeat_interleave(4)
    assert pages(memory.n_bytes - before) == 3 * N_PLANES
    append(cache, 4, 1, seed=1)
    assert pages(memory.n_bytes - before) == 3 * N_PLANES
    cache.batch_select_indices([2])
    cache.reset()
    cache.trim()
    assert memory.n_bytes == 0
    cache.close()


def test_beams_that_go_on_from_one_take_its_memory_and_tails() -> None:
    memory = Memory()
    cache = filled(memory, 4, 20 * TOKENS_PER_PAGE + 1)
    alone = pages(memory.n_bytes) // 4
    cache.reorder_cache(torch.tensor([2, 2, 2, 2]))
    assert pages(memory.n_bytes) == alone + 3 * N_PLANES
    states = [(layer.keys, layer.values) for layer in cache.layers]
    assert all(torch.equal(tensor[0], tensor[i]) for pair in states for tensor in pair for i in range(4))
    del states
    for step in range(2 * TOKENS_PER_PAGE):  # they part, and come together again, over two pages
        append(cache, 4, 1, seed=step)
        cache.reorder_cache(torch.tensor([0, 0, 1, 1]))
    assert pages(memory.n_bytes) <= alone + 2 * N_PLANES + 3 * N_PLANES
    cache.close()
    assert cache.stats().n_owned_pages == 0


def test_exchanged_pages_are_no_reason_for_a_driver_call_as_long_as_they_are_the_same() -> None:
    cache = filled(Memory(), 4, 20 * TOKENS_PER_PAGE + 1)
    cache.reorder_cache(torch.tensor([1, 1, 1, 1]))
    calls = cache.stats().driver_calls
    for step in range(TOKENS_PER_PAGE - 1):
        append(cache, 4, 1, seed=step)
        if step < TOKENS_PER_PAGE - 2:
            cache.reorder_cache(torch.tensor([3, 0, 2, 1]))
            assert cache.stats().driver_calls == calls
    cache.reorder_cache(torch.tensor([3, 0, 2, 1]))  # the page is full now
    assert cache.stats().driver_calls["map"] == calls["map"] + N_LAYERS
    cache.close()


def generate_on(cache: Any, name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> dict[str, torch.Tensor]:
    model = build_model(name, dtype, None)
    settings = {"max_new_tokens": 40, "do_sample": False, **settings}
    argument = {ARCHITECTURES[name].cache_argument: cache}
    torch.manual_seed(5)
    output = model.generate(
        random_tokens(2, 37, seed=2), **argument, return_dict_in_generate=True, output_scores=True, **settings
    )
    tensors = {"tokens": output.sequences, "scores": torch.stack(output.scores)}
    if getattr(output, "sequences_scores", None) is not None:
        tensors["beams"] = output.sequences_scores
    return tensors | cached_states(cache)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 2},
        {"num_beams": 3, "num_return_sequences": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.3},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": True, "num_beams": 2, "top_k": 30},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3", "falcon_h1", "bart", "mistral"])
def test_generate_with_beams_has_the_bits_of_the_stock_cache(
    open_driver: Callable[..., Driver], name: str, settings: dict[str, Any]
) -> None:
    config = build_model(name).config.get_text_config(decoder=True)
    is_pair = ARCHITECTURES[name].is_encoder_decoder
    stock: Any = DynamicCache(config=config)
    ours: Any = VmemCache(config, page_bytes=PAGE, open_driver=open_driver)
    if is_pair:
        stock = EncoderDecoderCache(stock, DynamicCache(config=config))
        ours = EncoderDecoderCache(ours, VmemCache(config, page_bytes=PAGE, open_driver=open_driver))
    expected, actual = generate_on(stock, name, **settings), generate_on(ours, name, **settings)
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(actual[key], tensor), key
    for half in simple_caches(ours):
        assert isinstance(half, VmemCache)
        half.check()
        if "num_beams" in settings and half is simple_caches(ours)[0] and not ARCHITECTURES[name].has_window:
            assert half.stats().n_saved_pages > 0
        half.close()


def test_a_prompt_prefilled_once_and_repeated_gives_the_beams_of_a_prompt_prefilled_often(new_cache: NewCache) -> None:
    model = build_model("llama")
    prompt = random_tokens(1, 60, seed=4)
    settings = {"max_new_tokens": 30, "do_sample": False, "num_beams": 4}
    expected = model.generate(prompt, past_key_values=DynamicCache(config=model.config), **settings)
    cache = new_cache(model.config, page_bytes=PAGE)
    with torch.no_grad():
        model(prompt[:, :-1], past_key_values=cache)
    n_alone = cache.stats().n_owned_pages
    cache.batch_repeat_interleave(4)
    actual = model.generate(prompt, past_key_values=cache, **settings)
    assert torch.equal(actual, expected)
    assert cache.stats().n_peak_owned_pages < 3 * n_alone


@pytest.mark.parametrize("settings", [{"prompt_lookup_num_tokens": 4}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_forks_of_one_prefix_continue_as_copies_of_the_stock_cache(
    new_cache: NewCache, name: str, settings: dict[str, Any]
) -> None:
    model = build_model(name)
    prefix = random_tokens(1, 45, seed=4)
    stock, ours = DynamicCache(config=model.config), new_cache(model.config, page_bytes=PAGE)
    for cache in (stock, ours):
        with torch.no_grad():
            model(prefix, past_key_values=cache)
    for seed in range(3):
        inputs = torch.cat([prefix, random_tokens(1, 3, seed)], dim=1)
        expected_cache, fork = copy.deepcopy(stock), ours.fork()
        if "num_beams" in settings:
            expected_cache.batch_repeat_interleave(3)
            fork.batch_repeat_interleave(3)
        expected, actual = (
            model.generate(inputs, past_key_values=cache, max_new_tokens=12, do_sample=False, **settings)
            for cache in (expected_cache, fork)
        )
        assert torch.equal(actual, expected)
        fork.check()
        fork.close()
        for layer, other in zip(ours.layers, stock.layers, strict=True):
            assert torch.equal(layer.keys, other.keys)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_crop_into_shared_pages_leaves_the_other_its_tokens(layout: str) -> None:
    memory = Memory()
    cache = filled(memory, 2, 100, layout=layout)
    fork = cache.fork()
    before = cached_states(cache)
    for n_removed in (1, 3, 40, 17):
        fork.crop(-n_removed)
        fork.check()
        n_left = fork.get_seq_length()
        for name, tensor in cached_states(fork).items():
            assert torch.equal(tensor, before[name][:, :, :n_left])
        append(fork, 2, 1, seed=n_removed)
        fork.crop(-1)
        assert all(torch.equal(a, b) for a, b in zip(cached_states(cache).values(), before.values(), strict=True))
    assert n_left == 100 - 1 - 3 - 40 - 17
    fork.crop(-fork.get_seq_length())
    assert fork.get_seq_length() == 0
    fork.close()
    cache.close()


def test_a_crop_without_room_for_pages_of_its_own_changes_nothing() -> None:
    memory = Memory()
    n_tokens = 4 * TOKENS_PER_PAGE
    n_own = N_PLANES * 4
    cache = filled(memory, 1, n_tokens, max_bytes=(n_own + N_PLANES // 2) * PAGE)
    fork = cache.fork()  # takes nothing
    before = cached_states(fork)
    with pytest.raises(OutOfPages):
        fork.crop(-1)  # the first layers have room for it
    assert fork.get_seq_length() == n_tokens
    assert_holds(fork, before)
    assert_holds(cache, before)
    fork.crop(-TOKENS_PER_PAGE)  # needs no page
    assert fork.get_seq_length() == n_tokens - TOKENS_PER_PAGE
    cache.close()
    append(fork, 1, 1, seed=1)
    fork.close()


def assert_holds(cache: VmemCache, expected: dict[str, torch.Tensor]) -> None:
    cache.check()
    actual = cached_states(cache)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def parted(open_driver: Callable[..., Driver]) -> VmemCache:
    """Beams that have some pages in common and some not, and tails."""
    cache = filled(Memory(), 3, 2 * TOKENS_PER_PAGE, open_driver=open_driver, layout="per_layer")
    cache.reorder_cache(torch.tensor([1, 1, 1]))
    append(cache, 3, TOKENS_PER_PAGE + 3, seed=1)
    return cache


CHANGES: dict[str, Callable[[VmemCache], object]] = {
    "swapped": lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])),
    "one for all": lambda cache: cache.reorder_cache(torch.tensor([2, 2, 2])),
    "selected": lambda cache: cache.batch_select_indices([2, 0]),
    "repeated": lambda cache: cache.batch_repeat_interleave(2),
    "forked": lambda cache: cache.fork().close(),
    "cropped": lambda cache: cache.crop(-2 * TOKENS_PER_PAGE),
}


@pytest.mark.parametrize("make_error", [driver_error(), natural_error, interruption], ids=["error", "lack", "Ctrl-C"])
@pytest.mark.parametrize("what", CHANGES)
def test_a_change_that_fails_leaves_all_layers_as_they_were(what: str, make_error: Any) -> None:
    """Every call of the driver fails once. What fails when all is done fails too late to be undone, and says so."""
    change, n_undone, n_done = CHANGES[what], 0, 0
    for n in range(1, 500):
        driver = FaultyDriver(HostDriver())
        cache = parted(lambda device, config, driver=driver: driver)
        before = cached_states(cache)
        driver.begin_count()
        driver.plan = fail_once(n, make_error)
        with suppress(VmemError, KeyboardInterrupt):
            change(cache)
        driver.plan = fail_once(0)
        is_over, operation = not driver.faults, driver.faults[0].operation if driver.faults else ""
        if is_over or operation in ("release", "fence", "unmap"):
            n_done += 1  # done, or undone as far as it could be: the books add up, and nothing is written by two
            cache.check()
        else:
            n_undone += 1
            assert_holds(cache, before)
            append(cache, 3, 1, seed=2)
        del before
        cache.close()
        if is_over:
            break
    assert is_over
    assert n_undone > 5
    assert n_done > 0


def test_a_reorder_that_lacks_mappings_in_a_later_layer_changes_none() -> None:
    driver = FaultyDriver(HostDriver())
    cache = parted(lambda device, config: driver)
    before = cached_states(cache)
    ledger, limit = driver.ledger, driver.info.max_mappings
    n_others = limit - ledger.n_mappings - 3
    n_refused = 0
    while n_others > 0:
        assert ledger.charge_mappings(n_others, limit)
        try:
            cache.reorder_cache(torch.tensor([2, 0, 1]))
        except OutOfMappings:
            n_refused += 1
            assert_holds(cache, before)
        else:
            break
        finally:
            ledger.refund_mappings(n_others)
        n_others -= 1
    assert n_refused > 3
    cache.check()
    cache.close()


def test_a_fork_without_room_for_its_tails_changes_nothing() -> None:
    memory = Memory()
    cache = filled(memory, 2, 20, max_bytes=(2 * N_PLANES * 2 + N_PLANES) * PAGE)
    before, n_bytes = cached_states(cache), memory.n_bytes
    for change in (cache.fork, lambda: cache.batch_repeat_interleave(2), lambda: copy.deepcopy(cache)):
        with pytest.raises(OutOfPages):
            change()
        assert_holds(cache, before)
        assert memory.n_bytes == n_bytes
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.close()


def test_more_rows_than_there_are_addresses_beside_each_other_are_copied_apart() -> None:
    memory = Memory()
    cache = filled(memory, 2, 40)
    before = cached_states(cache)
    forks = [cache.fork() for _ in range(20)]  # the first fifteen fit beside it
    for fork in forks:
        assert_holds(fork, before)
        append(fork, 2, 1, seed=1)
    cache.close()
    expected = cached_states(forks[0])
    for fork in forks:
        assert_holds(fork, expected)
        fork.close()
    assert forks[-1].stats().n_owned_pages == 0


def test_a_new_batch_beside_forks_of_the_last_one_finds_room() -> None:
    cache = filled(Memory(), 8, 20)
    forks = [cache.fork() for _ in range(3)]
    before = cached_states(cache)
    cache.reset()
    append(cache, 8, 20, seed=0)
    assert_holds(cache, before)
    for fork in forks:
        assert_holds(fork, before)
        fork.close()
    cache.close()


def test_a_closed_cache_is_not_forked() -> None:
    cache = filled(Memory(), 1, 5)
    cache.close()
    with pytest.raises(UsageError, match="closed"):
        cache.fork()


def test_an_empty_cache_is_forked_to_an_empty_one() -> None:
    config = LlamaConfig(num_hidden_layers=N_LAYERS, hidden_size=128, num_attention_heads=2)
    with VmemCache(config) as cache, cache.fork() as fork:
        append(fork, 2, 5, seed=0)
        assert cache.get_seq_length() == 0
        fork.reset()
        with fork.fork() as other:
            append(other, 2, 5, seed=0)
            assert fork.get_seq_length() == 0


# Planted faults: each of them is what one of the tests above is there to find.


def tails_stay(self: RegionTensors, *args: Any) -> list[torch.Tensor]:
    """Copies no tails when rows change."""
    return []


def alias_tails(layout: Any, source: Any, target: Any, n_tokens: int) -> Any:
    """Gives a fork the page of the tail as well, by whole pages of tokens."""
    longest = max(plane.token_bytes for plane in layout.planes)
    return plan_fork(layout, source, target, -(-n_tokens * longest // layout.page_bytes) * layout.page_bytes // longest)


def exchange_in_vain(*args: Any) -> list[Any]:
    """Finds that all pages are the same."""
    return []


PLANTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "tails are not copied": lambda patch: patch.setattr(RegionTensors, "tails", tails_stay),
    "tails are aliased": lambda patch: (
        patch.setattr("vmem_kv.exchange.plan_fork", alias_tails),
        patch.setattr("vmem_kv.exchange.tail_copies", exchange_in_vain),
    ),
    "pages are not exchanged": lambda patch: patch.setattr("vmem_kv.exchange.plan_share", exchange_in_vain),
    "tails of forks are not copied": lambda patch: patch.setattr("vmem_kv.exchange.tail_copies", exchange_in_vain),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_fault_is_caught(new_cache: NewCache, monkeypatch: pytest.MonkeyPatch, plant: str) -> None:
    PLANTS[plant](monkeypatch)

    def walk_often() -> None:
        for seed in range(8):
            walk(Pair(new_cache, None, Shape(), page_bytes=PAGE, layout="per_head"), seed, [])

    with pytest.raises((AssertionError, InvariantError)):
        walk_often()


def test_an_undo_that_does_nothing_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Exchange, "undo", Exchange.commit)
    with pytest.raises((AssertionError, InvariantError)):
        test_a_change_that_fails_leaves_all_layers_as_they_were("swapped", driver_error())


def test_a_crop_that_takes_shared_pages_for_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayerRows, "n_shared_tokens", lambda self: 0)
    with pytest.raises(UsageError, match="truncate it"):
        test_a_crop_into_shared_pages_leaves_the_other_its_tokens("per_layer")
