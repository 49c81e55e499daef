"""The pass that stores weights in NVFP4."""

import re

import pytest
import torch

from nemoc.ir import DType, Graph, NemocError, TensorType, parse
from nemoc.ir.dims import B
from nemoc.ir.interpreter import interpret
from nemoc.ir.nvfp4 import BLOCK
from nemoc.ir.ops import (
    DequantizeNvfp4,
    Folded,
    Full,
    Fused,
    GroupedLinear,
    Interleave,
    Linear,
    Nvfp4GlobalScale,
    Nvfp4ToFp8,
)
from nemoc.ir.ops import QuantizeFp8 as EncodeFp8
from nemoc.ir.ops import QuantizeNvfp4 as EncodeNvfp4
from nemoc.ir.rewrite import substitute_dims
from nemoc.ir.sample_inputs import sample_arguments
from nemoc.ir.scopes import scope_of
from nemoc.models import ModelConfig, Nvfp4
from nemoc.models.graph import build_step
from nemoc.passes import Pass, PassContext, TargetInfo, parse_pipeline, run_pipeline
from nemoc.passes.check import NumericCheck
from nemoc.passes.growth import QUANTIZERS
from nemoc.passes.quantize_fp8 import QuantizeFp8
from nemoc.passes.quantize_nvfp4 import QuantizeNvfp4
from nemoc.passes.specialize_decode import SpecializeDecode
from support.checkpoints import BASE
from support.kernels import relative_error
from support.models import SMALL
from support.quantized import WIDE

STEP = parse("""
graph @step {
  input %x: f32[B, 64]
  param %layers.0.mixer.up_proj.weight: bf16[32, 64]
  param %layers.0.mixer.gate.weight: bf16[8, 64]
  param %layers.0.mixer.down_proj.weight: bf16[64, 32]
  param %lm_head.weight: bf16[48, 64]
  param %odd.weight: bf16[4, 64]

  %s = linear(%x, %layers.0.mixer.gate.weight) : f32[B, 8]
  %u = linear(%x, %layers.0.mixer.up_proj.weight) : f32[B, 32]
  %r = relu(%u) : f32[B, 32]
  %d = linear(%r, %layers.0.mixer.down_proj.weight) : f32[B, 64]
  %y = linear(%d, %lm_head.weight) : f32[B, 48]
  return %y, %s
}
""")


def run(graph: Graph, text: str, packed: bool = True) -> tuple[Graph, PassContext]:
    ctx = PassContext(TargetInfo(packed_weights=packed))
    return run_pipeline(graph, parse_pipeline(text), ctx, check=NumericCheck()), ctx


def decoded(graph: Graph) -> list[str]:
    """The parameters whose codes are decoded somewhere in the step."""
    found = []
    for node in graph.nodes:
        inner = node.op.body.nodes if isinstance(node.op, Fused) else (node,)
        found += [n.op.packed.name for n in inner if isinstance(n.op, DequantizeNvfp4)]
    return found


def test_where_kernels_unpack_weights_their_codes_and_scales_are_laid_out_in_blocks() -> None:
    text = "quantize-nvfp4,interleave-weights{block=16},fold-constants,dce"
    graph, _ = run(STEP, text)
    folded = {n.results[0]: n.op for n in graph.nodes if isinstance(n.op, Folded)}
    unpacked = [n.op for n in graph.nodes if isinstance(n.op, DequantizeNvfp4)]
    assert [op.interleave for op in unpacked] == [16, 16]
    for op in unpacked:
        for part in (op.packed, op.scales):
            assert part.shape[-1] == 16
            assert isinstance(folded[part].body.nodes[-1].op, Interleave)
    stored, _ = run(STEP, text, packed=False)
    assert not decoded(stored)


def test_projections_are_quantized_but_not_the_router_and_the_head() -> None:
    graph, ctx = run(STEP, "quantize-nvfp4")
    assert [r.message for r in ctx.remarks if not r.refused] == [
        "layers.0.mixer.up_proj.weight in NVFP4",
        "layers.0.mixer.down_proj.weight in NVFP4",
    ]
    assert len(decoded(graph)) == 2


@pytest.mark.parametrize(
    ("scope", "count"), [("all", 2), ("lm_head", 1), (r"layers\..*(up|gate)", 2)]
)
def test_a_scope_is_a_word_or_a_pattern(scope: str, count: int) -> None:
    graph = QuantizeNvfp4(scope=scope).run(STEP, PassContext())
    assert len(decoded(graph)) == count


@pytest.mark.parametrize("scope", ["experts", "layers.7"])
def test_a_scope_that_means_no_weight_is_named(scope: str) -> None:
    with pytest.raises(NemocError) as raised:
        QuantizeNvfp4(scope=scope).run(STEP, PassContext())
    says = f"pass quantize-nvfp4: option scope is '{scope}', found no weight that it means"
    assert str(raised.value) == says


@pytest.mark.parametrize("pass_", [QuantizeNvfp4(), QuantizeFp8()], ids=lambda p: p.name)
def test_weights_are_quantized_from_what_is_stored_whatever_the_model_computes_in(
    pass_: Pass,
) -> None:
    config = ModelConfig.from_dict(BASE | WIDE)
    narrow, wide = (
        build_step(config, weight_types=lambda _: DType.F32, dtype=dtype)
        for dtype in (DType.BF16, DType.F32)
    )
    encoded = [
        [
            (n.op.w.name, n.op.w.type)
            for n in pass_.run(graph, PassContext()).nodes
            if isinstance(n.op, EncodeFp8 | EncodeNvfp4)
        ]
        for graph in (narrow, wide)
    ]
    assert len(encoded[0]) > 8 and encoded[0] == encoded[1]


def test_codes_are_stored_and_decoded_in_the_region_that_reads_them() -> None:
    graph, _ = run(STEP, "quantize-nvfp4,fold-constants,dce,fuse-epilogues")
    stored = {v.type for n in graph.nodes if isinstance(n.op, Folded) for v in n.results}
    assert {t.dtype for t in stored} == {DType.U8, DType.F8E4M3, DType.F32}
    assert not any(isinstance(node.op, DequantizeNvfp4) for node in graph.nodes)
    assert len(decoded(graph)) == 2


def test_a_target_without_such_kernels_stores_what_codes_decode_to() -> None:
    graph, _ = run(STEP, "quantize-nvfp4,fold-constants,dce,fuse-epilogues", packed=False)
    assert decoded(graph) == []


def test_results_stay_near() -> None:
    graph, _ = run(STEP, "quantize-nvfp4")
    arguments = sample_arguments(STEP, {"B": 5})
    found, expected = (interpret(g, arguments).outputs for g in (graph, STEP))
    assert torch.equal(found[1], expected[1])
    assert 0.01 < relative_error(found[0], expected[0]) < 0.2


def test_a_weight_beside_narrow_activations_is_rounded_to_their_type() -> None:
    graph = build_step(SMALL, dtype=DType.BF16)
    found = QuantizeNvfp4(scope=".*").run(graph, PassContext())
    wide = [n for n in found.nodes if isinstance(n.op, DequantizeNvfp4)]
    for node in wide:
        (user,) = found.uses[node.results[0]]
        assert user.results[0].dtype == DType.BF16


def test_rows_that_are_no_whole_blocks_stay_and_are_named() -> None:
    graph = build_step(SMALL)
    ctx = PassContext()
    found = QuantizeNvfp4().run(graph, ctx)
    assert all(
        int(n.op.packed.shape[-1]) * 2 % BLOCK == 0
        for n in found.nodes
        if isinstance(n.op, DequantizeNvfp4)
    )
    assert any("no whole blocks of 16" in r.message for r in ctx.remarks if r.refused)


def test_activations_are_quantized_row_by_row_and_no_row_knows_of_others() -> None:
    graph, _ = run(STEP, "quantize-nvfp4{mode=w4a4}")
    assert sum(name.endswith(".codes") for name in decoded(graph)) == 4
    arguments = sample_arguments(STEP, {"B": 6})
    together, expected = (interpret(g, arguments).outputs[0] for g in (graph, STEP))
    rows = [arguments | {"x": 0.25 * row[None]} for row in arguments["x"]]
    apart = torch.cat([interpret(graph, row).outputs[0] for row in rows])
    assert relative_error(4 * apart, together) < 1e-6
    assert 0.01 < relative_error(together, expected) < 0.25


def test_a_known_scale_lets_a_product_quantize_what_it_makes() -> None:
    text = "quantize-nvfp4{mode=w4a4,input-scale=0.5},fold-constants,dce,fuse-epilogues,fuse-rows"
    graph, _ = run(STEP, text)
    regions = [n.op.body for n in graph.nodes if isinstance(n.op, Fused)]
    makers = [body for body in regions if any(isinstance(n.op, Linear) for n in body.nodes)]
    assert any({v.dtype for v in body.outputs} == {DType.U8, DType.F8E4M3} for body in makers)
    assert not any(isinstance(node.op, QUANTIZERS) for node in graph.nodes)


UP, DOWN = "layers.0.mixer.up_proj.weight", "layers.0.mixer.down_proj.weight"


def test_each_weight_has_its_own_static_scale() -> None:
    ctx = PassContext(input_scales={UP: 0.5, DOWN: 0.25})
    graph = QuantizeNvfp4(mode="w4a4").run(STEP, ctx)
    values = {n.results[0]: n.op.value for n in graph.nodes if isinstance(n.op, Full)}
    found = {
        n.op.w.name: values[n.op.global_scale]
        for n in graph.nodes
        if isinstance(n.op, EncodeNvfp4) and n.op.global_scale in values
    }
    assert found == {"x.rows": 0.5, "r.rows": 0.25}


def test_a_static_scale_cuts_off_what_is_larger() -> None:
    ctx = PassContext(input_scales={UP: 1 / 2688, DOWN: 1.0})
    scoped = QuantizeNvfp4(mode="w4a4", scope=re.escape(UP)).run(STEP, ctx)
    arguments = sample_arguments(STEP, {"B": 3})
    large = arguments | {"x": arguments["x"].sign() * 5}
    whole = arguments | {"x": arguments["x"].sign()}
    found, expected = (interpret(scoped, given).outputs[0] for given in (large, whole))
    assert relative_error(found, expected) < 1e-6


def test_a_weight_without_a_static_scale_beside_others_is_named() -> None:
    with pytest.raises(NemocError) as caught:
        QuantizeNvfp4(mode="w4a4").run(STEP, PassContext(input_scales={UP: 0.5}))
    assert str(caught.value) == (
        f"pass quantize-nvfp4: found no scale of the activations that {DOWN} multiplies, "
        "expected one as for others"
    )


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_weights_that_are_codes_already_keep_them(dtype: DType) -> None:
    formats = {
        "layers.1.mixer.experts.up_proj": Nvfp4(),
        "layers.1.mixer.shared_experts.up_proj.weight": Nvfp4(),
    }
    graph = build_step(ModelConfig.from_dict(BASE | WIDE, "here"), dtype=dtype, formats=formats)
    scope = scope_of(list(formats))
    found = QuantizeNvfp4(mode="w4a4", scope=scope).run(graph, PassContext())
    stored = {n.op.packed: n.results[0] for n in graph.nodes if isinstance(n.op, DequantizeNvfp4)}
    products = [
        n.op
        for n in found.nodes
        if isinstance(n.op, Linear | GroupedLinear) and n.op.w in stored.values()
    ]
    assert len(products) == 2
    assert {op.x.dtype for op in products} == {DType.F32}
    assert QuantizeNvfp4(mode="w4a4", scope=scope).run(found, PassContext()) is found
    assert QuantizeNvfp4(scope=scope).run(graph, PassContext()) is graph


def recoded(graph: Graph) -> list[str]:
    """The weights of which FP8 is made in the step, by what their codes are stored as."""
    return [n.op.packed.name for n in graph.nodes if isinstance(n.op, Nvfp4ToFp8)]


def in_fp8_for_prompts(graph: Graph) -> tuple[Graph, Graph]:
    """The steps over many tokens and over one, if prompts are to be multiplied in FP8."""
    pass_ = QuantizeNvfp4(mode="fp8-prompts", scope="layers")
    one = run_pipeline(graph, (SpecializeDecode(),), PassContext())
    return pass_.run(graph, PassContext()), pass_.run(one, PassContext())


def test_fp8_is_made_of_weights_for_prompts_alone_and_of_the_same_codes() -> None:
    graph = build_step(ModelConfig.from_dict(BASE | WIDE, "here"))
    many, one = in_fp8_for_prompts(graph)
    assert len(recoded(many)) > 8 and recoded(one) == []
    plain = QuantizeNvfp4(scope="layers")
    assert one == plain.run(
        run_pipeline(graph, (SpecializeDecode(),), PassContext()), PassContext()
    )
    encoded = {n.results[0].name for n in one.nodes if isinstance(n.op, EncodeNvfp4)}
    assert set(recoded(many)) == encoded
    ran = QuantizeNvfp4(mode="fp8-prompts", scope="layers").run(many, PassContext())
    assert ran == many


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_fp8_for_prompts_is_made_of_the_codes_of_a_checkpoint(dtype: DType) -> None:
    formats = {
        "layers.1.mixer.experts.up_proj": Nvfp4(),
        "layers.1.mixer.shared_experts.up_proj.weight": Nvfp4("compressed-tensors"),
    }
    graph = build_step(ModelConfig.from_dict(BASE | WIDE, "here"), dtype=dtype, formats=formats)
    pass_ = QuantizeNvfp4(mode="fp8-prompts", scope=scope_of(list(formats)))
    found = pass_.run(graph, PassContext())
    stored = {n.op.packed.name for n in graph.nodes if isinstance(n.op, DequantizeNvfp4)}
    assert len(stored) == 2 and set(recoded(found)) == stored
    assert pass_.run(found, PassContext()) == found


def test_fp8_for_prompts_costs_as_its_rows_and_weights_do() -> None:
    graph = substitute_dims(STEP, {"B": 65}, name="step")
    arguments = sample_arguments(graph, {})
    expected = interpret(graph, arguments).outputs[0]
    weights, both = (
        relative_error(interpret(run(graph, text)[0], arguments).outputs[0], expected)
        for text in ("quantize-nvfp4", "quantize-nvfp4{mode=fp8-prompts}")
    )
    assert weights < both < 1.15 * weights


def test_remarks_say_where_fp8_is_made() -> None:
    ctx = PassContext()
    graph = build_step(ModelConfig.from_dict(BASE | WIDE, "here"))
    QuantizeNvfp4(mode="fp8-prompts").run(graph, ctx)
    said = {r.message.partition(" in ")[2] for r in ctx.remarks if not r.refused}
    assert said == {"NVFP4, and FP8 beside rows of prompts"}


def test_rows_of_a_table_are_quantized_before_they_are_gathered() -> None:
    graph = parse("""
    graph @step {
      input %x: f32[B, 32]
      input %token: i32[2*B] < B
      input %offsets: i32[4]
      param %layers.1.mixer.experts.up_proj: bf16[3, 16, 32]
      %rows = take_rows(%x, %token) : f32[2*B, 32]
      %y = grouped_linear(%rows, %layers.1.mixer.experts.up_proj, %offsets) : f32[2*B, 16]
      return %y
    }
    """)
    found = QuantizeNvfp4(mode="w4a4").run(graph, PassContext())
    scaled = [n.op.w.type for n in found.nodes if isinstance(n.op, Nvfp4GlobalScale)]
    assert TensorType(DType.F32, (B, 1, 32)) in scaled


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("quantize-nvfp4{mode=w3a3}", "option mode is 'w3a3', expected one of w4a16"),
        (
            "quantize-nvfp4{input-scale=-1.0}",
            "option input-scale is -1.0, expected 0 or a positive",
        ),
        ("quantize-nvfp4{dialect=mine}", "option dialect is 'mine'"),
        ('quantize-nvfp4{scope="("}', "option scope '(': expected all, experts or a regular"),
    ],
)
def test_bad_options_are_named(text: str, says: str) -> None:
    with pytest.raises(NemocError) as raised:
        parse_pipeline(text)
    assert says in str(raised.value)
