"""Reading GGUF files: element types, the model in them, tokenizers, and one line for every kind of damage."""

import json
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from gguf import GGMLQuantizationType as T
from safetensors.torch import load_file

from nemoc.ir import NemocError
from nemoc.models import Checkpoint, Generation, Model, ModelConfig, eager_reference, open_model
from nemoc.models.gguf_file import GgufTensor, read_gguf
from nemoc.models.gguf_tokenizer import tokenizer_files, tokenizer_metadata
from nemoc.models.gguf_types import GGML_TYPES, UNREAD, GgmlType, encode_nvfp4, encode_q8_0
from nemoc.models.sample import CHECKPOINT
from support.checkpoints import write_checkpoint
from support.gguf_files import Arrays, write_file
from support.quantized import WIDE, Tensors

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES: dict[str, dict[str, Any]] = {
    "latent": {"hybrid_override_pattern": "MEM*ME"},
    "moe": {"hybrid_override_pattern": "ME*M", "moe_latent_size": None},
    "dense": {"hybrid_override_pattern": "M*-M"},
    "both": {"hybrid_override_pattern": "ME*-"},
}
"""Changes to `WIDE`."""

Source = tuple[ModelConfig, Tensors]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """Models as checkpoints hold them, f32."""
    found = {}
    for name, changes in SHAPES.items():
        directory = tmp_path_factory.mktemp(name)
        write_checkpoint(directory, **(WIDE | changes))
        config = replace(ModelConfig.from_file(directory), mtp_layers=(), chunk_size=128)
        tensors = load_file(directory / "model.safetensors")
        found[name] = replace(config, num_nextn_predict_layers=0, bos_token_id=None), tensors
    return found


@pytest.fixture(scope="module")
def whole(sources: dict[str, Source], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file without fault."""
    path = tmp_path_factory.mktemp("whole") / "model.gguf"
    config, tensors = sources["moe"]
    write_file(path, tensors, config)
    return path.read_bytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


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
def test_a_model_is_what_was_converted(sources: dict[str, Source], shape: str, path: Path) -> None:
    config, tensors = sources[shape]
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


def test_it_is_read_in_slices(sources: dict[str, Source], path: Path) -> None:
    config, tensors = sources["latent"]
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
    sources: dict[str, Source], path: Path, kind: T
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
    kept: Arrays = {}
    scales = np.array([0.25], np.float32)

    def metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.0.attn_q.weight", data, raw_dtype=kind)
        if kind is T.NVFP4:
            writer.add_tensor("blk.0.attn_q.scale", scales)
            writer.add_tensor("blk.0.attn_q.input_scale", scales)

    def change(arrays: Arrays) -> None:
        kept["q"] = arrays.pop("blk.0.attn_q.weight")

    write_file(path, tensors, config, change=change, metadata=metadata)
    model = open_model(path)
    expected = gguf.quants.dequantize(data, kind) * (0.25 if kind is T.NVFP4 else 1)
    found = _weights(model)["backbone.layers.0.mixer.q_proj.weight"].numpy()
    assert found.shape == kept["q"].shape
    assert np.array_equal(found, expected)
    said = f"weights in {kind.name} are read as f32"
    more = ("1 scales of activations are ignored",) if kind is T.NVFP4 else ()
    assert model.notes == (*more, said)


def test_stacks_have_a_scale_for_each_expert(path: Path) -> None:
    config, tensors = _model(path, WIDE | SHAPES["latent"] | {"moe_latent_size": 64})
    data = _blocks(GGML_TYPES[40], 7 * 32).reshape(7, 32, 36)
    scales = np.linspace(0.5, 2, 7, dtype=np.float32)

    def metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.1.ffn_up_exps.weight", data, raw_dtype=T.NVFP4)
        writer.add_tensor("blk.1.ffn_up_exps.scale", scales)

    write_file(
        path,
        tensors,
        config,
        change=lambda arrays: arrays.pop("blk.1.ffn_up_exps.weight"),
        metadata=metadata,
    )
    model = open_model(path)
    codes = gguf.quants.dequantize(data, T.NVFP4)
    found = _weights(model)["backbone.layers.1.mixer.experts.up_proj"].numpy()
    np.testing.assert_allclose(found, codes * scales[:, None, None], rtol=2e-7)
    assert model.parameters is not None
    part = model.parameters.read("layers.1.mixer.experts.up_proj", 4, 6)
    assert np.array_equal(part.numpy(), found[4:6])


def test_a_tied_head_has_no_tensor(sources: dict[str, Source], path: Path) -> None:
    config, tensors = sources["dense"]
    write_file(path, tensors, config, change=lambda arrays: arrays.pop("output.weight"))
    model = open_model(path)
    assert model.config.tie_word_embeddings
    assert "lm_head.weight" not in {p.name for p in model.build_step().params}


def test_multi_token_prediction_is_ignored_and_said_so(
    sources: dict[str, Source], path: Path
) -> None:
    config, tensors = sources["moe"]
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


def test_ends_of_a_generation(sources: dict[str, Source], path: Path) -> None:
    config, tensors = sources["dense"]

    def metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(11)
        writer.add_eot_token_id(2)
        writer.add_pad_token_id(0)

    write_file(path, tensors, config, metadata=metadata)
    found = open_model(path).generation
    assert (found.bos_token_id, found.eos_token_ids, found.pad_token_id) == (1, (11, 2), 0)


# Damage.


def _refusal(path: Path) -> str:
    with pytest.raises(NemocError) as caught:
        open_model(path)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(path), "FILE")


def _header(*parts: bytes, tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)


def _text(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def _key(name: str, kind: int, value: bytes) -> bytes:
    return _text(name) + struct.pack("<I", kind) + value


def _tensor(name: str, axes: tuple[int, ...], kind: int, offset: int = 0) -> bytes:
    shape = struct.pack(f"<I{len(axes)}Q", len(axes), *axes)
    return _text(name) + shape + struct.pack("<IQ", kind, offset)


_HUGE = 1 << 62

_FILES: list[tuple[str, bytes, str]] = [
    ("empty", b"", "a magic number: found 4 bytes to come, expected at most 0"),
    ("zip", b"PK\x03\x04" + bytes(99), "is no GGUF file: starts with b'PK\\x03\\x04'"),
    ("magic alone", b"GGUF", "a version: found 4 bytes to come, expected at most 0"),
    ("old version", _header(version=1), "found GGUF version 1, expected 2 or 3"),
    ("big-endian", b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "found GGUF version 50331648"),
    ("tensors without end", _header(tensors=_HUGE), f"{_HUGE} tensors and 0 entries of metadata: "),
    ("keys without end", _header(keys=_HUGE), f"0 tensors and {_HUGE} entries of metadata: found"),
    ("cut in a key", _header(struct.pack("<Q", 99), bytes(9), keys=1), "a key: found 99 bytes"),
    (
        "a key without end",
        _header(struct.pack("<Q", _HUGE), bytes(9), keys=1),
        f"a key: found {_HUGE} bytes to come",
    ),
    (
        "text that is no UTF-8",
        _header(_key("x", 8, _text(b"\xff\xfe")), keys=1),
        "x: found text that is not UTF-8",
    ),
    (
        "unknown kind of metadata",
        _header(_key("x", 13, bytes(8)), keys=1),
        "x: found metadata of type 13, expected one of 0 to 12",
    ),
    (
        "list of lists",
        _header(_key("x", 9, struct.pack("<IQ", 9, 1)), bytes(20), keys=1),
        "x: found a list of type 9, expected numbers or text",
    ),
    (
        "list without end",
        _header(_key("x", 9, struct.pack("<IQ", 6, _HUGE)), keys=1),
        f"x: {_HUGE} numbers: found",
    ),
    (
        "texts without end",
        _header(_key("x", 9, struct.pack("<IQ", 8, _HUGE)), keys=1),
        f"x: {_HUGE} texts: found",
    ),
    (
        "a key twice",
        _header(_key("x", 4, bytes(4)), _key("x", 4, bytes(4)), keys=2),
        "x: is there twice",
    ),
    (
        "odd alignment",
        _header(_key("general.alignment", 4, struct.pack("<I", 24)), keys=1),
        "general.alignment: found 24, expected a power of two",
    ),
    (
        "five axes",
        _header(_tensor("x", (1, 1, 1, 1, 1), 0), tensors=1),
        "tensor 'x': found 5 axes, expected 1 to 4",
    ),
    ("unread type", _header(_tensor("x", (256,), 11), tensors=1), "tensor 'x': found type Q3_K"),
    ("unknown type", _header(_tensor("x", (256,), 99), tensors=1), "tensor 'x': found type 99"),
    (
        "a part of a block",
        _header(_tensor("x", (40,), 8), bytes(200), tensors=1),
        "tensor 'x': found rows of 40, expected a multiple of 32 for Q8_0",
    ),
    (
        "no elements",
        _header(_tensor("x", (0, 4), 0), tensors=1),
        "tensor 'x': found shape [4, 0] in a file of",
    ),
    (
        "elements without end",
        _header(_tensor("x", (_HUGE, _HUGE), 0), tensors=1),
        f"tensor 'x': found shape [{_HUGE}, {_HUGE}] in a file of",
    ),
    (
        "a gap",
        _header(_tensor("x", (8,), 0, 64), bytes(200), tensors=1),
        "tensor 'x': starts at byte 64 of the data, expected 0",
    ),
    (
        "an overlap",
        _header(_tensor("x", (8,), 0), _tensor("y", (8,), 0, 0), bytes(200), tensors=2),
        "tensor 'y': starts at byte 0 of the data, expected 32",
    ),
    (
        "a name twice",
        _header(_tensor("x", (8,), 0), _tensor("x", (8,), 0, 32), bytes(200), tensors=2),
        "tensor 'x': is there twice",
    ),
    (
        "no data",
        _header(_tensor("x", (16,), 0), tensors=1),
        "is truncated: found 57 bytes, expected 128 or more",
    ),
]


@pytest.mark.parametrize(
    ("content", "expected"), [f[1:] for f in _FILES], ids=[f[0].replace(" ", "-") for f in _FILES]
)
def test_files_that_are_not_whole_are_refused(path: Path, content: bytes, expected: str) -> None:
    path.write_bytes(content)
    assert _refusal(path).startswith(f"FILE: {expected}")


def test_a_file_cut_anywhere_gives_one_line(path: Path, whole: bytes) -> None:
    size = len(whole)
    for end in [*Random(0).sample(range(size), 60), size - 1]:
        path.write_bytes(whole[:end])
        assert _refusal(path).startswith("FILE: ")


def test_damage_anywhere_in_the_header_gives_one_line(path: Path, whole: bytes) -> None:
    path.write_bytes(whole)
    end = min(tensor.offset for tensor in read_gguf(path).tensors.values())
    random, refused = Random(0), 0
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(random.choice([1, 1, 4])):
            damaged[random.randrange(end)] = random.choice([0, 1, 3, 9, 0x7F, 0xFF])
        path.write_bytes(damaged)
        try:
            open_model(path)
        except NemocError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 100


def test_a_file_that_shrinks_after_opening_is_refused_when_read(path: Path, whole: bytes) -> None:
    path.write_bytes(whole)
    model = open_model(path)
    source, names = model.parameters, [p.name for p in model.build_step().params]
    assert source is not None
    path.write_bytes(whole[:-3000])
    with pytest.raises(
        NemocError, match=r"tensor '[a-z_.0-9]+': the file ends [0-9]+ bytes too early"
    ):
        for name in names:
            source.read(name)


Change = Callable[[Arrays], object]

_EDITS: list[tuple[str, Change, str]] = [
    (
        "missing tensor",
        lambda a: a.pop("blk.0.ssm_in.weight"),
        "FILE: tensor 'blk.0.ssm_in.weight': found nothing, expected shape [270, 48]",
    ),
    (
        "missing experts",
        lambda a: a.pop("blk.1.ffn_up_exps.weight"),
        "FILE: tensor 'blk.1.ffn_up_exps.weight': found nothing, expected shape [7, 32, 48]",
    ),
    (
        "missing embeddings",
        lambda a: a.pop("token_embd.weight"),
        "FILE: tensor 'token_embd.weight': found nothing",
    ),
    (
        "surplus tensor",
        lambda a: a.update({"rope_freqs.weight": np.ones(4, np.float32)}),
        "FILE: tensor 'rope_freqs.weight': found F32 [4], expected no such tensor",
    ),
    (
        "wrong shape",
        lambda a: a.update({"blk.0.ssm_in.weight": np.ones((48, 270), np.float32)}),
        "FILE: tensor 'blk.0.ssm_in.weight': found shape [48, 270], expected [270, 48]",
    ),
    (
        "one expert too few",
        lambda a: a.update({"blk.1.ffn_up_exps.weight": np.ones((6, 32, 48), np.float32)}),
        "FILE: tensor 'blk.1.ffn_up_exps.weight': found shape [6, 32, 48], expected [7, 32, 48]",
    ),
    (
        "too few scales",
        lambda a: a.update({"blk.1.ffn_up_exps.scale": np.ones(6, np.float32)}),
        "FILE: tensor 'blk.1.ffn_up_exps.scale': found F32 [6], expected F32 [7]",
    ),
]


@pytest.mark.parametrize(
    ("change", "expected"), [e[1:] for e in _EDITS], ids=[e[0].replace(" ", "-") for e in _EDITS]
)
def test_tensors_that_do_not_fit_the_model_are_refused(
    sources: dict[str, Source], path: Path, change: Change, expected: str
) -> None:
    config, tensors = sources["moe"]
    write_file(path, tensors, config, change=change)
    assert _refusal(path) == expected


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("ssm_a", 0.0, "tensor 'blk.0.ssm_a': found 0, expected negative numbers"),
        ("ssm_d", np.nan, "tensor 'blk.0.ssm_d': found NaN, expected finite weights"),
        ("ssm_in.weight", np.inf, "found an infinite value, expected finite weights"),
    ],
)
def test_weights_that_are_none_are_refused_by_name_when_read(
    sources: dict[str, Source], path: Path, name: str, value: float, expected: str
) -> None:
    config, tensors = sources["moe"]

    def change(arrays: Arrays) -> None:
        arrays[f"blk.0.{name}"] = arrays[f"blk.0.{name}"].copy()
        arrays[f"blk.0.{name}"][3] = value

    write_file(path, tensors, config, change=change)
    with pytest.raises(NemocError, match=re.escape(expected)):
        eager_reference(open_model(path))


def _with(**values: Any) -> Callable[[gguf.GGUFWriter], None]:
    """Metadata in place of what the writer has; None removes it."""

    def metadata(writer: gguf.GGUFWriter) -> None:
        entries = writer.kv_data[0]
        for name, value in values.items():
            key = name.replace("__", ".")
            entries.pop(key, None)
            match value:
                case None:
                    pass
                case list():
                    writer.add_array(key, value)
                case str():
                    writer.add_string(key, value)
                case float():
                    writer.add_float32(key, value)
                case _:
                    writer.add_uint32(key, value)

    return metadata


_SAID: list[tuple[str, dict[str, Any], str]] = [
    (
        "another architecture",
        {"general__architecture": "llama"},
        "general.architecture: found 'llama', expected one of nemotron_h, nemotron_h_moe",
    ),
    (
        "no architecture",
        {"general__architecture": None},
        "general.architecture: found '', expected one of",
    ),
    (
        "a part",
        {"split__count": 3},
        "split.count: found 3, expected a whole file (llama-gguf-split --merge makes one)",
    ),
    (
        "no width",
        {"nemotron_h_moe__embedding_length": None},
        "nemotron_h_moe.embedding_length: found nothing, expected an integer of at least 1",
    ),
    (
        "a text for a number",
        {"nemotron_h_moe__ssm__inner_size": "96"},
        "nemotron_h_moe.ssm.inner_size: found '96', expected an integer",
    ),
    (
        "heads that do not divide",
        {"nemotron_h_moe__ssm__time_step_rank": 7},
        "nemotron_h_moe.ssm.inner_size: found 96, expected a multiple of the 7 heads",
    ),
    (
        "no groups",
        {"nemotron_h_moe__ssm__group_count": 0},
        "nemotron_h_moe.ssm.group_count: found 0, expected an integer of at least 1",
    ),
    (
        "too few layers",
        {"nemotron_h_moe__attention__head_count_kv": [0, 0, 2]},
        "nemotron_h_moe.attention.head_count_kv: found 3 numbers, expected 4, one for each block",
    ),
    (
        "more blocks than tensors",
        {"nemotron_h_moe__block_count": 4_000_000_000},
        "nemotron_h_moe.block_count: found 4000000000, expected at most 33, the tensors",
    ),
    (
        "no blocks but a head",
        {"nemotron_h_moe__nextn_predict_layers": 4},
        "nemotron_h_moe.nextn_predict_layers: found 4, expected less than 4",
    ),
    (
        "experts of several widths",
        {"nemotron_h_moe__expert_used_count": [3, 3, 3, 2]},
        "",
    ),
    (
        "keys wider than values",
        {"nemotron_h_moe__attention__value_length": 8},
        "nemotron_h_moe.attention.value_length: found 8, expected 16, as of keys",
    ),
    (
        "no epsilon",
        {
            "nemotron_h_moe__attention__layer_norm_epsilon": None,
            "nemotron_h_moe__attention__layer_norm_rms_epsilon": None,
        },
        "nemotron_h_moe.attention.layer_norm_epsilon: found nothing, expected a positive number",
    ),
    (
        "an epsilon that is none",
        {"nemotron_h_moe__attention__layer_norm_rms_epsilon": -1.0},
        "nemotron_h_moe.attention.layer_norm_rms_epsilon: found -1.0, expected a positive number",
    ),
    (
        "more experts than there are",
        {"nemotron_h_moe__expert_used_count": 8},
        "num_experts_per_tok: found 8, expected at most 7, the experts to choose from",
    ),
]


@pytest.mark.parametrize(
    ("values", "expected"), [s[1:] for s in _SAID], ids=[s[0].replace(" ", "-") for s in _SAID]
)
def test_metadata_that_is_wrong_is_refused(
    sources: dict[str, Source], path: Path, values: dict[str, Any], expected: str
) -> None:
    config, tensors = sources["moe"]
    write_file(path, tensors, config, metadata=_with(**values))
    if expected:
        assert _refusal(path).startswith(f"FILE: {expected}")
    else:
        assert open_model(path).config.num_experts_per_tok == 3  # the layer with another has none


def test_layers_of_a_kind_that_differ_are_refused(sources: dict[str, Source], path: Path) -> None:
    config, tensors = sources["latent"]
    values = [0, 32, 0, 0, 0, 64]
    metadata = _with(nemotron_h_moe__expert_feed_forward_length=values)
    write_file(path, tensors, config, metadata=metadata)
    assert _refusal(path) == (
        "FILE: nemotron_h_moe.expert_feed_forward_length: found [32, 64], "
        "expected the same number for every moe layer"
    )


# Tokenizers.

_TEXTS = (
    "def main():\n    return x[1] + 12345\n",
    "it's they'll I'M ½ ²³ é日本語 🙂\u200d x\u00a0y",
    "\t\tif x:\r\n  return",
    "<s> and </s>",
    "",
)


def _sample() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((CHECKPOINT / "tokenizer.json").read_text())
    return data


_IDS = {
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 0,
}


def test_a_tokenizer_there_and_back_encodes_alike() -> None:
    metadata = tokenizer_metadata(_sample(), 4096)
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert metadata["tokenizer.ggml.tokens"][:3] == ["<pad>", "<s>", "</s>"]
    assert metadata["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    files = tokenizer_files(metadata | _IDS)
    found = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
    expected = tokenizers.Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    for text in _TEXTS:
        ids = expected.encode(text).ids
        assert found.encode(text).ids == ids
        assert found.decode(ids) == expected.decode(ids)
    config = json.loads(files["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == (
        "<s>",
        "</s>",
        "<pad>",
    )
    assert tokenizer_metadata(json.loads(files["tokenizer.json"]), 4096) == metadata


def _split(expression: str) -> dict[str, Any]:
    pieces = {
        "type": "Split",
        "pattern": {"Regex": expression},
        "behavior": "Isolated",
        "invert": False,
    }
    flags = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    bytes_ = {"type": "ByteLevel", **flags}
    return {"type": "Sequence", "pretokenizers": [pieces, bytes_]}


_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("expression", "ignore_merges", "name"),
    [(_TEKKEN, True, "tekken"), (_LLAMA_3, True, "llama-bpe")],
)
def test_ways_to_split_have_names(expression: str, ignore_merges: bool, name: str) -> None:
    data = _sample()
    data["pre_tokenizer"] = _split(expression)
    data["model"]["ignore_merges"] = ignore_merges
    metadata = tokenizer_metadata(data, 5000)
    assert metadata["tokenizer.ggml.pre"] == name
    assert metadata["tokenizer.ggml.tokens"][-1] == "[PAD4999]"
    assert metadata["tokenizer.ggml.token_type"][-1] == 5
    files = tokenizer_files(metadata | _IDS)
    found = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
    expected = tokenizers.Tokenizer.from_str(json.dumps(data))
    for text in _TEXTS:
        assert found.encode(text).ids == expected.encode(text).ids


_UNSAYABLE: list[tuple[str, dict[str, Any], str]] = [
    ("another model", {"model": {"type": "Unigram"}}, "it is not byte-pair encoding of bytes"),
    ("no model", {"model": None}, "it is not as the library writes it"),
    ("no bytes", {"decoder": {"type": "Metaspace"}}, "it is not byte-pair encoding of bytes"),
    ("normalizer", {"normalizer": {"type": "NFC"}}, "it changes text before it splits it"),
    ("split", {"pre_tokenizer": _split("a+")}, "its way to split text has no name there"),
    ("merges", {"pre_tokenizer": _split(_TEKKEN)}, "its way to split text has no name there"),
    (
        "prefix",
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        "its way to split text has no name there",
    ),
    (
        "suffix",
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"Sequence": {}}, {"SpecialToken": {}}],
            }
        },
        "it adds other tokens than a first one to a text",
    ),
    (
        "stripping",
        {"added_tokens": [{"id": 0, "content": "<pad>", "lstrip": True}]},
        "a special token takes what is around it along",
    ),
    (
        "too many",
        {"added_tokens": [{"id": 4096, "content": "<more>"}]},
        "it has a token 4096, the model 4096 tokens",
    ),
]


@pytest.mark.parametrize(
    ("changes", "why"), [u[1:] for u in _UNSAYABLE], ids=[u[0] for u in _UNSAYABLE]
)
def test_tokenizers_that_files_have_no_words_for(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(NemocError) as caught:
        tokenizer_metadata(_sample() | changes, 4096)
    assert str(caught.value) == why


_UNREADABLE: list[tuple[str, dict[str, Any], str]] = [
    ("model", {"tokenizer.ggml.model": "llama"}, "model 'llama' is not byte-pair encoding"),
    ("split", {"tokenizer.ggml.pre": "falcon"}, "how 'falcon' splits text is not known"),
    ("no tokens", {"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is no list of texts"),
    ("twice", {"tokenizer.ggml.tokens": ["a", "a"]}, "a token is there twice"),
    ("no merges", {"tokenizer.ggml.merges": [1]}, "tokenizer.ggml.merges is no list of texts"),
    ("a merge", {"tokenizer.ggml.merges": ["abc"]}, "a merge is not of two tokens"),
    ("bytes", {"tokenizer.ggml.token_type": [6] * 4096}, "types of tokens are missing or"),
    ("end", {"tokenizer.ggml.add_eos_token": True}, "it adds a token behind each text"),
    ("unknown merge", {"tokenizer.ggml.merges": ["ÿ ÿÿÿ"]}, ""),
]


@pytest.mark.parametrize(
    ("changes", "why"), [u[1:] for u in _UNREADABLE], ids=[u[0] for u in _UNREADABLE]
)
def test_tokenizers_that_are_not_translated(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(NemocError) as caught:
        tokenizer_files(tokenizer_metadata(_sample(), 4096) | _IDS | changes)
    assert str(caught.value).startswith(why)
    assert "\n" not in str(caught.value)


def test_a_model_opens_without_a_tokenizer_that_is_not_translated(
    sources: dict[str, Source], path: Path
) -> None:
    config, tensors = sources["dense"]

    def metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("falcon")

    write_file(path, tensors, config, metadata=metadata)
    model = open_model(path)
    assert model.tokenizer_files() == {}
    assert model.notes == ("the tokenizer is ignored: how 'falcon' splits text is not known",)
