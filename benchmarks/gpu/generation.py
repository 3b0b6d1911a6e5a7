"""Part 5: transformers' `generate` over a `VmemCache`, against its own caches: speed and peak memory.

The model has random weights and the shape of Llama-3.2-1B. Times come from a streamer, which sees each token when it
reaches the host: the first one ends the prefill.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel, StaticCache

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.cases import OK, WRONG, Case, Reporter, Row
from benchmarks.gpu.plan import GenerationScale, Plan
from benchmarks.gpu.sequences import DTYPES
from vmem_kv.integrations.hf import VmemCache

SPEED = "generate"
TOKENS = "tokens in float32, against DynamicCache"
CACHES = ("vmem", "dynamic", "static")
_TIMED = ("prefill_ms", "decode_tokens_per_s", "vmem speed / this")


def cases(plan: Plan) -> Sequence[Case]:
    """All cases, by worth."""
    scale = plan.generation
    measured = [
        Case(
            f"context {context}, batch {batch}",
            partial(_compare, scale, context, batch),
            plan.costs.generation,
            90,
            table=SPEED,
        )
        for batch in scale.batches
        for context in scale.contexts
    ]
    same = Case("tokens in float32", partial(_check_tokens, scale), plan.costs.generation / 3, table=TOKENS)
    return [measured[0], same, *measured[1:]]


def _check_tokens(scale: GenerationScale, bench: Bench, report: Reporter) -> None:
    """Compare tokens, in a type in which no two logits are equal by rounding: with 16 bits the best two may be."""
    small = replace(scale, dtype="float32", n_layers=2)
    model = build_model(small, bench)
    tokens = torch.randint(3, small.vocab_size, (2, min(scale.contexts)), device=bench.device)
    outputs = [_generate(model, kind, tokens, 16, bench)[1] for kind in ("vmem", "dynamic")]
    n_same = int((outputs[0] == outputs[1])[:, tokens.shape[1] :].sum())
    row: Row = {"case": "tokens in float32", "n": n_same, "of": 32, "outcome": OK if n_same == 32 else WRONG}
    report.row(TOKENS, row)


class TokenTimes:
    """What `generate` calls a streamer: it is told the prompt, then every token."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Take the time of one token, which is on the host."""
        self.seconds.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def _compare(scale: GenerationScale, context: int, batch: int, bench: Bench, report: Reporter) -> None:
    model = build_model(scale, bench)
    generator = torch.Generator().manual_seed(context)
    tokens = torch.randint(3, scale.vocab_size, (batch, context), generator=generator).to(bench.device)
    kinds = list(CACHES)
    for kind in kinds:  # a turn that does not count: it loads kernels and grows torch's cache
        _generate(model, kind, tokens, scale.n_new_tokens, bench)
    rows: dict[str, list[Row]] = {kind: [] for kind in kinds}
    texts: dict[str, torch.Tensor] = {}
    for turn in range(scale.n_rounds):
        for kind in kinds[turn % 3 :] + kinds[: turn % 3]:
            row, output = _generate(model, kind, tokens, scale.n_new_tokens, bench)
            rows[kind].append(row)
            texts.setdefault(kind, output)
    speeds = {kind: statistics.median(row["decode_tokens_per_s"] for row in taken) for kind, taken in rows.items()}
    for kind in kinds:
        same = int((texts[kind] == texts["dynamic"])[:, context:].sum())
        row = {"case": kind, "context": context, "batch": batch, "new tokens": scale.n_new_tokens}
        row["prefill_ms"] = statistics.median(taken["prefill_ms"] for taken in rows[kind])
        row["decode_tokens_per_s"] = speeds[kind]
        row["vmem speed / this"] = speeds["vmem"] / speeds[kind]
        row |= {name: _median(rows[kind], name) for name in ("peak_bytes", "torch_peak_bytes", "pages_bytes")}
        row |= {"tokens as dynamic": same}
        report.row(SPEED, row, timed=_TIMED)


def _median(rows: Sequence[Row], name: str) -> float | None:
    values = [row[name] for row in rows if row[name] is not None]
    return statistics.median(values) if values else None


def build_model(scale: GenerationScale, bench: Bench) -> PreTrainedModel:
    """Return a model with random weights, on the device."""
    config = LlamaConfig(
        vocab_size=scale.vocab_size,
        hidden_size=scale.hidden_size,
        intermediate_size=scale.intermediate_size,
        num_hidden_layers=scale.n_layers,
        num_attention_heads=scale.n_q_heads,
        num_key_value_heads=scale.n_kv_heads,
        head_dim=scale.head_dim,
        max_position_embeddings=max(131_072, 2 * max(scale.contexts)),
        tie_word_embeddings=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with bench.device:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=DTYPES[scale.dtype], attn_implementation="sdpa")
    model.eval()
    kept: PreTrainedModel = model
    return kept


def make_cache(kind: str, model: PreTrainedModel, n_tokens: int, bench: Bench) -> Any:
    """Return one of the caches under comparison."""
    if kind == "vmem":
        return VmemCache(model.config, expected_tokens=n_tokens, open_driver=bench.opener)
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=n_tokens)


def _generate(model: Any, kind: str, tokens: torch.Tensor, n_new_tokens: int, bench: Bench) -> tuple[Row, torch.Tensor]:
    """Generate once; return what it took and the tokens."""
    bench.settle()
    bench.reset_peak()
    before = bench.torch_bytes()
    cache = make_cache(kind, model, tokens.shape[1] + n_new_tokens, bench)
    times = TokenTimes()
    bench.clock.synchronize()
    began = time.perf_counter()
    with torch.inference_mode():
        output: Any = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            past_key_values=cache,
            max_new_tokens=n_new_tokens,
            min_new_tokens=n_new_tokens,
            do_sample=False,
            streamer=times,
            disable_compile=True,
        )
    bench.clock.synchronize()
    first, last = times.seconds[1], times.seconds[-1]
    n_steps = len(times.seconds) - 2
    row: Row = {
        "prefill_ms": (first - began) * 1e3,
        "decode_tokens_per_s": tokens.shape[0] * n_steps / (last - first),
        "torch_peak_bytes": None,
        "pages_bytes": None,
        "peak_bytes": None,
    }
    if kind == "vmem":
        stats = cache.stats()
        row["pages_bytes"] = stats.n_peak_owned_pages * stats.page_bytes
        cache.close()
    after = bench.torch_bytes()
    if before is not None and after is not None:
        # What generate and its cache needed beyond the model: tensors of torch's own, and our pages.
        row["torch_peak_bytes"] = after[1] - before[0]
        row["peak_bytes"] = row["torch_peak_bytes"] + (row["pages_bytes"] or 0)
    return row, output.cpu()
