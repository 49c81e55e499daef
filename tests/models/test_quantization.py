"""Checkpoints as they are released: maps of formats, codes and scales."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemoc.ir import DType
from nemoc.ir.ops import DequantizeNvfp4, GroupedLinear, Linear
from nemoc.models import (
    Fp8,
    ModelConfig,
    Nvfp4,
    Quantization,
    eager_reference,
    open_model,
    preset,
    read_quantization,
    summarize,
)
from nemoc.models.reference import NemotronH, from_disk
from support.quantized import Kind, edit_json, edit_tensors, mixed, write_headers
from support.releases import (
    ATTENTION,
    MAMBA,
    MLP,
    NANO,
    SHARED,
    SUPER_KINDS,
    Release,
    Written,
    kinds_of,
    modules,
)
from support.stepping import Stepper, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")


def _tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(0))


def test_formats_are_those_of_each_module(written: Written) -> None:
    found = written.model.quantization
    layout = written.release.layout
    expected = {}
    for module, kind in written.release.kinds.items():
        name = re.sub(r"\.experts\.\d\.(\w+)", r".experts.\1", module.removeprefix("backbone."))
        name += "" if ".experts." in name else ".weight"
        expected[name] = Nvfp4(layout) if kind == "nvfp4" else Fp8()
    assert found == Quantization(expected, "fp8")


def test_weights_have_the_bits_that_they_stand_for(written: Written) -> None:
    module = eager_reference(written.model)
    expected = from_disk(written.dense)
    assert module.state_dict().keys() == expected.keys()
    for name, weight in module.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_the_graph_means_the_model_with_those_weights(written: Written) -> None:
    tokens = _tokens(2, 13)
    reference = NemotronH(written.model.config).eval()
    reference.load_state_dict(from_disk(written.dense))
    found = Stepper(written.model, 2, 16)(tokens)
    assert relative_error(found, reference(tokens)) < 1e-6
    exact = Stepper(written.model, 2, 16, float64=True)(tokens)
    assert relative_error(exact, eager_reference(written.model, torch.float64)(tokens)) < 1e-12


def test_the_graph_takes_steps_with_those_weights(written: Written) -> None:
    tokens = _tokens(1, 12)
    step = Stepper(written.model, 1, 16)
    pieces = [step(tokens[:, :7]), *(step(tokens[:, n : n + 1]) for n in range(7, 12))]
    expected = eager_reference(written.model)(tokens)
    assert relative_error(torch.cat(pieces, 1), expected) < 1e-6


def test_what_weights_decode_to_is_not_rounded_to_the_compute_type(written: Written) -> None:
    graph = written.model.build_step(dtype=DType.BF16, logits="all")
    found = Stepper(written.model, 1, 16, graph=graph, float64=True)(_tokens(1, 9))
    expected = eager_reference(written.model, torch.float64)(_tokens(1, 9))
    assert relative_error(found, expected) < 1e-12  # float64 evaluation rounds nothing
    products = [node.op for node in graph.nodes if isinstance(node.op, Linear | GroupedLinear)]
    decoded = [op.w for op in products if op.w not in graph.params]
    assert {w.dtype for w in decoded} == {DType.F32}
    assert len(decoded) == len(written.model.quantization.formats)
    assert {op.w.dtype for op in products if op.w in graph.params} <= {DType.BF16}


def test_parameters_are_what_the_files_hold(written: Written) -> None:
    stored = load_file(written.directory / "model.safetensors")
    source, layout = written.model.parameters, written.release.layout
    assert source is not None
    stem = "layers.1.mixer.experts.up_proj"
    codes, last = (
        ("weight", "weight_scale_2")
        if layout == "modelopt"
        else ("weight_packed", "weight_global_scale")
    )
    params = {p.name: str(p.type) for p in written.model.build_step().params}
    width = 48 if written.release is NANO else 16
    assert params[stem] == f"u8[7, 32, {width // 2}]"
    assert params[f"{stem}.weight_scale"] == f"f8e4m3[7, 32, {width // 16}]"
    assert params[f"{stem}.{last}"] == "f32[7]"
    for name, leaf in ((stem, codes), (f"{stem}.weight_scale", "weight_scale")):
        parts = [stored[f"backbone.layers.1.mixer.experts.{n}.up_proj.{leaf}"] for n in range(7)]
        assert _same_bytes(source.read(name), torch.stack(parts))
        assert _same_bytes(source.read(name, 2, 5), torch.stack(parts[2:5]))
    scales = [stored[f"backbone.layers.1.mixer.experts.{n}.up_proj.{last}"] for n in range(7)]
    assert torch.equal(source.read(f"{stem}.{last}", 3, 6), torch.stack(scales[3:6]).reshape(3))


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_scales_of_one_matrix_are_scalars(releases: dict[str, Written]) -> None:
    expected = {"super": "f32[]", "compressed-tensors": "bf16[]"}
    for name, type_ in expected.items():
        source = releases[name].model.parameters
        assert source is not None
        scale = "layers.0.mixer.in_proj.weight_scale"
        assert str(source.type_of(scale)) == type_
        assert source.read(scale).shape == ()


def test_parameters_are_counted_by_what_they_stand_for(written: Written) -> None:
    model = written.model
    found = summarize(model.config, DType.F32, model.weight_types, model.quantization.formats)
    plain = summarize(model.config)
    assert (found.parameters, found.active_parameters) == (
        plain.parameters,
        plain.active_parameters,
    )
    tensors = load_file(written.directory / "model.safetensors")
    weights = [t for name, t in tensors.items() if ".input_" not in name]
    assert found.weight_bytes == sum(t.numel() * t.element_size() for t in weights)


def test_scales_of_activations_are_kept_for_later(written: Written) -> None:
    model, source = written.model, written.model.parameters
    assert source is not None
    stored = load_file(written.directory / "model.safetensors")
    names = [name for name in stored if ".input_" in name]
    leaf = "input_scale" if written.release.layout == "modelopt" else "input_global_scale"
    stack = f"layers.6.mixer.experts.down_proj.{leaf}"
    assert stack in model.scales
    assert len(model.scales) == len(model.quantization.formats)
    parts = [stored[f"backbone.layers.6.mixer.experts.{n}.down_proj.{leaf}"] for n in range(7)]
    assert torch.equal(source.read(stack), torch.stack(parts).reshape(7))
    assert len(names) == len(written.release.kinds)
    assert not {p.name for p in model.build_step().params} & set(model.scales)


@pytest.mark.parametrize(
    ("release", "stem"),
    [("super", "backbone.layers.3.mixer.{}_proj"), ("compressed-tensors", "model.layers.3.mixer")],
)
def test_scales_of_the_cache_may_be_there(
    copy: Callable[[str], Path], release: str, stem: str
) -> None:
    directory = copy(release)
    scales = {f"{stem.format(x)}.{x}_scale": torch.tensor([0.5]) for x in "kv"}
    edit_tensors(directory, lambda tensors: tensors.update(scales))
    model = open_model(directory)
    assert model.scales[-2:] == (
        "layers.3.mixer.k_proj.k_scale",
        "layers.3.mixer.v_proj.v_scale",
    )
    assert model.parameters is not None
    assert model.parameters.read("layers.3.mixer.k_proj.k_scale").item() == 0.5


def test_a_configuration_alone_has_the_graph_of_the_release(written: Written) -> None:
    model = open_model(written.directory / "config.json")
    assert model.parameters is None
    assert model.quantization == written.model.quantization
    kinds = {p.name: p.type.shape for p in model.build_step().params}
    assert kinds == {p.name: p.type.shape for p in written.model.build_step().params}


def test_wildcards_and_modules_around_others_exclude(copy: Callable[[str], Path]) -> None:
    directory = copy("nano")
    path = directory / "hf_quant_config.json"
    quantization = json.loads(path.read_text())["quantization"]
    excluded = ["lm_head*", "backbone.layers.2.mixer", "model.layers.3.*", "mtp*", "mtp.layers.0"]
    edit_json(path, quantization=quantization | {"exclude_modules": excluded})
    config = ModelConfig.from_file(directory)
    found = read_quantization(directory / "config.json", config)
    assert found == open_model(directory).quantization
    assert "layers.2.mixer.in_proj.weight" not in found.formats


def test_a_module_may_stand_for_all_experts_inside(copy: Callable[[str], Path]) -> None:
    directory = copy("super")
    rest = {name: kind for name, kind in SUPER_KINDS.items() if ".experts." not in name}
    experts: dict[str, Kind] = {f"backbone.layers.{n}.mixer.experts": "nvfp4" for n in (1, 6)}
    edit_json(directory / "hf_quant_config.json", quantization=mixed({**rest, **experts}))
    edit_json(directory / "config.json", quantization_config=None)
    model = open_model(directory)
    assert model.quantization.kv_cache is None
    assert len(model.quantization.formats) == 4 + len(rest)


def test_embeddings_and_head_may_be_quantized(tmp_path: Path) -> None:
    kinds: dict[str, Kind] = {"lm_head": "nvfp4", "backbone.embeddings": "nvfp4"}
    release = Release(kinds, beside=mixed(kinds), changes={"hybrid_override_pattern": "M"})
    dense = release.write(tmp_path)
    model = open_model(tmp_path)
    assert model.quantization.formats.keys() == {"lm_head.weight", "embeddings.weight"}
    reference = NemotronH(model.config).eval()
    reference.load_state_dict(from_disk(dense))
    tokens = _tokens(2, 5)
    assert relative_error(Stepper(model, 2, 8)(tokens), reference(tokens)) < 1e-6


def test_weights_alone_have_no_scales_of_activations(tmp_path: Path) -> None:
    kinds: dict[str, Kind] = dict.fromkeys(modules(0, *MAMBA), "nvfp4")
    beside = {"quant_algo": "W4A16_NVFP4", "exclude_modules": ["lm_head"]}
    Release(kinds, beside=beside, changes={"hybrid_override_pattern": "M"}).write(tmp_path)
    edit_tensors(
        tmp_path, lambda t: [t.pop(f"{module}.input_scale") for module in modules(0, *MAMBA)]
    )
    model = open_model(tmp_path)
    assert model.scales == ()
    assert set(model.quantization.formats.values()) == {Nvfp4("modelopt", activations=False)}
    graph = model.build_step()
    assert sum(isinstance(node.op, DequantizeNvfp4) for node in graph.nodes) == 2


def test_what_a_converter_to_compressed_tensors_left_behind_does_not_count(
    copy: Callable[[str], Path],
) -> None:
    directory = copy("compressed-tensors")
    expected = open_model(directory).quantization
    edit_json(directory / "hf_quant_config.json", quantization={"quant_algo": "NVFP4"})
    assert open_model(directory).quantization == expected


NANO_EXCLUDED = [
    "lm_head",
    *(m for n in (4, 11, 18, 25, 32, 41) for m in modules(n, *MAMBA)),
    *(m for n in (5, 12, 19, 26, 33, 42) for m in modules(n, *ATTENTION)),
]
"""The released map of Nano-NVFP4, but for the convolutions."""


def test_nano_as_released_has_the_published_size(tmp_path: Path) -> None:
    config = preset("nano")
    quantization = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": NANO_EXCLUDED}
    edit_json(tmp_path / "config.json", **config.to_dict())
    edit_json(tmp_path / "hf_quant_config.json", quantization=quantization)
    formats = read_quantization(tmp_path / "config.json", config).formats
    size = write_headers(
        tmp_path, config, formats, extra={}, wide=lambda name: "mixer.gate." in name
    )
    assert size == (24_147, 19_339_781_632)
    model = open_model(tmp_path)
    found = summarize(config, DType.F32, model.weight_types, model.quantization.formats)
    assert found.parameters == 31_577_940_288
    assert found.weight_bytes == size[1] - 4 * 5968  # which are scales of activations
    assert float(found.decode.at(1, 1, 0).weights) / 1e9 == pytest.approx(2.886, abs=0.0006)


SUPER_FP8 = {
    "in_proj": "0 2 4 6 9 11 13 15 18 20 27 29 31 40 49 51 53 55 57 60 62 66 68 71 73 82 84 86",
    "out_proj": "0 2 4 9 11 13 18 38 40 42 44 49 51 53 55 57 60 62 64 66 68 71 73 75 77 80 82 84 86",
    "o_proj": "69 78",
    "fc1_latent_proj": "1 3 5",
    "fc2_latent_proj": "3",
}
"""The layers whose module of a name is FP8 in Super-NVFP4."""


SUPER_NOT_FP8 = {
    "shared_experts.up_proj": (41,),
    "shared_experts.down_proj": (1, 8, 76),
}
"""The layers of experts whose module of a name is not. Experts, and the first shared down_proj, are NVFP4."""


@pytest.mark.slow
def test_super_as_released_has_the_published_size(tmp_path: Path) -> None:
    config = preset("super")
    experts = [n for n, kind in enumerate(config.layers) if kind == "moe"]
    layers = {name: list(map(int, text.split())) for name, text in SUPER_FP8.items()}
    layers |= {name: [n for n in experts if n not in no] for name, no in SUPER_NOT_FP8.items()}
    leaves = [f"experts.{expert}.{name}" for expert in range(512) for name in MLP]
    kinds = kinds_of(
        [*(m for n in experts for m in modules(n, *leaves)), *modules(1, SHARED[1])],
        [module for name, where in layers.items() for n in where for module in modules(n, name)],
    )
    assert len(kinds) == 41_100
    section = {**mixed(kinds), "quant_method": "modelopt", "ignore": []}
    cache = {"num_bits": 8, "type": "float", "dynamic": False}
    edit_json(
        tmp_path / "config.json",
        **config.to_dict(),
        quantization_config=section | {"kv_cache_scheme": cache},
    )
    edit_json(
        tmp_path / "hf_quant_config.json",
        quantization=mixed(kinds) | {"kv_cache_quant_algo": "FP8"},
    )
    formats = read_quantization(tmp_path / "config.json", config).formats
    attention = [n for n, kind in enumerate(config.layers) if kind == "attention"]
    extra: dict[str, tuple[str, tuple[int, ...]]] = {
        f"{modules(n, f'{x}_proj')[0]}.{x}_scale": ("F32", ()) for n in attention for x in "kv"
    }
    found = write_headers(
        tmp_path, config, formats, extra=extra, wide=lambda name: name.endswith("correction_bias")
    )
    head = 2 * 2_942_325_248 + 2 * 512  # multi-token prediction in bf16, its correction bias in f32
    assert found == (165_860 - 1040, 80_297_329_824 - head)
    model = open_model(tmp_path)
    assert len(model.scales) == len(formats) + 16
    summary = summarize(config, DType.F32, model.weight_types, model.quantization.formats)
    assert summary.parameters == 120_668_707_840
    assert float(summary.decode.at(1, 1, 0).weights) / 1e9 == pytest.approx(12.646, abs=0.0006)
