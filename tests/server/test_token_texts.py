"""What is said of single tokens: joined they are the answer, and each begins where the answer says so."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.engine.tokenizers import byte_tokenizer
from vmem_kv.engine.request import TokenLogprob, TokenLogprobs
from vmem_kv.server.logprobs import TextOffsets, for_chat, for_completion
from vmem_kv.server.text import TextCodec

from .harness import Running, events

TEXT = "naïve 漢字 🌟🌟!"


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """Words that hold the space before them, which is not written at a text's beginning."""
    words = {word: i for i, word in enumerate(("<unk>", "▁a", "▁the", "▁sky", "."))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def entries(token_ids: list[int]) -> list[TokenLogprobs]:
    chosen = [TokenLogprob(token_id, -0.5) for token_id in token_ids]
    return [TokenLogprobs(token, (token,)) for token in chosen]


@pytest.fixture(params=[byte_tokenizer, spaced_tokenizer])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    made: PreTrainedTokenizerBase = request.param()
    return made


@pytest.fixture
def codec(tokenizer: PreTrainedTokenizerBase) -> Iterator[TextCodec]:
    made = TextCodec(tokenizer, 128)
    yield made
    made.close()


def test_a_token_keeps_its_space(codec: TextCodec, tokenizer: PreTrainedTokenizerBase) -> None:
    token_ids = tokenizer.encode("the sky", add_special_tokens=False)
    told = for_chat(codec, entries(token_ids))["content"]
    whole = tokenizer.decode([*tokenizer.encode("a", add_special_tokens=False), *token_ids])[1:]
    assert " sky" in whole
    assert "".join(entry["token"] for entry in told) == whole
    assert bytes(byte for entry in told for byte in entry["bytes"]).decode() == whole


def test_a_token_that_swallows_its_context_is_written_alone() -> None:
    class Backwards(PreTrainedTokenizerFast):
        def decode(self, token_ids: list[int], **_: object) -> str:  # type: ignore[override]
            return ".".join(str(token_id) for token_id in reversed(token_ids))

    codec = TextCodec(Backwards(tokenizer_object=spaced_tokenizer().backend_tokenizer), 128)
    assert codec.token_text(3) == "3"
    codec.close()


def test_parts_of_a_character_begin_where_it_does() -> None:
    codec = TextCodec(byte_tokenizer(), 128)
    token_ids = byte_tokenizer().encode(TEXT)
    expected = [i for i, character in enumerate(TEXT) for _ in character.encode()]
    assert len(token_ids) == len(expected) > len(TEXT)
    offsets = TextOffsets(codec, byte_tokenizer().encode("a prompt"), True)
    first, rest = (for_completion(codec, entries(part), offsets) for part in (token_ids[:9], token_ids[9:]))
    assert first["text_offset"] + rest["text_offset"] == expected
    codec.close()


def test_special_tokens_take_no_place_where_the_text_leaves_them_out() -> None:
    codec = TextCodec(byte_tokenizer(), 128)
    end = byte_tokenizer().eos_token_id
    a, b = byte_tokenizer().encode("ab")
    for skip, expected in ((True, [0, 1, 1]), (False, [0, 1, 1 + len("<end>")])):
        offsets = TextOffsets(codec, [a], skip)
        assert for_completion(codec, entries([a, end, b]), offsets)["text_offset"] == expected
    codec.close()


@pytest.mark.parametrize("stream", [False, True])
def test_an_answers_tokens_stand_where_they_say(running: Running, stream: bool) -> None:
    response = running.post("completions", prompt=["the sky", "we look"], n=2, logprobs=1, stream=stream)
    found = events(response.text)[:-1] if stream else [json.loads(response.text)]
    texts, places = ["", "", "", ""], [[], [], [], []]  # type: ignore[var-annotated]
    for event in found:
        assert isinstance(event, dict)
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
            told = choice["logprobs"]
            places[choice["index"]] += zip(told["tokens"], told["text_offset"], strict=True)
    for text, told in zip(texts, places, strict=True):
        assert len(told) == 8
        assert "".join(token for token, _ in told) == text
        assert all(text[offset:].startswith(token) for token, offset in told)
