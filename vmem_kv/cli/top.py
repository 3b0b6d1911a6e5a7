"""`vmem-kv top`: the dashboard in a terminal."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vmem_kv.cli.client import DEFAULT_URL, ApiKey, Url, connect, get
from vmem_kv.units import format_bytes

_BARS = " ▁▂▃▄▅▆▇█"
_STYLES = {"active": "blue", "cached": "magenta", "warm": "yellow", "cold": "dim"}
_BAR_CELLS = 40
_N_LINES_AROUND = 10


def top(
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one look, and end.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Show a running server's slots and memory, live. Ctrl-C ends it.

    Of each slot: what its live tokens need (full blocks), what is mapped beyond that (light blocks), and the rest of
    the longest slot in use (dots). The whole span of addresses is far longer, and costs nothing.
    """
    out = Console()
    with connect(url, api_key) as client:
        if once:
            out.print(draw(get(client, "/dashboard/data"), n_rows=None))
            return
        try:
            with Live(console=out, screen=True, auto_refresh=False) as live:
                while True:
                    n_rows = max(1, out.height - _N_LINES_AROUND)
                    live.update(draw(get(client, "/dashboard/data"), n_rows), refresh=True)
                    time.sleep(interval)
        except KeyboardInterrupt:
            return


def draw(data: dict[str, Any], n_rows: int | None) -> RenderableType:
    """Return one look at a server.

    Args:
        data: Of /dashboard/data.
        n_rows: The most slots to show, those in use first; None for all.
    """
    last = data["samples"][-1] if data["samples"] else {}
    state = Text(data["ready"]["status"].replace("_", " "), "green" if data["ready"]["status"] == "ready" else "red")
    head = Text.assemble((data["model"], "bold"), "  ", state, "  ", "; ".join(data["ready"]["reasons"]))
    pages = "  ".join(f"{name} {n:,}" for name, n in data["pages"].items())
    memory = (
        f"addresses {format_bytes(data['virtual_bytes'])}   mapped {format_bytes(data['mapped_bytes'])}   "
        f"live {format_bytes(data['live_bytes'])}"
    )
    work = (
        f"running {data['n_running']} of {data['max_running']}   queued {last.get('n_waiting', 0)}   "
        f"preemptions {data['n_preempted']}   driver calls/s {last.get('driver_calls_per_s', 0.0):.1f}"
        + ("" if data["hit_share"] is None else f"   prompts cached {data['hit_share']:.0%}")
    )
    lines = (
        memory,
        f"pages of {format_bytes(data['page_bytes'])}: {pages}",
        *([] if data["tiers"] is None else [_tiers(data["tiers"])]),
        work,
        f"tokens/s {last.get('generated_tokens_per_s', 0.0):7.1f} {_spark(data, 'generated_tokens_per_s')}",
        f"pages    {last.get('n_live_pages', 0):7,} {_spark(data, 'n_live_pages')}",
    )
    return Group(head, *(Text(line, no_wrap=True, overflow="ellipsis") for line in lines), _slots(data, n_rows))


def _tiers(tiers: dict[str, Any]) -> str:
    sessions = tiers["n_sessions"]
    return (
        f"sessions on device {sessions['in_use'] + sessions['device']}   host {sessions['host']}   "
        f"disk {sessions['disk']}   host memory {format_bytes(tiers['host_bytes'])} of "
        f"{format_bytes(tiers['max_host_bytes'])}   parked {tiers['n_parked']}   restored {tiers['n_restored']}"
    )


def _slots(data: dict[str, Any], n_rows: int | None) -> Table:
    table = Table(box=None, pad_edge=False, show_header=True, header_style="dim")
    for heading in ("slot", "state", "live, mapped", "tokens", "live", "mapped"):
        table.add_column(heading, justify="right" if heading in ("slot", "tokens", "live", "mapped") else "left")
    most = max(1, *(slot["mapped_bytes"] for slot in data["slots"]))
    order = {"active": 0, "cached": 1, "retired": 2, "warm": 3, "broken": 4}
    slots = [item for item in enumerate(data["slots"]) if item[1]["state"] != "cold"]
    slots.sort(key=lambda item: order.get(item[1]["state"], 5))
    for index, slot in slots[:n_rows]:
        live_bytes = slot["n_tokens"] * data["token_bytes"]
        n_mapped = round(_BAR_CELLS * slot["mapped_bytes"] / most)
        n_live = min(n_mapped, round(_BAR_CELLS * live_bytes / most))
        bar = "█" * n_live + "▒" * (n_mapped - n_live) + "·" * (_BAR_CELLS - n_mapped)
        table.add_row(
            str(index),
            slot["state"],
            Text(bar, _STYLES.get(slot["state"], "red")),
            f"{slot['n_tokens']:,}",
            format_bytes(live_bytes),
            format_bytes(slot["mapped_bytes"]),
        )
    if n_cold := len(data["slots"]) - len(slots):
        table.add_row("", "cold", Text(f"{n_cold} slots with nothing mapped", _STYLES["cold"]))
    return table


def _spark(data: dict[str, Any], name: str) -> str:
    """Return the last minute as a line of bars."""
    values = [sample[name] for sample in data["samples"][-60:]]
    most = max(values, default=0) or 1
    return "".join(_BARS[round(value / most * (len(_BARS) - 1))] for value in values)
