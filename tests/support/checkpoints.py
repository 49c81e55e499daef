"""Small checkpoints with unusual values, made and written by transformers."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import NemotronHConfig, NemotronHForCausalLM

from nemoc.models import ModelConfig, build_step

BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 40,
    "hybrid_override_pattern": "ME*M-",
    "mamba_num_heads": 6,
    "mamba_head_dim": 10,
    "n_groups": 3,
    "ssm_state_size": 12,
    "conv_kernel": 4,
    "chunk_size": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 14,
    "intermediate_size": 52,
    "n_routed_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 18,
    "moe_shared_expert_intermediate_size": 30,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
}
"""All four mixers, and no width that is a multiple of 16."""

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "latent experts": {"moe_latent_size": 22},
    "grouped routing": {"n_routed_experts": 12, "n_group": 4, "topk_group": 2},
    "one group of B and C": {"n_groups": 1},
    "a group for each head": {"n_groups": 6},
    "two taps": {"conv_kernel": 2},
    "seven taps without bias": {"conv_kernel": 7, "use_conv_bias": False},
    "silu experts": {"mlp_hidden_act": "silu", "mamba_hidden_act": "gelu"},
    "gelu experts": {"mlp_hidden_act": "gelu", "moe_latent_size": 22},
    "tanh gelu and relu": {"mlp_hidden_act": "gelu_pytorch_tanh", "mamba_hidden_act": "relu"},
    "biases": {"use_bias": True, "mlp_bias": True, "moe_latent_size": 22},
    "raw weights of all experts": {"norm_topk_prob": False, "num_experts_per_tok": 7},
    "large epsilon": {"layer_norm_epsilon": 0.1, "chunk_size": 3},
    "attention only": {"hybrid_override_pattern": "*"},
}
"""Changes to `BASE`, by what they are about."""


def unusual_model(seed: int = 0, **changes: Any) -> NemotronHForCausalLM:
    """A model of `BASE` with changes, in float32, whose values differ from an initialised one's.

    dt_bias lies in −9 to 1, and dt is not clamped (transformers' prefill would, its decode would not).
    """
    config = NemotronHConfig(**{**BASE, **changes})
    config._experts_implementation = "eager"
    model = NemotronHForCausalLM(config).eval().float()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            _fill(name, value, random)
    for layer in model.model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (0.0, math.inf)
    return model


def _fill(name: str, value: torch.Tensor, random: torch.Generator) -> None:
    leaf = name.rpartition(".")[2]
    if leaf == "dt_bias":
        value.uniform_(-9, 1, generator=random)
    elif leaf == "A_log":
        value.uniform_(-2, 3, generator=random)
    elif leaf == "e_score_correction_bias":
        value.normal_(0, 0.2, generator=random)
    elif "norm" in name.split(".")[-2]:
        value.uniform_(-0.5, 2, generator=random)
    elif leaf in ("D", "bias"):
        value.normal_(0, 0.5, generator=random)
    elif "embeddings" in name:
        value.normal_(0, 1, generator=random)
    else:
        value.normal_(0, 1.5 * value.shape[-1] ** -0.5, generator=random)


def write_checkpoint(
    directory: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard: str = "1GB",
    **changes: Any,
) -> NemotronHForCausalLM:
    """Write an unusual model as transformers does; returns it with the values as stored, in float32.

    Args:
        directory: where to.
        seed: of the values.
        dtype: of the stored weights (the correction bias stays float32).
        shard: the largest file, as `save_pretrained` spells it.
        changes: to `BASE`.
    """
    model = unusual_model(seed, **changes)
    model.config.dtype = dtype
    model.to(dtype).save_pretrained(directory, max_shard_size=shard)
    return model.float()


def write_zeros(directory: Path, config: ModelConfig) -> None:
    """A checkpoint of zeros, of any size: the file is sparse and takes no room on disk.

    Experts are stored one by one, in the type that the configuration names.
    """
    header: dict[str, Any] = {}
    end = 0
    for param in build_step(config).params:
        stem, _, projection = param.name.rpartition(".")
        name = param.name if param.name.startswith("lm_head.") else f"backbone.{param.name}"
        shape = [int(n) for n in param.shape]
        names = [name]
        if stem.endswith(".experts"):
            names = [f"backbone.{stem}.{i}.{projection}.weight" for i in range(shape[0])]
            shape = shape[1:]
        size = math.prod(shape) * param.dtype.bytes
        for each in names:
            dtype = param.dtype.value.upper()
            header[each] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            end += size
    text = json.dumps(header).encode()
    (directory / "config.json").write_text(json.dumps(config.to_dict()))
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
