"""What every user sees first: help, exit codes, one-line errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemoc.__main__ import main
from nemoc.cli import nemoc
from nemoc.models.sample import CHECKPOINT

GRAPH = """graph @double {
  input %x: f32[B, 4]

  %y = add(%x, %x) : f32[B, 4]
  return %y
}
"""


@pytest.fixture
def graph_file(tmp_path: Path) -> Path:
    path = tmp_path / "double.ir"
    path.write_text(GRAPH)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def child(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.parametrize("arguments", ["--help", "compile --help", "--version"])
def test_help_loads_no_heavy_module(arguments: str) -> None:
    code = (
        "import sys; from nemoc.__main__ import main; main(sys.argv[1:]);"
        "heavy = {'torch', 'tvm', 'tvm_ffi', 'triton', 'sympy', 'transformers', 'rich'};"
        "sys.exit(f'loaded {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)"
    )
    done = child("-c", code, *arguments.split())
    assert done.returncode == 0, done.stderr


def test_importing_nemoc_loads_no_heavy_module() -> None:
    code = (
        "import sys, nemoc; assert nemoc.__version__;"
        "heavy = {'torch', 'tvm', 'tvm_ffi', 'triton'};"
        "sys.exit(f'loaded {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)"
    )
    done = child("-c", code)
    assert done.returncode == 0, done.stderr


def test_runs_as_a_module() -> None:
    done = child("-m", "nemoc", "--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in nemoc.commands)


def test_help_lists_commands_in_order_of_use(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "--help")
    places = [out.index(f"\n  {name} ") for name in nemoc.commands]
    assert places == sorted(places)
    assert "..." not in out.partition("Commands:")[2]  # no summary is cut


BAD_INPUT = {
    "unknown command": (["compil", "sample"], "No such command 'compil'"),
    "unknown option": (["targets", "--fast"], "--fast"),
    "option without value": (["ir", "nano", "--pipeline"], "--pipeline"),
    "no output": (["compile", "sample"], "--output"),
    "unknown source": (["ir", "nanoo"], "nanoo"),
    "unknown preset": (["ir", "random:nanoo"], "nanoo"),
    "unknown function": (["ir", "nano", "--function", "train"], "'train'"),
    "unknown target": (["ir", "mid", "--target", "gpu"], "unknown target 'gpu'"),
    "unknown pass": (["ir", "mid", "--pipeline", "canonicalise"], "did you mean canonicalize"),
    "unknown pass to explain": (["passes", "csee"], "did you mean cse"),
    "unknown option of a pass": (["ir", "mid", "--pipeline", "cse{depth=2}"], "no option 'depth'"),
    "unreadable pipeline": (["ir", "mid", "--pipeline", "cse;dce"], "unexpected ';'"),
    "pass that is not in the pipeline": (
        ["ir", "mid", "--pipeline", "cse", "--print-after", "dce"],
        "--print-after dce",
    ),
    "unknown plugin": (["passes", "--plugin", "no_such_module_at_all"], "no_such_module_at_all"),
    "no graph text": (["ir", "missing.ir"], "missing.ir"),
    "summary of a graph": (["ir", "x.ir", "--summary"], "--summary needs a model"),
    "sites of no remarks": (["ir", "x.ir", "--sites"], "--sites needs --remarks"),
    "remarks for no rows": (["ir", "x.ir", "--remarks", "--batch", "0"], "--batch"),
    "remarks for negative rows": (["ir", "x.ir", "--remarks", "--batch", "-1"], "-1"),
    "remarks for no tokens": (["ir", "x.ir", "--remarks", "--tokens", "0"], "--tokens"),
    "remarks for fewer than none cached": (["ir", "x.ir", "--remarks", "--cached=-1"], "--cached"),
    "remarks for half a token": (["ir", "x.ir", "--remarks", "--tokens", "0.5"], "'0.5'"),
    "weights needed": (["compile", "nano", "-o", "x.nemoc"], "random:nano"),
    "verify without weights": (["verify", "nano"], "random:nano"),
    "no artifact to run": (["run", "missing.nemoc", "--prompt", "x"], "missing.nemoc"),
    "no artifact to measure": (["bench", "missing.nemoc"], "missing.nemoc"),
    "negative temperature": (["run", "x", "--prompt", "x", "--temperature", "-1"], "-1"),
    "top-p above 1": (["run", "x", "--prompt", "x", "--top-p", "1.5"], "1.5"),
    "no threads": (["bench", "x", "--threads", "0"], "--threads"),
    "no tokens": (["run", "x", "--prompt", "x", "-n", "0"], "-n"),
    "context of none": (["compile", "sample", "-o", "x", "--max-context", "0"], "--max-context"),
}


@pytest.mark.parametrize(("arguments", "says"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_one_line_and_code_2(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("nemoc: error: ")
    assert err.count("\n") == 1
    assert says in err
    assert list(tmp_path.iterdir()) == []


def test_misspelt_config_field_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = json.loads((CHECKPOINT / "config.json").read_text())
    data["mamba_num_head"] = data.pop("mamba_num_heads")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(data))
    code, _, err = run(capsys, "ir", str(path), "--summary")
    assert code == 2
    assert str(path) in err
    assert "mamba_num_head" in err


def test_bad_graph_text_is_located(capsys: pytest.CaptureFixture[str], graph_file: Path) -> None:
    graph_file.write_text(GRAPH.replace("add(%x, %x)", "add(%x, %z)"))
    code, _, err = run(capsys, "ir", str(graph_file))
    assert code == 2
    assert f"{graph_file}:4" in err


def test_wrong_setting_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, graph_file: Path
) -> None:
    monkeypatch.setenv("NEMOC_THREADS", "many")
    code, _, err = run(capsys, "passes")
    assert code == 2
    assert "NEMOC_THREADS: found 'many'" in err


@pytest.mark.parametrize(("option", "setting"), [(["--debug"], "0"), ([], "1")])
def test_debug_shows_the_traceback(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    option: list[str],
    setting: str,
) -> None:
    monkeypatch.setenv("NEMOC_DEBUG", setting)
    code, _, err = run(capsys, "ir", "nanoo", *option)
    assert code == 2
    assert "Traceback" in err
    assert err.rstrip().splitlines()[-1].startswith("nemoc: error: ")


def test_an_error_of_nemoc_itself_is_told_apart(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr("nemoc.commands.passes.run", lambda *_: fail(None))
    code, _, err = run(capsys, "passes")
    assert code == 70
    assert err.count("\n") == 1
    assert err.startswith("nemoc: internal error: ZeroDivisionError: by zero")


def test_interruption_is_code_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nemoc.commands.passes.run", interrupt)
    assert run(capsys, "passes") == (130, "", "\nnemoc: interrupted\n")


def test_no_arguments_show_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys)
    assert code == 2
    assert "Commands:" in err


def test_reader_that_goes_away_is_no_error() -> None:
    piped = f"{sys.executable} -m nemoc ir nano | head -1"
    done = subprocess.run(["sh", "-c", piped], capture_output=True, text=True, check=False)
    assert done.stdout == "graph @step {\n"
    assert done.stderr == ""


@pytest.mark.parametrize("command", ["ir nano", "passes"])
def test_output_that_nobody_reads_is_no_error(command: str) -> None:
    code = f"{sys.executable} -m nemoc {command}"
    for line in (f"{{ {code}; echo $? >&2; }} | true", f"{code} >&-; echo $? >&2"):
        done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
        assert done.stderr == "0\n"
