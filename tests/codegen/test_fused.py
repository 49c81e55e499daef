"""Regions by their anchors, and ops that no backend knows within them."""

import ctypes
import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import tvm_ffi

from nemoc.codegen.expand import expand_ops
from nemoc.codegen.plan import RegionError, Site
from nemoc.codegen.storage import Layout
from nemoc.codegen.tvm.compile import compile_program
from nemoc.codegen.tvm.emit import EMITTERS, emit, expanded
from nemoc.codegen.tvm.fused import emit_fused
from nemoc.codegen.tvm.target import cpu_target
from nemoc.ir import Builder, Env, NemocError, Value, ops, parse
from nemoc.ir.ops.elementwise import Unary
from nemoc.ir.region import Fused
from support.kernels import CompiledSite, KernelSuite, relative_error
from support.regions import operands, region

SUITE = KernelSuite()
SIZES = {"B": 3, "L": 7}


@dataclass(frozen=True)
class Bend(Unary):
    """x · tanh(0.7306 · x), an activation of this file alone."""

    def evaluate(self, env: Env, x: torch.Tensor) -> torch.Tensor:
        return x * torch.tanh(0.7306 * x)

    def expand(self, build: Builder) -> Value:
        return build(ops.Mul(self.x, build(ops.Tanh(build(ops.Scale(self.x, 0.7306))))))


ROWS = """
  input %x: f32[B, L, 48]
  input %r: f32[B, L, 48]
  input %g: f32[48]
  %s = add(%x, %r) : f32[B, L, 48]
  %a = ACT(%s) : f32[B, L, 48]
  %n = rms_norm(%a, %g) {eps=1e-05} : f32[B, L, 48]
  return %n, %s"""

LINEAR = """
  input %x: f32[B, L, 48]
  input %g: f32[48]
  input %w: bf16[5, 48, 16]
  input %r: f32[B, L, 70]
  %n = rms_norm(%x, %g) {eps=1e-05} : f32[B, L, 48]
  %y = linear(%n, %w) {interleave=16, features=70} : f32[B, L, 70]
  %a = ACT(%y) : f32[B, L, 70]
  %s = add(%a, %r) : f32[B, L, 70]
  return %s"""

ROUTER = """
  input %x: f32[B*L, 48]
  input %w: bf16[2, 48, 16]
  %y = linear(%x, %w) {interleave=16, features=20} : f32[B*L, 20]
  %a = ACT(%y) : f32[B*L, 20]
  %k = top_k(%a) {k=3} : i32[B*L, 3]
  %t = take_along(%a, %k) : f32[B*L, 3]
  %order, %position, %offsets = group_by(%k) {groups=20} : i32[3*B*L], i32[3*B*L], i32[21]
  return %t, %position, %offsets"""

SCAN = """
  input %x: f32[B, 4, 8]
  input %z: f32[B, 4, 8]
  input %dt: f32[B, 4]
  input %a: f32[4]
  input %b: f32[B, 2, 16]
  input %c: f32[B, 2, 16]
  input %state: f32[B, 4, 8, 16]
  %p = softplus(%dt) : f32[B, 4]
  %y, %next = ssd_update(%x, %p, %a, %b, %c, _, %state) : f32[B, 4, 8], f32[B, 4, 8, 16]
  %g = ACT(%z) : f32[B, 4, 8]
  %o = mul(%y, %g) : f32[B, 4, 8]
  return %o, %next"""

BODIES = {"rows": ROWS, "linear": LINEAR, "router": ROUTER, "scan": SCAN}
ACTS = {
    "silu": lambda text: text.replace("ACT(", "silu("),
    "another activation": lambda text: text.replace("ACT(", "gelu("),
    "an inserted scale": lambda text: re.sub(
        r"%(\w) = ACT\(%(\w)\) : (.*)",
        r"%\1.s = scale(%\2) {factor=0.7306} : \3\n %\1 = silu(%\1.s) : \3",
        text,
    ),
    "an unknown op": lambda text: text.replace("ACT(", "bend("),
}
"""What stands in the place of an activation."""


def fused(name: str, act: str) -> Fused:
    return region(ACTS[act](BODIES[name]), extra=(Bend,))


def compiled(name: str, act: str) -> CompiledSite:
    """A region's kernels; the op keeps the unknown op that it is checked against."""
    op = fused(name, act)
    known = dataclasses.replace(op, body=expand_ops(op.body, EMITTERS))
    case = SUITE.add(Site.dense(known), emit)
    return dataclasses.replace(case, site=Site.dense(op))


CASES = {(name, act): compiled(name, act) for name in BODIES for act in ACTS}


@pytest.mark.parametrize(("name", "act"), CASES)
def test_elementwise_ops_are_fused_wherever_they_stand(name: str, act: str) -> None:
    case = CASES[name, act]
    op = case.site.op
    assert isinstance(op, Fused)
    case.check(SIZES, *operands(op, SIZES), tolerance=3e-6)
    sources = [stage.kernel.source for stage in case.plan.stages]
    assert any("0.7306" in s for s in sources) == (act in ("an inserted scale", "an unknown op"))


@pytest.mark.parametrize("act", ["an inserted scale", "an unknown op"])
@pytest.mark.parametrize("name", BODIES)
def test_what_is_inserted_costs_no_launch(name: str, act: str) -> None:
    assert len(CASES[name, act].plan.stages) == len(CASES[name, "silu"].plan.stages)


def test_an_unknown_op_compiles_by_itself(tmp_path: Path) -> None:
    graph = parse(
        "graph @g { input %x: f32[B, 9] %y = bend(%x) : f32[B, 9] return %y }", extra_ops=(Bend,)
    )
    sizes = {"B": 4, "L": 1, "C": 1}
    made = compile_program({"g": graph}, Layout((), 0), [sizes], cpu_target())
    assert "0.7306" in made.source
    library = tmp_path / "g.so"
    library.write_bytes(made.library)
    x, y = torch.randn(4, 9), torch.full((4, 9), torch.nan)
    scratch = torch.empty(made.program.scratch_bytes + 1, dtype=torch.uint8)
    arenas = [scratch, scratch, scratch, x, y]
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in arenas]
    tvm_ffi.load_module(str(library))["g"](*pointers, *sizes.values(), 2, None)
    assert relative_error(y, Bend(graph.inputs[0]).evaluate(Env({}), x.double())) < 1e-6


def test_an_unknown_op_without_an_expansion_is_named() -> None:
    @dataclass(frozen=True)
    class Opaque(Unary):
        pass

    graph = parse(
        "graph @g { input %x: f32[B] %y = opaque(%x) : f32[B] return %y }", extra_ops=(Opaque,)
    )
    (node,) = expanded({"g": graph})["g"].nodes
    with pytest.raises(NemocError, match="the cpu target has no kernel for opaque"):
        emit(Site.dense(node.op), cpu_target())


def test_the_anchor_decides() -> None:
    stems = {name: CASES[name, "silu"].plan.stages[0].kernel.name for name in BODIES}
    assert stems["rows"].startswith("rows_")
    assert stems["linear"].startswith("fused_linear_")
    assert stems["router"].startswith("router_")
    assert stems["scan"].startswith("conv_update_")


def test_kind_means_nothing_to_code_generation() -> None:
    op = fused("rows", "silu")
    one, two = (
        emit_fused(Site.dense(dataclasses.replace(op, kind=kind)), cpu_target())
        for kind in ("conv-scan", "rows")
    )
    assert one == two


def test_a_region_that_nothing_takes_says_why() -> None:
    op = region("""
      input %x: f32[B, 8]
      input %w: f32[8, 8]
      %y = linear(%x, %w) : f32[B, 8]
      %z = sum(%y) {axis=0} : f32[8]
      return %z""")
    with pytest.raises(RegionError, match="a router has one product, with an interleaved weight"):
        emit_fused(Site.dense(op), cpu_target())
