"""The kernel in C against the definition of attention, in float64, over K and V that are NaN between the rows."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.core.subprocesses import run_python
from vmem_kv.attention.base import AttentionSpec
from vmem_kv.attention.choose import choose, explain
from vmem_kv.attention.native import MAX_HEAD_DIM, Native
from vmem_kv.errors import ConfigError

from .harness import MIXES, Seq, assert_same, build_batch, make_case, reference, spec
from .test_sdpa import EXTRAS
from .test_unmapped_edge import EVERYTHING, PROGRAM

_VERDICT = Native().availability(torch.device("cpu"))
_HAS_COMPILER = any(shutil.which(name) for name in ("cc", "gcc", "clang"))
# Where it could have been built, tests without it fail instead.
needs_library = pytest.mark.skipif(not _VERDICT.is_available and not _HAS_COMPILER, reason=_VERDICT.why)


@pytest.fixture
def n_threads() -> Iterator[int]:
    """The number of threads, put back afterwards."""
    n = torch.get_num_threads()
    yield n
    torch.set_num_threads(n)


def check(asked: AttentionSpec, sequences: list[Seq], layout: str = "per_layer") -> None:
    case = make_case(asked, sequences, layout=layout)
    assert_same(asked, Native().bind(asked, "cpu")(*case.arguments), reference(asked, case))


@needs_library
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("extras", EXTRAS)
def test_every_mix_with_every_option(mix: str, extras: str) -> None:
    check(spec(dtype=torch.float32, head_dim=32, **EXTRAS[extras]), MIXES[mix])


@needs_library
@pytest.mark.parametrize("layout", ["per_layer", "per_head", "token_major"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n_q_heads", "n_kv_heads"), [(4, 4), (6, 2), (8, 1), (1, 1), (9, 1)])
def test_layouts_dtypes_and_groupings(layout: str, dtype: torch.dtype, n_q_heads: int, n_kv_heads: int) -> None:
    asked = spec(n_q_heads, n_kv_heads, 16, dtype=dtype)
    check(asked, MIXES["mixed off the base, some idle"], layout)
    check(asked, MIXES["decode of equal lengths"], layout)


@needs_library
@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_sizes(head_dim: int, dtype: torch.dtype) -> None:
    check(spec(4, 2, head_dim, dtype=dtype), MIXES["mixed"])


@needs_library
@pytest.mark.parametrize("extras", EXTRAS)
def test_values_of_another_size_than_keys(extras: str) -> None:
    check(spec(4, 1, 96, 64, dtype=torch.float32, **EXTRAS[extras]), MIXES["mixed"])
    check(spec(4, 1, 32, 80, dtype=torch.bfloat16, **EXTRAS[extras]), MIXES["mixed"])


@needs_library
@pytest.mark.parametrize("n_q_heads", [47, 48, 49, 300])
def test_as_many_query_heads_to_a_key_head_as_a_tile_has_rows(n_q_heads: int) -> None:
    check(spec(n_q_heads, 1, 16, dtype=torch.float32, has_sinks=True), [Seq(3, 5, 1), Seq(1, 70, 0)])


@needs_library
@pytest.mark.parametrize("n_queries", [11, 12, 13, 63, 64, 65, 129])
@pytest.mark.parametrize("window", [None, 1, 10, 64, 100])
@pytest.mark.parametrize("softcap", [None, 2.5])
def test_edges_of_tiles_and_blocks(n_queries: int, window: int | None, softcap: float | None) -> None:
    asked = spec(4, 1, 16, dtype=torch.float32, window=window, softcap=softcap)
    check(asked, [Seq(n_queries, 130, 2, 5), Seq(2, 2, 0)])


@needs_library
@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 128, 129])
@pytest.mark.parametrize("n_queries", [1, 2])
def test_lengths_around_a_block(length: int, n_queries: int) -> None:
    check(spec(2, 1, 32, dtype=torch.float32), [Seq(min(n_queries, length), length, 3, 9)])


@needs_library
@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("past", ["before the start", "behind the end"])
@pytest.mark.parametrize("n_queries", [1, 20])
def test_a_row_too_many_shows(extras: str, past: str, n_queries: int) -> None:
    """The rows around a sequence are NaN, so the tests above see every row that is read and not its own."""
    asked = spec(dtype=torch.float32, **EXTRAS[extras])
    right = Seq(n_queries, 20, 1, 7)
    wrong = Seq(n_queries, 21, 1, 6 if past == "before the start" else 7)
    case = make_case(asked, [right])
    output = Native().bind(asked, "cpu")(case.query, case.kv, build_batch([wrong]), case.sinks)
    is_in_reach = past == "behind the end" or asked.window is None or asked.window > 21 - n_queries
    assert bool(output.isnan().any()) == is_in_reach


@needs_library
@pytest.mark.parametrize("size", [1e-30, 1e3, 1e18])
def test_scores_of_any_size(size: float) -> None:
    """Where one key is all that counts, the output is its value; where all count alike, their mean."""
    asked = spec(2, 1, 16, dtype=torch.float32)
    case = make_case(asked, [Seq(1, 100, 0)])
    case.query.fill_(size)
    case.kv.keys[:100].fill_(1.0)
    case.kv.keys[37] += 1.0
    output = Native().bind(asked, "cpu")(*case.arguments)
    expected = case.kv.values[:100].mean(0) if size < 1 else case.kv.values[37]
    torch.testing.assert_close(output[0], expected.expand(2, 16))


@needs_library
@pytest.mark.parametrize("where", ["query", "keys"])
def test_what_is_no_number_stays_none(where: str) -> None:
    asked = spec(2, 2, 16, dtype=torch.float32)
    case = make_case(asked, [Seq(1, 70, 0), Seq(1, 70, 1)])
    (case.query[0] if where == "query" else case.kv.keys[3])[0, 0] = torch.nan
    is_nan = Native().bind(asked, "cpu")(*case.arguments).isnan()
    assert is_nan[0, 0].all()
    assert not is_nan[0, 1].any()
    assert not is_nan[1].any()


@needs_library
@pytest.mark.parametrize("mix", MIXES)
def test_the_number_of_threads_does_not_change_a_bit(mix: str, n_threads: int) -> None:
    asked = spec(6, 2, 32, dtype=torch.float32)
    case = make_case(asked, MIXES[mix])
    outputs = []
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        outputs.append(Native().bind(asked, "cpu")(*case.arguments))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@needs_library
def test_a_sequence_gets_the_same_bits_whatever_else_is_in_the_batch() -> None:
    asked = spec(6, 2, 64, dtype=torch.float32)
    case = make_case(asked, MIXES["mixed"])
    kernel = Native().bind(asked, "cpu")
    together = kernel(*case.arguments)
    for sequence, rows in zip(MIXES["mixed"], case.batch.sequences, strict=True):
        part = slice(rows.query_start, rows.query_start + rows.n_queries)
        alone = kernel(case.query[part], case.kv, build_batch([sequence]))
        assert torch.equal(together[part], alone)


@needs_library
def test_queries_need_not_be_contiguous() -> None:
    asked = spec(6, 2, 32, dtype=torch.float32)
    case = make_case(asked, MIXES["mixed"])
    kernel = Native().bind(asked, "cpu")
    by_head = case.query.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(kernel(by_head, case.kv, case.batch), kernel(*case.arguments))


@needs_library
def test_nothing_behind_the_last_token_is_loaded() -> None:
    program = PROGRAM.replace("attention.sdpa import Sdpa", "attention.native import Native as Sdpa")
    done = run_python(program + EVERYTHING.replace(", torch.float16", ""))
    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr
    done = run_python(program + "    attend(1, 131, 130, torch.float32, 64, None)\n")
    assert done.returncode == -signal.SIGSEGV


@needs_library
def test_auto_takes_it_on_a_cpu_for_what_it_has() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert choose("auto", spec(dtype=dtype, softcap=1.0, has_sinks=True, window=3), "cpu").name == "native"
    for asked in (spec(head_dim=72), spec(value_dim=MAX_HEAD_DIM + 16), spec(dtype=torch.float16)):
        assert choose("auto", asked, "cpu").name == "sdpa"
        with pytest.raises(ConfigError, match="attention kernel 'native' has no"):
            choose("native", asked, "cpu")


@pytest.mark.parametrize("content", [None, b"no library", "vmem_kv/_host"])
def test_without_its_library_torchs_own_serves(content: bytes | str | None, tmp_path: Path) -> None:
    path = tmp_path / "library.so"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        found = sorted(Path(__file__).parents[2].glob(f"{content}*.so"))
        if not found:
            pytest.skip("the host driver's library was not built either")
        path = found[0]
    kernel = Native(path)
    (verdict,) = explain("cpu", spec(), kernels=[kernel])
    assert not verdict.is_usable
    assert "was not built, or does not fit" in verdict.why
    with pytest.raises(ConfigError, match="'native' cannot run on cpu"):
        kernel.bind(spec(), "cpu")
