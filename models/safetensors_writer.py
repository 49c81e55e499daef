"""Writing safetensors files in pieces, so that memory holds a piece at a time.

A file starts with a header that says where every tensor lies (`nemoc.models.safetensors_file`). Types and shapes are
known before any data is, so the header is written first, and pieces come in any order.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from nemoc.ir.errors import NemocError
from nemoc.ir.types import TensorType
from nemoc.models.safetensors_file import NAMES

SHARD = 5_000_000_000
"""Bytes of data in a file, at most, unless one tensor has more; what transformers takes too."""

_ALIGNMENT = 8


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of a tensor.

    Attributes:
        tensor: its name.
        data: of the tensor's element type.
        start: how many of its elements come before these.
    """

    tensor: str
    data: torch.Tensor
    start: int = 0


@dataclass(frozen=True)
class _Place:
    """Where the data of a tensor begins."""

    file: str
    offset: int


def write_tensors(
    directory: Path,
    tensors: Mapping[str, TensorType],
    pieces: Iterable[Piece],
    advance: Callable[[int, int], None] = lambda done, total: None,
    shard_bytes: int = SHARD,
) -> None:
    """Write `model.safetensors`, or several files and `model.safetensors.index.json`; all of them durable.

    Args:
        directory: where to; it has none of these files.
        tensors: what is to be written; files take them in this order.
        pieces: the data, which together is all of it.
        advance: told the bytes written so far, and those of all.
        shard_bytes: of data in a file, at most.

    Raises:
        NemocError: pieces do not make up the tensors.
        OSError: a file cannot be written.
    """
    shards = _shards(tensors, shard_bytes)
    names = _file_names(len(shards))
    missing = {name: int(type_.bytes) for name, type_ in tensors.items()}
    done, total = 0, sum(missing.values())
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        places: dict[str, _Place] = {}
        for file, shard in zip(names, shards, strict=True):
            files[file] = stack.enter_context((directory / file).open("xb"))
            header = _header(shard)
            files[file].write(header)
            places |= _places(file, len(header), shard)
        for piece in pieces:
            type_, place = tensors[piece.tensor], places[piece.tensor]
            if piece.data.dtype != type_.dtype.torch:
                raise NemocError(
                    f"tensor {piece.tensor!r}: the data is {piece.data.dtype}, expected {type_}"
                )
            data = piece.data.contiguous().reshape(-1).view(torch.uint8).numpy().data
            files[place.file].seek(place.offset + piece.start * type_.dtype.bytes)
            files[place.file].write(data)
            missing[piece.tensor] -= len(data)
            done += len(data)
            advance(done, total)
        _check_whole(missing)
        for opened in files.values():
            opened.flush()
            os.fsync(opened.fileno())
    if len(shards) > 1:
        write_json(
            directory / "model.safetensors.index.json",
            {
                "metadata": {"total_size": done},
                "weight_map": {name: places[name].file for name in tensors},
            },
        )


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file and make it durable.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("x", encoding="utf-8") as file:
        file.write(json.dumps(data, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _shards(tensors: Mapping[str, TensorType], limit: int) -> list[dict[str, TensorType]]:
    shards: list[dict[str, TensorType]] = [{}]
    size = 0
    for name, type_ in tensors.items():
        if shards[-1] and size + int(type_.bytes) > limit:
            shards.append({})
            size = 0
        shards[-1][name] = type_
        size += int(type_.bytes)
    return [_aligned(shard) for shard in shards]


def _aligned(shard: Mapping[str, TensorType]) -> dict[str, TensorType]:
    """Wide elements first, so that each tensor starts at a multiple of its elements' size, as readers want it."""
    return dict(sorted(shard.items(), key=lambda entry: -entry[1].dtype.bytes))


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]


def _header(shard: Mapping[str, TensorType]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, type_ in shard.items():
        start, end = end, end + int(type_.bytes)
        shape = [int(n) for n in type_.shape]
        entries[name] = {
            "dtype": NAMES[type_.dtype],
            "shape": shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _places(file: str, offset: int, shard: Mapping[str, TensorType]) -> dict[str, _Place]:
    places = {}
    for name, type_ in shard.items():
        places[name] = _Place(file, offset)
        offset += int(type_.bytes)
    return places


def _check_whole(missing: Mapping[str, int]) -> None:
    for name, count in missing.items():
        if count:
            raise NemocError(f"tensor {name!r}: {count} bytes of its data are missing")
