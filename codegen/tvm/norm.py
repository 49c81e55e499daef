"""Root mean square norm: one task for each group of each row reads it twice, the second time from the nearest cache."""

from nemoc.codegen.plan import Arg, Plan, Site, View
from nemoc.codegen.tvm.elementwise import unflatten
from nemoc.codegen.tvm.loops import each_vector, sum_elements, vector_lanes
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.codegen.tvm.writer import COMPUTE_NAMES, KernelWriter
from nemoc.codegen.views import merge_axes
from nemoc.ir.dims import product
from nemoc.ir.dtypes import DType
from nemoc.ir.ops.norm import RmsNorm


def emit_rms_norm(site: Site, target: CpuTarget) -> Plan:
    """x [..., H], weight [H]: Σx² of a group, then x · 1 / √(Σx² / width + eps) · weight; may run in place."""
    op = site.op
    assert isinstance(op, RmsNorm)
    x, weight = site.operands
    width = x.shape[-1]
    assert isinstance(width, int)
    width //= op.groups
    lanes = vector_lanes(site.operands + site.results, target) if x.dtype == DType.F32 else 1
    kind = COMPUTE_NAMES[x.dtype]

    writer = KernelWriter("rms_norm")
    lead = merge_axes([drop_last(x), drop_last(site.results[0])])
    source, result = (
        writer.buffer(
            hint, arg, View(v.dtype, (*m.shape, *v.shape[-1:]), (*m.strides, *v.strides[-1:]))
        )
        for hint, arg, m, v in (
            ("x", site.arg("x"), lead[0], x),
            ("y", Arg("result", 0), lead[1], site.results[0]),
        )
    )
    scale_by = writer.buffer("weight", site.arg("weight"), weight)
    row = unflatten(writer, writer.let("row", f"task // {op.groups}"), lead[0].shape)
    first = writer.let("first", f"task % {op.groups} * {width}")

    def square(at: str, count: int) -> str:
        v = writer.value(
            "v", writer.load(source, ", ".join([*row, f"{first} + {at}"]), count), count, kind
        )
        return f"{v} * {v}"

    total = sum_elements(writer, width, lanes, x.dtype, square)
    mean = f"{total} / T.{kind}({width})"
    scale = writer.value("scale", f"T.{kind}(1) / T.sqrt({mean} + T.{kind}({op.eps!r}))", 1, kind)

    def apply(at: str, count: int) -> None:
        index = ", ".join([*row, f"{first} + {at}"])
        w = writer.load(scale_by, f"{first} + {at}", count)
        writer.store(result, index, f"{writer.load(source, index, count)} * {scale} * {w}", count)

    each_vector(writer, width, lanes, apply)
    stage = writer.finish(product((*lead[0].shape, op.groups)))
    return Plan((stage,), in_place=((0, 0),) if x == site.results[0] else ())


def drop_last(view: View) -> View:
    """The view without its last axis."""
    return View(view.dtype, view.shape[:-1], view.strides[:-1])
