"""Random operations on a cache, against the reference model; every failure prints a program that repeats it.

`Run` has a method per operation, with plain numbers as arguments, so that a run is a list of calls. Every page gets a
tag at both its ends when it is mapped, after a look that it is zero: stale bytes, aliases, pages that were unmapped
too early or mixed up show as a wrong tag.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

from vmem_kv.cache import KVCache
from vmem_kv.driver.base import PASSED, Driver
from vmem_kv.driver.checked import CheckedDriver
from vmem_kv.errors import CapacityError, DriverError, OutOfPages, OutOfSlots, UsageError, VmemError
from vmem_kv.growth import SlotId
from vmem_kv.pages import PagePool
from vmem_kv.testing import (
    FaultyDriver,
    HostMemory,
    ManualFence,
    ReferenceModel,
    driver_error,
    fail_from,
    fail_once,
    no_faults,
)

from .backends import open_backend, physical_bytes
from .bench import PAGE, Bench, make_layout

MAX_TOKENS = 48
KINDS = ("token_major", "group:2", "per_layer", "per_head")


class Run(Bench):
    """A cache, its model, and what was done to them."""

    def __init__(
        self,
        kind: str = "per_layer",
        *,
        n_slots: int = 4,
        max_pages: int = 40,
        keep_freed: bool = False,
        backend: str = "native",
        device: Driver | None = None,
    ) -> None:
        self.history = [f"run = Run({kind!r}, n_slots={n_slots}, max_pages={max_pages}, {keep_freed=}, {backend=})"]
        self.device = device or open_backend(backend)
        self.faulty = FaultyDriver(self.device)
        self.driver = CheckedDriver(self.faulty)
        self.memory = HostMemory()
        self.pool = PagePool(self.driver, PAGE, max_pages, keep_freed=keep_freed)
        self.layout = make_layout(kind, n_slots=n_slots, max_tokens=MAX_TOKENS)
        self.cache = KVCache(self.pool, self.layout)
        rows = [plane.token_bytes for plane in self.layout.planes]
        self.model = ReferenceModel(rows, PAGE, n_slots, MAX_TOKENS, max_pages, keep_freed)
        self.fences: dict[int, tuple[int, ManualFence, int | None]] = {}  # number -> slot, fence, first token of slide
        self.tags: dict[tuple[int, int, int], bytes] = {}
        self.n_sequences = 0
        self.n_ops = 0
        self.n_faults = 0

    # One method per operation. `fault` is (fail from there on?, at which point), for this call only.

    def acquire(self, expected_tokens: int, domain: str, fault: tuple[bool, int] | None = None) -> int | None:
        self._begin(f"acquire({expected_tokens}, {domain!r}, fault={fault})", fault)
        best = self.model.best_slot(expected_tokens)
        try:
            slot = self.cache.acquire(expected_tokens=expected_tokens, domain=domain)
        except OutOfSlots:
            assert best is None or self.is_faulted, f"slot {best} is free"
            self._end()
            return None
        except DriverError:
            assert self.faulty.faults
            for page in [page for page in self.tags if page[0] == best]:
                del self.tags[page]  # perhaps scrubbed, perhaps not
            self._end()
            return None
        assert slot == best, f"slot {slot} was chosen, {best} fits best"
        state = self.model.slots[slot]
        was_other = state.state == "warm" and state.domain != domain
        self.model.acquired(slot, domain)
        self._end({page for page in self.model.pages if page[0] == slot and was_other})  # scrubbed
        return slot

    def ensure(self, lengths: dict[int, int], fault: tuple[bool, int] | None = None) -> None:
        self._begin(f"ensure({lengths}, fault={fault})", fault)
        grows = any(n > self.model.capacity(s) for s, n in lengths.items())
        is_broken = any(self.model.slots[s].is_broken and n > self.model.capacity(s) for s, n in lengths.items())
        fits, victims = self.model.plan_ensure(lengths)
        try:
            self.cache.ensure({SlotId(s): n for s, n in lengths.items()})
        except UsageError:
            assert is_broken
        except OutOfPages:
            assert not fits
            if not self.is_faulted:
                self.model.reclaimed(victims)
        except DriverError:
            assert self.faulty.faults
        else:
            assert fits
            assert not is_broken or not grows
            new = self.model.missing(lengths)
            if not self.is_faulted:
                self.model.reclaimed(victims)
            else:  # a fault that ensure could get around; take over what it reclaimed on the way
                warm = {s for s in self.model.reclaim_order() if self.cache._slots.state[s].value != "warm"}
                self.model.reclaimed(warm)
            self.model.ensured(lengths)
            self._end(new)
            return
        self._end()

    def premap(self, lengths: dict[int, int], fault: tuple[bool, int] | None = None) -> None:
        self._begin(f"premap({lengths}, fault={fault})", fault)
        whole = {s: n for s, n in lengths.items() if not self.model.slots[s].is_broken}
        new = self.model.missing(whole)
        try:
            n_pages = self.cache.premap({SlotId(s): n for s, n in lengths.items()})
        except CapacityError:
            assert len(new) > self.model.n_available
        except DriverError:
            assert self.faulty.faults
        else:
            assert n_pages == len(new) <= self.model.n_available
            self.model.premapped(whole)
            self._end(new)
            return
        self._end()

    def slide(self, slot: int, first_token: int, fence: int | None, fault: tuple[bool, int] | None = None) -> None:
        self._begin(f"slide({slot}, {first_token}, {fence}, fault={fault})", fault)
        self.model.slid(slot, first_token)
        if fence is None:
            self.model.slide_fence_passed(slot, first_token)
            self._broken_off(lambda: self.cache.slide(SlotId(slot), first_token, PASSED))
        else:
            manual = ManualFence()
            if self.model.before_window(slot, first_token):  # else there is nothing to wait for
                self.fences[fence] = (slot, manual, first_token)
            self._broken_off(lambda: self.cache.slide(SlotId(slot), first_token, manual))
        self._end()

    def retire(self, slot: int, fence: int | None, fault: tuple[bool, int] | None = None) -> None:
        self._verify(slot)
        self._begin(f"retire({slot}, {fence}, fault={fault})", fault)
        self.model.retired(slot)
        if fence is not None:
            self.fences[fence] = (slot, ManualFence(), None)
        elif not self._is_waiting(slot):
            self.model.fence_passed(slot)
        given = PASSED if fence is None else self.fences[fence][1]
        self._broken_off(lambda: self.cache.retire(SlotId(slot), given))
        self._end()

    def pass_fence(self, fence: int, fault: tuple[bool, int] | None = None) -> None:
        self._begin(f"pass_fence({fence}, fault={fault})", fault)
        slot, manual, first_token = self.fences.pop(fence)
        manual.pass_()
        if first_token is not None:
            self.model.slide_fence_passed(slot, first_token)
        if self.model.slots[slot].state == "retired" and not self._is_waiting(slot):
            self.model.fence_passed(slot)
        self._broken_off(lambda: self.cache.reclaim(0))
        if self.is_faulted:  # a poll that broke off leaves the rest to the next one
            self.faulty.plan = no_faults
            self.cache.reclaim(0)
        self._end()

    def reclaim(self, n_pages: int, fault: tuple[bool, int] | None = None) -> None:
        self._begin(f"reclaim({n_pages}, fault={fault})", fault)
        victims, n_expected = [], 0
        for slot in self.model.reclaim_order():
            if n_expected >= n_pages:
                break
            victims.append(slot)
            n_expected += sum(page[0] == slot for page in self.model.pages)
        try:
            assert self.cache.reclaim(n_pages) == n_expected
        except DriverError:
            assert self.faulty.faults
        else:
            self.model.reclaimed(victims)
        self._end()

    def trim(self, n_pages: int, fault: tuple[bool, int] | None = None) -> None:
        self._begin(f"trim({n_pages}, fault={fault})", fault)
        if not self._broken_off(lambda: self.pool.trim(n_pages)):
            self.model.trimmed(n_pages)
        self._end()

    def resize(self, max_pages: int, fault: tuple[bool, int] | None = None) -> None:
        self._begin(f"resize({max_pages}, fault={fault})", fault)
        fits, victims = self.model.plan_resize(max_pages)
        try:
            self.pool.resize(max_pages)
        except OutOfPages:
            assert not fits or self.is_faulted
        except DriverError:
            assert self.faulty.faults
        else:
            assert fits
            self.model.reclaimed(victims)
            self.model.resized(max_pages)
        self._end()

    def finish(self) -> None:
        """End everything and look for what is left. Not an operation: nothing can follow."""
        self.history.append("run.finish()")
        for slot in self.live():
            self._verify(slot)
            self.cache.retire(SlotId(slot))
        for _, fence, _ in self.fences.values():
            fence.pass_()
        self.cache.close()
        self.pool.trim()
        lost = list(self.pool._quarantined)
        assert self.driver.n_live_mappings == self.driver.n_live_reservations == self.pool.n_mappings == 0
        assert self.driver.n_live_handles == len(lost) == self.pool.n_owned
        assert self.physical_bytes() == len(lost) * PAGE
        for handle in lost:
            self.device.release(PAGE, [handle])

    # What the choice of the next operation may look at

    def live(self) -> list[int]:
        """Slots that belong to sequences."""
        return [slot for slot, state in enumerate(self.model.slots) if state.state == "active"]

    def n_broken(self) -> int:
        """Slots that are lost, or will be when their sequence ends."""
        return sum(state.is_broken for state in self.model.slots)

    # Inside

    def _begin(self, call: str, fault: tuple[bool, int] | None) -> None:
        self.history.append(f"run.{call}")
        self.n_ops += 1
        self.faulty.points.clear()
        self.faulty.faults.clear()
        self.faulty._n_of_kind.clear()
        if fault is not None:
            from_then_on, n = fault
            self.faulty.plan = (fail_from if from_then_on else fail_once)(n, driver_error())

    @property
    def is_faulted(self) -> bool:
        """Whether the present call met a fault."""
        return bool(self.faulty.faults)

    def _broken_off(self, call: Callable[[], object]) -> bool:
        """Make a call that may meet a fault; return whether it did."""
        try:
            call()
        except DriverError:
            assert self.faulty.faults
            return True
        return False

    def _end(self, fresh: Iterable[tuple[int, int, int]] = ()) -> None:
        """Compare everything with the model; `fresh` pages must be zero, and are tagged."""
        self.faulty.plan = no_faults
        stuck = {
            page for stuck in self.cache.region._stuck for page in range(stuck.range[0][0], sum(stuck.range[0]), PAGE)
        }
        mapped = {self._page_at(address) for address in self.driver._mapped if address not in stuck}
        stats = self.cache.stats()
        if self.faulty.faults:
            self.n_faults += len(self.faulty.faults)
            self.model.broke_off(mapped, self.cache.region.broken, stats.n_free_pages, stats.n_quarantined_pages)
        self.model.compare(stats, mapped)
        self.cache.check()
        assert stats.n_owned_pages == self.driver.n_live_handles
        for page in self.tags.keys() - mapped:
            del self.tags[page]
        for page in fresh:
            assert self._ends(page) == (bytes(8), bytes(8)), f"page {page} shows old bytes"
            self._tag(page)

    def _page_at(self, address: int) -> tuple[int, int, int]:
        offset = address - self.cache.region.reservation.base
        for index, plane in enumerate(self.layout.planes):
            if offset < plane.base_bytes + plane.span_bytes * len(self.model.slots):
                slot, inside = divmod(offset - plane.base_bytes, plane.span_bytes)
                return slot, index, inside // PAGE
        raise AssertionError(f"{address:#x} lies outside of the region")

    def _address(self, page: tuple[int, int, int]) -> int:
        slot, plane_index, index = page
        return self.address(slot, plane_index, 0) + index * PAGE

    def _ends(self, page: tuple[int, int, int]) -> tuple[bytes, bytes]:
        address = self._address(page)
        return self.memory.read(address, 8), self.memory.read(address + PAGE - 8, 8)

    def _tag(self, page: tuple[int, int, int]) -> None:
        self.n_sequences += 1
        tag = self.n_sequences.to_bytes(8, "little")
        self.memory.write(self._address(page), tag)
        self.memory.write(self._address(page) + PAGE - 8, tag)
        self.tags[page] = tag

    def _verify(self, slot: int) -> None:
        for page, tag in self.tags.items():
            if page[0] == slot:
                assert self._ends(page) == (tag, tag), f"page {page} holds the bytes of another one"

    def _is_waiting(self, slot: int) -> bool:
        return any(waiting == slot for waiting, _, _ in self.fences.values())

    def script(self) -> str:
        """A program that repeats this run."""
        return "\n".join(["from tests.core.random_ops import Run", "", *self.history])


def step(run: Run, choose: random.Random, fault_share: float = 0.15) -> None:
    """Do one random operation."""
    fault = (choose.random() < 0.5, choose.choice((1, 1, 2, 3, 5, 8))) if choose.random() < fault_share else None
    live = run.live()
    kind = choose.random()
    if not live or kind < 0.13:
        run.acquire(choose.choice((0, 1, 5, 20, 48)), choose.choice("ab"), fault)
    elif kind < 0.55:
        slots = choose.sample(live, choose.randint(1, min(3, len(live))))
        run.ensure({slot: _length(run, slot, choose) for slot in slots}, fault)
    elif kind < 0.63:
        run.premap({slot: choose.randint(1, MAX_TOKENS) for slot in live[:2]}, fault)
    elif kind < 0.70:
        slot = choose.choice(live)
        state = run.model.slots[slot]
        if state.n_tokens > state.first_token:
            fence = run.n_ops if choose.random() < 0.5 else None
            run.slide(slot, choose.randint(state.first_token + 1, state.n_tokens), fence, fault)
    elif kind < 0.80:
        run.retire(choose.choice(live), run.n_ops if choose.random() < 0.4 else None, fault)
    elif kind < 0.88:
        if run.fences:
            run.pass_fence(choose.choice(list(run.fences)), fault)
    elif kind < 0.92:
        run.reclaim(choose.randint(1, 12), fault)
    elif kind < 0.95:
        run.trim(choose.randint(1, 8), fault)
    else:
        run.resize(choose.randint(10, 60), fault)


def _length(run: Run, slot: int, choose: random.Random) -> int:
    """Mostly one more token or a few, sometimes a prompt, sometimes shorter."""
    state = run.model.slots[slot]
    kind = choose.random()
    if kind < 0.6:
        return min(MAX_TOKENS, state.n_tokens + choose.randint(1, 4))
    if kind < 0.8:
        return choose.randint(max(state.n_tokens, 1), MAX_TOKENS)
    return choose.randint(state.first_token, max(state.n_tokens, state.first_token))


def random_run(seed: int, n_ops: int, backend: str = "native", kinds: Sequence[str] = KINDS) -> tuple[int, int]:
    """Do `n_ops` operations; return how many were done and how many faults they met.

    Raises:
        AssertionError: Something is wrong; the message ends with a program that repeats it.
    """
    choose = random.Random(seed)
    device = open_backend(backend)
    n_done = n_faults = 0
    while n_done < n_ops:
        run = Run(
            choose.choice(kinds),
            n_slots=choose.randint(2, 6),
            max_pages=choose.randint(12, 60),
            keep_freed=choose.random() < 0.5,
            backend=backend,
            device=device,
        )
        try:
            while run.n_ops < 300 and n_done + run.n_ops < n_ops and run.n_broken() < 2:
                step(run, choose)
            run.finish()
        except (AssertionError, VmemError, LookupError) as error:
            raise AssertionError(f"seed {seed}: {error!r}. To repeat it:\n\n{run.script()}\n") from error
        n_done += run.n_ops
        n_faults += run.n_faults
    assert physical_bytes(device) == 0
    device.close()
    return n_done, n_faults
