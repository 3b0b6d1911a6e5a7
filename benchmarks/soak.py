"""A server under mixed traffic for a long time: does anything differ, fail or grow?

    python -m benchmarks.soak [MODEL] --minutes 30 --json benchmarks/results/soak.json

`vmem-kv serve` runs in a process of its own, with a pool that is too small for its slots, and is watched from outside.
Clients (soak_traffic.py) ask well and badly, leave, stop reading, send half a request, and come all at once. Every good
answer is compared with what the same request answered alone. After a warm-up, and at the end, the traffic pauses until
the server is idle: these two looks are compared.

The verdict is the exit status: 0 where every check holds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks.records import ROOT, describe_run, write_json
from benchmarks.soak_traffic import Tally, Traffic

MIB = 1 << 20
MAX_GROWTH_BYTES = 16 * MIB
SAMPLE_S = 5.0
START_S = 300.0
IDLE_S = 120.0
N_SAME = 5
_CODE = "from vmem_kv.cli import main; main()"


@dataclass(frozen=True, slots=True)
class Look:
    """What an idle server holds.

    Attributes:
        resident_bytes: Its memory, the cache's pages included.
        n_threads: Its threads.
        n_files: Its open descriptors.
        n_live_pages: Pages that belong to a sequence.
        n_quarantined_pages: Pages that could not be given back.
    """

    resident_bytes: int
    n_threads: int
    n_files: int
    n_live_pages: int
    n_quarantined_pages: int


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must hold."""

    what: str
    value: float
    most: float

    @property
    def holds(self) -> bool:
        """Whether it does."""
        return self.value <= self.most


def judge(tally: Tally, before: Look, after: Look, exit_code: int, n_error_lines: int) -> list[Check]:
    """Return every check with what was found.

    Args:
        tally: Of the traffic.
        before: The server after the warm-up.
        after: The server at the end.
        exit_code: Of the server.
        n_error_lines: Lines of its log that report an error.
    """
    n_failed = sum(n for status, n in tally.n_of_status.items() if status >= 500)
    return [
        Check("responses with a 5xx status", n_failed, 0),
        Check("findings: a wrong status, another text, a lost connection", tally.n_findings, 0),
        Check(
            "growth of resident memory, MiB",
            (after.resident_bytes - before.resident_bytes) / MIB,
            MAX_GROWTH_BYTES / MIB,
        ),
        Check("threads more than after the warm-up", after.n_threads - before.n_threads, 0),
        Check("descriptors more than after the warm-up", after.n_files - before.n_files, 0),
        Check("pages of no sequence that are still live", after.n_live_pages, 0),
        Check("pages lost to quarantine", after.n_quarantined_pages, 0),
        Check("error lines in the log", n_error_lines, 0),
        Check("exit status of the server", abs(exit_code), 0),
    ]


def slope_per_hour(samples: Sequence[tuple[float, float]]) -> float:
    """Return the median of the slopes of all pairs of samples (seconds, value), per hour: outliers do not count."""
    thinned = samples[:: max(1, len(samples) // 300)]
    slopes = [(v2 - v1) / (t2 - t1) for i, (t1, v1) in enumerate(thinned) for t2, v2 in thinned[i + 1 :] if t2 > t1]
    return 3_600 * statistics.median(slopes) if slopes else 0.0


class ServerProcess:
    """A running `vmem-kv serve`, seen from outside."""

    def __init__(self, process: subprocess.Popen[str], url: str, log: Log) -> None:
        self.process = process
        self.url = url
        self.log = log

    def resident_bytes(self) -> int:
        """Resident memory now."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) * 1024  # type: ignore[index]

    def n_threads(self) -> int:
        """Its threads now."""
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def look(self, before: Look | None = None) -> Look:
        """Wait until the server is idle and holds no more than before; say what it holds then, or after `IDLE_S`.

        A connection that a client has left stays open until the server notices, which may take it some seconds. Idle is
        what looks so twice in a row: a sequence that is just starting neither runs nor waits for a moment.
        """
        end_s = time.monotonic() + IDLE_S
        n_idle = 0
        while True:
            numbers = self._metrics()
            now = self._look(numbers)
            n_idle = 0 if numbers["running_sequences"] or numbers["waiting_sequences"] else n_idle + 1
            has_more = before is not None and (now.n_files > before.n_files or now.n_threads > before.n_threads)
            if (n_idle > 1 and not has_more) or time.monotonic() > end_s:
                return now
            time.sleep(0.5)

    def _look(self, numbers: dict[str, float]) -> Look:
        return Look(
            self.resident_bytes(),
            self.n_threads(),
            len(os.listdir(f"/proc/{self.process.pid}/fd")),
            int(numbers['pages{state="live"}']),
            int(numbers['pages{state="quarantined"}']),
        )

    def counters(self) -> dict[str, float]:
        """Return what the server counted."""
        return {k: v for k, v in self._metrics().items() if k.endswith("_total") and "{" not in k}

    def stop(self) -> int:
        """End it as an operator does; return its exit status."""
        self.process.terminate()
        return self.process.wait(60)

    def _metrics(self) -> dict[str, float]:
        text = httpx.get(f"{self.url}/metrics", trust_env=False, timeout=30).text
        lines = (line.rpartition(" ") for line in text.splitlines() if line.startswith("vmem_kv_"))
        return {name.removeprefix("vmem_kv_"): float(value) for name, _, value in lines}


class Log:
    """Reads a server's standard error: its address, and how many lines report an error. Keeps only these."""

    def __init__(self) -> None:
        self.url = ""
        self.is_up = threading.Event()
        self.error_lines: list[str] = []
        self.n_lines = 0

    def read(self, lines: Iterator[str]) -> None:
        """Read until the server ends."""
        for line in lines:
            self.n_lines += 1
            if found := re.search(r" is served at (\S+)/v1", line):
                self.url = found[1]
                self.is_up.set()
            elif not self.url or self._is_error(line):
                self.error_lines = [*self.error_lines[-20:], line]
        self.is_up.set()

    def after_start(self) -> None:
        """Forget what was said before the server was up: progress bars, mostly."""
        self.error_lines = []

    def _is_error(self, line: str) -> bool:
        try:
            return bool(json.loads(line)["level"] in ("error", "critical"))
        except (ValueError, KeyError, TypeError):
            return True  # whatever is no log line is a traceback


@contextlib.contextmanager
def serving(model: str | None, options: Sequence[str]) -> Iterator[ServerProcess]:
    """Run a server; it is killed at the end unless it has ended.

    Raises:
        RuntimeError: It did not start; the message has what it said.
    """
    words = [sys.executable, "-c", _CODE, "serve", *([model] if model else []), "--port", "0", *options]
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    log = Log()
    assert process.stderr is not None
    reader = threading.Thread(target=log.read, args=(process.stderr,))
    reader.start()
    try:
        log.is_up.wait(START_S)
        if not log.url:
            raise RuntimeError("the server did not start: " + "".join(log.error_lines))
        log.after_start()
        yield ServerProcess(process, log.url, log)
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stderr.close()


async def soak(server: ServerProcess, traffic: Traffic, options: argparse.Namespace) -> dict[str, Any]:
    """Run the traffic; return both looks and the samples between them."""
    total_s = options.minutes * 60
    warm_s = min(300.0, total_s / 5)
    async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as client:
        # More at once than ever will be, until the server's pool of threads grows no more: a pool starts a thread only
        # where no other one happens to be free.
        n_threads = n_same = 0
        while n_same < N_SAME:
            await asyncio.gather(*(client.get("/metrics") for _ in range(40)))
            n_before, n_threads = n_threads, server.n_threads()
            n_same = n_same + 1 if n_threads <= n_before else 0
    await traffic.pin()
    await traffic.meet_sizes(options.max_len)
    await traffic.run(warm_s, options.clients)
    before = await asyncio.to_thread(server.look)
    samples: list[tuple[float, float]] = []
    start_s = time.monotonic()

    async def sample() -> None:
        while True:
            samples.append((time.monotonic() - start_s, server.resident_bytes()))
            await asyncio.sleep(SAMPLE_S)

    sampling = asyncio.create_task(sample())
    await traffic.run(total_s - warm_s, options.clients)
    sampling.cancel()
    await asyncio.gather(sampling, return_exceptions=True)
    after = await asyncio.to_thread(server.look, before)
    return {"warm_up_s": warm_s, "before": before, "after": after, "samples": samples}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a soak; return 0 where every check holds."""
    options = _parse(arguments)
    console = Console()
    about = describe_run()
    serve_options = [
        *(
            "--max-seqs",
            str(options.max_seqs),
            "--max-queue",
            str(options.max_queue),
            "--max-len",
            str(options.max_len),
        ),
        *("--max-memory", options.max_memory, "--send-timeout", "5", "--grace", "10"),
        *(("--threads", str(options.threads)) if options.threads else ()),
    ]
    with serving(options.model, serve_options) as server:
        name = httpx.get(f"{server.url}/v1/models", trust_env=False).json()["data"][0]["id"]
        traffic = Traffic(server.url, name, options.seed, max_tokens=options.max_tokens, pause_s=options.pause)
        try:
            found = asyncio.run(soak(server, traffic, options))
            counters = server.counters()
        except (httpx.HTTPError, OSError) as error:
            console.print(f"the server cannot be reached any more: {error!r}", markup=False)
            console.print(f"its exit status: {server.process.poll()}; its log's errors:", markup=False)
            console.print("".join(server.log.error_lines), markup=False)
            console.print("\n".join(traffic.tally.findings), markup=False)
            return 1
        exit_code = server.stop()
    checks = judge(traffic.tally, found["before"], found["after"], exit_code, len(server.log.error_lines))
    _show(console, checks, traffic.tally, counters)
    if options.json:
        record = {
            "run": about,
            "model": name,
            "minutes": options.minutes,
            "serve_options": serve_options,
            "n_clients": options.clients,
            "warm_up_s": found["warm_up_s"],
            "passed": all(check.holds for check in checks),
            "checks": [{**asdict(check), "holds": check.holds} for check in checks],
            "traffic": traffic.tally.as_data(),
            "server_counters": counters,
            "after_warm_up": asdict(found["before"]),
            "at_the_end": asdict(found["after"]),
            "resident_slope_bytes_per_hour": slope_per_hour(found["samples"]),
            "resident_samples": [[round(t), round(v)] for t, v in found["samples"]],
            "error_lines": server.log.error_lines,
        }
        write_json(options.json, "soak", record)
    return 0 if all(check.holds for check in checks) else 1


def _show(console: Console, checks: Sequence[Check], tally: Tally, counters: dict[str, float]) -> None:
    table = Table(title="Soak")
    for heading in ("check", "found", "at most", "verdict"):
        table.add_column(heading)
    for check in checks:
        table.add_row(check.what, f"{check.value:g}", f"{check.most:g}", "holds" if check.holds else "[red]broken[/]")
    console.print(table)
    console.print(f"requests: {dict(tally.n_of_kind)}", markup=False)
    console.print(f"statuses: {dict(sorted(tally.n_of_status.items()))}; answers compared: {tally.n_compared}")
    console.print(f"preemptions: {counters.get('preemptions_total', 0):g}")
    for finding in tally.findings:
        console.print(finding, markup=False)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="as `vmem-kv serve` takes it (default: its own default)")
    parser.add_argument("--minutes", type=float, default=30.0, help="of traffic, warm-up included")
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--pause", type=float, default=0.2, help="seconds between two requests of a client, on average")
    parser.add_argument("--max-tokens", type=int, default=40, help="of the longest good answer")
    parser.add_argument("--max-seqs", type=int, default=8)
    parser.add_argument("--max-queue", type=int, default=24)
    parser.add_argument("--max-len", type=int, default=1_024)
    parser.add_argument("--max-memory", default="12m", help="the pool's budget: below what all slots together want")
    parser.add_argument("--threads", type=int, help="that torch computes with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the record there")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
