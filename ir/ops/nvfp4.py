"""Matrices in NVFP4 and back, and the layout of block scales that Blackwell's tensor cores read.

`nemoc.ir.nvfp4` has the format and its dialects. Quantizing is three ops with one result each, because each can then be
computed in slices: the scale of a tensor needs all of it, but given that scale every block has its scale, and
given both every block its codes, by itself. `quantized` appends the three.

A matrix is w [..., N, K] of f32, bf16 or f16, widened to f32; K is a multiple of 16. Mostly it is a weight. Leading
axes stack matrices that have a tensor scale each, f32 [...], as experts do in released checkpoints, and as rows of
activations do, matrices of one row; f32[] is one for all of them. It is what the dialect's files hold: a factor, or for
compressed-tensors a divisor.

NaN and infinity are refused when they are met. Rounding to codes and scales is what these ops mean, not an error of
arithmetic, so in float64 evaluation they give the same codes and scales.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch

from nemoc.ir.dims import Dim, ceil_div
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import IRError, expect
from nemoc.ir.nvfp4 import (
    BLOCK,
    DIALECTS,
    LARGEST_SCALE,
    LARGEST_SCALE_OF_SIX,
    Dialect,
    decode,
    encode,
    error,
    gathered,
    pack,
    spread,
)
from nemoc.ir.op import Env, Op, RowSlice
from nemoc.ir.ops.checks import expect_finite, expect_shapes, matrix_amax
from nemoc.ir.types import TensorType, Value

_WEIGHTS = (DType.F32, DType.BF16, DType.F16)

TILE_ROWS, TILE_COLUMNS, TILE_LANES = 128, 4, 32
"""A tile of block scales: its rows and columns, and how many of its rows stand below each other in memory."""


@dataclass(frozen=True)
class Nvfp4GlobalScale(Op):
    """The scale of each matrix by its largest magnitude: w [..., N, K] -> f32 [...].

    With `four_over_six` it leaves room for block scales 1.5 times as large. Separable along leading axes.
    """

    w: Value
    dialect: str = "modelopt"
    four_over_six: bool = False

    def infer(self) -> TensorType:
        _check_weight(self)
        return TensorType(DType.F32, self.w.shape[:-2])

    def evaluate(self, env: Env, w: torch.Tensor) -> torch.Tensor:
        amax = matrix_amax(self, w)
        largest = LARGEST_SCALE_OF_SIX if self.four_over_six else LARGEST_SCALE
        scale = _dialect(self).tensor_scale(amax, largest)
        _check_tensor_scale(self, scale, amax)
        return scale.to(env.torch(DType.F32))

    def slice_rows(self, start: int, stop: int) -> RowSlice:
        return RowSlice(self, (range(start, stop),))

    def flops(self) -> Dim:
        return self.w.type.elements


@dataclass(frozen=True)
class Nvfp4BlockScales(Op):
    """The scale of each block of 16: w [..., N, K], f32 [...] -> f8e4m3 [..., N, K/16].

    With `four_over_six` the scale that makes the largest magnitude 4 where its squared error is lower than that of the
    one that makes it 6. Separable along the first axis.
    """

    w: Value
    global_scale: Value
    dialect: str = "modelopt"
    four_over_six: bool = False

    def infer(self) -> TensorType:
        width = _check_weight(self)
        _check_global_scale(self, self.w.shape[:-2])
        return TensorType(DType.F8E4M3, (*self.w.shape[:-1], width // BLOCK))

    def evaluate(self, env: Env, w: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
        return _in_parts(self._scales, w, global_scale).to(env.torch(DType.F8E4M3))

    def _scales(self, w: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
        dialect = _dialect(self)
        x, g = _blocks(w.to(torch.float32)), _over_blocks(global_scale.to(torch.float32))
        amax = expect_finite(self, x.abs().amax(-1, keepdim=True))
        _check_tensor_scale(self, g, amax)
        ideal = torch.where(amax == 0, 0.0, dialect.ideal(amax, g))
        scales = dialect.rounded(ideal).to(torch.float32)
        if self.four_over_six:
            wider = dialect.rounded(ideal * 1.5).to(torch.float32)
            better = error(x, wider, g, dialect) < error(x, scales, g, dialect)
            scales = torch.where(better, wider, scales)
        return scales.squeeze(-1)

    def slice_rows(self, start: int, stop: int) -> RowSlice:
        rows = range(start, stop)
        return RowSlice(self, (rows, _stack_rows(self.global_scale, rows)))

    def flops(self) -> Dim:
        return self.w.type.elements


@dataclass(frozen=True)
class QuantizeNvfp4(Op):
    """The nearest codes, ties to even, two a byte: w [..., N, K] and its scales -> u8 [..., N, K/2].

    The even element is in the low half. Separable along the first axis.
    """

    w: Value
    scales: Value
    global_scale: Value
    dialect: str = "modelopt"

    def infer(self) -> TensorType:
        width = _check_weight(self)
        expect_shapes(self, DType.F8E4M3, scales=(*self.w.shape[:-1], width // BLOCK))
        _check_global_scale(self, self.w.shape[:-2])
        return TensorType(DType.U8, (*self.w.shape[:-1], width // 2))

    def evaluate(
        self, env: Env, w: torch.Tensor, scales: torch.Tensor, global_scale: torch.Tensor
    ) -> torch.Tensor:
        return _in_parts(self._codes, w, global_scale, scales)

    def _codes(
        self, w: torch.Tensor, global_scale: torch.Tensor, scales: torch.Tensor
    ) -> torch.Tensor:
        x = _blocks(expect_finite(self, w.to(torch.float32)))
        s, g = scales.to(torch.float32), _over_blocks(global_scale.to(torch.float32))
        expect(bool((s > 0).all()), f"{self.mnemonic()}: scales are NaN, zero or negative")
        _check_tensor_scale(self, g, x)
        return pack(encode(x, s.unsqueeze(-1), g, _dialect(self)).flatten(-2))

    def slice_rows(self, start: int, stop: int) -> RowSlice:
        rows = range(start, stop)
        return RowSlice(self, (rows, rows, _stack_rows(self.global_scale, rows)))

    def flops(self) -> Dim:
        return self.w.type.elements


@dataclass(frozen=True)
class DequantizeNvfp4(Op):
    """code · s_b · s_g: u8 [..., N, K/2], f8e4m3 [..., N, K/16], f32 [...] -> f32 [..., N, K].

    By the dialect the tensor scale is a factor (in torchao, and `weight_scale_2` in ModelOpt's files) or a divisor
    (`weight_global_scale` of compressed-tensors). The scales are combined first, in f32.

    With `interleave = b` above 1 codes and scales are each as `interleave` lays them out, and the result is as it lays
    out what they stand for: u8 [..., ⌈N/b⌉, K/2, b], f8e4m3 [..., ⌈N/b⌉, K/16, b] -> f32 [..., ⌈N/b⌉, K, b].
    `spread` codes are as `spread_codes` orders them. Separable along the first axis.
    """

    is_unpacking: ClassVar[bool] = True

    packed: Value
    scales: Value
    global_scale: Value
    dialect: str = "modelopt"
    interleave: int = 1
    spread: bool = False

    def infer(self) -> TensorType:
        name, packed, b = self.mnemonic(), self.packed.type, self.interleave
        expect(not self.spread or b == 1, f"{name}: interleave is {b}, expected 1 of spread codes")
        rank = 2 if b == 1 else 3
        expect(
            packed.dtype is DType.U8 and packed.rank >= rank and (b == 1 or packed.shape[-1] == b),
            f"{name}: packed is {packed}, expected u8 of rank ≥ {rank}"
            + (f" in blocks of {b} rows" if b > 1 else ""),
        )
        _check_dialect(self)
        columns = packed.rank - (1 if b == 1 else 2)
        lead, inner = packed.shape[:columns], packed.shape[columns + 1 :]
        rows = TensorType(packed.dtype, packed.shape[: columns + 1])
        width = _check_width(name, "packed", rows, BLOCK // 2) * 2
        expect_shapes(self, DType.F8E4M3, scales=(*lead, width // BLOCK, *inner))
        _check_global_scale(self, lead[:-1])
        return TensorType(DType.F32, (*lead, width, *inner))

    def evaluate(
        self, env: Env, packed: torch.Tensor, scales: torch.Tensor, global_scale: torch.Tensor
    ) -> torch.Tensor:
        dialect, wide = _dialect(self), env.torch(DType.F32)
        g = _over_blocks(global_scale.to(wide))
        if self.interleave > 1:
            packed, scales, g = packed.mT, scales.mT, g.unsqueeze(-1)
        s = scales.to(wide).unsqueeze(-1)
        expect(not bool(s.isnan().any()), f"{self.mnemonic()}: scales has NaN elements")
        expect(
            bool(dialect.can_decode(g).all()),
            f"{self.mnemonic()}: global_scale is NaN, infinite or a divisor of 0",
        )
        codes = gathered(packed) if self.spread else packed
        x = _blocks(decode(codes, dialect, wide))
        w = (x * dialect.step(s, g)).flatten(-2)
        return w if self.interleave == 1 else w.mT.contiguous()

    def slice_rows(self, start: int, stop: int) -> RowSlice:
        rows = range(start, stop)
        return RowSlice(self, (rows, rows, _stack_rows(self.global_scale, rows)))

    def flops(self) -> Dim:
        return self.infer().elements


@dataclass(frozen=True)
class Nvfp4ToFp8(Op):
    """The E4M3 number nearest to code · s_b / 8: u8 [..., N, K/2], f8e4m3 [..., N, K/16] -> f8e4m3 [..., N, K].

    For matrix units that multiply FP8 and no NVFP4. Ties go to even. None is cut off, since code · s_b is at most
    6 · 448; and a power of two leaves the codes 0.5, 1, 2 and 4 times any scale as they are. Of normally distributed
    weights that changes what is decoded by 2.1 % of its norm, and the distance to what was quantized from 9.5 to 9.7 %.
    Separable along the first axis.
    """

    is_unpacking: ClassVar[bool] = True

    SHARE: ClassVar[float] = 8.0
    """What the number stands for over itself, tensor scale apart."""

    packed: Value
    scales: Value

    def infer(self) -> TensorType:
        name, packed = self.mnemonic(), self.packed.type
        expect(
            packed.dtype is DType.U8 and packed.rank >= 2,
            f"{name}: packed is {packed}, expected u8 of rank ≥ 2",
        )
        width = _check_width(name, "packed", packed, BLOCK // 2) * 2
        lead = packed.shape[:-1]
        expect_shapes(self, DType.F8E4M3, scales=(*lead, width // BLOCK))
        return TensorType(DType.F8E4M3, (*lead, width))

    def evaluate(self, env: Env, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        s = scales.to(torch.float32).unsqueeze(-1) / self.SHARE
        expect(not bool(s.isnan().any()), f"{self.mnemonic()}: scales has NaN elements")
        numbers = _blocks(decode(packed, DIALECTS["modelopt"], torch.float32)) * s
        narrow = numbers.flatten(-2).to(torch.float8_e4m3fn)
        return narrow.to(env.torch(DType.F8E4M3))

    def slice_rows(self, start: int, stop: int) -> RowSlice:
        rows = range(start, stop)
        return RowSlice(self, (rows, rows))

    def flops(self) -> Dim:
        return self.infer().elements


@dataclass(frozen=True)
class SpreadCodes(Op):
    """The same codes in another order of bits, for less work in kernels: u8 [..., N, K/2] -> u8 [..., N, K/2].

    What the order is says `nemoc.ir.nvfp4.spread`; K is a multiple of 16. Separable along the first axis.
    """

    packed: Value

    def infer(self) -> TensorType:
        type_ = self.packed.type
        expect(
            type_.dtype is DType.U8 and type_.rank >= 2,
            f"spread_codes: packed is {type_}, expected u8 of rank ≥ 2",
        )
        _check_width("spread_codes", "packed", type_, BLOCK // 2)
        return type_

    def evaluate(self, env: Env, packed: torch.Tensor) -> torch.Tensor:
        return spread(packed)

    def slice_rows(self, start: int, stop: int) -> RowSlice:
        return RowSlice(self, (range(start, stop),))


@dataclass(frozen=True)
class SwizzleScales(Op):
    """Block scales in tiles of 128 × 4 as Blackwell's tensor cores read them, padded with zeros.

    scales [..., M, S] -> [..., ⌈M/128⌉, ⌈S/4⌉, 32, 4, 4], with

        result[..., m div 128, s div 4, m mod 32, (m mod 128) div 32, s mod 4] = scales[..., m, s],

    so that a tile is 512 consecutive bytes: cuBLAS's layout of block scaling factors, which FlashInfer and Transformer
    Engine write too. Files hold scales row by row. The inverse reads the result at those places; what lies at m ≥ M or
    s ≥ S is padding. Separable along every leading axis, and along M in multiples of 128.
    """

    scales: Value

    def infer(self) -> TensorType:
        type_ = self.scales.type
        expect(
            type_.dtype is DType.F8E4M3 and type_.rank >= 2,
            f"swizzle_scales: scales is {type_}, expected f8e4m3 of rank ≥ 2",
        )
        *lead, rows, columns = type_.shape
        tiles = ceil_div(rows, TILE_ROWS), ceil_div(columns, TILE_COLUMNS)
        tile = TILE_LANES, TILE_ROWS // TILE_LANES, TILE_COLUMNS
        return TensorType.of(DType.F8E4M3, (*lead, *tiles, *tile))

    def evaluate(self, env: Env, scales: torch.Tensor) -> torch.Tensor:
        *lead, rows, columns = scales.shape
        padded = scales.new_zeros(
            (*lead, -(-rows // TILE_ROWS) * TILE_ROWS, -(-columns // TILE_COLUMNS) * TILE_COLUMNS)
        )
        padded[..., :rows, :columns] = scales
        tiles = padded.unflatten(-1, (-1, TILE_COLUMNS)).unflatten(-3, (-1, 4, TILE_LANES))
        blocks: torch.Tensor = tiles.movedim(-2, -4).transpose(-2, -3)
        return blocks.contiguous()

    def slice_rows(self, start: int, stop: int) -> RowSlice | None:
        if self.scales.type.rank > 2:
            return RowSlice(self, (range(start, stop),))
        rows = self.scales.shape[0]
        if not isinstance(rows, int):
            return None
        return RowSlice(self, (range(start * TILE_ROWS, min(stop * TILE_ROWS, rows)),))


def quantized(
    append: Callable[[Op], Value],
    w: Value,
    dialect: str = "modelopt",
    four_over_six: bool = False,
    scale: Value | None = None,
) -> tuple[Value, Value, Value]:
    """Append the ops that quantize a matrix; gives codes, block scales and tensor scale, which may be given."""
    g = append(Nvfp4GlobalScale(w, dialect, four_over_six)) if scale is None else scale
    s = append(Nvfp4BlockScales(w, g, dialect, four_over_six))
    return append(QuantizeNvfp4(w, s, g, dialect)), s, g


_Encoder: TypeAlias = Nvfp4GlobalScale | Nvfp4BlockScales | QuantizeNvfp4


def _check_dialect(op: _Encoder | DequantizeNvfp4) -> None:
    expect(
        op.dialect in DIALECTS,
        f"{op.mnemonic()}: dialect is {op.dialect!r}, expected one of {', '.join(DIALECTS)}",
    )


def _dialect(op: _Encoder | DequantizeNvfp4) -> Dialect:
    return DIALECTS[op.dialect]


def _check_weight(op: _Encoder) -> int:
    """Dialect, rank, type and width of w; gives the width."""
    name, type_ = op.mnemonic(), op.w.type
    expect(
        type_.dtype in _WEIGHTS and type_.rank >= 2,
        f"{name}: w is {type_}, expected f32, bf16 or f16 of rank ≥ 2",
    )
    _check_dialect(op)
    return _check_width(name, "w", type_, BLOCK)


def _check_width(name: str, operand: str, type_: TensorType, unit: int) -> int:
    width = type_.shape[-1]
    if not isinstance(width, int) or width % unit or 0 in type_.shape:
        raise IRError(f"{name}: {operand} is {type_}, expected whole blocks of {unit} columns")
    return width


def _check_global_scale(
    op: Nvfp4BlockScales | QuantizeNvfp4 | DequantizeNvfp4, lead: tuple[Dim, ...]
) -> None:
    """One scale, or one for each of the matrices that leading axes stack."""
    type_ = op.global_scale.type
    expect(
        type_.dtype is DType.F32 and type_.shape in ((), lead),
        f"{op.mnemonic()}: global_scale is {type_}, expected {TensorType(DType.F32, lead)}",
    )


def _check_tensor_scale(op: _Encoder, g: torch.Tensor, x: torch.Tensor) -> None:
    """A tensor scale out of range is harmless to zeros alone."""
    usable = _dialect(op).can_encode(g)
    expect(
        bool(usable.all()) or bool((usable | (x == 0)).all()),
        f"{op.mnemonic()}: a tensor scale is out of range in dialect {op.dialect}; "
        f"they lie between {g.amin().item():.3g} and {g.amax().item():.3g}",
    )


def _blocks(x: torch.Tensor) -> torch.Tensor:
    blocks: torch.Tensor = x.unflatten(-1, (-1, BLOCK))
    return blocks


def _over_blocks(g: torch.Tensor) -> torch.Tensor:
    """Tensor scales so that they broadcast over [..., rows, blocks, 16]."""
    return g[..., None, None, None]


_PART = 1 << 18
"""Elements that are worked on at a time: what is computed on the way stays in caches."""


def _in_parts(
    compute: Callable[..., torch.Tensor],
    w: torch.Tensor,
    global_scale: torch.Tensor,
    *row_wise: torch.Tensor,
) -> torch.Tensor:
    """What is computed of matrices [..., N, K], a part of their rows at a time.

    Args:
        compute: given some rows, the tensor scale and the same rows of others, what becomes of them.
        w: the matrices.
        global_scale: one for each of them, or for all.
        row_wise: others that have the rows of w.
    """
    count = len(w)
    if w.numel() <= _PART or (count == 1 and w.dim() == 2):
        return compute(w, global_scale, *row_wise)
    whole = global_scale.dim() == 0
    if count == 1:
        scale = global_scale if whole else global_scale[0]
        return _in_parts(compute, w[0], scale, *(x[0] for x in row_wise)).unsqueeze(0)
    each = max(1, _PART * count // w.numel())
    rows, *others = (x.split(each) for x in (w, *row_wise))
    scales = (global_scale,) * len(rows) if whole else global_scale.split(each)
    parts = zip(rows, scales, *others, strict=True)
    return torch.cat([_in_parts(compute, *part) for part in parts])


def _stack_rows(global_scale: Value, rows: range) -> range | None:
    return rows if global_scale.type.rank else None
