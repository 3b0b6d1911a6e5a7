"""What the dashboard shows: the slots as they are, and ten minutes of the past.

Guarantees: the past is bounded, and sampled once a second whoever looks.
"""

from __future__ import annotations

import asyncio
from collections import deque
from functools import cache
from importlib.resources import files
from time import monotonic
from typing import Any

from starlette.responses import HTMLResponse, Response

from vmem_kv.engine.stats import EngineStats
from vmem_kv.engine.tier_stats import TierFigures
from vmem_kv.server.metrics import Metrics
from vmem_kv.server.readiness import readiness
from vmem_kv.server.service import Service

N_SAMPLES = 600
SAMPLE_S = 1.0
_CONTENT_SECURITY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; "  # the icon
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class History:
    """Samples of the last `N_SAMPLES` seconds.

    Args:
        metrics: Where times to first token come from.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._samples: deque[dict[str, Any]] = deque(maxlen=N_SAMPLES)
        self._before: tuple[float, EngineStats] | None = None

    def samples(self) -> list[dict[str, Any]]:
        """Return them, oldest first."""
        return list(self._samples)

    def add(self, stats: EngineStats, now_s: float) -> None:
        """Take a sample; rates are since the one before."""
        before_s, before = self._before or (now_s - SAMPLE_S, stats)
        self._before = (now_s, stats)
        passed_s = max(now_s - before_s, 1e-3)
        taken = [self._metrics.recent_first_token_s.popleft() for _ in range(len(self._metrics.recent_first_token_s))]
        n_calls, n_calls_before = (sum(s.cache.driver_calls.values()) for s in (stats, before))
        self._samples.append(
            {
                "t_s": round(now_s, 3),
                "n_running": stats.n_running,
                "n_waiting": stats.n_waiting,
                "generated_tokens_per_s": (stats.n_generated_tokens - before.n_generated_tokens) / passed_s,
                "prompt_tokens_per_s": (stats.n_prompt_tokens - before.n_prompt_tokens) / passed_s,
                "cached_tokens_per_s": (_n_hit_tokens(stats) - _n_hit_tokens(before)) / passed_s,
                "first_token_s": sum(taken) / len(taken) if taken else None,
                "n_live_pages": stats.n_pages_by_state["live"],
                "n_cached_pages": stats.n_pages_by_state["cached"],
                "n_warm_pages": stats.cache.n_warm_pages,
                "n_free_pages": stats.cache.n_free_pages,
                "driver_calls_per_s": (n_calls - n_calls_before) / passed_s,
            }
        )


async def keep_history(service: Service, history: History) -> None:
    """Sample the engine until cancelled."""
    while True:
        history.add(await asyncio.to_thread(service.engine.snapshot), monotonic())
        await asyncio.sleep(SAMPLE_S)


def dashboard_data(service: Service, history: History) -> dict[str, Any]:
    """Return everything that the page draws. Takes a snapshot: call it outside the event loop."""
    stats = service.engine.snapshot()
    cache_stats = stats.cache
    return {
        "model": service.model_name,
        "ready": readiness(service.engine, service.limits.silent_s).as_data(),
        "max_model_len": stats.max_model_len,
        "token_bytes": stats.token_bytes,
        "page_bytes": stats.page_bytes,
        "span_bytes": cache_stats.virtual_bytes // max(1, len(stats.slots)),
        "slots": [
            {
                "state": "cached" if slot_id in stats.cached_slots else s.state,
                "mapped_bytes": s.n_mapped_pages * stats.page_bytes,
                "n_tokens": s.n_tokens,
            }
            for slot_id, s in enumerate(stats.slots)
        ],
        "pages": {state: n for state, n in stats.n_pages_by_state.items() if state != "elsewhere"},
        "hit_share": stats.hit_share,
        "max_pages": cache_stats.max_pages,
        "peak_pages": cache_stats.n_peak_owned_pages,
        "virtual_bytes": cache_stats.virtual_bytes,
        "mapped_bytes": cache_stats.mapped_bytes,
        "live_bytes": stats.live_bytes,
        "n_running": stats.n_running,
        "max_running": service.engine.engine.config.max_num_seqs,
        "n_preempted": stats.n_preempted,
        "tiers": None if stats.tiers is None else _tier_data(stats.tiers),
        "n_steps": stats.n_steps,
        "n_generated_tokens": stats.n_generated_tokens,
        "driver_calls": dict(cache_stats.driver_calls),
        "sample_s": SAMPLE_S,
        "samples": history.samples(),
    }


def _tier_data(tiers: TierFigures) -> dict[str, Any]:
    return {
        "n_sessions": tiers.n_sessions_by_tier,
        "host_bytes": tiers.host.taken_bytes,
        "max_host_bytes": tiers.host.max_bytes,
        "disk_bytes": tiers.disk_bytes,
        "max_disk_bytes": tiers.max_disk_bytes,
        "n_parked": tiers.n_parked,
        "n_restored": tiers.n_restored,
    }


def _n_hit_tokens(stats: EngineStats) -> int:
    return 0 if stats.prefixes is None else stats.prefixes.n_hit_tokens


def dashboard_page() -> Response:
    """Return the page: one file that loads nothing else."""
    return HTMLResponse(
        _page(),
        headers={
            "Content-Security-Policy": _CONTENT_SECURITY,
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
        },
    )


@cache
def _page() -> str:
    return files("vmem_kv.server").joinpath("dashboard.html").read_text("utf-8")
