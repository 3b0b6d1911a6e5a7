"""The command: which parts, where to write, how long; then one part after the other."""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.gpu.cases import Part
from benchmarks.gpu.emulator import PATH_VARIABLE, built_emulator
from benchmarks.gpu.plan import choose_plan
from benchmarks.gpu.preflight import missing_device
from benchmarks.gpu.results import Results
from benchmarks.gpu.runner import ALL, BUDGET, ROOT, run_part
from benchmarks.gpu.summary import bad_rows, summarise
from vmem_kv.errors import ConfigError

PARTS = (
    Part("facts", "1. Facts about the driver", "benchmarks.gpu.facts", 0.10),
    Part("correctness", "2. Correctness", "benchmarks.gpu.correctness", 0.24),
    Part("speed", "3. Speed of kernels", "benchmarks.gpu.speed", 0.30),
    Part("interference", "4. Interference of mapping with running kernels", "benchmarks.gpu.interference", 0.15),
    Part("generate", "5. transformers' generate", "benchmarks.gpu.generation", 0.21),
)


COMMIT_VARIABLE = "VMEM_KV_COMMIT"
_LEAST_S = 20.0
"""With less left than this, cases that were skipped are not tried again."""
_SOURCES = ("vmem_kv", "native", "benchmarks")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite.

    Returns:
        0 where it found nothing wrong, 1 where it did (the last lines say what), 2 where nothing can be measured here.
    """
    options = _parse(arguments)
    if not options.emulate and (missing := missing_device()):
        print(f"no CUDA device can be used: {missing}; --emulate runs the same without a GPU", file=sys.stderr)
        return 2
    try:
        with built_emulator() if options.emulate else nullcontext() as emulator:
            if emulator is not None:
                os.environ[PATH_VARIABLE] = str(emulator)
            return _run(options)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    plan = choose_plan(emulate=options.emulate, quick=options.quick)
    stem = "gpu-emulated" if options.emulate else "gpu"
    run = _describe_run(options)
    results = Results(options.out, stem, run, is_emulated=options.emulate)
    signal.signal(signal.SIGTERM, _interrupt)
    parts = [part for part in PARTS if part.name in options.parts]
    began = time.monotonic()
    ends = began + (options.budget or plan.budget_s)

    def run_cases(part: Part, seconds: float, only: list[str] | None = None) -> None:
        part_began = time.monotonic()
        again = f", {len(only)} cases that were skipped" if only is not None else ""
        print(f"[{part_began - began:5.0f} s] {part.title}{again} (at most {seconds:.0f} s)", flush=True)
        try:
            run_part(part, results, emulate=options.emulate, quick=options.quick, budget_s=seconds, only=only)
            results.end(part, time.monotonic() - part_began)
        finally:
            run["seconds"] = round(time.monotonic() - began, 1)
            results.save(now=True)

    for index, part in enumerate(parts):
        results.begin(part)
        # What a part leaves over, the later ones share.
        left = ends - time.monotonic()
        run_cases(part, left * part.weight / sum(p.weight for p in parts[index:]))
    for part in parts:  # and what the last one leaves over, what had been skipped
        if (left := ends - time.monotonic()) > _LEAST_S and (names := results.take_skipped(part, BUDGET)):
            run_cases(part, left, None if ALL in names else names)
    if options.tables or options.emulate:
        print(f"\n{results.to_markdown()}")
    print("\n".join(["", *summarise(results), str(results.json_path), str(results.markdown_path)]), flush=True)
    return 1 if bad_rows(results) else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu/run.py",
        description="Find out what the CUDA path does and costs on this machine. Writes JSON, Markdown and a log.",
    )
    add = parser.add_argument
    add("--emulate", action="store_true", help="on the emulated driver, with CPU tensors; its times mean nothing")
    add("--parts", metavar="NAMES", default=",".join(names), help=f"some of {','.join(names)}")
    add("--out", type=Path, metavar="DIR", help="where to write; default: $OUT, else benchmarks/results")
    add("--quick", action="store_true", help="the smallest grid of every part")
    add("--tables", action="store_true", help="print every table before the summary, as --emulate does")
    add("--commit", help=f"what is measured, where there is no git; default: ${COMMIT_VARIABLE}, else what git says")
    add("--budget", type=float, metavar="SECONDS", help="for everything together")
    options = parser.parse_args(arguments)
    options.parts = options.parts.split(",")
    if unknown := [name for name in options.parts if name not in names]:
        parser.error(f"unknown parts {', '.join(unknown)}; choose from {', '.join(names)}")
    options.commit = options.commit or os.environ.get(COMMIT_VARIABLE)
    if options.out is None:
        options.out = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    return options


def _describe_run(options: argparse.Namespace) -> dict[str, Any]:
    """What somebody needs who wants to run the same again; the facts about the device are found out by part 1."""
    changes = _output("git", "status", "--porcelain", "--", *_SOURCES)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "commit": options.commit or _output("git", "rev-parse", "HEAD") or "unknown (not a git checkout)",
        "has_uncommitted_changes": None if changes is None else bool(changes),
        "sources_sha256": hash_sources(ROOT),
        "device": "emulated" if options.emulate else _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"),
        "kernel_driver": None
        if options.emulate
        else _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "cuda_bindings": _version("cuda-bindings"),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "n_cpus": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
    }


def hash_sources(root: Path) -> str:
    """Return one SHA-256 over the names and the contents of the sources: which code it was, whatever git knows."""
    total = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".c", ".h", ".json") and "results" not in path.relative_to(root).parts:
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                total.update(f"{path.relative_to(root)} {digest}\n".encode())
    return total.hexdigest()


def _output(*words: str) -> str | None:
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End as on Ctrl-C, so that workers are ended and results are written."""
    raise KeyboardInterrupt
