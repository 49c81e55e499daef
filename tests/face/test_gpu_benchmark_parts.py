"""Parts of models on GPUs beside peers: kernels are interpreted, and the clock is a counter."""

import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from benchmarks import gpu, gpu_peers, gpu_stages
from benchmarks.gpu_peers import eager_scan, torch_product
from benchmarks.gpu_region import (
    DeviceRegion,
    Kernels,
    Part,
    compile_parts,
    evaluate,
)
from benchmarks.gpu_results import Journal
from benchmarks.gpu_stages import BOUND, Case, Parts, PartStage
from benchmarks.gpu_values import DrawnWeights, Sizes, Values

from nemoc.codegen.storage import weight_layout
from nemoc.ir import NemocError
from nemoc.ir.dims import evaluate_dim
from nemoc.passes.check import relative_error
from nemoc.runtime.launches import LaunchRecord
from support.fake_cuda import FakeDevice, FakeKernel, FakeLaunch, FakeLibrary
from support.gpu_benchmark import (
    MINI,
    QUANTIZED,
    ROOFS,
    TARGET,
    WIDE,
    binary_of,
    code_of,
    model_of,
    quiet,
    region_of,
    session_on,
    small,
)
from support.mamba_ssm import kernels_in_torch
from support.models import shortened


@pytest.fixture(scope="module")
def mini() -> Parts:
    return Parts(model_of(MINI), TARGET)


@pytest.fixture(scope="module")
def nano() -> Parts:
    """Nano's regions, each the first of its kind."""
    return Parts(shortened("random:nano"), TARGET)


def stages() -> list[PartStage]:
    return [stage for stage in gpu.stages() if isinstance(stage, PartStage)]


@pytest.mark.parametrize("stage", stages(), ids=lambda stage: stage.name)
def test_every_case_has_launches_and_costs(nano: Parts, stage: PartStage) -> None:
    lowered = stage.lowered(nano, TARGET)
    functions = [f for one in lowered.values() for f in one.program.functions]
    kernels = {x.kernel.name: x.kernel for f in functions for x in f.launches}
    binaries = {name: binary_of(kernel) for name, kernel in kernels.items()}
    record = LaunchRecord.of(TARGET, 0, binaries, functions)
    assert LaunchRecord.from_json(json.loads(record.to_text()), "") == record
    assert len(set(stage.case_names())) == len(stage.cases)
    for case in stage.cases:
        one = lowered[case.part]
        tasks = [x.tasks for x in record.functions[case.part].launches]
        assert any(evaluate_dim(count, case.sizes.symbols) > 0 for count in tasks)
        for amount in (one.part.bytes(case.sizes), one.part.flops(case.sizes)):
            assert math.isfinite(amount)
            assert amount > 0
        assert case.peers is None or case.peers <= stage.peers.keys()


def test_costs_of_a_product_are_those_on_paper(nano: Parts) -> None:
    stage = gpu_stages.matmul_stage(nano.config)
    part = Part("q", stage.parts["q"](nano, "q"))
    assert part.bytes(Sizes(1, 512)) == 2 * (512 * 2688 + 4096 * 2688 + 512 * 4096)
    assert part.flops(Sizes(1, 512)) == 2 * 512 * 2688 * 4096


def test_a_decode_with_nvfp4_reads_a_quarter_of_what_cublas_does(nano: Parts) -> None:
    stage = gpu_stages.nvfp4_stage(nano.config)
    batches = {case.sizes.batch for case in stage.cases if case.part == "q"}
    assert {1, 2, 4, 8, 16, 32, 64} == batches
    part = Part("q", stage.parts["q"](nano, "q"))
    assert part.bytes(Sizes(1, 1)) == 4096 * 2688 * 9 / 16 + 4 + 2 * (2688 + 4096)


def test_costs_of_an_update_are_those_on_paper(nano: Parts) -> None:
    stage = gpu_stages.update_stage()
    part = Part("update", stage.parts["update"](nano, "update"))
    channels, heads, inner = 6144, 64, 4096
    state, before = 64 * 64 * 128 * 4, 3 * channels * 4
    row = 2 * (channels + heads + inner) + 4 * inner + 2 * (state + before)
    assert part.bytes(Sizes(4, 1)) == 4 * row + 4 * (5 * channels + 3 * heads)


def test_forms_of_the_scan_differ_in_what_they_launch(nano: Parts) -> None:
    lowered = gpu_stages.scan_stage().lowered(nano, TARGET)
    for name, chunked in (("scan, chunked", 1), ("scan, single", 0)):
        (function,) = lowered[name].program.functions
        tasks = {x.kernel.name.rpartition("_")[0]: x.kernel.tasks for x in function.launches}
        for sizes in (Sizes(1, 512), Sizes(64, 512), Sizes(1, 32768)):
            found = {stem: evaluate_dim(t, sizes.symbols) for stem, t in tasks.items()}
            assert bool(found["pass_states"]) == bool(chunked)
            assert bool(found["conv_scan"]) != bool(chunked)


def test_a_part_is_compiled_for_a_gpu(mini: Parts) -> None:
    stage = gpu_stages.matmul_stage(MINI)
    lowered = stage.lowered(mini, TARGET)
    chosen = [lowered["o, decode"]]
    code = compile_parts(chosen, TARGET, None, None)
    assert list(code.record.functions) == ["o, decode"]
    assert len(code.record.binaries) > 1  # one for each form
    for binary in code.record.binaries:
        assert code.images[binary.file].startswith(b"\x7fELF")
        assert binary.pointers in (2, 3)  # those that add the sums of parts read no operand


NOBODY = frozenset[str]()
SMALL = {
    "matmul": small(
        gpu_stages.matmul_stage(MINI),
        Case("in_proj", Sizes(1, 19)),
        Case("q, decode", Sizes(3, 1)),
        Case("head, decode", Sizes(2, 1), NOBODY),
    ),
    "nvfp4": small(
        gpu_stages.nvfp4_stage(MINI),
        Case("o", Sizes(1, 1)),
        Case("k", Sizes(2, 1)),
        Case("head", Sizes(3, 1), NOBODY),
    ),
    "fp8": small(
        gpu_stages.fp8_stage(MINI),
        Case("out_proj, FP8", Sizes(1, 19)),
        Case("q, FP8, decode", Sizes(3, 1)),
    ),
    "update": small(gpu_stages.update_stage(), Case("update", Sizes(2, 1))),
    "moe": small(
        gpu_stages.moe_stage(),
        Case("moe", Sizes(1, 9), frozenset({"transformers"})),
        Case("moe, decode", Sizes(2, 1), frozenset({"transformers"})),
    ),
    "attention": small(
        gpu_stages.attention_stage(),
        Case("attention", Sizes(2, 40)),
        Case("attention, decode", Sizes(2, 1, 30)),
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_regions_on_a_device_are_right_and_so_are_peers(
    name: str, mini: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = SMALL[name]
    code, library = code_of(stage.lowered(mini, TARGET).values())
    monkeypatch.setattr(gpu_stages, "compile_parts", lambda *_: code)
    monkeypatch.setattr(gpu_stages, "_MOST_IN_A_ROW", 2)
    journal = Journal(tmp_path / "gpu.jsonl")
    assert session_on(library, journal).run(stage, quiet)
    of_one_token = {case.name for case in stage.cases if case.sizes.new == 1}
    for line in journal.lines:
        if line.status == "unavailable":
            assert line.note == "the package mamba_ssm is not installed"
            continue
        assert line.status == "measured", line.note
        assert line.error is not None
        assert line.error <= (1e-2 if line.contender in stage.peers else 1e-3)
        # The clock says a second of every run, in which there are three parts in a row, or one.
        together = 3 if stage.in_a_row and line.case in of_one_token else 1
        assert line.ms[1] == pytest.approx(1000 / together)
        assert line.share == pytest.approx(together * ROOFS.seconds(line.bytes, line.flops))
    assert [line.case for line in journal.lines if line.contender == "nemoc"] == list(
        stage.case_names()
    )


@pytest.fixture(scope="module")
def mini_quantized() -> Parts:
    return Parts(model_of(QUANTIZED), TARGET)


LAYERS_OF_EXPERTS = {
    name: (Sizes(3, 1) if name.endswith("decode") else Sizes(1, 9))
    for name in gpu_stages.quantized_moe_stage().parts
}


@pytest.mark.parametrize("name", LAYERS_OF_EXPERTS)
def test_quantized_experts_on_a_device_are_right_and_so_is_the_peer(
    name: str, mini_quantized: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.gpu_values._LARGE", 500)
    stage = small(gpu_stages.quantized_moe_stage(), Case(name, LAYERS_OF_EXPERTS[name]))
    code, library = code_of(stage.lowered(mini_quantized, TARGET).values())
    monkeypatch.setattr(gpu_stages, "compile_parts", lambda *_: code)
    journal = Journal(tmp_path / "gpu.jsonl")
    assert session_on(library, journal, model_of(QUANTIZED)).run(stage, quiet)
    ours, peer = journal.lines
    assert (ours.status, peer.status) == ("measured", "measured"), (ours.note, peer.note)
    assert peer.contender == "transformers, bf16"
    assert ours.error is not None and peer.error is not None
    # The peer does not round activations to FP8.
    assert ours.error <= 2e-3
    assert peer.error <= (0.05 if name.endswith("fp8-prompts") else 1e-2)


@pytest.mark.parametrize("name", LAYERS_OF_EXPERTS)
def test_what_is_drawn_of_quantized_experts_decodes_to_weights_of_usual_size(
    name: str, mini_quantized: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.gpu_values._LARGE", 500)
    stage = small(gpu_stages.quantized_moe_stage(), Case(name, LAYERS_OF_EXPERTS[name]))
    (lowered,) = stage.lowered(mini_quantized, TARGET).values()
    values = mini_quantized.quantized(stage.quantize[name]).values
    region = region_of(lowered, LAYERS_OF_EXPERTS[name], values)
    stored = region.operands.values()
    narrow = [x.float() for x in stored if x.dtype == torch.float8_e4m3fn]
    assert len(narrow) == 4
    assert all(x.isfinite().all() for x in narrow)
    if any(x.dtype == torch.uint8 for x in stored):  # they are block scales
        assert all((x > 0).all() for x in narrow)
    for matrix in ("experts.up_proj", "experts.down_proj", "shared_experts.up_proj.weight"):
        found = gpu_peers._mixer_weight(region, matrix).float()
        assert found.std().item() == pytest.approx(found.shape[-1] ** -0.5, rel=0.2)


def test_work_that_cannot_be_recorded_in_a_row_is_told_and_not_timed(
    mini: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stubborn(region: DeviceRegion, config: Any) -> Any:
        run, runs = torch_product(region, config), itertools.count()

        def once() -> Any:
            if next(runs):
                raise RuntimeError("operation not permitted when stream is capturing")
            return run()

        return once

    stage = small(gpu_stages.matmul_stage(MINI), Case("q, decode", Sizes(2, 1)))
    stage = replace(stage, peers={"stubborn": stubborn})
    code, library = code_of(stage.lowered(mini, TARGET).values())
    monkeypatch.setattr(gpu_stages, "compile_parts", lambda *_: code)
    monkeypatch.setattr(gpu_stages, "_MOST_IN_A_ROW", 2)
    journal = Journal(tmp_path / "gpu.jsonl")
    session_on(library, journal).run(stage, quiet)
    ours, peer = journal.lines
    assert (ours.status, len(ours.ms)) == ("measured", 3)
    assert (peer.status, peer.ms) == ("failed", ())
    assert peer.note.startswith("not recorded: ")


def test_a_kernel_that_writes_nothing_is_found_out(
    mini: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = small(gpu_stages.matmul_stage(MINI), Case("q", Sizes(1, 5)))
    code, _ = code_of(stage.lowered(mini, TARGET).values())
    monkeypatch.setattr(gpu_stages, "compile_parts", lambda *_: code)
    idle = FakeLibrary({b.symbol: FakeKernel(b.pointers) for b in code.record.binaries})
    journal = Journal(tmp_path / "gpu.jsonl")
    session_on(idle, journal).run(stage, quiet)
    ours, peer = journal.lines
    assert (ours.status, ours.ms, ours.error) == ("wrong", (), math.inf)
    assert ours.note == "relative error inf, expected at most 0.01"
    assert peer.status == "measured"


def test_a_peer_that_is_wrong_is_not_timed(
    mini: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(region: DeviceRegion, config: Any) -> Any:
        right = torch_product(region, config)
        return lambda: {name: 1.1 * result for name, result in right().items()}

    stage = small(gpu_stages.matmul_stage(MINI), Case("q", Sizes(1, 5)))
    stage = replace(stage, peers={"wrong": wrong})
    code, library = code_of(stage.lowered(mini, TARGET).values())
    monkeypatch.setattr(gpu_stages, "compile_parts", lambda *_: code)
    journal = Journal(tmp_path / "gpu.jsonl")
    session_on(library, journal).run(stage, quiet)
    ours, peer = journal.lines
    assert (ours.status, peer.status, peer.ms) == ("measured", "wrong", ())


def test_a_state_is_put_back_and_results_poisoned(mini: Parts) -> None:
    stage = SMALL["update"]
    region = region_of(stage.lowered(mini, TARGET)["update"], Sizes(2, 1), mini.values)
    before = {name: tensor.clone() for name, tensor in region.operands.items()}
    assert all(tensor.any() for tensor in before.values())
    region.run()
    first = {name: tensor.clone() for name, tensor in region.results().items()}
    region.run()
    assert not torch.equal(region.results()["layers.0.ssm"], first["layers.0.ssm"])
    region.reset()
    assert all(torch.equal(region.operands[n], t) for n, t in before.items())
    (output,) = region.part.graph.outputs
    assert region.results()[output.name].isnan().all()
    region.run()
    assert all(torch.equal(region.results()[n], t) for n, t in first.items())
    expected = region.expected()
    assert all(relative_error(first[n], expected[n]) <= BOUND for n in first)


def test_launches_have_the_addresses_of_the_operands(mini: Parts) -> None:
    stage = small(gpu_stages.matmul_stage(MINI), Case("q", Sizes(2, 5)))
    lowered = stage.lowered(mini, TARGET)["q"]
    code, _ = code_of([lowered])
    seen: list[FakeLaunch] = []
    kernels = {b.symbol: FakeKernel(b.pointers, seen.append) for b in code.record.binaries}
    region = DeviceRegion(
        lowered, Sizes(2, 5), Kernels(code, FakeDevice(FakeLibrary(kernels))), mini.values
    )
    region.run()
    (launch,) = seen
    tensors = [region.operands["x"], region.operands["w"], *region.results().values()]
    assert set(launch.pointers) == {tensor.data_ptr() for tensor in tensors}
    assert launch.sizes == (2, 5, 5)
    assert region.launches == 1
    assert region.bytes == region.part.bytes(Sizes(2, 5))


@pytest.fixture(scope="module")
def scan() -> DeviceRegion:
    """A recurrence of a prefill that ends with the gate."""
    parts = Parts(model_of(WIDE), TARGET)
    stage = small(gpu_stages.scan_stage(), Case("scan", Sizes(2, 70)))
    lowered = replace(stage, forms={}).lowered(parts, TARGET)["scan"]
    return region_of(lowered, Sizes(2, 70), parts.values)


def test_the_eager_scan_means_what_the_region_means(scan: DeviceRegion) -> None:
    assert_means_the_same(eager_scan(scan, WIDE, compiled=False), scan)


def assert_means_the_same(peer: Any, region: DeviceRegion) -> None:
    expected = region.expected()
    found = peer()
    assert len(found) == 2
    for name, tensor in found.items():
        assert relative_error(tensor.float(), expected[name].float()) <= BOUND


def test_mamba_ssm_is_given_what_the_scan_is_given(
    scan: DeviceRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_peers, "_mamba_kernels", kernels_in_torch)
    assert_means_the_same(gpu_peers.mamba_scan(scan, WIDE, compiled=False), scan)


def test_mamba_ssm_is_found_time_and_again_without_its_extension(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mamba_ssm", "einops"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('no extension')")
    kernels = tmp_path / "mamba_ssm" / "ops" / "triton"
    kernels.mkdir(parents=True)
    (kernels / "ssd_combined.py").write_text("answer = 7")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("", ".ops", ".ops.triton", ".ops.triton.ssd_combined"):
        monkeypatch.setitem(sys.modules, f"mamba_ssm{name}", ModuleType("gone after the test"))
        monkeypatch.delitem(sys.modules, f"mamba_ssm{name}")
    for _ in range(2):
        assert gpu_peers._mamba_kernels("ssd_combined").answer == 7


def test_mamba_ssm_is_given_what_the_update_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_peers, "_mamba_kernels", kernels_in_torch)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    parts = Parts(model_of(WIDE), TARGET)
    lowered = small(gpu_stages.update_stage(), Case("update", Sizes(2, 1))).lowered(parts, TARGET)
    region = region_of(lowered["update"], Sizes(2, 1), parts.values)
    assert_means_the_same(gpu_peers.mamba_update(region, WIDE), region)


def test_a_scan_with_the_norm_in_it_has_no_such_peer(mini: Parts) -> None:
    stage = small(gpu_stages.scan_stage(), Case("scan", Sizes(1, 4)))
    lowered = replace(stage, forms={}).lowered(mini, TARGET)["scan"]
    region = region_of(lowered, Sizes(1, 4), mini.values)
    with pytest.raises(NemocError, match="the part has the norm in it"):
        eager_scan(region, MINI, compiled=False)


@pytest.mark.parametrize(("function", "part"), [("scan", "scan"), ("update", "update")])
def test_references_are_evaluated_where_their_operands_are(
    nano: Parts, function: str, part: str
) -> None:
    stage = {"scan": gpu_stages.scan_stage(), "update": gpu_stages.update_stage()}[function]
    graph = stage.parts[part](nano, part)
    symbols = Sizes(2, 1 if part == "update" else 130).symbols
    given = {
        v.name: torch.empty(
            [evaluate_dim(d, symbols) for d in v.shape], dtype=v.dtype.torch, device="meta"
        )
        for v in graph.arguments
    }
    found = evaluate(graph, given)
    assert {tensor.device.type for tensor in found.values()} == {"meta"}


def test_sampled_tokens_are_those_of_the_whole(mini: Parts) -> None:
    stage = SMALL["attention"]
    lowered = stage.lowered(mini, TARGET)["attention"]
    region = region_of(lowered, Sizes(2, 40), mini.values)
    (name,) = (v.name for v in lowered.part.graph.outputs)
    whole = region.expected()[name]
    for row, start, stop in ((0, 0, 32), (1, 8, 40), (1, 39, 40)):
        rows = region.expected_rows(row, start, stop)[name]
        assert relative_error(rows.float(), whole[row : row + 1, start:stop].float()) <= 1e-3


def test_large_weights_are_drawn_in_pieces(mini: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu_values._LARGE", 500)
    weights = mini._bound[1]
    values = Values(weights, mini._model.parameters)
    drawn = DrawnWeights(weights, values, torch.device("cpu"))
    layout = weight_layout(weights)
    assert drawn.numel() == int(layout.bytes)
    step = 1 << 12
    block = torch.cat([drawn[at : at + step] for at in range(0, drawn.numel(), step)])
    assert block.numel() == drawn.numel()
    kinds = set()
    for slot in layout:
        begin, size = int(slot.offset), int(slot.type.bytes)
        found = block[begin : begin + size].view(slot.type.dtype.torch)
        kinds.add(values.is_small(slot.name))
        if values.is_small(slot.name):
            assert torch.equal(found, values.small(slot.name).view(-1))
        else:
            scale = 1.0 if slot.name.startswith("embed") else int(slot.type.shape[-1]) ** -0.5
            assert found.float().std().item() == pytest.approx(scale, rel=0.1)
    assert kinds == {True, False}


def test_integers_that_nobody_knows_are_refused() -> None:
    with pytest.raises(NemocError, match=r"offsets holds torch\.int32"):
        Values().fill("offsets", torch.empty(3, dtype=torch.int32), Sizes(1, 1), False)


def test_sums_off_by_a_thousandth_make_the_error_that_is_allowed_of_fp8_between_products() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        x = torch.randn(*shape, generator=generator)
        return in_fp8(x / x.abs().amax())

    def in_fp8(x: torch.Tensor) -> torch.Tensor:
        return (x * 448).to(torch.float8_e4m3fn).double()

    def active(sums: torch.Tensor) -> torch.Tensor:
        squares = sums.relu().square()
        return in_fp8(squares / squares.amax(dim=1, keepdim=True))

    x, up, down = draw(8, 2688), draw(1856, 2688), draw(64, 1856)
    exact = x @ up.T
    # Hopper's units add 32 products at a time, cut off 13 bits behind the first one of the largest.
    sums = torch.zeros_like(exact)
    for a, b in zip(x.split(32, dim=1), up.split(32, dim=1), strict=True):
        terms = torch.cat([sums[..., None], a[:, None] * b], dim=-1)
        _, exponent = torch.frexp(terms.abs().amax(dim=-1, keepdim=True))
        unit = torch.exp2(exponent.double() - 14)
        sums = ((terms / unit).trunc() * unit).sum(dim=-1)
    assert 0.9e-3 < relative_error(sums, exact) < 1.1e-3  # as an H100 was measured to add
    found, expected = active(sums), active(exact)
    assert 0.01 < float((found != expected).double().mean()) < 0.03
    error = relative_error(found @ down.T, expected @ down.T)
    assert gpu_stages.BOUND < error < gpu_stages.FP8_BOUND
