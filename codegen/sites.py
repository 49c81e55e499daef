"""The distinct sites of a program with the values that reach them, for whoever runs kernels one by one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from nemoc.codegen.lower import Emit, Program, corner_sizes, lower_program
from nemoc.codegen.plan import Plan, Site
from nemoc.codegen.storage import Layout
from nemoc.ir.graph import Graph, Node
from nemoc.ir.interpreter import interpret
from nemoc.ir.op import Env
from nemoc.ir.types import Value


@dataclass(frozen=True)
class RecordedSite:
    """A site as lowering met it first.

    Attributes:
        site: the op and the views.
        plan: its launches.
        operands: a tensor for each operand, in the order of `op.operands()`.
    """

    site: Site
    plan: Plan
    operands: tuple[torch.Tensor, ...]


def record_sites(
    graphs: Mapping[str, Graph],
    weights: Layout,
    arguments: Callable[[Graph], Mapping[str, torch.Tensor]],
    sizes: Mapping[str, int],
    emit: Emit,
) -> tuple[Program, tuple[RecordedSite, ...]]:
    """Lower a program and interpret it, keeping what each distinct site reads.

    Args:
        graphs: step functions; parameters are stored weights.
        weights: where the weights lie.
        arguments: inputs, states and weights of a graph at `sizes`; looked up one by one.
        sizes: B, L and C.
        emit: the backend; the graphs are in terms of what it knows.
    """
    plans: list[tuple[Site, Plan]] = []

    def record(site: Site) -> Plan:
        plan = emit(site)
        plans.append((site, plan))
        return plan

    corners = corner_sizes(sizes["B"], sizes["B"] * sizes["L"], sizes["C"])
    program = lower_program(graphs, weights, corners, record)
    waiting = {value for site, _ in plans for value in site.op.operands()}
    values: dict[Value, torch.Tensor] = {}
    for graph in program.graphs:
        given = arguments(graph)
        values.update((v, given[v.name]) for v in graph.arguments if v in waiting)

        def keep(node: Node, results: tuple[torch.Tensor, ...]) -> None:
            values.update(
                (v, t) for v, t in zip(node.results, results, strict=True) if v in waiting
            )

        interpret(graph, given, observe=keep)
    env = Env(sizes)
    return program, tuple(
        RecordedSite(
            site,
            plan,
            tuple(values[v] if v in values else _arbitrary(v, env) for v in site.op.operands()),
        )
        for site, plan in plans
    )


def _arbitrary(value: Value, env: Env) -> torch.Tensor:
    """Data for a copy that lowering put in, which no value of the graph stands for."""
    size = torch.Size(env.shape(value.shape))
    return torch.arange(size.numel()).reshape(size).to(value.dtype.torch)
