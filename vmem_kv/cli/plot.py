"""The picture of `vmem-kv generate --plot`: what each cache holds while the text grows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from vmem_kv.cli.memory_trace import Trace
from vmem_kv.units import MIB


def draw_memory(path: Path, traces: Sequence[Trace], n_prompt_tokens: int) -> None:
    """Draw the physical memory of each cache over the tokens in it, and the live bytes of the first."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for trace in traces:
        n_tokens = range(n_prompt_tokens, n_prompt_tokens + len(trace.memory))
        axes.plot(
            n_tokens, [m.physical_bytes / MIB for m in trace.memory], label=trace.cache_name, drawstyle="steps-post"
        )
    live = [m.live_bytes / MIB for m in traces[0].memory]
    axes.plot(range(n_prompt_tokens, n_prompt_tokens + len(live)), live, "k:", label="live bytes")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("tokens in the cache")
    axes.set_ylabel("physical memory of the KV cache, MiB")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
