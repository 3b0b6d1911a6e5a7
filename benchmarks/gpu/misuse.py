"""Ways to misuse the driver, each with the answers that the emulated driver gives to it.

A probe returns the names of the answers that matter. `answers.json` holds what the emulator answers; a test runs every
probe on the emulator, so that the file cannot drift from it. A device that answers otherwise shows a bug of the
emulator, or a rule that it is stricter about on purpose: its source says which.

Probes clean up after themselves where the driver lets them. What may end the process or lose the device is kept apart.
"""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.raw import Raw

ANSWERS = Path(__file__).with_name("answers.json")


@dataclass(frozen=True, slots=True)
class Probe:
    """One way to misuse the driver."""

    name: str
    run: Callable[[Raw], list[str]]
    is_stricter: bool = False  # the emulator refuses on purpose what a device may allow


def expected_answers() -> dict[str, list[str]]:
    """What the emulator answers, by probe."""
    answers: dict[str, list[str]] = json.loads(ANSWERS.read_text())
    return answers


def _name(result: Any) -> str:
    return str(result[0].name).removeprefix("CUDA_")


class _Setting:
    """A reservation of 8 granules and what a probe maps in it; afterwards everything is taken down, come what may."""

    def __init__(self, raw: Raw) -> None:
        self.raw = raw
        self.page = raw.granularity_bytes
        self.n_bytes = 8 * self.page
        self.base = int(raw.must(raw.reserve(self.n_bytes)))
        self._handles: list[int] = []
        self._mapped: list[tuple[int, int]] = []

    def create(self, n_granules: int = 1) -> int:
        handle = int(self.raw.must(self.raw.create(n_granules * self.page)))
        self._handles.append(handle)
        return handle

    def map(self, index: int, n_granules: int = 1, *, access: bool = True) -> int:
        """Map a new page at granule `index`; return its address."""
        address, n_bytes = self.base + index * self.page, n_granules * self.page
        self.raw.must(self.raw.map(address, n_bytes, self.create(n_granules)))
        self._mapped.append((address, n_bytes))
        if access:
            self.raw.must(self.raw.set_access(address, n_bytes))
        return address

    def forget(self, handle: int) -> None:
        """A probe released it."""
        self._handles.remove(handle)

    def take_down(self) -> None:
        self.raw.cuda.cuCtxSynchronize()
        for address, n_bytes in self._mapped:
            self.raw.unmap(address, n_bytes)
        for handle in self._handles:
            self.raw.release(handle)
        self.raw.free(self.base, self.n_bytes)


@contextmanager
def _setting(raw: Raw) -> Iterator[_Setting]:
    setting = _Setting(raw)
    try:
        yield setting
    finally:
        setting.take_down()


def _create_half(raw: Raw) -> list[str]:
    return [_name(raw.create(raw.granularity_bytes // 2))]


def _create_nothing(raw: Raw) -> list[str]:
    return [_name(raw.create(0))]


def _create_elsewhere(raw: Raw) -> list[str]:
    return [_name(raw.create(raw.granularity_bytes, raw.device_memory(77)))]


def _reserve_nothing(raw: Raw) -> list[str]:
    return [_name(raw.reserve(0))]


def _reserve_odd_size(raw: Raw) -> list[str]:
    return [_name(raw.reserve(raw.granularity_bytes + 1))]


def _reserve_odd_alignment(raw: Raw) -> list[str]:
    return [_name(raw.reserve(raw.granularity_bytes, alignment=3 * raw.granularity_bytes))]


def _map_offset(raw: Raw) -> list[str]:
    with _setting(raw) as s:
        return [_name(raw.map(s.base, s.page, s.create(2), offset=s.page))]


def _map_flags(raw: Raw) -> list[str]:
    with _setting(raw) as s:
        return [_name(raw.map(s.base, s.page, s.create(), flags=1))]


def _map_unaligned(raw: Raw) -> list[str]:
    with _setting(raw) as s:
        return [_name(raw.map(s.base + 4096, s.page, s.create()))]


def _map_prefix(raw: Raw) -> list[str]:
    with _setting(raw) as s:
        answer = _name(raw.map(s.base, s.page, s.create(2)))
        raw.unmap(s.base, s.page)
        return [answer]


def _map_beyond_handle(raw: Raw) -> list[str]:
    with _setting(raw) as s:
        answer = _name(raw.map(s.base, 2 * s.page, s.create()))
        raw.unmap(s.base, 2 * s.page)
        return [answer]


def _map_twice(raw: Raw) -> list[str]:
    with _setting(raw) as s:
        return [_name(raw.map(s.map(0), s.page, s.create()))]


def _map_overlap(raw: Raw) -> list[str]:
    with _setting(raw) as s:
        s.map(1)
        return [_name(raw.map(s.base, 2 * s.page, s.create(2)))]


def _map_unreserved(raw: Raw) -> list[str]:
    with _setting(raw) as s:
        where = int(raw.must(raw.reserve(s.page)))
        raw.must(raw.free(where, s.page))
        return [_name(raw.map(where, s.page, s.create()))]


def _map_over_the_end(raw: Raw) -> list[str]:
    with _setting(raw) as s:
        return [_name(raw.map(s.base + s.n_bytes - s.page, 2 * s.page, s.create(2)))]


def _map_aliases(raw: Raw) -> list[str]:
    with _setting(raw) as s:
        handle = s.create()
        answers = [_name(raw.map(s.base + i * s.page, s.page, handle)) for i in (0, 1)]
        answers.append(_name(raw.set_access(s.base, 2 * s.page)))
        answers.append(_name(raw.unmap(s.base, 2 * s.page)))
        return answers


def _access_hole(raw: Raw) -> list[str]:
    with _setting(raw) as s:
        s.map(0, access=False)
        s.map(2, access=False)
        return [_name(raw.set_access(s.base, 3 * s.page))]


def _access_unmapped(raw: Raw) -> list[str]:
    with _setting(raw) as s:
        return [_name(raw.set_access(s.base, s.page))]


def _access_part(raw: Raw) -> list[str]:
    with _setting(raw) as s:
        return [_name(raw.set_access(s.map(0, 2, access=False), s.page))]


def _access_adjacent(raw: Raw) -> list[str]:
    with _setting(raw) as s:
        s.map(0, access=False)
        s.map(1, 2, access=False)
        return [_name(raw.set_access(s.base, 3 * s.page))]


def _unmap_part(raw: Raw) -> list[str]:
    with _setting(raw) as s:
        return [_name(raw.unmap(s.map(0, 2), s.page))]


def _unmap_several(raw: Raw) -> list[str]:
    with _setting(raw) as s:
        s.map(0)
        s.map(1)
        return [_name(raw.unmap(s.base, 2 * s.page)), _name(raw.unmap(s.base, s.page))]


def _unmap_hole(raw: Raw) -> list[str]:
    with _setting(raw) as s:
        s.map(0)
        s.map(2)
        answers = [_name(raw.unmap(s.base, 3 * s.page))]
        # Whether a refused unmap left everything as it was.
        answers += [_name(raw.unmap(s.base + i * s.page, s.page)) for i in (0, 2)]
        return answers


def _unmap_tail(raw: Raw) -> list[str]:
    with _setting(raw) as s:
        return [_name(raw.unmap(s.map(0), 2 * s.page))]


def _unmap_unmapped(raw: Raw) -> list[str]:
    with _setting(raw) as s:
        return [_name(raw.unmap(s.base, s.page))]


def _free_half(raw: Raw) -> list[str]:
    with _setting(raw) as s:
        return [_name(raw.free(s.base, s.n_bytes // 2))]


def _free_inside(raw: Raw) -> list[str]:
    with _setting(raw) as s:
        return [_name(raw.free(s.base + s.page, s.page))]


def _free_twice(raw: Raw) -> list[str]:
    base = int(raw.must(raw.reserve(raw.granularity_bytes)))
    return [_name(raw.free(base, raw.granularity_bytes)) for _ in range(2)]


def _free_mapped(raw: Raw) -> list[str]:
    with _setting(raw) as s:
        s.map(0)
        return [_name(raw.free(s.base, s.n_bytes))]


def _release_mapped(raw: Raw) -> list[str]:
    with _setting(raw) as s:
        handle = s.create()
        raw.must(raw.map(s.base, s.page, handle))
        raw.must(raw.set_access(s.base, s.page))
        s.forget(handle)
        answers = [_name(raw.release(handle)), _name(raw.cuda.cuMemsetD8(s.base, 1, s.page))]
        raw.cuda.cuCtxSynchronize()
        return [*answers, _name(raw.unmap(s.base, s.page))]


def _retain_unmapped(raw: Raw) -> list[str]:
    with _setting(raw) as s:
        return [_name(raw.cuda.cuMemRetainAllocationHandle(s.base))]


def _retain_mapped(raw: Raw) -> list[str]:
    with _setting(raw) as s:
        answer = raw.cuda.cuMemRetainAllocationHandle(s.map(0))
        return [_name(answer), _name(raw.release(int(answer[1])))]


def _no_context(call: Callable[[Raw, _Setting], Any]) -> Callable[[Raw], list[str]]:
    """Make a call in a thread that has no context."""

    def run(raw: Raw) -> list[str]:
        with _setting(raw) as s:
            s.map(0)
            answers: list[str] = []
            thread = threading.Thread(target=lambda: answers.append(_name(call(raw, s))))
            thread.start()
            thread.join()
            return answers

    return run


def _unmap_without_context(raw: Raw, s: _Setting) -> Any:
    return raw.unmap(s.base, s.page)


def _fill_without_context(raw: Raw, s: _Setting) -> Any:
    return raw.cuda.cuMemsetD8(s.base, 0, s.page)


def _release_twice(raw: Raw) -> list[str]:
    handle = int(raw.must(raw.create(raw.granularity_bytes)))
    return [_name(raw.release(handle)) for _ in range(2)]


def _release_garbage(raw: Raw) -> list[str]:
    return [_name(raw.release(0x123450))]


def _map_released(raw: Raw) -> list[str]:
    with _setting(raw) as s:
        handle = s.create()
        raw.must(raw.release(handle))
        s.forget(handle)
        return [_name(raw.map(s.base, s.page, handle))]


def _fill(raw: Raw, address: int, n_bytes: int) -> list[str]:
    return [_name(raw.cuda.cuMemsetD8(address, 1, n_bytes)), _name(raw.cuda.cuCtxSynchronize())]


def _fill_without_access(raw: Raw) -> list[str]:
    with _setting(raw) as s:
        return _fill(raw, s.map(0, access=False), s.page)


def _fill_unmapped(raw: Raw) -> list[str]:
    with _setting(raw) as s:
        return _fill(raw, s.base, s.page)


def _fill_over_the_edge(raw: Raw) -> list[str]:
    with _setting(raw) as s:
        return _fill(raw, s.map(0), 2 * s.page)


def _fill_after_remap(raw: Raw) -> list[str]:
    with _setting(raw) as s:
        handle = s.create()
        raw.must(raw.map(s.base, s.page, handle))
        raw.must(raw.set_access(s.base, s.page))
        raw.must(raw.unmap(s.base, s.page))
        raw.must(raw.map(s.base, s.page, handle))
        answers = _fill(raw, s.base, s.page)
        raw.unmap(s.base, s.page)
        return answers


def _read_unmapped(raw: Raw) -> list[str]:
    with _setting(raw) as s:
        buffer = ctypes.create_string_buffer(64)
        return [_name(raw.cuda.cuMemcpyDtoH(ctypes.addressof(buffer), s.base, 64))]


PROBES: Sequence[Probe] = (
    Probe("unmap of several whole mappings, then again", _unmap_several),
    Probe("unmap of a part of a mapping", _unmap_part),
    Probe("unmap over a hole, then of what lies beside it", _unmap_hole),
    Probe("unmap over an unmapped tail", _unmap_tail),
    Probe("unmap of what is not mapped", _unmap_unmapped),
    Probe("access over a hole", _access_hole),
    Probe("access to what is not mapped", _access_unmapped),
    Probe("access to a part of a mapping", _access_part),
    Probe("access over adjacent mappings", _access_adjacent),
    Probe("map at an offset into the handle", _map_offset),
    Probe("map with flags", _map_flags),
    Probe("map at an unaligned address", _map_unaligned),
    Probe("map of a handle's first part", _map_prefix, is_stricter=True),
    Probe("map of more than the handle", _map_beyond_handle),
    Probe("map where something is mapped", _map_twice),
    Probe("map that overlaps a mapping", _map_overlap),
    Probe("map outside of every reservation", _map_unreserved),
    Probe("map over the end of a reservation", _map_over_the_end),
    Probe("map of one handle twice, access, unmap", _map_aliases),
    Probe("free of half a reservation", _free_half),
    Probe("free from inside a reservation", _free_inside),
    Probe("free twice", _free_twice),
    Probe("release while mapped, then fill, then unmap", _release_mapped),
    Probe("create of half a granule", _create_half),
    Probe("create of nothing", _create_nothing),
    Probe("create on a device that is not there", _create_elsewhere),
    Probe("reserve of nothing", _reserve_nothing),
    Probe("reserve of an odd size", _reserve_odd_size, is_stricter=True),
    Probe("reserve with an odd alignment", _reserve_odd_alignment),
    Probe("handle of what is not mapped", _retain_unmapped),
    Probe("handle of a mapping, and its release", _retain_mapped),
    Probe("unmap in a thread without a context", _no_context(_unmap_without_context), is_stricter=True),
    Probe("fill in a thread without a context", _no_context(_fill_without_context)),
)
"""What a driver should survive."""

DANGEROUS_PROBES: Sequence[Probe] = (
    Probe("fill without access", _fill_without_access),
    Probe("fill after a remap without access", _fill_after_remap),
    Probe("fill of what is not mapped", _fill_unmapped),
    Probe("fill over the edge of a mapping", _fill_over_the_edge),
    Probe("copy from what is not mapped", _read_unmapped),
    Probe("release twice", _release_twice),
    Probe("map of a released handle", _map_released),
    Probe("release of a number that is no handle", _release_garbage),
    Probe("free of a reservation with mappings", _free_mapped, is_stricter=True),
)
"""What may end the process, or lose the device: undefined by the documentation, or a fault."""
