"""transformers: a cache for `generate` whose memory is mapped as the tokens come.

    cache = VmemCache(model.config)
    model.generate(**inputs, past_key_values=cache)
    cache.close()

The only file, with `attention/sdpa.py`, that knows transformers. It subclasses the public cache classes and builds
layers from the public mapping of layer types; a layer type that it does not know keeps the stock layer.

Guarantees: tokens are those of `DynamicCache`. What attention receives are views of exactly the used length, at an
address that never changes. After a CapacityError or UsageError the cache is as before the forward pass (in models
that mix attention with recurrent state, the recurrent layers keep what the failed pass wrote: reset those).

Where stock layers slice their tensors (crop), we let them slice the views and read the new length off the result:
their rules, of whatever version, are then ours.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, NoReturn

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
    get_layer_types_and_kwargs,
)

from vmem_kv.attention.sdpa import register
from vmem_kv.config import CacheConfig
from vmem_kv.errors import UsageError, VmemError
from vmem_kv.layout import LayerSpec, TensorSpec
from vmem_kv.rows import DEFAULT_MAX_TOKENS, LayerRows, RowStore, close_rows
from vmem_kv.stats import CacheStats

register()


class VmemLayerMixin(DynamicLayer):
    """Storage of a stock layer class replaced by `LayerRows`; everything else is the stock class's."""

    keys: Any  # a view of the tokens kept, `[n_rows, n_heads, n_tokens, head_dim]`; None before the first update
    values: Any

    def __init__(self, store: RowStore, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._store = store
        self._rows: LayerRows | None = None

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        if len(args) != 2:  # the recurrent part of a layer that has both
            super().lazy_initialization(*args, **kwargs)
            return
        key_states, value_states = args
        n_rows = key_states.shape[0]
        if self._rows is None or self._rows.max_rows < n_rows or not _fits(self._rows, key_states, value_states):
            self._rows = None
            self._rows = self._store.open_rows(_spec(key_states, value_states), key_states.dtype, n_rows)
        else:
            self._rows.start(n_rows)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True
        self._refresh()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self._begin(key_states, value_states)
        rows.append(key_states, value_states)
        self._refresh()
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return 0 if self._rows is None else self._rows.n_tokens

    def reset(self) -> None:
        # First drop the tensors, which some versions of the stock method would fill with zeros.
        self.keys = self.values = None
        self.is_initialized = False
        if self._rows is not None:
            self._rows.stop()
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self._rows is not None and self.is_initialized:
            self._rows.truncate(self._rows.first_token + self.keys.shape[-2])
            self._refresh()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._rows is not None:
            self._select(torch.arange(self._rows.n_rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Any) -> None:
        if self._rows is not None:
            # As tensor indexing reads them: lists, tuples of one index tensor, masks, negative numbers.
            self._select(torch.arange(self._rows.n_rows)[indices])

    def roll_back(self, n_tokens: int) -> None:
        """Forget the tokens from `n_tokens` on, which a forward pass wrote that failed in a later layer."""
        if self._rows is not None and self._rows.n_tokens > n_tokens:
            self._rows.truncate(max(n_tokens, self._rows.first_token))
            self._refresh()

    def let_go(self) -> list[LayerRows]:
        """Drop the tensors of this layer and return what there is to close."""
        self.keys = self.values = None
        return [] if self._rows is None else [self._rows]

    def look_again(self) -> None:
        """Undo `let_go`."""
        if self._rows is not None and self.is_initialized:
            self._refresh()

    def __deepcopy__(self, memo: dict[int, Any]) -> VmemLayerMixin:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        ours = {"keys": None, "values": None, "_rows": self._rows and self._rows.copy()}
        clone.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k not in ours})
        clone.__dict__.update(ours)
        if clone.is_initialized:
            clone._refresh()
        return clone

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UsageError("a vmem_kv cache cannot be pickled: its memory is mapped in parts; save clones of its tensors")

    def _begin(self, key_states: torch.Tensor, value_states: torch.Tensor) -> LayerRows:
        """Return the rows to append to, begun anew where they hold nothing that a new batch could contradict."""
        rows = self._rows
        if rows is not None and rows.n_tokens == 0 and rows.n_rows != key_states.shape[0]:
            rows.stop()
            self.is_initialized = False
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self._rows is not None
        return self._rows

    def _select(self, indices: torch.Tensor) -> None:
        if self._rows is not None and self._rows.n_tokens > 0:
            self._rows = self._rows.select(indices.to("cpu"))
            self._refresh()

    def _refresh(self) -> None:
        """Point `keys` and `values`, which models and users read, at what is stored."""
        assert self._rows is not None
        self.keys, self.values = self._rows.views()


class VmemLayer(VmemLayerMixin):
    """Full attention."""


class VmemSlidingLayer(VmemLayerMixin, DynamicSlidingWindowLayer):
    """Attention through a window. Pages behind it are given back; addresses stay."""

    _sliding_window_tensor: Any

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        super().lazy_initialization(*args, **kwargs)
        self._sliding_window_tensor = self._sliding_window_tensor.to(self.device)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self._begin(key_states, value_states)
        visible_from = max(rows.n_tokens - self.sliding_window + 1, rows.first_token)
        if not self.record_past:
            # What fell out of the window goes back now, a pass late: if this one fails, nothing is missing.
            rows.slide(visible_from)
        rows.append(key_states, value_states)
        self.cumulative_length = rows.n_tokens
        self._refresh()
        return rows.views(visible_from)

    def get_seq_length(self) -> int:
        return int(self.cumulative_length)

    def crop(self, tokens_to_remove: int) -> None:
        DynamicSlidingWindowLayer.crop(self, tokens_to_remove)
        rows = self._rows
        if rows is not None and self.is_initialized:
            rows.truncate(self.cumulative_length)
            rows.slide(self.cumulative_length - self.keys.shape[-2])
            self._refresh()

    def roll_back(self, n_tokens: int) -> None:
        super().roll_back(n_tokens)
        if self._rows is not None:
            self.cumulative_length = self._rows.n_tokens

    def _refresh(self) -> None:
        rows = self._rows
        assert rows is not None
        first = rows.first_token if self.record_past else max(rows.n_tokens - self.sliding_window + 1, rows.first_token)
        self.keys, self.values = rows.views(first)


class VmemHybridLayer(VmemLayerMixin, LinearAttentionAndFullAttentionLayer):
    """Full attention beside recurrent state in one layer; the state stays with the stock class."""

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        self._select(beam_idx)


class VmemHybridSlidingLayer(VmemSlidingLayer, LinearAttentionAndSlidingWindowAttentionLayer):
    """Windowed attention beside recurrent state in one layer; the state stays with the stock class."""

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        self._select(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)
        super().crop(tokens_to_remove)


_LAYERS: dict[str, type[VmemLayerMixin]] = {
    "full_attention": VmemLayer,
    "sliding_attention": VmemSlidingLayer,
    "chunked_attention": VmemSlidingLayer,
    "hybrid": VmemHybridLayer,
    "hybrid_sliding": VmemHybridSlidingLayer,
}


class VmemCache(DynamicCache):
    """A `DynamicCache` over demand-mapped memory: `model.generate(..., past_key_values=VmemCache(model.config))`.

    Args:
        config: The model's configuration.
        max_tokens: Virtual length of a sequence; costs addresses only. Default: what the model was made for, but at
            least 32,768.
        page_bytes: Unit of physical memory; default: chosen with the layout.
        layout: "auto", "per_head", "per_layer" or "token_major".
        max_bytes: Budget of physical memory; default: 90 % of what is available.
        expected_tokens: The usual final length, for choosing page size and layout; default 4,096.
        options: Instead of the five above, a whole `CacheConfig`.

    Raises:
        ConfigError: A value makes no sense. What the machine cannot offer is refused at the first forward pass,
            when the shapes are known.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        max_tokens: int | None = None,
        page_bytes: int | None = None,
        layout: str = "auto",
        max_bytes: int | None = None,
        expected_tokens: int | None = None,
        options: CacheConfig | None = None,
    ) -> None:
        decoder_config = config.get_text_config(decoder=True)
        if max_tokens is None:
            max_tokens = max(getattr(decoder_config, "max_position_embeddings", None) or 0, DEFAULT_MAX_TOKENS)
        options = options or CacheConfig(
            max_tokens=max_tokens,
            page_bytes=page_bytes,
            layout=layout,
            max_bytes=max_bytes,
            expected_tokens=expected_tokens,
        )
        layer_types, kwargs = get_layer_types_and_kwargs(decoder_config)
        per_layer = kwargs if isinstance(kwargs, list) else [kwargs] * len(layer_types)  # 5.17 shares one dict
        store = RowStore(options, n_layers=sum(name in _LAYERS for name in layer_types))
        mapping = DYNAMIC_LAYER_TYPE_MAPPING | _layers_on(store)
        Cache.__init__(self, layers=[mapping[t](**kw) for t, kw in zip(layer_types, per_layer, strict=True)])
        self._store = store
        self._closed = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the next tokens of one layer and return views of all of its K and V.

        Raises:
            CapacityError: No room; the message says of what. All layers are as before the forward pass.
            UsageError: Another batch size, dtype or device than before, or a closed cache. Likewise.
        """
        if self._closed:
            raise UsageError("the cache is closed; make a new VmemCache")
        try:
            states: tuple[torch.Tensor, torch.Tensor] = self.layers[layer_idx].update(
                key_states, value_states, *args, **kwargs
            )
            return states
        except VmemError:
            n_tokens = self.layers[layer_idx].get_seq_length()
            for layer in self._our_layers():
                layer.roll_back(n_tokens)
            raise

    def stats(self) -> CacheStats:
        """Return one snapshot over all layers."""
        return self._store.stats()

    def explain(self) -> str:
        """Say in one sentence which layout and page size are used, and why; known after the first forward pass."""
        choice = self._store.choice
        return choice.why if choice else "Layout and page size are chosen at the first forward pass."

    def check(self) -> None:
        """Verify the books. Raises InvariantError."""
        self._store.check()

    def trim(self) -> int:
        """Give memory that no token uses back to the system, as after `reset`; return how many pages.

        Raises:
            DriverError: A page could not be given back; it is quarantined.
        """
        return self._store.trim()

    def close(self) -> None:
        """Give all memory back. Idempotent.

        Raises:
            UsageError: Tensors that look into the cache are still alive; nothing is lost, close again without them.
            DriverError: Memory could not be given back; call again to try again.
        """
        layers = self._our_layers()
        try:
            close_rows([rows for layer in layers for rows in layer.let_go()])
        except UsageError:
            for layer in layers:
                layer.look_again()
            raise
        self._closed = True

    def __enter__(self) -> VmemCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        # The traceback's frames may hold views; what they keep alive is freed when they die.
        try:
            self.close()
        except UsageError:
            self._closed = True

    def __deepcopy__(self, memo: dict[int, Any]) -> VmemCache:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return clone

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UsageError("a vmem_kv cache cannot be pickled: its memory is mapped in parts; save clones of its tensors")

    def _our_layers(self) -> list[VmemLayerMixin]:
        return [layer for layer in self.layers if isinstance(layer, VmemLayerMixin)]


@contextmanager
def dynamic_caches_on_vmem(options: CacheConfig | None = None) -> Iterator[RowStore]:
    """Inside this context, every `DynamicCache(config=...)` that anybody makes is on demand-mapped memory.

    For code that builds its own caches. It swaps entries of transformers' mapping of layer types, for the whole
    process, and puts them back on exit; caches made inside stay ours. Yields the store that they share.
    """
    store = RowStore(options or CacheConfig(), n_layers=32)
    stock = {name: DYNAMIC_LAYER_TYPE_MAPPING[name] for name in _LAYERS if name in DYNAMIC_LAYER_TYPE_MAPPING}
    DYNAMIC_LAYER_TYPE_MAPPING.update(_layers_on(store))
    try:
        yield store
    finally:
        DYNAMIC_LAYER_TYPE_MAPPING.update(stock)


def _layers_on(store: RowStore) -> dict[str, Any]:
    return {name: partial(layer, store) for name, layer in _LAYERS.items() if name in DYNAMIC_LAYER_TYPE_MAPPING}


def _spec(key_states: torch.Tensor, value_states: torch.Tensor) -> LayerSpec:
    key, value = (TensorSpec(t.shape[1], t.shape[3], t.element_size()) for t in (key_states, value_states))
    return LayerSpec(key, value)


def _fits(rows: LayerRows, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
    return rows.dtype is key_states.dtype and rows.spec == _spec(key_states, value_states)
