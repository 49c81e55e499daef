"""Ops of a user's own: every target runs them, and what checks models checks them too."""

from pathlib import Path

import pytest
import torch

import nemoc
from nemoc import NemocError
from nemoc.__main__ import main
from nemoc.ir.ops import own_ops
from nemoc.models import build_step
from support.checkpoints import write_checkpoint
from support.models import SMALL
from support.own_op import write_plugin
from support.quantized import WIDE

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return write_plugin(tmp_path)


@pytest.fixture
def source(tmp_path: Path) -> str:
    write_checkpoint(tmp_path / "model", seed=1, **(WIDE | {"hybrid_override_pattern": "ME"}))
    return str(tmp_path / "model")


def _logits(executable: nemoc.Executable) -> torch.Tensor:
    return executable.prefill(torch.arange(7).reshape(1, 7) % 5, executable.new_state())


@pytest.mark.parametrize("target", ["reference", "cpu", "triton-interpret"])
def test_every_target_runs_them(plugin: str, source: str, target: str, tmp_path: Path) -> None:
    place = tmp_path / "own.nemoc"
    usual = nemoc.compile(source, target, max_context=16)
    made = nemoc.compile(
        source,
        target,
        pipeline="double-and-halve,preset",
        plugins=plugin,
        max_context=16,
        destination=place,
    )
    assert "halved(" in (place / "graphs" / "decode.ir").read_text()
    torch.testing.assert_close(_logits(made), _logits(usual), rtol=1e-5, atol=1e-6)
    again = nemoc.load(place, plugins=[plugin])
    assert torch.equal(_logits(again), _logits(made))


def test_an_artifact_that_runs_graphs_says_that_an_op_is_missing(
    plugin: str, source: str, tmp_path: Path
) -> None:
    place = tmp_path / "own.nemoc"
    nemoc.compile(
        source, "reference", pipeline="double-and-halve", plugins=plugin, destination=place
    )
    with pytest.raises(NemocError) as refusal:
        nemoc.load(place)
    message = str(refusal.value)
    assert message.endswith("unknown op 'halved', expected one of the IR or of a plugin")
    assert message.startswith(f"{place / 'graphs' / 'prefill.ir'}:")


def test_models_and_artifacts_that_have_them_are_verified(
    plugin: str, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--plugin", plugin, "-q")
    own = ("--pipeline", "double-and-halve,preset", *options)
    assert main(("verify", source, *own)) == 0
    assert "double-and-halve" in capsys.readouterr().out
    assert main(("compile", source, *own, "-o", "own.nemoc", "--max-batch", "2")) == 0
    assert main(("verify", "own.nemoc", *options)) == 0
    assert "no misses" in capsys.readouterr().out
    assert main(("bench", "own.nemoc", "--prefill", "8", "--decode", "2", *options)) == 0


def test_bisect_finds_who_spoils_them_in_a_file_and_says_how_to_see_it_again(
    plugin: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--plugin", plugin, "--target", "reference")
    step = tmp_path / "step.ir"
    step.write_text(str(build_step(SMALL)))
    assert main(("ir", str(step), "--pipeline", "double-and-halve", *options)) == 0
    step.write_text(capsys.readouterr().out)
    found = main(("bisect", str(step), *options, "--pipeline", "cse,forget", "-o", "found", "-q"))
    lines = capsys.readouterr().out.splitlines()
    assert found == 1
    assert lines[0].startswith("pass 2 of 2 (forget), change 1 of ")
    assert lines[-1] == f"found: shows it again with `nemoc verify found --plugin {plugin}`"
    assert main(("verify", "found", "--plugin", plugin)) == 1


def test_own_ops_are_found_in_regions(plugin: str, source: str) -> None:
    found = nemoc.compiler.functions(
        source, "cpu", "double-and-halve,preset", plugins=plugin, which=("prefill",)
    )
    (op,) = own_ops(found.graphs.values())
    assert op.mnemonic() == "halved"
    assert not any(type(node.op) is op for node in found.graphs["prefill"].nodes)


@pytest.mark.parametrize("wrong", [3, torch.nn.Linear, [None], [torch.nn.Linear]])
def test_what_is_no_plugin_is_refused(wrong: object) -> None:
    with pytest.raises(NemocError, match=r"^plugins: found .*, expected the name of a module or"):
        nemoc.compile("sample", "reference", plugins=wrong)  # type: ignore[arg-type]
