"""The kernels of every op sample against the op's evaluation: a new op is tested as soon as it has an emitter.

Where the backend has no kernels for a sample's element types, it has to say so.
"""

from dataclasses import dataclass

import pytest
import torch

from nemoc.codegen.plan import Site
from nemoc.codegen.tvm.emit import EMITTERS, emit
from nemoc.ir import Env, Graph, parse
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import NemocError
from nemoc.ir.ops import OPS
from nemoc.ir.region import evaluate_op
from nemoc.ir.sample_inputs import sample_arguments
from support.kernels import CompiledSite, KernelSuite
from support.op_samples import OP_SAMPLES, sample_graph

SIZES = ({"B": 1, "L": 1, "C": 3}, {"B": 2, "L": 5, "C": 16})
RARE = (DType.F64, DType.F8E4M3)
"""Element types that kernels may refuse."""


@dataclass(frozen=True)
class Case:
    """A sample whose last node is compiled."""

    graph: Graph
    compiled: CompiledSite


def compile_samples() -> dict[str, Case]:
    suite = KernelSuite()
    cases: dict[str, Case] = {}
    for op in OPS:
        samples = OP_SAMPLES[op.mnemonic()].valid if op in EMITTERS else ()
        for number, lines in enumerate(samples):
            graph = parse(sample_graph(lines))
            last = graph.nodes[-1].op
            try:
                compiled = suite.add(Site.dense(last), emit)
            except NemocError:
                types = [v.dtype for v in (*last.operands(), *graph.nodes[-1].results)]
                assert any(t in RARE for t in types), f"{op.mnemonic()} is refused for {types}"
                continue
            cases[f"{op.mnemonic()}-{number}"] = Case(graph, compiled)
    return cases


CASES = compile_samples()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sizes", SIZES, ids=["ones", "several"])
def test_kernels_equal_evaluation(name: str, sizes: dict[str, int]) -> None:
    graph = CASES[name].graph
    arguments = sample_arguments(graph, sizes)
    values = {v: arguments[v.name] for v in graph.arguments}
    for node in graph.nodes[:-1]:
        values.update(zip(node.results, evaluate_op(node.op, Env(sizes), values), strict=True))
    last = graph.nodes[-1]
    exact = all(r.dtype not in (DType.F32, DType.F64) for r in last.results)
    operands: list[torch.Tensor] = [values[v] for v in last.op.operands()]
    CASES[name].compiled.check(sizes, *operands, tolerance=0.0 if exact else 1e-6)
