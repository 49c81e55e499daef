"""NVFP4 on tensors: E2M1 codes, a scale for every 16 of them, and a scale for the whole tensor.

An element is code · s · g. A code is one of ±{0, 0.5, 1, 1.5, 2, 3, 4, 6}: a sign, two bits of exponent, one of
mantissa. Two share a byte, the even element in the low half. The block scale s is E4M3, one for 16 consecutive elements
of the last axis; the tensor scale g is float32. They are such that a block's largest magnitude becomes code 6 and the
largest block scale 448: g = amax / (6 · 448), s = E4M3(amax of the block / 6 / g). NVIDIA describes the format in
arXiv 2509.25149.

*Four over six* (arXiv 2512.02010): a block's largest magnitude becomes code 4 instead, where codes lie closer, if that
lowers the block's squared error. Its scale is then 1.5 times as large, for which the tensor scale leaves room:
g = amax / (6 · 256). What reads the result sees no difference.

Three libraries write this format, each with float32 arithmetic of its own: what is equal on paper is rounded elsewhere.
A *dialect* is a library's arithmetic to the bit, as it is on CPUs:

|                        | modelopt      | torchao           | compressed-tensors              |
|------------------------|---------------|-------------------|---------------------------------|
| tensor scale g         | amax / 2688   | amax / 2688       | (1 / amax) · 2688: it divides   |
| scale of a block       | amax / (6 g)  | (amax / 6) / g    | g (amax / 6)                    |
| at least               | 2⁻⁹           | 2⁻⁶               | any, but 0.125 instead of 0     |
| of a block of zeros    | 1             | 2⁻⁶               | 0.125                           |
| to codes               | x / (s g)     | x · ((1 / g) / s) | x / (s / g)                     |
| from codes             | code · (s g)  | code · (s g)      | code · (s / g)                  |
| −0 becomes             | code 0        | code 8            | code 0                          |
| code 8 becomes         | 0             | −0                | −0                              |

They are read from, and tested against, nvidia-modelopt (`NVFP4QTensor`), torchao (`nvfp4_quantize`, `NVFP4Tensor`) and
compressed-tensors (`generate_gparam`, `calculate_qparams`, `NVFP4PackedCompressor`). Roundings decide where an element
lies on a tie between two codes or next to one. Weights that came from bf16 do that often enough that no two dialects
give equal bytes for every tensor, not even where no bound touches a block scale. All is widened to float32 first here;
compressed-tensors divides in bf16 when it is given bf16.

Of a tensor of zeros, for which ModelOpt and torchao compute 0 / 0, every dialect makes zeros, in its blocks of zeros.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

BLOCK = 16
"""Elements that share a block scale."""

LARGEST_CODE, LARGEST_SCALE, LARGEST_SCALE_OF_SIX = 6.0, 448.0, 256.0
"""The largest code and block scale, and the block scale that leaves room for four over six."""

_MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def _below(x: float) -> float:
    return torch.nextafter(torch.tensor(x), torch.tensor(0.0)).item()


_CUTS = (0.25, _below(0.75), 1.25, _below(1.75), 2.5, _below(3.5), 5.0)
"""The largest float32 that is rounded to each magnitude but the last. Halfway between two, the even mantissa wins."""


class Dialect:
    """A library's arithmetic; this one is ModelOpt's. Tensors are float32 and broadcast, scales of blocks too.

    Attributes:
        keeps_sign_of_zero: −0 becomes code 8.
        has_negative_zero: code 8 becomes −0.
        divides: the tensor scale is a divisor.
    """

    keeps_sign_of_zero = False
    has_negative_zero = False
    divides = False

    def tensor_scale(self, amax: torch.Tensor, largest: float) -> torch.Tensor:
        """The scale of tensors by their largest magnitudes; `largest` is what the largest block scale is to be."""
        return amax / amax.new_tensor(LARGEST_CODE * largest)

    def ideal(self, amax: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """The scales of blocks before rounding, by their largest magnitudes, which are above 0."""
        return amax / (LARGEST_CODE * g)

    def rounded(self, ideal: torch.Tensor) -> torch.Tensor:
        """Block scales as E4M3, which rounds to nearest, ties to even."""
        some = torch.where(ideal == 0, 1.0, ideal)
        return some.clamp(2**-9, LARGEST_SCALE).to(torch.float8_e4m3fn)

    def step(self, s: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """What code 1 stands for."""
        return s * g

    def scaled(self, x: torch.Tensor, s: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """Elements in units of their step."""
        return x / (s * g)

    def can_encode(self, g: torch.Tensor) -> torch.Tensor:
        """Whether no step that a tensor scale allows vanishes or overflows."""
        return (g > 0) & g.isfinite() & (2**-9 * g > 0)

    def can_decode(self, g: torch.Tensor) -> torch.Tensor:
        """Whether a tensor scale gives numbers."""
        return g.isfinite()


class TorchAo(Dialect):
    """torchao's arithmetic."""

    keeps_sign_of_zero = True
    has_negative_zero = True

    def ideal(self, amax: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return amax / amax.new_tensor(LARGEST_CODE) / g

    def rounded(self, ideal: torch.Tensor) -> torch.Tensor:
        return ideal.clamp(2**-6, LARGEST_SCALE).to(torch.float8_e4m3fn)

    def scaled(self, x: torch.Tensor, s: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return x * (g.reciprocal() / s)

    def can_encode(self, g: torch.Tensor) -> torch.Tensor:
        return (g > 0) & g.isfinite() & (2**6 * g.reciprocal()).isfinite()


class CompressedTensors(Dialect):
    """The arithmetic of compressed-tensors, whose tensor scale is a divisor."""

    has_negative_zero = True
    divides = True

    def tensor_scale(self, amax: torch.Tensor, largest: float) -> torch.Tensor:
        floor = torch.finfo(torch.float32).tiny
        g = amax.clamp(min=floor).reciprocal() * (LARGEST_CODE * largest)
        return torch.where(g.isinf(), 1.0, g)

    def ideal(self, amax: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return g * (amax / amax.new_tensor(LARGEST_CODE))

    def rounded(self, ideal: torch.Tensor) -> torch.Tensor:
        near = ideal.clamp(max=LARGEST_SCALE).to(torch.float8_e4m3fn).to(torch.float32)
        return torch.where(near == 0, 0.125, near).to(torch.float8_e4m3fn)

    def step(self, s: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return s / g

    def scaled(self, x: torch.Tensor, s: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return x / (s / g)

    def can_encode(self, g: torch.Tensor) -> torch.Tensor:
        return (g > 0) & g.isfinite()

    def can_decode(self, g: torch.Tensor) -> torch.Tensor:
        return g.isfinite() & (g != 0)


DIALECTS: dict[str, Dialect] = {
    "modelopt": Dialect(),
    "torchao": TorchAo(),
    "compressed-tensors": CompressedTensors(),
}
"""By the name of the library."""


def encode(x: torch.Tensor, s: torch.Tensor, g: torch.Tensor, dialect: Dialect) -> torch.Tensor:
    """Codes of elements, uint8 below 16. Zeros are code 0 or 8 whatever the scales."""
    scaled = torch.where(x == 0, x, dialect.scaled(x, s, g))
    negative = scaled.signbit() if dialect.keeps_sign_of_zero else scaled < 0
    return _nearest(scaled) | negative.to(torch.uint8) << 3


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Two codes a byte, along the last axis."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def decode(packed: torch.Tensor, dialect: Dialect, dtype: torch.dtype) -> torch.Tensor:
    """The codes in bytes as numbers, twice as many along the last axis."""
    values = torch.cat([_MAGNITUDES, -_MAGNITUDES])
    if not dialect.has_negative_zero:
        values = values + 0.0
    pairs = torch.stack([values.repeat(16), values.repeat_interleave(16)], -1)
    pairs = pairs.to(packed.device, dtype)
    return F.embedding(packed.int(), pairs).flatten(-2)  # in a third of the time of indexing


def spread(packed: torch.Tensor) -> torch.Tensor:
    """The same codes with their bits in another order: GPUs make bf16 pairs of them with a shift and a mask.

    Eight codes are a word w of four bytes, the first byte lowest, and become four pairs of bf16 numbers 2⁻¹²⁶ times as
    large, codes 2i and 2i + 1 in the lower and the upper half of pair i: the sign at bit 15 of a half, the rest at bits
    8 to 6. In the order that this makes

        pair 0 = w,  pair 1 = w « 4,  pair 2 = w rotated left by 10,  pair 3 = (w » 2) ⊕ (w « 6)

    without other bits. Pair 3 takes two shifts, as there are no four distances by which these places would be all of a
    word. What its shifts bring along of other codes is taken out here, so that not every bit is one of a code's.

    Args:
        packed: u8 [..., K/2], two codes a byte; K is a multiple of 8.
    """
    return _mapped(packed, _tables()[0])


def gathered(spread: torch.Tensor) -> torch.Tensor:
    """The inverse of `spread`."""
    return _mapped(spread, _tables()[1])


def _mapped(packed: torch.Tensor, table: np.ndarray) -> torch.Tensor:
    """Each word of bytes by a linear map of its bits, looked up by its halves: several times as fast as bit by bit."""
    halves = packed.cpu().contiguous().numpy().view("<u2")
    words = np.take(table[0], halves[..., 0::2]) ^ np.take(table[1], halves[..., 1::2])
    return torch.from_numpy(words.view(np.uint8)).to(packed.device)


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Of `spread` and of its inverse, what each half of a word contributes: u32 [2, 65536]."""
    images = [_gathered(1 << bit) for bit in range(32)]
    return _table(_inverse(images)), _table(images)


def _gathered(word: int) -> int:
    """The codes in a word of `spread`, as its text says."""
    pairs = word, word << 4, word << 10 | word >> 22, word >> 2 ^ word << 6
    halves = (pair >> shift for pair in pairs for shift in (0, 16))
    return sum((half >> 12 & 8 | half >> 6 & 7) << 4 * j for j, half in enumerate(halves))


def _inverse(images: Sequence[int]) -> list[int]:
    """Of a linear map of words, by what it makes of each bit, the same of its inverse (Gauss-Jordan over GF(2))."""
    rows = [image | 1 << 32 + bit for bit, image in enumerate(images)]
    for bit in range(32):
        found = next(i for i in range(bit, 32) if rows[i] >> bit & 1)
        rows[bit], rows[found] = rows[found], rows[bit]
        rows = [
            row ^ rows[bit] if i != bit and row >> bit & 1 else row for i, row in enumerate(rows)
        ]
    return [row >> 32 for row in rows]


def _table(images: Sequence[int]) -> np.ndarray:
    halves = []
    for half in (images[:16], images[16:]):
        table = np.zeros(1, "<u4")
        for image in half:
            table = np.concatenate([table, table ^ np.uint32(image)])
        halves.append(table)
    return np.stack(halves)


def error(x: torch.Tensor, s: torch.Tensor, g: torch.Tensor, dialect: Dialect) -> torch.Tensor:
    """The squared error of each block, [..., blocks, 16] -> [..., blocks, 1], in float64.

    Summed in halves, so that its bits do not depend on how many blocks there are.
    """
    scaled = torch.where(x == 0, x, dialect.scaled(x, s, g))
    found = _MAGNITUDES.to(x.device)[_nearest(scaled).int()] * dialect.step(s, g)
    squares = (found.double() - x.abs().double()).square()
    while squares.shape[-1] > 1:
        low, high = squares.chunk(2, -1)
        squares = low + high
    return squares


def _nearest(scaled: torch.Tensor) -> torch.Tensor:
    """The index of the nearest magnitude, ties to even."""
    size = scaled.abs()
    found = torch.zeros_like(size, dtype=torch.uint8)
    for cut in _CUTS:  # in a fraction of the time that a search takes
        found += size > cut
    return found
