"""Which weights NVIDIA's quantized releases store in which format: the map of a model's family, from its configuration.

| Release | NVFP4 | FP8 |
|---|---|---|
| Nano | experts, routed and shared; Mamba projections but those of a layer just before attention | |
| Lightning | experts, routed and shared; the head | Mamba projections |
| Super | routed experts, and one shared `down_proj` | what a search chose, by name |
| Ultra | routed experts | shared experts, Mamba projections |

Everything else stays as it is: attention, latent projections, convolutions, norms, embeddings, the router. Super's map
was chosen module by module (AutoQuantize) and holds for Super's layers alone; the others are rules, and hold for any
number of layers. Nano's is read from its `hf_quant_config.json`, Super's from `quantized_layers` in its `config.json`,
Ultra's from what its release notes say, Lightning's from ModelOpt's recipe and the size of the files.
"""

import re
from collections.abc import Callable, Mapping
from typing import TypeAlias

from nemoc.ir.errors import NemocError
from nemoc.models.config import ModelConfig
from nemoc.models.formats import Format, Fp8, Nvfp4
from nemoc.models.graph import build_step
from nemoc.models.names import module_of
from nemoc.models.presets import preset

_Rule: TypeAlias = Callable[[ModelConfig, int, str], Format | None]
"""The format of a layer's module, by the layer's number and the module's name within its mixer."""

_ROUTED = ("experts.up_proj", "experts.down_proj")
_SHARED = ("shared_experts.up_proj", "shared_experts.down_proj")
_MAMBA = ("in_proj", "out_proj")
_IN_LAYER = re.compile(r"layers\.(\d+)\.mixer\.(.+)")

_SUPER_FP8: Mapping[str, frozenset[int]] = {
    module: frozenset(map(int, layers.split()))
    for module, layers in {
        "in_proj": "0 2 4 6 9 11 13 15 18 20 27 29 31 40 49 51 53 55 57 60 62 66 68 71 73 82 84 86",
        "out_proj": "0 2 4 9 11 13 18 38 40 42 44 49 51 53 55 57 60 62 64 66 68 71 73 75 77 80 82 84 86",
        "shared_experts.up_proj": "1 3 5 8 10 12 14 17 19 21 23 26 28 30 32 34 37 39 43 45 48 50 52 54 56 59 61 63 "
        "65 67 70 72 74 76 79 81 83 85 87",
        "shared_experts.down_proj": "3 5 10 12 14 17 19 21 23 26 28 30 32 34 37 39 41 43 45 48 50 52 54 56 59 61 63 "
        "65 67 70 72 74 79 81 83 85 87",
        "fc1_latent_proj": "1 3 5",
        "fc2_latent_proj": "3",
        "o_proj": "69 78",
    }.items()
}
"""The layers whose module of a name is FP8 in Super."""


def released_formats(config: ModelConfig) -> dict[str, Format]:
    """The format of each quantized parameter in the release of a model's family; all others stay as they are.

    A model with experts in a latent space has Super's map if it has Super's layers, else Ultra's. One without has
    Lightning's if it has layers for multi-token prediction, else Nano's.

    Raises:
        NemocError: the model has no experts; no such model was released in these formats.
    """
    if "moe" not in config.layers:
        raise NemocError(
            f"as-released: found layers {config.pattern} without experts, expected a model like nano, lightning, "
            "super or ultra, whose maps are known"
        )
    rule = _rule(config)
    found: dict[str, Format] = {}
    for param in build_step(config).params:
        if match := _IN_LAYER.fullmatch(module_of(param.name)):
            stored = rule(config, int(match[1]), match[2])
        else:
            stored = _OUTSIDE.get(rule, {}).get(param.name)
        if stored is not None:
            found[param.name] = stored
    return found


def _rule(config: ModelConfig) -> _Rule:
    if config.moe_latent_size is not None:
        return _super if config.layers == preset("super").layers else _ultra
    return _lightning if config.mtp_layers else _nano


def _nano(config: ModelConfig, layer: int, module: str) -> Format | None:
    before_attention = config.layers[layer + 1 : layer + 2] == ("attention",)
    if module in (*_ROUTED, *_SHARED) or (module in _MAMBA and not before_attention):
        return Nvfp4()
    return None


def _lightning(config: ModelConfig, layer: int, module: str) -> Format | None:
    if module in (*_ROUTED, *_SHARED):
        return Nvfp4(activations=False)
    return Fp8() if module in _MAMBA else None


def _super(config: ModelConfig, layer: int, module: str) -> Format | None:
    if module in _ROUTED or (layer, module) == (1, "shared_experts.down_proj"):
        return Nvfp4()
    return Fp8() if layer in _SUPER_FP8.get(module, ()) else None


def _ultra(config: ModelConfig, layer: int, module: str) -> Format | None:
    if module in _ROUTED:
        return Nvfp4()
    return Fp8() if module in (*_SHARED, *_MAMBA) else None


_OUTSIDE: Mapping[_Rule, Mapping[str, Format]] = {
    _lightning: {"lm_head.weight": Nvfp4(activations=False)}
}
"""What a release quantizes outside its layers, by the parameter's name."""
