"""Rearranged weights compute the same, and the model is given back as it was."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.hf.architectures import build_model
from vmem_kv.engine.packed_weights import PackedLinear, _rounded_up, is_available, pack

from .harness import engine_on


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_rows", [0, 1, 3, 16, 17, 50, 64, 100])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_same_up_to_rounding(dtype: torch.dtype, n_rows: int, has_bias: bool) -> None:
    assert is_available()
    torch.manual_seed(0)
    linear = torch.nn.Linear(48, 80, bias=has_bias, dtype=dtype)
    states = torch.randn(2, n_rows, 48, dtype=dtype).transpose(0, 1)
    with torch.inference_mode():
        expected = linear(states)
        packed = PackedLinear.of(linear)(states)
    assert packed.shape == expected.shape
    torch.testing.assert_close(packed, expected, atol=1e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2)


def test_few_different_numbers_of_rows_are_computed() -> None:
    """oneDNN keeps a program, and memory, for each of them."""
    numbers = [_rounded_up(n) for n in range(513)]
    assert len(set(numbers)) == 17 + 5 * 8
    assert numbers[:17] == list(range(17))
    assert all(n <= padded <= 1.125 * n for n, padded in enumerate(numbers))


def test_every_linear_layer_is_exchanged_and_put_back() -> None:
    model = copy.deepcopy(build_model("llama"))
    before = dict(model.named_modules())
    parameters = {name: p.data_ptr() for name, p in model.named_parameters()}
    undo = pack(model)
    kinds = {type(m) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    assert kinds == {PackedLinear}
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == parameters
    undo()
    undo()
    assert all(module is before[name] for name, module in model.named_modules())


def test_layers_that_somebody_watches_or_made_his_own_are_left_alone() -> None:
    class Own(torch.nn.Linear):
        pass

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), Own(4, 4), torch.nn.Linear(4, 4).double())
    model[0].register_forward_hook(lambda *_: None)
    pack(model)
    assert not any(isinstance(module, PackedLinear) for module in model)


def test_a_layer_in_two_places_is_packed_once() -> None:
    shared = torch.nn.Linear(4, 4)
    model = torch.nn.Sequential(shared, torch.nn.ReLU())
    model.also = shared
    pack(model)
    assert model[0] is model.also
    assert isinstance(model.also, PackedLinear)


@pytest.mark.parametrize("is_packed", [True, False])
def test_the_engine_packs_as_it_is_told(is_packed: bool) -> None:
    with engine_on(pack_weights=is_packed) as engine:
        model = engine.route._model  # type: ignore[attr-defined]
        assert any(isinstance(m, PackedLinear) for m in model.modules()) is is_packed
    assert not any(isinstance(m, PackedLinear) for m in model.modules())
