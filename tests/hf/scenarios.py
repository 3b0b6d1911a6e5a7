"""Everything that `generate`, and users of `forward`, do with a cache.

Each scenario returns tokens, and where the decoding method offers them also logits: tokens of a tiny model may agree
by luck, logits do not.
"""

from __future__ import annotations

from typing import Any

import torch

from .architectures import build_assistant, random_tokens
from .harness import Run, Scenario, cached_states

N_PROMPT = 11
N_NEW = 24


def _generate(run: Run, inputs: dict[str, torch.Tensor], cache: Any, **settings: Any) -> dict[str, torch.Tensor]:
    settings = {"max_new_tokens": N_NEW, "do_sample": False, **settings}
    output = run.model.generate(
        **inputs, **run.as_argument(cache), return_dict_in_generate=True, output_logits=True, **settings
    )
    tensors = {"tokens": output.sequences}
    if output.logits is not None:
        tensors["logits"] = torch.stack(output.logits)
    return tensors


def _prompt(batch_size: int, length: int = N_PROMPT, seed: int = 0) -> dict[str, torch.Tensor]:
    tokens = random_tokens(batch_size, length, seed)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def greedy(run: Run) -> dict[str, torch.Tensor]:
    cache = run.make_cache()
    return _generate(run, _prompt(2), cache) | cached_states(cache)


def beam_search(run: Run) -> dict[str, torch.Tensor]:
    cache = run.make_cache()
    return _generate(run, _prompt(2), cache, num_beams=3) | cached_states(cache)


def beam_sampling(run: Run) -> dict[str, torch.Tensor]:
    return _generate(run, _prompt(2), run.make_cache(), num_beams=3, do_sample=True, top_k=20)


def sampling(run: Run) -> dict[str, torch.Tensor]:
    return _generate(run, _prompt(2), run.make_cache(), do_sample=True, temperature=1.3, top_k=50)


def several_returned(run: Run) -> dict[str, torch.Tensor]:
    return _generate(run, _prompt(2), run.make_cache(), do_sample=True, num_return_sequences=2)


def left_padded(run: Run) -> dict[str, torch.Tensor]:
    inputs = _prompt(3, 12)
    for row, n_padding in enumerate((0, 7, 3)):
        inputs["input_ids"][row, :n_padding] = 0
        inputs["attention_mask"][row, :n_padding] = 0
    return _generate(run, inputs, run.make_cache())


def chunked_prefill(run: Run) -> dict[str, torch.Tensor]:
    return _generate(run, _prompt(2, 23), run.make_cache(), prefill_chunk_size=5)


def continued(run: Run) -> dict[str, torch.Tensor]:
    """Two turns of a conversation, the second on the cache that the first left."""
    cache = run.make_cache()
    first = _generate(run, _prompt(2), cache, max_new_tokens=9)
    user = random_tokens(2, 4, seed=7)
    if run.architecture.is_encoder_decoder:
        inputs = _prompt(2) | {"decoder_input_ids": torch.cat([first["tokens"], user], dim=1)}
    else:
        tokens = torch.cat([first["tokens"], user], dim=1)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return _generate(run, inputs, cache, max_new_tokens=12) | cached_states(cache)


def _repetitive_prompt() -> dict[str, torch.Tensor]:
    tokens = random_tokens(1, 7, seed=3).repeat(1, 3)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def prompt_lookup(run: Run) -> dict[str, torch.Tensor]:
    return _generate(run, _repetitive_prompt(), run.make_cache(), prompt_lookup_num_tokens=4)


def assisted(run: Run) -> dict[str, torch.Tensor]:
    """Speculative decoding with an assistant that is right about half of the time."""
    assistant = build_assistant(run.architecture.name)
    return _generate(run, _prompt(1, seed=5), run.make_cache(), assistant_model=assistant)


def prefix_reused(run: Run) -> dict[str, torch.Tensor]:
    """Two continuations of copies of a prefix, then one of the original, which the copies must not have touched."""
    cache = run.make_cache()
    prefix = _prompt(1, 19)["input_ids"]
    _forward(run, prefix, cache)
    tensors: dict[str, torch.Tensor] = {}
    for name, used, seed in (("a", run.copy_of(cache), 1), ("b", run.copy_of(cache), 2), ("original", cache, 3)):
        suffix = random_tokens(1, 3, seed)
        if run.architecture.is_encoder_decoder:
            inputs = _prompt(1) | {"decoder_input_ids": torch.cat([prefix, suffix], dim=1)}
        else:
            inputs = {"input_ids": torch.cat([prefix, suffix], dim=1)}
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        output = _generate(run, inputs, used, max_new_tokens=10)
        tensors |= {f"{name}.{key}": tensor for key, tensor in output.items()}
    return tensors


def emptied_and_used_again(run: Run) -> dict[str, torch.Tensor]:
    """Shorter, wider and narrower batches after a reset: nothing of what was there before may shine through."""
    cache = run.make_cache()
    tensors: dict[str, torch.Tensor] = {}
    # Stock layers of recurrent state keep their batch size through a reset.
    wider, narrower = (2, 2) if run.architecture.has_state else (3, 1)
    for name, batch_size, length in (("first", 2, 17), ("shorter", 2, 6), ("wider", wider, 9), ("last", narrower, 9)):
        output = _generate(run, _prompt(batch_size, length, seed=length), cache, max_new_tokens=12)
        tensors |= {f"{name}.{key}": tensor for key, tensor in (output | cached_states(cache)).items()}
        cache = run.emptied(cache)
    return tensors


def _forward(run: Run, tokens: torch.Tensor, cache: Any, rows: list[int] | None = None) -> torch.Tensor:
    """Return the logits of one call. For encoder-decoders, `rows` says which rows of the encoder's batch are used."""
    inputs: dict[str, torch.Tensor] = {"input_ids": tokens}
    if run.architecture.is_encoder_decoder:
        source = random_tokens(8, 13, seed=11)
        source = source[: tokens.shape[0]] if rows is None else source[rows]
        inputs = {"input_ids": source, "decoder_input_ids": tokens}
    with torch.no_grad():
        logits: torch.Tensor = run.model(**inputs, **run.as_argument(cache), use_cache=True).logits
    return logits


def rows_selected_and_repeated(run: Run) -> dict[str, torch.Tensor]:
    cache = run.make_cache()
    tensors = {"prefill": _forward(run, random_tokens(3, 18, seed=0), cache)}
    cache.batch_select_indices(torch.tensor([2, 0]))
    tensors["selected"] = _forward(run, random_tokens(2, 2, seed=1), cache, rows=[2, 0])
    cache.batch_repeat_interleave(3)
    tensors["repeated"] = _forward(run, random_tokens(6, 1, seed=2), cache, rows=[2, 2, 2, 0, 0, 0])
    cache.batch_select_indices(torch.tensor([5]))
    tensors["one"] = _forward(run, random_tokens(1, 5, seed=3), cache, rows=[0])
    return tensors | cached_states(cache)


def rows_reordered(run: Run) -> dict[str, torch.Tensor]:
    cache = run.make_cache()
    rows = [0, 1, 2, 3]
    tensors = {"prefill": _forward(run, random_tokens(4, 18, seed=0), cache)}
    for step, order in enumerate(([3, 2, 1, 0], [1, 2, 3, 0], [0, 0, 3, 3], [0, 1, 2, 3], [2, 0, 0, 1])):
        cache.reorder_cache(torch.tensor(order))
        rows = [rows[index] for index in order]
        tensors[f"step {step}"] = _forward(run, random_tokens(4, 1, seed=step), cache, rows)
    return tensors | cached_states(cache)


def cropped(run: Run) -> dict[str, torch.Tensor]:
    """What assisted decoding does: run ahead, take back, go on; also `crop(0)`."""
    cache = run.make_cache()
    tensors = {"prefill": _forward(run, random_tokens(2, 13, seed=0), cache)}
    cache.activate_past_recording()
    for step, (n_ahead, n_removed) in enumerate(((5, 3), (1, 0), (6, 5), (7, 1), (3, 3), (9, 2))):
        tensors[f"step {step}"] = _forward(run, random_tokens(2, n_ahead, seed=step), cache)
        cache.crop(-n_removed)
    tensors["after"] = _forward(run, random_tokens(2, 2, seed=99), cache)
    if run.architecture.has_kv:
        tensors["length"] = torch.tensor(cache.get_seq_length())
    return tensors


def cropped_without_preparation(run: Run) -> dict[str, torch.Tensor]:
    """A user who crops a cache that was never told that this would come. Windowed layers may refuse."""
    cache = run.make_cache()
    tensors = {"prefill": _forward(run, random_tokens(2, 19, seed=0), cache)}
    cache.crop(-6)
    tensors["after"] = _forward(run, random_tokens(2, 3, seed=1), cache)
    return tensors | cached_states(cache)


SCENARIOS: dict[str, Scenario] = {
    scenario.__name__: scenario
    for scenario in (
        greedy,
        beam_search,
        beam_sampling,
        sampling,
        several_returned,
        left_padded,
        chunked_prefill,
        continued,
        prompt_lookup,
        assisted,
        prefix_reused,
        emptied_and_used_again,
        rows_selected_and_repeated,
        rows_reordered,
        cropped,
        cropped_without_preparation,
    )
}
