"""Checkpoints as they are released, and every way in which they can be wrong."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemoc.ir import NemocError
from nemoc.models import eager_reference, open_model, preset
from support.quantized import Kind, Tensors, edit_json, edit_tensors, mixed, scheme
from support.releases import COMPRESSED, SUPER_KINDS, expert_modules

pytestmark = pytest.mark.usefixtures("one_thread")


def _refusal(directory: Path) -> str:
    """The one-line error that opening a directory gives, without the directory's own name."""
    with pytest.raises(NemocError) as caught:
        open_model(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(directory), "DIR")


def test_scales_of_an_unquantized_cache_are_refused(copy: Callable[[str], Path]) -> None:
    directory, name = copy("nano"), "backbone.layers.3.mixer.k_proj.k_scale"
    edit_tensors(directory, lambda tensors: tensors.update({name: torch.ones(())}))
    path = directory / "hf_quant_config.json"
    quantization = json.loads(path.read_text())["quantization"]
    edit_json(path, quantization=quantization | {"kv_cache_quant_algo": None})
    assert _refusal(directory) == (
        f"DIR/model.safetensors: tensor '{name}': found F32 [], expected no such tensor"
    )


IN = "backbone.layers.0.mixer.in_proj"


UP_4 = "backbone.layers.1.mixer.experts.4.up_proj"


def _set(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


_EDITS: list[tuple[str, str, Callable[[Tensors], object], str]] = [
    (
        "block scales missing",
        "nano",
        lambda t: t.pop(f"{IN}.weight_scale"),
        f"DIR: tensor '{IN}.weight_scale': found nothing, expected shape [270, 3]",
    ),
    (
        "tensor scale of an expert missing",
        "nano",
        lambda t: t.pop(f"{UP_4}.weight_scale_2"),
        f"DIR: tensor '{UP_4}.weight_scale_2': found nothing, expected shape []",
    ),
    (
        "scale of FP8 missing",
        "super",
        lambda t: t.pop(f"{IN}.weight_scale"),
        f"DIR: tensor '{IN}.weight_scale': found nothing, expected shape []",
    ),
    (
        "divisor missing",
        "compressed-tensors",
        lambda t: t.pop(f"{UP_4}.weight_global_scale"),
        f"DIR: tensor '{UP_4}.weight_global_scale': found nothing, expected shape []",
    ),
    (
        "packed codes missing",
        "compressed-tensors",
        lambda t: t.pop(f"{UP_4}.weight_packed"),
        f"DIR: tensor '{UP_4}.weight_packed': found nothing, expected shape [32, 8]",
    ),
    (
        "scale of one expert's activations missing",
        "nano",
        lambda t: t.pop(f"{UP_4}.input_scale"),
        f"DIR: tensor '{UP_4}.input_scale': found nothing, expected shape []",
    ),
    (
        "codes cut short",
        "nano",
        _set(f"{IN}.weight", lambda codes: codes[:, :16]),
        f"DIR/model.safetensors: tensor '{IN}.weight': found shape [270, 16], expected [270, 24]",
    ),
    (
        "codes of one expert cut short",
        "compressed-tensors",
        _set(f"{UP_4}.weight_packed", lambda codes: codes[:-1]),
        f"DIR/model.safetensors: tensor '{UP_4}.weight_packed': found shape [31, 8], "
        "expected [32, 8]",
    ),
    (
        "a scale per row of FP8",
        "super",
        _set(f"{IN}.weight_scale", lambda scale: scale.expand(270, 1)),
        f"DIR/model.safetensors: tensor '{IN}.weight_scale': found shape [270, 1], expected []",
    ),
    (
        "codes of another type",
        "nano",
        _set(f"{IN}.weight", lambda codes: codes.to(torch.int8)),
        f"DIR/model.safetensors: tensor '{IN}.weight': found type I8, expected U8",
    ),
    (
        "not quantized after all",
        "nano",
        _set(f"{UP_4}.weight", lambda codes: torch.ones(32, 48, dtype=torch.bfloat16)),
        f"DIR/model.safetensors: tensor '{UP_4}.weight': found type BF16, expected U8",
    ),
    (
        "block scales of another type",
        "nano",
        _set(f"{IN}.weight_scale", lambda scales: scales.to(torch.float8_e5m2)),
        f"DIR/model.safetensors: tensor '{IN}.weight_scale': found type F8_E5M2, expected F8_E4M3",
    ),
    (
        "tensor scale of another type",
        "nano",
        _set(f"{IN}.weight_scale_2", lambda scale: scale.bfloat16()),
        f"DIR/model.safetensors: tensor '{IN}.weight_scale_2': found type BF16, expected F32",
    ),
    (
        "FP8 of another kind",
        "super",
        _set(f"{IN}.weight", lambda codes: codes.to(torch.float8_e5m2)),
        f"DIR/model.safetensors: tensor '{IN}.weight': found type F8_E5M2, expected F8_E4M3",
    ),
    (
        "quantized without being listed",
        "super",
        _set("lm_head.weight", lambda weight: weight.to(torch.uint8)),
        "DIR/model.safetensors: tensor 'lm_head.weight': found type U8, expected F32, BF16, F16",
    ),
    (
        "scales without being listed",
        "super",
        lambda t: t.update({"lm_head.weight_scale": torch.ones(())}),
        "DIR/model.safetensors: tensor 'lm_head.weight_scale': found F32 [], "
        "expected no such tensor",
    ),
    (
        "codes twice",
        "compressed-tensors",
        lambda t: t.update({f"{UP_4}.weight": t[f"{UP_4}.weight_packed"].clone()}),
        "the same weights as",
    ),
]


@pytest.mark.parametrize(
    ("release", "change", "expected"),
    [e[1:] for e in _EDITS],
    ids=[e[0].replace(" ", "-") for e in _EDITS],
)
def test_tensors_that_do_not_fit_their_format_are_refused(
    copy: Callable[[str], Path], release: str, change: Callable[[Tensors], object], expected: str
) -> None:
    directory = copy(release)
    edit_tensors(directory, change)
    assert expected in _refusal(directory)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize(
    ("release", "name"),
    [
        ("nano", f"{UP_4}.weight_scale"),
        ("super", f"{IN}.weight"),
        ("compressed-tensors", f"{UP_4}.weight_scale"),
    ],
)
def test_numbers_that_are_none_are_refused_by_name_when_read(
    copy: Callable[[str], Path], release: str, name: str, code: int
) -> None:
    def damage(tensors: Tensors) -> None:
        tensors[name].view(torch.uint8)[5, -1] = code

    directory = copy(release)
    edit_tensors(directory, damage)
    model = open_model(directory)
    expected = f"model.safetensors: tensor '{name}': found NaN, expected finite weights"
    with pytest.raises(NemocError, match=re.escape(expected)):
        eager_reference(model)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_tensor_scales_that_are_not_finite_are_refused_when_read(
    copy: Callable[[str], Path], bad: float
) -> None:
    directory, name = copy("nano"), f"{UP_4}.weight_scale_2"
    edit_tensors(directory, _set(name, lambda scale: torch.full_like(scale, bad)))
    source = open_model(directory).parameters
    assert source is not None
    source.read("layers.1.mixer.experts.up_proj.weight_scale_2", 0, 4)
    with pytest.raises(NemocError, match=re.escape(f"tensor '{name}': found ")):
        source.read("layers.1.mixer.experts.up_proj.weight_scale_2")


@pytest.mark.parametrize(
    ("release", "leaf", "bad", "said"),
    [
        ("nano", "weight_scale_2", -1.0, "found -1, expected scales of 0 or more"),
        ("compressed-tensors", "weight_global_scale", 0.0, "found 0, expected a positive divisor"),
        ("compressed-tensors", "weight_global_scale", -2.0, "found -2, expected a positive"),
        ("compressed-tensors", "weight_global_scale", 1e-45, "found 1.4013e-45, expected a pos"),
    ],
)
def test_tensor_scales_that_make_no_numbers_are_refused_when_read(
    copy: Callable[[str], Path], release: str, leaf: str, bad: float, said: str
) -> None:
    directory, name = copy(release), f"{UP_4}.{leaf}"
    edit_tensors(directory, _set(name, lambda scale: torch.full_like(scale, bad)))
    source = open_model(directory).parameters
    assert source is not None
    with pytest.raises(NemocError, match=re.escape(f"tensor '{name}': {said}")):
        source.read(f"layers.1.mixer.experts.up_proj.{leaf}")


def _listed(**layers: object) -> dict[str, Any]:
    return {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}


_MAPS: list[tuple[str, object, str]] = [
    (
        "unknown algorithm",
        {"quant_algo": "NVFP4_AWQ"},
        "quant_algo: found 'NVFP4_AWQ', expected one of NVFP4, W4A16_NVFP4, FP8, MIXED_PRECISION",
    ),
    (
        "unknown algorithm of a module",
        _listed(**{IN: {"quant_algo": "W4A16_AWQ", "group_size": 128}}),
        f"quantized_layers: {IN}: quant_algo: found 'W4A16_AWQ', "
        "expected one of NVFP4, W4A16_NVFP4, FP8",
    ),
    (
        "wrong block",
        {"quant_algo": "NVFP4", "group_size": 32},
        "group_size: found 32, expected 16",
    ),
    (
        "wrong block of a module",
        _listed(**{IN: {"quant_algo": "NVFP4", "group_size": 64}}),
        f"quantized_layers: {IN}: group_size: found 64, expected 16",
    ),
    (
        "a module that is none",
        _listed(**{"backbone.layers.9.mixer.in_proj": {"quant_algo": "FP8"}}),
        "quantized_layers: found 'backbone.layers.9.mixer.in_proj', expected a module of the model",
    ),
    (
        "an expert that is none",
        _listed(**{UP_4.replace(".4.", ".7."): {"quant_algo": "NVFP4"}}),
        f"quantized_layers: found '{UP_4.replace('.4.', '.7.')}', expected a module of the model",
    ),
    (
        "an exclusion that is none",
        {"quant_algo": "NVFP4", "exclude_modules": ["backbone.layers.0.mixer.q_proj"]},
        "exclude_modules: found 'backbone.layers.0.mixer.q_proj', expected a module of the model",
    ),
    (
        "formats within a stack",
        _listed(
            **{name: {"quant_algo": "NVFP4"} for name in expert_modules(1) if name != UP_4},
            **{UP_4: {"quant_algo": "FP8"}},
        ),
        "quantized_layers: found FP8 for 'layers.1.mixer.experts.4.up_proj', "
        "expected NVFP4 as for 'layers.1.mixer.experts.0.up_proj'",
    ),
    (
        "an expert left out",
        {"quant_algo": "NVFP4", "exclude_modules": [UP_4]},
        "quant_algo: found no format for 'layers.1.mixer.experts.4.up_proj', "
        "expected NVFP4 as for 'layers.1.mixer.experts.0.up_proj'",
    ),
    (
        "no list of modules",
        {"quant_algo": "MIXED_PRECISION"},
        "quantized_layers: found nothing, expected the algorithm of each quantized module",
    ),
    (
        "a module without an algorithm",
        _listed(**{IN: {}}),
        f"quantized_layers: {IN}: found nothing, expected an object",
    ),
    (
        "unknown cache",
        {"quant_algo": "NVFP4", "kv_cache_quant_algo": "INT8"},
        "kv_cache_quant_algo: found 'INT8', expected 'FP8' or null",
    ),
    ("no object", 3, "quantization: found 3, expected an object"),
    ("no names", {"quant_algo": "FP8", "exclude_modules": 3}, "exclude_modules: found 3"),
]


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [m[1:] for m in _MAPS],
    ids=[m[0].replace(" ", "-") for m in _MAPS],
)
def test_maps_of_modelopt_that_cannot_be_read_are_refused(
    copy: Callable[[str], Path], quantization: object, expected: str
) -> None:
    directory = copy("nano")
    edit_json(directory / "hf_quant_config.json", quantization=quantization)
    message = _refusal(directory)
    assert message.startswith("DIR/hf_quant_config.json: quantization")
    assert expected in message


def _group(kind: Kind, *targets: str, **weights: Any) -> dict[str, Any]:
    return {"config_groups": {"g": scheme(kind, *targets, **weights)}}


_SECTIONS: list[tuple[str, dict[str, Any], str]] = [
    (
        "unknown library",
        {"quant_method": "gptq"},
        "quant_method: found 'gptq', expected 'modelopt' or 'compressed-tensors'",
    ),
    (
        "no library",
        {"quant_method": None},
        "quant_method: found nothing, expected 'modelopt' or 'compressed-tensors'",
    ),
    (
        "not compressed",
        {"quantization_status": "frozen"},
        "quantization_status: found 'frozen', expected 'compressed'",
    ),
    (
        "rotated weights",
        {"transform_config": {"config_groups": {"R1": {}}}},
        "transform_config: found an object with settings, expected none",
    ),
    (
        "wrong block",
        _group("nvfp4", "Linear", group_size=32),
        "config_groups: g: weights: group_size: found 32, expected 16",
    ),
    (
        "a scale per row",
        _group("fp8", "Linear", strategy="channel"),
        "config_groups: g: weights: strategy: found 'channel', expected 'tensor'",
    ),
    (
        "integers",
        {
            "config_groups": {
                "g": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int"}}
            }
        },
        "config_groups: g: weights: num_bits: found 8-bit int, expected 4-bit float or 8-bit float",
    ),
    (
        "other activations",
        {
            "config_groups": {
                "g": scheme("nvfp4", "Linear") | {"input_activations": {"num_bits": 8}}
            }
        },
        "config_groups: g: input_activations: num_bits: found 8-bit int, "
        "expected 4-bit float as for the weights",
    ),
    (
        "another packing",
        {"config_groups": {"g": scheme("nvfp4", "Linear") | {"format": "pack-quantized"}}},
        "config_groups: g: format: found 'pack-quantized', "
        "expected nvfp4-pack-quantized or mixed-precision for 4-bit float",
    ),
    (
        "a target that is none",
        _group("nvfp4", "Linear", "backbone.layers.0.mixer.gate"),
        "config_groups: found 'backbone.layers.0.mixer.gate', expected a module of the model",
    ),
    (
        "no regular expression",
        _group("nvfp4", "re:.*(up"),
        "config_groups: found 're:.*(up', expected a regular expression (missing ), ",
    ),
    (
        "an expression with a number that is too large",
        {"ignore": ["re:a{99999999999}"]},
        "expected a regular expression (the repetition number is too large)",
    ),
    (
        "formats within a stack",
        _group("nvfp4", r"re:.*experts\.[0-3]\."),
        "config_groups: found no format for 'layers.1.mixer.experts.4.up_proj', "
        "expected NVFP4 (compressed-tensors) as for 'layers.1.mixer.experts.0.up_proj'",
    ),
    (
        "a scheme by name",
        {"config_groups": {"NVFP4": ["Linear"]}},
        "config_groups: NVFP4: found ['Linear'], expected an object",
    ),
    (
        "unknown cache",
        {"kv_cache_scheme": {"num_bits": 8, "type": "int"}},
        "kv_cache_scheme: num_bits: found 8-bit int, expected 8-bit float",
    ),
]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [m[1:] for m in _SECTIONS],
    ids=[m[0].replace(" ", "-") for m in _SECTIONS],
)
def test_maps_of_compressed_tensors_that_cannot_be_read_are_refused(
    copy: Callable[[str], Path], changes: dict[str, Any], expected: str
) -> None:
    directory = copy("compressed-tensors")
    section = COMPRESSED.section | changes
    edit_json(directory / "config.json", quantization_config=section)
    message = _refusal(directory)
    assert message.startswith("DIR/config.json: quantization_config: ")
    assert expected in message


def test_files_that_contradict_each_other_are_refused(copy: Callable[[str], Path]) -> None:
    directory = copy("super")
    one_less = {name: kind for name, kind in SUPER_KINDS.items() if name != IN}
    edit_json(directory / "hf_quant_config.json", quantization=mixed(one_less))
    assert _refusal(directory) == (
        "DIR/config.json: quantization_config: found FP8 for layers.0.mixer.in_proj.weight, "
        "expected no format as in hf_quant_config.json"
    )
    edit_json(directory / "hf_quant_config.json", quantization=mixed(SUPER_KINDS))
    assert _refusal(directory) == (
        "DIR/config.json: quantization_config: found fp8 for the cache, "
        "expected None as in hf_quant_config.json"
    )


def test_a_map_that_is_not_json_is_refused(copy: Callable[[str], Path]) -> None:
    directory = copy("nano")
    (directory / "hf_quant_config.json").write_text("{")
    assert _refusal(directory).startswith("DIR/hf_quant_config.json: is not JSON: ")


def test_widths_that_are_no_blocks_are_refused_by_name(tmp_path: Path) -> None:
    edit_json(
        tmp_path / "config.json",
        **preset("nano").to_dict() | {"moe_intermediate_size": 1848},
        quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4"},
    )
    with pytest.raises(NemocError) as caught:
        open_model(tmp_path / "config.json").build_step()
    assert str(caught.value) == (
        "layers.1.mixer.experts.down_proj: found 1848 columns, expected a multiple of 16 for NVFP4"
    )
