"""What is measured while a schedule runs: integrals over simulated time, counts, percentiles, a thinned-out series.

Utilisation is a ratio of integrals, byte-seconds over byte-seconds, so that an hour counts more than a second and a
full budget more than an empty one. Time in which nothing runs is not counted.

Guarantees: memory grows with the number of steps by eight bytes each, the series not at all.
"""

from __future__ import annotations

from array import array
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any, Literal, NamedTuple

from vmem_kv.units import MIB

Window = Literal["whole", "loaded"]
"""While anything ran, or while requests waited for memory, too."""

_MAX_POINTS = 128
"""Of the series; when it is full, neighbours are put together."""


class Sample(NamedTuple):
    """Memory during one step, in bytes, and who ran."""

    live_bytes: int
    active_bytes: int
    mapped_bytes: int
    owned_bytes: int
    n_running: int


@dataclass(slots=True)
class Integral:
    """Sums of samples, each weighted with the time for which it held."""

    seconds: float = 0.0
    live: float = 0.0
    active: float = 0.0
    mapped: float = 0.0
    owned: float = 0.0
    running: float = 0.0

    def add(self, sample: Sample, seconds: float) -> None:
        """Count a sample that held for so long."""
        self.seconds += seconds
        self.live += sample.live_bytes * seconds
        self.active += sample.active_bytes * seconds
        self.mapped += sample.mapped_bytes * seconds
        self.owned += sample.owned_bytes * seconds
        self.running += sample.n_running * seconds

    def merge(self, other: Integral) -> None:
        """Count what another one has."""
        self.seconds += other.seconds
        self.live += other.live
        self.active += other.active
        self.mapped += other.mapped
        self.owned += other.owned
        self.running += other.running

    def averages(self) -> Averages:
        """Everything per second, and the ratios."""
        seconds = self.seconds or 1.0
        return Averages(
            seconds=self.seconds,
            live_of_active=_ratio(self.live, self.active),
            live_of_mapped=_ratio(self.live, self.mapped),
            live_of_owned=_ratio(self.live, self.owned),
            live_bytes=int(self.live / seconds),
            active_bytes=int(self.active / seconds),
            mapped_bytes=int(self.mapped / seconds),
            owned_bytes=int(self.owned / seconds),
            n_running=self.running / seconds,
        )


@dataclass(frozen=True, slots=True)
class Averages:
    """Time-averaged memory, in bytes, and three shares of it that is live. None where nothing ran."""

    seconds: float  # simulated
    live_of_active: float | None  # waste: unused tails of running sequences
    live_of_mapped: float | None  # waste: these, and what is kept mapped for the next ones
    live_of_owned: float | None  # waste: these, and free pages that are kept
    live_bytes: int
    active_bytes: int
    mapped_bytes: int
    owned_bytes: int
    n_running: float


@dataclass(frozen=True, slots=True)
class Times:
    """Microseconds of allocator time per step."""

    n_steps: int
    p50_us: float
    p99_us: float
    mean_us: float
    n_running: float  # mean over these steps

    @classmethod
    def of(cls, nanoseconds: array[int], n_running: float) -> Times | None:
        """Summarise; None without any."""
        if not nanoseconds:
            return None
        ordered = sorted(nanoseconds)
        n = len(ordered)
        p50, p99 = ordered[n // 2], ordered[min(n - 1, n * 99 // 100)]
        return cls(n, p50 / 1e3, p99 / 1e3, sum(ordered) / n / 1e3, n_running / n)


@dataclass(slots=True)
class Counts:
    """What happened."""

    n_done: int = 0
    n_rejected: int = 0
    n_preemptions: int = 0
    n_prompt_tokens: int = 0  # computed, recomputed ones included
    n_recomputed_tokens: int = 0
    n_output_tokens: int = 0
    n_steps: int = 0
    rejected: dict[str, int] = field(default_factory=dict)  # by reason: the shortage's name, or "patience"
    preempted: dict[str, int] = field(default_factory=dict)  # by the shortage's name
    held_up: dict[str, int] = field(default_factory=dict)  # steps in which it kept the first who waited from beginning

    def reject(self, reason: str) -> None:
        """Count a request that will not run."""
        self.n_rejected += 1
        self.rejected[reason] = self.rejected.get(reason, 0) + 1

    def preempt(self, reason: str) -> None:
        """Count a sequence that lost its memory."""
        self.n_preemptions += 1
        self.preempted[reason] = self.preempted.get(reason, 0) + 1

    def hold(self, reason: str) -> None:
        """Count a step in which somebody waited for memory."""
        self.held_up[reason] = self.held_up.get(reason, 0) + 1


@dataclass(frozen=True, slots=True)
class Series:
    """Averages over consecutive stretches of time, at most `_MAX_POINTS` of them."""

    until_s: tuple[float, ...]  # simulated seconds, idle time left out
    live_mib: tuple[float, ...]
    active_mib: tuple[float, ...]
    owned_mib: tuple[float, ...]
    n_running: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """What a replay found."""

    scheme: str
    is_complete: bool
    counts: Counts
    whole: Averages  # while anything ran
    loaded: Averages  # while requests waited for memory, too
    peak_live_bytes: int
    peak_active_bytes: int
    peak_owned_bytes: int
    n_peak_running: int
    peak_live_of_owned: float | None  # at the moment of the most live bytes
    n_peak_mappings: int  # of at most max_mappings
    max_mappings: int | None
    n_batches: int
    n_driver_calls: int | None  # one for each page or span of a batch; None where nobody counts them
    batches_per_1000_tokens: float | None  # per output token, over the whole run
    driver_calls_per_1000_tokens: float | None  # likewise
    late_driver_calls_per_1000_tokens: float | None  # over its second half: steady state
    step_times: Times | None  # all steps; the driver's own time is in it
    quiet_times: Times | None  # steps in which nobody came, went or needed a page
    series: Series

    @property
    def averages(self) -> Averages:
        """While requests waited, if that was half of the time at least: filling and draining do not count then."""
        return self.averages_of(self.window)

    @property
    def window(self) -> Window:
        """Which of the two `averages` is."""
        return "loaded" if 2 * self.loaded.seconds >= self.whole.seconds > 0 else "whole"

    def averages_of(self, window: Window) -> Averages:
        """Averages over a window."""
        return self.loaded if window == "loaded" else self.whole

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        return asdict(self)


@dataclass(slots=True)
class Statistics:
    """Collects; `report` may be asked at any time."""

    counts: Counts = field(default_factory=Counts)
    whole: Integral = field(default_factory=Integral)
    loaded: Integral = field(default_factory=Integral)
    n_peak_running: int = 0
    peak: Sample = field(default=Sample(0, 0, 0, 0, 0))  # at the most live bytes
    peak_active_bytes: int = 0
    peak_owned_bytes: int = 0
    _points: list[Integral] = field(default_factory=list)
    _steps_per_point: int = 1
    _n_in_point: int = 0
    _all_ns: array[int] = field(default_factory=lambda: array("q"))
    _quiet_ns: array[int] = field(default_factory=lambda: array("q"))
    _n_running_sum: int = 0
    _n_quiet_running_sum: int = 0
    _marks: list[tuple[int, int | None]] = field(default_factory=list)  # (output tokens, driver calls), thinned out

    def add_step(
        self,
        sample: Sample,
        seconds: float,
        *,
        is_loaded: bool,
        is_quiet: bool,
        took_ns: int | None,
        n_calls: int | None,
    ) -> None:
        """Count a step: its memory, its simulated length, the allocator's time in it, driver calls so far."""
        self.counts.n_steps += 1
        self.whole.add(sample, seconds)
        if is_loaded:
            self.loaded.add(sample, seconds)
        self.n_peak_running = max(self.n_peak_running, sample.n_running)
        self.peak_active_bytes = max(self.peak_active_bytes, sample.active_bytes)
        self.peak_owned_bytes = max(self.peak_owned_bytes, sample.owned_bytes)
        if sample.live_bytes > self.peak.live_bytes:
            self.peak = sample
        if took_ns is not None:
            self._all_ns.append(took_ns)
            self._n_running_sum += sample.n_running
            if is_quiet:
                self._quiet_ns.append(took_ns)
                self._n_quiet_running_sum += sample.n_running
        self._add_point(sample, seconds, n_calls)

    def report(
        self,
        scheme: str,
        *,
        is_complete: bool,
        n_batches: int,
        n_driver_calls: int | None,
        n_peak_mappings: int = 0,
        max_mappings: int | None = None,
    ) -> Report:
        """Summarise what was collected so far."""
        n_tokens = self.counts.n_output_tokens
        return Report(
            scheme=scheme,
            is_complete=is_complete,
            counts=self.counts,
            whole=self.whole.averages(),
            loaded=self.loaded.averages(),
            peak_live_bytes=self.peak.live_bytes,
            peak_active_bytes=self.peak_active_bytes,
            peak_owned_bytes=self.peak_owned_bytes,
            n_peak_running=self.n_peak_running,
            peak_live_of_owned=_ratio(self.peak.live_bytes, self.peak.owned_bytes),
            n_peak_mappings=n_peak_mappings,
            max_mappings=max_mappings,
            n_batches=n_batches,
            n_driver_calls=n_driver_calls,
            batches_per_1000_tokens=_ratio(1000 * n_batches, n_tokens),
            driver_calls_per_1000_tokens=None if n_driver_calls is None else _ratio(1000 * n_driver_calls, n_tokens),
            late_driver_calls_per_1000_tokens=self._late_calls(n_driver_calls),
            step_times=Times.of(self._all_ns, self._n_running_sum),
            quiet_times=Times.of(self._quiet_ns, self._n_quiet_running_sum),
            series=self._series(),
        )

    def _series(self) -> Series:
        averages = [point.averages() for point in self._points]
        return Series(
            tuple(round(at_s, 3) for at_s in accumulate(point.seconds for point in self._points)),
            tuple(round(a.live_bytes / MIB, 1) for a in averages),
            tuple(round(a.active_bytes / MIB, 1) for a in averages),
            tuple(round(a.owned_bytes / MIB, 1) for a in averages),
            tuple(round(a.n_running, 1) for a in averages),
        )

    def _add_point(self, sample: Sample, seconds: float, n_calls: int | None) -> None:
        if self._n_in_point == 0:
            if len(self._points) == _MAX_POINTS:
                for one, other in zip(self._points[::2], self._points[1::2], strict=True):
                    one.merge(other)
                self._points, self._marks = self._points[::2], self._marks[::2]
                self._steps_per_point *= 2
            self._points.append(Integral())
            self._marks.append((self.counts.n_output_tokens, n_calls))
        self._points[-1].add(sample, seconds)
        self._n_in_point = (self._n_in_point + 1) % self._steps_per_point

    def _late_calls(self, n_driver_calls: int | None) -> float | None:
        if n_driver_calls is None:
            return None
        n_tokens = self.counts.n_output_tokens
        for n_tokens_then, n_calls_then in self._marks:
            if n_calls_then is not None and 2 * n_tokens_then >= n_tokens > n_tokens_then:
                return 1000 * (n_driver_calls - n_calls_then) / (n_tokens - n_tokens_then)
        return None


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
