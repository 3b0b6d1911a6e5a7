"""Addresses as torch tensors, on any device.

Guarantees
  * A tensor over the whole region never reaches a user: printing, cloning or pickling one would touch unmapped memory.
    Users get views cut to a length, at an address that does not change as the sequence grows; kernels get `SlotKV`.
  * The region stays reserved as long as any such view is alive: `on_unused` runs when the last one has died.

A cut view may be read, written, printed, cloned, as long as its tokens are mapped: until the sequence ends, slides or
is truncated, and its memory is reclaimed. Reading it later is a fault, or shows another sequence. It must not be
pickled or saved (torch would write the storage, holes included): clone it first.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch

from vmem_kv.cache import KVCache
from vmem_kv.errors import ConfigError, UsageError
from vmem_kv.growth import SlotId
from vmem_kv.layout import Strides
from vmem_kv.storage import open_storage


class RegionTensors:
    """The region of a cache, seen by torch.

    Args:
        cache: Whose region. It refuses to close while views are alive.
        on_unused: Called once, when this object and every view made from it are gone without `let_go`.
    """

    def __init__(self, cache: KVCache, on_unused: Callable[[], None]) -> None:
        self.device = torch.device(cache.pool.driver.info.device)
        self._layout = cache.layout
        self._when_unused = on_unused
        self._storage: torch.UntypedStorage | None
        self._bytes: torch.Tensor | None
        reservation = cache.region.reservation
        storage = open_storage(reservation.base, reservation.n_bytes, self.device)
        self._look(storage)
        cache.add_viewer(partial(_is_looking, weakref.ref(self), weakref.ref(storage)))

    def let_go(self) -> bool:
        """Drop this object's own hold on the region, if it is the last one.

        Returns:
            True: nothing looks into the region any more, `on_unused` will not run, and this object is spent.
            False: views are still out, and nothing changed.
        """
        if self._storage is None:
            return True
        storage = weakref.ref(self._storage)
        self._unused.detach()
        self._bytes = self._storage = None
        alive = storage()
        if alive is None:
            return True
        self._look(alive)
        return False

    def view(self, strides: Strides, slot_ids: Sequence[SlotId], dtype: torch.dtype) -> GrowingView:
        """Return the K or V of one layer for neighbouring slots."""
        spec, item = strides.spec, strides.spec.element_bytes
        with torch.inference_mode(False):
            full = self._all(dtype).as_strided(
                (len(slot_ids), spec.n_heads, strides.slot_bytes // strides.token_bytes, spec.head_dim),
                (strides.slot_bytes // item, strides.head_bytes // item, strides.token_bytes // item, 1),
                (strides.offset_bytes + slot_ids[0] * strides.slot_bytes) // item,
            )
        return GrowingView(full)

    def tails(self, slot_ids: Sequence[SlotId], n_tokens: int) -> list[torch.Tensor]:
        """Return views of the bytes of the first `n_tokens` tokens that lie behind their last full pages.

        Returns:
            `[n_planes, n_slots, n_bytes]` of uint8 for every group of planes of one geometry that has such bytes. The
            slots are neighbours.
        """
        layout, tails = self._layout, []
        first_plane = 0
        for (token_bytes, span_bytes), planes in groupby(layout.planes, lambda p: (p.token_bytes, p.span_bytes)):
            n_planes = len(list(planes))
            n_bytes = n_tokens * token_bytes
            n_tail_bytes = n_bytes % layout.page_bytes
            if n_tail_bytes:
                base = layout.planes[first_plane].base_bytes + slot_ids[0] * span_bytes
                with torch.inference_mode(False):
                    tail = self._all(torch.uint8).as_strided(
                        (n_planes, len(slot_ids), n_tail_bytes),
                        (layout.n_slots * span_bytes, span_bytes, 1),
                        base + n_bytes - n_tail_bytes,
                    )
                tails.append(tail)
            first_plane += n_planes
        return tails

    def layer(self, layer_index: int, dtype: torch.dtype) -> SlotKV:
        """Return the K and V of one layer over all slots, for kernels.

        Raises:
            ConfigError: K's and V's slots are not equally many rows long, so that no one row number fits both.
        """
        keys, values = self._layout.keys[layer_index], self._layout.values[layer_index]
        span_tokens = keys.slot_bytes // keys.token_bytes
        if values.slot_bytes // values.token_bytes != span_tokens:
            raise ConfigError(
                f"layer {layer_index} has K rows of {keys.token_bytes} and V rows of {values.token_bytes} bytes, whose "
                "slots differ in length; use layout='token_major'"
            )
        return SlotKV(self._rows(keys, dtype), self._rows(values, dtype), span_tokens)

    def _rows(self, strides: Strides, dtype: torch.dtype) -> torch.Tensor:
        spec, item = strides.spec, strides.spec.element_bytes
        n_rows = self._layout.n_slots * (strides.slot_bytes // strides.token_bytes)
        with torch.inference_mode(False):
            return self._all(dtype).as_strided(
                (n_rows, spec.n_heads, spec.head_dim),
                (strides.token_bytes // item, strides.head_bytes // item, 1),
                strides.offset_bytes // item,
            )

    def _all(self, dtype: torch.dtype) -> torch.Tensor:
        if self._bytes is None:
            raise UsageError("the cache is closed, and its tensors with it; make new ones of a new cache")
        return self._bytes.view(dtype)

    def _look(self, storage: torch.UntypedStorage) -> None:
        self._storage = storage
        # A tensor born in inference mode could not be written outside of it, and the cache lives through both.
        with torch.inference_mode(False):
            empty = torch.empty(0, dtype=torch.uint8, device=self.device)
            self._bytes = empty.set_(storage, 0, (storage.nbytes(),), (1,))
        self._unused = weakref.finalize(storage, self._when_unused)
        self._unused.atexit = False  # the process's end frees everything, and daemon threads may still read


def _is_looking(tensors: weakref.ref[RegionTensors], storage: weakref.ref[torch.UntypedStorage]) -> bool:
    """Whether a view is alive; the object that makes them lets go if it is the last that holds the region."""
    maker = tensors()
    if maker is not None:
        return not maker.let_go()
    return storage() is not None


@dataclass(frozen=True, slots=True, eq=False)
class SlotKV:
    """One layer's K and V over all slots, as kernels that take starts and lengths want them: rows of tokens.

    Most rows have no memory behind them. Only rows `[start, start + length)` of a sequence (and a kernel's slack) may
    be touched, so this goes to kernels only, never to users.

    Attributes:
        keys: `[n_slots * span_tokens, n_heads, head_dim]`, last stride 1; slot s begins at row `s * span_tokens`.
        values: The same with V's heads and size.
        span_tokens: Rows of one slot.
    """

    keys: torch.Tensor
    values: torch.Tensor
    span_tokens: int

    def __repr__(self) -> str:
        return f"SlotKV(n_rows={self.keys.shape[0]}, span_tokens={self.span_tokens}, dtype={self.keys.dtype})"


class GrowingView:
    """One layer's K or V as `[n_slots, n_heads, n_tokens, head_dim]`, cut to what is mapped by whoever uses it."""

    def __init__(self, full: torch.Tensor) -> None:
        self._full = full

    def cut(self, first_token: int, end_token: int) -> torch.Tensor:
        """Return tokens `[first_token, end_token)`, a view. They must be mapped."""
        return self._full.narrow(2, first_token, end_token - first_token)

    def write(self, first_token: int, states: torch.Tensor) -> None:
        """Copy `states` `[n_slots, n_heads, n, head_dim]` in place, from `first_token` on. The range must be mapped."""
        self._full.narrow(2, first_token, states.shape[2]).copy_(states.detach())

    def __repr__(self) -> str:
        return f"GrowingView(shape={tuple(self._full.shape)}, dtype={self._full.dtype})"
