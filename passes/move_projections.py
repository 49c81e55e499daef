"""Matrix products moved across gathers and sums of rows, to where there are fewer rows."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import sympy

from nemoc.ir.cost import Cost
from nemoc.ir.dims import Dim, format_dim, product
from nemoc.ir.graph import Graph, Node
from nemoc.ir.op import Op
from nemoc.ir.ops import Linear, Mul, Reshape, Sum, TakeLast, TakeRows
from nemoc.ir.rewrite import Replacement, Rewriter, Rule, rewrite
from nemoc.ir.types import Value
from nemoc.passes.base import Effect, Pass
from nemoc.passes.context import PassContext, Remark
from nemoc.passes.options import rules_without


@dataclass(frozen=True)
class MoveProjections(Pass):
    """Move matrix products across gathers and weighted sums of rows where that takes fewer flops.

    A model with experts in a latent space projects into it and out of it for each token, which is cheap, or
    for each slot of an expert, as some exporters write it. `without` names rules to leave out (`RULES` has their
    algebra). A rule fires only if nobody else reads what the product made and flops provably fall: more for no
    sizes, fewer for some. Views that keep the last axis are looked through; anything else in between, such as a bias
    or a rounding, stops a rule. What loses its last reader stays until `dce`.

    Before::

        %wide = linear(%down, %fc2) : f32[2*B, 64]
        %slots = take_rows(%wide, %position) : f32[2*B, 64]
        %grouped = reshape(%slots) {shape=[B, 2, 64]} : f32[B, 2, 64]
        %weighted = mul(%grouped, %weights) : f32[B, 2, 64]
        %y = sum(%weighted) {axis=1} : f32[B, 64]

    After, with `dce`::

        %slots.1 = take_rows(%down, %position) : f32[2*B, 16]
        %grouped.1 = reshape(%slots.1) {shape=[B, 2, 16]} : f32[B, 2, 16]
        %weighted.1 = mul(%grouped.1, %weights) : f32[B, 2, 16]
        %down.sum = sum(%weighted.1) {axis=1} : f32[B, 16]
        %y = linear(%down.sum, %fc2) : f32[B, 64]
    """

    effect = Effect.REORDERS

    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._rules()

    def _rules(self) -> list[Rule]:
        return rules_without(self.name, RULES, self.without)

    def run(self, graph: Graph, ctx: PassContext) -> Graph:
        judge = _Judge(self.name, graph.name, ctx, _reads(graph))
        rules = [judge.watched(rule) for rule in self._rules()]
        after = rewrite(graph, rules, on_apply=judge.allows)
        judge.note_refusals()
        return after


@dataclass(frozen=True)
class _Step:
    """An op that treats all rows [..., K] of one operand alike.

    Attributes:
        op: the op.
        field: where that operand stands.
        name: the value that the op makes; empty for the one that a rule looks at.
    """

    op: Op
    field: str
    name: str

    @property
    def rows(self) -> Value:
        value = getattr(self.op, self.field)
        assert isinstance(value, Value)
        return value

    def on(self, rows: Value) -> Op:
        """The same done to rows of another width."""
        if isinstance(self.op, Reshape):
            return Reshape(rows, (*self.op.shape[:-1], rows.shape[-1]))
        return dataclasses.replace(self.op, **{self.field: rows})


def _rows_field(op: Op) -> str | None:
    """The operand whose rows an op picks, lays out, weights, adds up or projects; none if it mixes their elements."""
    match op:
        case Linear() | TakeLast():
            return "x"
        case TakeRows():
            return "table" if op.table.type.rank > 1 else None
        case Sum():
            return "x" if op.axis < op.x.type.rank - 1 else None
        case Reshape():
            old, new = op.x.shape, op.shape
            keeps_rows = old[-1:] == new[-1:] and product(old[:-1]) == product(new[:-1])
            return "x" if keeps_rows else None
        case Mul():
            if _is_one_per_row(op.b):
                return "a"
            return "b" if _is_one_per_row(op.a) else None
    return None


def _is_one_per_row(value: Value) -> bool:
    """Whether a factor is constant along the last axis."""
    return value.shape[-1:] in ((), (1,))


def _chain(op: Op, through: tuple[type[Op], ...], end: type[Op], rewriter: Rewriter) -> list[_Step]:
    """From an op back to one of class `end`, by way of others of `through`; empty if it leads elsewhere."""
    steps: list[_Step] = []
    found: Op | None = op
    while found is not None and (rows := _rows_field(found)) is not None:
        steps.append(_Step(found, rows, steps[-1].rows.name if steps else ""))
        if found is not op and isinstance(found, end):
            return steps
        if found is not op and not isinstance(found, through):
            break
        found = rewriter.producer(steps[-1].rows)
    return []


def _applied(steps: Sequence[_Step], rows: Value, rewriter: Rewriter) -> Value:
    """What steps in order make of rows."""
    source = rows.name
    for step in steps:
        rows = rewriter(step.on(rows), step.name or f"{source}.{step.op.mnemonic()}")
    return rows


def _product_last(chain: Sequence[_Step], rewriter: Rewriter) -> Replacement:
    """A chain's result with the product at its far end applied after all others."""
    if not chain:
        return None
    *steps, last = chain
    return _applied([*reversed(steps), last], last.rows, rewriter)


def _project_after_combine(op: Op, rewriter: Rewriter) -> Replacement:
    chain = _chain(op, (Reshape, Mul, TakeRows), Linear, rewriter)
    linear = chain[-1].op if chain else None
    if not isinstance(linear, Linear) or linear.x.dtype is not linear.acc:
        return None  # rows are to be weighted and summed in the accumulator's type, as before
    return _product_last(chain, rewriter)


def _project_before_gather(op: Op, rewriter: Rewriter) -> Replacement:
    chain = _chain(op, (Reshape,), TakeRows, rewriter)
    if not chain:
        return None
    first, *steps = chain
    return _applied([first, *reversed(steps)], steps[-1].rows, rewriter)


def _project_after_gather(op: Op, rewriter: Rewriter) -> Replacement:
    return _product_last(_chain(op, (Reshape,), Linear, rewriter), rewriter)


RULES: tuple[Rule, ...] = (
    # Σⱼ wⱼ · (dⱼ · Pᵀ) = (Σⱼ wⱼ · dⱼ) · Pᵀ, where d may be gathered: (d · Pᵀ)[i]
    Rule("project-after-combine", Sum, _project_after_combine),
    # x[i] · Pᵀ = (x · Pᵀ)[i], where i picks more rows than x has
    Rule("project-before-gather", Linear, _project_before_gather),
    # (x · Pᵀ)[i] = x[i] · Pᵀ, where i picks fewer
    Rule("project-after-gather", (TakeRows, TakeLast), _project_after_gather),
)
"""Every rule; each says what is equal, and `_Judge` whether it pays."""


@dataclass(frozen=True)
class _Move:
    """What a rule proposes: ops that nobody needs any more, and nodes that do their work instead."""

    old: tuple[Op, ...]
    new: tuple[Node, ...]

    @property
    def before(self) -> Cost:
        return sum((op.cost() for op in self.old), Cost())

    @property
    def after(self) -> Cost:
        return sum((node.op.cost() for node in self.new), Cost())

    def refusal(self) -> str | None:
        """Why not to do it; none if it pays."""
        if not any(isinstance(op, Linear) for op in self.old):
            return "linear stays, since what it makes is read elsewhere"
        old, new = self.before.flops, self.after.flops
        if _is_fewer(new, old):
            return None
        return (
            f"linear stays, since {format_dim(new)} flops would take the place of {format_dim(old)}"
        )


@dataclass
class _Judge:
    """Decides about moves while a graph is rewritten, and keeps account of who reads what.

    Attributes:
        pass_name, graph_name, ctx: for remarks.
        reads: how often a value is read by ops that somebody needs, and by the graph's results.
        made: values of ops that moves placed; that they stay there is not worth a remark.
        refused: the present refusals by the value they are about.
        move: what the rule that is being tried proposes.
    """

    pass_name: str
    graph_name: str
    ctx: PassContext
    reads: Counter[Value]
    made: set[Value] = field(default_factory=set)
    refused: dict[Value, Remark] = field(default_factory=dict)
    move: _Move = field(default_factory=lambda: _Move((), ()))

    def watched(self, rule: Rule) -> Rule:
        """The rule, telling what it proposes."""

        def apply(op: Op, rewriter: Rewriter) -> Replacement:
            mark = rewriter.mark()
            found = rule.apply(op, rewriter)
            if found is not None:
                new = rewriter.since(mark)
                self.move = _Move(self._freed(op, new, rewriter), new)
            return found

        return dataclasses.replace(rule, apply=apply)

    def _freed(self, op: Op, new: Sequence[Node], rewriter: Rewriter) -> tuple[Op, ...]:
        """An op and those before it that nobody needs once new nodes do its work."""
        still_read = {v for node in new for v in node.op.operands()}
        freed = [op]
        for reader in freed:  # which grows on the way
            for value in reader.operands():
                producer = rewriter.producer(value)
                alone = self.reads[value] == 1 and value not in still_read
                if alone and producer is not None:
                    freed.append(producer)
        return tuple(freed)

    def allows(self, rule: Rule, node: Node) -> bool:
        """Whether the move takes the node's place."""
        (value,) = node.results
        if not self.reads[value]:
            return False
        remark = Remark(self.pass_name, f"{self.graph_name}/%{value.name}", rule.name)
        reason = self.move.refusal()
        if reason is not None:
            if value not in self.made:
                message = f"{rule.name}: {reason}"
                self.refused[value] = dataclasses.replace(remark, message=message)
            return False
        if not self.ctx.allows(
            dataclasses.replace(remark, saved=self.move.before - self.move.after)
        ):
            return False
        for op in self.move.old:
            self.reads.subtract(op.operands())
        for new in self.move.new:
            self.reads.update(new.op.operands())
            self.made.update(new.results)
        self.made.add(value)
        self.refused.pop(value, None)
        return True

    def note_refusals(self) -> None:
        """Hand on the refusals that still matter."""
        for value, remark in self.refused.items():
            if self.reads[value]:
                self.ctx.refuses(remark)


def _reads(graph: Graph) -> Counter[Value]:
    """How often each value is read by ops that the graph's results depend on, and by these."""
    reads = Counter(graph.results)
    for node in reversed(graph.nodes):
        if any(reads[v] for v in node.results):
            reads.update(node.op.operands())
    return reads


def _is_fewer(small: Dim, large: Dim) -> bool:
    """Whether a closed form is at most another for all sizes of at least 1, and not always equal."""
    difference = sympy.sympify(large - small)
    # With s = 1 + n a difference such as B·L − B is a sum of terms that sympy knows to be nonnegative.
    shifted = {s: 1 + sympy.Dummy(integer=True, nonnegative=True) for s in difference.free_symbols}
    found = sympy.expand(difference.subs(shifted))
    return bool(found != 0 and found.is_nonnegative)
