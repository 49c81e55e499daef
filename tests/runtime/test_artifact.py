"""Artifacts: what is loaded is what was saved, and anything else is refused in one line."""

import dataclasses
import errno
import gc
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nemoc.ir import NemocError
from nemoc.runtime import Bounds, Contents, Executable, Generation, Machine, build, load
from nemoc.runtime.manifest import VERSION

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def logits(exe: Executable) -> torch.Tensor:
    state = exe.new_state()
    return torch.stack([exe.prefill(IDS, state), exe.decode(IDS[:, 0], state)])


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    """A copy of the artifact, to be damaged."""
    return Path(shutil.copytree(artifact, tmp_path / "copy.nemoc"))


def rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and make its own digest right again."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    del data["digest"]
    text = json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    data["digest"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def refused(folder: Path, message: str, **options: Any) -> None:
    with pytest.raises(NemocError, match=re.escape(message)) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)


def never(weight: object) -> Iterator[torch.Tensor]:
    raise AssertionError("weights are read again")


def test_weights_of_another_artifact_are_the_same_file(
    exe: Executable, artifact: Path, contents: Callable[..., Contents], tmp_path: Path
) -> None:
    first = load(artifact)
    second = build(contents(packed=first, pieces=never), tmp_path / "second.nemoc")
    assert (second.folder / "weights.safetensors").samefile(artifact / "weights.safetensors")
    assert torch.equal(logits(load(second.folder)), logits(exe))


def test_weights_that_cannot_be_shared_are_copied(
    exe: Executable,
    artifact: Path,
    contents: Callable[..., Contents],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EXDEV, "another device")

    monkeypatch.setattr(os, "link", fail)
    second = build(contents(packed=load(artifact), pieces=never), tmp_path / "second.nemoc")
    assert not (second.folder / "weights.safetensors").samefile(artifact / "weights.safetensors")
    assert torch.equal(logits(load(second.folder)), logits(exe))


def test_weights_of_another_layout_are_not_taken(
    artifact: Path, contents: Callable[..., Contents], tmp_path: Path
) -> None:
    fewer = contents(packed=load(artifact))
    fewer = dataclasses.replace(fewer, weights=(*fewer.weights[1:], fewer.weights[0]))
    with pytest.raises(NemocError, match="holds other weights than the executable needs"):
        build(fewer, tmp_path / "second.nemoc")
    assert not (tmp_path / "second.nemoc").exists()


def test_loading_gives_the_same_bits(artifact: Path, exe: Executable, tmp_path: Path) -> None:
    expected = logits(exe)
    loaded = load(artifact)
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(load(artifact, resident=True)), expected)
    assert torch.equal(logits(load(artifact, verify="headers")), expected)
    loaded.save(tmp_path / "again.nemoc")
    assert torch.equal(logits(load(tmp_path / "again.nemoc")), expected)
    assert os.listdir(tmp_path) == ["again.nemoc"]


def test_a_loaded_program_knows_what_the_built_one_knew(
    artifact: Path, contents: Callable[..., Contents]
) -> None:
    program = load(artifact).program
    given = contents()
    assert (program.bounds, program.generation) == (given.bounds, given.generation)
    assert program.model == given.model
    assert program.vocab == 97
    assert program.functions == {"prefill", "prefill_all", "decode"}


def test_artifacts_are_the_same_bytes_each_time(
    artifact: Path, tmp_path: Path, contents: Callable[..., Contents]
) -> None:
    build(contents(), tmp_path / "b.nemoc")
    for path in artifact.rglob("*"):
        if path.is_file():
            other = tmp_path / "b.nemoc" / path.relative_to(artifact)
            assert other.read_bytes() == path.read_bytes(), path.name


FILES = (
    "manifest.json",
    "weights.safetensors",
    "graphs/prefill.ir",
    "graphs/prefill_all.ir",
    "graphs/decode.ir",
    "report.json",
)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.0, 0.01, 0.5, 1.0])
def test_an_altered_byte_is_refused(copy: Path, name: str, where: float) -> None:
    path = copy / name
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    path.write_bytes(data)
    with pytest.raises(NemocError, match=rf"^{re.escape(str(path))}: ") as caught:
        load(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_missing_or_truncated_file_is_refused(copy: Path, name: str) -> None:
    path = copy / name
    size = path.stat().st_size
    os.truncate(path, size - 1)
    refused(copy, f"{path}: has {size - 1} bytes, expected {size}")
    path.unlink()
    refused(copy, f"{path}: is missing from the artifact")


def test_every_digit_of_the_manifest_counts(copy: Path) -> None:
    path = copy / "manifest.json"
    path.write_text(path.read_text().replace('"max_context": 200', '"max_context": 300'))
    refused(copy, "manifest.json: was altered: it does not match its digest")


def test_checking_headers_only_still_checks_the_weights_header(copy: Path) -> None:
    path = copy / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    load(copy, verify="headers")
    at = data.index(b"lm_head")
    data[at] ^= 1
    path.write_bytes(data)
    refused(copy, "weights.safetensors: was altered: its SHA-256 is", verify="headers")
    with pytest.raises(NemocError, match="verify is 'none', expected one of full, headers"):
        load(copy, verify="none")  # type: ignore[arg-type]


def test_other_versions_and_formats_are_refused(copy: Path) -> None:
    for other in (VERSION - 1, VERSION + 1):
        rewrite_manifest(copy, lambda data, other=other: data.update(version=other))
        said = f"format version is {other}, this nemoc reads version {VERSION}; compile the"
        refused(copy, f"manifest.json: {said}")
    rewrite_manifest(copy, lambda data: data.update(format="something"))
    refused(copy, "manifest.json: format is 'something', expected 'nemoc artifact'")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("bounds"), "the field 'bounds' is missing"),
        (lambda d: d["bounds"].pop("max_batch"), "the field 'max_batch' is missing"),
        (lambda d: d.update(surprise=1), "was altered: it does not match"),
        (lambda d: d["bounds"].update(surprise=1), "was altered: it does not match"),
        (lambda d: d.update(bounds=[1]), "bounds is [1], expected dict"),
        (lambda d: d.update(generation=None), "generation is None, expected dict"),
        (lambda d: d.update(machine=5), "machine is 5, expected dict"),
        (lambda d: d["bounds"].update(max_batch="1"), "max_batch is '1', expected int"),
        (lambda d: d["bounds"].update(max_batch=1.5), "max_batch is 1.5, expected int"),
        (lambda d: d["bounds"].update(max_tokens=True), "max_tokens is True, expected int"),
        (lambda d: d["bounds"].update(max_batch=0), "max_batch is 0, expected at least 1"),
        (lambda d: d["bounds"].update(max_context=2**31), "expected at most 2147483647"),
        (lambda d: d["generation"].update(eos=["x"]), "eos is ['x'], expected a list of int"),
        (lambda d: d["generation"].update(eos=2), "eos is 2, expected list"),
        (lambda d: d["generation"].update(pad=True), "pad is True, expected int"),
        (lambda d: d["tools"].update(nemoc=1), "nemoc is 1, expected str"),
        (lambda d: d.update(machine={}), "the field 'architecture' is missing"),
        (
            lambda d: d.update(machine={"architecture": 5, "features": []}),
            "architecture is 5, expected str",
        ),
        (
            lambda d: d.update(machine={"architecture": "x86_64", "features": [1]}),
            "features is [1], expected a list of str",
        ),
        (lambda d: d["files"]["report.json"].update(size="2"), "report.json: size is '2'"),
        (lambda d: d["files"]["report.json"].update(sha256=5), "report.json: sha256 is 5"),
        (lambda d: d["files"].update({"report.json": 5}), "report.json is 5, expected dict"),
        (lambda d: d["files"].pop("weights.safetensors"), "lists no file weights.safetensors"),
        (lambda d: d["files"].pop("graphs/decode.ir"), "lists no file graphs/decode.ir"),
        (lambda d: d["generation"].update(eos=[97]), "eos token id 97 is outside the vocabulary"),
        (lambda d: d["generation"].update(pad=-1), "pad token id -1 is outside the vocabulary"),
        (lambda d: d.update(target="tpu"), "target 'tpu' cannot be run by this nemoc"),
        (lambda d: d.update(target="cpu"), "kernels is {}, expected the size of scratch"),
        (
            lambda d: d.update(target="cpu", kernels={"scratch": -1}),
            "kernels is {'scratch': -1}, expected the size of scratch",
        ),
    ],
)
def test_manifests_that_do_not_hold_together_are_refused(
    copy: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    rewrite_manifest(copy, change)
    refused(copy, message)


def rewrite_graph(folder: Path, name: str, old: str, new: str) -> None:
    """Change a graph's text and make its digest right again."""
    path = folder / "graphs" / f"{name}.ir"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    record = {
        "size": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    rewrite_manifest(folder, lambda data: data["files"].update({f"graphs/{name}.ir": record}))


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("prefill", "i64[B, L] < 97", "i64[B, L] < 98", "%tokens has no bound that is one number"),
        ("decode", "i64[B, 1] < 97", "i64[B, 1]", "%tokens has no bound that is one number"),
        ("decode", "i64[B, 1] < 97", "i64[B, L] < 97", "decode: %tokens is i64[B, L], expected i6"),
        ("decode", "%lengths: i32[B]", "%lengths: i32[B, 2]", "the states of decode are not those"),
        ("decode", "state %lengths:", "state %length:", "the states of decode are not those of"),
        ("decode", "state %lengths:", "stat %lengths:", "expected an argument, a node or 'return'"),
        ("prefill", "input %valid:", "input %valet:", "prefill: no step has an input %valet"),
        ("prefill", "graph @", "\0", "unexpected character"),
    ],
)
def test_graphs_that_cannot_be_called_are_refused(
    copy: Path, name: str, old: str, new: str, message: str
) -> None:
    rewrite_graph(copy, name, old, new)
    refused(copy, message)


def test_a_graph_that_is_no_text_is_refused(copy: Path) -> None:
    (copy / "graphs" / "prefill.ir").write_bytes(b"\xff")
    record = {"size": 1, "sha256": hashlib.sha256(b"\xff").hexdigest()}
    rewrite_manifest(copy, lambda data: data["files"].update({"graphs/prefill.ir": record}))
    refused(copy, "graphs/prefill.ir: is no text, expected a graph")


def test_vocabulary_and_state_are_those_of_the_graphs(artifact: Path) -> None:
    assert not {"vocab", "state"} & json.loads((artifact / "manifest.json").read_text()).keys()
    program = load(artifact).program
    assert program.vocab == 97
    assert [slot.name for slot in program.state][:2] == ["lengths", "layers.0.conv"]


@pytest.mark.parametrize(
    "name",
    ["../outside", "/etc/hostname", "graphs/../../outside", "a//b", "./x", ".x", "a\\b", "x\n"],
)
def test_names_that_lead_out_of_the_artifact_are_refused(copy: Path, name: str) -> None:
    (copy.parent / "outside").write_text("outside")
    record = {"size": 7, "sha256": hashlib.sha256(b"outside").hexdigest()}
    rewrite_manifest(copy, lambda data: data["files"].update({name: record}))
    refused(copy, f"the file name {name!r} is no plain relative path")


def test_links_out_of_the_artifact_are_refused(copy: Path, tmp_path: Path) -> None:
    outside = tmp_path / "graphs"
    shutil.move(copy / "graphs", outside)
    (copy / "graphs").symlink_to(outside)
    refused(copy, "graphs/decode.ir: is no regular file within the artifact")
    (copy / "graphs").unlink()
    shutil.copytree(outside, copy / "graphs")
    (copy / "report.json").rename(tmp_path / "report.json")
    (copy / "report.json").symlink_to(tmp_path / "report.json")
    refused(copy, "report.json: is no regular file within the artifact")


def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "x.nemoc", "x.nemoc: no such artifact")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty: is no artifact: it has no manifest.json")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "file: is no artifact: it is not a directory")
    (tmp_path / "empty" / "manifest.json").write_text("[" * 100000)
    refused(tmp_path / "empty", "manifest.json: is not JSON")
    (tmp_path / "empty" / "manifest.json").write_text("[]\n")
    refused(tmp_path / "empty", "manifest.json: found a JSON list, expected an object")
    (tmp_path / "empty" / "manifest.json").write_text("{}\n\n")
    refused(tmp_path / "empty", "manifest.json: was altered: it is not in the form")
    (tmp_path / "empty" / "manifest.json").write_text('{"a": "\\ud800"}')
    refused(tmp_path / "empty", "manifest.json: is not JSON")
    refused(tmp_path / "a\0b", "which holds a zero byte")
    with pytest.raises(NemocError, match="path is 5, expected text or a path"):
        load(5)  # type: ignore[arg-type]


def test_an_artifact_for_another_machine_is_refused(
    tmp_path: Path, contents: Callable[..., Contents]
) -> None:
    build(contents(machine=Machine.host()), tmp_path / "own.nemoc")
    with pytest.raises(NemocError, match="was compiled for reference and needs an vax processor"):
        build(contents(machine=Machine.of("vax", [])), tmp_path / "vax.nemoc")
    host = Machine.host()
    more = Machine(host.architecture, (*host.features, "avx9000"))
    with pytest.raises(NemocError, match="needs a processor with avx9000"):
        build(contents(machine=more), tmp_path / "more.nemoc")


def test_an_artifact_replaces_an_artifact_only(
    artifact: Path, tmp_path: Path, contents: Callable[..., Contents]
) -> None:
    exe = load(artifact)
    path = tmp_path / "out.nemoc"
    exe.save(path)
    build(contents(model={"other": True}), path)
    assert load(path).program.model == {"other": True}
    exe.save(path)
    assert load(path).program.model != {"other": True}
    for name, make in (
        ("folder", lambda p: p.mkdir()),
        ("file", lambda p: p.write_text("precious")),
        ("link", lambda p: p.symlink_to(path)),
    ):
        other = tmp_path / name
        make(other)
        with pytest.raises(NemocError, match=f"{name}: exists and is no artifact of nemoc"):
            exe.save(other)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "link", "out.nemoc"]


def test_saving_an_artifact_onto_itself_keeps_it(copy: Path) -> None:
    exe = load(copy)
    expected = logits(exe)
    exe.save(copy)
    assert torch.equal(logits(exe), expected)
    assert torch.equal(logits(load(copy)), expected)


def test_saving_checks_what_it_copies(copy: Path, tmp_path: Path) -> None:
    exe = load(copy)
    data = bytearray((copy / "report.json").read_bytes())
    data[0] ^= 1
    (copy / "report.json").write_bytes(data)
    with pytest.raises(NemocError, match=r"report.json: was altered"):
        exe.save(tmp_path / "new.nemoc")
    assert not (tmp_path / "new.nemoc").exists()


def test_an_executable_whose_artifact_was_replaced_does_not_save_the_other(
    tmp_path: Path, contents: Callable[..., Contents]
) -> None:
    exe = build(contents(model={"version": 1}), tmp_path / "a.nemoc")
    expected = logits(exe)
    build(contents(model={"version": 2}), tmp_path / "a.nemoc")
    with pytest.raises(NemocError, match=r"a.nemoc: has been replaced since it was loaded"):
        exe.save(tmp_path / "b.nemoc")
    with pytest.raises(NemocError, match=r"a.nemoc: has been replaced since it was loaded"):
        _ = exe.tokenizer
    assert os.listdir(tmp_path) == ["a.nemoc"]
    assert torch.equal(logits(exe), expected)
    build(contents(model={"version": 1}), tmp_path / "a.nemoc")
    exe.save(tmp_path / "b.nemoc")


@pytest.mark.parametrize("path", ["a\0b", 5])
def test_names_that_are_no_path_are_refused(exe: Executable, path: Any) -> None:
    with pytest.raises(NemocError, match=r"^path is ") as caught:
        exe.save(path)
    assert "\n" not in str(caught.value)


def test_a_temporary_artifact_goes_with_its_executable(contents: Callable[..., Contents]) -> None:
    exe = build(contents())
    folder = exe.folder
    assert folder is not None
    assert folder.exists()
    del exe
    gc.collect()
    assert not folder.parent.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generation": Generation(eos=(97,))}, "eos token id 97 is outside the vocabulary of 97"),
        ({"weights": ()}, "prefill: the parameter %embeddings.weight is not among the weights"),
        ({"functions": {}}, "there is no function prefill"),
        ({"files": {"../x": ""}}, "the file name '../x' is no plain relative path"),
    ],
)
def test_contents_that_do_not_fit_together_are_refused(
    contents: Callable[..., Contents], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(NemocError, match=message):
        build(contents(**change), tmp_path / "x.nemoc")
    assert os.listdir(tmp_path) == []


def test_progress_counts_the_bytes_of_the_weights(
    tmp_path: Path, contents: Callable[..., Contents]
) -> None:
    told: list[tuple[str, int, int]] = []
    build(contents(), tmp_path / "x.nemoc", progress=lambda *step: told.append(step))
    load(tmp_path / "x.nemoc", progress=lambda *step: told.append(step))
    for stage in ("pack weights", "check weights"):
        done = [d for s, d, _ in told if s == stage]
        total = {t for s, _, t in told if s == stage}
        assert done == sorted(done)
        assert total == {done[-1]}


def test_loading_imports_neither_compiler_nor_models(artifact: Path) -> None:
    code = (
        "import sys, nemoc.runtime as r\n"
        f"r.load({str(artifact)!r})\n"
        "bad = {'tvm', 'triton', 'transformers', 'nemoc.models', 'nemoc.passes'} & set(sys.modules)\n"
        "sys.exit(' '.join(bad) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bounds_of_an_artifact_hold(tmp_path: Path, contents: Callable[..., Contents]) -> None:
    exe = build(contents(bounds=Bounds(1, 8, 4)), tmp_path / "x.nemoc")
    with pytest.raises(NemocError, match=r"batch is 2, expected 1 to 1"):
        exe.new_state(2)
    assert torch.equal(logits(exe), logits(load(tmp_path / "x.nemoc")))


@pytest.mark.parametrize("threads", [0, 1.5, "2", True])
def test_threads_are_counted_from_one_on_every_target(
    artifact: Path, tmp_path: Path, contents: Callable[..., Contents], threads: Any
) -> None:
    with pytest.raises(NemocError, match=f"threads is {threads!r}, expected "):
        load(artifact, threads=threads)
    with pytest.raises(NemocError, match=f"threads is {threads!r}, expected "):
        build(contents(), tmp_path / "x.nemoc", threads=threads)
    assert os.listdir(tmp_path) == []


def test_functions_that_no_step_can_call_are_refused(contents: Callable[..., Contents]) -> None:
    functions = dict(contents().functions)
    with pytest.raises(
        NemocError, match="decode: %tokens is i64\\[B, L\\], expected i64\\[B, 1\\]"
    ):
        build(contents(functions={**functions, "decode": functions["prefill"]}))
    with pytest.raises(
        NemocError, match="prefill: gives f32\\[B, L, 97\\], expected f32\\[B, 97\\]"
    ):
        build(contents(functions={**functions, "prefill": functions["prefill_all"]}))
    with pytest.raises(NemocError, match="there is no use for a function train"):
        build(contents(functions={**functions, "train": functions["prefill"]}))
