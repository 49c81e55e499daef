"""Small checkpoints that say how they are quantized as releases do."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemoc.models import Model
from support.quantized import Kind, Layout, Tensors, edit_json, mixed, scheme, write_quantized

MLP = ("up_proj", "down_proj")
SHARED = ("shared_experts.up_proj", "shared_experts.down_proj")
MAMBA = ("in_proj", "out_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LATENT = ("fc1_latent_proj", "fc2_latent_proj")


def modules(layer: int, *names: str) -> list[str]:
    """Modules of a layer by their names in the mixer."""
    return [f"backbone.layers.{layer}.mixer.{name}" for name in names]


def expert_modules(*layers: int) -> list[str]:
    """Every expert's modules of those layers."""
    leaves = [f"experts.{n}.{name}" for n in range(7) for name in MLP]
    return [module for layer in layers for module in modules(layer, *leaves)]


def kinds_of(nvfp4: list[str], fp8: list[str]) -> dict[str, Kind]:
    """What is stored as what."""
    return {**dict.fromkeys(nvfp4, "nvfp4"), **dict.fromkeys(fp8, "fp8")}


@dataclass(frozen=True)
class Release:
    """A way to quantize the small model, whose layers are MEM*-ME, and how its files say so.

    Attributes:
        kinds: of quantized modules.
        section: `quantization_config` of its `config.json`.
        beside: what `hf_quant_config.json` says, if it comes with one.
        layout: of the tensors.
        changes: to the configuration.
    """

    kinds: dict[str, Kind]
    section: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, Any] | None = None
    layout: Layout = "modelopt"
    changes: dict[str, Any] = field(default_factory=dict)

    def write(self, directory: Path) -> Tensors:
        """Write the model; gives the numbers that it stands for, by name on disk."""
        dense = write_quantized(directory, self.kinds, self.layout, **self.changes)
        if self.section:
            edit_json(directory / "config.json", quantization_config=self.section)
        if self.beside is not None:
            producer = {"name": "modelopt", "version": "0.29.0"}
            edit_json(
                directory / "hf_quant_config.json", producer=producer, quantization=self.beside
            )
        return dense


# The Mamba layer before attention stays as it is, and so do attention, convolutions and head.
NANO = Release(
    kinds=kinds_of(
        [
            *modules(0, *MAMBA),
            *expert_modules(1, 6),
            *modules(1, *SHARED),
            *modules(4, *MLP),
            *modules(5, *MAMBA),
            *modules(6, *SHARED),
        ],
        [],
    ),
    beside={
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": "FP8",
        "group_size": 16,
        "exclude_modules": [
            "lm_head",
            *modules(2, *MAMBA),
            *modules(3, *ATTENTION),
            *(f"backbone.layers.{n}.mixer.conv1d" for n in (0, 2, 5)),
        ],
    },
    changes={"moe_latent_size": None},
)


SUPER_KINDS = kinds_of(
    [*expert_modules(1, 6), *modules(1, "shared_experts.down_proj")],
    [
        *modules(0, "in_proj"),
        *modules(1, "shared_experts.up_proj", "fc1_latent_proj"),
        *modules(3, "o_proj"),
        *modules(5, *MAMBA),
        *modules(6, *SHARED),
    ],
)


SUPER = Release(
    kinds=SUPER_KINDS,
    section={
        **mixed(SUPER_KINDS),
        "quant_method": "modelopt",
        "config_groups": {"group_0": {"targets": ["not read"]}},
        "ignore": [],
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
    },
    beside={**mixed(SUPER_KINDS), "kv_cache_quant_algo": "FP8"},
)


# By class, by expression and by name; the name is the most specific.
COMPRESSED = Release(
    kinds=kinds_of(
        [
            *expert_modules(1, 6),
            *modules(0, "out_proj"),
            *modules(1, *SHARED, *LATENT),
            *modules(4, *MLP),
            *modules(6, *SHARED, *LATENT),
        ],
        [*modules(0, "in_proj"), *modules(5, *MAMBA)],
    ),
    section={
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "mixed-precision",
        "config_groups": {
            "group_0": scheme("nvfp4", "Linear", "backbone.layers.0.mixer.out_proj"),
            "group_1": scheme("fp8", r"re:.*mixer\.(in|out)_proj$"),
        },
        "ignore": ["lm_head", *modules(2, *MAMBA), r"re:.*\.layers\.3\."],
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
        "sparsity_config": {},
        "transform_config": {},
    },
    layout="compressed-tensors",
)


RELEASES = {"nano": NANO, "super": SUPER, "compressed-tensors": COMPRESSED}


@dataclass(frozen=True)
class Written:
    """A release on disk; not to be changed."""

    release: Release
    directory: Path
    dense: Tensors
    model: Model
