"""A cache of transformers over slots, for one forward pass of sequences that have nothing to do with each other.

    cache = SlotCache(columns, layers)      columns: where each sequence's tokens stand in the batch
    model(..., past_key_values=cache)       every layer writes in place, and reads what the batch needs

To the model this is a batch padded on the left, as `generate` makes it: row b holds sequence b, its last tokens in the
last columns. What attention receives is a view where one sequence is alone, else a copy of the rows, in which a
sequence's own first token stands for its padding. So nothing is read that is not mapped, and masks, windows and chunks
are the model's own business.

Guarantees: K and V are written once, into their slots; beyond a sequence's tokens nothing is read or written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from transformers import DynamicCache
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from vmem_kv.errors import UsageError
from vmem_kv.growth import SlotId
from vmem_kv.tensors import SlotKV


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """Where the tokens of a padded batch lie in their slots, the same for all layers.

    Attributes:
        slot_ids: For each sequence its slot.
        lengths: For each sequence its tokens, the new ones included.
        n_new: New tokens of each sequence, equally many.
        tokens: `[n_seqs, longest]`, which token of its sequence stands in each column; padding repeats the first.
        is_token: `[n_seqs, longest]`, 0 where a column is padding; None where none is.
    """

    slot_ids: tuple[SlotId, ...]
    lengths: tuple[int, ...]
    n_new: int
    tokens: torch.Tensor
    is_token: torch.Tensor | None

    @classmethod
    def of(cls, slot_ids: Sequence[SlotId], lengths: Sequence[int], n_new: int, device: torch.device) -> Columns:
        """Align sequences at their last tokens."""
        longest = max(lengths)
        token = torch.arange(longest).unsqueeze(0) - torch.tensor([[longest - n] for n in lengths])
        is_padded = min(lengths) < longest
        is_token = (token >= 0).long().to(device) if is_padded else None
        return cls(tuple(slot_ids), tuple(lengths), n_new, token.clamp(min=0).to(device), is_token)

    @property
    def longest(self) -> int:
        """Columns in the batch, after the new tokens came in."""
        return max(self.lengths)

    @property
    def n_past(self) -> int:
        """Columns before the new tokens came in."""
        return self.longest - self.n_new

    @property
    def positions(self) -> torch.Tensor:
        """`[n_seqs, n_new]`, the new tokens' positions in their sequences."""
        return self.tokens[:, self.n_past :]

    def rows(self, span_tokens: int) -> torch.Tensor:
        """Return `[n_seqs, longest]`, the rows of K and V in which they lie."""
        starts = torch.tensor([[slot_id * span_tokens] for slot_id in self.slot_ids])
        return self.tokens + starts.to(self.tokens.device)


class SlotLayerMixin(DynamicLayer):
    """Reads and writes one layer's K and V through `Columns`; everything else is the stock class's."""

    def bind(self, kv: SlotKV, columns: Columns, rows: torch.Tensor) -> None:
        """Say what to read and write in this pass."""
        self._kv, self._columns, self._rows = kv, columns, rows
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        new_rows = (self._rows[:, self._columns.n_past :].flatten(),)
        self._kv.keys.index_put_(new_rows, key_states.transpose(1, 2).flatten(0, 1))
        self._kv.values.index_put_(new_rows, value_states.transpose(1, 2).flatten(0, 1))
        first = self._first_column()
        return self._read(self._kv.keys, first), self._read(self._kv.values, first)

    def get_seq_length(self) -> int:
        return self._columns.n_past

    def _first_column(self) -> int:
        return 0

    def _read(self, states: torch.Tensor, first: int) -> torch.Tensor:
        """Return `[n_seqs, n_heads, columns, head_dim]`."""
        columns = self._columns
        if len(columns.slot_ids) == 1:
            start = columns.slot_ids[0] * self._kv.span_tokens + first
            return states.narrow(0, start, columns.longest - first).transpose(0, 1).unsqueeze(0)
        rows = self._rows[:, first:]
        return states.index_select(0, rows.flatten()).view(*rows.shape, *states.shape[1:]).transpose(1, 2)


class SlotLayer(SlotLayerMixin):
    """Full attention."""


class SlidingSlotLayer(SlotLayerMixin, DynamicSlidingWindowLayer):
    """Attention through a window, or in chunks."""

    def bind(self, kv: SlotKV, columns: Columns, rows: torch.Tensor) -> None:
        super().bind(kv, columns, rows)
        self.cumulative_length = columns.n_past

    def _first_column(self) -> int:
        return max(0, self._columns.n_past - int(self.sliding_window) + 1)


class HybridSlotLayer(SlotLayerMixin, LinearAttentionAndFullAttentionLayer):
    """Full attention beside recurrent state."""

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)


class HybridSlidingSlotLayer(SlidingSlotLayer, LinearAttentionAndSlidingWindowAttentionLayer):
    """Attention through a window beside recurrent state."""

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)


SLOT_LAYERS: dict[str, Callable[..., SlotLayerMixin]] = {
    "full_attention": SlotLayer,
    "sliding_attention": SlidingSlotLayer,
    "chunked_attention": SlidingSlotLayer,
    "hybrid": HybridSlotLayer,
    "hybrid_sliding": HybridSlidingSlotLayer,
}
STATE_TYPES = {"conv", "linear_attention", "hybrid", "hybrid_sliding"}
STOCK_TYPES = {"conv", "linear_attention", "dummy"}


class SlotCache(DynamicCache):
    """One pass's layers. It goes to one forward pass and is gone with it."""

    def __init__(self, layers: list[Any]) -> None:
        Cache.__init__(self, layers=layers)

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refuse: sequences are the engine's."""
        raise UsageError("a SlotCache serves one forward pass and cannot be cropped")


class States:
    """The recurrent states of one sequence: of every layer that has some, what a stock layer keeps."""

    _FLAGS = ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state", "conv_kernel_size")
    _TENSORS = ("conv_states", "recurrent_states")

    def __init__(self, layers: dict[int, Any], row: int) -> None:
        """Take row `row` of what a pass left in its layers."""
        self._flags = {
            (index, name): dict(getattr(layer, name)) for index, layer in layers.items() for name in self._FLAGS
        }
        self._kinds = {index: (layer.dtype, layer.device) for index, layer in layers.items()}
        self._tensors: dict[tuple[int, str], dict[int, torch.Tensor | None]] = {
            (index, name): {i: t if t is None else t[row : row + 1] for i, t in getattr(layer, name).items()}
            for index, layer in layers.items()
            for name in self._TENSORS
        }

    @classmethod
    def put(cls, states: Sequence[States], layers: dict[int, Any]) -> None:
        """Put the states of sequences, one a row, into the fresh layers of a pass."""
        first = states[0]
        for (index, name), flags in first._flags.items():
            setattr(layers[index], name, dict(flags))
        for index, (dtype, device) in first._kinds.items():
            layers[index].dtype, layers[index].device = dtype, device
        for (index, name), tensors in first._tensors.items():
            rows = [s._tensors[index, name] for s in states]
            setattr(layers[index], name, {i: None if t is None else _joined(rows, i) for i, t in tensors.items()})


def _joined(rows: list[dict[int, torch.Tensor | None]], state_index: int) -> torch.Tensor:
    return torch.cat([row for tensors in rows if (row := tensors[state_index]) is not None])
