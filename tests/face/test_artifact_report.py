"""`nemoc report`, and pages about artifacts: what is launched, what that costs, how long it took."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

from nemoc import measurement
from nemoc.__main__ import main
from nemoc.artifact_report import FunctionReport, artifact_html, read_artifact
from nemoc.autotune.measure import Roofs
from nemoc.kernel_times import kernel_groups
from nemoc.remarks import Shape
from nemoc.runtime.costs import COSTS, FunctionCosts, LaunchCost, OpCost
from support.checkpoints import BASE, write_checkpoint
from support.page import BAD, Page

if importlib.util.find_spec("tvm") is None:
    pytest.skip("needs apache-tvm", allow_module_level=True)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_checkpoint(folder / "model", dtype=torch.bfloat16, **BASE)
    options = ["--target", "cpu", "--max-context", "64", "--quiet"]
    assert main(["compile", str(folder / "model"), "-o", str(folder / "a.nemoc"), *options]) == 0
    return folder / "a.nemoc"


def test_every_launch_is_in_the_report(artifact: Path) -> None:
    report = read_artifact(artifact, tokens=20, cached=30)
    assert [f.name for f in report.functions] == ["prefill", "decode"]
    assert [f.shape for f in report.functions] == ["B=1 L=20 T=0", "B=1 L=1 T=30"]
    for function in report.functions:
        launches = sum(group.sites * len(group.kernels) for group in function.groups)
        assert launches == len(function.costs.launches)
        assert sum(group.sites for group in function.groups) == len(function.costs.ops)
    assert report.pipelines[0].startswith("prefill: ")


def test_costs_are_those_of_the_shape_that_is_asked_for(artifact: Path) -> None:
    def attention(cached: int) -> float:
        (found,) = (
            group.moved
            for function in read_artifact(artifact, 8, cached).functions
            for group in function.groups
            if function.name == "decode" and group.op == "attention"
        )
        assert found is not None
        return found

    once, twice, thrice = map(attention, (10, 20, 30))
    assert twice - once == pytest.approx(thrice - twice)
    assert twice > once


def test_the_report_is_a_table_for_each_function(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(artifact), "--prefill", "20", "--cached", "30"]) == 0
    out = capsys.readouterr().out
    assert "prefill: " in out and "costs at B=1 L=20 T=0" in out
    assert "decode: " in out and "costs at B=1 L=1 T=30" in out
    assert "in_proj" in out
    assert max(map(len, out.splitlines())) <= 80


def test_the_page_has_launches_in_order_and_no_times(artifact: Path, tmp_path: Path) -> None:
    assert main(["report", str(artifact), "-o", str(tmp_path / "page.html")]) == 0
    page = Page((tmp_path / "page.html").read_text())
    assert page.cells["prefill"][0] == ["Op", "Kernels", "Sites", "Arithmetic", "Moved"]
    costs = read_artifact(artifact).functions[1].costs
    order = [
        [str(number), launch.kernel, costs.ops[launch.op].op, costs.ops[launch.op].weight]
        for number, phase in enumerate(costs.phases, 1)
        for launch in phase
    ]
    assert page.cells["decode-order"][1:] == order
    assert not [tag for tag, _ in page.attributes if tag in ("script", "img", "link")]


def test_bench_writes_a_page_with_times(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurement, "measured_roofs", lambda threads, size: Roofs(1e9, 1e10))
    page, found = tmp_path / "page.html", tmp_path / "found.json"
    sizes = ["--prefill", "20", "--decode", "6", "--report", str(page), "--json", str(found), "-q"]
    assert main(["bench", str(artifact), *sizes]) == 0
    shown = Page(page.read_text())
    steps = json.loads(found.read_text())["steps"]
    for name, step in steps.items():
        rows = shown.cells[name]
        assert rows[0][3:6] == ["Time", "Share", "Roofline"]
        assert [row[1].split(", ") for row in rows[1:]] == [k["kernels"] for k in step["kernels"]]
        assert [int(row[2]) for row in rows[1:]] == [k["sites"] for k in step["kernels"]]
    assert [row[0] for row in shown.cells["summary"] if "1.00 GB/s" in row[-1]] == ["Measured on"]


def test_a_long_prompt_costs_what_its_steps_do(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--target", "cpu", "--max-context", "1100", "--quiet", "-o", str(tmp_path / "long")]
    assert main(["compile", str(artifact.parent / "model"), *options]) == 0
    report = read_artifact(tmp_path / "long", tokens=1030)
    assert report.functions[0].shape == "B=1 L=1030 T=0 in 3 steps"

    def head(tokens: int) -> float:
        groups = read_artifact(tmp_path / "long", tokens).functions[0].groups
        (found,) = (g.moved for g in groups if "lm_head" in g.weights)
        assert found is not None
        return found

    assert head(1030) == pytest.approx(3 * head(500))
    capsys.readouterr()
    assert main(["report", str(tmp_path / "long"), "--prefill", "1101"]) == 2
    assert "holds 1100 tokens, a prompt of 1101 is beyond that" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "long"), "--cached", "1100"]) == 2
    assert "holds 1100 tokens, a token behind 1100 is beyond that" in capsys.readouterr().err


def test_nothing_in_an_artifact_becomes_a_part_of_the_page(artifact: Path, tmp_path: Path) -> None:
    report = read_artifact(artifact)
    entry = {"kernel": BAD, "schedule": {BAD: BAD}, "origin": BAD}
    occupancy = {"programs": 1, "limit": BAD}
    said = {"registers": 1, "spilled": 0, "occupancy": occupancy, "matrix": [], "plain": [BAD]}
    costs = FunctionCosts((OpCost(BAD, BAD, False, None),), ((LaunchCost(BAD, 0),),))
    shape = (Shape(1, 1, 0),)
    function = FunctionReport("decode", shape, costs, tuple(kernel_groups(costs, [])))
    report = type(report)(
        tmp_path / BAD.replace("/", ""),
        report.manifest,
        (f"decode: {BAD}",),
        (function,),
        (entry,),
        ({"symbol": BAD, "shared": 0, "report": said},),
    )
    page = Page(artifact_html(report))
    assert page.cells["decode"][1][:2] == [f"{BAD} {BAD}", BAD]
    assert page.cells["decode-order"][1] == ["1", BAD, BAD, BAD]
    assert page.cells["kernels"][1][0] == BAD
    assert page.cells["schedules"][1] == [BAD, f"{BAD}={BAD}", BAD]
    assert page.cells["passes"] == [["decode", BAD]]
    assert not [tag for tag, _ in page.attributes if tag in ("script", "img")]


def test_a_record_that_was_altered_is_refused(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(artifact, tmp_path / "copy.nemoc")
    content = (copy / COSTS).read_text()
    (copy / COSTS).write_text(content.replace('"linear"', '"linger"', 1))
    assert main(["report", str(copy)]) == 2
    err = capsys.readouterr().err
    assert "costs.json: was altered" in err
    assert err.count("\n") == 1
