"""Which stripes lie under which sequences, when several sequences may begin with the same ones.

A stripe is the pages at one offset in every plane. Sequences share leading stripes only: that is all that aliasing a
prefix can give. So a sequence is a list of runs, each of them some consecutive stripes, and whoever shares a run shares
all runs before it.

    n_stripes        distinct stripes that exist
    n_live_stripes   of them, those under a sequence that runs
    n_mapped_stripes a stripe counts once for every sequence that it lies under

Guarantees: bookkeeping only. Every call takes time in proportion to the runs of a sequence and not to its stripes.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmem_kv.errors import InvariantError, UsageError


@dataclass(slots=True, eq=False)
class _Run:
    """Consecutive stripes that lie under the same sequences."""

    n_stripes: int
    owners: set[int]
    n_live: int  # owners that run


class StripeBooks:
    """Runs of stripes under sequences, named by numbers. It answers `prefix.PageCounts`.

    Args:
        pages_per_stripe: As many as there are planes.
    """

    def __init__(self, pages_per_stripe: int) -> None:
        self.n_stripes = 0
        self.n_live_stripes = 0
        self.n_mapped_stripes = 0
        self._pages_per_stripe = pages_per_stripe
        self._runs: dict[int, list[_Run]] = {}
        self._live: set[int] = set()

    def __contains__(self, key: int) -> bool:
        return key in self._runs

    def length(self, key: int) -> int:
        """Stripes under a sequence."""
        return sum(run.n_stripes for run in self._runs[key])

    def n_live_of(self, key: int, n_stripes: int) -> int:
        """How many of a sequence's first `n_stripes` lie under one that runs."""
        n_left, n_live = n_stripes, 0
        for run in self._runs[key]:
            n_here = min(n_left, run.n_stripes)
            n_live += n_here if run.n_live else 0
            n_left -= n_here
        return n_live

    def begin(self, key: int) -> None:
        """Begin a sequence that runs, with no stripe under it."""
        if key in self._runs:
            raise UsageError(f"sequence {key} exists already; drop it first")
        self._runs[key] = []
        self._live.add(key)

    def fork(self, source: int, key: int, n_stripes: int) -> None:
        """Let the first stripes of `source` lie under `key` as well, which runs and has none yet."""
        if self._runs[key] or n_stripes > self.length(source):
            raise UsageError(
                f"fork of {n_stripes} stripes of sequence {source}, which has fewer, or {key} is not empty"
            )
        n_left = n_stripes
        index = 0
        while n_left:
            run = self._runs[source][index]
            if run.n_stripes > n_left:
                run = self._split(run, index, n_left)
            run.owners.add(key)
            self._runs[key].append(run)
            self._now_lives(run)
            n_left -= run.n_stripes
            index += 1
        self.n_mapped_stripes += n_stripes

    def grow(self, key: int, n_stripes: int) -> None:
        """Put new stripes under a sequence that runs, behind those that it has."""
        if not n_stripes:
            return
        runs = self._runs[key]
        if runs and len(runs[-1].owners) == 1:
            runs[-1].n_stripes += n_stripes
        else:
            runs.append(_Run(n_stripes, {key}, 1))
        self.n_stripes += n_stripes
        self.n_live_stripes += n_stripes
        self.n_mapped_stripes += n_stripes

    def wake(self, key: int) -> None:
        """Let a sequence run that does not."""
        self._live.add(key)
        for run in self._runs[key]:
            self._now_lives(run)

    def rest(self, key: int) -> None:
        """Let a sequence run no more; its stripes stay."""
        self._live.remove(key)
        for run in self._runs[key]:
            run.n_live -= 1
            if not run.n_live:
                self.n_live_stripes -= run.n_stripes

    def drop(self, key: int) -> int:
        """Take a sequence away that does not run; return how many pages came free."""
        if key in self._live:
            raise UsageError(f"drop of sequence {key}, which runs; let it rest first")
        n_freed = 0
        for run in self._runs.pop(key):
            run.owners.remove(key)
            self.n_mapped_stripes -= run.n_stripes
            if not run.owners:
                n_freed += run.n_stripes
        self.n_stripes -= n_freed
        return n_freed * self._pages_per_stripe

    def held(self) -> int:
        """Distinct pages that lie under nothing that runs."""
        return (self.n_stripes - self.n_live_stripes) * self._pages_per_stripe

    def freed_by(self, key: int) -> int:
        """Pages that would come free if this sequence were dropped."""
        return sum(run.n_stripes for run in self._runs[key] if len(run.owners) == 1) * self._pages_per_stripe

    def check(self) -> None:
        """Count everything again.

        Raises:
            InvariantError: The books contradict each other.
        """
        found: dict[int, tuple[_Run, set[int]]] = {}
        for key, runs_of_key in self._runs.items():
            for run in runs_of_key:
                found.setdefault(id(run), (run, set()))[1].add(key)
        runs = [run for run, _ in found.values()]
        counted = (
            sum(run.n_stripes for run in runs),
            sum(run.n_stripes for run in runs if run.n_live),
            sum(run.n_stripes * len(run.owners) for run in runs),
        )
        books = (self.n_stripes, self.n_live_stripes, self.n_mapped_stripes)
        if counted != books:
            raise InvariantError(f"stripes (distinct, live, mapped) are {counted}, the books say {books}")
        for run, owners in found.values():
            if run.owners != owners or run.n_live != len(owners & self._live):
                raise InvariantError(f"a run of {run.n_stripes} stripes lies under {owners}, it says {run.owners}")

    def _now_lives(self, run: _Run) -> None:
        if not run.n_live:
            self.n_live_stripes += run.n_stripes
        run.n_live += 1

    def _split(self, run: _Run, index: int, n_stripes: int) -> _Run:
        """Cut a run behind so many stripes, under all of its owners: it has the same index in all of them."""
        front = _Run(n_stripes, set(run.owners), run.n_live)
        run.n_stripes -= n_stripes
        for owner in run.owners:
            self._runs[owner].insert(index, front)
        return front
