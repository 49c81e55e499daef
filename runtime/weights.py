"""The weight file: what a step reads, in one safetensors file that is mapped and used in place.

Tensors lie as `nemoc.codegen.storage.weight_layout` has them, and the data starts at a multiple of
`ALIGNMENT` in the file, so that every tensor is aligned in memory. The format allows no holes: padding is
tensors of its own, whose names start with `padding.`.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from nemoc.codegen.storage import ALIGNMENT, Layout, Slot, Weight, weight_layout
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import NemocError
from nemoc.ir.folding import stream
from nemoc.ir.params import ParameterSource
from nemoc.ir.region import Folded
from nemoc.ir.types import TensorType, Value
from nemoc.runtime.mapping import map_file

Pieces = Callable[[Weight], Iterable[torch.Tensor]]
"""A weight's data in order: slices along its first axis that together are all of it."""


class Sink(Protocol):
    """Somewhere to write to."""

    def write(self, data: bytes | memoryview, /) -> int: ...


_PIECE = 16 << 20
"""Bytes of a plain parameter that are read at a time."""

_PADDING = "padding."
"""What the names of tensors that only fill a gap begin with."""

_SPELLING = {
    DType.F64: "F64",
    DType.F32: "F32",
    DType.BF16: "BF16",
    DType.F16: "F16",
    DType.F8E4M3: "F8_E4M3",
    DType.I64: "I64",
    DType.I32: "I32",
    DType.I8: "I8",
    DType.U8: "U8",
    DType.BOOL: "BOOL",
}
_DTYPES = {text: dtype for dtype, text in _SPELLING.items()}


def weight_pieces(source: ParameterSource, budget_bytes: int = 64 << 20) -> Pieces:
    """Pieces of weights made from parameters slice by slice.

    Args:
        source: the parameters' data.
        budget_bytes: what the computation of one slice of a folded weight may take.
    """

    def pieces(weight: Weight) -> Iterator[torch.Tensor]:
        if weight.body is None:
            yield from plain_pieces(source, weight)
            return
        args = map(Value, weight.params, (v.type for v in weight.body.inputs))
        folded = Folded(tuple(args), weight.body)
        yield from stream(folded, source, budget_bytes, weight.result)

    return pieces


def plain_pieces(source: ParameterSource, weight: Weight) -> Iterator[torch.Tensor]:
    """Slices of a weight that is one parameter, each of a few megabytes."""
    name = weight.params[0]
    if not weight.type.shape:
        yield source.read(name)
        return
    rows = int(weight.type.shape[0])
    step = max(1, _PIECE * rows // max(1, int(weight.type.bytes)))
    for start in range(0, rows, step):
        yield source.read(name, start, min(start + step, rows))


def write_weights(
    file: Sink,
    weights: Sequence[Weight],
    pieces: Pieces,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write a weight file; memory holds one piece at a time.

    Args:
        file: what to write to.
        weights: in the order of their layout.
        pieces: where the data comes from.
        advance: told the bytes of data written so far, after each piece.

    Raises:
        NemocError: a weight's data has another type or size than declared, or holds NaN.
    """
    layout = weight_layout(weights)
    file.write(_header(layout))
    done = 0

    def note(count: int) -> None:
        advance(done + count)

    for slot, weight, end in zip(layout, weights, _ends(layout), strict=False):
        _write_weight(file, weight, pieces, note)
        file.write(bytes(end - int(slot.offset) - int(slot.type.bytes)))
        done = end
        advance(done)


def header_digest(weights: Iterable[Weight]) -> str:
    """SHA-256 of the header of a weight file, in hex."""
    return hashlib.sha256(_header(weight_layout(weights))).hexdigest()


def _ends(layout: Layout) -> list[int]:
    """Where the padding of each slot ends; for no slots, one 0."""
    return [*(int(slot.offset) for slot in layout.slots[1:]), int(layout.bytes)]


def _header(layout: Layout) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"nemoc.weights": "1"}}
    for slot, stop in zip(layout, _ends(layout), strict=False):
        start, end = int(slot.offset), int(slot.offset) + int(slot.type.bytes)
        entries[slot.name] = {
            "dtype": _SPELLING[slot.type.dtype],
            "shape": list(slot.type.shape),
            "data_offsets": [start, end],
        }
        if stop > end:
            pad = {"dtype": "U8", "shape": [stop - end], "data_offsets": [end, stop]}
            entries[f"{_PADDING}{end}"] = pad
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_weight(
    file: Sink, weight: Weight, pieces: Pieces, advance: Callable[[int], None]
) -> None:
    origin = ", ".join(weight.params) or weight.name
    expected = int(weight.type.bytes)
    written = 0
    for piece in pieces(weight):
        if piece.dtype != weight.type.dtype.torch:
            raise NemocError(
                f"weight {origin}: the data is {piece.dtype}, expected {weight.type.dtype.torch}"
            )
        if _has_nan(piece):
            raise NemocError(f"weight {origin}: holds NaN")
        data = piece.contiguous().reshape(-1).view(torch.uint8).numpy()
        written += data.size
        if written > expected:
            break
        file.write(data.data)
        advance(written)
    if written != expected:
        raise NemocError(
            f"weight {origin}: the data has {written} bytes or more, expected {expected} "
            f"for {weight.type}"
        )


def _has_nan(piece: torch.Tensor) -> bool:
    if not piece.is_floating_point() or not piece.numel():
        return False
    comparable = piece if piece.dtype.itemsize > 1 else piece.float()
    return bool(comparable.amax().isnan())  # a maximum is NaN if any element is, and is one pass


class WeightSource:
    """A model's weights in the form in which steps read them, made when asked. A `ParameterSource`.

    Args:
        source: the model's parameters.
        weights: what steps read of them.
    """

    def __init__(self, source: ParameterSource, weights: Iterable[Weight]) -> None:
        self._pieces = weight_pieces(source)
        self._weights = {w.name: w for w in weights}

    def type_of(self, name: str) -> TensorType:
        return self._weights[name].type

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        pieces = list(self._pieces(self._weights[name]))
        return pieces[0] if pieces[0].dim() == 0 else torch.cat(pieces)[start:stop]


class PackedWeights:
    """A weight file in memory: mapped, or copied into memory of our own. A `ParameterSource`.

    Attributes:
        path: the file.
        data: everything behind the header: uint8, aligned. Read only: it may be the file itself.
        header_digest: SHA-256 of the header, in hex.

    Raises:
        NemocError: the file is missing, or is no weight file.
    """

    def __init__(self, path: Path, resident: bool = False) -> None:
        self.path = path
        self._file = map_file(path, resident)
        length = int.from_bytes(bytes(self._file[:8].tolist()), "little")
        if self._file.numel() < 8 or length > self._file.numel() - 8:
            raise NemocError(f"{path}: is truncated: {self._file.numel()} bytes, no whole header")
        header = self._file[: 8 + length].numpy().tobytes()
        self.data = self._file[8 + length :]
        self.header_digest = hashlib.sha256(header).hexdigest()
        self._slots = _read_header(path, header[8:], self.data.numel())
        if self.data.data_ptr() % ALIGNMENT:
            raise NemocError(f"{path}: the data starts at byte {8 + length}, which is not aligned")

    def digest(self, advance: Callable[[int], None] = lambda count: None) -> str:
        """SHA-256 of the whole file, in hex; `advance` is told the bytes done so far."""
        digest = hashlib.sha256()
        whole = self._file.numpy().data
        for start in range(0, len(whole), _PIECE):
            digest.update(whole[start : start + _PIECE])
            advance(min(start + _PIECE, len(whole)))
        return digest.hexdigest()

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._file.numel()

    @property
    def layout(self) -> Layout:
        """Where each weight lies in the data."""
        slots = (s for s in self._slots.values() if not s.name.startswith(_PADDING))
        return Layout(tuple(sorted(slots, key=lambda s: s.offset)), self.data.numel())

    def type_of(self, name: str) -> TensorType:
        return self._slot(name).type

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        slot = self._slot(name)
        begin = int(slot.offset)
        data = self.data[begin : begin + int(slot.type.bytes)].view(slot.type.dtype.torch)
        tensor = data.view([int(d) for d in slot.type.shape])
        return tensor if start == 0 and stop is None else tensor[start:stop]

    def _slot(self, name: str) -> Slot:
        try:
            return self._slots[name]
        except KeyError:
            raise NemocError(f"{self.path}: the tensor {name} is missing") from None


def _read_header(path: Path, text: bytes, size: int) -> dict[str, Slot]:
    try:
        entries = dict(json.loads(text).items())
        entries.pop("__metadata__", None)
        return {name: _read_entry(path, name, entry, size) for name, entry in entries.items()}
    except (ValueError, AttributeError, RecursionError):
        raise NemocError(f"{path}: is no safetensors file: its header cannot be read") from None


def _read_entry(path: Path, name: str, entry: Mapping[str, Any], size: int) -> Slot:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if (
            dtype in _DTYPES and all(type(n) is int and n >= 0 for n in shape)
        ):
            type_ = TensorType(_DTYPES[dtype], tuple(shape))
        case _:
            raise NemocError(f"{path}: the entry of tensor {name} cannot be read")
    if not 0 <= begin <= end <= size or end - begin != int(type_.bytes):
        raise NemocError(
            f"{path}: tensor {name} lies at bytes {begin} to {end} of {size}, "
            f"expected a range of {type_.bytes}"
        )
    return Slot(name, type_, begin)
