"""Who computes how many tokens in a step.

    waiting ──admit──▶ running ──finish──▶ gone
       ▲                  │
       └────preempt───────┘        its slot goes back; what is not kept then is computed again later

What goes to host memory or comes from there is on its way for some steps (moves.py). Pages that come free then count
when it is decided who may run, but nobody is computed before his are there; the others are. Where nobody can be, the
step waits for the oldest copy on its way, `WAIT_S` at most.

Guarantees
  * Every decision about room is made in pages, before anything is mapped.
  * Order is priority, then arrival. Decoding sequences go first in a step; what is left of the token budget goes to
    prompts, in that order.
  * Who waits takes nobody's slot, however urgent: it starts when the next one ends. Slots are lost for want of pages
    only, by the last of the order first.
  * What is only cached makes room before anybody loses a slot (slot_source.py).
  * Progress: the first of the running sequences is never preempted, and a sequence that could not run with all memory
    for itself is not accepted (engine.py). So the first one always computes, at the latest when everything has passed
    that is on its way, ends, and makes the next one first.

Assumes: one thread.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from vmem_kv.engine.memory import SlotMemory
from vmem_kv.engine.moves import Moves
from vmem_kv.engine.request import Rank, Sequence
from vmem_kv.engine.slot_source import SlotSource
from vmem_kv.errors import DriverError, OutOfSlots, VmemError
from vmem_kv.growth import SlotId

HEADROOM_TOKENS = 32
"""Beside others, a sequence starts only where it and they can also grow by so much: else one that starts would soon
be preempted, and all of its work lost. A trade: more of it leaves memory unused under pressure."""

WAIT_S = 0.1
"""The longest that a step waits for what is on its way, so that others than sequences are seen to, too."""


class Chunk(NamedTuple):
    """The next tokens of one sequence: its prompt's, or the one that was sampled last."""

    sequence: Sequence
    slot_id: SlotId
    first_token: int  # position of the first one
    n_tokens: int

    @property
    def end(self) -> int:
        """The sequence's length in the slot after the step."""
        return self.first_token + self.n_tokens

    @property
    def gives_token(self) -> bool:
        """Whether the sequence's next token can be sampled after this chunk."""
        return self.end == len(self.sequence.token_ids)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes. No two chunks are of the same sequence."""

    chunks: tuple[Chunk, ...]

    @property
    def n_tokens(self) -> int:
        """Tokens in the step."""
        return sum(chunk.n_tokens for chunk in self.chunks)

    @property
    def lengths(self) -> dict[SlotId, int]:
        """What each slot must hold."""
        return {chunk.slot_id: chunk.end for chunk in self.chunks}


@dataclass(slots=True)
class Counts:
    """What happened so far."""

    n_admitted: int = 0
    n_preempted: int = 0
    n_recomputed_tokens: int = 0
    """Tokens that were computed again after a preemption."""


@dataclass(slots=True)
class _Waiting:
    """Sequences by rank; those that left are passed over."""

    heap: list[tuple[Rank, Sequence]] = field(default_factory=list)
    members: set[Sequence] = field(default_factory=set)

    def push(self, sequence: Sequence) -> None:
        self.members.add(sequence)
        heapq.heappush(self.heap, (sequence.rank, sequence))

    def first(self) -> Sequence | None:
        while self.heap and self.heap[0][1] not in self.members:
            heapq.heappop(self.heap)
        return self.heap[0][1] if self.heap else None


class Scheduler:
    """The queue, the running sequences, and the choice among them.

    Args:
        memory: Where the slots are.
        slots: Where a sequence gets its slot from.
        moves: What is on its way between the tiers.
        max_num_seqs: The most sequences that run together.
        max_batch_tokens: The most tokens of a step.
        forget: Told of every preempted sequence: whatever else is kept of it beside its slot is void.
    """

    def __init__(
        self,
        memory: SlotMemory,
        slots: SlotSource,
        moves: Moves,
        max_num_seqs: int,
        max_batch_tokens: int,
        forget: Callable[[Sequence], None],
    ) -> None:
        self._forget = forget
        self._memory = memory
        self._slots = slots
        self._moves = moves
        self._max_num_seqs = max_num_seqs
        self._max_batch_tokens = max_batch_tokens
        self._waiting = _Waiting()
        self._running: dict[Rank, Sequence] = {}
        self.counts = Counts()
        self.failed: list[tuple[Sequence, VmemError]] = []
        """Sequences that no slot could be prepared for, because the driver failed. The engine answers them."""

    @property
    def n_waiting(self) -> int:
        """Sequences that have no slot."""
        return len(self._waiting.members)

    @property
    def n_running(self) -> int:
        """Sequences that have one."""
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self._running or self._waiting.members)

    def running(self) -> list[Sequence]:
        """The running sequences, first ones first."""
        return [self._running[rank] for rank in sorted(self._running)]

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self._waiting.push(sequence)

    def remove(self, sequences: list[Sequence], *, is_sound: bool = True) -> None:
        """End sequences, wherever they are. Their slots go back at once.

        Args:
            sequences: Which.
            is_sound: Whether others may use what they computed.
        """
        try:
            self._slots.end(sequences, is_sound=is_sound)
        finally:
            for sequence in sequences:
                self._waiting.members.discard(sequence)
                self._running.pop(sequence.rank, None)
                sequence.slot_id = None

    def schedule(self, *, may_admit: bool = True) -> StepPlan:
        """Choose the next step's tokens, so that their pages can be mapped. None, where all of it has to wait.

        Args:
            may_admit: Whether waiting sequences may start.

        Raises:
            DriverError: The device is lost.
        """
        plan = self._choose(may_admit=may_admit)
        if not plan.chunks and self.has_work and self._moves.wait(WAIT_S):
            plan = self._choose(may_admit=may_admit)
        return plan

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's slot; it waits, at its old rank, to go on, or to be computed again."""
        assert sequence.slot_id is not None
        self.counts.n_preempted += 1
        sequence.n_preemptions += 1
        sequence.n_lost = sequence.n_computed
        try:
            self._slots.pause(sequence)
        finally:
            self._running.pop(sequence.rank, None)
            sequence.slot_id = None
        sequence.n_computed = 0
        self._forget(sequence)
        self._waiting.push(sequence)

    def relieve(self, plan: StepPlan) -> bool:
        """Make room for a plan that turned out not to fit (of mappings nobody can say beforehand).

        Schedule without admitting then, or the same sequence could start again and again.

        Returns:
            Whether there was anything to wait for, anything cached to give up, or anybody to preempt beside the first.
        """
        if self._moves.leaving and self._moves.wait(WAIT_S):
            return True
        if self._slots.give_way(max(1, self._memory.n_missing_pages(plan.lengths))):
            return True
        running = self.running()
        if len(running) < 2:
            return False
        self.preempt(running[-1])
        return True

    def _choose(self, *, may_admit: bool) -> StepPlan:
        self._slots.settle()
        running = self.running()
        plan, n_left = self._share_out(running)
        was_preempted = False
        while not self._has_room(plan) and len(running) > 1:
            self.preempt(running.pop())
            was_preempted = True
            plan, n_left = self._share_out(running)
        if was_preempted or not may_admit:
            return self._without_waiting(plan)
        admitted = self._admit(running, n_left)
        if admitted:
            plan = StepPlan((*plan.chunks, *admitted))
            self._has_room(plan)
        return self._without_waiting(plan)

    def _without_waiting(self, plan: StepPlan) -> StepPlan:
        """Leave out whose pages are on their way still."""
        memory = self._memory
        n_left = memory.n_available_pages()
        if not self._moves.leaving or memory.n_missing_pages(plan.lengths) <= n_left:
            return plan
        chunks: list[Chunk] = []
        for chunk in plan.chunks:
            n_missing = memory.n_missing_pages({chunk.slot_id: chunk.end})
            if n_missing <= n_left:
                n_left -= n_missing
                chunks.append(chunk)
        return StepPlan(tuple(chunks))

    def _start(self, sequence: Sequence, n_promised: int) -> bool:
        """Give a slot to a sequence that fits beside `n_promised` pages; return whether it has it, or it is coming."""
        memory, slots = self._memory, self._slots
        expected = _comfortable_length(sequence)
        following = self._waiting.first()
        n_wanted = 0 if following is None else memory.n_pages(_comfortable_length(following))
        start = slots.begin(sequence, expected)
        if start is None:
            return False
        sequence.slot_id, sequence.n_computed = start
        n_left = slots.n_available_pages() - n_promised - memory.n_missing_pages(_comfortable(sequence))
        n_excess = memory.n_mapped_pages(start.slot_id) - memory.n_pages(expected)
        if n_left < n_wanted and n_excess > 0 and not start.n_tokens:
            # A warm slot with more pages than its new owner needs, which others do need: take a cold one instead.
            slots.end([sequence])
            sequence.slot_id = None
            sequence.n_computed = 0
            memory.reclaim()
            start = slots.begin(sequence, expected)
            if start is None:
                return False
            sequence.slot_id, sequence.n_computed = start
        if not sequence.n_preemptions:
            sequence.n_cached = min(sequence.n_computed, sequence.n_prompt)
        self.counts.n_recomputed_tokens += max(0, sequence.n_lost - sequence.n_computed)
        self._running[sequence.rank] = sequence
        self.counts.n_admitted += 1
        return True

    def _share_out(self, running: list[Sequence]) -> tuple[StepPlan, int]:
        """Share out the token budget among the running; return the plan and what is left."""
        n_left = self._max_batch_tokens
        decoding = [s for s in running if s.n_to_compute == 1]
        chunks = [_chunk(sequence, 1) for sequence in decoding]
        n_left -= len(chunks)
        for sequence in running:
            if sequence.n_to_compute > 1 and n_left > 0:
                chunks.append(_chunk(sequence, min(sequence.n_to_compute, n_left)))
                n_left -= chunks[-1].n_tokens
        return StepPlan(tuple(chunks)), n_left

    def _has_room(self, plan: StepPlan) -> bool:
        """Whether a plan's pages can be had, at once or soon. What is only cached is given up for them."""
        n_missing = self._memory.n_missing_pages(plan.lengths)
        return not n_missing or self._slots.make_room(n_missing)

    def _admit(self, running: list[Sequence], n_left: int) -> list[Chunk]:
        """Start waiting sequences, in order, as long as the first of them fits.

        Those pass that will soon begin with what a running one computes: it would be computed twice. So do those whose
        rows, slot or pages are coming; their share stays theirs.
        """
        chunks: list[Chunk] = []
        if n_left <= 0 or len(running) >= self._max_num_seqs or self._waiting.first() is None:
            return chunks
        memory = self._memory
        n_promised = memory.n_missing_pages(_comfortable(*running))
        passing: list[Sequence] = []
        n_coming = 0
        while n_left > 0 and len(self._running) + n_coming < self._max_num_seqs and len(passing) < self._max_num_seqs:
            sequence = self._waiting.first()
            if sequence is None:
                break
            if self._slots.is_coming(sequence):
                self._waiting.members.discard(sequence)
                passing.append(sequence)
                continue
            expected = _comfortable_length(sequence)
            n_pages = memory.n_pages(expected) - self._slots.n_live_pages(sequence, expected)
            if (self._running or n_coming) and n_promised + n_pages > self._slots.n_available_pages():
                break
            self._waiting.members.discard(sequence)
            try:
                has_started = self._start(sequence, n_promised)
            except OutOfSlots as error:  # slots are left over that the driver did not let go of
                if self._running:  # one of which will give its own
                    self._waiting.push(sequence)
                    break
                self.failed.append((sequence, error))
                continue
            except DriverError as error:
                if error.is_fatal:
                    raise
                self.failed.append((sequence, error))
                continue
            if not has_started:
                passing.append(sequence)
                n_coming += 1
                n_promised += n_pages
                continue
            n_promised += memory.n_missing_pages(_comfortable(sequence))
            chunks.append(_chunk(sequence, min(sequence.n_to_compute, n_left)))
            n_left -= chunks[-1].n_tokens
        for sequence in passing:
            self._waiting.push(sequence)
        return chunks


def _chunk(sequence: Sequence, n_tokens: int) -> Chunk:
    assert sequence.slot_id is not None
    return Chunk(sequence, sequence.slot_id, sequence.n_computed, n_tokens)


def _comfortable(*sequences: Sequence) -> dict[SlotId, int]:
    """What running sequences need to go on for a while."""
    return {s.slot_id: _comfortable_length(s) for s in sequences if s.slot_id is not None}


def _comfortable_length(sequence: Sequence) -> int:
    return min(len(sequence.token_ids) + HEADROOM_TOKENS, sequence.max_length)
