"""Writing checkpoints in NVFP4: the bits, the names, the maps, and that nothing is left half written."""

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemoc.__main__ import main
from nemoc.ir import Builder, DType, NemocError, interpret
from nemoc.ir.ops.nvfp4 import quantized
from nemoc.ir.types import TensorType
from nemoc.models import (
    Checkpoint,
    Fp8,
    Model,
    ModelConfig,
    Nvfp4,
    RandomSource,
    eager_reference,
    open_model,
    preset,
)
from nemoc.models.dequantized import Dequantized
from nemoc.models.input_scales import stored_input_scales
from nemoc.models.names import is_stack, module_of, parameter_of, tensor_of
from nemoc.models.quantize import select
from nemoc.models.release import LAYOUTS, Layout, write_release
from nemoc.models.safetensors_file import read_header
from nemoc.models.safetensors_writer import Piece, write_tensors
from nemoc.models.source import Generation
from support.checkpoints import BASE, write_checkpoint, write_zeros
from support.nvfp4_peers import PEERS
from support.quantized import WIDE, Kind, Tensors, edit_json, mixed, write_quantized

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES: dict[str, dict[str, Any]] = {
    "latent": {},
    "moe": {"moe_latent_size": None},
    "dense": {"hybrid_override_pattern": "M*-M"},
}
"""Changes to `WIDE`."""

LEAVES = {
    "modelopt": ("weight", "weight_scale", "weight_scale_2"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_global_scale"),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints in bf16; not to be changed."""
    written = {}
    for name, changes in SHAPES.items():
        written[name] = tmp_path_factory.mktemp(name)
        write_checkpoint(written[name], dtype=torch.bfloat16, **(WIDE | changes))
    return written


@pytest.fixture
def out(tmp_path: Path) -> Path:
    path = tmp_path / "written"
    path.mkdir()
    return path


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Layout:
    found: Layout = request.param
    return found


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and _bytes(a[n]) == _bytes(b[n])
        for n in a
    )


def _whole(weight: torch.Tensor, layout: Layout) -> list[bytes]:
    """Codes, block scales and scale of a matrix, by the ops on all of it at once."""
    build = Builder("whole")
    w = build.param("w", DType.of(weight), tuple(weight.shape))
    graph = build.finish(quantized(build, w, layout))
    return [_bytes(tensor) for tensor in interpret(graph, {"w": weight}).outputs]


def _quantized_modules(found: Tensors, layout: Layout) -> set[str]:
    last = f".{LEAVES[layout][-1]}"
    return {name.removesuffix(last) for name in found if name.endswith(last)}


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_scales_are_those_of_whole_matrices(
    sources: dict[str, Path], shape: str, layout: Layout, out: Path
) -> None:
    before = load_file(sources[shape] / "model.safetensors")
    written = write_release(open_model(sources[shape]), out, layout)
    after = load_file(out / "model.safetensors")
    modules = _quantized_modules(after, layout)
    assert written.quantized == len(modules) > 4
    assert written.notes == ()
    for module in modules:
        weight = before.pop(f"{module}.weight")
        found = [after.pop(f"{module}.{leaf}") for leaf in LEAVES[layout]]
        assert [_bytes(tensor) for tensor in found] == _whole(weight, layout), module
        assert found[2].shape == (() if layout == "modelopt" else (1,))
    assert _same(before, after)
    kept = {name.rpartition(".")[0].rpartition(".")[2] for name in before}
    assert kept <= {"norm", "norm_f", "conv1d", "mixer", "gate", "embeddings", ""} | {"lm_head"}


@pytest.mark.parametrize("shape", SHAPES)
def test_it_opens_as_what_was_written(
    sources: dict[str, Path], shape: str, layout: Layout, out: Path
) -> None:
    write_release(open_model(sources[shape]), out, layout)
    model, stored = open_model(out), load_file(out / "model.safetensors")
    modules = _quantized_modules(stored, layout)
    assert set(model.quantization.formats) == {parameter_of(f"{m}.weight")[0] for m in modules}
    assert set(model.quantization.formats.values()) == {Nvfp4(layout, activations=False)}
    config = replace(open_model(sources[shape]).config, mtp_layers=(), num_nextn_predict_layers=0)
    assert (model.config, model.notes) == (config, ())
    assert model.parameters is not None
    for name in (p.name for p in model.build_step().params):
        found = model.parameters.read(name)
        packed = name in model.quantization.formats and layout == "compressed-tensors"
        parts = [
            stored[tensor_of(name, n, packed=packed)]
            for n in range(len(found) if is_stack(name) else 1)
        ]
        assert _bytes(found) == b"".join(map(_bytes, parts)), name


def test_scales_of_activations_stand_beside_codes_and_the_map_says_so(
    sources: dict[str, Path], layout: Layout, out: Path
) -> None:
    model = open_model(sources["latent"])
    chosen = sorted(select(model.config, "all", 16).chosen)
    scales = {name: 0.25 + n for n, name in enumerate(chosen)}
    write_release(model, out, layout, input_scales=scales)
    written, stored = open_model(out), load_file(out / "model.safetensors")
    assert set(written.quantization.formats.values()) == {Nvfp4(layout)}
    assert stored_input_scales(written) == pytest.approx(scales, rel=1e-6)
    leaf = Nvfp4(layout).input_scale
    found = [stored[name] for name in stored if name.endswith(leaf)]
    assert len(found) == len(_quantized_modules(stored, layout))
    assert {tuple(t.shape) for t in found} == {() if layout == "modelopt" else (1,)}


@pytest.mark.parametrize("bad", [None, 0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_without_a_scale_is_not_written(
    sources: dict[str, Path], bad: float | None, out: Path
) -> None:
    model = open_model(sources["dense"])
    scales = dict.fromkeys(select(model.config, "all", 16).chosen, 1.0)
    name = min(scales)
    del scales[name]
    scales |= {} if bad is None else {name: bad}
    with pytest.raises(
        NemocError, match=rf"^{re.escape(name)}: found .* expected a positive number$"
    ):
        write_release(model, out, "modelopt", input_scales=scales)
    assert not list(out.iterdir())


def test_the_model_means_the_quantized_weights(sources: dict[str, Path], out: Path) -> None:
    source = open_model(sources["latent"])
    write_release(source, out, "modelopt")
    tokens = torch.arange(24).reshape(2, 12)
    exact, found = (eager_reference(model)(tokens) for model in (source, open_model(out)))
    error = (found - exact).norm() / exact.norm()
    assert 0.01 < error < 0.8


def test_slices_and_files_change_no_bit(
    sources: dict[str, Path], layout: Layout, out: Path, tmp_path: Path
) -> None:
    model = open_model(sources["latent"])
    write_release(model, out, layout)
    sliced = tmp_path / "sliced"
    sliced.mkdir()
    write_release(model, sliced, layout, slice_bytes=1000, shard_bytes=20_000)
    index = json.loads((sliced / "model.safetensors.index.json").read_text())
    names = sorted(path.name for path in sliced.glob("*.safetensors"))
    count = len(names)
    assert count > 3
    assert names[0] == f"model-00001-of-{count:05}.safetensors"
    assert sorted(set(index["weight_map"].values())) == names
    found: Tensors = {}
    for name in names:
        assert (sliced / name).stat().st_size < 20_000 + 20_000
        found |= load_file(sliced / name)
    assert _same(found, load_file(out / "model.safetensors"))
    assert index["metadata"]["total_size"] == sum(len(_bytes(t)) for t in found.values())
    assert open_model(sliced).quantization == open_model(out).quantization


def test_tensors_are_aligned(sources: dict[str, Path], layout: Layout, out: Path) -> None:
    write_release(open_model(sources["latent"]), out, layout)
    sizes = {"F32": 4, "BF16": 2}
    tensors = read_header(out / "model.safetensors").values()
    assert all(tensor.offset % sizes.get(tensor.dtype, 1) == 0 for tensor in tensors)


def test_files_say_what_is_quantized(sources: dict[str, Path], out: Path) -> None:
    write_release(open_model(sources["dense"]), out, "modelopt", r".*\.(out|[qk])_proj")
    beside = json.loads((out / "hf_quant_config.json").read_text())
    left = [
        "lm_head",
        "backbone.embeddings",
        "backbone.layers.0.mixer.in_proj",
        "backbone.layers.0.mixer.conv1d",
        "backbone.layers.1.mixer.v_proj",
        "backbone.layers.1.mixer.o_proj",
        "backbone.layers.2.mixer.up_proj",
        "backbone.layers.2.mixer.down_proj",
        "backbone.layers.3.mixer.in_proj",
        "backbone.layers.3.mixer.conv1d",
    ]
    assert beside["producer"]["name"] == "modelopt"
    assert beside["quantization"] == {
        "quant_algo": "W4A16_NVFP4",
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "exclude_modules": left,
    }
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    assert section["quant_method"] == "modelopt"
    assert (section["quant_algo"], section["ignore"]) == ("W4A16_NVFP4", left)


def test_compressed_tensors_says_it_in_one_file(sources: dict[str, Path], out: Path) -> None:
    write_release(open_model(sources["latent"]), out, "compressed-tensors", r".*(?<!up)_proj")
    assert not (out / "hf_quant_config.json").exists()
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    assert section["format"] == "nvfp4-pack-quantized"
    (group,) = section["config_groups"].values()
    assert group["input_activations"] is None
    assert group["weights"]["strategy"] == "tensor_group"
    assert "lm_head" in section["ignore"]
    assert r"re:.*\.layers\.1\.mixer\.experts\.[0-9]+\.up_proj$" in section["ignore"]
    assert not any("down_proj" in name for name in section["ignore"])


def test_what_does_not_hold_any_more_is_left_out_of_the_configuration(
    sources: dict[str, Path], out: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in sources["dense"].iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    changes = {
        "auto_map": {"AutoConfig": "configuration.Config"},
        "num_nextn_predict_layers": 1,
        "mtp_hybrid_override_pattern": "*E",
        "rope_theta": 123,
    }
    edit_json(source / "config.json", **changes)
    (source / "tokenizer_config.json").write_text('{"x": 1}')
    (source / "modeling.py").write_text("")
    write_release(open_model(source), out, "modelopt")
    config = json.loads((out / "config.json").read_text())
    assert config["rope_theta"] == 123
    assert changes.keys() & config.keys() == {"rope_theta"}
    assert (out / "tokenizer_config.json").read_text() == '{"x": 1}'
    assert not (out / "modeling.py").exists()


def _names(scope: str, **changes: Any) -> set[str]:
    config = preset("nano").to_dict() | {"moe_latent_size": 1024} | changes
    chosen = select(ModelConfig.from_dict(config), scope, 16).chosen
    return {name.split(".mixer.")[-1] for name in chosen}


def test_scopes() -> None:
    experts = {"experts.up_proj", "experts.down_proj"}
    projections = {f"{x}_proj.weight" for x in ("in", "out", "q", "k", "v", "o")}
    shared = {"shared_experts.up_proj.weight", "shared_experts.down_proj.weight"}
    latent = {"fc1_latent_proj.weight", "fc2_latent_proj.weight"}
    assert _names("all") == experts | projections | shared | latent
    assert _names("experts") == experts | shared
    assert _names("lm_head|.*latent") == latent | {"lm_head.weight"}
    assert _names(r"layers\.1\.mixer\.experts\.up_proj$") == {"experts.up_proj"}


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("(", "scope '(': expected all, experts or a regular expression (missing )"),
        (
            "mixer",
            "scope 'mixer': found no weight whose name begins so, as in layers.0.mixer.in_proj",
        ),
        (r".*\.gate", r"scope '.*\.gate': found no weight whose name begins so"),
        ("embeddings|.*conv1d", "scope 'embeddings|.*conv1d': found no weight whose name"),
    ],
)
def test_scopes_that_mean_nothing_are_refused(
    sources: dict[str, Path], out: Path, scope: str, expected: str
) -> None:
    with pytest.raises(NemocError) as caught:
        write_release(open_model(sources["latent"]), out, "modelopt", scope)
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)
    assert not list(out.iterdir())


def test_widths_that_are_no_blocks_stay_and_are_named(
    tmp_path: Path, layout: Layout, out: Path
) -> None:
    source = tmp_path / "source"
    write_checkpoint(source, dtype=torch.bfloat16, **WIDE | {"moe_intermediate_size": 24})
    written = write_release(open_model(source), out, layout)
    assert written.notes == tuple(
        f"layers.{n}.mixer.experts.down_proj stays as it is: its 24 columns are no multiple of 16"
        for n in (1, 6)
    )
    formats = open_model(out).quantization.formats
    assert "layers.1.mixer.experts.up_proj" in formats
    assert "layers.1.mixer.experts.down_proj" not in formats
    before, after = (load_file(path / "model.safetensors") for path in (source, out))
    name = "backbone.layers.6.mixer.experts.3.down_proj.weight"
    assert torch.equal(before[name], after[name])


def test_a_model_without_any_such_width_is_refused(tmp_path: Path, out: Path) -> None:
    write_checkpoint(tmp_path / "source")
    with pytest.raises(NemocError, match="nothing can be quantized, since no width is a multiple"):
        write_release(open_model(tmp_path / "source"), out, "modelopt")


def test_a_configuration_alone_is_refused(out: Path) -> None:
    with pytest.raises(NemocError, match="nano has no weights; 'random:nano' has random ones"):
        write_release(open_model("nano"), out, "modelopt")


def test_random_weights_can_be_written(out: Path) -> None:
    config = ModelConfig.from_dict(
        preset("nano").to_dict()
        | {
            "layers_block_type": ["mamba", "attention"],
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "vocab_size": 50,
            "mamba_num_heads": 8,
        }
    )
    model = Model("random", config, RandomSource(config, 3), Generation((2, 11), 1, None))
    write_release(model, out, "modelopt")
    found = open_model(out)
    assert found.config == config
    assert found.generation == Generation((2, 11), 1, config.pad_token_id)


_KINDS: dict[str, Kind] = {
    **{
        f"backbone.layers.1.mixer.experts.{n}.{leaf}": "nvfp4"
        for n in range(7)
        for leaf in ("up_proj", "down_proj")
    },
    "backbone.layers.0.mixer.in_proj": "fp8",
    "backbone.layers.0.mixer.out_proj": "nvfp4",
}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of mixed formats, in ModelOpt's layout; one expert is all zeros by a scale of 0."""
    directory = tmp_path_factory.mktemp("mixed")
    write_quantized(directory, _KINDS)
    edit_json(directory / "hf_quant_config.json", quantization=mixed(_KINDS))
    return directory


def test_what_is_nvfp4_keeps_its_codes(release: Path, layout: Layout, out: Path) -> None:
    written = write_release(open_model(release), out, layout, r".*\.(experts|in_proj|out_proj)")
    before, after = (load_file(path / "model.safetensors") for path in (release, out))
    codes, scales, last = LEAVES[layout]
    for module in (m for m, kind in _KINDS.items() if kind == "nvfp4"):
        assert torch.equal(after[f"{module}.{codes}"], before[f"{module}.weight"])
        assert _bytes(after[f"{module}.{scales}"]) == _bytes(before[f"{module}.weight_scale"])
        factor = before[f"{module}.weight_scale_2"]
        expected = factor if layout == "modelopt" else factor.reciprocal()[None]
        assert torch.equal(after[f"{module}.{last}"], expected)
    wide = eager_reference(open_model(release)).state_dict()[
        "backbone.layers.0.mixer.in_proj.weight"
    ]
    found = [after[f"backbone.layers.0.mixer.in_proj.{leaf}"] for leaf in LEAVES[layout]]
    assert [_bytes(tensor) for tensor in found] == _whole(wide, layout)
    assert written.notes == ()


def test_what_was_quantized_and_is_not_in_scope_is_written_as_numbers(
    release: Path, out: Path
) -> None:
    written = write_release(open_model(release), out, "modelopt", r".*\.experts")
    assert written.notes == tuple(
        f"layers.0.mixer.{name}_proj.weight was quantized and is written as bf16"
        for name in ("in", "out")
    )
    expected = eager_reference(open_model(release)).state_dict()
    found = load_file(out / "model.safetensors")
    for name in ("in", "out"):
        key = f"backbone.layers.0.mixer.{name}_proj.weight"
        assert torch.equal(found[key], expected[key].bfloat16())


def test_a_factor_of_zero_becomes_zeros_of_a_divisor(
    release: Path, out: Path, tmp_path: Path
) -> None:
    write_release(open_model(release), out, "modelopt", r".*\.experts")
    path = out / "model.safetensors"
    tensors = load_file(path)
    module = "backbone.layers.1.mixer.experts.2.up_proj"
    tensors[f"{module}.weight_scale_2"] = torch.zeros(())
    config = open_model(out).config
    quantization = open_model(out).quantization
    source = Checkpoint.of_state_dict(tensors, config, "memory", quantization)
    model = Model("zeros", config, source, Generation((), None, None), quantization=quantization)
    again = tmp_path / "again"
    again.mkdir()
    write_release(model, again, "compressed-tensors", r".*\.experts")
    found = load_file(again / "model.safetensors")
    assert found[f"{module}.weight_packed"].count_nonzero() == 0
    assert found[f"{module}.weight_global_scale"].tolist() == [1.0]


def test_parameters_as_numbers(release: Path) -> None:
    model = open_model(release)
    assert Fp8() in model.quantization.formats.values()
    weights = Dequantized(model)
    expected = eager_reference(model).state_dict()
    for name, type_ in weights.types.items():
        prefix = "" if name.startswith("lm_head.") else "backbone."
        whole = expected[prefix + name]
        assert weights.read(name).shape == type_.shape
        assert torch.equal(weights.read(name).float(), whole)
        assert torch.equal(weights.read(name, 1, 3).float(), whole[1:3])
        assert weights.type_of(name).dtype.torch == weights.read(name).dtype
    with pytest.raises(NemocError, match="the model has no parameter 'x'"):
        weights.type_of("x")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_libraries_read_what_is_written(
    sources: dict[str, Path], layout: Layout, out: Path
) -> None:
    """The library quantizes the same weight to the same bytes, and reads the numbers that nemoc reads."""
    write_release(open_model(sources["latent"]), out, layout)
    before = load_file(sources["latent"] / "model.safetensors")
    after, model = load_file(out / "model.safetensors"), open_model(out)
    dense = eager_reference(model).state_dict()
    for module in sorted(_quantized_modules(after, layout))[:6]:
        peer = PEERS[layout](before[f"{module}.weight"].float())
        found = [after[f"{module}.{leaf}"] for leaf in LEAVES[layout]]
        assert torch.equal(found[0], peer.packed)
        assert _bytes(found[1]) == _bytes(peer.scales)
        assert found[2] == peer.global_scale
        name, expert = parameter_of(f"{module}.weight")
        weight = dense[f"backbone.{name}"]
        assert torch.equal(weight if expert is None else weight[expert], peer.dequantized)
        assert module_of(name) in name


def _refusing(error: Exception, after: int) -> Callable[..., None]:
    """A write that fails in the middle."""
    calls = iter(range(10**6))

    def write(*args: Any, **kwargs: Any) -> None:
        if next(calls) == after:
            raise error

    return write


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("error", "code"),
    [(OSError(errno.ENOSPC, "No space left on device"), 2), (NemocError("damaged"), 2)],
    ids=["full disk", "damaged source"],
)
def test_an_interrupted_write_leaves_nothing(
    sources: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    layout: Layout,
    error: Exception,
    code: int,
) -> None:
    fail = _refusing(error, after=7)
    read = Checkpoint.read

    def failing(self: Checkpoint, *args: Any) -> torch.Tensor:
        fail()
        return read(self, *args)

    monkeypatch.setattr(Checkpoint, "read", failing)
    arguments = ["quantize", str(sources["latent"]), "-o", str(tmp_path / "new")]
    assert main([*arguments, "--format", layout]) == code
    message = capsys.readouterr().err
    assert message.count("nemoc: error: ") == 1
    assert str(error.args[-1]) in message
    assert not list(tmp_path.iterdir())


def test_the_command_writes_and_says_so(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new"
    arguments = ["quantize", str(sources["latent"]), "-o", str(output), "-q"]
    assert main([*arguments, "--format", "modelopt", "--scope", "experts"]) == 0
    said = capsys.readouterr().out
    assert "32 matrices quantized" in said
    assert len(open_model(output).quantization.formats) == 8
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    assert main([*arguments, "--format", "modelopt"]) == 2
    assert capsys.readouterr().err == f"nemoc: error: {output}: exists, and is not replaced\n"
    assert before == {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_pieces_that_do_not_make_up_the_tensors_are_refused(tmp_path: Path) -> None:
    types = {"a": TensorType(DType.F32, (3,))}
    with pytest.raises(NemocError, match=r"tensor 'a': 4 bytes of its data are missing"):
        write_tensors(tmp_path, types, [Piece("a", torch.ones(2))])
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(NemocError, match=r"tensor 'a': the data is torch\.float64, expected f32"):
        write_tensors(tmp_path, types, [Piece("a", torch.ones(3, dtype=torch.float64))])


_MEMORY = """
import resource, sys
from pathlib import Path
import torch
from nemoc.models import open_model
from nemoc.models.release import write_release

torch.set_num_threads(1)
source, out = map(Path, sys.argv[1:])
model = open_model(source)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_release(model, out, "modelopt", slice_bytes=1 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path, out: Path) -> None:
    """67 million weights, 134 MB: a matrix alone has 67 MB."""
    source = tmp_path / "source"
    source.mkdir()
    changes = {"hybrid_override_pattern": "-", "hidden_size": 1024, "intermediate_size": 1 << 15}
    write_zeros(source, ModelConfig.from_dict(BASE | changes | {"dtype": "bfloat16"}))
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY, str(source), str(out)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert int(done.stdout) * 1024 < 45 << 20
    assert len(open_model(out).quantization.formats) == 2
