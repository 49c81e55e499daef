"""Local simplifications, by named rules."""

from dataclasses import dataclass

from nemoc.ir.errors import NemocError
from nemoc.ir.graph import Graph, Node
from nemoc.ir.rewrite import Rule, rewrite
from nemoc.passes.base import Pass
from nemoc.passes.context import PassContext, Remark
from nemoc.passes.options import nearest
from nemoc.passes.rules import arithmetic, casts, layout

RULES: tuple[Rule, ...] = (*casts.RULES, *arithmetic.RULES, *layout.RULES)
"""Every rule, in the order in which they are tried at a node."""


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Simplify ops locally, by rules that keep every bit (`rules/README.md` has their laws).

    `without` names rules to leave out. What loses its last reader stays until `dce`.

    Before::

        %a = cast(%x) {dtype=f32} : f32[B, 4, 2]
        %b = reshape(%a) {shape=[B, 8]} : f32[B, 8]
        %c = reshape(%b) {shape=[2*B, 4]} : f32[2*B, 4]
        %d = cast(%c) {dtype=f32} : f32[2*B, 4]
        return %d

    After, with `dce`::

        %a = cast(%x) {dtype=f32} : f32[B, 4, 2]
        %c = reshape(%a) {shape=[2*B, 4]} : f32[2*B, 4]
        return %c
    """

    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = [rule.name for rule in RULES]
        for name in self.without:
            if name not in known:
                hint = nearest(name, known)
                raise NemocError(f"pass {self.name}: option without names no rule {name!r}{hint}")

    def run(self, graph: Graph, ctx: PassContext) -> Graph:
        def allowed(rule: Rule, node: Node) -> bool:
            site = f"{graph.name}/%{node.results[0].name}"
            return ctx.allows(Remark(self.name, site, rule.name))

        rules = [rule for rule in RULES if rule.name not in self.without]
        return rewrite(graph, rules, on_apply=allowed)
