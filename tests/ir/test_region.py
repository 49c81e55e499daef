"""Regions: what they mean, and what they read and write."""

import pytest
import sympy
import torch

from nemoc.ir import Env, Graph, IRError, parse
from nemoc.ir.dims import B, Dim, L, dim
from nemoc.ir.fusion import fuse
from nemoc.ir.region import Fused

MIXED = """
  input %x: f32[B, L, 8]
  input %table: f32[100, 8]
  input %index: i32[B, L] < 100

  %rows = take_rows(%table, %index) : f32[B, L, 8]
  %sum = add(%x, %rows) : f32[B, L, 8]
  %y = silu(%sum) : f32[B, L, 8]
  return %sum, %y
"""


PACKED = """
  input %x: f32[M, 32]
  input %codes: u8[4, 6, 16]
  input %scales: f8e4m3[4, 6, 2]
  input %whole: f32[4]
  input %offsets: i32[5]
  %w = dequantize_nvfp4(%codes, %scales, %whole) : f32[4, 6, 32]
  %y = grouped_linear(%x, %w, %offsets) : f32[M, 6]
  return RESULTS
"""


def fused(text: str) -> Fused:
    graph = parse(f"graph @g {{{text}}}")
    (node,) = fuse(graph, graph.nodes, "k").nodes
    assert isinstance(node.op, Fused)
    return node.op


def reads(op: Fused) -> dict[str, Dim]:
    """Bytes read of each operand, by name."""
    return {v.name: n for v, n in zip(op.args, op.reads(), strict=True)}


def test_a_region_means_its_body() -> None:
    op = fused(MIXED)
    x, table = torch.randn(2, 3, 8), torch.randn(100, 8)
    index = torch.tensor([[1, 99, 0], [5, 5, 5]], dtype=torch.int32)
    given = {"x": x, "table": table, "index": index}
    sum_, y = op.evaluate(Env({"B": 2, "L": 3}), tuple(given[v.name] for v in op.args))
    assert torch.equal(sum_, x + table[index.long()])
    assert torch.equal(y, torch.nn.functional.silu(sum_))


def test_operands_have_the_types_of_the_body() -> None:
    op = fused(MIXED)
    other = parse("graph @g { input %x: f32[B, 9] %y = exp(%x) : f32[B, 9] return %y }")
    with pytest.raises(IRError, match=r"fused: operands .* do not fit the body.s inputs"):
        Fused(op.args[::-1], op.body).infer()
    body: Graph = parse("graph @g { param %w: f32[9] %y = exp(%w) : f32[9] return %y }")
    with pytest.raises(IRError, match="fused: the body has parameters or states of its own"):
        Fused((other.inputs[0],), body).infer()


def test_what_stays_inside_is_no_traffic() -> None:
    op = fused(MIXED)
    elements = dim(B * L * 8)
    assert reads(op) == {"x": 4 * elements, "table": 4 * elements, "index": dim(4 * B * L)}
    assert op.writes() == (4 * elements, 4 * elements)
    assert op.flops() == 2 * elements
    assert op.cost().read == dim(8 * elements + 4 * B * L)
    assert op.cost().written == 8 * elements


def test_an_operand_read_twice_is_read_once() -> None:
    op = fused("""
      input %x: f32[B, 8]
      %a = exp(%x) : f32[B, 8]
      %b = mul(%a, %x) : f32[B, 8]
      return %b
    """)
    assert reads(op) == {"x": dim(32 * B)}


def test_only_the_parts_that_are_looked_at_are_read() -> None:
    op = fused("""
      input %x: f32[B, 12]
      %a = slice(%x) {axis=1, start=0, stop=4} : f32[B, 4]
      %b = slice(%x) {axis=1, start=4, stop=12} : f32[B, 8]
      %c = exp(%a) : f32[B, 4]
      %d = exp(%b) : f32[B, 8]
      return %c, %d
    """)
    assert reads(op) == {"x": dim(48 * B)}
    op = fused("""
      input %x: f32[B, 12]
      %a = slice(%x) {axis=1, start=0, stop=4} : f32[B, 4]
      %r = reshape(%a) {shape=[B, 2, 2]} : f32[B, 2, 2]
      %c = exp(%r) : f32[B, 2, 2]
      return %c
    """)
    assert reads(op) == {"x": dim(16 * B)}


def test_of_packed_weights_the_codes_of_those_that_are_hit_are_read() -> None:
    found = reads(fused(PACKED.replace("M", "1").replace("RESULTS", "%y")))
    assert found == {"x": 128, "codes": 96, "scales": 12, "whole": 4, "offsets": 20}
    shown = "%v = reshape(%w) {shape=[24, 32]} : f32[24, 32]\n      return %v, %y"
    for results in ("return %w, %y", shown):
        whole = reads(fused(PACKED.replace("M", "1").replace("return RESULTS", results)))
        assert (whole["codes"], whole["scales"]) == (384, 48)
    rows = reads(fused(PACKED.replace("M", "2*B").replace("RESULTS", "%y")))
    hit = 4 * (1 - sympy.Rational(3, 4) ** (2 * B))
    assert sympy.simplify(rows["codes"] - 96 * hit) == 0


def test_weights_that_are_not_hit_are_not_unpacked() -> None:
    products, unpacking = 2 * 32 * 6, 6 * 32
    whole = fused(PACKED.replace("M", "1").replace("RESULTS", "%w, %y")).flops()
    assert whole % unpacking == 0
    each = (int(whole) - products) // 4
    assert each >= unpacking
    assert fused(PACKED.replace("M", "1").replace("RESULTS", "%y")).flops() == products + each


def test_rows_taken_and_rows_looked_at_as_a_whole_are_all_of_it() -> None:
    op = fused("""
      input %x: f32[B, L, 8]
      input %valid: i32[B] < L + 1
      %a = take_last(%x, %valid) : f32[B, 8]
      %b = exp(%x) : f32[B, L, 8]
      return %a, %b
    """)
    assert reads(op)["x"] == dim(32 * B * L)


def test_a_state_updated_in_place_costs_what_changes() -> None:
    op = fused("""
      input %cache: f32[B, C, 2, 3]
      input %rows: f32[B, L, 2, 3]
      input %lengths: i32[B] < C - L + 1
      %scaled = scale(%rows) {factor=2.0} : f32[B, L, 2, 3]
      %next = cache_write(%cache, %scaled, %lengths) : f32[B, C, 2, 3]
      return %next
    """)
    new = dim(24 * B * L)
    assert reads(op) == {"rows": new, "cache": 0, "lengths": dim(4 * B)}
    assert op.writes() == (new,)
