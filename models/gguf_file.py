"""Reading GGUF files: the header checked, the data by slices, nothing executed and nothing mapped.

A file is a magic number, a version, the counts of tensors and of metadata, the metadata as typed values by key, for
each tensor a name, a shape, an element type and an offset, and then the data, every tensor of which starts at a
multiple of the alignment right behind its predecessor (https://github.com/ggml-org/ggml, "docs/gguf.md"; versions 2
and 3, little-endian). Nobody vouches for a file: each count is held against the bytes that are left before anything of
that size is made.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch

from nemoc.ir.errors import NemocError
from nemoc.models.gguf_types import GGML_TYPES, UNREAD, GgmlType

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
"""Of tensors' data, where a file says nothing else."""

HEADER_LIMIT = 64 << 20
"""Bytes of header, at most; a vocabulary of 131,072 with its merges has 8 million."""

STRING, ARRAY = 8, 9
SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
"""Types of metadata that are a number or a truth value, and how `struct` spells them."""

_MAX_AXES = 4
_PIECE = 1 << 22
"""Elements that are made numbers at a time."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor in a GGUF file.

    Attributes:
        path: the file.
        name: its name in it.
        type: its element type.
        shape: its shape, the axis whose elements lie next to each other last.
        offset: where its data starts, in bytes from the start of the file.
    """

    path: Path
    name: str
    type: GgmlType
    shape: tuple[int, ...]
    offset: int

    def __str__(self) -> str:
        return f"{self.path}: tensor {self.name!r}"

    @property
    def bytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape) // self.type.elements * self.type.size

    def read_into(
        self, out: torch.Tensor, start: int = 0, scales: torch.Tensor | None = None
    ) -> None:
        """Fill a contiguous tensor with elements in row-major order from `start` on.

        Args:
            out: of a floating-point type that holds what the tensor's type stands for.
            start: the first element.
            scales: what each of as many equal parts of the tensor is multiplied by, f32 [parts].

        Raises:
            NemocError: the file cannot be read, or ends too early.
        """
        flat = out.view(-1)
        for done in range(0, flat.numel(), _PIECE):
            self._fill(flat[done : done + _PIECE], start + done, scales)

    def blocks(self, first: int, count: int) -> torch.Tensor:
        """So many blocks from one on, u8 [count, bytes].

        Raises:
            NemocError: the file cannot be read, or ends too early.
        """
        data = torch.empty((count, self.type.size), dtype=torch.uint8)
        target = data.view(-1).numpy().data
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset + first * self.type.size)
                while target:
                    got = file.readinto(target)
                    if not got:
                        raise NemocError(f"{self}: the file ends {len(target)} bytes too early")
                    target = target[got:]
        except OSError as error:
            raise NemocError(f"{self}: cannot be read: {error.strerror}") from None
        return data

    def _fill(self, out: torch.Tensor, start: int, scales: torch.Tensor | None) -> None:
        """Elements from `start` on, of which the first block may give only its last ones, and the last its first."""
        each = self.type.elements
        first, last = start // each, -(-(start + out.numel()) // each)
        data = self.blocks(first, last - first)
        factors = None
        if scales is not None:
            blocks = math.prod(self.shape) // each // len(scales)
            factors = scales[torch.arange(first, last) // blocks].unsqueeze(-1)
        numbers = self.type.numbers(data, factors).view(-1)
        out.copy_(numbers[start - first * each :][: out.numel()])


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file.

    Attributes:
        path: of the file.
        metadata: values by key: numbers, truth values, text, and lists of one of these.
        tensors: by name, in the order of the file.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf(path: Path) -> GgufFile:
    """The metadata and tensors of a file; no data is read.

    Raises:
        NemocError: the file cannot be read, is truncated or damaged, or has a type that nemoc does not know; one line.
    """
    try:
        with path.open("rb") as file:
            return _Reader(path, file, path.stat().st_size).file()
    except OSError as error:
        raise NemocError(f"{path}: cannot be read: {error.strerror}") from None


class _Reader:
    """Reads a header from its start to its end."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path = path
        self._file = file
        self._size = size
        self._at = 0

    def file(self) -> GgufFile:
        """The whole header."""
        if (magic := self._take(4, "a magic number")) != MAGIC:
            self._fail(f"is no GGUF file: starts with {magic!r}")
        version = self._number("I", "a version")
        if version not in (2, VERSION):
            self._fail(f"found GGUF version {version}, expected 2 or {VERSION}, little-endian")
        tensors, keys = self._number("Q", "a count"), self._number("Q", "a count")
        # The least that a tensor takes is 24 bytes, and an entry of metadata 13.
        self._expect(tensors * 24 + keys * 13, f"{tensors} tensors and {keys} entries of metadata")
        metadata = self._metadata(keys)
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
            self._fail(
                f"general.alignment: found {alignment!r}, expected a power of two of at least 8"
            )
        entries = [self._entry() for _ in range(tensors)]
        return GgufFile(self._path, metadata, self._place(entries, alignment))

    def _metadata(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(count):
            key = self._text("a key")
            if key in metadata:
                self._fail(f"{key}: is there twice")
            metadata[key] = self._value(key, self._number("I", f"the type of {key}"))
        return metadata

    def _value(self, key: str, kind: int) -> Any:
        if kind == STRING:
            return self._text(key)
        if kind in SCALARS:
            return self._number(SCALARS[kind], key)
        if kind != ARRAY:
            self._fail(f"{key}: found metadata of type {kind}, expected one of 0 to 12")
        inner, count = self._number("I", key), self._number("Q", key)
        if inner == STRING:
            self._expect(8 * count, f"{key}: {count} texts")
            return [self._text(key) for _ in range(count)]
        if inner not in SCALARS:
            self._fail(f"{key}: found a list of type {inner}, expected numbers or text")
        code = SCALARS[inner]
        data = self._take(struct.calcsize(f"<{code}") * count, f"{key}: {count} numbers")
        return list(struct.unpack(f"<{count}{code}", data))

    def _entry(self) -> GgufTensor:
        """A tensor, its offset counted from where data starts."""
        name = self._text("the name of a tensor")
        where = f"tensor {name!r}"
        axes = self._number("I", where)
        if not 1 <= axes <= _MAX_AXES:
            self._fail(f"{where}: found {axes} axes, expected 1 to {_MAX_AXES}")
        shape = tuple(self._number("Q", where) for _ in range(axes))[::-1]
        number = self._number("I", where)
        offset = self._number("Q", where)
        if number not in GGML_TYPES:
            known = ", ".join(type_.name for type_ in GGML_TYPES.values())
            self._fail(f"{where}: found type {UNREAD.get(number, number)}, expected one of {known}")
        type_ = GGML_TYPES[number]
        if 0 in shape or math.prod(shape) > self._size * type_.elements:
            self._fail(f"{where}: found shape {list(shape)} in a file of {self._size} bytes")
        if shape[-1] % type_.elements:
            self._fail(
                f"{where}: found rows of {shape[-1]}, expected a multiple of {type_.elements} "
                f"for {type_.name}"
            )
        return GgufTensor(self._path, name, type_, shape, offset)

    def _place(self, entries: list[GgufTensor], alignment: int) -> dict[str, GgufTensor]:
        """The tensors by name; each must start where the one before it ends, as the format demands."""
        data = -(-self._at // alignment) * alignment
        expected, tensors = 0, {}
        for entry in entries:
            if entry.name in tensors:
                self._fail(f"tensor {entry.name!r}: is there twice")
            if entry.offset != expected:
                self._fail(
                    f"tensor {entry.name!r}: starts at byte {entry.offset} of the data, "
                    f"expected {expected}"
                )
            end = data + entry.offset + entry.bytes
            if end > self._size:
                self._fail(f"is truncated: found {self._size} bytes, expected {end} or more")
            placed = GgufTensor(
                entry.path, entry.name, entry.type, entry.shape, data + entry.offset
            )
            tensors[entry.name] = placed
            expected += -(-entry.bytes // alignment) * alignment
        return tensors

    def _text(self, what: str) -> str:
        data = self._take(self._number("Q", what), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            self._fail(f"{what}: found text that is not UTF-8")

    def _number(self, code: str, what: str) -> Any:
        (value,) = struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}"), what))
        return value

    def _take(self, count: int, what: str) -> bytes:
        self._expect(count, what)
        self._at += count
        data = self._file.read(count)
        if len(data) < count:
            self._fail(f"ends in the middle of {what}")
        return data

    def _expect(self, count: int, what: str) -> None:
        """Refuse what cannot be there."""
        if count > min(self._size, HEADER_LIMIT) - self._at:
            self._fail(
                f"{what}: found {count} bytes to come, expected at most "
                f"{min(self._size, HEADER_LIMIT) - self._at}"
            )

    def _fail(self, message: str) -> NoReturn:
        raise NemocError(f"{self._path}: {message}")
