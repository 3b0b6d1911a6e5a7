"""Interruptions behind the last item of a driver call: all of it took effect, and nobody says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest

from vmem_kv.cache import KVCache
from vmem_kv.driver.base import Copy, Driver, Handle, Span
from vmem_kv.driver.ledger import Ledger
from vmem_kv.growth import SlotId
from vmem_kv.pages import PagePool
from vmem_kv.testing import HostMemory
from vmem_kv.testing.adaptor import Adaptor

from .backends import open_backend, physical_bytes
from .bench import PAGE, books, make_layout


class LateDriver(Adaptor):
    """Is interrupted behind its next call of one operation."""

    def __init__(self, inner: Driver) -> None:
        super().__init__(inner)
        self.operation = ""

    def map(self, page_bytes: int, addresses: Sequence[int], handles: Sequence[Handle]) -> None:
        self.inner.map(page_bytes, addresses, handles)
        self._end("map")

    def set_access(self, spans: Sequence[Span]) -> None:
        self.inner.set_access(spans)
        self._end("set_access")

    def unmap(self, spans: Sequence[Span]) -> None:
        self.inner.unmap(spans)
        self._end("unmap")

    def copy(self, copies: Sequence[Copy]) -> None:
        self.inner.copy(copies)
        self._end("copy")

    def _end(self, operation: str) -> None:
        if operation == self.operation:
            self.operation = ""
            raise KeyboardInterrupt


class Lab:
    """Two sequences of 40 tokens, the second one a fork of the first, and a third one, over such a driver."""

    def __init__(self, backend: str) -> None:
        self.device = open_backend(backend, Ledger())
        self.driver = LateDriver(self.device)
        self.pool = PagePool(self.driver, PAGE, 64)
        self.cache = KVCache(self.pool, make_layout("group:2"))
        self.memory = HostMemory()
        self.source, self.other = self.cache.acquire_adjacent(2)
        self.cache.ensure({self.source: 40, self.other: 40})
        for number, slot_id in enumerate((self.source, self.other)):
            for address, n_bytes in self.spans(slot_id):
                self.memory.write(address, bytes((i * 7 + number) % 251 for i in range(n_bytes)))
        self.fork = self.cache.fork(self.source)

    def spans(self, slot_id: SlotId) -> list[Span]:
        """Where the tokens of a sequence lie."""
        return self.cache.spans(slot_id, 0, self.cache.n_tokens(slot_id))

    def contents(self) -> dict[SlotId, list[bytes]]:
        """What all sequences hold."""
        slots = self.cache.active_slots()
        return {slot_id: [self.memory.read(*span) for span in self.spans(slot_id)] for slot_id in slots}


@pytest.fixture
def lab(backend: str) -> Iterator[Lab]:
    """A lab; in the end nothing may be left."""
    lab = Lab(backend)
    yield lab
    lab.cache.retire(lab.cache.active_slots())
    lab.cache.close()
    lab.pool.trim()
    assert (lab.pool.n_owned, lab.pool.n_mappings, physical_bytes(lab.device)) == (0, 0, 0)
    lab.device.close()


CALLS: dict[str, Callable[[Lab], object]] = {
    "ensure": lambda lab: lab.cache.ensure({lab.source: 48, lab.other: 48}),
    "fork": lambda lab: lab.cache.fork(lab.source, 33),
    "truncate": lambda lab: lab.cache.truncate(lab.fork, 3),
    "share": lambda lab: lab.cache.share({lab.other: lab.fork, lab.fork: lab.other}, 40),
}


@pytest.mark.parametrize(
    ("call", "operation"),
    [
        *(("ensure", operation) for operation in ("map", "set_access")),
        *(("fork", operation) for operation in ("map", "set_access", "copy")),
        *(("truncate", operation) for operation in ("unmap", "map", "set_access")),
        *(("share", operation) for operation in ("unmap", "map", "set_access")),
    ],
)
def test_a_call_that_was_interrupted_behind_a_driver_call_changed_nothing(lab: Lab, call: str, operation: str) -> None:
    contents, state = lab.contents(), books(lab.cache)
    lab.driver.operation = operation
    with pytest.raises(KeyboardInterrupt):
        CALLS[call](lab)
    assert lab.contents() == contents
    assert books(lab.cache) == state
    lab.cache.check()
    CALLS[call](lab)
    lab.cache.check()


def test_pages_that_were_unmapped_when_the_interruption_came_go_back(lab: Lab) -> None:
    lab.cache.retire([lab.other, lab.fork])
    contents, n_warm = lab.contents(), lab.cache.stats().n_warm_pages
    assert n_warm > 0
    lab.driver.operation = "unmap"
    with pytest.raises(KeyboardInterrupt):
        lab.cache.reclaim(1000)
    assert (lab.pool.n_quarantined, lab.cache.stats().n_warm_pages) == (0, 0)
    assert lab.contents() == contents
    lab.cache.check()
