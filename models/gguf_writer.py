"""Writing models as GGUF files that llama.cpp runs, in slices, so that memory holds a slice at a time."""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import torch

from nemoc.ir.dtypes import DType
from nemoc.ir.errors import NemocError
from nemoc.ir.json_file import parse_json, read_json
from nemoc.models.config import ModelConfig
from nemoc.models.dequantized import Dequantized
from nemoc.models.gguf import ARCHITECTURES, ENDS, gguf_name, gguf_shape, scale_name
from nemoc.models.gguf_file import ALIGNMENT, ARRAY, MAGIC, STRING, VERSION
from nemoc.models.gguf_tokenizer import tokenizer_metadata
from nemoc.models.gguf_types import (
    BF16,
    F16,
    F32,
    NVFP4,
    Q8_0,
    GgmlType,
    encode_nvfp4,
    encode_q8_0,
)
from nemoc.models.graph import default_weight_types
from nemoc.models.names import is_stack
from nemoc.models.quantize import SLICE, Written, nvfp4_rows, select
from nemoc.models.source import Model

GgufType = Literal["f32", "bf16", "q8_0", "nvfp4"]
GGUF_TYPES: tuple[GgufType, ...] = get_args(GgufType)

_TYPES = {"f32": F32, "bf16": BF16, "q8_0": Q8_0, "nvfp4": NVFP4}
_PLAIN = {DType.F32: F32, DType.F16: F16, DType.BF16: BF16}
_FILE_TYPES = {"f32": 0, "q8_0": 7, "bf16": 32, "nvfp4": 39}
"""What llama.cpp calls the type of most tensors (`LlamaFileType`)."""

_QUANTIZATION_VERSION = 2
"""Of ggml's blocks."""

_ALWAYS_F32 = (".conv1d.weight", ".gate.weight")
"""Matrices that llama.cpp wants as f32; what is no matrix it wants as f32 too."""

_UNSCALED = (".fc1_latent_proj.weight", ".fc2_latent_proj.weight")
"""Matrices that llama.cpp multiplies without a scale of their own."""

_DENSE = (".mixer.up_proj.weight", ".mixer.down_proj.weight")
"""Matrices that it multiplies so only where there is no bias."""

_U32, _I32, _F32, _BOOL = 4, 5, 6, 7
"""Types of metadata."""


def write_gguf(
    model: Model,
    file: BinaryIO,
    type_: GgufType = "nvfp4",
    scope: str = "all",
    *,
    advance: Callable[[int, int], None] = lambda done, total: None,
    slice_bytes: int = SLICE,
) -> Written:
    """Write a model.

    Args:
        model: what to write; weights in NVFP4 that stay so keep their codes.
        file: an empty file, open for writing.
        type_: of matrices: `f32` and `bf16` are of all of them, `q8_0` and `nvfp4` of those in scope, and others keep
            the type in which they are stored. Norms, convolutions, routers and the like are f32.
        scope: what to quantize, as `nemoc.models.quantize.select` has it.
        advance: told the bytes written so far, and those of all.
        slice_bytes: of f32 weights to work on at a time.

    Raises:
        NemocError: the model has no weights, they cannot be read, or llama.cpp does not know such a model; or the scope
            means nothing.
        OSError: the file cannot be written.
    """
    _check_known(model.config)
    weights = Dequantized(model)
    types, notes = _element_types(model.config, weights, type_, scope)
    tokenizer, more = _tokenizer(model)
    tensors = _tensors(model.config, weights, types)
    metadata = _metadata(model, type_) | tokenizer | _weights_only(tensors)
    header = _header(metadata, tensors)
    total = len(header) + sum(_padded(tensor.bytes) for tensor in tensors)
    file.write(header)
    done = len(header)
    data = _Data(weights, slice_bytes)
    for tensor in tensors:
        written = 0
        for part in data.of(tensor):
            written += file.write(part.contiguous().view(-1).view(torch.uint8).numpy().data)
            advance(done + written, total)
        file.write(bytes(_padded(tensor.bytes) - written))
        done += _padded(tensor.bytes)
    quantized = (name for name, found in types.items() if not found.is_plain)
    count = sum(int(weights.types[n].shape[0]) if is_stack(n) else 1 for n in quantized)
    return Written(count, (*notes, *more, *model.notes))


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file.

    Attributes:
        name: its name there.
        parameter: what it is made of.
        type: its element type.
        shape: its shape, the axis whose elements lie next to each other last.
        is_scale: whether it holds the scales of the parameter's matrices, not the parameter.
    """

    name: str
    parameter: str
    type: GgmlType
    shape: tuple[int, ...]
    is_scale: bool = False

    @property
    def bytes(self) -> int:
        """Size of its data."""
        return torch.Size(self.shape).numel() // self.type.elements * self.type.size


class _Data:
    """The data of tensors, in slices."""

    def __init__(self, weights: Dequantized, slice_bytes: int) -> None:
        self._weights = weights
        self._slice_bytes = slice_bytes
        self._scales: dict[str, list[torch.Tensor]] = {}

    def of(self, tensor: _Tensor) -> Iterator[torch.Tensor]:
        """A tensor's data; that of a scale only after that of what it scales."""
        if tensor.is_scale:
            yield torch.stack(self._scales.pop(tensor.parameter))
        elif tensor.type is NVFP4:
            yield from self._nvfp4(tensor.parameter)
        else:
            for _, rows in self._weights.slices(tensor.parameter, self._slice_bytes):
                yield _converted(rows, tensor)

    def _nvfp4(self, name: str) -> Iterator[torch.Tensor]:
        scales: dict[int, torch.Tensor] = {}
        for rows in nvfp4_rows(self._weights, name, "modelopt", self._slice_bytes):
            scales[rows.matrix] = rows.scale.reshape(())
            yield encode_nvfp4(rows.codes, rows.scales)
        self._scales[name] = [*scales.values()]


def _converted(rows: torch.Tensor, tensor: _Tensor) -> torch.Tensor:
    if tensor.parameter.endswith(".A_log"):
        return -rows.double().exp().float()
    if tensor.type is Q8_0:
        return encode_q8_0(rows.float())
    return rows.to(tensor.type.plain.torch)


def _check_known(config: ModelConfig) -> None:
    """Refuse what llama.cpp would compute otherwise.

    Raises:
        NemocError: the model is of such a kind.
    """
    kinds = set(config.layers)
    if {"moe", "mlp"} <= kinds:
        raise NemocError("GGUF: found layers of experts and dense ones, expected one of the two")
    wrong = [
        ("mlp_hidden_act", config.mlp_hidden_act, "relu2", kinds & {"moe", "mlp"}),
        ("mamba_hidden_act", config.mamba_hidden_act, "silu", kinds & {"mamba"}),
    ]
    for name, found, expected, matters in wrong:
        if matters and found != expected:
            raise NemocError(f"GGUF: {name}: found '{found}', expected '{expected}'")
    flags = [
        ("use_bias", config.use_bias, kinds & {"mamba"}),
        ("use_conv_bias", not config.use_conv_bias, kinds & {"mamba"}),
        ("mlp_bias", config.mlp_bias, kinds & {"moe"}),
    ]
    for name, is_wrong, matters in flags:
        if matters and is_wrong:
            raise NemocError(f"GGUF: {name}: found a value that llama.cpp does not know")


def _element_types(
    config: ModelConfig, weights: Dequantized, type_: GgufType, scope: str
) -> tuple[dict[str, GgmlType], list[str]]:
    """The type of each parameter in the file, and what is to be said of them."""
    wanted = _TYPES[type_]
    if wanted.is_plain:
        if scope != "all":
            raise NemocError(f"scope '{scope}': {type_} is of all matrices, expected all")
        chosen, narrow = {name for name, t in weights.types.items() if t.rank > 1}, {}
    else:
        selection = select(config, scope, wanted.elements)
        chosen, narrow = set(selection.chosen), dict(selection.narrow)
    suffixes = _UNSCALED + (_DENSE if config.mlp_bias else ())
    unscaled = {name for name in chosen if wanted is NVFP4 and name.endswith(suffixes)}
    types = {}
    for name, found in weights.types.items():
        if found.rank == 1 or name.endswith(_ALWAYS_F32):
            types[name] = F32
        elif name in chosen - unscaled:
            types[name] = wanted
        else:
            stored = default_weight_types(config)(name) if name in weights.formats else found.dtype
            types[name] = _PLAIN[stored]
    notes = [
        f"{name} stays as it is: its {width} columns are no multiple of {wanted.elements}"
        for name, width in narrow.items()
    ]
    notes += [
        f"{name} stays as it is: llama.cpp applies no scale to it" for name in sorted(unscaled)
    ]
    notes += [
        f"{name} was quantized and is written as {types[name].name}"
        for name in weights.formats
        if types[name].is_plain and not wanted.is_plain
    ]
    return types, notes


def _tensors(
    config: ModelConfig, weights: Dequantized, types: dict[str, GgmlType]
) -> list[_Tensor]:
    tensors = []
    for parameter, type_ in weights.types.items():
        shape = tuple(map(int, type_.shape))
        name = gguf_name(parameter)
        if name is None:
            raise NemocError(f"GGUF: has no tensor for {parameter}")
        placed = gguf_shape(parameter, shape, config)
        tensors.append(_Tensor(name, parameter, types[parameter], placed))
        if types[parameter] is NVFP4:
            count = shape[0] if is_stack(parameter) else 1
            tensors.append(_Tensor(scale_name(name), parameter, F32, (count,), is_scale=True))
    return tensors


def _metadata(model: Model, type_: GgufType) -> dict[str, Any]:
    """The constants of a model."""
    config, generation = model.config, model.generation
    has = {kind: kind in config.layers for kind in ("moe", "mlp", "attention")}
    width = config.moe_intermediate_size if has["moe"] else config.intermediate_size
    kv_heads = config.num_key_value_heads
    own: dict[str, Any] = {
        "block_count": len(config.layers),
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "vocab_size": config.vocab_size,
        "feed_forward_length": [width if k in ("moe", "mlp") else 0 for k in config.layers],
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": [kv_heads if k == "attention" else 0 for k in config.layers],
        "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        "attention.layer_norm_rms_epsilon": config.layer_norm_epsilon,
        "ssm.conv_kernel": config.conv_kernel,
        "ssm.inner_size": config.mamba_inner_size,
        "ssm.state_size": config.ssm_state_size,
        "ssm.time_step_rank": config.mamba_num_heads,
        "ssm.group_count": config.n_groups,
    }
    if has["attention"]:
        own |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if has["moe"]:
        own |= {
            "expert_count": config.n_routed_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_shared_count": config.n_shared_experts,
            "expert_shared_feed_forward_length": config.moe_shared_expert_intermediate_size,
            "expert_weights_norm": config.norm_topk_prob,
            "expert_weights_scale": config.routed_scaling_factor,
            "expert_group_count": config.n_group,
            "expert_group_used_count": config.topk_group,
        }
        if config.moe_latent_size is not None:
            own["moe_latent_size"] = config.moe_latent_size
    arch = ARCHITECTURES[has["moe"]]
    general = {
        "general.architecture": arch,
        "general.type": "model",
        "general.name": model.name,
        "general.file_type": _FILE_TYPES[type_],
        "general.quantization_version": _QUANTIZATION_VERSION,
    }
    ids = {
        "bos": generation.bos_token_id,
        "padding": generation.pad_token_id,
        **dict(zip(ENDS, generation.eos_token_ids, strict=False)),
    }
    special = {f"tokenizer.ggml.{kind}_token_id": id_ for kind, id_ in ids.items()}
    return (
        general
        | {f"{arch}.{key}": value for key, value in own.items()}
        | {key: id_ for key, id_ in special.items() if id_ is not None}
    )


def _weights_only(tensors: list[_Tensor]) -> dict[str, Any]:
    """That activations are not to be NVFP4 because the weights that they are multiplied with are."""
    names = sorted(tensor.name for tensor in tensors if tensor.type is NVFP4)
    if not names:
        return {}
    return {
        "general.tensor_extra.name": names,
        "general.tensor_extra.prec_a4": [False for _ in names],
    }


def _tokenizer(model: Model) -> tuple[dict[str, Any], list[str]]:
    """The tokenizer as metadata, and why it is left out if it is."""
    none = {"tokenizer.ggml.model": "none"}
    match model.tokenizer_files().get("tokenizer.json"):
        case None:
            return none, ["the file has no tokenizer, since the model has none"]
        case str(text):
            data = parse_json(text.encode(), Path("tokenizer.json"))
        case path:
            data = read_json(path)
    try:
        found = tokenizer_metadata(data, model.config.vocab_size)
    except NemocError as error:
        return none, [f"the file has no tokenizer: {error}"]
    if model.chat_template is not None:
        found["tokenizer.chat_template"] = model.chat_template
    return found, []


def _header(metadata: dict[str, Any], tensors: list[_Tensor]) -> bytes:
    """Everything before the data."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_text(key), _value(value)]
    offset = 0
    for tensor in tensors:
        axes = tensor.shape[::-1]
        entry = struct.pack(f"<I{len(axes)}Q", len(axes), *axes)
        parts += [_text(tensor.name), entry, struct.pack("<IQ", tensor.type.number, offset)]
        offset += _padded(tensor.bytes)
    text = b"".join(parts)
    return text + bytes(_padded(len(text)) - len(text))


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """A value of metadata behind its type."""
    match value:
        case bool():
            return struct.pack("<I?", _BOOL, value)
        case int():
            return struct.pack("<II", _U32, value)
        case float():
            return struct.pack("<If", _F32, value)
        case str():
            return struct.pack("<I", STRING) + _text(value)
    if value and isinstance(value[0], str):
        head = struct.pack("<IIQ", ARRAY, STRING, len(value))
        return head + b"".join(map(_text, value))
    kind, code = (_BOOL, "?") if value and isinstance(value[0], bool) else (_I32, "i")
    return struct.pack(f"<IIQ{len(value)}{code}", ARRAY, kind, len(value), *value)


def _padded(size: int) -> int:
    """A size up to where the next tensor starts."""
    return -(-size // ALIGNMENT) * ALIGNMENT
