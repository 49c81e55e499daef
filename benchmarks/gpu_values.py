"""Random tensors of a model, made on the device that uses them: a model's experts would take a CPU minutes.

Small weights, and those that are computed from others, are those of `nemoc.models.random_weights`, so that states
decay and gates open as in trained models. Large ones are normal, divided by the root of what they are summed over; of
weights in NVFP4 and FP8 codes and scales are drawn, so that what they decode to is as large.
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nemoc.codegen.storage import Slot, Weight, weight_layout
from nemoc.ir import DType, NemocError
from nemoc.ir.nvfp4 import DIALECTS, decode
from nemoc.ir.ops import Full
from nemoc.ir.params import ParameterSource
from nemoc.ir.types import TensorType
from nemoc.models.drawn import draw, draw_bytes
from nemoc.runtime.weights import weight_pieces

_LARGE = 1 << 21
"""Elements from which on a weight is drawn on the device."""

_FP8_SIZE = 64.0
"""The standard deviation of codes in FP8: 448, the largest, lies beyond what is ever drawn."""

_BLOCK_SCALES = (0x58, 0x77)
"""The bytes of the least and the largest block scale, 16 and 240 in E4M3: between them all are positive numbers."""


def _nvfp4_size() -> float:
    """The root of the mean square of codes in NVFP4 times block scales, as they are drawn."""
    codes = decode(torch.arange(256, dtype=torch.uint8), DIALECTS["modelopt"], torch.float32)
    least, most = _BLOCK_SCALES
    scales = torch.arange(least, most + 1, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return math.sqrt(codes.square().mean().item() * scales.square().mean().item())


@dataclass(frozen=True)
class Sizes:
    """How large a step is.

    Attributes:
        batch: sequences, B.
        new: tokens of each, L.
        cached: tokens of each that came before, T.
    """

    batch: int
    new: int
    cached: int = 0

    @property
    def symbols(self) -> dict[str, int]:
        """The integer behind each dimension symbol; a cache holds what it has to and no more."""
        context = self.cached + self.new
        return {"B": self.batch, "L": self.new, "C": context, "T": self.cached}


class Values:
    """Random values by name: the same name has the same ones, whatever the tensor's device.

    Args:
        weights: the weights that there are, as bound graphs call them.
        source: the parameters that they are made from.
    """

    def __init__(
        self, weights: Sequence[Weight] = (), source: ParameterSource | None = None
    ) -> None:
        self._weights = {w.name: w for w in weights}
        self._codes: dict[tuple[str, ...], TensorType] = {}
        for w in weights:  # what is NVFP4 has block scales in FP8
            if w.type.dtype is DType.U8:
                self._codes[w.params] = w.type
            elif w.type.dtype is DType.F8E4M3:
                self._codes.setdefault(w.params, w.type)
        self._source = source
        self._pieces = None if source is None else weight_pieces(source)
        self._made: dict[str, torch.Tensor] = {}

    def fill(self, name: str, tensor: torch.Tensor, sizes: Sizes, is_weight: bool) -> None:
        """Fill an operand of a step in which every row has all its new tokens.

        Raises:
            NemocError: nothing is known of the operand but that it holds integers.
        """
        counts = {"valid": sizes.new, "lengths": sizes.cached}
        if name in counts:
            tensor.fill_(counts[name])
        elif self.is_small(name):
            tensor.copy_(self.small(name))
        elif is_weight and tensor.dtype == torch.uint8:
            draw_bytes(tensor.view(-1), name)
        elif not tensor.is_floating_point():
            raise NemocError(f"{name} holds {tensor.dtype}: a part that reads it cannot be timed")
        elif (codes := self._quantized(name)) is not None:
            _fill_quantized(name, tensor, codes, self._weights[name])
        else:
            scale = tensor.shape[-1] ** -0.5 if is_weight and tensor.dim() > 1 else 1.0
            draw(tensor.view(-1), scale, name)

    def is_small(self, name: str) -> bool:
        """Whether a weight is made by the CPU: it, and what it is made from, have few elements."""
        weight = self._weights.get(name)
        if weight is None or self._source is None:
            return False
        made_from = (self._source.type_of(param) for param in weight.params)
        return all(int(type_.elements) < _LARGE for type_ in (weight.type, *made_from))

    def _quantized(self, name: str) -> TensorType | None:
        """The codes that a weight holds or scales; none if it is not quantized."""
        weight = self._weights.get(name)
        return None if weight is None else self._codes.get(weight.params)

    def small(self, name: str) -> torch.Tensor:
        """A small weight, on the CPU."""
        if name not in self._made:
            assert self._pieces is not None
            pieces = list(self._pieces(self._weights[name]))
            self._made[name] = pieces[0] if pieces[0].dim() == 0 else torch.cat(pieces)
        return self._made[name]


def _fill_quantized(name: str, tensor: torch.Tensor, codes: TensorType, weight: Weight) -> None:
    """Draw codes in FP8, or scales.

    Codes times scales have a variance of about 1 / K, K being what they are summed over.

    Args:
        name: the seed.
        tensor: what is filled.
        codes: what it holds or scales: f8e4m3 [..., K], or u8 [..., K/2] of NVFP4.
        weight: what the tensor is.
    """
    packed = codes.dtype is DType.U8
    if tensor.dtype == torch.float8_e4m3fn and packed:
        draw_bytes(tensor.view(-1).view(torch.uint8), name, *_BLOCK_SCALES)
    elif tensor.dtype == torch.float8_e4m3fn:
        draw(tensor.view(-1), _FP8_SIZE, name)
    else:
        width = int(codes.shape[-1]) * (2 if packed else 1)
        size = _shares(weight) / ((_nvfp4_size() if packed else _FP8_SIZE) * math.sqrt(width))
        draw(tensor.view(-1), size / 8, name)  # no two alike
        tensor.add_(size).abs_()


def _shares(weight: Weight) -> float:
    """What a scale is multiplied by where codes were divided by it."""
    nodes = () if weight.body is None else weight.body.nodes
    return math.prod(node.op.value for node in nodes if isinstance(node.op, Full))


class DrawnWeights:
    """The weights of a whole model as one block of bytes that is never anywhere as a whole: pieces are drawn when read.

    Stands for the tensor uint8 that a backend copies to its device piece by piece, and costs neither memory of the host
    nor a disk.

    Args:
        weights: in the order of the block.
        values: what they hold.
        place: where pieces are drawn.
    """

    def __init__(self, weights: Sequence[Weight], values: Values, place: torch.device) -> None:
        self._layout = weight_layout(weights)
        self._starts = [int(slot.offset) for slot in self._layout]
        self._values = values
        self._place = place

    def numel(self) -> int:
        """Bytes."""
        return int(self._layout.bytes)

    def __getitem__(self, cut: slice) -> torch.Tensor:
        """Bytes `start` to `stop`, at most, on the place."""
        start, stop, _ = cut.indices(self.numel())
        piece = torch.zeros(stop - start, dtype=torch.uint8, device=self._place)
        first = bisect.bisect_right(self._starts, start) - 1
        for slot in self._layout.slots[first : bisect.bisect_left(self._starts, stop)]:
            begin = int(slot.offset)
            low, high = max(start, begin), min(stop, begin + int(slot.type.bytes))
            if low < high:
                self._fill(slot, low - begin, piece[low - start : high - start])
        return piece

    def _fill(self, slot: Slot, skipped: int, part: torch.Tensor) -> None:
        """Bytes of a weight from a given one on."""
        if self._values.is_small(slot.name):
            data = self._values.small(slot.name).contiguous().view(-1).view(torch.uint8)
            part.copy_(data[skipped : skipped + part.numel()])
            return
        looked_up = slot.name.startswith("embeddings.")
        scale = 1.0 if looked_up else int(slot.type.shape[-1]) ** -0.5
        draw(part.view(slot.type.dtype.torch), scale, f"{slot.name}/{skipped}")
