"""Layers of transformers' caches whose K and V lie in demand-mapped rows: one class for each type that stores them.

Each subclasses the stock layer and replaces its storage. Where stock layers slice their tensors (crop), we let them
slice the views and read the new length off the result: their rules, of whatever version, are then ours.

Guarantees: what `update` returns are views of exactly the used length; as long as a batch lives, token i stays at its
address. After a CapacityError or UsageError all layers of a forward pass are as before it. What can fail of a crop or a
change of rows is a `Change` that can be undone.

Assumptions: the layers of one cache share a `ForwardPass` and are updated in order, as models do.
"""

from __future__ import annotations

import copy
import weakref
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

import torch
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from vmem_kv.errors import OutOfSlots, UsageError, VmemError
from vmem_kv.integrations.hf_changes import Change, RowsOf, all_or_none, repeated, selected
from vmem_kv.layout import LayerSpec, TensorSpec
from vmem_kv.rows import Change as RowsChange
from vmem_kv.rows import LayerRows, RowStore


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
        all_or_none([partial(self.begin_crop, n_removed)])
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
        all_or_none([partial(self.begin_change, repeated(repeats))])

    def batch_select_indices(self, indices: Any) -> None:
        all_or_none([partial(self.begin_change, selected(indices))])

    def begin_change(self, rows_of: RowsOf) -> Change:
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


LAYERS: dict[str, type[VmemLayerMixin]] = {
    "full_attention": VmemLayer,
    "sliding_attention": VmemSlidingLayer,
    "chunked_attention": VmemSlidingLayer,
    "hybrid": VmemHybridLayer,
    "hybrid_sliding": VmemHybridSlidingLayer,
}
"""By transformers' names of layer types."""


def layers_on(store: RowStore, forward_pass: ForwardPass | None = None) -> dict[str, Any]:
    """What makes our layers on a store, for every type that this version of transformers has."""
    return {
        name: partial(layer, store, forward_pass)
        for name, layer in LAYERS.items()
        if name in DYNAMIC_LAYER_TYPE_MAPPING
    }


def _spec(key_states: torch.Tensor, value_states: torch.Tensor) -> LayerSpec:
    key, value = (TensorSpec(t.shape[1], t.shape[3], t.element_size()) for t in (key_states, value_states))
    return LayerSpec(key, value)


def _fits(rows: LayerRows, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
    spec = _spec(key_states, value_states)
    return rows.dtype is key_states.dtype and rows.device == key_states.device and rows.spec == spec
