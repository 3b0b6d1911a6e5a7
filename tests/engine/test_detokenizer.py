"""Text comes out whole: no character is split, nothing is lost, and a stop text is found wherever its pieces end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmem_kv.engine.detokenizer import Detokenizer, StopFinder

from ..steady import STEADY
from .tokenizers import byte_tokenizer, word_tokenizer


def pieces_of(token_ids: list[int], prompt: list[int], tokenizer: object = None) -> list[str]:
    detokenizer = Detokenizer(tokenizer or byte_tokenizer(), prompt, True)  # type: ignore[arg-type]
    return [*(detokenizer.add(token_id) for token_id in token_ids), detokenizer.flush()]


@given(st.text(max_size=30), st.text(max_size=8))
@settings(STEADY, max_examples=60)
def test_pieces_joined_are_the_text_and_no_character_is_split(text: str, prompt: str) -> None:
    tokenizer = byte_tokenizer()
    text, prompt = (t.replace("\ufffd", "") for t in (text, prompt))  # its own bytes say "incomplete" to every decoder
    token_ids, prompt_ids = tokenizer.encode(text), tokenizer.encode(prompt)
    pieces = pieces_of(token_ids, prompt_ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_comes_with_its_last_byte() -> None:
    assert pieces_of(byte_tokenizer().encode("a€😀b"), []) == ["a", "", "", "€", "", "", "", "😀", "b", ""]


def test_a_character_that_the_prompt_began_is_completed() -> None:
    first, *rest = byte_tokenizer().encode("é")
    assert "".join(pieces_of([*rest, *byte_tokenizer().encode("!")], [first])).endswith("!")


def test_a_character_that_never_ends_is_written_at_the_end() -> None:
    *some, _ = byte_tokenizer().encode("x😀")
    assert pieces_of(some, []) == ["x", "", "", "", "\ufffd"]


def test_spaces_between_words_are_kept() -> None:
    assert "".join(pieces_of([3, 4, 5], [9, 8], word_tokenizer())) == " w3 w4 w5"


def found(stops: list[str], pieces: list[str], include: bool = False) -> tuple[str, str | None]:
    finder = StopFinder(stops, include)
    given_out = ""
    for piece in pieces:
        text, stop = finder.add(piece)
        given_out += text
        if stop is not None:
            return given_out, stop
    return given_out + finder.flush(), None


@pytest.mark.parametrize(
    ("stops", "pieces", "text", "stop"),
    [
        (["END"], ["abENDcd"], "ab", "END"),
        (["END"], ["abE", "N", "Dcd"], "ab", "END"),
        (["END"], ["abE", "N"], "abEN", None),
        (["aab"], ["a", "a", "a", "b"], "a", "aab"),
        (["xyz", "y"], ["wxy"], "wx", "y"),
        (["longer", "long"], ["so long", "er"], "so ", "long"),
        ([], ["ab", "c"], "abc", None),
        (["\n\n"], ["a\n", "b\n", "\nc"], "a\nb", "\n\n"),
    ],
)
def test_stop_texts(stops: list[str], pieces: list[str], text: str, stop: str | None) -> None:
    assert found(stops, pieces) == (text, stop)


def test_a_stop_text_can_be_kept() -> None:
    assert found(["END"], ["aE", "NDb"], include=True) == ("aEND", "END")


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
@settings(STEADY, max_examples=200)
def test_however_a_text_is_cut_the_same_is_found(text: str, stops: list[str]) -> None:
    by_character = found(stops, list(text))
    assert found(stops, [text[i : i + 2] for i in range(0, len(text), 2)]) == by_character
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if ends:
        assert by_character[1] is not None
        assert text[: min(ends)] == by_character[0] + by_character[1]
    else:
        assert by_character == (text, None)
