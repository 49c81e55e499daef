"""The check of every kernel by itself: right kernels pass it, planted faults do not."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import pytest
import torch

from nemoc.codegen.check import KernelCheck, check_kernels
from nemoc.codegen.plan import Arg, Plan, Site, View
from nemoc.codegen.storage import Layout
from nemoc.codegen.tvm import check
from nemoc.codegen.tvm.emit import emit
from nemoc.codegen.tvm.harness import Emitter
from nemoc.codegen.tvm.target import CpuTarget, cpu_target
from nemoc.codegen.tvm.writer import KernelWriter, size_text
from nemoc.ir import Builder, DType, Graph, ops
from nemoc.ir.dims import B, L
from nemoc.ir.sample_inputs import sample_arguments
from nemoc.ir.types import TensorType
from nemoc.passes.check import relative_error

F32 = DType.F32
SIZES = {"B": 2, "L": 7, "C": 24}
BOUND = 1e-5


def checks(**graphs: Graph) -> list[KernelCheck]:
    """The checks of a program's kernels on random arguments."""
    params = {p.name: p.type for graph in graphs.values() for p in graph.params}

    def arguments(graph: Graph) -> Mapping[str, torch.Tensor]:
        return sample_arguments(graph, SIZES)

    layout = Layout.of(params.items())
    found = check_kernels(
        graphs, layout, arguments, SIZES, check.checked_backend(cpu_target()), relative_error
    )
    return list(found)


def mixer() -> Graph:
    """A convolution, a recurrence, experts' scores, and outputs that are views of other values."""
    b = Builder("mixer")
    x, valid = b.input("x", F32, (B, L, 12)), b.input("valid", DType.I32, (B,), L + 1)
    w, taps = b.param("w", DType.BF16, (4, 12)), b.param("taps", F32, (12, 4))
    conv, ssm = b.state("conv", F32, (B, 3, 12)), b.state("ssm", F32, (B, 4, 3, 2))
    mixed, conv_next = b.all(ops.CausalConv(x, taps, None, conv, valid))
    dt = b(ops.Softplus(b(ops.Linear(b(ops.Silu(mixed)), w))))
    a = b(ops.Scale(b(ops.Exp(b.param("a", F32, (4,)))), -1.0))
    heads = b(ops.Reshape(mixed, (B, L, 4, 3)))
    keys = b(ops.Reshape(b(ops.Slice(mixed, 2, 0, 4)), (B, L, 2, 2)))
    y, ssm_next = b.all(ops.SsdScan(heads, dt, a, keys, keys, None, ssm, valid))
    best = b(ops.TopK(b(ops.Reshape(dt, (B * L, 4))), 2))
    turned = b(ops.Permute(y, (1, 0, 2, 3)))
    return b.finish([b(ops.TakeLast(mixed, valid)), best, turned], [conv_next, ssm_next])


def test_every_kernel_of_a_program_passes() -> None:
    b = Builder("decode")
    x, s = b.input("x", F32, (B, 12)), b.state("conv", F32, (B, 3, 12))
    t = b.state("ssm", F32, (B, 4, 3, 2))
    decode = b.finish([b(ops.Cast(b(ops.Gelu(x)), DType.BF16))], [s, t])
    found = checks(prefill=mixer(), decode=decode)
    assert [c for c in found if not c.error <= BOUND] == []
    names = [c.op.partition("(")[0] for c in found]
    assert {"causal_conv", "ssd_scan", "linear", "top_k", "take_last", "gelu"} <= set(names)
    assert all(c.kernels for c in found)


def test_equal_sites_are_checked_once_and_named() -> None:
    b = Builder("g")
    x = b.input("x", F32, (B, 12))
    graph = b.finish([b(ops.Sub(b(ops.Exp(b(ops.Exp(x)))), x))])
    exp, sub = checks(g=graph)
    assert exp.op == "exp(f32[B, 12])" and sub.op == "sub(f32[B, 12], f32[B, 12])"
    assert [c.kernels[0].partition("_")[0] for c in (exp, sub)] == ["exp", "sub"]


Body = Callable[[KernelWriter, str, str, str], None]
"""Writes a kernel that should double: writer, operand, result, number of elements."""


def double(writer: KernelWriter, x: str, y: str, count: str, shift: str = "0") -> None:
    with writer.loop("i", count) as i:
        writer.store(y, i, f"{writer.load(x, f'{i} + {shift}')} * T.float32(2)")


def tail_not_scaled(writer: KernelWriter, x: str, y: str, n: str) -> None:
    double(writer, x, y, n)
    writer.store(y, f"{n} - 1", writer.load(x, f"{n} - 1"))


def last_unwritten(writer: KernelWriter, x: str, y: str, n: str) -> None:
    double(writer, x, y, f"{n} - 1")


def nothing_written(writer: KernelWriter, x: str, y: str, n: str) -> None:
    writer.load(x, "0")


def written_past_the_end(writer: KernelWriter, x: str, y: str, n: str) -> None:
    double(writer, x, y, n)
    writer.store(y, n, "T.float32(0)")


def written_before_the_start(writer: KernelWriter, x: str, y: str, n: str) -> None:
    double(writer, x, y, n)
    writer.store(y, "0 - 1", "T.float32(0)")


def read_past_the_end(writer: KernelWriter, x: str, y: str, n: str) -> None:
    double(writer, x, y, n, shift="1")


def operand_overwritten(writer: KernelWriter, x: str, y: str, n: str) -> None:
    double(writer, x, y, n)
    writer.store(x, "0", "T.float32(0)")


def emitter(body: Body) -> Emitter:
    """An emitter of dense element-wise ops whose one task is `body`."""

    def emit_planted(site: Site, target: CpuTarget) -> Plan:
        (operand,) = site.operands
        flat = View.dense(TensorType(operand.dtype, (operand.elements,)))
        writer = KernelWriter("planted")
        x = writer.buffer("x", Arg("operand", 0), flat)
        y = writer.buffer("y", Arg("result", 0), flat)
        body(writer, x, y, size_text(operand.elements))
        return Plan((writer.finish(1),))

    return emit_planted


def doubled(monkeypatch: pytest.MonkeyPatch, body: Body) -> float:
    """The error that the check finds in a kernel that should double."""
    monkeypatch.setattr(check, "emit", emitter(body))
    b = Builder("g")
    (found,) = checks(g=b.finish([b(ops.Scale(b.input("x", F32, (B, L, 5)), 2.0))]))
    return found.error


def test_a_right_kernel_in_their_place_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doubled(monkeypatch, double) == 0.0


@pytest.mark.parametrize(
    "body",
    [
        tail_not_scaled,
        last_unwritten,
        nothing_written,
        written_past_the_end,
        written_before_the_start,
        read_past_the_end,
        operand_overwritten,
    ],
    ids=lambda body: body.__name__,
)
def test_a_planted_fault_is_found(monkeypatch: pytest.MonkeyPatch, body: Body) -> None:
    error = doubled(monkeypatch, body)
    expected = error > 1e-2 if body is tail_not_scaled else not math.isfinite(error)
    assert expected, error


def test_operands_that_trade_places_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other kernels of the program are still told to be right."""
    traded = {Arg("operand", 0): Arg("operand", 1), Arg("operand", 1): Arg("operand", 0)}

    def trade(site: Site, target: CpuTarget) -> Plan:
        plan = emit(site, target)
        if not isinstance(site.op, ops.Sub):
            return plan
        stages = (
            dataclasses.replace(s, args=tuple(traded.get(a, a) for a in s.args))
            for s in plan.stages
        )
        return dataclasses.replace(plan, stages=tuple(stages))

    monkeypatch.setattr(check, "emit", trade)
    b = Builder("g")
    x, y = b.input("x", F32, (B, L, 5)), b.input("y", F32, (B, L, 5))
    exp, sub = checks(g=b.finish([b(ops.Sub(b(ops.Exp(x)), y))]))
    assert exp.error <= BOUND
    assert sub.error == pytest.approx(2.0)
