"""The pass that stores weights in FP8, and the ops that it is made of."""

import pytest
import torch

from nemoc.ir import DType, Graph, NemocError, parse
from nemoc.ir.builder import Builder
from nemoc.ir.interpreter import interpret
from nemoc.ir.ops import Folded, Full, GroupedLinear, Linear, QuantizeFp8
from nemoc.ir.ops.fp8 import dequantized_fp8, quantized_fp8
from nemoc.ir.rewrite import substitute_dims
from nemoc.ir.sample_inputs import sample_arguments
from nemoc.models.graph import build_step
from nemoc.passes import PassContext, parse_pipeline, run_pipeline
from nemoc.passes.check import NumericCheck
from nemoc.passes.quantize_fp8 import QuantizeFp8 as QuantizeFp8Pass
from nemoc.passes.specialize_decode import SpecializeDecode
from support.models import SMALL

STEP = parse("""
graph @step {
  input %x: f32[B, 64]
  param %layers.0.mixer.up_proj.weight: bf16[32, 64]
  param %layers.0.mixer.gate.weight: bf16[8, 64]
  param %layers.0.mixer.down_proj.weight: bf16[63, 32]
  param %lm_head.weight: bf16[48, 63]

  %s = linear(%x, %layers.0.mixer.gate.weight) : f32[B, 8]
  %u = linear(%x, %layers.0.mixer.up_proj.weight) : f32[B, 32]
  %r = relu(%u) : f32[B, 32]
  %d = linear(%r, %layers.0.mixer.down_proj.weight) : f32[B, 63]
  %y = linear(%d, %lm_head.weight) : f32[B, 48]
  return %y, %s
}
""")


def run(graph: Graph, text: str) -> tuple[Graph, PassContext]:
    ctx = PassContext()
    return run_pipeline(graph, parse_pipeline(text), ctx, check=NumericCheck()), ctx


def quantized(graph: Graph) -> list[str]:
    return [n.op.w.name for n in graph.nodes if isinstance(n.op, QuantizeFp8)]


def round_trip(w: torch.Tensor, float64: bool = False) -> list[torch.Tensor]:
    """Numbers, scale, and what they stand for."""
    build = Builder("fp8")
    numbers, scale = quantized_fp8(build, build.param("w", DType.of(w), tuple(w.shape)))
    graph = build.finish([numbers, scale, dequantized_fp8(build, numbers, scale)])
    return list(interpret(graph, {"w": w}, float64=float64).outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_magnitude_becomes_448(dtype: torch.dtype) -> None:
    w = torch.randn(5, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    numbers, scale, _ = round_trip(w)
    assert torch.equal(scale, w.abs().max().float() / 448)
    assert torch.equal(numbers.float(), (w.float() / scale).to(torch.float8_e4m3fn).float())
    assert numbers.float().abs().max() == 448


def test_each_matrix_of_a_stack_has_its_scale() -> None:
    w = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(2))
    w = w * torch.tensor([1.0, 100.0, 1e-3])[:, None, None]
    numbers, scale, decoded = round_trip(w)
    for index in range(3):
        alone = round_trip(w[index])
        assert torch.equal(scale[index], alone[1])
        assert torch.equal(numbers[index].float(), alone[0].float())
        assert torch.equal(decoded[index], alone[2])


def test_numbers_lie_within_half_a_step() -> None:
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    _, scale, decoded = round_trip(w)
    normal = w.abs() > scale * 2**-6
    assert ((decoded - w).abs() <= w.abs() * (2**-4 + 1e-6))[normal].all()
    assert ((decoded - w).abs() <= scale * 2**-10 * (1 + 1e-6))[~normal].all()
    error = float((decoded - w).norm() / w.norm())
    assert 0.01 < error < 0.04


def test_float64_gives_the_same_numbers_and_scales() -> None:
    w = torch.randn(4, 32, generator=torch.Generator().manual_seed(4)).bfloat16()
    for narrow, wide in zip(round_trip(w), round_trip(w, float64=True), strict=True):
        assert torch.equal(narrow.double(), wide.double().float().double())


@pytest.mark.parametrize("magnitude", [0.0, 1e-44])
def test_a_matrix_without_a_usable_scale_becomes_zeros(magnitude: float) -> None:
    numbers, scale, decoded = round_trip(torch.full((2, 16), magnitude))
    assert scale == 1
    assert not numbers.float().any()
    assert not decoded.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(bad: float) -> None:
    with pytest.raises(NemocError, match=r"^fp8_scale: w has NaN or infinite elements$"):
        round_trip(torch.tensor([[1.0, bad]]))


def test_projections_are_quantized_but_not_the_router_and_the_head() -> None:
    graph, ctx = run(STEP, "quantize-fp8")
    assert [r.message for r in ctx.remarks] == [
        "layers.0.mixer.up_proj.weight in FP8",
        "layers.0.mixer.down_proj.weight in FP8",
    ]
    assert len(quantized(graph)) == 2


def test_what_another_pass_quantized_is_left() -> None:
    graph, _ = run(STEP, "quantize-nvfp4{scope=.*up_proj},quantize-fp8{scope=.*}")
    assert quantized(graph) == [
        "layers.0.mixer.gate.weight",
        "layers.0.mixer.down_proj.weight",
        "lm_head.weight",
    ]


def test_codes_are_folded_into_what_they_stand_for() -> None:
    graph, _ = run(STEP, "quantize-fp8,fold-constants,dce")
    assert quantized(graph) == []
    stored = [v.type.dtype for n in graph.nodes if isinstance(n.op, Folded) for v in n.results]
    assert stored == [DType.F32, DType.F32]


def test_results_stay_near() -> None:
    graph, _ = run(STEP, "quantize-fp8")
    arguments = sample_arguments(STEP, {"B": 5})
    found, expected = (interpret(g, arguments).outputs for g in (graph, STEP))
    assert torch.equal(found[1], expected[1])
    error = float((found[0] - expected[0]).norm() / expected[0].norm())
    assert 0.003 < error < 0.06


def test_a_weight_beside_narrow_activations_is_not_rounded_again() -> None:
    graph = build_step(SMALL, dtype=DType.BF16)
    found = QuantizeFp8Pass(scope="layers").run(graph, PassContext())
    products = [n.op for n in found.nodes if isinstance(n.op, Linear | GroupedLinear)]
    decoded = [op for op in products if ".fp8" in op.w.name]
    assert len(decoded) > 8
    assert {op.w.dtype for op in decoded} == {DType.F32}
    assert {op.x.dtype for op in decoded} == {DType.BF16, DType.F32}  # f32 into the router


def test_each_row_of_activations_has_its_scale() -> None:
    graph, _ = run(STEP, "quantize-fp8{mode=w8a8}")
    arguments = sample_arguments(STEP, {"B": 5})
    together = interpret(graph, arguments).outputs
    loud = arguments["x"].clone()
    loud[0] *= 100.0
    beside = interpret(graph, arguments | {"x": loud}).outputs
    assert torch.equal(together[0][1:], beside[0][1:])
    assert not torch.equal(together[0][0], beside[0][0])


def test_activations_in_fp8_cost_as_much_again_as_weights() -> None:
    arguments = sample_arguments(STEP, {"B": 5})
    expected = interpret(STEP, arguments).outputs[0]
    weights, both = (
        interpret(run(STEP, f"quantize-fp8{{mode={mode}}}")[0], arguments).outputs[0]
        for mode in ("w8a16", "w8a8")
    )
    errors = [float((found - expected).norm() / expected.norm()) for found in (weights, both)]
    assert 1.1 * errors[0] < errors[1] < 2.0 * errors[0]


def test_activations_are_quantized_once() -> None:
    once, _ = run(STEP, "quantize-fp8{mode=w8a8}")
    twice, _ = run(STEP, "quantize-fp8{mode=w8a8},quantize-fp8{mode=w8a8}")
    assert twice == once


def rows_in_fp8(graph: Graph) -> int:
    """How many products of a graph multiply activations that are decoded from FP8."""
    products = [n.op for n in graph.nodes if isinstance(n.op, Linear | GroupedLinear)]
    return sum(op.x.name.endswith(".fp8") for op in products)


def steps(mode: str) -> tuple[Graph, Graph, PassContext]:
    """The small model's steps over many tokens and over one, and what the pass said of both."""
    ctx, first = PassContext(), QuantizeFp8Pass(mode=mode)
    graph = build_step(SMALL)
    many = run_pipeline(graph, (first,), ctx)
    return many, run_pipeline(graph, (SpecializeDecode(), first), ctx), ctx


def test_rows_of_prompts_are_quantized_and_those_of_steps_of_one_token_are_not() -> None:
    (many, one, _), (all_many, all_one, _) = steps("w8a8-prompts"), steps("w8a8")
    _, weights_one, _ = steps("w8a16")
    assert many == all_many
    assert rows_in_fp8(many) > 10
    assert one == weights_one
    assert rows_in_fp8(one) == 0 < rows_in_fp8(all_one)


def test_rows_of_routed_experts_go_by_how_many_are_gathered() -> None:
    many, one, _ = steps("w8a8-prompts")
    names = [
        [n.op.x.name.endswith(".fp8") for n in g.nodes if isinstance(n.op, GroupedLinear)]
        for g in (many, one)
    ]
    assert names == [[True] * 4, [False] * 4]


def test_remarks_say_whether_rows_of_prompts_become_fp8_too() -> None:
    _, _, ctx = steps("w8a8-prompts")
    said: dict[str, set[str]] = {"step": set(), "decode": set()}
    for remark in (r for r in ctx.remarks if r.pass_name == "quantize-fp8"):
        said[remark.site.partition("/")[0]].add(remark.message.partition(" in ")[2])
    assert said == {"step": {"FP8, rows of prompts too"}, "decode": {"FP8"}}


def test_the_head_behind_the_last_token_keeps_its_rows() -> None:
    pass_ = QuantizeFp8Pass(mode="w8a8-prompts", scope="lm_head")
    last, every = (
        pass_.run(build_step(SMALL, logits=logits), PassContext()) for logits in ("last", "all")
    )
    assert (rows_in_fp8(last), rows_in_fp8(every)) == (0, 1)


@pytest.mark.parametrize(("rows", "count"), [(64, 0), (65, 2)])
def test_rows_whose_number_is_known_are_quantized_if_there_are_more_than_64(
    rows: int, count: int
) -> None:
    graph = substitute_dims(STEP, {"B": rows}, name="step")
    found, _ = run(graph, "quantize-fp8{mode=w8a8-prompts}")
    assert rows_in_fp8(found) == count


def test_codes_of_a_checkpoint_keep_the_rows_of_steps_of_one_token() -> None:
    stored, _ = run(STEP, "quantize-fp8")
    assert run(stored, "quantize-fp8{mode=w8a8-prompts}")[0] == stored


UP, DOWN = "layers.0.mixer.up_proj.weight", "layers.0.mixer.down_proj.weight"


def test_each_weight_has_its_own_static_scale() -> None:
    ctx = PassContext(input_scales={UP: 0.5, DOWN: 0.25})
    graph = QuantizeFp8Pass(mode="w8a8").run(STEP, ctx)
    values = {n.results[0]: n.op.value for n in graph.nodes if isinstance(n.op, Full)}
    found = {
        n.op.w.name: values[n.op.scale]
        for n in graph.nodes
        if isinstance(n.op, QuantizeFp8) and n.op.scale in values
    }
    assert found == {"x.rows": 0.5, "r.rows": 0.25}


def test_a_static_scale_is_as_good_as_that_of_the_largest_row_and_cuts_off_what_is_larger() -> None:
    arguments = sample_arguments(STEP, {"B": 3})
    signs = arguments | {"x": arguments["x"].sign()}
    (rows, _), (static, _) = (
        run(STEP, f'quantize-fp8{{mode=w8a8,scope="{UP}",input-scale={scale}}}')
        for scale in (0.0, 1 / 448)
    )
    found, expected = (interpret(graph, signs).outputs[0] for graph in (static, rows))
    assert torch.equal(found, expected)
    large = interpret(static, signs | {"x": signs["x"] * 5}).outputs[0]
    assert torch.equal(large, expected)


def test_a_bad_static_scale_is_named() -> None:
    with pytest.raises(NemocError, match=r"option input-scale is -1\.0, expected 0 or a positive"):
        parse_pipeline("quantize-fp8{input-scale=-1.0}")


def test_a_bad_mode_is_named() -> None:
    with pytest.raises(
        NemocError, match="pass quantize-fp8: option mode is 'w4a8', expected one of w8a16, w8a8"
    ):
        parse_pipeline("quantize-fp8{mode=w4a8}")


def test_a_bad_scope_is_named() -> None:
    with pytest.raises(NemocError, match=r"pass quantize-fp8: option scope '\(': expected all"):
        parse_pipeline('quantize-fp8{scope="("}')
