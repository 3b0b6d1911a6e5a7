"""What the host driver promises beyond the contract: faults, limits, forks, and memory given back exactly."""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from vmem_kv.driver.base import Handle, Reservation
from vmem_kv.driver.host import HEADROOM_MAPPINGS, HostDriver
from vmem_kv.driver.host_mapper import ABI, NativeMapper, open_mapper
from vmem_kv.errors import ConfigError, OutOfAddressSpace, OutOfMappings, UsageError
from vmem_kv.machine import describe_machine
from vmem_kv.pages import PagePool
from vmem_kv.testing import HostMemory, check_driver

from ..held import open_files
from .subprocesses import output_of, run_python

PAGE = mmap.PAGESIZE
OpenHost = Callable[[], HostDriver]


def open_mapped(driver: HostDriver, n_pages: int) -> tuple[Reservation, list[Handle]]:
    """Reserve a range with room around `n_pages` mapped pages, the first one at page 4."""
    reservation = driver.reserve((n_pages + 8) * PAGE)
    first = reservation.base + 4 * PAGE
    handles: list[Handle] = []
    places = [first + i * PAGE for i in range(n_pages)]
    driver.create(PAGE, places, handles)
    driver.map(PAGE, places, handles)
    driver.set_access([(first, n_pages * PAGE)])
    return reservation, handles


def close_mapped(driver: HostDriver, reservation: Reservation, handles: list[Handle]) -> None:
    driver.unmap([(reservation.base + 4 * PAGE, len(handles) * PAGE)])
    driver.release(PAGE, handles)
    driver.free_reservation(reservation)


def test_the_memfd_is_sealed_against_resizing(open_host: OpenHost) -> None:
    driver = open_host()
    for n_bytes in (0, 1 << 30, 1 << 49):
        with pytest.raises(PermissionError):
            os.ftruncate(driver._fd, n_bytes)
    with pytest.raises(PermissionError):  # nor can anybody seal it against writing
        fcntl.fcntl(driver._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_pages_are_backed_before_anybody_touches_them(open_host: OpenHost) -> None:
    driver = open_host()
    handles: list[Handle] = []
    reservation = driver.reserve(64 * PAGE)
    assert driver.physical_bytes() == 0
    driver.create(PAGE, [reservation.base + i * PAGE for i in range(64)], handles)
    assert driver.physical_bytes() == 64 * PAGE
    driver.release(PAGE, handles)
    assert driver.physical_bytes() == 0
    driver.free_reservation(reservation)


def test_pages_go_back_to_the_system_exactly(open_host: OpenHost) -> None:
    driver = open_host()
    reservation, handles = open_mapped(driver, 32)
    HostMemory().write(reservation.base + 4 * PAGE, b"x" * 32 * PAGE)
    driver.unmap([(reservation.base + 4 * PAGE, 32 * PAGE)])
    driver.release(PAGE, handles[3:20])
    assert driver.physical_bytes() == 15 * PAGE
    driver.release(PAGE, handles[:3] + handles[20:])
    assert driver.physical_bytes() == 0
    driver.free_reservation(reservation)


@pytest.mark.parametrize("where", ["before", "behind", "after_unmap", "after_free"])
def test_touching_what_is_not_mapped_faults(path: str, where: str) -> None:
    done = run_python(
        f"""
        import ctypes
        from tests.core.test_host_driver import *
        driver = HostDriver({path!r})
        reservation, handles = open_mapped(driver, 2)
        address = reservation.base + 4 * PAGE
        ctypes.memset(address, 1, 2 * PAGE)
        if {where!r} == "before":
            address -= 1
        elif {where!r} == "behind":
            address += 2 * PAGE
        else:
            driver.unmap([(address, 2 * PAGE)])
            if {where!r} == "after_free":
                driver.free_reservation(reservation)
        print("alive", flush=True)
        ctypes.string_at(address, 1)
        """
    )
    assert done.stdout.strip() == "alive", done.stderr
    assert done.returncode == -signal.SIGSEGV


def mapped_ranges() -> list[tuple[int, int]]:
    """What this process has mapped, start and end, as the system lists it."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [(int(start, 16), int(end, 16)) for start, end in (line.split()[0].split("-") for line in lines)]


def mappings_in(reservation: Reservation) -> int:
    """The system's mappings in a reservation, one that reaches beyond it included."""
    return sum(start < reservation.end and end > reservation.base for start, end in mapped_ranges())


def test_a_row_of_pages_costs_two_mappings_and_none_once_it_is_gone(open_host: OpenHost) -> None:
    driver = open_host()
    close_mapped(driver, *open_mapped(driver, 1))  # whatever the first use allocates
    reservation = driver.reserve(108 * PAGE)
    places = [reservation.base + (4 + i) * PAGE for i in range(100)]
    handles: list[Handle] = []
    before = mappings_in(reservation)
    driver.create(PAGE, places, handles)
    driver.map(PAGE, places, handles)
    driver.set_access([(places[0], 100 * PAGE)])
    n_row = mappings_in(reservation) - before
    driver.unmap([(places[0], 100 * PAGE)])
    n_none = mappings_in(reservation) - before
    for i in (0, 1, 2, 50, 51, 52):  # two islands, grown page by page
        driver.map(PAGE, [places[i]], [handles[i]])
        driver.set_access([(places[i], PAGE)])
    n_islands = mappings_in(reservation) - before
    driver.unmap([(places[0], 3 * PAGE), (places[50], 3 * PAGE)])
    n_none_again = mappings_in(reservation) - before
    driver.release(PAGE, handles)
    driver.free_reservation(reservation)
    cost = driver.info.mappings_per_run
    assert (n_row, n_none, n_islands, n_none_again) == (cost, 0, 2 * cost, 0)


def test_a_forked_child_cannot_reach_the_pages_and_the_parent_does_not_notice(path: str) -> None:
    output = output_of(
        f"""
        import ctypes
        from tests.core.test_host_driver import *
        driver = HostDriver({path!r})
        reservation, handles = open_mapped(driver, 2)
        address = reservation.base + 4 * PAGE
        ctypes.memset(address, 65, 2 * PAGE)
        pid = os.fork()
        if pid == 0:
            ctypes.memset(address, 66, 1)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        print(os.WTERMSIG(status), ctypes.string_at(address, 1).decode())
        close_mapped(driver, reservation, handles)
        driver.close()
        """
    )
    assert output == f"{signal.SIGSEGV:d} A"


def test_every_call_is_refused_in_a_forked_child(path: str) -> None:
    output = output_of(
        f"""
        from tests.core.test_host_driver import *
        driver = HostDriver({path!r})
        reservation, handles = open_mapped(driver, 2)
        address = reservation.base + 4 * PAGE
        calls = [
            lambda: driver.reserve(PAGE),
            lambda: driver.free_reservation(reservation),
            lambda: driver.create(PAGE, [reservation.base], []),
            lambda: driver.map(PAGE, [reservation.base], handles[:1]),
            lambda: driver.set_access([(address, 2 * PAGE)]),
            lambda: driver.unmap([(address, 2 * PAGE)]),
            lambda: driver.release(PAGE, handles),
            lambda: driver.scrub([(address, 2 * PAGE)]),
            lambda: driver.physical_bytes(),
        ]
        pid = os.fork()
        if pid == 0:
            n_refused = 0
            for call in calls:
                try:
                    call()
                except UsageError as error:
                    n_refused += "forked child" in str(error)
            driver.close()  # quiet: a child that cleans up must not disturb its parent
            os._exit(n_refused)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), len(calls))
        HostMemory().write(address, b"fine")
        assert HostMemory().read(address, 4) == b"fine"
        close_mapped(driver, reservation, handles)
        assert driver.physical_bytes() == 0
        driver.close()
        """
    )
    n_refused, n_calls = output.split()
    assert n_refused == n_calls


def test_a_closed_driver_refuses_everything_and_closes_again(open_host: OpenHost) -> None:
    driver = open_host()
    driver.close()
    driver.close()
    with pytest.raises(UsageError, match="closed"):
        driver.reserve(PAGE)
    with pytest.raises(UsageError, match="closed"):
        driver.create(PAGE, [PAGE], [])
    with pytest.raises(UsageError, match="closed"):
        driver.physical_bytes()


def test_closing_gives_the_file_descriptor_back(path: str) -> None:
    drivers = [HostDriver(path) for _ in range(5)]
    ours = {os.fstat(driver._fd).st_ino for driver in drivers}
    assert len(ours) == 5
    assert ours <= open_inodes()
    for driver in drivers:
        driver.close()
    assert not ours & open_inodes()


def open_inodes() -> set[int]:
    """The files that this process has open, by what no name can hide: memory files are all called the same."""
    found: set[int] = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the listing itself, closed by now
            found.add(os.stat(f"/proc/self/fd/{name}").st_ino)
    return found


def test_a_driver_that_is_forgotten_gives_its_file_descriptor_back(path: str) -> None:
    before = open_files()
    HostDriver(path)
    assert not open_files() - before


def test_huge_pages_are_refused_where_there_are_none(path: str) -> None:
    if describe_machine().n_huge_pages_free:
        pytest.skip("this machine has huge pages")
    with pytest.raises(ConfigError, match="nr_hugepages"):
        HostDriver(path, huge_pages=True)


def test_over_huge_pages_the_driver_keeps_the_contract(path: str) -> None:
    machine = describe_machine()
    if machine.n_huge_pages_free < 64:
        pytest.skip("fewer than 64 huge pages are free here: the driver over hugetlbfs is not shown")
    report = check_driver(lambda: HostDriver(path, huge_pages=True))
    assert report.n_checks >= 100
    driver = HostDriver(path, huge_pages=True)
    assert driver.info.granularity_bytes == machine.huge_page_bytes
    driver.close()


def test_a_native_part_that_is_missing_is_a_config_error_only_if_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vmem_kv.driver.host_mapper.EXTENSION_SUFFIXES", [".missing"])
    assert open_mapper("auto").name == "python"
    with pytest.raises(ConfigError, match="path='python'"):
        HostDriver("native")


def test_a_native_part_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    if path == "native":
        monkeypatch.setattr("vmem_kv.driver.host_mapper.ABI", ABI + 1)
        with pytest.raises(OSError, match="ABI"):
            NativeMapper()
        assert open_mapper("auto").name == "python"


def test_the_mapping_budget_leaves_headroom(open_host: OpenHost) -> None:
    machine = describe_machine()
    info = open_host().info
    assert 0 < info.max_mappings <= machine.max_map_count - HEADROOM_MAPPINGS
    assert HostDriver("python", headroom_mappings=1 << 40).info.max_mappings == 0


def test_a_reservation_beyond_the_address_space_limit_says_which_limit(path: str) -> None:
    output = output_of(
        f"""
        import resource
        from tests.core.test_host_driver import *
        driver = HostDriver({path!r})
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
        try:
            driver.reserve(64 << 30)
        except OutOfAddressSpace as error:
            print(error)
        driver.free_reservation(driver.reserve(1 << 20))
        """
    )
    assert "ulimit -v" in output


def test_too_many_open_files_is_a_config_error(path: str) -> None:
    output = output_of(
        f"""
        import resource
        from tests.core.test_host_driver import *
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        files = []
        try:
            while True:
                files.append(open("/dev/null"))
        except OSError:
            pass
        try:
            HostDriver({path!r})
        except ConfigError as error:
            print(error)
        for file in files:
            file.close()
        HostDriver({path!r}).close()
        """
    )
    assert output


def test_a_file_size_limit_is_a_config_error(path: str) -> None:
    output = output_of(
        f"""
        import resource
        from tests.core.test_host_driver import *
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
        before = open_files()
        try:
            HostDriver({path!r})
        except ConfigError as error:
            print(error)
        assert not open_files() - before
        """
    )
    assert "ulimit -f" in output


def test_the_kernels_own_mapping_limit_is_a_typed_error_and_changes_nothing(path: str) -> None:
    output = output_of(
        f"""
        from tests.core.test_host_driver import *
        driver = HostDriver({path!r})
        n_limit = describe_machine().max_map_count
        if n_limit > 200_000:
            print("too many to fill")
            raise SystemExit
        n_pages = n_limit // 2 + 100
        reservation = driver.reserve(2 * n_pages * PAGE)
        handles = []
        driver.create(PAGE, [reservation.base], handles)
        places = [reservation.base + 2 * i * PAGE for i in range(n_pages)]
        try:
            driver.map(PAGE, places, handles * n_pages)
        except OutOfMappings as error:
            n_done, text = error.n_done, str(error)
        # At the limit even an unmap may fail; the reservation as a whole can always go.
        driver.free_reservation(reservation)
        assert 0 < n_done < n_pages, n_done
        driver.release(PAGE, handles)
        assert driver.physical_bytes() == 0
        print(text)
        """
    )
    assert "vm.max_map_count" in output or output == "too many to fill"


def lay_out_machine(root: Path, *, memory_kb: int, cgroup_bytes: int | None = None, used_bytes: int = 0) -> None:
    """Write a /proc (and a cgroup of version 2) as of a machine with so much memory."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(
        f"MemTotal: {memory_kb} kB\nMemAvailable: {memory_kb} kB\nHugepagesize: 2048 kB\n"
    )
    (root / "proc/self/maps").write_text("one\ntwo\n")
    if cgroup_bytes is not None:
        (root / "proc/self/cgroup").write_text("0::/box/inner\n")
        inner = root / "sys/fs/cgroup/box/inner"
        inner.mkdir(parents=True)
        (inner / "memory.max").write_text("max\n")
        (inner.parent / "memory.max").write_text(f"{cgroup_bytes}\n")
        (inner.parent / "memory.current").write_text(f"{used_bytes}\n")


def test_a_pool_larger_than_the_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    lay_out_machine(tmp_path, memory_kb=1024)
    machine = describe_machine(tmp_path)
    for name in ("describe_machine", "describe_memory"):
        monkeypatch.setattr(f"vmem_kv.driver.host.{name}", lambda: machine)
    driver = HostDriver(path)
    assert driver.info.memory_bytes == 1 << 20
    n_most = int((1 << 20) * 0.9) // PAGE
    assert PagePool(driver, PAGE).max_pages == n_most
    assert PagePool(driver, PAGE, n_most).max_pages == n_most
    with pytest.raises(ConfigError, match="are available on cpu, of which 90%"):
        PagePool(driver, PAGE, n_most + 1)
    driver.close()


def test_a_pool_larger_than_its_cgroup_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    lay_out_machine(tmp_path, memory_kb=1 << 30, cgroup_bytes=8 << 20, used_bytes=4 << 20)
    machine = describe_machine(tmp_path)
    assert machine.cgroup_limit_bytes == 8 << 20
    assert machine.usable_memory_bytes == 4 << 20
    for name in ("describe_machine", "describe_memory"):
        monkeypatch.setattr(f"vmem_kv.driver.host.{name}", lambda: machine)
    driver = HostDriver(path)
    with pytest.raises(ConfigError, match="lower max_bytes"):
        PagePool(driver, PAGE, (4 << 20) // PAGE)
    driver.close()


def test_a_pool_without_a_single_page_is_refused(open_host: OpenHost) -> None:
    with pytest.raises(ConfigError, match="at least one page"):
        PagePool(open_host(), PAGE, 0)
    with pytest.raises(ConfigError, match="multiple"):
        PagePool(open_host(), PAGE + 1, 4)
    with pytest.raises(ConfigError, match="multiple"):
        PagePool(open_host(), PAGE // 2, 4)


def test_an_impossible_reservation_changes_nothing(open_host: OpenHost) -> None:
    driver = open_host()
    with pytest.raises(OutOfAddressSpace):
        driver.reserve(1 << 50)
    assert max(end - start for start, end in mapped_ranges()) < 1 << 46


def test_handles_are_released_once(open_host: OpenHost) -> None:
    driver = open_host()
    handles: list[Handle] = []
    driver.create(PAGE, [PAGE], handles)
    driver.release(PAGE, handles)
    with pytest.raises(UsageError, match="not a live page"):
        driver.release(PAGE, handles)


def test_the_kernels_refusal_of_a_mapping_is_counted(open_host: OpenHost) -> None:
    driver = open_host()
    reservation = driver.reserve(4 * PAGE)
    handles: list[Handle] = []
    driver.create(PAGE, [reservation.base], handles)
    bad = Handle((1 << 62) + 1)  # not a multiple of the page: EINVAL
    with pytest.raises(Exception, match="EINVAL") as caught:
        driver.map(PAGE, [reservation.base, reservation.base + 2 * PAGE], [handles[0], bad])
    assert caught.value.n_done == 1  # type: ignore[attr-defined]
    driver.unmap([(reservation.base, PAGE)])
    driver.release(PAGE, handles)
    driver.free_reservation(reservation)


def test_out_of_mappings_is_a_type_of_its_own() -> None:
    assert not issubclass(OutOfMappings, OutOfAddressSpace)
