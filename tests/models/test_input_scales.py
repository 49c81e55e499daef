"""Scales of activations in quantized checkpoints: which hold, and which are refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemoc.ir import NemocError
from nemoc.models import Fp8, Nvfp4, open_model
from nemoc.models.input_scales import stored_input_scales
from nemoc.models.names import module_of, tensor_of
from support.quantized import Tensors, edit_tensors, scheme
from support.releases import MLP, NANO, SUPER, Release, kinds_of, modules

DENSE = {"hybrid_override_pattern": "-"}
DIVIDED = Release(
    kinds_of(modules(0, *MLP), []),
    section={
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "nvfp4-pack-quantized",
        "config_groups": {"group_0": scheme("nvfp4", "Linear")},
        "ignore": ["lm_head"],
    },
    layout="compressed-tensors",
    changes=DENSE,
)
ALONE = Release(
    kinds_of(modules(0, *MLP), []),
    beside={"quant_algo": "W4A16_NVFP4", "exclude_modules": ["lm_head"]},
    changes=DENSE,
)
UP = "backbone.layers.4.mixer.up_proj.input_scale"


def test_experts_have_the_largest_of_theirs(tmp_path: Path) -> None:
    NANO.write(tmp_path)
    model, tensors = open_model(tmp_path), load_file(tmp_path / "model.safetensors")
    found = stored_input_scales(model)
    assert found.keys() == model.quantization.formats.keys()
    stack = "layers.6.mixer.experts.up_proj"
    each = [float(tensors[tensor_of(f"{stack}.input_scale", n)]) for n in range(7)]
    assert len(set(each)) == 7
    assert found[stack] == max(each)
    for name, scale in found.items():
        if "experts." not in name:
            assert scale == float(tensors[f"backbone.{module_of(name)}.input_scale"])


def test_weights_of_both_formats_have_them(tmp_path: Path) -> None:
    SUPER.write(tmp_path)
    model = open_model(tmp_path)
    stored = model.quantization.formats
    assert {type(format_) for format_ in stored.values()} == {Nvfp4, Fp8}
    assert stored_input_scales(model).keys() == stored.keys()


def test_one_format_may_have_none(tmp_path: Path) -> None:
    SUPER.write(tmp_path)
    stored = open_model(tmp_path).quantization.formats
    fp8 = {module_of(name) for name, format_ in stored.items() if isinstance(format_, Fp8)}
    gone = {f"backbone.{module}.input_scale" for module in fp8}
    edit_tensors(tmp_path, lambda tensors: [tensors.pop(name) for name in gone])
    assert stored_input_scales(open_model(tmp_path)).keys() == {
        name for name, format_ in stored.items() if isinstance(format_, Nvfp4)
    }


def test_divisors_become_factors(tmp_path: Path) -> None:
    DIVIDED.write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, scale in stored_input_scales(open_model(tmp_path)).items():
        divisor = tensors[f"backbone.{module_of(name)}.input_global_scale"]
        assert scale == pytest.approx(1 / float(divisor), rel=1e-6)


def test_weights_alone_have_none(tmp_path: Path) -> None:
    ALONE.write(tmp_path)
    assert stored_input_scales(open_model(tmp_path)) == {}


def test_a_checkpoint_without_any_has_none(tmp_path: Path) -> None:
    NANO.write(tmp_path)
    edit_tensors(tmp_path, lambda t: [t.pop(n) for n in [*t] if n.endswith(".input_scale")])
    assert stored_input_scales(open_model(tmp_path)) == {}


def set_to(value: float) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({UP: torch.tensor(value)})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (set_to(0.0), "found 0 as what 1 stands for, expected a positive number"),
        (set_to(-0.5), "found -0.5 as what 1 stands for, expected a positive number"),
        (set_to(float("nan")), "found NaN, expected finite weights"),
        (set_to(float("inf")), "found an infinite value, expected finite weights"),
        (lambda t: t.pop(UP), "found nothing, expected a scale of activations as"),
    ],
    ids=["zero", "negative", "nan", "infinite", "missing"],
)
def test_a_bad_scale_is_refused_in_one_line(
    tmp_path: Path, change: Callable[[Tensors], object], says: str
) -> None:
    NANO.write(tmp_path)
    edit_tensors(tmp_path, change)
    model = open_model(tmp_path)
    with pytest.raises(NemocError) as caught:
        stored_input_scales(model)
    message = str(caught.value)
    assert says in message and "layers.4.mixer.up_proj.input_scale" in message
    assert "\n" not in message


def test_a_divisor_of_zero_is_refused(tmp_path: Path) -> None:
    DIVIDED.write(tmp_path)
    name = "backbone.layers.0.mixer.up_proj.input_global_scale"
    edit_tensors(tmp_path, lambda tensors: tensors.update({name: torch.zeros(1)}))
    with pytest.raises(NemocError, match=r"'layers.0.mixer.up_proj.input_global_scale': found inf"):
        stored_input_scales(open_model(tmp_path))
