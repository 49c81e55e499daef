"""What a model costs, read off its graph: parameters, state, and the work of a step in closed form.

Nothing here knows the architecture: counts come from the types of the graph's parameters and states, work from
the costs of its ops.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import sympy

from nemoc.ir.dims import B, Dim, L, T, dim
from nemoc.ir.dtypes import DType
from nemoc.ir.graph import Graph, Node
from nemoc.ir.op import Op
from nemoc.ir.ops import GroupBy, GroupedLinear
from nemoc.ir.types import Value
from nemoc.models.config import LayerKind, ModelConfig
from nemoc.models.formats import Format, WeightTypes
from nemoc.models.graph import build_step


@dataclass(frozen=True)
class Work:
    """Arithmetic and traffic; closed forms in B, L and T, or numbers.

    Attributes:
        flops: floating-point operations.
        weights: bytes of weights read, each used expert once (with B·L tokens choosing at random).
        state: bytes of state and cache read and written.
        intermediate: bytes that pass between ops while none is fused with another.
    """

    flops: sympy.Expr
    weights: sympy.Expr
    state: sympy.Expr
    intermediate: sympy.Expr

    def map(self, change: Callable[[sympy.Expr], sympy.Expr]) -> "Work":
        """The same with each quantity changed."""
        return Work(*(change(q) for q in (self.flops, self.weights, self.state, self.intermediate)))

    def at(self, batch: int, new: int, cached: int) -> "Work":
        """The numbers for B rows of L new tokens after T cached ones."""
        sizes = {B: batch, L: new, T: cached}
        return self.map(lambda quantity: quantity.subs(sizes))


@dataclass(frozen=True)
class Summary:
    """A model in numbers.

    Attributes:
        layers: how many layers of each kind.
        dtype: the type of activations and of the KV cache that the numbers hold for.
        parameters: all of them, without multi-token prediction; of a quantized weight what it stands for.
        active_parameters: those that take part in one token: all but the experts it does not choose.
        weight_bytes: the parameters in their stored types, scales included.
        ssm_bytes: recurrent state of one request.
        conv_bytes: convolution inputs kept for one request.
        kv_bytes_per_token: keys and values kept for each token of a request.
        step: the work of one step.
    """

    layers: dict[LayerKind, int]
    dtype: DType
    parameters: int
    active_parameters: int
    weight_bytes: int
    ssm_bytes: int
    conv_bytes: int
    kv_bytes_per_token: int
    step: Work

    @property
    def decode(self) -> Work:
        """The work per decoded token, in B and T."""
        return self.step.map(lambda quantity: sympy.expand(quantity.subs(L, 1) / B))

    @property
    def prefill(self) -> Work:
        """The work per token of a prompt, in B, L and T; logits of the last token only."""
        return self.step.map(lambda quantity: sympy.expand(quantity / (B * L)))


def summarize(
    config: ModelConfig,
    dtype: DType = DType.BF16,
    weight_types: WeightTypes | None = None,
    formats: Mapping[str, Format] | None = None,
) -> Summary:
    """The numbers of a model, from its configuration alone.

    Args:
        config: the model.
        dtype: the compute type.
        weight_types: the stored type of each parameter; None for those that the configuration names.
        formats: how each quantized weight is stored, by its name.
    """
    graph = build_step(config, dtype=dtype, weight_types=weight_types, formats=formats)
    plain = build_step(config) if formats else graph
    return Summary(
        layers=dict(Counter(config.layers)),
        dtype=dtype,
        parameters=_integer(sum(p.type.elements for p in plain.params)),
        active_parameters=_integer(sum(_active(plain, p) for p in plain.params)),
        weight_bytes=_integer(sum(p.type.bytes for p in graph.params)),
        ssm_bytes=_state_bytes(graph, (".ssm",)),
        conv_bytes=_state_bytes(graph, (".conv",)),
        kv_bytes_per_token=_state_bytes(graph, (".k", ".v")),
        step=step_work(graph),
    )


def _integer(value: Dim) -> int:
    return int(value)


def _state_bytes(graph: Graph, suffixes: tuple[str, ...]) -> int:
    """Bytes of the states so named, for one row (and one token of capacity)."""
    states = [s for s in graph.states if s.name.endswith(suffixes)]
    return _integer(sum(s.type.substitute({"B": 1, "C": 1}).bytes for s in states))


def _active(graph: Graph, param: Value) -> Dim:
    """Elements of a parameter that one token uses."""
    for node in graph.uses[param]:
        if isinstance(node.op, GroupedLinear):
            chosen = _chosen(graph, node.op)
            if chosen is not None:
                return dim(param.type.elements * chosen[1] / param.shape[0])
    return param.type.elements


def _chosen(graph: Graph, op: GroupedLinear) -> tuple[Dim, Dim] | None:
    """How many rows chose groups, and how many different groups each; none if the graph does not say."""
    source = graph.producers.get(op.offsets)
    if source is None or not isinstance(source.op, GroupBy):
        return None
    rows, each = source.op.index.shape
    return rows, each


def step_work(graph: Graph) -> Work:
    """The work of a step, op by op; weights are what the graph's parameters hold, in whatever form.

    Args:
        graph: a step whose regions are inlined.
    """
    kinds: Counter[object] = Counter()  # nodes of one kind and type are costed once
    example: dict[object, Node] = {}
    places = _Places.of(graph)
    for node in graph.nodes:
        if node.results[0] in places.weights:
            continue  # whatever reads it reads what is stored
        key: object = (
            type(node.op),
            tuple(node.op.attributes().values()),
            tuple((v.type, places.weights.get(v), v in places.state) for v in node.op.operands()),
        )
        kinds[key] += 1
        example[key] = node
    total = [sympy.Integer(0)] * 4
    for key, count in kinds.items():
        parts = _parts(graph, example[key], places)
        total = [t + count * sympy.sympify(p) for t, p in zip(total, parts, strict=True)]
    return Work(*map(sympy.expand, total))


@dataclass(frozen=True)
class _Places:
    """Where values lie.

    Attributes:
        weights: parameters, and the values that are made of quantized ones alone, with the bytes that are stored of
            them.
        state: states and their next values.
    """

    weights: dict[Value, Dim]
    state: frozenset[Value]

    @classmethod
    def of(cls, graph: Graph) -> "_Places":
        """The places of a graph's values."""
        weights = {param: param.type.bytes for param in graph.params}
        constant = set(graph.params)
        quantized = {param for param in graph.params if param.dtype in (DType.U8, DType.F8E4M3)}
        for node in graph.nodes:
            operands = node.op.operands()
            if not operands or not constant.issuperset(operands):
                continue
            constant.update(node.results)
            if not quantized.isdisjoint(operands):
                quantized.update(node.results)
                stored = sum(weights.get(v, 0) for v in operands)
                weights |= dict.fromkeys(node.results, stored)
        return cls(weights, frozenset(graph.states) | frozenset(graph.next_states))


def _parts(graph: Graph, node: Node, places: _Places) -> tuple[Dim, Dim, Dim, Dim]:
    """Flops of a node, and its bytes by whether they are weights, state or neither."""
    weights = state = passed = sympy.Integer(0)
    for value, amount in zip(node.op.operands(), _reads(graph, node.op), strict=True):
        if value in places.weights:
            weights += amount * sympy.Rational(places.weights[value], value.type.bytes)
        elif value in places.state:
            state += amount
        else:
            passed += amount
    for value, amount in zip(node.results, node.op.writes(), strict=True):
        if value in places.state:
            state += amount
        else:
            passed += amount
    return node.op.flops(), weights, state, passed


def _reads(graph: Graph, op: Op) -> tuple[Dim, ...]:
    """Bytes read of each operand; of experts knowing that one token never chooses the same twice."""
    chosen = _chosen(graph, op) if isinstance(op, GroupedLinear) else None
    if not isinstance(op, GroupedLinear) or chosen is None:
        return op.reads()
    rows, each = chosen
    missed = sympy.Rational(op.w.shape[0] - each, op.w.shape[0])
    return op.x.type.bytes, op.w.type.bytes * (1 - missed**rows), op.offsets.type.bytes


def render_summary(summary: Summary, name: str) -> str:
    """The summary as plain text."""
    layers = ", ".join(f"{count} {kind}" for kind, count in summary.layers.items())
    lines = [
        f"{name}: {sum(summary.layers.values())} layers ({layers})",
        f"  parameters         {summary.parameters:,}",
        f"  active per token   {summary.active_parameters:,}",
        f"  weights            {_bytes(summary.weight_bytes)} as stored",
        f"  state per request  {_mib(summary.ssm_bytes)} recurrent, {_mib(summary.conv_bytes)} convolution",
        f"  cache per token    {summary.kv_bytes_per_token:,} B in {summary.dtype}",
    ]
    for title, work, sizes in (
        ("decode, per token", summary.decode, ((1, 1, 0), (1, 1, 32768), (16, 1, 4096))),
        ("prefill, per token", summary.prefill, ((1, 512, 0), (1, 8192, 0))),
    ):
        lines += ["", title, *_table(work, sizes)]
    return "\n".join(lines) + "\n"


def _table(work: Work, sizes: tuple[tuple[int, int, int], ...]) -> list[str]:
    rows: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("flops", "flops", _count),
        ("weights read", "weights", _bytes),
        ("state moved", "state", _bytes),
        ("between ops, unfused", "intermediate", _bytes),
    )
    columns = [work.at(*size) for size in sizes]
    lines = [f"  {'':22}" + "".join(f"{f'B={b} L={new} T={t}':>18}" for b, new, t in sizes)]
    for title, quantity, show in rows:
        cells = (show(float(getattr(column, quantity))) for column in columns)
        lines.append(f"  {title:22}" + "".join(f"{cell:>18}" for cell in cells))
    lines.append("  in closed form:")
    lines += [f"    {title:20}  {getattr(work, quantity)}" for title, quantity, _ in rows]
    return lines


def _count(number: float) -> str:
    return _scaled(number, "")


def _bytes(number: float) -> str:
    return _scaled(number, "B")


def _scaled(number: float, unit: str) -> str:
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3f} {prefix}{unit}"
    return f"{number:.0f} {unit}".rstrip()


def _mib(number: int) -> str:
    return f"{number / 2**20:.2f} MiB"
