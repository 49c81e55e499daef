"""A model's parameters as numbers, whatever they are stored as, by slices."""

import math
from collections.abc import Iterator

import torch

from nemoc.ir.builder import Builder
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import NemocError
from nemoc.ir.interpreter import interpret
from nemoc.ir.params import ParameterSource
from nemoc.ir.types import TensorType
from nemoc.models.formats import Format
from nemoc.models.graph import build_step
from nemoc.models.source import Model


class Dequantized:
    """The parameters of a model's graph without formats; implements `nemoc.ir.params.ParameterSource`.

    A quantized weight is f32, of the values that the graph's own ops give it; every other one is as it is stored.

    Attributes:
        stored: the parameters as they are stored.
        formats: of those that are quantized, by name.

    Raises:
        NemocError: the model has no weights.
    """

    def __init__(self, model: Model) -> None:
        if model.parameters is None:
            raise NemocError(
                f"{model.name} has no weights; 'random:{model.name}' has random ones if it is a preset"
            )
        self.stored: ParameterSource = model.parameters
        self.formats = model.quantization.formats
        shapes = {p.name: tuple(map(int, p.shape)) for p in build_step(model.config).params}
        self._types = {name: self._type(name, shape) for name, shape in shapes.items()}

    @property
    def types(self) -> dict[str, TensorType]:
        """The type of every parameter, in the order of the graph."""
        return self._types

    def type_of(self, name: str) -> TensorType:
        """The type of a parameter.

        Raises:
            NemocError: the model has no such parameter.
        """
        if name not in self._types:
            raise NemocError(f"the model has no parameter '{name}'")
        return self._types[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start` to `stop` of the first axis, dense.

        Raises:
            NemocError: there is no such parameter, or it cannot be read.
        """
        type_ = self.type_of(name)
        stored = self.formats.get(name)
        if stored is None:
            return self.stored.read(name, start, stop)
        rows, *rest = map(int, type_.shape)
        start, stop, _ = slice(start, stop).indices(rows)
        return self._decode(name, stored, start, stop, rest)

    def slices(self, name: str, slice_bytes: int) -> Iterator[tuple[int, torch.Tensor]]:
        """A parameter in consecutive rows of its first axis, each with the number of the first.

        Args:
            name: of the parameter.
            slice_bytes: of f32 to read at a time; a row at least.

        Raises:
            NemocError: it cannot be read.
        """
        rows, *rest = map(int, self.type_of(name).shape)
        step = max(1, slice_bytes // (4 * max(1, math.prod(rest))))
        for start in range(0, rows, step):
            yield start, self.read(name, start, min(start + step, rows))

    def _stored_type(self, name: str) -> DType:
        return self.stored.type_of(name).dtype

    def _type(self, name: str, shape: tuple[int, ...]) -> TensorType:
        if name in self.formats:
            return TensorType(DType.F32, shape)
        return self.stored.type_of(name)

    def _decode(
        self, name: str, stored: Format, start: int, stop: int, rest: list[int]
    ) -> torch.Tensor:
        build = Builder("weight")
        weight = stored.append(build, name, (max(stop - start, 0), *rest), self._stored_type)
        graph = build.finish([weight])
        arguments = {
            p.name: self.stored.read(p.name, start, stop)
            if p.type.rank  # each is rows of the weight's, but for the scale of a single matrix
            else self.stored.read(p.name)
            for p in graph.params
        }
        return interpret(graph, arguments).outputs[0]
