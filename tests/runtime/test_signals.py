"""A process that is asked to end removes what it had under way."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nemoc.__main__ import main


def test_sigterm_leaves_no_temporary_artifact(tmp_path: Path) -> None:
    code = """
import sys, time
import click
from nemoc import __main__, cli, runtime
from nemoc.runtime import artifact

def slow(*arguments, **options):
    print("ready", flush=True)
    time.sleep(60)

@cli.nemoc.command("build")
def build():
    import importlib.util
    spec = importlib.util.spec_from_file_location("model", sys.argv[1])
    model = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(model)
    artifact.load = slow
    runtime.build(model.reference_contents())

sys.exit(__main__.main(["build"]))
"""
    conftest = Path(__file__).parent / "conftest.py"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(conftest)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert [path.name[:6] for path in tmp_path.iterdir()] == ["nemoc-"]
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (143, "nemoc: terminated\n")
    assert not any(tmp_path.iterdir())


def test_the_command_line_leaves_the_handling_of_signals_as_it_was(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert main(["--version"]) == 0
    assert signal.getsignal(signal.SIGTERM) is before
    capsys.readouterr()
