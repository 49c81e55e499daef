"""The distinct sites of a program with the values that reach them, for whoever runs kernels one by one."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from nemoc.codegen.lower import Emit, Program, corner_sizes, lower_program
from nemoc.codegen.plan import Plan, Site
from nemoc.codegen.storage import Layout
from nemoc.ir.graph import Graph, Node
from nemoc.ir.interpreter import interpret
from nemoc.ir.op import Env
from nemoc.ir.types import Value


class _Recording:
    """What reaches the sites of a program; its graphs are interpreted when that is first asked for.

    Args:
        graphs: of the program.
        arguments, sizes: as for `record_sites`.
        wanted: the values to keep.
    """

    def __init__(
        self,
        graphs: Sequence[Graph],
        arguments: Callable[[Graph], Mapping[str, torch.Tensor]],
        sizes: Mapping[str, int],
        wanted: set[Value],
    ) -> None:
        self._graphs, self._arguments, self._wanted = graphs, arguments, wanted
        self._env = Env(sizes)

    def operands(self, site: Site) -> tuple[torch.Tensor, ...]:
        """What a site reads; of a copy that lowering put in, which no value of the graph stands for, anything."""
        values, env = self._values, self._env
        return tuple(values[v] if v in values else _arbitrary(v, env) for v in site.op.operands())

    @functools.cached_property
    def _values(self) -> dict[Value, torch.Tensor]:
        found: dict[Value, torch.Tensor] = {}
        for graph in self._graphs:
            given = self._arguments(graph)
            found.update((v, given[v.name]) for v in graph.arguments if v in self._wanted)

            def keep(node: Node, results: tuple[torch.Tensor, ...]) -> None:
                found.update(
                    (v, t) for v, t in zip(node.results, results, strict=True) if v in self._wanted
                )

            interpret(graph, given, observe=keep)
        return found


@dataclass(frozen=True)
class RecordedSite:
    """A site as lowering met it first.

    Attributes:
        site: the op and the views.
        plan: its launches.
        read: what gives its operands.
    """

    site: Site
    plan: Plan
    read: Callable[[], tuple[torch.Tensor, ...]]

    @property
    def operands(self) -> tuple[torch.Tensor, ...]:
        """A tensor for each operand, in the order of `op.operands()`."""
        return self.read()


def record_sites(
    graphs: Mapping[str, Graph],
    weights: Layout,
    arguments: Callable[[Graph], Mapping[str, torch.Tensor]],
    sizes: Mapping[str, int],
    emit: Emit,
) -> tuple[Program, tuple[RecordedSite, ...]]:
    """Lower a program. It is interpreted once the operands of a site are asked for, and keeps what every site reads.

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
    recording = _Recording(program.graphs, arguments, sizes, waiting)
    return program, tuple(
        RecordedSite(site, plan, functools.partial(recording.operands, site))
        for site, plan in plans
    )


def _arbitrary(value: Value, env: Env) -> torch.Tensor:
    size = torch.Size(env.shape(value.shape))
    return torch.arange(size.numel()).reshape(size).to(value.dtype.torch)
