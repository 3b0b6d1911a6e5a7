"""The pictures of `vmem-kv frag`: for each trace the use of memory over time, and three bars per scheme."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from vmem_kv.replay.study import Row
from vmem_kv.units import format_bytes

_BARS: tuple[tuple[str, Callable[[Row], float]], ...] = (
    ("largest batch that ran", lambda row: row.report.n_peak_running),
    ("requests rejected", lambda row: row.report.counts.n_rejected),
    ("driver calls (pages, spans) per 1,000 tokens", lambda row: row.report.driver_calls_per_1000_tokens or 0.0),
)


def draw_rows(path: Path, rows: Sequence[Row]) -> None:
    """Draw all rows into one file; the form follows its suffix."""
    traces = list(dict.fromkeys(row.trace for row in rows))
    schemes = list(dict.fromkeys(row.scheme for row in rows))
    cycle = mpl.colormaps["tab10"].colors  # type: ignore[attr-defined]  # of a listed colour map
    colours = {scheme: cycle[i % len(cycle)] for i, scheme in enumerate(schemes)}
    n_rows = len(traces)
    figure = Figure(figsize=(15, 0.9 + 2.9 * n_rows), layout="constrained")
    grid = figure.subplots(n_rows, 1 + len(_BARS), squeeze=False, width_ratios=[2.2, 1, 1, 1])
    for panels, trace in zip(grid, traces, strict=True):
        ours = [row for row in rows if row.trace == trace]
        _draw_series(panels[0], ours, colours)
        for axes, (title, value) in zip(panels[1:], _BARS, strict=True):
            _draw_bars(axes, ours, colours, title, value)
    setting, traffic = rows[0].setting, rows[0].traffic
    load = "recorded arrivals" if traffic.is_timed else "always requests waiting"
    figure.suptitle(
        f"{setting.shape.name}, {setting.shape.token_bytes / 1024:g} KiB a token, "
        f"budget {format_bytes(setting.budget_bytes)}, {load}, {traffic.policy}",
        fontsize="medium",
    )
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    if path.suffix.lower() != ".png":
        figure.savefig(path)
        return
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=80)
    # So few colours are in it that a palette halves the file.
    Image.open(drawn).convert("RGB").quantize(64).save(path, optimize=True)


def _draw_series(axes: Axes, rows: Sequence[Row], colours: dict[str, object]) -> None:
    """Live over owned memory, against the share of the run that has passed: schemes take unequal times."""
    for row in rows:
        series = row.report.series
        end = series.until_s[-1] if series.until_s else 1.0
        axes.plot(
            [100 * at_s / end for at_s in series.until_s],
            [
                100 * live / owned if owned else 0.0
                for live, owned in zip(series.live_mib, series.owned_mib, strict=True)
            ],
            label=row.scheme,
            color=colours[row.scheme],
            linewidth=1.2,
        )
    axes.set_ylim(0, 102)
    axes.set_xlim(0, 100)
    axes.set_title(f"{rows[0].trace}: live / owned memory", fontsize="small")
    axes.set_xlabel("simulated time, % of each scheme's run", fontsize="x-small")
    axes.set_ylabel("%", fontsize="x-small")
    axes.tick_params(labelsize="x-small")
    axes.grid(alpha=0.3)


def _draw_bars(
    axes: Axes, rows: Sequence[Row], colours: dict[str, object], title: str, value: Callable[[Row], float]
) -> None:
    values = [value(row) for row in rows]
    bars = axes.barh(range(len(rows)), values, color=[colours[row.scheme] for row in rows])
    axes.bar_label(bars, [f"{v:,.0f}" if v >= 10 or v == int(v) else f"{v:.1f}" for v in values], fontsize="x-small")
    axes.invert_yaxis()
    axes.set_yticks([])
    axes.set_xlim(0, 1.2 * max(values) or 1)
    axes.set_title(title, fontsize="small")
    axes.tick_params(labelsize="x-small")
