"""Local simplifications, by named rules."""

from dataclasses import dataclass

from nemoc.ir.graph import Graph, Node
from nemoc.ir.rewrite import Rule, rewrite
from nemoc.passes.base import Pass
from nemoc.passes.context import PassContext, Remark
from nemoc.passes.options import rules_without
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
        self._rules()

    def _rules(self) -> list[Rule]:
        return rules_without(self.name, RULES, self.without)

    def run(self, graph: Graph, ctx: PassContext) -> Graph:
        def allowed(rule: Rule, node: Node) -> bool:
            site = f"{graph.name}/%{node.results[0].name}"
            return ctx.allows(Remark(self.name, site, rule.name))

        return rewrite(graph, self._rules(), on_apply=allowed)
