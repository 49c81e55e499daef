"""Writing checkpoints in NVFP4 as ModelOpt and compressed-tensors do: tensors, and the maps that say what they are.

Both hold linear layers as codes, block scales and a scale for each matrix, experts one by one, and everything else as
it was. Activations are not quantized (W4A16), or are meant to be NVFP4 by scales that stand beside those (W4A4). They
differ in names, in arithmetic (`nemoc.ir.nvfp4`), in whether the
scale of a matrix is a factor or a divisor, and in where they say it: ModelOpt in `hf_quant_config.json` and in
`config.json`, compressed-tensors in `config.json` alone. Layouts are those of nvidia-modelopt 0.47 and
compressed-tensors 0.20.
"""

import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from nemoc.ir.dtypes import DType
from nemoc.ir.errors import NemocError
from nemoc.ir.json_file import read_json
from nemoc.ir.nvfp4 import BLOCK
from nemoc.ir.types import TensorType
from nemoc.models.dequantized import Dequantized
from nemoc.models.formats import TENSOR_SCALES, Nvfp4
from nemoc.models.graph import default_weight_types
from nemoc.models.names import is_stack, module_of, on_disk, tensor_of
from nemoc.models.quantize import SLICE, Selection, Written, nvfp4_rows, select
from nemoc.models.safetensors_writer import SHARD, Piece, write_json, write_tensors
from nemoc.models.source import Model

Layout = Literal["modelopt", "compressed-tensors"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
"""Files beside the weights that are taken over as they are."""

_DROPPED = (
    "auto_map",  # names Python files, which are not copied: transformers has the model
    "quantization_config",
    "mtp_layers_block_type",  # multi-token prediction is not read, and so not written
    "mtp_hybrid_override_pattern",
    "num_nextn_predict_layers",
)
"""Fields of the source's `config.json` that do not hold for what is written."""

_PRODUCER = {"name": "modelopt", "version": "0.47.0"}
"""Whose layout it is, by which readers choose theirs."""

_WEIGHTS_ALONE, _BOTH = "W4A16_NVFP4", "NVFP4"
"""ModelOpt's names of what is quantized."""

_NUMBERS = {"num_bits": 4, "type": "float", "group_size": BLOCK, "dynamic": False}


def write_release(
    model: Model,
    directory: Path,
    layout: Layout,
    scope: str = "all",
    *,
    input_scales: Mapping[str, float] | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
    slice_bytes: int = SLICE,
    shard_bytes: int = SHARD,
) -> Written:
    """Write a model with its linear layers in NVFP4, as a directory that others load.

    Args:
        model: what to write; if it is quantized already, what stays NVFP4 keeps its codes, and the rest is written as
            numbers.
        directory: an empty directory. It is whole only when this returns, so it should get its name then.
        layout: whose names and arithmetic to use.
        scope: what to quantize, as `nemoc.models.quantize.select` has it.
        input_scales: what 1 stands for in the activations that a weight multiplies, by its name; None: they are not
            quantized. Experts of a layer get the same.
        advance: told the bytes written so far, and those of all.
        slice_bytes: of f32 weights to work on at a time.
        shard_bytes: of data in a file, at most.

    Raises:
        NemocError: the model has no weights, they cannot be read, the scope means nothing, or a weight has no scale.
        OSError: a file cannot be written.
    """
    weights = Dequantized(model)
    selection = select(model.config, scope, BLOCK)
    _check_scales(selection, input_scales)
    release = _Release(model, weights, layout, selection, slice_bytes, input_scales)
    write_tensors(directory, release.tensors(), release.pieces(), advance, shard_bytes)
    release.write_files(directory)
    return Written(release.quantized, (*release.notes(), *model.notes))


def _check_scales(selection: Selection, scales: Mapping[str, float] | None) -> None:
    if scales is None:
        return
    for name in sorted(selection.chosen):
        found = scales.get(name)
        if found is None or not 0 < found < math.inf:
            raise NemocError(
                f"{name}: found {'nothing' if found is None else found} as the scale of the "
                "activations that it multiplies, expected a positive number"
            )


@dataclass(frozen=True)
class _Release:
    """A model on its way into a directory."""

    model: Model
    weights: Dequantized
    layout: Layout
    selection: Selection
    slice_bytes: int
    input_scales: Mapping[str, float] | None

    @property
    def quantized(self) -> int:
        """How many matrices are quantized."""
        return sum(self._matrices(name) for name in self.selection.chosen)

    def notes(self) -> Iterator[str]:
        """What is written otherwise than one might expect."""
        for name, width in self.selection.narrow.items():
            yield f"{name} stays as it is: its {width} columns are no multiple of {BLOCK}"
        for name in self.weights.formats:
            if name not in self.selection.chosen:
                yield f"{name} was quantized and is written as {self._plain_type(name).dtype}"

    def tensors(self) -> dict[str, TensorType]:
        """The tensors of the checkpoint."""
        tensors: dict[str, TensorType] = {}
        for name in self.weights.types:
            for matrix in range(self._matrices(name)):
                tensors |= self._tensors_of(name, matrix)
        return tensors

    def pieces(self) -> Iterator[Piece]:
        """Their data."""
        for name in self.weights.types:
            if name in self.selection.chosen:
                yield from self._quantized(name)
            else:
                yield from self._plain(name)

    def write_files(self, directory: Path) -> None:
        """Write what comes with the tensors."""
        source = self.model.directory
        config = (
            self.model.config.to_dict() if source is None else read_json(source / "config.json")
        )
        kept = {key: value for key, value in config.items() if key not in _DROPPED}
        write_json(directory / "config.json", kept | {"quantization_config": self._section()})
        if self.layout == "modelopt":
            quantization = {
                "quant_algo": self._algorithm,
                "kv_cache_quant_algo": None,
                "group_size": BLOCK,
                "exclude_modules": self._kept(),
            }
            write_json(
                directory / "hf_quant_config.json",
                {"producer": _PRODUCER, "quantization": quantization},
            )
        for name, content in self._beside().items():
            if isinstance(content, str):
                (directory / name).write_text(content, encoding="utf-8")
            else:
                shutil.copyfile(content, directory / name)
        if not (directory / "generation_config.json").exists():
            write_json(directory / "generation_config.json", self._generation())

    @property
    def _algorithm(self) -> str:
        return _WEIGHTS_ALONE if self.input_scales is None else _BOTH

    @property
    def _group(self) -> dict[str, Any]:
        """What ModelOpt says of the modules that are quantized."""
        group = {"targets": ["Linear"], "weights": _NUMBERS}
        return group if self.input_scales is None else {**group, "input_activations": _NUMBERS}

    def _beside(self) -> dict[str, Path | str]:
        """Files that are taken over, by name: where they are, or their text."""
        source = self.model.directory
        if source is None:
            return self.model.tokenizer_files()
        return {name: source / name for name in COPIED if (source / name).is_file()}

    def _matrices(self, name: str) -> int:
        return int(self.weights.types[name].shape[0]) if is_stack(name) else 1

    def _tensors_of(self, name: str, matrix: int) -> dict[str, TensorType]:
        """What a parameter, or one matrix of it, is stored as."""
        if name not in self.selection.chosen:
            type_ = self._plain_type(name)
            shape = type_.shape[1:] if is_stack(name) else type_.shape
            return {tensor_of(name, matrix): TensorType(type_.dtype, shape)}
        codes, scales, scale = self._names(name, matrix)
        rows, width = map(int, self.weights.types[name].shape[-2:])
        tensors = {
            codes: TensorType(DType.U8, (rows, width // 2)),
            scales: TensorType(DType.F8E4M3, (rows, width // BLOCK)),
            scale: self._scalar,
        }
        if self.input_scales is not None:
            tensors[self._input_name(name, matrix)] = self._scalar
        return tensors

    @property
    def _scalar(self) -> TensorType:
        """The type of what holds for a whole matrix."""
        return TensorType(DType.F32, () if self.layout == "modelopt" else (1,))

    def _input_name(self, name: str, matrix: int) -> str:
        """Of the scale of activations."""
        return tensor_of(f"{module_of(name)}.{Nvfp4(self.layout).input_scale}", matrix)

    def _names(self, name: str, matrix: int) -> tuple[str, str, str]:
        """Of codes, block scales and the scale of the matrix."""
        module = module_of(name)
        return (
            tensor_of(name, matrix, packed=self.layout == "compressed-tensors"),
            tensor_of(f"{module}.weight_scale", matrix),
            tensor_of(f"{module}.{TENSOR_SCALES[self.layout]}", matrix),
        )

    def _plain_type(self, name: str) -> TensorType:
        """The type of a parameter that is written as numbers."""
        type_ = self.weights.types[name]
        if name in self.weights.formats:
            return type_.with_dtype(default_weight_types(self.model.config)(name))
        return type_

    def _quantized(self, name: str) -> Iterator[Piece]:
        width = int(self.weights.types[name].shape[-1])
        for rows in nvfp4_rows(self.weights, name, self.layout, self.slice_bytes):
            codes, scales, scale = self._names(name, rows.matrix)
            yield Piece(codes, rows.codes, rows.start * width // 2)
            yield Piece(scales, rows.scales, rows.start * width // BLOCK)
            if rows.start == 0:
                yield Piece(scale, rows.scale)
                yield from self._input_scale(name, rows.matrix)

    def _input_scale(self, name: str, matrix: int) -> Iterator[Piece]:
        """A factor or, in compressed-tensors' files, a divisor."""
        if self.input_scales is not None:
            scale = torch.tensor(self.input_scales[name])
            if self.layout == "compressed-tensors":
                scale = scale.reciprocal()
            yield Piece(self._input_name(name, matrix), scale)

    def _plain(self, name: str) -> Iterator[Piece]:
        type_ = self._plain_type(name)
        size = math.prod(map(int, type_.shape[1:]))
        for start, rows in self.weights.slices(name, self.slice_bytes):
            rows = rows.to(type_.dtype.torch)
            if is_stack(name):
                for number, part in enumerate(rows, start):
                    yield Piece(tensor_of(name, number), part)
            else:
                yield Piece(tensor_of(name), rows, start * size)

    def _kept(self) -> list[str]:
        """The modules with matrices that are not quantized, experts of a layer as one with `*`."""
        kept = ["lm_head"] if "lm_head.weight" not in self.selection.chosen else []
        for name, type_ in self.weights.types.items():
            if type_.rank > 1 and name not in self.selection.chosen and name != "lm_head.weight":
                module = name.replace(".experts.", ".experts.*.") if is_stack(name) else name
                kept.append(on_disk(module_of(module)))
        return kept

    def _section(self) -> dict[str, Any]:
        """The `quantization_config` of `config.json`."""
        if self.layout == "modelopt":
            return {
                "quant_method": "modelopt",
                "quant_algo": self._algorithm,
                "config_groups": {"group_0": self._group},
                "ignore": self._kept(),
                "producer": _PRODUCER,
            }
        packing = "nvfp4-pack-quantized"
        numbers = {**_NUMBERS, "strategy": "tensor_group", "symmetric": True}
        group = {
            "targets": ["Linear"],
            "weights": numbers,
            "input_activations": (
                None if self.input_scales is None else {**numbers, "dynamic": "local"}
            ),
            "output_activations": None,
            "format": packing,
        }
        return {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": packing,
            "config_groups": {"group_0": group},
            "ignore": [_expression(module) for module in self._kept()],
            "kv_cache_scheme": None,
        }

    def _generation(self) -> dict[str, Any]:
        """A `generation_config.json`."""
        known = self.model.generation
        ids = {
            "bos_token_id": known.bos_token_id,
            "eos_token_id": list(known.eos_token_ids) or None,
            "pad_token_id": known.pad_token_id,
        }
        return {name: value for name, value in ids.items() if value is not None}


def _expression(module: str) -> str:
    """A module as an expression that means it under each prefix that it has in other libraries."""
    if module == "lm_head":
        return module
    name = re.escape(module.removeprefix("backbone.")).replace(r"\*", "[0-9]+")
    return rf"re:.*\.{name}$"
