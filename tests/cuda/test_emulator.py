"""The emulated CUDA driver through the real cuda-python: loading, devices, memory, failures that tests plan."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cuda.machine import NONE, PAGE, READ, READ_WRITE, Machine, emulated_machine
from vmem_kv.errors import ConfigError, UsageError
from vmem_kv.testing.emulator import NOTHING, SIGNS_OF_A_DEVICE, Live, find_emulator, load_emulator

OUT_OF_MEMORY, NOT_INITIALIZED, DEINITIALIZED, STUB_LIBRARY, NO_DEVICE, INVALID_DEVICE, INVALID_CONTEXT = (
    2,
    3,
    4,
    34,
    100,
    101,
    201,
)
ILLEGAL_ADDRESS, NOT_SUPPORTED = 700, 801
PATTERN = b"\xa5"


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A started machine, on which nobody may have broken a rule."""
    with emulated_machine(n_devices=2) as machine:
        machine.start()
        yield machine
        assert machine.emulator.violations() == []


# Loading


def test_loading_twice_gives_the_same_driver(machine: Machine) -> None:
    again = load_emulator()
    again.cap_memory(10 * PAGE)
    assert machine.ok(machine.d.cuMemGetInfo()) == (10 * PAGE, 10 * PAGE)
    assert again.live() == Live(handles=0, mappings=0, reservations=0, streams=0, events=0, contexts=1)


def test_loading_what_was_not_built(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no emulated CUDA driver"):
        load_emulator(tmp_path / "nothing.so")


def test_devices_of_every_make_have_a_sign() -> None:
    cards, windows, jetson = {"dev/nvidiactl", "dev/nvidia0", "proc/driver/nvidia"}, {"dev/dxg"}, {"dev/nvhost-gpu"}
    assert cards | windows | jetson | {"dev/nvgpu"} == set(SIGNS_OF_A_DEVICE)


@pytest.mark.parametrize("sign", SIGNS_OF_A_DEVICE)
def test_no_loading_where_a_device_exists(tmp_path: Path, sign: str) -> None:
    (tmp_path / sign).parent.mkdir(parents=True)
    (tmp_path / sign).touch()
    with pytest.raises(ConfigError, match="does not stand in for a real one"):
        load_emulator(root=tmp_path)


@pytest.mark.parametrize("sign", SIGNS_OF_A_DEVICE)
def test_every_call_fails_where_a_device_exists(tmp_path: Path, sign: str) -> None:
    with emulated_machine() as machine:
        d, emulator = machine.d, machine.emulator
        assert not emulator.refuses(tmp_path)
        machine.ok(d.cuInit(0))
        (tmp_path / sign).parent.mkdir(parents=True)
        (tmp_path / sign).touch()
        assert emulator.refuses(tmp_path)
        assert {machine.raw(name) for name in emulator.call_names()} == {STUB_LIBRARY}
        emulator.reset()
        machine.ok(d.cuInit(0))


def test_another_libcuda_in_the_process(tmp_path: Path) -> None:
    from tests.core.subprocesses import output_of

    other = tmp_path / "libcuda.so.1"
    other.write_bytes(find_emulator().read_bytes())
    assert output_of(f"""
        import ctypes
        from vmem_kv.errors import ConfigError
        from vmem_kv.testing.emulator import load_emulator
        ctypes.CDLL({str(other)!r})
        try:
            load_emulator()
        except ConfigError as error:
            print(error)
    """).startswith("another libcuda.so.1 is loaded")


def test_no_import_of_the_package_loads_the_emulator() -> None:
    from tests.core.subprocesses import output_of

    assert (
        output_of("""
        import ctypes, importlib, os, pkgutil, warnings
        import vmem_kv
        warnings.simplefilter("ignore")
        found = []
        names = [module.name for module in pkgutil.walk_packages(vmem_kv.__path__, "vmem_kv.")]
        for name in names:
            if not name.endswith("__main__"):
                try:
                    importlib.import_module(name)
                    found.append(name)
                except ImportError:
                    assert name in ("vmem_kv._host", "vmem_kv._attention"), name  # libraries, not modules
        try:
            ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD)
        except OSError:
            print("none,", "vmem_kv.testing.emulator" in found, len(found) > 50)
    """)
        == "none, True True"
    )


def test_loaded_by_anyone_else_it_is_inert() -> None:
    """As when something finds the file and loads it: cuda-python then finds a library that has nothing."""
    from tests.core.subprocesses import output_of

    assert (
        output_of("""
        import ctypes
        from vmem_kv.testing.emulator import find_emulator, load_emulator
        library = ctypes.CDLL(str(find_emulator()), mode=ctypes.RTLD_GLOBAL)
        assert ctypes.CDLL("libcuda.so.1")._handle == library._handle

        def look_up():
            function, status = ctypes.c_void_p(), ctypes.c_int()
            arguments = (b"cuInit", ctypes.byref(function), 13000, ctypes.c_uint64(0), ctypes.byref(status))
            code = library.cuGetProcAddress_v2(*arguments)
            return code, function.value

        print(look_up())
        load_emulator()
        code, init = look_up()
        print(code, ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint)(init)(0))
        """)
        == f"({STUB_LIBRARY}, None)\n0 0"
    )


def test_inert_cuda_python_has_no_calls() -> None:
    from tests.core.subprocesses import output_of

    assert (
        output_of("""
        import ctypes
        from vmem_kv.testing.emulator import find_emulator
        ctypes.CDLL(str(find_emulator()), mode=ctypes.RTLD_GLOBAL)
        from cuda.bindings import driver
        try:
            print(driver.cuInit(0))
        except RuntimeError as error:
            print("no call:", error)
        """)
        .lower()
        .startswith("no call:")
    )


def test_only_the_look_up_and_the_controls_are_exported(machine: Machine) -> None:
    library = ctypes.CDLL(str(find_emulator()))
    assert library.cuGetProcAddress_v2
    for name in [*machine.emulator.call_names(), "state", "broken", "memory_map"]:
        assert not hasattr(library, name), name


def test_what_is_not_emulated_is_not_found(machine: Machine) -> None:
    with pytest.raises(RuntimeError, match="cuMemAlloc"):
        machine.d.cuMemAlloc(PAGE)


def test_a_forked_child_gets_nothing() -> None:
    from tests.core.subprocesses import output_of

    assert (
        output_of("""
        import os, warnings
        from tests.cuda.machine import PAGE, emulated_machine
        from vmem_kv.errors import UsageError
        warnings.simplefilter("ignore", DeprecationWarning)  # numpy may have threads, and Python warns of forks then
        with emulated_machine() as m:
            m.start()
            base = m.mapped()
            child = os.fork()
            if child == 0:
                answers = {m.code(answer) for answer in (
                    m.d.cuInit(0), m.d.cuDriverGetVersion(), m.d.cuMemGetInfo(), m.d.cuMemUnmap(base, PAGE))}
                try:
                    m.emulator.hold()
                except UsageError:
                    os._exit(0 if answers == {3} else 1)
                os._exit(2)
            print(os.waitpid(child, 0)[1], m.code(m.d.cuMemUnmap(base, PAGE)), m.emulator.violations())
    """)
        == "0 0 []"
    )


# Devices and contexts


def test_devices(machine: Machine) -> None:
    d, ok = machine.d, machine.ok
    assert ok(d.cuDeviceGetCount()) == 2
    assert ok(d.cuDriverGetVersion()) == 13000
    assert machine.code(d.cuDeviceGet(2)) == INVALID_DEVICE
    assert [int(ok(d.cuDeviceGet(i))) for i in range(2)] == [0, 1]
    assert ok(d.cuDeviceGetName(64, 1)).rstrip(b"\0 ") == b"Emulated device 1"
    assert bytes(ok(d.cuDeviceGetUuid(0)).bytes) != bytes(ok(d.cuDeviceGetUuid(1)).bytes)
    assert ok(d.cuDeviceTotalMem(1)) == 2 << 30
    attribute = d.CUdevice_attribute
    values = {
        attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED: 1,
        attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: 9,
        attribute.CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID: -1,
        attribute.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED: 0,
    }
    assert {name: ok(d.cuDeviceGetAttribute(name, 0)) for name in values} == values
    assert ok(d.cuDeviceCanAccessPeer(0, 1)) == 0
    assert ok(d.cuGetErrorName(d.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS)) == b"CUDA_ERROR_ILLEGAL_ADDRESS"
    assert ok(d.cuGetErrorString(d.CUresult.CUDA_ERROR_OUT_OF_MEMORY)) == b"out of memory"


def test_a_machine_without_devices() -> None:
    with emulated_machine(n_devices=0) as machine:
        assert machine.code(machine.d.cuInit(0)) == NO_DEVICE


def test_a_machine_without_virtual_memory(machine: Machine) -> None:
    d = machine.d
    machine.emulator.support_virtual_memory(False)
    attribute = d.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
    assert machine.ok(d.cuDeviceGetAttribute(attribute, 0)) == 0
    assert machine.code(d.cuMemAddressReserve(PAGE, 0, 0, 0)) == NOT_SUPPORTED
    assert machine.code(d.cuMemCreate(PAGE, machine.prop(), 0)) == NOT_SUPPORTED


def test_each_thread_has_its_own_contexts(machine: Machine) -> None:
    d, ok = machine.d, machine.ok
    zero, one = ok(d.cuCtxGetCurrent()), ok(d.cuDevicePrimaryCtxRetain(1))
    assert ok(d.cuDevicePrimaryCtxGetState(1)) == (0, 1)
    seen: list[list[int]] = []

    def look() -> None:
        steps = [int(ok(d.cuCtxGetCurrent()))]
        ok(d.cuCtxSetCurrent(one))
        ok(d.cuCtxPushCurrent(zero))
        steps.append(int(ok(d.cuCtxGetDevice())))
        assert int(ok(d.cuCtxPopCurrent())) == int(zero)
        steps.append(int(ok(d.cuCtxGetDevice())))
        seen.append(steps)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [[0, 0, 1]]
    assert int(ok(d.cuCtxGetDevice())) == 0
    ok(d.cuDevicePrimaryCtxRelease(1))
    assert ok(d.cuDevicePrimaryCtxGetState(1)) == (0, 0)


def test_a_released_context_is_current_no_more(machine: Machine) -> None:
    d, ok = machine.d, machine.ok
    ok(d.cuDevicePrimaryCtxRetain(0))
    ok(d.cuDevicePrimaryCtxRelease(0))
    assert int(ok(d.cuCtxGetDevice())) == 0  # somebody else retains it still
    ok(d.cuDevicePrimaryCtxRelease(0))
    assert int(ok(d.cuCtxGetCurrent())) == 0


# Memory


def test_a_page_s_whole_life(machine: Machine) -> None:
    d, ok, emulator = machine.d, machine.ok, machine.emulator
    base, handle = machine.reserve(), machine.create()
    machine.map(base, handle)
    ok(d.cuMemsetD8Async(base, 7, PAGE, 0))
    assert machine.read(base, PAGE) == b"\x07" * PAGE
    assert emulator.live() == Live(handles=1, mappings=1, reservations=1, streams=0, events=0, contexts=1)
    ok(d.cuMemUnmap(base, PAGE))
    ok(d.cuMemRelease(handle))
    ok(d.cuMemAddressFree(base, 16 * PAGE))
    ok(d.cuDevicePrimaryCtxRelease(0))
    assert emulator.live() == NOTHING


def test_new_pages_are_not_zero_unless_asked_for(machine: Machine) -> None:
    base = machine.mapped()
    assert machine.read(base, PAGE) == PATTERN * PAGE
    machine.emulator.zero_new_pages(True)
    machine.map(base + PAGE, machine.create())
    assert machine.read(base, 2 * PAGE) == PATTERN * PAGE + b"\0" * PAGE


def test_large_new_pages_are_full_of_the_pattern(machine: Machine) -> None:
    n_pages = 64
    base = machine.reserve(n_pages)
    machine.map(base, machine.create(n_pages), n_pages)
    assert machine.read(base, n_pages * PAGE) == PATTERN * (n_pages * PAGE)


def test_a_remapped_page_keeps_what_it_holds(machine: Machine) -> None:
    d, ok = machine.d, machine.ok
    base, handle = machine.reserve(), machine.create()
    machine.map(base, handle)
    ok(d.cuMemsetD8(base, 9, PAGE))
    ok(d.cuMemUnmap(base, PAGE))
    machine.map(base + 5 * PAGE, handle)
    assert machine.read(base + 5 * PAGE) == b"\x09" * 4


def test_aliases_are_the_same_memory(machine: Machine) -> None:
    base, handle = machine.reserve(), machine.create()
    machine.map(base, handle)
    machine.map(base + 9 * PAGE, handle)
    ctypes.memset(base + 9 * PAGE + 100, 0x55, 8)
    assert machine.read(base + 100, 8) == b"\x55" * 8
    machine.ok(machine.d.cuMemUnmap(base, PAGE))
    assert machine.read(base + 9 * PAGE + 100, 8) == b"\x55" * 8


def test_one_unmap_of_several_whole_mappings(machine: Machine) -> None:
    base = machine.mapped(3)
    machine.ok(machine.d.cuMemUnmap(base + PAGE, 2 * PAGE))
    assert machine.read(base) == PATTERN * 4
    assert machine.emulator.live().mappings == 1


def test_released_memory_lives_as_long_as_its_mappings(machine: Machine) -> None:
    d, ok = machine.d, machine.ok
    base, handle = machine.reserve(), machine.create()
    machine.map(base, handle)
    ok(d.cuMemRelease(handle))
    assert machine.read(base) == PATTERN * 4
    assert machine.emulator.live().handles == 1
    assert int(ok(d.cuMemRetainAllocationHandle(base + 5))) == handle
    ok(d.cuMemUnmap(base, PAGE))
    assert machine.emulator.live().handles == 1
    ok(d.cuMemRelease(handle))
    assert machine.emulator.live().handles == 0


def test_freed_memory_goes_back_to_the_system(machine: Machine) -> None:
    d, ok = machine.d, machine.ok
    base, handle = machine.reserve(64), machine.create(64)
    before = memory_file_bytes()
    machine.map(base, handle, 64)
    assert memory_file_bytes() == before + 64 * PAGE
    ok(d.cuMemRelease(handle))
    ok(d.cuMemUnmap(base, 64 * PAGE))
    assert memory_file_bytes() == before


def memory_file_bytes() -> int:
    """What the emulated device's memory takes of the host's."""
    n_bytes = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if "emulated device memory" in os.readlink(entry):
                n_bytes += entry.stat().st_blocks * 512
        except FileNotFoundError:
            continue
    return n_bytes


def test_neighbours_are_one_mapping_of_the_process(machine: Machine) -> None:
    base = machine.reserve(64)
    handles = [machine.create() for _ in range(64)]
    for i, handle in enumerate(handles):
        machine.ok(machine.d.cuMemMap(base + i * PAGE, PAGE, 0, handle, 0))
    for first in (0, 32):
        machine.ok(machine.d.cuMemSetAccess(base + first * PAGE, 32 * PAGE, [machine.desc()], 1))
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if "emulated device memory" in line]
    assert len(lines) == 1
    machine.ok(machine.d.cuMemsetD8(base, 3, 64 * PAGE))
    assert machine.read(base, 64 * PAGE) == b"\x03" * (64 * PAGE)


def test_pages_in_another_order_keep_their_contents_apart(machine: Machine) -> None:
    base = machine.reserve()
    handles = [machine.create() for _ in range(4)]
    for i, handle in enumerate(reversed(handles)):
        machine.ok(machine.d.cuMemMap(base + i * PAGE, PAGE, 0, handle, 0))
    machine.ok(machine.d.cuMemSetAccess(base, 4 * PAGE, [machine.desc()], 1))
    for i in range(4):
        machine.ok(machine.d.cuMemsetD8(base + i * PAGE, i, PAGE))
    for i, handle in enumerate(reversed(handles)):
        machine.map(base + (8 + i) * PAGE, handle)
        assert machine.read(base + (8 + i) * PAGE) == bytes([i]) * 4


def test_access_comes_and_goes(machine: Machine) -> None:
    d, ok = machine.d, machine.ok
    base = machine.mapped(2)
    for access in (READ, NONE, READ_WRITE):
        ok(d.cuMemSetAccess(base, PAGE, [machine.desc(access=access)], 1))
        assert ok(d.cuMemGetAccess(machine.desc().location, base + 17)) == access
        assert ok(d.cuMemGetAccess(machine.desc(1).location, base)) == NONE
        assert ok(d.cuMemGetAccess(machine.desc().location, base + PAGE)) == READ_WRITE
    assert machine.read(base) == PATTERN * 4


@pytest.mark.parametrize(
    ("touch", "faults"),
    [
        ("ctypes.string_at(base, 1)", False),
        ("ctypes.string_at(base + 2 * PAGE - 1, 1)", False),
        ("ctypes.string_at(base + 2 * PAGE, 1)", True),
        ("ctypes.string_at(base + 3 * PAGE, 1)", True),
        ("ctypes.memset(base + PAGE, 0, 1)", True),
        ("(m.ok(m.d.cuMemUnmap(base, PAGE)), ctypes.string_at(base, 1))", True),
        ("(m.ok(m.d.cuMemUnmap(base, PAGE)), ctypes.string_at(base + PAGE, 1))", False),
        ("(m.emulator.reset(force=True), ctypes.string_at(base + PAGE, 1))", True),
    ],
)
def test_a_touch_without_access_is_a_real_fault(touch: str, faults: bool) -> None:
    from tests.core.subprocesses import run_python

    done = run_python(f"""
        import ctypes
        from tests.cuda.machine import NONE, PAGE, READ, emulated_machine
        with emulated_machine() as m:
            m.start()
            base = m.mapped()
            m.map(base + PAGE, m.create(), access=READ)
            m.map(base + 3 * PAGE, m.create(), access=NONE)
            print("before", flush=True)
            {touch}
            print("after")
    """)
    assert done.stdout.split() == (["before"] if faults else ["before", "after"]), done.stderr
    assert done.returncode == (-11 if faults else 0), done.stderr


def test_reservations_are_aligned_and_may_be_huge(machine: Machine) -> None:
    d, ok = machine.d, machine.ok
    for alignment in (0, 2, PAGE, 64 * PAGE):
        base = int(ok(d.cuMemAddressReserve(1 << 40, alignment, 0, 0)))
        assert base % max(alignment, PAGE) == 0
        ok(d.cuMemAddressFree(base, 1 << 40))
    assert machine.code(d.cuMemAddressReserve(1 << 60, 0, 0, 0)) == OUT_OF_MEMORY
    assert machine.code(d.cuMemAddressReserve(2**64 - PAGE, PAGE, 0, 0)) == OUT_OF_MEMORY


def test_large_granularity() -> None:
    with emulated_machine() as machine:
        d, ok = machine.d, machine.ok
        machine.emulator.set_granularity(2 << 20)
        machine.start()
        kind = d.CUmemAllocationGranularity_flags
        for name in (kind.CU_MEM_ALLOC_GRANULARITY_MINIMUM, kind.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED):
            assert ok(d.cuMemGetAllocationGranularity(machine.prop(), name)) == 2 << 20
        assert int(ok(d.cuMemAddressReserve(2 << 20, 0, 0, 0))) % (2 << 20) == 0
        assert machine.code(d.cuMemCreate(1 << 20, machine.prop(), 0)) == 1


def test_fills_and_copies(machine: Machine) -> None:
    d, ok = machine.d, machine.ok
    base = machine.mapped(4)
    ok(d.cuMemsetD8(base, 1, PAGE))
    ok(d.cuMemsetD8Async(base + PAGE - 2, 2, 4, 0))  # over the border of two mappings
    assert machine.read(base + PAGE - 4, 8) == b"\1\1\2\2\2\2" + PATTERN * 2
    ok(d.cuMemsetD32(base, 0x04030201, 2))
    ok(d.cuMemsetD32Async(base + 8, 0x08070605, 1, 0))
    assert machine.read(base, 13) == bytes([1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 7, 8, 1])
    for copy in (d.cuMemcpyDtoD, d.cuMemcpy):
        ok(copy(base + 2 * PAGE, base, PAGE + 3))
        assert machine.read(base + 2 * PAGE, PAGE + 4) == machine.read(base, PAGE + 3) + PATTERN
        ok(d.cuMemsetD8(base + 2 * PAGE, PATTERN[0], 2 * PAGE))
    for queued in (d.cuMemcpyDtoDAsync, d.cuMemcpyAsync):
        ok(queued(base + 2 * PAGE, base, 8, 0))
        assert machine.read(base + 2 * PAGE, 9) == machine.read(base, 8) + PATTERN
        ok(d.cuMemsetD8(base + 2 * PAGE, PATTERN[0], PAGE))
    host = bytearray(12)
    ok(d.cuMemcpyDtoH(host, base, 12))
    assert host == machine.read(base, 12)
    ok(d.cuMemcpyHtoDAsync(base + 100, bytearray(range(12)), 12, 0))
    ok(d.cuMemcpyDtoHAsync(host, base + 100, 12, 0))
    assert host == bytes(range(12))
    ok(d.cuMemcpyHtoD(base + 200, b"\x42" * 3, 3))
    assert machine.read(base + 199, 5) == b"\x01BBB\x01"


def test_pointer_attributes(machine: Machine) -> None:
    d, ok = machine.d, machine.ok
    base = machine.mapped()
    kind = d.CUpointer_attribute
    assert int(ok(d.cuPointerGetAttribute(kind.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, base + 5))) == 0
    assert int(ok(d.cuPointerGetAttribute(kind.CU_POINTER_ATTRIBUTE_RANGE_SIZE, base + 5))) == 16 * PAGE
    assert machine.code(d.cuPointerGetAttribute(kind.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, base + PAGE)) == 1


def test_memory_runs_out(machine: Machine) -> None:
    d, ok = machine.d, machine.ok
    machine.emulator.cap_memory(3 * PAGE)
    first = machine.create(2)
    assert ok(d.cuMemGetInfo()) == (PAGE, 3 * PAGE)
    assert machine.code(d.cuMemCreate(2 * PAGE, machine.prop(), 0)) == OUT_OF_MEMORY
    assert machine.code(d.cuMemCreate(2**64 - PAGE, machine.prop(), 0)) == OUT_OF_MEMORY
    machine.create(2, device=1)  # another device has its own
    ok(d.cuMemRelease(first))
    machine.create(3)
    assert ok(d.cuMemGetInfo()) == (0, 3 * PAGE)
    machine.emulator.cap_memory(PAGE)  # less than is used
    assert ok(d.cuMemGetInfo()) == (0, PAGE)
    assert machine.code(d.cuMemCreate(PAGE, machine.prop(), 0)) == OUT_OF_MEMORY


def test_mappings_run_out_when_access_is_given(machine: Machine) -> None:
    d, ok = machine.d, machine.ok
    machine.emulator.cap_mappings(2)
    base = machine.mapped()
    for i in (1, 2):
        ok(d.cuMemMap(base + i * PAGE, PAGE, 0, machine.create(), 0))
    assert machine.code(d.cuMemSetAccess(base + PAGE, 2 * PAGE, [machine.desc()], 1)) == OUT_OF_MEMORY
    assert ok(d.cuMemGetAccess(machine.desc().location, base + PAGE)) == NONE
    ok(d.cuMemSetAccess(base + PAGE, PAGE, [machine.desc()], 1))
    assert machine.code(d.cuMemSetAccess(base + 2 * PAGE, PAGE, [machine.desc()], 1)) == OUT_OF_MEMORY
    ok(d.cuMemUnmap(base, PAGE))
    ok(d.cuMemSetAccess(base + PAGE, 2 * PAGE, [machine.desc()], 1))


# Failures that tests plan


def test_the_nth_call_fails_and_does_nothing(machine: Machine) -> None:
    machine.emulator.fail("cuMemCreate", OUT_OF_MEMORY, nth=2)
    codes = [machine.code(machine.d.cuMemCreate(PAGE, machine.prop(), 0)) for _ in range(4)]
    assert codes == [0, OUT_OF_MEMORY, 0, 0]
    assert machine.emulator.live().handles == 3
    assert machine.emulator.calls()["cuMemCreate"] == 4


def test_all_calls_fail_from_the_nth_on(machine: Machine) -> None:
    machine.create()
    machine.emulator.fail("cuMemCreate", OUT_OF_MEMORY, nth=2, and_on=True)
    codes = [machine.code(machine.d.cuMemCreate(PAGE, machine.prop(), 0)) for _ in range(4)]
    assert codes == [0, OUT_OF_MEMORY, OUT_OF_MEMORY, OUT_OF_MEMORY]
    machine.ok(machine.d.cuMemGetInfo())
    machine.emulator.succeed("cuMemCreate")
    machine.create()


def test_a_sticky_error_ends_everything(machine: Machine) -> None:
    d = machine.d
    base = machine.mapped()
    machine.emulator.fail("cuMemUnmap", ILLEGAL_ADDRESS, sticky=True)
    machine.ok(d.cuMemGetInfo())
    assert machine.code(d.cuMemUnmap(base, PAGE)) == ILLEGAL_ADDRESS
    for answer in (d.cuMemGetInfo(), d.cuInit(0), d.cuCtxSynchronize(), d.cuMemUnmap(base, PAGE), d.cuEventQuery(0)):
        assert machine.code(answer) == ILLEGAL_ADDRESS
    with_names = (715, 716, 217, 802, 226, 721, 810, 911, 906, 907)
    for code in with_names:
        result = d.CUresult(code)
        assert machine.ok(d.cuGetErrorName(result)).decode() == result.name
    machine.ok(d.cuDriverGetVersion())
    machine.ok(d.cuGetErrorName(d.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS))
    machine.emulator.make_sticky(0)
    machine.ok(d.cuMemUnmap(base, PAGE))


def test_which_context_is_current_does_not_depend_on_the_work(machine: Machine) -> None:
    """So a caller that pushed a context can pop it whatever happened meanwhile."""
    d, ok = machine.d, machine.ok
    zero, one = ok(d.cuCtxGetCurrent()), ok(d.cuDevicePrimaryCtxRetain(1))
    machine.emulator.make_sticky(ILLEGAL_ADDRESS)
    ok(d.cuCtxPushCurrent(one))
    assert int(ok(d.cuCtxGetCurrent())) == int(one)
    assert int(ok(d.cuCtxPopCurrent())) == int(one)
    ok(d.cuCtxSetCurrent(zero))
    assert int(ok(d.cuCtxGetCurrent())) == int(zero)
    assert machine.code(d.cuCtxSynchronize()) == ILLEGAL_ADDRESS


def test_a_failure_planned_before_a_reset_does_not_happen_after_it(machine: Machine) -> None:
    d, ok, emulator = machine.d, machine.ok, machine.emulator
    context, answers = ok(d.cuCtxGetCurrent()), []
    emulator.slow("cuMemGetInfo", 1_000_000)  # it is asleep when the reset comes
    emulator.fail("cuMemGetInfo", ILLEGAL_ADDRESS, sticky=True)

    def sleep() -> None:
        ok(d.cuCtxSetCurrent(context))
        answers.append(machine.code(d.cuMemGetInfo()))

    sleeper = threading.Thread(target=sleep)
    sleeper.start()
    while emulator.calls()["cuMemGetInfo"] < 1:
        time.sleep(0.001)
    emulator.reset(force=True)
    sleeper.join()
    assert answers == [DEINITIALIZED]
    ok(d.cuInit(0))


def test_no_context_of_any_thread_outlives_a_reset(machine: Machine) -> None:
    d, ok, emulator = machine.d, machine.ok, machine.emulator
    may_go_on, was_reset, seen = threading.Event(), threading.Event(), []

    def hold() -> None:
        ok(d.cuCtxPushCurrent(ok(d.cuDevicePrimaryCtxRetain(0))))
        may_go_on.set()
        was_reset.wait()
        ok(d.cuInit(0))
        seen.append(machine.code(d.cuCtxPopCurrent()))

    thread = threading.Thread(target=hold)
    thread.start()
    may_go_on.wait()
    emulator.reset(force=True)
    was_reset.set()
    thread.join()
    assert seen == [INVALID_CONTEXT], "there was nothing to pop"
    for _ in range(20):  # more than a thread's stack has room for
        emulator.reset(force=True)
        ok(d.cuInit(0))
        ok(d.cuCtxPushCurrent(ok(d.cuDevicePrimaryCtxRetain(0))))


def test_a_slow_call_takes_its_time_but_not_the_lock(machine: Machine) -> None:
    machine.emulator.slow("cuMemGetInfo", 50_000)
    before = time.monotonic()
    machine.ok(machine.d.cuMemGetInfo())
    assert time.monotonic() - before >= 0.05  # at least: a sleep never ends early
    machine.emulator.slow("cuMemGetInfo", 3_600_000_000)
    sleeper = threading.Thread(target=machine.d.cuMemGetInfo, daemon=True)  # for an hour, or until the process ends
    sleeper.start()
    while machine.emulator.calls()["cuMemGetInfo"] < 2:
        time.sleep(0.001)
    machine.ok(machine.d.cuCtxGetDevice())


def test_controls_refuse_nonsense(machine: Machine) -> None:
    emulator = machine.emulator
    with pytest.raises(UsageError, match="no such entry point: cuMemAlloc"):
        emulator.fail("cuMemAlloc", 1)
    with pytest.raises(UsageError, match="no such entry point: cuMemAlloc"):
        emulator.slow("cuMemAlloc", 1)
    with pytest.raises(UsageError, match="nth must be at least 1"):
        emulator.fail("cuMemMap", 1, nth=0)
    with pytest.raises(UsageError, match="something is live still"):
        emulator.set_granularity(2 * PAGE)
    with pytest.raises(UsageError, match="something is live still"):
        emulator.set_n_devices(1)
    with pytest.raises(UsageError, match=f"a value that cannot be: {3 * PAGE}"):
        emulator.set_granularity(3 * PAGE)
    with pytest.raises(UsageError, match="a value that cannot be: 9"):
        emulator.set_n_devices(9)
    with pytest.raises(UsageError, match="-1 is negative"):
        emulator.cap_memory(-1)
    with pytest.raises(UsageError, match="no such thing"):
        emulator.hold(0xDEAD0)
    with pytest.raises(UsageError, match="no such thing"):
        emulator.hold(device=2)
    with pytest.raises(UsageError, match="no such thing"):
        emulator.capture(0xDEAD0, True)
    with pytest.raises(UsageError, match="no such thing"):
        emulator.use(machine.reserve(), PAGE)


def test_reset_refuses_while_anything_lives(machine: Machine) -> None:
    d, ok, emulator = machine.d, machine.ok, machine.emulator
    with pytest.raises(UsageError, match="contexts=1"):
        emulator.reset()
    base = machine.mapped()
    ok(d.cuStreamCreate(0))
    ok(d.cuEventCreate(0))
    with pytest.raises(UsageError, match="handles=1, mappings=1, reservations=1, streams=1, events=1, contexts=1"):
        emulator.reset()
    assert machine.read(base) == PATTERN * 4
    emulator.hold()
    ok(d.cuMemsetD8Async(base, 0, PAGE, 0))
    emulator.reset(force=True)
    assert emulator.live() == NOTHING
    assert not emulator.is_busy()
    assert emulator.calls() == {}
    emulator.reset()
    ok(d.cuInit(0))
    assert ok(d.cuDeviceGetCount()) == 1


def test_the_list_of_violations_ends_somewhere() -> None:
    with emulated_machine() as machine:
        for _ in range(300):
            assert machine.code(machine.d.cuDeviceGet(0)) == NOT_INITIALIZED
        assert machine.emulator.violations() == ["INIT: cuDeviceGet: before cuInit"] * 256
        machine.emulator.forget_violations()
        assert machine.emulator.violations() == []


def test_many_threads_at_once(machine: Machine) -> None:
    errors: list[BaseException] = []
    base = machine.reserve(64)

    def churn(lane: int) -> None:
        d, ok = machine.d, machine.ok
        try:
            ok(d.cuCtxSetCurrent(ok(d.cuDevicePrimaryCtxRetain(0))))
            stream, event = ok(d.cuStreamCreate(1)), ok(d.cuEventCreate(2))
            for turn in range(100):
                start = base + lane * 8 * PAGE
                handles = [machine.create() for _ in range(4)]
                for i, handle in enumerate(handles):
                    ok(d.cuMemMap(start + i * PAGE, PAGE, 0, handle, 0))
                ok(d.cuMemSetAccess(start, 4 * PAGE, [machine.desc()], 1))
                machine.map(start + 6 * PAGE, handles[0])
                ok(d.cuMemsetD8Async(start, (lane * 31 + turn) % 256, PAGE, stream))
                ok(d.cuEventRecord(event, stream))
                ok(d.cuEventSynchronize(event))
                assert machine.read(start + 6 * PAGE) == bytes([(lane * 31 + turn) % 256]) * 4
                ok(d.cuMemUnmap(start, 4 * PAGE))
                ok(d.cuMemUnmap(start + 6 * PAGE, PAGE))
                for handle in handles:
                    ok(d.cuMemRelease(handle))
            ok(d.cuStreamDestroy(stream))
            ok(d.cuEventDestroy(event))
            ok(d.cuDevicePrimaryCtxRelease(0))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=churn, args=(lane,)) for lane in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    machine.ok(machine.d.cuMemAddressFree(base, 64 * PAGE))
    machine.ok(machine.d.cuDevicePrimaryCtxRelease(0))
    assert machine.emulator.live() == NOTHING
