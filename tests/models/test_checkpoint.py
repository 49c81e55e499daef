"""Reading checkpoints: every spelling of the names, slices, and one line for every kind of damage."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemoc.ir import NemocError
from nemoc.models import Checkpoint, ModelConfig, open_model
from support.checkpoints import write_checkpoint, write_zeros

IN_PROJ = "backbone.layers.0.mixer.in_proj.weight"
UP_4 = "backbone.layers.1.mixer.experts.4.up_proj.weight"

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as transformers writes it; not to be changed."""
    directory = tmp_path_factory.mktemp("written")
    write_checkpoint(directory)
    return directory


@pytest.fixture
def checkpoint(written: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(written, tmp_path / "model"))


def _edit(directory: Path, change: Callable[[Tensors], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def _rename(directory: Path, rename: Callable[[str], str]) -> None:
    path = directory / "model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path)


def _open(directory: Path) -> Checkpoint:
    return Checkpoint.open(directory, ModelConfig.from_file(directory))


def _refusal(directory: Path) -> str:
    """The one-line error that opening a directory gives, without the directory's own name."""
    with pytest.raises(NemocError) as caught:
        open_model(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(directory), "DIR")


def _all(source: Checkpoint, like: Path) -> Tensors:
    names = [p.name for p in open_model(like).build_step().params]
    return {name: source.read(name) for name in names}


def _assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_stacks_the_experts_that_transformers_wrote_one_by_one(written: Path) -> None:
    source, stored = _open(written), load_file(written / "model.safetensors")
    name = "layers.1.mixer.experts.up_proj"
    assert str(source.type_of(name)) == "f32[7, 18, 40]"
    parts = [stored[f"backbone.layers.1.mixer.experts.{i}.up_proj.weight"] for i in range(7)]
    assert torch.equal(source.read(name), torch.stack(parts))
    assert torch.equal(source.read(name, 2, 5), torch.stack(parts[2:5]))


def test_reads_rows_of_the_first_axis(written: Path) -> None:
    source, stored = _open(written), load_file(written / "model.safetensors")
    name = "layers.0.mixer.in_proj.weight"
    assert torch.equal(source.read(name, 3, 10), stored[IN_PROJ][3:10])
    assert torch.equal(source.read(name, 200), stored[IN_PROJ][200:])
    assert source.read(name, 4, 4).shape == (0, 40)


def test_shards_hold_what_the_single_file_holds(written: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, shard="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    _assert_equal(_all(_open(tmp_path), written), _all(_open(written), written))


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace("backbone.", "model."),
        lambda name: name.replace("embeddings.", "embedding."),
        lambda name: name.removeprefix("backbone."),
    ],
    ids=["model", "embedding", "bare"],
)
def test_accepts_other_spellings_of_names(
    checkpoint: Path, written: Path, rename: Callable[[str], str]
) -> None:
    _rename(checkpoint, rename)
    _assert_equal(_all(_open(checkpoint), written), _all(_open(written), written))


def test_accepts_experts_that_are_stacked_already(checkpoint: Path, written: Path) -> None:
    def stack(tensors: Tensors) -> None:
        for projection in ("up_proj", "down_proj"):
            stem = "backbone.layers.1.mixer.experts"
            parts = [tensors.pop(f"{stem}.{i}.{projection}.weight") for i in range(7)]
            tensors[f"{stem}.{projection}"] = torch.stack(parts)

    _edit(checkpoint, stack)
    source = _open(checkpoint)
    _assert_equal(_all(source, written), _all(_open(written), written))
    whole = source.read("layers.1.mixer.experts.down_proj")
    assert torch.equal(source.read("layers.1.mixer.experts.down_proj", 6), whole[6:])


def test_each_tensor_may_have_its_own_type(checkpoint: Path) -> None:
    def narrow(tensors: Tensors) -> None:
        tensors[IN_PROJ] = tensors[IN_PROJ].bfloat16()
        tensors["lm_head.weight"] = tensors["lm_head.weight"].half()

    _edit(checkpoint, narrow)
    source = _open(checkpoint)
    assert str(source.type_of("layers.0.mixer.in_proj.weight")) == "bf16[198, 40]"
    assert str(source.type_of("lm_head.weight")) == "f16[97, 40]"
    assert source.read("lm_head.weight").dtype == torch.float16


def test_multi_token_prediction_is_ignored_and_said_so(checkpoint: Path) -> None:
    extra = {
        "mtp.layers.0.enorm.weight": torch.ones(40),
        "mtp.layers.0.hnorm.weight": torch.ones(40),
    }
    _edit(checkpoint, lambda tensors: tensors.update(extra))
    expected = "2 tensors mtp.* are ignored: multi-token prediction is not built"
    assert open_model(checkpoint).notes == (expected,)


def test_tied_head_is_ignored_and_said_so(checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"tie_word_embeddings": True}))
    model = open_model(checkpoint)
    assert model.notes == ("lm_head.weight is ignored: config.json ties it to the embeddings",)
    with pytest.raises(NemocError, match=r"the model has no parameter 'lm_head\.weight'"):
        assert model.parameters is not None
        model.parameters.type_of("lm_head.weight")


_EDITS: list[tuple[str, Callable[[Tensors], object], str]] = [
    (
        "missing tensor",
        lambda t: t.pop(IN_PROJ),
        f"DIR: tensor '{IN_PROJ}': found nothing, expected shape [198, 40]",
    ),
    (
        "missing expert",
        lambda t: t.pop(UP_4),
        f"DIR: tensor '{UP_4}': found nothing, expected shape [18, 40]",
    ),
    (
        "missing head",
        lambda t: t.pop("lm_head.weight"),
        "DIR: tensor 'lm_head.weight': found nothing, expected shape [97, 40]",
    ),
    (
        "surplus tensor",
        lambda t: t.update({"backbone.layers.9.norm.weight": torch.ones(4)}),
        "DIR/model.safetensors: tensor 'backbone.layers.9.norm.weight': found F32 [4], "
        "expected no such tensor",
    ),
    (
        "surplus expert",
        lambda t: t.update({UP_4.replace(".4.", ".7."): torch.ones(18, 40)}),
        "DIR/model.safetensors: tensor 'backbone.layers.1.mixer.experts.7.up_proj.weight': "
        "found F32 [18, 40], expected no such tensor",
    ),
    (
        "the same tensor twice",
        lambda t: t.update({"model.norm_f.weight": torch.ones(40)}),
        "DIR/model.safetensors: tensor 'model.norm_f.weight': the same weights as "
        "'backbone.norm_f.weight', expected once",
    ),
    (
        "experts twice",
        lambda t: t.update({"model.layers.1.mixer.experts.up_proj": torch.ones(7, 18, 40)}),
        "the same weights as",
    ),
    (
        "wrong shape",
        lambda t: t.update({IN_PROJ: torch.ones(40, 198)}),
        f"DIR/model.safetensors: tensor '{IN_PROJ}': found shape [40, 198], expected [198, 40]",
    ),
    (
        "wrong shape of one expert",
        lambda t: t.update({UP_4: torch.ones(18, 41)}),
        f"DIR/model.safetensors: tensor '{UP_4}': found shape [18, 41], expected [18, 40]",
    ),
    (
        "unsupported type",
        lambda t: t.update({IN_PROJ: t[IN_PROJ].double()}),
        f"DIR/model.safetensors: tensor '{IN_PROJ}': found type F64, expected F32, BF16, F16",
    ),
    (
        "experts of different types",
        lambda t: t.update({UP_4: t[UP_4].bfloat16()}),
        f"DIR/model.safetensors: tensor '{UP_4}': found type BF16, expected F32 like "
        "'backbone.layers.1.mixer.experts.0.up_proj.weight'",
    ),
]


@pytest.mark.parametrize(
    ("change", "expected"), [e[1:] for e in _EDITS], ids=[e[0].replace(" ", "-") for e in _EDITS]
)
def test_tensors_that_do_not_fit_the_model_are_refused(
    checkpoint: Path, change: Callable[[Tensors], object], expected: str
) -> None:
    _edit(checkpoint, change)
    assert expected in _refusal(checkpoint)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused_by_name_when_read(
    checkpoint: Path, bad: float, dtype: torch.dtype
) -> None:
    def damage(tensors: Tensors) -> None:
        for expert in range(7):
            name = UP_4.replace(".4.", f".{expert}.")
            tensors[name] = tensors[name].to(dtype)
        tensors[UP_4][3, 5] = bad

    _edit(checkpoint, damage)
    source = _open(checkpoint)
    source.read("layers.1.mixer.experts.up_proj", 0, 4)
    kind = "NaN" if bad != bad else "an infinite value"
    expected = f"tensor '{UP_4}': found {kind}, expected finite weights"
    with pytest.raises(NemocError, match=re.escape(expected)):
        source.read("layers.1.mixer.experts.up_proj", 4, 5)


def _header(text: bytes, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def _entry(**changes: object) -> bytes:
    return json.dumps(
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}
    ).encode()


_FILES: list[tuple[str, bytes, str]] = [
    ("empty", b"", "is no safetensors file: found 0 bytes and a header of 0"),
    (
        "zip",
        b"PK\x03\x04" + b"\x00" * 99,
        "is no safetensors file: found 103 bytes and a header of",
    ),
    ("text", b"not a safetensors file at all", "is no safetensors file"),
    ("no json", _header(b"{]"), "its header is not JSON"),
    ("not utf-8", _header(b'{"\xff": 1}'), "its header is not JSON"),
    ("deep json", _header(b"[" * 100_000), "its header is not JSON"),
    ("a list", _header(b"[]"), "its header is not a JSON object"),
    ("no entry", _header(b'{"x": 3}'), "tensor 'x': its header entry lacks a type"),
    (
        "unknown type",
        _header(_entry(dtype="Q7")),
        "tensor 'x': found type 'Q7', expected one of BOOL",
    ),
    ("negative shape", _header(_entry(shape=[-2])), "tensor 'x': found shape [-2]"),
    ("shape of text", _header(_entry(shape=["2"])), "tensor 'x': found shape ['2']"),
    (
        "short range",
        _header(_entry(data_offsets=[0, 7])),
        "tensor 'x': found bytes 0 to 7, expected a range of 8",
    ),
    (
        "range before the data",
        _header(_entry(data_offsets=[-8, 0])),
        "tensor 'x': found bytes -8 to 0",
    ),
    ("gap", _header(_entry(data_offsets=[4, 12]), bytes(12)), "tensor 'x': starts at byte"),
    ("trailing data", _header(_entry(), bytes(9)), "data that no tensor owns"),
    ("truncated", _header(_entry(), bytes(5)), "is truncated: found"),
]


@pytest.mark.parametrize(
    ("content", "expected"), [f[1:] for f in _FILES], ids=[f[0].replace(" ", "-") for f in _FILES]
)
def test_files_that_are_not_whole_safetensors_are_refused(
    checkpoint: Path, content: bytes, expected: str
) -> None:
    (checkpoint / "model.safetensors").write_bytes(content)
    message = _refusal(checkpoint)
    assert message.startswith("DIR/model.safetensors: ")
    assert expected in message


def test_damage_anywhere_in_the_header_gives_one_line(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    whole = path.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    random = Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(random.choice([1, 1, 4])):
            damaged[random.randrange(size)] = random.choice(b'0919"\\,:{}[]\n\xff x')
        path.write_bytes(damaged)
        try:
            _open(checkpoint)
        except NemocError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 250


def test_a_checkpoint_cut_short_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1000])
    expected = f"is truncated: found {len(content) - 1000} bytes, expected {len(content)}"
    assert _refusal(checkpoint) == f"DIR/model.safetensors: {expected}"


def test_a_file_that_shrinks_after_opening_is_refused_when_read(checkpoint: Path) -> None:
    source, path = _open(checkpoint), checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(NemocError, match=r"the file ends [0-9]+ bytes too early"):
        for name in ("lm_head.weight", "norm_f.weight", "embeddings.weight"):
            source.read(name)


def _index(directory: Path, weight_map: object) -> None:
    (directory / "model.safetensors").rename(directory / "shard.safetensors")
    text = json.dumps({"weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize(
    "file",
    ["../shard.safetensors", "/etc/passwd", "..", ".", "a/b.safetensors", "..\\x", "", "a\0"],
)
def test_an_index_cannot_lead_out_of_the_directory(checkpoint: Path, file: str) -> None:
    _index(checkpoint, {IN_PROJ: file})
    assert _refusal(checkpoint) == (
        f"DIR/model.safetensors.index.json: tensor '{IN_PROJ}': found file {file!r}, "
        "expected one in the same directory"
    )


def test_an_index_that_disagrees_with_its_files_is_refused(checkpoint: Path) -> None:
    _index(checkpoint, {"backbone.x": "shard.safetensors"})
    assert _refusal(checkpoint) == (
        "DIR/shard.safetensors: tensor 'backbone.x': found nothing, though the index lists it"
    )


def test_an_index_of_absent_files_is_refused(checkpoint: Path) -> None:
    _index(checkpoint, {IN_PROJ: "other.safetensors"})
    assert (
        _refusal(checkpoint) == "DIR/other.safetensors: cannot be read: No such file or directory"
    )


@pytest.mark.parametrize("weight_map", [None, [], {IN_PROJ: 3}])
def test_an_index_without_a_weight_map_is_refused(checkpoint: Path, weight_map: object) -> None:
    _index(checkpoint, weight_map)
    assert "index.json: weight_map: expected an object of file names" in _refusal(checkpoint)


def test_an_index_that_is_not_json_is_refused(checkpoint: Path) -> None:
    _index(checkpoint, {})
    (checkpoint / "model.safetensors.index.json").write_text("{")
    assert _refusal(checkpoint).startswith("DIR/model.safetensors.index.json: is not JSON: ")


def test_a_pickle_is_refused_without_opening_it(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    expected = "is a pickle, which can run code when it is loaded; expected safetensors"
    assert _refusal(checkpoint) == f"DIR/pytorch_model.bin: {expected}"


def test_an_index_of_pickles_is_refused(checkpoint: Path) -> None:
    _index(checkpoint, {IN_PROJ: "pytorch_model-00001.bin"})
    assert _refusal(checkpoint).startswith("DIR/pytorch_model-00001.bin: is a pickle")


def test_shards_without_an_index_are_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "model-1-of-1.safetensors")
    assert _refusal(checkpoint) == (
        "DIR: found model-1-of-1.safetensors, expected model.safetensors or "
        "model.safetensors.index.json"
    )


def test_a_directory_without_weights_is_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    assert _refusal(checkpoint) == (
        "DIR: found no weights, expected model.safetensors or model.safetensors.index.json"
    )


def test_a_directory_without_configuration_is_refused(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    assert _refusal(checkpoint) == "DIR/config.json: cannot be read: No such file or directory"


def test_a_configuration_that_is_not_json_is_refused(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text('{"vocab_size": }')
    assert _refusal(checkpoint).startswith("DIR/config.json: is not JSON: ")


def test_links_into_another_directory_are_followed(checkpoint: Path, tmp_path: Path) -> None:
    # The Hugging Face cache stores every file of a snapshot as a link to a blob.
    (checkpoint / "model.safetensors").rename(tmp_path / "blob")
    (checkpoint / "model.safetensors").symlink_to(tmp_path / "blob")
    assert _open(checkpoint).read("norm_f.weight").shape == (40,)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_file(written: Path, tmp_path: Path) -> None:
    # Each expert takes 40 MiB: glibc gives blocks above 32 MiB back when they are freed.
    config = replace(ModelConfig.from_file(written), moe_latent_size=10240, dtype="bfloat16")
    write_zeros(tmp_path, replace(config, n_routed_experts=8, moe_intermediate_size=2048))
    source, name = open_model(tmp_path).parameters, "layers.1.mixer.experts.up_proj"
    assert source is not None
    assert str(source.type_of(name)) == "bf16[8, 2048, 10240]"
    before = _anonymous_bytes()
    for expert in range(8):
        assert not source.read(name, expert, expert + 1).any()
        assert _anonymous_bytes() - before < 150 << 20


def _anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    (kilobytes,) = re.findall(r"RssAnon:\s+(\d+) kB", status)
    return int(kilobytes) * 1024
