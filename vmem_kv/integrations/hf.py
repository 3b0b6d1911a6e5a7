"""transformers: a cache for `generate` whose memory is mapped as the tokens come.

    cache = VmemCache(model.config)
    model.generate(**inputs, past_key_values=cache)
    cache.close()

All that touches transformers' caches. It subclasses the public cache classes and builds layers from the public mapping
of layer types; a layer type that it does not know keeps the stock layer.

Guarantees: tokens are those of `DynamicCache`. What attention receives are views of exactly the used length: as long
as a batch lives, token i stays at its address. After a CapacityError or UsageError all layers are as before the
forward pass, so that the call can be repeated with less. Two things are beyond our reach then: recurrent state in
hybrid layers, and the flags of an `EncoderDecoderCache`, which say that the encoder's side is computed. Call `reset()`
on those before going on. A change of rows (beam search, copies) or a crop that fails leaves all rows as they were.

Copies (`fork`, `copy.deepcopy`, `batch_repeat_interleave`, `reorder_cache`) share the pages that are full of the same
tokens, and copy what is left, less than a page of each layer's K and V (or of each of their heads).

A view (`cache.layers[i].keys`) is good until the next forward pass, crop, reset or trim: clone what is to last.

Where stock layers slice their tensors (crop), we let them slice the views and read the new length off the result:
their rules, of whatever version, are then ours.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

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

from vmem_kv.config import CacheConfig
from vmem_kv.devices import OpenDriver, open_driver
from vmem_kv.errors import ConfigError, OutOfSlots, UsageError, VmemError
from vmem_kv.integrations.hf_attention import register
from vmem_kv.layout import LayerSpec, TensorSpec
from vmem_kv.rows import DEFAULT_MAX_TOKENS, LayerRows, RowStore, close_rows
from vmem_kv.rows import Change as RowsChange
from vmem_kv.stats import CacheStats

register()


class ForwardPass:
    """What the layers of one cache wrote in the forward pass that is under way, to be undone if a later one cannot.

    A layer whose turn comes a second time begins a new pass. Layers are held weakly: they hold this object.
    """

    def __init__(self) -> None:
        self._lengths: dict[int, tuple[weakref.ref[VmemLayerMixin], int | None]] = {}

    def note(self, layer: VmemLayerMixin) -> None:
        """Note how long a layer is before it is written; None stands for not begun."""
        if id(layer) in self._lengths:
            self._lengths.clear()
        n_tokens = layer.get_seq_length() if layer.is_initialized else None
        self._lengths[id(layer)] = weakref.ref(layer), n_tokens

    def undo(self) -> None:
        """Take every layer back to where it was before the pass."""
        for reference, n_tokens in self._lengths.values():
            layer = reference()
            if layer is not None:
                layer.roll_back(n_tokens)
        self._lengths.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardPass:
        return ForwardPass()  # copied layers are in no pass yet


class VmemLayerMixin(DynamicLayer):
    """Storage of a stock layer class replaced by `LayerRows`; everything else is the stock class's."""

    keys: Any  # a view of the tokens kept, `[n_rows, n_heads, n_tokens, head_dim]`; None before the first update
    values: Any

    def __init__(self, store: RowStore, forward_pass: ForwardPass | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._store = store
        self._pass = forward_pass or ForwardPass()
        self._rows: LayerRows | None = None

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        if len(args) != 2:  # the recurrent part of a layer that has both
            super().lazy_initialization(*args, **kwargs)
            return
        key_states, value_states = args
        n_rows = key_states.shape[0]
        if not self._start(n_rows, key_states, value_states):
            self._rows = None
            self._rows = self._store.open_rows(
                _spec(key_states, value_states), key_states.dtype, n_rows, key_states.device
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True
        self._refresh()

    def _start(self, n_rows: int, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        """Begin a batch where the last one was, if there is room for such a one."""
        rows = self._rows
        if rows is None or rows.max_rows < n_rows or not _fits(rows, key_states, value_states):
            return False
        try:
            rows.start(n_rows)
        except OutOfSlots:  # copies of earlier batches have them
            return False
        return True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the next tokens and return views of all that attention needs.

        Raises:
            CapacityError: No room; the message says of what. All layers are as before the forward pass.
            UsageError: Another batch size, dtype or device than before. Likewise.
        """
        self._pass.note(self)
        try:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            return self._append(key_states, value_states)
        except VmemError:
            self._pass.undo()
            raise

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._rows is not None
        self._rows.append(key_states, value_states)
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
        n_removed = int(tokens_to_remove)  # assisted decoding passes a tensor
        _all_or_none([partial(self.begin_crop, n_removed)])
        try:
            self._crop(n_removed)
        except BaseException:
            self.look_again()
            raise

    def _crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self._rows is not None and self.is_initialized:
            self._rows.truncate(self._cropped_length())
            self._refresh()

    def begin_crop(self, tokens_to_remove: int) -> Change:
        """Do of a crop what can fail for lack of memory: have pages of one's own where shared ones are cut.

        Raises:
            CapacityError: No room for them. Nothing changed.
        """
        rows = self._rows
        if rows is None or not self.is_initialized or not rows.n_shared_tokens():
            return Change()
        n_tokens = self._length_after(tokens_to_remove)
        if n_tokens >= rows.n_shared_tokens():
            return Change()
        truncation = rows.begin_truncate(n_tokens)
        return Change(truncation.commit, truncation.undo)

    def _length_after(self, tokens_to_remove: int) -> int:
        """What a crop would leave. Only the stock class knows: let it slice the views, look, and forget that it did."""
        before = self.__dict__.copy()
        try:
            self._slice(tokens_to_remove)
            return self._cropped_length()
        finally:
            self.__dict__.clear()
            self.__dict__.update(before)

    def _slice(self, tokens_to_remove: int) -> None:
        """Let the stock class crop the views, and nothing else."""
        DynamicLayer.crop(self, tokens_to_remove)

    def _cropped_length(self) -> int:
        """The length that the cropped views mean."""
        assert self._rows is not None
        return self._rows.first_token + int(self.keys.shape[-2])

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def reorder_state(self, beam_idx: torch.Tensor) -> None:
        """Reorder what a layer keeps beside its K and V."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        _all_or_none([partial(self.begin_change, _repeated(repeats))])

    def batch_select_indices(self, indices: Any) -> None:
        _all_or_none([partial(self.begin_change, _selected(indices))])

    def begin_change(self, rows_of: Callable[[int], torch.Tensor]) -> Change:
        """Do of a change of rows what can fail: exchange the pages that rows share, and map memory for more rows.

        Args:
            rows_of: Told how many rows there are; returns, for every row that there shall be, which one it copies.

        Raises:
            CapacityError: No room for them. Nothing changed.
        """
        if self._rows is None or not self.is_initialized:
            return Change()
        indices = rows_of(self._rows.n_rows)
        if indices.numel() > self._rows.n_rows:
            wider = self._rows.copy(indices)
            return Change(partial(self._use, wider), wider.close)
        selection = self._rows.begin_select(indices)
        return Change(partial(self._end_selection, selection), selection.undo)

    def _use(self, rows: LayerRows) -> None:
        assert self._rows is not None
        old, self._rows = self._rows, rows
        self._refresh()
        with suppress(UsageError):  # somebody looks at them: then they go with the last view
            old.close()

    def _end_selection(self, selection: RowsChange) -> None:
        try:
            selection.commit()
        finally:
            self._refresh()

    def roll_back(self, n_tokens: int | None) -> None:
        """Forget the tokens from `n_tokens` on; with None, begin anew with the next update."""
        rows = self._rows
        if n_tokens is None:
            self.keys = self.values = None
            self.is_initialized = False
            if rows is not None:
                rows.stop()
        elif rows is not None and rows.n_tokens > n_tokens:
            rows.truncate(n_tokens)
            self._refresh()

    def let_go(self) -> list[LayerRows]:
        """Drop the tensors of this layer and return what there is to close."""
        self.keys = self.values = None
        return [] if self._rows is None else [self._rows]

    def abandon(self) -> None:
        """Leave the memory to whoever still looks at it: it is freed when the last view dies."""
        self.keys = self.values = self._rows = None
        self.is_initialized = False

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

    def _refresh(self) -> None:
        """Point `keys` and `values`, which models and users read, at what is stored."""
        assert self._rows is not None
        self.keys, self.values = self._rows.views()


def _nothing() -> None:
    """What is to be done where nothing changes."""


class Change(NamedTuple):
    """A change of one layer of which the part that can fail is done. Exactly one of the two ends it."""

    commit: Callable[[], None] = _nothing
    undo: Callable[[], None] = _nothing


def _all_or_none(beginnings: Iterable[Callable[[], Change]]) -> None:
    """Change all layers or, where one cannot, none of them."""
    changes: list[Change] = []
    try:
        for begin in beginnings:
            changes.append(begin())  # noqa: PERF401 - what was begun must be known on failure
    except BaseException:
        for change in reversed(changes):
            with suppress(VmemError):  # rows that cannot be put back refuse to grow; the first error is the one to tell
                change.undo()
        raise
    with ExitStack() as stack:  # every one of them, whatever another says
        for change in changes:
            stack.callback(change.commit)


def _repeated(repeats: int) -> Callable[[int], torch.Tensor]:
    return lambda n_rows: torch.arange(n_rows).repeat_interleave(repeats)


def _selected(indices: Any) -> Callable[[int], torch.Tensor]:
    # As the stock layer reads them: tensors, lists, tuples, masks, negative numbers.
    where = indices.to("cpu") if isinstance(indices, torch.Tensor) else indices
    return lambda n_rows: torch.arange(n_rows)[where, ...]


class VmemLayer(VmemLayerMixin):
    """Full attention."""


class VmemSlidingLayer(VmemLayerMixin, DynamicSlidingWindowLayer):
    """Attention through a window. Pages behind it are given back; addresses stay."""

    _sliding_window_tensor: Any

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        super().lazy_initialization(*args, **kwargs)
        self._sliding_window_tensor = self._sliding_window_tensor.to(self.device)

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self._rows
        assert rows is not None
        visible_from = max(rows.n_tokens - self.sliding_window + 1, rows.first_token)
        if not self.record_past:
            # What fell out of the window goes back now, a pass late: if this one fails, nothing is missing.
            rows.slide(visible_from)
        rows.append(key_states, value_states)
        self._refresh()
        return rows.views(visible_from)

    def activate_past_recording(self) -> None:
        if self._rows is not None and self.is_initialized:
            # From here on everything kept is shown, so what has left the window must be gone first.
            self._rows.slide(self._rows.n_tokens - self.keys.shape[-2])
        super().activate_past_recording()

    def get_seq_length(self) -> int:
        return int(self.cumulative_length)

    def _crop(self, tokens_to_remove: int) -> None:
        self._slice(tokens_to_remove)
        rows = self._rows
        if rows is not None and self.is_initialized:
            rows.truncate(self._cropped_length())
            rows.slide(rows.n_tokens - self.keys.shape[-2])
            self._refresh()

    def _slice(self, tokens_to_remove: int) -> None:
        DynamicSlidingWindowLayer.crop(self, tokens_to_remove)

    def _cropped_length(self) -> int:
        return self.get_seq_length()

    def roll_back(self, n_tokens: int | None) -> None:
        super().roll_back(n_tokens)
        self.cumulative_length = n_tokens or 0

    def abandon(self) -> None:
        super().abandon()
        self.cumulative_length = 0

    def _refresh(self) -> None:
        rows = self._rows
        assert rows is not None
        self.cumulative_length = rows.n_tokens
        first = rows.first_token if self.record_past else max(rows.n_tokens - self.sliding_window + 1, rows.first_token)
        self.keys, self.values = rows.views(first)


class VmemHybridLayer(VmemLayerMixin, LinearAttentionAndFullAttentionLayer):
    """Full attention beside recurrent state in one layer; the state stays with the stock class."""

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.reorder_state(beam_idx)

    def reorder_state(self, beam_idx: torch.Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)


class VmemHybridSlidingLayer(VmemSlidingLayer, LinearAttentionAndSlidingWindowAttentionLayer):
    """Windowed attention beside recurrent state in one layer; the state stays with the stock class."""

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.reorder_state(beam_idx)

    def reorder_state(self, beam_idx: torch.Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)

    def _crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)
        super()._crop(tokens_to_remove)


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
        store = RowStore(options, sum(name in _LAYERS for name in layer_types), open_driver)
        mapping = DYNAMIC_LAYER_TYPE_MAPPING | _layers_on(store, ForwardPass())
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
        _all_or_none([partial(layer.begin_crop, n_removed) for layer in layers])
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
        self._change_rows(_selected(beam_idx), "reorder_cache", beam_idx)
        for layer in self._our_layers():
            layer.reorder_state(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Put `repeats` copies of every row in its place, which share their full pages.

        Raises:
            CapacityError: No room for them. Nothing changed.
        """
        self._change_rows(_repeated(repeats), "batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: Any) -> None:
        """Keep the rows `indices`, in this order.

        Raises:
            CapacityError: They are more than before, and there is no room. Nothing changed.
        """
        self._change_rows(_selected(indices), "batch_select_indices", indices)

    def fork(self) -> VmemCache:
        """Return an independent cache with the same tokens, which shares their full pages; as `copy.deepcopy` does.

        Both go on as they like, and are closed in any order.

        Raises:
            CapacityError: No room for what is left of the tokens behind their full pages. Nothing changed.
        """
        return copy.deepcopy(self)

    def _change_rows(self, rows_of: Callable[[int], torch.Tensor], stock_method: str, argument: Any) -> None:
        """Change the rows of all layers or, where one has no room, of none."""
        self._require_open()
        _all_or_none([partial(layer.begin_change, rows_of) for layer in self._our_layers()])
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
    stock = {name: DYNAMIC_LAYER_TYPE_MAPPING[name] for name in _LAYERS if name in DYNAMIC_LAYER_TYPE_MAPPING}
    DYNAMIC_LAYER_TYPE_MAPPING.update(_layers_on(store))
    try:
        yield store
    finally:
        DYNAMIC_LAYER_TYPE_MAPPING.update(stock)


def _layers_on(store: RowStore, forward_pass: ForwardPass | None = None) -> dict[str, Any]:
    return {
        name: partial(layer, store, forward_pass)
        for name, layer in _LAYERS.items()
        if name in DYNAMIC_LAYER_TYPE_MAPPING
    }


def _spec(key_states: torch.Tensor, value_states: torch.Tensor) -> LayerSpec:
    key, value = (TensorSpec(t.shape[1], t.shape[3], t.element_size()) for t in (key_states, value_states))
    return LayerSpec(key, value)


def _fits(rows: LayerRows, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
    spec = _spec(key_states, value_states)
    return rows.dtype is key_states.dtype and rows.device == key_states.device and rows.spec == spec
