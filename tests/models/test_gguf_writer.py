"""Writing GGUF files: what the library reads in them, what comes back, and that nothing is left half written."""

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T
from safetensors.torch import load_file

from nemoc.__main__ import main
from nemoc.compiler import compile
from nemoc.ir import DType, NemocError
from nemoc.models import (
    Checkpoint,
    Generation,
    Model,
    ModelConfig,
    RandomSource,
    eager_reference,
    open_model,
)
from nemoc.models.formats import Nvfp4
from nemoc.models.gguf_writer import GGUF_TYPES, GgufType, write_gguf
from nemoc.models.quantize import Written
from nemoc.models.release import write_release
from nemoc.models.sample import CHECKPOINT
from nemoc.runtime.tokenizer import Tokenizer
from support.checkpoints import BASE, write_checkpoint
from support.gguf_files import write_file
from support.quantized import WIDE, Kind, edit_json, mixed, write_quantized

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = WIDE | {
    "hidden_size": 64,
    "mamba_num_heads": 4,
    "n_groups": 2,
    "num_attention_heads": 4,
    "moe_intermediate_size": 64,
    "moe_latent_size": 64,
    "moe_shared_expert_intermediate_size": 128,
}
"""Every width a multiple of 64."""

SHAPES: dict[str, dict[str, Any]] = {
    "latent": {"hybrid_override_pattern": "MEM*ME"},
    "moe": {"hybrid_override_pattern": "ME*M", "moe_latent_size": None},
    "dense": {"hybrid_override_pattern": "M*-M"},
}
"""Changes to `SIZES`."""

Arrays = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints in f32; not to be changed."""
    written = {}
    for name, changes in SHAPES.items():
        written[name] = tmp_path_factory.mktemp(name)
        write_checkpoint(written[name], **(SIZES | changes))
    return written


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def _write(
    source: Model | Path, out: Path, type_: GgufType, scope: str = "all", **options: Any
) -> Written:
    model = source if isinstance(source, Model) else open_model(source)
    with out.open("wb") as file:
        return write_gguf(model, file, type_, scope, **options)


def _tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def _numbers(path: Path) -> Arrays:
    """What the library reads."""
    found = {}
    for name, tensor in _tensors(path).items():
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found[name] = numbers.reshape(tuple(tensor.shape[::-1].tolist()))
    return found


def _metadata(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields
    return {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_what_the_converter_writes(
    sources: dict[str, Path], shape: str, out: Path, tmp_path: Path
) -> None:
    written = _write(sources[shape], out, "f32")
    assert written == Written(0, ("the file has no tokenizer, since the model has none",))
    peer = tmp_path / "peer.gguf"
    stored = load_file(sources[shape] / "model.safetensors")
    expected = write_file(peer, stored, ModelConfig.from_file(sources[shape]))
    found = _numbers(out)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].shape == array.shape, name
        if name.endswith("ssm_a"):
            np.testing.assert_allclose(found[name], array, rtol=2e-7)
        else:
            assert np.array_equal(found[name], array), name
    said = _metadata(out)
    assert {key: said[key] for key in _metadata(peer)} == _metadata(peer)


@pytest.mark.parametrize("type_", GGUF_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_opens_as_what_was_written(
    sources: dict[str, Path], shape: str, type_: GgufType, out: Path
) -> None:
    written = _write(sources[shape], out, type_)
    model, source = open_model(out), open_model(sources[shape])
    expected = replace(
        source.config,
        chunk_size=128,
        mtp_layers=(),
        num_nextn_predict_layers=0,
        dtype=model.config.dtype,
    )
    assert model.config == expected
    assert model.generation == source.generation
    quantized = type_ in ("q8_0", "nvfp4")
    assert model.notes == (("weights in Q8_0 are read as f32",) if type_ == "q8_0" else ())
    kept = sum(tensor.tensor_type is T.NVFP4 for tensor in gguf.GGUFReader(out).tensors)
    assert len(model.quantization.formats) == kept
    assert (kept > 5) == (type_ == "nvfp4")
    assert (written.quantized > 5) == quantized
    found, before = (eager_reference(m).state_dict() for m in (model, source))
    library = _numbers(out)
    error = 0.0
    for name, weight in before.items():
        assert found[name].shape == weight.shape
        if name.endswith(("conv1d.weight", "gate.weight", ".bias", "norm.weight", "dt_bias", "D")):
            assert torch.equal(found[name], weight), name
        elif name.endswith("A_log"):
            assert torch.allclose(found[name], weight, rtol=0, atol=2e-7)
        else:
            error = max(error, float((found[name] - weight).norm() / weight.norm()))
    low, high = {"f32": (0, 0), "bf16": (1e-3, 3e-3), "q8_0": (3e-3, 2e-2), "nvfp4": (0.05, 0.2)}[
        type_
    ]
    assert low <= error <= high
    whole = found["backbone.layers.0.mixer.in_proj.weight"].numpy()
    scale = library.get("blk.0.ssm_in.scale", np.ones(1, np.float32))
    np.testing.assert_allclose(library["blk.0.ssm_in.weight"] * scale, whole, rtol=2e-7)


def test_types_of_tensors(sources: dict[str, Path], out: Path) -> None:
    _write(sources["latent"], out, "nvfp4", r".*(experts|in_proj|q_proj)|lm_head")
    kinds = {name: tensor.tensor_type for name, tensor in _tensors(out).items()}
    nvfp4 = {name for name, kind in kinds.items() if kind is T.NVFP4}
    assert nvfp4 == {
        "output.weight",
        *(f"blk.{n}.ssm_in.weight" for n in (0, 2, 4)),
        "blk.3.attn_q.weight",
        *(
            f"blk.{n}.ffn_{x}_{part}.weight"
            for n in (1, 5)
            for x in ("up", "down")
            for part in ("exps", "shexp")
        ),
    }
    scales = {name for name in kinds if name.endswith(".scale")}
    assert scales == {name.replace(".weight", ".scale") for name in nvfp4}
    assert all(kind is T.F32 for name, kind in kinds.items() if name not in nvfp4)
    said = _metadata(out)
    assert said["general.tensor_extra.name"] == sorted(nvfp4)
    assert said["general.tensor_extra.prec_a4"] == [False] * len(nvfp4)
    _write(sources["latent"], out, "bf16")
    kinds = {name: tensor.tensor_type for name, tensor in _tensors(out).items()}
    plain = {name for name, kind in kinds.items() if kind is T.F32}
    assert {name.partition(".")[2].partition(".")[2] or name for name in plain} == {
        "attn_norm.weight",
        "ssm_a",
        "ssm_d",
        "ssm_dt.bias",
        "ssm_conv1d.weight",
        "ssm_conv1d.bias",
        "ssm_norm.weight",
        "ffn_gate_inp.weight",
        "exp_probs_b.bias",
        "output_norm.weight",
    }


def test_what_is_not_in_scope_keeps_its_type(tmp_path: Path, out: Path) -> None:
    source = tmp_path / "source"
    write_checkpoint(source, dtype=torch.bfloat16, **(SIZES | SHAPES["dense"]))
    _write(source, out, "q8_0", r".*\.in_proj")
    kinds = {name: tensor.tensor_type for name, tensor in _tensors(out).items()}
    assert kinds["blk.0.ssm_in.weight"] is T.Q8_0
    for name in ("token_embd", "output", "blk.1.attn_q", "blk.0.ssm_out"):
        assert kinds[f"{name}.weight"] is T.BF16
    assert open_model(out).config.dtype == "bfloat16"


def test_codes_are_those_of_modelopt(sources: dict[str, Path], out: Path, tmp_path: Path) -> None:
    """Of a checkpoint that ModelOpt would read, from the weights or from that checkpoint."""
    release = tmp_path / "release"
    release.mkdir()
    write_release(open_model(sources["moe"]), release, "modelopt")
    again = tmp_path / "again.gguf"
    _write(sources["moe"], out, "nvfp4")
    written = _write(release, again, "nvfp4")
    assert written.quantized == 2 * 2 + 4 + 7 * 2 + 2
    a, b = _tensors(out), _tensors(again)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert np.array_equal(tensor.data, b[name].data), name
    stored = load_file(release / "model.safetensors")
    module = "backbone.layers.1.mixer.experts.3.up_proj"
    assert a["blk.1.ffn_up_exps.scale"].data[3] == stored[f"{module}.weight_scale_2"]
    expected = eager_reference(open_model(release)).state_dict()
    for name, weight in eager_reference(open_model(out)).state_dict().items():
        if not name.endswith("A_log"):
            assert torch.equal(weight, expected[name]), name
    formats = open_model(release).quantization.formats
    assert open_model(out).quantization.formats == dict.fromkeys(formats, Nvfp4(activations=False))


def test_a_quantized_checkpoint_becomes_numbers_where_it_has_to(tmp_path: Path, out: Path) -> None:
    source = tmp_path / "source"
    kinds: dict[str, Kind] = {
        "backbone.layers.0.mixer.in_proj": "fp8",
        "backbone.layers.2.mixer.up_proj": "nvfp4",
    }
    write_quantized(source, kinds, **(SIZES | SHAPES["dense"]))
    edit_json(source / "hf_quant_config.json", quantization=mixed(kinds))
    expected = eager_reference(open_model(source)).state_dict()
    written = _write(source, out, "nvfp4", r".*mixer\.up_proj")
    assert written.notes[0] == "layers.0.mixer.in_proj.weight was quantized and is written as BF16"
    found = eager_reference(open_model(out)).state_dict()
    assert torch.equal(
        found["backbone.layers.2.mixer.up_proj.weight"],
        expected["backbone.layers.2.mixer.up_proj.weight"],
    )
    name = "backbone.layers.0.mixer.in_proj.weight"
    assert torch.equal(found[name], expected[name].bfloat16().float())
    _write(source, out, "f32")
    assert torch.equal(eager_reference(open_model(out)).state_dict()[name], expected[name])


def test_slices_change_no_bit(sources: dict[str, Path], out: Path, tmp_path: Path) -> None:
    for type_ in GGUF_TYPES:
        sliced = tmp_path / "sliced.gguf"
        seen: list[tuple[int, int]] = []
        _write(sources["latent"], out, type_)
        _write(
            sources["latent"],
            sliced,
            type_,
            slice_bytes=1000,
            advance=lambda done, total, seen=seen: seen.append((done, total)),
        )
        assert sliced.read_bytes() == out.read_bytes()
        assert len(seen) > 300
        assert seen == sorted(seen)
        assert {total for _, total in seen} == {out.stat().st_size}


def test_widths_and_scales_that_there_are_no_blocks_for(tmp_path: Path, out: Path) -> None:
    source = tmp_path / "source"
    changes = SHAPES["latent"] | {"moe_intermediate_size": 96, "hybrid_override_pattern": "ME"}
    write_checkpoint(source, **(SIZES | changes))
    assert _write(source, out, "nvfp4").notes[:3] == (
        "layers.1.mixer.experts.down_proj stays as it is: its 96 columns are no multiple of 64",
        "layers.1.mixer.fc1_latent_proj.weight stays as it is: llama.cpp applies no scale to it",
        "layers.1.mixer.fc2_latent_proj.weight stays as it is: llama.cpp applies no scale to it",
    )
    assert _write(source, out, "q8_0").notes == (
        "the file has no tokenizer, since the model has none",
    )


def _random(**changes: Any) -> Model:
    config = ModelConfig.from_dict(BASE | SIZES | {"moe_latent_size": None} | changes)
    return Model("r", config, RandomSource(config, 1, DType.F32), Generation((2,), 1, 0))


def test_biases_that_llama_cpp_knows(out: Path) -> None:
    model = _random(hybrid_override_pattern="M*-", attention_bias=True, mlp_bias=True)
    written = _write(model, out, "nvfp4")
    assert written.notes[:2] == tuple(
        f"layers.2.mixer.{name}_proj.weight stays as it is: llama.cpp applies no scale to it"
        for name in ("down", "up")
    )
    found = open_model(out)
    assert (found.config.attention_bias, found.config.mlp_bias) == (True, True)
    assert found.parameters is not None
    assert model.parameters is not None
    for name in ("layers.1.mixer.o_proj.bias", "layers.2.mixer.up_proj.bias"):
        assert torch.equal(found.parameters.read(name), model.parameters.read(name))


_UNKNOWN: list[tuple[dict[str, Any], str]] = [
    (
        {"hybrid_override_pattern": "ME*-"},
        "GGUF: found layers of experts and dense ones, expected one of the two",
    ),
    (
        {"hybrid_override_pattern": "M*-", "mlp_hidden_act": "silu"},
        "GGUF: mlp_hidden_act: found 'silu', expected 'relu2'",
    ),
    (
        {"hybrid_override_pattern": "M*-", "mamba_hidden_act": "gelu"},
        "GGUF: mamba_hidden_act: found 'gelu', expected 'silu'",
    ),
    (
        {"hybrid_override_pattern": "M*-", "use_bias": True},
        "GGUF: use_bias: found a value that llama.cpp does not know",
    ),
    (
        {"hybrid_override_pattern": "M*-", "use_conv_bias": False},
        "GGUF: use_conv_bias: found a value that llama.cpp does not know",
    ),
    (
        {"hybrid_override_pattern": "ME*", "mlp_bias": True},
        "GGUF: mlp_bias: found a value that llama.cpp does not know",
    ),
]


@pytest.mark.parametrize(("changes", "expected"), _UNKNOWN)
def test_models_that_llama_cpp_does_not_know_are_refused(
    out: Path, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(NemocError) as caught:
        _write(_random(**changes), out, "f32")
    assert str(caught.value) == expected
    assert out.stat().st_size == 0


def test_groups_of_experts_come_back(out: Path) -> None:
    changes = {"n_routed_experts": 12, "n_group": 4, "topk_group": 2, "norm_topk_prob": False}
    model = _random(hybrid_override_pattern="ME*", **changes)
    _write(model, out, "f32")
    assert replace(open_model(out).config, chunk_size=8, dtype="bfloat16") == model.config


def test_the_sample_comes_back_with_its_tokenizer(out: Path, tmp_path: Path) -> None:
    source = replace(open_model("sample"), chat_template="{{ messages }}")
    assert _write(source, out, "bf16").notes == ()
    said = _metadata(out)
    assert said["tokenizer.ggml.pre"] == "gpt-2"
    assert len(said["tokenizer.ggml.tokens"]) == source.config.vocab_size
    assert said["tokenizer.chat_template"] == "{{ messages }}"
    model = open_model(out)
    assert (model.chat_template, model.generation) == ("{{ messages }}", source.generation)
    artifact = tmp_path / "artifact"
    executable = compile(model, target="reference", destination=artifact)
    found, expected = Tokenizer.open(artifact / "tokenizer"), Tokenizer.open(CHECKPOINT)
    text = "def main():\n    return 1"
    assert found.encode(text) == expected.encode(text)
    assert found.template == "{{ messages }}"
    ids = torch.tensor([expected.encode(text)])
    assert executable.generate(ids, max_new_tokens=4).shape[1] in (4, ids.shape[1] + 4)
    assert torch.equal(eager_reference(model)(ids), eager_reference(source)(ids))
    released = tmp_path / "released"
    released.mkdir()
    write_release(model, released, "modelopt")
    assert open_model(released).tokenizer_dir == released
    assert open_model(released).chat_template == "{{ messages }}"
    assert Tokenizer.open(released).encode(text) == expected.encode(text)


def test_a_tokenizer_that_has_no_words_there_is_left_out_and_said_so(
    tmp_path: Path, out: Path
) -> None:
    source = open_model("sample")
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unigram"}, "decoder": null}')
    written = _write(replace(source, tokenizer_dir=tmp_path), out, "bf16")
    assert written.notes == ("the file has no tokenizer: it is not byte-pair encoding of bytes",)
    assert _metadata(out)["tokenizer.ggml.model"] == "none"
    assert open_model(out).notes == ()


def test_a_scope_of_all_matrices_has_no_parts(sources: dict[str, Path], out: Path) -> None:
    with pytest.raises(NemocError, match="scope 'experts': bf16 is of all matrices, expected all"):
        _write(sources["moe"], out, "bf16", "experts")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), NemocError("damaged")]
)
def test_an_interrupted_write_leaves_nothing(
    sources: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    read, calls = Checkpoint.read, iter(range(10**6))

    def failing(self: Checkpoint, *args: Any) -> torch.Tensor:
        if next(calls) == 7:
            raise error
        return read(self, *args)

    monkeypatch.setattr(Checkpoint, "read", failing)
    arguments = ["quantize", str(sources["latent"]), "-o", str(tmp_path / "new.gguf")]
    assert main([*arguments, "--format", "gguf"]) == 2
    message = capsys.readouterr().err
    assert message.count("nemoc: error: ") == 1
    assert str(error.args[-1]) in message
    assert not list(tmp_path.iterdir())


def test_the_command_writes_and_says_so(
    sources: dict[str, Path], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["quantize", str(sources["moe"]), "-o", str(out), "-q", "--format", "gguf"]
    assert main([*arguments, "--type", "q8_0", "--scope", "experts"]) == 0
    assert "16 matrices quantized" in capsys.readouterr().out
    assert open_model(out).notes == ("weights in Q8_0 are read as f32",)
    size = out.stat().st_size
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"nemoc: error: {out}: exists, and is not replaced\n"
    assert out.stat().st_size == size


def test_directories_have_one_type(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["quantize", str(sources["moe"]), "-o", str(tmp_path / "x"), "--type", "q8_0"]
    assert main([*arguments, "--format", "modelopt"]) == 2
    expected = "nemoc: error: --type q8_0: found format modelopt, expected gguf\n"
    assert capsys.readouterr().err == expected
    assert not list(tmp_path.iterdir())
