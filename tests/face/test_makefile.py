"""What `make demo` says on a machine that lacks something; nothing is installed here."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("sh", "make", "cat", "cksum", "cut")


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A checkout on a machine with little more than make."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        if found is None:
            pytest.skip(f"{tool} is not installed")
        (tmp_path / "bin" / tool).symlink_to(found)
    return tmp_path


def add(bare: Path, name: str, script: str) -> None:
    path = bare / "bin" / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def make_demo(bare: Path) -> str:
    done = subprocess.run(
        [bare / "bin" / "make", "demo"],
        cwd=bare,
        env={"PATH": str(bare / "bin")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert not (bare / ".venv").exists()
    return done.stderr


def test_without_python(bare: Path) -> None:
    assert "needs Python 3.11 or 3.12" in make_demo(bare)


def test_with_another_python_only(bare: Path) -> None:
    add(bare, "python3", 'test "$1" = --version && echo "Python 3.13.0"; exit 1')
    assert "needs Python 3.11 or 3.12, found: Python 3.13.0" in make_demo(bare)


def test_without_the_venv_module(bare: Path) -> None:
    add(bare, "python3", f'case "$2" in *ensurepip*) exit 1;; esac; exec {sys.executable} "$@"')
    assert "apt install python3-venv" in make_demo(bare)


def test_without_a_compiler(bare: Path) -> None:
    add(bare, "python3", f'exec {sys.executable} "$@"')
    assert "no C compiler found" in make_demo(bare)
