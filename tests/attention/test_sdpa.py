"""The reference kernel against the definition of attention, in float64, over K and V that are NaN between the rows."""

from __future__ import annotations

import pytest
import torch

from vmem_kv.attention import sdpa
from vmem_kv.attention.base import AttentionSpec
from vmem_kv.attention.sdpa import Sdpa
from vmem_kv.errors import UsageError
from vmem_kv.tensors import SlotKV

from .harness import MIXES, SPAN, Seq, assert_same, build_batch, make_case, reference, spec

EXTRAS = {
    "plain": {},
    "window": {"window": 24},
    "window of one": {"window": 1},
    "window longer than all": {"window": 5000},
    "softcap": {"softcap": 2.5},
    "sinks": {"has_sinks": True},
    "all": {"window": 24, "softcap": 2.5, "has_sinks": True},
    "not causal": {"is_causal": False},
}


def check(asked: AttentionSpec, sequences: list[Seq], layout: str = "per_layer") -> None:
    case = make_case(asked, sequences, layout=layout)
    output = Sdpa().bind(asked, "cpu")(*case.arguments)
    assert_same(asked, output, reference(asked, case))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("extras", EXTRAS)
def test_every_mix_with_every_option(mix: str, extras: str) -> None:
    check(spec(dtype=torch.float32, head_dim=32, **EXTRAS[extras]), MIXES[mix])


@pytest.mark.parametrize("layout", ["per_layer", "per_head", "token_major"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n_q_heads", "n_kv_heads"), [(4, 4), (6, 2), (8, 1), (1, 1)])
def test_layouts_dtypes_and_groupings(layout: str, dtype: torch.dtype, n_q_heads: int, n_kv_heads: int) -> None:
    asked = spec(n_q_heads, n_kv_heads, 16, dtype=dtype)
    check(asked, MIXES["mixed off the base, some idle"], layout)
    check(asked, MIXES["decode of equal lengths"], layout)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_sizes(head_dim: int, dtype: torch.dtype) -> None:
    check(spec(4, 2, head_dim, dtype=dtype), MIXES["mixed"])


@pytest.mark.parametrize("extras", EXTRAS)
def test_values_of_another_size_than_keys(extras: str) -> None:
    asked = spec(4, 1, 72, 64, dtype=torch.float32, **EXTRAS[extras])
    check(asked, MIXES["mixed"])


def test_more_query_heads_to_a_key_head_than_a_tile_has_rows() -> None:
    assert sdpa.TILE_ROWS < 300
    check(spec(300, 1, 8, dtype=torch.float32), [Seq(3, 5, 1), Seq(1, 5, 0)])


@pytest.mark.parametrize("n_queries", [63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("window", [None, 10, 64, 100])
@pytest.mark.parametrize("softcap", [None, 2.5])
def test_edges_of_tiles(n_queries: int, window: int | None, softcap: float | None) -> None:
    asked = spec(4, 1, 8, dtype=torch.float32, window=window, softcap=softcap)
    check(asked, [Seq(n_queries, 130, 2, 5), Seq(2, 2, 0)])


def test_an_empty_batch_gives_an_empty_output() -> None:
    asked = spec()
    case = make_case(asked, [Seq(0, 3, 1)])
    output = Sdpa().bind(asked, "cpu")(*case.arguments)
    assert output.shape == (0, 4, 64)
    assert output.dtype == asked.dtype


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("past", ["before the start", "behind the end"])
def test_a_row_too_many_shows(extras: str, past: str) -> None:
    """The rows around a sequence are NaN, so the tests above see every row that is read and not its own."""
    asked = spec(dtype=torch.float32, **EXTRAS[extras])
    right = Seq(4, 20, 1, 7)
    wrong = Seq(4, 21, 1, 6 if past == "before the start" else 7)
    case = make_case(asked, [right])
    output = Sdpa().bind(asked, "cpu")(case.query, case.kv, build_batch([wrong]), case.sinks)
    is_in_reach = past == "behind the end" or asked.window is None or asked.window > 20
    assert bool(output.isnan().any()) == is_in_reach


@pytest.mark.parametrize(
    ("sequences", "n_calls", "n_copies"),
    [
        (MIXES["decode of equal lengths"], 1, 0),
        ([Seq(1, 33, slot) for slot in (0, 2, 4, 7, 6)], 1, 1),
        ([Seq(1, 30, 0), Seq(1, 20, 3), Seq(1, 17, 1), Seq(1, 15, 2)], 1, 1),
        ([Seq(1, 600, 0), Seq(1, 599, 3)], 2, 0),
        (MIXES["prefill"], 1 + 1 + 5 + 1, 0),
    ],
)
def test_how_sequences_share_calls(sequences: list[Seq], n_calls: int, n_copies: int) -> None:
    kernel = sdpa._Sdpa(spec(4, 2, 64, dtype=torch.float32))
    strided, gathered = kernel._plan(build_batch(sequences))
    assert (len(strided), len(gathered)) == (n_calls, n_copies)


def test_a_batch_is_planned_once_for_all_layers() -> None:
    kernel = sdpa._Sdpa(spec())
    batch = build_batch(MIXES["mixed"])
    assert kernel._plan(batch) is kernel._plan(batch)
    assert kernel._plan(batch) is not kernel._plan(build_batch(MIXES["mixed"]))


@pytest.mark.parametrize("mix", ["mixed", "decode of long and short, any order"])
def test_a_batch_planned_in_inference_mode_serves_outside_of_it(mix: str) -> None:
    """A tensor made in inference mode cannot be used where gradients are recorded, so a plan must hold none."""
    asked = spec(dtype=torch.float32)
    case = make_case(asked, MIXES[mix])
    kernel = sdpa._Sdpa(asked)
    with torch.inference_mode():
        inferred = kernel(*case.arguments)
        strided, gathered = kernel._plan(case.batch)
    tensors = [call.mask for call in strided if call.mask is not None]
    tensors += [tensor for call in gathered for tensor in (call.queries, call.rows, call.mask)]
    assert tensors
    assert not any(tensor.is_inference() for tensor in tensors)
    assert torch.equal(inferred, kernel(*case.arguments))


@pytest.mark.parametrize("name", ["keys", "values"])
@pytest.mark.parametrize("stride", ["row", "head"])
def test_strides_that_torchs_cuda_kernels_do_not_count_to_are_refused(name: str, stride: str) -> None:
    """On tensors without data, in place of CUDA's."""
    asked = spec(dtype=torch.float32)
    batch = build_batch([Seq(1, 5, 1)])

    def rows(n_elements: int) -> torch.Tensor:
        strides = (n_elements, 64, 1) if stride == "row" else (64, n_elements, 1)
        return torch.empty_strided((batch.n_rows, 2, 64), strides, device="meta")

    query, good = torch.empty(1, 4, 64, device="meta"), rows(sdpa.MAX_STRIDE)
    kernel = sdpa._Sdpa(asked)
    assert kernel(query, SlotKV(good, good, SPAN), batch, None).shape == query.shape
    bad = rows(sdpa.MAX_STRIDE + 1)
    kv = SlotKV(bad, good, SPAN) if name == "keys" else SlotKV(good, bad, SPAN)
    with pytest.raises(UsageError, match=f"{name} have rows .* use the layout per_layer"):
        kernel(query, kv, batch, None)
