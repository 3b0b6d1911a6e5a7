"""Each rule of the emulated driver, and a deliberately wrong caller that it catches.

A wrong caller returns the results of its wrong calls. Each must have the rule's code, be written down once under the
rule's name, and change nothing that is counted.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.cuda.machine import NONE, PAGE, READ, READ_WRITE, Machine, emulated_machine

INVALID_VALUE, NOT_INITIALIZED, INVALID_DEVICE, INVALID_CONTEXT, INVALID_HANDLE = 1, 3, 101, 201, 400
ALREADY_REGISTERED, NOT_REGISTERED = 712, 713
WrongCaller = Callable[[Machine], Iterator[int]]
WRONG_CALLERS: list[tuple[str, int, WrongCaller]] = []


@pytest.fixture
def machine() -> Iterator[Machine]:
    with emulated_machine(n_devices=2) as machine:
        yield machine


def breaks(rule: str, code: int = INVALID_VALUE) -> Callable[[WrongCaller], WrongCaller]:
    def add(caller: WrongCaller) -> WrongCaller:
        WRONG_CALLERS.append((rule, code, caller))
        return caller

    return add


def in_new_thread(call: Callable[[], int]) -> int:
    answers: list[int] = []
    thread = threading.Thread(target=lambda: answers.append(call()))
    thread.start()
    thread.join()
    return answers[0]


# A wrong caller prepares, and then yields one result after the other.


@breaks("INIT", NOT_INITIALIZED)
def before_init(m: Machine) -> Iterator[int]:
    yield m.code(m.d.cuDeviceGet(0))
    yield m.code(m.d.cuDeviceGetCount())
    yield m.code(m.d.cuDevicePrimaryCtxRetain(0))
    yield m.code(m.d.cuCtxGetCurrent())
    yield m.code(m.d.cuMemAddressReserve(PAGE, 0, 0, 0))
    yield m.code(m.d.cuEventQuery(16))


@breaks("CONTEXT", INVALID_CONTEXT)
def without_a_context(m: Machine) -> Iterator[int]:
    m.start()
    base, handle = m.mapped(), m.create()
    event, stream = m.ok(m.d.cuEventCreate(0)), m.ok(m.d.cuStreamCreate(0))
    host = bytearray(4)
    calls: list[Callable[[], tuple[object, ...]]] = [
        lambda: m.d.cuCtxGetDevice(),
        lambda: m.d.cuCtxSynchronize(),
        lambda: m.d.cuMemGetInfo(),
        lambda: m.d.cuMemAddressReserve(PAGE, 0, 0, 0),
        lambda: m.d.cuMemAddressFree(base, 16 * PAGE),
        lambda: m.d.cuMemCreate(PAGE, m.prop(), 0),
        lambda: m.d.cuMemRelease(handle),
        lambda: m.d.cuMemMap(base + PAGE, PAGE, 0, handle, 0),
        lambda: m.d.cuMemUnmap(base, PAGE),
        lambda: m.d.cuMemSetAccess(base, PAGE, [m.desc()], 1),
        lambda: m.d.cuMemGetAccess(m.desc().location, base),
        lambda: m.d.cuMemRetainAllocationHandle(base),
        lambda: m.d.cuMemsetD8(base, 0, 4),
        lambda: m.d.cuMemsetD8Async(base, 0, 4, 0),
        lambda: m.d.cuMemsetD32Async(base, 0, 1, 0),
        lambda: m.d.cuMemcpyAsync(base, base + 8, 4, 0),
        lambda: m.d.cuMemcpyDtoDAsync(base, base + 8, 4, 0),
        lambda: m.d.cuMemcpyDtoHAsync(host, base, 4, 0),
        lambda: m.d.cuMemcpyHtoDAsync(base, host, 4, 0),
        lambda: m.d.cuMemHostRegister(0, 0, 0),
        lambda: m.d.cuMemHostUnregister(0),
        lambda: m.d.cuStreamCreate(0),
        lambda: m.d.cuStreamQuery(stream),
        lambda: m.d.cuStreamSynchronize(stream),
        lambda: m.d.cuStreamWaitEvent(stream, event, 0),
        lambda: m.d.cuStreamDestroy(stream),
        lambda: m.d.cuEventCreate(0),
        lambda: m.d.cuEventRecord(event, 0),
        lambda: m.d.cuEventDestroy(event),
        lambda: m.d.cuCtxPopCurrent(),
    ]
    for call in calls:
        yield in_new_thread(lambda call=call: m.code(call()))  # type: ignore[misc]


@breaks("CONTEXT", INVALID_CONTEXT)
def with_a_context_that_was_released_and_came_back(m: Machine) -> Iterator[int]:
    m.start()
    m.ok(m.d.cuDevicePrimaryCtxRelease(0))
    yield m.code(m.d.cuMemGetInfo())
    m.ok(m.d.cuDevicePrimaryCtxRetain(0))
    yield m.code(m.d.cuMemGetInfo())


@breaks("CONTEXT_RETAINED", INVALID_CONTEXT)
def use_of_a_context_that_nobody_retains(m: Machine) -> Iterator[int]:
    m.ok(m.d.cuInit(0))
    context = m.ok(m.d.cuDevicePrimaryCtxRetain(0))
    m.ok(m.d.cuDevicePrimaryCtxRelease(0))
    yield m.code(m.d.cuCtxSetCurrent(context))
    yield m.code(m.d.cuCtxPushCurrent(context))
    yield m.code(m.d.cuCtxSetCurrent(m.d.CUcontext(0x1234)))
    yield m.code(m.d.cuDevicePrimaryCtxRelease(0))
    yield m.code(m.d.cuDevicePrimaryCtxRelease(1))


@breaks("CONTEXT_IDLE")
def last_release_with_a_stream_an_event_or_work_left(m: Machine) -> Iterator[int]:
    m.start()
    event = m.ok(m.d.cuEventCreate(0))
    yield m.code(m.d.cuDevicePrimaryCtxRelease(0))
    m.ok(m.d.cuEventDestroy(event))
    stream = m.ok(m.d.cuStreamCreate(0))
    yield m.code(m.d.cuDevicePrimaryCtxRelease(0))
    m.ok(m.d.cuStreamDestroy(stream))
    base = m.mapped()
    m.emulator.hold()
    m.ok(m.d.cuMemsetD8Async(base, 0, 4, 0))
    yield m.code(m.d.cuDevicePrimaryCtxRelease(0))


@breaks("DEVICE", INVALID_DEVICE)
def of_a_device_that_is_not_there(m: Machine) -> Iterator[int]:
    m.start()
    yield m.code(m.d.cuDeviceGetName(16, 2))
    yield m.code(m.d.cuDeviceGetAttribute(m.d.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_WARP_SIZE, -1))
    yield m.code(m.d.cuDeviceTotalMem(7))
    yield m.code(m.d.cuDeviceGetUuid(2))
    yield m.code(m.d.cuDevicePrimaryCtxRetain(2))
    yield m.code(m.d.cuDevicePrimaryCtxRelease(2))


@breaks("VALUE")
def unknown_flags(m: Machine) -> Iterator[int]:
    m.start()
    base, handle = m.reserve(), m.create()
    event = m.ok(m.d.cuEventCreate(0))
    yield m.code(m.d.cuInit(1))
    yield m.code(m.d.cuMemAddressReserve(PAGE, 0, 0, 1))
    yield m.code(m.d.cuMemCreate(PAGE, m.prop(), 1))
    yield m.code(m.d.cuMemMap(base, PAGE, 0, handle, 1))
    yield m.code(m.d.cuStreamCreate(2))
    yield m.code(m.d.cuStreamWaitEvent(0, event, 8))
    yield m.code(m.d.cuEventCreate(8))
    yield m.code(m.d.cuEventCreate(4))  # to share an event with timing


@breaks("VALUE")
def memory_of_another_kind(m: Machine) -> Iterator[int]:
    m.start()
    for change in (
        lambda p: setattr(p, "type", m.d.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_INVALID),
        lambda p: setattr(p.location, "type", m.d.CUmemLocationType.CU_MEM_LOCATION_TYPE_HOST),
        lambda p: setattr(p.location, "type", m.d.CUmemLocationType.CU_MEM_LOCATION_TYPE_INVALID),
        lambda p: setattr(p.location, "id", 2),
        lambda p: setattr(p.location, "id", -1),
        lambda p: setattr(
            p, "requestedHandleTypes", m.d.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        ),
        lambda p: setattr(p.allocFlags, "compressionType", 1),
        lambda p: setattr(p.allocFlags, "usage", 1),
    ):
        prop = m.prop()
        change(prop)
        yield m.code(m.d.cuMemCreate(PAGE, prop, 0))
        yield m.code(
            m.d.cuMemGetAllocationGranularity(
                prop, m.d.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
            )
        )


@breaks("VALUE")
def access_of_another_kind(m: Machine) -> Iterator[int]:
    m.start()
    base = m.mapped()
    desc = m.desc()
    desc.location.type = m.d.CUmemLocationType.CU_MEM_LOCATION_TYPE_HOST_NUMA
    yield m.code(m.d.cuMemSetAccess(base, PAGE, [desc], 1))
    desc = m.desc()
    desc.flags = m.d.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_MAX
    yield m.code(m.d.cuMemSetAccess(base, PAGE, [desc], 1))
    yield m.code(m.d.cuMemSetAccess(base, PAGE, [], 0))
    yield m.code(m.d.cuMemSetAccess(base, PAGE, [m.desc(), m.desc(1)], 2))
    desc = m.desc()
    desc.location.type = m.d.CUmemLocationType.CU_MEM_LOCATION_TYPE_HOST
    yield m.code(m.d.cuMemGetAccess(desc.location, base))
    yield m.code(m.d.cuMemGetAccess(m.desc().location, base + PAGE))  # nothing is mapped there
    yield m.code(m.d.cuMemRetainAllocationHandle(base + PAGE))


@breaks("VALUE")
def no_room_for_results(m: Machine) -> Iterator[int]:
    m.start()
    for name in (
        "cuGetErrorName",
        "cuGetErrorString",
        "cuDriverGetVersion",
        "cuDeviceGet",
        "cuDeviceGetCount",
        "cuDeviceGetName",
        "cuDeviceGetUuid",
        "cuDeviceGetAttribute",
        "cuDeviceTotalMem",
        "cuDeviceCanAccessPeer",
        "cuDevicePrimaryCtxRetain",
        "cuDevicePrimaryCtxGetState",
        "cuCtxGetCurrent",
        "cuCtxPushCurrent",
        "cuCtxGetDevice",
        "cuMemGetInfo",
        "cuMemGetAllocationGranularity",
        "cuMemAddressReserve",
        "cuMemCreate",
        "cuMemSetAccess",
        "cuMemGetAccess",
        "cuMemRetainAllocationHandle",
        "cuStreamCreate",
        "cuStreamCreateWithPriority",
        "cuStreamIsCapturing",
        "cuEventCreate",
        "cuEventElapsedTime",
        "cuThreadExchangeStreamCaptureMode",
    ):
        yield m.raw(name)


@breaks("VALUE")
def nothing_where_something_must_be(m: Machine) -> Iterator[int]:
    m.start()
    base, place = m.mapped(), ctypes.create_string_buffer(64)
    room = ctypes.addressof(place)
    yield m.code(m.d.cuMemCreate(PAGE, None, 0))
    yield m.raw("cuMemGetAllocationGranularity", room, m.prop().getPtr(), 2)
    yield m.raw("cuDeviceGetAttribute", room, 0, 0)
    yield m.raw("cuDeviceGetAttribute", room, 100_000, 0)
    place[0] = b"\3"
    yield m.raw("cuThreadExchangeStreamCaptureMode", room)  # there is no mode 3
    yield m.code(m.d.cuMemcpyDtoHAsync(0, base, 4, 0))
    yield m.code(m.d.cuMemcpyHtoDAsync(base, 0, 4, 0))
    for _ in range(15):
        m.ok(m.d.cuCtxPushCurrent(m.ok(m.d.cuCtxGetCurrent())))
    yield m.code(m.d.cuCtxPushCurrent(m.ok(m.d.cuCtxGetCurrent())))


@breaks("ALIGNMENT")
def odd_sizes_and_addresses(m: Machine) -> Iterator[int]:
    m.start()
    base, handle = m.mapped(), m.create()
    for n_bytes in (0, 1, PAGE - 1, PAGE + 512):
        yield m.code(m.d.cuMemAddressReserve(n_bytes, 0, 0, 0))
        yield m.code(m.d.cuMemCreate(n_bytes, m.prop(), 0))
        yield m.code(m.d.cuMemMap(base + PAGE, n_bytes, 0, handle, 0))
        yield m.code(m.d.cuMemSetAccess(base, n_bytes, [m.desc()], 1))
        yield m.code(m.d.cuMemUnmap(base, n_bytes))
    for odd in (1, 512, PAGE - 1):
        yield m.code(m.d.cuMemAddressReserve(PAGE, 0, odd, 0))
        yield m.code(m.d.cuMemMap(base + PAGE + odd, PAGE, 0, handle, 0))
        yield m.code(m.d.cuMemSetAccess(base + odd, PAGE, [m.desc()], 1))
        yield m.code(m.d.cuMemUnmap(base + odd, PAGE))
    yield m.code(m.d.cuMemAddressReserve(PAGE, 3 * PAGE, 0, 0))
    yield m.code(m.d.cuMemsetD32Async(base + 2, 0, 1, 0))
    yield m.code(m.d.cuMemUnmap(base, 2**64 - PAGE))  # the end wraps around


@breaks("OFFSET")
def map_the_inside_of_a_handle(m: Machine) -> Iterator[int]:
    m.start()
    base, handle = m.reserve(), m.create(2)
    yield m.code(m.d.cuMemMap(base, PAGE, PAGE, handle, 0))
    yield m.code(m.d.cuMemMap(base, 2 * PAGE, PAGE, handle, 0))


@breaks("HANDLE")
def dead_handles(m: Machine) -> Iterator[int]:
    m.start()
    base = m.reserve()
    released, mapped = m.create(), m.create()
    m.ok(m.d.cuMemRelease(released))
    yield m.code(m.d.cuMemRelease(released))
    yield m.code(m.d.cuMemRelease(0))
    yield m.code(m.d.cuMemRelease(0xDEAD))
    yield m.code(m.d.cuMemMap(base, PAGE, 0, released, 0))
    successor = m.create()  # in the dead one's place, but not by its name
    assert successor != released
    yield m.code(m.d.cuMemRelease(released))
    m.map(base, mapped)
    m.ok(m.d.cuMemRelease(mapped))
    yield m.code(m.d.cuMemRelease(mapped))  # only its mapping keeps the memory
    yield m.code(m.d.cuMemMap(base + PAGE, PAGE, 0, mapped, 0))


@breaks("HANDLE")
def one_release_more_than_retained(m: Machine) -> Iterator[int]:
    m.start()
    base, handle = m.reserve(), m.create()
    m.map(base, handle)
    assert int(m.ok(m.d.cuMemRetainAllocationHandle(base))) == handle
    m.ok(m.d.cuMemRelease(handle))
    m.ok(m.d.cuMemRelease(handle))
    yield m.code(m.d.cuMemRelease(handle))


@breaks("HANDLE_SIZE")
def map_another_size(m: Machine) -> Iterator[int]:
    m.start()
    base, handle = m.reserve(), m.create(2)
    yield m.code(m.d.cuMemMap(base, PAGE, 0, handle, 0))
    yield m.code(m.d.cuMemMap(base, 3 * PAGE, 0, handle, 0))


@breaks("MAP_RESERVED")
def map_where_nothing_is_reserved(m: Machine) -> Iterator[int]:
    m.start()
    handle, pair = m.create(), m.create(2)
    base = m.reserve(4)
    yield m.code(m.d.cuMemMap(base + 4 * PAGE, PAGE, 0, handle, 0))
    yield m.code(m.d.cuMemMap(base - PAGE, PAGE, 0, handle, 0))
    yield m.code(m.d.cuMemMap(base + 3 * PAGE, 2 * PAGE, 0, pair, 0))
    yield m.code(m.d.cuMemMap(base - PAGE, 2 * PAGE, 0, pair, 0))
    m.ok(m.d.cuMemAddressFree(base, 4 * PAGE))
    yield m.code(m.d.cuMemMap(base, PAGE, 0, handle, 0))


@breaks("MAP_RESERVED")
def map_over_the_border_of_two_reservations(m: Machine) -> Iterator[int]:
    m.start()
    room = m.reserve(4)
    m.ok(m.d.cuMemAddressFree(room, 4 * PAGE))
    low = int(m.ok(m.d.cuMemAddressReserve(2 * PAGE, 0, room, 0)))
    high = int(m.ok(m.d.cuMemAddressReserve(2 * PAGE, 0, room + 2 * PAGE, 0)))
    assert high == low + 2 * PAGE
    yield m.code(m.d.cuMemMap(low + PAGE, 2 * PAGE, 0, m.create(2), 0))


@breaks("MAP_FREE")
def map_over_a_mapping(m: Machine) -> Iterator[int]:
    m.start()
    base, handle, triple = m.reserve(), m.create(), m.create(3)
    m.map(base + 2 * PAGE, handle, access=NONE)
    yield m.code(m.d.cuMemMap(base + 2 * PAGE, PAGE, 0, handle, 0))
    yield m.code(m.d.cuMemMap(base + 2 * PAGE, 3 * PAGE, 0, triple, 0))
    yield m.code(m.d.cuMemMap(base + PAGE, 3 * PAGE, 0, triple, 0))
    yield m.code(m.d.cuMemMap(base, 3 * PAGE, 0, triple, 0))


@breaks("UNMAP_WHOLE")
def unmap_parts_and_holes(m: Machine) -> Iterator[int]:
    m.start()
    base = m.reserve()
    m.map(base, m.create(2), 2)
    m.map(base + 2 * PAGE, m.create())
    m.map(base + 4 * PAGE, m.create())
    for first, n_pages in ((0, 1), (1, 1), (1, 2), (2, 2), (0, 4), (0, 5), (3, 1), (3, 2), (8, 1)):
        yield m.code(m.d.cuMemUnmap(base + first * PAGE, n_pages * PAGE))
    m.ok(m.d.cuMemUnmap(base, 3 * PAGE))
    yield m.code(m.d.cuMemUnmap(base, 3 * PAGE))


@breaks("ACCESS_WHOLE")
def access_to_parts_and_holes(m: Machine) -> Iterator[int]:
    m.start()
    base = m.reserve()
    m.map(base, m.create(2), 2, access=NONE)
    m.map(base + 2 * PAGE, m.create(), access=NONE)
    m.map(base + 4 * PAGE, m.create(), access=NONE)
    for first, n_pages in ((0, 1), (1, 1), (1, 2), (2, 2), (0, 4), (0, 5), (3, 1), (3, 2), (8, 1)):
        yield m.code(m.d.cuMemSetAccess(base + first * PAGE, n_pages * PAGE, [m.desc()], 1))


@breaks("ACCESS_DEVICE")
def access_for_another_device(m: Machine) -> Iterator[int]:
    m.start()
    base = m.mapped()
    yield m.code(m.d.cuMemSetAccess(base, PAGE, [m.desc(1)], 1))
    m.map(base + PAGE, m.create(device=1), device=1)
    yield m.code(m.d.cuMemSetAccess(base, 2 * PAGE, [m.desc(0)], 1))
    yield m.code(m.d.cuMemSetAccess(base, PAGE, [m.desc(7)], 1))


@breaks("TOUCH")
def touch_without_access(m: Machine) -> Iterator[int]:
    m.start()
    base = m.mapped(2)
    m.map(base + 2 * PAGE, m.create(), access=NONE)
    hidden, unmapped, host = base + 2 * PAGE, base + 3 * PAGE, bytearray(2 * PAGE)
    for bad, n_bytes in ((hidden, 4), (unmapped, 4), (base + PAGE, PAGE + 4), (base, 3 * PAGE), (base, 2**64 - 1)):
        yield m.code(m.d.cuMemsetD8Async(bad, 0, n_bytes, 0))
    for bad in (hidden, unmapped):
        yield m.code(m.d.cuMemsetD8(bad, 0, 4))
        yield m.code(m.d.cuMemsetD32(bad, 0, 1))
        yield m.code(m.d.cuMemsetD32Async(bad, 0, 1, 0))
        yield m.code(m.d.cuMemcpyDtoDAsync(base, bad, 4, 0))
        yield m.code(m.d.cuMemcpyDtoDAsync(bad, base, 4, 0))
        yield m.code(m.d.cuMemcpyAsync(base, bad, 4, 0))
        yield m.code(m.d.cuMemcpyAsync(bad, base, 4, 0))
        yield m.code(m.d.cuMemcpyDtoHAsync(host, bad, 4, 0))
        yield m.code(m.d.cuMemcpyHtoDAsync(bad, host, 4, 0))
        yield m.code(m.d.cuMemcpyDtoH(host, bad, 4))
        yield m.code(m.d.cuMemcpyHtoD(bad, host, 4))
    yield m.code(m.d.cuMemcpyDtoDAsync(base, base + PAGE, PAGE + 1, 0))


@breaks("TOUCH")
def write_what_is_only_readable(m: Machine) -> Iterator[int]:
    m.start()
    base = m.mapped(2)
    m.ok(m.d.cuMemSetAccess(base, PAGE, [m.desc(access=READ)], 1))
    m.ok(m.d.cuMemcpyDtoDAsync(base + PAGE, base, 4, 0))  # to read it is fine
    yield m.code(m.d.cuMemsetD8Async(base, 0, 4, 0))
    yield m.code(m.d.cuMemcpyDtoDAsync(base, base + PAGE, 4, 0))


@breaks("TOUCH")
def touch_memory_of_another_device(m: Machine) -> Iterator[int]:
    m.start()
    base = m.mapped(device=1)
    yield m.code(m.d.cuMemsetD8Async(base, 0, 4, 0))
    yield m.code(m.d.cuMemcpyDtoDAsync(m.mapped(), base, 4, 0))


@breaks("COPY")
def copies_the_wrong_way(m: Machine) -> Iterator[int]:
    m.start()
    base = m.mapped(2)
    yield m.code(m.d.cuMemcpyDtoHAsync(base + PAGE, base, 4, 0))
    yield m.code(m.d.cuMemcpyHtoDAsync(base, base + PAGE, 4, 0))
    yield m.code(m.d.cuMemcpyDtoDAsync(base, base + 2, 4, 0))
    yield m.code(m.d.cuMemcpyDtoDAsync(base + PAGE - 8, base, PAGE, 0))
    yield m.code(m.d.cuMemcpyAsync(base, base, 4, 0))


@breaks("IN_USE")
def take_memory_from_unfinished_work(m: Machine) -> Iterator[int]:
    m.start()
    base = m.reserve()
    handles = [m.create() for _ in range(3)]
    for i, handle in enumerate(handles):
        m.map(base + i * PAGE, handle)
    m.emulator.hold()
    m.ok(m.d.cuMemsetD8Async(base, 0, PAGE, 0))
    yield m.code(m.d.cuMemUnmap(base, PAGE))
    yield m.code(m.d.cuMemUnmap(base, 3 * PAGE))
    yield m.code(m.d.cuMemRelease(handles[0]))
    yield m.code(m.d.cuMemSetAccess(base, PAGE, [m.desc(access=READ)], 1))
    yield m.code(m.d.cuMemSetAccess(base, PAGE, [m.desc(access=NONE)], 1))
    m.ok(m.d.cuMemcpyDtoDAsync(base, base + PAGE, 4, 0))
    yield m.code(m.d.cuMemUnmap(base + PAGE, PAGE))  # a copy reads it
    m.emulator.use(base + 2 * PAGE + 8, 8)
    yield m.code(m.d.cuMemUnmap(base + 2 * PAGE, PAGE))  # a kernel may touch it


@breaks("FREE_EXACT")
def free_what_was_not_reserved(m: Machine) -> Iterator[int]:
    m.start()
    base = m.reserve(4)
    for first, n_pages in ((0, 3), (1, 3), (0, 5), (4, 1), (-1, 5)):
        yield m.code(m.d.cuMemAddressFree(base + first * PAGE, n_pages * PAGE))
    m.ok(m.d.cuMemAddressFree(base, 4 * PAGE))
    yield m.code(m.d.cuMemAddressFree(base, 4 * PAGE))


@breaks("FREE_EMPTY")
def free_what_is_not_empty(m: Machine) -> Iterator[int]:
    m.start()
    base = m.reserve()
    m.map(base + 15 * PAGE, m.create(), access=NONE)
    yield m.code(m.d.cuMemAddressFree(base, 16 * PAGE))
    m.ok(m.d.cuMemSetAccess(base + 15 * PAGE, PAGE, [m.desc()], 1))
    yield m.code(m.d.cuMemAddressFree(base, 16 * PAGE))


@breaks("RESOURCE", INVALID_HANDLE)
def dead_streams_and_events(m: Machine) -> Iterator[int]:
    m.start()
    base = m.mapped()
    stream, event = m.ok(m.d.cuStreamCreate(0)), m.ok(m.d.cuEventCreate(0))
    live_stream, live_event = m.ok(m.d.cuStreamCreate(0)), m.ok(m.d.cuEventCreate(0))
    m.ok(m.d.cuStreamDestroy(stream))
    m.ok(m.d.cuEventDestroy(event))
    yield m.code(m.d.cuStreamDestroy(stream))
    yield m.code(m.d.cuStreamDestroy(0))
    yield m.code(m.d.cuStreamQuery(stream))
    yield m.code(m.d.cuStreamSynchronize(stream))
    yield m.code(m.d.cuMemsetD8Async(base, 0, 4, stream))
    yield m.code(m.d.cuEventRecord(live_event, stream))
    yield m.code(m.d.cuEventRecord(event, live_stream))
    yield m.code(m.d.cuEventRecord(m.d.CUevent(int(live_stream)), live_stream))  # a stream is no event
    yield m.code(m.d.cuStreamWaitEvent(live_stream, event, 0))
    yield m.code(m.d.cuEventQuery(event))
    yield m.code(m.d.cuEventSynchronize(event))
    yield m.code(m.d.cuEventDestroy(event))


@breaks("RESOURCE", INVALID_HANDLE)
def the_time_between_events_that_have_none(m: Machine) -> Iterator[int]:
    m.start()
    timed, later, untimed = (m.ok(m.d.cuEventCreate(flags)) for flags in (0, 0, 2))
    m.ok(m.d.cuEventRecord(timed, 0))
    m.ok(m.d.cuEventRecord(untimed, 0))
    yield m.code(m.d.cuEventElapsedTime(timed, untimed))
    yield m.code(m.d.cuEventElapsedTime(untimed, timed))
    yield m.code(m.d.cuEventElapsedTime(timed, later))  # never recorded
    m.ok(m.d.cuEventDestroy(later))
    yield m.code(m.d.cuEventElapsedTime(later, timed))


@breaks("RESOURCE", INVALID_HANDLE)
def streams_and_events_of_another_context(m: Machine) -> Iterator[int]:
    m.start(1)
    theirs, their_event = m.ok(m.d.cuStreamCreate(0)), m.ok(m.d.cuEventCreate(0))
    m.start(0)
    base = m.mapped()
    yield m.code(m.d.cuMemsetD8Async(base, 0, 4, theirs))
    yield m.code(m.d.cuEventRecord(their_event, 0))
    yield m.code(m.d.cuStreamSynchronize(theirs))
    yield m.code(m.d.cuStreamDestroy(theirs))


def host_pages(m: Machine, n_pages: int = 4) -> tuple[mmap.mmap, int]:
    """Ordinary memory, and where it begins."""
    memory = mmap.mmap(-1, n_pages * mmap.PAGESIZE)
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))


@breaks("HOST_RANGE")
def registering_what_is_no_host_memory(m: Machine) -> Iterator[int]:
    m.start()
    memory, start = host_pages(m)
    yield m.code(m.d.cuMemHostRegister(start + 8, mmap.PAGESIZE, 0))
    yield m.code(m.d.cuMemHostRegister(start, mmap.PAGESIZE + 8, 0))
    yield m.code(m.d.cuMemHostRegister(start, 0, 0))
    yield m.code(m.d.cuMemHostRegister(0, mmap.PAGESIZE, 0))
    yield m.code(m.d.cuMemHostRegister(m.mapped(), PAGE, 0))
    yield m.code(m.d.cuMemHostRegister(1 << 40, mmap.PAGESIZE, 0))  # nothing is there
    del memory


@breaks("HOST_RANGE")
def freeing_what_is_registered(m: Machine) -> Iterator[int]:
    m.start()
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    m.ok(m.d.cuMemHostRegister(start, mmap.PAGESIZE, 0))
    memory.close()
    yield m.code(m.d.cuMemHostUnregister(start))


@breaks("HOST_FREE", ALREADY_REGISTERED)
def registering_host_memory_twice(m: Machine) -> Iterator[int]:
    m.start()
    memory, start = host_pages(m)
    m.ok(m.d.cuMemHostRegister(start + mmap.PAGESIZE, 2 * mmap.PAGESIZE, 1))
    yield m.code(m.d.cuMemHostRegister(start + mmap.PAGESIZE, 2 * mmap.PAGESIZE, 1))
    yield m.code(m.d.cuMemHostRegister(start, 2 * mmap.PAGESIZE, 1))
    yield m.code(m.d.cuMemHostRegister(start + 2 * mmap.PAGESIZE, 2 * mmap.PAGESIZE, 1))
    m.ok(m.d.cuMemHostRegister(start, mmap.PAGESIZE, 1))
    del memory


@breaks("HOST_REGISTERED", NOT_REGISTERED)
def unregistering_what_is_not_registered(m: Machine) -> Iterator[int]:
    m.start()
    memory, start = host_pages(m)
    yield m.code(m.d.cuMemHostUnregister(start))
    m.ok(m.d.cuMemHostRegister(start, 2 * mmap.PAGESIZE, 0))
    yield m.code(m.d.cuMemHostUnregister(start + mmap.PAGESIZE))
    m.ok(m.d.cuMemHostUnregister(start))
    yield m.code(m.d.cuMemHostUnregister(start))
    del memory


@breaks("COPY")
def copies_over_the_end_of_registered_memory(m: Machine) -> Iterator[int]:
    m.start()
    base = m.mapped()
    memory, start = host_pages(m)
    for i in (0, 1):
        m.ok(m.d.cuMemHostRegister(start + i * mmap.PAGESIZE, mmap.PAGESIZE, 0))
    yield m.code(m.d.cuMemcpyDtoHAsync(start + mmap.PAGESIZE - 8, base, 16, 0))
    yield m.code(m.d.cuMemcpyHtoDAsync(base, start + 2 * mmap.PAGESIZE - 8, 16, 0))
    m.ok(m.d.cuMemcpyHtoDAsync(base, start + mmap.PAGESIZE, 16, 0))
    del memory


@breaks("IN_USE")
def unregistering_what_a_copy_still_writes(m: Machine) -> Iterator[int]:
    m.start()
    base = m.mapped()
    memory, start = host_pages(m)
    m.ok(m.d.cuMemHostRegister(start, mmap.PAGESIZE, 0))
    m.emulator.hold()
    m.ok(m.d.cuMemcpyDtoHAsync(start + 100, base, 16, 0))
    yield m.code(m.d.cuMemHostUnregister(start))
    m.emulator.let_go()
    m.ok(m.d.cuMemHostUnregister(start))
    del memory


@breaks("VALUE")
def registration_flags_that_are_not_known(m: Machine) -> Iterator[int]:
    m.start()
    memory, start = host_pages(m)
    yield m.code(m.d.cuMemHostRegister(start, mmap.PAGESIZE, 2))
    del memory


@breaks("CONTEXT_IDLE")
def last_release_with_host_memory_registered(m: Machine) -> Iterator[int]:
    m.start()
    memory, start = host_pages(m)
    m.ok(m.d.cuMemHostRegister(start, mmap.PAGESIZE, 0))
    yield m.code(m.d.cuDevicePrimaryCtxRelease(0))
    m.ok(m.d.cuMemHostUnregister(start))
    del memory


@pytest.mark.parametrize(
    ("rule", "code", "caller"), [pytest.param(*row, id=f"{row[0]}-{row[2].__name__}") for row in WRONG_CALLERS]
)
def test_wrong_callers_are_caught(machine: Machine, rule: str, code: int, caller: WrongCaller) -> None:
    assert machine.emulator.violations() == []
    for i, answer in enumerate(caller(machine)):
        wrong_call = f"wrong call number {i}"
        assert answer == code, wrong_call
        lines = machine.emulator.violations()
        assert len(lines) == i + 1, wrong_call
        assert lines[-1].startswith(f"{rule}: cu"), wrong_call
    assert machine.emulator.violations(), "the caller did nothing wrong"


def test_every_rule_has_a_wrong_caller(machine: Machine) -> None:
    assert {rule for rule, _, _ in WRONG_CALLERS} == set(machine.emulator.rules())


def test_a_refused_call_changes_nothing(machine: Machine) -> None:
    m = machine
    m.start()
    base, handle, other = m.reserve(), m.create(), m.create()
    m.map(base, handle)
    m.ok(m.d.cuMemsetD8(base, 7, PAGE))
    before = m.emulator.live(), m.ok(m.d.cuMemGetInfo())
    m.d.cuMemMap(base, PAGE, 0, other, 0)
    m.d.cuMemUnmap(base, 2 * PAGE)
    m.d.cuMemSetAccess(base, 2 * PAGE, [m.desc(access=NONE)], 1)
    m.d.cuMemAddressFree(base, 16 * PAGE)
    m.d.cuMemRelease(0xDEAD)
    m.d.cuMemCreate(1, m.prop(), 0)
    assert len(m.emulator.violations()) == 6
    assert (m.emulator.live(), m.ok(m.d.cuMemGetInfo())) == before
    assert m.read(base) == b"\x07" * 4
    assert m.ok(m.d.cuMemGetAccess(m.desc().location, base)) == READ_WRITE
