"""Rounding activations to int8."""

import pytest
import torch

from nemoc.ir.dtypes import DType
from nemoc.ir.op import Env
from nemoc.ir.ops import RoundToInt8
from nemoc.ir.types import TensorType, Value

ENV = Env({})


def rounded(x: torch.Tensor, block: int = 16) -> torch.Tensor:
    return RoundToInt8(Value("x", TensorType.of(DType.F32, tuple(x.shape))), block).evaluate(ENV, x)


def test_numbers_become_the_nearest_multiples_of_their_blocks_step() -> None:
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(0))
    step = x.unflatten(-1, (3, 16)).abs().amax(-1, keepdim=True) / 127
    y = rounded(x)
    multiples = y.unflatten(-1, (3, 16)) / step
    assert (multiples - multiples.round()).abs().max() < 1e-4
    assert multiples.abs().amax(-1).allclose(torch.tensor(127.0))
    error = (y - x).unflatten(-1, (3, 16)).abs()
    assert bool((error <= step * 0.5001).all())


def test_error_on_normally_distributed_numbers_is_as_stated() -> None:
    x = torch.randn(200, 160, generator=torch.Generator().manual_seed(1))
    assert 0.0045 < (rounded(x) - x).norm() / x.norm() < 0.005


def test_rounding_again_changes_nothing() -> None:
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(2))
    once = rounded(x)
    assert torch.equal(rounded(once), once)


def test_halves_go_to_the_even_multiple() -> None:
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5])
    assert rounded(x, 8).tolist() == [127.0, 0.0, 2.0, 2.0, 0.0, -2.0, -2.0, 126.0]


def test_blocks_too_small_to_divide_by_become_zeros() -> None:
    x = torch.tensor([[1e-40] * 4 + [0.0] * 4 + [1.0] * 4])
    assert rounded(x, 4).tolist() == [[0.0] * 8 + [1.0] * 4]


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_what_is_no_number_spoils_its_block_and_no_other(special: float) -> None:
    x = torch.ones(1, 32)
    x[0, 3] = special
    y = rounded(x)
    assert bool(y[0, 3].isnan())
    assert bool((y[0, 16:] == 1).all())


def test_float64_evaluation_gives_the_same_numbers() -> None:
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    op = RoundToInt8(Value("x", TensorType.of(DType.F32, (5, 32))))
    wide = op.evaluate(Env({}, float64=True), x.double())
    assert wide.dtype is torch.float64
    assert torch.equal(wide, rounded(x).double())
