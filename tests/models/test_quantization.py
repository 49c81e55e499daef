"""Checkpoints as they are released: maps of formats, codes and scales, and every way in which they can be wrong."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemoc.ir import DType, NemocError
from nemoc.ir.ops import DequantizeNvfp4, GroupedLinear, Linear
from nemoc.models import (
    Fp8,
    Model,
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
from support.quantized import (
    Kind,
    Layout,
    Tensors,
    edit_json,
    edit_tensors,
    mixed,
    scheme,
    write_headers,
    write_quantized,
)
from support.stepping import Stepper, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

MLP = ("up_proj", "down_proj")
SHARED = ("shared_experts.up_proj", "shared_experts.down_proj")
MAMBA = ("in_proj", "out_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LATENT = ("fc1_latent_proj", "fc2_latent_proj")


def _modules(layer: int, *names: str) -> list[str]:
    return [f"backbone.layers.{layer}.mixer.{name}" for name in names]


def _experts(*layers: int) -> list[str]:
    leaves = [f"experts.{n}.{name}" for n in range(7) for name in MLP]
    return [module for layer in layers for module in _modules(layer, *leaves)]


def _kinds(nvfp4: list[str], fp8: list[str]) -> dict[str, Kind]:
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
    kinds=_kinds(
        [
            *_modules(0, *MAMBA),
            *_experts(1, 6),
            *_modules(1, *SHARED),
            *_modules(4, *MLP),
            *_modules(5, *MAMBA),
            *_modules(6, *SHARED),
        ],
        [],
    ),
    beside={
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": "FP8",
        "group_size": 16,
        "exclude_modules": [
            "lm_head",
            *_modules(2, *MAMBA),
            *_modules(3, *ATTENTION),
            *(f"backbone.layers.{n}.mixer.conv1d" for n in (0, 2, 5)),
        ],
    },
    changes={"moe_latent_size": None},
)

_SUPER = _kinds(
    [*_experts(1, 6), *_modules(1, "shared_experts.down_proj")],
    [
        *_modules(0, "in_proj"),
        *_modules(1, "shared_experts.up_proj", "fc1_latent_proj"),
        *_modules(3, "o_proj"),
        *_modules(5, *MAMBA),
        *_modules(6, *SHARED),
    ],
)
SUPER = Release(
    kinds=_SUPER,
    section={
        **mixed(_SUPER),
        "quant_method": "modelopt",
        "config_groups": {"group_0": {"targets": ["not read"]}},
        "ignore": [],
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
    },
    beside={**mixed(_SUPER), "kv_cache_quant_algo": "FP8"},
)

# By class, by expression and by name; the name is the most specific.
COMPRESSED = Release(
    kinds=_kinds(
        [
            *_experts(1, 6),
            *_modules(0, "out_proj"),
            *_modules(1, *SHARED, *LATENT),
            *_modules(4, *MLP),
            *_modules(6, *SHARED, *LATENT),
        ],
        [*_modules(0, "in_proj"), *_modules(5, *MAMBA)],
    ),
    section={
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "mixed-precision",
        "config_groups": {
            "group_0": scheme("nvfp4", "Linear", "backbone.layers.0.mixer.out_proj"),
            "group_1": scheme("fp8", r"re:.*mixer\.(in|out)_proj$"),
        },
        "ignore": ["lm_head", *_modules(2, *MAMBA), r"re:.*\.layers\.3\."],
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


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    written = {}
    for name, release in RELEASES.items():
        directory = tmp_path_factory.mktemp(name)
        dense = release.write(directory)
        written[name] = Written(release, directory, dense, open_model(directory))
    return written


@pytest.fixture(params=RELEASES)
def written(request: pytest.FixtureRequest, releases: dict[str, Written]) -> Written:
    return releases[request.param]


@pytest.fixture
def copy(releases: dict[str, Written], tmp_path: Path) -> Callable[[str], Path]:
    """Copies a release to damage it."""
    return lambda name: Path(shutil.copytree(releases[name].directory, tmp_path / "model"))


def _refusal(directory: Path) -> str:
    """The one-line error that opening a directory gives, without the directory's own name."""
    with pytest.raises(NemocError) as caught:
        open_model(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(directory), "DIR")


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


def test_weights_are_rounded_to_the_compute_type(written: Written) -> None:
    graph = written.model.build_step(dtype=DType.BF16, logits="all")
    found = Stepper(written.model, 1, 16, graph=graph, float64=True)(_tokens(1, 9))
    expected = eager_reference(written.model, torch.float64)(_tokens(1, 9))
    assert relative_error(found, expected) < 1e-12  # float64 evaluation rounds nothing
    products = [node.op for node in graph.nodes if isinstance(node.op, Linear | GroupedLinear)]
    assert all(op.w.dtype.bytes <= op.x.dtype.bytes for op in products)
    assert sum(op.w.dtype is DType.BF16 for op in products) == len(products)


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


def test_scales_of_an_unquantized_cache_are_refused(copy: Callable[[str], Path]) -> None:
    directory, name = copy("nano"), "backbone.layers.3.mixer.k_proj.k_scale"
    edit_tensors(directory, lambda tensors: tensors.update({name: torch.ones(())}))
    path = directory / "hf_quant_config.json"
    quantization = json.loads(path.read_text())["quantization"]
    edit_json(path, quantization=quantization | {"kv_cache_quant_algo": None})
    assert _refusal(directory) == (
        f"DIR/model.safetensors: tensor '{name}': found F32 [], expected no such tensor"
    )


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
    rest = {name: kind for name, kind in _SUPER.items() if ".experts." not in name}
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
    kinds: dict[str, Kind] = dict.fromkeys(_modules(0, *MAMBA), "nvfp4")
    beside = {"quant_algo": "W4A16_NVFP4", "exclude_modules": ["lm_head"]}
    Release(kinds, beside=beside, changes={"hybrid_override_pattern": "M"}).write(tmp_path)
    edit_tensors(
        tmp_path, lambda t: [t.pop(f"{module}.input_scale") for module in _modules(0, *MAMBA)]
    )
    model = open_model(tmp_path)
    assert model.scales == ()
    assert set(model.quantization.formats.values()) == {Nvfp4("modelopt", activations=False)}
    graph = model.build_step()
    assert sum(isinstance(node.op, DequantizeNvfp4) for node in graph.nodes) == 2


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
            **{name: {"quant_algo": "NVFP4"} for name in _experts(1) if name != UP_4},
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
    one_less = {name: kind for name, kind in _SUPER.items() if name != IN}
    edit_json(directory / "hf_quant_config.json", quantization=mixed(one_less))
    assert _refusal(directory) == (
        "DIR/config.json: quantization_config: found FP8 for layers.0.mixer.in_proj.weight, "
        "expected no format as in hf_quant_config.json"
    )
    edit_json(directory / "hf_quant_config.json", quantization=mixed(_SUPER))
    assert _refusal(directory) == (
        "DIR/config.json: quantization_config: found fp8 for the cache, "
        "expected None as in hf_quant_config.json"
    )


def test_what_a_converter_to_compressed_tensors_left_behind_does_not_count(
    copy: Callable[[str], Path],
) -> None:
    directory = copy("compressed-tensors")
    expected = open_model(directory).quantization
    edit_json(directory / "hf_quant_config.json", quantization={"quant_algo": "NVFP4"})
    assert open_model(directory).quantization == expected


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


NANO_EXCLUDED = [
    "lm_head",
    *(m for n in (4, 11, 18, 25, 32, 41) for m in _modules(n, *MAMBA)),
    *(m for n in (5, 12, 19, 26, 33, 42) for m in _modules(n, *ATTENTION)),
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
    kinds = _kinds(
        [*(m for n in experts for m in _modules(n, *leaves)), *_modules(1, SHARED[1])],
        [module for name, where in layers.items() for n in where for module in _modules(n, name)],
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
        f"{_modules(n, f'{x}_proj')[0]}.{x}_scale": ("F32", ()) for n in attention for x in "kv"
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
