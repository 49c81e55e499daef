"""The wheel: what it contains, and that it works in an environment of its own."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from nemoc import __version__

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("autotune", "codegen", "ir", "models", "passes", "runtime")
DATA = (
    "nemoc/py.typed",
    "nemoc/autotune/shipped.json",
    "nemoc/models/sample/checkpoint/config.json",
    "nemoc/models/sample/checkpoint/generation_config.json",
    "nemoc/models/sample/checkpoint/model.safetensors",
    "nemoc/models/sample/checkpoint/tokenizer.json",
    "nemoc/models/sample/checkpoint/tokenizer_config.json",
    "nemoc/models/sample/corpus.json",
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel made from it."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob(f"nemoc-{__version__}-py3-none-any.whl")
    return path


def test_the_wheel_contains_every_module(wheel: Path) -> None:
    expected = {
        f"nemoc/{room}/{path.relative_to(ROOT / room)}"
        for room in ROOMS
        for path in (ROOT / room).glob("**/*.py")
    }
    face = ROOT / "src" / "nemoc"
    expected |= {
        f"nemoc/{path.relative_to(face)}"
        for path in (*face.glob("*.py"), *face.glob("commands/*.py"))
    }
    found = zipfile.ZipFile(wheel).namelist()
    assert expected <= set(found)
    assert {name.split("/")[0] for name in found} == {"nemoc", f"nemoc-{__version__}.dist-info"}


def test_the_wheel_contains_the_data(wheel: Path) -> None:
    presets = {f"nemoc/models/presets/{p.name}" for p in (ROOT / "models/presets").glob("*.json")}
    found = set(zipfile.ZipFile(wheel).namelist())
    assert presets
    assert presets | set(DATA) <= found
    assert f"nemoc-{__version__}.dist-info/licenses/LICENSE" in found


def test_the_sdist_contains_real_files(built: Path) -> None:
    (path,) = built.glob("nemoc-*.tar.gz")
    with tarfile.open(path) as archive:
        members = {m.name.partition("/")[2]: m for m in archive.getmembers()}
    assert members["src/nemoc/ir/graph.py"].isreg()
    assert members["src/nemoc/models/presets/mid.json"].isreg()
    assert members["LICENSE"].isreg()


def test_the_wheel_works_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    """Dependencies are borrowed from this environment; nemoc itself comes from the wheel."""
    venv.create(tmp_path / "clean", with_pip=False)
    python = tmp_path / "clean" / "bin" / "python"
    here = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    # Without PYTHONPATH, or pip takes the checkout for an installed nemoc and does nothing.
    clear = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    install = [*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, env=clear)
    # Paths named in a .pth file are searched, but .pth files in them are not read: so the editable
    # nemoc of this environment stays out of sight.
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(here, "borrowed.pth").write_text("\n".join(sorted(borrowed)) + "\n")
    code = "import nemoc, nemoc.compiler; print(nemoc.__file__)"
    assert _run(python, tmp_path, "-c", code).startswith(here)
    nemoc = tmp_path / "clean" / "bin" / "nemoc"
    assert nemoc.is_file()
    assert __version__ in _run(nemoc, tmp_path, "--version")
    assert "parameters" in _run(nemoc, tmp_path, "ir", "sample", "--summary")


def _run(program: Path, cwd: Path, *arguments: str) -> str:
    done = subprocess.run(
        [program, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
