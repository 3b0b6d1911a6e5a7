"""What happens to processes: killed, forked, interrupted, ended with live tensors, opened and closed again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from vmem_kv.cache import KVCache
from vmem_kv.driver.base import Driver, Handle
from vmem_kv.errors import UsageError
from vmem_kv.growth import SlotId
from vmem_kv.pages import PagePool
from vmem_kv.testing.operations import Run, odd_layout, step
from vmem_kv.testing.stress import OPS_OF_ROUND

from ..core.subprocesses import ROOT, TIMEOUT_S, output_of, run_python
from ..held import Held
from .conftest import Record
from .drivers import DRIVERS, open_driver, physical_bytes

pytestmark = pytest.mark.timeout(900)  # of a busy machine

N_KILLS = 200

KILLS = """
import os, random, signal, time
from tests.proof.memory_files import MemoryFiles
from vmem_kv.driver.host import HostDriver
from vmem_kv.driver.ledger import Ledger
from vmem_kv.testing.operations import random_run

MIB = 1 << 20
LEAK = {leak!r}
choose, files = random.Random(11), MemoryFiles()
lifeline, we_live = os.pipe()
n_least = 1 << 60
for number in range({n_kills}):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(we_live)
        driver = HostDriver("native", ledger=Ledger())
        base = driver.reserve(4 * MIB)
        handles = []
        driver.create(4096, range(base.base, base.end, 4096), handles)
        driver.map(4096, range(base.base, base.end, 4096), handles)
        if LEAK == "a process that keeps it":
            os.dup(driver._fd)  # or the driver would close it in a forked child
            if os.fork() == 0:
                os.read(lifeline, 1)
                os._exit(0)
        if LEAK.startswith("/dev/shm"):
            named = open(f"{{LEAK}}-{{number}}", "wb")
            named.write(bytes(4 * MIB))
        os.write(writing, b"x")
        while True:
            random_run(number, 10_000, driver)
    os.read(reading, 1)
    time.sleep(choose.random() * 0.03)
    os.kill(child, signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])
    n_least = min(n_least, files.look_at(child) // MIB)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    os.close(reading), os.close(writing)
n_left = files.wait({patience_s})
os.close(we_live)
print(n_least, files.n_seen, files.n_bytes // MIB, n_left, files.wait({last_patience_s}))
"""


def kill_processes(n_kills: int, record: Record) -> None:
    """Every child owns 4 MiB and more. What counts is its memory files, each of them, and whether the kernel gave it
    up: what else the machine's memory is used for does not matter."""
    code = KILLS.format(leak="", n_kills=n_kills, patience_s=120, last_patience_s=0)
    n_least, n_files, mebibytes, n_left, _ = map(int, output_of(code).split())
    assert n_least >= 4
    assert n_files == n_kills
    assert n_left == 0
    record("kill -9 at random moments", "native", processes=n_kills, MiB_owned=mebibytes, memory_files_left=n_left)


def test_memory_of_a_killed_process_goes_back(record: Record) -> None:
    kill_processes(N_KILLS, record)


@pytest.mark.parametrize("leak", ["a process that keeps it", "a name"])
def test_memory_that_outlives_a_killed_process_is_seen(leak: str, tmp_path: Path) -> None:
    name = f"/dev/shm/vmem-kv-proof-{os.getpid()}-{tmp_path.name}"
    is_named = leak == "a name"
    n_kills = 5
    try:
        patience_s = 2 if is_named else 120  # for what stays, and for what goes
        code = KILLS.format(leak=name if is_named else leak, n_kills=n_kills, patience_s=2, last_patience_s=patience_s)
        _, n_files, _, n_left, n_left_in_the_end = map(int, output_of(code).split())
    finally:
        for left in Path("/dev/shm").glob(f"{Path(name).name}-*"):
            left.unlink()
    assert n_files == n_kills * (1 + is_named)
    assert n_left == n_kills
    assert n_left_in_the_end == (n_kills if is_named else 0)  # the keepers went when we let them


FORK = """
import os
from tests.proof.drivers import open_driver
from vmem_kv.cache import KVCache
from vmem_kv.errors import UsageError
from vmem_kv.pages import PagePool
from vmem_kv.testing import HostMemory
from vmem_kv.testing.operations import odd_layout

driver = open_driver({name!r})
page = driver.info.granularity_bytes
cache = KVCache(PagePool(driver, page, 100), odd_layout("per_layer", page, n_slots=2))
slot = cache.acquire()
cache.ensure({{slot: 20}})
base = cache.region.reservation.base
HostMemory().write(base, b"parent")
child = os.fork()
if child == 0:
    refused = 0
    calls = [cache.acquire, cache.check, cache.stats, lambda: cache.ensure({{slot: 40}}), lambda: cache.retire(slot)]
    calls += [lambda: cache.reclaim(1), cache.close, cache.pool.trim, lambda: driver.reserve(page)]
    for call in calls:
        try:
            call()
        except UsageError:
            refused += 1
    os._exit(0 if refused == len(calls) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "the child was not refused"
assert HostMemory().read(base, 6) == b"parent"
cache.ensure({{slot: 40}})
cache.check()
cache.retire(slot)
cache.close()
driver.close()
print("unharmed")
"""


def test_a_forked_child_is_refused_and_the_parent_is_unharmed(driver_name: str) -> None:
    assert output_of(FORK.format(name=driver_name)) == "unharmed"


LIVE_TENSORS = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vmem_kv import VmemCache
config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
                     num_key_value_heads=1, head_dim=16, pad_token_id=0)
torch.manual_seed(0)
cache = VmemCache(config)
with torch.no_grad():
    LlamaForCausalLM(config).eval()(torch.arange(1, 9)[None], past_key_values=cache)
keys = cache.layers[0].keys
print(keys.shape[2])
"""


@pytest.mark.parametrize("how", ["", "raise SystemExit(3)", "raise RuntimeError('mine')", "del cache"])
def test_a_process_may_end_with_live_tensors(how: str) -> None:
    done = run_python(LIVE_TENSORS + how)
    assert done.stdout == "8\n", done.stderr
    assert done.returncode == {"raise SystemExit(3)": 3, "raise RuntimeError('mine')": 1}.get(how, 0), done.stderr
    assert ("Traceback" in done.stderr) == ("mine" in how), done.stderr


@contextmanager
def stress_in_a_process(*arguments: str, ops_of_round: int = OPS_OF_ROUND) -> Iterator[subprocess.Popen[str]]:
    """It works: its memory file was seen open. In the end it is gone, whatever happened."""
    command = (
        f"import vmem_kv.testing.stress as s; s.OPS_OF_ROUND = {ops_of_round}; from vmem_kv.cli import main; main()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", command, "stress", *arguments], cwd=ROOT, stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            wait_until_it_works(process)
            yield process
        finally:
            process.kill()


def wait_until_it_works(process: subprocess.Popen[str]) -> None:
    end_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end_s and process.poll() is None:
        for fd in Path(f"/proc/{process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed between the two looks
                if str(fd.readlink()).startswith("/memfd:vmem_kv"):  # not a source file that is being imported
                    return
        time.sleep(0.05)
    raise AssertionError("it did not begin")


def test_an_interrupted_stress_run_gives_its_verdict() -> None:
    with stress_in_a_process("--minutes", "5") as process:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err
    assert "stopped by the user" in out
    assert "clean" in out


@pytest.mark.parametrize("threads", ["1", "2"])
def test_interrupted_twice_it_ends_at_once_without_a_traceback(threads: str) -> None:
    """In a round that would take hours: nothing but the second interruption ends it."""
    with stress_in_a_process("--minutes", "500", "--threads", threads, ops_of_round=10**9) as process:
        assert process.stderr is not None
        process.send_signal(signal.SIGINT)
        acknowledged = process.stderr.readline()
        assert acknowledged.startswith("interrupted: this round is finished first"), acknowledged
        assert process.poll() is None
        time.sleep(0.3)  # or it would end before the round began
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    assert err.strip() == "error: interrupted"


def open_and_close(driver_name: str, n_cycles: int, record: Record) -> None:
    """Open a driver and a cache, use them, and close them, so many times."""

    def cycle() -> None:
        driver = open_driver(driver_name)
        page = driver.info.granularity_bytes
        pool = PagePool(driver, page, 40)
        cache = KVCache(pool, odd_layout("group:2", page, n_slots=2))
        cache.ensure({cache.acquire(): 20})
        cache.retire(cache.active_slots())
        cache.close()
        pool.trim()
        assert physical_bytes(driver) == 0
        driver.close()

    for _ in range(5):
        cycle()
    before, n_mappings_before = Held.now(), n_mappings_of_caches()
    for _ in range(n_cycles):
        cycle()
    assert not Held.now().beyond(before)
    assert n_mappings_of_caches() - n_mappings_before <= 20  # guards of stacks and the like
    record("open and close in one process", driver_name, cycles=n_cycles, files_and_threads_left=0)


def test_a_thousand_caches_in_one_process_leave_nothing(driver_name: str, record: Record) -> None:
    open_and_close(driver_name, 1000, record)


def n_mappings_of_caches() -> int:
    """Mappings of memory files, and addresses that are only reserved: the kinds that caches make.

    Python's heap is left out: it may come to lie in more pieces when what other tests left is collected.
    """
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum("memfd:" in line or " ---p " in line or " ---s " in line for line in lines)


def test_the_mappings_of_a_cache_are_counted(driver_name: str) -> None:
    driver = open_driver(driver_name)
    before = n_mappings_of_caches()
    reservations = [driver.reserve(2 * driver.info.granularity_bytes) for _ in range(30)]
    page = driver.info.granularity_bytes
    places = [reservation.base for reservation in reservations]  # what else is in them parts their neighbours
    handles: list[Handle] = []
    driver.create(page, places, handles)
    driver.map(page, places, handles)
    driver.set_access([(place, page) for place in places])
    assert n_mappings_of_caches() - before > 20
    driver.unmap([(place, page) for place in places])
    driver.release(page, handles)
    for reservation in reservations:
        driver.free_reservation(reservation)
    driver.close()


def test_caches_on_two_drivers_in_one_process_do_not_meet(record: Record) -> None:
    choose = random.Random(2)
    drivers = [open_driver(name) for name in (*DRIVERS, *DRIVERS)]
    runs = [Run(driver, "group:2", n_slots=3, max_pages=30, keep_freed=True) for driver in drivers]
    for _ in range(4000):
        step(choose.choice(runs), choose, fault_share=0.0)
    n_ops = sum(run.n_ops for run in runs)
    for run in runs:
        run.finish()
        run.base.close()
    record("four caches on four drivers in one process", operations=n_ops, differences=0)


def test_two_caches_on_one_pool_see_their_own_rows_only(driver: Driver) -> None:
    page = driver.info.granularity_bytes
    run = Run(driver, "per_layer", n_slots=3, max_pages=60, keep_freed=True)
    other = KVCache(run.pool, odd_layout("token_major", page, n_slots=2))
    slot = other.acquire(domain="other")
    other.ensure({slot: 40})
    assert other.stats().n_elsewhere_pages == 0
    run.cache.ensure({run.cache.acquire(): 30})
    run.tags.write(0, 0, 30, 1)
    other.ensure({slot: 41})
    run.tags.verify(0, 0, 30)
    with pytest.raises(UsageError):
        other.ensure({SlotId(1): 3})
    other.retire(slot)
    other.close()
    run.cache.retire(run.cache.active_slots())
    run.cache.close()
    run.pool.trim()
