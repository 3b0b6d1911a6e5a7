"""The public traces, where they are: named by VMEM_KV_TRACES, or in `shared/traces` beside the checkout."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

import pytest

from vmem_kv.errors import ConfigError
from vmem_kv.replay.schedule import Replay
from vmem_kv.replay.study import SCHEMES, Setting
from vmem_kv.traces import find_shape, read_trace, scan_trace
from vmem_kv.traces.prefixes import unbounded_hits
from vmem_kv.units import GIB

FOLDER = Path(os.environ.get("VMEM_KV_TRACES") or Path(__file__).parents[3] / "shared" / "traces")
NO_TRACES = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"no traces in {FOLDER}; name their folder by VMEM_KV_TRACES"
)

ROWS = {
    # Requests, sum of prompt tokens, sum of output tokens.
    "azure2023_conv": (9683, 11_977_495, 2_148_721),
    "azure2023_code": (4409, 8_997_785, 121_331),
    "mooncake_conversation": (6015, 76_878_216, 2_085_843),
    "len_sharegpt_val10k": (5000, 1_263_463, 1_630_918),
    "servegen_r1_resampled": (52_355, 75_711_684, 81_271_477),
}


@NO_TRACES
@pytest.mark.parametrize("name", ROWS)
def test_public_traces_are_read_whole(name: str) -> None:
    summary = scan_trace(FOLDER / f"{name}.csv.gz")
    assert (summary.n_requests, summary.prompt_tokens, summary.output_tokens) == ROWS[name]
    assert summary.has_arrivals == (not name.startswith("len_"))
    assert summary.is_ascending


BOUNDS = {
    # In percent, as published with the traces.
    "mooncake_conversation": (512, 35.2),
    "mooncake_synthetic": (512, 33.8),
    "lmcache_miniswe": (16, 93.2),
    "lmcache_magagent": (16, 79.0),
    "sharegpt300_multiturn": (16, 4.7),
}


@NO_TRACES
@pytest.mark.parametrize("name", BOUNDS)
def test_what_could_be_shared_is_what_was_published(name: str) -> None:
    path = FOLDER / f"{name}.csv.gz"
    block_tokens, percent = BOUNDS[name]
    assert scan_trace(path).block_tokens == block_tokens
    n_prompt, n_cached = unbounded_hits(read_trace(path), block_tokens)
    assert 100 * n_cached / n_prompt == pytest.approx(percent, abs=0.051)


@NO_TRACES
def test_a_table_that_is_no_trace_is_told_from_one() -> None:
    with pytest.raises(ConfigError, match="no form known here"):
        scan_trace(FOLDER / "claude_code_weka_starts.csv")
    assert not scan_trace(FOLDER / "claude_code_weka.csv.gz").is_ascending


@NO_TRACES
@pytest.mark.parametrize("name", ["len_sharegpt_val10k", "azure2023_conv", "mooncake_conversation"])
def test_token_major_pages_fill_up_as_published(name: str) -> None:
    """The figure that PagedAttention published for itself, under full load: 96.3 %."""
    path = FOLDER / f"{name}.csv.gz"
    requests = list(islice(read_trace(path), 600))
    longest = max(r.prompt_tokens + r.output_tokens for r in requests)
    setting = Setting.for_trace(find_shape("llama-3-8b"), 40 * GIB, longest, 1024)
    memory = SCHEMES["vmem_kv token-major, 2 MiB"].open(setting)
    report = Replay(memory, requests, n_max_running=1024).run()
    assert report.counts.n_done == 600
    assert report.averages.live_of_active is not None
    assert report.averages.live_of_active >= 0.963
    memory.close()
