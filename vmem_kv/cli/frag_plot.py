"""The pictures of `vmem-kv frag`: for each trace the use of memory over time, and what came of it, scheme by scheme.

They are drawn from the rows as they stand in the JSON, so that a picture can be made again without another run. Rules
have dashed lines and hatched bars, the real allocator solid ones: colours alone do not survive a printer.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from vmem_kv.units import format_bytes

PUBLISHED_PERCENT = 96.3
"""What PagedAttention published for itself."""

Row = Mapping[str, Any]
"""A row of `vmem_kv.replay.study.rows_to_json`."""


class _Style(NamedTuple):
    colour: str
    line: str
    hatch: str


_RIVALS = (("#8c8c8c", ":"), ("#e69f00", "--"), ("#cc79a7", "-."), ("#000000", "--"))
_OURS = ("#d55e00", "#56b4e9", "#0072b2", "#009e73", "#7f3c8d")


class _Bars(NamedTuple):
    """A panel with a bar for each scheme."""

    title: str
    value: Callable[[Row], float]
    mark: Callable[[Row], float] | None = None  # a second value, drawn as a line across the bar
    is_logarithmic: bool = False
    digits: int = 0


def _percent(row: Row) -> float:
    return 100 * (row[row["averaged"]]["live_of_active"] or 0.0)


_USE = _Bars("live / active\nmean, %", _percent, digits=1)
_BATCH = _Bars(
    "batch: mean\n(line: most)",
    lambda row: row[row["averaged"]]["n_running"],
    lambda row: row["n_peak_running"],
)
_FIT = _Bars("first requests that\nfit side by side", lambda row: row["n_fitting"])
_CALLS = _Bars(
    "driver calls per\n1,000 tokens (log)",
    lambda row: row["driver_calls_per_1000_tokens"] or 0.0,
    is_logarithmic=True,
)
_REJECTED = _Bars("requests\nrejected", lambda row: row["counts"]["n_rejected"])


def draw_rows(path: Path, rows: Sequence[Row]) -> None:
    """Draw rows of one setting into one file; the form follows its suffix."""
    traces = list(dict.fromkeys(row["trace"] for row in rows))
    styles = _styles(list(dict.fromkeys(row["scheme"] for row in rows)))
    panels = [_USE, _BATCH, _FIT, _CALLS] + ([_REJECTED] if any(row["counts"]["n_rejected"] for row in rows) else [])
    height = 1.3 + 0.24 * len(styles)
    figure = Figure(figsize=(14, 1.4 + height * len(traces)), layout="constrained")
    grid = figure.subplots(len(traces), 1 + len(panels), squeeze=False, width_ratios=[2.3] + [1.0] * len(panels))
    for axes_of_row, trace in zip(grid, traces, strict=True):
        ours = [row for row in rows if row["trace"] == trace]
        _draw_series(axes_of_row[0], trace, ours, styles)
        for axes, panel in zip(axes_of_row[1:], panels, strict=True):
            _draw_bars(axes, ours, styles, panel)
        axes_of_row[1].set_yticks(range(len(ours)), [row["scheme"] for row in ours], fontsize=9)
    for axes, panel in zip(grid[0][1:], panels, strict=True):
        axes.set_title(panel.title, fontsize=10)
    grid[-1][0].set_xlabel("simulated time, % of each scheme's own run", fontsize=9)
    first = rows[0]
    load = "recorded arrivals" if first["load"] == "recorded" else "all requests waiting from the start"
    rejected = "" if _REJECTED in panels else "; no request was rejected"
    figure.suptitle(
        f"{first['model']}, {first['token_bytes'] / 1024:g} KiB a token, budget {format_bytes(first['budget_bytes'])}, "
        f"{load}{rejected}",
        fontsize=12,
    )
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, handlelength=4)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a figure; a PNG with a palette, which halves the file: there are few colours in it."""
    if path.suffix.lower() != ".png":
        figure.savefig(path)
        return
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    Image.open(drawn).convert("RGB").quantize(96).save(path, optimize=True)


def _styles(schemes: Sequence[str]) -> dict[str, _Style]:
    """Colours in the order of the schemes: one row for the rules, one for the real allocator."""
    rivals, ours = iter(_RIVALS), iter(_OURS)
    return {
        scheme: _Style(next(ours, "#444444"), "-", "")
        if scheme.startswith("vmem_kv")
        else _Style(*next(rivals, ("#444444", ":")), "////")
        for scheme in schemes
    }


def _draw_series(axes: Axes, trace: str, rows: Sequence[Row], styles: Mapping[str, _Style]) -> None:
    """Live over active memory, against the share of the run that has passed: schemes take unequal times."""
    axes.axhline(PUBLISHED_PERCENT, color="#666666", linewidth=0.8)
    axes.annotate(f"{PUBLISHED_PERCENT} %", (100.5, PUBLISHED_PERCENT), fontsize=8, va="center", annotation_clip=False)
    for row in rows:
        series, style = row["series"], styles[row["scheme"]]
        end = series["until_s"][-1] if series["until_s"] else 1.0
        points = [
            (100 * at_s / end, 100 * live / active)
            for at_s, live, active in zip(series["until_s"], series["live_mib"], series["active_mib"], strict=True)
            if active
        ]
        # The rules lie on top, thin and dashed: where both have the same figure, both can be seen.
        width, order = (1.1, 3) if style.hatch else (1.8, 2)
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            label=row["scheme"],
            color=style.colour,
            linestyle=style.line,
            linewidth=width,
            zorder=order,
        )
    axes.set_ylim(0, 104)
    axes.set_xlim(0, 100)
    axes.set_title(trace, fontsize=11, fontweight="bold", loc="left")
    axes.set_ylabel("live / active, %", fontsize=9)
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.25)


def _draw_bars(axes: Axes, rows: Sequence[Row], styles: Mapping[str, _Style], panel: _Bars) -> None:
    values = [panel.value(row) for row in rows]
    bars = axes.barh(range(len(rows)), values, height=0.72)
    for bar, row in zip(bars, rows, strict=True):
        style = styles[row["scheme"]]
        bar.set(facecolor="white" if style.hatch else style.colour, edgecolor=style.colour, hatch=style.hatch)
    greatest = max(values, default=0.0)
    labels = [f"{value:,.{panel.digits}f}" for value in values]
    if panel.mark is not None:
        marks = [panel.mark(row) for row in rows]
        axes.vlines(marks, [i - 0.36 for i in range(len(rows))], [i + 0.36 for i in range(len(rows))], colors="black")
        labels = [f"{label} ({mark:,.0f})" for label, mark in zip(labels, marks, strict=True)]
        greatest = max(greatest, *marks)
        for index, (value, mark, label) in enumerate(zip(values, marks, labels, strict=True)):
            axes.annotate(label, (max(value, mark), index), (4, 0), textcoords="offset points", fontsize=9, va="center")
    else:
        axes.bar_label(bars, labels, fontsize=9, padding=3)
    axes.invert_yaxis()
    axes.set_yticks([])
    if panel.is_logarithmic and greatest:
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(0, greatest**1.45)
    else:
        axes.set_xlim(0, 1.6 * greatest or 1)
    axes.xaxis.set_visible(False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
