"""`sdpa` over K and V whose last live byte is the last mapped one: a load past it kills the process.

NaN shows what reaches the output. This shows what is loaded and thrown away too.
"""

from __future__ import annotations

import signal

from tests.core.subprocesses import run_python

PROGRAM = """
    import ctypes, mmap
    import torch
    from vmem_kv.attention.base import AttentionSpec
    from vmem_kv.attention.batch import RaggedBatch
    from vmem_kv.attention.sdpa import Sdpa
    from vmem_kv.tensors import SlotKV

    BYTES = 1 << 20
    SPAN = 512
    PROT_NONE = 0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def rows(n_live, n_heads, dim, dtype):
        # One megabyte that may be touched, and three behind it that may not.
        access, kind = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        base = libc.mmap(None, 4 * BYTES, access, kind, -1, 0)
        memory = torch.frombuffer((ctypes.c_char * (4 * BYTES)).from_address(base), dtype=dtype)
        first = BYTES // dtype.itemsize - n_live * n_heads * dim
        tensor = memory.as_strided((SPAN, n_heads, dim), (n_heads * dim, dim, 1), first)
        tensor[:n_live] = torch.randn(n_live, n_heads, dim).to(dtype)
        assert libc.mprotect(base + BYTES, 3 * BYTES, PROT_NONE) == 0
        return tensor

    def attend(n_queries, length, n_live, dtype, head_dim, softcap):
        spec = AttentionSpec(4, 2, head_dim, head_dim, dtype, 0.1, softcap=softcap)
        kv = SlotKV(rows(n_live, 2, head_dim, dtype), rows(n_live, 2, head_dim, dtype), SPAN)
        batch = RaggedBatch.build([0, n_queries], [0], [length], span_tokens=SPAN, n_rows=SPAN, device="cpu")
        query = torch.randn(n_queries, 4, head_dim).to(dtype)
        assert Sdpa().bind(spec, "cpu")(query, kv, batch).isfinite().all()
"""

EVERYTHING = """
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for head_dim in (64, 80, 128):
            for n_queries in (1, 5, 130):
                for length in (130, 255, 401):
                    for softcap in (None, 2.5):
                        attend(n_queries, length, length, dtype, head_dim, softcap)
    print("alive")
"""


def test_nothing_behind_the_last_token_is_loaded() -> None:
    done = run_python(PROGRAM + EVERYTHING)
    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr


def test_one_token_too_many_is_a_fault() -> None:
    done = run_python(PROGRAM + "    attend(1, 131, 130, torch.float32, 64, None)\n")
    assert done.returncode == -signal.SIGSEGV
