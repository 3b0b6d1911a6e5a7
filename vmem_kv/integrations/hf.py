"""transformers: a cache for `generate` whose memory is mapped as the tokens come.

    cache = VmemCache(model.config)
    model.generate(**inputs, past_key_values=cache)
    cache.close()

It subclasses the public cache class and builds layers (`hf_layers.py`) from the public mapping of layer types; a layer
type that we do not know keeps the stock layer. What changes all layers or none is in `hf_changes.py`.

Guarantees: tokens are those of `DynamicCache`. What attention receives are views of exactly the used length: as long
as a batch lives, token i stays at its address. After a CapacityError or UsageError all layers are as before the
forward pass, so that the call can be repeated with less. Two things are beyond our reach then: recurrent state in
hybrid layers, and the flags of an `EncoderDecoderCache`, which say that the encoder's side is computed. Call `reset()`
on those before going on. A change of rows (beam search, copies) or a crop that fails leaves all rows as they were.

Copies (`fork`, `copy.deepcopy`, `batch_repeat_interleave`, `reorder_cache`) share the pages that are full of the same
tokens, and copy what is left, less than a page of each layer's K and V (or of each of their heads).

A view (`cache.layers[i].keys`) is good until the next forward pass, crop, reset or trim: clone what is to last.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, NoReturn

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache, get_layer_types_and_kwargs

from vmem_kv.config import CacheConfig
from vmem_kv.devices import OpenDriver, open_driver
from vmem_kv.errors import ConfigError, UsageError
from vmem_kv.integrations.hf_attention import register
from vmem_kv.integrations.hf_changes import RowsOf, all_or_none, repeated, selected
from vmem_kv.integrations.hf_layers import LAYERS, ForwardPass, layers_on
from vmem_kv.integrations.hf_layers import VmemLayerMixin as VmemLayerMixin
from vmem_kv.rows import DEFAULT_MAX_TOKENS, RowStore, close_rows
from vmem_kv.stats import CacheStats

register()


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
        open_driver: Opens the driver for the device on which the model lies; to wrap one, or to bring your own.

    Raises:
        ConfigError: A value makes no sense, or `options` was given beside one of the five. What the machine cannot
            offer is refused at the first forward pass, when the shapes are known.
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
        open_driver: OpenDriver = open_driver,
    ) -> None:
        given = CacheConfig(
            max_tokens=max_tokens,
            page_bytes=page_bytes,
            layout=layout,
            max_bytes=max_bytes,
            expected_tokens=expected_tokens,
        )
        if options is not None and given != CacheConfig():
            raise ConfigError(f"VmemCache was given {given} and {options}; put everything into options")
        options = options or given
        decoder_config = config.get_text_config(decoder=True)
        if options.max_tokens is None:
            model_tokens = getattr(decoder_config, "max_position_embeddings", None) or 0
            options = replace(options, max_tokens=max(model_tokens, DEFAULT_MAX_TOKENS))
        layer_types, kwargs = get_layer_types_and_kwargs(decoder_config)
        per_layer = kwargs if isinstance(kwargs, list) else [kwargs] * len(layer_types)  # 5.17 shares one dict
        store = RowStore(options, sum(name in LAYERS for name in layer_types), open_driver)
        mapping = DYNAMIC_LAYER_TYPE_MAPPING | layers_on(store, ForwardPass())
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
        self._require_open()
        states: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return states

    def reset(self) -> None:
        """Forget all tokens. The memory stays mapped, for the next batch to use without a driver call."""
        self._require_open()
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens, by the rules of the stock cache.

        Raises:
            CapacityError: They are shared with a copy, and there is no room for pages of one's own at the new end.
                Nothing changed.
        """
        self._require_open()
        n_removed = int(tokens_to_remove)
        layers = self._our_layers()
        all_or_none([partial(layer.begin_crop, n_removed) for layer in layers])
        try:
            super().crop(n_removed)
        except BaseException:
            for layer in layers:
                layer.look_again()  # where a layer refused before the turn of these
            raise

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make row i what row `beam_idx[i]` is now.

        Pages full of tokens are exchanged, where they differ; what is left of the tokens is copied.

        Raises:
            OutOfMappings: Pages could not be exchanged. Nothing changed.
            DriverError: Likewise. Where a layer could not be put back, its rows refuse to grow: reset it, or drop it.
        """
        self._change_rows(selected(beam_idx), "reorder_cache", beam_idx)
        for layer in self._our_layers():
            layer.reorder_state(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Put `repeats` copies of every row in its place, which share their full pages.

        Raises:
            CapacityError: No room for them. Nothing changed.
        """
        self._change_rows(repeated(repeats), "batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: Any) -> None:
        """Keep the rows `indices`, in this order.

        Raises:
            CapacityError: They are more than before, and there is no room. Nothing changed.
        """
        self._change_rows(selected(indices), "batch_select_indices", indices)

    def fork(self) -> VmemCache:
        """Return an independent cache with the same tokens, which shares their full pages; as `copy.deepcopy` does.

        Both go on as they like, and are closed in any order.

        Raises:
            CapacityError: No room for what is left of the tokens behind their full pages. Nothing changed.
        """
        return copy.deepcopy(self)

    def _change_rows(self, rows_of: RowsOf, stock_method: str, argument: Any) -> None:
        """Change the rows of all layers or, where one has no room, of none."""
        self._require_open()
        all_or_none([partial(layer.begin_change, rows_of) for layer in self._our_layers()])
        for other in self.layers:
            if not isinstance(other, VmemLayerMixin):
                getattr(other, stock_method)(argument)

    def stats(self) -> CacheStats:
        """Return one snapshot over all layers; those of deep copies count too, they share the pool."""
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
            UsageError: Tensors that look into the cache are still alive, or this is a forked child. Nothing changed:
                close again without them.
            DriverError, OutOfMappings: Memory could not be given back; call again to try again.
        """
        self._store.require_owner()
        layers = self._our_layers()
        try:
            close_rows([rows for layer in layers for rows in layer.let_go()])
        except UsageError:
            for layer in layers:
                layer.look_again()
            raise
        self._abandon()

    def __enter__(self) -> VmemCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        self._abandon()  # the traceback's frames may hold views: their memory is freed when they die

    def __deepcopy__(self, memo: dict[int, Any]) -> VmemCache:
        self._require_open()
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        try:
            clone.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        except BaseException:
            for layer in self._our_layers():
                copied = memo.get(id(layer))
                if copied is not None:
                    copied.abandon()
            raise
        return clone

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UsageError("a vmem_kv cache cannot be pickled: its memory is mapped in parts; save clones of its tensors")

    def _abandon(self) -> None:
        for layer in self._our_layers():
            layer.abandon()
        self._closed = True

    def _require_open(self) -> None:
        if self._closed:
            raise UsageError("the cache is closed; make a new VmemCache")

    def _our_layers(self) -> list[VmemLayerMixin]:
        return [layer for layer in self.layers if isinstance(layer, VmemLayerMixin)]


@contextmanager
def dynamic_caches_on_vmem(options: CacheConfig | None = None) -> Iterator[RowStore]:
    """Inside this context, every `DynamicCache(config=...)` that anybody makes is on demand-mapped memory.

    For code that builds its own caches. It swaps entries of transformers' mapping of layer types, for the whole
    process, and puts them back on exit; caches made inside stay ours. Yields the store that they share.

    Such a cache does not know its layers as a whole: after a CapacityError some have the failed pass's tokens and some
    do not, so reset or drop it. Sequences are limited to `options.max_tokens`, by default 32,768.
    """
    store = RowStore(options or CacheConfig(), n_layers=32)
    stock = {name: DYNAMIC_LAYER_TYPE_MAPPING[name] for name in LAYERS if name in DYNAMIC_LAYER_TYPE_MAPPING}
    DYNAMIC_LAYER_TYPE_MAPPING.update(layers_on(store))
    try:
        yield store
    finally:
        DYNAMIC_LAYER_TYPE_MAPPING.update(stock)
