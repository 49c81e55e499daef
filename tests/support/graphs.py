"""Random graphs, for property tests."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from hypothesis import strategies as st

from nemoc.ir import Builder, Dim, DType, Graph, Op, Value, ops
from nemoc.ir.dims import B, C, L, product

_T = TypeVar("_T")

SIZES = {"B": 2, "L": 5, "C": 9}
"""What the symbols of random graphs are bound to."""

WIDTH = 12
"""The last axis of what the blocks read: divisible by 2, 3, 4 and 6."""


@dataclass
class _Plan:
    """A graph under construction: what may be read, what the states become, whether steps follow the last value."""

    draw: st.DrawFn
    builder: Builder
    valid: Value
    lengths: Value
    pool: list[Value] = field(default_factory=list)
    following: list[Value] = field(default_factory=list)
    chained: bool = False

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def pick(self, items: Sequence[_T]) -> _T:
        return items[self.number(0, len(items) - 1)]

    def any(self, fits: Callable[[Value], bool] = lambda v: True) -> Value:
        """A value that fits, every other time the last one, so that ops meet their kind; the input always fits."""
        found = [v for v in self.pool if fits(v)] or self.pool[:1]
        return found[-1] if self.chained or self.number(0, 1) else self.pick(found)

    def hidden(self) -> Value:
        """A value that the blocks of a model can read."""
        return self.any(lambda v: v.shape == (B, L, WIDTH))

    def param(self, dtype: DType, *shape: Dim) -> Value:
        return self.builder.param(self.builder.fresh("w") + ".p", dtype, shape)

    def weight(self, *shape: Dim) -> Value:
        """A weight: a parameter, or something computed from one."""
        kind = self.number(0, 3)
        if kind == 0:
            return self.param(DType.BF16, *shape)
        if kind == 1:
            wide = self.param(DType.F32, shape[0], *shape[1:-1], product((shape[-1], 2)))
            return self.builder(ops.Slice(wide, len(shape) - 1, 0, int(shape[-1])))
        plain = self.param(DType.F32, *shape)
        return plain if kind == 2 else self.builder(ops.Scale(plain, 0.5))

    def vector(self, size: Dim) -> Value:
        """A small f32 vector of parameters, read through a cast from bf16 or not."""
        if self.number(0, 1):
            return self.param(DType.F32, size)
        return self.builder(ops.Cast(self.param(DType.BF16, size), DType.F32))

    def add(self, op: Op) -> Value:
        value = self.builder(op)
        self.pool.append(value)
        return value


def _unary(plan: _Plan) -> None:
    kinds = [ops.Relu, ops.Sigmoid, ops.Silu, ops.Tanh, ops.Gelu, ops.Softplus]
    x = plan.any()
    choice = plan.number(0, 8)
    if choice < len(kinds):
        plan.add(kinds[choice](x))
    elif choice == 6:
        plan.add(ops.Exp(plan.builder(ops.Tanh(x))))
    elif choice == 7:
        plan.add(ops.Scale(x, plan.pick([1.0, -1.0, 0.5])))
    else:
        plan.add(ops.Shift(x, plan.pick([0.0, -0.0, 1.0])))


def _full(plan: _Plan) -> None:
    """A constant, which the next steps may lay out otherwise or compute with."""
    value = plan.pick([1.0, 0.0, -0.0, 2.0])
    plan.add(ops.Full(value, DType.F32, (B, L, WIDTH)))


def _binary(plan: _Plan) -> None:
    kind = plan.pick([ops.Add, ops.Sub, ops.Mul])
    x = plan.any()
    if plan.number(0, 2) == 0 and x.type.rank:
        value = plan.pick([0.0, -0.0, 1.0, 2.0])
        other = plan.builder(ops.Full(value, DType.F32, x.shape[-1:]))
    elif plan.number(0, 1) and x.type.rank and isinstance(x.shape[-1], int):
        other = plan.vector(x.shape[-1])
    else:
        other = plan.any(lambda v: v.type == x.type)
        if other.type != x.type:
            other = x
    plan.add(kind(x, other) if plan.number(0, 1) else kind(other, x))


def _reshape(plan: _Plan) -> None:
    x = plan.any()
    shape = list(x.shape)
    axis = plan.number(0, max(len(shape) - 1, 0))
    choice = plan.number(0, 3)
    if choice == 0 and axis + 1 < len(shape):
        shape[axis : axis + 2] = [product(shape[axis : axis + 2])]
    elif choice == 1 and shape and isinstance(size := shape[axis], int) and size % 2 == 0:
        shape[axis : axis + 1] = [size // 2, 2]
    elif choice == 2:
        shape.insert(axis, 1)
    plan.add(ops.Reshape(x, tuple(shape)))


def _permute(plan: _Plan) -> None:
    x = plan.any()
    plan.add(ops.Permute(x, tuple(plan.draw(st.permutations(range(x.type.rank))))))


def _slice(plan: _Plan) -> None:
    x = plan.any()
    sized = [(i, d) for i, d in enumerate(x.shape) if isinstance(d, int)]
    if sized:
        axis, size = plan.pick(sized)
        start = plan.number(0, size - 1)
        plan.add(ops.Slice(x, axis, start, plan.number(start + 1, size)))


def _concat(plan: _Plan) -> None:
    x = plan.any()
    sized = [(i, d) for i, d in enumerate(x.shape) if isinstance(d, int) and d > 1]
    if plan.number(0, 1) and sized:
        axis, size = plan.pick(sized)
        cut = plan.number(1, size - 1)
        parts = [ops.Slice(x, axis, 0, cut), ops.Slice(x, axis, cut, size)]
        if plan.number(0, 1):
            parts.reverse()
        plan.add(ops.Concat(tuple(map(plan.builder, parts)), axis))
    elif x.type.rank:
        axis = plan.number(0, x.type.rank - 1)
        other = plan.any(lambda v: v.type == x.type)
        plan.add(ops.Concat((x, other) if other.type == x.type else (x,), axis))


def _casts(plan: _Plan) -> None:
    x = plan.any()
    narrow = plan.pick([DType.BF16, DType.F64, DType.F16, DType.F32])
    y = plan.builder(ops.Cast(x, narrow))
    if plan.number(0, 1):
        y = plan.builder(ops.Cast(y, DType.F64))
    plan.add(ops.Cast(y, DType.F32))


def _sum(plan: _Plan) -> None:
    x = plan.any(lambda v: v.type.rank > 1)
    plan.add(ops.Sum(x, plan.number(0, x.type.rank - 1)))


def _linear(plan: _Plan) -> None:
    x = plan.any(lambda v: v.type.rank > 0 and isinstance(v.shape[-1], int))
    plan.add(ops.Linear(x, plan.weight(plan.pick([WIDTH, 5, 8]), x.shape[-1])))


def _norm(plan: _Plan) -> None:
    x = plan.hidden()
    plan.add(ops.RmsNorm(x, plan.vector(WIDTH), 1e-5, plan.pick([1, 3])))


def _repeat(plan: _Plan) -> None:
    """An expression that stands there twice."""
    x = plan.hidden()
    a, b = (plan.builder(ops.Silu(plan.builder(ops.Scale(x, 0.5)))) for _ in range(2))
    plan.add(ops.Mul(a, b))


def _chain(plan: _Plan) -> None:
    """A few steps that each read what the one before gave."""
    plan.chained = True
    for _ in range(plan.number(2, 4)):
        plan.pick(_CHAINED)(plan)
    plan.chained = False


def _conv(plan: _Plan) -> None:
    b = plan.builder
    state = b.state(b.fresh("conv") + ".s", DType.F32, (B, 3, WIDTH))
    bias = plan.vector(WIDTH) if plan.number(0, 1) else None
    weight = plan.param(DType.F32, WIDTH, 4)
    y, following = b.all(ops.CausalConv(plan.hidden(), weight, bias, state, plan.valid))
    plan.pool.append(y)
    plan.following.append(following)


def _scan(plan: _Plan) -> None:
    b, x = plan.builder, plan.hidden()
    state = b.state(b.fresh("ssm") + ".s", DType.F32, (B, 4, 3, 2))
    steps = b(ops.Softplus(b(ops.Linear(x, plan.weight(4, WIDTH)))))
    decay = b(ops.Scale(b(ops.Exp(plan.vector(4))), -1.0))
    heads = b(ops.Reshape(x, (B, L, 4, 3)))
    keys = b(ops.Reshape(b(ops.Slice(x, 2, 0, 4)), (B, L, 2, 2)))
    d = plan.vector(4) if plan.number(0, 1) else None
    y, following = b.all(ops.SsdScan(heads, steps, decay, keys, keys, d, state, plan.valid))
    plan.pool.append(b(ops.Reshape(y, (B, L, WIDTH))))
    plan.following.append(following)


def _attention(plan: _Plan) -> None:
    b, x = plan.builder, plan.hidden()
    rows = b(ops.Reshape(b(ops.Linear(x, plan.weight(6, WIDTH))), (B, L, 2, 3)))
    caches = []
    for name in ("k", "v"):
        state = b.state(b.fresh(name) + ".s", DType.F32, (B, C, 2, 3))
        caches.append(b(ops.CacheWrite(state, rows, plan.lengths)))
    q = b(ops.Reshape(x, (B, L, 4, 3)))
    y = b(ops.Attention(q, caches[0], caches[1], plan.lengths, 0.5))
    plan.pool.append(b(ops.Reshape(y, (B, L, WIDTH))))
    plan.following.extend(caches)


def _experts(plan: _Plan) -> None:
    b = plan.builder
    x = b(ops.Reshape(plan.hidden(), (B * L, WIDTH)))
    scores = b(ops.Sigmoid(b(ops.Linear(x, plan.weight(6, WIDTH)))))
    limited = b(ops.GroupLimit(scores, 3, 2)) if plan.number(0, 1) else scores
    chosen = b(ops.TopK(limited, 2))
    weights = b(ops.Reshape(b(ops.TakeAlong(scores, chosen)), (B * L, 2, 1)))
    order, position, offsets = b.all(ops.GroupBy(chosen, 6))
    rows = b(ops.TakeRows(x, b(ops.FloorDiv(order, 2))))
    y = b(ops.GroupedLinear(rows, plan.weight(6, WIDTH, WIDTH), offsets))
    parts = b(ops.Reshape(b(ops.TakeRows(y, position)), (B * L, 2, WIDTH)))
    total = b(ops.Sum(b(ops.Mul(parts, weights)), 1))
    plan.add(ops.Reshape(total, (B, L, WIDTH)))


def _last(plan: _Plan) -> None:
    plan.add(ops.TakeLast(plan.hidden(), plan.valid))


_CHAINED = [_unary, _binary, _reshape, _permute, _permute, _slice, _slice, _concat, _casts]
_STEPS = [
    *[_chain, _chain, _chain, _full, _binary, _concat, _slice, _sum, _linear, _norm, _repeat],
    *[_conv, _scan, _attention, _experts, _last],
]


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Graphs of up to a dozen steps: single ops, and blocks like those of a model."""
    builder = Builder("random")
    x = builder.input("x", DType.F32, (B, L, WIDTH))
    valid = builder.input("valid", DType.I32, (B,), bound=L + 1)
    lengths = builder.state("lengths", DType.I32, (B,), bound=C - L + 1)
    plan = _Plan(draw, builder, valid, lengths, [x])
    plan.following.append(builder(ops.Add(lengths, valid)))
    for _ in range(plan.number(1, 12)):
        plan.pick(_STEPS)(plan)
    outputs = [plan.pool[-1], *(plan.any() for _ in range(plan.number(0, 2)))]
    return builder.finish(outputs, plan.following)
