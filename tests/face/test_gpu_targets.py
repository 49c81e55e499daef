"""GPU targets without a GPU: kernels are interpreted, code is compiled, and artifacts say where they run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import nemoc
from nemoc import NemocError, compiler
from nemoc.__main__ import main
from nemoc.codegen.plan import StepFunction
from nemoc.codegen.storage import bind_weights
from nemoc.codegen.triton import check
from nemoc.codegen.triton.build import compile_variants, variants_of
from nemoc.codegen.triton.target import GPUS, INTERPRETER, gpu_target
from nemoc.gpu import REPORT
from nemoc.ir import DType, print_graph
from nemoc.ir.dims import evaluate_dim
from nemoc.ir.ops import DequantizeNvfp4, Fused
from nemoc.passes import preset
from nemoc.passes.spread_nvfp4 import SpreadNvfp4
from nemoc.runtime.launches import LAUNCHES, read_launches
from nemoc.verification import NARROW_BOUND, kernel_rows
from support.checkpoints import VARIANTS, write_checkpoint
from support.gpu_programs import program
from support.page import Page
from support.watched import run_watched, watched_launches

GPU_NAMES = [name for name in GPUS if name != INTERPRETER]

ODD = ("base", "latent experts", "grouped routing", "one group of B and C")
"""Variants whose kernels differ most; all of them are compiled for CPUs."""

PROMPT = "def "


@pytest.fixture(scope="module", params=ODD, ids=lambda name: name.replace(" ", "-"))
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path]:
    """A transformers model and its checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return write_checkpoint(folder, seed=7, **VARIANTS[request.param]), folder


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks of kernels are under a watch."""
    monkeypatch.setattr(check, "run_site", run_watched)


# In f32 whole models run the same kernels, under the same watch, below.
@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("dtype", [pytest.param("f32", marks=pytest.mark.slow), "bf16"])
def test_every_kernel_equals_its_op(checkpoint: tuple[Any, Path], dtype: str) -> None:
    found = compiler.functions(
        str(checkpoint[1]), INTERPRETER, dtype=dtype, which=("prefill", "decode")
    )
    rows = list(kernel_rows(found))
    assert len(rows) > 15
    assert [(row.name, row.error) for row in rows if not row.ok] == []


@pytest.mark.usefixtures("watched")
def test_kernels_for_a_gpu_equal_their_ops_too(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, seed=8, hybrid_override_pattern="ME*")
    found = compiler.functions(str(tmp_path), "cuda:sm_90", dtype="bf16", which=("decode",))
    assert [row.name for row in kernel_rows(found) if not row.error <= NARROW_BOUND] == []


def test_a_whole_model_equals_transformers(checkpoint: tuple[Any, Path]) -> None:
    reference, folder = checkpoint
    executable = nemoc.compile(str(folder), target=INTERPRETER, max_batch=2, max_context=16)
    ids = torch.randint(0, 97, (2, 8), generator=torch.Generator().manual_seed(0))
    state = executable.new_state(2)
    with watched_launches(scratch=executable._backend._scratch):  # type: ignore[attr-defined]
        first = executable.prefill(ids[:, :7], state, lengths=torch.tensor([7, 3]))
        second = executable.decode(ids[:, 7], state)
    for row, length in enumerate((7, 3)):
        alone = torch.cat([ids[row, :length], ids[row, 7:]])[None]
        with torch.inference_mode():
            expected = reference(alone).logits[0]
        for found, wanted in ((first[row], expected[-2]), (second[row], expected[-1])):
            assert float((found - wanted).norm() / wanted.norm()) <= 1e-4


def test_the_sample_model_writes_the_same_text_on_every_target() -> None:
    texts = {}
    for target in ("reference", "cpu", INTERPRETER):
        executable = nemoc.compile("sample", target=target, max_context=32)
        ids = torch.tensor([executable.tokenizer.encode(PROMPT)])
        texts[target] = executable.generate(ids, max_new_tokens=4).tolist()
    assert texts["cpu"] == texts["reference"] == texts[INTERPRETER]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample model for a GPU that is not here."""
    path = tmp_path_factory.mktemp("compiled") / "sample.nemoc"
    executable = nemoc.compile("sample", target="cuda:sm_90", destination=path)
    assert executable.program.target == "cuda:sm_90"
    return path


def test_an_artifact_for_an_absent_gpu_is_complete(compiled: Path) -> None:
    kernels = {path.name for path in (compiled / "kernels").iterdir()}
    assert {"launches.json", "report.json", "launches.txt", "step.py"} < kernels
    reports = json.loads((compiled / REPORT).read_text())
    assert {f"{r['symbol']}.cubin" for r in reports} <= kernels


def test_every_kernel_waits_before_it_does_anything(compiled: Path) -> None:
    record = read_launches(compiled / LAUNCHES)
    assert [binary.symbol for binary in record.binaries if not binary.waits] == []


def test_default_schedules_spill_nothing_and_use_matrix_units(compiled: Path) -> None:
    reports = json.loads((compiled / REPORT).read_text())
    assert [r["symbol"] for r in reports if r["report"]["spilled"]] == []
    assert [r["symbol"] for r in reports if r["report"]["plain"]] == []
    anchors = ("product", "grouped", "attention", "conv_scan", "chunk")
    for stem in anchors:
        made = [r for r in reports if r["symbol"].startswith(stem)]
        kinds = {kind for r in made for kind, _ in r["report"]["matrix"]}
        assert any(kind.startswith("wgmma") for kind in kinds), stem


def test_the_report_fits_a_terminal(compiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(compiled)]) == 0
    out = capsys.readouterr().out
    assert "none spilling" in out
    assert "conv-scan conv1d" in out
    assert max(map(len, out.splitlines())) <= 80


def test_the_page_about_an_artifact_has_every_kernel(compiled: Path, tmp_path: Path) -> None:
    assert main(["report", str(compiled), "-o", str(tmp_path / "page.html")]) == 0
    page = Page((tmp_path / "page.html").read_text())
    reports = json.loads((compiled / REPORT).read_text())
    assert [row[0] for row in page.cells["kernels"][1:]] == [r["symbol"] for r in reports]
    launched = {name for row in page.cells["decode"][1:] for name in row[1].split(", ")}
    assert launched <= {r["symbol"] for r in reports}


def test_what_cannot_run_here_says_what_it_needs(
    compiled: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["run", str(compiled), "--prompt", "x", "-q"]) == 2
    err = capsys.readouterr().err
    assert "needs an NVIDIA GPU of compute capability 9.0, found none" in err
    assert err.count("\n") == 1


def test_an_artifact_that_launches_nothing_has_no_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sample.nemoc"
    nemoc.compile("sample", target="reference", destination=path)
    assert main(["report", str(path)]) == 2
    assert "is for reference, which launches no kernels" in capsys.readouterr().err


def test_a_cpu_does_not_compute_in_bf16() -> None:
    with pytest.raises(NemocError, match="the cpu target computes in f32"):
        nemoc.compile("sample", target="cpu", dtype="bf16")


# One of each maker besides sm_90; `make test-targets` compiles all kernels for every GPU.
@pytest.mark.parametrize("target", ["cuda:sm_100", "hip:gfx942"])
def test_a_kernel_of_each_kind_compiles_for_other_gpus(target: str) -> None:
    variants = variants_of(program("sample", target).functions)
    kinds = {name.rpartition("_")[0]: variant for name, variant in variants.items()}
    assert {"rows", "product", "grouped", "sort", "attention", "conv_update"} <= kinds.keys()
    binaries = compile_variants(kinds.values(), gpu_target(target))
    assert all(binary.shared <= gpu_target(target).shared for binary in binaries.values())


def test_nvfp4_reaches_matrix_units_as_it_is_in_every_projection() -> None:
    found = program("sample", "cuda:sm_120", quantize="nvfp4-w4a4")
    sources = [kernel.source for kernel in found.kernels]
    assert sum("dot_nvfp4(" in source for source in sources) > 10
    assert not any("nvfp4_numbers(" in s or "nvfp4_units(" in s for s in sources)


@pytest.mark.parametrize(
    ("quantize", "call", "like"),
    [
        ("fp8", "dot(", None),
        ("fp8-w8a8", "dot_fp8(", "nvfp4-w4a4"),
        (
            "quantize-fp8{mode=w8a8,input-scale=0.5}",
            "dot_fp8(",
            "quantize-nvfp4{mode=w4a4,input-scale=0.5}",
        ),
    ],
    ids=["weights", "rows", "static"],
)
def test_fp8_is_multiplied_as_it_is_stored_and_takes_no_more_launches(
    quantize: str, call: str, like: str | None
) -> None:
    found, other = (program("sample", "cuda:sm_90", quantize=q) for q in (quantize, like))
    assert sum(call in kernel.source for kernel in found.kernels) > 10
    for mine, theirs in zip(found.functions, other.functions, strict=True):
        assert working(mine) == working(theirs)


def test_what_is_loaded_before_former_kernels_have_ended_are_weights() -> None:
    (decode,) = (
        function
        for function in program("sample", "cuda:sm_90", quantize="nvfp4").functions
        if function.name == "decode"
    )
    early = [
        launch.buffers[number].arena for launch in decode.launches for number in launch.kernel.early
    ]
    assert len(early) > 20
    assert set(early) == {"weights"}


def test_fp8_for_prompts_is_made_of_the_codes_that_decode_reads() -> None:
    kept = [p for p in preset("cuda", "prefill") if not isinstance(p, SpreadNvfp4)]
    found, plain = (
        compiler.functions("sample", "cuda:sm_90", pipeline, quantize=name).graphs
        for name, pipeline in (("nvfp4-fp8-prompts", None), ("nvfp4", kept))
    )
    assert found["decode"] == plain["decode"]
    mine, theirs = ({w.name: w.type for w in bind_weights(g)[1]} for g in (found, plain))
    assert theirs.keys() <= mine.keys()
    scales = [type_ for name, type_ in mine.items() if name not in theirs]
    assert {type_.dtype for type_ in scales} == {DType.F32}
    assert max(int(type_.elements) for type_ in scales) <= 32  # one for each expert at most


def test_codes_of_nvfp4_are_spread_for_gpus_and_stored_once() -> None:
    for quantize, order in (("nvfp4", True), ("nvfp4-fp8-prompts", False)):
        graphs = compiler.functions("sample", "cuda:sm_90", quantize=quantize).graphs
        bodies = [n.op.body for g in graphs.values() for n in g.nodes if isinstance(n.op, Fused)]
        ops = [n.op for body in bodies for n in body.nodes if isinstance(n.op, DequantizeNvfp4)]
        assert {op.spread for op in ops} == {order}
        _, weights = bind_weights(graphs)
        codes = [w.name.partition("-")[0] for w in weights if w.type.dtype is DType.U8]
        assert len(codes) == len(set(codes)) > 10


def test_rows_of_prompts_alone_become_fp8_from_the_weights_that_decode_reads_too() -> None:
    found = {
        name: compiler.functions("sample", "cuda:sm_90", quantize=name)
        for name in ("fp8-prompts", "fp8-w8a8", "fp8")
    }
    graphs = {name: functions.graphs for name, functions in found.items()}
    for step, like in (("prefill", "fp8-w8a8"), ("prefill_all", "fp8-w8a8"), ("decode", "fp8")):
        assert graphs["fp8-prompts"][step] == graphs[like][step]
    _, weights = bind_weights(graphs["fp8-prompts"])
    _, expected = bind_weights(graphs["fp8"])
    assert {w.name: w.type for w in weights} == {w.name: w.type for w in expected}
    assert sum(w.type.dtype is DType.F8E4M3 for w in weights) > 10


@pytest.mark.parametrize("quantize", ["fp8-prompts", "nvfp4-fp8-prompts"])
def test_products_of_prompts_multiply_fp8_by_fp8_and_those_of_decode_do_not(quantize: str) -> None:
    found = program("sample", "cuda:sm_90", quantize=quantize)
    kernels = {
        function.name: {launch.kernel.source for launch in function.launches}
        for function in found.functions
    }
    many, one = kernels["prefill"], kernels["decode"]
    many_fp8 = [source for source in many if "dot_fp8(" in source]
    assert len(many_fp8) > 5
    assert not any("dot_fp8(" in source or "e4m3_codes(" in source for source in one)
    made_of_codes = sum("nvfp4_word_fp8(" in source for source in many)
    assert made_of_codes == (len(many_fp8) if quantize.startswith("nvfp4") else 0)


def working(function: StepFunction) -> int:
    """Launches that do something for one sequence: of a product's forms there may be several."""
    sizes = {"B": 1, "L": 1 if function.name == "decode" else 40, "C": 64}
    return sum(evaluate_dim(launch.kernel.tasks, sizes) > 0 for launch in function.launches)


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize(
    ("quantize", "step"),
    [
        ("fp8", "decode"),
        ("fp8-w8a8", "prefill"),
        ("quantize-fp8{mode=w8a8,input-scale=0.02}", "prefill"),
    ],
    ids=["weights", "rows", "static"],
)
def test_kernels_of_fp8_equal_their_ops(tmp_path: Path, quantize: str, step: str) -> None:
    write_checkpoint(tmp_path, seed=9, hybrid_override_pattern="*E")
    found = compiler.functions(
        str(tmp_path), "cuda:sm_90", dtype="bf16", quantize=quantize, which=(step,)
    )
    assert print_graph(found.graphs[step]).count("quantize_fp8(") >= 8
    assert [row.name for row in kernel_rows(found) if not row.error <= NARROW_BOUND] == []


@pytest.mark.targets
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", GPU_NAMES)
@pytest.mark.parametrize("source", ["sample", "nano", "super"])
def test_every_kernel_of_a_model_compiles_for_every_gpu(source: str, target: str) -> None:
    variants = variants_of(program(source, target).functions)
    binaries = compile_variants(variants.values(), gpu_target(target))
    assert len(binaries) == len(variants)
    if target == "cuda:sm_90":
        assert all(binary.waits for binary in binaries.values())
        spilling = {b.symbol: b.report.spilled for b in binaries.values() if b.report.spilled}
        assert spilling == {}
