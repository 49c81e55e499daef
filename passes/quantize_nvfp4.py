"""Weights of matrix products in NVFP4."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from nemoc.ir.errors import NemocError
from nemoc.ir.graph import Graph
from nemoc.ir.nvfp4 import BLOCK, DIALECTS
from nemoc.ir.op import Op
from nemoc.ir.ops import Cast, DequantizeNvfp4, GroupedLinear, Linear
from nemoc.ir.ops.nvfp4 import quantized
from nemoc.ir.rewrite import Replacement, Rewriter, Rule, rewrite
from nemoc.ir.scopes import read_scope
from nemoc.ir.types import Value
from nemoc.passes.base import Effect, Pass
from nemoc.passes.context import PassContext, Remark


@dataclass(frozen=True)
class QuantizeNvfp4(Pass):
    """Store weights of matrix products in NVFP4, 4.5 bits each, and multiply with what they decode to.

    `scope` is `all` (every projection but the router and the head), `experts`, or a regular expression that the
    weight's name has to begin with. `dialect` is whose arithmetic scales follow (`nemoc.ir.nvfp4`); `four_over_six`
    chooses for each block between two scales (arXiv 2512.02010). Weights whose rows are no whole blocks of 16 stay as
    they are. Activations are not quantized. `budget` is the largest relative error of any result that the check of
    passes allows.

    Before::

        %y = linear(%x, %w) : f32[B, 256]

    After::

        %w.scale = nvfp4_global_scale(%w) : f32[]
        %w.scales = nvfp4_block_scales(%w, %w.scale) : f8e4m3[256, 4]
        %w.codes = quantize_nvfp4(%w, %w.scales, %w.scale) : u8[256, 32]
        %w.nvfp4 = dequantize_nvfp4(%w.codes, %w.scales, %w.scale) : f32[256, 64]
        %y = linear(%x, %w.nvfp4) : f32[B, 256]
    """

    effect: ClassVar[Effect] = Effect.PRECISION

    scope: str = "all"
    dialect: str = "modelopt"
    four_over_six: bool = False
    budget: float = 0.5

    def __post_init__(self) -> None:
        if self.dialect not in DIALECTS:
            raise NemocError(
                f"pass {self.name}: option dialect is {self.dialect!r}, expected one of "
                f"{', '.join(DIALECTS)}"
            )
        try:
            read_scope(self.scope)
        except NemocError as error:
            raise NemocError(f"pass {self.name}: option {error}") from None

    def error_budget(self) -> float:
        return self.budget

    def run(self, graph: Graph, ctx: PassContext) -> Graph:
        begins = read_scope(self.scope)
        chosen = {p for p in graph.params if begins.match(p.name)}

        def apply(op: Op, rewriter: Rewriter) -> Replacement:
            assert isinstance(op, Linear | GroupedLinear)
            if op.interleave != 1 or op.w not in chosen or not _has_blocks(op.w):
                return None
            return rewriter(replace(op, w=self._decoded(op.w, op.x, rewriter)))

        for param in graph.params:
            if param in chosen and graph.uses.get(param) and not _has_blocks(param):
                self._note_left(graph, param, ctx)
        return rewrite(
            graph,
            (Rule("quantize-weight", (Linear, GroupedLinear), apply),),
            on_apply=lambda _, node: ctx.allows(
                Remark(
                    self.name,
                    f"{graph.name}/%{node.results[0].name}",
                    f"{node.op.w.name} in NVFP4",  # type: ignore[attr-defined]
                )
            ),
        )

    def _note_left(self, graph: Graph, param: Value, ctx: PassContext) -> None:
        if any(isinstance(n.op, Linear | GroupedLinear) for n in graph.uses[param]):
            message = f"{param.name} has rows of {param.shape[-1]}, no whole blocks of {BLOCK}"
            ctx.refuses(Remark(self.name, f"{graph.name}/%{param.name}", message))

    def _decoded(self, w: Value, x: Value, rewriter: Rewriter) -> Value:
        """The weight that its codes stand for, of a type that a product with x takes."""
        names = iter(("scale", "scales", "codes"))
        append: Callable[[Op], Value] = lambda op: rewriter(op, f"{w.name}.{next(names)}")  # noqa: E731
        codes, scales, scale = quantized(append, w, self.dialect, self.four_over_six)
        decoded = rewriter(DequantizeNvfp4(codes, scales, scale, self.dialect), f"{w.name}.nvfp4")
        if decoded.dtype.bytes <= x.dtype.bytes:
            return decoded
        return rewriter(Cast(decoded, x.dtype), f"{w.name}.nvfp4.{x.dtype}")


def _has_blocks(w: Value) -> bool:
    width = w.shape[-1] if w.type.rank else 0
    return w.type.rank >= 2 and isinstance(width, int) and width % BLOCK == 0
