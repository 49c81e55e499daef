"""Reading GGUF files: element types, and the model in them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T
from safetensors.torch import load_file

from nemoc.ir.errors import NemocError
from nemoc.models import Checkpoint, Generation, Model, ModelConfig, eager_reference, open_model
from nemoc.models.formats import Nvfp4
from nemoc.models.gguf_file import GgufTensor, read_gguf
from nemoc.models.gguf_types import GGML_TYPES, UNREAD, GgmlType, encode_nvfp4, encode_q8_0
from support.checkpoints import write_checkpoint
from support.gguf_files import SHAPES, Arrays, Source, write_file
from support.quantized import WIDE, Tensors

pytestmark = pytest.mark.usefixtures("one_thread")


# Element types.


def _blocks(type_: GgmlType, count: int) -> np.ndarray[Any, Any]:
    """Blocks of random bytes, whose 16-bit scales are numbers, and whose E4M3 ones too."""
    data = np.random.default_rng(type_.number).integers(0, 256, (count, type_.size), dtype=np.uint8)
    at = {
        "F32": (2,),
        "Q4_1": (0, 2),
        "Q5_1": (0, 2),
        "Q4_K": (0, 2),
        "Q5_K": (0, 2),
        "Q6_K": (208,),
    }
    if type_.name == "NVFP4":
        data[:, :4] &= 0x77
    elif type_.name == "MXFP4":
        data[:, 0] &= 0x7F
    else:
        for offset in at.get(type_.name, (0,)):
            data[:, offset + 1] &= 0xBB
    return data


@pytest.mark.parametrize("type_", GGML_TYPES.values(), ids=lambda type_: type_.name)
def test_blocks_stand_for_what_the_library_says(type_: GgmlType) -> None:
    assert T(type_.number).name == type_.name
    assert gguf.GGML_QUANT_SIZES[T(type_.number)] == (type_.elements, type_.size)
    data = _blocks(type_, 300)
    found = type_.numbers(torch.from_numpy(data))
    expected = gguf.quants.dequantize(data, T(type_.number)).reshape(300, type_.elements)
    assert found.shape == (300, type_.elements)
    assert np.array_equal(found.float().numpy(), expected)
    assert np.isfinite(expected).all()


def test_other_types_are_named() -> None:
    assert {T(number).name for number in UNREAD} == set(UNREAD.values())
    assert {*UNREAD, *GGML_TYPES} == {int(number) for number in T}


@pytest.mark.parametrize("kind", [T.F16, T.BF16, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.MXFP4])
def test_rows_that_the_library_wrote_are_read(path: Path, kind: T) -> None:
    """From any element on, even in the middle of a block."""
    array = np.random.default_rng(0).normal(size=(3, 5, 96)).astype(np.float32)
    writer = gguf.GGUFWriter(path, "any")
    data = array.astype(np.float16) if kind is T.F16 else gguf.quants.quantize(array, kind)
    writer.add_tensor("x", data, raw_dtype=None if kind is T.F16 else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = read_gguf(path).tensors["x"]
    assert (tensor.type.name, tensor.shape) == (kind.name, (3, 5, 96))
    expected = data if kind is T.F16 else gguf.quants.dequantize(data, kind)
    expected = expected.astype(np.float32).reshape(-1)
    for start, count in ((0, 1440), (7, 100), (96, 1), (1439, 1), (5, 0), (31, 66)):
        out = torch.empty(count)
        tensor.read_into(out, start)
        assert np.array_equal(out.numpy(), expected[start : start + count])


def test_a_scale_for_each_part_is_applied(path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 0x77, (2, 36 * 3), dtype=np.uint8)
    path.write_bytes(data.tobytes())
    tensor = GgufTensor(path, "x", GGML_TYPES[40], (2, 3, 64), 0)
    plain, scaled = torch.empty(2, 3, 64), torch.empty(2, 3, 64)
    tensor.read_into(plain)
    tensor.read_into(scaled, 0, torch.tensor([2.0, 0.5]))
    assert torch.equal(scaled[0], plain[0] * 2)
    assert torch.equal(scaled[1], plain[1] / 2)
    part = torch.empty(80)
    tensor.read_into(part, 3 * 64 - 40, torch.tensor([2.0, 0.5]))
    assert torch.equal(part, scaled.view(-1)[3 * 64 - 40 :][:80])


def test_q8_0_is_written_as_the_library_does() -> None:
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    x[2, :32] = 0
    x[3] = torch.arange(256) * 0.5 - 63.5  # ties
    expected = gguf.quants.quantize(x.numpy(), T.Q8_0)
    assert np.array_equal(encode_q8_0(x).numpy(), expected)


def test_nvfp4_is_another_order_of_the_same_bits() -> None:
    random = np.random.default_rng(0)
    codes = random.integers(0, 256, (3, 64), dtype=np.uint8)
    scales = random.integers(0, 0x7F, (3, 8), dtype=np.uint8)
    packed = encode_nvfp4(
        torch.from_numpy(codes), torch.from_numpy(scales).view(torch.float8_e4m3fn)
    )
    assert packed.shape == (3, 72)
    found = gguf.quants.dequantize(packed.numpy(), T.NVFP4)
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    single = np.stack([codes & 15, codes >> 4], -1).reshape(3, 128)
    numbers = magnitudes[single & 7] * np.where(single & 8, -1, 1)
    steps = torch.from_numpy(scales).view(torch.float8_e4m3fn).float().numpy().repeat(16, 1)
    assert np.array_equal(found, numbers * steps)


# The model.


def _weights(model: Model) -> Tensors:
    return dict(eager_reference(model).state_dict())


def _in_memory(config: ModelConfig, tensors: Tensors) -> Model:
    source = Checkpoint.of_state_dict(tensors, config, "memory")
    return Model("memory", config, source, Generation((), None, None))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_is_what_was_converted(
    gguf_sources: dict[str, Source], shape: str, path: Path
) -> None:
    config, tensors = gguf_sources[shape]
    write_file(path, tensors, config)
    model = open_model(path)
    assert model.name == "model"
    assert model.config == replace(config, eos_token_ids=(), pad_token_id=None)
    assert (model.notes, model.tokenizer_files(), model.directory) == ((), {}, None)
    expected = _weights(_in_memory(config, tensors))
    for name, weight in _weights(model).items():
        if name.endswith(".A_log"):
            assert torch.allclose(weight, expected[name], rtol=0, atol=2e-7)
        else:
            assert torch.equal(weight, expected[name]), name


def test_it_is_read_in_slices(gguf_sources: dict[str, Source], path: Path) -> None:
    config, tensors = gguf_sources["latent"]
    write_file(path, tensors, config, types=lambda n: T.F16 if "_exps" in n else T.F32)
    source = open_model(path).parameters
    assert source is not None
    for name, first, last in (
        ("layers.1.mixer.experts.up_proj", 2, 5),
        ("layers.0.mixer.in_proj.weight", 3, 50),
        ("layers.0.mixer.norm.weight", 5, 40),
        ("layers.0.mixer.conv1d.weight", 5, 40),
        ("layers.0.mixer.A_log", 1, 4),
    ):
        whole = source.read(name)
        assert torch.equal(source.read(name, first, last), whole[first:last])
        assert whole.dtype is source.type_of(name).dtype.torch
    assert str(source.type_of("layers.1.mixer.experts.up_proj")) == "f16[7, 32, 16]"
    assert str(source.type_of("layers.0.mixer.conv1d.weight")) == "f32[168, 1, 4]"


def _k_quant(name: str, kind: T) -> T:
    return kind if name.endswith(("ssm_in.weight", "ffn_up_exps.weight")) else T.F32


@pytest.mark.parametrize("kind", [T.Q8_0, T.Q4_0, T.Q5_0, T.MXFP4, T.BF16])
def test_quantized_weights_are_what_the_library_reads(
    gguf_sources: dict[str, Source], path: Path, kind: T
) -> None:
    changes = WIDE | SHAPES["moe"] | {"hidden_size": 64}
    config, tensors = _model(path, changes)
    expected = write_file(path, tensors, config, types=lambda name: _k_quant(name, kind))
    model = open_model(path)
    assert model.notes == (() if kind is T.BF16 else (f"weights in {kind.name} are read as f32",))
    weights = _weights(model)
    for layer, name, gguf_name in (
        (0, "in_proj.weight", "ssm_in"),
        (1, "experts.up_proj", "ffn_up_exps"),
    ):
        found = weights[f"backbone.layers.{layer}.mixer.{name}"]
        assert np.array_equal(found.numpy(), expected[f"blk.{layer}.{gguf_name}.weight"])


def _model(path: Path, changes: dict[str, Any]) -> Source:
    directory = path.parent / "source"
    write_checkpoint(directory, **changes)
    return ModelConfig.from_file(directory), load_file(directory / "model.safetensors")


@pytest.mark.parametrize("kind", [T.Q4_K, T.Q5_K, T.Q6_K, T.IQ4_NL, T.NVFP4])
def test_blocks_that_only_llama_cpp_writes_are_read(path: Path, kind: T) -> None:
    """Of bytes at random, since the package cannot quantize to these."""
    changes = WIDE | {"hybrid_override_pattern": "*", "hidden_size": 256}
    config, tensors = _model(path, changes)
    type_ = GGML_TYPES[kind]
    rows = 96
    blocks = _blocks(type_, rows * 256 // type_.elements)
    data = blocks.reshape(rows, -1)
    taken: Arrays = {}
    scales = np.array([0.25], np.float32)

    def metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.0.attn_q.weight", data, raw_dtype=kind)
        if kind is T.NVFP4:
            writer.add_tensor("blk.0.attn_q.scale", scales)
            writer.add_tensor("blk.0.attn_q.input_scale", scales)

    def change(arrays: Arrays) -> None:
        taken["q"] = arrays.pop("blk.0.attn_q.weight")

    write_file(path, tensors, config, change=change, metadata=metadata)
    model = open_model(path)
    expected = gguf.quants.dequantize(data, kind) * (0.25 if kind is T.NVFP4 else 1)
    found = _weights(model)["backbone.layers.0.mixer.q_proj.weight"].numpy()
    assert found.shape == taken["q"].shape
    assert np.array_equal(found, expected)
    kept = kind is T.NVFP4
    assert model.notes == (() if kept else (f"weights in {kind.name} are read as f32",))
    name = "layers.0.mixer.q_proj.weight"
    assert model.quantization.formats == ({name: Nvfp4()} if kept else {})


def _with_nvfp4(path: Path, tensors: Arrays) -> Model:
    """A model of experts in which some weights are blocks in NVFP4, or have scales."""
    config, numbers = _model(path, WIDE | SHAPES["latent"] | {"moe_latent_size": 64})

    def metadata(writer: gguf.GGUFWriter) -> None:
        for name, data in tensors.items():
            kind = T.NVFP4 if data.dtype == np.uint8 else T.F32
            writer.add_tensor(name, data, raw_dtype=kind)

    def change(arrays: Arrays) -> None:
        for name in arrays.keys() & tensors.keys():
            del arrays[name]

    write_file(path, numbers, config, change=change, metadata=metadata)
    return open_model(path)


def test_stacks_have_a_scale_for_each_expert(path: Path) -> None:
    data = _blocks(GGML_TYPES[40], 7 * 32).reshape(7, 32, 36)
    scales = np.linspace(0.5, 2, 7, dtype=np.float32)
    model = _with_nvfp4(path, {"blk.1.ffn_up_exps.weight": data, "blk.1.ffn_up_exps.scale": scales})
    codes = gguf.quants.dequantize(data, T.NVFP4)
    found = _weights(model)["backbone.layers.1.mixer.experts.up_proj"].numpy()
    np.testing.assert_allclose(found, codes * scales[:, None, None], rtol=2e-7)


def test_nvfp4_of_linear_layers_stays_packed(path: Path) -> None:
    data = _blocks(GGML_TYPES[40], 7 * 32).reshape(7, 32, 36)
    inputs = np.linspace(1, 3, 7, dtype=np.float32)
    model = _with_nvfp4(
        path,
        {
            "blk.1.ffn_up_exps.weight": data,
            "blk.1.ffn_up_exps.input_scale": inputs,
            "blk.5.ffn_up_exps.weight": data[::-1].copy(),
            "blk.5.ffn_up_exps.input_scale": inputs[:1],
        },
    )
    one, other = (f"layers.{n}.mixer.experts.up_proj" for n in (1, 5))
    assert model.quantization.formats == {one: Nvfp4(), other: Nvfp4(activations=False)}
    assert model.scales == (f"{one}.input_scale",)
    assert model.notes == ("1 scales of activations are ignored",)
    source = model.parameters
    assert source is not None
    stored = {
        name: source.read(f"{one}{name}")
        for name in ("", ".weight_scale", ".weight_scale_2", ".input_scale")
    }
    assert {name: f"{t.dtype} {list(t.shape)}" for name, t in stored.items()} == {
        "": "torch.uint8 [7, 32, 32]",
        ".weight_scale": "torch.float8_e4m3fn [7, 32, 4]",
        ".weight_scale_2": "torch.float32 [7]",
        ".input_scale": "torch.float32 [7]",
    }
    again = encode_nvfp4(stored[""], stored[".weight_scale"])
    assert np.array_equal(again.numpy(), data)
    assert stored[".weight_scale_2"].tolist() == [1.0] * 7
    assert np.array_equal(stored[".input_scale"].numpy(), inputs)
    for name, whole in stored.items():
        part = source.read(f"{one}{name}", 4, 6)
        assert torch.equal(part.view(torch.uint8), whole[4:6].view(torch.uint8))
    flipped = source.read(other)
    assert torch.equal(flipped.flip(0), stored[""])


def test_nvfp4_of_what_no_product_reads_is_numbers(path: Path) -> None:
    """Tables of embeddings and routers, which no kernel decodes."""
    config, tensors = _model(path, WIDE | SHAPES["latent"] | {"hidden_size": 64})
    data = _blocks(GGML_TYPES[40], config.vocab_size).reshape(config.vocab_size, 36)
    write_file(
        path,
        tensors,
        config,
        change=lambda arrays: arrays.pop("token_embd.weight"),
        metadata=lambda w: w.add_tensor("token_embd.weight", data, raw_dtype=T.NVFP4),
    )
    model = open_model(path)
    assert model.quantization.formats == {}
    assert model.notes == ("weights in NVFP4 are read as f32",)
    assert model.parameters is not None
    found = model.parameters.read("embeddings.weight").numpy()
    assert np.array_equal(found, gguf.quants.dequantize(data, T.NVFP4))


def test_a_scale_of_a_block_that_is_no_number_is_refused_by_name(path: Path) -> None:
    data = _blocks(GGML_TYPES[40], 7 * 32).reshape(7, 32, 36)
    data[3, 5, 2] = 0x7F
    model = _with_nvfp4(path, {"blk.1.ffn_up_exps.weight": data})
    assert model.parameters is not None
    with pytest.raises(NemocError) as refusal:
        model.parameters.read("layers.1.mixer.experts.up_proj.weight_scale")
    assert str(refusal.value) == (
        f"{path}: tensor 'blk.1.ffn_up_exps.weight': found NaN, expected finite weights"
    )


def test_a_tied_head_has_no_tensor(gguf_sources: dict[str, Source], path: Path) -> None:
    config, tensors = gguf_sources["dense"]
    write_file(path, tensors, config, change=lambda arrays: arrays.pop("output.weight"))
    model = open_model(path)
    assert model.config.tie_word_embeddings
    assert "lm_head.weight" not in {p.name for p in model.build_step().params}


def test_multi_token_prediction_is_ignored_and_said_so(
    gguf_sources: dict[str, Source], path: Path
) -> None:
    config, tensors = gguf_sources["moe"]
    more = replace(config, layers=(*config.layers, "moe"))

    def change(arrays: Arrays) -> None:
        arrays["blk.4.nextn.enorm.weight"] = np.ones(48, np.float32)
        arrays["blk.4.attn_q.weight"] = np.ones((4, 48), np.float32)

    write_file(path, tensors, more, change=change, metadata=lambda w: w.add_nextn_predict_layers(1))
    model = open_model(path)
    assert model.config.layers == config.layers
    assert model.notes == (
        "2 tensors from blk.4 on are ignored: multi-token prediction is not built",
    )


def test_ends_of_a_generation(gguf_sources: dict[str, Source], path: Path) -> None:
    config, tensors = gguf_sources["dense"]

    def metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(11)
        writer.add_eot_token_id(2)
        writer.add_pad_token_id(0)

    write_file(path, tensors, config, metadata=metadata)
    found = open_model(path).generation
    assert (found.bos_token_id, found.eos_token_ids, found.pad_token_id) == (1, (11, 2), 0)
