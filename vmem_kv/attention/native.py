"""Attention in C for CPUs, `native/host_attention.c`: one call for all sequences, prefill and decode mixed.

torch's own kernel takes one call for each sequence, since their lengths differ, and multiplies a few rows of queries at
a tenth of what the memory could deliver. This one reads K and V once and in place, for all query heads that share them.

Guarantees: slack is 0; all sums in float32, whatever the dtype; the same output for any number of threads.
Assumes: the library was built (it is optional; `Sdpa` does all of this without). It computes with torch's threads: both
use the OpenMP runtime that torch has loaded.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from vmem_kv.attention.base import Attend, AttentionSpec, Availability, Kernel
from vmem_kv.attention.batch import RaggedBatch
from vmem_kv.tensors import SlotKV

ABI = 1
MAX_HEAD_DIM = 256
LANES = 16
"""Head sizes are multiples of it."""
_DTYPES = (torch.float32, torch.bfloat16)


class _Call(ctypes.Structure):
    """`vmem_attention` in host_attention.c."""

    _fields_ = (
        ("query", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("sinks", ctypes.c_void_p),
        ("sequences", ctypes.c_void_p),
        ("tasks", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("n_tasks", "n_q_heads", "n_kv_heads", "head_dim", "value_dim")),
        *((f"{name}_strides", ctypes.c_int64 * 2) for name in ("query", "key", "value")),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("is_causal", "is_bfloat16", "n_threads")),
    )


class Native(Kernel):
    """The kernel of this package.

    Args:
        library: Where it was built to; by default beside the package.
    """

    name = "native"

    def __init__(self, library: Path | None = None) -> None:
        self._path = library

    def availability(self, device: torch.device) -> Availability:
        if device.type != "cpu":
            return Availability(False, f"it runs on CPUs, not on {device}")
        try:
            _load(self._path)
        except OSError as error:
            return Availability(False, f"its library was not built, or does not fit: {error}")
        return Availability(True, "part of this package, in C")

    def lacks(self, spec: AttentionSpec) -> str:
        if spec.dtype not in _DTYPES:
            return f"{spec.dtype}; use float32 or bfloat16"
        for what, size in (("keys", spec.head_dim), ("values", spec.value_dim)):
            if size % LANES or size > MAX_HEAD_DIM:
                return f"{what} of size {size}; it takes multiples of {LANES} up to {MAX_HEAD_DIM}"
        return ""

    def slack_tokens(self, spec: AttentionSpec) -> int:
        return 0

    def build(self, spec: AttentionSpec) -> Attend:
        return _Native(spec, _load(self._path))


class _Native:
    """The kernel for one spec. Shares a batch out into tasks once, not once a layer."""

    def __init__(self, spec: AttentionSpec, library: ctypes.CDLL) -> None:
        self._spec = spec
        self._library = library
        self._tile_tokens = max(1, int(library.vmem_attention_tile_rows()) // spec.n_groups)
        self._plan = lru_cache(maxsize=4)(self._make_plan)

    def __call__(self, query: torch.Tensor, kv: SlotKV, batch: RaggedBatch, sinks: torch.Tensor | None) -> torch.Tensor:
        spec = self._spec
        sequences, tasks = self._plan(batch)
        output = query.new_empty(batch.n_tokens, spec.n_q_heads, spec.value_dim)
        scores_of_sinks = None if sinks is None else sinks.detach().to(torch.float32).contiguous()
        call = _Call(
            query=query.data_ptr(),
            keys=kv.keys.data_ptr(),
            values=kv.values.data_ptr(),
            output=output.data_ptr(),
            sinks=None if scores_of_sinks is None else scores_of_sinks.data_ptr(),
            sequences=sequences.data_ptr(),
            tasks=tasks.data_ptr(),
            n_tasks=len(tasks),
            n_q_heads=spec.n_q_heads,
            n_kv_heads=spec.n_kv_heads,
            head_dim=spec.head_dim,
            value_dim=spec.value_dim,
            query_strides=query.stride()[:2],
            key_strides=kv.keys.stride()[:2],
            value_strides=kv.values.stride()[:2],
            window=spec.window or 0,
            scale=spec.scale,
            softcap=spec.softcap or 0.0,
            is_causal=spec.is_causal,
            is_bfloat16=spec.dtype == torch.bfloat16,
            n_threads=torch.get_num_threads(),
        )
        self._library.vmem_attend(ctypes.byref(call))
        return output

    def _make_plan(self, batch: RaggedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sequences, `[n_seqs, 4]`, and the tasks `[n_tasks, 2]`: which one, from which new token on."""
        tasks = [
            (sequence.length - sequence.n_queries + first, index, first)
            for index, sequence in enumerate(batch.sequences)
            for first in range(0, sequence.n_queries, self._tile_tokens)
        ]
        # Those with the most keys first: the last tasks to end are short, and threads end together.
        tasks.sort(reverse=True)
        return torch.tensor(batch.sequences), torch.tensor([(index, first) for _, index, first in tasks])


@lru_cache(maxsize=2)
def _load(path: Path | None) -> ctypes.CDLL:
    """Open the library.

    Raises:
        OSError: There is none, or it is of another version.
    """
    folder = Path(__file__).parent.parent
    found = path or next((p for s in EXTENSION_SUFFIXES if (p := folder / f"_attention{s}").is_file()), None)
    if found is None:
        raise OSError(f"there is no _attention{EXTENSION_SUFFIXES[0]} in {folder}")
    library = ctypes.CDLL(str(found))
    if not hasattr(library, "vmem_attention_abi"):
        raise OSError(f"{found} holds no attention")
    if library.vmem_attention_abi() != ABI:
        raise OSError(f"{found} has ABI {library.vmem_attention_abi()}, this package needs {ABI}")
    library.vmem_attend.argtypes = [ctypes.POINTER(_Call)]
    library.vmem_attend.restype = None
    return library
