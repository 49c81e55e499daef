"""NVFP4 as other libraries write and read it; a test that asks for one that is not installed is skipped.

`tests/golden/nvfp4/libraries.json` holds what they gave for a few tensors, so that they need not be installed
everywhere.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch


@dataclass(frozen=True)
class Written:
    """What a library makes of a weight [N, K], and what it reads back from that in float32."""

    packed: torch.Tensor
    scales: torch.Tensor
    global_scale: torch.Tensor
    dequantized: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """The four by name, the tensor scale as a scalar."""
        return {**vars(self), "global_scale": self.global_scale.reshape(())}


def _module(name: str) -> Any:
    """A module, whatever it warns of when it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(
            name, reason=f"{name.partition('.')[0]} is not installed", exc_type=ImportError
        )


def modelopt(w: torch.Tensor) -> Written:
    """nvidia-modelopt; seen with 0.47.0."""
    tensor = _module("modelopt.torch.quantization.qtensor.nvfp4_tensor").NVFP4QTensor
    quantized, scales, g = tensor.quantize(w.clone(), 16)
    dequantized = quantized.dequantize(
        dtype=torch.float32, scale=scales, double_scale=g, block_sizes={-1: 16}
    )
    return Written(quantized._quantized_data, scales, g, dequantized)


def torchao(w: torch.Tensor) -> Written:
    """torchao; seen with 0.18.0."""
    nvfp4 = _module("torchao.prototype.mx_formats.nvfp4_tensor")
    g = nvfp4.per_tensor_amax_to_scale(w.abs().max())
    tensor = nvfp4.NVFP4Tensor.to_nvfp4(w, per_tensor_scale=g)
    return Written(tensor.qdata, tensor.scale, g, tensor.dequantize(torch.float32))


def compressed_tensors(w: torch.Tensor) -> Written:
    """compressed-tensors; seen with 0.20.0. What it decompresses to is the bf16 of what is given here."""
    quantization = _module("compressed_tensors.quantization")
    utils = _module("compressed_tensors.quantization.utils")
    forward = _module("compressed_tensors.quantization.lifecycle.forward")
    compressors = _module("compressed_tensors.compressors.nvfp4")
    preset = _module("compressed_tensors.quantization.quant_scheme").NVFP4A16
    scheme = quantization.QuantizationScheme(targets=["Linear"], **preset)
    g = utils.generate_gparam(w.min(), w.max())
    blocks = w.unflatten(-1, (-1, 16))
    low, high = blocks.amin(-1), blocks.amax(-1)
    scales, _ = utils.calculate_qparams(low, high, scheme.weights, global_scale=g)
    stored = compressors.NVFP4PackedCompressor.compress(
        {"weight": w, "weight_scale": scales, "weight_global_scale": g}, scheme
    )
    codes = compressors.unpack_fp4_from_uint8(
        stored["weight_packed"], *w.shape, dtype=torch.float32
    )
    dequantized = forward.dequantize(
        codes,
        stored["weight_scale"].float(),
        args=scheme.weights,
        global_scale=g,
        dtype=torch.float32,
    )
    read = compressors.NVFP4PackedCompressor.decompress(stored, scheme)["weight"]
    assert torch.equal(read, dequantized.to(read.dtype))
    return Written(stored["weight_packed"], stored["weight_scale"], g, dequantized)


PEERS: dict[str, Callable[[torch.Tensor], Written]] = {
    "modelopt": modelopt,
    "torchao": torchao,
    "compressed-tensors": compressed_tensors,
}
"""By the name of their dialect."""
