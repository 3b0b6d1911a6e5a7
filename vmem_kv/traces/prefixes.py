"""Token ids for prompts of which a trace says only which blocks they share, and what sharing could spare at best.

A block's tokens are numbered by its id, so that two prompts have as many leading tokens in common as the trace says,
and an index that compares tokens can be run on them. Tokens behind the last block have no ids here: nobody knows
whether another prompt has the same ones.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from vmem_kv.traces.formats import Request


def known_tokens(request: Request, block_tokens: int) -> array[int]:
    """Return ids of a prompt's leading tokens, as far as blocks stand for them, each below 2**31."""
    ids = array("I")
    for run in request.blocks:
        ids.extend(range(run.start * block_tokens, run.stop * block_tokens))
    del ids[request.prompt_tokens :]  # the last block may stand for less than a whole one
    return ids


def unbounded_hits(requests: Iterable[Request], block_tokens: int) -> tuple[int, int]:
    """Count what an unbounded cache would spare: every prompt is cached before the next request comes.

    Outputs and what is behind the last block are not cached.

    Returns:
        Prompt tokens, and those of them that were cached.
    """
    seen: set[int] = set()
    n_prompt = n_cached = 0
    for request in requests:
        n_prompt += request.prompt_tokens
        n_blocks = 0
        is_known = True
        for block in (each for run in request.blocks for each in run):
            is_known = is_known and block in seen
            n_blocks += is_known
            seen.add(block)
        n_cached += min(n_blocks * block_tokens, request.prompt_tokens)
    return n_prompt, n_cached
