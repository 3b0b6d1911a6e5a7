"""The schedule once more, as plainly as it can be said: lists, and loops over all sequences in every step.

It shares no code with `vmem_kv.replay`. Memory is PagedAttention's rule: blocks of so many tokens out of so many.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vmem_kv.traces.formats import Request


@dataclass
class Outcome:
    """What a run came to."""

    n_done: int = 0
    n_rejected: int = 0
    n_preemptions: int = 0
    n_output_tokens: int = 0
    n_prompt_tokens: int = 0
    n_steps: int = 0
    n_peak_running: int = 0
    seconds: float = 0.0
    live_token_seconds: float = 0.0
    held_block_seconds: float = 0.0
    admitted: list[int] = field(default_factory=list)  # indices of requests, in the order of admission


def simulate(
    requests: list[Request],
    *,
    block: int,
    n_blocks: int,
    headroom_blocks: int,
    n_max_running: int,
    times: tuple[float, float, float],
    is_timed: bool = False,
    patience_s: float = float("inf"),
) -> Outcome:
    """Run first come, first served."""
    out = Outcome()
    todo = list(enumerate(requests))
    waiting: list[dict] = []
    running: list[dict] = []
    now = 0.0

    def blocks(n_tokens: int) -> int:
        return (n_tokens + block - 1) // block

    def used() -> int:
        return sum(blocks(s["tokens"]) for s in running)

    while todo or waiting or running:
        while todo and (not is_timed or todo[0][1].arrival_s <= now):
            index, request = todo.pop(0)
            n_outputs = max(1, request.output_tokens)
            if blocks(request.prompt_tokens + n_outputs - 1) > n_blocks:
                out.n_rejected += 1
            else:
                came = request.arrival_s if is_timed else now
                waiting.append(
                    {"index": index, "prompt": request.prompt_tokens, "left": n_outputs, "came": came, "again": False}
                )
        while is_timed and waiting and not waiting[0]["again"] and now - waiting[0]["came"] > patience_s:
            waiting.pop(0)
            out.n_rejected += 1
        if not waiting and not running:
            if todo:
                now = max(now, todo[0][1].arrival_s)
            continue
        preempted = False
        while running and sum(blocks(s["tokens"] + 1) for s in running) > n_blocks:
            victim = running.pop()
            preempted = True
            if not running:
                out.n_rejected += 1
                break
            out.n_preemptions += 1
            again = {**victim, "prompt": victim["tokens"] + 1, "again": True}
            waiting.insert(0, again)
        for s in running:
            s["tokens"] += 1
        prefilled = 0
        while not preempted and waiting and len(running) < n_max_running:
            s = waiting[0]
            if used() + blocks(s["prompt"]) + (headroom_blocks if running else 0) > n_blocks:
                break
            running.append({**waiting.pop(0), "tokens": s["prompt"]})
            out.admitted.append(s["index"])
            prefilled += s["prompt"]
        out.n_prompt_tokens += prefilled
        out.n_output_tokens += len(running)
        if running:
            live = sum(s["tokens"] for s in running)
            seconds = times[0] + times[1] * prefilled + times[2] * live
            out.n_steps += 1
            out.n_peak_running = max(out.n_peak_running, len(running))
            out.seconds += seconds
            out.live_token_seconds += live * seconds
            out.held_block_seconds += used() * seconds
            now += seconds
        for s in running:
            s["left"] -= 1
        out.n_done += sum(s["left"] == 0 for s in running)
        running = [s for s in running if s["left"]]
    return out
