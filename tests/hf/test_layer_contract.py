"""Our layers against the stock ones, operation by operation, without a model.

A pair of caches with one layer each receives the same random states and the same operations; after each operation
everything that a caller can read must be equal, bit for bit: K and V are stored, never computed.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers import DynamicCache, LlamaConfig, MistralConfig, __version__

from vmem_kv import VmemCache
from vmem_kv.config import CacheConfig
from vmem_kv.errors import UsageError

WINDOW = 8
NewCache = Callable[..., VmemCache]


def _config(window: int | None = None) -> Any:
    fields = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
    return LlamaConfig(**fields) if window is None else MistralConfig(**fields, sliding_window=window)


@dataclass(frozen=True)
class Shape:
    """What one token of one layer looks like."""

    key_heads: int = 2
    key_dim: int = 64
    value_heads: int = 2
    value_dim: int = 64
    dtype: torch.dtype = torch.float32

    def states(self, n_rows: int, n_tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return random K and V as models pass them: heads and tokens transposed, so not contiguous."""
        generator = torch.Generator().manual_seed(seed)
        keys = torch.randn(n_rows, n_tokens, self.key_heads, self.key_dim, generator=generator)
        values = torch.randn(n_rows, n_tokens, self.value_heads, self.value_dim, generator=generator)
        return keys.to(self.dtype).transpose(1, 2), values.to(self.dtype).transpose(1, 2)


SHAPES = {
    "GQA": Shape(),
    "one head": Shape(1, 64, 1, 64),
    "latent": Shape(1, 96, 1, 32),
    "different heads": Shape(4, 32, 2, 128),
    "bfloat16": Shape(2, 64, 2, 64, torch.bfloat16),
    "float16": Shape(2, 64, 2, 64, torch.float16),
    "odd": Shape(3, 40, 3, 24),
}


class Pair:
    """A stock cache and ours, kept in step; every method compares what the two return and hold."""

    def __init__(self, new_cache: NewCache, window: int | None, shape: Shape, **options: Any) -> None:
        self.shape = shape
        self.window = window
        self.stock = DynamicCache(config=_config(window))
        self.ours = new_cache(_config(window), **options)
        self.n_rows = 0
        self._seed = 0

    def update(self, n_rows: int, n_tokens: int) -> None:
        self._seed += 1
        keys, values = self.shape.states(n_rows, n_tokens, self._seed)
        sizes = self.ours.get_mask_sizes(n_tokens, 0)
        assert sizes == self.stock.get_mask_sizes(n_tokens, 0)
        expected = self.stock.update(keys.clone(), values.clone(), 0)
        actual = self.ours.update(keys, values, 0)
        # Masks are made from the announced sizes before the states are there.
        assert actual[0].shape[-2] == sizes[0]
        for name, tensor, other in zip(("keys", "values"), actual, expected, strict=True):
            # Before 5.18, a stock layer that records returned more than it had announced to the mask.
            _assert_equal(f"returned {name}", tensor, other[:, :, -sizes[0] :])
        del actual, tensor
        self.n_rows = n_rows
        self.compare()

    def apply(self, operation: str, *arguments: Any) -> None:
        getattr(self.stock, operation)(*arguments)
        getattr(self.ours, operation)(*arguments)
        if operation == "reset":
            # Made anew, because before 5.18 it kept its length. That it records the past survives a reset.
            is_recording = getattr(self.stock.layers[0], "record_past", False)
            self.stock = DynamicCache(config=_config(self.window))
            if is_recording:
                self.stock.activate_past_recording()
        elif self.stock.layers[0].keys is not None:
            self.n_rows = self.stock.layers[0].keys.shape[0]
        self.compare()

    def compare(self) -> None:
        stock, ours = self.stock.layers[0], self.ours.layers[0]
        assert self.ours.get_seq_length() == self.stock.get_seq_length()
        assert isinstance(self.ours.get_seq_length(), int)
        assert ours.is_initialized == stock.is_initialized
        for n_query in (1, 2, WINDOW, 3 * WINDOW):
            assert self.ours.get_mask_sizes(n_query, 0) == self.stock.get_mask_sizes(n_query, 0)
        assert self.ours.is_sliding == self.stock.is_sliding
        assert self.ours.get_max_length() == self.stock.get_max_length()
        for name in ("keys", "values"):
            expected, actual = getattr(stock, name), getattr(ours, name)
            if expected is None or expected.numel() == 0:
                assert actual is None or actual.numel() == 0
            else:
                _assert_equal(name, actual, expected)
        self.ours.check()


def _assert_equal(what: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), what
    n_different = int((actual != expected).sum())
    assert n_different == 0, f"{n_different} of {expected.numel()} numbers of {what} differ"


@pytest.fixture(params=[None, WINDOW], ids=["full", "sliding"])
def window(request: pytest.FixtureRequest) -> int | None:
    value: int | None = request.param
    return value


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("layout", ["per_head", "per_layer", "token_major"])
def test_updates_return_and_keep_what_the_stock_layer_does(
    new_cache: NewCache, window: int | None, shape: Shape, layout: str
) -> None:
    pair = Pair(new_cache, window, shape, layout=layout)
    for n_tokens in (11, 1, 1, 5, 1, 30, 2, 8, 7, 1, 64):
        pair.update(3, n_tokens)


OPERATIONS = ("update", "update", "update", "crop", "reorder", "select", "repeat", "copy", "reset", "record")


def _random_operation(pair: Pair, rng: random.Random) -> None:
    length = pair.stock.get_seq_length()
    operation = rng.choice(OPERATIONS)
    if operation == "update" or length == 0:
        # A layer that was never used, or was reset, takes any batch size.
        is_new = pair.stock.layers[0].keys is None
        pair.update(rng.randint(1, 4) if is_new else pair.n_rows, rng.choice([1, 1, 1, 2, 5, 13, 40]))
    elif operation == "crop":
        layer = pair.stock.layers[0]
        if pair.window is None or length < pair.window:
            pair.apply("crop", -rng.choice([0, 1, 2, length // 2, length]))
        elif layer.record_past:
            # As assisted decoding does: no further back than what was recorded. The stock layer does not refuse
            # more, it silently keeps too short a window.
            pair.apply("crop", -rng.randint(0, layer.keys.shape[-2] - pair.window + 1))
    elif operation == "reorder":
        pair.apply("reorder_cache", torch.tensor([rng.randrange(pair.n_rows) for _ in range(pair.n_rows)]))
    elif operation == "select":
        rows = [rng.randrange(pair.n_rows) for _ in range(rng.randint(1, 5))]
        pair.apply("batch_select_indices", rng.choice([torch.tensor(rows), rows]))
    elif operation == "repeat" and pair.n_rows <= 4:
        pair.apply("batch_repeat_interleave", rng.randint(1, 3))
    elif operation == "copy":
        pair.stock, pair.ours = copy.deepcopy(pair.stock), copy.deepcopy(pair.ours)
        pair.compare()
    elif operation == "reset" and rng.random() < 0.3:
        pair.apply("reset")
    elif operation == "record" and (pair.window is None or length < pair.window):
        pair.apply("activate_past_recording")


@pytest.mark.parametrize("seed", range(25))
def test_random_operations_agree_with_the_stock_layer(new_cache: NewCache, window: int | None, seed: int) -> None:
    rng = random.Random(seed)
    shape = rng.choice(list(SHAPES.values()))
    pair = Pair(new_cache, window, shape, layout=rng.choice(["per_head", "per_layer", "token_major"]))
    for _ in range(60):
        _random_operation(pair, rng)


@pytest.mark.parametrize("n_removed", [0, 1, 4, 12, 13, 14, 1000])
def test_crop_keeps_what_the_stock_layer_keeps_also_beyond_the_length(new_cache: NewCache, n_removed: int) -> None:
    pair = Pair(new_cache, None, Shape())
    pair.update(2, 13)
    pair.apply("crop", -n_removed)
    pair.update(2, 5)


def test_cropping_a_window_takes_back_what_was_recorded(new_cache: NewCache) -> None:
    pair = Pair(new_cache, WINDOW, Shape())
    pair.apply("activate_past_recording")
    pair.update(1, 20)
    pair.apply("crop", 0)
    for n_ahead, n_removed in ((6, 4), (1, 0), (5, 5), (30, 29), (2, 1), (1, 1)):
        pair.update(1, n_ahead)
        pair.apply("crop", -n_removed)
    pair.update(1, 3)


def test_recording_may_begin_when_the_window_is_full(new_cache: NewCache) -> None:
    # As in the second turn of a conversation, if that one is decoded with an assistant.
    pair = Pair(new_cache, WINDOW, Shape())
    pair.update(1, 20)
    pair.apply("activate_past_recording")
    pair.update(1, 4)
    pair.apply("crop", -3)
    pair.update(1, 1)


def test_a_number_of_tokens_may_be_a_tensor(new_cache: NewCache, window: int | None) -> None:
    # In assisted decoding it is: the number of candidates less the number of matches.
    pair = Pair(new_cache, window, Shape(), options=CacheConfig(page_bytes=4096, host_path="python"))
    pair.apply("activate_past_recording")
    pair.update(1, 20)
    pair.apply("crop", torch.tensor(-3))
    pair.update(1, 30)
    pair.apply("crop", torch.tensor(0))
    assert pair.ours.layers[0].keys.shape[-2] == (47 if window is None else WINDOW - 1)
    pair.ours.close()


def test_cropping_a_window_within_its_size_needs_no_recording(new_cache: NewCache) -> None:
    pair = Pair(new_cache, WINDOW, Shape())
    pair.update(2, WINDOW - 1)
    pair.apply("crop", -3)
    pair.update(2, 6)


def test_cropping_a_full_window_without_recording_is_refused_as_by_the_stock_layer(new_cache: NewCache) -> None:
    pair = Pair(new_cache, WINDOW, Shape())
    pair.update(2, WINDOW + 2)
    for cache in (pair.stock, pair.ours):
        with pytest.raises(RuntimeError, match="activate_past_recording"):
            cache.crop(-1)
    pair.compare()
    pair.update(2, 1)


@pytest.mark.parametrize("tokens_to_keep", [1, 5, 12, 13, 99])
def test_positive_crop_does_what_the_installed_release_does(
    new_cache: NewCache, window: int | None, tokens_to_keep: int
) -> None:
    pair = Pair(new_cache, window, Shape())
    pair.update(2, 13)
    if window is None and Version(__version__) < Version("5.18"):
        pair.apply("crop", tokens_to_keep)  # then still the length to keep
        return
    for cache in (pair.stock, pair.ours):
        with pytest.raises(RuntimeError if window else ValueError):
            cache.crop(tokens_to_keep)
    pair.compare()


@pytest.mark.parametrize(
    "indices",
    [
        torch.tensor([2, 0]),
        torch.tensor([1]),
        torch.tensor([3, 3, 3, 0, 1, 2]),
        torch.tensor([-1, 0]),
        torch.tensor([True, False, True, False]),
        torch.tensor([0, 1, 2, 3]),
        [2, 0],
        [0, 0],
        [False, True, False, False],
        (2, 0),
        (3, 3, 1, 0, 0),
        slice(1, 3),
    ],
    ids=repr,
)
def test_rows_are_selected_as_by_tensor_indexing(new_cache: NewCache, window: int | None, indices: Any) -> None:
    pair = Pair(new_cache, window, Shape())
    pair.update(4, 21)
    pair.apply("batch_select_indices", indices)
    pair.update(pair.n_rows, 2)


@pytest.mark.parametrize("indices", [[4], torch.tensor([0, 17]), torch.tensor([-5])], ids=repr)
def test_selecting_rows_that_are_not_there_changes_nothing(
    new_cache: NewCache, window: int | None, indices: Any
) -> None:
    pair = Pair(new_cache, window, Shape())
    pair.update(4, 11)
    with pytest.raises((IndexError, UsageError)):
        pair.ours.batch_select_indices(indices)
    pair.compare()
    pair.update(4, 1)


@pytest.mark.parametrize(
    "order", [[3, 2, 1, 0], [1, 2, 3, 0], [0, 0, 0, 0], [3, 3, 0, 0], [0, 1, 2, 3], [1, 0, 3, 2], [2, 2, 1, 1]]
)
def test_beams_are_reordered_by_permutation_and_repetition(
    new_cache: NewCache, window: int | None, order: list[int]
) -> None:
    pair = Pair(new_cache, window, Shape())
    pair.update(4, 21)
    for _ in range(3):
        pair.apply("reorder_cache", torch.tensor(order))
        pair.update(4, 1)


def test_operations_on_an_empty_cache_do_nothing(new_cache: NewCache, window: int | None) -> None:
    pair = Pair(new_cache, window, Shape())
    pair.compare()
    pair.apply("reorder_cache", torch.tensor([1, 0]))
    pair.apply("batch_repeat_interleave", 2)
    pair.apply("batch_select_indices", torch.tensor([0]))
    pair.apply("reset")
    if window is None and Version(__version__) >= Version("5.18"):
        pair.apply("crop", -3)  # the other stock layers fail on it
    pair.update(2, 4)


def test_a_reset_cache_starts_from_nothing_with_another_batch_and_shape(
    new_cache: NewCache, window: int | None
) -> None:
    pair = Pair(new_cache, window, Shape())
    for shape, n_rows in ((Shape(), 2), (Shape(), 5), (Shape(1, 96, 1, 32), 1), (Shape(dtype=torch.bfloat16), 3)):
        pair.shape = shape
        pair.update(n_rows, 13)
        pair.update(n_rows, 1)
        pair.apply("reset")
        assert pair.ours.get_seq_length() == 0


def test_a_copy_and_its_original_go_separate_ways(new_cache: NewCache, window: int | None) -> None:
    pair = Pair(new_cache, window, Shape())
    pair.update(2, 19)
    fork = Pair.__new__(Pair)
    fork.__dict__ = dict(pair.__dict__, stock=copy.deepcopy(pair.stock), ours=copy.deepcopy(pair.ours), _seed=1000)
    fork.compare()
    for step in range(3):
        pair.update(2, 1 + step)
        fork.compare()
        fork.update(2, 3)
        pair.compare()
    pair.apply("reorder_cache", torch.tensor([1, 1]))
    fork.compare()
    fork.apply("batch_select_indices", [1])
    pair.compare()
    pair.apply("reset")
    fork.compare()
    pair.ours.close()
    fork.update(1, 2)
    fork.ours.close()


def test_a_copy_outlives_its_original(new_cache: NewCache, window: int | None) -> None:
    original = VmemCache(_config(window))
    keys, values = Shape().states(2, 11, seed=0)
    original.update(keys, values, 0)
    duplicate = copy.deepcopy(original)
    original.close()
    n_kept = 11 if window is None else window - 1
    assert torch.equal(duplicate.layers[0].keys, keys[:, :, -n_kept:])
    assert torch.equal(duplicate.layers[0].values, values[:, :, -n_kept:])
    duplicate.check()
    duplicate.close()


def test_copies_of_copies_and_of_empty_caches_work(new_cache: NewCache) -> None:
    cache = copy.deepcopy(copy.deepcopy(new_cache(_config())))
    keys, values = Shape().states(1, 4, seed=0)
    cache.update(keys, values, 0)
    second = copy.deepcopy(copy.deepcopy(cache))
    second.update(keys, values, 0)
    assert cache.get_seq_length() == 4
    assert torch.equal(second.layers[0].keys, torch.cat([keys, keys], dim=2))
    second.close()
    cache.close()


def _strided(tensor: torch.Tensor, how: str) -> torch.Tensor:
    if how == "contiguous":
        return tensor.contiguous()
    if how == "expanded":
        return tensor[:, :1].expand(tensor.shape)
    if how == "sliced":
        return torch.cat([tensor, tensor], dim=-1)[..., : tensor.shape[-1]]
    if how == "last stride":
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    if how == "flipped":
        return tensor.flip(2)
    return tensor.transpose(2, 3).contiguous().transpose(2, 3)


@pytest.mark.parametrize("how", ["contiguous", "expanded", "sliced", "last stride", "flipped", "transposed"])
def test_states_may_have_any_strides(new_cache: NewCache, window: int | None, how: str) -> None:
    pair = Pair(new_cache, window, Shape())
    pair.update(2, 3)
    for seed in range(3):
        keys, values = (_strided(states, how) for states in pair.shape.states(2, 5, seed))
        expected = pair.stock.update(keys, values, 0)
        actual = pair.ours.update(keys, values, 0)
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])
        del actual
        pair.compare()


def test_the_caller_may_overwrite_its_states_afterwards(new_cache: NewCache, window: int | None) -> None:
    cache = new_cache(_config(window))
    keys, values = Shape().states(2, 5, seed=0)
    original = keys.clone()
    cache.update(keys, values, 0)
    keys.zero_()
    assert torch.equal(cache.layers[0].keys, original)


def test_states_that_require_grad_are_stored_detached(new_cache: NewCache, window: int | None) -> None:
    cache = new_cache(_config(window))
    for step in range(4):
        keys, values = Shape().states(2, 5, seed=step)
        returned = cache.update(keys.requires_grad_(), values.requires_grad_(), 0)
        assert torch.equal(returned[0][:, :, -5:], keys)
        assert not cache.layers[0].keys.requires_grad
    del returned
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_cache_filled_in_one_mode_goes_on_in_another(new_cache: NewCache, mode: Any) -> None:
    pair = Pair(new_cache, None, Shape())
    with mode():
        pair.update(2, 5)
    pair.update(2, 1)
    with mode():
        pair.update(2, 3)
        pair.apply("reorder_cache", torch.tensor([1, 0]))
    pair.apply("reorder_cache", torch.tensor([1, 1]))
    pair.update(2, 1)


def test_the_address_of_a_full_layer_never_changes(new_cache: NewCache) -> None:
    cache = new_cache(_config())
    addresses = set()
    for step in range(200):
        keys, values = Shape().states(3, 1 + step % 7, seed=step)
        returned = cache.update(keys, values, 0)
        assert returned[0].data_ptr() == cache.layers[0].keys.data_ptr()
        assert returned[1].data_ptr() == cache.layers[0].values.data_ptr()
        addresses.add((returned[0].data_ptr(), returned[1].data_ptr(), returned[0].stride(), returned[1].stride()))
        if step % 20 == 0:
            cache.crop(-3)
            cache.reorder_cache(torch.tensor([2, 0, 1]))
    del returned
    assert len(addresses) == 1


def test_the_address_of_a_window_is_the_storage_plus_its_offset(new_cache: NewCache) -> None:
    cache = new_cache(_config(WINDOW))
    keys, values = Shape().states(2, 5, seed=0)
    first = [states.data_ptr() for states in cache.update(keys, values, 0)]
    n_before = 5
    for step in range(120):
        n_new = 1 + step % 3
        returned = cache.update(*Shape().states(2, n_new, seed=step), 0)
        for states, address in zip(returned, first, strict=True):
            first_visible = max(0, n_before - WINDOW + 1)
            assert states.data_ptr() == address + first_visible * states.stride(2) * states.element_size()
            assert states.shape[2] == n_before + n_new - first_visible
        n_before += n_new
    del returned, states


def test_views_share_the_memory_of_the_cache(new_cache: NewCache) -> None:
    cache = new_cache(_config())
    keys, _ = cache.update(*Shape().states(2, 5, seed=0), 0)
    keys[1, 0, 2] = 7.0
    assert (cache.layers[0].keys[1, 0, 2] == 7.0).all()
    longer, _ = cache.update(*Shape().states(2, 1, seed=1), 0)
    assert longer.untyped_storage().data_ptr() == keys.untyped_storage().data_ptr()
    del keys, longer


@pytest.mark.parametrize("record_past", [False, True])
def test_pages_behind_a_window_are_given_back(new_cache: NewCache, record_past: bool) -> None:
    cache = new_cache(_config(WINDOW), page_bytes=4096)
    if record_past:
        cache.activate_past_recording()
    mapped = []
    for step in range(600):
        cache.update(*Shape().states(2, 2, seed=step), 0)
        cache.crop(-1) if record_past else None
        mapped.append(cache.stats().mapped_bytes)
    assert cache.get_seq_length() == (600 if record_past else 1200)
    assert cache.stats().live_bytes <= mapped[-1]
    # Heads of 256 bytes, 16 tokens to a page: a window of 8 is never under more than two pages of a head, plus
    # one that may not have been given back yet.
    assert max(mapped) <= 3 * 4096 * (2 * 2 * 2)
    assert cache.stats().peak_bytes <= 4 * 4096 * (2 * 2 * 2)
    cache.check()


def test_a_full_layer_beside_keeps_its_pages(new_cache: NewCache) -> None:
    """The bound above is the window's doing, not some general forgetting."""
    cache = new_cache(_config(), page_bytes=4096)
    for step in range(600):
        cache.update(*Shape().states(2, 2, seed=step), 0)
    assert cache.stats().mapped_bytes >= cache.stats().live_bytes == 1200 * 2 * 2 * 2 * 64 * 4
    assert cache.stats().mapped_bytes <= cache.stats().live_bytes + 4096 * (2 * 2 * 2)


def test_early_initialization_leaves_an_empty_cache_that_works(new_cache: NewCache, window: int | None) -> None:
    stock, ours = DynamicCache(config=_config(window)), new_cache(_config(window))
    for cache in (stock, ours):
        cache.early_initialization(2, 2, 64, torch.float32, torch.device("cpu"))
        assert cache.get_seq_length() == 0
    for step in range(3):
        keys, values = Shape().states(2, 5, seed=step)
        expected, actual = stock.update(keys, values, 0), ours.update(keys, values, 0)
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])


def test_iterating_over_the_cache_yields_what_the_stock_cache_yields(new_cache: NewCache, window: int | None) -> None:
    pair = Pair(new_cache, window, Shape())
    pair.update(2, 13)
    for ours, stock in zip(pair.ours, pair.stock, strict=True):
        for actual, expected in zip(ours, stock, strict=True):
            assert (actual is None and expected is None) or torch.equal(actual, expected)
    del ours, stock, actual, expected
    assert len(pair.ours) == len(pair.stock)


class _StatePair(Pair):
    """A pair whose layer has recurrent state beside its attention, windowed or not."""

    def __init__(self, new_cache: NewCache, window: int | None) -> None:
        super().__init__(new_cache, window, Shape())
        config = LlamaConfig(
            num_hidden_layers=1,
            hidden_size=32,
            num_attention_heads=2,
            sliding_window=window or WINDOW,
            layer_types=["hybrid" if window is None else "hybrid_sliding"],
        )
        self.stock, self.ours = DynamicCache(config=config), new_cache(config)

    def update_state(self, n_rows: int, n_tokens: int, with_recurrence: bool = True) -> None:
        """Do what a layer's recurrent half does in a pass, which comes before or after the attention."""
        generator = torch.Generator().manual_seed(self._seed)
        convolved = torch.randn(n_rows, 6, n_tokens, generator=generator)
        recurrent = torch.randn(n_rows, 3, 5, generator=generator)
        for cache in (self.stock, self.ours):
            cache.update_conv_state(convolved.clone(), 0, conv_kernel_size=4)
            if with_recurrence:
                cache.update_recurrent_state(recurrent.clone(), 0)

    def compare(self) -> None:
        super().compare()
        stock, ours = self.stock.layers[0], self.ours.layers[0]
        for name in ("conv_states", "recurrent_states"):
            for expected, actual in zip(getattr(stock, name).values(), getattr(ours, name).values(), strict=True):
                assert (actual is None) == (expected is None), name
                assert actual is None or torch.equal(actual, expected), name
        assert ours.has_previous_state == stock.has_previous_state
        assert self.ours.is_croppable == self.stock.is_croppable
        assert self.ours.is_compileable == self.stock.is_compileable
        assert self.ours.is_linear == self.stock.is_linear


@pytest.mark.parametrize("is_state_first", [True, False])
def test_state_beside_attention_stays_as_in_the_stock_layer(
    new_cache: NewCache, window: int | None, is_state_first: bool
) -> None:
    pair = _StatePair(new_cache, window)
    for n_tokens in (11, 1, 1, 5, 1):
        if is_state_first:
            pair.update_state(3, n_tokens)
        pair.update(3, n_tokens)
        if not is_state_first:
            pair.update_state(3, n_tokens)
        pair.apply("reorder_cache", torch.tensor([2, 0, 0]))
    pair.stock, pair.ours = copy.deepcopy(pair.stock), copy.deepcopy(pair.ours)
    pair.compare()
    pair.update(3, 1)
    pair.update_state(3, 1)
    pair.compare()
    for cache in (pair.stock, pair.ours):  # not recorded: neither half of the layer can be taken back
        with pytest.raises(RuntimeError, match="activate_past_recording"):
            cache.crop(-1)
    pair.compare()
    pair.ours.reset()
    assert pair.ours.get_seq_length() == 0
    assert not pair.ours.has_previous_state(0)
    pair.ours.close()


def test_convolutions_beside_attention_are_cropped_with_it(new_cache: NewCache, window: int | None) -> None:
    pair = _StatePair(new_cache, window)
    pair.apply("activate_past_recording")
    for n_tokens, n_removed in ((20, 0), (6, 4), (1, 0), (5, 5), (1, 1), (9, 2)):
        pair.update_state(2, n_tokens, with_recurrence=False)
        pair.update(2, n_tokens)
        pair.apply("crop", -n_removed)
    pair.update(2, 3)


class _ForgetfulPair(Pair):
    """A pair of which one side skips reorders: the comparison has to notice."""

    def apply(self, operation: str, *arguments: Any) -> None:
        if operation == "reorder_cache":
            self.ours.reorder_cache(*arguments)
            self.compare()
        else:
            super().apply(operation, *arguments)


def test_a_planted_fault_is_caught(new_cache: NewCache) -> None:
    pair = _ForgetfulPair(new_cache, None, Shape())
    pair.update(2, 13)
    with pytest.raises(AssertionError):
        pair.apply("reorder_cache", torch.tensor([1, 0]))
