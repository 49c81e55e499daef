"""Element-wise ops with broadcasting: one skeleton, and a table of what each op does to one vector.

The axes of all views are merged as far as their strides allow; a task covers up to `BLOCK` elements of the
last merged axis, with vectors where every view is contiguous or constant along it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nemoc.codegen.plan import Arg, Plan, Site, Stage, View
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.codegen.tvm.vmath import VectorMath
from nemoc.codegen.tvm.writer import COMPUTE_NAMES, KernelWriter, lanes_of, size_text, tir_name
from nemoc.codegen.views import merge_axes
from nemoc.ir.dims import Dim, ceil_div, product
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import NemocError
from nemoc.ir.op import Op
from nemoc.ir.ops import elementwise as ops

BLOCK = 1024
"""Elements of one task: large enough to hide a call, small enough to balance one row of a decode step."""

Formula = Callable[[VectorMath, Site, Sequence[str]], str]
"""Writes an op on loaded operands, each a name, and returns the result as an expression."""


def emit_elementwise(site: Site, target: CpuTarget) -> Plan:
    """The plan of an op that `FORMULAS` lists: one launch, which may run in place.

    Raises:
        NemocError: the op is for f32 only and the operands are not.
    """
    if not has_formula(site.op):
        raise NemocError(
            f"the cpu target has no {site.op.mnemonic()} of {site.operands[0].dtype}, expected f32"
        )
    stem = site.op.mnemonic()
    formula = FORMULAS[type(site.op)]
    result = site.results[0]
    same = tuple((0, i) for i, view in enumerate(site.operands) if view == result)
    stage = map_elements(stem, formula, site, target)
    return Plan((stage,), in_place=same)


def has_formula(op: Op) -> bool:
    """Whether `FORMULAS` holds for an op on operands of these types."""
    if isinstance(op, _ANY_TYPE):
        return True
    return type(op) in FORMULAS and all(v.dtype == DType.F32 for v in op.operands())


def map_elements(stem: str, formula: Formula, site: Site, target: CpuTarget) -> Stage:
    """The launch that applies a formula to every element of the result."""
    result = site.results[0]
    args = [*(Arg("operand", i) for i in range(len(site.operands))), Arg("result", 0)]
    views = merge_axes([*(v.broadcast(result.shape) for v in site.operands), result])
    *outer, inner = views[0].shape or (1,)
    blocks = ceil_div(inner, BLOCK)
    writer = KernelWriter(stem)
    names = [
        writer.buffer("y" if a.kind == "result" else f"x{a.index}", a, v)
        for a, v in zip(args, views, strict=True)
    ]
    row = writer.let("row", f"task // {size_text(blocks)}")
    start = writer.let("start", f"task % {size_text(blocks)} * {BLOCK}")
    lead = unflatten(writer, row, outer)
    body = _Body(writer, formula, site, names, views, lead)
    lanes = target.lanes if all(v.strides[-1] in (0, 1) for v in views) else 1
    count = writer.let("count", f"T.min({BLOCK}, {size_text(inner)} - {start})")
    whole = "0"
    if lanes > 1:
        whole = writer.let("whole", f"{count} // {lanes} * {lanes}")
        with writer.loop("k", f"{count} // {lanes}") as k:
            body.write(f"{start} + {k} * {lanes}", lanes)
    if lanes == 1 or not isinstance(inner, int) or inner % lanes:
        with writer.loop("k", f"{count} - {whole}") as k:
            body.write(f"{start} + {whole} + {k}", 1)
    return writer.finish(product((*outer, blocks)))


@dataclass(frozen=True)
class _Body:
    """The statements for one vector; `views` and `names` are those of the operands, then of the result."""

    writer: KernelWriter
    formula: Formula
    site: Site
    names: list[str]
    views: list[View]
    lead: list[str]

    @property
    def _raw(self) -> bool:
        """Whether the op copies: elements then keep their bits."""
        types = {v.dtype for v in self.views}
        return isinstance(self.site.op, ops.Cast) and len(types) == 1

    def write(self, at: str, lanes: int) -> None:
        """The statements for the `lanes` elements from `at` on."""
        loaded = [
            self._load(n, v, at, lanes) for n, v in zip(self.names[:-1], self.views, strict=False)
        ]
        value = self.formula(VectorMath(self.writer, lanes), self.site, loaded)
        self.writer.store(self.names[-1], ", ".join([*self.lead, at]), value, lanes, self._raw)

    def _load(self, name: str, view: View, at: str, lanes: int) -> str:
        if lanes > 1 and view.strides[-1] == 0:
            one = self.writer.load(name, ", ".join([*self.lead, "0"]), raw=self._raw)
            return self._hold(view, f"T.Broadcast({one}, {lanes})", lanes)
        loaded = self.writer.load(name, ", ".join([*self.lead, at]), lanes, self._raw)
        return self._hold(view, loaded, lanes)

    def _hold(self, view: View, expression: str, lanes: int) -> str:
        kind = tir_name(view.dtype) if self._raw else COMPUTE_NAMES[view.dtype]
        return self.writer.value("v", expression, lanes, kind)


def unflatten(writer: KernelWriter, row: str, shape: Sequence[Dim]) -> list[str]:
    """The indices along leading axes of a row number counted in row-major order."""
    indices: list[str] = []
    rest = row
    for size in reversed(shape[1:]):
        indices.append(writer.let("i", f"{rest} % {size_text(size)}"))
        rest = writer.let("rest", f"{rest} // {size_text(size)}")
    return [*([rest] if shape else []), *reversed(indices)]


def _cast(math: VectorMath, site: Site, x: Sequence[str]) -> str:
    source, target = site.operands[0].dtype, site.results[0].dtype
    if COMPUTE_NAMES[source] == COMPUTE_NAMES[target] and target != DType.BOOL:
        return x[0]
    if target == DType.BOOL:
        zero = f'T.Cast("{COMPUTE_NAMES[source]}", 0)'
        return f'T.Cast("{lanes_of("uint8", math.lanes)}", {x[0]} != {zero})'
    return f'T.Cast("{lanes_of(COMPUTE_NAMES[target], math.lanes)}", {x[0]})'


def _gelu(math: VectorMath, site: Site, x: Sequence[str]) -> str:
    assert isinstance(site.op, ops.Gelu)
    return math.gelu_tanh(x[0]) if site.op.tanh else math.gelu(x[0])


def _floor_div(math: VectorMath, site: Site, x: Sequence[str]) -> str:
    assert isinstance(site.op, ops.FloorDiv)
    kind = COMPUTE_NAMES[site.operands[0].dtype]
    divisor = f"T.{kind}({site.op.divisor})"
    return f"T.floordiv({x[0]}, {divisor if math.lanes == 1 else f'T.Broadcast({divisor}, {math.lanes})'})"


def _scale(math: VectorMath, site: Site, x: Sequence[str]) -> str:
    assert isinstance(site.op, ops.Scale)
    return f"{x[0]} * {math.const(site.op.factor)}"


def _shift(math: VectorMath, site: Site, x: Sequence[str]) -> str:
    assert isinstance(site.op, ops.Shift)
    return f"{x[0]} + {math.const(site.op.amount)}"


FORMULAS: dict[type[Op], Formula] = {
    ops.Cast: _cast,
    ops.Exp: lambda m, _, x: m.exp(x[0]),
    ops.Relu: lambda m, _, x: m.maximum(x[0], 0.0),
    ops.Square: lambda m, _, x: f"{x[0]} * {x[0]}",
    ops.Sigmoid: lambda m, _, x: m.sigmoid(x[0]),
    ops.Silu: lambda m, _, x: m.silu(x[0]),
    ops.Tanh: lambda m, _, x: m.tanh(x[0]),
    ops.FloorDiv: _floor_div,
    ops.Gelu: _gelu,
    ops.Softplus: lambda m, _, x: m.softplus(x[0]),
    ops.Scale: _scale,
    ops.Shift: _shift,
    ops.Add: lambda m, _, x: f"{x[0]} + {x[1]}",
    ops.Sub: lambda m, _, x: f"{x[0]} - {x[1]}",
    ops.Mul: lambda m, _, x: f"{x[0]} * {x[1]}",
    ops.Div: lambda m, _, x: f"{x[0]} / {x[1]}",
}
"""What each op does to one vector."""

_ANY_TYPE = (ops.Cast, ops.Binary, ops.FloorDiv)
"""Ops whose formulas hold for every stored type; the others are for f32."""
