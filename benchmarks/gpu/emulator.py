"""The emulated driver for runs from a checkout: the package's own library, or one built for this run.

Its path goes to the workers in the environment variable `PATH_VARIABLE`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from vmem_kv.errors import ConfigError
from vmem_kv.testing.emulator import FILE, SONAME, find_emulator

PATH_VARIABLE = "VMEM_KV_GPU_SUITE_EMULATOR"
_SOURCES = Path(__file__).resolve().parents[2] / "native" / "cuda_emulator"
_COMPILERS = ("cc", "gcc", "clang")
_TIMEOUT_S = 120.0


@contextmanager
def built_emulator() -> Iterator[Path]:
    """The library's path, for as long as the context lasts.

    Raises:
        ConfigError: It was not built with the package, and cannot be built here.
    """
    try:
        found = find_emulator()
    except ConfigError:
        found = None
    if found is not None:
        yield found
        return
    with TemporaryDirectory() as folder:
        yield build(Path(folder))


def build(folder: Path) -> Path:
    """Compile the library into a folder; return its path.

    Raises:
        ConfigError: There is no compiler, or it fails.
    """
    compiler = next((path for name in _COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        raise ConfigError("the emulated CUDA driver was not built, and there is no C compiler; install one (cc)")
    library = folder / FILE
    command = [compiler, "-std=c11", "-O2", "-fPIC", "-fvisibility=hidden", "-shared"]
    command += [*sorted(map(str, _SOURCES.glob("*.c"))), "-o", str(library), f"-Wl,-soname,{SONAME}", "-pthread"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        words = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise ConfigError(f"the emulated CUDA driver cannot be built: {words[0] if words else 'no reason'}") from error
    return library


def emulator_path() -> Path | None:
    """The library that the command chose for its workers; None for the package's own."""
    path = os.environ.get(PATH_VARIABLE)
    return Path(path) if path else None
