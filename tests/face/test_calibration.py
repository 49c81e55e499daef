"""Static scales of activations: what is measured, what follows from it, and where they go."""

from pathlib import Path

import pytest
import torch
from torch import nn

import nemoc
from nemoc.__main__ import main
from nemoc.calibration import input_scales, largest_inputs, measured_scales
from nemoc.compiler import functions
from nemoc.ir import Graph, NemocError
from nemoc.ir.ops import Full
from nemoc.ir.scopes import read_scope
from nemoc.models import Model, eager_reference, open_model
from nemoc.models.input_scales import stored_input_scales
from nemoc.models.mixers import Experts
from nemoc.models.quantize import select
from nemoc.models.release import LAYOUTS
from nemoc.passes import parse_pipeline
from support.checkpoints import write_checkpoint
from support.kernels import relative_error
from support.quantized import WIDE
from support.releases import NANO

pytestmark = pytest.mark.usefixtures("one_thread")

W4A4 = parse_pipeline("quantize-nvfp4{mode=w4a4}")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough of it for two windows of the sample model."""
    path = tmp_path_factory.mktemp("text") / "text.py"
    lines = (f"def double_{i}(x: int) -> int:\n    return {i} * x\n\n" for i in range(30))
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def sample() -> Model:
    return open_model("sample")


@pytest.fixture(scope="module")
def measured(sample: Model, text: Path) -> dict[str, float]:
    return measured_scales(sample, [text])


def seen_by_hooks(model: Model, tokens: torch.Tensor) -> dict[str, float]:
    """The largest magnitude that enters each linear layer and the experts of the eager model."""
    module, found = eager_reference(model), dict[str, float]()

    def note(name: str, x: torch.Tensor) -> None:
        found[name] = max(found.get(name, 0.0), float(x.abs().max()))

    for path, child in module.named_modules():
        name = path.removeprefix("backbone.")
        if isinstance(child, nn.Linear):
            child.register_forward_pre_hook(
                lambda _, args, name=name: note(f"{name}.weight", args[0])
            )
        if isinstance(child, Experts):
            child.register_forward_pre_hook(
                lambda _, args, name=name: note(f"{name}.up_proj", args[0])
            )
            activation = child.activation

            def noted(x: torch.Tensor, name: str = name, activation: object = activation) -> object:
                assert callable(activation)
                note(f"{name}.down_proj", y := activation(x))
                return y

            child.activation = noted  # type: ignore[assignment]
    module(tokens)
    return found


@pytest.mark.parametrize("latent", [16, None])
def test_largest_inputs_are_those_of_the_eager_model(tmp_path: Path, latent: int | None) -> None:
    write_checkpoint(tmp_path, seed=3, **{**WIDE, "moe_latent_size": latent})
    model = open_model(tmp_path)
    tokens = torch.randint(0, 97, (2, 19), generator=torch.Generator().manual_seed(4))
    expected = seen_by_hooks(model, tokens)
    found = largest_inputs(model, tokens)
    assert expected.keys() <= found.keys()
    assert all(found[name] == pytest.approx(amax, rel=1e-5) for name, amax in expected.items())
    assert expected.keys() >= select(model.config, ".*", 16).chosen


def test_a_quantized_checkpoint_is_measured_by_what_it_stands_for(tmp_path: Path) -> None:
    NANO.write(tmp_path)
    model = open_model(tmp_path)
    tokens = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(5))
    expected, found = seen_by_hooks(model, tokens), largest_inputs(model, tokens)
    assert all(found[name] == pytest.approx(amax, rel=1e-5) for name, amax in expected.items())


def scales_in(graph: Graph) -> set[float]:
    """The tensor scales that a graph has as numbers."""
    return {float(node.op.value) for node in graph.nodes if isinstance(node.op, Full)}


def test_each_weight_has_its_scale_in_the_graph(
    sample: Model, text: Path, measured: dict[str, float]
) -> None:
    step = functions(
        sample,
        "reference",
        "dce",
        quantize="nvfp4-w4a4",
        calibration=[text],
        which=["prefill"],
    ).graphs["prefill"]
    chosen = select(sample.config, "all", 16).chosen
    assert scales_in(step) >= {measured[name] for name in chosen}


def test_each_format_has_its_own_scale(
    sample: Model, text: Path, measured: dict[str, float]
) -> None:
    passes = parse_pipeline("quantize-nvfp4{mode=w4a4,scope=experts},quantize-fp8{mode=w8a8}")
    found = input_scales(sample, passes, [text])
    factors = {
        name: found[name] / measured[name] for name in select(sample.config, "all", 16).chosen
    }
    experts = {name for name in factors if read_scope("experts").match(name)}
    assert experts and experts < factors.keys()
    for name, factor in factors.items():
        assert factor == pytest.approx(1.0 if name in experts else 6.0, rel=1e-6)


@pytest.mark.parametrize(("narrow", "wide"), [("nvfp4-w4a4", "nvfp4"), ("fp8-w8a8", "fp8")])
def test_static_scales_are_nearly_as_good_as_those_of_rows(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, narrow: str, wide: str
) -> None:
    write_checkpoint(tmp_path, seed=8, **WIDE)
    random = torch.Generator().manual_seed(6)
    seen, fresh = (torch.randint(0, 97, (4, 32), generator=random) for _ in range(2))
    monkeypatch.setattr("nemoc.calibration.calibration_tokens", lambda *_: seen)

    def logits(quantize: str, *calibration: Path) -> torch.Tensor:
        executable = nemoc.compile(
            tmp_path, "reference", quantize, max_batch=4, max_context=32, calibration=calibration
        )
        return executable.prefill(fresh, executable.new_state(4), all_logits=True)

    weights, rows = logits(wide), logits(narrow)
    static = logits(narrow, text)
    assert not torch.equal(static, rows)
    assert relative_error(static, weights) < 1.5 * relative_error(rows, weights)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_written_checkpoint_has_the_scales_and_asks_for_them(
    sample: Model, text: Path, measured: dict[str, float], layout: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["quantize", "sample", "-o", str(out), "--format", layout, "--calibration", str(text)]
    assert main([*words, "-q"]) == 0
    written = open_model(out)
    found = stored_input_scales(written)
    assert found.keys() == select(sample.config, "all", 16).chosen
    assert all(scale == pytest.approx(measured[name], rel=1e-6) for name, scale in found.items())
    step = functions(written, "reference", "dce", quantize="as-released", which=["prefill"]).graphs[
        "prefill"
    ]
    assert scales_in(step) >= set(found.values())


def test_a_file_for_llama_cpp_has_no_scales(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out.gguf")
    words = ["quantize", "sample", "-o", out, "--format", "gguf", "--calibration", str(text)]
    assert main(words) == 2
    error = (
        "nemoc: error: --calibration: found format gguf, expected modelopt or compressed-tensors"
    )
    assert capsys.readouterr().err.strip() == error


@pytest.mark.parametrize(
    "quantize", ["", "quantize-nvfp4", "quantize-nvfp4{mode=w4a4,input-scale=1}"]
)
def test_text_without_activations_to_scale_is_refused(
    sample: Model, text: Path, quantize: str
) -> None:
    passes = parse_pipeline(quantize) if quantize else ()
    with pytest.raises(NemocError, match=r"^calibration: found text, but no activations to scale"):
        input_scales(sample, passes, [text])


def test_too_little_text_is_refused(sample: Model, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("one line of text")
    with pytest.raises(
        NemocError, match=r"^calibration: found 1 window of [0-9]+ tokens, expected"
    ):
        input_scales(sample, W4A4, [path])


def test_activations_of_zeros_have_no_scale(
    sample: Model, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemoc.calibration.largest_inputs", lambda *_: {"w": 0.0})
    with pytest.raises(NemocError, match=r"^calibration: what w multiplies is 0 at most, expected"):
        measured_scales(sample, [text])
