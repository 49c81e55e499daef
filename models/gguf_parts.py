"""Tensors of GGUF files as those that a checkpoint has instead of them (`nemoc.models.checkpoint.StoredTensor`).

Most are numbers, whatever their blocks hold. A matrix in NVFP4 is three tensors in a checkpoint, whose bits the file
has in another order.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from nemoc.ir.dtypes import DType
from nemoc.ir.errors import NemocError
from nemoc.ir.nvfp4 import BLOCK
from nemoc.models.checkpoint import StoredTensor
from nemoc.models.formats import TENSOR_SCALES
from nemoc.models.gguf_file import GgufTensor
from nemoc.models.gguf_types import NVFP4, nvfp4_codes, nvfp4_scales
from nemoc.models.names import module_of
from nemoc.models.safetensors_file import NAMES

_PIECE = 1 << 16
"""Blocks that are taken apart at a time."""


@dataclass(frozen=True)
class Numbers:
    """A tensor of numbers.

    Attributes:
        name: what it is called in a checkpoint.
        shape: its shape there.
        source: the tensor.
        scales: what its matrices are multiplied by, f32 [1] or [E], or None.
        is_logarithm: whether the logarithm of its negative is meant.
    """

    name: str
    shape: tuple[int, ...]
    source: GgufTensor
    scales: GgufTensor | None = None
    is_logarithm: bool = False

    @property
    def dtype(self) -> str:
        """Its element type as safetensors spells it."""
        plain = self.source.type.is_plain and self.scales is None and not self.is_logarithm
        return NAMES[self.source.type.plain if plain else DType.F32]

    def __str__(self) -> str:
        return str(self.source)

    def read_into(self, out: torch.Tensor, start: int = 0) -> None:
        """Fill `out` with rows of the first axis from `start` on."""
        scales = None
        if self.scales is not None:
            scales = torch.empty(self.scales.shape)
            self.scales.read_into(scales)
        row = torch.Size(self.shape[1:]).numel()
        self.source.read_into(out, start * row, scales)
        if self.is_logarithm:
            if bool((out >= 0).any()):
                raise NemocError(f"{self}: found {out.max().item():g}, expected negative numbers")
            out.copy_(out.double().neg_().log_())


def nvfp4_parts(
    name: str, shape: tuple[int, ...], source: GgufTensor, scales: GgufTensor | None
) -> Iterator[StoredTensor]:
    """The tensors that ModelOpt's checkpoints have for a weight in NVFP4.

    Args:
        name: of the weight in a checkpoint.
        shape: of the weight, [..., N, K].
        source: its blocks.
        scales: of its matrices, f32 [1] or [E]; None where they are 1.
    """
    *rows, width = shape
    module = module_of(name)
    yield _Field(name, (*rows, width // 2), source, DType.U8, nvfp4_codes)
    yield _Field(
        f"{module}.weight_scale", (*rows, width // BLOCK), source, DType.F8E4M3, nvfp4_scales
    )
    whole = f"{module}.{TENSOR_SCALES['modelopt']}"
    yield _Ones(whole, shape[:-2], source) if scales is None else Numbers(whole, shape[:-2], scales)


@dataclass(frozen=True)
class _Field:
    """Codes or scales of blocks in NVFP4.

    Attributes:
        name, shape: in a checkpoint.
        source: the blocks.
        type: the element type.
        of: takes them out of blocks u8 [n, bytes]: [n, elements].
    """

    name: str
    shape: tuple[int, ...]
    source: GgufTensor
    type: DType
    of: Callable[[torch.Tensor], torch.Tensor]

    @property
    def dtype(self) -> str:
        """Its element type as safetensors spells it."""
        return NAMES[self.type]

    def __str__(self) -> str:
        return str(self.source)

    def read_into(self, out: torch.Tensor, start: int = 0) -> None:
        """Fill `out` with rows of the first axis from `start` on, which whole blocks make up."""
        row = torch.Size(self.source.shape[1:]).numel() // NVFP4.elements
        first, count = start * row, len(out) * row
        each = out.view(count, -1)
        for done in range(0, count, _PIECE):
            part = each[done : done + _PIECE]
            part.copy_(self.of(self.source.blocks(first + done, len(part))))


@dataclass(frozen=True)
class _Ones:
    """Scales of matrices whose file has none.

    Attributes:
        name, shape: in a checkpoint.
        source: the tensor that they would scale.
    """

    name: str
    shape: tuple[int, ...]
    source: GgufTensor
    dtype: str = "F32"

    def __str__(self) -> str:
        return str(self.source)

    def read_into(self, out: torch.Tensor, start: int = 0) -> None:
        """Fill `out`."""
        out.fill_(1.0)
