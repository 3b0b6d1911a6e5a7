"""The native code under the address, undefined behaviour and thread sanitizers, each seen to find something."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ..core.subprocesses import ROOT, TIMEOUT_S
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

# gcc's own OpenMP is not instrumented: the thread sanitizer would see no order between its threads, and report every
# loop. These are the calls that gcc makes for the one loop of host_attention.c; with pthreads the sanitizer sees all.
LOOPS = """
#include <pthread.h>
#include <stdbool.h>
#define OURS __attribute__((visibility("hidden")))
#define MAX_THREADS 16
typedef struct {
    void (*work)(void *);
    void *data;
    pthread_mutex_t lock;
    bool has_begun;
    long next, end, step;
} team;
static __thread team *mine;
OURS bool GOMP_loop_nonmonotonic_dynamic_next(long *first, long *behind) {
    pthread_mutex_lock(&mine->lock);
    bool is_left = mine->next < mine->end;
    *first = mine->next;
    mine->next += mine->step;
    *behind = mine->next < mine->end ? mine->next : mine->end;
    pthread_mutex_unlock(&mine->lock);
    return is_left;
}
OURS bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long chunk, long *first,
                                               long *behind) {
    pthread_mutex_lock(&mine->lock);
    if (!mine->has_begun) {
        mine->has_begun = true, mine->next = start, mine->end = end, mine->step = step * chunk;
    }
    pthread_mutex_unlock(&mine->lock);
    return GOMP_loop_nonmonotonic_dynamic_next(first, behind);
}
OURS void GOMP_loop_end_nowait(void) {}
static void *take_part(void *given) {
    mine = given;
    mine->work(mine->data);
    return 0;
}
OURS void GOMP_parallel(void (*work)(void *), void *data, unsigned n_threads, unsigned flags) {
    team all = {.work = work, .data = data, .lock = PTHREAD_MUTEX_INITIALIZER};
    pthread_t others[MAX_THREADS];
    (void)flags;
    for (unsigned i = 1; i < n_threads; i++) pthread_create(&others[i], 0, take_part, &all);
    take_part(&all);
    for (unsigned i = 1; i < n_threads; i++) pthread_join(others[i], 0);
}
"""
ATTENTION = "native/host_attention.c"
CLONES = '__attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))'
ATTEND = """
from tests.proof.ragged_attention import attend_all
print(attend_all({library!r}, n_threads=3))
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
    subprocess.run([*command, "-o", str(target), *sources, "-lpthread"], cwd=ROOT, check=True, timeout=TIMEOUT_S)
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
        "TSAN_OPTIONS": "exitcode=66:halt_on_error=1:report_signal_unsafe=0",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [*prefix, sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
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


def build_attention(sanitizer: str, source: Path, folder: Path) -> str:
    loops = folder / "loops.c"
    loops.write_text(LOOPS)
    options = ["-fopenmp", "-Wno-psabi", "-g1"]
    library = build(sanitizer, [str(source), str(loops)], folder / "attention.so", *options)
    wanted = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    assert "GOMP" not in wanted.stdout, "this compiler makes other calls; add them to LOOPS"
    return library


@pytest.mark.parametrize("sanitizer", ["asan", "tsan"])
def test_attention_is_clean(sanitizer: str, tmp_path: Path, record: Record) -> None:
    library = build_attention(sanitizer, ROOT / ATTENTION, tmp_path)
    done = run(sanitizer, ATTEND.format(library=library))
    assert not any(name in done.stderr for name in REPORTS), done.stderr[-4000:]
    assert done.returncode == 0, done.stderr[-4000:]
    record(
        f"native code under {'TSan' if sanitizer == 'tsan' else 'ASan and UBSan'}",
        "attention",
        ragged_batches=int(done.stdout),
        reports=0,
    )


@pytest.mark.parametrize(
    ("sanitizer", "old", "new", "report"),
    [
        ("asan", "? end_key - key : KEYS;", "? end_key - key + (length == 7) : KEYS;", "use-after-poison"),
        ("asan", "token * call->query_strides[0]", "(token + 1) * call->query_strides[0]", "heap-buffer-overflow"),
        ("asan", "LANES; i++) {\n        column[i]", "LANES + 1; i++) {\n        column[i]", "out of bounds for type"),
        ("tsan", "    scratch memory;", "    static scratch memory;", "data race"),
    ],
)
def test_a_mistake_in_attention_is_found(sanitizer: str, old: str, new: str, report: str, tmp_path: Path) -> None:
    text = (ROOT / ATTENTION).read_text()
    for piece in (old, CLONES):
        assert piece in text, "the kernel has another text now; plant this mistake anew"
    source = tmp_path / "planted.c"
    source.write_text(text.replace(old, new).replace(CLONES, ""))  # once, for any machine: compiled sooner
    done = run(sanitizer, ATTEND.format(library=build_attention(sanitizer, source, tmp_path)))
    assert done.returncode != 0
    assert report in done.stderr
