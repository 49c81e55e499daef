"""Views of views."""

import pytest
import torch

from nemoc.codegen.plan import View
from nemoc.codegen.views import apply_view, reshape_view
from nemoc.ir.dims import B, Dim, L
from nemoc.ir.dtypes import DType
from nemoc.ir.ops import Permute, Relu, Reshape, Slice
from nemoc.ir.types import TensorType
from support.kernels import value

F32 = DType.F32


def dense(*shape: Dim) -> View:
    return View.dense(TensorType.of(F32, shape))


def test_symbolic_axes_merge_and_split() -> None:
    x = dense(B, L, 12)
    flat = reshape_view(x, (B * L, 12))
    assert flat == dense(B * L, 12)
    assert flat is not None
    assert reshape_view(flat, (B, L, 3, 4)) == dense(B, L, 3, 4)


def test_rows_of_a_slice_stay_a_view() -> None:
    part = View(F32, (B, L, 6), (20 * L, 20, 1))
    assert reshape_view(part, (B * L, 2, 3)) == View(F32, (B * L, 2, 3), (20, 3, 1))
    assert reshape_view(part, (6 * B * L,)) is None


def test_axes_of_size_one_come_and_go() -> None:
    part = View(F32, (B, 1, 6), (20, 20, 1))
    assert reshape_view(part, (B, 6)) == View(F32, (B, 6), (20, 1))
    assert reshape_view(part, (1, B, 6, 1)) == View(F32, (1, B, 6, 1), (1, 20, 1, 1))


@pytest.mark.parametrize("seed", range(30))
def test_agrees_with_torch(seed: int) -> None:
    """Where torch can view, so can we, with equal elements; where it cannot, neither do we."""
    generator = torch.Generator().manual_seed(seed)

    def pick(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    shape = [1 + pick(4) for _ in range(3)]
    base = torch.arange(1000).reshape(10, 10, 10)[: shape[0], : shape[1], : shape[2]]
    base = base.permute(*torch.randperm(3, generator=generator).tolist())
    count = base.numel()
    divisors = [d for d in range(1, count + 1) if count % d == 0]
    first = divisors[pick(len(divisors))]
    wanted = (first, count // first)
    ours = reshape_view(View(DType.I64, tuple(base.shape), base.stride()), wanted)
    try:
        expected = base.view(wanted)
    except RuntimeError:
        assert ours is None
        return
    assert ours is not None
    strides = [int(s) for s in ours.strides]
    assert torch.equal(torch.as_strided(base, wanted, strides), expected)


def test_permute_and_slice() -> None:
    view = dense(B, 5, 7)
    permuted = apply_view(Permute(value(F32, B, 5, 7), (2, 0, 1)), view)
    assert permuted == (View(F32, (7, B, 5), (1, 35, 7)), 0)
    sliced = apply_view(Slice(value(F32, B, 5, 7), 1, 2, 4), view)
    assert sliced == (View(F32, (B, 2, 7), (35, 7, 1)), 2 * 7 * 4)


def test_other_ops_are_no_views() -> None:
    assert apply_view(Relu(value(F32, 3)), dense(3)) is None


def test_reshape_of_a_permuted_matrix_needs_a_copy() -> None:
    op = Reshape(value(F32, 3, 4), (12,))
    assert apply_view(op, View(F32, (3, 4), (1, 3))) is None


def test_view_reports_density_and_span() -> None:
    assert dense(B, L, 3).is_dense
    assert View(F32, (B, 1, 6), (6, 99, 1)).is_dense
    assert not View(F32, (B, 6), (20, 1)).is_dense
    assert View(F32, (3, 6), (20, 1)).span == (2 * 20 + 5 + 1) * 4
    assert dense().span == 4
