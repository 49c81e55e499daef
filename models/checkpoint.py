"""Checkpoints as parameter sources: Hugging Face directories, and state dictionaries at hand.

Checkpoints spell names in several ways: prefix `backbone.` or `model.`, `embedding.` in old ones, one tensor
per expert (on disk) or all stacked (in transformers 5). Everything is checked when it is opened, by headers
alone, against the parameters of the model's graph; data is read when it is asked for, by slices, and refused
when it is not finite. Files are untrusted: pickles are not opened, and no path leads out of the directory.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import torch

from nemoc.ir.dtypes import DType
from nemoc.ir.errors import NemocError
from nemoc.ir.json_file import read_json
from nemoc.ir.types import TensorType
from nemoc.models.config import ModelConfig
from nemoc.models.graph import build_step
from nemoc.models.safetensors_file import read_header

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Suffixes of files that can run code when they are loaded."""

_TYPES = {"F32": DType.F32, "BF16": DType.BF16, "F16": DType.F16}
_NAMES = {dtype.torch: name for name, dtype in _TYPES.items()}
_FILE_NAME = r"(?!\.{1,2}$)[^/\\\x00-\x1f]+"
"""A name that stays in its directory on every system."""


class StoredTensor(Protocol):
    """One tensor of a checkpoint; its text says where it is."""

    @property
    def name(self) -> str:
        """Its name in the checkpoint."""
        ...

    @property
    def dtype(self) -> str:
        """Its element type as safetensors spells it."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    def read_into(self, out: torch.Tensor, start: int = 0) -> None:
        """Fill `out` with rows of the first axis from `start` on."""
        ...


@dataclass(frozen=True)
class _HeldTensor:
    """A tensor of a state dictionary."""

    owner: str
    name: str
    tensor: torch.Tensor

    @property
    def dtype(self) -> str:
        return _NAMES.get(self.tensor.dtype, str(self.tensor.dtype).removeprefix("torch."))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def __str__(self) -> str:
        return f"{self.owner}: tensor {self.name!r}"

    def read_into(self, out: torch.Tensor, start: int = 0) -> None:
        out.copy_(self.tensor.detach()[start : start + len(out)])


@dataclass(frozen=True)
class _Parameter:
    """A parameter and the tensors it is made of: one, or one per expert."""

    type: TensorType
    parts: tuple[StoredTensor, ...]
    stacked: bool


class Checkpoint:
    """The parameters of one model in a checkpoint; implements `nemoc.ir.params.ParameterSource`.

    Attributes:
        notes: what was tolerated, one line each.
    """

    def __init__(self, tensors: Iterable[StoredTensor], config: ModelConfig, where: str) -> None:
        """Find every parameter of the model among a checkpoint's tensors.

        Args:
            tensors: all tensors of the checkpoint.
            config: the model.
            where: what errors about absent tensors call the checkpoint.

        Raises:
            NemocError: a tensor is missing, surplus, there twice, or has the wrong shape or type.
        """
        found, self.notes = _by_parameter(tensors, config)
        expected = {p.name: tuple(map(int, p.shape)) for p in build_step(config).params}
        for name, shape in expected.items():
            _check_present(where, name, shape, found.get(name, {}))
        self._parameters = {n: _parameter(found[n], shape) for n, shape in expected.items()}
        for name, parts in found.items():
            for index, part in parts.items():
                if name not in expected or (index or 0) >= expected[name][0]:
                    raise NemocError(
                        f"{part}: found {part.dtype} {list(part.shape)}, expected no such tensor"
                    )

    @classmethod
    def open(cls, directory: str | Path, config: ModelConfig) -> Self:
        """The checkpoint in a Hugging Face directory; only headers are read.

        Raises:
            NemocError: there is no safetensors checkpoint, or it is not this model's.
        """
        directory = Path(directory)
        return cls(_tensors_of(directory), config, str(directory))

    @classmethod
    def of_state_dict(
        cls, state: Mapping[str, torch.Tensor], config: ModelConfig, where: str
    ) -> Self:
        """A checkpoint of tensors at hand, which are neither copied nor changed.

        Raises:
            NemocError: the tensors are not this model's.
        """
        return cls((_HeldTensor(where, n, t) for n, t in state.items()), config, where)

    def type_of(self, name: str) -> TensorType:
        """The type of a parameter as stored.

        Raises:
            NemocError: there is no such parameter.
        """
        return self._parameter(name).type

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start` to `stop` of a parameter's first axis; of stacked experts only those asked for.

        Raises:
            NemocError: there is no such parameter, it cannot be read, or a value is not finite.
        """
        parameter = self._parameter(name)
        rows, *rest = map(int, parameter.type.shape)
        start, stop, _ = slice(start, stop).indices(rows)
        out = torch.empty((max(stop - start, 0), *rest), dtype=parameter.type.dtype.torch)
        if parameter.stacked:
            for expert, part in zip(out, parameter.parts[start:stop], strict=True):
                part.read_into(expert)
                _check_finite(part, expert)
        elif len(out):
            (part,) = parameter.parts
            part.read_into(out, start)
            _check_finite(part, out)
        return out

    def _parameter(self, name: str) -> _Parameter:
        try:
            return self._parameters[name]
        except KeyError:
            raise NemocError(f"checkpoint: the model has no parameter '{name}'") from None


Parts = dict[int | None, StoredTensor]
"""The tensors of one parameter: by expert, or under None when there is one for the whole."""


def _by_parameter(
    tensors: Iterable[StoredTensor], config: ModelConfig
) -> tuple[dict[str, Parts], tuple[str, ...]]:
    found: dict[str, Parts] = {}
    heads, notes = 0, []
    for tensor in tensors:
        if tensor.name.startswith("mtp."):
            heads += 1
            continue
        name, expert = _canonical(tensor.name)
        if name == "lm_head.weight" and config.tie_word_embeddings:
            notes.append("lm_head.weight is ignored: config.json ties it to the embeddings")
            continue
        parts = found.setdefault(name, {})
        if expert in parts or (parts and None in {expert, *parts}):
            other = parts.get(expert) or next(iter(parts.values()))
            raise NemocError(f"{tensor}: the same weights as {other.name!r}, expected once")
        parts[expert] = tensor
    if heads:
        notes.append(f"{heads} tensors mtp.* are ignored: multi-token prediction is not built")
    return found, tuple(notes)


def _canonical(name: str) -> tuple[str, int | None]:
    """The parameter that a tensor belongs to, and which expert of it."""
    name = re.sub(r"^(backbone|model)\.", "", name)
    name = re.sub(r"^embedding\.", "embeddings.", name)
    if match := re.fullmatch(r"(.*\.experts)\.([0-9]{1,9})\.(\w+)\.weight", name):
        return f"{match[1]}.{match[3]}", int(match[2])
    return name, None


def _check_present(where: str, name: str, shape: tuple[int, ...], parts: Parts) -> None:
    if None in parts:
        return
    disk = name if name.startswith("lm_head.") else f"backbone.{name}"
    stem, _, projection = disk.rpartition(".")
    if not stem.endswith(".experts"):
        raise NemocError(f"{where}: tensor '{disk}': found nothing, expected shape {list(shape)}")
    for index in range(shape[0]):
        if index not in parts:
            raise NemocError(
                f"{where}: tensor '{stem}.{index}.{projection}.weight': found nothing, "
                f"expected shape {list(shape[1:])}"
            )


def _parameter(parts: Parts, shape: tuple[int, ...]) -> _Parameter:
    stacked = None not in parts
    ordered = tuple(parts[i] for i in range(shape[0])) if stacked else (parts[None],)
    first = ordered[0]
    wanted = shape[1:] if stacked else shape
    for part in ordered:
        if part.dtype not in _TYPES:
            raise NemocError(f"{part}: found type {part.dtype}, expected {', '.join(_TYPES)}")
        if part.dtype != first.dtype:
            raise NemocError(
                f"{part}: found type {part.dtype}, expected {first.dtype} like {first.name!r}"
            )
        if part.shape != wanted:
            raise NemocError(f"{part}: found shape {list(part.shape)}, expected {list(wanted)}")
    return _Parameter(TensorType(_TYPES[first.dtype], shape), ordered, stacked)


def _check_finite(part: StoredTensor, values: torch.Tensor) -> None:
    """Refuse NaN and infinities: `aminmax` is one pass without temporaries, and NaN spreads through it."""
    if values.numel() == 0:
        return
    low, high = (float(bound) for bound in torch.aminmax(values))
    if not (math.isfinite(low) and math.isfinite(high)):
        kind = "NaN" if math.isnan(low) or math.isnan(high) else "an infinite value"
        raise NemocError(f"{part}: found {kind}, expected finite weights")


def _tensors_of(directory: Path) -> list[StoredTensor]:
    """Every tensor of a directory's checkpoint, from the headers of its files."""
    if not directory.is_dir():
        raise NemocError(f"{directory}: found no directory, expected one with config.json")
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return list(read_header(single).values())
    if index.is_file():
        return _from_index(index)
    names = sorted(path.name for path in directory.iterdir())
    for name in names:
        if name.endswith(PICKLES):
            raise pickle_error(directory / name)
    found = next((name for name in names if name.endswith(".safetensors")), "no weights")
    raise NemocError(f"{directory}: found {found}, expected {single.name} or {index.name}")


def _from_index(index: Path) -> list[StoredTensor]:
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
        raise NemocError(f"{index}: weight_map: expected an object of file names by tensor")
    headers = {}
    for name, file in files.items():
        if not re.fullmatch(_FILE_NAME, file):
            raise NemocError(
                f"{index}: tensor {name!r}: found file {file!r}, expected one in the same directory"
            )
        if file.endswith(PICKLES):
            raise pickle_error(index.parent / file)
        if file not in headers:
            headers[file] = read_header(index.parent / file)
        if name not in headers[file]:
            raise NemocError(
                f"{index.parent / file}: tensor {name!r}: found nothing, though the index lists it"
            )
    return [headers[file][name] for name, file in files.items()]


def pickle_error(path: Path) -> NemocError:
    """The error that a file is a pickle."""
    return NemocError(
        f"{path}: is a pickle, which can run code when it is loaded; expected safetensors"
    )
