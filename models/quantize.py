"""Weights to NVFP4: which ones, and their codes and scales, by slices.

Weights are read in slices and never held together, so that a model of any size takes a few slices of memory. A matrix
that does not fit into one slice is read twice, since its scale depends on all of it.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from nemoc.ir.builder import Builder
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import IRError, NemocError
from nemoc.ir.graph import Graph
from nemoc.ir.interpreter import interpret
from nemoc.ir.nvfp4 import DIALECTS, LARGEST_SCALE
from nemoc.ir.ops import Nvfp4BlockScales, QuantizeNvfp4
from nemoc.ir.params import ParameterSource
from nemoc.ir.scopes import read_scope
from nemoc.models.config import ModelConfig
from nemoc.models.dequantized import Dequantized
from nemoc.models.formats import TENSOR_SCALES, Nvfp4
from nemoc.models.graph import build_step
from nemoc.models.modules import Modules
from nemoc.models.names import module_of

SLICE = 16 << 20
"""Bytes of f32 weights that are worked on at a time; one row, or one expert's matrix, at least.

What is computed on the way to codes takes some fifteen times as much.
"""


@dataclass(frozen=True)
class Selection:
    """What is to be quantized.

    Attributes:
        chosen: parameters with matrices of linear layers, [N, K] or [E, N, K].
        narrow: those that would be too but for their width, and that width K.
    """

    chosen: frozenset[str]
    narrow: Mapping[str, int]


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of one matrix in NVFP4.

    Attributes:
        matrix: which of a stack, 0 where there is one.
        start: the first row.
        codes: two a byte, the even element in the low half; u8 [rows, K/2].
        scales: of the blocks, f8e4m3 [rows, K/16].
        scale: of the matrix, f32 [].
    """

    matrix: int
    start: int
    codes: torch.Tensor
    scales: torch.Tensor
    scale: torch.Tensor


@dataclass(frozen=True)
class Written:
    """What came of writing a model.

    Attributes:
        quantized: how many matrices were quantized.
        notes: what was not, and what else a user has to know, one line each.
    """

    quantized: int
    notes: tuple[str, ...]


def select(config: ModelConfig, scope: str, block: int) -> Selection:
    """The matrices that a scope means, which is in the words of the pass `quantize-nvfp4`.

    Args:
        config: the model.
        scope: `all` for those of linear layers but the head: the projections of mixers, routed and shared experts,
            latent projections and dense layers; `experts` for those of routed and shared experts; else a regular
            expression that the name of such a weight, or `lm_head.weight`, has to begin with.
        block: how many columns share a scale.

    Raises:
        NemocError: the scope is no regular expression, or means nothing that has the width for it.
    """
    modules = Modules.of(config)
    linear = dict.fromkeys(modules.owner[m] for m in modules.of_class("Linear") or ())
    pattern = read_scope(scope)
    wanted = [name for name in linear if pattern.match(name)]
    if not wanted:
        example = next(iter(linear), "lm_head.weight")
        raise NemocError(f"scope '{scope}': found no weight whose name begins so, as in {example}")
    widths = {p.name: int(p.shape[-1]) for p in build_step(config).params if p.type.rank}
    narrow = {name: widths[name] for name in wanted if widths[name] % block}
    if len(narrow) == len(wanted):
        name, width = next(iter(narrow.items()))
        raise NemocError(
            f"scope '{scope}': nothing can be quantized, since no width is a multiple of {block}; "
            f"{name} has {width} columns"
        )
    return Selection(frozenset(wanted) - narrow.keys(), narrow)


def nvfp4_rows(
    weights: Dequantized, name: str, dialect: str, slice_bytes: int = SLICE
) -> Iterator[Rows]:
    """A parameter in NVFP4, matrix by matrix and each from its first row on.

    What is NVFP4 already keeps its codes and block scales; only the scale of a matrix is turned where one library
    multiplies by it and the other divides.

    Args:
        weights: the model's.
        name: of a parameter [N, K] or [E, N, K].
        dialect: the library whose arithmetic it is to be.
        slice_bytes: of f32 to work on at a time.

    Raises:
        NemocError: the weights cannot be read, or have no scale in that dialect.
    """
    stored = weights.formats.get(name)
    shape = tuple(map(int, weights.type_of(name).shape))
    for matrix in range(shape[0] if len(shape) == 3 else 1):
        view = _Matrix(weights, name, matrix, shape, slice_bytes)
        if isinstance(stored, Nvfp4):
            yield from view.kept(stored.dialect, dialect)
        else:
            yield from view.encoded(dialect)


@dataclass(frozen=True)
class _Matrix:
    """One of the matrices of a parameter."""

    weights: Dequantized
    name: str
    index: int
    shape: tuple[int, ...]
    slice_bytes: int

    def encoded(self, dialect: str) -> Iterator[Rows]:
        """The matrix, quantized."""
        slices = self._slices()
        first = self._read(self.weights, self.name, *slices[0])
        amax = _magnitude(first)
        for bounds in slices[1:]:
            amax = torch.maximum(amax, _magnitude(self._read(self.weights, self.name, *bounds)))
        scale = DIALECTS[dialect].tensor_scale(amax, LARGEST_SCALE)
        for number, (start, stop) in enumerate(slices):
            w = first if number == 0 else self._read(self.weights, self.name, start, stop)
            graph = _encoder(DType.of(w), *w.shape, dialect)
            try:
                codes, scales = interpret(graph, {"w": w, "g": scale}).outputs
            except IRError as error:
                raise error.at(self.name) from None
            yield Rows(self.index, start, codes, scales, scale)

    def kept(self, found: str, wanted: str) -> Iterator[Rows]:
        """The matrix as it is stored; of one dialect, in terms of another."""
        stored, module = self.weights.stored, module_of(self.name)
        scale = self._read(stored, f"{module}.{TENSOR_SCALES[found]}", 0, None, scalar=True)
        for start, stop in self._slices():
            codes = self._read(stored, self.name, start, stop)
            scales = self._read(stored, f"{module}.weight_scale", start, stop)
            if found != wanted and scale == 0:  # a factor of 0, which makes all of it zeros
                yield Rows(self.index, start, torch.zeros_like(codes), scales, torch.ones(()))
            else:
                g = scale if found == wanted else scale.reciprocal()
                yield Rows(self.index, start, codes, scales, g)

    def _slices(self) -> list[tuple[int, int]]:
        rows, width = self.shape[-2:]
        step = rows if len(self.shape) == 3 else max(1, self.slice_bytes // (4 * width))
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]

    def _read(
        self, source: ParameterSource, name: str, start: int, stop: int | None, scalar: bool = False
    ) -> torch.Tensor:
        """Rows of this matrix of a parameter, or the scalar that it has there."""
        if len(self.shape) == 3:
            whole = source.read(name, self.index, self.index + 1)[0]
            return whole if scalar else whole[start:stop]
        return source.read(name) if scalar else source.read(name, start, stop)


def _magnitude(x: torch.Tensor) -> torch.Tensor:
    low, high = x.aminmax()
    return torch.maximum(low.abs(), high.abs()).to(torch.float32)


@functools.lru_cache(maxsize=64)
def _encoder(dtype: DType, rows: int, width: int, dialect: str) -> Graph:
    """Codes and block scales of w [rows, width] by the scale g."""
    build = Builder("nvfp4")
    w, g = build.param("w", dtype, (rows, width)), build.param("g", DType.F32, ())
    scales = build(Nvfp4BlockScales(w, g, dialect), "scales")
    return build.finish([build(QuantizeNvfp4(w, scales, g, dialect), "codes"), scales])
