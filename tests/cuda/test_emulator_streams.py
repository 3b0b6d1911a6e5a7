"""Streams and events of the emulated CUDA driver: work that a test holds back runs later, and in the right order."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.cuda.machine import PAGE, Machine, emulated_machine

DEINITIALIZED, NOT_READY, ILLEGAL_ADDRESS, NOT_SUPPORTED = 4, 600, 700, 801
CAPTURE_UNSUPPORTED, CAPTURE_IMPLICIT, CAPTURED_EVENT = 900, 906, 907
NON_BLOCKING = 1


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A started machine, on which nobody may have broken a rule."""
    with emulated_machine(n_devices=2) as machine:
        machine.start()
        yield machine
        assert machine.emulator.violations() == []


class Waiter:
    """A thread that makes one call. It waits inside: a call is counted and begins to wait under one lock."""

    def __init__(self, machine: Machine, name: str, call: Callable[[], object]) -> None:
        self.answers: list[object] = []
        context = machine.ok(machine.d.cuCtxGetCurrent())

        def wait() -> None:
            machine.ok(machine.d.cuCtxSetCurrent(context))
            self.answers.append(call())

        before = machine.emulator.calls()[name]
        self._thread = threading.Thread(target=wait)
        self._thread.start()
        while machine.emulator.calls()[name] == before:
            time.sleep(0.0005)

    def answer(self) -> int:
        self._thread.join()
        (answer,) = self.answers
        return int(answer[0])  # type: ignore[index]


def filled(machine: Machine, address: int) -> int:
    """The byte that the first four at an address are full of."""
    values = set(machine.read(address))
    assert len(values) == 1
    return values.pop()


def test_work_is_done_at_once_unless_held(machine: Machine) -> None:
    d, ok = machine.d, machine.ok
    base, event = machine.mapped(), ok(d.cuEventCreate(0))
    assert machine.code(d.cuEventQuery(event)) == 0  # never recorded
    ok(d.cuEventRecord(event, 0))
    ok(d.cuMemsetD8Async(base, 1, PAGE, 0))
    assert filled(machine, base) == 1
    assert machine.code(d.cuEventQuery(event)) == 0
    assert machine.code(d.cuStreamQuery(0)) == 0
    ok(d.cuEventSynchronize(event))
    ok(d.cuStreamSynchronize(0))
    ok(d.cuCtxSynchronize())


@pytest.mark.parametrize("default", [True, False])
def test_held_work_waits_in_order(machine: Machine, default: bool) -> None:
    d, ok, emulator = machine.d, machine.ok, machine.emulator
    base = machine.mapped(2)
    stream = 0 if default else int(ok(d.cuStreamCreate(0)))
    event, host = ok(d.cuEventCreate(0)), bytearray(4)
    emulator.hold(stream)
    ok(d.cuMemsetD8Async(base, 1, PAGE, stream))
    ok(d.cuMemcpyDtoDAsync(base + PAGE, base, PAGE, stream))
    ok(d.cuMemcpyDtoHAsync(host, base + PAGE, 4, stream))
    ok(d.cuEventRecord(event, stream))
    ok(d.cuMemsetD32Async(base, 0x02020202, PAGE // 4, stream))
    assert machine.code(d.cuEventQuery(event)) == NOT_READY
    assert machine.code(d.cuStreamQuery(stream)) == NOT_READY
    assert (filled(machine, base), filled(machine, base + PAGE), host) == (0xA5, 0xA5, bytearray(4))
    emulator.let_go(stream)
    assert (filled(machine, base), filled(machine, base + PAGE), host) == (2, 1, bytearray(b"\1" * 4))
    assert machine.code(d.cuEventQuery(event)) == 0
    assert machine.code(d.cuStreamQuery(stream)) == 0
    assert not emulator.is_busy()


@pytest.mark.parametrize("call", ["cuEventSynchronize", "cuStreamSynchronize", "cuCtxSynchronize", "cuMemcpyDtoH"])
def test_waiting_ends_when_the_stream_is_let_go(machine: Machine, call: str) -> None:
    d, ok, emulator = machine.d, machine.ok, machine.emulator
    base, event, host = machine.mapped(), ok(d.cuEventCreate(0)), bytearray(4)
    emulator.hold()
    ok(d.cuMemsetD8Async(base, 1, PAGE, 0))
    ok(d.cuEventRecord(event, 0))
    waiter = Waiter(
        machine,
        call,
        {
            "cuEventSynchronize": lambda: d.cuEventSynchronize(event),
            "cuStreamSynchronize": lambda: d.cuStreamSynchronize(0),
            "cuCtxSynchronize": lambda: d.cuCtxSynchronize(),
            "cuMemcpyDtoH": lambda: d.cuMemcpyDtoH(host, base, 4),
        }[call],
    )
    ok(d.cuMemGetInfo())  # others go on meanwhile
    assert waiter.answers == []
    emulator.let_go()
    assert waiter.answer() == 0
    assert host == (b"\1" * 4 if call == "cuMemcpyDtoH" else b"\0" * 4)


@pytest.mark.parametrize("call", ["cuEventSynchronize", "cuCtxSynchronize"])
@pytest.mark.parametrize("end", ["sticky", "reset"])
def test_waiting_ends_with_an_error_when_everything_ends(machine: Machine, call: str, end: str) -> None:
    d, ok, emulator = machine.d, machine.ok, machine.emulator
    event = ok(d.cuEventCreate(0))
    emulator.hold()
    ok(d.cuEventRecord(event, 0))
    waits = {
        "cuEventSynchronize": lambda: d.cuEventSynchronize(event),
        "cuCtxSynchronize": lambda: d.cuCtxSynchronize(),
    }
    waiter = Waiter(machine, call, waits[call])
    assert waiter.answers == []
    if end == "sticky":
        emulator.make_sticky(ILLEGAL_ADDRESS)
        assert waiter.answer() == ILLEGAL_ADDRESS
        emulator.make_sticky(0)
    else:
        emulator.reset(force=True)
        assert waiter.answer() == DEINITIALIZED


def test_a_stream_waits_for_another_one_s_event(machine: Machine) -> None:
    d, ok, emulator = machine.d, machine.ok, machine.emulator
    base = machine.mapped()
    first, second = (int(ok(d.cuStreamCreate(NON_BLOCKING))) for _ in range(2))
    event = ok(d.cuEventCreate(0))
    emulator.hold(first)
    ok(d.cuMemsetD8Async(base, 1, PAGE, first))
    ok(d.cuEventRecord(event, first))
    ok(d.cuStreamWaitEvent(second, event, 0))
    ok(d.cuEventRecord(event, first))  # the wait is for the earlier record
    ok(d.cuMemsetD8Async(base, 2, PAGE, second))
    assert machine.code(d.cuStreamQuery(second)) == NOT_READY
    assert filled(machine, base) == 0xA5
    emulator.let_go(first)
    assert filled(machine, base) == 2
    assert machine.code(d.cuStreamQuery(second)) == 0


def test_a_wait_for_an_event_that_was_never_recorded_is_nothing(machine: Machine) -> None:
    d, ok = machine.d, machine.ok
    base, stream = machine.mapped(), ok(d.cuStreamCreate(NON_BLOCKING))
    ok(d.cuStreamWaitEvent(stream, ok(d.cuEventCreate(0)), 0))
    ok(d.cuMemsetD8Async(base, 2, PAGE, stream))
    assert filled(machine, base) == 2


def test_an_event_recorded_anew_counts_from_there(machine: Machine) -> None:
    d, ok, emulator = machine.d, machine.ok, machine.emulator
    slow, fast = (int(ok(d.cuStreamCreate(NON_BLOCKING))) for _ in range(2))
    event = ok(d.cuEventCreate(0))
    emulator.hold(slow)
    ok(d.cuEventRecord(event, slow))
    assert machine.code(d.cuEventQuery(event)) == NOT_READY
    ok(d.cuEventRecord(event, fast))
    assert machine.code(d.cuEventQuery(event)) == 0
    ok(d.cuEventRecord(event, slow))
    assert machine.code(d.cuEventQuery(event)) == NOT_READY


def test_the_default_stream_and_blocking_streams_take_turns(machine: Machine) -> None:
    d, ok, emulator = machine.d, machine.ok, machine.emulator
    base = machine.mapped(3)
    blocking, free = int(ok(d.cuStreamCreate(0))), int(ok(d.cuStreamCreateWithPriority(NON_BLOCKING, 0)))
    emulator.hold()
    ok(d.cuMemsetD8Async(base, 1, PAGE, 0))
    ok(d.cuMemsetD8Async(base + PAGE, 1, PAGE, blocking))
    ok(d.cuMemsetD8Async(base + 2 * PAGE, 1, PAGE, free))
    assert [filled(machine, base + i * PAGE) for i in range(3)] == [0xA5, 0xA5, 1]
    emulator.let_go()
    assert [filled(machine, base + i * PAGE) for i in range(3)] == [1, 1, 1]
    emulator.hold(blocking)
    ok(d.cuMemsetD8Async(base + PAGE, 2, PAGE, blocking))
    ok(d.cuMemsetD8Async(base, 2, PAGE, 0))
    assert [filled(machine, base + i * PAGE) for i in range(3)] == [1, 1, 1]
    emulator.let_go(blocking)
    assert [filled(machine, base + i * PAGE) for i in range(3)] == [2, 2, 1]


def test_devices_have_their_own_default_streams(machine: Machine) -> None:
    d, ok, emulator = machine.d, machine.ok, machine.emulator
    base = machine.mapped()
    emulator.hold(device=0)
    ok(d.cuMemsetD8Async(base, 1, PAGE, 0))
    machine.start(1)
    other = machine.mapped(device=1)
    ok(d.cuMemsetD8Async(other, 2, PAGE, 0))
    ok(d.cuCtxSynchronize())
    assert (filled(machine, base), filled(machine, other)) == (0xA5, 2)
    emulator.let_go(device=0)
    assert filled(machine, base) == 1


def test_a_destroyed_stream_finishes_its_work(machine: Machine) -> None:
    d, ok, emulator = machine.d, machine.ok, machine.emulator
    base, event = machine.mapped(), ok(d.cuEventCreate(0))
    stream = int(ok(d.cuStreamCreate(NON_BLOCKING)))
    assert emulator.streams() == [stream]
    emulator.hold(stream)
    ok(d.cuMemsetD8Async(base, 1, PAGE, stream))
    ok(d.cuEventRecord(event, stream))
    ok(d.cuStreamDestroy(stream))
    assert emulator.streams() == []
    assert emulator.live().streams == 0
    assert machine.code(d.cuEventQuery(event)) == NOT_READY
    emulator.let_go(stream)
    assert filled(machine, base) == 1
    assert machine.code(d.cuEventQuery(event)) == 0
    assert not emulator.is_busy()


def test_an_event_may_go_before_its_record_is_reached(machine: Machine) -> None:
    d, ok, emulator = machine.d, machine.ok, machine.emulator
    event = ok(d.cuEventCreate(0))
    emulator.hold()
    ok(d.cuEventRecord(event, 0))
    waiter = Waiter(machine, "cuEventSynchronize", lambda: d.cuEventSynchronize(event))
    ok(d.cuEventDestroy(event))
    assert emulator.live().events == 0
    assert waiter.answers == []
    emulator.let_go()
    assert waiter.answer() == 0
    assert not emulator.is_busy()


def test_memory_may_go_when_the_work_that_uses_it_is_done(machine: Machine) -> None:
    d, ok, emulator = machine.d, machine.ok, machine.emulator
    base = machine.mapped(2)
    emulator.hold()
    emulator.use(base, PAGE)
    ok(d.cuMemUnmap(base + PAGE, PAGE))  # nobody uses this one
    emulator.let_go()
    ok(d.cuMemUnmap(base, PAGE))


def test_host_memory_is_read_when_the_copy_runs(machine: Machine) -> None:
    d, ok, emulator = machine.d, machine.ok, machine.emulator
    base, host = machine.mapped(), bytearray(b"\1" * 4)
    emulator.hold()
    ok(d.cuMemcpyHtoDAsync(base, host, 4, 0))
    host[:] = b"\2" * 4
    emulator.let_go()
    assert filled(machine, base) == 2


def test_the_time_between_events(machine: Machine) -> None:
    d, ok, emulator = machine.d, machine.ok, machine.emulator
    first, second = (ok(d.cuEventCreate(0)) for _ in range(2))
    ok(d.cuEventRecord(first, 0))
    emulator.hold()
    ok(d.cuEventRecord(second, 0))
    assert machine.code(d.cuEventElapsedTime(first, second)) == NOT_READY
    before = time.monotonic()
    time.sleep(0.02)
    at_least_ms = (time.monotonic() - before) * 1e3
    emulator.let_go()
    assert ok(d.cuEventElapsedTime(first, second)) >= at_least_ms * 0.999  # a float32
    assert ok(d.cuEventElapsedTime(second, first)) == -ok(d.cuEventElapsedTime(first, second))
    assert ok(d.cuEventElapsedTime(first, first)) == 0.0


def test_a_capturing_stream_runs_nothing_and_its_events_are_captured(machine: Machine) -> None:
    d, ok, emulator = machine.d, machine.ok, machine.emulator
    base, event, other_event = machine.mapped(), ok(d.cuEventCreate(0)), ok(d.cuEventCreate(0))
    stream, other = (int(ok(d.cuStreamCreate(NON_BLOCKING))) for _ in range(2))
    assert int(ok(d.cuStreamIsCapturing(stream))) == 0
    emulator.capture(stream, True)
    assert int(ok(d.cuStreamIsCapturing(stream))) == 1
    assert int(ok(d.cuStreamIsCapturing(other))) == 0
    ok(d.cuMemsetD8Async(base, 1, PAGE, stream))
    ok(d.cuEventRecord(event, stream))
    ok(d.cuEventRecord(other_event, other))
    ok(d.cuStreamWaitEvent(stream, other_event, 0))
    assert filled(machine, base) == 0xA5
    assert machine.code(d.cuEventQuery(event)) == CAPTURED_EVENT
    assert machine.code(d.cuEventSynchronize(event)) == CAPTURED_EVENT
    assert machine.code(d.cuEventElapsedTime(event, other_event)) == CAPTURED_EVENT
    assert machine.code(d.cuStreamWaitEvent(other, event, 0)) == NOT_SUPPORTED
    assert machine.code(d.cuEventQuery(other_event)) == 0
    assert machine.code(d.cuStreamQuery(stream)) == CAPTURE_UNSUPPORTED
    assert machine.code(d.cuStreamSynchronize(stream)) == CAPTURE_UNSUPPORTED
    emulator.capture(stream, False)
    assert int(ok(d.cuStreamIsCapturing(stream))) == 0
    assert machine.code(d.cuEventQuery(event)) == CAPTURED_EVENT  # until it is recorded anew
    ok(d.cuEventRecord(event, stream))
    assert machine.code(d.cuEventQuery(event)) == 0
    ok(d.cuMemsetD8Async(base, 2, PAGE, stream))
    assert filled(machine, base) == 2


@pytest.mark.parametrize(("flags", "answer"), [(0, CAPTURE_IMPLICIT), (NON_BLOCKING, 0)])
def test_the_default_stream_beside_one_that_captures(machine: Machine, flags: int, answer: int) -> None:
    d, ok = machine.d, machine.ok
    stream = int(ok(d.cuStreamCreate(flags)))
    machine.emulator.capture(stream, True)
    assert machine.code(d.cuStreamIsCapturing(0)) == answer
    machine.emulator.capture(stream, False)
    assert int(ok(d.cuStreamIsCapturing(0))) == 0
    machine.emulator.capture(0, True, device=0)
    assert int(ok(d.cuStreamIsCapturing(0))) == 1


def test_each_thread_has_its_own_capture_mode(machine: Machine) -> None:
    d, ok = machine.d, machine.ok
    mode = d.CUstreamCaptureMode
    relaxed, everywhere = mode.CU_STREAM_CAPTURE_MODE_RELAXED, mode.CU_STREAM_CAPTURE_MODE_GLOBAL
    assert ok(d.cuThreadExchangeStreamCaptureMode(relaxed)) == everywhere
    waiter = Waiter(
        machine,
        "cuThreadExchangeStreamCaptureMode",
        lambda: (int(ok(d.cuThreadExchangeStreamCaptureMode(relaxed))),),
    )
    assert waiter.answer() == int(everywhere)
    assert ok(d.cuThreadExchangeStreamCaptureMode(everywhere)) == relaxed
