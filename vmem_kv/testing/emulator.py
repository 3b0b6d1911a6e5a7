"""The emulated CUDA driver: a `libcuda.so.1` over plain memory, for tests on machines without a GPU.

`load_emulator` loads the library built from `native/cuda_emulator/` by its explicit path; after that cuda-python
(`cuda.bindings.driver`) finds it instead of a driver. `Emulator` turns its knobs and reads its counts. Its pages are
memory of this process, aliases are the same memory, and touching an address without access is a real fault.

Guarantees: it never stands in for a real driver (it refuses where an NVIDIA device exists, or where another libcuda is
loaded already). Nobody finds it by accident: its file is called neither libcuda nor like a module, and loaded by
anyone but `load_emulator` it is inert: no call is found, and all fail. It is stricter than hardware: `rules()` lists
what it holds callers to, `violations()` who broke it.
It assumes that it is loaded before `cuda.bindings.driver` is used for the first time. There is one per process, so
`Emulator` objects share their state; `reset` brings it back to the beginning.
"""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from vmem_kv.errors import ConfigError, UsageError

ABI = 3
FILE = "cuda_emulator.library"  # as setup.py names it
SONAME = "libcuda.so.1"
SIGNS_OF_A_DEVICE = (
    *("dev/nvidiactl", "dev/nvidia0", "proc/driver/nvidia"),  # discrete cards
    "dev/dxg",  # Windows' devices under WSL2
    *("dev/nvhost-gpu", "dev/nvgpu"),  # Jetson
)
VIOLATION_CHARS = 240

UNKNOWN_NAME, BAD_VALUE, SOMETHING_LIVES, FORKED = 1, 2, 3, 4
MEMORY_BYTES, MAX_MAPPINGS, GRANULARITY, N_DEVICES, VIRTUAL_MEMORY, ZERO_NEW_PAGES, STICKY, PINNED_BYTES = range(8)
HANDLES, MAPPINGS, RESERVATIONS, STREAMS, EVENTS, CONTEXTS, PINNED, VIOLATIONS, UNFINISHED = range(9)


class Live(NamedTuple):
    """How many of each are live, on all devices together."""

    handles: int
    """Pieces of memory: created, and not yet both released and unmapped."""
    mappings: int
    reservations: int
    streams: int
    events: int
    contexts: int
    """Retains of primary contexts that were not released yet."""
    pinned: int = 0
    """Ranges of registered host memory."""


NOTHING = Live(0, 0, 0, 0, 0, 0)


class Emulator:
    """The controls of the loaded library. Thread safe. In a forked child they raise `UsageError`, and all counts are 0.

    A new one, and one that was reset: one device with 2 GiB, a granularity of 2 MiB, at most 30,000 accessible
    mappings, new pages full of 0xA5, all work done at once, no failures planned, cuInit not called.

    Args:
        library: The loaded library. Use `load_emulator`.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._lib = library
        text, size, u64, integer = ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint64, ctypes.c_int
        library.vmem_emulator_look_for_devices.argtypes = [text]
        library.vmem_emulator_call_name.argtypes = [size]
        library.vmem_emulator_call_name.restype = text
        library.vmem_emulator_rule.argtypes = [size]
        library.vmem_emulator_rule.restype = text
        library.vmem_emulator_fail.argtypes = [text, u64, integer, integer, integer]
        library.vmem_emulator_slow.argtypes = [text, u64]
        library.vmem_emulator_set.argtypes = [integer, u64]
        library.vmem_emulator_count.argtypes = [integer]
        library.vmem_emulator_count.restype = u64
        library.vmem_emulator_n_calls.argtypes = [size]
        library.vmem_emulator_n_calls.restype = u64
        library.vmem_emulator_violation.argtypes = [u64, text, size]
        library.vmem_emulator_hold.argtypes = [u64, integer, integer]
        library.vmem_emulator_capture.argtypes = [u64, integer, integer]
        library.vmem_emulator_use.argtypes = [u64, integer, u64, u64]
        library.vmem_emulator_stream.argtypes = [size]
        library.vmem_emulator_stream.restype = u64
        library.vmem_emulator_reset.argtypes = [integer]

    # What goes wrong

    def fail(self, call: str, code: int, nth: int = 1, and_on: bool = False, sticky: bool = False) -> None:
        """Let the ``nth`` call of ``call`` from now on fail with ``code`` and do nothing, and all behind it if asked.

        Replaces what was planned for that call before.

        Args:
            call: An entry point's name without a version suffix, e.g. ``"cuMemCreate"``.
            code: The CUresult to answer.
            nth: 1 is the next call.
            and_on: Whether all later calls of that name fail too.
            sticky: Whether from then on every call of any name answers ``code``, as `make_sticky` does.

        Raises:
            UsageError: There is no such entry point, or ``nth`` is not positive.
        """
        if nth < 1:
            raise UsageError(f"nth must be at least 1, the next call, not {nth}")
        self._check(self._lib.vmem_emulator_fail(call.encode(), nth, int(code), and_on, sticky), call)

    def succeed(self, call: str) -> None:
        """Forget what `fail` planned for ``call``."""
        self._check(self._lib.vmem_emulator_fail(call.encode(), 0, 0, False, False), call)

    def slow(self, call: str, microseconds: int) -> None:
        """Let each call of ``call`` take that much longer, without the driver's lock; 0 for no longer."""
        self._check(self._lib.vmem_emulator_slow(call.encode(), microseconds), call)

    def make_sticky(self, code: int) -> None:
        """Answer ``code`` to every call from now on, as after an illegal address (700); 0 ends it.

        Only the driver's version, the error texts and what says which context is current still work. Whoever waits for
        work gets ``code``.
        """
        self._set(STICKY, int(code))

    # What the machine is like

    def cap_memory(self, n_bytes: int) -> None:
        """Give each device that much memory. Above it cuMemCreate answers OUT_OF_MEMORY."""
        self._set(MEMORY_BYTES, n_bytes)

    def cap_mappings(self, n_mappings: int) -> None:
        """Allow that many accessible mappings. Above it cuMemSetAccess answers OUT_OF_MEMORY.

        Above 30,000 the system's limit (vm.max_map_count) may come first. Then cuMemUnmap may answer the same.
        """
        self._set(MAX_MAPPINGS, n_mappings)

    def cap_pinned(self, n_bytes: int) -> None:
        """Allow that much registered host memory. Above it cuMemHostRegister answers OUT_OF_MEMORY."""
        self._set(PINNED_BYTES, n_bytes)

    def set_granularity(self, n_bytes: int) -> None:
        """Set the granularity: a power of two, at least the system's page size.

        Raises:
            UsageError: Another size, or something is live.
        """
        self._set(GRANULARITY, n_bytes)

    def set_n_devices(self, n_devices: int) -> None:
        """Set the number of devices: 0 (cuInit answers NO_DEVICE) to 8.

        Raises:
            UsageError: Another number, or something is live.
        """
        self._set(N_DEVICES, n_devices)

    def support_virtual_memory(self, supported: bool) -> None:
        """Say whether devices support virtual memory management; where not, its calls answer NOT_SUPPORTED."""
        self._set(VIRTUAL_MEMORY, supported)

    def zero_new_pages(self, zero: bool) -> None:
        """Fill pages created from now on with zeros, or with 0xA5."""
        self._set(ZERO_NEW_PAGES, zero)

    # Streams

    def hold(self, stream: int = 0, device: int = 0) -> None:
        """Let work queue up on a stream instead of running.

        Args:
            stream: The stream's number, ``int(CUstream)``; 0 is the default stream of ``device``.
            device: Counts for the default stream only.

        Raises:
            UsageError: There is no such stream.
        """
        self._check(self._lib.vmem_emulator_hold(stream, device, True), f"stream {stream:#x} of device {device}")

    def let_go(self, stream: int = 0, device: int = 0) -> None:
        """Run what queued up on a stream that was held, also on one that was destroyed meanwhile. Arguments as `hold`.

        Raises:
            UsageError: There is no such stream.
        """
        self._check(self._lib.vmem_emulator_hold(stream, device, False), f"stream {stream:#x} of device {device}")

    def capture(self, stream: int, on: bool, device: int = 0) -> None:
        """Let a stream begin or end to capture, as for a CUDA graph. Stream and device as `hold`.

        Meanwhile work queued on it is forgotten, for nobody launches that graph, and events recorded on it are
        captured: cuEventQuery and cuEventSynchronize answer CAPTURED_EVENT (907) until the event is recorded anew on
        a stream that does not capture. cuStreamIsCapturing answers ACTIVE, and for the default stream beside a
        blocking one that captures STREAM_CAPTURE_IMPLICIT (906). Waiting for the stream, or asking whether its work is
        done, is STREAM_CAPTURE_UNSUPPORTED (900).

        Raises:
            UsageError: There is no such stream.
        """
        self._check(self._lib.vmem_emulator_capture(stream, device, on), f"stream {stream:#x} of device {device}")

    def use(self, address: int, n_bytes: int, stream: int = 0, device: int = 0) -> None:
        """Queue work that touches a range, as a kernel would. It changes nothing. Stream and device as `hold`.

        Raises:
            UsageError: There is no such stream, or its device has no access to all of the range.
        """
        code = self._lib.vmem_emulator_use(stream, device, address, n_bytes)
        self._check(code, f"{n_bytes:#x} bytes at {address:#x} on stream {stream:#x}")

    def streams(self) -> list[int]:
        """Return the numbers of all live streams, default streams not included."""
        found: list[int] = []
        while stream := self._lib.vmem_emulator_stream(len(found)):
            found.append(stream)
        return found

    def is_busy(self) -> bool:
        """Return whether any work is queued and not done."""
        return self._count(UNFINISHED) != 0

    # What happened

    def live(self) -> Live:
        """Return what is live."""
        return Live(
            handles=self._count(HANDLES),
            mappings=self._count(MAPPINGS),
            reservations=self._count(RESERVATIONS),
            streams=self._count(STREAMS),
            events=self._count(EVENTS),
            contexts=self._count(CONTEXTS),
            pinned=self._count(PINNED),
        )

    def calls(self) -> Counter[str]:
        """Return how often each entry point was called since the last reset, failed calls included."""
        return Counter(
            {name: n for i, name in enumerate(self.call_names()) if (n := self._lib.vmem_emulator_n_calls(i))}
        )

    def call_names(self) -> list[str]:
        """Return the names of all entry points."""
        names: list[str] = []
        while name := self._lib.vmem_emulator_call_name(len(names)):
            names.append(name.decode())
        return names

    def rules(self) -> dict[str, str]:
        """Return every rule's name and text."""
        lines: list[str] = []
        while line := self._lib.vmem_emulator_rule(len(lines)):
            lines.append(line.decode())
        return dict(line.split(": ", 1) for line in lines)

    def violations(self) -> list[str]:
        """Return one line ``"RULE: call: what was wrong"`` per broken rule since the last reset (the first 256)."""
        lines: list[str] = []
        text = ctypes.create_string_buffer(VIOLATION_CHARS)
        while self._lib.vmem_emulator_violation(len(lines), text, len(text)) == 0:
            lines.append(text.value.decode())
        return lines

    def forget_violations(self) -> None:
        """Empty the list of violations."""
        self._check(self._lib.vmem_emulator_forget_violations(), "")

    def refuses(self, root: Path) -> bool:
        """Look for NVIDIA devices under ``root`` instead of ``/``, and return whether there is one.

        Where there is, every call answers STUB_LIBRARY until the next reset.
        """
        return bool(self._lib.vmem_emulator_look_for_devices(os.fsencode(root)))

    def reset(self, force: bool = False) -> None:
        """Go back to the beginning.

        Args:
            force: Free whatever is live. Work that did not run never will; threads that wait for it get
                DEINITIALIZED. Tensors over the memory must be gone.

        Raises:
            UsageError: Something is live or unfinished, and ``force`` is not set. Nothing changed.
        """
        self._check(self._lib.vmem_emulator_reset(force), f"live: {self.live()}, unfinished work: {self.is_busy()}")

    def _set(self, setting: int, value: int) -> None:
        if value < 0:
            raise UsageError(f"{value} is negative")
        self._check(self._lib.vmem_emulator_set(setting, value), f"{value}")

    def _count(self, what: int) -> int:
        n: int = self._lib.vmem_emulator_count(what)
        return n

    def _check(self, code: int, detail: str) -> None:
        if code == 0:
            return
        reason = {
            UNKNOWN_NAME: "no such entry point",
            BAD_VALUE: "no such thing, or a value that cannot be",
            SOMETHING_LIVES: "something is live still",
            FORKED: "the emulator does not work in a forked child",
        }[code]
        raise UsageError(f"{reason}: {detail}")


def load_emulator(path: Path | None = None, root: Path = Path("/")) -> Emulator:
    """Load the emulated driver, before `cuda.bindings.driver` is used for the first time. Idempotent.

    Args:
        path: The built library; by default the one built beside this file.
        root: Where to look for NVIDIA devices, for tests of that look.

    Raises:
        ConfigError: It was not built or does not fit, a real NVIDIA device exists, or another libcuda is loaded in
            this process. Nothing was loaded.
    """
    for sign in SIGNS_OF_A_DEVICE:
        if (root / sign).exists():
            raise ConfigError(f"{root / sign} exists: the emulated CUDA driver does not stand in for a real one")
    library_path = find_emulator() if path is None else path
    if not library_path.exists():
        raise ConfigError(f"there is no emulated CUDA driver at {library_path}")
    other, ours = _already_loaded(SONAME), _already_loaded(str(library_path))
    if other is not None and other != ours:
        raise ConfigError(f"another {SONAME} is loaded in this process: the emulated one would never be called")
    library = ctypes.CDLL(str(library_path), mode=ctypes.RTLD_GLOBAL)
    if library.vmem_emulator_abi() != ABI:
        raise ConfigError(f"{library_path} has ABI {library.vmem_emulator_abi()}, this package needs {ABI}")
    if library.vmem_emulator_activate() != 0:
        raise ConfigError(f"{library_path} found an NVIDIA device when it was loaded, and stays inert")
    return Emulator(library)


def find_emulator() -> Path:
    """Return the path of the built library.

    Raises:
        ConfigError: It was not built.
    """
    path = Path(__file__).parent / FILE
    if not path.exists():
        raise ConfigError("the emulated CUDA driver was not built (no C compiler at install time?)")
    return path


def _already_loaded(name: str) -> int | None:
    """The linker's handle of a library that is loaded under that name or path, else None."""
    try:
        handle: int = ctypes.CDLL(name, mode=os.RTLD_NOLOAD)._handle
    except OSError:
        return None
    return handle
