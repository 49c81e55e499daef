"""The decode step, derived from the step over L tokens."""

import dataclasses
from dataclasses import dataclass

from nemoc.ir.dtypes import DType
from nemoc.ir.errors import NemocError
from nemoc.ir.graph import Graph, Node
from nemoc.ir.op import Op
from nemoc.ir.ops import Full, Reshape, SsdScan, SsdUpdate, TakeLast
from nemoc.ir.rewrite import Replacement, Rewriter, Rule, rebuild, rewrite, substitute_dims
from nemoc.ir.types import Value
from nemoc.passes.base import Assumptions, Effect, Pass
from nemoc.passes.context import PassContext, Remark


@dataclass(frozen=True)
class SpecializeDecode(Pass):
    """Derive the step of one token per row: L = 1, every row valid.

    The dimension symbol `length` becomes 1, the input `valid` (tokens of each row that count) a constant 1, and with
    these the scan becomes a state update and the last valid token the only one. Tokens stay [B, 1]. The
    update sums in another order than the chunked scan.

    Before::

        graph @step {
          input %x: f32[B, L, 8, 4]
          input %valid: i32[B] < L + 1
          ...
          %y, %s = ssd_scan(%x, %dt, %a, %b, %c, _, %ssm, %valid) : f32[B, L, 8, 4], f32[B, 8, 4, 16]

    After::

        graph @decode {
          input %x: f32[B, 1, 8, 4]
          ...
          %x.now = reshape(%x) {shape=[B, 8, 4]} : f32[B, 8, 4]
          ...
          %updated, %s = ssd_update(%x.now, %dt.now, %a, %b.now, %c.now, _, %ssm) : f32[B, 8, 4], f32[B, 8, 4, 16]
          %y = reshape(%updated) {shape=[B, 1, 8, 4]} : f32[B, 1, 8, 4]
    """

    effect = Effect.REORDERS

    length: str = "L"
    valid: str = "valid"

    def run(self, graph: Graph, ctx: PassContext) -> Graph:
        if self.length not in graph.symbols:
            return graph
        site = f"{graph.name}/%{graph.results[0].name}"
        if not ctx.allows(Remark(self.name, site, f"{self.length} = 1")):
            return graph
        decode = substitute_dims(graph, {self.length: 1}, name="decode")
        decode = _replace_by_ones(decode, self.valid)
        return rewrite(
            decode,
            RULES,
            on_apply=lambda rule, node: ctx.allows(
                Remark(self.name, f"{decode.name}/%{node.results[0].name}", rule.name)
            ),
        )

    def assumes(self, graph: Graph) -> Assumptions:
        names = {v.name for v in graph.inputs}
        return Assumptions({self.length: 1}, {self.valid: 1} if self.valid in names else {})


def _replace_by_ones(graph: Graph, name: str) -> Graph:
    """The graph without the input of that name, which is 1 everywhere; as it is if there is none."""
    valid = next((v for v in graph.inputs if v.name == name), None)
    if valid is None:
        return graph
    if valid.dtype is not DType.I32:
        raise NemocError(f"{graph.name}: input %{name} is {valid.type}, expected i32")
    ones = Value(name, valid.type)
    moved = {valid: ones}
    nodes = [Node(Full(1.0, DType.I32, valid.shape), (ones,))]
    for node in graph.nodes:
        op = node.op.map_operands(lambda v: moved.get(v, v))
        nodes.append(Node(op, node.results, node.location))
    inputs = tuple(v for v in graph.inputs if v is not valid)
    return dataclasses.replace(rebuild(graph, nodes, moved), inputs=inputs)


def _scan_to_update(op: Op, rewriter: Rewriter) -> Replacement:
    """A scan over one valid token is one update of the state."""
    assert isinstance(op, SsdScan)
    if not _is_one_token(op.x, op.valid, rewriter):
        return None
    x, dt, b, c = (_without_time(v, rewriter) for v in (op.x, op.dt, op.b, op.c))
    y, state = rewriter.all(SsdUpdate(x, dt, op.a, b, c, op.d, op.state), "updated")
    return rewriter(Reshape(y, op.x.shape)), state


def _only_is_last(op: Op, rewriter: Rewriter) -> Replacement:
    """The last valid token of one is that one."""
    assert isinstance(op, TakeLast)
    if not _is_one_token(op.x, op.valid, rewriter):
        return None
    return _without_time(op.x, rewriter)


def _is_one_token(x: Value, valid: Value, rewriter: Rewriter) -> bool:
    count = rewriter.producer(valid)
    return x.shape[1] == 1 and isinstance(count, Full) and count.value == 1


def _without_time(x: Value, rewriter: Rewriter) -> Value:
    """[B, 1, ...] -> [B, ...]."""
    return rewriter(Reshape(x, (x.shape[0], *x.shape[2:])), f"{x.name}.now")


RULES = (
    Rule("scan-to-update", SsdScan, _scan_to_update),
    Rule("only-is-last", TakeLast, _only_is_last),
)
