"""What a part of a model is compared with on a GPU: libraries and torch.compile, on the part's own operands.

A peer computes the part's results in its own way, rounding where it does. What it needs is imported when it is made, so
that one that is not installed is missing by itself.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_region import DeviceRegion
from nemoc.ir import NemocError
from nemoc.ir.nvfp4 import BLOCK, DIALECTS, decode, gathered
from nemoc.ir.op import Op
from nemoc.ir.ops import DequantizeNvfp4, Nvfp4ToFp8
from nemoc.ir.region import Fused
from nemoc.models import ModelConfig
from nemoc.models.mixers import chunked_scan

Results = Mapping[str, torch.Tensor]
Peer = Callable[[], Results]
"""Puts a part's work into torch's current stream and returns results by name, not necessarily all."""

MakePeer = Callable[[DeviceRegion, ModelConfig], Peer]


class AbsentError(NemocError):
    """A peer is not there; the message says why."""


def _installed(package: str) -> Any:
    """Where a package is.

    Raises:
        AbsentError: nowhere.
    """
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise AbsentError(f"the package {package} is not installed")
    return spec


def _operand(region: DeviceRegion, name: str) -> torch.Tensor:
    """The operand whose name has this in it.

    Raises:
        AbsentError: none, or several.
    """
    found = [tensor for key, tensor in region.operands.items() if name in key]
    if len(found) != 1:
        raise AbsentError(f"the part has {len(found)} operands {name!r}")
    return found[0]


def _output(region: DeviceRegion) -> str:
    """The name of the part's one output."""
    (value,) = region.part.graph.outputs
    return value.name


def torch_product(region: DeviceRegion, config: ModelConfig) -> Peer:
    """`torch.mm`, which is cuBLAS; of results in float32 too."""
    return _multiplied(region, region.operands["x"], region.operands["w"])


def product_with_decoded(region: DeviceRegion, config: ModelConfig) -> Peer:
    """`torch.mm` with what a weight in NVFP4 decodes to in bf16, which takes 3.6 times the bytes."""
    parts = (region.operands[f"w.{part}"] for part in ("codes", "scales", "scale"))
    return _multiplied(region, region.operands["x"], _decoded_nvfp4(region, *parts))


def scaled_product(region: DeviceRegion, config: ModelConfig) -> Peer:
    """`torch._scaled_mm`, which is cuBLAS: FP8 by FP8, both with one scale."""
    x, w, of_x, of_w = (region.operands[name] for name in ("x", "w", "x.scale", "w.scale"))
    name, rows = _output(region), x.flatten(0, -2)
    result = region.results()[name]
    return lambda: {
        name: torch._scaled_mm(rows, w.mT, scale_a=of_x, scale_b=of_w, out_dtype=result.dtype).view(
            result.shape
        )
    }


def product_with_widened(region: DeviceRegion, config: ModelConfig) -> Peer:
    """`torch.mm` with what both operands stand for in bf16, which takes twice the bytes."""
    stored = region.operands
    x, w = (_decoded_fp8(stored[name], stored[f"{name}.scale"]) for name in ("x", "w"))
    return _multiplied(region, x, w)


def _multiplied(region: DeviceRegion, x: torch.Tensor, w: torch.Tensor) -> Peer:
    name = _output(region)
    result, rows = region.results()[name], x.flatten(0, -2)
    if result.dtype == x.dtype:
        product = partial(torch.mm, rows, w.mT)
    else:
        product = partial(torch.mm, rows, w.mT, out_dtype=result.dtype)
    return lambda: {name: product().view(result.shape)}


@dataclass(frozen=True)
class Mixer:
    """The operands of a part around a recurrence, by what they are.

    Attributes:
        projected: [B, L, I + (I + 2GN) + H]: gate, channels to be convolved, step sizes.
        taps, bias: of the convolution: f32 [I + 2GN, K] and [I + 2GN].
        before: the K - 1 channels before the first token, f32 [B, K - 1, I + 2GN].
        dt_bias, a, d: f32 [H].
        state: before the first token, f32 [B, H, P, N].
        output, next_state: names of the gated result f32 [B, L, I] and of the state.
    """

    projected: torch.Tensor
    taps: torch.Tensor
    bias: torch.Tensor
    before: torch.Tensor
    dt_bias: torch.Tensor
    a: torch.Tensor
    d: torch.Tensor
    state: torch.Tensor
    output: str
    next_state: str

    @classmethod
    def of(cls, region: DeviceRegion) -> "Mixer":
        """The operands of a region; states are copies, since the region changes its own.

        Raises:
            AbsentError: the region does not end with the gate, or lacks something.
        """
        find = partial(_operand, region)
        if any("norm.weight" in name for name in region.operands):
            raise AbsentError("the part has the norm in it")
        return cls(
            projected=find("in_proj"),
            taps=find("conv1d.weight"),
            bias=find("conv1d.bias"),
            before=_state(region, ".conv"),
            dt_bias=find("dt_bias"),
            a=find("A_log"),
            d=find(".mixer.D"),
            state=_state(region, ".ssm"),
            output=_output(region),
            next_state=_state_name(region, ".ssm"),
        )

    def split(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gate, channels and step sizes: views."""
        heads, width = self.state.shape[1:3]
        z, xbc, dt = self.projected.split([heads * width, len(self.taps), heads], -1)
        return z, xbc, dt

    def parts(self, convolved: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [..., H, P], b and c [..., G, N] of convolved channels [..., I + 2GN]: views."""
        heads, width, columns = self.state.shape[1:]
        inner = heads * width
        grouped = (len(self.taps) - inner) // 2
        x, b, c = convolved.split([inner, grouped, grouped], -1)
        per_head, per_group = (-1, width), (-1, columns)
        return x.unflatten(-1, per_head), b.unflatten(-1, per_group), c.unflatten(-1, per_group)


def _state_name(region: DeviceRegion, ending: str) -> str:
    (name,) = (s.name for s in region.part.graph.states if s.name.endswith(ending))
    return name


def _state(region: DeviceRegion, ending: str) -> torch.Tensor:
    return region.at_first()[_state_name(region, ending)].clone()


def convolve(
    before: torch.Tensor, x: torch.Tensor, taps: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """A causal convolution and SiLU, in float32, rounded to the type of x: as sums, which torch.compile fuses.

    Args:
        before: f32 [B, K - 1, D], what came before.
        x: [B, L, D].
        taps, bias: f32 [D, K] and [D].
    """
    joined = torch.cat([before.to(x.dtype), x], 1).float()
    total = bias
    for number, tap in enumerate(taps.unbind(-1)):
        total = total + joined[:, number : number + x.shape[1]] * tap
    return F.silu(total).to(x.dtype)


def _library_convolve(
    before: torch.Tensor, x: torch.Tensor, taps: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """The same with torch's convolution, in the type of x."""
    joined = torch.cat([before.to(x.dtype), x], 1).mT
    weight = taps.to(x.dtype).unsqueeze(1)
    made = F.conv1d(joined, weight, bias.to(x.dtype), groups=len(taps))
    return F.silu(made).mT


def _mamba_kernels(module: str) -> ModuleType:
    """A module of mamba-ssm's Triton kernels.

    The package imports its CUDA extension when it is imported as a whole, which a build without extensions has not; so
    it is not: a bare package stands for it in this process.
    """
    if "mamba_ssm" not in sys.modules:
        spec = _installed("mamba_ssm")
        for needed in ("einops", "triton"):
            _installed(needed)
        bare = ModuleType("mamba_ssm")
        bare.__path__ = list(spec.submodule_search_locations)
        sys.modules["mamba_ssm"] = bare
        sys.modules.setdefault("selective_scan_cuda", ModuleType("selective_scan_cuda"))
    return importlib.import_module(f"mamba_ssm.ops.triton.{module}")


def mamba_scan(region: DeviceRegion, config: ModelConfig, compiled: bool) -> Peer:
    """mamba-ssm's five kernels behind a convolution of torch's, or one that torch.compile makes."""
    scan = _mamba_kernels("ssd_combined").mamba_chunk_scan_combined
    mixer = Mixer.of(region)
    made = torch.compile(convolve, dynamic=True) if compiled else _library_convolve

    def run() -> Results:
        z, xbc, dt = mixer.split()
        x, b, c = mixer.parts(made(mixer.before, xbc, mixer.taps, mixer.bias))
        y, state = scan(
            x,
            dt,
            mixer.a,
            b,
            c,
            config.chunk_size,
            D=mixer.d,
            z=z.unflatten(-1, x.shape[-2:]),
            dt_bias=mixer.dt_bias,
            initial_states=mixer.state,
            dt_softplus=True,
            return_final_states=True,
        )
        return {mixer.output: y.flatten(-2), mixer.next_state: state}

    return _inference(run)


def mamba_update(region: DeviceRegion, config: ModelConfig) -> Peer:
    """mamba-ssm's kernel of one token behind a convolution that torch.compile makes; it updates a state of its own."""
    update = _mamba_kernels("selective_state_update").selective_state_update
    mixer = Mixer.of(region)
    made = torch.compile(convolve, dynamic=True)
    heads, width, columns = mixer.state.shape[1:]

    def run() -> Results:
        z, xbc, dt = (part.squeeze(1) for part in mixer.split())
        convolved = made(mixer.before, xbc.unsqueeze(1), mixer.taps, mixer.bias)
        x, b, c = mixer.parts(convolved.squeeze(1))
        y = update(
            mixer.state,
            x,
            dt.unsqueeze(-1).expand(-1, -1, width),
            mixer.a[:, None, None].expand(-1, width, columns),
            b,
            c,
            mixer.d.unsqueeze(-1).expand(-1, width),
            z=z.unflatten(-1, (heads, width)),
            dt_bias=mixer.dt_bias.unsqueeze(-1).expand(-1, width),
            dt_softplus=True,
        )
        return {mixer.output: y.flatten(1).unsqueeze(1), mixer.next_state: mixer.state}

    return _inference(run)


def eager_scan(region: DeviceRegion, config: ModelConfig, compiled: bool) -> Peer:
    """The eager reference of the recurrence and what is around it, its products in TF32; or torch.compile of it."""
    mixer = Mixer.of(region)
    groups = mixer.parts(mixer.split()[1])[1].shape[-2]

    def compute(state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z, xbc, dt = mixer.split()
        x, b, c = mixer.parts(convolve(mixer.before, xbc, mixer.taps, mixer.bias))
        y, following = chunked_scan(
            x.unflatten(-2, (groups, -1)),
            F.softplus(dt.float() + mixer.dt_bias).unflatten(-1, (groups, -1)),
            mixer.a.unflatten(-1, (groups, -1)),
            b,
            c,
            state.unflatten(1, (groups, -1)),
            min(config.chunk_size, xbc.shape[1]),
        )
        y = y.flatten(2, 3) + mixer.d.unsqueeze(-1) * x
        return y.flatten(-2) * F.silu(z.float()), following.flatten(1, 2)

    made = torch.compile(compute, dynamic=False) if compiled else compute

    def run() -> Results:
        with _Precision("high"):
            y, state = made(mixer.state)
        return {mixer.output: y, mixer.next_state: state}

    return _inference(run)


class _Precision(AbstractContextManager[None]):
    """Products of float32 in another precision while it is entered: "high" allows TF32."""

    def __init__(self, precision: str) -> None:
        self._precision = precision

    def __enter__(self) -> None:
        self._before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self._precision)

    def __exit__(self, *_: object) -> None:
        torch.set_float32_matmul_precision(self._before)


def transformers_moe(region: DeviceRegion, config: ModelConfig, compiled: bool) -> Peer:
    """transformers' module with its grouped products, norm and residual around it; or torch.compile of that.

    Quantized weights are what they decode to, in bf16.
    """
    _installed("transformers")
    library = importlib.import_module("transformers")
    models = importlib.import_module("transformers.models.nemotron_h.modeling_nemotron_h")
    settings = library.NemotronHConfig(**config.to_dict())
    settings._experts_implementation = "grouped_mm"
    (residual,) = (region.operands[v.name] for v in region.part.graph.inputs)
    with torch.device("meta"):
        moe = models.NemotronHMoE(settings).eval()
        norm = models.NemotronHRMSNorm(config.hidden_size, config.layer_norm_epsilon).eval()
    weights = {name: _mixer_weight(region, name) for name in moe.state_dict()}
    moe.load_state_dict(weights, assign=True)
    norm.load_state_dict({"weight": _operand(region, ".norm.weight")}, assign=True)
    name = _output(region)

    def compute(x: torch.Tensor) -> Any:
        # Up to transformers 5.17 a norm with float32 weights gives float32.
        return x + moe(norm(x).to(x.dtype))

    made = torch.compile(compute, dynamic=False) if compiled else compute
    return _inference(lambda: {name: made(residual)})


def _mixer_weight(region: DeviceRegion, name: str) -> torch.Tensor:
    """A parameter of a mixer; what it decodes to in bf16 if it is quantized.

    Raises:
        AbsentError: the part has none.
    """
    whole = [x for key, x in region.operands.items() if key.endswith(f".mixer.{name}")]
    folded = [x for key, x in region.operands.items() if f".mixer.{name}-" in key]
    stored = {x.dtype: x for x in folded}
    codes, narrow, scale = map(stored.get, (torch.uint8, torch.float8_e4m3fn, torch.float32))
    if len(whole) == 1:
        return whole[0]
    if narrow is None or scale is None or len(stored) != len(folded):
        raise AbsentError(f"the part has no weight {name!r}")
    decode_one = partial(_decoded_nvfp4, region) if codes is not None else _decoded_fp8
    operands = [x for x in (codes, narrow, scale) if x is not None]
    if scale.dim() == 0:
        return decode_one(*operands)
    # One expert at a time: all of them are large in float32.
    return torch.stack([decode_one(*one) for one in zip(*operands, strict=True)])


def _decoded_fp8(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (codes.float() * scale).bfloat16()


def _decoded_nvfp4(
    region: DeviceRegion, codes: torch.Tensor, scales: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """What codes [N, K/2] of a part stand for in bf16; in FP8 first, if the part makes that of codes and scales."""
    if any(isinstance(op, DequantizeNvfp4) and op.spread for op in _ops(region)):
        codes = gathered(codes)
    numbers = decode(codes, DIALECTS["modelopt"], torch.float32).unflatten(-1, (-1, BLOCK))
    numbers = (numbers * scales.float().unsqueeze(-1)).flatten(-2)
    if any(isinstance(op, Nvfp4ToFp8) for op in _ops(region)):
        numbers = (numbers / Nvfp4ToFp8.SHARE).to(scales.dtype)
    return _decoded_fp8(numbers, scale)


def _ops(region: DeviceRegion) -> list[Op]:
    """The ops within a part's regions."""
    bodies = [node.op.body for node in region.part.graph.nodes if isinstance(node.op, Fused)]
    return [inner.op for body in bodies for inner in body.nodes]


def torch_attention(region: DeviceRegion, config: ModelConfig) -> Peer:
    """torch's attention by its flash backend, over the cache's tokens."""
    graph, name = region.part.graph, _output(region)
    q, k, v = (region.operands[x.name] for x in graph.inputs if x.name != "lengths")
    if region.sizes.cached and region.sizes.new > 1:
        raise AbsentError("torch's causal mask begins with the first cached token")
    heads = q.unflatten(-1, (config.num_attention_heads, config.head_dim)).transpose(1, 2)
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    causal = region.sizes.new > 1

    def run() -> Results:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(
                heads, keys, values, is_causal=causal, enable_gqa=True
            )
        return {name: out.transpose(1, 2).flatten(2)}

    return _inference(run)


def _inference(run: Peer) -> Peer:
    """The same without gradients."""

    def without_gradients() -> Results:
        with torch.inference_mode():
            return run()

    return without_gradients
