"""`nemoc bisect`, `--verify-each`, and `nemoc verify` of what they leave."""

import json
import os
from pathlib import Path

import pytest

from nemoc.__main__ import main
from nemoc.compiler import compile
from nemoc.models import build_step
from nemoc.passes.reproducer import FACTS
from support.models import SMALL

PLUGIN = '''"""A pass that drops what it must not."""

from dataclasses import dataclass

from nemoc.ir.ops import Silu
from nemoc.ir.rewrite import Rule, rewrite
from nemoc.passes import Pass, Remark


@dataclass(frozen=True)
class DropGates(Pass):
    """Drop the activation of gates, and say that nothing changed."""

    def run(self, graph, ctx):
        def drop(op, rewriter):
            return op.x if op.x.name.endswith(".z") else None

        return rewrite(
            graph,
            (Rule("drop-gate", Silu, drop),),
            on_apply=lambda rule, node: ctx.allows(
                Remark(self.name, f"{graph.name}/%{node.results[0].name}", rule.name)
            ),
        )


NEMOC_PASSES = [DropGates]
'''
FAULTY = ["--plugin", "drop_gates", "--pipeline", "cse,drop-gates,dce", "--target", "reference"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model's graph in a file, beside the plugin."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("drop_gates.py").write_text(PLUGIN)
    Path("small.ir").write_text(str(build_step(SMALL)))
    return "small.ir"


def test_bisect_names_pass_and_change_and_verify_replays_them(
    capsys: pytest.CaptureFixture[str], graph: str
) -> None:
    code, out, err = run(capsys, "bisect", graph, *FAULTY, "-o", "found", "-q")
    assert (code, err) == (1, "")
    lines = out.splitlines()
    assert lines[0] == "pass 2 of 3 (drop-gates), change 1 of 2 (step/%layers.0.gate: drop-gate)"
    assert lines[1].startswith("  declares exact but changes output 0 (%logits) by ")
    assert lines[2].startswith("  the first value that diverges is %layers.0.gated (mul, error ")
    assert lines[3] == "  reproduce with --pipeline 'cse,drop-gates'"
    assert lines[4] == "found: shows it again with `nemoc verify found`"

    code, again, _ = run(capsys, "verify", "found")
    assert code == 1
    assert again.splitlines()[0] == lines[0]
    assert lines[1].strip() in again and "(it was" not in again


def test_mended_reproducer_passes(capsys: pytest.CaptureFixture[str], graph: str) -> None:
    run(capsys, "bisect", graph, *FAULTY, "-o", "found")
    facts = json.loads(Path("found", FACTS).read_text())
    facts["files"]["after.ir"] = facts["files"]["before.ir"]
    Path("found", FACTS).write_text(json.dumps(facts))
    Path("found/after.ir").write_bytes(Path("found/before.ir").read_bytes())
    code, out, _ = run(capsys, "verify", "found")
    assert code == 0
    assert out.splitlines()[1].startswith("passes now; it was: changes output 0 (%logits) by ")


def test_damaged_reproducer_is_one_line(capsys: pytest.CaptureFixture[str], graph: str) -> None:
    run(capsys, "bisect", graph, *FAULTY, "-o", "found")
    os.remove("found/arguments.safetensors")
    code, out, err = run(capsys, "verify", "found")
    assert (code, out) == (2, "")
    assert err == (
        "nemoc: error: found/arguments.safetensors: cannot be read: No such file or directory\n"
    )


def test_bisect_of_a_sound_pipeline_finds_nothing(
    capsys: pytest.CaptureFixture[str], graph: str
) -> None:
    options = ["--function", "decode", "--target", "reference", "-q"]
    code, out, err = run(capsys, "bisect", graph, *options)
    assert (code, err) == (0, "")
    assert out.startswith("decode: ") and out.endswith(" passes, each does what it declares.\n")
    assert not Path("reproducer").exists()


def test_bisect_replaces_reproducers_and_nothing_else(
    capsys: pytest.CaptureFixture[str], graph: str
) -> None:
    for _ in range(2):
        assert run(capsys, "bisect", graph, *FAULTY)[0] == 1
    Path("mine").mkdir()
    code, _, err = run(capsys, "bisect", graph, *FAULTY, "-o", "mine", "-q")
    assert code == 2
    assert err.count("\n") == 1 and "mine: exists and is no" in err
    assert list(Path("mine").iterdir()) == []


def test_verify_each_names_the_pass(capsys: pytest.CaptureFixture[str], graph: str) -> None:
    code, out, err = run(capsys, "ir", graph, "--verify-each", *FAULTY)
    assert (code, out) == (2, "")
    assert err.startswith("nemoc: error: pass 2 of 3 (drop-gates) declares exact but changes ")
    assert "the first value that diverges is %layers.0.gated (mul, error " in err
    assert err.count("\n") == 1


def test_verify_each_prints_the_graph_of_a_sound_pipeline(
    capsys: pytest.CaptureFixture[str], graph: str
) -> None:
    code, out, err = run(capsys, "ir", graph, "--verify-each", "--target", "reference")
    assert (code, err) == (0, "")
    assert out.startswith("graph @step {")


def test_compile_verifies_each_pass(
    capsys: pytest.CaptureFixture[str], graph: str, tmp_path: Path
) -> None:
    code, _, err = run(
        capsys, "compile", "sample", "-o", "out.nemoc", "--verify-each", "-q", *FAULTY
    )
    assert code == 2
    assert err.startswith("nemoc: error: pass 2 of 3 (drop-gates) declares exact but changes ")
    assert not Path("out.nemoc").exists()


def test_artifact_is_verified_by_itself(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    executable = compile("sample", "reference", max_batch=2, max_context=32)
    executable.save("sample.nemoc")
    code, out, err = run(capsys, "verify", "sample.nemoc", "-q")
    assert (code, err) == (0, "")
    for what in ("files", "prefill", "chunked prefill", "decode", "unequal rows"):
        assert what in out
    assert "6 checks, no misses." in out
    code, _, err = run(capsys, "verify", "sample.nemoc", "--pipeline", "cse")
    assert code == 2 and "--pipeline needs a model, found an artifact" in err

    with open("sample.nemoc/weights.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    code, _, err = run(capsys, "verify", "sample.nemoc", "-q")
    assert code == 2 and "was altered" in err
