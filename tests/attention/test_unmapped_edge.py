"""`sdpa` over K and V whose last live byte is the last mapped one: a load past it kills the process.

NaN shows what reaches the output. This shows what is loaded and thrown away too.
"""

from __future__ import annotations

import signal

import pytest

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


LAYOUTS = """
    # Every system page that holds no row of a sequence is without access, in front, behind and between.
    from vmem_kv.attention import sdpa
    PAGE = mmap.PAGESIZE
    HEAD_DIM, N_SLOTS, N_HEADS = 64, 6, 2

    def strides(layout, n_rows):
        return {
            "per_layer": (N_HEADS * HEAD_DIM, HEAD_DIM),
            "per_head": (HEAD_DIM, n_rows * HEAD_DIM),
            "token_major": (4 * N_HEADS * HEAD_DIM, HEAD_DIM),
        }[layout]

    def holes_around(layout, dtype, span, sequences):
        n_rows = N_SLOTS * span
        row, head = (n * dtype.itemsize for n in strides(layout, n_rows))
        n_bytes = (n_rows * row + N_HEADS * head + 2 * PAGE) // PAGE * PAGE
        access, kind = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        base = libc.mmap(None, n_bytes, access, kind, -1, 0)
        memory = torch.frombuffer((ctypes.c_char * n_bytes).from_address(base), dtype=dtype)
        tensor = memory.as_strided((n_rows, N_HEADS, HEAD_DIM), (*strides(layout, n_rows), 1), 0)
        live = set()
        for start, length in sequences:
            tensor[start : start + length] = torch.randn(length, N_HEADS, HEAD_DIM).to(dtype)
            for h in range(N_HEADS):
                first, last = start * row + h * head, (start + length - 1) * row + h * head
                live.update(range(first // PAGE, (last + HEAD_DIM * dtype.itemsize - 1) // PAGE + 1))
        for page in set(range(n_bytes // PAGE)) - live:
            assert libc.mprotect(base + page * PAGE, PAGE, PROT_NONE) == 0
        return tensor, base, n_bytes

    def sequences_of(shape, rows_per_page, span):
        # Lengths and starts are whole pages of rows, so that each sequence begins and ends at a page's edge.
        if shape == "evenly spaced":
            return [(slot * span + rows_per_page, 2 * rows_per_page) for slot in range(N_SLOTS)]
        if shape == "gathered":
            return [(slot * span, (1 + (slot * 2 + 1) % 3) * rows_per_page) for slot in (3, 0, 4, 1)]
        return [(2 * span, span), (5 * span + rows_per_page, span - rows_per_page)]  # longer than is gathered

    def check(layout, dtype, shape, n_queries, window, planted=0):
        spec = AttentionSpec(2 * N_HEADS, N_HEADS, HEAD_DIM, HEAD_DIM, dtype, 0.1, window=window)
        rows_per_page = max(1, PAGE // (strides(layout, 1)[0] * dtype.itemsize))
        span = rows_per_page * 4
        if shape == "in place":
            span = max(span, (sdpa.GATHER_BYTES // (N_HEADS * HEAD_DIM * dtype.itemsize) // rows_per_page + 3)
                             * rows_per_page)
        sequences = sequences_of(shape, rows_per_page, span)
        memory = [holes_around(layout, dtype, span, sequences) for _ in "kv"]
        n_seqs = len(sequences)
        batch = RaggedBatch.build(
            [i * n_queries for i in range(n_seqs + 1)], [start for start, _ in sequences],
            [length + planted for _, length in sequences], span_tokens=span, n_rows=N_SLOTS * span, device="cpu")
        kernel = sdpa._Sdpa(spec)
        query = torch.randn(batch.n_tokens, 2 * N_HEADS, HEAD_DIM).to(dtype)
        output = kernel(query, SlotKV(memory[0][0], memory[1][0], span), batch, None)
        assert output.isfinite().all()
        strided, gathered = kernel._plan(batch)
        if n_queries == 1 and window is None:
            calls = [len(gathered), len(strided), max((call.n_seqs for call in strided), default=0)]
            expected = {"evenly spaced": [0, 1, N_SLOTS], "in place": [0, 2, 1]}
            assert calls == expected[shape] if shape in expected else calls[0] >= 1, (shape, calls)
        for _, base, n_bytes in memory:
            libc.munmap(ctypes.c_void_p(base), ctypes.c_size_t(n_bytes))
"""

ALL_LAYOUTS = """
    for layout in ("per_layer", "per_head", "token_major"):
        for dtype in (torch.float32, torch.bfloat16):
            for shape in ("evenly spaced", "gathered", "in place"):
                for n_queries in (1, 2):
                    for window in (None, 5):
                        check(layout, dtype, shape, n_queries, window)
    print("alive")
"""


def test_nothing_behind_the_last_token_is_loaded() -> None:
    done = run_python(PROGRAM + EVERYTHING)
    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr


def test_one_token_too_many_is_a_fault() -> None:
    done = run_python(PROGRAM + "    attend(1, 131, 130, torch.float32, 64, None)\n")
    assert done.returncode == -signal.SIGSEGV


def test_nothing_around_the_tokens_is_loaded_in_any_layout_by_any_path() -> None:
    done = run_python(PROGRAM + LAYOUTS + ALL_LAYOUTS)
    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr


@pytest.mark.parametrize("layout", ["per_layer", "per_head", "token_major"])
@pytest.mark.parametrize("shape", ["evenly spaced", "gathered"])
def test_one_token_too_many_is_a_fault_in_any_layout_by_any_path(layout: str, shape: str) -> None:
    done = run_python(PROGRAM + LAYOUTS + f"    check({layout!r}, torch.bfloat16, {shape!r}, 1, None, planted=1)\n")
    assert done.returncode == -signal.SIGSEGV, done.stderr
