"""At the machine's limits, each in a process of its own: a typed error or a refusal at the start, never a signal."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ..core.subprocesses import ROOT, TIMEOUT_S, run_python
from .conftest import Record

pytestmark = pytest.mark.timeout(900)  # of a busy machine

LIFE = """
import ctypes, mmap, resource, sys, threading
from vmem_kv.cache import KVCache
from vmem_kv.driver.host import HostDriver
from vmem_kv.errors import VmemError
from vmem_kv.layout import LayerSpec, Layout
from vmem_kv.pages import PagePool

def relieve():
    '''What whoever caused the trouble does before everything is closed.'''

def live(max_pages=200, n_slots=8, max_tokens=64, head_dim=64, n_layers=2, headroom=4096, path="native", page=4096):
    '''Grow until it is full; a typed error must leave everything as it was and be survived. Returns its type.'''
    driver = HostDriver(path, headroom_mappings=headroom)
    pool = PagePool(driver, page, max_pages)
    layers = [LayerSpec.uniform(1, head_dim, 2)] * n_layers
    layout = Layout.build("per_layer", layers, n_slots=n_slots, max_tokens=max_tokens, page_bytes=page)
    cache = KVCache(pool, layout)
    name = "none"
    for _ in range(n_slots):
        slot = cache.acquire()
        try:
            cache.ensure({slot: max_tokens})
        except VmemError as error:
            name = type(error).__name__
            cache.check()
            break
        start = cache.region.reservation.base + slot * layout.planes[0].span_bytes
        ctypes.memset(start, 1, max_tokens * layout.planes[0].token_bytes)
    thread = threading.Thread(target=cache.check)
    thread.start()
    thread.join()
    relieve()
    for _ in range(3):  # an injected error may come once more
        try:
            for slot in cache.active_slots():
                cache.retire(slot)
            cache.close()
            break
        except VmemError as error:
            name = type(error).__name__
    pool.trim()
    assert pool.n_owned == pool.n_quarantined
    driver.close()
    return name

def attempt(**options):
    try:
        return live(**options)
    except VmemError as error:
        return type(error).__name__
"""


def outcome(code: str) -> str:
    """Run `code` behind `LIFE`; it must end by itself, with success."""
    done = run_python(LIFE + code)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


def test_an_end_by_a_signal_is_noticed() -> None:
    with pytest.raises(AssertionError, match=f"exit {-signal.SIGSEGV}"):
        outcome("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")


def test_without_limits_it_lives() -> None:
    assert outcome("print(live())") == "none"


@pytest.mark.parametrize("path", ["native", "python"])
def test_a_small_budget_of_mappings_is_a_typed_error(path: str, record: Record) -> None:
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    code = f"""
from vmem_kv.machine import count_mappings
print(attempt(path={path!r}, headroom={limit} - count_mappings() - 21, n_slots=50))
"""
    assert outcome(code) == "OutOfMappings"
    record("limits of the machine: a budget of mappings, a typed error", path, lives=1)


def test_at_the_kernels_own_limit_of_mappings_it_is_a_typed_error_too(record: Record) -> None:
    """Somebody else takes the mappings behind our back: the kernel refuses, in the middle of a batch."""
    code = """
from pathlib import Path
from vmem_kv.driver.host_mapper import libc
limit = int(Path("/proc/sys/vm/max_map_count").read_text())
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
address = libc.mmap(None, 2 * limit * 4096, 1, 0x22 | 0x4000, -1, 0)
n_eaten = 0

def eat():  # every second page of a read-only range gets another protection: two mappings each
    global n_eaten
    while libc.mprotect(address + 2 * n_eaten * 4096, 4096, 3) == 0:
        n_eaten += 1
    for i in range(1, 16):  # leave a few
        libc.mprotect(address + 2 * (n_eaten - i) * 4096, 4096, 1)

class Hungry(KVCache):
    def ensure(self, lengths):
        if not n_eaten:
            eat()
        super().ensure(lengths)

class Now:  # at this limit no thread can be started
    def __init__(self, target):
        self.start = target
    def join(self):
        pass

def relieve():  # at this limit nothing can be unmapped either
    libc.munmap(address, 2 * limit * 4096)

KVCache, threading.Thread = Hungry, Now
name = attempt(headroom=0, n_slots=60, max_pages=2000, head_dim=48)
assert n_eaten > limit // 2 - 2048, n_eaten
print(name)
"""
    assert outcome(code) == "OutOfMappings"
    record("limits of the machine: the kernel's own limit of mappings, a typed error", "native", lives=1)


@pytest.mark.parametrize(
    ("limit", "options", "expected"),
    [
        ("RLIMIT_AS, (8 << 30, 8 << 30)", "max_tokens=1 << 28", "OutOfAddressSpace"),
        ("RLIMIT_NOFILE, (len(__import__('os').listdir('/proc/self/fd')) - 1,) * 2", "", "ConfigError"),
        ("RLIMIT_FSIZE, (1 << 20, 1 << 20)", "", "ConfigError"),
    ],
    ids=["addresses", "files", "file size"],
)
def test_a_limit_of_the_process_is_a_typed_error(limit: str, options: str, expected: str, record: Record) -> None:
    assert outcome(f"resource.setrlimit(resource.{limit})\nprint(attempt({options}))") == expected
    record("limits of the machine: addresses, open files, file size, a typed error", "native", lives=1)


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A memory cgroup of 64 MiB. Where none can be made, that is said, and nothing is shown."""
    version_1 = Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
    version_2 = Path("/sys/fs/cgroup/cgroup.controllers")
    is_first = version_1.exists()
    if not is_first and not (version_2.exists() and "memory" in version_2.read_text()):
        pytest.skip("no memory cgroups here: the limit of a cgroup is not shown")
    folder = (version_1 if is_first else version_2).parent / f"vmem-kv-proof-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / ("memory.limit_in_bytes" if is_first else "memory.max")).write_text(str(64 << 20))
    except OSError as error:
        pytest.skip(f"no cgroup can be made here ({error}): its limit is not shown")
    yield folder
    for _ in range(600):
        with suppress(OSError):  # busy: the process in it was waited for, and the system may count it still
            folder.rmdir()
            return
        time.sleep(0.1)
    folder.rmdir()


IN_CGROUP = """
import os, time
open({procs!r}, "w").write(str(os.getpid()))
print(attempt({options}), flush=True)
"""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("max_pages=20_000", "ConfigError"),
        ("max_pages=None, n_slots=64, max_tokens=20_000", "OutOfPages"),
        ("max_pages=4_000", "none"),
    ],
    ids=["refused at the start", "full before the cgroup is", "fits"],
)
def test_the_limit_of_a_cgroup_is_a_typed_error(cgroup: Path, options: str, expected: str, record: Record) -> None:
    code = IN_CGROUP.format(procs=str(cgroup / "cgroup.procs"), options=options)
    assert outcome(code) == expected
    record("limits of the machine: a memory cgroup of 64 MiB, a typed error or none", "native", lives=1)


INJECTED = {
    "fallocate": ["ENOSPC", "ENOMEM", "EIO"],  # ENOSPC is what a full tmpfs says
    "memfd_create": ["EMFILE", "ENOMEM"],
    "ftruncate": ["EFBIG"],
    "madvise": ["EAGAIN", "ENOMEM"],
}


@pytest.mark.parametrize(("call", "code"), [(call, code) for call, codes in INJECTED.items() for code in codes])
def test_a_system_call_that_fails_is_a_typed_error(call: str, code: str, record: Record) -> None:
    """strace makes the n-th call fail: the first ones, and some of each later kind (releases, further pages)."""
    if shutil.which("strace") is None:
        pytest.skip("no strace here: failures of single system calls are not shown")
    outcomes = []
    for n in (1, 2, 3, 5, 20, 33, 40, 64, 97) if call in ("fallocate", "madvise") else (1,):
        done = strace(call, code, n)
        if "ptrace" in done.stderr and "not permitted" in done.stderr:
            pytest.skip("strace may not trace here: failures of single system calls are not shown")
        assert done.returncode == 0, f"{call} {code} {n}: exit {done.returncode}\n{done.stderr[-2000:]}"
        outcomes.append(done.stdout.strip())
    assert set(outcomes) <= {"none", "OutOfPages", "OutOfMappings", "DriverError", "ConfigError"}
    if call != "madvise":  # most advice does not matter
        assert outcomes[0] != "none"
    if call == "madvise" and code == "ENOMEM":
        assert set(outcomes) != {"none"}
    record(
        f"limits of the machine: {call} fails, by strace",
        "native",
        calls_made_to_fail=len(outcomes),
        lives_that_noticed=len(outcomes) - outcomes.count("none"),
        ended_by_a_signal=0,
    )


def strace(call: str, code: str, n: int) -> subprocess.CompletedProcess[str]:
    command = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}"]
    command += ["-e", f"inject={call}:error={code}:when={n}"]
    return subprocess.run(
        [*command, sys.executable, "-c", LIFE + "print(attempt())"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def test_strace_is_seen_to_inject() -> None:
    """The detector: a life whose errors are not caught ends with the injected one."""
    if shutil.which("strace") is None:
        pytest.skip("no strace here")
    command = [
        "strace",
        "-f",
        "-qq",
        "-o",
        "/dev/null",
        "-e",
        "trace=fallocate",
        "-e",
        "inject=fallocate:error=EIO:when=1",
    ]
    done = subprocess.run(
        [*command, sys.executable, "-c", "import os\nos.posix_fallocate(os.memfd_create('x'), 0, 4096)"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert re.search(r"OSError.*Errno 5", done.stderr), done.stderr
