"""What `vmem-kv replay` prints: a table in which each figure stands beside what it counts."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vmem_kv.cli import trace_options as shared
from vmem_kv.layout import Choice
from vmem_kv.replay.sharing import SharingMemory
from vmem_kv.replay.statistics import Report, Times
from vmem_kv.replay.study import Setting, Traffic
from vmem_kv.units import format_bytes


def print_report(
    out: Console,
    report: Report,
    setting: Setting,
    traffic: Traffic,
    choice: Choice,
    memory: str,
    calls: dict[str, int],
) -> None:
    """Print what was found, each figure with what it counts; `calls` are those of the driver, by kind."""
    counts, page = report.counts, choice.page_bytes
    why = f"{shared.show_reasons(counts.preempted)}; " if counts.preempted else ""
    averages = report.averages
    when = "while requests waited" if report.window == "loaded" else "while anything ran"
    title = (
        f"{setting.shape.name}, {setting.shape.token_bytes:,} bytes a token, {format_bytes(setting.budget_bytes)} "
        f"{memory}, {choice.kind}, pages of {format_bytes(page)}"
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("what")
    table.add_column("figure", justify="right")
    table.add_column("meaning")
    rows: list[tuple[str, str, str]] = [
        ("requests done", f"{counts.n_done:,}", f"of {traffic.summary.n_requests:,}"),
        (
            "rejected",
            f"{counts.n_rejected:,}",
            shared.show_reasons(counts.rejected) or "could not run alone, or waited too long",
        ),
        (
            "preempted",
            f"{counts.n_preemptions:,}",
            f"{why}{shared.count(counts.n_recomputed_tokens, 'token')} computed again",
        ),
        ("sequences at once", f"{averages.n_running:,.1f}", f"time-averaged; at most {report.n_peak_running:,}"),
        (
            "live / active",
            shared.show_share(averages.live_of_active),
            "waste: mapped, unused memory of running sequences",
        ),
        (
            "live / mapped",
            shared.show_share(averages.live_of_mapped),
            "waste: that, and pages kept warm for the next ones",
        ),
        (
            "live / owned",
            shared.show_share(averages.live_of_owned),
            f"waste: that, and free pages that are kept; {shared.show_share(report.peak_live_of_owned)} at the peak",
        ),
        (
            "owned pages",
            f"{averages.owned_bytes // page:,}",
            f"time-averaged; at most {report.peak_owned_bytes // page:,}",
        ),
        ("mapped pages", f"{averages.mapped_bytes // page:,}", "time-averaged, active and warm"),
        ("mappings", f"{report.n_peak_mappings:,}", f"at most; the limit is {report.max_mappings or 0:,}"),
        (
            "batches",
            shared.show_number(report.batches_per_1000_tokens),
            "per 1,000 output tokens; each for any number of pages",
        ),
        (
            "driver calls",
            shared.show_number(report.driver_calls_per_1000_tokens),
            "per 1,000 output tokens, one for each page or span; in the second half "
            f"{shared.show_number(report.late_driver_calls_per_1000_tokens)}"
            if report.n_driver_calls is not None
            else "counted for accounted memory only",
        ),
        ("allocator and driver", _show_times(report.step_times), "all steps, p50 / p99; the driver's time is in it"),
        ("allocator, quiet steps", _show_times(report.quiet_times), _quiet_meaning(report.quiet_times)),
        ("simulated time", f"{report.whole.seconds:,.1f} s", f"in {counts.n_steps:,} steps, idle time left out"),
    ]
    for row in rows:
        table.add_row(*row)
    shared.write(out, shared.describe_traffic(traffic))
    shared.write(out, title, style="bold")
    out.print(table)
    shared.write(out, f"Averages: {when}. Layout: {choice.why}")
    listed = ", ".join(f"{name} {n:,}" for name, n in sorted(calls.items()))
    kind = "Driver calls" if report.n_driver_calls is not None else "Batches"
    shared.write(out, f"{kind}: {listed}")
    for remark in shared.remarks(setting, traffic):
        shared.write(out, remark)
    if not report.is_complete:
        shared.write(out, "Interrupted: these are the figures of the part that was done.")


def print_sharing(
    out: Console, report: Report, memory: SharingMemory, traffic: Traffic, bound: float, page_bytes: int
) -> None:
    """Print what sharing came to, and how near that is to `bound`, the hit rate of a cache that never forgets."""
    counts = memory.counts
    n_thousands = (counts.n_prompt_tokens + report.counts.n_output_tokens) / 1000
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("sharing")
    table.add_column("figure", justify="right")
    table.add_column("meaning")
    rate = counts.hit_rate
    rows = [
        ("hit rate", shared.show_share(rate), "of prompt tokens were cached"),
        (
            "of the upper bound",
            shared.show_share(rate / bound if rate is not None and bound else None),
            f"which is {bound:.1%}: nothing is ever given up, and each prompt is there before the next request comes",
        ),
        ("from the host", f"{counts.n_restored_tokens:,}", f"of {shared.count(counts.n_hit_tokens, 'cached token')}"),
        ("adopted whole", f"{counts.n_adopted:,}", "sequences that went on in a cached slot: no call, no copy"),
        ("forked", f"{counts.n_forked:,}", "that began with another one's stripes"),
        ("fresh", f"{counts.n_fresh:,}", "that shared nothing on the device"),
        ("given up", f"{counts.n_evicted:,}", "cached prompts, for want of memory or mappings"),
        ("peak pages", f"{counts.n_peak_pages:,}", f"distinct ones of {format_bytes(page_bytes)}, on the device"),
        ("peak pages, host", f"{counts.n_peak_host_pages:,}", "likewise, parked"),
        ("copies", show_rate(counts.n_copies, n_thousands), "per 1,000 prompt and output tokens, of all kinds"),
        ("copied, device", format_bytes(counts.device_copy_bytes), "tails that fill no stripe"),
        (
            "parked, restored",
            f"{format_bytes(counts.park_bytes)}, {format_bytes(counts.restore_bytes)}",
            "to the host, and back",
        ),
    ]
    for row in rows:
        table.add_row(*row)
    out.print(table)
    shared.write(
        out,
        "Sequences that share tokens count them each, so that live / active may pass 100 %. Outputs are not shared: "
        "the trace does not say which tokens they were.",
    )
    if not traffic.is_timed:
        shared.write(
            out,
            "Requests did not come as recorded: a conversation's next prompt may begin before the one in front of it "
            "is computed, which lowers the hit rate.",
        )


def show_rate(number: int, n_thousands: float) -> str:
    """A number per 1,000 tokens."""
    return f"{number / n_thousands:,.2f}" if n_thousands else "-"


def _show_times(times: Times | None) -> str:
    return f"{times.p50_us:,.1f} / {times.p99_us:,.1f} us" if times else "-"


def _quiet_meaning(times: Times | None) -> str:
    if times is None:
        return "steps in which nobody came, went or needed a page: none"
    return f"nobody came, went or needed a page: {times.n_steps:,} steps of {times.n_running:,.0f} on average"
