"""Checkpoints as parameter sources: Hugging Face directories, and state dictionaries at hand.

Checkpoints spell names in several ways: prefix `backbone.` or `model.`, `embedding.` in old ones, one tensor
per expert (on disk) or all stacked (in transformers 5). Everything is checked when it is opened, by headers
alone, against the parameters of the model's graph; data is read when it is asked for, by slices, and refused
when it is not finite. Quantized weights are read as they are stored, codes and scales. Files are untrusted: pickles are
not opened, and no path leads out of the directory.
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
from nemoc.models.formats import TENSOR_SCALES, Format, Nvfp4
from nemoc.models.graph import build_step
from nemoc.models.names import is_stack, module_of, parameter_of, tensor_of
from nemoc.models.quantization import Quantization
from nemoc.models.safetensors_file import NAMES, TYPES, read_header

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Suffixes of files that can run code when they are loaded."""

_TORCH_NAMES = {dtype.torch: name for name, dtype in TYPES.items()}
_NUMBERS = (DType.F32, DType.BF16, DType.F16)
"""Types of what is not quantized."""

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
        return _TORCH_NAMES.get(self.tensor.dtype, str(self.tensor.dtype).removeprefix("torch."))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def __str__(self) -> str:
        return f"{self.owner}: tensor {self.name!r}"

    def read_into(self, out: torch.Tensor, start: int = 0) -> None:
        rows = self.tensor.detach()
        out.copy_(rows[start : start + len(out)] if out.dim() else rows.reshape(()))


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
        scales: the names under which it also has scales of activations and caches, [] or, for stacked experts, [E]:
            `layers.0.mixer.in_proj.input_scale`, `layers.5.mixer.k_proj.k_scale`. No graph reads them.
    """

    def __init__(
        self,
        tensors: Iterable[StoredTensor],
        config: ModelConfig,
        where: str,
        quantization: Quantization | None = None,
    ) -> None:
        """Find every parameter of the model among a checkpoint's tensors.

        Args:
            tensors: all tensors of the checkpoint.
            config: the model.
            where: what errors about absent tensors call the checkpoint.
            quantization: how it is stored; None: as it is.

        Raises:
            NemocError: a tensor is missing, surplus, there twice, or has the wrong shape or type.
        """
        quantization = quantization or Quantization()
        found, self.notes = _by_parameter(tensors, config)
        graph = build_step(config, formats=quantization.formats)
        expected = {p.name: p.type for p in graph.params}
        scales = _scales(expected, config, quantization)
        self.scales = tuple(name for name in scales if name in found)
        expected |= {name: scales[name] for name in self.scales}
        for name, type_ in expected.items():
            _check_present(where, name, type_, found.get(name, {}), quantization.formats.get(name))
        self._parameters = {n: _parameter(n, found[n], type_) for n, type_ in expected.items()}
        for name, parts in found.items():
            shape = expected[name].shape if name in expected else ()
            for index, part in parts.items():
                if name not in expected or (index is not None and index >= int(shape[0])):
                    raise NemocError(
                        f"{part}: found {part.dtype} {list(part.shape)}, expected no such tensor"
                    )

    @classmethod
    def open(
        cls, directory: str | Path, config: ModelConfig, quantization: Quantization | None = None
    ) -> Self:
        """The checkpoint in a Hugging Face directory; only headers are read.

        Raises:
            NemocError: there is no safetensors checkpoint, or it is not this model's.
        """
        directory = Path(directory)
        return cls(_tensors_of(directory), config, str(directory), quantization)

    @classmethod
    def of_state_dict(
        cls,
        state: Mapping[str, torch.Tensor],
        config: ModelConfig,
        where: str,
        quantization: Quantization | None = None,
    ) -> Self:
        """A checkpoint of tensors at hand, which are neither copied nor changed.

        Raises:
            NemocError: the tensors are not this model's.
        """
        tensors = (_HeldTensor(where, name, tensor) for name, tensor in state.items())
        return cls(tensors, config, where, quantization)

    def type_of(self, name: str) -> TensorType:
        """The type of a parameter as stored.

        Raises:
            NemocError: there is no such parameter.
        """
        return self._parameter(name).type

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start` to `stop` of a parameter's first axis; of stacked experts only those asked for.

        A scalar is read whole.

        Raises:
            NemocError: there is no such parameter, it cannot be read, or a value is not finite.
        """
        parameter = self._parameter(name)
        shape = list(map(int, parameter.type.shape))
        if shape:
            start, stop, _ = slice(start, stop).indices(shape[0])
            shape[0] = max(stop - start, 0)
        out = torch.empty(shape, dtype=parameter.type.dtype.torch)
        if parameter.stacked:
            for expert, part in zip(out, parameter.parts[start:stop], strict=True):
                part.read_into(expert)
                _check_values(part, expert)
        elif out.numel():
            (part,) = parameter.parts
            part.read_into(out, start)
            _check_values(part, out)
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
        name, expert = parameter_of(tensor.name)
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


def _scales(
    expected: Mapping[str, TensorType], config: ModelConfig, quantization: Quantization
) -> dict[str, TensorType]:
    """The scales of activations and caches that a checkpoint may have."""
    shapes = {
        f"{module_of(name)}.{stored.input_scale}": expected[name].shape[:-2]
        for name, stored in quantization.formats.items()
    }
    if quantization.kv_cache is not None:
        layers = [n for n, kind in enumerate(config.layers) if kind == "attention"]
        shapes |= {f"layers.{n}.mixer.{x}_proj.{x}_scale": () for n in layers for x in "kv"}
    return {name: TensorType(DType.F32, shape) for name, shape in shapes.items()}


def _check_present(
    where: str, name: str, type_: TensorType, parts: Parts, stored: Format | None
) -> None:
    if None in parts:
        return
    packed = isinstance(stored, Nvfp4) and stored.dialect == "compressed-tensors"
    stacked, shape = is_stack(name), list(type_.shape)
    for index in range(int(shape[0])) if stacked else (None,):
        if index not in parts:
            raise NemocError(
                f"{where}: tensor '{tensor_of(name, index or 0, packed=packed)}': found nothing, "
                f"expected shape {shape[1:] if stacked else shape}"
            )


def _parameter(name: str, parts: Parts, type_: TensorType) -> _Parameter:
    stacked = None not in parts
    shape = tuple(map(int, type_.shape))
    ordered = tuple(parts[i] for i in range(shape[0])) if stacked else (parts[None],)
    first, wanted = ordered[0], shape[1:] if stacked else shape
    allowed = [NAMES[dtype] for dtype in _allowed(name, type_)]
    for part in ordered:
        if part.dtype not in allowed:
            raise NemocError(f"{part}: found type {part.dtype}, expected {', '.join(allowed)}")
        if part.dtype != first.dtype:
            raise NemocError(
                f"{part}: found type {part.dtype}, expected {first.dtype} like {first.name!r}"
            )
        if part.shape != wanted and (wanted or part.shape != (1,)):  # a scalar may have an axis
            raise NemocError(f"{part}: found shape {list(part.shape)}, expected {list(wanted)}")
    return _Parameter(TensorType(TYPES[first.dtype], shape), ordered, stacked)


def _allowed(name: str, type_: TensorType) -> tuple[DType, ...]:
    """The types in which a parameter may be stored: codes and block scales have one, and so has what scales those."""
    if type_.dtype not in _NUMBERS or name.endswith(tuple(TENSOR_SCALES.values())):
        return (type_.dtype,)
    return _NUMBERS


def _check_values(part: StoredTensor, values: torch.Tensor) -> None:
    """Refuse numbers that are none, and scales of matrices that make such.

    Raises:
        NemocError: there is one; the tensor is named.
    """
    _check_finite(part, values)
    leaf = part.name.rpartition(".")[2]
    if leaf == TENSOR_SCALES["modelopt"] and (low := float(values.min())) < 0:
        raise NemocError(f"{part}: found {low:g}, expected scales of 0 or more")
    if leaf == TENSOR_SCALES["compressed-tensors"]:
        wrong = values[~((values > 0) & values.reciprocal().isfinite())]
        if len(wrong):
            raise NemocError(f"{part}: found {float(wrong[0]):g}, expected a positive divisor")


def _check_finite(part: StoredTensor, values: torch.Tensor) -> None:
    """Refuse NaN and infinities, of which codes have none and E4M3 has NaN alone, as the largest magnitude."""
    if values.numel() == 0 or values.dtype is torch.uint8:
        return
    if values.dtype is torch.float8_e4m3fn:
        low, high = 0.0, math.nan if (values.view(torch.uint8) & 0x7F).max() == 0x7F else 0.0
    else:  # one pass without temporaries, and NaN spreads through it
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
