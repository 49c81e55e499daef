"""The examples work as they say."""

import re
import sys
from pathlib import Path

import pytest

from nemoc.__main__ import main

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(autouse=True)
def among_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_a_plugin_is_listed_with_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["passes", "--plugin", "custom_pass", "round-activations"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("round-activations (precision)")
    assert "budget" in out


def test_a_plugin_named_by_the_environment_is_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("NEMOC_PLUGINS", "custom_pass")
    assert main(["passes"]) == 0
    assert "round-activations" in capsys.readouterr().out


def test_a_plugin_rewrites_a_model_where_its_option_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pipeline = "round-activations{weights=experts.}"
    assert main(["ir", "mid", "--plugin", "custom_pass", "--pipeline", pipeline]) == 0
    rounded = [line for line in capsys.readouterr().out.splitlines() if "{dtype=bf16}" in line]
    assert (
        len(rounded) == 4 * 7
    )  # two products of the routed and two of the shared experts, 7 layers


def test_a_plugin_is_held_to_its_budget(capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = "round-activations{budget=1e-9},cse,dce"
    arguments = ["--plugin", "custom_pass", "--pipeline", pipeline, "--target", "reference"]
    assert main(["verify", "sample", *arguments]) == 1
    out = capsys.readouterr().out
    (line,) = [x for x in out.splitlines() if x.startswith("round-activations") and "step" in x]
    assert line.endswith("MISS")


def test_the_change_that_breaks_its_word_is_found(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pipeline = "round-activations{budget=1e-9},cse"
    arguments = ["--plugin", "custom_pass", "--pipeline", pipeline, "--target", "reference", "-q"]
    assert main(["bisect", "sample", *arguments, "-o", str(tmp_path / "found")]) == 1
    (first, *_) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"pass 1 of 2 \(round-activations\), change \d+ of \d+ \(step/%.*: input rounded to bf16\)",
        first,
    )
