"""The command: which parts, where to write, how long; then one part after the other."""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.gpu.cases import Part
from benchmarks.gpu.plan import choose_plan
from benchmarks.gpu.results import Results
from benchmarks.gpu.runner import ROOT, run_part

PARTS = (
    Part("facts", "1. Facts about the driver", "benchmarks.gpu.facts", 0.10),
    Part("correctness", "2. Correctness", "benchmarks.gpu.correctness", 0.24),
    Part("speed", "3. Speed of kernels", "benchmarks.gpu.speed", 0.30),
    Part("interference", "4. Interference of mapping with running kernels", "benchmarks.gpu.interference", 0.15),
    Part("generate", "5. transformers' generate", "benchmarks.gpu.generation", 0.21),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite; return 0 when it came to its end, whatever the parts found, and 2 where there is no device."""
    options = _parse(arguments)
    if not options.emulate and (missing := missing_device()):
        print(f"{missing}; --emulate runs the same without a GPU", file=sys.stderr)
        return 2
    plan = choose_plan(emulate=options.emulate, quick=options.quick)
    stem = "gpu-emulated" if options.emulate else "gpu"
    run = _describe_run(options)
    results = Results(options.out, stem, run, is_emulated=options.emulate)
    signal.signal(signal.SIGTERM, _interrupt)
    parts = [part for part in PARTS if part.name in options.parts]
    began = time.monotonic()
    budget_s = options.budget or plan.budget_s
    for index, part in enumerate(parts):
        # What a part leaves over, the later ones share.
        left = budget_s - (time.monotonic() - began)
        share = left * part.weight / sum(p.weight for p in parts[index:])
        print(f"[{time.monotonic() - began:5.0f} s] {part.title} (at most {share:.0f} s)", flush=True)
        results.begin(part)
        part_began = time.monotonic()
        try:
            run_part(part, results, emulate=options.emulate, quick=options.quick, budget_s=share)
            results.end(part, time.monotonic() - part_began)
        finally:
            run["seconds"] = round(time.monotonic() - began, 1)
            results.save(now=True)
    print(f"\n{results.to_markdown()}\n{results.json_path}\n{results.markdown_path}", flush=True)
    return 0


def missing_device() -> str | None:
    """Say what is missing on this machine, without touching the device."""
    for package in ("torch", "cuda.bindings"):
        if _version(package.replace(".", "-")) is None and importlib.util.find_spec(package.partition(".")[0]) is None:
            return f"{package} is not installed"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver: libcuda.so.1 was not found"
    return None


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
    add("--budget", type=float, metavar="SECONDS", help="for everything together")
    options = parser.parse_args(arguments)
    options.parts = options.parts.split(",")
    if unknown := [name for name in options.parts if name not in names]:
        parser.error(f"unknown parts {', '.join(unknown)}; choose from {', '.join(names)}")
    if options.out is None:
        options.out = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    return options


def _describe_run(options: argparse.Namespace) -> dict[str, Any]:
    """What somebody needs who wants to run the same again; the facts about the device are found out by part 1."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "commit": _output("git", "rev-parse", "HEAD") or "unknown (not a git checkout)",
        "has_uncommitted_changes": bool(
            _output("git", "status", "--porcelain", "--", "vmem_kv", "native", "benchmarks")
        ),
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
