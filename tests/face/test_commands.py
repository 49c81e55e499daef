"""The commands that need no compiled model: `ir`, `passes`, `targets`, `doctor`."""

import re
from pathlib import Path

import pytest

from nemoc.__main__ import main
from nemoc.ir import parse, print_graph
from nemoc.models import preset
from nemoc.models.graph import build_step
from nemoc.passes import PASSES

EXPECTED_PARAMETERS = {
    "nano": "31,577,940,288",
    "super": "120,668,707,840",
    "ultra": "549,308,993,536",
}


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    code = main(arguments)
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "")
    return captured.out


@pytest.mark.parametrize("name", EXPECTED_PARAMETERS)
def test_summary_counts_parameters(capsys: pytest.CaptureFixture[str], name: str) -> None:
    out = output(capsys, "ir", name, "--summary")
    assert re.search(rf"^  parameters +{EXPECTED_PARAMETERS[name]}$", out, re.MULTILINE)
    assert "in closed form" in out
    assert out.endswith(f"{preset(name).pattern[-8:]}\n")


def test_summary_knows_the_types_of_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    out = output(capsys, "ir", "sample", "--summary")
    assert "7,898,744" in out
    assert "15.798 MB as stored" in out


def test_graph_is_printed_as_built(capsys: pytest.CaptureFixture[str]) -> None:
    out = output(capsys, "ir", "mid")
    assert parse(out) == build_step(preset("mid"))


def test_decode_graph_has_one_token(capsys: pytest.CaptureFixture[str]) -> None:
    out = output(capsys, "ir", "mid", "--function", "decode")
    assert "input %tokens: i64[B, 1]" in out
    assert "ssd_update" in out
    assert "ssd_scan" not in out


def test_preset_pipeline_of_a_target(capsys: pytest.CaptureFixture[str]) -> None:
    plain = output(capsys, "ir", "mid", "--pipeline", "preset", "--target", "reference")
    assert "folded" in plain
    assert "interleave" not in plain


def test_print_after_all_shows_each_pass(capsys: pytest.CaptureFixture[str]) -> None:
    out = output(capsys, "ir", "mid", "--pipeline", "cse,dce", "--print-after", "all")
    assert out.count("graph @step") == 2
    assert "// after pass 1 of 2 (cse)" in out
    assert "// after pass 2 of 2 (dce)" in out


def test_graph_text_goes_through_a_pipeline(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "twice.ir"
    path.write_text(
        "graph @twice {\n"
        "  input %x: f32[B, 4]\n\n"
        "  %a = add(%x, %x) : f32[B, 4]\n"
        "  %b = add(%x, %x) : f32[B, 4]\n"
        "  %c = mul(%a, %b) : f32[B, 4]\n"
        "  return %c\n}\n"
    )
    out = output(capsys, "ir", str(path), "--pipeline", "cse")
    assert out.count("add(") == 1
    assert print_graph(parse(out)) == out


def test_remarks_say_what_each_pass_did(capsys: pytest.CaptureFixture[str]) -> None:
    out = output(capsys, "ir", "mid", "--function", "decode", "--remarks", "--target", "reference")
    mambas = preset("mid").layers.count("mamba")
    assert re.search(rf"^ +{mambas} x scan-to-update$", out, re.MULTILINE)
    assert re.search(r"^fold-constants: \d+ changes$", out, re.MULTILINE)
    total = (
        r"^  in all saves \d+ bytes, \d+ flops, 0 launches; at B=1 L=1 T=0: saves \d.*B, \d.*FLOP$"
    )
    assert re.search(total, out, re.MULTILINE)
    assert "graph @" not in out


def test_passes_lists_every_pass(capsys: pytest.CaptureFixture[str]) -> None:
    out = output(capsys, "passes")
    assert all(f"\n{cls.name} " in out for cls in PASSES)
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("name", [cls.name for cls in PASSES])
def test_passes_explains_each(capsys: pytest.CaptureFixture[str], name: str) -> None:
    out = output(capsys, "passes", name)
    assert out.startswith(f"{name} (")


def test_targets_says_what_works(capsys: pytest.CaptureFixture[str]) -> None:
    out = output(capsys, "targets")
    assert "reference" in out
    assert "Default on this machine: " in out


def test_doctor_finds_this_machine_well(capsys: pytest.CaptureFixture[str]) -> None:
    out = output(capsys, "doctor")
    for what in ("python", "torch", "apache-tvm", "linker", "processor", "memory", "disk"):
        assert f"\n{what} " in out
    assert "All is well." in out


def test_doctor_names_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemoc.commands.doctor.shutil.which", lambda name: None)
    monkeypatch.setenv("NEMOC_THREADS", "0")
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "linker: install gcc or clang" in out
    assert "settings: NEMOC_THREADS: found '0'" in out
