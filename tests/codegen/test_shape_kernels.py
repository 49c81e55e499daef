"""Kernels that move or sum elements, against the ops' evaluation."""

import pytest
import torch

from nemoc.codegen.plan import Site, View
from nemoc.codegen.tvm.shape import (
    emit_concat,
    emit_full,
    emit_sum,
    emit_view,
)
from nemoc.ir.dims import B, Dim, L, evaluate_dim
from nemoc.ir.dtypes import DType
from nemoc.ir.ops import Concat, Full, Permute, Reshape, Slice, Sum
from support.kernels import CompiledSite, KernelSuite, value

BF16, F32, F64, I32, I64 = DType.BF16, DType.F32, DType.F64, DType.I32, DType.I64
SIZES = ({"B": 1, "L": 1}, {"B": 2, "L": 7}, {"B": 3, "L": 130})

SUITE = KernelSuite()


def check(case: CompiledSite, sizes: dict[str, int], tolerance: float = 0.0) -> None:
    """Check a case on random operands."""
    generator = torch.Generator().manual_seed(3)
    operands = []
    for view in case.site.operands:
        shape = [evaluate_dim(d, sizes) for d in view.shape]
        once = [1 if s == 0 else n for n, s in zip(shape, view.strides, strict=True)]
        random = (torch.randn(once, generator=generator) * 100).to(view.dtype.torch)
        operands.append(random.expand(shape))
    case.check(sizes, *operands, tolerance=tolerance)


def strided(dtype: DType, shape: tuple[Dim, ...], *strides: Dim) -> View:
    return View(dtype, shape, strides)


_SPLIT = Reshape(value(F32, B * L, 24), (B, L, 4, 6))
_WIDE_ROWS = strided(F32, (B * L, 24), 30, 1)
_SWAP = Permute(value(BF16, B, L, 4, 40), (2, 0, 1, 3))
_TRANSPOSE = Permute(value(F32, L, 33), (1, 0))
_MIDDLE = Slice(value(I64, B, 9, L), 1, 3, 5)

COPIES = {
    "reshape to dense": SUITE.add(
        Site(_SPLIT, (_WIDE_ROWS,), (View.dense(_SPLIT.infer()),)), emit_view
    ),
    "reshape from dense": SUITE.add(
        Site(
            _SPLIT,
            (strided(F32, (B * L, 24), 24, 1),),
            (strided(F32, (B, L, 4, 6), 40, 40 * B, 10, 1),),
        ),
        emit_view,
    ),
    "reshape of strided": SUITE.add(
        Site(_SPLIT, (_WIDE_ROWS,), (strided(F32, (B, L, 4, 6), 40, 40 * B, 1, 4),)), emit_view
    ),
    "permute": SUITE.add(Site.dense(_SWAP), emit_view),
    "transpose": SUITE.add(Site.dense(_TRANSPOSE), emit_view),
    "slice": SUITE.add(Site.dense(_MIDDLE), emit_view),
}


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_copies(name: str, sizes: dict[str, int]) -> None:
    check(COPIES[name], sizes)


def joined(axis: int, *parts: tuple[Dim, ...], dtype: DType = F32) -> Concat:
    return Concat(tuple(value(dtype, *shape) for shape in parts), axis)


_LAST = joined(2, (B, L, 20), (B, L, 3), (B, L, 17))
CONCATS = {
    "last axis": SUITE.add(Site.dense(_LAST), emit_concat),
    "first axis": SUITE.add(Site.dense(joined(0, (B, 50), (L, 50), dtype=BF16)), emit_concat),
    "symbolic middle axis": SUITE.add(
        Site.dense(joined(1, (B, 3, 8), (B, L, 8), dtype=I32)), emit_concat
    ),
    "one operand": SUITE.add(Site.dense(joined(0, (B, L))), emit_concat),
    "strided": SUITE.add(
        Site(
            _LAST,
            (
                strided(F32, (B, L, 20), 20, 20 * B, 1),
                strided(F32, (B, L, 3), 3 * L, 3, 0),
                strided(F32, (B, L, 17), 17 * L, 1, L),
            ),
            (strided(F32, (B, L, 40), 64 * L, 64, 1),),
        ),
        emit_concat,
    ),
}


@pytest.mark.parametrize("name", CONCATS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_concatenates(name: str, sizes: dict[str, int]) -> None:
    check(CONCATS[name], sizes)


FULLS = {
    "float": SUITE.add(Site.dense(Full(-2.5, F32, (B, L))), emit_full),
    "infinite": SUITE.add(Site.dense(Full(float("-inf"), F32, (L,))), emit_full),
    "rounded": SUITE.add(Site.dense(Full(0.1, BF16, (B, 5))), emit_full),
    "integer": SUITE.add(Site.dense(Full(-7.0, I64, (B, L, 3))), emit_full),
    "boolean": SUITE.add(Site.dense(Full(1.0, DType.BOOL, (L,))), emit_full),
    "float64": SUITE.add(Site.dense(Full(0.1, F64, (L,))), emit_full),
    "scalar": SUITE.add(Site.dense(Full(3.0, I32)), emit_full),
    "strided": SUITE.add(
        Site(Full(1.0, F32, (B, L)), (), (strided(F32, (B, L), 2, 2 * B + 1),)), emit_full
    ),
}


@pytest.mark.parametrize("name", FULLS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_fills(name: str, sizes: dict[str, int]) -> None:
    check(FULLS[name], sizes)


_SLOTS = Sum(value(F32, B * L, 6, 70), 1)
SUMS = {
    "slots of a token": SUITE.add(Site.dense(_SLOTS), emit_sum),
    "short rows": SUITE.add(Site.dense(Sum(value(F32, B * L, 6), 1)), emit_sum),
    "long rows": SUITE.add(Site.dense(Sum(value(F32, B, L, 1000), 2)), emit_sum),
    "symbolic rows": SUITE.add(Site.dense(Sum(value(F32, B, L), 1)), emit_sum),
    "symbolic columns": SUITE.add(Site.dense(Sum(value(F32, B, L), 0)), emit_sum),
    "everything": SUITE.add(Site.dense(Sum(value(F32, L), 0)), emit_sum),
    "float64": SUITE.add(Site.dense(Sum(value(F64, B, L, 9), 2)), emit_sum),
    "strided": SUITE.add(
        Site(
            _SLOTS,
            (strided(F32, (B * L, 6, 70), 1, 70 * B * L, B * L),),
            (strided(F32, (B * L, 70), 80, 1),),
        ),
        emit_sum,
    ),
}


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sums(name: str, sizes: dict[str, int]) -> None:
    check(SUMS[name], sizes, tolerance=1e-6)
