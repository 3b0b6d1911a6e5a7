"""Sums by hand: integrals, percentiles, the thinned-out series, calls in the second half."""

from __future__ import annotations

from array import array

import pytest

from vmem_kv.replay.statistics import Integral, Sample, Statistics, Times


def add(statistics: Statistics, sample: Sample, seconds: float, **options: object) -> None:
    defaults = {"is_loaded": False, "is_quiet": False, "took_ns": None, "n_calls": 0}
    statistics.add_step(sample, seconds, **{**defaults, **options})  # type: ignore[arg-type]


def test_utilisation_is_a_ratio_of_byte_seconds() -> None:
    integral = Integral()
    integral.add(Sample(10, 20, 40, 80, 1), 1.0)
    integral.add(Sample(90, 100, 100, 100, 3), 3.0)
    averages = integral.averages()
    assert averages.live_of_active == pytest.approx(280 / 320)
    assert averages.live_of_mapped == pytest.approx(280 / 340)
    assert averages.live_of_owned == pytest.approx(280 / 380)
    assert (averages.live_bytes, averages.owned_bytes, averages.n_running) == (70, 95, 2.5)


def test_nothing_has_no_utilisation() -> None:
    report = Statistics().report("x", is_complete=True, n_batches=1, n_driver_calls=1)
    assert report.whole.live_of_active is None
    assert report.driver_calls_per_1000_tokens is None
    assert report.late_driver_calls_per_1000_tokens is None
    assert report.step_times is None
    assert report.series.until_s == ()


def test_percentiles() -> None:
    times = Times.of(array("q", [1000 * i for i in range(100, 0, -1)]), 500)
    assert times is not None
    assert (times.n_steps, times.p50_us, times.p99_us, times.mean_us, times.n_running) == (100, 51, 100, 50.5, 5)
    assert Times.of(array("q"), 0) is None


@pytest.mark.parametrize("n_steps", [1, 127, 128, 129, 1000, 12_345])
def test_the_series_is_bounded_and_loses_no_time(n_steps: int) -> None:
    statistics = Statistics()
    for i in range(n_steps):
        statistics.counts.n_output_tokens += 2
        add(statistics, Sample(i << 20, i << 20, i << 20, i << 20, 2), 0.5, n_calls=i)
    report = statistics.report("x", is_complete=True, n_batches=n_steps, n_driver_calls=n_steps)
    series = report.series
    assert len(series.until_s) == len(series.live_mib) == len(series.n_running) <= 128
    assert series.until_s[-1] == pytest.approx(n_steps / 2)
    assert list(series.until_s) == sorted(series.until_s)
    spans = [b - a for a, b in zip((0.0, *series.until_s), series.until_s, strict=False)]
    mean = sum(s * v for s, v in zip(spans, series.live_mib, strict=True)) / (n_steps / 2)
    assert mean == pytest.approx((n_steps - 1) / 2, abs=0.1)


def test_calls_in_the_second_half_are_told_apart() -> None:
    statistics = Statistics()
    for i in range(1000):
        statistics.counts.n_output_tokens += 1
        add(statistics, Sample(1, 1, 1, 1, 1), 1.0, n_calls=min(i + 1, 100))
    report = statistics.report("x", is_complete=True, n_batches=10, n_driver_calls=100)
    assert report.batches_per_1000_tokens == 10
    assert report.driver_calls_per_1000_tokens == 100
    assert report.late_driver_calls_per_1000_tokens == 0


def test_peaks_and_load() -> None:
    statistics = Statistics()
    add(statistics, Sample(5, 10, 10, 30, 2), 1.0, is_loaded=True, is_quiet=True, took_ns=4000)
    add(statistics, Sample(8, 9, 10, 20, 1), 3.0, took_ns=8000)
    report = statistics.report("x", is_complete=False, n_batches=1, n_driver_calls=None)
    assert report.driver_calls_per_1000_tokens is report.late_driver_calls_per_1000_tokens is None
    assert (report.peak_live_bytes, report.peak_active_bytes, report.peak_owned_bytes) == (8, 10, 30)
    assert report.peak_live_of_owned == pytest.approx(8 / 20)
    assert report.n_peak_running == 2
    assert report.loaded.live_of_active == 0.5
    assert report.averages is report.whole  # requests waited in a quarter of the time only
    assert report.quiet_times is not None
    assert report.quiet_times.p50_us == 4.0
    statistics.loaded.add(Sample(5, 10, 10, 30, 2), 1.0)
    assert (report := statistics.report("x", is_complete=True, n_batches=1, n_driver_calls=1)).averages is report.loaded
