"""Inference refuses whatever does not fit with an `IRError`, never with another exception."""

import dataclasses
import random
import typing
from typing import Any

import pytest

from nemoc.ir import DType, IRError, TensorType, Value, parse
from nemoc.ir.dims import B, C, L
from nemoc.ir.op import Op, field_types
from nemoc.ir.ops import OPS, Cast, Full, Region
from support.op_samples import OP_SAMPLES, sample_graph

_DIMS = (1, 2, 3, 6, B, L, C, 2 * B)
_DTYPES = (
    DType.F32,
    DType.F32,
    DType.F64,
    DType.BF16,
    DType.F8E4M3,
    DType.I32,
    DType.I64,
    DType.U8,
)


def _value(rng: random.Random) -> Value:
    shape = [rng.choice(_DIMS) for _ in range(rng.randrange(5))]
    return Value("x", TensorType.of(rng.choice(_DTYPES), shape))


def _field(hint: Any, rng: random.Random) -> Any:
    if hint is Value or hint == Value | None:
        return _value(rng)
    if hint == tuple[Value, ...]:
        return tuple(_value(rng) for _ in range(rng.randrange(3)))
    if typing.get_origin(hint) is tuple:
        return tuple(rng.randrange(-1, 4) for _ in range(rng.randrange(4)))
    return {
        int: rng.randrange(-1, 7),
        float: rng.choice((0.0, -1.5, float("inf"), float("nan"))),
        bool: rng.random() < 0.5,
        str: rng.choice(("", "modelopt", "torchao", "x")),
        DType: rng.choice(_DTYPES),
    }[hint]


def _near(value: Value, rng: random.Random) -> Value:
    """A value whose type differs in its element type, one size or its rank."""
    shape = list(value.shape)
    change = rng.randrange(4)
    if change == 0:
        return Value("x", value.type.with_dtype(rng.choice(_DTYPES)))
    if change == 1 and shape:
        shape[rng.randrange(len(shape))] = rng.choice(_DIMS)
    elif change == 2 and shape:
        del shape[rng.randrange(len(shape))]
    else:
        shape.insert(rng.randrange(len(shape) + 1), rng.choice(_DIMS))
    return Value("x", TensorType.of(value.dtype, shape))


def _mutated(op: Op, rng: random.Random) -> Op:
    name = rng.choice(list(field_types(type(op))))
    old = getattr(op, name)
    if isinstance(old, Value):
        return dataclasses.replace(op, **{name: _near(old, rng)})
    return dataclasses.replace(op, **{name: _field(field_types(type(op))[name], rng)})


@pytest.mark.parametrize(
    "op", [o for o in OPS if not issubclass(o, Region)], ids=lambda o: o.mnemonic()
)
def test_inference_raises_ir_errors_only(op: type[Op]) -> None:
    rng = random.Random(op.mnemonic())
    samples = [parse(sample_graph(t)).nodes[-1].op for t in OP_SAMPLES[op.mnemonic()].valid]
    refused = 0
    for i in range(300):
        fields = {name: _field(hint, rng) for name, hint in field_types(op).items()}
        candidate = op(**fields) if i % 3 == 0 else _mutated(rng.choice(samples), rng)
        try:
            types = candidate.result_types()
        except IRError:
            refused += 1
        else:
            assert all(isinstance(t, TensorType) for t in types)
    assert refused > 0 or op in (Cast, Full)
