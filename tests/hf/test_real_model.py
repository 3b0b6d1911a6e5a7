"""Real text by a real model of 135 million parameters: the same tokens with our cache as with `DynamicCache`.

In bfloat16 with our attention function, in float32 with the stock one; always the same function on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from vmem_kv import VmemCache, models

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.timeout(600),  # the first time on a machine, the model is converted
]

NewCache = Callable[..., VmemCache]

SHORT = "The capital of France is"
LONG = (
    "Rain falls when water vapour in the air cools, condenses on tiny grains of dust and grows into drops that are "
    "too heavy for the wind to carry. Rivers bring the water back to the sea, the sun lifts it up again, and so the "
    "water of the world goes round. Explain in one sentence what drives the water cycle. The water cycle is driven by"
)
BATCH = [SHORT, "Two plus two is", LONG[:90], "Once upon a time, in a village by the sea, there lived a"]


@pytest.fixture(scope="module", params=[("float32", "sdpa"), ("bfloat16", "vmem_kv")], ids="-".join)
def loaded(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    dtype, attention = request.param
    return models.load(dtype=dtype, attention=attention)


def _assert_same_tokens(
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    new_cache: NewCache,
    prompts: list[str],
    **settings: Any,
) -> str:
    """Generate with both caches, and return the text of the first sequence."""
    model, tokenizer = loaded
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    outputs = []
    for cache in (DynamicCache(config=model.config), new_cache(model.config)):
        torch.manual_seed(7)
        outputs.append(
            model.generate(**inputs, past_key_values=cache, **{"max_new_tokens": 16, "do_sample": False, **settings})
        )
    cache.check()
    assert torch.equal(outputs[0], outputs[1])
    assert cache.stats().peak_bytes > 0
    text: str = tokenizer.decode(outputs[1][0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return text


def test_greedy(loaded: Any, new_cache: NewCache) -> None:
    assert "Paris" in _assert_same_tokens(loaded, new_cache, [SHORT], max_new_tokens=32)


def test_a_left_padded_batch_of_four(loaded: Any, new_cache: NewCache) -> None:
    assert "Paris" in _assert_same_tokens(loaded, new_cache, BATCH)


def test_beam_search(loaded: Any, new_cache: NewCache) -> None:
    assert _assert_same_tokens(loaded, new_cache, [LONG], num_beams=3)


def test_sampling_several_sequences(loaded: Any, new_cache: NewCache) -> None:
    assert _assert_same_tokens(loaded, new_cache, [SHORT], do_sample=True, temperature=1.2, num_return_sequences=2)


def test_an_assistant_that_is_not_always_right(loaded: Any, new_cache: NewCache) -> None:
    # The model without its last three layers. About every second guess is right, so that up to 5 tokens are cropped.
    assistant = models.load(dtype="float32", attention="sdpa")[0]
    assistant.model.layers = assistant.model.layers[:27]
    assistant.config.num_hidden_layers = 27
    assert _assert_same_tokens(loaded, new_cache, [LONG], assistant_model=assistant)


def test_prompt_lookup(loaded: Any, new_cache: NewCache) -> None:
    assert _assert_same_tokens(loaded, new_cache, [LONG], prompt_lookup_num_tokens=4)


def test_chunked_prefill(loaded: Any, new_cache: NewCache) -> None:
    assert _assert_same_tokens(loaded, new_cache, [LONG], prefill_chunk_size=16)


def test_a_conversation_goes_on_with_the_same_cache_and_again_after_a_reset(loaded: Any, new_cache: NewCache) -> None:
    model, tokenizer = loaded
    transcripts = []
    ours = new_cache(model.config)
    calls = {}
    for cache in (DynamicCache(config=model.config), ours, ours):
        messages: list[dict[str, str]] = []
        for question in ("Name a colour.", "And another one?"):
            messages.append({"role": "user", "content": question})
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            output = model.generate(**inputs, past_key_values=cache, max_new_tokens=12, do_sample=False)
            answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            messages.append({"role": "assistant", "content": answer})
        transcripts.append(messages)
        if cache is ours:
            calls[len(transcripts)] = dict(ours.stats().driver_calls)
            ours.reset()
    assert transcripts[0] == transcripts[1] == transcripts[2]
    assert calls[2] == calls[3]


def test_our_attention_says_what_the_stock_one_says(new_cache: NewCache) -> None:
    texts = set()
    for attention in ("sdpa", "vmem_kv"):
        model, tokenizer = models.load(dtype="float32", attention=attention)
        inputs = tokenizer(BATCH, return_tensors="pt", padding=True)
        output = model.generate(**inputs, past_key_values=new_cache(model.config), max_new_tokens=16, do_sample=False)
        texts.add(tuple(tokenizer.batch_decode(output)))
    assert len(texts) == 1
