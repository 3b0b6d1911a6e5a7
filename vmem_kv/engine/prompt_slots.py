"""Prompts that were loaded from files: they wait in host memory, and a sequence that begins as one of them begins with
its rows.

    load     a file's rows come to host memory, checked; there they stay
    begin    a sequence of a prompt's domain: what it has in common with the prompt is moved into its slot, unless the
             sources below know as many of its tokens. Whoever comes next finds them in the cache of prefixes

So what is loaded is never lost for want of pages, and no slot is held for it. It takes host memory as long as the
engine is open. Where prefixes are cached, requests that come while a prompt's rows are on their way to one of them wait
for these, and share them.

Guarantees: token ids are compared, so rows are used for the tokens that they were computed for. A prompt of one domain
is not used in another one; one for everybody is restored into each domain's own slots, which share no page. Whatever
fails here, the sequence is computed.
Assumptions: one thread. All that a sequence keeps is in its slot, from its first token on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as SequenceOf
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from vmem_kv.engine.arrivals import Arrivals
from vmem_kv.engine.memory import SlotMemory
from vmem_kv.engine.moves import Moves
from vmem_kv.engine.request import Sequence
from vmem_kv.engine.slot_source import SlotSource, Start
from vmem_kv.engine.slots_over import SlotsOver
from vmem_kv.errors import CapacityError, DriverError
from vmem_kv.tiers import files
from vmem_kv.tiers.copies import HostCopy, n_common, token_ids
from vmem_kv.tiers.files import ModelIdentity
from vmem_kv.tiers.host import HostTier

_LOG = logging.getLogger("vmem_kv")


@dataclass(frozen=True, slots=True, eq=False)
class _Prompt:
    """A prompt's rows, and whose they are; None for everybody's."""

    copy: HostCopy
    domain: str | None

    def is_for(self, domain: str | None) -> bool:
        return self.domain is None or self.domain == domain


class PromptSlots(SlotsOver):
    """See this file's first lines.

    Args:
        inner: The source below.
        memory: Where the slots are.
        host: Where prompts wait. Whoever opened it closes it, after this.
        moves: What is on its way, for the scheduler.
        min_tokens: Fewer in common are computed: that costs less than moving them.
    """

    def __init__(self, inner: SlotSource, memory: SlotMemory, host: HostTier, moves: Moves, *, min_tokens: int) -> None:
        super().__init__(inner)
        self._memory = memory
        self._host = host
        self._min_tokens = min_tokens
        self._arrivals = Arrivals(self, memory, host, moves)
        self._prompts: list[_Prompt] = []
        self._users: dict[Sequence, _Prompt] = {}
        """Whose rows are asked for, for sequences that have not begun yet."""

    def load(self, path: str | Path, identity: ModelIdentity, domain: str | None) -> int:
        """Take in what a file holds; return how many tokens that are. What is known already is not taken twice.

        Args:
            path: A file that was saved from a session.
            identity: Whose rows are wanted.
            domain: Who may begin with them; None for everybody.

        Raises:
            FileRefused, FileError, OutOfHostMemory: See `files.load`. Nothing changed.
        """
        copy = files.load(path, self._host, self._memory.cache.layout, identity)
        n_tokens = copy.n_tokens
        if any(known.is_for(domain) and known.copy.tokens == copy.tokens for known in self._prompts):
            self._host.drop_when_quiet(copy)
        else:
            self._host.hold(copy)  # nobody else has it: it must not go for room
            self._prompts.append(_Prompt(copy, domain))
        return n_tokens

    # Beginning and ending

    def begin(self, sequence: Sequence, expected_tokens: int) -> Start | None:
        prompt, n_tokens = self._choose(sequence)
        if prompt is None:
            self._users.pop(sequence, None)
            return self._arrivals.begin_below(self._inner, sequence, expected_tokens)
        try:
            start = self._arrivals.bring(sequence, prompt.copy, n_tokens, expected_tokens)
        except (CapacityError, DriverError) as error:
            self._users.pop(sequence, None)
            if isinstance(error, DriverError) and error.is_fatal:
                raise
            _LOG.warning("a loaded prompt is computed, since it could not be restored: %s", error)
            return self._arrivals.begin_below(self._inner, sequence, expected_tokens)
        if start is None:
            self._users[sequence] = prompt
        else:
            self._users.pop(sequence, None)
            self._inner.go_on(sequence, *start)
        return start

    def end(self, sequences: SequenceOf[Sequence], *, is_sound: bool = True) -> None:
        try:
            self._inner.end(sequences, is_sound=is_sound)
        finally:
            for sequence in sequences:
                self._users.pop(sequence, None)
                self._arrivals.drop(sequence)

    def settle(self) -> None:
        self._arrivals.settle()
        self._inner.settle()

    def is_coming(self, sequence: Sequence) -> bool:
        if sequence in self._arrivals:
            return False
        return self._is_arriving(sequence) or self._inner.is_coming(sequence)

    def n_found_tokens(self, sequence: Sequence) -> int:
        return max(self._find(sequence)[1], self._inner.n_found_tokens(sequence))

    def n_live_pages(self, sequence: Sequence, expected_tokens: int) -> int:
        return self._arrivals.n_pages(sequence) or self._inner.n_live_pages(sequence, expected_tokens)

    # Room

    def make_room(self, n_pages: int) -> bool:
        return self._arrivals.make_room_over(self._inner, n_pages)

    def give_way(self, n_pages: int) -> bool:
        return self._inner.give_way(n_pages) or self._arrivals.drop_one()

    def close(self) -> None:
        with ExitStack() as stack:
            stack.callback(self._inner.close)
            for prompt in self._prompts:
                stack.callback(self._host.drop_when_quiet, prompt.copy)
                stack.callback(self._host.release, prompt.copy)
            stack.callback(self._arrivals.close)
            self._prompts = []

    # Below: which prompt

    def _choose(self, sequence: Sequence) -> tuple[_Prompt | None, int]:
        """The prompt that a sequence is to begin with, and how many of its tokens; None where others know as many."""
        if sequence in self._arrivals:
            return self._users[sequence], 0  # what was begun goes on
        prompt, n_tokens = self._find(sequence)
        if prompt is None or n_tokens <= self._inner.n_found_tokens(sequence):
            return None, 0
        return prompt, n_tokens

    def _is_arriving(self, sequence: Sequence) -> bool:
        """Whether an earlier sequence's rows are on their way that this one can share."""
        if not self._users or self._inner.stats() is None:  # without a cache of prefixes nothing is shared
            return False
        prompt, n_tokens = self._find(sequence)
        return any(
            used is prompt
            and other in self._arrivals
            and other.rank < sequence.rank
            and other.request.domain == sequence.request.domain
            for other, used in self._users.items()
        ) and n_tokens > self._inner.n_found_tokens(sequence)

    def _find(self, sequence: Sequence) -> tuple[_Prompt | None, int]:
        """The prompt that a sequence has most in common with, and how many tokens; the last one is to be computed."""
        best: _Prompt | None = None
        n_best = 0
        if self._prompts and len(sequence.token_ids) > 1:
            wanted = token_ids(sequence.token_ids[:-1])
            for prompt in self._prompts:
                if prompt.is_for(sequence.request.domain):
                    n_same = n_common(prompt.copy.tokens, wanted)
                    if n_same >= self._min_tokens and n_same > n_best:
                        best, n_best = prompt, n_same
        return best, n_best
