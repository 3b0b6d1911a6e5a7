"""The loop: one step is schedule, prepare, run, commit.

    engine.add(request)                    checked, queued
    while engine.has_work:
        for update in engine.step():       schedule ─▶ prepare ─▶ run ─▶ commit
            ...

Two domains of failure. What one request caused ends that request, with a `RequestError` in its last update: a pass that
raises is repeated sequence by sequence, and only those that raise alone end. A lost device or an invariant that does
not hold ends the engine: `step` raises.

Guarantees: after `step` returns, a sequence that ended has no slot. Between steps, `memory.cache.check()` holds.
Assumes: one thread calls, but for `snapshot`.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vmem_kv.attention.choose import AUTO
from vmem_kv.devices import OpenDriver, open_driver
from vmem_kv.driver.base import Driver
from vmem_kv.engine.admission import Admission
from vmem_kv.engine.answer import Answer
from vmem_kv.engine.config import EngineConfig
from vmem_kv.engine.model_facts import end_token_ids, keeps_latents, max_model_len, vocabulary
from vmem_kv.engine.moves import Carriers, threads
from vmem_kv.engine.packed import PackedRoute
from vmem_kv.engine.packed_weights import is_available, pack
from vmem_kv.engine.request import FinishReason, Request, Sequence, SequenceUpdate
from vmem_kv.engine.route import Route
from vmem_kv.engine.rows_route import RowsRoute
from vmem_kv.engine.sampler import Sampled, Sampler
from vmem_kv.engine.saved import SavedSessions
from vmem_kv.engine.scheduler import Chunk, Scheduler, StepPlan
from vmem_kv.engine.session_slots import SessionSlots
from vmem_kv.engine.stats import EngineStats
from vmem_kv.engine.tiers import open_slots
from vmem_kv.errors import (
    CapacityError,
    ConfigError,
    DriverError,
    InvalidRequest,
    InvariantError,
    QueueFull,
    RequestFailed,
    UnknownSession,
    UsageError,
)
from vmem_kv.tiers.moving import Task
from vmem_kv.tiers.sessions import Level

LEAST_TOKENS = 2
"""Of a sequence that is worth a budget: a prompt of one, and an answer of one."""
_LOG = logging.getLogger("vmem_kv")


class Engine:
    """A model, its slots and its queue.

    Args:
        model: A decoder of transformers, in evaluation mode, on one device. It belongs to the engine until `close`.
        tokenizer: The model's; None for tokens without text.
        config: How to run.
        open_driver: Opens the driver for the model's device.
        clock: Seconds that never go back: by them sessions expire.
        open_carriers: Begins who makes copies to and from host memory and reads and writes files, by default threads.

    Raises:
        ConfigError: The model or the machine does not allow it, or the memory budget holds no sequence at all; the
            message says why. Nothing was left behind.
        OutOfAddressSpace: The slots are too long for this machine's addresses.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        config: EngineConfig | None = None,
        open_driver: OpenDriver = open_driver,
        clock: Callable[[], float] = time.monotonic,
        open_carriers: Callable[[Driver], Carriers] = threads,
    ) -> None:
        self.config = config = config or EngineConfig()
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len(model, config.max_model_len)
        self.vocabulary = vocabulary(model)
        self._unpack = pack(model) if config.pack_weights and is_available() else _nothing
        try:
            self.route: Route = _open_route(model, config, self.max_model_len, open_driver)
        except BaseException:
            self._unpack()
            raise
        self.memory = self.route.memory
        self.max_tokens_alone = self.memory.max_tokens_alone(self.max_model_len)
        """The most tokens of a sequence that fit: in the model's length, and in the memory budget."""
        self.end_token_ids = end_token_ids(model)
        try:
            self._require_room()
            slots = open_slots(self.route, config, clock, open_carriers)
        except BaseException:
            self.route.close()
            self._unpack()
            raise
        self.slots, self._sessions = slots.source, slots.sessions
        self.saved = SavedSessions(model, self.route, slots)
        self._scheduler = Scheduler(
            self.memory, self.slots, slots.moves, config.max_num_seqs, config.max_batch_tokens, self.route.drop
        )
        self._admission = Admission(
            config,
            vocabulary=self.vocabulary,
            max_model_len=self.max_model_len,
            max_tokens_alone=self.max_tokens_alone,
            has_tokenizer=tokenizer is not None,
        )
        self._sampler = Sampler(self.end_token_ids)
        self._answers: dict[Sequence, Answer] = {}
        self._requests: dict[str, list[Sequence]] = {}
        self._n_arrived = 0
        self._n_steps = self._n_prompt_tokens = self._n_generated_tokens = 0
        self._n_finished = dict.fromkeys(FinishReason, 0)
        self._last_step_s = time.monotonic()

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return self._scheduler.has_work

    def check(self, request: Request) -> None:
        """Check a request against the model and the budget. May be called from any thread.

        Raises:
            InvalidRequest: A value is wrong; `param` names it.
            RequestTooLong: It can never fit.
        """
        self._admission.check(request)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InvalidRequest, RequestTooLong: See `check`; or the tokenizer cannot read the prompt.
            QueueFull: Too many requests wait.
            UsageError: A request of that id is unfinished.
            Nothing was queued after any of these.
        """
        self.check(request)
        if request.request_id in self._requests:
            raise UsageError(f"request {request.request_id} is unfinished; every request needs an id of its own")
        if not self.has_place(request.params.n):
            raise QueueFull(f"too many answers wait already ({self._scheduler.n_waiting}); try again later")
        max_length = self._admission.max_length(request)
        sequences = [Sequence(request, i, self._n_arrived, max_length) for i in range(request.params.n)]
        try:
            answers = {s: Answer(s, self.tokenizer, self.end_token_ids) for s in sequences}
        except Exception as error:  # whatever a tokenizer raises: it reads the prompt's end
            raise InvalidRequest(f"the tokenizer cannot read the prompt ({type(error).__name__})", "prompt") from error
        self._n_arrived += 1
        self._answers |= answers
        self._requests[request.request_id] = sequences
        for sequence in sequences:
            self._scheduler.add(sequence)

    def has_place(self, n_answers: int) -> bool:
        """Whether so many more answers can be queued. What free slots will take does not count as waiting.

        May be called from any thread: a step changes nothing about it but that there is more room.
        """
        return len(self._answers) + n_answers <= self.config.max_queued + self.config.max_num_seqs

    def is_unfinished(self, request_id: str) -> bool:
        """Whether any answer of a request is still to come."""
        return request_id in self._requests

    def abort(self, request_id: str) -> list[SequenceUpdate]:
        """End a request at once and free its memory; return the last updates of its answers. Unknown ids are fine."""
        sequences = list(self._requests.get(request_id, ()))
        self._end(sequences, FinishReason.ABORT)
        return [SequenceUpdate(request_id, s.index, finish_reason=FinishReason.ABORT) for s in sequences]

    def step(self) -> list[SequenceUpdate]:
        """Compute the next tokens; return what is new.

        Raises:
            DriverError: The device is lost. The engine is of no more use.
            InvariantError: A bug. Likewise.
        """
        updates: list[SequenceUpdate] = []
        self.saved.settle()
        plan = self._schedule(updates)
        if plan.chunks:
            for part, logits in self._compute(plan, updates):
                self._commit(part, logits, updates)
        self._n_steps += 1
        self._last_step_s = time.monotonic()
        return updates

    def tend(self) -> None:
        """Do what time asks for: sessions whose time is over leave the device. `step` does it, too; for idle times.

        Raises:
            DriverError: The device is lost.
        """
        self.saved.settle()
        self.slots.settle()

    def park_session(self, session_id: str, domain: str = "") -> Level | None:
        """Move a session that waits one level down before its time: from the device to host memory, from there to disk.

        Returns:
            Where it is then; None where there is no room for it any more, and it is gone.

        Raises:
            UnknownSession: There is none of that name in this domain, or there are no sessions at all.
            SessionInUse: It belongs to an unfinished request.
            VmemError: It could not be moved, and is where it was.
        """
        try:
            return self._require_sessions().demote(session_id, domain)
        finally:
            self.slots.settle()  # which sets out what has changed

    def forget_session(self, session_id: str, domain: str = "") -> None:
        """End a session that waits, wherever it is, and free what it holds.

        Raises:
            UnknownSession: There is none of that name in this domain, or there are no sessions at all.
            SessionInUse: It belongs to an unfinished request.
            DriverError: No fence could be recorded behind its slot. Nothing changed.
        """
        try:
            self._require_sessions().forget(session_id, domain)
        finally:
            self.slots.settle()

    def save_session(self, session_id: str, path: str | Path, domain: str = "") -> None:
        """Write a session that waits to a file, wherever it is. It stays there.

        The file holds the session's tokens as they are, and is readable by its owner only. An engine of the same model
        loads it, in a later process and on another device too. To write it takes the disk's time, and is waited for;
        `begin_save_session` does not wait for the disk.

        Raises:
            ConfigError: No sessions are kept here; the message says what to set.
            UnknownSession: There is none of that name in this domain.
            SessionInUse: It belongs to an unfinished request.
            OutOfHostMemory: There is no host memory for its rows, which pass through it.
            FileRefused: It was damaged on disk (`disk_folder`). It is gone.
            OutOfDiskSpace, FileError: The file cannot be written. One of that name is as it was.
            DriverError: Its rows could not be moved.
            Nothing changed after any other than FileRefused.
        """
        try:
            self.begin_save_session(session_id, path, domain).result()
        finally:
            self.saved.settle()

    def begin_save_session(self, session_id: str, path: str | Path, domain: str = "") -> Task[None]:
        """Begin `save_session`, while the engine goes on; return what says, in any thread, when and how it has ended.

        Raises:
            VmemError: As `save_session`, but for what the file fails with: `Task.result` raises that.
        """
        try:
            return self.saved.begin_save(session_id, path, domain)
        finally:
            self.slots.settle()

    def load_session(self, session_id: str, path: str | Path, domain: str = "", *, ttl_s: float | None = None) -> None:
        """Begin a session with what a file holds: the next request of that name goes on in it.

        Its rows are in host memory until then. Load files only from where you would load a model from.

        Args:
            session_id: A name that no session has.
            path: A file that `save_session` wrote.
            domain: Whose session it is to be.
            ttl_s: As `Request.session_ttl_s`, without its bound; default: `EngineConfig.session_ttl_s`.

        Raises:
            ConfigError: No sessions are kept here; the message says what to set.
            UsageError: There is a session of that name, or the name or the time is none.
            SessionInUse: An unfinished request has that name.
            FileRefused: The file is truncated, altered, too long, of another model or number type, or from a newer
                version; the message says which.
            FileError: It cannot be read.
            CapacityError: There is no room for it in host memory, or for one more session. Others may have gone to
                disk.
            Nothing changed after any of these.
        """
        try:
            self.saved.load(session_id, path, domain, ttl_s)
        finally:
            self.slots.settle()

    def load_prompt(self, path: str | Path, domain: str | None = "") -> int:
        """Let every request that begins as a saved session does begin with its rows: a system prompt, most often.

        It stays in host memory until the engine is closed; no request and no session pushes it out.

        Args:
            path: A file that `save_session` wrote.
            domain: Whose requests; None for everybody's. Their slots share no page across domains all the same.

        Returns:
            How many tokens it has. Requests use as many as they have in common with it.

        Raises:
            ConfigError, FileRefused, FileError, OutOfHostMemory: As `load_session`.
        """
        try:
            return self.saved.load_prompt(path, domain)
        finally:
            self.slots.settle()

    def snapshot(self) -> EngineStats:
        """Return what there is to know just now. May be called from any thread."""
        counts, memory = self._scheduler.counts, self.memory
        return EngineStats(
            n_running=self._scheduler.n_running,
            n_waiting=self._scheduler.n_waiting,
            n_steps=self._n_steps,
            n_prompt_tokens=self._n_prompt_tokens,
            n_generated_tokens=self._n_generated_tokens,
            n_requests=self._n_arrived,
            n_finished={reason.value: n for reason, n in self._n_finished.items()},
            n_preempted=counts.n_preempted,
            n_recomputed_tokens=counts.n_recomputed_tokens,
            max_model_len=self.max_model_len,
            token_bytes=memory.cache.layout.token_bytes,
            page_bytes=memory.cache.layout.page_bytes,
            slots=memory.cache.slot_stats(),
            cached_slots=self.slots.cached_slots(),
            prefixes=self.slots.stats(),
            tiers=self.slots.tiers(),
            cache=memory.cache.stats(),
            is_mapper_alive=None if memory.premapper is None else memory.premapper.is_alive,
            last_step_s=self._last_step_s,
        )

    def close(self) -> None:
        """End what is unfinished, leave the model as it was found, give the memory back. Idempotent.

        Raises:
            DriverError: The device is lost, or did not let go of some memory, which calling again tries again. All
                the rest was done all the same.
        """
        with ExitStack() as stack:
            stack.callback(self._unpack)
            stack.callback(self.route.close)
            stack.callback(self.slots.close)
            stack.callback(self.saved.close)
            for request_id in list(self._requests):
                self.abort(request_id)

    def _require_sessions(self) -> SessionSlots:
        if self._sessions is None:
            raise UnknownSession("this engine keeps no sessions: no host_bytes, or a model with state beside its slots")
        return self._sessions

    def _require_room(self) -> None:
        """Raise ConfigError where the budget holds no sequence at all."""
        if self.max_tokens_alone >= LEAST_TOKENS:
            return
        pool = self.memory.pool
        has_bytes = self.config.cache.max_bytes or pool.max_pages * pool.page_bytes
        raise ConfigError(
            f"max_bytes is {has_bytes}, which holds no sequence of {LEAST_TOKENS} tokens; "
            f"set it to {self.memory.n_pages(LEAST_TOKENS) * pool.page_bytes} or more"
        )

    def _schedule(self, updates: list[SequenceUpdate]) -> StepPlan:
        """Choose what to compute, and map its pages."""
        may_admit = True
        while True:
            plan = self._scheduler.schedule(may_admit=may_admit)
            may_admit = False
            while self._scheduler.failed:
                sequence, failure = self._scheduler.failed.pop()
                self._fail([sequence], failure, updates)
            try:
                self.memory.grow(plan.lengths)
                return plan
            except CapacityError as error:
                if not self._scheduler.relieve(plan):
                    self._fail([chunk.sequence for chunk in plan.chunks], error, updates)
            except DriverError as error:
                if error.is_fatal:
                    raise
                self._fail(self._cannot_grow(plan), error, updates)

    def _cannot_grow(self, plan: StepPlan) -> list[Sequence]:
        """Grow one by one where all together failed; return those that fail alone."""
        failed: list[Sequence] = []
        for chunk in plan.chunks:
            try:
                self.memory.grow({chunk.slot_id: chunk.end})
            except DriverError as error:
                if error.is_fatal:
                    raise
                failed.append(chunk.sequence)
            except CapacityError:
                pass  # the next try decides
        return failed

    def _compute(self, plan: StepPlan, updates: list[SequenceUpdate]) -> Iterable[tuple[StepPlan, torch.Tensor | None]]:
        """Run a plan; where that raises, run it sequence by sequence, and end those that raise alone."""
        try:
            batch = self.route.prepare(plan)
            self.memory.premap(self._next_lengths(plan))
            return [(plan, self.route.run(batch))]
        except (DriverError, InvariantError):
            raise
        except Exception as error:  # whatever a model raises
            if len(plan.chunks) == 1:
                self._fail([plan.chunks[0].sequence], error, updates)
                return []
            _LOG.warning("a step of %d sequences failed, repeating it one by one: %s", len(plan.chunks), repr(error))
        # Outside of the handler: what is raised in it would hold on to the first error, and that to all its tensors.
        return [result for chunk in plan.chunks for result in self._compute(StepPlan((chunk,)), updates)]

    def _next_lengths(self, plan: StepPlan) -> dict[Any, int]:
        """Lengths after the step that follows, as far as they are known: what to map ahead."""
        return {
            chunk.slot_id: min(
                chunk.end + (1 if chunk.gives_token else chunk.n_tokens),
                chunk.sequence.max_length if chunk.gives_token else len(chunk.sequence.token_ids),
            )
            for chunk in plan.chunks
        }

    def _commit(self, plan: StepPlan, logits: torch.Tensor | None, updates: list[SequenceUpdate]) -> None:
        """Note what was computed, sample, and end what is complete."""
        giving: list[Sequence] = []
        for chunk in plan.chunks:
            chunk.sequence.n_computed = chunk.end
            if chunk.gives_token:
                giving.append(chunk.sequence)
            self._n_prompt_tokens += _n_prompt_tokens(chunk)
        if self.route.window_tokens is not None:
            kept = self.route.window_tokens
            self.memory.slide({chunk.slot_id: chunk.end - kept for chunk in plan.chunks if chunk.end > kept})
        if not giving or logits is None:
            return
        for sequence, sampled in self._sample(giving, logits, updates):
            self._append(sequence, sampled, updates)

    def _sample(
        self, sequences: list[Sequence], logits: torch.Tensor, updates: list[SequenceUpdate]
    ) -> list[tuple[Sequence, Sampled]]:
        """Sample together; where that raises, one by one, and end those that raise alone."""
        try:
            return list(zip(sequences, self._sampler.sample(sequences, logits), strict=True))
        except Exception as error:  # whatever one request's values do that nobody foresaw
            if len(sequences) == 1:
                self._fail(sequences, error, updates)
                return []
            _LOG.warning("sampling for %d sequences failed, repeating it one by one: %s", len(sequences), repr(error))
        return [
            pair
            for row, sequence in enumerate(sequences)
            for pair in self._sample([sequence], logits[row : row + 1], updates)
        ]

    def _append(self, sequence: Sequence, sampled: Sampled, updates: list[SequenceUpdate]) -> None:
        if sampled.token_id is None:
            self._fail([sequence], ValueError("the model's logits are no numbers"), updates)
            return
        self._n_generated_tokens += 1
        try:
            update = self._answers[sequence].add(sampled.token_id, sampled)
        except Exception as error:  # whatever a tokenizer raises
            self._fail([sequence], error, updates)
            return
        update.n_cached_tokens = sequence.n_cached
        updates.append(update)
        if update.finish_reason is not None:
            self._end([sequence], update.finish_reason)

    def _fail(self, sequences: list[Sequence], cause: Exception, updates: list[SequenceUpdate]) -> None:
        """End sequences that could not be computed."""
        # As text: a log that keeps the exception would keep its frames, and all tensors in them.
        _LOG.warning("%d answers failed: %s", len(sequences), "".join(traceback.format_exception(cause)))
        for sequence in sequences:
            error = RequestFailed(f"computing the answer failed: {type(cause).__name__}")
            error.__cause__ = cause.with_traceback(None)  # whose frames would keep tensors alive
            update = SequenceUpdate(sequence.request.request_id, sequence.index, finish_reason=FinishReason.ERROR)
            update.error = error
            updates.append(update)
        self._end(sequences, FinishReason.ERROR)

    def _end(self, sequences: list[Sequence], reason: FinishReason) -> None:
        """Free what ended sequences held."""
        self._scheduler.remove(sequences, is_sound=reason is not FinishReason.ERROR)
        self._n_finished[reason] += len(sequences)
        for sequence in sequences:
            del self._answers[sequence]
            self._sampler.drop(sequence)
            self.route.drop(sequence)
            left = self._requests[sequence.request.request_id]
            left.remove(sequence)
            if not left:
                del self._requests[sequence.request.request_id]


def _open_route(model: PreTrainedModel, config: EngineConfig, max_tokens: int, open_driver: OpenDriver) -> Route:
    why_not_packed = ""
    if config.route == "packed" or (config.route == "auto" and not keeps_latents(model)):
        try:
            return PackedRoute(model, config, max_tokens, open_driver)
        except ConfigError as error:
            if config.route == "packed" or config.kernel != AUTO:
                raise
            why_not_packed = str(error)
    try:
        return RowsRoute(model, config, max_tokens, open_driver)
    except ConfigError as error:
        reasons = dict.fromkeys((why_not_packed, str(error)))  # which are often the same
        raise ConfigError("; ".join(filter(None, reasons))) from error


def _nothing() -> None:
    """What is to be undone where nothing was done."""


def _n_prompt_tokens(chunk: Chunk) -> int:
    return max(0, min(chunk.end, chunk.sequence.n_prompt) - chunk.first_token)
