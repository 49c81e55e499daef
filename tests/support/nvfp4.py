"""Operands of regions with weights in NVFP4."""

from collections.abc import Mapping

import torch

from nemoc.ir.op import Op
from nemoc.ir.region import Fused
from support.regions import operands


def codes_or_scales(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random codes, or scales of all magnitudes that there are, 0 and denormals among them; others as they are."""
    if tensor.dtype == torch.uint8:
        return torch.randint(0, 256, tensor.shape, generator=generator, dtype=torch.uint8)
    if tensor.dtype == torch.float8_e4m3fn:
        bits = torch.randint(0, 127, tensor.shape, generator=generator, dtype=torch.uint8)
        return bits.view(torch.float8_e4m3fn)
    return tensor


def given(op: Op, sizes: Mapping[str, int]) -> list[torch.Tensor]:
    """Random operands of a region: tensor scales are positive, `offsets` are those of groups of all B rows."""
    assert isinstance(op, Fused)
    generator = torch.Generator().manual_seed(sizes["B"])
    full = {"B": 1, "L": 1, "C": 1} | dict(sizes)
    tensors = [codes_or_scales(t, generator) for t in operands(op, full, sizes["B"])]
    for i, operand in enumerate(op.body.inputs):
        if operand.name == "offsets":
            tensors[i] = tensors[i].sort().values
            tensors[i][0], tensors[i][-1] = 0, sizes["B"]
        if operand.name == "global_scale":
            tensors[i] = tensors[i].abs() / 2688 + 1e-4
    return tensors
