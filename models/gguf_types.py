"""Element types of GGUF files: how many elements share a block of bytes, and the numbers that a block stands for.

Blocks lie along rows, which hold whole ones. Layouts and arithmetic are those of ggml (`ggml-common.h`,
`ggml-quants.c`), and bits those that its Python package gives. In all but the largest types a byte holds element j in
its low half and element j + half a block in its high half. Here a function takes blocks u8 [n, bytes] and gives
f32 [n, elements].

NVFP4 (`block_nvfp4`) is four blocks of 16 in one of 36 bytes: four scales in E4M3 without its sign, then the codes of
one block after the other. The scale of a matrix is a tensor of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nemoc.ir.dtypes import DType
from nemoc.ir.nvfp4 import BLOCK, DIALECTS, decode

Decoder = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class GgmlType:
    """An element type.

    Attributes:
        name: as ggml spells it.
        number: what files call it.
        elements: in a block.
        size: bytes of a block.
        decode: gives the numbers of blocks; None where elements are numbers, and for NVFP4.
        plain: the type of elements that are numbers.
    """

    name: str
    number: int
    elements: int
    size: int
    decode: Decoder | None = None
    plain: DType = DType.F32

    @property
    def is_plain(self) -> bool:
        """Whether elements are numbers, not codes in blocks."""
        return self.elements == 1

    def numbers(self, blocks: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """The numbers in blocks u8 [n, size], times a scale for each block, f32 [n, 1], if there is one.

        Returns:
            [n, elements]; f32, or `plain` where nothing has to be computed.
        """
        if self.number == NVFP4.number:
            return _nvfp4(blocks, scale)
        found = blocks.view(self.plain.torch) if self.decode is None else self.decode(blocks)
        return found if scale is None else found.to(torch.float32) * scale


_CODEBOOK = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What the codes of IQ4_NL stand for."""


def _f16(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The 16-bit number at a byte of each block, f32 [n, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).to(torch.float32)


def _halves(packed: torch.Tensor) -> torch.Tensor:
    """The low halves of bytes, then the high ones."""
    return torch.cat([packed & 0x0F, packed >> 4], -1)


def _bits(packed: torch.Tensor) -> torch.Tensor:
    """The bits of bytes, the lowest of each first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> shifts & 1).flatten(-2)


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _f16(blocks, 0) * (_halves(blocks[:, 2:]).to(torch.float32) - 8.0)


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _f16(blocks, 0) * _halves(blocks[:, 4:]).to(torch.float32) + _f16(blocks, 2)


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    codes = _halves(blocks[:, 6:]) | _bits(blocks[:, 2:6]) << 4
    return _f16(blocks, 0) * (codes.to(torch.float32) - 16.0)


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    codes = _halves(blocks[:, 8:]) | _bits(blocks[:, 4:8]) << 4
    return _f16(blocks, 0) * codes.to(torch.float32) + _f16(blocks, 2)


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, 2:].view(torch.int8).to(torch.float32) * _f16(blocks, 0)


def _iq4_nl(blocks: torch.Tensor) -> torch.Tensor:
    values = torch.tensor(_CODEBOOK, dtype=torch.float32, device=blocks.device)
    return _f16(blocks, 0) * values[_halves(blocks[:, 2:]).int()]


def _mxfp4(blocks: torch.Tensor) -> torch.Tensor:
    """Codes of E2M1 times a power of two, whose exponent is the first byte; 2⁻¹²⁷ and more."""
    exponents = blocks[:, :1].int() - 127
    scales = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)
    packed = _halves(blocks[:, 1:])
    codes = packed[:, 0::2] | packed[:, 1::2] << 4
    return scales * decode(codes, DIALECTS["modelopt"], torch.float32)


def _k_scales(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight scales and eight minima of 6 bits each in 12 bytes [n, 12]; f32 [n, 8, 1] both."""
    a, b, c = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat([a & 0x3F, c & 0x0F | a >> 6 << 4], -1)
    minima = torch.cat([b & 0x3F, c >> 4 | b >> 6 << 4], -1)
    return scales.to(torch.float32).unsqueeze(-1), minima.to(torch.float32).unsqueeze(-1)


def _k_codes(packed: torch.Tensor) -> torch.Tensor:
    """Codes of 8 · 32 elements in 4 · 32 bytes, the low halves of 32 bytes before their high ones."""
    rows = packed.reshape(len(packed), 4, 1, 32)
    return torch.cat([rows & 0x0F, rows >> 4], 2).reshape(len(packed), 8, 32)


def _k_numbers(blocks: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    scales, minima = _k_scales(blocks[:, 4:16])
    step = _f16(blocks, 0).unsqueeze(-1) * scales
    least = _f16(blocks, 2).unsqueeze(-1) * minima
    return (step * codes.to(torch.float32) - least).flatten(1)


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    return _k_numbers(blocks, _k_codes(blocks[:, 16:]))


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    """As Q4_K, with a fifth bit: bit i of byte j belongs to element 32 i + j."""
    high = _bits(blocks[:, 16:48]).reshape(len(blocks), 32, 8).transpose(1, 2)
    return _k_numbers(blocks, _k_codes(blocks[:, 48:]) | high << 4)


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    """Four bits in 128 bytes and two in 64, for two halves of 128 elements; 16 scales of 8 bits."""
    count = len(blocks)
    low = blocks[:, :128].reshape(count, 2, 1, 64)
    low = torch.cat([low & 0x0F, low >> 4], 2).reshape(count, 2, 4, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device).reshape(4, 1)
    high = blocks[:, 128:192].reshape(count, 2, 1, 32) >> shifts & 3
    codes = (low | high << 4).reshape(count, 16, 16).to(torch.float32) - 32.0
    scales = blocks[:, 192:208].contiguous().view(torch.int8).to(torch.float32)
    return ((_f16(blocks, 208) * scales).unsqueeze(-1) * codes).flatten(1)


def nvfp4_codes(blocks: torch.Tensor) -> torch.Tensor:
    """The codes of blocks in NVFP4 as `nemoc.ir.nvfp4.pack` has them, u8 [n, 32]."""
    halves = _halves(blocks[:, 4:].reshape(-1, 4, BLOCK // 2))
    return (halves[..., 0::2] | halves[..., 1::2] << 4).flatten(1)


def nvfp4_scales(blocks: torch.Tensor) -> torch.Tensor:
    """Their scales, f8e4m3 [n, 4]."""
    return (blocks[:, :4] & 0x7F).view(torch.float8_e4m3fn)


def _nvfp4(blocks: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """As ModelOpt multiplies: the two scales first."""
    scales = nvfp4_scales(blocks).to(torch.float32)
    if scale is not None:
        scales = scales * scale
    numbers = decode(nvfp4_codes(blocks), DIALECTS["modelopt"], torch.float32)
    return numbers * scales.repeat_interleave(BLOCK, -1)


F32 = GgmlType("F32", 0, 1, 4)
F16 = GgmlType("F16", 1, 1, 2, plain=DType.F16)
BF16 = GgmlType("BF16", 30, 1, 2, plain=DType.BF16)
Q8_0 = GgmlType("Q8_0", 8, 32, 34, _q8_0)
NVFP4 = GgmlType("NVFP4", 40, 64, 36)

GGML_TYPES = {
    type_.number: type_
    for type_ in (
        F32,
        F16,
        BF16,
        GgmlType("Q4_0", 2, 32, 18, _q4_0),
        GgmlType("Q4_1", 3, 32, 20, _q4_1),
        GgmlType("Q5_0", 6, 32, 22, _q5_0),
        GgmlType("Q5_1", 7, 32, 24, _q5_1),
        Q8_0,
        GgmlType("Q4_K", 12, 256, 144, _q4_k),
        GgmlType("Q5_K", 13, 256, 176, _q5_k),
        GgmlType("Q6_K", 14, 256, 210, _q6_k),
        GgmlType("IQ4_NL", 20, 32, 18, _iq4_nl),
        GgmlType("MXFP4", 39, 32, 17, _mxfp4),
        NVFP4,
    )
}
"""The types that can be read, by number."""

UNREAD = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64",
    28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 41: "Q1_0",
}  # fmt: skip
"""The names of others."""


def encode_q8_0(x: torch.Tensor) -> torch.Tensor:
    """Rows in Q8_0: f32 [..., K] -> u8 [..., K/32 · 34]. A half is rounded away from zero, as C's `roundf` does."""
    blocks = x.unflatten(-1, (-1, Q8_0.elements))
    step = blocks.abs().amax(-1, keepdim=True) / 127.0
    scaled = blocks * torch.where(step == 0, 0.0, step.reciprocal())
    codes = (scaled.sign() * (scaled.abs() + 0.5).floor()).to(torch.int8)
    parts = [step.to(torch.float16).view(torch.uint8), codes.view(torch.uint8)]
    return torch.cat(parts, -1).flatten(-2)


def encode_nvfp4(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Rows in ggml's layout: codes u8 [..., K/2] as `nemoc.ir.nvfp4.pack` has them, f8e4m3 [..., K/16].

    Returns:
        u8 [..., K/64 · 36].
    """
    pairs = codes.unflatten(-1, (-1, BLOCK // 2))
    single = torch.stack([pairs & 0x0F, pairs >> 4], -1).flatten(-2)
    packed = single[..., : BLOCK // 2] | single[..., BLOCK // 2 :] << 4
    parts = [
        scales.view(torch.uint8).unflatten(-1, (-1, 4)),
        packed.unflatten(-2, (-1, 4)).flatten(-2),
    ]
    return torch.cat(parts, -1).flatten(-2)
