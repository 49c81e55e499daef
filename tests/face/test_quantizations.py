"""What `quantize` may name, and what that does to the graphs of released models."""

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from nemoc.__main__ import main
from nemoc.compiler import compile, functions
from nemoc.ir import Graph, NemocError, interpret
from nemoc.ir.ops import QuantizeFp8, QuantizeNvfp4
from nemoc.ir.params import LazyArguments
from nemoc.ir.sample_inputs import sample_arguments
from nemoc.models import Fp8, Model, ModelConfig, Nvfp4, open_model
from nemoc.models.input_scales import stored_input_scales
from nemoc.models.names import module_of
from nemoc.passes import Pass, PassContext, print_pipeline, run_pipeline
from nemoc.passes.quantize_fp8 import QuantizeFp8 as QuantizeFp8Pass
from nemoc.passes.quantize_nvfp4 import QuantizeNvfp4 as QuantizePass
from nemoc.passes.quantize_products import weights_in
from nemoc.quantizations import AS_RELEASED, QUANTIZATIONS, quantization, released_passes
from nemoc.verification import verify_artifact
from support import releases
from support.checkpoints import unusual_model
from support.kernels import relative_error
from support.quantized import WIDE, Kind, edit_tensors
from support.releases import SUPER


@pytest.fixture(scope="module")
def sample() -> Model:
    return open_model("sample")


def modules(graph: Graph) -> Counter[type]:
    """How many matrices a graph quantizes, by op; experts count one by one."""
    found: Counter[type] = Counter()
    for node in graph.nodes:
        if isinstance(node.op, QuantizeNvfp4 | QuantizeFp8):
            found[type(node.op)] += math.prod(map(int, node.op.w.shape[:-2]))
    return found


def as_released(name: str) -> Counter[type]:
    model = open_model(name)
    return modules(run_pipeline(model.build_step(), released_passes(model.config), PassContext()))


def test_nano_as_released_quantizes_the_modules_of_its_release() -> None:
    assert as_released("nano") == {QuantizeNvfp4: 5968}


def test_super_as_released_quantizes_the_modules_of_its_release() -> None:
    assert as_released("super") == {QuantizeNvfp4: 40_961, QuantizeFp8: 139}


@pytest.mark.parametrize(
    ("quantize", "scope", "text"),
    [
        (None, None, ""),
        ("nvfp4", None, "quantize-nvfp4"),
        ("nvfp4", "experts", "quantize-nvfp4{scope=experts}"),
        ("nvfp4-w4a4", None, "quantize-nvfp4{mode=w4a4}"),
        ("nvfp4-fp8-prompts", None, "quantize-nvfp4{mode=fp8-prompts}"),
        ("fp8-w8a8", None, "quantize-fp8{mode=w8a8}"),
        ("fp8-prompts", None, "quantize-fp8{mode=w8a8-prompts}"),
        ("fp8-prompts", "experts", "quantize-fp8{scope=experts, mode=w8a8-prompts}"),
        ("fp8", "lm_head", "quantize-fp8{scope=lm_head}"),
        ("quantize-fp8{scope=experts},cse", None, "quantize-fp8{scope=experts},cse"),
        ([*QUANTIZATIONS.values()][:1], None, "quantize-nvfp4"),
    ],
)
def test_a_quantization_stands_for_passes(
    sample: Model, quantize: Any, scope: str | None, text: str
) -> None:
    found: tuple[Pass, ...] = quantization(sample, quantize, scope)
    assert print_pipeline(found) == text


@pytest.fixture(scope="module")
def small() -> Model:
    """All four mixers, with weights."""
    return open_model(unusual_model(**WIDE))


def logits(model: Model, quantize: str, function: str) -> torch.Tensor:
    """What a function's graph makes of random arguments."""
    graph = functions(model, "reference", quantize=quantize, which=(function,)).graphs[function]
    given = sample_arguments(graph, {"B": 2, "L": 5, "C": 8}, params=False)
    assert model.parameters is not None
    return interpret(graph, LazyArguments(graph, model.parameters, given)).outputs[0]


@pytest.mark.parametrize(("function", "like"), [("prefill", "fp8-w8a8"), ("decode", "fp8")])
def test_activations_of_prompts_alone_become_fp8(small: Model, function: str, like: str) -> None:
    found, expected = (logits(small, name, function) for name in ("fp8-prompts", like))
    (other,) = {"fp8", "fp8-w8a8"} - {like}
    assert torch.equal(found, expected)
    assert not torch.equal(found, logits(small, other, function))


def test_fp8_is_made_of_nvfp4_for_prompts_alone(small: Model) -> None:
    prefill, decode = (
        [logits(small, name, step) for name in ("nvfp4-fp8-prompts", "nvfp4")]
        for step in ("prefill", "decode")
    )
    assert torch.equal(*decode)
    assert 1e-3 < relative_error(*prefill) < 0.1


@pytest.mark.parametrize("quantize", ["fp8-prompts", "nvfp4-fp8-prompts"])
def test_an_artifact_is_verified_whose_prompts_alone_are_rounded(
    small: Model, quantize: str, tmp_path: Path
) -> None:
    path = tmp_path / "small.nemoc"
    compile(small, "reference", quantize, max_batch=2, max_context=24, destination=path)
    errors = {row.name: row.error for row in verify_artifact(path).rows}
    assert {"prefill", "decode", "unequal rows"} < errors.keys()
    assert max(errors.values()) < 1e-5


@pytest.mark.parametrize(
    "quantize",
    [
        'quantize-nvfp4{scope=".*experts.*up_proj",mode=w4a4}',
        'quantize-nvfp4{scope=experts,mode=w4a4},quantize-fp8{scope=".*shared_experts",mode=w8a8}',
    ],
)
def test_products_of_one_norm_have_each_their_own_activations(small: Model, quantize: str) -> None:
    """As in releases, whose router is not quantized, nor all experts alike."""
    ids = torch.arange(12).reshape(2, 6)
    found = []
    for target in ("triton-interpret", "reference"):
        made = compile(small, target, quantize, max_batch=2, max_context=8)
        state = made.new_state(2)
        prompts = made.prefill(ids, state, all_logits=True)
        found.append(torch.cat([prompts.flatten(0, 1), made.decode(ids[:, 0], state)]))
    assert relative_error(*found) < 1e-5


@pytest.mark.parametrize("quantize", ["fp8-w8a8", "fp8-prompts", "nvfp4-fp8-prompts", "nvfp4-w4a4"])
def test_no_cpu_kernel_quantizes_activations_to_floats(small: Model, quantize: str) -> None:
    op = "nvfp4_global_scale" if quantize == "nvfp4-w4a4" else "fp8_scale"
    with pytest.raises(NemocError) as refusal:
        compile(small, "cpu", quantize)
    assert str(refusal.value) == (
        f"the cpu target has no kernel for {op}: of weights the pass fold-constants does it, and activations in FP8 "
        "or NVFP4 are for GPUs and the reference target (in int8, nvfp4-w4a8, for CPUs)"
    )


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("cpu", "spread codes are for GPUs, expected those of files"),
        ("triton-interpret", "spread codes are for products alone"),
    ],
)
def test_spread_codes_are_refused_where_no_kernel_reads_them(
    small: Model, target: str, says: str
) -> None:
    pipeline = "canonicalize,spread-nvfp4{always=true},fold-constants"
    with pytest.raises(NemocError, match=says):
        compile(small, target, "nvfp4", pipeline=pipeline)


@pytest.mark.parametrize(
    ("quantize", "scope", "says"),
    [
        ("int4", None, "quantize is 'int4', expected one of nvfp4, "),
        ("as-released", "all", "scope is 'all': goes with a format (nvfp4, "),
        (None, "all", "scope is 'all': goes with a format (nvfp4, "),
        ("fp8", "[", "pass quantize-fp8: option scope '[': expected all, experts or a regular"),
        (5, None, "quantize is 5, expected text or passes"),
        ([5], None, "quantize: found 5 among the passes, expected a pass"),
    ],
)
def test_what_is_no_quantization_is_refused(
    sample: Model, quantize: Any, scope: str | None, says: str
) -> None:
    with pytest.raises(NemocError) as caught:
        quantization(sample, quantize, scope)
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize("command", ["compile", "eval"])
def test_help_names_every_format(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([command, "--help"]) == 0
    text = "".join(capsys.readouterr().out.split())  # lines break at hyphens too
    assert [name for name in (*QUANTIZATIONS, AS_RELEASED) if name not in text] == []


def test_a_model_of_no_released_family_is_refused() -> None:
    config: ModelConfig = open_model("nemotron-h-8b").config
    with pytest.raises(NemocError, match=r"^as-released: found layers M-M-M-M\*"):
        released_passes(config)


def test_as_released_does_of_a_quantized_checkpoint_what_it_asks_for(tmp_path: Path) -> None:
    SUPER.write(tmp_path)
    model = open_model(tmp_path)
    nvfp4, fp8 = quantization(model, AS_RELEASED)
    step = model.build_step()
    assert isinstance(nvfp4, QuantizePass) and nvfp4.mode == "w4a4"
    assert isinstance(fp8, QuantizeFp8Pass) and fp8.mode == "w8a8"
    for pass_, kind in ((nvfp4, Nvfp4), (fp8, Fp8)):
        wanted = {n for n, f in model.quantization.formats.items() if isinstance(f, kind)}
        assert {p.name for p in weights_in(step, pass_.name, pass_.scope)} == wanted


@pytest.mark.parametrize(("lacking", "by_name"), [(Nvfp4, "nvfp4-w4a4"), (Fp8, "fp8-w8a8")])
def test_scales_of_one_format_are_not_missed_by_the_other(
    tmp_path: Path, lacking: type, by_name: str
) -> None:
    SUPER.write(tmp_path)
    stored = open_model(tmp_path).quantization.formats
    modules = {module_of(name) for name, format_ in stored.items() if isinstance(format_, lacking)}

    def is_theirs(tensor: str) -> bool:
        owner, _, last = tensor.removeprefix("backbone.").rpartition(".")
        plain = re.sub(r"\.experts\.\d+\.", ".experts.", owner)
        return last == "input_scale" and plain in modules

    edit_tensors(tmp_path, lambda tensors: [tensors.pop(n) for n in [*tensors] if is_theirs(n)])
    model = open_model(tmp_path)
    found = stored_input_scales(model)
    assert found and not any(isinstance(stored[name], lacking) for name in found)
    for quantize in (AS_RELEASED, by_name):
        functions(model, "reference", "dce", quantize=quantize, which=("prefill",))


def test_as_released_leaves_activations_that_a_checkpoint_does_not_quantize(tmp_path: Path) -> None:
    kinds: dict[str, Kind] = dict.fromkeys(releases.modules(0, *releases.MLP), "nvfp4")
    alone = {"quant_algo": "W4A16_NVFP4", "exclude_modules": ["lm_head"]}
    changes = {"hybrid_override_pattern": "-"}
    releases.Release(kinds, beside=alone, changes=changes).write(tmp_path)
    assert quantization(open_model(tmp_path), AS_RELEASED) == ()
