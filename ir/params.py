"""Where parameters' data comes from: a protocol, so that the IR knows no file format."""

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch

from nemoc.ir.dtypes import DType
from nemoc.ir.errors import IRError
from nemoc.ir.graph import Graph
from nemoc.ir.types import TensorType


class ParameterSource(Protocol):
    """Tensors by parameter name, readable whole or by slices of the first axis.

    Nothing is held in memory beyond what a call returns.
    """

    def type_of(self, name: str) -> TensorType:
        """The type as stored.

        Raises:
            NemocError: there is no such parameter.
        """
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start` to `stop` (exclusive; None: the end) of the first axis, in the stored type.

        A scalar is read whole.
        """
        ...


class InMemory:
    """A parameter source over tensors at hand."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def type_of(self, name: str) -> TensorType:
        tensor = self._tensor(name)
        return TensorType.of(DType.of(tensor), tuple(tensor.shape))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        tensor = self._tensor(name)
        return tensor[start:stop] if tensor.dim() else tensor

    def _tensor(self, name: str) -> torch.Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise IRError(f"no parameter {name!r} among {len(self._tensors)} tensors") from None


class LazyArguments(Mapping[str, torch.Tensor]):
    """Arguments of `interpret`: given tensors, and a graph's parameters read when looked up."""

    def __init__(
        self, graph: Graph, source: ParameterSource, given: Mapping[str, torch.Tensor]
    ) -> None:
        self._params = {p.name for p in graph.params}
        self._source = source
        self._given = given

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._given:
            return self._given[name]
        if name in self._params:
            return self._source.read(name)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        yield from self._given
        yield from (name for name in self._params if name not in self._given)

    def __len__(self) -> int:
        return len(self._params | self._given.keys())
