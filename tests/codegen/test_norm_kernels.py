"""Norm kernels against the op's evaluation."""

import pytest
import torch

from nemoc.codegen.plan import Site, View
from nemoc.codegen.tvm.norm import emit_rms_norm
from nemoc.ir.dims import B, L
from nemoc.ir.dtypes import DType
from nemoc.ir.ops import RmsNorm
from support.kernels import CompiledSite, KernelSuite, value

F32 = DType.F32
EPS = 1e-5

SUITE = KernelSuite()


def dense(width: int, groups: int, dtype: DType = F32) -> CompiledSite:
    op = RmsNorm(value(dtype, B, L, width), value(dtype, width), EPS, groups)
    return SUITE.add(Site.dense(op), emit_rms_norm)


CASES = {
    "wide": dense(4096, 1),
    "groups": dense(1024, 8),
    "no multiple of a vector": dense(203, 1),
    "odd groups": dense(111, 3),
    "narrower than a vector": dense(5, 1),
    "float64": dense(40, 2, DType.F64),
}

_OP = RmsNorm(value(F32, B, L, 96), value(F32, 96), EPS, 2)
_WEIGHT = View(F32, (96,), (1,))
_SLICE = View(F32, (B, L, 96), (250 * L, 250, 1))
_COLUMNS = View(F32, (B, L, 96), (288 * L, 3, 3 * L))
STRIDED = {
    "a slice of wider rows": Site(_OP, (_SLICE, _WEIGHT), (View.dense(_OP.infer()),)),
    "into a slice": Site(_OP, (_SLICE, _WEIGHT), (_SLICE,)),
    "columns": Site(_OP, (_COLUMNS, _WEIGHT), (View.dense(_OP.infer()),)),
    "strided weight": Site(
        _OP, (_SLICE, View(F32, (96,), (2,))), (View(F32, (B, L, 96), (100, 100 * B, 1)),)
    ),
}
STRIDED_CASES = {name: SUITE.add(site, emit_rms_norm) for name, site in STRIDED.items()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("b", "n"), [(1, 1), (2, 5)])
def test_equals_evaluation(name: str, b: int, n: int) -> None:
    case = CASES[name]
    x, weight = (v.dtype.torch for v in case.site.operands)
    width = case.site.operands[1].shape[0]
    assert isinstance(width, int)
    generator = torch.Generator().manual_seed(width)
    rows = torch.randn(b, n, width, dtype=x, generator=generator) * 3 + 1
    scales = torch.randn(width, dtype=weight, generator=generator)
    case.check({"B": b, "L": n}, rows, scales, tolerance=1e-6)
    case.check({"B": b, "L": n}, rows, scales, tolerance=1e-6, threads=(2,), in_place=True)


@pytest.mark.parametrize("name", STRIDED_CASES)
def test_reads_and_writes_strided_rows(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    rows, scales = torch.randn(2, 3, 96, generator=generator), torch.rand(96, generator=generator)
    STRIDED_CASES[name].check({"B": 2, "L": 3}, rows, scales, tolerance=1e-6)


def test_tiny_and_huge_rows() -> None:
    rows = torch.stack([torch.zeros(203), torch.full((203,), 1e-12), torch.full((203,), 1e15)])
    scales = torch.linspace(-1, 1, 203)
    case = CASES["no multiple of a vector"]
    for row in rows:
        case.check({}, row.expand(1, 1, 203).contiguous(), scales, tolerance=1e-6)
