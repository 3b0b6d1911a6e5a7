"""What the kernel says about this process: resident memory, its peak, page faults."""

from __future__ import annotations

import ctypes
import gc
import resource
from pathlib import Path

_libc = ctypes.CDLL(None)


def settle() -> None:
    """Give back what died, to the system too, so that every measurement starts from the same state."""
    gc.collect()
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


def reset_peak() -> bool:
    """Let the peak of resident memory start anew; False where the kernel does not let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident_bytes() -> int:
    """Resident memory now: private, file and shared pages alike."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """The most resident memory since `reset_peak`."""
    return _status("VmHWM")


def minor_faults() -> int:
    """Page faults of this process so far that needed no disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0
