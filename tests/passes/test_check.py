"""The numeric check: it catches passes that break their word, names them and writes a reproducer."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from nemoc.ir import Graph, Op, interpret, ops, parse
from nemoc.ir.params import InMemory
from nemoc.ir.rewrite import Replacement, Rewriter, Rule, rewrite
from nemoc.ir.sample_inputs import sample_arguments
from nemoc.passes import (
    Effect,
    Pass,
    PassContext,
    PassError,
    PassRun,
    parse_pipeline,
    run_pipeline,
)
from nemoc.passes.check import CheckError, NumericCheck, relative_error, same_bits
from nemoc.passes.cse import Cse
from nemoc.passes.dce import Dce

STEP = """graph @step {
  input %x: f32[B, L, 12]
  input %valid: i32[B] < L + 1
  param %w: bf16[4, 12]
  param %a_log: f32[4]
  param %taps: f32[12, 4]
  param %norm: f32[12]
  state %conv: f32[B, 3, 12]
  state %ssm: f32[B, 4, 3, 2]
  state %lengths: i32[B] < C - L + 1

  %normed = rms_norm(%x, %norm) {eps=1e-05, groups=3} : f32[B, L, 12]
  %mixed, %conv.next = causal_conv(%normed, %taps, _, %conv, %valid) : f32[B, L, 12], f32[B, 3, 12]
  %active = silu(%mixed) : f32[B, L, 12]
  %raw = linear(%active, %w) : f32[B, L, 4]
  %dt = softplus(%raw) : f32[B, L, 4]
  %exp = exp(%a_log) : f32[4]
  %a = scale(%exp) {factor=-1.0} : f32[4]
  %heads = reshape(%active) {shape=[B, L, 4, 3]} : f32[B, L, 4, 3]
  %part = slice(%active) {axis=2, start=0, stop=4} : f32[B, L, 4]
  %b = reshape(%part) {shape=[B, L, 2, 2]} : f32[B, L, 2, 2]
  %y, %ssm.next = ssd_scan(%heads, %dt, %a, %b, %b, _, %ssm, %valid) : f32[B, L, 4, 3], f32[B, 4, 3, 2]
  %flat = reshape(%y) {shape=[B, L, 12]} : f32[B, L, 12]
  %wide = cast(%flat) {dtype=bf16} : bf16[B, L, 12]
  %rounded = cast(%wide) {dtype=f32} : f32[B, L, 12]
  %residual = add(%rounded, %x) : f32[B, L, 12]
  %last = take_last(%residual, %valid) : f32[B, 12]
  %total = add(%lengths, %valid) : i32[B]
  return %last
  update %conv = %conv.next
  update %ssm = %ssm.next
  update %lengths = %total
}
"""

Fault = tuple[type[Op], Callable[[Any, Rewriter], Replacement]]


def _instead(root: type[Op], change: Callable[[Any], Op]) -> Fault:
    """Another op takes the place of one."""
    return root, lambda op, rewriter: rewriter.all(change(op))


def _changed(root: type[Op], **fields: Any) -> Fault:
    return _instead(root, lambda op: dataclasses.replace(op, **fields))


def _drop_rounding(op: ops.Cast, rewriter: Rewriter) -> Replacement:
    inner = rewriter.producer(op.x)
    return inner.x if isinstance(inner, ops.Cast) and inner.x.dtype is op.dtype else None


def _forget_state(op: ops.CausalConv, rewriter: Rewriter) -> Replacement:
    return rewriter.all(op)[0], op.state


FAULTS: dict[str, Fault] = {
    "another factor": _changed(ops.Scale, factor=-1.0001),
    "another activation": _instead(ops.Silu, lambda op: ops.Gelu(op.x)),
    "another epsilon": _changed(ops.RmsNorm, eps=1e-3),
    "one norm group": _changed(ops.RmsNorm, groups=1),
    "a lost rounding": (ops.Cast, _drop_rounding),
    "a stale state": (ops.CausalConv, _forget_state),
    "a skip that is not there": _instead(ops.SsdScan, lambda op: dataclasses.replace(op, d=op.a)),
    "one row further": _changed(ops.Slice, start=1, stop=5),
    "a subtracted residual": _instead(ops.Add, lambda op: ops.Sub(op.a, op.b)),
}


@dataclass(frozen=True)
class Planted(Pass):
    """Declares exact and carries a fault."""

    fault: str = ""

    def run(self, graph: Graph, ctx: PassContext) -> Graph:
        root, apply = FAULTS[self.fault]
        applied: list[str] = []
        rule = Rule("planted", root, lambda op, r: None if applied else apply(op, r))
        return rewrite(graph, (rule,), on_apply=lambda rule, node: applied.append(rule.name))


@dataclass(frozen=True)
class Nudge(Pass):
    """Declares that it reorders, and scales by one plus an error."""

    error: float = 1e-7
    effect = Effect.REORDERS

    def run(self, graph: Graph, ctx: PassContext) -> Graph:
        rewriter = Rewriter(graph.name)
        rewriter.adopt(graph)
        for node in graph.nodes:
            rewriter.keep(node)
        last = rewriter(ops.Scale(graph.outputs[0], 1.0 + self.error), "nudged")
        return rewriter.finish([last], graph.next_states)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught_and_named(fault: str) -> None:
    passes = (Cse(), Planted(fault), Dce())
    with pytest.raises(CheckError) as caught:
        run_pipeline(parse(STEP), passes, PassContext(), check=NumericCheck({"L": 7}))
    message = str(caught.value)
    assert message.startswith("pass 2 of 3 (planted) declares exact but changes ")
    assert f"reproduce with --pipeline 'cse,planted{{fault=\"{fault}\"}}'" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("fault", "first"),
    [
        ("another factor", "%a (scale"),
        ("another activation", "%active (gelu"),
        ("one norm group", "%normed (rms_norm"),
        ("one row further", "%part (slice"),
    ],
)
def test_first_diverging_value_is_named(fault: str, first: str) -> None:
    with pytest.raises(CheckError) as caught:
        run_pipeline(parse(STEP), (Planted(fault),), PassContext(), check=NumericCheck())
    assert f"the first value that diverges is {first}, error" in str(caught.value)


def test_budget_separates_reordering_from_wrong() -> None:
    check = NumericCheck()
    run_pipeline(parse(STEP), (Nudge(1e-6),), PassContext(), check=check)
    with pytest.raises(CheckError, match=r"declares reorders but .* by 0\.000[12].*at most 1e-05"):
        run_pipeline(parse(STEP), (Nudge(1e-4),), PassContext(), check=check)


def test_registered_pipeline_passes_the_check() -> None:
    text = "specialize-decode,canonicalize,cse,interleave-weights{block=4},fold-constants,dce"
    run_pipeline(parse(STEP), parse_pipeline(text), PassContext(), check=NumericCheck())


def test_weights_come_from_the_context() -> None:
    graph = parse(STEP)
    weights = sample_arguments(graph, seed=5)
    read: list[str] = []

    class Spy(InMemory):
        def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
            read.append(name)
            return super().read(name, start, stop)

    ctx = PassContext(parameters=Spy({p.name: weights[p.name] for p in graph.params}))
    run_pipeline(graph, parse_pipeline("fold-constants"), ctx, check=NumericCheck())
    assert set(read) == {p.name for p in graph.params}


def test_reproducer_reproduces(tmp_path: Path) -> None:
    folder = tmp_path / "reproducer"
    passes = (Cse(), Planted("one row further"))
    with pytest.raises(CheckError, match=f"see {folder}"):
        run_pipeline(
            parse(STEP), passes, PassContext(), check=NumericCheck(seed=3, reproducer=folder)
        )
    before = parse((folder / "before.ir").read_text())
    after = parse((folder / "after.ir").read_text())
    arguments = safetensors.torch.load_file(folder / "arguments.safetensors")
    old, new = interpret(before, arguments), interpret(after, arguments)
    assert not torch.equal(old.outputs[0], new.outputs[0])
    text = (folder / "pipeline.txt").read_text()
    again = parse_pipeline(text, (Planted,))
    assert run_pipeline(before, again, PassContext()) == after
    facts = json.loads((folder / "check.json").read_text())
    assert facts["place"] == "pass 2 of 2 (planted)" and facts["seed"] == 3


def test_missing_result_is_a_miss() -> None:
    @dataclass(frozen=True)
    class DropOutput(Pass):
        """Loses an output."""

        def run(self, graph: Graph, ctx: PassContext) -> Graph:
            return dataclasses.replace(graph, outputs=graph.outputs[:1])

    graph = parse("graph @g {\n input %x: f32[B]\n %y = exp(%x) : f32[B]\n return %y, %x\n}")
    with pytest.raises(PassError, match="changes the number of results"):
        run_pipeline(graph, (DropOutput(),), PassContext(), check=NumericCheck())


def _run(pass_: Pass, graph: Graph) -> PassRun:
    return PassRun((pass_,), 0, graph, pass_.run(graph, PassContext()), 0.0)


def test_error_is_zero_for_equal_bits() -> None:
    graph = parse(STEP)
    for pass_ in (Cse(), *parse_pipeline("canonicalize,interleave-weights{block=4},dce")):
        assert NumericCheck({"L": 7}).error(_run(pass_, graph), PassContext()) == 0.0


@pytest.mark.parametrize("fault", FAULTS)
def test_error_of_a_planted_fault_is_above_zero(fault: str) -> None:
    assert NumericCheck({"L": 7}).error(_run(Planted(fault), parse(STEP)), PassContext()) > 0


def test_error_is_the_relative_error_of_the_worst_result() -> None:
    found = NumericCheck().error(_run(Nudge(1e-3), parse(STEP)), PassContext())
    assert found == pytest.approx(1e-3, rel=1e-3)


def test_error_knows_the_sign_of_zero() -> None:
    before, after = (
        parse(f"graph @g {{\n %z = full() {{value={zero}, dtype=f32}} : f32[]\n return %z\n}}")
        for zero in ("0.0", "-0.0")
    )
    run = PassRun((Cse(),), 0, before, after, 0.0)
    assert 0 < NumericCheck().error(run, PassContext()) < 1e-300


def test_error_of_another_number_of_results_is_infinite() -> None:
    graph = parse("graph @g {\n input %x: f32[B]\n %y = exp(%x) : f32[B]\n return %y, %x\n}")
    fewer = dataclasses.replace(graph, outputs=graph.outputs[:1])
    for before, after in ((graph, fewer), (fewer, graph)):
        run = PassRun((Dce(),), 0, before, after, 0.0)
        assert NumericCheck().error(run, PassContext()) == float("inf")


def test_same_bits_knows_nan_and_signed_zero() -> None:
    nan, zero = float("nan"), torch.tensor([0.0])
    assert same_bits(torch.tensor([nan, 1.0]), torch.tensor([-nan, 1.0]))
    assert not same_bits(torch.tensor([nan, 1.0]), torch.tensor([1.0, nan]))
    assert not same_bits(zero, -zero)
    assert not same_bits(zero, zero.double())
    assert same_bits(torch.tensor([3, 4]), torch.tensor([3, 4]))


def test_relative_error_of_special_values() -> None:
    inf, nan = float("inf"), float("nan")
    a = torch.tensor([1.0, inf, nan])
    assert relative_error(a, a) == 0
    assert relative_error(torch.tensor([1.0, -inf, nan]), a) == inf
    assert relative_error(torch.tensor([1.0, inf, 2.0]), a) == inf
    assert relative_error(torch.tensor([nan, inf, nan]), a) == inf
    assert relative_error(torch.tensor([1.5, inf, nan]), a) == 0.5
    assert relative_error(torch.tensor([1e-30]), torch.tensor([0.0])) == inf
    assert relative_error(torch.tensor([1, 2]), torch.tensor([1, 3])) == inf
