"""Nemotron-H in GGUF files: names, shapes and constants as llama.cpp has them (`nemotron_h` and `nemotron_h_moe`).

A file holds the same tensors as a checkpoint in other words, experts stacked. Three differ in more than their name: A
is stored itself and not the logarithm of −A, and a grouped norm and the convolution have other axes. Constants are
metadata; what a layer is follows from two lists: one with neither heads nor a width is Mamba, one with heads alone
attention, any other feeds forward. A last block may be multi-token prediction, which is ignored.

Facts are from llama.cpp (`conversion/nemotron.py`, `gguf-py/gguf/constants.py`, `src/models/nemotron-h.cpp`).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from nemoc.ir.errors import NemocError
from nemoc.ir.types import Value
from nemoc.models.checkpoint import Checkpoint, StoredTensor
from nemoc.models.config import ModelConfig
from nemoc.models.config_fields import FieldReader
from nemoc.models.formats import Format, Nvfp4
from nemoc.models.gguf_file import GgufFile, GgufTensor, read_gguf
from nemoc.models.gguf_parts import Numbers, nvfp4_parts
from nemoc.models.gguf_types import F32, NVFP4
from nemoc.models.graph import build_step
from nemoc.models.modules import Modules
from nemoc.models.names import is_stack, module_of
from nemoc.models.quantization import Quantization

ARCHITECTURES = ("nemotron_h", "nemotron_h_moe")

_OUTSIDE = {
    "embeddings.weight": "token_embd.weight",
    "norm_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_INSIDE = {
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.out_proj.weight": "ssm_out.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.norm.weight": "ssm_norm.weight",
    "mixer.q_proj.weight": "attn_q.weight",
    "mixer.k_proj.weight": "attn_k.weight",
    "mixer.v_proj.weight": "attn_v.weight",
    "mixer.o_proj.weight": "attn_output.weight",
    "mixer.q_proj.bias": "attn_q.bias",
    "mixer.k_proj.bias": "attn_k.bias",
    "mixer.v_proj.bias": "attn_v.bias",
    "mixer.o_proj.bias": "attn_output.bias",
    "mixer.up_proj.weight": "ffn_up.weight",
    "mixer.down_proj.weight": "ffn_down.weight",
    "mixer.up_proj.bias": "ffn_up.bias",
    "mixer.down_proj.bias": "ffn_down.bias",
    "mixer.gate.weight": "ffn_gate_inp.weight",
    "mixer.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mixer.experts.up_proj": "ffn_up_exps.weight",
    "mixer.experts.down_proj": "ffn_down_exps.weight",
    "mixer.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mixer.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
    "mixer.fc1_latent_proj.weight": "ffn_latent_down.weight",
    "mixer.fc2_latent_proj.weight": "ffn_latent_up.weight",
}
"""Parameters and what files call them, without `layers.N.` and `blk.N.`."""

ENDS = ("eos", "eot", "eom")
"""Special tokens that end a generation."""

_DTYPES = {"F32": "float32", "F16": "float16"}

_LAYER = re.compile(r"layers\.([0-9]+)\.(.+)")
_BLOCK = re.compile(r"blk\.([0-9]{1,6})\.(.+)")


def gguf_name(parameter: str) -> str | None:
    """What files call a parameter of the graph; None if they have no such tensor."""
    match = _LAYER.fullmatch(parameter)
    if match is None:
        return _OUTSIDE.get(parameter)
    name = _INSIDE.get(match[2])
    return None if name is None else f"blk.{match[1]}.{name}"


def gguf_shape(parameter: str, shape: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
    """The shape under which files hold a parameter."""
    if parameter.endswith((".A_log", ".D")):
        return (*shape, 1)
    if parameter.endswith(".conv1d.weight"):
        return (shape[0], shape[2])
    if parameter.endswith(".mixer.norm.weight"):
        return (config.n_groups, shape[0] // config.n_groups)
    return shape


def scale_name(tensor: str) -> str:
    """The tensor that scales a tensor in NVFP4: f32 [1], or one for each of a stack."""
    return f"{tensor.removesuffix('.weight')}.scale"


@dataclass(frozen=True)
class Opened:
    """A model in a GGUF file.

    Attributes:
        file: the file.
        config: its shape and constants.
        parameters: its weights; blocks of codes are read as f32, but for linear layers in NVFP4.
        quantization: the formats of those.
        notes: what was tolerated, one line each.
    """

    file: GgufFile
    config: ModelConfig
    parameters: Checkpoint
    quantization: Quantization
    notes: tuple[str, ...]


def open_gguf(path: Path) -> Opened:
    """Open a file; only its header is read.

    Raises:
        NemocError: it is no GGUF file, is damaged, or holds no model that nemoc knows; one line.
    """
    file = read_gguf(path)
    config = _Metadata(file).config()
    contents = _Contents.of(file, config)
    quantization = Quantization(contents.formats)
    parameters = Checkpoint(contents.parts, config, str(path), quantization)
    notes = (*_notes(contents, len(config.layers)), *parameters.notes)
    return Opened(file, config, parameters, quantization, notes)


@dataclass
class _Contents:
    """What a file's tensors are in a checkpoint of the model.

    Attributes:
        parts: its tensors.
        formats: of the matrices that stay quantized, by parameter.
        left: the tensors of the file that are none of these.
        decoded: the types of blocks that are read as numbers.
    """

    parts: list[StoredTensor]
    formats: dict[str, Format]
    left: dict[str, GgufTensor]
    decoded: set[str]

    @classmethod
    def of(cls, file: GgufFile, config: ModelConfig) -> Self:
        """Find every parameter of a model.

        Raises:
            NemocError: a tensor is missing, or has the wrong shape or type.
        """
        found = cls([], {}, dict(file.tensors), set())
        modules = Modules.of(config)
        linear = {modules.owner[name] for name in modules.of_class("Linear") or ()}
        for parameter in build_step(config).params:
            found._add(file, parameter, config, parameter.name in linear)
        return found

    def _add(self, file: GgufFile, parameter: Value, config: ModelConfig, is_linear: bool) -> None:
        shape = tuple(map(int, parameter.shape))
        name = gguf_name(parameter.name)
        expected = gguf_shape(parameter.name, shape, config)
        tensor = None if name is None else self.left.pop(name, None)
        if name is None or tensor is None:
            raise NemocError(
                f"{file.path}: tensor '{name or parameter.name}': found nothing, "
                f"expected shape {list(expected)}"
            )
        if _without_ones(tensor.shape) != _without_ones(expected):
            raise NemocError(
                f"{tensor}: found shape {list(tensor.shape)}, expected {list(expected)}"
            )
        stacked = is_stack(parameter.name)
        scales = self._take_scales(name, shape[0] if stacked else 1)
        if is_linear and tensor.type is NVFP4:
            self.parts += nvfp4_parts(parameter.name, shape, tensor, scales)
            inputs = self._take_input_scales(name, shape[0] if stacked else 1)
            stored = Nvfp4(activations=inputs is not None)
            if inputs is not None:
                module = module_of(parameter.name)
                self.parts.append(Numbers(f"{module}.{stored.input_scale}", shape[:-2], inputs))
            self.formats[parameter.name] = stored
            return
        if not tensor.type.is_plain:
            self.decoded.add(tensor.type.name)
        is_logarithm = parameter.name.endswith(".A_log")
        self.parts.append(Numbers(parameter.name, shape, tensor, scales, is_logarithm))

    def _take_scales(self, tensor: str, count: int) -> GgufTensor | None:
        """What so many matrices are multiplied by, if the file has that."""
        scales = self.left.pop(scale_name(tensor), None)
        if scales is not None and not _are_numbers(scales, count):
            raise NemocError(
                f"{scales}: found {scales.type.name} {list(scales.shape)}, expected F32 [{count}]"
            )
        return scales

    def _take_input_scales(self, tensor: str, count: int) -> GgufTensor | None:
        """The scales of what so many matrices multiply, if the file has one for each."""
        name = f"{module_of(tensor)}.input_scale"
        scales = self.left.get(name)
        return self.left.pop(name) if scales is not None and _are_numbers(scales, count) else None


def _are_numbers(scales: GgufTensor, count: int) -> bool:
    return scales.type is F32 and scales.shape == (count,)


def _notes(contents: _Contents, layers: int) -> Iterator[str]:
    """What is said of tensors that are no parameters, and of those whose codes are not kept.

    Raises:
        NemocError: there is one which is known to be nothing else either.
    """
    heads = activations = 0
    for name, tensor in contents.left.items():
        block = _BLOCK.fullmatch(name)
        if block is not None and int(block[1]) >= layers:
            heads += 1
        elif name.endswith(".input_scale"):
            activations += 1
        else:
            raise NemocError(
                f"{tensor}: found {tensor.type.name} {list(tensor.shape)}, expected no such tensor"
            )
    if heads:
        yield f"{heads} tensors from blk.{layers} on are ignored: multi-token prediction is not built"
    if activations:
        yield f"{activations} scales of activations are ignored"
    if contents.decoded:
        yield f"weights in {', '.join(sorted(contents.decoded))} are read as f32"


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


class _Metadata:
    """The constants of a model, field by field; errors name the file and the key."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._read = FieldReader(file.metadata, str(file.path), frozenset())
        self._arch = self._read.text("general.architecture", "")
        if self._arch not in ARCHITECTURES:
            self._read.fail(
                "general.architecture", f"'{self._arch}'", f"one of {', '.join(ARCHITECTURES)}"
            )
        if (parts := self._read.integer("split.count", 1, minimum=0)) > 1:
            self._read.fail(
                "split.count", str(parts), "a whole file (llama-gguf-split --merge makes one)"
            )

    def config(self) -> ModelConfig:
        """All of them.

        Raises:
            NemocError: one is missing or wrong, or layers of a kind differ.
        """
        kinds = self._layers()
        data: dict[str, Any] = {
            "layers_block_type": kinds,
            "vocab_size": self._tensor("token_embd.weight").shape[0],
            "hidden_size": self._integer("embedding_length"),
            "layer_norm_epsilon": self._epsilon(),
            "tie_word_embeddings": "output.weight" not in self._file.tensors,
            "max_position_embeddings": self._integer("context_length"),
            "dtype": _DTYPES.get(self._tensor("token_embd.weight").type.name, "bfloat16"),
            "bos_token_id": self.token("bos"),
            "eos_token_id": [id_ for kind in ENDS if (id_ := self.token(kind)) is not None],
            "pad_token_id": self.token("padding"),
        }
        if "mamba" in kinds:
            data |= self._mamba(kinds.index("mamba"))
        if "attention" in kinds:
            data |= self._attention(kinds)
        if "moe" in kinds:
            data |= self._experts(kinds)
        if "mlp" in kinds:
            first = kinds.index("mlp")
            data["intermediate_size"] = self._of_kind("feed_forward_length", kinds, "mlp")
            data["mlp_bias"] = f"blk.{first}.ffn_up.bias" in self._file.tensors
        return ModelConfig.from_dict(data, str(self._file.path))

    def token(self, kind: str) -> int | None:
        """The id of a special token, if the file names one."""
        return self._read.optional_integer(f"tokenizer.ggml.{kind}_token_id", None)

    def _layers(self) -> list[str]:
        blocks = self._integer("block_count")
        if blocks > (most := len(self._file.tensors)):
            self._read.fail(self._key("block_count"), str(blocks), f"at most {most}, the tensors")
        extra = self._integer("nextn_predict_layers", 0, minimum=0)
        if extra >= blocks:
            self._read.fail(self._key("nextn_predict_layers"), str(extra), f"less than {blocks}")
        heads = self._each("attention.head_count_kv", blocks)
        widths = self._each("feed_forward_length", blocks)
        return [self._kind(n, heads[n], widths[n]) for n in range(blocks - extra)]

    def _kind(self, layer: int, heads: int, width: int) -> str:
        if width == 0:
            return "attention" if heads else "mamba"
        return "moe" if f"blk.{layer}.ffn_gate_inp.weight" in self._file.tensors else "mlp"

    def _mamba(self, first: int) -> dict[str, Any]:
        inner, heads = self._integer("ssm.inner_size"), self._integer("ssm.time_step_rank")
        if inner % heads:
            self._read.fail(
                self._key("ssm.inner_size"), str(inner), f"a multiple of the {heads} heads"
            )
        return {
            "mamba_num_heads": heads,
            "mamba_head_dim": inner // heads,
            "n_groups": self._integer("ssm.group_count"),
            "ssm_state_size": self._integer("ssm.state_size"),
            "conv_kernel": self._integer("ssm.conv_kernel", minimum=2),
            "use_conv_bias": f"blk.{first}.ssm_conv1d.bias" in self._file.tensors,
        }

    def _attention(self, kinds: list[str]) -> dict[str, Any]:
        width = self._integer("attention.key_length")
        if (other := self._integer("attention.value_length")) != width:
            self._read.fail(self._key("attention.value_length"), str(other), f"{width}, as of keys")
        first = kinds.index("attention")
        return {
            "num_attention_heads": self._of_kind("attention.head_count", kinds, "attention"),
            "num_key_value_heads": self._of_kind("attention.head_count_kv", kinds, "attention"),
            "head_dim": width,
            "attention_bias": f"blk.{first}.attn_q.bias" in self._file.tensors,
        }

    def _experts(self, kinds: list[str]) -> dict[str, Any]:
        groups = self._integer("expert_group_count", 1, minimum=0) or 1
        latent = self._integer("moe_latent_size", 0, minimum=0)
        return {
            "n_routed_experts": self._integer("expert_count"),
            "num_experts_per_tok": self._of_kind("expert_used_count", kinds, "moe"),
            "moe_intermediate_size": self._of_kind("expert_feed_forward_length", kinds, "moe"),
            "moe_shared_expert_intermediate_size": self._integer(
                "expert_shared_feed_forward_length"
            ),
            "n_shared_experts": self._integer("expert_shared_count", 1),
            "norm_topk_prob": self._read.flag(self._key("expert_weights_norm"), False),
            "routed_scaling_factor": self._float("expert_weights_scale", 1.0),
            "n_group": groups,
            "topk_group": self._integer("expert_group_used_count", groups, minimum=0) or groups,
            "moe_latent_size": latent or None,
        }

    def _epsilon(self) -> float:
        """That of RMS norms; older files name it otherwise."""
        name = "attention.layer_norm_rms_epsilon"
        other = "attention.layer_norm_epsilon"
        return self._float(name if self._key(name) in self._file.metadata else other)

    def _key(self, name: str) -> str:
        return f"{self._arch}.{name}"

    def _tensor(self, name: str) -> GgufTensor:
        if name not in self._file.tensors:
            raise NemocError(f"{self._file.path}: tensor '{name}': found nothing")
        return self._file.tensors[name]

    def _integer(self, name: str, default: int | None = None, minimum: int = 1) -> int:
        return self._read.integer(self._key(name), default, minimum)

    def _float(self, name: str, default: float | None = None) -> float:
        """A number in the fewest digits that are the same in float32, in which files hold it."""
        key = self._key(name)
        if default is None and key not in self._file.metadata:
            self._read.missing(key, "a positive number")
        found = self._read.number(key, 1.0 if default is None else default)
        return float(str(torch.tensor(found).numpy()))

    def _each(self, name: str, blocks: int) -> tuple[int, ...]:
        """A number for each block; files may give one for all."""
        key = self._key(name)
        found = self._file.metadata.get(key)
        if found is None:
            self._read.missing(key, f"{blocks} numbers")
        numbers = self._read.integers(key, ())
        if not isinstance(found, list):
            return numbers * blocks
        if len(numbers) < blocks:
            self._read.fail(key, f"{len(numbers)} numbers", f"{blocks}, one for each block")
        return numbers

    def _of_kind(self, name: str, kinds: list[str], kind: str) -> int:
        """A number that all layers of a kind share."""
        each = self._each(name, len(kinds))
        found = {each[layer] for layer, other in enumerate(kinds) if other == kind}
        if len(found) > 1:
            self._read.fail(
                self._key(name), f"{sorted(found)}", f"the same number for every {kind} layer"
            )
        return found.pop()
