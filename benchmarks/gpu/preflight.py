"""Whether a CUDA device works here at all: `python -m benchmarks.gpu.preflight`, in a process of its own.

It does once what every worker will do: loads torch and transformers, starts the driver and launches a kernel. So what
is missing is said in one sentence, before anything is measured, and the first measurement finds warm files. It writes
one line of JSON, the last of its output: null, or what is missing. A process that dies is an answer as well.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

TIMEOUT_S = 180.0
_ROOT = Path(__file__).resolve().parents[2]


def find_missing() -> str | None:
    """Return what is missing in this process, in one sentence."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed; pip install torch"

    import torch

    from vmem_kv.devices import open_driver
    from vmem_kv.driver.cuda import describe_cuda
    from vmem_kv.errors import VmemError

    try:
        machine = describe_cuda()
        if not machine.devices:
            return "the NVIDIA driver sees no device; check CUDA_VISIBLE_DEVICES"
        first = machine.devices[0]
        if not first.has_virtual_memory:
            return f"{first.name} has no virtual memory management, which vmem_kv is built on; use another GPU"
        if not torch.cuda.is_available():
            built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
            return f"torch {torch.__version__}, {built}, cannot use {first.name}; install a build that fits the driver"
        open_driver(torch.device("cuda", 0)).close()
    except VmemError as error:
        return str(error)
    try:
        total = float(torch.ones(1000, device="cuda:0").sum())
    except RuntimeError as error:
        return f"the first kernel failed: {error}"
    if total != 1000.0:
        return f"the first kernel summed 1000 ones to {total}"
    if importlib.util.find_spec("transformers") is not None:
        importlib.import_module("transformers")
    return None


def missing_device() -> str | None:
    """Return what is missing on this machine, found out in a process of its own; None where a device works."""
    command = [sys.executable, "-m", "benchmarks.gpu.preflight"]
    try:
        done = subprocess.run(
            command, cwd=_ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return f"the first use of the device did not end in {TIMEOUT_S:g} s; check nvidia-smi"
    return read_answer(done.returncode, done.stdout, done.stderr)


def read_answer(status: int, output: str, errors: str) -> str | None:
    """Return what a preflight that ended so found missing."""
    lines = output.splitlines()
    if status == 0 and lines:
        answer = json.loads(lines[-1])
        return None if answer is None else str(answer)
    last = next((line for line in reversed(errors.splitlines()) if line.strip()), "no last words")
    return f"the first use of the device ended its process (status {status}): {last.strip()}"


if __name__ == "__main__":
    print(json.dumps(find_missing()))
