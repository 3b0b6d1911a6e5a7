"""What the detokeniser holds is bounded whatever the tokens are, and its pieces are the text of the whole."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmem_kv.engine import detokenizer as module
from vmem_kv.engine.detokenizer import Detokenizer

from ..steady import STEADY
from .tokenizers import byte_tokenizer, word_tokenizer

MOST_DECODED = 24
MOST_HELD = 8


class Watched:
    """A tokenizer that notes the longest list it was asked to decode."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.longest = 0

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        self.longest = max(self.longest, len(token_ids))
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text


def byte_ids(data: bytes) -> list[int]:
    """The token of every byte: those of a whole character, and of bytes that are none."""
    letters = _letters()
    return [byte_tokenizer().convert_tokens_to_ids(letters[byte]) for byte in data]


def _letters() -> list[str]:
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


END = byte_tokenizer().eos_token_id


def check(token_ids: list[int], skip: bool) -> None:
    """Whatever comes, the window is short, little is held back, and the pieces are the whole."""
    watched = Watched(byte_tokenizer())
    detokenizer = Detokenizer(watched, [], skip)
    given_out = "".join(map(detokenizer.add, token_ids))
    assert watched.longest <= MOST_DECODED
    whole = byte_tokenizer().decode(token_ids, skip_special_tokens=skip)
    assert len(whole) - len(given_out) <= MOST_HELD
    assert given_out + detokenizer.flush() == whole


def test_bytes_are_what_they_should_be() -> None:
    assert byte_tokenizer().decode(byte_ids("a€😀 \n".encode())) == "a€😀 \n"
    assert byte_tokenizer().decode(byte_ids(b"\x80a\xe2\x82")) == "\ufffda\ufffd"


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(
    "token_ids",
    [
        byte_ids(b"\x80" * 300),
        byte_ids(b"\xf0" * 300),
        byte_ids(b"ab" + b"\xe2\x82" * 150 + "€".encode()),
        byte_ids(b"\x80" * 50 + "😀x".encode()) * 5,
        [*byte_ids(b"a"), *[END] * 300, *byte_ids(b"b")],
        [*byte_ids(b"a\xe2"), *[END] * 300, *byte_ids(b"\x82\xacb")],
    ],
    ids=["lone", "begun", "two_of_three", "then_whole", "special", "special_within"],
)
def test_tokens_without_text_do_not_gather(token_ids: list[int], skip: bool) -> None:
    check(token_ids, skip)


def test_they_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail."""
    monkeypatch.setattr(module, "_MOST_WAITING", 1_000)
    with pytest.raises(AssertionError):
        check(byte_ids(b"\x80" * 300), True)


@given(st.lists(st.one_of(st.binary(max_size=12), st.text(max_size=4), st.just(END)), max_size=12), st.booleans())
@settings(STEADY, max_examples=300)
def test_any_bytes_are_decoded_as_the_whole(parts: list[bytes | str | int], skip: bool) -> None:
    token_ids: list[int] = []
    for part in parts:
        token_ids += [part] if isinstance(part, int) else byte_ids(part.encode() if isinstance(part, str) else part)
    check(token_ids, skip)


def test_words_come_at_once() -> None:
    detokenizer = Detokenizer(word_tokenizer(), [], True)
    assert [detokenizer.add(i) for i in (3, 4, 5)] == ["w3", " w4", " w5"]
