"""A plugin with an op of its own, as a user would write one."""

from pathlib import Path

PLUGIN = '''"""An op, a pass that uses it, and one that spoils it."""

from dataclasses import dataclass
from typing import ClassVar

from nemoc.ir import ops
from nemoc.ir.ops.elementwise import Unary
from nemoc.ir.rewrite import Rule, rewrite
from nemoc.passes import Effect, Pass, Remark


@dataclass(frozen=True)
class Halved(Unary):
    """Half of x."""

    def evaluate(self, env, x):
        return x * 0.5

    def expand(self, build):
        return build(ops.Scale(self.x, 0.5))

    def flops(self):
        return self.x.type.elements


def _replaced(name, graph, ctx, rule):
    def allowed(rule, node):
        return ctx.allows(Remark(name, f"{graph.name}/%{node.results[0].name}", rule.name))

    return rewrite(graph, (rule,), on_apply=allowed)


@dataclass(frozen=True)
class DoubleAndHalve(Pass):
    """Double squares, and halve them again, which changes no bit."""

    def run(self, graph, ctx):
        def there_and_back(op, rewriter):
            square = rewriter(ops.Mul(op.x, op.x))
            return rewriter(Halved(rewriter(ops.Scale(square, 2.0))))

        return _replaced(self.name, graph, ctx, Rule("there-and-back", ops.Square, there_and_back))


@dataclass(frozen=True)
class Forget(Pass):
    """Leave halving out, and say that nothing changed."""

    def run(self, graph, ctx):
        return _replaced(self.name, graph, ctx, Rule("forget", Halved, lambda op, r: op.x))


NEMOC_PASSES = [DoubleAndHalve, Forget]
'''


def write_plugin(folder: Path) -> str:
    """Write the module to a folder; returns its name."""
    (folder / "halving.py").write_text(PLUGIN, "utf-8")
    return "halving"
