"""Small checkpoints in the layouts of quantized releases, and the headers of large ones."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from nemoc.ir import DType
from nemoc.ir.nvfp4 import DIALECTS, LARGEST_SCALE, decode, encode, pack
from nemoc.models import ModelConfig, build_step
from nemoc.models.formats import Format
from nemoc.models.names import is_stack, module_of, tensor_of
from support.checkpoints import write_checkpoint

Layout = Literal["modelopt", "compressed-tensors"]
Kind = Literal["nvfp4", "fp8"]
Tensors = dict[str, torch.Tensor]

WIDE: dict[str, Any] = {
    "hidden_size": 48,
    "hybrid_override_pattern": "MEM*-ME",
    "mamba_head_dim": 16,
    "head_dim": 16,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "moe_latent_size": 16,
    "moe_shared_expert_intermediate_size": 80,
}
"""Changes to `support.checkpoints.BASE`: what products sum over comes in blocks of 16."""


def write_quantized(
    directory: Path, kinds: Mapping[str, Kind], layout: Layout = "modelopt", **changes: Any
) -> Tensors:
    """Write a model of `WIDE` with changes in bf16, some modules quantized; without a word on that in `config.json`.

    Args:
        directory: where to.
        kinds: what to quantize, by module on disk.
        layout: the library whose names and arithmetic to use. compressed-tensors gives scalars an axis, and stores
            scales of FP8 in bf16.
        changes: to the configuration.

    Returns:
        The weights by name on disk, f32: what the quantized ones stand for.
    """
    write_checkpoint(directory, dtype=torch.bfloat16, **(WIDE | changes))
    path = directory / "model.safetensors"
    tensors = load_file(path)
    dense = {name: tensor.float() for name, tensor in tensors.items()}
    for seed, (module, kind) in enumerate(kinds.items()):
        weight = tensors.pop(f"{module}.weight").float()
        quantize = _nvfp4 if kind == "nvfp4" else _fp8
        parts, dense[f"{module}.weight"] = quantize(weight, layout)
        activations = (
            "input_scale" if layout == "modelopt" or kind == "fp8" else "input_global_scale"
        )
        parts[activations] = torch.tensor(0.5 + seed)
        if layout == "compressed-tensors":
            parts = {name: part if part.dim() else part[None] for name, part in parts.items()}
        tensors |= {f"{module}.{name}": part for name, part in parts.items()}
    save_file(tensors, path)
    return dense


def _nvfp4(weight: torch.Tensor, layout: Layout) -> tuple[Tensors, torch.Tensor]:
    dialect = DIALECTS[layout]
    blocks = weight.unflatten(-1, (-1, 16))
    amax = blocks.abs().amax(-1, keepdim=True)
    total = dialect.tensor_scale(amax.max(), LARGEST_SCALE)
    scales = dialect.rounded(dialect.ideal(amax, total))
    packed = pack(encode(blocks, scales.float(), total, dialect).flatten(-2))
    numbers = decode(packed, dialect, torch.float32).unflatten(-1, (-1, 16))
    codes, last = (
        ("weight", "weight_scale_2")
        if layout == "modelopt"
        else ("weight_packed", "weight_global_scale")
    )
    parts = {codes: packed, "weight_scale": scales.squeeze(-1), last: total}
    return parts, (numbers * dialect.step(scales.float(), total)).flatten(-2)


def _fp8(weight: torch.Tensor, layout: Layout) -> tuple[Tensors, torch.Tensor]:
    scale = weight.abs().max() / 448
    if layout == "compressed-tensors":
        scale = scale.bfloat16()
    codes = (weight / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale.float()


def edit_json(path: Path, **changes: Any) -> None:
    """Set fields of a JSON file, which may not exist yet."""
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(data | changes))


def edit_tensors(directory: Path, change: Callable[[Tensors], object]) -> None:
    """Change the tensors of a checkpoint in one file."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def mixed(kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """ModelOpt's `MIXED_PRECISION` of modules on disk."""
    spelled = {"nvfp4": {"quant_algo": "NVFP4", "group_size": 16}, "fp8": {"quant_algo": "FP8"}}
    layers = {module: spelled[kind] for module, kind in kinds.items()}
    return {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}


def scheme(kind: Kind, *targets: str, **weights: Any) -> dict[str, Any]:
    """A group of compressed-tensors, W4A4 or W8A8, with changes to what it says of weights."""
    common = {"symmetric": True, "type": "float"}
    if kind == "nvfp4":
        numbers = {"num_bits": 4, "strategy": "tensor_group", "group_size": 16, **common}
        inputs, packing = {**numbers, "dynamic": "local"}, "nvfp4-pack-quantized"
    else:
        numbers = {"num_bits": 8, "strategy": "tensor", "group_size": None, **common}
        inputs, packing = {**numbers, "dynamic": False}, "float-quantized"
    return {
        "targets": list(targets),
        "weights": {**numbers, "dynamic": False, **weights},
        "input_activations": inputs,
        "output_activations": None,
        "format": packing,
    }


def write_headers(
    directory: Path,
    config: ModelConfig,
    formats: Mapping[str, Format],
    *,
    extra: Mapping[str, tuple[str, tuple[int, ...]]],
    wide: Callable[[str], bool],
) -> tuple[int, int]:
    """A checkpoint of zeros in which each matrix is stored as it is in a release, of any size: the file is sparse.

    Args:
        directory: where to; its `config.json` is written by others.
        config: the model.
        formats: of quantized parameters, as ModelOpt has them; each of their modules has a scale of activations too.
        extra: type and shape of tensors beyond those.
        wide: parameters that are f32 where others are bf16.

    Returns:
        How many tensors there are, and their bytes.
    """
    entries: dict[str, tuple[str, tuple[int, ...]]] = {}
    types = {DType.U8: "U8", DType.F8E4M3: "F8_E4M3", DType.F32: "F32", DType.BF16: "BF16"}
    graph = build_step(config, formats=formats)
    shapes = {p.name: (p.dtype, tuple(map(int, p.shape))) for p in graph.params}
    for name, stored in formats.items():
        lead = shapes[name][1][:-2]
        shapes[f"{module_of(name)}.{stored.input_scale}"] = DType.F32, lead
    for name, (dtype, shape) in shapes.items():
        kind = "F32" if wide(name) else types[dtype]
        for expert in range(shape[0]) if is_stack(name) else (0,):
            entries[tensor_of(name, expert)] = kind, shape[1:] if is_stack(name) else shape
    return _write_zeros(directory / "model.safetensors", entries | dict(extra))


def _write_zeros(path: Path, entries: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[int, int]:
    sizes = {"U8": 1, "F8_E4M3": 1, "BF16": 2, "F32": 4}
    header, end = {}, 0
    for name, (kind, shape) in entries.items():
        size = math.prod(shape) * sizes[kind]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return len(entries), end
