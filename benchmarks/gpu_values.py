"""Random tensors of a model, made on the device that uses them: a model's experts would take a CPU minutes.

Small weights, and those that are computed from others, are those of `nemoc.models.random_weights`, so that states
decay and gates open as in trained models. Large ones are normal, divided by the root of what they are summed over.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nemoc.codegen.storage import Slot, Weight, weight_layout
from nemoc.ir import NemocError
from nemoc.ir.params import ParameterSource
from nemoc.models.drawn import draw, draw_bytes
from nemoc.runtime.weights import weight_pieces

_LARGE = 1 << 21
"""Elements from which on a weight is drawn on the device."""


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
        elif is_weight and tensor.dtype == torch.uint8:
            draw_bytes(tensor.view(-1), name)
        elif not tensor.is_floating_point():
            raise NemocError(f"{name} holds {tensor.dtype}: a part that reads it cannot be timed")
        elif self.is_small(name):
            tensor.copy_(self.small(name))
        else:
            scale = tensor.shape[-1] ** -0.5 if is_weight and tensor.dim() > 1 else 1.0
            draw(tensor.view(-1), scale, name)

    def is_small(self, name: str) -> bool:
        """Whether a weight is made by the CPU."""
        weight = self._weights.get(name)
        return weight is not None and int(weight.type.bytes) < _LARGE * weight.type.dtype.bytes

    def small(self, name: str) -> torch.Tensor:
        """A small weight, on the CPU."""
        if name not in self._made:
            assert self._pieces is not None
            pieces = list(self._pieces(self._weights[name]))
            self._made[name] = pieces[0] if pieces[0].dim() == 0 else torch.cat(pieces)
        return self._made[name]


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
