"""Values computed from parameters, in slices, so that weights larger than memory can be built.

`stream` gives a folded value as consecutive slices of its first axis. Each slice is computed from the slices of the
parameters that it needs, by what every op says of itself in `slice_rows`; an op that is not separable is evaluated
whole, once. The slices have the same bits as the whole.
"""

from collections.abc import Iterator
from typing import TypeAlias

import torch

from nemoc.ir.dtypes import DType
from nemoc.ir.errors import IRError
from nemoc.ir.op import Env, Op, RowSlice
from nemoc.ir.params import ParameterSource
from nemoc.ir.region import Folded, apply_op
from nemoc.ir.types import Value

_Slices: TypeAlias = dict[tuple[Value, int, int], torch.Tensor]
"""Rows that were computed: value, start, stop."""


def stream(
    folded: Folded, source: ParameterSource, budget_bytes: int, output: int = 0
) -> Iterator[torch.Tensor]:
    """A folded value as consecutive slices of its first axis; a scalar as it is.

    Args:
        folded: a region whose operands are parameters.
        source: where the parameters are found, by the operands' names.
        budget_bytes: what the rows of one slice, those of values on the way included, may take together. At least one
            row is computed at a time; values that are needed whole, which no slicing makes smaller, and what an op
            needs besides its operands and result come on top.
        output: which of the region's results.

    Raises:
        IRError: a parameter is stored in another type or shape than the region expects, or an op refuses what it holds.
    """
    value = folded.body.outputs[output]
    evaluation = _Evaluation(folded, source)
    if value.type.rank == 0:
        yield evaluation.whole(value)
        return
    total = _size(value, 0)
    rows = total
    while rows > 1 and evaluation.bytes_of_rows(value, rows) > budget_bytes:
        rows = -(-rows // 2)
    for start in range(0, total, rows):
        yield evaluation.rows(value, start, min(start + rows, total))


def _size(value: Value, axis: int) -> int:
    size = value.shape[axis]
    if not isinstance(size, int):
        raise IRError(f"%{value.name} is {value.type}, expected fixed sizes in a folded value")
    return size


def _row_bytes(value: Value) -> int:
    total = value.type.bytes
    if not isinstance(total, int):
        raise IRError(f"%{value.name} is {value.type}, expected fixed sizes in a folded value")
    return total // _size(value, 0)


class _Evaluation:
    """Demand-driven evaluation of one region: asks for rows of a value, back to the parameters."""

    def __init__(self, folded: Folded, source: ParameterSource) -> None:
        self._body = folded.body
        self._names = {
            inner: outer.name for inner, outer in zip(folded.body.inputs, folded.args, strict=True)
        }
        self._source = source
        self._env = Env({})
        self._wholes: dict[Value, torch.Tensor] = {}
        for inner, name in self._names.items():
            stored = source.type_of(name)
            if stored != inner.type:
                raise IRError(f"parameter {name} is stored as {stored}, expected {inner.type}")

    def rows(self, value: Value, start: int, stop: int) -> torch.Tensor:
        """Rows of a value, dense."""
        return self._rows(value, start, stop, {}).contiguous()

    def whole(self, value: Value) -> torch.Tensor:
        """A value at once; kept, since every slice asks for it again."""
        if value not in self._wholes:
            self._wholes[value] = self._evaluate(value, {})
        return self._wholes[value]

    def bytes_of_rows(self, value: Value, rows: int) -> int:
        """What the first rows of a value take, and those of others that they are computed from."""
        counted: set[tuple[Value, range]] = set()

        def count(value: Value, rows: range | None) -> int:
            if rows is None or (value, rows) in counted:
                return 0
            counted.add((value, rows))
            size = len(rows) * _row_bytes(value)
            how = self._how(value, rows) if value in self._body.producers else None
            if how is None:
                return size
            return size + sum(map(count, how.op.operands(), how.operands))

        return count(value, range(rows))

    def _how(self, value: Value, rows: range) -> RowSlice | None:
        node = self._body.producers[value]
        if len(node.results) > 1 or value in self._wholes:
            return None
        return node.op.slice_rows(rows.start, rows.stop)

    def _rows(self, value: Value, start: int, stop: int, known: _Slices) -> torch.Tensor:
        key = (value, start, stop)
        if key not in known:
            known[key] = self._slice(value, start, stop, known)
        return known[key]

    def _slice(self, value: Value, start: int, stop: int, known: _Slices) -> torch.Tensor:
        if value in self._names:
            return self._read(value, start, stop)
        how = self._how(value, range(start, stop))
        if how is None:
            return self.whole(value)[start:stop]
        operands = [
            self.whole(v) if rows is None else self._rows(v, rows.start, rows.stop, known)
            for v, rows in zip(how.op.operands(), how.operands, strict=True)
        ]
        (result,) = self._apply(how.op, operands)
        return result[how.skip : how.skip + stop - start]

    def _evaluate(self, value: Value, known: dict[Value, torch.Tensor]) -> torch.Tensor:
        if value in self._names:
            return self._read(value, 0, None)
        if value not in known:
            node = self._body.producers[value]
            operands = [self._evaluate(v, known) for v in node.op.operands()]
            known.update(zip(node.results, self._apply(node.op, operands), strict=True))
        return known[value]

    def _apply(self, op: Op, operands: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        try:
            return apply_op(op, self._env, operands)
        except IRError as error:  # ops know their operands, but not which parameters they come from
            raise error.at(", ".join(self._names.values())) from None

    def _read(self, value: Value, start: int, stop: int | None) -> torch.Tensor:
        tensor = self._source.read(self._names[value], start, stop)
        if DType.of(tensor) is not value.dtype or tensor.shape[1:] != value.shape[1:]:
            found = f"{DType.of(tensor)}{list(tensor.shape)}"
            raise IRError(f"parameter {self._names[value]} reads as {found}, expected {value.type}")
        return tensor
