"""What one engine did with one workload: a token's time, one after another, and the memory of K and V. No dependencies.

    log = Log(workload, token_bytes)     the clock starts
    log.tokens(index, token_ids)         as they are given out
    log.memory(taken, needed)            as often as the engine likes, at least once a step
    log.summary()                        figures and a short timeline, as plain data

All engines are judged by this one file. `live` is what the tokens take that an engine has computed, counted alike for
all of them: prompt and answer of every request from its first token to its last.
"""

from __future__ import annotations

import hashlib
import math
import resource
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from benchmarks.serving_workload import Workload

N_TIMELINE_POINTS = 120


class Log:
    """See this file's first lines.

    Args:
        workload: What is served. Its arrivals count from now.
        token_bytes: What one token takes in K and V, over all layers.
    """

    def __init__(self, workload: Workload, token_bytes: int) -> None:
        self._asks = workload.asks
        self._token_bytes = token_bytes
        self._token_ids: list[list[int]] = [[] for _ in workload.asks]
        self._times: list[list[float]] = [[] for _ in workload.asks]
        self._memory: list[tuple[float, int, int | None]] = []
        self._cpu_s = _cpu_s()
        self._began_s = time.perf_counter()

    @property
    def now_s(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self._began_s

    def has_arrived(self, index: int) -> bool:
        """Whether a request's time has come."""
        return self._asks[index].arrival_s <= self.now_s

    def wait_for(self, index: int) -> None:
        """Sleep until a request's time comes."""
        time.sleep(max(0.0, self._asks[index].arrival_s - self.now_s))

    def tokens(self, index: int, token_ids: Sequence[int], at_s: float | None = None) -> None:
        """Take note of new tokens of one answer; those beyond the wanted number do not count.

        Args:
            index: Of the request in the workload.
            token_ids: In order.
            at_s: When, by `time.perf_counter`; now if None.
        """
        now = (time.perf_counter() if at_s is None else at_s) - self._began_s
        wanted = token_ids[: self._asks[index].n_output - len(self._token_ids[index])]
        self._token_ids[index] += wanted
        self._times[index] += [now] * len(wanted)

    def memory(self, taken_bytes: int, needed_bytes: int | None = None) -> None:
        """Take note of memory: what is set aside for K and V now, and what the live tokens need in whole pages."""
        self._memory.append((self.now_s, taken_bytes, needed_bytes))

    def summary(self) -> dict[str, Any]:
        """Return what was measured.

        Raises:
            RuntimeError: An answer is shorter than it was to be; then nothing here means anything.
        """
        wall_s, cpu_s = max(times[-1] for times in self._times if times), _cpu_s() - self._cpu_s
        for index, (ask, token_ids) in enumerate(zip(self._asks, self._token_ids, strict=True)):
            if len(token_ids) != ask.n_output:
                raise RuntimeError(f"answer {index} has {len(token_ids)} tokens, {ask.n_output} were asked for")
        n_tokens = sum(map(len, self._token_ids))
        first = [times[0] - ask.arrival_s for ask, times in zip(self._asks, self._times, strict=True)]
        between = [after - before for times in self._times for before, after in pairwise(times)]
        needed = [n for _, _, n in self._memory if n is not None]
        live = [n for _, n in self._live()]
        return {
            "wall_s": wall_s,
            "cpu_s": cpu_s,
            "n_tokens": n_tokens,
            "tokens_per_s": n_tokens / wall_s,
            "tokens_per_cpu_s": n_tokens / cpu_s,
            "first_token_s": _quantiles(first),
            "between_tokens_s": _quantiles(between),
            "peak_kv_bytes": max(n for _, n, _ in self._memory),
            "peak_needed_kv_bytes": max(needed) if needed else None,
            "peak_live_kv_bytes": max(live),
            "timeline": self._timeline(),
            "answers": [hashlib.sha256(repr(ids).encode()).hexdigest()[:16] for ids in self._token_ids],
        }

    def _live(self) -> list[tuple[float, int]]:
        """Return (time, live bytes) at each change."""
        changes: list[tuple[float, int]] = []
        for ask, times in zip(self._asks, self._times, strict=True):
            changes.append((times[0], len(ask.prompt)))
            changes += [(at, 1) for at in times[1:]]
            changes.append((math.nextafter(times[-1], math.inf), -len(ask.prompt) - len(times) + 1))
        live, points = 0, []
        for at, change in sorted(changes):
            live += change
            points.append((at, live * self._token_bytes))
        return points

    def _timeline(self) -> list[dict[str, float]]:
        """Return a few moments: tokens given out so far, K and V set aside, needed, and live."""
        times = sorted(at for times in self._times for at in times)
        live, memory = self._live(), self._memory
        points = []
        n_given = i_live = i_memory = 0
        for step in range(N_TIMELINE_POINTS + 1):
            at = times[-1] * step / N_TIMELINE_POINTS
            while n_given < len(times) and times[n_given] <= at:
                n_given += 1
            while i_live < len(live) and live[i_live][0] <= at:
                i_live += 1
            while i_memory < len(memory) and memory[i_memory][0] <= at:
                i_memory += 1
            taken = memory[i_memory - 1][1] if i_memory else 0
            points.append(
                {
                    "at_s": round(at, 4),
                    "n_tokens": n_given,
                    "kv_bytes": taken,
                    "live_kv_bytes": live[i_live - 1][1] if i_live else 0,
                }
            )
        return points


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    if not ordered:
        return {"p50": math.nan, "p99": math.nan}
    return {name: ordered[min(len(ordered) - 1, int(q * len(ordered)))] for name, q in (("p50", 0.5), ("p99", 0.99))}


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
