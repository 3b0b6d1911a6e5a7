"""How a generation is shown: the streamed text, the table, the JSON object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table
from transformers import PreTrainedTokenizerBase, TextStreamer
from transformers.generation.streamers import BaseStreamer

from vmem_kv.cli.comparison import n_common_tokens
from vmem_kv.cli.memory_trace import Trace
from vmem_kv.units import format_bytes


class _ConsoleStreamer(TextStreamer):  # type: ignore[misc]  # its base is not annotated
    """Print words as they are finished."""

    def __init__(self, console: Console, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._console = console

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print what will not change any more."""
        end = "\n" if stream_end else ""
        self._console.print(text, end=end, markup=False, highlight=False, emoji=False, soft_wrap=True)


def console_streamer(console: Console, tokenizer: PreTrainedTokenizerBase) -> BaseStreamer:
    """Return a streamer that prints the text, without the prompt, as it comes."""
    return _ConsoleStreamer(console, tokenizer)


class ProgressStreamer(BaseStreamer):  # type: ignore[misc]  # its base is not annotated
    """Advance a bar by one for every new token."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task
        self._n_calls = 0

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt (the first call) or a new token."""
        self._progress.update(self._task, completed=self._n_calls)
        self._n_calls += 1

    def end(self) -> None:
        """Nothing is held back."""


def print_report(console: Console, traces: Sequence[Trace], skipped: Sequence[str], facts: Mapping[str, Any]) -> None:
    """Print one row per cache, then what is to be said about them."""
    ours = traces[0]
    title = (
        f"{facts['model']}, {facts['dtype']}, attention {facts['attention']}: "
        f"{facts['n_prompt_tokens']:,} prompt tokens, {len(ours.token_ids):,} new"
    )
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    if any(trace.cache_name == "DynamicCache" for trace in traces):
        table.caption = "Not counted: the layer's K or V that DynamicCache holds twice while it appends a token."
        table.caption_justify = "left"
    table.add_column("KV cache", no_wrap=True)
    for heading in ("tokens/s", "first\ntoken", "virtual\nreserved", "physical\npeak", "live\nbytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    for trace in traces:
        last = trace.memory[-1]
        speed = trace.decode_tokens_per_s
        table.add_row(
            trace.cache_name,
            f"{speed:.1f}" if speed else "-",
            f"{trace.first_token_s:.2f} s",
            format_bytes(last.virtual_bytes),
            format_bytes(trace.peak_bytes),
            format_bytes(last.live_bytes),
        )
    console.print()
    console.print(table)
    for line in (*_agreement(traces), *skipped, f"Layout: {ours.explanation}"):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _agreement(traces: Sequence[Trace]) -> list[str]:
    ours, others = traces[0], traces[1:]
    lines = []
    same = [other.cache_name for other in others if other.token_ids == ours.token_ids]
    if same:
        lines.append(f"Tokens: the same with {' and '.join(same)}.")
    for other in others:
        if other.token_ids != ours.token_ids:
            n_common = n_common_tokens(ours, other)
            lines.append(f"Tokens: with {other.cache_name} the same up to token {n_common:,}, then others (rounding).")
    return lines


def as_data(
    traces: Sequence[Trace], skipped: Sequence[str], facts: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Return everything that the table says, and the text, as plain data."""
    ours = traces[0]
    return {
        **facts,
        "n_new_tokens": len(ours.token_ids),
        "n_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "text": tokenizer.decode(ours.token_ids, skip_special_tokens=True),
        "layout": ours.explanation,
        "skipped": list(skipped),
        "caches": [
            {
                "cache": trace.cache_name,
                "decode_tokens_per_s": trace.decode_tokens_per_s,
                "first_token_s": trace.first_token_s,
                "virtual_bytes": trace.memory[-1].virtual_bytes,
                "peak_physical_bytes": trace.peak_bytes,
                "live_bytes": trace.memory[-1].live_bytes,
                "same_tokens": trace.token_ids == ours.token_ids,
            }
            for trace in traces
        ],
    }
