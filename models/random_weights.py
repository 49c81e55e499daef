"""Random weights of any size, made when they are read: for shapes, speed and memory, not for quality.

Values have the scales of trained models, so that activations and logits stay of order one and the router
spreads its load. Every block of rows has its own seed, made from the source's seed, the parameter's name and the
block's number: a slice is the same whether it is read alone or with others, and costs only itself.
"""

import hashlib
import math
from collections.abc import Callable

import torch

from nemoc.ir.dtypes import DType
from nemoc.ir.errors import NemocError
from nemoc.ir.types import TensorType
from nemoc.models.config import ModelConfig
from nemoc.models.formats import WeightTypes
from nemoc.models.graph import build_step, default_weight_types

_BLOCK = 1 << 16
"""Elements in a block, at most, unless one row has more."""

Draw = Callable[[torch.Tensor, torch.Generator], object]
"""Fills an f32 tensor of rows of one parameter."""


class RandomSource:
    """A `ParameterSource` of random weights.

    Args:
        config: the model whose parameters these are.
        seed: equal seeds give equal weights.
        dtype: the stored type of all parameters but the router's correction bias, which is f32.
            None: the type that `config.dtype` names.
    """

    def __init__(self, config: ModelConfig, seed: int = 0, dtype: DType | None = None) -> None:
        self.seed = seed
        types = default_weight_types(config)
        graph = build_step(config, weight_types=types if dtype is None else _uniform(types, dtype))
        self._types = {param.name: param.type for param in graph.params}

    def type_of(self, name: str) -> TensorType:
        """The type of a parameter.

        Raises:
            NemocError: the model has no such parameter.
        """
        try:
            return self._types[name]
        except KeyError:
            raise NemocError(f"random weights: the model has no parameter '{name}'") from None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start` to `stop` of a parameter, in its stored type."""
        type_ = self.type_of(name)
        rows, *rest = map(int, type_.shape)
        start, stop, _ = slice(start, stop).indices(rows)
        out = torch.empty((max(stop - start, 0), *rest), dtype=type_.dtype.torch)
        draw = _draw(name, rest)
        per_block = max(1, _BLOCK // max(1, math.prod(rest)))
        for block in range(start // per_block, -(-stop // per_block)):
            first, last = block * per_block, min((block + 1) * per_block, rows)
            values = torch.empty((last - first, *rest))
            draw(values, torch.Generator().manual_seed(self._block_seed(name, block)))
            kept = values[max(start - first, 0) : stop - first]
            at = max(first - start, 0)
            out[at : at + len(kept)] = kept
        return out

    def _block_seed(self, name: str, block: int) -> int:
        digest = hashlib.sha256(f"{self.seed}/{name}/{block}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1


def _uniform(usual: WeightTypes, dtype: DType) -> WeightTypes:
    return lambda name: dtype if not name.endswith("e_score_correction_bias") else usual(name)


def _draw(name: str, row: list[int]) -> Draw:
    """How a parameter is drawn, from its name and the shape of one row."""
    leaf = ".".join(name.split(".")[-2:])
    match leaf.rpartition(".")[2]:
        case "A_log":
            return lambda x, g: x.uniform_(1, 16, generator=g).log_()
        case "dt_bias":
            return _draw_dt_bias
        case "D":
            return _normal(1.0, 0.1)
        case "e_score_correction_bias":
            return _normal(0.0, 0.05)
        case "bias":
            return _normal(0.0, 0.1)
    if leaf in ("norm.weight", "norm_f.weight"):
        return _normal(1.0, 0.1)
    if leaf == "embeddings.weight":
        return _normal(0.0, 1.0)
    return _normal(0.0, row[-1] ** -0.5)


def _normal(mean: float, deviation: float) -> Draw:
    return lambda x, g: x.normal_(mean, deviation, generator=g)


def _draw_dt_bias(x: torch.Tensor, generator: torch.Generator) -> None:
    """The inverse of softplus of a step size log-uniform in [0.001, 0.1], as Mamba initialises it."""
    dt = x.uniform_(math.log(1e-3), math.log(0.1), generator=generator).exp_()
    x.copy_(dt + torch.log(-torch.expm1(-dt)))
