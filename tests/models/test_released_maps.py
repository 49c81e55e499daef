"""The per-module maps of NVIDIA's releases, from configurations alone."""

import re
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

from nemoc.ir import NemocError
from nemoc.ir.scopes import read_scope, scope_of
from nemoc.models import Format, Fp8, ModelConfig, Nvfp4, build_step, preset, read_quantization
from nemoc.models.names import is_stack, module_of
from nemoc.models.released_maps import released_formats
from nemoc.models.sample import CHECKPOINT
from support.quantized import edit_json

NANO_EXCLUDED = ["lm_head"] + [
    f"backbone.layers.{n}.mixer.{name}"
    for layers, names in (
        ((4, 11, 18, 25, 32, 41), ("in_proj", "out_proj")),
        ((5, 12, 19, 26, 33, 42), ("q_proj", "k_proj", "v_proj", "o_proj")),
    )
    for n in layers
    for name in names
]
"""What Nano's `hf_quant_config.json` excludes, but for the convolutions."""


@cache
def formats(name: str) -> Mapping[str, Format]:
    return released_formats(preset(name))


def modules(name: str, kind: type) -> Counter[str]:
    """How many modules of a preset have a format on disk, by what they are within their layers."""
    found: Counter[str] = Counter()
    for parameter, stored in formats(name).items():
        if isinstance(stored, kind):
            leaf = re.sub(r"layers\.\d+\.mixer\.", "", module_of(parameter))
            found[leaf] += preset(name).n_routed_experts if is_stack(parameter) else 1
    return found


def test_nano_has_the_map_of_its_release(tmp_path: Path) -> None:
    config = preset("nano")
    edit_json(tmp_path / "config.json", **config.to_dict())
    said = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": NANO_EXCLUDED}
    edit_json(tmp_path / "hf_quant_config.json", quantization=said)
    expected = read_quantization(tmp_path / "config.json", config).formats
    assert formats("nano") == expected
    assert sum(modules("nano", Nvfp4).values()) == 5968
    assert not modules("nano", Fp8)


def test_super_has_the_counts_of_its_release() -> None:
    nvfp4, fp8 = modules("super", Nvfp4), modules("super", Fp8)
    assert nvfp4 == {
        "experts.up_proj": 20_480,
        "experts.down_proj": 20_480,
        "shared_experts.down_proj": 1,
    }
    assert fp8 == {
        "in_proj": 28,
        "out_proj": 29,
        "shared_experts.up_proj": 39,
        "shared_experts.down_proj": 37,
        "fc1_latent_proj": 3,
        "fc2_latent_proj": 1,
        "o_proj": 2,
    }
    assert sum(nvfp4.values()) + sum(fp8.values()) == 41_100


def test_ultra_and_lightning_have_the_rules_of_theirs() -> None:
    assert modules("ultra", Nvfp4) == {"experts.up_proj": 48 * 512, "experts.down_proj": 48 * 512}
    assert modules("ultra", Fp8) == dict.fromkeys(
        ("in_proj", "out_proj", "shared_experts.up_proj", "shared_experts.down_proj"), 48
    )
    assert modules("lightning", Nvfp4)["lm_head"] == 1
    assert modules("lightning", Fp8) == {"in_proj": 23, "out_proj": 23}


def test_a_model_without_a_latent_space_has_nanos_rule() -> None:
    config = ModelConfig.from_file(CHECKPOINT)
    assert config.pattern == "MEM*EMM*E"
    found = released_formats(config)
    mamba = [n for n in found if n.endswith(("in_proj.weight", "out_proj.weight"))]
    assert mamba == [f"layers.{n}.mixer.{x}_proj.weight" for n in (0, 5) for x in ("in", "out")]
    assert len(found) == len(mamba) + 3 * 4


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(NemocError, match=r"^as-released: found layers M-M-\S+ without experts"):
        released_formats(preset("nano-9b-v2"))


def test_a_scope_of_names_means_them_and_no_others() -> None:
    step = build_step(preset("super"))
    params = [p.name for p in step.params]
    assert {p.type.rank for p in step.params if p.name in formats("super")} == {2, 3}
    for names in (list(formats("super")), params[5:9], ["lm_head.weight"]):
        pattern = read_scope(scope_of(names))
        assert [p for p in params if pattern.match(p)] == [p for p in params if p in names]


def test_a_scope_of_names_is_short() -> None:
    names = [f"layers.{n}.mixer.in_proj.weight" for n in (0, 12)] + ["lm_head.weight"]
    assert scope_of(names) == r"layers\.(0|12)\.mixer\.in_proj\.weight$|lm_head\.weight$"
