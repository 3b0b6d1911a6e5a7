"""Continuous batching over any memory, with a simulated clock.

One step is what an engine does between two launches:

    decode    every running sequence gets room for one more token; where there is none, the newest is preempted:
              it loses its memory and waits in front, to be computed again from its first token
    admit     waiting requests begin with their whole prompts, as long as memory and the policy let them; none in a
              step that preempted. Without arrivals the trace moves up: whoever begins, the next request takes its place
    account   the step takes `StepTime` seconds of simulated time; memory is sampled once, now, and counts for all of it
    end       sequences that have written their last token go

A request that could not run alone is rejected when it arrives, one that has waited for longer than `patience_s` since
its arrival when its turn comes near. Every rejection is counted by its reason: the shortage (pages, mappings,
addresses) or patience. A prompt of p tokens with o outputs ends at p + o - 1 tokens: the last one is never written into
the cache. Prompts are not chunked. Prefixes are shared where the memory does that: then the step that begins a sequence
computes what was not there, and copies what lay in a slower tier.

Guarantees: every step of every sequence is made, none is skipped or estimated; only the clock jumps over times in
which nothing runs. The same requests and settings give the same counts. After an interruption `report` still says what
was found.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from vmem_kv.errors import CapacityError, ConfigError, OutOfPages
from vmem_kv.replay.memory import Key, Memory, Shortage
from vmem_kv.replay.statistics import Report, Sample, Statistics
from vmem_kv.traces.formats import Request

LOOK_AHEAD = 64
"""How many waiting requests a policy may look at. It bounds what is read ahead, and not how many begin in a step."""


@dataclass(slots=True, eq=False)
class Job:
    """A request on its way through."""

    n_prefill: int  # tokens to compute before the next output
    n_left: int  # outputs to come, at least 1: a prompt is computed even if nothing is asked for
    n_outputs: int  # of all of it
    request: Request  # as it came
    arrived_s: float  # on the replay's clock; with arrivals, that of the trace and not of the step that saw it
    n_preempted: int = 0
    ends_at: int = -1  # the step behind which it is done


@dataclass(frozen=True, slots=True)
class StepTime:
    """Simulated seconds of a step: a + b * prompt tokens computed + c * tokens in the cache + d * tokens restored.

    The defaults are those of an 8B model on one large GPU, roughly: 16 GB of weights and 128 KiB of cache for each
    token are read in every step at 3 TB/s, prompts are computed at 25,000 tokens a second, and tokens come back from
    host memory at 25 GB/s.
    """

    fixed_s: float = 0.006
    prefill_s: float = 40e-6
    context_s: float = 0.04e-6
    restore_s: float = 5e-6

    def __post_init__(self) -> None:
        if not (self.fixed_s > 0 and min(self.prefill_s, self.context_s, self.restore_s) >= 0):
            raise ConfigError(f"{self} makes no sense; a step takes time, and no part of it may be negative")


Policy = Callable[[Sequence[int], Callable[[int], bool]], "int | None"]
"""(prompt tokens of the waiting in their order, can the one with this index be admitted) -> who comes next, or None."""


def fcfs(prompts: Sequence[int], can_admit: Callable[[int], bool]) -> int | None:
    """First come, first served: who does not fit holds up all behind."""
    return 0 if can_admit(0) else None


def first_fit(prompts: Sequence[int], can_admit: Callable[[int], bool]) -> int | None:
    """The first who fits: the long ones may wait for long."""
    return next(filter(can_admit, range(len(prompts))), None)


def shortest(prompts: Sequence[int], can_admit: Callable[[int], bool]) -> int | None:
    """The shortest prompt first: the long ones wait longer still."""
    index = min(range(len(prompts)), key=prompts.__getitem__)
    return index if can_admit(index) else None


POLICIES: dict[str, Policy] = {"fcfs": fcfs, "first_fit": first_fit, "shortest": shortest}
"""Who is admitted next, by name. All but the first choose among `LOOK_AHEAD` requests."""


class Replay:
    """One trace through one memory.

    Args:
        memory: Where sequences live. The caller closes it.
        requests: The trace; read as far as it is needed.
        n_max_running: The most sequences in a batch.
        policy: Who is admitted next.
        is_timed: Whether requests come at their arrivals; else all of them wait from the start.
        patience_s: How long a request that comes at its arrival waits before it is rejected; None for ever.
        step_time: The clock.
        watch: Called with the number of requests that are through, now and then.
    """

    def __init__(
        self,
        memory: Memory,
        requests: Iterable[Request],
        *,
        n_max_running: int = 1024,
        policy: Policy = fcfs,
        is_timed: bool = False,
        patience_s: float | None = None,
        step_time: StepTime | None = None,
        watch: Callable[[int], None] = lambda n_through: None,
    ) -> None:
        self.memory = memory
        self.statistics = Statistics()
        self.now_s = 0.0
        self._requests: Iterator[Request] = iter(requests)
        self._next: Request | None = next(self._requests, None)
        self._first_s = (self._next.arrival_s or 0.0) if self._next else 0.0
        self._n_max_running = n_max_running
        self._policy = policy
        self._is_timed = is_timed
        self._patience_s = math.inf if patience_s is None or not is_timed else patience_s
        self._time = step_time or StepTime()
        self._watch = watch
        self._waiting: deque[Job] = deque()
        self._running: dict[Key, Job] = {}  # in the order of admission
        self._lengths: dict[Key, int] = {}  # likewise
        self._ending: dict[int, list[Job]] = {}  # by step; preempted ones stay in it and are passed over
        self._keys: dict[Job, Key] = {}
        self._n_live_tokens = 0
        self._n_outputs_done = 0
        self._step = 0
        self._is_complete = False

    def run(self) -> Report:
        """Replay to the end.

        Raises:
            ConfigError: A row of the trace is malformed, or arrivals go back in time.
            VmemError: Of the driver, other than a shortage.
        """
        while self._next is not None or self._waiting or self._running:
            self._make_step()
        self._is_complete = True
        self._watch(self._n_through)
        return self.report()

    def report(self) -> Report:
        """Say what was found so far."""
        return self.statistics.report(
            self.memory.name,
            is_complete=self._is_complete,
            n_batches=self.memory.n_batches,
            n_driver_calls=self.memory.n_driver_calls,
            n_peak_mappings=self.memory.n_peak_mappings,
            max_mappings=self.memory.max_mappings,
        )

    @property
    def _n_through(self) -> int:
        return self.statistics.counts.n_done + self.statistics.counts.n_rejected

    def _make_step(self) -> None:
        self._take_arrivals()
        self._turn_away()
        if not self._running and not self._waiting:
            if self._next is not None and self._next.arrival_s is not None:
                self.now_s = max(self.now_s, self._next.arrival_s - self._first_s)
            return
        memory, counts = self.memory, self.statistics.counts
        n_batches_before, ns_before = memory.n_batches, memory.allocator_ns
        n_restored_before = memory.n_restored_tokens
        n_running_before = len(self._running)
        n_preempted = self._decode()
        n_prefilled = 0 if n_preempted else self._admit()
        if self._waiting and not self._running and not n_preempted:
            job = self._waiting.popleft()  # memory is as empty as it gets, and nobody fits: there is no room for it
            counts.reject((memory.lack(job.n_prefill, job.request) or OutOfPages).__name__)
        counts.n_output_tokens += len(self._running)
        counts.n_prompt_tokens += n_prefilled
        n_running = len(self._running)
        sample = Sample(
            self._n_live_tokens * memory.token_bytes,
            memory.active_bytes,
            memory.mapped_bytes,
            memory.owned_bytes,
            n_running,
        )
        time = self._time
        seconds = (
            time.fixed_s
            + time.prefill_s * n_prefilled
            + time.context_s * self._n_live_tokens
            + time.restore_s * (memory.n_restored_tokens - n_restored_before)
        )
        n_ended = self._end()
        n_batches = memory.n_batches
        if n_running:
            self.statistics.add_step(
                sample,
                seconds,
                is_loaded=bool(self._waiting),
                is_quiet=n_batches == n_batches_before
                and n_running == n_running_before
                and not (n_ended or n_prefilled),
                took_ns=None if memory.allocator_ns is None or ns_before is None else memory.allocator_ns - ns_before,
                n_calls=memory.n_driver_calls,
            )
            self.now_s += seconds
        self._step += 1
        if n_ended:
            self._watch(self._n_through)

    def _take_arrivals(self) -> None:
        """Let those in who have arrived; without arrivals, as many as a policy may look at."""
        while (request := self._next) is not None:
            if self._is_timed:
                if request.arrival_s is None:
                    raise ConfigError("the trace has requests without an arrival; replay it with --load full")
                if request.arrival_s - self._first_s > self.now_s:
                    return
            elif len(self._waiting) >= LOOK_AHEAD:
                return
            n_left = max(1, request.output_tokens)
            obstacle = self.memory.obstacle(request.final_tokens)
            if obstacle is None:
                came_s = (request.arrival_s or 0.0) - self._first_s if self._is_timed else self.now_s
                self._waiting.append(Job(request.prompt_tokens, n_left, n_left, request, came_s))
            else:
                self.statistics.counts.reject(obstacle.__name__)
                self._watch(self._n_through)
            self._next = next(self._requests, None)
            if self._is_timed and self._next is not None and (self._next.arrival_s or 0.0) < (request.arrival_s or 0.0):
                raise ConfigError(
                    f"a request arrives at {self._next.arrival_s} s, before the one in front of it "
                    f"({request.arrival_s} s); replay this trace with --load full"
                )

    def _turn_away(self) -> None:
        """Reject those who have waited too long. Who was preempted is past that, and stands in front."""
        while self._waiting and not self._waiting[0].n_preempted:
            if self.now_s - self._waiting[0].arrived_s <= self._patience_s:
                return
            self._waiting.popleft()
            self.statistics.counts.reject("patience")

    def _decode(self) -> int:
        """Give every running sequence room for one more token; return how many were preempted for it."""
        n_preempted = 0
        while self._running:
            longer = {key: n_tokens + 1 for key, n_tokens in self._lengths.items()}
            try:
                self.memory.grow(longer)
            except CapacityError as error:
                self._preempt(type(error))
                n_preempted += 1
            else:
                self._lengths = longer
                self._n_live_tokens += len(longer)
                return n_preempted
        return n_preempted

    def _preempt(self, shortage: Shortage) -> None:
        """Throw out the newest; what it had is computed again later. The last one left is rejected: it cannot run."""
        key, job = self._running.popitem()
        n_tokens = self._lengths.pop(key)
        n_left = job.ends_at - self._step + 1
        job.ends_at = -1
        del self._keys[job]
        self.memory.end([key])
        self._n_live_tokens -= n_tokens
        counts = self.statistics.counts
        if not self._running:
            counts.reject(shortage.__name__)
            return
        counts.preempt(shortage.__name__)
        job.n_prefill, job.n_left = n_tokens + 1, n_left
        job.n_preempted += 1
        self._waiting.appendleft(job)

    def _admit(self) -> int:
        """Begin waiting requests; return how many prompt tokens must be computed for that."""
        n_prefilled, memory = 0, self.memory

        def lack(index: int) -> Shortage | None:
            return memory.lack(self._waiting[index].n_prefill, self._waiting[index].request)

        while self._waiting and len(self._running) < self._n_max_running:
            prompts = [job.n_prefill for job in islice(self._waiting, LOOK_AHEAD)]
            index = self._policy(prompts, lambda index: lack(index) is None)
            if index is None:
                self.statistics.counts.hold((lack(0) or OutOfPages).__name__)
                break
            job = self._waiting[index]
            n_cached_before = memory.n_cached_tokens
            counts = self.statistics.counts
            # As an engine would guess: as many outputs as those had on average that are done.
            n_outputs = self._n_outputs_done // max(1, counts.n_done)
            try:
                key = memory.begin(job.n_prefill, job.n_prefill + n_outputs, job.request)
            except CapacityError as error:
                if not self._running:  # nothing will come free: it cannot run at all
                    del self._waiting[index]
                    counts.reject(type(error).__name__)
                    self._take_arrivals()
                    continue
                counts.hold(type(error).__name__)
                break
            del self._waiting[index]
            job.ends_at = self._step + job.n_left - 1
            self._ending.setdefault(job.ends_at, []).append(job)
            self._running[key] = job
            self._keys[job] = key
            self._lengths[key] = job.n_prefill
            self._n_live_tokens += job.n_prefill
            n_computed = job.n_prefill - (memory.n_cached_tokens - n_cached_before)
            n_prefilled += n_computed
            if job.n_preempted:
                counts.n_recomputed_tokens += n_computed
            self._take_arrivals()
        return n_prefilled

    def _end(self) -> int:
        """End those whose last output this step made; return how many."""
        done = [job for job in self._ending.pop(self._step, ()) if job.ends_at == self._step]
        if done:
            keys = [self._keys.pop(job) for job in done]
            for key in keys:
                del self._running[key]
                self._n_live_tokens -= self._lengths.pop(key)
            self.memory.end(keys)
            self.statistics.counts.n_done += len(done)
            self._n_outputs_done += sum(job.n_outputs for job in done)
        return len(done)
