"""How a weight is stored when it is not stored as numbers: the tensors that make it up, and the ops that give it back.

A graph has one parameter for each of these tensors and de-quantizes by ops, so that what is done about it, and when, is
a matter of passes. The parameter with the codes keeps the name that the weight has where it is not quantized; the
scales follow the name of the module (`nemoc.models.names`). Experts are stacked: then there is a scale for each, [E].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from nemoc.ir import ops
from nemoc.ir.builder import Builder
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import NemocError
from nemoc.ir.nvfp4 import BLOCK
from nemoc.ir.types import Value
from nemoc.models.names import module_of

WeightTypes = Callable[[str], DType]
"""The stored element type of the parameter of a name."""

TENSOR_SCALES = {"modelopt": "weight_scale_2", "compressed-tensors": "weight_global_scale"}
"""What the scale of a whole matrix in NVFP4 is called: a factor in ModelOpt's files, a divisor in the others'."""


@dataclass(frozen=True)
class Nvfp4:
    """E2M1 codes, an E4M3 scale for every 16 of them, and an f32 scale for the matrix (`nemoc.ir.nvfp4`).

    Attributes:
        dialect: the library whose names and arithmetic these are.
        activations: what the weight multiplies is meant to be NVFP4 too, by a scale that the file has (W4A4).
    """

    dialect: Literal["modelopt", "compressed-tensors"] = "modelopt"
    activations: bool = True

    @property
    def input_scale(self) -> str:
        """What the scale of activations is called."""
        return "input_scale" if self.dialect == "modelopt" else "input_global_scale"

    def append(
        self, build: Builder, name: str, shape: tuple[int, ...], types: WeightTypes
    ) -> Value:
        """Declare the parameters of a weight [..., N, K] and append what makes f32 of them.

        They are u8 [..., N, K/2], f8e4m3 [..., N, K/16] and f32 [...].

        Raises:
            NemocError: K is no multiple of 16.
        """
        *rows, width = shape
        if width % BLOCK:
            raise NemocError(
                f"{name}: found {width} columns, expected a multiple of {BLOCK} for NVFP4"
            )
        module = module_of(name)
        codes = build.param(name, DType.U8, (*rows, width // 2))
        scales = build.param(f"{module}.weight_scale", DType.F8E4M3, (*rows, width // BLOCK))
        scale = build.param(f"{module}.{TENSOR_SCALES[self.dialect]}", DType.F32, rows[:-1])
        return build(ops.DequantizeNvfp4(codes, scales, scale, self.dialect), f"{name}.f32")

    def __str__(self) -> str:
        name = "NVFP4" if self.activations else "NVFP4 of weights alone"
        return name if self.dialect == "modelopt" else f"{name} ({self.dialect})"


@dataclass(frozen=True)
class Fp8:
    """E4M3 numbers and one scale for the matrix, which is a factor.

    Attributes:
        activations: what the weight multiplies is meant to be FP8 too.
    """

    activations: bool = True

    @property
    def input_scale(self) -> str:
        """What the scale of activations is called."""
        return "input_scale"

    def append(
        self, build: Builder, name: str, shape: tuple[int, ...], types: WeightTypes
    ) -> Value:
        """Declare the parameters of a weight [..., N, K] and append what makes f32 of them.

        They are f8e4m3 [..., N, K] and [...] of any floating-point type; the product is rounded to f32 once.
        """
        codes = build.param(name, DType.F8E4M3, shape)
        scale_name = f"{module_of(name)}.weight_scale"
        scale = build.param(scale_name, types(scale_name), shape[:-2])
        if scale.dtype is not DType.F32:
            scale = build(ops.Cast(scale, DType.F32), f"{scale_name}.f32")
        if scale.shape:
            scale = build(ops.Reshape(scale, (*scale.shape, 1, 1)), f"{scale_name}.view")
        wide = build(ops.Cast(codes, DType.F32), f"{name}.f32")
        return build(ops.Mul(wide, scale), f"{name}.scaled")

    def __str__(self) -> str:
        return "FP8" if self.activations else "FP8 of weights alone"


Format: TypeAlias = Nvfp4 | Fp8
"""How a quantized weight is stored."""
