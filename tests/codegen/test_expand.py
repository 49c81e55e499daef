"""Ops that the backend has never heard of: compiled by their expansions, alone and within regions."""

from dataclasses import dataclass

import pytest
import torch

from nemoc.codegen.expand import expand_ops
from nemoc.ir import (
    Builder,
    Env,
    Graph,
    IRError,
    Op,
    TensorType,
    Value,
    interpret,
    ops,
    parse,
    verify,
)
from nemoc.ir.dims import product
from nemoc.ir.ops.elementwise import Unary
from nemoc.ir.region import Fused
from nemoc.ir.sample_inputs import sample_arguments

KNOWN = frozenset(ops.OPS)


@dataclass(frozen=True)
class Wobble(Unary):
    """x · tanh(0.7306 · x): of no backend."""

    def evaluate(self, env: Env, x: torch.Tensor) -> torch.Tensor:
        return x * torch.tanh(0.7306 * x)

    def expand(self, build: Builder) -> Value:
        return build(ops.Mul(self.x, build(ops.Tanh(build(ops.Scale(self.x, 0.7306))))))


@dataclass(frozen=True)
class Halves(Op):
    """Wobble of either half of the last axis: two results, by way of another unknown op."""

    x: Value

    def infer(self) -> tuple[TensorType, TensorType]:
        width = self.x.shape[-1]
        assert isinstance(width, int)
        half = TensorType(self.x.dtype, (*self.x.shape[:-1], width // 2))
        return half, half

    def evaluate(self, env: Env, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(h * torch.tanh(0.7306 * h) for h in x.chunk(2, dim=-1))

    def expand(self, build: Builder) -> tuple[Value, ...]:
        axis, width = self.x.type.rank - 1, int(self.x.shape[-1])
        halves = ((0, width // 2), (width // 2, width))
        return tuple(build(Wobble(build(ops.Slice(self.x, axis, *h)))) for h in halves)


@dataclass(frozen=True)
class Opaque(Unary):
    """An op without an expansion."""

    def evaluate(self, env: Env, x: torch.Tensor) -> torch.Tensor:
        return x


EXTRA = (Wobble, Halves, Opaque)

GRAPH = """graph @g {
  input %x: f32[B, 8]

  %a, %b = halves(%x) : f32[B, 4], f32[B, 4]
  %c = add(%a, %b) : f32[B, 4]
  %d = fused([%c]) {kind="k"} : f32[B, 4] {
    input %p: f32[B, 4]
    %e = wobble(%p) : f32[B, 4]
    %f = exp(%e) : f32[B, 4]
    return %f
  }
  return %d, %b
}
"""


def classes(graph: Graph) -> list[type[Op]]:
    """The ops of a graph, those of bodies included."""
    found: list[type[Op]] = []
    for node in graph.nodes:
        found += [type(node.op)]
        found += classes(node.op.body) if isinstance(node.op, Fused) else []
    return found


def test_expands_until_every_op_is_known() -> None:
    graph = parse(GRAPH, extra_ops=EXTRA)
    after = expand_ops(graph, KNOWN)
    verify(after)
    assert KNOWN.issuperset(classes(after))
    assert [v.name for v in after.outputs] == ["d", "b"]
    arguments = sample_arguments(graph)
    for found, expected in zip(
        interpret(after, arguments).outputs, interpret(graph, arguments).outputs, strict=True
    ):
        assert torch.equal(found, expected)


def test_known_ops_stay_as_they_are() -> None:
    graph = parse(GRAPH, extra_ops=EXTRA)
    assert expand_ops(graph, KNOWN | {Wobble, Halves}) is graph


def test_an_op_without_an_expansion_stays() -> None:
    graph = parse(GRAPH.replace("wobble", "opaque"), extra_ops=EXTRA)
    after = expand_ops(graph, KNOWN)
    assert set(classes(after)) - KNOWN == {Opaque}


def test_an_expansion_of_another_type_is_named() -> None:
    @dataclass(frozen=True)
    class Wrong(Unary):
        def evaluate(self, env: Env, x: torch.Tensor) -> torch.Tensor:
            return x

        def expand(self, build: Builder) -> Value:
            return build(ops.Reshape(self.x, (product(self.x.shape),)))

    graph = parse(
        "graph @g { input %x: f32[B, 8] %y = wrong(%x) : f32[B, 8] return %y }", extra_ops=(Wrong,)
    )
    with pytest.raises(IRError, match="rule expand replaces"):
        expand_ops(graph, KNOWN)
