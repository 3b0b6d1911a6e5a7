"""Random operations on a cache, held against the reference model and shadow tags after every single one.

`Run` has a method per operation with plain numbers as arguments, so that a run is a list of operations that can be
printed as a program, repeated and shortened. After each: the books add up, the driver's own table of mappings is the
one that the model predicts, every live K and V row of every sequence carries its tag, and every page that was mapped
or scrubbed for somebody reads as zeros from end to end.

Guarantees: a run is a function of its operations; `random_run` is one of its seed.
Assumptions: nobody else uses the driver.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypedDict

from vmem_kv.cache import KVCache
from vmem_kv.driver.base import PASSED, Driver, Fence
from vmem_kv.driver.checked import CheckedDriver
from vmem_kv.errors import CapacityError, DriverError, OutOfPages, OutOfSlots, UsageError
from vmem_kv.growth import SlotId
from vmem_kv.layout import LayerSpec, Layout, TensorSpec
from vmem_kv.pages import PagePool
from vmem_kv.sharing import tail_copies
from vmem_kv.testing.faults import FaultyDriver, Point, driver_error, fail_from, fail_once, no_faults
from vmem_kv.testing.memory import DriverMemory, HostMemory, KernelFence, ManualFence
from vmem_kv.testing.model import Page, ReferenceModel
from vmem_kv.testing.shadow import ShadowTags, words_of

MAX_TOKENS = 48
KINDS = ("token_major", "group:2", "per_layer", "per_head")
RUN_LENGTH = 300
"""Operations on one cache before `random_run` opens the next."""

_SMALL_PAGE_BYTES = 4096

Fault = tuple[bool, int] | None
"""(from there on?, at which point of the call)."""


class Operation(NamedTuple):
    """One call of a method of `Run`."""

    name: str
    arguments: tuple[Any, ...]
    fault: Fault

    def __str__(self) -> str:
        return f"run.{self.name}({', '.join([*map(repr, self.arguments), f'fault={self.fault}'])})"


class Found(AssertionError):
    """A run went wrong.

    Attributes:
        run: The run, as it was left.
        what: What is wrong.
        program: Python that repeats it.
    """

    def __init__(self, what: str, run: Run, opener: str) -> None:
        self.run = run
        self.what = what
        self.program = run.program(opener)
        super().__init__(f"{what}. To repeat it:\n\n{self.program}\n")


def odd_layout(kind: str, page_bytes: int, *, n_slots: int, max_tokens: int = MAX_TOKENS) -> Layout:
    """Lay out two layers of odd sizes, K and V of different shapes; 3 to 42 rows of a plane fill a page."""
    scale = max(1, page_bytes // _SMALL_PAGE_BYTES)
    layers = (
        LayerSpec(TensorSpec(3, 56 * scale, 2), TensorSpec(1, 24 * scale, 4)),
        LayerSpec(TensorSpec(2, 80 * scale, 2), TensorSpec(2, 112 * scale, 2)),
    )
    return Layout.build(kind, layers, n_slots=n_slots, max_tokens=max_tokens, page_bytes=page_bytes)


def exact_layout(kind: str, page_bytes: int, *, n_slots: int, max_tokens: int = MAX_TOKENS) -> Layout:
    """Lay out two layers whose rows divide a page, in every plane of every kind: many lengths end where a page ends."""
    scale = max(1, page_bytes // _SMALL_PAGE_BYTES)
    layer = LayerSpec(TensorSpec(2, 64 * scale, 2), TensorSpec(1, 64 * scale, 4))
    return Layout.build(kind, (layer, layer), n_slots=n_slots, max_tokens=max_tokens, page_bytes=page_bytes)


ROWS: dict[str, Callable[..., Layout]] = {"odd": odd_layout, "exact": exact_layout}
"""How the rows of a plane lie on its pages."""


class RunOptions(TypedDict, total=False):
    """What a `Run` may be told beside its driver and its layout."""

    rows: str
    n_slots: int
    max_pages: int
    keep_freed: bool


class Run:
    """A cache, its model, and what was done to them.

    Args:
        driver: What to run on; it is not closed.
        kind: The layout.
        rows: Its rows, a name in `ROWS`.
        n_slots: How many slots.
        max_pages: The budget.
        keep_freed: Whether the pool keeps freed pages.
    """

    def __init__(
        self,
        driver: Driver,
        kind: str = "per_layer",
        *,
        rows: str = "odd",
        n_slots: int = 4,
        max_pages: int = 40,
        keep_freed: bool = False,
    ) -> None:
        self.settings = {
            "kind": kind,
            "rows": rows,
            "n_slots": n_slots,
            "max_pages": max_pages,
            "keep_freed": keep_freed,
        }
        self.history: list[Operation] = []
        self.base = driver
        self.faulty = FaultyDriver(driver)
        self.driver = CheckedDriver(self.faulty)
        self.page_bytes = driver.info.granularity_bytes
        self._ledger_before = (driver.ledger.n_bytes, driver.ledger.n_mappings)
        self.pool = PagePool(self.driver, self.page_bytes, max_pages, keep_freed=keep_freed)
        self.layout = ROWS[rows](kind, self.page_bytes, n_slots=n_slots)
        self.cache = KVCache(self.pool, self.layout)
        self.memory = HostMemory() if driver.info.device == "cpu" else DriverMemory(driver)
        self.tags = ShadowTags(self.layout, words_of(driver, self.cache.region.reservation))
        row_bytes = [plane.token_bytes for plane in self.layout.planes]
        self.model = ReferenceModel(row_bytes, self.page_bytes, n_slots, MAX_TOKENS, max_pages, keep_freed)
        self.fences: dict[int, tuple[int, ManualFence, int | None]] = {}  # number -> slot, fence, first token of slide
        self.n_ops = self.n_faults = self.n_sequences = self.n_mapped = 0
        self._sequences: dict[int, int] = {}  # by slot
        self._n_calls = -1
        self._mapped: dict[Page, int] = {}
        self._page_of: dict[int, Page] = {}
        self._zeros = bytes(self.page_bytes)

    # One method per operation. `fault` is for this call only.

    def acquire(self, expected_tokens: int, domain: str, fault: Fault = None) -> int | None:
        """Begin a sequence; return its slot."""
        self._begin("acquire", (expected_tokens, domain), fault)
        acquire = self.cache.acquire
        slots = self._acquire(
            1, expected_tokens, domain, lambda: [acquire(expected_tokens=expected_tokens, domain=domain)]
        )
        return slots[0] if slots else None

    def acquire_adjacent(self, n_slots: int, expected_tokens: int, domain: str, fault: Fault = None) -> list[int]:
        """Begin sequences in neighbouring slots; return the slots, none where there are not so many."""
        self._begin("acquire_adjacent", (n_slots, expected_tokens, domain), fault)
        acquire = self.cache.acquire_adjacent
        return self._acquire(
            n_slots, expected_tokens, domain, lambda: acquire(n_slots, expected_tokens=expected_tokens, domain=domain)
        )

    def ensure(self, lengths: dict[int, int], fault: Fault = None) -> None:
        """Grow or truncate sequences, and let them write their new rows."""
        self._begin("ensure", (lengths,), fault)
        slots = self.model.slots
        grows = any(n > self.model.capacity(s) for s, n in lengths.items())
        is_broken = any(
            (slots[s].is_broken or slots[s].is_damaged) and n > self.model.capacity(s) for s, n in lengths.items()
        )
        is_shared = any(n < slots[s].n_tokens and n < self.model.n_shared_tokens(s) for s, n in lengths.items())
        fits, victims = self.model.plan_ensure(lengths)
        before = {slot: slots[slot].n_tokens for slot in lengths}
        fresh: set[Page] = set()
        try:
            self.cache.ensure({SlotId(s): n for s, n in lengths.items()})
        except UsageError:
            require(is_broken or is_shared, "a sequence that is whole was refused")
        except OutOfPages:
            require(not fits, "the pages were there")
            if not self.is_faulted:
                self.model.reclaimed(victims)
        except DriverError:
            require(self.is_faulted, "a driver error without a fault")
        else:
            require(fits, "there were not so many pages")
            require(not is_broken or not grows, "a broken slot has grown")
            require(not is_shared, "a sequence may write what it shares")
            fresh = self.model.missing(lengths)
            if self.is_faulted:  # a fault that ensure could get around; take over what it reclaimed on the way
                victims = [s for s in self.model.reclaim_order() if self.cache._slots.state[s].value != "warm"]
            self.model.reclaimed(victims)
            self.model.ensured(lengths)
            self._require_zero(fresh)
            for slot, n_tokens in lengths.items():
                self.tags.write(slot, before[slot], n_tokens, self._sequences[slot])
        self._end()

    def premap(self, lengths: dict[int, int], fault: Fault = None) -> None:
        """Map ahead."""
        self._begin("premap", (lengths,), fault)
        states = self.model.slots
        whole = {s: n for s, n in lengths.items() if not (states[s].is_broken or states[s].is_damaged)}
        fresh = self.model.missing(whole)
        try:
            n_pages = self.cache.premap({SlotId(s): n for s, n in lengths.items()})
        except CapacityError:
            require(len(fresh) > self.model.n_available, "the pages were there")
            fresh = set()
        except DriverError:
            require(self.is_faulted, "a driver error without a fault")
            fresh = set()
        else:
            require(n_pages == len(fresh) <= self.model.n_available, f"{n_pages} pages, not {len(fresh)}")
            self.model.premapped(whole)
        self._end(fresh)

    def fork(self, source: int, n_tokens: int, fault: Fault = None) -> None:
        """Begin another sequence with the first tokens of this one."""
        self._begin("fork", (source, n_tokens), fault)
        target, fits, victims = self.model.plan_fork(source, n_tokens)
        new: set[Page] = set()
        try:
            slot = self.cache.fork(SlotId(source), n_tokens)
        except OutOfSlots:
            require(target is None or self.is_faulted, f"slot {target} is free")
        except OutOfPages:
            require(not fits, "the pages were there")
            if not self.is_faulted:
                self.model.reclaimed([*([] if target is None else [target]), *victims])
        except DriverError:
            require(self.is_faulted, "a driver error without a fault")
        else:
            require(slot == target and fits, f"slot {slot} was taken, not {target}")
            if self.is_faulted:
                warm = (s for s in self.model.reclaim_order() if s != slot)
                victims = [s for s in warm if self.cache._slots.state[s].value != "warm"]
            self.model.reclaimed(victims)
            new = self.model.forked(source, slot, n_tokens)
            self.n_sequences += 1
            self._sequences[slot] = self.n_sequences
            self.tags.fork(source, slot, n_tokens)
        self._end()
        self._require_zero(new, behind=n_tokens)

    def truncate(self, slot: int, n_tokens: int, fault: Fault = None) -> None:
        """Shorten a sequence, also where it is shared."""
        self._begin("truncate", (slot, n_tokens), fault)
        fits, victims = self.model.plan_truncate(slot, n_tokens)
        try:
            with self._kernel_on(slot) as fence:
                self.cache.truncate(SlotId(slot), n_tokens, fence)
        except OutOfPages:
            require(not fits, "the pages were there")
            if not self.is_faulted:
                self.model.reclaimed(victims)
        except DriverError:
            require(self.is_faulted, "a driver error without a fault")
        else:
            require(fits, "there were not so many pages")
            if self.is_faulted:
                victims = [s for s in self.model.reclaim_order() if self.cache._slots.state[s].value != "warm"]
            self.model.reclaimed(victims)
            self.model.truncated(slot, n_tokens)
        self._end()

    def share(self, target: int, source: int, fault: Fault = None) -> None:
        """Let a sequence go on from another one's tokens, as many as it has."""
        self._begin("share", (target, source), fault)
        n_tokens = self.model.slots[target].n_tokens
        try:
            with self._kernel_on(target) as fence:
                self.cache.share({SlotId(target): SlotId(source)}, n_tokens, fence)
        except DriverError:
            require(self.is_faulted, "a driver error without a fault")
        else:
            self.model.shared(target, source)
            base = self.cache.region.reservation.base
            self.base.copy(tail_copies(self.layout, base, SlotId(source), SlotId(target), n_tokens))
            self.tags.fork(source, target, n_tokens)
        self._end()

    def vacate(self, slot: int, fault: Fault = None) -> None:
        """Give back all pages of a sequence, which goes on from nothing."""
        self._begin("vacate", (slot,), fault)
        self.model.vacated(slot)
        self.fences = {number: fence for number, fence in self.fences.items() if fence[0] != slot}
        with self._kernel_on(slot) as fence:
            self._may_break_off(lambda: self.cache.vacate(SlotId(slot), fence))
        self._end()

    def slide(self, slot: int, first_token: int, fence: int | None, fault: Fault = None) -> None:
        """Give up the tokens before one, behind a fence of this number or at once."""
        self._begin("slide", (slot, first_token, fence), fault)
        self.model.slid(slot, first_token)
        if fence is None:
            self.model.slide_fence_passed(slot, first_token)
            self._may_break_off(lambda: self.cache.slide(SlotId(slot), first_token, PASSED))
        else:
            manual = ManualFence()
            if self.model.before_window(slot, first_token):  # else there is nothing to wait for
                self.fences[fence] = (slot, manual, first_token)
            self._may_break_off(lambda: self.cache.slide(SlotId(slot), first_token, manual))
        self._end()

    def retire(self, slot: int, fence: int | None, fault: Fault = None) -> None:
        """End a sequence, behind a fence of this number or at once."""
        self._begin("retire", (slot, fence), fault)
        self.model.retired(slot)
        if fence is not None:
            self.fences[fence] = (slot, ManualFence(), None)
        elif not self._is_waiting(slot):
            self.model.fence_passed(slot)
        given = PASSED if fence is None else self.fences[fence][1]
        self._may_break_off(lambda: self.cache.retire(SlotId(slot), given))
        self._end()

    def pass_fence(self, fence: int, fault: Fault = None) -> None:
        """Let a fence pass, and let the cache notice."""
        self._begin("pass_fence", (fence,), fault)
        slot, manual, first_token = self.fences.pop(fence)
        manual.pass_()
        if first_token is not None:
            self.model.slide_fence_passed(slot, first_token)
        if self.model.slots[slot].state == "retired" and not self._is_waiting(slot):
            self.model.fence_passed(slot)
        self._may_break_off(lambda: self.cache.reclaim(0))
        if self.is_faulted:  # a poll that broke off leaves the rest to the next one
            self.faulty.plan = no_faults
            self.cache.reclaim(0)
        self._end()

    def reclaim(self, n_pages: int, fault: Fault = None) -> None:
        """Unmap warm slots."""
        self._begin("reclaim", (n_pages,), fault)
        victims, n_expected = [], 0
        for slot in self.model.reclaim_order():
            if n_expected >= n_pages:
                break
            victims.append(slot)
            n_expected += self.model.n_givable(slot)
        try:
            n_freed = self.cache.reclaim(n_pages)
        except DriverError:
            require(self.is_faulted, "a driver error without a fault")
        else:
            require(n_freed == n_expected, f"{n_freed} pages were reclaimed, not {n_expected}")
            self.model.reclaimed(victims)
        self._end()

    def trim(self, n_pages: int, fault: Fault = None) -> None:
        """Release free pages."""
        self._begin("trim", (n_pages,), fault)
        if not self._may_break_off(lambda: self.pool.trim(n_pages)):
            self.model.trimmed(n_pages)
        self._end()

    def resize(self, max_pages: int, fault: Fault = None) -> None:
        """Change the budget."""
        self._begin("resize", (max_pages,), fault)
        fits, victims = self.model.plan_resize(max_pages)
        try:
            self.pool.resize(max_pages)
        except OutOfPages:
            require(not fits or self.is_faulted, "the budget covers what is in use")
        except DriverError:
            require(self.is_faulted, "a driver error without a fault")
        else:
            require(fits, "the budget is below what is in use")
            self.model.reclaimed(victims)
            self.model.resized(max_pages)
        self._end()

    def finish(self) -> None:
        """End everything and look for what is left. Not an operation: nothing can follow.

        Raises:
            AssertionError: Something is left.
        """
        for slot in self.live():
            self.cache.retire(SlotId(slot), PASSED)
        for _, fence, _ in self.fences.values():
            fence.pass_()
        self.cache.close()
        self.pool.trim()
        lost = list(self.pool._quarantined)
        left = (self.driver.n_live_mappings, self.driver.n_live_reservations, self.pool.n_mappings)
        require(left == (0, 0, 0), f"mappings, reservations and mappings in the books that are left: {left}")
        require(self.driver.n_live_handles == len(lost) == self.pool.n_owned, "pages are left that nobody knows")
        self._require_ledger()
        for handle in lost:
            self.base.release(self.page_bytes, [handle])
        self.base.ledger.refund_bytes(len(lost) * self.page_bytes)

    # Random choices

    @classmethod
    def random_settings(cls, choose: random.Random, kinds: Sequence[str]) -> dict[str, Any]:
        """Choose the arguments of a run."""
        return {
            "kind": choose.choice(kinds),
            "rows": choose.choice(tuple(ROWS)),
            "n_slots": choose.randint(2, 6),
            "max_pages": choose.randint(12, 60),
            "keep_freed": choose.random() < 0.5,
        }

    def random_step(self, choose: random.Random, fault_share: float) -> None:
        """Do one random operation."""
        step(self, choose, fault_share)

    def fault_error(self, point: Point) -> BaseException:
        """What a planned fault fails with at a point."""
        return driver_error()(point)

    # Lists of operations

    def is_possible(self, operation: Operation) -> bool:
        """Whether an operation makes sense now; in a shortened list some do not."""
        name, arguments, live = operation.name, operation.arguments, set(self.live())
        slots = self.model.slots
        if name in ("ensure", "premap"):
            return all(s in live and slots[s].first_token <= n for s, n in arguments[0].items())
        if name == "acquire_adjacent":
            return bool(arguments[0] <= len(slots))
        if name == "slide":
            slot, first_token = arguments[:2]
            return slot in live and slots[slot].first_token < first_token <= slots[slot].n_tokens
        if name in ("retire", "vacate"):
            return arguments[0] in live
        if name in ("fork", "truncate"):
            slot, n_tokens = arguments
            return slot in self.whole() and slots[slot].first_token <= n_tokens <= slots[slot].n_tokens
        if name == "share":
            return arguments[1] in self.sharers(arguments[0])
        return name != "pass_fence" or arguments[0] in self.fences

    def do(self, operation: Operation) -> None:
        """Make one operation of a list."""
        getattr(self, operation.name)(*operation.arguments, operation.fault)

    def program(self, opener: str = "open_driver('host')") -> str:
        """Python that repeats this run, on a driver that the expression `opener` opens."""
        name = type(self).__name__
        lines = [
            f"from {type(self).__module__} import {name}",
            "from vmem_kv.testing.targets import open_driver",
            "",
            f"run = {name}({opener}, **{self.settings})",
            *map(str, self.history),
            "run.finish()",
            "run.base.close()",
        ]
        return "\n".join(lines)

    # What the choice of the next operation may look at

    def live(self) -> list[int]:
        """Slots that belong to sequences."""
        return [slot for slot, state in enumerate(self.model.slots) if state.state == "active"]

    def whole(self) -> list[int]:
        """Slots that belong to sequences which can grow."""
        slots = self.model.slots
        return [slot for slot in self.live() if not (slots[slot].is_broken or slots[slot].is_damaged)]

    def sharers(self, target: int) -> list[int]:
        """Slots from which a sequence could go on."""
        slots = self.model.slots
        return [
            slot
            for slot in self.whole()
            if slot != target
            and target in self.whole()
            and slots[slot].domain == slots[target].domain
            and slots[slot].n_tokens >= slots[target].n_tokens
            and slots[slot].first_token == slots[target].first_token == 0
        ]

    def n_broken(self) -> int:
        """Slots that are lost, or will be when their sequence ends."""
        return sum(state.is_broken for state in self.model.slots)

    @property
    def is_faulted(self) -> bool:
        """Whether the present call met a fault."""
        return bool(self.faulty.faults)

    # Inside

    def _acquire(self, n_slots: int, expected_tokens: int, domain: str, call: Callable[[], Sequence[int]]) -> list[int]:
        best = self.model.best_slots(n_slots, expected_tokens)
        try:
            slots = list(call())
        except OutOfSlots:
            require(not best or self.is_faulted, f"slots {best} are free")
            self._end()
            return []
        except DriverError:
            require(self.is_faulted, "a driver error without a fault")
            self._end()
            return []
        require(slots == best, f"slots {slots} were chosen, {best} fit best")
        before = {slot: self.model.slots[slot] for slot in slots}
        others = {slot for slot, state in before.items() if state.state == "warm" and state.domain != domain}
        for slot in slots:
            self.model.acquired(slot, domain)
            self.n_sequences += 1
            self._sequences[slot] = self.n_sequences
        self._end({page for page in self.model.pages if page[0] in others})  # scrubbed
        return slots

    def _begin(self, name: str, arguments: tuple[Any, ...], fault: Fault) -> None:
        self.history.append(Operation(name, arguments, fault))
        self.n_ops += 1
        self.faulty.begin_count()
        if fault is not None:
            from_then_on, n = fault
            self.faulty.plan = (fail_from if from_then_on else fail_once)(n, self.fault_error)

    @contextmanager
    def _kernel_on(self, slot: int) -> Iterator[Fence]:
        """Let a kernel read what lies under a slot until it is waited for: nothing of that may go before."""
        before = self._pages_under(slot)

        def require_all() -> None:
            require(self._pages_under(slot) == before, "pages went while a kernel read them")

        fence = KernelFence(require_all)
        yield fence
        if not fence.passed():
            require_all()

    def _pages_under(self, slot: int) -> dict[int, int]:
        """What lies under a slot by the driver's own books: addresses and pages."""
        return {at: handle for at, handle in self.driver._mapped.items() if self._page_at(at)[0] == slot}

    def _may_break_off(self, call: Callable[[], object]) -> bool:
        """Make a call that may meet a fault; return whether it did."""
        try:
            call()
        except DriverError:
            require(self.is_faulted, "a driver error without a fault")
            return True
        return False

    def _end(self, fresh: Iterable[Page] = ()) -> None:
        """Compare everything; `fresh` pages must be zero."""
        self.faulty.plan = no_faults
        is_quiet = sum(self.faulty.calls.values()) == self._n_calls
        mapped = self._mapped_pages()
        stats = self.cache.stats()
        if self.is_faulted:
            self.n_faults += len(self.faulty.faults)
            region = self.cache.region
            stuck = {found.slot_id for found in region.unmapper.stuck}
            handles = {handle for found in region.unmapper.stuck for handle in found.range[1]}
            doomed = [page for page, handle in mapped.items() if handle in handles]
            free_and_lost = (stats.n_free_pages, stats.n_quarantined_pages)
            self.model.broke_off(mapped, stuck, *free_and_lost, region.unmapper.damaged, doomed)
        self.model.compare(stats, mapped)
        if not is_quiet or not self.n_ops % 8:  # without a driver call, states and lengths alone have changed
            self.cache.check()
        require(stats.n_owned_pages == self.driver.n_live_handles, "the driver has another number of pages")
        self._require_ledger()
        self._require_zero(fresh)
        for slot, state in enumerate(self.model.slots):
            if state.state == "active":
                self.tags.verify(slot, state.first_token, state.n_tokens)

    def _require_ledger(self) -> None:
        """What the pool holds is what the ledger counts, no more and no less. Nobody else charges it meanwhile."""
        ledger, before = self.driver.ledger, self._ledger_before
        counted = (ledger.n_bytes - before[0], ledger.n_mappings - before[1])
        held = (self.pool.n_owned * self.page_bytes, self.pool.n_mappings)
        require(counted == held, f"the ledger counts (bytes, mappings) {counted}, the pool holds {held}")

    def _mapped_pages(self) -> dict[Page, int]:
        """What the driver has mapped, by its own books, without pages that are stuck in quarantine."""
        n_calls = sum(self.faulty.calls.values())
        if n_calls == self._n_calls:
            return self._mapped
        self._n_calls = n_calls
        step = self.page_bytes
        stuck = {a for s in self.cache.region.unmapper.stuck for a in range(s.range[0][0], sum(s.range[0]), step)}
        mapped = self.driver._mapped.items()
        self._mapped = {self._page_at(address): handle for address, handle in mapped if address not in stuck}
        return self._mapped

    def _page_at(self, address: int) -> Page:
        page = self._page_of.get(address)
        if page is None:
            offset = address - self.cache.region.reservation.base
            planes = self.layout.planes
            index = next(i for i in reversed(range(len(planes))) if planes[i].base_bytes <= offset)
            slot, inside = divmod(offset - planes[index].base_bytes, planes[index].span_bytes)
            page = self._page_of[address] = (slot, index, inside // self.page_bytes)
        return page

    def _require_zero(self, pages: Iterable[Page], *, first: int = 0, behind: int = 0) -> None:
        """Pages must be zero, but for rows from `first` on that are before `behind`."""
        wanted = set(pages)
        missing = wanted - self._mapped_pages().keys()  # to touch one would end the process
        require(not missing, f"pages {sorted(missing)} are not mapped")
        for page in wanted:
            self.n_mapped += 1
            _, plane_index, index = page
            data, row_bytes = self._read_page(page), self.layout.planes[plane_index].token_bytes
            begin, end = (max(n * row_bytes - index * self.page_bytes, 0) for n in (first, behind))
            is_zero = data[:begin] == self._zeros[:begin] and data[end:] == self._zeros[end:]
            require(is_zero, f"page {page} shows old bytes")

    def _read_page(self, page: Page) -> bytes:
        slot, plane_index, index = page
        plane = self.layout.planes[plane_index]
        start = self.cache.region.reservation.base + plane.base_bytes + slot * plane.span_bytes
        return self.memory.read(start + index * self.page_bytes, self.page_bytes)

    def _is_waiting(self, slot: int) -> bool:
        return any(waiting == slot for waiting, _, _ in self.fences.values())


def require(condition: bool, what: str) -> None:
    """Raise AssertionError where a condition does not hold."""
    if not condition:
        raise AssertionError(what)


def step(run: Run, choose: random.Random, fault_share: float = 0.15) -> None:
    """Do one random operation."""
    fault = (choose.random() < 0.5, choose.choice((1, 1, 2, 3, 5, 8))) if choose.random() < fault_share else None
    live = run.live()
    kind = choose.random()
    if not live and run.fences and kind < 0.5:
        run.pass_fence(choose.choice(list(run.fences)), fault)
    elif kind < 0.03:
        run.acquire_adjacent(choose.choice((2, 2, 3)), choose.choice((0, 5, 20, 48)), choose.choice("ab"), fault)
    elif not live or kind < 0.13:
        run.acquire(choose.choice((0, 1, 5, 20, 48)), choose.choice("ab"), fault)
    elif kind < 0.23:
        _step_of_sharing(run, live, choose, fault)
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


def _step_of_sharing(run: Run, live: Sequence[int], choose: random.Random, fault: Fault) -> None:
    """Fork mostly, and do to what is shared all that could hurt it."""
    kind, whole, slots = choose.random(), run.whole(), run.model.slots
    if kind < 0.1:
        run.vacate(choose.choice(live), fault)
    elif whole:
        slot = choose.choice(whole)
        state = slots[slot]
        sources = run.sharers(slot)
        if kind < 0.2 and sources:
            run.share(slot, choose.choice(sources), fault)
        elif kind < 0.4:
            run.truncate(slot, choose.randint(state.first_token, state.n_tokens), fault)
        else:
            n_tokens = state.n_tokens if choose.random() < 0.5 else choose.randint(state.first_token, state.n_tokens)
            run.fork(slot, n_tokens, fault)


def _length(run: Run, slot: int, choose: random.Random) -> int:
    """Mostly one more token or a few, sometimes a prompt, sometimes shorter."""
    state = run.model.slots[slot]
    kind = choose.random()
    if kind < 0.6:
        return min(MAX_TOKENS, state.n_tokens + choose.randint(1, 4))
    if kind < 0.8:
        return choose.randint(max(state.n_tokens, 1), MAX_TOKENS)
    return choose.randint(state.first_token, max(state.n_tokens, state.first_token))


class Totals:
    """What random runs did so far."""

    def __init__(self) -> None:
        self.n_ops = 0
        self.n_faults = 0
        self.n_checks = 0
        """K and V rows whose tags were verified."""
        self.n_pages = 0
        """Pages that were mapped or scrubbed for somebody and looked at."""

    def add(self, run: Run) -> None:
        """Count a finished run."""
        self.n_ops += run.n_ops
        self.n_faults += run.n_faults
        self.n_checks += run.tags.n_checks
        self.n_pages += run.n_mapped


def random_run(
    seed: int,
    n_ops: int,
    driver: Driver,
    *,
    kinds: Sequence[str] = KINDS,
    fault_share: float = 0.15,
    run_type: type[Run] = Run,
    opener: str = "open_driver('host')",
    on_run: Callable[[Totals], bool] = lambda totals: True,
    totals: Totals | None = None,
) -> Totals:
    """Do `n_ops` operations on caches of all kinds; return what was done.

    Args:
        seed: All that is chosen depends on it alone.
        n_ops: How many operations.
        driver: What to run on.
        kinds: Layouts to choose from.
        fault_share: Share of operations in which a fault is planned.
        run_type: Which operations there are (`TieredRun` and `SessionRun` have more).
        opener: How a program that repeats a run opens the driver.
        on_run: Called after each cache; False ends it early.
        totals: Where to count, from nothing; also what was done in the cache in which something is found.

    Raises:
        Found: Something is wrong.
    """
    choose = random.Random(seed)
    totals = Totals() if totals is None else totals
    while totals.n_ops < n_ops:
        run = run_type(driver, **run_type.random_settings(choose, kinds))
        try:
            while run.n_ops < RUN_LENGTH and totals.n_ops + run.n_ops < n_ops and run.n_broken() < 2:
                run.random_step(choose, fault_share)
            run.finish()
        except Exception as error:
            raise Found(f"seed {seed}: {error!r}", run, opener) from error
        finally:
            totals.add(run)
        if not on_run(totals):
            break
    return totals
