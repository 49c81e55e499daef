"""The reader of kernel text against TVM's parser, and TIR's own check of what it reads."""

import pytest
import tvm
from tvm.script import from_source

from nemoc.codegen.plan import Address, Launch, Site, StepFunction
from nemoc.codegen.tvm.emit import EMITTERS, emit
from nemoc.codegen.tvm.reader import read_module
from nemoc.codegen.tvm.step import module_source
from nemoc.codegen.tvm.target import cpu_target
from nemoc.ir.dims import B, C, L
from nemoc.ir.dtypes import DType
from nemoc.ir.op import Op
from nemoc.ir.ops import Add, Attention, Cast, Linear, Relu, RmsNorm, Softplus, SsdUpdate
from support.kernels import value

F32, BF16, I32 = DType.F32, DType.BF16, DType.I32

OPS: list[Op] = [
    Add(value(F32, B, L, 40), value(F32, 40)),
    Softplus(value(F32, B, 7)),
    Cast(value(F32, B, 33), BF16),
    RmsNorm(value(F32, B, 40), value(F32, 40), 1e-5, 2),
    Linear(value(F32, B, 37), value(BF16, 2, 37, 32), interleave=32, features=50),
    SsdUpdate(
        value(F32, B, 4, 10),
        value(F32, B, 4),
        value(F32, 4),
        value(F32, B, 2, 12),
        value(F32, B, 2, 12),
        value(F32, 4),
        value(F32, B, 4, 10, 12),
    ),
    Attention(
        value(F32, B, L, 4, 14),
        value(F32, B, C, 2, 14),
        value(F32, B, C, 2, 14),
        value(I32, B),
        0.3,
    ),
]


def _module(op: Op) -> str:
    """The text of a module that runs an op's plan once."""
    plan = emit(Site.dense(op), cpu_target("cpu:x86-64-v3"))
    launches = tuple(
        Launch(s.kernel, tuple(Address("arena", 64 * i) for i, _ in enumerate(s.args)))
        for s in plan.stages
    )
    return module_source([StepFunction("step", ("arena",), (launches,))])


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.mnemonic())
def test_reads_what_tvm_parses(op: Op) -> None:
    assert type(op) in EMITTERS
    source = _module(op)
    read, parsed = read_module(source), from_source(source)
    assert {v.name_hint for v in read.get_global_vars()} == {
        v.name_hint for v in parsed.get_global_vars()
    }
    for variable, function in parsed.functions.items():
        tvm.ir.assert_structural_equal(read[variable.name_hint], function, map_free_vars=True)


def test_reads_deterministically() -> None:
    source = _module(Relu(value(F32, B, 5)))
    assert read_module(source).script() == read_module(source).script()
