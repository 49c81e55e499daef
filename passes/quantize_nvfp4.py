"""Weights of matrix products in NVFP4, and what becomes of the activations that they multiply."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from nemoc.ir.dtypes import DType
from nemoc.ir.errors import NemocError
from nemoc.ir.graph import Graph
from nemoc.ir.nvfp4 import BLOCK, DIALECTS
from nemoc.ir.op import Op
from nemoc.ir.ops import (
    Cast,
    DequantizeNvfp4,
    Full,
    GroupedLinear,
    Linear,
    Reshape,
    RoundToInt8,
    TakeRows,
)
from nemoc.ir.ops.fp8 import nvfp4_in_fp8
from nemoc.ir.ops.nvfp4 import quantized
from nemoc.ir.rewrite import Replacement, Rewriter
from nemoc.ir.types import Value
from nemoc.passes.base import Effect, Pass
from nemoc.passes.context import PassContext, Remark
from nemoc.passes.quantize_products import (
    check_input_scale,
    check_scope,
    fp8_decoded,
    has_many_rows,
    rewrite_products,
    row_by_row,
    rows_in_fp8,
    unrounded,
    weights_in,
)


@dataclass(frozen=True)
class QuantizeNvfp4(Pass):
    """Store weights of matrix products in NVFP4, 4.5 bits each, and multiply with what they decode to.

    `scope` is `all` (every projection but the router and the head), `experts`, or a regular expression that the
    weight's name has to begin with. `dialect` is whose arithmetic scales follow (`nemoc.ir.nvfp4`); `four_over_six`
    chooses for each block of a weight between two scales (arXiv 2512.02010). Weights whose rows are no whole blocks of
    16 stay as they are. `mode` says what becomes of the activations that such a weight multiplies (`MODES`). `budget`
    is the largest relative error of any result that the check of passes allows.

    - `w4a16`: nothing.
    - `w4a8`: they are rounded to int8, 16 at a time, so that CPUs multiply in integers. That changes a row of normally
      distributed numbers by 0.47 % of its norm.
    - `w4a4`: they become NVFP4 too, every row as a tensor of its own: its scale is of its own largest magnitude and
      those of its blocks follow from that, so that no row's result depends on others in the batch. Where a product
      gathers rows, the table is quantized before. On normally distributed numbers the error of a row is 9.5 % of its
      norm, as of weights, and that of a product of both 13.5 %. Weights in scope that a checkpoint stores in NVFP4 keep
      their codes. With static scales (the context's `input_scales`, one for each weight, from calibration or the
      checkpoint) that is the tensor scale of all rows; then the kernel that makes activations can quantize them tile by
      tile. `input-scale` above 0 is one for all weights instead. Blocks' scales lie between 2⁻⁹ and 448, so magnitudes
      above 2688 times the scale are cut off there.
    - `fp8-prompts`: in products of many rows, as `quantize-fp8{mode=w8a8-prompts}` counts them, activations become FP8,
      each row with a scale of its own, and the weight's numbers the nearest in FP8 (`nvfp4_in_fp8`), for matrix units
      that multiply FP8 but no NVFP4; in all others nothing. All steps read the same codes, those of a checkpoint too.
      That costs a row 2.6 % and a weight 2.1 % of its norm, beside the 9.5 % of NVFP4 itself.

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
    mode: str = "w4a16"
    dialect: str = "modelopt"
    four_over_six: bool = False
    input_scale: float = 0.0
    budget: float = 0.5

    def __post_init__(self) -> None:
        for option, known in (("dialect", DIALECTS), ("mode", MODES)):
            found = getattr(self, option)
            if found not in known:
                raise NemocError(
                    f"pass {self.name}: option {option} is {found!r}, expected one of {', '.join(known)}"
                )
        check_input_scale(self.name, self.input_scale)
        check_scope(self.name, self.scope)

    @property
    def takes_input_scales(self) -> bool:
        """Whether it quantizes activations by scales that the context has, if it has any."""
        return self.mode == "w4a4" and not self.input_scale

    def error_budget(self) -> float:
        return self.budget

    def run(self, graph: Graph, ctx: PassContext) -> Graph:
        chosen = weights_in(graph, self.name, self.scope)

        def apply(op: Linear | GroupedLinear, rewriter: Rewriter) -> Replacement:
            w = unrounded(op.w, rewriter)
            stored = rewriter.producer(w)
            if isinstance(stored, DequantizeNvfp4) and stored.packed in chosen:
                if self.mode not in _OF_STORED or _is_nvfp4(op.x, rewriter):
                    return None
                x = self._activations(op.x, stored.packed, scales, rewriter)
                if x is op.x:
                    return None
                return rewriter(replace(op, x=x, w=self._beside(x, w, stored.packed, rewriter)))
            if w not in chosen:
                return None
            if not _has_blocks(w):
                left[w] = None
                return None
            x = self._activations(op.x, w, scales, rewriter)
            decoded = self._decoded(w, rewriter)
            return rewriter(replace(op, x=x, w=self._beside(x, decoded, w, rewriter)))

        def format_name(op: Linear | GroupedLinear) -> str:
            too = self.mode == PROMPTS and has_many_rows(op.x)
            return "NVFP4, and FP8 beside rows of prompts" if too else "NVFP4"

        # Weights in FP8, and those of another pass, have scales that say nothing of this one's.
        own = {p.name for p in chosen if p.dtype is not DType.F8E4M3}
        scales = {name: s for name, s in ctx.input_scales.items() if name in own}
        left: dict[Value, None] = {}
        result = rewrite_products(graph, ctx, self.name, format_name, apply)
        for param in left:
            message = f"{param.name} has rows of {param.shape[-1]}, no whole blocks of {BLOCK}"
            ctx.refuses(Remark(self.name, f"{graph.name}/%{param.name}", message))
        return result

    def _activations(
        self, x: Value, w: Value, scales: Mapping[str, float], rewriter: Rewriter
    ) -> Value:
        """What a product with a weight takes in the place of x, given the static scales of this pass's weights."""
        scale = self.input_scale or scales.get(w.name, 0.0)
        if self.mode == "w4a4" and scales and not scale:
            raise NemocError(
                f"pass {self.name}: found no scale of the activations that {w.name} multiplies, "
                "expected one as for others"
            )
        return MODES[self.mode](scale, x, rewriter)

    def _decoded(self, w: Value, rewriter: Rewriter) -> Value:
        """The weight that its codes stand for, f32."""
        names = iter(("scale", "scales", "codes"))
        append: Callable[[Op], Value] = lambda op: rewriter(op, f"{w.name}.{next(names)}")  # noqa: E731
        codes, scales, scale = quantized(append, w, self.dialect, self.four_over_six)
        return rewriter(DequantizeNvfp4(codes, scales, scale, self.dialect), f"{w.name}.nvfp4")

    def _beside(self, x: Value, decoded: Value, w: Value, rewriter: Rewriter) -> Value:
        """What a product with x takes for a decoded weight; w is what the weight is stored as."""
        if self.mode != PROMPTS or not has_many_rows(x):
            return decoded
        stored = rewriter.producer(decoded)
        assert isinstance(stored, DequantizeNvfp4)
        names = iter(("fp8.codes", "share", "fp8.scale"))
        append: Callable[[Op], Value] = lambda op: rewriter(op, f"{w.name}.{next(names)}")  # noqa: E731
        return fp8_decoded(*nvfp4_in_fp8(append, stored), w.name, "fp8", rewriter)


def _as_they_are(scale: float, x: Value, rewriter: Rewriter) -> Value:
    return x


def _prompts_in_fp8(scale: float, x: Value, rewriter: Rewriter) -> Value:
    """Activations in FP8 if they are those of a prompt."""
    return rows_in_fp8(x, rewriter) if has_many_rows(x) else x


def _blocks_in_int8(scale: float, x: Value, rewriter: Rewriter) -> Value:
    """Activations rounded to int8 in the blocks of the weights that they multiply."""
    wide = x if x.dtype is DType.F32 else rewriter(Cast(x, DType.F32), f"{x.name}.f32")
    return rewriter(RoundToInt8(wide, BLOCK), f"{x.name}.int8")


def _rows_in_nvfp4(scale: float, x: Value, rewriter: Rewriter) -> Value:
    """Activations [..., K] as matrices of one row each, which have a tensor scale each, quantized and decoded.

    Their scales follow ModelOpt's arithmetic whatever the weights' do: no file holds them.
    """

    def decoded(rows: Value, stem: str) -> Value:
        names = iter(("scale", "scales", "codes"))
        append: Callable[[Op], Value] = lambda op: rewriter(op, f"{stem}.{next(names)}")  # noqa: E731
        given = append(Full(scale, DType.F32)) if scale else None
        codes, scales, whole = quantized(append, rows, scale=given)
        return rewriter(DequantizeNvfp4(codes, scales, whole), f"{stem}.decoded")

    return row_by_row(x, rewriter, "nvfp4", decoded)


PROMPTS = "fp8-prompts"
"""The mode that goes by the number of rows."""

_OF_STORED = ("w4a4", PROMPTS)
"""The modes that change what weights multiply that a checkpoint stores in NVFP4."""

MODES: Mapping[str, Callable[[float, Value, Rewriter], Value]] = {
    "w4a16": _as_they_are,
    "w4a8": _blocks_in_int8,
    "w4a4": _rows_in_nvfp4,
    PROMPTS: _prompts_in_fp8,
}
"""By name: given a static scale or 0, and activations x, what a product takes in their place, of their shape."""


def _is_nvfp4(x: Value, rewriter: Rewriter) -> bool:
    """Whether activations are what NVFP4 codes stand for."""
    op = rewriter.producer(x)
    match op:
        case Reshape():
            return _is_nvfp4(op.x, rewriter)
        case TakeRows():
            return _is_nvfp4(op.table, rewriter)
    return isinstance(op, DequantizeNvfp4)


def _has_blocks(w: Value) -> bool:
    width = w.shape[-1] if w.type.rank else 0
    return w.type.rank >= 2 and isinstance(width, int) and width % BLOCK == 0
