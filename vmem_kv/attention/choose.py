"""Which kernels there are, which one `auto` takes for a spec on a device, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from typing import NamedTuple

import torch

from vmem_kv.attention.base import AttentionSpec, BoundKernel, Kernel, resolve_device
from vmem_kv.attention.fa3 import Fa3
from vmem_kv.attention.flash_attn import FlashAttn
from vmem_kv.attention.native import Native
from vmem_kv.attention.sdpa import Sdpa
from vmem_kv.attention.torch_flash import TorchFlash
from vmem_kv.errors import ConfigError

AUTO = "auto"


class Verdict(NamedTuple):
    """What is to be said of one kernel."""

    name: str
    is_usable: bool
    is_chosen: bool  # by `auto`; of exactly one verdict, where any is usable
    slack_tokens: int  # 0 where it is not usable, or no spec was given
    why: str  # in words for the user


def all_kernels() -> tuple[Kernel, ...]:
    """Return every kernel, the fastest first."""
    return (Fa3(), FlashAttn(), TorchFlash(), Native(), Sdpa())


def choose(
    name: str,
    spec: AttentionSpec,
    device: torch.device | str,
    *,
    max_slack_tokens: int = 0,
    kernels: Sequence[Kernel] | None = None,
) -> BoundKernel:
    """Bind the kernel of that name, or with "auto" the fastest that can do what is asked.

    Without `max_slack_tokens` no kernel is bound that loads anything behind a sequence's last token. Who passes it
    promises to map that many tokens more of each sequence and to make them finite: `BoundKernel.tokens_to_map` says
    how many to map in all. A kernel that reads an unmapped row ends the process's use of the device; one that reads
    NaN there returns NaN.

    Args:
        name: "auto" or the name of a kernel.
        spec: What is asked for.
        device: Where.
        max_slack_tokens: The most slack that the caller will map and make finite.
        kernels: What to choose from, the fastest first; default: all.

    Raises:
        ConfigError: There is no such kernel, it cannot do what is asked, or none can. The message says why.
    """
    kernels = all_kernels() if kernels is None else kernels
    if name == AUTO:
        verdicts = explain(device, spec, max_slack_tokens=max_slack_tokens, kernels=kernels)
        for kernel, verdict in zip(kernels, verdicts, strict=True):
            if verdict.is_chosen:
                return kernel.bind(spec, device)
        reasons = "; ".join(f"{v.name}: {v.why}" for v in verdicts)
        raise ConfigError(f"no attention kernel can do this on {device} ({reasons})")
    for kernel in kernels:
        if kernel.name == name:
            bound = kernel.bind(spec, device)
            if bound.slack_tokens > max_slack_tokens:
                raise ConfigError(f"attention kernel {name!r} {_slack_text(bound.slack_tokens, max_slack_tokens)}")
            return bound
    names = ", ".join((AUTO, *(kernel.name for kernel in kernels)))
    raise ConfigError(f"there is no attention kernel {name!r}; choose one of {names}")


def explain(
    device: torch.device | str,
    spec: AttentionSpec | None = None,
    *,
    max_slack_tokens: int = 0,
    kernels: Sequence[Kernel] | None = None,
) -> tuple[Verdict, ...]:
    """Say of every kernel whether it can be used on `device` (for `spec`), why, and which one "auto" takes.

    Arguments as `choose`.
    """
    where = resolve_device(device)
    verdicts: list[Verdict] = []
    for kernel in all_kernels() if kernels is None else kernels:
        verdict = _verdict(kernel, where, spec, max_slack_tokens)
        is_first = verdict.is_usable and not any(v.is_chosen for v in verdicts)
        if spec is None and verdict.is_usable and kernel.has_slack and not max_slack_tokens:
            # How much slack depends on the spec, but some it will be.
            verdict = verdict._replace(why=f"{verdict.why}; {AUTO} takes it where max_slack_tokens is given")
            is_first = False
        verdicts.append(verdict._replace(is_chosen=is_first))
    return tuple(verdicts)


def _verdict(kernel: Kernel, device: torch.device, spec: AttentionSpec | None, max_slack_tokens: int) -> Verdict:
    is_available, why = astuple(kernel.availability(device))
    if not is_available or spec is None:
        return Verdict(kernel.name, is_available, False, 0, why)
    lack = kernel.lacks(spec)
    if lack:
        return Verdict(kernel.name, False, False, 0, f"it has no {lack}")
    slack = kernel.slack_tokens(spec)
    if slack > max_slack_tokens:
        return Verdict(kernel.name, False, False, 0, f"it {_slack_text(slack, max_slack_tokens)}")
    return Verdict(kernel.name, True, False, slack, why)


def _slack_text(slack_tokens: int, max_slack_tokens: int) -> str:
    return (
        f"loads up to {slack_tokens} tokens behind a sequence, and only {max_slack_tokens} will be mapped: map and fill"
        f" that many and pass max_slack_tokens={slack_tokens}"
    )
