"""GPU kernels of every op sample against the op's evaluation, in Triton's interpreter.

A new op is tested as soon as it has an emitter. Where the backend has no kernels for a sample's element types or weight
layout, it has to say so in one line.
"""

import pytest
import torch

from nemoc.codegen.plan import Site
from nemoc.codegen.triton.emit import EMITTERS, emit
from nemoc.codegen.triton.writer import device_functions
from nemoc.ir import Env, Graph, NemocError, parse
from nemoc.ir.dtypes import DType
from nemoc.ir.op import Op
from nemoc.ir.ops import (
    OPS,
    DequantizeNvfp4,
    Folded,
    Fused,
    Interleave,
    RoundToInt8,
    SpreadCodes,
    SwizzleScales,
)
from nemoc.ir.region import evaluate_op
from nemoc.ir.sample_inputs import sample_arguments
from support.gpu_kernels import INTERPRETER, check_kernel
from support.op_samples import OP_SAMPLES, sample_graph

SIZES = ({"B": 1, "L": 1, "C": 3}, {"B": 2, "L": 5, "C": 16})

_FOLDED = "applied to parameters alone, so folded when the artifact is built"

WITHOUT: dict[type[Op], str] = {
    Folded: "computed when the artifact is built",
    Fused: "lowered by its body",
    Interleave: _FOLDED,
    RoundToInt8: "for integer products, which CPUs have kernels for",
    SpreadCodes: _FOLDED,
    SwizzleScales: _FOLDED,
}

CASES: dict[str, Graph] = {
    f"{op.mnemonic()}-{number}": parse(sample_graph(lines))
    for op in OPS
    if op in EMITTERS
    for number, lines in enumerate(OP_SAMPLES[op.mnemonic()].valid)
}


def is_refused(op: Op) -> bool:
    """Products of other sums than f32, weights laid out for CPUs, and what only weights are quantized by."""
    by_file = (
        not isinstance(op, DequantizeNvfp4) and getattr(op, "dialect", "modelopt") != "modelopt"
    )
    laid_out = getattr(op, "interleave", 1) > 1
    return by_file or laid_out or getattr(op, "acc", DType.F32) != DType.F32


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sizes", SIZES, ids=["ones", "several"])
def test_kernels_equal_evaluation(name: str, sizes: dict[str, int]) -> None:
    graph = CASES[name]
    site = Site.dense(graph.nodes[-1].op)
    if is_refused(site.op):
        with pytest.raises(NemocError, match="GPU targets have no kernel"):
            emit(site, INTERPRETER)
        return
    arguments = sample_arguments(graph, sizes)
    values = {v: arguments[v.name] for v in graph.arguments}
    for node in graph.nodes[:-1]:
        values.update(zip(node.results, evaluate_op(node.op, Env(sizes), values), strict=True))
    operands: list[torch.Tensor] = [values[v] for v in site.op.operands()]
    check_kernel(site, sizes, *operands, tolerance=1e-6)


def test_every_op_has_an_emitter_or_a_reason_for_none() -> None:
    missing = [op.mnemonic() for op in OPS if op not in EMITTERS and op not in WITHOUT]
    assert not missing, f"ops without kernels for GPU targets: {', '.join(missing)}"
    assert not [op.mnemonic() for op in WITHOUT if op in EMITTERS or op not in OPS]


def test_no_variable_hides_a_function_that_kernels_call() -> None:
    source = emit(Site.dense(CASES["relu-0"].nodes[-1].op), INTERPRETER).stages[0].kernel.source
    assert "relu(" in source
    assigned = {line.split(" = ")[0].strip() for line in source.splitlines() if " = " in line}
    assert assigned.isdisjoint(device_functions())
