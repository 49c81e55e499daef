"""The cheapest formats within an error budget: chosen by what is measured."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from nemoc.__main__ import main
from nemoc.compiler import compile
from nemoc.error_budget import FP8, NVFP4, Budgeted, calibrate, within_budget
from nemoc.evaluation import evaluate
from nemoc.ir import NemocError, interpret
from nemoc.ir.params import LazyArguments
from nemoc.ir.sample_inputs import sample_arguments
from nemoc.models import Model, open_model
from nemoc.passes import Pass, PassContext, parse_pipeline, print_pipeline, run_pipeline
from nemoc.passes.quantize_fp8 import QuantizeFp8
from nemoc.passes.quantize_nvfp4 import QuantizeNvfp4
from nemoc.quality import Window, model_tokenizer, own_calibration, own_text, read_windows
from nemoc.runtime import Executable
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
    return {x: within_budget(model, x, windows) for x in (1e-9, 3e-4, 2e-3, 100.0)}


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
        assert found.kl == pytest.approx(float(measured.mean()), rel=0.02)
        assert found.kl_error == pytest.approx(float(measured.std()) / ROWS**0.5, rel=0.02)
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
    assert (found.kl, found.kl_error) == (0.0, 0.0)
    assert sum(choice.saved for choice in found.choices) == 0


def test_more_room_saves_more(budgeted: Mapping[float, Budgeted]) -> None:
    saved = [sum(choice.saved for choice in found.choices) for found in budgeted.values()]
    assert saved == sorted(set(saved))


def test_the_choice_is_text(budgeted: Mapping[float, Budgeted]) -> None:
    passes = budgeted[2e-3].passes
    assert parse_pipeline(print_pipeline(passes)) == passes


def test_the_head_may_be_in_scope(model: Model, windows: list[Window]) -> None:
    found = within_budget(model, 100.0, windows, scope="lm_head")
    assert [choice.name for choice in found.choices] == ["lm_head.weight"]
    measured = errors(model, windows, found.passes)
    assert found.kl == pytest.approx(float(measured.mean()), rel=0.02)


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


def test_compile_says_what_each_choice_costs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out, text = tmp_path / "small.nemoc", tmp_path / "text.py"
    text.write_text(own_calibration(open_model("sample"))[0].read_text()[:3000])
    scope = ["--error-budget", "0.002", "--scope", r"layers\.8\.", "--calibration", str(text)]
    assert main(["compile", "sample", "-o", str(out), "--target", "reference", *scope, "-q"]) == 0
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
