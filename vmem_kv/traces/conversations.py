"""ShareGPT's form, read one conversation at a time: ``[{"conversations": [{"from": "human", "value": "..."}]}, ...]``.

Guarantees: memory is bounded by `MAX_CONVERSATION_CHARS`, however long the array is. Errors name the line in which the
conversation begins.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from vmem_kv.traces.lines import Place

MAX_CONVERSATION_CHARS = 8 << 20
"""A longer one is taken for a mistake."""

_READ_BYTES = 1 << 18

Turn = tuple[str, str]
"""Who speaks, and what."""


class _Text:
    """A file's text from where we are, as far as it was read."""

    def __init__(self, file: BinaryIO, place: Place) -> None:
        self._file = file
        self._place = place
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._is_at_end = False
        self.buffer = ""
        place.line = 1

    def read_more(self) -> bool:
        """Append more text; False at the end of the file."""
        if self._is_at_end:
            return False
        raw = self._file.read(_READ_BYTES)
        self._is_at_end = not raw
        try:
            self.buffer += self._decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            raise self._place.error(f"not UTF-8 text behind here: {error.reason}") from error
        return True

    def drop(self, n_chars: int) -> None:
        """Go on behind so many characters."""
        self._place.line += self.buffer.count("\n", 0, n_chars)
        self.buffer = self.buffer[n_chars:]

    def next_char(self) -> str:
        """Skip white space; return the character there, or nothing at the end."""
        while True:
            n_blank = len(self.buffer) - len(self.buffer.lstrip())
            self.drop(n_blank)
            if self.buffer or not self.read_more():
                return self.buffer[:1]


def read_conversations(file: BinaryIO, place: Place) -> Iterator[list[Turn]]:
    """Yield the turns of each conversation.

    Raises:
        ConfigError: The file is no such array.
    """
    text = _Text(file, place)
    if text.next_char() != "[":
        raise place.error("is no JSON array of conversations")
    text.drop(1)
    while (char := text.next_char()) != "]":
        if not char:
            raise place.error("the file ends before its array does")
        yield _turns(_read_item(text, place), place)
        char = text.next_char()
        if char == ",":
            text.drop(1)
        elif char not in ("]", ""):
            raise place.error(f"there is {char!r} behind a conversation, where a comma or the array's end should be")
    text.drop(1)
    if text.next_char():
        raise place.error("there is something behind the array's end")


def _read_item(text: _Text, place: Place) -> Any:
    """Read one JSON value. An attempt costs as much as the buffer is long, so each follows twice as much text."""
    decoder = json.JSONDecoder()
    n_wanted = _READ_BYTES
    while True:
        try:
            item, n_chars = decoder.raw_decode(text.buffer)
        except (ValueError, RecursionError) as error:
            if isinstance(error, RecursionError) or not text.read_more():
                raise place.error(f"a conversation that begins here is no JSON: {error}") from error
        else:
            text.drop(n_chars)
            return item
        while len(text.buffer) < n_wanted and text.read_more():
            pass
        n_wanted = 2 * len(text.buffer)
        if len(text.buffer) > MAX_CONVERSATION_CHARS:
            raise place.error(f"a conversation from here on is longer than {MAX_CONVERSATION_CHARS:,} characters")


def _turns(item: Any, place: Place) -> list[Turn]:
    turns = item.get("conversations", item.get("conversation")) if isinstance(item, dict) else None
    if not isinstance(turns, list):
        raise place.error('a conversation has no list "conversations"')
    found: list[Turn] = []
    for turn in turns:
        speaker, value = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if not isinstance(speaker, str) or not isinstance(value, str):
            raise place.error('a turn of a conversation has no texts "from" and "value"')
        found.append((speaker, value))
    return found
