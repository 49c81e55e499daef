"""Element-wise kernels against the ops' evaluation."""

import pytest
import torch

from nemoc.codegen.plan import Site, View
from nemoc.codegen.tvm.elementwise import emit_elementwise
from nemoc.codegen.tvm.target import cpu_target
from nemoc.codegen.views import merge_axes
from nemoc.ir.dims import B, L
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import NemocError
from nemoc.ir.op import Env, Op
from nemoc.ir.ops import (
    Add,
    Cast,
    Div,
    Exp,
    FloorDiv,
    Gelu,
    Mul,
    Relu,
    Scale,
    Shift,
    Sigmoid,
    Silu,
    Softplus,
    Square,
    Sub,
    Tanh,
)
from support.kernels import KernelSuite, value

F32, BF16, I32 = DType.F32, DType.BF16, DType.I32
SUITE = KernelSuite()


FUNCTIONS: dict[str, tuple[Op, float]] = {
    "exp": (Exp(value(F32, B, L, 203)), 2.0),
    "sigmoid": (Sigmoid(value(F32, B, L, 203)), 4.0),
    "silu": (Silu(value(F32, B, L, 203)), 4.0),
    "tanh": (Tanh(value(F32, B, L, 203)), 4.0),
    "softplus": (Softplus(value(F32, B, L, 203)), 4.0),
    "relu": (Relu(value(F32, B, L, 203)), 0.0),
    "square": (Square(value(F32, B, L, 203)), 0.5),
    "scale": (Scale(value(F32, B, L, 203), 0.1), 2.0),
    "shift": (Shift(value(F32, B, L, 203), 1e-20), 1.0),
}
"""Ops with the largest error allowed, in units in the last place of float32."""
FUNCTION_CASES = {
    name: SUITE.add(Site.dense(op), emit_elementwise) for name, (op, _) in FUNCTIONS.items()
}
GELUS = {
    tanh: SUITE.add(Site.dense(Gelu(value(F32, B, 77), tanh)), emit_elementwise)
    for tanh in (False, True)
}
CASTS = {
    (a, b): SUITE.add(Site.dense(Cast(value(a, L, 37), b)), emit_elementwise)
    for a, b in (
        (F32, BF16),
        (BF16, F32),
        (F32, DType.F16),
        (DType.F16, F32),
        (F32, I32),
        (I32, F32),
        (I32, DType.I64),
        (F32, DType.F64),
        (I32, DType.BOOL),
        (BF16, BF16),
    )
}
_WIDE = View(F32, (B, L, 40), (100 * L, 100, 1))
BINARY = {
    "add": Site.dense(Add(value(F32, B, L, 40), value(F32, B, L, 40))),
    "row": Site.dense(Mul(value(F32, B, L, 40), value(F32, 40))),
    "column": Site.dense(Div(value(F32, B, L, 40), value(F32, B, L, 1))),
    "scalar": Site.dense(Sub(value(F32), value(F32, B, L))),
    "integers": Site.dense(Add(value(I32, B), value(I32, B))),
    "slices": Site(
        Add(value(F32, B, L, 40), value(F32, B, L, 40)),
        (_WIDE, View(F32, (B, L, 40), (1, B, B * L))),
        (View.dense(value(F32, B, L, 40).type),),
    ),
}
BINARY_CASES = {name: SUITE.add(site, emit_elementwise) for name, site in BINARY.items()}
SLOTS = SUITE.add(Site.dense(FloorDiv(value(I32, 3 * L), 3)), emit_elementwise)

SPECIAL = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 88.7, -87.3, 1e-30])


def _inputs(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(*shape, generator=generator)
    scales = torch.logspace(-6, 1.6, rows.numel()).reshape(shape)
    rows = rows * scales
    rows.view(-1)[: len(SPECIAL)] = SPECIAL
    return rows


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_right_to_a_few_units_in_the_last_place(name: str) -> None:
    op, bound = FUNCTIONS[name]
    rows = _inputs(2, 9, 203)
    (found,) = FUNCTION_CASES[name].run({"B": 2, "L": 9}, rows)
    exact = op.evaluate(Env({}, float64=True), rows.double())
    assert torch.equal(found.isnan(), exact.isnan())
    # results so small that float32 holds them as denormal numbers have no full last place
    normal = exact.abs().float().isfinite() & (exact.abs() > 1e-36)
    size = exact.abs().float()
    unit = (torch.nextafter(size, torch.tensor(float("inf"))) - size).double()
    assert float(((found - exact).abs() / unit)[normal].max()) <= bound
    assert torch.allclose(found[~normal].double(), exact[~normal], atol=1e-36, equal_nan=True)


@pytest.mark.parametrize("tanh", [False, True])
def test_gelu_is_right_to_float32(tanh: bool) -> None:
    rows = _inputs(3, 77)
    (found,) = GELUS[tanh].run({"B": 3}, rows)
    exact = GELUS[tanh].site.op.evaluate(Env({}, float64=True), rows.double())
    assert torch.allclose(found.double(), exact, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("pair", CASTS, ids=str)
def test_casts_have_torchs_bits(pair: tuple[DType, DType]) -> None:
    case = CASTS[pair]
    rows = _inputs(3, 37).nan_to_num(0.5, 3e4, -3e4) * 3
    case.check({"L": 3}, rows.to(pair[0].torch))


def test_cast_to_bf16_keeps_nan() -> None:
    rows = torch.full((1, 37), float("nan"))
    (found,) = CASTS[F32, BF16].run({"L": 1}, rows)
    assert bool(found.isnan().all())


@pytest.mark.parametrize("name", BINARY)
def test_binary_ops_broadcast(name: str) -> None:
    case = BINARY_CASES[name]
    generator = torch.Generator().manual_seed(3)
    sizes = {"B": 3, "L": 5}
    operands = []
    for view in case.site.operands:
        shape = [sizes.get(str(n), 0) or int(n) for n in view.shape]
        if view.dtype == I32:
            operands.append(torch.randint(-9, 9, shape, generator=generator, dtype=torch.int32))
        else:
            operands.append(torch.randn(shape, generator=generator) + 2)
    case.check(sizes, *operands)
    if case.plan.in_place:
        case.check(sizes, *operands, in_place=True)


def test_floor_div_of_slots() -> None:
    SLOTS.check({"L": 40}, torch.arange(-60, 60, dtype=torch.int32))


def test_neighbouring_axes_merge_where_every_view_allows_it() -> None:
    a = View(F32, (B, L, 8), (8 * L, 8, 1))
    row = View(F32, (B, L, 8), (0, 0, 1))
    assert [v.shape for v in merge_axes([a, a])] == [(8 * B * L,)] * 2
    assert [v.strides for v in merge_axes([a, row])] == [(8, 1), (0, 1)]


def test_functions_of_other_types_are_refused_by_name() -> None:
    op = Exp(value(DType.F64, 3))
    with pytest.raises(NemocError, match="no exp of f64, expected f32"):
        emit_elementwise(Site.dense(op), cpu_target())
