"""Shadow tags: every word of every K and V row says who wrote it, and one vectorised look verifies a sequence's rows.

    a head of a row:  [ position, sequence | head, layer, kind, generation | place ][ the same | next place ] ...

A tag is two words of 8 bytes, and a head is full of them. In each pair, tag and place in the row are mixed so that both
words depend on all of it, and can be taken apart again. So a word that is missing, old, shifted or somebody else's
shows wherever it lies, and whatever the layout; so does a single byte, but for one that happens to be as it should.
A mismatch names both owners. The generation counts the writes of a row: a row that was truncated and written again is
another one.

Guarantees: touches only rows that it is told are mapped. Slots are independent of each other: threads may work on
different ones. Assumptions: rows and heads are multiples of 8 bytes, and a head has at least 16.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vmem_kv.driver.base import Driver, Reservation
from vmem_kv.errors import ConfigError
from vmem_kv.layout import Layout, Strides

Words = NDArray[np.uint64]

WORD_BYTES = 8
TAG_BYTES = 2 * WORD_BYTES

_LOW = 0xFFFFFFFF
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
"""What words are mixed with: odd and large, so that what differs in low bytes differs in the last one too."""
_IS_TAG = 1 << 63
"""Tells the words of a tag from the zeros of a page that nobody wrote."""

_memcmp = ctypes.CDLL(None).memcmp  # without a copy, and far quicker than numpy where words are few
_memcmp.argtypes, _memcmp.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t], ctypes.c_int


class TagMismatch(AssertionError):
    """A live row does not hold what its owner wrote."""


class StaleRow(AssertionError):
    """A row that nobody has written shows bytes that its owner must not see."""


class WordMemory(Protocol):
    """The memory of one region in words of 8 bytes."""

    def load(self, first: int, n_words: int) -> Words:
        """Return `[n_words]` words from `first` on, all of them mapped. Do not write to them, nor keep them."""

    def holds(self, first: int, address: int, n_words: int) -> bool:
        """Whether the words from `first` on, all of them mapped, are those at an address of this process."""

    def store(self, first: int, words: Words) -> None:
        """Write `[n_words]` words from `first` on."""


class HostWords:
    """Memory that this process can touch itself."""

    def __init__(self, reservation: Reservation) -> None:
        self._base = reservation.base
        whole = (ctypes.c_char * reservation.n_bytes).from_address(reservation.base)
        self._words: Words = np.frombuffer(memoryview(whole), dtype=np.uint64)

    def load(self, first: int, n_words: int) -> Words:
        """Return words, as a view: nothing is copied."""
        return self._words[first : first + n_words]

    def holds(self, first: int, address: int, n_words: int) -> bool:
        """Whether these are the words."""
        return _is_equal(self._base + first * WORD_BYTES, address, n_words)

    def store(self, first: int, words: Words) -> None:
        """Write words."""
        self._words[first : first + len(words)] = words


class DriverWords:
    """Memory reached through a driver's own copies."""

    def __init__(self, driver: Driver, reservation: Reservation) -> None:
        self._driver = driver
        self._base = reservation.base

    def load(self, first: int, n_words: int) -> Words:
        """Return words, in memory of their own."""
        words = np.empty(n_words, np.uint64)
        self._driver.copy_to_host(self._base + first * WORD_BYTES, words.data.cast("B")).wait()
        return words

    def holds(self, first: int, address: int, n_words: int) -> bool:
        """Whether these are the words."""
        found = self.load(first, n_words)
        return _is_equal(found.ctypes.data, address, n_words)

    def store(self, first: int, words: Words) -> None:
        """Write words."""
        self._driver.copy_from_host(words.data.cast("B"), self._base + first * WORD_BYTES).wait()


def _is_equal(one: int, other: int, n_words: int) -> bool:
    """Whether words at two addresses of this process are equal."""
    return int(_memcmp(one, other, n_words * WORD_BYTES)) == 0


def words_of(driver: Driver, reservation: Reservation) -> WordMemory:
    """Return the fastest way to the memory of a region."""
    return HostWords(reservation) if driver.info.device == "cpu" else DriverWords(driver, reservation)


@dataclass(frozen=True, slots=True)
class _PlaneTags:
    """One plane: where its rows lie, and what they should be."""

    base: int  # word of slot 0, token 0 in the region
    slot_words: int
    row_words: int
    is_second: NDArray[np.bool_]  # [row_words] where the second word of a pair stands
    owners: Words  # [row_words] the layer, kind and head there
    places: Words  # [row_words] where the pair begins in the row
    expected: Words  # [n_slots, max_tokens, row_words]
    expected_base: int  # its address

    def first_word(self, slot: int, token: int) -> int:
        """Where a row begins in the region."""
        return self.base + slot * self.slot_words + token * self.row_words

    def expected_at(self, slot: int, token: int) -> int:
        """The address of what is expected of a row."""
        return self.expected_base + (slot * int(self.expected.shape[1]) + token) * self.row_words * WORD_BYTES

    def words(self, whose: Words, generations: Words) -> Words:
        """The words `[n_tokens, row_words]` of rows, by the columns of which their tags are made."""
        what = generations + self.owners
        first = whose + self.places + _FACTOR * what
        return np.where(self.is_second, what + _FACTOR * first, first)

    def describe(self, row: Words, word: int) -> str:
        """Whose the pair is to which this word of a row belongs."""
        at = word - int(self.is_second[word])
        if not self.is_second[at + 1 : at + 2].any():
            at -= 2  # the last word of a head of an odd number of them
        first, second = row[at : at + 1], row[at + 1 : at + 2]
        if not first.any() and not second.any():
            return "zeros"
        what = second - _FACTOR * first
        low, high = int((first - _FACTOR * what - self.places[at])[0]), int(what[0])
        return (
            f"sequence {low & _LOW} position {low >> 32} layer {(high >> 33) & 0x7FFF} "
            f"{'V' if high >> 32 & 1 else 'K'} head {(high >> 48) & 0x7FFF} generation {high & _LOW}"
        )


class ShadowTags:
    """The tags of one region, and what they should be.

    Args:
        layout: The region's geometry.
        memory: Its words.

    Raises:
        ConfigError: A head is shorter than a tag, or no multiple of 8 bytes.
    """

    def __init__(self, layout: Layout, memory: WordMemory) -> None:
        self._memory = memory
        self._n_rows_per_token = 2 * len(layout.layers)
        self._planes = _plane_tags(layout)
        shape = (layout.n_slots, layout.max_tokens)
        self._positions: Words = np.arange(layout.max_tokens, dtype=np.uint64) << np.uint64(32)
        self._generations: Words = np.zeros(shape, np.uint64)
        self._identities: Words = np.zeros(shape, np.uint64)
        self._n_checks = [0] * layout.n_slots
        self._domains: list[str | None] = [None] * layout.n_slots

    @property
    def n_checks(self) -> int:
        """K and V rows verified so far."""
        return sum(self._n_checks)

    def write(self, slot: int, first: int, end: int, sequence: int) -> None:
        """Let `sequence` write its rows `[first, end)` in a slot. They must be mapped."""
        if first >= end:
            return
        self._generations[slot, first:end] += np.uint64(1)
        self._expect(slot, first, self._generations[slot, first:end] | np.uint64(sequence << 32))
        for plane in self._planes:
            self._memory.store(plane.first_word(slot, first), plane.expected[slot, first:end].reshape(-1))

    def fork(self, source: int, target: int, end: int) -> None:
        """Expect in a slot the rows `[0, end)` of another one, as they are: they were copied or are the same memory."""
        self._identities[target, :end] = self._identities[source, :end]
        for plane in self._planes:
            plane.expected[target, :end] = plane.expected[source, :end]

    def identities(self, slot: int, end: int) -> list[int]:
        """Return a number for each of the rows `[0, end)` of a slot: equal ones at one position are the same row."""
        return [int(identity) for identity in self._identities[slot, :end]]

    def expect(self, slot: int, first: int, identities: Sequence[int]) -> None:
        """Expect in a slot, from row `first` on, rows that came from elsewhere: those of these identities."""
        self._expect(slot, first, np.array(identities, np.uint64))

    def verify(self, slot: int, first: int, end: int) -> None:
        """Look at every byte of the rows `[first, end)` of a slot, all of which were written.

        Raises:
            TagMismatch: A row holds something else; the message says whose it is.
        """
        if first >= end:
            return
        self._n_checks[slot] += (end - first) * self._n_rows_per_token
        for index, plane in enumerate(self._planes):
            at, n_words = plane.first_word(slot, first), (end - first) * plane.row_words
            if self._memory.holds(at, plane.expected_at(slot, first), n_words):
                continue
            expected, found = plane.expected[slot, first:end].reshape(-1), self._memory.load(at, n_words)
            token, word = divmod(int((found != expected).argmax()), plane.row_words)
            row = slice(token * plane.row_words, (token + 1) * plane.row_words)
            raise TagMismatch(
                f"slot {slot}, token {first + token}, plane {index}, byte {word * WORD_BYTES} of its row: "
                f"expected {plane.describe(expected[row], word)}, found {plane.describe(found[row], word)}"
            )

    def adopt(self, slot: int, domain: str) -> None:
        """Let a sequence of `domain` begin in a slot. What another domain left there, `require_clean` finds."""
        if self._domains[slot] != domain:
            self.forget(slot)
            self._domains[slot] = domain

    def forget(self, slot: int) -> None:
        """Let nothing be left of what was written in a slot: from now on its rows must be zero until they are."""
        n_written = int(np.flatnonzero(self._identities[slot]).max(initial=-1)) + 1
        self._identities[slot, :n_written] = 0
        for plane in self._planes:
            plane.expected[slot, :n_written] = 0

    def require_clean(self, slot: int, first: int, end: int) -> None:
        """Look at rows `[first, end)` of a slot before they are written: each word is zero, or as its domain left it.

        They must be mapped.

        Raises:
            StaleRow: A word is neither; the message says whose it is.
        """
        if first >= end:
            return
        for index, plane in enumerate(self._planes):
            expected = plane.expected[slot, first:end].reshape(-1)
            found = self._memory.load(plane.first_word(slot, first), len(expected))
            is_stale = (found != 0) & (found != expected)
            if is_stale.any():
                token, word = divmod(int(is_stale.argmax()), plane.row_words)
                row = found[token * plane.row_words : (token + 1) * plane.row_words]
                raise StaleRow(
                    f"slot {slot}, token {first + token}, plane {index}, byte {word * WORD_BYTES} of its row shows old "
                    f"bytes: {plane.describe(row, word)}"
                )

    def _expect(self, slot: int, first: int, identities: Words) -> None:
        end = first + len(identities)
        self._identities[slot, first:end] = identities
        whose = (self._positions[first:end] | identities >> np.uint64(32))[:, None]
        generations = (identities & np.uint64(_LOW))[:, None]
        for plane in self._planes:
            plane.expected[slot, first:end] = plane.words(whose, generations)


def _plane_tags(layout: Layout) -> list[_PlaneTags]:
    """What the rows of each plane are made of."""
    heads = [*_heads(layout)]
    made = []
    for plane in layout.planes:
        n_words = plane.token_bytes // WORD_BYTES
        is_second, owners = np.zeros(n_words, np.bool_), np.zeros(n_words, np.uint64)
        places = np.zeros(n_words, np.uint64)
        for offset_bytes, head_bytes, owner in heads:
            if head_bytes < TAG_BYTES or head_bytes % WORD_BYTES:
                raise ConfigError(f"a head has {head_bytes} bytes; a tag needs {TAG_BYTES}, and whole words of 8")
            if 0 <= offset_bytes - plane.base_bytes < plane.token_bytes:
                first = (offset_bytes - plane.base_bytes) // WORD_BYTES
                end = first + head_bytes // WORD_BYTES
                is_second[first + 1 : end : 2] = True
                owners[first:end] = owner
                places[first:end] = np.arange(first, end) - is_second[first:end]
        expected = np.zeros((layout.n_slots, layout.max_tokens, n_words), np.uint64)
        base, slot_words = plane.base_bytes // WORD_BYTES, plane.span_bytes // WORD_BYTES
        made.append(_PlaneTags(base, slot_words, n_words, is_second, owners, places, expected, expected.ctypes.data))
    return made


def _heads(layout: Layout) -> Iterator[tuple[int, int, int]]:
    """Of every head: where it lies in slot 0 at token 0, its bytes, and the bits that say whose it is."""
    for layer_index, tensors in enumerate(zip(layout.keys, layout.values, strict=True)):
        for kind, strides in enumerate(tensors):
            yield from _heads_of(strides, layer_index << 33 | kind << 32)


def _heads_of(strides: Strides, owner: int) -> Iterator[tuple[int, int, int]]:
    for head in range(strides.spec.n_heads):
        yield strides.offset_bytes + head * strides.head_bytes, strides.spec.head_bytes, _IS_TAG | head << 48 | owner
