"""Every op, driven by its samples."""

import re

import pytest
import sympy
import torch

from nemoc.ir import DType, Graph, IRError, interpret, parse, verify
from nemoc.ir.dims import evaluate_dim, symbol, symbols_of
from nemoc.ir.ops import OPS
from nemoc.ir.sample_inputs import sample_arguments
from support.op_samples import OP_SAMPLES, sample_graph

SIZES = {"B": 3, "L": 5, "C": 16}

VALID = [
    pytest.param(text, id=f"{name}-{i}")
    for name, samples in OP_SAMPLES.items()
    for i, text in enumerate(samples.valid)
]
INVALID = [
    pytest.param(name, text, reason, id=f"{name}-{i}")
    for name, samples in OP_SAMPLES.items()
    for i, (text, reason) in enumerate(samples.invalid)
]


@pytest.mark.parametrize("name", [op.mnemonic() for op in OPS])
def test_every_op_has_samples(name: str) -> None:
    assert name in OP_SAMPLES, f"{name} lacks an entry in tests/support/op_samples.py"
    assert OP_SAMPLES[name].valid and OP_SAMPLES[name].invalid


@pytest.mark.parametrize("text", VALID)
def test_text_round_trips(text: str) -> None:
    graph = parse(sample_graph(text))
    verify(graph)
    printed = str(graph)
    assert parse(printed) == graph
    assert str(parse(printed)) == printed


@pytest.mark.parametrize("text", VALID)
def test_results_have_the_inferred_types(text: str) -> None:
    graph = parse(sample_graph(text))
    result = interpret(graph, sample_arguments(graph, SIZES))
    for value, tensor in zip(graph.outputs, result.outputs, strict=True):
        assert DType.of(tensor) is value.dtype
        assert list(tensor.shape) == [evaluate_dim(d, SIZES) for d in value.shape]


@pytest.mark.parametrize("text", VALID)
def test_native_and_float64_evaluation_agree(text: str) -> None:
    graph = parse(sample_graph(text))
    arguments = sample_arguments(graph, SIZES)
    native, wide = interpret(graph, arguments), interpret(graph, arguments, float64=True)
    for value, a, b in zip(graph.outputs, native.outputs, wide.outputs, strict=True):
        if value.dtype.is_float:
            assert b.dtype is torch.float64
            step = torch.finfo(value.dtype.torch).eps
            torch.testing.assert_close(a.double(), b, rtol=16 * step, atol=16 * step)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("text", VALID)
def test_evaluation_leaves_its_operands_alone(text: str) -> None:
    graph = parse(sample_graph(text))
    arguments = sample_arguments(graph, SIZES)
    kept = {name: tensor.clone() for name, tensor in arguments.items()}
    interpret(graph, arguments)
    assert all(torch.equal(arguments[name].float(), kept[name].float()) for name in kept)


@pytest.mark.parametrize("text", VALID)
def test_cost_is_a_closed_form_in_the_sizes(text: str) -> None:
    op = parse(sample_graph(text)).nodes[-1].op
    cost = op.cost()
    for amount in (cost.flops, cost.read, cost.written):
        assert symbols_of(amount) <= {"B", "L", "C", "T"}
        sizes = {symbol(name): size for name, size in {**SIZES, "T": 7}.items()}
        assert float(sympy.sympify(amount).subs(sizes)) >= 0
    if op.is_view:
        assert cost.bytes == 0


@pytest.mark.parametrize(("name", "text", "reason"), INVALID)
def test_misfits_are_refused_where_they_stand(name: str, text: str, reason: str) -> None:
    lines = sample_graph(text)
    line = next(i for i, s in enumerate(lines.splitlines(), 1) if f"= {name}(" in s)
    with pytest.raises(IRError, match=re.escape(reason)) as caught:
        parse(lines, "sample.ir")
    assert caught.value.location == f"sample.ir:{line}"
    assert "\n" not in str(caught.value)


def test_samples_reach_graphs_without_arguments() -> None:
    graph = parse(sample_graph(OP_SAMPLES["full"].valid[1]))
    assert isinstance(graph, Graph) and not graph.arguments
    assert interpret(graph, {}).outputs[0].item() == 3
