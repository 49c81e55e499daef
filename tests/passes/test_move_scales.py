"""The pass that applies scales of FP8 to what products make."""

import pytest
import torch

from nemoc.ir import DType, Graph, parse
from nemoc.ir.interpreter import interpret
from nemoc.ir.ops import GroupedLinear, Linear, Mul
from nemoc.ir.sample_inputs import sample_arguments
from nemoc.models.graph import build_step
from nemoc.passes import PassContext, parse_pipeline, run_pipeline
from support.models import SMALL

STEP = parse("""
graph @step {
  input %x: f32[B, 64]
  input %token: i32[2*B] < B
  input %index: i32[B, 2] < 3
  param %layers.0.mixer.up_proj.weight: f32[32, 64]
  param %layers.0.mixer.experts.up_proj: f32[3, 16, 64]

  %order, %position, %offsets = group_by(%index) {groups=3} : i32[2*B], i32[2*B], i32[4]
  %u = linear(%x, %layers.0.mixer.up_proj.weight) : f32[B, 32]
  %rows = take_rows(%x, %token) : f32[2*B, 64]
  %z = grouped_linear(%rows, %layers.0.mixer.experts.up_proj, %offsets) : f32[2*B, 16]
  return %u, %z
}
""")


def run(graph: Graph, text: str) -> Graph:
    return run_pipeline(graph, parse_pipeline(text), PassContext())


def products(graph: Graph) -> list[Linear | GroupedLinear]:
    return [n.op for n in graph.nodes if isinstance(n.op, Linear | GroupedLinear)]


@pytest.mark.parametrize("mode", ["w8a16", "w8a8"])
def test_results_keep_but_for_rounding(mode: str) -> None:
    before = run(STEP, f"quantize-fp8{{mode={mode}}}")
    after = run(before, "move-scales,dce")
    arguments = sample_arguments(STEP, {"B": 7})
    # Scales that differ, or an expert's in the place of another's would not be seen.
    arguments["layers.0.mixer.experts.up_proj"] *= torch.tensor([1.0, 30.0, 900.0])[:, None, None]
    for found, expected in zip(
        interpret(after, arguments).outputs, interpret(before, arguments).outputs, strict=True
    ):
        assert 0 < float((found - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize(("mode", "x"), [("w8a16", DType.F32), ("w8a8", DType.F8E4M3)])
def test_products_read_fp8(mode: str, x: DType) -> None:
    graph = run(STEP, f"quantize-fp8{{mode={mode}}},move-scales")
    assert [(op.x.dtype, op.w.dtype) for op in products(graph)] == [(x, DType.F8E4M3)] * 2


def test_every_quantized_product_of_a_model_reads_fp8() -> None:
    graph = build_step(SMALL, dtype=DType.BF16)
    found = run(graph, "quantize-fp8,canonicalize,cse,move-scales,dce")
    quantized = [op for op in products(run(graph, "quantize-fp8")) if ".fp8" in op.w.name]
    assert len(quantized) > 8
    assert sum(op.w.dtype is DType.F8E4M3 for op in products(found)) == len(quantized)


def test_products_of_other_weights_stay() -> None:
    assert run(STEP, "move-scales") is STEP


def scaled(shape: str, dtype: str = "f32") -> Graph:
    """A product with a weight in FP8 and a scale of some shape."""
    return parse(f"""
    graph @g {{
      input %x: {dtype}[B, 4]
      param %w: f8e4m3[3, 4]
      param %s: {dtype}{shape}

      %wide = cast(%w) {{dtype={dtype}}} : {dtype}[3, 4]
      %scaled = mul(%s, %wide) : {dtype}[3, 4]
      %y = linear(%x, %scaled) : f32[B, 3]
      return %y
    }}
    """)


@pytest.mark.parametrize(("shape", "dtype"), [("[3, 4]", "f32"), ("[3, 1]", "f64"), ("[]", "f64")])
def test_a_scale_along_the_reduction_or_of_another_type_stays(shape: str, dtype: str) -> None:
    graph = scaled(shape, dtype)
    assert run(graph, "move-scales") is graph


@pytest.mark.parametrize("shape", ["[]", "[1, 1]", "[3, 1]"])
def test_scales_of_rows_go_with_their_columns(shape: str) -> None:
    graph = scaled(shape)
    after = run(graph, "move-scales,dce")
    assert isinstance(after.producers[after.outputs[0]].op, Mul)
    arguments = sample_arguments(graph, {"B": 5})
    found, expected = (interpret(g, arguments).outputs[0] for g in (after, graph))
    assert float((found - expected).norm() / expected.norm()) < 1e-6
