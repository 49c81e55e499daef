"""A model's regions as parts that are measured by themselves."""

import functools
from collections.abc import Iterable
from dataclasses import replace

from benchmarks.gpu_values import Values
from nemoc import compiler
from nemoc.codegen.storage import Weight, bind_weights
from nemoc.ir import Graph
from nemoc.ir.cutting import cut
from nemoc.ir.graph import Node
from nemoc.ir.op import Op
from nemoc.ir.region import Fused
from nemoc.models import Model


class Parts:
    """A model's regions as parts, in bf16.

    Args:
        model: the model, with parameters.
        target: the GPU that its passes look at.
        quantize: a format of weights, as `nemoc.compile` takes it; none for them as they are.
    """

    def __init__(self, model: Model, target: str, quantize: str | None = None) -> None:
        self.config = model.config
        self._model, self._target, self._quantize = model, target, quantize
        self._quantized: dict[str, Parts] = {}

    def quantized(self, quantize: str) -> "Parts":
        """Parts of the same model quantized; each time the same ones.

        Of its first layers alone, up to one of each kind: passes of a whole model take their time in each format.
        """
        if quantize not in self._quantized:
            layers = self.config.layers
            count = 1 + max(map(layers.index, layers))
            config = replace(self.config, layers=layers[:count])
            model = replace(self._model, config=config)
            self._quantized[quantize] = Parts(model, self._target, quantize)
        return self._quantized[quantize]

    @functools.cached_property
    def _bound(self) -> tuple[dict[str, Graph], tuple[Weight, ...]]:
        names = ("prefill", "decode")
        found = compiler.functions(
            self._model, self._target, dtype="bf16", quantize=self._quantize, which=names
        )
        return bind_weights(found.graphs)

    @functools.cached_property
    def values(self) -> Values:
        """What operands hold."""
        return Values(self._bound[1], self._model.parameters)

    def around(self, function: str, op: type[Op], name: str) -> Graph:
        """The first region with an op of that class in it, and the views that it reads."""
        graph = self._bound[0][function]
        region = next(node for node in graph.nodes if _holds(node, op))
        return cut(graph, _with_views(graph, [region]), name)

    def layer(self, function: str, op: type[Op], name: str) -> Graph:
        """All of the first layer that has an op of that class."""
        graph = self._bound[0][function]
        region = next(node for node in graph.nodes if _holds(node, op))
        weights = (v.name for v in region.op.operands() if v in graph.params)
        prefix = ".".join(next(weights).split(".")[:2]) + "."
        mine = [n for n in graph.nodes if _is_of(graph, n, prefix)]
        return cut(graph, _with_views(graph, mine), name)


def _holds(node: Node, op: type[Op]) -> bool:
    inside = node.op.body.nodes if isinstance(node.op, Fused) else (node,)
    return any(isinstance(n.op, op) for n in inside)


def _with_views(graph: Graph, nodes: Iterable[Node]) -> list[Node]:
    """Some nodes, and the views behind them."""
    wanted = set(nodes)
    waiting = list(wanted)
    while waiting:
        for value in waiting.pop().op.operands():
            maker = graph.producers.get(value)
            if maker is not None and maker.op.is_view and maker not in wanted:
                wanted.add(maker)
                waiting.append(maker)
    return [n for n in graph.nodes if n in wanted]


def _is_of(graph: Graph, node: Node, prefix: str) -> bool:
    """Whether a node is of a layer, by the names of its results and weights."""
    weights = (v for v in node.op.operands() if v in graph.params or v in graph.states)
    return any(v.name.startswith(prefix) for v in (*node.results, *weights))
