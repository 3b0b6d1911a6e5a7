"""Shadow tags: every K and V row carries who wrote it, and one vectorised look verifies all rows of a sequence.

    a row of one head     [ position | sequence ][ head | layer, kind | generation ] ...        two words of 8 bytes

A tag stands at the beginning of every head of every row, so whatever the layout, every page holds some (as long as a
row is no longer than a page). Any wrong mapping, alias, early unmap, late write or lost page shows as a mismatch that
names both owners. The generation counts the writes of a row: a row that was truncated and written again is another one.

Guarantees: touches only rows that it is told are mapped. Slots are independent of each other: threads may work on
different ones. Assumptions: rows and heads begin at multiples of 8 bytes and a head has at least 16.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vmem_kv.driver.base import Driver, Reservation
from vmem_kv.errors import ConfigError
from vmem_kv.layout import Layout

Words = NDArray[np.uint64]
Index = NDArray[np.int64]
"""Which words of a region: `[n_tokens, n_pieces, 2]`; the tokens follow each other and are mapped."""

WORD_BYTES = 8
TAG_BYTES = 2 * WORD_BYTES

_LOW = 0xFFFFFFFF


class TagMismatch(AssertionError):
    """A live row does not hold what its owner wrote."""


class WordMemory(Protocol):
    """The memory of one region in words of 8 bytes."""

    def load(self, index: Index) -> Words:
        """Return the words at `index`."""

    def store(self, index: Index, words: Words) -> None:
        """Write words at `index`."""


class HostWords:
    """Memory that this process can touch itself."""

    def __init__(self, reservation: Reservation) -> None:
        whole = (ctypes.c_char * reservation.n_bytes).from_address(reservation.base)
        self._words: Words = np.frombuffer(memoryview(whole), dtype=np.uint64)

    def load(self, index: Index) -> Words:
        """Return the words at `index`."""
        return self._words.take(index)

    def store(self, index: Index, words: Words) -> None:
        """Write words at `index`."""
        self._words[index] = words


class DriverWords:
    """Memory reached through a driver's own copies, a copy for each piece of a sequence."""

    def __init__(self, driver: Driver, reservation: Reservation) -> None:
        self._driver = driver
        self._base = reservation.base

    def load(self, index: Index) -> Words:
        """Return the words at `index`."""
        words = np.empty(index.shape, np.uint64)
        for piece in range(index.shape[1]):
            local = index[:, piece]
            words[:, piece] = self._read(local)[local - local[0, 0]]
        return words

    def store(self, index: Index, words: Words) -> None:
        """Write words at `index`."""
        for piece in range(index.shape[1]):
            local = index[:, piece]
            whole = self._read(local)
            whole[local - local[0, 0]] = words[:, piece]
            self._driver.copy_from_host(whole.data.cast("B"), self._address(local)).wait()

    def _read(self, local: Index) -> Words:
        """All words from the first tag of a piece to its last one."""
        whole = np.empty(int(local[-1, -1] - local[0, 0]) + 1, np.uint64)
        self._driver.copy_to_host(self._address(local), whole.data.cast("B")).wait()
        return whole

    def _address(self, local: Index) -> int:
        return self._base + int(local[0, 0]) * WORD_BYTES


def words_of(driver: Driver, reservation: Reservation) -> WordMemory:
    """Return the fastest way to the memory of a region."""
    return HostWords(reservation) if driver.info.device == "cpu" else DriverWords(driver, reservation)


class ShadowTags:
    """The tags of one region, and what they should be.

    Args:
        layout: The region's geometry.
        memory: Its words.

    Raises:
        ConfigError: A head is shorter than a tag, or does not begin at a multiple of 8 bytes.
    """

    def __init__(self, layout: Layout, memory: WordMemory) -> None:
        self.n_checks = 0
        """K and V rows verified so far."""
        self._memory = memory
        self._n_rows_per_token = 2 * len(layout.layers)
        offsets, slot_strides, token_strides, owners = [], [], [], []
        for layer_index, tensors in enumerate(zip(layout.keys, layout.values, strict=True)):
            for kind, strides in enumerate(tensors):
                if strides.spec.head_bytes < TAG_BYTES:
                    raise ConfigError(f"a head has {strides.spec.head_bytes} bytes; a tag needs {TAG_BYTES}")
                for head in range(strides.spec.n_heads):
                    offsets.append(strides.offset_bytes + head * strides.head_bytes)
                    slot_strides.append(strides.slot_bytes)
                    token_strides.append(strides.token_bytes)
                    owners.append(head << 48 | layer_index << 33 | kind << 32)
        slots, tokens = np.arange(layout.n_slots)[:, None, None], np.arange(layout.max_tokens)[None, :, None]
        starts = np.array(offsets) + slots * np.array(slot_strides) + tokens * np.array(token_strides)
        if (starts % WORD_BYTES).any():
            raise ConfigError(f"rows and heads must begin at multiples of {WORD_BYTES} bytes")
        first = starts // WORD_BYTES
        self._index: Index = np.stack([first, first + 1], axis=-1)  # [slot, token, piece, word]
        self._owners: Words = np.array(owners, np.uint64)
        self._positions: Words = np.arange(layout.max_tokens, dtype=np.uint64)[:, None] << np.uint64(32)
        self._expected: Words = np.zeros(self._index.shape, np.uint64)
        self._generations: Words = np.zeros((layout.n_slots, layout.max_tokens, 1), np.uint64)

    def write(self, slot: int, first: int, end: int, sequence: int) -> None:
        """Let `sequence` write its rows `[first, end)` in a slot. They must be mapped."""
        if first >= end:
            return
        self._generations[slot, first:end] += np.uint64(1)
        expected = self._expected[slot, first:end]
        expected[..., 0] = self._positions[first:end] | np.uint64(sequence)
        expected[..., 1] = self._owners | self._generations[slot, first:end]
        self._memory.store(self._index[slot, first:end], expected)

    def fork(self, source: int, target: int, end: int) -> None:
        """Expect in a slot the rows `[0, end)` of another one, as they are: they were copied or are the same memory."""
        self._expected[target, :end] = self._expected[source, :end]

    def identities(self, slot: int, end: int) -> list[int]:
        """Return a number for each of the rows `[0, end)` of a slot: equal ones at one position are the same row."""
        tags = self._expected[slot, :end, 0] & np.uint64(_LOW)
        return [int(sequence) << 32 | int(generation) for sequence, generation in tags]

    def expect(self, slot: int, first: int, identities: Sequence[int]) -> None:
        """Expect in a slot, from row `first` on, rows that came from elsewhere: those of these identities."""
        numbers = np.array(identities, np.uint64)[:, None]
        expected = self._expected[slot, first : first + len(identities)]
        expected[..., 0] = self._positions[first : first + len(identities)] | numbers >> np.uint64(32)
        expected[..., 1] = self._owners | numbers & np.uint64(_LOW)

    def verify(self, slot: int, first: int, end: int) -> None:
        """Look at the rows `[first, end)` of a slot, all of which were written.

        Raises:
            TagMismatch: A row holds something else; the message says whose it is.
        """
        if first >= end:
            return
        index, expected = self._index[slot, first:end], self._expected[slot, first:end]
        found = self._memory.load(index)
        self.n_checks += (end - first) * self._n_rows_per_token
        if (found != expected).any():
            token, piece, _ = (int(i) for i in np.argwhere(found != expected)[0])
            raise TagMismatch(
                f"slot {slot}, token {first + token}, piece {piece}: expected {_describe(expected[token, piece])}, "
                f"found {_describe(found[token, piece])}"
            )


def _describe(tag: Words) -> str:
    if not tag.any():
        return "zeros"
    low, high = int(tag[0]), int(tag[1])
    return (
        f"sequence {low & _LOW} position {low >> 32} layer {(high >> 33) & 0x7FFF} "
        f"{'V' if high >> 32 & 1 else 'K'} head {high >> 48} generation {high & _LOW}"
    )
