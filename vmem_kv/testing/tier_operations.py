"""Random operations on a cache with a host tier behind it: park, restore, copy out, drop, save, load, spoil a file.

`TieredRun` is a `Run` with more operations. Beside what `operations.py` holds every run against, after each of them:
the tier's books add up and are those of its own model (`tier_model.py`), every host copy holds the rows of the tokens
that it should, and what came back into a slot carries the tags of those who wrote it. A file that was altered or cut
off is refused, and nothing has changed. Pages that a restore mapped are zero wherever no row was put.

A planned fault is a failure of the driver or, where it pins memory, a lack of that. Sessions are in
`session_operations.py`.

Guarantees and assumptions are those of `operations.py`.
"""

from __future__ import annotations

import mmap
import random
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

from vmem_kv.driver.base import Driver
from vmem_kv.driver.ledger import Ledger
from vmem_kv.errors import DriverError, FileRefused, OutOfHostMemory, OutOfPages
from vmem_kv.growth import SlotId
from vmem_kv.testing.faults import Point, natural_error
from vmem_kv.testing.model import Page
from vmem_kv.testing.operations import Fault, Operation, Run, RunOptions, require, step
from vmem_kv.testing.tier_model import ModelCopy, TierModel
from vmem_kv.tiers import files
from vmem_kv.tiers.copies import HostCopy
from vmem_kv.tiers.files import ModelIdentity
from vmem_kv.tiers.host import HostTier
from vmem_kv.tiers.memory import FramePool, PinnedMemory

N_COPIES, N_FILES = 4, 3
FRAMES_PER_BUFFER = 3
MEMORY = Path("/dev/shm")
IDENTITY = ModelIdentity("random operations", "bytes")


class TieredRun(Run):
    """A run with a host tier and files; see this file's first lines.

    Args:
        driver: As of `Run`.
        kind: Likewise.
        n_frames: The host tier's budget, in frames as large as a page.
        options: What else `Run` takes.
    """

    def __init__(
        self,
        driver: Driver,
        kind: str = "per_layer",
        *,
        n_frames: int = 40,
        **options: Unpack[RunOptions],
    ) -> None:
        super().__init__(driver, kind, **options)
        self.settings["n_frames"] = n_frames
        frame_bytes = max(self.page_bytes, mmap.PAGESIZE)
        self.frames = FramePool(
            n_frames * frame_bytes,
            PinnedMemory(self.driver),
            frame_bytes=frame_bytes,
            buffer_bytes=FRAMES_PER_BUFFER * frame_bytes,
            ledger=Ledger(),
        )
        self.host = HostTier(self.frames)
        self.tier = TierModel(self.layout.token_bytes, frame_bytes, n_frames)
        self.copies: dict[int, HostCopy] = {}
        self.files: dict[int, list[int]] = {}  # the rows of each; none where it was spoilt

    @cached_property
    def directory(self) -> Path:
        """Where files are, in memory if there is such a place."""
        directory = Path(tempfile.mkdtemp(prefix="vmem_kv-", dir=MEMORY if MEMORY.is_dir() else None))
        weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)  # also of a run that went wrong
        return directory

    # One method per operation.

    def park(self, slot: int, copy: int, fault: Fault = None) -> None:
        """Move a sequence's rows to a copy; its pages go back."""
        self._begin("park", (slot, copy), fault)
        self._bring_up_to_date(slot, copy, vacates=True)
        self._end()

    def copy_out(self, slot: int, copy: int, fault: Fault = None) -> None:
        """Bring a copy up to date with a sequence, which goes on."""
        self._begin("copy_out", (slot, copy), fault)
        self._bring_up_to_date(slot, copy, vacates=False)
        self._end()

    def restore(self, copy: int, slot: int, first_token: int, n_tokens: int, fault: Fault = None) -> None:
        """Bring the rows `[first_token, n_tokens)` of a copy to an empty slot, whose owner computes those before."""
        self._begin("restore", (copy, slot, first_token, n_tokens), fault)
        held, lengths = self.tier.copies[copy], {slot: n_tokens}
        fresh = self.model.missing(lengths)
        fits, victims = self.model.plan_ensure(lengths)
        try:
            self.host.restore(self.copies[copy], self.cache, SlotId(slot), first_token=first_token, n_tokens=n_tokens)
        except OutOfPages:
            require(not fits, "the pages were there")
            if not self.is_faulted:
                self.model.reclaimed(victims)
        except DriverError:
            require(self.is_faulted, "a driver error without a fault")
            if self.cache.token_capacity(SlotId(slot)) >= n_tokens:  # they stay mapped
                self.model.reclaimed(s for s in self.model.reclaim_order() if not self._is_warm(s))
                self.model.premapped(lengths)
                self._require_nothing_old(slot, copy, fresh)
        else:
            require(fits, "there were not so many pages")
            if self.is_faulted:
                victims = [s for s in self.model.reclaim_order() if not self._is_warm(s)]
            self.model.reclaimed(victims)
            self._came_back(slot, held.rows, first_token, n_tokens, fresh)
            self.tier.holds(copy, held)  # used last
            held.is_spare |= first_token == 0 and n_tokens == len(held.rows)
        self._end()

    def drop(self, copy: int, fault: Fault = None) -> None:
        """Empty a copy."""
        self._begin("drop", (copy,), fault)
        self.host.drop(self.copies[copy])
        del self.tier.copies[copy]
        self._end()

    def trim_host(self, fault: Fault = None) -> None:
        """Give host memory back that nobody uses, so that what is taken next has to be pinned."""
        self._begin("trim_host", (), fault)
        self._may_break_off(self.frames.trim)
        self._end()

    def save(self, copy: int, file: int, fault: Fault = None) -> None:
        """Write a copy to a file."""
        self._begin("save", (copy, file), fault)
        files.save(self._path(file), self.host, self.copies[copy], IDENTITY)
        self.files[file] = list(self.tier.copies[copy].rows)
        self._end()

    def load(self, file: int, copy: int, fault: Fault = None) -> None:
        """Read a file into a copy that holds nothing."""
        self._begin("load", (file, copy), fault)
        rows = self.files[file]
        fits, victims = self.tier.plan_room(self.tier.n_frames_for(rows), None)
        try:
            loaded = files.load(self._path(file), self.host, self.layout, IDENTITY)
        except FileRefused:
            is_hopeless = self.tier.n_frames_for(rows) > self.tier.max_frames
            require(not rows or is_hopeless, "a whole file was refused")
            self._take_over_drops()
        except OutOfHostMemory:
            require(not rows or not fits or self.is_faulted, "the host memory was there")
            if self.is_faulted:
                self._take_over_drops()
        except DriverError:
            require(self.is_faulted, "a driver error without a fault")
            self._take_over_drops()
        else:
            require(bool(rows), "a file that was spoilt was loaded")
            require(fits, "there was not so much host memory")
            self.tier.dropped_for_room(victims)
            self.copies[copy] = loaded
            self.tier.holds(copy, ModelCopy(rows, [(0, len(rows), 0)]))
        self._end()

    def spoil(self, file: int, at: int, cuts: bool, fault: Fault = None) -> None:
        """Alter a byte of a file, or cut it off there."""
        self._begin("spoil", (file, at, cuts), fault)
        path = self._path(file)
        data = bytearray(path.read_bytes())
        at %= len(data)
        data[at] ^= 0xFF
        path.write_bytes(data[:at] if cuts else data)
        self.files[file] = []
        self._end()

    # What `Run` asks

    @classmethod
    def random_settings(cls, choose: random.Random, kinds: Sequence[str]) -> dict[str, Any]:
        """Choose the arguments of a run."""
        return {**super().random_settings(choose, kinds), "n_frames": choose.randint(15, 60)}

    def fault_error(self, point: Point) -> BaseException:
        """A driver's failure; where it pins host memory, half of the time a lack of that."""
        lacks_memory = point.operation == "pin" and point.n % 2
        return natural_error(point) if lacks_memory else super().fault_error(point)

    def random_step(self, choose: random.Random, fault_share: float) -> None:
        """Do one random operation."""
        tiered_step(self, choose, fault_share)

    def is_possible(self, operation: Operation) -> bool:
        """Whether an operation makes sense now."""
        name, arguments = operation.name, operation.arguments
        if name in ("park", "copy_out"):
            return arguments[0] in self.parkable()
        if name == "restore":
            copy, slot, _, n_tokens = arguments
            return slot in self.empty() and copy in self.tier.copies and n_tokens <= len(self.tier.copies[copy].rows)
        if name in ("drop", "save"):
            return arguments[0] in self.tier.copies
        if name == "load":
            return arguments[0] in self.files and arguments[1] not in self.tier.copies
        if name == "spoil":
            return arguments[0] in self.files
        return super().is_possible(operation)

    def finish(self) -> None:
        """End everything and look for what is left; see `Run.finish`."""
        self.host.close()
        require(self.frames.n_bytes == 0, "host memory is left")
        super().finish()

    # What the choice of the next operation may look at

    def parkable(self) -> list[int]:
        """Slots of whole sequences that have tokens."""
        slots = self.model.slots
        return [slot for slot in self.live() if slots[slot].n_tokens and not slots[slot].first_token]

    def empty(self) -> list[int]:
        """Slots of sequences without tokens, which can grow."""
        return [slot for slot in self.whole() if not self.model.slots[slot].n_tokens]

    # Inside

    def _end(self, fresh: Iterable[Page] = ()) -> None:
        super()._end(fresh)
        self.host.check()
        self.tier.compare(self.host.stats())
        if self.is_faulted:  # whether what broke off used a copy is left open
            ranks = {id(copy): rank for rank, copy in enumerate(self.host._copies)}
            self.tier.copies = dict(sorted(self.tier.copies.items(), key=lambda item: ranks[id(self._copy(item[0]))]))
        for number, held in self.tier.copies.items():
            require(list(self._copy(number).tokens) == held.rows, f"copy {number} holds other rows")

    def _bring_up_to_date(self, slot: int, number: int, *, vacates: bool) -> None:
        copy = self.copies.setdefault(number, self.host.new_copy(self.layout))
        rows = self._rows(slot)
        held = self._rows_in(copy) if self.history[-1].fault is not None else []
        new, n_moved, n_frames = self.tier.after_park(number, rows)
        fits, victims = self.tier.plan_room(n_frames, number)
        call = self.host.park if vacates else self.host.copy_out
        try:
            call(copy, self.cache, SlotId(slot), rows)
        except OutOfHostMemory:
            require(not fits or self.is_faulted, "the host memory was there")
            if self.is_faulted:
                self._take_over_drops()
            return
        except DriverError:
            require(self.is_faulted, "a driver error without a fault")
            self._take_over_drops()
            if (list(copy.tokens), [tuple(extent) for extent in copy.extents]) != (new.rows, new.parts):
                require(self._rows_in(copy) == held, f"a park that failed has changed copy {number}")
                return
        else:
            require(fits, "there was not so much host memory")
            self.tier.dropped_for_room(victims)
        self.tier.holds(number, new)
        self.tier.out_bytes += n_moved * self.tier.row_bytes
        is_vacated = not self.cache.n_tokens(SlotId(slot))
        require(is_vacated == vacates or self.is_faulted, "the sequence is where it should not be")
        # Where nothing had to move, nobody sees whether a call that broke off came so far as to say that it is spare.
        new.is_spare = not is_vacated and (copy.is_spare or not self.is_faulted)
        if is_vacated:
            self.model.vacated(slot)

    def _came_back(self, slot: int, rows: Sequence[int], first_token: int, n_tokens: int, fresh: set[Page]) -> None:
        """Rows were put into a slot; the owner writes those before them."""
        self.model.ensured({slot: n_tokens})
        self._require_zero(fresh, first=first_token, behind=n_tokens)
        self.tags.expect(slot, first_token, rows[first_token:n_tokens])
        self.tags.write(slot, 0, first_token, self._sequences[slot])
        self.tier.in_bytes += (n_tokens - first_token) * self.tier.row_bytes

    def _take_over_drops(self) -> None:
        """A call broke off: spare copies may have gone for room."""
        for number, held in list(self.tier.copies.items()):
            if held.is_spare and not self._copy(number).n_tokens:
                self.tier.dropped_for_room([number])

    def _require_nothing_old(self, slot: int, number: int, pages: set[Page]) -> None:
        """A restore broke off: new pages hold rows of the copy, or zeros."""
        rows = self._rows_in(self._copy(number))
        for page in pages:
            _, plane_index, index = page
            found = self._read_page(page)
            first = index * self.page_bytes
            wanted = bytes(rows[plane_index][first : first + self.page_bytes]).ljust(self.page_bytes, b"\0")
            is_ours = all(a in (0, b) for a, b in zip(found, wanted, strict=True))
            require(is_ours, f"page {page} shows old bytes after a restore that failed")

    def _rows_in(self, copy: HostCopy) -> list[bytearray]:
        """The rows that a copy holds, plane by plane."""
        rows = [bytearray() for _ in self.layout.planes]
        for piece, views in self.host.rows(copy):
            for view in views:
                rows[piece.plane_index] += view
        return rows

    def _rows(self, slot: int) -> list[int]:
        return self.tags.identities(slot, self.model.slots[slot].n_tokens)

    def _is_warm(self, slot: int) -> bool:
        return self.cache._slots.state[slot].value == "warm"

    def _path(self, file: int) -> Path:
        return self.directory / f"{file}.kv"

    def _copy(self, number: int) -> HostCopy:
        return self.copies[number]


def tiered_step(run: TieredRun, choose: random.Random, fault_share: float = 0.15) -> None:
    """Do one random operation: one in three goes to the tiers."""
    kind = choose.random()
    if kind >= 1 / 3:
        step(run, choose, fault_share)
        return
    fault = (choose.random() < 0.5, choose.choice((1, 1, 2, 3, 5, 8))) if choose.random() < fault_share else None
    kind = choose.random()
    parkable, held = run.parkable(), [number for number in run.tier.copies if number < N_COPIES]
    free = [number for number in range(N_COPIES) if number not in held]
    if kind < 0.40:
        if parkable:
            run.park(choose.choice(parkable), choose.randrange(N_COPIES), fault)
    elif kind < 0.48:
        if parkable:
            run.copy_out(choose.choice(parkable), choose.randrange(N_COPIES), fault)
    elif kind < 0.80:
        if held:
            _step_of_restoring(run, choose.choice(held), choose, fault)
    elif kind < 0.85:
        if held and choose.random() < 0.6:
            run.drop(choose.choice(held), fault)
        else:
            run.trim_host(fault)
    elif kind < 0.90:
        if held:
            run.save(choose.choice(held), choose.randrange(N_FILES), fault)
    elif kind < 0.97:
        if run.files and free:
            run.load(choose.choice(list(run.files)), choose.choice(free), fault)
    elif run.files:
        run.spoil(choose.choice(list(run.files)), choose.randrange(1 << 20), choose.random() < 0.3, fault)


def _step_of_restoring(run: TieredRun, copy: int, choose: random.Random, fault: Fault) -> None:
    """Into an empty slot, mostly all of it."""
    empty = run.empty()
    if not empty:
        slot = run.acquire(choose.choice((0, 48)), choose.choice("ab"))
        empty = [] if slot is None else [slot]
    if empty:
        n_held = len(run.tier.copies[copy].rows)
        n_tokens = n_held if choose.random() < 0.7 else choose.randint(1, n_held)
        first_token = 0 if choose.random() < 0.7 else choose.randint(0, n_tokens)
        run.restore(copy, choose.choice(empty), first_token, n_tokens, fault)
