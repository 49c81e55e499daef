"""What the documentation shows is run, and what it names exists."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from nemoc.__main__ import main
from nemoc.cli import nemoc

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
CODE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
FOLDERS = "autotune|benchmarks|codegen|docs|examples|ir|models|passes|runtime|src|tests"


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in CODE.findall(page.read_text()) if kind == language]


def with_blocks(language: str) -> Any:
    pages = [page for page in PAGES if blocks(page, language)]
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.name)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run examples in, with the plugin that they name."""
    shutil.copy(ROOT / "examples" / "custom_pass.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@with_blocks("python")
def test_python_of_a_page_runs(
    page: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {"__name__": f"docs.{page.stem}"}
    for number, text in enumerate(blocks(page, "python"), 1):
        exec(compile(text, f"{page.name}, block {number}", "exec"), names)
    assert capsys.readouterr().out


@with_blocks("sh")
def test_commands_of_a_page_run(
    page: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in "".join(blocks(page, "sh")).splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] == "nemoc":
            code = main(words[1:])
            captured = capsys.readouterr()
            assert code == 0, f"{line}: {captured.err}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_text_exist(page: Path) -> None:
    for name in re.findall(r"`nemoc ([a-z]+)", page.read_text()):
        assert name in nemoc.commands


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = CODE.sub("", page.read_text())
    linked = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    missing = [name for name in linked if not (page.parent / name).exists()]
    named = re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", text)
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing
