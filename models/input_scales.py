"""The scales of activations that a quantized checkpoint has, as one number for each weight."""

import torch

from nemoc.ir.errors import NemocError
from nemoc.models.formats import Format, Fp8, Nvfp4
from nemoc.models.names import module_of
from nemoc.models.source import Model


def stored_input_scales(model: Model) -> dict[str, float]:
    """What 1 stands for in the activations that a weight multiplies, where the checkpoint has them in its format.

    Experts of a layer have the largest of theirs, which cuts off none of their rows. compressed-tensors' files hold
    divisors for NVFP4.

    Returns:
        By the weight's name; nothing of a format if the checkpoint has none of its scales at all.

    Raises:
        NemocError: a scale is missing beside others of its format, or is not a positive finite number.
    """
    return _scales_of(model, Nvfp4) | _scales_of(model, Fp8)


def _scales_of(model: Model, kind: type[Format]) -> dict[str, float]:
    """The scales of activations that belong to weights of one format."""
    wanted = {
        name: f"{module_of(name)}.{stored.input_scale}"
        for name, stored in model.quantization.formats.items()
        if isinstance(stored, kind) and stored.activations
    }
    present = {name for name, scale in wanted.items() if scale in model.scales}
    if not present or model.parameters is None:
        return {}
    for name, scale in wanted.items():
        if name not in present:
            raise NemocError(
                f"{model.name}: tensor '{scale}': found nothing, expected a scale of activations "
                f"as '{wanted[min(present)]}' is one"
            )
    scales = {}
    for name, scale in wanted.items():
        stored = model.quantization.formats[name]
        values = model.parameters.read(scale).to(torch.float32)
        if isinstance(stored, Nvfp4) and stored.dialect == "compressed-tensors":
            values = values.reciprocal()
        if not bool(((values > 0) & values.isfinite()).all()):
            raise NemocError(
                f"{model.name}: tensor '{scale}': found {_worst(values):g} as what 1 stands for, "
                "expected a positive number"
            )
        scales[name] = float(values.max())
    return scales


def _worst(values: torch.Tensor) -> float:
    """The first number that is no scale."""
    return float(values.flatten()[~((values > 0) & values.isfinite()).flatten()][0])
