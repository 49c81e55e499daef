"""Products with weights against float64."""

import re

import pytest
import torch

from nemoc.codegen.plan import LayoutError, Site, View
from nemoc.codegen.tvm.linear import emit_linear
from nemoc.codegen.tvm.target import cpu_target
from nemoc.ir.dims import B, L
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import NemocError
from nemoc.ir.op import Env
from nemoc.ir.ops import GroupedLinear, Interleave, Linear
from support.assembly import kernel_assembly
from support.kernels import CompiledSite, KernelSuite, value

F32, BF16, F16, I32 = DType.F32, DType.BF16, DType.F16, DType.I32
FP8 = DType.F8E4M3
SUITE = KernelSuite()
ROWS = [1, 2, 3, 5, 11, 12, 29, 253]
"""Row counts that need every mix of tile heights, and more than one block of rows."""


def linear_op(features: int, width: int, dtype: DType, block: int) -> Linear:
    """x [B·L, width] by a weight of that type; plain rows if `block` is 1."""
    w = value(dtype, features, width)
    if block > 1:
        w = value(dtype, *Interleave(w, block).infer().shape)
    return Linear(
        value(F32, B * L, width), w, interleave=block, features=features if block > 1 else 0
    )


def grouped_op(groups: int, features: int, width: int, dtype: DType, block: int) -> GroupedLinear:
    """The same with one weight for each of `groups` groups of rows."""
    w = value(dtype, groups, features, width)
    if block > 1:
        w = value(dtype, *Interleave(w, block).infer().shape)
    return GroupedLinear(
        value(F32, B * L, width),
        w,
        value(I32, groups + 1),
        interleave=block,
        features=features if block > 1 else 0,
    )


LINEAR = {
    "bf16": SUITE.add(Site.dense(linear_op(64, 96, BF16, 32)), emit_linear),
    "f32": SUITE.add(Site.dense(linear_op(64, 96, F32, 32)), emit_linear),
    "ragged": SUITE.add(Site.dense(linear_op(33, 37, BF16, 32)), emit_linear),
    "one feature": SUITE.add(Site.dense(linear_op(1, 5, F16, 32)), emit_linear),
    "wide panels": SUITE.add(Site.dense(linear_op(100, 50, BF16, 64)), emit_linear),
    "narrow panels": SUITE.add(Site.dense(linear_op(100, 50, F32, 16)), emit_linear),
    "plain": SUITE.add(Site.dense(linear_op(35, 45, BF16, 1)), emit_linear),
    "fp8": SUITE.add(Site.dense(linear_op(70, 37, FP8, 32)), emit_linear),
    "fp8, panels too large for the stack": SUITE.add(
        Site.dense(linear_op(5, 2100, FP8, 256)), emit_linear
    ),
    "fp8, plain": SUITE.add(Site.dense(linear_op(35, 45, FP8, 1)), emit_linear),
}
GROUPED = {
    "bf16": SUITE.add(Site.dense(grouped_op(6, 64, 40, BF16, 32)), emit_linear),
    "ragged": SUITE.add(Site.dense(grouped_op(130, 33, 37, BF16, 32)), emit_linear),
    "many panels": SUITE.add(Site.dense(grouped_op(3, 2100, 24, F32, 32)), emit_linear),
    "plain": SUITE.add(Site.dense(grouped_op(6, 35, 45, BF16, 1)), emit_linear),
    "fp8": SUITE.add(Site.dense(grouped_op(6, 33, 40, FP8, 32)), emit_linear),
}

_SLICE = linear_op(70, 24, BF16, 32)
_STRIDED = Linear(value(F32, B, L, 24), _SLICE.w, interleave=32, features=70)
STRIDED = SUITE.add(
    Site(
        _STRIDED,
        (View(F32, (B, L, 24), (61 * L, 61, 1)), View.dense(_SLICE.w.type)),
        (View.dense(_STRIDED.infer()),),
    ),
    emit_linear,
)


_AVX2 = cpu_target("cpu:x86-64-v3")
_LACKING = {"avx2", "fma"} - set(cpu_target().features)
AVX2_SUITE = KernelSuite(_AVX2)
AVX2 = {
    "linear": AVX2_SUITE.add(Site.dense(linear_op(70, 37, BF16, 32)), emit_linear),
    "plain": AVX2_SUITE.add(Site.dense(linear_op(35, 45, F32, 1)), emit_linear),
}


def _weight(case: CompiledSite, generator: torch.Generator) -> torch.Tensor:
    """A random weight; rows that only fill up the last panel are zero, as `interleave` leaves them.

    FP8 has numbers of every magnitude, denormal ones too.
    """
    op = case.site.op
    assert isinstance(op, Linear | GroupedLinear)
    w = case.site.view(case.site.arg("w"))
    shape = [int(n) for n in w.shape]
    if op.interleave == 1:
        return torch.randn(shape, generator=generator).to(w.dtype.torch)
    *lead, _, width, block = shape
    rows = torch.randn([*lead, op.features, width], generator=generator)
    if w.dtype is FP8:
        rows *= torch.exp2(torch.randint(-9, 7, rows.shape, generator=generator))
    rows = rows.to(w.dtype.torch)
    return Interleave(value(w.dtype, *rows.shape), block).evaluate(Env({}), rows)


@pytest.mark.parametrize("name", LINEAR)
def test_linear_for_every_number_of_rows(name: str) -> None:
    case = LINEAR[name]
    generator = torch.Generator().manual_seed(len(name))
    width = int(case.site.operands[0].shape[1])
    w = _weight(case, generator)
    for rows in ROWS:
        x = torch.randn(rows, width, generator=generator)
        case.check({"B": 1, "L": rows}, x, w, tolerance=2e-6)


@pytest.mark.skipif(bool(_LACKING), reason="this machine has no AVX2")
@pytest.mark.parametrize("name", AVX2)
def test_linear_for_older_cpus(name: str) -> None:
    generator = torch.Generator().manual_seed(2)
    w = _weight(AVX2[name], generator)
    for rows in ROWS:
        x = torch.randn(rows, int(AVX2[name].site.operands[0].shape[1]), generator=generator)
        AVX2[name].check({"B": 1, "L": rows}, x, w, tolerance=2e-6)


def test_linear_reads_slices_of_wider_rows() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 7, 24, generator=generator)
    STRIDED.check({"B": 2, "L": 7}, x, _weight(STRIDED, generator), tolerance=1e-6)


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("rows", [1, 6, 40, 300])
def test_grouped_linear_for_uneven_groups(name: str, rows: int) -> None:
    case = GROUPED[name]
    generator = torch.Generator().manual_seed(rows)
    groups = int(case.site.operands[1].shape[0])
    # the first group and the last get no rows
    index = torch.randint(1, max(groups - 1, 2), (rows,), generator=generator)
    counts = torch.bincount(index, minlength=groups)
    offsets = torch.cat([torch.zeros(1), counts.cumsum(0)]).int()
    x = torch.randn(rows, int(case.site.operands[0].shape[1]), generator=generator)
    case.check({"B": 1, "L": rows}, x, _weight(case, generator), offsets, tolerance=1e-6)


def test_grouped_linear_does_not_touch_weights_of_empty_groups() -> None:
    case = GROUPED["bf16"]
    generator = torch.Generator().manual_seed(0)
    w = _weight(case, generator)
    w[[0, 2, 3, 5]] = float("nan")
    offsets = torch.tensor([0, 0, 4, 4, 4, 9, 9], dtype=torch.int32)
    x = torch.randn(9, 40, generator=generator)
    (y,) = case.run({"B": 1, "L": 9}, x, w, offsets)
    assert bool(y.isfinite().all())


def _assembly(cpu: str) -> str:
    """The code of a product whose rows fill the highest tile only."""
    target = cpu_target(f"cpu:{cpu}")
    (stage,) = emit_linear(Site.dense(linear_op(64, 256, BF16, 32)), target).stages
    return kernel_assembly(stage, target)


@pytest.mark.parametrize(("cpu", "register"), [("x86-64-v4", "zmm"), ("x86-64-v3", "ymm")])
def test_inner_loops_are_vector_fmas_that_spill_nothing(cpu: str, register: str) -> None:
    assembly = _assembly(cpu)
    fmas = re.findall(rf"vfmadd\d+ps.*%{register}\d+$", assembly, re.MULTILINE)
    assert len(fmas) >= 24
    assert not re.findall(r"vfmadd\d+ss", assembly)
    spills = re.findall(rf"%{register}\d+, -?\d*\(%r[sb]p\)", assembly)
    assert not spills


def test_other_architectures_get_vector_code_too() -> None:
    assembly = _assembly("apple-m1")
    assert len(re.findall(r"fmla\.4s|fmla\s+v\d+\.4s", assembly)) >= 24


def test_source_is_deterministic() -> None:
    site = Site.dense(linear_op(64, 96, BF16, 32))
    assert emit_linear(site, SUITE.target) == emit_linear(site, SUITE.target)


def test_refuses_other_types_by_name() -> None:
    op = Linear(value(DType.F64, 3, 4), value(DType.F64, 5, 4), DType.F64)
    with pytest.raises(NemocError, match="no linear of f64 by f64 in f64"):
        emit_linear(Site.dense(op), SUITE.target)


def test_refuses_rows_without_a_common_stride() -> None:
    x = View(F32, (B, L, 24), (24, 24 * B + 1, 1))
    with pytest.raises(LayoutError, match="no common stride"):
        emit_linear(
            Site(_STRIDED, (x, STRIDED.site.operands[1]), STRIDED.site.results), SUITE.target
        )
