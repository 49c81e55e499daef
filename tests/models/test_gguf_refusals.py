"""Damaged GGUF files, and such as do not fit: one line for each kind."""

import re
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import gguf
import numpy as np
import pytest

from nemoc.ir import NemocError
from nemoc.models import eager_reference, open_model
from nemoc.models.gguf_file import read_gguf
from support.gguf_files import Arrays, Source, write_file

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(gguf_sources: dict[str, Source], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file without fault."""
    path = tmp_path_factory.mktemp("whole") / "model.gguf"
    config, tensors = gguf_sources["moe"]
    write_file(path, tensors, config)
    return path.read_bytes()


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
    gguf_sources: dict[str, Source], path: Path, change: Change, expected: str
) -> None:
    config, tensors = gguf_sources["moe"]
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
    gguf_sources: dict[str, Source], path: Path, name: str, value: float, expected: str
) -> None:
    config, tensors = gguf_sources["moe"]

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
    gguf_sources: dict[str, Source], path: Path, values: dict[str, Any], expected: str
) -> None:
    config, tensors = gguf_sources["moe"]
    write_file(path, tensors, config, metadata=_with(**values))
    if expected:
        assert _refusal(path).startswith(f"FILE: {expected}")
    else:
        assert open_model(path).config.num_experts_per_tok == 3  # the layer with another has none


def test_layers_of_a_kind_that_differ_are_refused(
    gguf_sources: dict[str, Source], path: Path
) -> None:
    config, tensors = gguf_sources["latent"]
    values = [0, 32, 0, 0, 0, 64]
    metadata = _with(nemotron_h_moe__expert_feed_forward_length=values)
    write_file(path, tensors, config, metadata=metadata)
    assert _refusal(path) == (
        "FILE: nemotron_h_moe.expert_feed_forward_length: found [32, 64], "
        "expected the same number for every moe layer"
    )
