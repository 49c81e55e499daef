"""Each invariant that the verifier lists, broken once."""

import dataclasses
import re
from typing import Any

import pytest

from nemoc.ir import Builder, DType, Graph, IRError, Node, TensorType, Value, ops, parse, verify
from nemoc.ir.dims import B, L
from nemoc.ir.ops import Folded

X = Value("x", TensorType.of(DType.F32, (B, 4)))
Y = Value("y", X.type)
STATE = Value("s", X.type)


def _graph(**changes: Any) -> Graph:
    graph = Graph("g", (X,), (Node(ops.Exp(X), (Y,)),), (Y,), (), (STATE,), (Y,))
    return dataclasses.replace(graph, **changes)


def test_the_unbroken_graph_holds() -> None:
    verify(_graph())


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (_graph(params=(Value("x", X.type),)), "g/%x: %x is defined twice"),
        (
            _graph(nodes=(Node(ops.Exp(X), (Y,)), Node(ops.Relu(X), (Y,)))),
            "g/%y: %y is defined twice",
        ),
        (
            _graph(nodes=(Node(ops.Exp(Value("x", X.type)), (Y,)),)),
            "g/%y: exp reads %x, which is not defined yet",
        ),
        (_graph(outputs=(Value("z", X.type),)), "g: returns %z, which is not defined"),
        (
            _graph(nodes=(Node(ops.Sum(X, 1), (Y,)),)),
            "g/%y: sum gives f32[B], but its values are f32[B, 4]",
        ),
        (
            _graph(
                nodes=(Node(ops.Exp(X), (Y,), "file.ir:7"), Node(ops.Sum(X, 1), (Y,), "file.ir:8"))
            ),
            "file.ir:8: sum gives f32[B]",
        ),
        (_graph(next_states=()), "g: 0 next states for 1 states"),
        (_graph(outputs=()), "g: returns nothing, expected an output"),
        (_graph(name="a b"), "the name 'a b' cannot be written, expected ASCII letters, digits"),
        (_graph(params=(Value("w/0", X.type),)), "g: the name 'w/0' cannot be written"),
        (
            _graph(nodes=(Node(ops.Exp(X), (Y,)), Node(ops.Exp(X), (Value("a\nb", X.type),)))),
            "g: the name 'a\\nb' cannot be written",
        ),
        (_graph(params=(Value("größe", X.type),)), "g: the name 'größe' cannot be written"),
        (_graph(params=(Value("", X.type),)), "g: the name '' cannot be written"),
        (
            _graph(
                nodes=(
                    Node(ops.Exp(X), (Y,)),
                    Node(ops.Sum(X, 1), (Value("z", TensorType.of(DType.F32, (B,))),)),
                ),
                states=(Value("s", TensorType.of(DType.F32, (B,))),),
            ),
            "g: state %s is f32[B], its next value f32[B, 4]",
        ),
        (
            _graph(inputs=(X, Value("b", X.type, bound=3))),
            "g/%b: a bound on floating-point elements",
        ),
        (
            _graph(params=(Value("w", TensorType.of(DType.F32, (L,))),)),
            "g/%w: f32[L] uses L, which no input or state determines",
        ),
        (
            _graph(inputs=(X, Value("z", TensorType.of(DType.F32, (2 * L,))))),
            "g/%z: f32[2*L] uses L, which no input or state determines",
        ),
    ],
)
def test_broken_graph_is_refused(graph: Graph, message: str) -> None:
    with pytest.raises(IRError, match=re.escape(message)):
        verify(graph)


def test_bodies_are_verified() -> None:
    inner = Value("p", X.type)
    out = Value("q", X.type)
    body = Graph("body", (inner,), (Node(ops.Exp(X), (out,)),), (out,))
    graph = _graph(nodes=(Node(Folded((X,), body), (Y,)),))
    with pytest.raises(IRError, match="body/%q: exp reads %x"):
        verify(graph)


def test_a_symbol_may_come_from_a_state() -> None:
    verify(
        parse(
            "graph @g {\n state %s: f32[B, C]\n %y = exp(%s) : f32[B, C]\n return %y\n update %s = %y\n}"
        )
    )


def test_builder_refuses_what_does_not_fit() -> None:
    b = Builder("g")
    x = b.input("x", DType.F32, (B, 4))
    with pytest.raises(IRError, match="the name %x is taken"):
        b.param("x", DType.F32, (4,))
    with pytest.raises(IRError, match="sum: axis 2"):
        b(ops.Sum(x, 2))
    with pytest.raises(IRError, match="group_by has 3 results, expected one"):
        b(ops.GroupBy(b.input("i", DType.I32, (B, 2), 3), 3))
    b.state("s", DType.F32, (B, 4))
    with pytest.raises(IRError, match="g: 0 next states for 1 states"):
        b.finish([x])


def test_builder_makes_names_unique() -> None:
    b = Builder("g")
    x = b.input("x", DType.F32, (B,))
    names = [b(ops.Exp(x), "e").name for _ in range(3)] + [b(ops.Exp(x)).name, b(ops.Exp(x)).name]
    assert names == ["e", "e.1", "e.2", "v", "v.1"]
