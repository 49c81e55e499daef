"""The cheapest formats within an error budget: chosen by what is measured."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from nemoc.__main__ import main
from nemoc.codegen.triton.target import INTERPRETER
from nemoc.compiler import compile
from nemoc.error_budget import (
    FP8,
    NVFP4,
    Budgeted,
    Error,
    calibrate,
    rows_in_fp8,
    within_budget,
)
from nemoc.evaluation import evaluate
from nemoc.ir import Builder, DType, NemocError, interpret
from nemoc.ir.ops.fp8 import dequantized_fp8, quantized_fp8
from nemoc.ir.params import LazyArguments
from nemoc.ir.sample_inputs import sample_arguments
from nemoc.models import Model, eager_reference, open_model
from nemoc.models.eager import change_rows
from nemoc.models.names import is_stack
from nemoc.passes import Pass, PassContext, parse_pipeline, print_pipeline, run_pipeline
from nemoc.passes.quantize_fp8 import QuantizeFp8
from nemoc.passes.quantize_nvfp4 import QuantizeNvfp4
from nemoc.quality import Window, model_tokenizer, own_calibration, own_text, read_windows
from nemoc.runtime import Executable
from nemoc.targets import multiplies_fp8
from support.checkpoints import unusual_model
from support.quantized import WIDE

ROWS, TOKENS = 6, 24
NARROW = "shared_experts.down_proj.weight"


@pytest.fixture(scope="module")
def model() -> Model:
    """All four mixers; some weights have rows of 40, no whole blocks of 16."""
    return open_model(unusual_model(**(WIDE | {"moe_shared_expert_intermediate_size": 40})))


@pytest.fixture(scope="module")
def windows() -> list[Window]:
    random = torch.Generator().manual_seed(5)
    return [Window(torch.randint(0, 97, (TOKENS + 1,), generator=random), 1) for _ in range(ROWS)]


@pytest.fixture(scope="module")
def budgeted(model: Model, windows: list[Window]) -> Mapping[float, Budgeted]:
    """By budget, from one that allows nothing to one that allows everything."""
    return {x: within_budget(model, x, windows) for x in (1e-9, 3e-4, 2e-3, 1e-2, 100.0)}


def errors(model: Model, windows: list[Window], passes: tuple[Pass, ...]) -> torch.Tensor:
    """KL of the next token's distribution for each window, in float64, from the graphs that passes make."""
    assert model.parameters is not None
    logits = []
    for applied in ((), passes):
        graph = run_pipeline(model.build_step(logits="all"), applied, PassContext())
        given = sample_arguments(graph, {"B": ROWS, "L": TOKENS, "C": TOKENS}, params=False)
        given = {name: torch.zeros_like(tensor) for name, tensor in given.items()}
        given["tokens"] = torch.stack([w.ids[:-1] for w in windows]).to(given["tokens"].dtype)
        given["valid"] = torch.full_like(given["valid"], TOKENS)
        arguments = LazyArguments(graph, model.parameters, given)
        logits.append(interpret(graph, arguments, float64=True).outputs[0].log_softmax(-1))
    p, q = logits
    return (p.exp() * (p - q)).sum(-1).mean(-1)


def test_the_error_of_the_choice_is_that_of_the_graph_and_within_the_budget(
    model: Model, windows: list[Window], budgeted: Mapping[float, Budgeted]
) -> None:
    for budget in (3e-4, 2e-3):
        found = budgeted[budget]
        kinds = {choice.format for choice in found.choices}
        assert len(kinds) > 1  # neither nothing nor everything
        measured = errors(model, windows, found.passes)
        assert found.error.mean == pytest.approx(float(measured.mean()), rel=0.02)
        assert found.error.deviation == pytest.approx(float(measured.std()) / ROWS**0.5, rel=0.02)
        assert float(measured.mean() + 1.98 * measured.std() / ROWS**0.5) <= budget


@pytest.mark.parametrize(("format", "pass_"), [(NVFP4, QuantizeNvfp4), (FP8, QuantizeFp8)])
def test_the_error_of_one_weight_is_that_of_the_graph(
    model: Model,
    windows: list[Window],
    budgeted: Mapping[float, Budgeted],
    format: str,
    pass_: type[QuantizeNvfp4 | QuantizeFp8],
) -> None:
    for choice in budgeted[100.0].choices[2:6]:
        expected = errors(model, windows, (pass_(scope=f"{choice.name}$"),))[:4].mean()
        assert choice.kl[format] == pytest.approx(float(expected), rel=0.02, abs=1e-8)


def test_everything_takes_the_cheapest_format_where_there_is_room(
    budgeted: Mapping[float, Budgeted],
) -> None:
    for choice in budgeted[100.0].choices:
        assert choice.format == (FP8 if choice.name.endswith(NARROW) else NVFP4)
    names = {choice.name for choice in budgeted[100.0].choices}
    assert not [n for n in names if "gate" in n or "norm" in n or "conv" in n or "lm_head" in n]


def test_nothing_is_quantized_where_there_is_none(budgeted: Mapping[float, Budgeted]) -> None:
    found = budgeted[1e-9]
    assert found.passes == ()
    assert found.error == Error(0.0, 0.0)
    assert sum(choice.saved for choice in found.choices) == 0


def test_more_room_saves_more(budgeted: Mapping[float, Budgeted]) -> None:
    saved = [sum(choice.saved for choice in found.choices) for found in budgeted.values()]
    assert saved == sorted(set(saved))


def test_the_choice_is_text(budgeted: Mapping[float, Budgeted]) -> None:
    passes = budgeted[2e-3].passes
    assert parse_pipeline(print_pipeline(passes)) == passes


PASSES: Mapping[str, type[QuantizeNvfp4 | QuantizeFp8]] = {NVFP4: QuantizeNvfp4, FP8: QuantizeFp8}
MODES: Mapping[type[Pass], str] = {QuantizeNvfp4: "fp8-prompts", QuantizeFp8: "w8a8-prompts"}


@pytest.fixture(scope="module")
def for_prompts(model: Model, windows: list[Window]) -> Mapping[float, Budgeted]:
    """By budget, where the target multiplies FP8 by FP8."""
    return {x: within_budget(model, x, windows, prompts=True) for x in (2e-3, 1e-2, 100.0)}


def test_rows_of_prompts_become_fp8_where_there_is_room(
    for_prompts: Mapping[float, Budgeted],
) -> None:
    found = for_prompts[100.0]
    assert all(c.prompts for c in found.choices)
    assert {type(p): p.mode for p in found.passes} == MODES
    assert found.prompts is not None
    assert found.prompts.chosen == found.prompts.all
    assert found.prompts.all.mean != found.error.mean


def test_as_many_rows_of_prompts_become_fp8_as_the_budget_allows(
    model: Model, windows: list[Window], for_prompts: Mapping[float, Budgeted]
) -> None:
    counts = []
    for budget in (2e-3, 1e-2):
        found = for_prompts[budget]
        assert found.prompts is not None
        measured = errors(model, windows, found.passes)
        assert found.prompts.chosen.mean == pytest.approx(float(measured.mean()), rel=0.02)
        assert found.prompts.chosen.within(budget)
        could = [c for c in found.choices if c.kl_prompts is not None]
        assert could == [c for c in found.choices if c.format is not None]
        counts.append((sum(c.prompts for c in could), len(could)))
    assert any(0 < some < every for some, every in counts)


def test_rows_of_prompts_stay_where_there_is_no_room(model: Model, windows: list[Window]) -> None:
    scope = r"layers\.1\.mixer\.shared_experts\.down_proj"
    alone = within_budget(model, 100.0, windows, scope)
    budget = alone.error.mean + 2 * alone.error.deviation
    found = within_budget(model, budget * (1 + 1e-6), windows, scope, prompts=True)
    (choice,) = found.choices
    assert (choice.format, choice.prompts) == (FP8, False)
    assert found.passes == alone.passes
    assert found.prompts is not None
    assert found.prompts.chosen == found.error
    assert not found.prompts.all.within(budget)


def test_rows_of_prompts_change_nothing_of_the_weights(
    budgeted: Mapping[float, Budgeted], for_prompts: Mapping[float, Budgeted]
) -> None:
    for budget, found in for_prompts.items():
        expected = budgeted[budget]
        assert found.error == expected.error
        assert [c.format for c in found.choices] == [c.format for c in expected.choices]
        assert expected.prompts is None


def test_the_error_of_rows_of_prompts_is_that_of_the_graph(
    model: Model, windows: list[Window], for_prompts: Mapping[float, Budgeted]
) -> None:
    choices = [c for found in for_prompts.values() for c in found.choices]
    measured = [c for c in choices if c.format is not None and c.kl_prompts is not None]
    by_kind = {(c.format, is_stack(c.name)): c for c in measured}
    assert len(by_kind) == 4
    for (format_, _), choice in by_kind.items():
        kind = PASSES[format_]
        pass_ = kind(scope=f"{choice.name}$", mode=MODES[kind])
        expected = errors(model, windows, (pass_,))[:4].mean()
        assert choice.kl_prompts == pytest.approx(float(expected), rel=0.02)


def test_the_head_keeps_its_rows(model: Model, windows: list[Window]) -> None:
    found = within_budget(model, 1e-3, windows, scope="lm_head", prompts=True)
    (choice,) = found.choices
    assert (choice.format, choice.prompts, choice.kl_prompts) == (FP8, False, None)


def test_rows_in_fp8_are_those_of_the_ops_to_the_bit() -> None:
    random = torch.Generator().manual_seed(11)
    x = torch.randn(2, 9, 48, generator=random) * torch.logspace(-6, 3, 9)[:, None]
    x[0, 0] = 0.0
    build = Builder("rows")
    rows = build.input("x", DType.F32, (18, 1, 48))
    decoded = dequantized_fp8(build, *quantized_fp8(build, rows))
    expected = interpret(build.finish([decoded]), {"x": x.reshape(18, 1, 48)}).outputs[0]
    assert torch.equal(rows_in_fp8(x), expected.reshape(2, 9, 48))
    for found, row in zip(rows_in_fp8(x)[1], x[1], strict=True):
        assert torch.equal(found, rows_in_fp8(row))


def test_rows_are_changed_for_one_weight_and_until_that_is_undone(model: Model) -> None:
    module = eager_reference(model)
    seen: list[tuple[int, ...]] = []

    def change(x: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return x * 0.0

    ids = torch.arange(10)[None]
    before = module(ids)
    for name, width in (
        ("mixer.experts.down_proj", 32),
        ("mixer.shared_experts.up_proj.weight", 48),
    ):
        seen.clear()
        with change_rows(module, f"layers.1.{name}", change):
            assert not torch.equal(module(ids), before)
        assert {shape[-1] for shape in seen} == {width}
        assert torch.equal(module(ids), before)


def test_the_head_may_be_in_scope(model: Model, windows: list[Window]) -> None:
    found = within_budget(model, 100.0, windows, scope="lm_head")
    assert [choice.name for choice in found.choices] == ["lm_head.weight"]
    measured = errors(model, windows, found.passes)
    assert found.error.mean == pytest.approx(float(measured.mean()), rel=0.02)


@pytest.mark.parametrize("budget", [0.0, -1.0, float("inf"), float("nan")])
def test_a_budget_that_is_none_is_refused(
    model: Model, windows: list[Window], budget: float
) -> None:
    with pytest.raises(NemocError, match=r"^error budget is \S+, expected a positive number of n"):
        within_budget(model, budget, windows)


def test_text_of_one_window_is_refused(model: Model, windows: list[Window]) -> None:
    with pytest.raises(NemocError, match=r"^calibration: found 1 window of 24 tokens, expected at"):
        within_budget(model, 1.0, windows[:1])


def test_a_model_without_text_of_its_own_needs_some(model: Model) -> None:
    with pytest.raises(NemocError, match=r"^calibration: found no text for NemotronH"):
        calibrate(model, 1.0)


def test_a_budget_beside_a_quantization_is_refused(model: Model) -> None:
    with pytest.raises(NemocError, match=r"^quantize is 'nvfp4', expected none beside an error bu"):
        compile(model, "reference", "nvfp4", error_budget=0.1)


@pytest.fixture(scope="module")
def sample() -> Executable:
    return compile("sample", "reference", max_context=512)


def test_the_sample_model_keeps_a_budget_on_text_that_it_was_not_calibrated_with(
    sample: Executable,
) -> None:
    budget, scope = 0.003, r"layers\.[78]\."
    model = open_model("sample")
    assert not set(own_text(model)) & set(own_calibration(model))
    quantized = compile(model, "reference", max_context=512, scope=scope, error_budget=budget)
    text = (quantized.folder / "pipelines.txt").read_text()
    assert text.startswith('prefill: quantize-nvfp4{scope="layers')
    assert "quantize-fp8" in text
    windows = read_windows(model_tokenizer(model), own_text(model), 256, 1024)
    found = evaluate({"quantized": quantized}, windows, sample)["quantized"]
    assert found.kl is not None
    assert 0.6 * budget < found.kl <= budget


def compile_last_layer(out: Path, target: str, budget: str) -> None:
    """Compile the sample model with a budget for its last layer, by little text."""
    text = out.with_name("text.py")
    text.write_text(own_calibration(open_model("sample"))[0].read_text()[:3000])
    scope = ["--error-budget", budget, "--scope", r"layers\.8\.", "--calibration", str(text)]
    assert main(["compile", "sample", "-o", str(out), "--target", target, *scope, "-q"]) == 0


def test_compile_says_what_each_choice_costs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "small.nemoc"
    compile_last_layer(out, "reference", "0.002")
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line for line in lines if line.startswith("layers.8.experts.down_proj ")]
    _, alone_in_nvfp4, alone_in_fp8, chosen, *saved = row.split()
    assert 0 < float(alone_in_fp8) < float(alone_in_nvfp4) < 0.01
    assert (chosen, saved) == ("nvfp4", ["754", "kB"])
    assert [line for line in lines if line.startswith("All together: KL 0.00")]
    assert (
        (out / "pipelines.txt")
        .read_text()
        .startswith('prefill: quantize-nvfp4{scope="layers\\\\.8\\\\.mixer\\\\.')
    )
    assert lines[-1].startswith(f"{out}: sample for reference, ")
    assert not [line for line in lines if "rows" in line.lower()]


def test_compile_says_what_rows_of_prompts_cost_where_fp8_is_multiplied_by_fp8(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "small.nemoc"
    compile_last_layer(out, INTERPRETER, "0.0004")
    lines = capsys.readouterr().out.splitlines()
    chosen = [line for line in lines if line.startswith("layers.8.")]
    rows = sum(", rows " in line for line in chosen)
    stay = sum(" fp8  " in line or " nvfp4  " in line for line in chosen)
    (said,) = [line for line in lines if "weights: KL" in line]
    assert said.startswith(f"Rows of prompts in FP8 too, beside {rows} of {rows + stay} weights: ")
    (over,) = [line for line in lines if "over the budget" in line]
    assert over.startswith(f"Rows of prompts in FP8 too, beside all {rows + stay}: KL 0.000")
    assert max(map(len, lines[:-1])) <= 80
    pipelines = (out / "pipelines.txt").read_text().splitlines()
    assert len(pipelines) == 3
    assert all("prompts}" in line for line in pipelines)


@pytest.mark.parametrize(
    ("target", "does"),
    [
        ("reference", False),
        ("cpu", False),
        ("cpu:znver3", False),
        ("cuda:sm_80", False),
        ("hip:gfx942", False),
        ("cuda:sm_90", True),
        ("cuda:sm_120", True),
        ("hip:gfx950", True),
    ],
)
def test_rows_of_prompts_are_for_targets_with_matrix_units_of_fp8(target: str, does: bool) -> None:
    assert multiplies_fp8(target) is does
