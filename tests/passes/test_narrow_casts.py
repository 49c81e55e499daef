"""Where casts go: rounding belongs to who makes a value, widening to who reads it, and memory holds the narrow one."""

import random
from collections.abc import Iterator
from functools import cache
from itertools import permutations

import pytest

from nemoc.ir import DType, Graph, Node, Value, ops, parse
from nemoc.ir.ops import Fused
from nemoc.models import build_step, open_model
from nemoc.passes import Pass, PassContext, TargetInfo, parse_pipeline, preset, run_pipeline
from nemoc.passes.check import NumericCheck
from nemoc.passes.dce import Dce
from nemoc.passes.presets import Phase
from support.models import SMALL

SIZES = {"B": 2, "L": 9, "C": 24}


def _fuse(text: str, passes: str) -> Graph:
    """A graph after passes and `dce`, each of which keeps every bit."""
    pipeline = parse_pipeline(f"{passes},dce")
    return run_pipeline(parse(text), pipeline, PassContext(), check=NumericCheck())


def _launches(graph: Graph) -> list[Node]:
    """What is carried out in a step."""
    return [n for n in graph.nodes if not isinstance(n.op, ops.Folded) and not n.op.is_view]


def _work(node: Node) -> list[str]:
    """The ops of a region without its views, or of a launch that is no region."""
    nodes = node.op.body.nodes if isinstance(node.op, Fused) else [node]
    return [n.op.mnemonic() for n in nodes if not n.op.is_view]


def _types(node: Node) -> list[str]:
    """What a launch writes."""
    return [str(v.type) for v in node.results]


def _widened(node: Node) -> Iterator[Value]:
    """Results of a region that are the widening of what the region or its operands have in a narrower type."""
    if not isinstance(node.op, Fused):
        return
    body = node.op.body
    for result, value in zip(node.results, body.outputs, strict=True):
        while (maker := body.producers.get(value)) is not None and maker.op.is_view:
            (value,) = maker.op.operands()
        cast = maker.op if maker is not None else None
        if isinstance(cast, ops.Cast) and cast.x.dtype.bytes < cast.dtype.bytes:
            yield result


MIXER = """graph @step {
  input %h: bf16[B, L, 6]
  input %valid: i32[B] < L + 1
  param %in: bf16[28, 6]
  param %w: f32[16, 4]
  param %bias: f32[16]
  param %a: f32[4]
  state %conv: f32[B, 3, 16]
  state %ssm: f32[B, 4, 2, 2]

  %projected = linear(%h, %in) : f32[B, L, 28]
  %rounded = cast(%projected) {dtype=bf16} : bf16[B, L, 28]
  %z = slice(%rounded) {axis=2, start=0, stop=8} : bf16[B, L, 8]
  %xbc = slice(%rounded) {axis=2, start=8, stop=24} : bf16[B, L, 16]
  %dt = slice(%rounded) {axis=2, start=24, stop=28} : bf16[B, L, 4]
  %xbc.wide = cast(%xbc) {dtype=f32} : f32[B, L, 16]
  %convolved, %conv.next = causal_conv(%xbc.wide, %w, %bias, %conv, %valid) : f32[B, L, 16], f32[B, 3, 16]
  %mixed = silu(%convolved) : f32[B, L, 16]
  %x = slice(%mixed) {axis=2, start=0, stop=8} : f32[B, L, 8]
  %b = slice(%mixed) {axis=2, start=8, stop=12} : f32[B, L, 4]
  %c = slice(%mixed) {axis=2, start=12, stop=16} : f32[B, L, 4]
  %x.heads = reshape(%x) {shape=[B, L, 4, 2]} : f32[B, L, 4, 2]
  %b.groups = reshape(%b) {shape=[B, L, 2, 2]} : f32[B, L, 2, 2]
  %c.groups = reshape(%c) {shape=[B, L, 2, 2]} : f32[B, L, 2, 2]
  %dt.wide = cast(%dt) {dtype=f32} : f32[B, L, 4]
  %step = softplus(%dt.wide) : f32[B, L, 4]
  %y, %next = ssd_scan(%x.heads, %step, %a, %b.groups, %c.groups, %a, %ssm, %valid) : f32[B, L, 4, 2], f32[B, 4, 2, 2]
  %y.flat = reshape(%y) {shape=[B, L, 8]} : f32[B, L, 8]
  %z.wide = cast(%z) {dtype=f32} : f32[B, L, 8]
  %gate = silu(%z.wide) : f32[B, L, 8]
  %gated = mul(%y.flat, %gate) : f32[B, L, 8]
  %out = cast(%gated) {dtype=bf16} : bf16[B, L, 8]
  return %out
  update %conv = %conv.next
  update %ssm = %next
}
"""


@pytest.mark.parametrize(
    "order", ["fuse-conv-scan,fuse-epilogues", "fuse-epilogues,fuse-conv-scan"]
)
def test_a_product_rounds_its_result_and_the_recurrence_reads_slices_of_that(order: str) -> None:
    product, mixer = _launches(_fuse(MIXER, order))
    assert (_work(product), _types(product)) == (["linear", "cast"], ["bf16[B, L, 28]"])
    assert {str(v.type) for v in mixer.op.operands()} >= {
        "bf16[B, L, 8]",
        "bf16[B, L, 16]",
        "bf16[B, L, 4]",
    }
    assert _types(mixer) == ["f32[B, 3, 16]", "f32[B, 4, 2, 2]", "bf16[B, L, 8]"]


def test_a_cast_is_left_to_its_producer_even_if_no_pass_comes_for_that() -> None:
    product, cast, _ = _launches(_fuse(MIXER, "fuse-conv-scan"))
    assert _work(product) + _work(cast) == ["linear", "cast"]


ROUNDED_INPUT = """graph @step {
  input %x: f32[B, L, 6]
  param %w: bf16[8, 6]

  %rounded = cast(%x) {dtype=bf16} : bf16[B, L, 6]
  %y = linear(%rounded, %w) : f32[B, L, 8]
  return %y
}
"""


def test_a_cast_of_what_nothing_makes_belongs_to_its_reader() -> None:
    (product,) = _launches(_fuse(ROUNDED_INPUT, "fuse-epilogues"))
    assert _work(product) == ["cast", "linear"]


MADE = """graph @step {{
  input %x: f32[B, L, 2, 4]
  param %w: bf16[5, 4]
  param %v: bf16[8, 4]

  {made}
  %rounded = cast(%made) {{dtype=bf16}} : bf16[B, L, 4]
  %y = linear(%rounded, %w) : f32[B, L, 5]
  return %y
}}
"""

REGION = """%made = fused([%x]) {kind="rows"} : f32[B, L, 4] {
    input %x: f32[B, L, 2, 4]

    %relu = relu(%x) : f32[B, L, 2, 4]
    %sum = sum(%relu) {axis=2} : f32[B, L, 4]
    return %sum
  }"""

PART = """%part = slice(%x) {axis=2, start=0, stop=1} : f32[B, L, 1, 4]
  %all = linear(%part, %v) : f32[B, L, 1, 8]
  %half = slice(%all) {axis=3, start=0, stop=4} : f32[B, L, 1, 4]
  %made = reshape(%half) {shape=[B, L, 4]} : f32[B, L, 4]"""

CONCAT = """%part = slice(%x) {axis=3, start=0, stop=2} : f32[B, L, 2, 2]
  %row = reshape(%part) {shape=[B, L, 4]} : f32[B, L, 4]
  %made = concat([%row]) {axis=2} : f32[B, L, 4]"""

SUM = """%summed = sum(%x) {axis=2} : f32[B, L, 4]
  %rows = reshape(%summed) {shape=[B*L, 4]} : f32[B*L, 4]
  %made = reshape(%rows) {shape=[B, L, 4]} : f32[B, L, 4]"""


@pytest.mark.parametrize("made", [REGION, PART, CONCAT], ids=["region", "part", "concat"])
def test_a_cast_that_its_producer_cannot_take_belongs_to_its_reader(made: str) -> None:
    *_, last = _launches(_fuse(MADE.format(made=made), "fuse-epilogues,fuse-rows"))
    assert _work(last) == ["cast", "linear"]


def test_a_cast_that_a_later_pass_gives_to_its_producer_is_left_to_it() -> None:
    rows, product = _launches(_fuse(MADE.format(made=SUM), "fuse-epilogues,fuse-rows"))
    assert (_work(rows), _work(product)) == (["sum", "cast"], ["linear"])


LATER = """graph @step {
  input %x: bf16[B, L, 6]
  input %y: bf16[B, L, 5]
  param %w: bf16[8, 6]
  param %up: bf16[7, 5]
  param %down: bf16[8, 7]

  %first = linear(%x, %w) : f32[B, L, 8]
  %wide = linear(%y, %up) : f32[B, L, 7]
  %positive = relu(%wide) : f32[B, L, 7]
  %active = cast(%positive) {dtype=bf16} : bf16[B, L, 7]
  %second = linear(%active, %down) : f32[B, L, 8]
  %sum = add(%first, %second) : f32[B, L, 8]
  return %sum
}
"""


def test_what_is_rounded_behind_a_later_product_is_its_epilogue() -> None:
    works = [_work(node) for node in _launches(_fuse(LATER, "fuse-epilogues"))]
    assert works == [["linear", "relu", "cast"], ["linear", "linear", "add"]]
    works = [_work(node) for node in _launches(_fuse(LATER, "fuse-epilogues{epilogues=false}"))]
    assert works == [["linear"], ["linear"], ["relu", "cast", "linear"], ["add"]]


RESIDUALS = """graph @step {{
  input %x: bf16[B, L, 6]
  input %h: bf16[B, L, 8]
  param %w: bf16[8, 6]
  param %norm: f32[8]
  param %v: bf16[8, 8]

  %h.wide = cast(%h) {{dtype=f32}} : f32[B, L, 8]
  %p = linear(%x, %w) : f32[B, L, 8]
  %sum = add(%h.wide, %p) : f32[B, L, 8]
  %sum.rounded = cast(%sum) {{dtype=bf16}} : bf16[B, L, 8]
  %sum.wide = cast(%sum.rounded) {{dtype=f32}} : f32[B, L, 8]
  %normed = rms_norm(%sum.wide, %norm) {{eps=1e-05}} : f32[B, L, 8]
  %normed.rounded = cast(%normed) {{dtype=bf16}} : bf16[B, L, 8]
  %q = linear(%normed.rounded, %v) : f32[B, L, 8]
  %next = {next}
  %next.rounded = cast(%next) {{dtype=bf16}} : bf16[{shape}]
  return %next.rounded{also}
}}
"""


def _residuals(following: str, shape: str = "B, L, 8", also: str = "") -> list[Node]:
    next_ = f"{following} : f32[{shape}]"
    text = RESIDUALS.format(next=next_, shape=shape, also=also)
    return _launches(_fuse(text, "fuse-epilogues,fuse-rows"))


def test_each_reader_of_a_rounded_residual_widens_it_for_itself() -> None:
    first, second = _residuals("add(%sum.wide, %q)")
    assert _work(first) == ["cast", "linear", "add", "cast"]
    assert _types(first) == ["bf16[B, L, 8]"]
    assert sorted(_work(second)) == ["add", "cast", "cast", "cast", "linear", "rms_norm"]
    assert first.results[0] in second.op.operands()


def test_a_widened_value_that_the_graph_returns_is_handed_out() -> None:
    first, _ = _residuals("add(%sum.wide, %q)", also=", %sum.wide")
    assert "f32[B, L, 8]" in _types(first)


def test_a_widened_value_that_an_op_without_a_region_reads_is_handed_out() -> None:
    first, *_ = _residuals("concat([%sum.wide, %q]) {axis=2}", "B, L, 16")
    assert "f32[B, L, 8]" in _types(first)


VIEWS = """graph @step {
  input %x: bf16[B, L, 6]
  param %w: bf16[8, 6]
  param %v: bf16[5, 8]

  %p = linear(%x, %w) : f32[B, L, 8]
  %p.rounded = cast(%p) {dtype=bf16} : bf16[B, L, 8]
  %p.wide = cast(%p.rounded) {dtype=f32} : f32[B, L, 8]
  %p.rows = reshape(%p.wide) {shape=[B*L, 8]} : f32[B*L, 8]
  %positive = relu(%p.rows) : f32[B*L, 8]
  %q = linear(%p.rows, %v) : f32[B*L, 5]
  return %positive, %q
}
"""


def test_a_view_of_a_widened_value_is_not_handed_out_either() -> None:
    first, second = _launches(_fuse(VIEWS, "fuse-epilogues"))
    assert _types(first) == ["bf16[B, L, 8]", "f32[B*L, 8]"]
    assert _work(second) == ["cast", "linear"]


TABLE = """graph @step {{
  input %tokens: i32[B, L] < 11
  param %table: bf16[11, 6]
  param %w: bf16[6, 6]

  %rows = take_rows(%table, %tokens) : bf16[B, L, 6]
  %wide = cast(%rows) {{dtype=f32}} : f32[B, L, 6]
  %s = silu(%wide) : f32[B, L, 6]
  %x = {x}
  %p = linear(%x, %w) : f32[B, L, 6]
  %y = relu(%wide) : f32[B, L, 6]
  return %p, %y
}}
"""


def test_rows_of_a_narrow_table_are_widened_at_once_unless_the_step_rounds() -> None:
    plain = TABLE.format(x="scale(%s) {factor=2.0} : f32[B, L, 6]")
    gather, product = _launches(_fuse(plain, "fuse-epilogues,fuse-rows"))
    assert (_work(gather), _types(gather)) == (["take_rows", "cast", "relu"], ["f32[B, L, 6]"] * 2)
    assert _work(product) == ["silu", "scale", "linear"]
    rounded = TABLE.format(x="cast(%s) {dtype=bf16} : bf16[B, L, 6]")
    gather, product = _launches(_fuse(rounded, "fuse-epilogues,fuse-rows"))
    assert _work(gather) == ["take_rows", "cast", "relu"]
    assert _types(gather) == ["bf16[B, L, 6]", "f32[B, L, 6]"]
    assert _work(product) == ["cast", "silu", "cast", "linear"]


ELSEWHERE = """graph @step {
  input %tokens: i32[B, L] < 11
  input %x: bf16[B, L, 6]
  param %table: bf16[11, 6]
  param %w: bf16[6, 6]

  %p = linear(%x, %w) : f32[B, L, 6]
  %p.rounded = cast(%p) {dtype=bf16} : bf16[B, L, 6]
  %rows = take_rows(%table, %tokens) : bf16[B, L, 6]
  %wide = cast(%rows) {dtype=f32} : f32[B, L, 6]
  %y = relu(%wide) : f32[B, L, 6]
  %z = sum(%wide) {axis=1} : f32[B, 6]
  return %p.rounded, %y, %z
}
"""


def test_what_regions_round_says_that_the_step_rounds() -> None:
    rows, sums, _ = _launches(_fuse(ELSEWHERE, "fuse-epilogues,fuse-rows"))
    assert _types(rows) == ["bf16[B, L, 6]", "f32[B, L, 6]"]
    assert _work(sums) == ["cast", "sum"]


ATTENTION = """graph @step {
  input %x: bf16[B, L, 6]
  param %w: bf16[12, 6]
  param %o: bf16[6, 12]
  state %k: bf16[B, C, 2, 3]
  state %v: bf16[B, C, 2, 3]
  state %lengths: i32[B] < C - L + 1

  %q = linear(%x, %w) : f32[B, L, 12]
  %q.rounded = cast(%q) {dtype=bf16} : bf16[B, L, 12]
  %q.wide = cast(%q.rounded) {dtype=f32} : f32[B, L, 12]
  %heads = reshape(%q.wide) {shape=[B, L, 4, 3]} : f32[B, L, 4, 3]
  %attended = attention(%heads, %k, %v, %lengths) {scale=0.5} : f32[B, L, 4, 3]
  %flat = reshape(%attended) {shape=[B, L, 12]} : f32[B, L, 12]
  %rounded = cast(%flat) {dtype=bf16} : bf16[B, L, 12]
  %y = linear(%rounded, %o) : f32[B, L, 6]
  return %y
  update %k = %k
  update %v = %v
  update %lengths = %lengths
}
"""


def test_attention_takes_the_casts_around_it() -> None:
    first, attention, last = _launches(_fuse(ATTENTION, "fuse-epilogues"))
    assert (_work(first), _types(first)) == (["linear", "cast"], ["bf16[B, L, 12]"])
    assert _work(attention) == ["cast", "attention", "cast"]
    assert _types(attention) == ["bf16[B, L, 12]"]
    assert _work(last) == ["linear"]


EXPERTS = """graph @moe {
  input %h: bf16[B, L, 6]
  param %norm: f32[6]
  param %gate: bf16[4, 6]
  param %up: bf16[4, 5, 6]
  param %down: bf16[4, 6, 5]
  param %shared: bf16[6, 6]

  %h.wide = cast(%h) {dtype=f32} : f32[B, L, 6]
  %normed = rms_norm(%h.wide, %norm) {eps=1e-05} : f32[B, L, 6]
  %rounded = cast(%normed) {dtype=bf16} : bf16[B, L, 6]
  %x = reshape(%rounded) {shape=[B*L, 6]} : bf16[B*L, 6]
  %x.wide = cast(%x) {dtype=f32} : f32[B*L, 6]
  %logits = linear(%x.wide, %gate) : f32[B*L, 4]
  %scores = sigmoid(%logits) : f32[B*L, 4]
  %chosen = top_k(%scores) {k=2} : i32[B*L, 2]
  %weights = take_along(%scores, %chosen) : f32[B*L, 2]
  %order, %position, %offsets = group_by(%chosen) {groups=4} : i32[2*B*L], i32[2*B*L], i32[5]
  %token = floor_div(%order) {divisor=2} : i32[2*B*L]
  %rows = take_rows(%x, %token) : bf16[2*B*L, 6]
  %wide = grouped_linear(%rows, %up, %offsets) : f32[2*B*L, 5]
  %active = relu(%wide) : f32[2*B*L, 5]
  %active.rounded = cast(%active) {dtype=bf16} : bf16[2*B*L, 5]
  %narrow = grouped_linear(%active.rounded, %down, %offsets) : f32[2*B*L, 6]
  %narrow.rounded = cast(%narrow) {dtype=bf16} : bf16[2*B*L, 6]
  %slots = take_rows(%narrow.rounded, %position) : bf16[2*B*L, 6]
  %slots.wide = cast(%slots) {dtype=f32} : f32[2*B*L, 6]
  %slots.view = reshape(%slots.wide) {shape=[B*L, 2, 6]} : f32[B*L, 2, 6]
  %weights.view = reshape(%weights) {shape=[B*L, 2, 1]} : f32[B*L, 2, 1]
  %weighted = mul(%slots.view, %weights.view) : f32[B*L, 2, 6]
  %routed = sum(%weighted) {axis=1} : f32[B*L, 6]
  %routed.rounded = cast(%routed) {dtype=bf16} : bf16[B*L, 6]
  %routed.wide = cast(%routed.rounded) {dtype=f32} : f32[B*L, 6]
  %beside = linear(%x, %shared) : f32[B*L, 6]
  %both = add(%routed.wide, %beside) : f32[B*L, 6]
  %both.view = reshape(%both) {shape=[B, L, 6]} : f32[B, L, 6]
  %y = add(%h.wide, %both.view) : f32[B, L, 6]
  %y.rounded = cast(%y) {dtype=bf16} : bf16[B, L, 6]
  return %y.rounded
}
"""


def test_a_layer_of_rounded_experts_is_three_regions() -> None:
    router, experts, combine = _launches(_fuse(EXPERTS, "fuse-moe-dispatch"))
    assert _work(router)[:5] == ["cast", "rms_norm", "cast", "cast", "linear"]
    assert _types(router)[0] == "bf16[B, L, 6]"
    assert (_work(experts)[-1], _types(experts)) == ("cast", ["bf16[2*B*L, 5]"])
    assert _types(combine) == ["bf16[B, L, 6]"]
    assert sum(_work(combine).count(name) for name in ("linear", "grouped_linear")) == 2
    floats = [v for v in combine.op.operands() if v.dtype.is_float and "B" in v.type.symbols]
    assert {v.dtype for v in floats if v.type.rank < 3 or v.shape[-1] == 6} == {DType.BF16}


def test_slots_that_no_product_combines_are_weighted_and_summed_in_one_region() -> None:
    passes = "fuse-moe-dispatch{combine=false},fuse-epilogues,fuse-rows"
    *_, product, rows, last = _launches(_fuse(EXPERTS, passes))
    assert _work(product) == ["grouped_linear", "cast"]
    assert _work(rows) == ["take_rows", "cast", "mul", "sum", "cast"]
    assert _types(rows) == ["bf16[B*L, 6]"]
    assert "linear" in _work(last)


SUMS = """graph @step {{
  input %tokens: i32[B, L] < 11
  input %x: f32[{flat}]

  %s = silu(%x) : f32[{flat}]
  %view = reshape(%s) {{shape=[{rows}]}} : f32[{rows}]
  %sum = sum(%view) {{axis={axis}}} : f32[{left}]
  %y = relu(%sum) : f32[{left}]
  return %y{also}
}}
"""


@pytest.mark.parametrize(
    ("flat", "rows", "axis", "left", "also", "joined"),
    [
        ("2*B*L, 6", "B, L, 2, 6", 2, "B, L, 6", "", True),
        ("2*B*L, 6", "B, L, 2, 6", 2, "B, L, 6", ", %s", False),  # results would have other rows
        ("2*B*L, 6", "B, 2, L, 6", 1, "B, L, 6", "", False),  # not of neighbours
        ("B*L, 6", "B, L, 6", 1, "B, 6", "", False),  # of any number
        ("2, 2, 6", "4, 6", 0, "6", "", False),  # of all rows
    ],
)
def test_sums_over_neighbouring_rows_join_them(
    flat: str, rows: str, axis: int, left: str, also: str, joined: bool
) -> None:
    text = SUMS.format(flat=flat, rows=rows, axis=axis, left=left, also=also)
    works = [_work(node) for node in _launches(_fuse(text, "fuse-rows"))]
    assert works == ([["silu", "sum", "relu"]] if joined else [["silu"], ["sum", "relu"]])


FUSIONS = tuple(p for p in preset("cpu", "prefill") if p.name.startswith("fuse-"))


@cache
def _unfused(name: str, phase: Phase, dtype: DType) -> Graph:
    model = open_model(name) if name == "sample" else None
    graph = build_step(SMALL, dtype=dtype) if model is None else model.build_step(dtype=dtype)
    passes = [p for p in preset("cpu", phase) if p not in FUSIONS]
    return run_pipeline(graph, passes, PassContext(TargetInfo("cpu")))


def _fused(name: str, phase: Phase, dtype: DType, fusions: tuple[Pass, ...] = FUSIONS) -> Graph:
    check = NumericCheck(SIZES) if dtype is DType.BF16 else None
    passes = (*fusions, Dce())
    return run_pipeline(_unfused(name, phase, dtype), passes, PassContext(), check=check)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_rounded_model_has_the_launches_of_the_plain_one_and_stores_nothing_wide(
    phase: Phase,
) -> None:
    plain, rounded = (_fused("sample", phase, d) for d in (DType.F32, DType.BF16))
    assert [v for node in rounded.nodes for v in _widened(node)] == []
    assert len(_launches(rounded)) <= len(_launches(plain))
    # Wide are the logits, the weights of experts, and nothing else that is no state.
    states = {v.type for v in rounded.states}
    wide = {
        v.type.shape[-1]
        for node in _launches(rounded)
        for v in node.results
        if v.dtype is DType.F32 and v.type not in states
    }
    assert wide == {4096, 2}


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("order", random.Random(1).sample([*permutations(range(4))], 3), ids=str)
def test_fusions_of_a_rounded_model_keep_every_bit_in_any_order(
    order: tuple[int, ...], phase: Phase
) -> None:
    _fused("small", phase, DType.BF16, tuple(FUSIONS[i] for i in order))
