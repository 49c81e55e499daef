"""`compile`, `run` and `bench` on the sample model, for the target that needs no compiler."""

import json
from pathlib import Path

import pytest
import torch

from nemoc.__main__ import main
from nemoc.runtime import mapping

PROMPT = "import "


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compiled") / "sample.nemoc"
    options = ["--target", "reference", "--max-context", "64", "--quiet"]
    assert main(["compile", "sample", "-o", str(path), *options]) == 0
    return path


def test_compile_says_what_came_out(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, artifact: Path
) -> None:
    out = tmp_path / "again.nemoc"
    code, printed, err = run(capsys, "compile", "sample", "-o", str(out), "--target", "reference")
    assert code == 0
    assert printed.startswith(f"{out}: sample for reference, ")
    assert err.startswith("  run passes: ")
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in artifact.iterdir())


def test_run_continues_the_prompt(capsys: pytest.CaptureFixture[str], artifact: Path) -> None:
    code, out, err = run(capsys, "run", str(artifact), "--prompt", PROMPT, "-n", "5")
    assert code == 0
    assert out.startswith(PROMPT)
    assert len(out) > len(PROMPT) + 1
    assert "5 tokens" in err


def test_run_with_a_seed_repeats_itself(capsys: pytest.CaptureFixture[str], artifact: Path) -> None:
    arguments = ["run", str(artifact), "--prompt", PROMPT, "-n", "5", "--temperature", "1", "-q"]
    first = run(capsys, *arguments, "--seed", "7")
    assert first == run(capsys, *arguments, "--seed", "7")
    assert first[1] != run(capsys, *arguments, "--seed", "8")[1]


def test_weights_are_copied_where_asked_for_and_the_text_is_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, artifact: Path
) -> None:
    copied: list[bool] = []

    def map_file(path: Path, resident: bool = False) -> torch.Tensor:
        copied.append(resident)
        return mapping.map_file(path, resident)

    monkeypatch.setattr("nemoc.runtime.weights.map_file", map_file)
    arguments = ["run", str(artifact), "--prompt", PROMPT, "-n", "5", "-q"]
    assert run(capsys, *arguments) == run(capsys, *arguments, "--resident")
    sizes = ["--prefill", "8", "--decode", "4", "-q"]
    assert run(capsys, "bench", str(artifact), "--resident", *sizes)[0] == 0
    assert copied == [False, True, True]


def test_bench_writes_json(
    capsys: pytest.CaptureFixture[str], artifact: Path, tmp_path: Path
) -> None:
    path = tmp_path / "bench.json"
    sizes = ["--prefill", "8", "--decode", "4", "--json", str(path), "-q"]
    code, out, _ = run(capsys, "bench", str(artifact), *sizes)
    assert code == 0
    assert "prefill of 8 tokens" in out
    assert json.loads(path.read_text())["decode_tokens"] == 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "ARTIFACT", "--prompt", "x " * 80], "64"),
        (["run", "ARTIFACT", "--prompt", "x", "-n", "65"], "64"),
        (["run", "ARTIFACT", "--prompt", ""], "--prompt"),
        (["run", "ARTIFACT", "--prompt", "x", "--chat"], "no chat template"),
        (["bench", "ARTIFACT", "--prefill", "60", "--decode", "10"], "64"),
    ],
    ids=["prompt past the context", "text past it", "no prompt", "no template", "bench past it"],
)
def test_what_the_artifact_cannot_do_is_one_line(
    capsys: pytest.CaptureFixture[str], artifact: Path, arguments: list[str], says: str
) -> None:
    filled = [str(artifact) if word == "ARTIFACT" else word for word in arguments]
    code, out, err = run(capsys, *filled, "--quiet")
    assert (code, out) == (2, "")
    assert err.startswith("nemoc: error: ")
    assert err.count("\n") == 1
    assert says in err


def test_a_folder_that_is_no_artifact_is_not_replaced(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("ten years of work")
    command = ["compile", "sample", "-o", str(tmp_path), "--target", "reference", "-q"]
    code, _, err = run(capsys, *command)
    assert code == 2
    assert str(tmp_path) in err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_altered_artifact_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "sample.nemoc"
    assert main(["compile", "sample", "-o", str(path), "--target", "reference", "-q"]) == 0
    (victim,) = path.glob("**/prefill.ir")
    victim.write_text(victim.read_text().replace("f32", "f64", 1))
    code, _, err = run(capsys, "run", str(path), "--prompt", "x", "-q")
    assert code == 2
    assert "prefill.ir" in err


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_demo_tells_the_whole_story(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "demo", "-q")
    assert code == 0
    for part in ("Compiled for", "Passes:", "Model:", "What it writes", "Speed in tokens/s"):
        assert part in out
    assert "MISS" not in out
    assert max(map(len, out.splitlines())) <= 80
