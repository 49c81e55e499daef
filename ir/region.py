"""Regions: ops that hold the ops they stand for as a body graph."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
import torch

from nemoc.ir.builder import Builder
from nemoc.ir.cost import Cost
from nemoc.ir.dims import Dim, dim
from nemoc.ir.errors import expect
from nemoc.ir.graph import Graph, Node
from nemoc.ir.op import Env, Op, operand_fields
from nemoc.ir.types import TensorType, Value


@dataclass(frozen=True)
class Region(Op):
    """Base of the ops whose meaning is a body graph applied to the operands.

    The body has one input per operand and neither parameters nor state of its own.
    """

    args: tuple[Value, ...]
    body: Graph

    def infer(self) -> tuple[TensorType, ...]:
        name = self.mnemonic()
        expect(
            not self.body.params and not self.body.states,
            f"{name}: the body has parameters or states of its own",
        )
        expect(
            [v.type for v in self.args] == [v.type for v in self.body.inputs],
            f"{name}: operands {[str(v.type) for v in self.args]} do not fit the body's inputs "
            f"{[str(v.type) for v in self.body.inputs]}",
        )
        return tuple(v.type for v in self.body.outputs)

    def evaluate(self, env: Env, args: tuple[torch.Tensor, ...]) -> Any:
        values: dict[Value, torch.Tensor] = dict(zip(self.body.inputs, args, strict=True))
        for node in self.body.nodes:
            values.update(zip(node.results, evaluate_op(node.op, env, values), strict=True))
        return tuple(values[v] for v in self.body.outputs)

    def flops(self) -> Dim:
        """Those of the body; of what is unpacked, as much as is looked at."""
        shares = self._looked_at[1]
        return dim(sum(node.op.flops() * shares.get(node, 1) for node in self.body.nodes))

    def reads(self) -> tuple[Dim, ...]:
        """Each operand once, as far as the body looks at it; what the body makes for itself is not traffic."""
        return self._looked_at[0]

    @cached_property
    def _looked_at(self) -> tuple[tuple[Dim, ...], dict[Node, Dim]]:
        """Bytes of each operand that the body looks at, and which part of their result that nodes have to unpack."""
        read: dict[Value, dict[Dim, None]] = {}
        shares: dict[Node, Dim] = {}
        shown = set(self.body.outputs)
        for node in reversed(self.body.nodes):
            if node.op.is_view:  # what is read of a view is read of what it shows
                (x,), (seen,) = node.op.operands(), node.results
                if seen in shown:
                    shown.add(x)
                for amount in read.get(seen, {}):
                    read.setdefault(x, {})[amount] = None
                continue
            if node.op.is_unpacking:  # what is read of a decoded value is read of its codes
                (decoded,) = node.results
                if decoded not in shown:
                    looked_at = _together(decoded, read.get(decoded, {}))
                    shares[node] = sympy.sympify(looked_at) / decoded.type.bytes
            share = shares.get(node, 1)
            for value, amount in zip(node.op.operands(), node.op.reads(), strict=True):
                read.setdefault(value, {})[dim(amount * share)] = None
        return tuple(_together(v, read.get(v, {})) for v in self.body.inputs), shares

    def writes(self) -> tuple[Dim, ...]:
        written = {
            value: amount
            for node in self.body.nodes
            for value, amount in zip(node.results, node.op.writes(), strict=True)
            if not node.op.is_view
        }
        return tuple(written.get(v, v.type.bytes) for v in self.body.outputs)


def _together(value: Value, amounts: Iterable[Dim]) -> Dim:
    """Distinct bytes that several reads of a value touch: at most all of it; equal amounts are taken for the same."""
    whole = value.type.bytes
    amounts = tuple(amounts)
    return whole if whole in amounts else dim(sum(amounts))


@dataclass(frozen=True)
class Folded(Region):
    """A value computed from parameters alone: built once with the artifact, not in a step."""

    def cost(self) -> Cost:
        return Cost()


@dataclass(frozen=True)
class Fused(Region):
    """Ops that code generation carries out together: what only they read does not have to be stored.

    Attributes:
        kind: what was fused, in a word or two in kebab-case; for people, since code generation goes by the body.
    """

    kind: str = "ops"


def append_to_body(
    node: Node, body: Builder, moved: dict[Value, Value], inlined: type[Region]
) -> None:
    """Append a node to a body under names that say its structure only, so that what is alike looks alike.

    Args:
        node: what to append; of a region of class `inlined` the nodes within it.
        body: the body.
        moved: what stands for each value in the body; results are added.
        inlined: the regions that are not kept as such.
    """
    op = node.op
    if isinstance(op, inlined):
        inner = dict(zip(op.body.inputs, (moved[v] for v in op.args), strict=True))
        for inside in op.body.nodes:
            append_to_body(inside, body, inner, inlined)
        moved.update(zip(node.results, (inner[v] for v in op.body.outputs), strict=True))
        return
    op = op.map_operands(moved.__getitem__)
    names = [op.mnemonic()] * len(node.results)
    moved.update(zip(node.results, body.all(op, *names, location=node.location), strict=True))


def evaluate_op(op: Op, env: Env, values: dict[Value, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """An op's results given its operands' tensors by value."""
    return apply_op(op, env, [values[v] for v in op.operands()])


def apply_op(op: Op, env: Env, operands: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """An op's results given its operands' tensors in the order of `op.operands()`.

    All ops but views see dense tensors, so that their bits depend on values and shapes and never on the
    strides that earlier views left behind.
    """
    remaining = iter(operands if op.is_view else [t.contiguous() for t in operands])
    args: list[Any] = []
    for field in operand_fields(type(op)):
        operand = getattr(op, field)
        if isinstance(operand, tuple):
            args.append(tuple(next(remaining) for _ in operand))
        else:
            args.append(None if operand is None else next(remaining))
    result = op.evaluate(env, *args)
    return result if isinstance(result, tuple) else (result,)
