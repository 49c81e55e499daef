"""Folded values computed in slices: the same bits as the whole, within a bound on memory."""

import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemoc.ir import Builder, DType, Graph, IRError, Value, interpret, ops
from nemoc.ir.folding import stream
from nemoc.ir.ops import Folded
from nemoc.ir.params import InMemory
from nemoc.ir.sample_inputs import sample_arguments
from nemoc.passes import PassContext
from nemoc.passes.check import same_bits
from nemoc.passes.fold_constants import FoldConstants


@st.composite
def weight_graphs(draw: st.DrawFn) -> Graph:
    """Chains of ops on parameters, as they stand in front of matrix products."""
    b = Builder("weights")
    shape = tuple(draw(st.lists(st.sampled_from([2, 3, 4, 6, 10]), min_size=1, max_size=3)))
    value = b.param("w", draw(st.sampled_from([DType.F32, DType.BF16])), shape)
    for i in range(draw(st.integers(1, 6))):
        value = _step(b, draw, value, i)
    return b.finish([value])


def _step(b: Builder, draw: st.DrawFn, x: Value, i: int) -> Value:
    """One more op on a weight, or the weight itself where the op drawn does not fit."""
    kind = draw(st.integers(0, 2))
    if kind == 0:
        return b(ops.Cast(x, draw(st.sampled_from([DType.BF16, DType.F32, DType.F64]))))
    if kind == 1:
        return _layout(b, draw, x, i)
    wide = x if x.dtype in (DType.F32, DType.F64) else b(ops.Cast(x, DType.F32))
    return _arithmetic(b, draw, wide, i)


def _layout(b: Builder, draw: st.DrawFn, x: Value, i: int) -> Value:
    shape = [int(d) for d in x.shape]
    axis = draw(st.integers(0, len(shape) - 1))
    kind = draw(st.integers(0, 5))
    if kind == 0 and len(shape) > 1:
        return b(ops.Interleave(x, draw(st.integers(2, 5))))
    if kind == 1 and len(shape) > 1:
        at = min(axis, len(shape) - 2)
        return b(ops.Reshape(x, (*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :])))
    if kind == 2 and shape[axis] % 2 == 0:
        return b(ops.Reshape(x, (*shape[:axis], 2, shape[axis] // 2, *shape[axis + 1 :])))
    if kind == 3:
        return b(ops.Permute(x, tuple(draw(st.permutations(range(len(shape)))))))
    if kind == 4:
        start = draw(st.integers(0, shape[axis] - 1))
        return b(ops.Slice(x, axis, start, draw(st.integers(start + 1, shape[axis]))))
    return b(ops.Concat((x, x, b.param(f"p{i}", x.dtype, shape)), axis))


def _arithmetic(b: Builder, draw: st.DrawFn, x: Value, i: int) -> Value:
    shape = [int(d) for d in x.shape]
    kind = draw(st.integers(0, 3))
    if kind == 0:
        other = [d if draw(st.booleans()) else 1 for d in shape][draw(st.integers(0, 1)) :]
        return b(ops.Mul(x, b.param(f"p{i}", x.dtype, other)))
    if kind == 1 and len(shape) > 1:
        return b(ops.Sum(x, draw(st.integers(0, len(shape) - 1))))
    if kind == 2:
        return b(ops.Add(x, b(ops.Full(0.5, x.dtype, tuple(shape)))))
    return b(draw(st.sampled_from([ops.Relu, ops.Square, ops.Exp, ops.Tanh]))(x))


@given(graph=weight_graphs(), budget=st.sampled_from([1, 100, 1000, 100_000]))
def test_slices_have_the_bits_of_the_whole(graph: Graph, budget: int) -> None:
    arguments = sample_arguments(graph)
    (whole,) = interpret(graph, arguments).outputs
    folded = FoldConstants().run(graph, PassContext())
    for node in folded.nodes:
        assert isinstance(node.op, Folded)
        parts = list(stream(node.op, InMemory(arguments), budget))
        assert all(part.is_contiguous() for part in parts)
        assert same_bits(torch.cat(parts), whole)


def _region(build: str) -> tuple[Folded, dict[str, torch.Tensor]]:
    b = Builder("weights")
    w = b.param("w", DType.BF16, (6, 8, 4))
    if build == "interleave":
        value = b(ops.Interleave(w, 3))
    elif build == "permute":
        value = b(ops.Permute(w, (1, 0, 2)))
    elif build == "merge":
        value = b(ops.Reshape(w, (48, 4)))
    else:
        value = b(ops.Reshape(b(ops.Scale(b(ops.Cast(w, DType.F32)), 2.0)), (2, 3, 8, 4)))
    graph = b.finish([value])
    (node,) = FoldConstants().run(graph, PassContext()).nodes
    assert isinstance(node.op, Folded)
    return node.op, sample_arguments(graph)


@pytest.mark.parametrize(
    ("build", "parts"), [("interleave", 6), ("permute", 8), ("merge", 48), ("split", 2)]
)
def test_small_budget_gives_single_rows(build: str, parts: int) -> None:
    folded, arguments = _region(build)
    assert len(list(stream(folded, InMemory(arguments), 1))) == parts
    assert len(list(stream(folded, InMemory(arguments), 1 << 20))) == 1


def test_what_is_needed_whole_makes_slices_no_smaller() -> None:
    b = Builder("weights")
    w = b.param("w", DType.F32, (64, 32))
    scale = b(ops.Nvfp4GlobalScale(w))
    graph = b.finish([b(ops.Nvfp4BlockScales(w, scale))])
    (node,) = FoldConstants().run(graph, PassContext()).nodes
    assert isinstance(node.op, Folded)
    row = 32 * 4 + 2
    parts = list(stream(node.op, InMemory(sample_arguments(graph)), 16 * row))
    assert [len(part) for part in parts] == [16, 16, 16, 16]


def test_slices_of_a_merge_read_each_row_of_the_parameter() -> None:
    folded, arguments = _region("merge")
    reads: list[tuple[int, int | None]] = []

    class Spy(InMemory):
        def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
            reads.append((start, stop))
            return super().read(name, start, stop)

    rows = 3 * 8 * 4 * 2
    list(stream(folded, Spy(arguments), 2 * rows))
    assert reads == [(0, 3), (3, 6)]


def test_parameter_stored_in_another_type_is_refused() -> None:
    folded, arguments = _region("split")
    with pytest.raises(IRError, match="parameter w is stored as f32"):
        list(stream(folded, InMemory({"w": arguments["w"].float()}), 1000))


def test_scalar_is_given_whole() -> None:
    b = Builder("weights")
    value = b(ops.Sum(b(ops.Exp(b.param("w", DType.F32, (5,)))), 0))
    graph = b.finish([value])
    (node,) = FoldConstants().run(graph, PassContext()).nodes
    assert isinstance(node.op, Folded)
    arguments = sample_arguments(graph)
    (part,) = stream(node.op, InMemory(arguments), 1)
    assert same_bits(part, arguments["w"].exp().sum())


BIG = """
    import resource, sys
    import torch
    from nemoc.ir import Builder, DType, TensorType, ops
    from nemoc.ir.folding import stream
    from nemoc.passes import PassContext
    from nemoc.passes.fold_constants import FoldConstants

    torch.set_num_threads(1)
    EXPERTS, ROWS, WIDTH, LIMIT = 96, 1000, 1024, 64 << 20

    class Generated:
        "A stack of 196 MB that is nowhere: rows are made when they are read."
        def type_of(self, name):
            return TensorType.of(DType.BF16, (EXPERTS, ROWS, WIDTH))
        def read(self, name, start=0, stop=None):
            stop = EXPERTS if stop is None else stop
            values = torch.arange(start, stop, dtype=torch.bfloat16)
            return values.reshape(-1, 1, 1).expand(-1, ROWS, WIDTH).contiguous()

    b = Builder("weights")
    w = b.param("w", DType.BF16, (EXPERTS, ROWS, WIDTH))
    value = b(ops.Interleave(w, 16))
    (node,) = FoldConstants().run(b.finish([value]), PassContext()).nodes
    list(zip(range(1), stream(node.op, Generated(), 1)))  # libraries load what they need
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    budget = int(sys.argv[1])
    first = [(len(part), part[0, 0, 0, 0].item()) for part in stream(node.op, Generated(), budget)]
    assert sum(rows for rows, _ in first) == EXPERTS
    at = 0
    for rows, value in first:
        assert value == at
        at += rows
    print(len(first))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the memory limit is Linux's")
def test_stack_larger_than_memory_folds_in_slices() -> None:
    def run(budget: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", textwrap.dedent(BIG), str(budget)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    sliced = run(16 << 20)
    assert sliced.returncode == 0, sliced.stderr
    assert int(sliced.stdout) >= 24
    whole = run(1 << 40)
    assert whole.returncode != 0 and "memory" in whole.stderr.lower()
