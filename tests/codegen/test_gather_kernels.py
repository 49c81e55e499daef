"""Gather kernels against the ops' evaluation, bit for bit."""

import pytest
import torch

from nemoc.codegen.plan import Site, View
from nemoc.codegen.tvm.gather import emit_take_along, emit_take_last, emit_take_rows
from nemoc.ir.dims import B, L
from nemoc.ir.dtypes import DType
from nemoc.ir.ops import TakeAlong, TakeLast, TakeRows
from support.kernels import CompiledSite, KernelSuite, value

BF16, F32, I32, I64, U8 = DType.BF16, DType.F32, DType.I32, DType.I64, DType.U8

SUITE = KernelSuite()


def values(view: View, *shape: int) -> torch.Tensor:
    """Random bits of an element type: NaNs with payloads included."""
    generator = torch.Generator().manual_seed(len(shape))
    count = int(torch.Size(shape).numel()) * view.dtype.bytes
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    return raw.view(view.dtype.torch).view(shape)


def picks(bound: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bound)
    return torch.randint(0, bound, shape, dtype=dtype, generator=generator)


def rows(dtype: DType, *shape: int, index: DType = I64) -> CompiledSite:
    op = TakeRows(value(dtype, 37, *shape), value(index, B, L))
    return SUITE.add(Site.dense(op), emit_take_rows)


ROWS = {
    "bf16": rows(BF16, 200),
    "f32 wide": rows(F32, 2050, index=I32),
    "two axes": rows(F32, 3, 5),
    "elements": rows(I32),
    "bytes": rows(U8, 7),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(("b", "n"), [(1, 1), (2, 9), (3, 700)])
def test_takes_rows(name: str, b: int, n: int) -> None:
    case = ROWS[name]
    table, index = case.site.operands
    tail = [int(d) for d in table.shape[1:]]
    chosen = picks(37, b, n, dtype=index.dtype.torch)
    case.check({"B": b, "L": n}, values(table, 37, *tail), chosen, threads=(2,))
    if n == 9:
        case.check({"B": b, "L": n}, values(table, 37, *tail), chosen, threads=(1,))


_ROWS = TakeRows(value(F32, 37, 4, 20), value(I32, L, B))
_STRIDED = SUITE.add(
    Site(
        _ROWS,
        (View(F32, (37, 4, 20), (1, 1200, 40)), View(I32, (L, B), (1, L))),
        (View(F32, (L, B, 4, 20), (100, 100 * L, 25, 1)),),
    ),
    emit_take_rows,
)
_ALL_ROWS = SUITE.add(
    Site.dense(TakeRows(value(F32, B * L, 24), value(I32, 3 * B * L))), emit_take_rows
)
_ONE_ROW = SUITE.add(Site.dense(TakeRows(value(BF16, B, 33), value(I64))), emit_take_rows)


def test_takes_rows_of_strided_tensors() -> None:
    table = values(_STRIDED.site.operands[0], 37, 4, 20)
    _STRIDED.check({"B": 3, "L": 5}, table, picks(37, 5, 3))


def test_takes_rows_of_a_symbolic_table() -> None:
    for b, n in ((1, 1), (2, 30)):
        table = values(_ALL_ROWS.site.operands[0], b * n, 24)
        _ALL_ROWS.check({"B": b, "L": n}, table, picks(b * n, 3 * b * n))


def test_takes_one_row_by_a_scalar() -> None:
    table = values(_ONE_ROW.site.operands[0], 5, 33)
    _ONE_ROW.check({"B": 5}, table, torch.tensor(3))


_ALONG = {
    "experts": SUITE.add(
        Site.dense(TakeAlong(value(F32, B * L, 128), value(I32, B * L, 6))), emit_take_along
    ),
    "wide bf16": SUITE.add(
        Site.dense(TakeAlong(value(BF16, B * L, 128), value(I64, B * L, 300))), emit_take_along
    ),
    "strided": SUITE.add(
        Site(
            TakeAlong(value(F32, B * L, 128), value(I32, B * L, 6)),
            (View(F32, (B * L, 128), (1, B * L)), View(I32, (B * L, 6), (8, 1))),
            (View(F32, (B * L, 6), (1, B * L)),),
        ),
        emit_take_along,
    ),
}


@pytest.mark.parametrize("name", _ALONG)
@pytest.mark.parametrize(("b", "n"), [(1, 1), (2, 101)])
def test_takes_along_the_last_axis(name: str, b: int, n: int) -> None:
    case = _ALONG[name]
    x, index = case.site.operands
    k = int(index.shape[1])
    chosen = picks(128, b * n, k, dtype=index.dtype.torch)
    finite = values(x, b * n, 128).nan_to_num()  # torch.gather may change the bits of a NaN
    case.check({"B": b, "L": n}, finite, chosen)


_VECTOR = SUITE.add(Site.dense(TakeAlong(value(I32, 50), value(I32, L))), emit_take_along)


def test_takes_along_a_vector() -> None:
    _VECTOR.check({"L": 600}, values(_VECTOR.site.operands[0], 50), picks(50, 600))


_LAST = TakeLast(value(BF16, B, L, 1100), value(I32, B))
LAST = {
    "dense": SUITE.add(Site.dense(_LAST), emit_take_last),
    "strided": SUITE.add(
        Site(
            _LAST,
            (View(BF16, (B, L, 1100), (1200, 1200 * B, 1)), View(I32, (B,), (3,))),
            (View(BF16, (B, 1100), (1, B)),),
        ),
        emit_take_last,
    ),
}


@pytest.mark.parametrize("name", LAST)
def test_takes_the_last_valid_token(name: str) -> None:
    case = LAST[name]
    x = values(case.site.operands[0], 4, 6, 1100)
    case.check({"B": 4, "L": 6}, x, torch.tensor([6, 1, 0, 3], dtype=torch.int32))
    case.check({"B": 1, "L": 1}, x[:1, :1], torch.tensor([1], dtype=torch.int32))
