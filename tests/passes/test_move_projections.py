"""Projections on the wrong side of gathers and sums move to the cheap one; others stay, and it is said why."""

from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemoc.ir import Builder, DType, Graph, NemocError, Value, interpret, ops, parse, verify
from nemoc.ir.cost import Cost
from nemoc.ir.dims import B, L, product
from nemoc.ir.rewrite import Rule
from nemoc.ir.sample_inputs import sample_arguments
from nemoc.models import build_step
from nemoc.passes import PassContext, parse_pipeline, run_pipeline
from nemoc.passes.check import NumericCheck, relative_error
from nemoc.passes.dce import Dce
from nemoc.passes.move_projections import RULES, MoveProjections
from nemoc.passes.specialize_decode import SpecializeDecode
from support.models import SMALL

SIZES = {"B": 2, "L": 7}
GOLDEN = Path(__file__).parent.parent / "golden" / "passes" / "move_projections"


def _cost(graph: Graph) -> Cost:
    return sum((node.op.cost() for node in graph.nodes), Cost())


def _latent_moe(cheap: bool, block: int = 1, weight: DType = DType.BF16) -> Graph:
    """Experts of width 6 behind a hidden size of 20: projected for each token, or (not cheap) for each slot."""
    b = Builder("moe")
    hidden = b.input("x", DType.F32, (B, L, 20))
    chosen = b.input("chosen", DType.I32, (B * L, 3), bound=4)
    weights = b.input("weights", DType.F32, (B * L, 3))
    x = b(ops.Reshape(hidden, (B * L, 20)))

    def project(rows: Value, name: str, width: int) -> Value:
        w = b.param(name, weight, (width, rows.shape[-1]))
        if block == 1:
            return b(ops.Linear(rows, w))
        w = b(ops.Interleave(w, block))
        return b(ops.Linear(rows, w, interleave=block, features=width))

    order, position, offsets = b.all(ops.GroupBy(chosen, 4))
    token = b(ops.FloorDiv(order, 3))
    rows = b(ops.TakeRows(project(x, "fc1", 6) if cheap else x, token))
    rows = rows if cheap else project(rows, "fc1", 6)
    experts = b.param("experts", DType.F32, (4, 6, 6))
    made = b(ops.GroupedLinear(rows, experts, offsets))
    made = made if cheap else project(made, "fc2", 20)
    slots = b(ops.TakeRows(made, position))
    slots = b(ops.Reshape(slots, (B * L, 3, slots.shape[-1])))
    each = b(ops.Reshape(weights, (B * L, 3, 1)))
    y = b(ops.Sum(b(ops.Mul(slots, each)), 1))
    return b.finish([project(y, "fc2", 20) if cheap else y])


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("weight", [DType.BF16, DType.F32], ids=str)
def test_latent_experts_in_the_dear_order_become_as_cheap(block: int, weight: DType) -> None:
    dear, cheap = (_latent_moe(order, block, weight) for order in (False, True))
    assert _cost(dear).flops != _cost(cheap).flops
    ctx = PassContext()
    passes = (MoveProjections(), Dce())
    after = run_pipeline(dear, passes, ctx, check=NumericCheck(SIZES))
    assert _cost(after) == _cost(cheap)
    said = [r.message for r in ctx.remarks if r.pass_name == "move-projections"]
    assert said == ["project-before-gather", "project-after-combine"]


def test_cheap_order_stays() -> None:
    graph, ctx = _latent_moe(cheap=True), PassContext()
    assert MoveProjections().run(graph, ctx) is graph
    assert not ctx.changes


@pytest.mark.parametrize("logits", ["last", "all"])
def test_models_as_they_are_built_have_the_cheap_order(logits: Literal["last", "all"]) -> None:
    step = build_step(SMALL, logits=logits)
    for graph in (step, SpecializeDecode().run(step, PassContext())):
        ctx = PassContext()
        assert MoveProjections().run(graph, ctx) is graph
        assert not ctx.changes
        assert [r.site for r in ctx.remarks] == [f"{graph.name}/%layers.{n}.rows" for n in (1, 4)]


@st.composite
def _chains(draw: st.DrawFn) -> Graph:
    """Products, gathers, views, weights and sums in any order, some of whose values are results too."""
    b = Builder("chain")
    h = b.input("x", DType.F32, (B, L, 4))
    valid = b.input("valid", DType.I32, (B,), bound=L + 1)
    kept: list[Value] = []
    for number in range(draw(st.integers(2, 8))):
        rank = h.type.rank
        match draw(st.sampled_from(["linear", "linear", "pick", "cut", "weigh", "sum", "last"])):
            case "linear":
                w = b.param(
                    f"w{number}", DType.F32, (draw(st.sampled_from([1, 2, 9])), h.shape[-1])
                )
                h = b(ops.Linear(h, w))
            case "pick" if rank > 1:
                shape = draw(st.sampled_from([(B,), (B, 2), (B, 3 * L), (2,)]))
                index = b.input(f"i{number}", DType.I32, shape, bound=h.shape[0])
                h = b(ops.TakeRows(h, index))
            case "cut" if rank > 1:
                rows = product(h.shape[:-1])
                h = b(ops.Reshape(h, draw(st.sampled_from([(rows,), (1, rows)])) + h.shape[-1:]))
            case "weigh":
                shape = draw(st.sampled_from([(), (1,), (3, *(1,) * rank), (*h.shape[:-1], 1)]))
                factors = (h, b.input(f"f{number}", DType.F32, shape))
                h = b(ops.Mul(*draw(st.permutations(factors))))
            case "sum" if rank > 1:
                h = b(ops.Sum(h, draw(st.integers(0, rank - 1))))
            case "last" if h.shape[:2] == (B, L) and rank == 3:
                h = b(ops.TakeLast(h, valid))
        if draw(st.integers(0, 9)) == 0:
            kept.append(h)
        if not h.type.rank:
            break
    return b.finish([h, *kept])


@settings(max_examples=300)
@given(graph=_chains(), share=st.floats(0, 1))
def test_any_number_of_moves_keeps_the_results_and_saves_what_it_says(
    graph: Graph, share: float
) -> None:
    whole = PassContext()
    rest = MoveProjections().run(graph, whole)
    assert MoveProjections().run(rest, PassContext()) is rest
    ctx = PassContext(limit=round(share * len(whole.changes)))
    after = MoveProjections().run(graph, ctx)
    verify(after)
    before, now = (_cost(Dce().run(g, PassContext())) for g in (graph, after))
    assert sum((r.saved for r in ctx.changes), now) == before
    arguments = sample_arguments(graph, {"B": 2, "L": 3})
    old, new = (interpret(g, arguments, float64=True).outputs for g in (graph, after))
    for a, b in zip(new, old, strict=True):
        assert relative_error(a, b) < 1e-9


def test_names_of_rules_are_unique_and_each_has_a_case() -> None:
    names = {rule.name for rule in RULES}
    assert len(names) == len(RULES)
    assert names <= {path.stem for path in GOLDEN.glob("*.ir")}


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_each_rule_can_be_left_out(rule: Rule) -> None:
    text = (GOLDEN / f"{rule.name}.ir").read_text().partition("// ---\n")[0]
    (pass_,) = parse_pipeline(f"move-projections{{without=[{rule.name}]}}")
    graph = parse(text)
    assert pass_.run(graph, PassContext()) is graph
    assert MoveProjections().run(graph, PassContext()) is not graph


def test_unknown_rule_is_refused() -> None:
    with pytest.raises(NemocError) as caught:
        MoveProjections(without=("project-after-gathr",))
    assert str(caught.value).startswith(
        "pass move-projections: option without names no rule 'project-after-gathr', "
        "did you mean project-after-gather"
    )


ARGUMENTS = """graph @g {
  input %x: f32[B, L, 6]
  input %narrow: bf16[B, L, 6]
  input %one: f32[B, L, 1]
  input %valid: i32[B] < L + 1
  input %ids: i32[B, L] < 9
  param %table: f32[9, 6]
  param %flat: f32[6]
  param %square: f32[6, 6]
  param %half: bf16[6, 6]
  param %w: f32[20, 6]
  param %v: f32[1, 6]
  param %bias: f32[20]
"""


def _graph(body: str) -> Graph:
    return parse(f"{ARGUMENTS}\n{body}\n}}")


COMBINE = "%y = linear(%x, %w) : f32[B, L, 20]\n%s = sum(%y) {axis=1} : f32[B, 20]\n"

REFUSALS = {
    "another reader": (
        f"{COMBINE}%t = silu(%y) : f32[B, L, 20]\nreturn %s, %t",
        "g/%s: project-after-combine: linear stays, since what it makes is read elsewhere",
    ),
    "a result of the graph": (
        f"{COMBINE}return %s, %y",
        "g/%s: project-after-combine: linear stays, since what it makes is read elsewhere",
    ),
    "another reader half way": (
        "%y = linear(%x, %w) : f32[B, L, 20]\n%z = mul(%y, %one) : f32[B, L, 20]\n"
        "%s = sum(%z) {axis=1} : f32[B, 20]\nreturn %s, %z",
        "g/%s: project-after-combine: linear stays, since what it makes is read elsewhere",
    ),
    "weights that are the product itself": (
        "%y = linear(%x, %v) : f32[B, L, 1]\n%z = mul(%y, %y) : f32[B, L, 1]\n"
        "%s = sum(%z) {axis=1} : f32[B, 1]\nreturn %s",
        "g/%s: project-after-combine: linear stays, since what it makes is read elsewhere",
    ),
    "more rows before the weights": (
        "%u = linear(%flat, %w) : f32[20]\n%z = mul(%u, %one) : f32[B, L, 20]\n"
        "%s = sum(%z) {axis=1} : f32[B, 20]\nreturn %s",
        "g/%s: project-after-combine: linear stays, since 12*B*L + 240*B flops would take the "
        "place of 40*B*L + 240",
    ),
    "a table whose rows may be more": (
        "%rows = take_rows(%table, %ids) : f32[B, L, 6]\n"
        "%y = linear(%rows, %w) : f32[B, L, 20]\nreturn %y",
        "g/%y: project-before-gather: linear stays, since 2160 flops would take the place of "
        "240*B*L",
    ),
    "a table whose rows may be fewer": (
        "%all = linear(%table, %w) : f32[9, 20]\n"
        "%y = take_rows(%all, %ids) : f32[B, L, 20]\nreturn %y",
        "g/%y: project-after-gather: linear stays, since 240*B*L flops would take the place of "
        "2160",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal_says_why(case: str) -> None:
    body, expected = REFUSALS[case]
    graph, ctx = _graph(body), PassContext()
    assert MoveProjections().run(graph, ctx) is graph
    assert [f"{r.site}: {r.message}" for r in ctx.remarks] == [expected]
    assert all(r.refused for r in ctx.remarks)


OTHERS = {
    "a bias in between": "%y = linear(%x, %w) : f32[B, L, 20]\n"
    "%z = add(%y, %bias) : f32[B, L, 20]\n%s = sum(%z) {axis=1} : f32[B, 20]\nreturn %s",
    "a rounding in between": "%y = linear(%x, %w) : f32[B, L, 20]\n"
    "%z = cast(%y) {dtype=bf16} : bf16[B, L, 20]\n"
    "%s = take_last(%z, %valid) : bf16[B, 20]\nreturn %s",
    "rows narrower than their sum": "%y = linear(%narrow, %half) : f32[B, L, 6]\n"
    "%s = sum(%y) {axis=1} : f32[B, 6]\nreturn %s",
    "weights for each column": "%y = linear(%x, %w) : f32[B, L, 20]\n"
    "%z = mul(%y, %bias) : f32[B, L, 20]\n%s = sum(%z) {axis=1} : f32[B, 20]\nreturn %s",
    "a sum over columns": "%y = linear(%x, %w) : f32[B, L, 20]\n"
    "%s = sum(%y) {axis=2} : f32[B, L]\nreturn %s",
    "a view that cuts rows": "%y = linear(%x, %w) : f32[B, L, 20]\n"
    "%z = reshape(%y) {shape=[B, 4*L, 5]} : f32[B, 4*L, 5]\n"
    "%s = sum(%z) {axis=1} : f32[B, 5]\nreturn %s",
    "a table of numbers": "%y = linear(%flat, %w) : f32[20]\n"
    "%s = take_rows(%y, %ids) : f32[B, L]\nreturn %s",
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_no_such_site_is_passed_over(case: str) -> None:
    graph, ctx = _graph(OTHERS[case]), PassContext()
    assert MoveProjections().run(graph, ctx) is graph
    assert not ctx.remarks


def _moved(body: str) -> tuple[Graph, PassContext]:
    ctx = PassContext()
    passes = (MoveProjections(), Dce())
    return run_pipeline(_graph(body), passes, ctx, check=NumericCheck(SIZES)), ctx


def test_reader_that_nobody_needs_does_not_count() -> None:
    after, _ = _moved(f"{COMBINE}%t = silu(%y) : f32[B, L, 20]\nreturn %s")
    assert [type(node.op) for node in after.nodes] == [ops.Sum, ops.Linear]


def test_several_products_move_in_turn() -> None:
    after, ctx = _moved(
        "%u = linear(%x, %square) : f32[B, L, 6]\n%y = linear(%u, %w) : f32[B, L, 20]\n"
        "%s = sum(%y) {axis=1} : f32[B, 20]\nreturn %s"
    )
    assert [type(node.op) for node in after.nodes] == [ops.Sum, ops.Linear, ops.Linear]
    assert sum(r.message == "project-after-combine" for r in ctx.changes) == 2


def test_rows_that_others_gather_too_are_projected_before() -> None:
    after, ctx = _moved(
        "%tokens = reshape(%x) {shape=[B*L, 6]} : f32[B*L, 6]\n"
        "%twice = concat([%ids, %ids]) {axis=1} : i32[B, 2*L]\n"
        "%rows = take_rows(%tokens, %twice) : f32[B, 2*L, 6]\n"
        "%y = linear(%rows, %w) : f32[B, 2*L, 20]\n"
        "%z = linear(%rows, %square) : f32[B, 2*L, 6]\nreturn %y, %z"
    )
    kinds = [type(node.op) for node in after.nodes]
    assert kinds[2:] == [ops.Linear, ops.TakeRows, ops.Linear, ops.TakeRows]
    first, second = (r.saved for r in ctx.changes[:2])
    assert first.flops == 240 * B * L and second.flops == 72 * B * L


def test_product_of_a_value_with_itself_keeps_its_weight() -> None:
    after, _ = _moved(
        "%y = linear(%square, %square) : f32[6, 6]\n%s = sum(%y) {axis=0} : f32[6]\nreturn %s"
    )
    total, product = after.nodes
    square = next(p for p in after.params if p.name == "square")
    assert product.op == ops.Linear(total.results[0], square)


def test_limit_stops_between_moves() -> None:
    graph = _latent_moe(cheap=False)
    ctx = PassContext(limit=1)
    after = Dce().run(MoveProjections().run(graph, ctx), PassContext())
    assert _cost(graph).flops - _cost(after).flops == ctx.changes[0].saved.flops
