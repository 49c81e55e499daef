"""Regions divided into parts that one launch can do."""

import torch

from nemoc.codegen.triton.divide import divide, divide_body
from nemoc.ir import Env, Graph, parse
from nemoc.ir.ops import Fused
from nemoc.ir.region import apply_op
from nemoc.ir.sample_inputs import sample_arguments
from nemoc.ir.verifier import verify

SIZES = {"B": 2, "L": 3, "C": 8}


def body(text: str) -> Graph:
    return parse(f"graph @body {{\n{text}\n}}\n")


def parts(graph: Graph) -> list[list[str]]:
    """The ops of each part in order; a view is a part of its own."""
    return [
        [n.op.mnemonic() for n in node.op.body.nodes]
        if isinstance(node.op, Fused)
        else [node.op.mnemonic()]
        for node in graph.nodes
    ]


def assert_same_meaning(before: Graph, after: Graph) -> None:
    arguments = sample_arguments(before, SIZES)
    operands = [arguments[v.name] for v in before.inputs]
    env = Env(SIZES)
    found, expected = (
        apply_op(Fused(before.inputs, graph), env, operands) for graph in (after, before)
    )
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


LINEAR = """
  input %x: f32[B, L, 6]
  input %weight: f32[6]
  input %w: bf16[4, 6]
  %n = rms_norm(%x, %weight) {eps=1e-05} : f32[B, L, 6]
  %y = linear(%n, %w) : f32[B, L, 4]
  %z = relu(%y) : f32[B, L, 4]
  return %z
"""


def test_a_norm_of_many_rows_goes_through_memory() -> None:
    graph = body(LINEAR)
    divided = divide_body(graph)
    assert parts(divided) == [["rms_norm"], ["linear", "relu"]]
    assert_same_meaning(graph, divided)


def test_a_norm_of_few_rows_is_computed_by_every_program() -> None:
    graph = body(LINEAR.replace("[B, L, ", "[B, 1, "))
    assert divide_body(graph) is graph


def test_a_norm_that_is_a_result_is_computed_once_even_for_few_rows() -> None:
    graph = body(LINEAR.replace("[B, L, ", "[B, 1, ").replace("return %z", "return %z, %n"))
    assert parts(divide_body(graph)) == [["rms_norm"], ["linear", "relu"]]


def test_a_norm_of_groups_is_never_part_of_a_product() -> None:
    few = LINEAR.replace("[B, L, ", "[B, 1, ").replace("1e-05}", "1e-05, groups=2}")
    assert parts(divide_body(body(few))) == [["rms_norm"], ["linear", "relu"]]


ROUTER = """
  input %x: f32[B, 6]
  input %w: bf16[8, 6]
  %y = linear(%x, %w) : f32[B, 8]
  %s = sigmoid(%y) : f32[B, 8]
  %k = top_k(%s) {k=2} : i32[B, 2]
  %p = take_along(%s, %k) : f32[B, 2]
  %order, %position, %offsets = group_by(%k) {groups=8} : i32[2*B], i32[2*B], i32[9]
  %token = floor_div(%order) {divisor=2} : i32[2*B]
  return %p, %token, %offsets
"""


def test_a_router_is_a_product_then_rows_then_a_sort() -> None:
    graph = body(ROUTER)
    divided = divide_body(graph)
    assert parts(divided) == [
        ["linear", "sigmoid"],
        ["top_k", "take_along"],
        ["group_by", "floor_div"],
    ]
    assert_same_meaning(graph, divided)


COMBINE = """
  input %x: f32[2*B, 6]
  input %w: bf16[3, 4, 6]
  input %offsets: i32[4] < 2*B + 1
  input %position: i32[2*B] < 2*B
  input %weights: f32[B, 2, 1]
  input %shared: f32[B, 5]
  input %v: bf16[4, 5]
  %y = grouped_linear(%x, %w, %offsets) : f32[2*B, 4]
  %slots = take_rows(%y, %position) : f32[2*B, 4]
  %view = reshape(%slots) {shape=[B, 2, 4]} : f32[B, 2, 4]
  %weighted = mul(%view, %weights) : f32[B, 2, 4]
  %routed = sum(%weighted) {axis=1} : f32[B, 4]
  %own = linear(%shared, %v) : f32[B, 4]
  %both = add(%routed, %own) : f32[B, 4]
  return %both
"""


def test_gathered_rows_are_summed_behind_the_product_that_they_are_added_to() -> None:
    divided = divide_body(body(COMBINE))
    assert parts(divided) == [
        ["grouped_linear"],
        ["take_rows", "reshape", "mul", "sum", "linear", "add"],
    ]


def test_products_of_one_size_that_are_added_are_one_part() -> None:
    graph = body("""
      input %x: f32[B, L, 6]
      input %z: f32[B*L, 3]
      input %w: bf16[4, 6]
      input %v: bf16[4, 3]
      %a = linear(%x, %w) : f32[B, L, 4]
      %b = linear(%z, %v) : f32[B*L, 4]
      %c = reshape(%b) {shape=[B, L, 4]} : f32[B, L, 4]
      %d = add(%a, %c) : f32[B, L, 4]
      return %d
    """)
    assert divide_body(graph) is graph


def test_a_product_of_a_product_is_two_parts() -> None:
    graph = body("""
      input %x: f32[B, 4]
      input %w: bf16[4, 4]
      %a = linear(%x, %w) : f32[B, 4]
      %r = relu(%a) : f32[B, 4]
      %b = linear(%r, %w) : f32[B, 4]
      %c = add(%a, %b) : f32[B, 4]
      return %c
    """)
    divided = divide_body(graph)
    assert parts(divided) == [["linear", "relu"], ["linear", "add"]]
    assert_same_meaning(graph, divided)


def test_a_slice_of_a_product_is_another_part() -> None:
    graph = body("""
      input %x: f32[B, 4]
      input %w: bf16[6, 4]
      %a = linear(%x, %w) : f32[B, 6]
      %s = slice(%a) {axis=1, start=2, stop=5} : f32[B, 3]
      %r = relu(%s) : f32[B, 3]
      return %r
    """)
    assert parts(divide_body(graph)) == [["linear"], ["slice", "relu"]]


def test_a_stored_view_of_a_stored_value_is_no_launch() -> None:
    graph = body("""
      input %x: f32[B, L, 4]
      %a = relu(%x) : f32[B, L, 4]
      %b = reshape(%a) {shape=[B*L, 4]} : f32[B*L, 4]
      %w = full() {value=1.0, dtype=bf16, shape=[3, 4]} : bf16[3, 4]
      %y = linear(%b, %w) : f32[B*L, 3]
      return %a, %b, %y
    """)
    assert parts(divide_body(graph))[:2] == [["relu"], ["reshape"]]


def test_divided_regions_take_the_place_of_the_region() -> None:
    text = "\n".join(f"    {line}" for line in ROUTER.strip().splitlines())
    inner = parse(
        """
graph @step {
  input %x: f32[B, 6]
  input %w: bf16[8, 6]

  %p, %token, %offsets = fused([%x, %w]) {kind="router"} : f32[B, 2], i32[2*B], i32[9] {
"""
        + text
        + """
  }
  return %p, %token, %offsets
}
"""
    )
    divided = divide(inner)
    verify(divided)
    assert [v.name for v in divided.outputs] == ["p", "token", "offsets"]
    assert len(divided.nodes) == 3
    assert divide(divided) is divided


def test_a_part_that_several_regions_begin_with_is_computed_once() -> None:
    inner = LINEAR.strip().replace("\n", "\n    ")
    text = "\n".join(
        f"""
  %{name} = fused([%x, %weight, %{name}.w]) {{kind="linear"}} : f32[B, L, 4] {{
    {inner}
  }}"""
        for name in ("q", "k")
    )
    graph = parse(f"""
graph @step {{
  input %x: f32[B, L, 6]
  input %weight: f32[6]
  input %q.w: bf16[4, 6]
  input %k.w: bf16[4, 6]
{text}
  return %q, %k
}}
""")
    divided = divide(graph)
    verify(divided)
    assert parts(divided) == [["rms_norm"], ["linear", "relu"], ["linear", "relu"]]
