"""`nemoc bench` on a target with kernels: which of them take the time, and what the roofline allows them."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from nemoc import measurement
from nemoc.__main__ import main
from nemoc.autotune.measure import Roofs
from support.checkpoints import BASE, write_checkpoint

if importlib.util.find_spec("tvm") is None:
    pytest.skip("needs apache-tvm", allow_module_level=True)

ROOFS = Roofs(bandwidth=1e9, arithmetic=1e10)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    write_checkpoint(folder / "model", dtype=torch.bfloat16, **BASE)
    options = ["--target", "cpu", "--max-context", "64", "--quiet"]
    assert main(["compile", str(folder / "model"), "-o", str(folder / "a.nemoc"), *options]) == 0
    return folder / "a.nemoc"


def test_bench_says_which_kernels_take_the_time(
    artifact: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def roofs(threads: int, size: int) -> Roofs:
        asked.append(threads)
        return ROOFS

    monkeypatch.setattr(measurement, "measured_roofs", roofs)
    found = tmp_path / "bench.json"
    sizes = ["--prefill", "20", "--decode", "6", "--threads", "1", "--json", str(found), "-q"]
    assert main(["bench", str(artifact), *sizes]) == 0
    out = capsys.readouterr().out
    assert asked == [1]
    assert "1 thread here: 1.00 GB/s from memory, 10.0 GFLOP/s" in out
    assert "A prompt of 20 tokens: " in out
    assert "A token behind 23: " in out
    assert "in_proj" in out
    steps = json.loads(found.read_text())["steps"]
    for name, step in steps.items():
        assert (step["tokens"], step["cached"]) == {"prefill": (20, 0), "decode": (1, 23)}[name]
        kernels = step["kernels"]
        times = [kernel["seconds"] for kernel in kernels]
        assert times == sorted(times, reverse=True)
        assert 0.0 <= step["outside"] < step["seconds"]
        for kernel in kernels:
            least = max(kernel["moved"] / 1e9, kernel["flops"] / 1e10)
            assert kernel["least"] >= least * (1 - 1e-9)
            assert kernel["roofline"] == pytest.approx(kernel["least"] / kernel["seconds"])


@pytest.mark.parametrize("option", ["--json", "--report"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    for place, reason in ((tmp_path / "none" / "x", "No such file"), (tmp_path, "Is a directory")):
        assert main(["bench", "missing.nemoc", option, str(place)]) == 2
        error = f"nemoc: error: {place}: cannot be written: {reason}"
        assert capsys.readouterr().err.startswith(error)
    assert list(tmp_path.iterdir()) == []
