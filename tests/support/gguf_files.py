"""GGUF files as llama.cpp's converter writes them, by the `gguf` package; and damage to them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from nemoc.models import ModelConfig
from nemoc.models.reference import from_disk
from support.quantized import Tensors

Arrays = dict[str, np.ndarray[Any, Any]]

Source = tuple[ModelConfig, Tensors]
"""A model as a checkpoint holds it."""

SHAPES: dict[str, dict[str, Any]] = {
    "latent": {"hybrid_override_pattern": "MEM*ME"},
    "moe": {"hybrid_override_pattern": "ME*M", "moe_latent_size": None},
    "dense": {"hybrid_override_pattern": "M*-M"},
    "both": {"hybrid_override_pattern": "ME*-"},
}
"""Changes to `WIDE`."""


def arrays(tensors: Mapping[str, torch.Tensor], config: ModelConfig) -> Arrays:
    """A checkpoint's tensors under the names, and in the shapes, that the converter gives them; f32."""
    architecture = gguf.MODEL_ARCH.NEMOTRON_H_MOE
    names = gguf.get_tensor_name_map(architecture, len(config.layers))
    found: Arrays = {}
    for name, tensor in from_disk(tensors).items():
        array = tensor.float().numpy()
        leaf = name.rpartition(".")[2]
        if leaf == "A_log":
            array = -np.exp(array)
        if leaf in ("A_log", "D"):
            array = array[:, None]
        if name.endswith("conv1d.weight"):
            array = array[:, 0]
        if name.endswith("mixer.norm.weight"):
            array = array.reshape(config.n_groups, -1)
        found[_mapped(names, name)] = array
    return found


def _mapped(names: Any, name: str) -> str:
    """By the package's own map, which knows experts under another name."""
    stem = name.replace("dt_bias", "dt.bias").replace("mixer.experts.", "mlp.experts.")
    if ".mlp.experts." in stem:
        stem = stem.replace("backbone.", "model.") + ".weight"
    if stem.endswith("e_score_correction_bias"):
        stem = stem.replace("e_score_correction_bias", "e_score_correction.bias")
    found = names.get_name(stem, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return str(found)


def write_file(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    config: ModelConfig,
    *,
    types: Callable[[str], gguf.GGMLQuantizationType] = lambda name: gguf.GGMLQuantizationType.F32,
    change: Callable[[Arrays], object] = lambda arrays: None,
    metadata: Callable[[gguf.GGUFWriter], object] = lambda writer: None,
) -> Arrays:
    """Write a checkpoint's tensors as the converter does.

    Args:
        path: where to.
        tensors: by name on disk.
        config: the model.
        types: of each tensor by its new name; the package can quantize to those asked for.
        change: to the tensors before.
        metadata: adds to what is said of the model.

    Returns:
        The numbers that the file stands for, by name.
    """
    is_moe = "moe" in config.layers
    writer = gguf.GGUFWriter(path, "nemotron_h_moe" if is_moe else "nemotron_h")
    _say(writer, config)
    metadata(writer)
    found = arrays(tensors, config)
    change(found)
    for name, array in found.items():
        kind = types(name)
        if kind is gguf.GGMLQuantizationType.F16:
            array = array.astype(np.float16)
            writer.add_tensor(name, array)
            found[name] = array.astype(np.float32)
        else:
            data = gguf.quants.quantize(array, kind)
            writer.add_tensor(name, data, raw_dtype=kind)
            found[name] = gguf.quants.dequantize(data, kind).reshape(array.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def _say(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    layers = config.layers
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(layers))
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_state_size(config.ssm_state_size)
    writer.add_ssm_group_count(config.n_groups)
    writer.add_ssm_inner_size(config.mamba_inner_size)
    writer.add_ssm_time_step_rank(config.mamba_num_heads)
    writer.add_head_count(config.num_attention_heads)
    kv_heads = [config.num_key_value_heads if kind == "attention" else 0 for kind in layers]
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    widths = {"moe": config.moe_intermediate_size, "mlp": config.intermediate_size}
    writer.add_feed_forward_length([widths.get(kind, 0) for kind in layers])
    if "moe" in layers:
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        writer.add_expert_shared_feed_forward_length(config.moe_shared_expert_intermediate_size)
        writer.add_expert_count(config.n_routed_experts)
        writer.add_expert_shared_count(config.n_shared_experts)
        writer.add_expert_weights_norm(config.norm_topk_prob)
        writer.add_expert_weights_scale(config.routed_scaling_factor)
        writer.add_expert_group_count(config.n_group)
        if config.moe_latent_size is not None:
            writer.add_moe_latent_size(config.moe_latent_size)
