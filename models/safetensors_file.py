"""Reading safetensors files: the header checked, the data by slices, nothing executed and nothing mapped.

A file is 8 bytes of header length (little-endian), a JSON object that gives each tensor's type, shape and byte
range, then the data (https://github.com/huggingface/safetensors, "Format"). A read copies the
rows asked for and nothing else, so a file that shrinks after it was opened gives an error, not a bus error.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemoc.ir.dtypes import DType
from nemoc.ir.errors import NemocError

HEADER_LIMIT = 100_000_000
"""Bytes of header, at most; the limit that safetensors itself sets."""

TYPES = {
    "F32": DType.F32, "BF16": DType.BF16, "F16": DType.F16, "F8_E4M3": DType.F8E4M3, "U8": DType.U8,
}  # fmt: skip
"""The element types that weights may have, as the format spells them."""

NAMES = {dtype: name for name, dtype in TYPES.items()}
"""How it spells each."""

_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2,
    "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class FileTensor:
    """One tensor in a safetensors file.

    Attributes:
        path: the file.
        name: the tensor's name in it.
        dtype: its element type as safetensors spells it.
        shape: its shape.
        offset: where its data starts, in bytes from the start of the file.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def __str__(self) -> str:
        return f"{self.path}: tensor {self.name!r}"

    def read_into(self, out: torch.Tensor, start: int = 0) -> None:
        """Fill a contiguous tensor with rows of the first axis from `start` on.

        Args:
            out: of the stored element type; its rows have the stored shape.
            start: the first row to read.

        Raises:
            NemocError: the file cannot be read, or ends too early.
        """
        row = math.prod(self.shape[1:]) * _SIZES[self.dtype]
        target = out.reshape(-1).view(torch.uint8).numpy().data
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset + start * row)
                while target:
                    count = file.readinto(target)
                    if not count:
                        raise NemocError(f"{self}: the file ends {len(target)} bytes too early")
                    target = target[count:]
        except OSError as error:
            raise NemocError(f"{self}: cannot be read: {error.strerror}") from None


def read_header(path: Path) -> dict[str, FileTensor]:
    """The tensors of a safetensors file by name.

    Raises:
        NemocError: the file cannot be read, is truncated, or is no safetensors file.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, HEADER_LIMIT):
                raise NemocError(
                    f"{path}: is no safetensors file: found {size} bytes and a header of {length}"
                )
            text = file.read(length)
    except OSError as error:
        raise NemocError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise NemocError(f"{path}: is no safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise NemocError(f"{path}: is no safetensors file: its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_extent(path, tensors, size, 8 + length)
    return tensors


def _tensor(path: Path, name: str, entry: Any, data: int) -> FileTensor:
    where = f"{path}: tensor {name!r}"
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise NemocError(f"{where}: its header entry lacks a type, a shape or a byte range")
    if dtype not in _SIZES:
        raise NemocError(f"{where}: found type {dtype!r}, expected one of {', '.join(_SIZES)}")
    if not all(type(n) is int and n >= 0 for n in shape):
        raise NemocError(f"{where}: found shape {shape}, expected integers of at least 0")
    expected = math.prod(shape) * _SIZES[dtype]
    if begin < 0 or end - begin != expected:
        raise NemocError(f"{where}: found bytes {begin} to {end}, expected a range of {expected}")
    return FileTensor(path, name, dtype, tuple(shape), data + begin)


def _check_extent(path: Path, tensors: dict[str, FileTensor], size: int, data: int) -> None:
    """The tensors must fill the file without gaps or overlaps, as the format demands."""
    end = data
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, math.prod(t.shape))):
        if tensor.offset != end:
            raise NemocError(f"{tensor}: starts at byte {tensor.offset}, expected {end}")
        end += math.prod(tensor.shape) * _SIZES[tensor.dtype]
    if size < end:
        raise NemocError(f"{path}: is truncated: found {size} bytes, expected {end}")
    if size > end:
        raise NemocError(f"{path}: found {size} bytes, expected {end}: data that no tensor owns")
