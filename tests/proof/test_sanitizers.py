"""The native code under the address, undefined behaviour and thread sanitizers, each seen to find something."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ..core.subprocesses import ROOT
from .conftest import Record

pytestmark = pytest.mark.timeout(900)  # of a busy machine

FLAGS = {
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "tsan": ["-fsanitize=thread"],
}
SOURCES = {
    "host": ["native/host_mapper.c"],
    "cuda": sorted(str(path.relative_to(ROOT)) for path in (ROOT / "native" / "cuda_emulator").glob("*.c")),
}

PLANTED = """
#include <pthread.h>
#include <stdlib.h>
static long counter;
int overrun(int n) { char *volatile bytes = malloc(8); bytes[n] = 1; int r = bytes[0]; free(bytes); return r; }
int overflow(int n) { return n + 2147483647; }
static void *count(void *unused) { for (int i = 0; i < 100000; i++) counter++; return unused; }
int race(int n) {
    pthread_t a, b;
    (void)n;
    pthread_create(&a, 0, count, 0); pthread_create(&b, 0, count, 0);
    pthread_join(a, 0); pthread_join(b, 0);
    return 0;
}
"""

OPEN = {
    "host": """
import pathlib
import vmem_kv.driver.host_mapper as mapper
from vmem_kv.driver.host import HostDriver
mapper.find_native_library = lambda: pathlib.Path({library!r})
open_driver = lambda: HostDriver("native")
""",
    "cuda": """
from pathlib import Path
from vmem_kv.driver.cuda import CudaDriver, NoRuntime
from vmem_kv.driver.ledger import Ledger
from vmem_kv.testing.emulator import load_emulator
emulator = load_emulator(Path({library!r}))
emulator.reset()
emulator.set_granularity(4096)
open_driver = lambda: CudaDriver(0, NoRuntime(), ledger=Ledger(), tensor_device="cpu")
""",
}

USE = """
from vmem_kv.testing import check_driver
from vmem_kv.testing.operations import random_run
from vmem_kv.testing.stress import StressOptions, run_stress
report = check_driver(open_driver)
totals = random_run(3, {n_ops}, driver := open_driver())
driver.close()
options = StressOptions("this", 4, {n_ops}, None, 0.1, n_threads=4)
progress = run_stress(options, open_driver)
assert not progress.findings, progress.findings
print(report.n_checks, totals.n_ops, progress.n_ops)
"""


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> None:
    if shutil.which("gcc") is None or platform.machine() != "x86_64":
        pytest.skip("no gcc for x86-64 here: the sanitizers are not shown")


def build(sanitizer: str, sources: list[str], target: Path, *options: str) -> str:
    command = [
        "gcc",
        "-std=c11",
        "-g",
        "-O1",
        "-fPIC",
        "-shared",
        "-fno-omit-frame-pointer",
        *FLAGS[sanitizer],
        *options,
    ]
    subprocess.run([*command, "-o", str(target), *sources, "-lpthread"], cwd=ROOT, check=True, timeout=120)
    return str(target)


def run(sanitizer: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the sanitizer's library in front. TSan needs addresses that are not randomised."""
    runtime = subprocess.run(
        ["gcc", f"-print-file-name=lib{sanitizer}.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    prefix = ["setarch", platform.machine(), "-R"] if sanitizer == "tsan" else []
    environment = os.environ | {
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0:exitcode=66",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "exitcode=66:report_signal_unsafe=0",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [*prefix, sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


REPORTS = ("AddressSanitizer", "runtime error", "ThreadSanitizer")


@pytest.mark.parametrize(
    ("sanitizer", "function", "report"),
    [
        ("asan", "overrun", "heap-buffer-overflow"),
        ("asan", "overflow", "signed integer overflow"),
        ("tsan", "race", "data race"),
    ],
)
def test_a_sanitizer_finds_a_planted_fault(sanitizer: str, function: str, report: str, tmp_path: Path) -> None:
    source = tmp_path / "planted.c"
    source.write_text(PLANTED)
    library = build(sanitizer, [str(source)], tmp_path / "planted.so")
    done = run(sanitizer, f"import ctypes\nctypes.CDLL({library!r}).{function}(8)")
    assert done.returncode != 0
    assert report in done.stderr


@pytest.mark.parametrize("sanitizer", ["asan", "tsan"])
@pytest.mark.parametrize("driver", ["host", "cuda"])
def test_the_native_code_is_clean(sanitizer: str, driver: str, tmp_path: Path, record: Record) -> None:
    options = ["-fvisibility=hidden", "-Wl,-soname,libcuda.so.1"] if driver == "cuda" else []
    library = build(sanitizer, SOURCES[driver], tmp_path / "native.so", *options)
    n_ops = 3000 if sanitizer == "asan" else 1500
    done = run(sanitizer, OPEN[driver].format(library=library) + USE.format(n_ops=n_ops))
    assert not any(name in done.stderr for name in REPORTS), done.stderr[-4000:]
    assert done.returncode == 0, done.stderr[-4000:]
    n_checks, n_model, n_threads = map(int, done.stdout.split())
    record(
        f"native code under {'TSan' if sanitizer == 'tsan' else 'ASan and UBSan'}",
        driver,
        contract_checks=n_checks,
        operations=n_model,
        operations_in_turns_with_four_threads=n_threads,
        reports=0,
    )
