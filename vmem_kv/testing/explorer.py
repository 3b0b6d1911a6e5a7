"""Every order in which things can happen, in one thread: sequences of moves, and moves in the middle of other moves.

`explore` tries every sequence of moves up to a depth. Sequences that lead to the same state are continued once, and
counted as often as they are: the number of schedules is exact, the number of runs stays small.

`CallHook` lets something happen in the middle: just before or behind the n-th driver call of a move. No lock of ours is
held there, so what runs there is what another thread could do at that moment.

Guarantees: deterministic. A state is rebuilt by repeating the moves that led to it, so nothing needs to be copied.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from vmem_kv.driver.base import Copy, Driver, Fence, Handle, Reservation, Span
from vmem_kv.testing.adaptor import Adaptor

T = TypeVar("T")

Path = tuple[str, ...]
"""Names of moves."""


@dataclass(frozen=True, slots=True)
class Explored:
    """What `explore` did.

    Attributes:
        n_schedules: Sequences of exactly `depth` moves; every shorter one is the beginning of one of them, or ends in a
            state without moves.
        n_runs: How many were really made.
        states: The shortest path to every state found, itself a schedule.
    """

    depth: int
    n_schedules: int
    n_runs: int
    states: dict[Hashable, Path]


def explore(
    begin: Callable[[], T],
    moves: Mapping[str, Callable[[T], bool]],
    fingerprint: Callable[[T], Hashable],
    finish: Callable[[T], None],
    depth: int,
) -> Explored:
    """Try every sequence of `depth` moves.

    Args:
        begin: Makes the thing that moves change.
        moves: By name; each returns whether it was possible, and changed nothing if not.
        fingerprint: Equal for states that need not be told apart.
        finish: Checks the thing and gives it up.
        depth: How many moves.

    Raises:
        AssertionError: A move or the end went wrong; the message names the path.
    """
    first = begin()
    frontier: dict[Hashable, tuple[Path, int]] = {fingerprint(first): ((), 1)}
    finish(first)
    states: dict[Hashable, Path] = {mark: path for mark, (path, _) in frontier.items()}
    n_runs = 0
    for _ in range(depth):
        following: dict[Hashable, tuple[Path, int]] = {}
        for path, n_ways in frontier.values():
            for name in moves:
                n_runs += 1
                mark = _try(begin, moves, fingerprint, finish, (*path, name))
                if mark is not None:
                    first_path, n_before = following.get(mark, ((*path, name), 0))
                    following[mark] = (first_path, n_before + n_ways)
                    states.setdefault(mark, first_path)
        frontier = following
    return Explored(depth, sum(n for _, n in frontier.values()), n_runs, states)


def walk(begin: Callable[[], T], moves: Mapping[str, Callable[[T], bool]], path: Path) -> T:
    """Make the moves of a path; return what they made."""
    thing = begin()
    for name in path:
        moves[name](thing)
    return thing


def _try(
    begin: Callable[[], T],
    moves: Mapping[str, Callable[[T], bool]],
    fingerprint: Callable[[T], Hashable],
    finish: Callable[[T], None],
    path: Path,
) -> Hashable | None:
    """The state that a path leads to; None if its last move is not possible."""
    try:
        thing = walk(begin, moves, path[:-1])
        is_possible = moves[path[-1]](thing)
        mark = fingerprint(thing) if is_possible else None
        finish(thing)
    except Exception as error:
        raise AssertionError(f"{' -> '.join(path)}: {error!r}") from error
    return mark


class CallHook(Adaptor):
    """Wrap `inner`; let `hook` happen once, at the n-th moment: before a call, behind it, before the next one, ..."""

    def __init__(self, inner: Driver) -> None:
        super().__init__(inner)
        self.n_moments = 0
        """Moments that have passed since `arm`."""
        self._at = 0
        self._hook: Callable[[], None] | None = None

    def arm(self, at: int, hook: Callable[[], None]) -> None:
        """Let `hook` happen at moment `at` (the first is 1), counted from now on."""
        self.n_moments, self._at, self._hook = 0, at, hook

    def reserve(self, n_bytes: int) -> Reservation:
        self._moment()
        reservation = self.inner.reserve(n_bytes)
        self._moment()
        return reservation

    def free_reservation(self, reservation: Reservation) -> None:
        self._around(lambda: self.inner.free_reservation(reservation))

    def create(self, page_bytes: int, places: Sequence[int], created: list[Handle]) -> None:
        self._around(lambda: self.inner.create(page_bytes, places, created))

    def map(self, page_bytes: int, addresses: Sequence[int], handles: Sequence[Handle]) -> None:
        self._around(lambda: self.inner.map(page_bytes, addresses, handles))

    def set_access(self, spans: Sequence[Span]) -> None:
        self._around(lambda: self.inner.set_access(spans))

    def unmap(self, spans: Sequence[Span]) -> None:
        self._around(lambda: self.inner.unmap(spans))

    def release(self, page_bytes: int, handles: Sequence[Handle]) -> None:
        self._around(lambda: self.inner.release(page_bytes, handles))

    def scrub(self, spans: Sequence[Span]) -> None:
        self._around(lambda: self.inner.scrub(spans))

    def copy(self, copies: Sequence[Copy]) -> None:
        self._around(lambda: self.inner.copy(copies))

    def copy_to_host(self, address: int, buffer: memoryview) -> Fence:
        self._moment()
        fence = self.inner.copy_to_host(address, buffer)
        self._moment()
        return fence

    def copy_from_host(self, buffer: memoryview, address: int) -> Fence:
        self._moment()
        fence = self.inner.copy_from_host(buffer, address)
        self._moment()
        return fence

    def pin(self, address: int, n_bytes: int) -> None:
        self._around(lambda: self.inner.pin(address, n_bytes))

    def unpin(self, address: int) -> None:
        self._around(lambda: self.inner.unpin(address))

    def fence(self, streams: Collection[int] = ()) -> Fence:
        self._moment()
        fence = self.inner.fence(streams)
        self._moment()
        return fence

    def _around(self, call: Callable[[], None]) -> None:
        self._moment()
        call()
        self._moment()

    def _moment(self) -> None:
        self.n_moments += 1
        if self.n_moments == self._at and self._hook is not None:
            hook, self._hook = self._hook, None
            hook()
