"""Where each token of each sequence lives: tokens -> bytes -> pages -> offsets -> shapes and strides.

Guarantees: pure and frozen; a layout is data, computed once, and nothing elsewhere asks which kind it is.
A region is `[plane][slot]`: every slot owns the same share (`span_bytes`) of every plane, and inside it tokens
follow each other at `token_bytes`:

    address(plane, slot, token) = region.base + plane.base_bytes + slot * plane.span_bytes + token * plane.token_bytes

A token's row in a plane holds one or more pieces (a layer's K or V, or one head of it). The kinds differ only in
which pieces share a plane:

    per_head     one piece each                   the fastest reads on a CPU, affordable with small pages
    per_layer    all heads of one layer's K or V  FlashAttention's own order
    group:g      g layers' K, or g layers' V      between
    token_major  everything                       the finest growth, the longest stride

Pages come from exact byte arithmetic: a token may straddle two pages harmlessly. A span is a multiple of the page
and of the token row, so that every slot starts at a page and at a whole row of its plane.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vmem_kv.driver.base import DriverInfo
from vmem_kv.errors import ConfigError
from vmem_kv.units import MIB, ceil_div, format_bytes, round_up


class TensorSpec(NamedTuple):
    """The K or the V of one layer: what one token adds to it."""

    n_heads: int
    head_dim: int
    element_bytes: int

    @property
    def head_bytes(self) -> int:
        """Bytes of one head of one token."""
        return self.head_dim * self.element_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token, all heads."""
        return self.n_heads * self.head_bytes


class LayerSpec(NamedTuple):
    """One layer's K and V. They may differ: latent attention caches a wide latent beside a narrow key."""

    key: TensorSpec
    value: TensorSpec

    @classmethod
    def uniform(cls, n_heads: int, head_dim: int, element_bytes: int) -> LayerSpec:
        """A layer whose K and V have the same shape."""
        spec = TensorSpec(n_heads, head_dim, element_bytes)
        return cls(spec, spec)


class Piece(NamedTuple):
    """What stands in one place of a token's row: some heads of one tensor, or all of them."""

    layer_index: int
    is_value: bool
    n_heads: int


@dataclass(frozen=True, slots=True)
class Plane:
    """The part of a region that holds the same pieces of every token of every slot."""

    base_bytes: int  # offset of slot 0 in the region
    span_bytes: int  # virtual share of one slot
    token_bytes: int  # one row: the stride from token to token


@dataclass(frozen=True, slots=True)
class Strides:
    """How to view one layer's K or V as `[slot, head, token, dim]`; all in bytes, dim is contiguous."""

    spec: TensorSpec
    offset_bytes: int  # of slot 0, head 0, token 0 in the region
    slot_bytes: int
    head_bytes: int
    token_bytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A region's geometry. Build it with `Layout.build`."""

    kind: str
    page_bytes: int
    n_slots: int
    max_tokens: int  # per slot
    layers: tuple[LayerSpec, ...]
    planes: tuple[Plane, ...]
    keys: tuple[Strides, ...]  # per layer
    values: tuple[Strides, ...]

    @classmethod
    def build(cls, kind: str, layers: Sequence[LayerSpec], *, n_slots: int, max_tokens: int, page_bytes: int) -> Layout:
        """Lay out `layers` for `n_slots` sequences of up to `max_tokens` tokens.

        Raises:
            ConfigError: A number is not positive, or `kind` is unknown.
        """
        for name, value in (("n_slots", n_slots), ("max_tokens", max_tokens), ("page_bytes", page_bytes)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if not layers or any(min(spec) < 1 for layer in layers for spec in layer):
            raise ConfigError("a layout needs at least one layer, with positive head counts and sizes")
        planes: list[Plane] = []
        strides: dict[tuple[int, bool], Strides] = {}
        base_bytes = 0
        for pieces in _partition(kind, layers):
            token_bytes = sum(_piece_bytes(layers, piece) for piece in pieces)
            span_bytes = round_up(max_tokens * token_bytes, math.lcm(page_bytes, token_bytes))
            offset_bytes = base_bytes
            for piece in pieces:
                spec = layers[piece.layer_index][piece.is_value]
                whole = piece.n_heads == spec.n_heads
                strides.setdefault(
                    (piece.layer_index, piece.is_value),
                    Strides(
                        spec,
                        offset_bytes,
                        slot_bytes=span_bytes,
                        # Heads either share a row or own a plane each; planes of one tensor follow each other.
                        head_bytes=spec.head_bytes if whole else n_slots * span_bytes,
                        token_bytes=token_bytes,
                    ),
                )
                offset_bytes += _piece_bytes(layers, piece)
            planes.append(Plane(base_bytes, span_bytes, token_bytes))
            base_bytes += n_slots * span_bytes
        return cls(
            kind=kind,
            page_bytes=page_bytes,
            n_slots=n_slots,
            max_tokens=max_tokens,
            layers=tuple(layers),
            planes=tuple(planes),
            keys=tuple(strides[i, False] for i in range(len(layers))),
            values=tuple(strides[i, True] for i in range(len(layers))),
        )

    @property
    def virtual_bytes(self) -> int:
        """Size of the reservation."""
        last = self.planes[-1]
        return last.base_bytes + self.n_slots * last.span_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes that one token adds over all planes."""
        return sum(plane.token_bytes for plane in self.planes)

    def starts(self, base: int, slot_id: int) -> list[int]:
        """The address of a slot's first token in every plane of a region that begins at `base`."""
        return [base + plane.base_bytes + slot_id * plane.span_bytes for plane in self.planes]

    def n_pages(self, n_tokens: int) -> int:
        """Pages behind the first `n_tokens` tokens of one slot."""
        return sum(ceil_div(n_tokens * plane.token_bytes, self.page_bytes) for plane in self.planes)

    def token_capacity(self, n_pages_of_planes: Sequence[int]) -> int:
        """Tokens from the slot's start that fit in so many pages of each plane."""
        tokens = (
            n_pages * self.page_bytes // plane.token_bytes
            for n_pages, plane in zip(n_pages_of_planes, self.planes, strict=True)
        )
        return min(self.max_tokens, *tokens)

    def capacity_of(self, n_tokens: int) -> int:
        """Tokens from the slot's start that fit in the pages behind its first `n_tokens`."""
        return self.token_capacity([ceil_div(n_tokens * plane.token_bytes, self.page_bytes) for plane in self.planes])


def _piece_bytes(layers: Sequence[LayerSpec], piece: Piece) -> int:
    return piece.n_heads * layers[piece.layer_index][piece.is_value].head_bytes


def _whole(layers: Sequence[LayerSpec], layer_index: int, is_value: bool) -> Piece:
    return Piece(layer_index, is_value, layers[layer_index][is_value].n_heads)


def _per_head(layers: Sequence[LayerSpec], group: int) -> list[list[Piece]]:
    return [
        [Piece(i, is_value, 1)]
        for i, layer in enumerate(layers)
        for is_value in (False, True)
        for _ in range(layer[is_value].n_heads)
    ]


def _grouped(layers: Sequence[LayerSpec], group: int) -> list[list[Piece]]:
    return [
        [_whole(layers, i, is_value) for i in range(first, min(first + group, len(layers)))]
        for first in range(0, len(layers), group)
        for is_value in (False, True)
    ]


def _token_major(layers: Sequence[LayerSpec], group: int) -> list[list[Piece]]:
    return [[_whole(layers, i, is_value) for i in range(len(layers)) for is_value in (False, True)]]


_KINDS: dict[str, Callable[[Sequence[LayerSpec], int], list[list[Piece]]]] = {
    "per_head": _per_head,
    "per_layer": _grouped,
    "group": _grouped,
    "token_major": _token_major,
}
LAYOUT_KINDS = ("per_head", "per_layer", "group:2", "group:4", "token_major")
"""Every kind by name; any number may stand behind ``group:``."""


def _partition(kind: str, layers: Sequence[LayerSpec]) -> list[list[Piece]]:
    """Split all pieces over planes; pieces in one list share a plane, in that order."""
    match = re.fullmatch(r"(per_head|per_layer|token_major)|(group):([1-9][0-9]*)", kind)
    if match is None:
        raise ConfigError(f"unknown layout {kind!r}; choose auto, per_head, per_layer, group:N or token_major")
    return _KINDS[match[1] or match[2]](layers, int(match[3] or 1))


class Choice(NamedTuple):
    """A layout kind and page size, with the reason in one sentence."""

    kind: str
    page_bytes: int
    why: str


WASTE_TARGET = 0.03
"""Share of a sequence's memory that `auto` lets the half-filled last pages take, at the expected length."""

_MAX_PAGE_BYTES = 2 * MIB


def choose_layout(
    info: DriverInfo,
    layers: Sequence[LayerSpec],
    *,
    n_slots: int,
    expected_tokens: int,
    kind: str = "auto",
    page_bytes: int | None = None,
) -> Choice:
    """Choose what is left open, and say why.

    Of the layouts, in the order of read speed on the device, the first is taken whose mappings fit the budget; of
    the page sizes the largest that wastes less than `WASTE_TARGET` at `expected_tokens` (larger pages mean fewer
    driver calls). Read speed goes before waste: where the granularity itself is too coarse for the target, the layout
    stays and `why` says so. Where no layout fits, the last one is taken: the pool raises `OutOfMappings` when it comes
    to it.

    Raises:
        ConfigError: `page_bytes` is not a multiple of the granularity, `kind` is unknown, or a count is not positive.
    """
    granularity = info.granularity_bytes
    if page_bytes is not None and (page_bytes < granularity or page_bytes % granularity):
        raise ConfigError(
            f"page_bytes is {page_bytes}; on {info.device} it must be a multiple of {granularity} "
            f"(for example {round_up(max(page_bytes, 1), granularity)})"
        )
    if n_slots < 1 or expected_tokens < 1:
        raise ConfigError(f"n_slots is {n_slots} and expected_tokens {expected_tokens}; both must be at least 1")
    kinds = (kind,) if kind != "auto" else _preferred_kinds(info, len(layers))
    for candidate in kinds:
        rows = [sum(_piece_bytes(layers, p) for p in pieces) for pieces in _partition(candidate, layers)]
        page = page_bytes or _largest_thrifty_page(granularity, rows, expected_tokens)
        runs_per_slot = len(rows)
        if not info.neighbours_merge:
            runs_per_slot = sum(ceil_div(expected_tokens * row, page) for row in rows)
        n_mappings = n_slots * runs_per_slot * info.mappings_per_run
        if n_mappings <= info.max_mappings:
            break
    waste = len(rows) * page / 2 / (expected_tokens * sum(rows))
    why = (
        f"{candidate} with {format_bytes(page)} pages: {len(rows)} planes need {n_mappings:,} of "
        f"{info.max_mappings:,} mappings for {n_slots} sequences of {expected_tokens:,} tokens, "
        f"and last pages waste {waste:.1%} on average."
    )
    if kind == "auto" and page == granularity and waste > WASTE_TARGET and len(rows) > 1:
        why += " No smaller page exists here; layouts with fewer planes would waste less, but read slower."
    return Choice(candidate, page, why)


def _preferred_kinds(info: DriverInfo, n_layers: int) -> tuple[str, ...]:
    """Layouts by falling read speed, beginning with the one that the device reads best."""
    groups = tuple(f"group:{g}" for g in (2, 4, 8, 16) if g < n_layers)
    kinds = ("per_head", "per_layer", *groups, "token_major")
    return kinds[kinds.index(info.reads_best) :]


def _largest_thrifty_page(granularity: int, rows: Sequence[int], expected_tokens: int) -> int:
    """The largest doubling of the granularity whose half-filled last pages stay under the waste target."""
    allowed = 2 * WASTE_TARGET * expected_tokens * sum(rows) / len(rows)
    page = granularity
    while page * 2 <= min(allowed, _MAX_PAGE_BYTES):
        page *= 2
    return page
