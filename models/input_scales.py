"""The scales of activations that a quantized checkpoint has, as one number for each weight."""

import torch

from nemoc.ir.errors import NemocError
from nemoc.models.formats import Nvfp4
from nemoc.models.names import module_of
from nemoc.models.source import Model


def stored_input_scales(model: Model) -> dict[str, float]:
    """What 1 stands for in the activations that a weight in NVFP4 multiplies, where the checkpoint has them in NVFP4.

    Experts of a layer have the largest of theirs, which cuts off none of their rows. compressed-tensors' files hold
    divisors.

    Returns:
        By the weight's name; nothing if the checkpoint has none of these scales at all.

    Raises:
        NemocError: a scale is missing beside others, or is not a positive finite number.
    """
    wanted = {
        name: f"{module_of(name)}.{stored.input_scale}"
        for name, stored in model.quantization.formats.items()
        if isinstance(stored, Nvfp4) and stored.activations
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
        assert isinstance(stored, Nvfp4)
        values = model.parameters.read(scale).to(torch.float32)
        if stored.dialect == "compressed-tensors":
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
