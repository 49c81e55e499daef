"""Passes stop after any number of changes, halving finds the guilty one, and reproducers replay it or refuse."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemoc.ir import DType, Graph, NemocError, interpret, ops, parse, verify
from nemoc.ir.rewrite import Replacement, Rewriter, Rule, rewrite
from nemoc.ir.sample_inputs import sample_arguments
from nemoc.models import build_step
from nemoc.passes import (
    PASSES,
    Effect,
    Pass,
    PassContext,
    PassError,
    Remark,
    TargetInfo,
    run_pipeline,
)
from nemoc.passes.bisect import Bisect, Culprit, CulpritFound
from nemoc.passes.check import relative_error, replay, same_bits
from nemoc.passes.dce import Dce
from nemoc.passes.reproducer import FACTS, is_reproducer, read_reproducer
from support.graphs import SIZES, graphs
from support.models import SMALL

TARGET = TargetInfo("cpu", linear_interleave=4)

CHAIN = """graph @chain {
  input %x: f32[B, 4]
  param %w: f32[4]

  %a = scale(%x) {factor=2.0} : f32[B, 4]
  %b = scale(%a) {factor=3.0} : f32[B, 4]
  %c = mul(%b, %w) : f32[B, 4]
  %d = scale(%c) {factor=4.0} : f32[B, 4]
  %e = scale(%d) {factor=5.0} : f32[B, 4]
  return %e
}
"""


@dataclass(frozen=True)
class Rescale(Pass):
    """Makes each factor a little larger, and asks before each change if it is to."""

    effect = Effect.REORDERS

    error: float = 1e-3
    asks: bool = True
    from_factor: float = 4.0

    def run(self, graph: Graph, ctx: PassContext) -> Graph:
        def rescale(op: ops.Scale, rewriter: Rewriter) -> Replacement:
            if op.factor not in (2.0, 3.0, 4.0, 5.0):
                return None
            wrong = 1 + self.error if op.factor >= self.from_factor else 1
            return rewriter(dataclasses.replace(op, factor=op.factor * wrong + (wrong == 1) * 1e-9))

        return rewrite(
            graph,
            (Rule("rescale", ops.Scale, rescale),),
            on_apply=lambda rule, node: (
                not self.asks
                or ctx.allows(Remark(self.name, f"chain/%{node.results[0].name}", rule.name))
            ),
        )


def _culprit(*passes: Pass) -> Culprit:
    with pytest.raises(CulpritFound) as caught:
        run_pipeline(parse(CHAIN), passes, PassContext(), check=Bisect())
    assert "\n" not in str(caught.value)
    assert caught.value.culprit.change in str(caught.value)
    return caught.value.culprit


def _all_changes(pass_: Pass, graph: Graph) -> int:
    ctx = PassContext(TARGET)
    pass_.run(graph, ctx)
    return len(ctx.changes)


@pytest.mark.parametrize("pass_", [cls() for cls in PASSES], ids=lambda p: p.name)
@settings(max_examples=40)
@given(data=st.data(), graph=graphs())
def test_stopped_pass_keeps_the_results(pass_: Pass, data: st.DataObject, graph: Graph) -> None:
    limit = data.draw(st.integers(0, _all_changes(pass_, graph)))
    ctx = PassContext(TARGET, limit=limit)
    after = pass_.run(graph, ctx)
    verify(after)
    assert len(ctx.changes) == limit
    assumed = pass_.assumes(graph)
    arguments = sample_arguments(graph, {**SIZES, **assumed.sizes})
    for name, value in assumed.inputs.items():
        arguments[name].fill_(value)
    exact = pass_.effect is Effect.EXACT
    old = interpret(graph, arguments, float64=not exact)
    new = interpret(after, arguments, float64=not exact)
    for a, b in zip(
        (*new.outputs, *new.states.values()), (*old.outputs, *old.states.values()), strict=True
    ):
        if pass_.effect is Effect.PRECISION:  # a budget is for models, which do not cancel
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
        else:
            assert same_bits(a, b) if exact else relative_error(a, b) < 1e-9


@pytest.mark.parametrize("pass_", [cls() for cls in PASSES], ids=lambda p: p.name)
def test_each_change_of_a_pass_counts_on_a_model(pass_: Pass) -> None:
    graph = build_step(SMALL)
    total = _all_changes(pass_, graph)
    assert pass_.run(graph, PassContext(TARGET, limit=0)) is graph or total == 0
    if total:
        half, more = (PassContext(TARGET, limit=k) for k in (total // 2, total // 2 + 1))
        assert pass_.run(graph, half) != pass_.run(graph, more)
        assert more.changes[:-1] == half.changes


def test_first_wrong_change_is_found() -> None:
    culprit = _culprit(Dce(), Rescale())
    assert culprit.change == "change 3 of 4 (chain/%d: rescale)"
    assert culprit.divergence.first.startswith("%d (scale, error 0.001")
    assert culprit.run.place == "pass 2 of 2 (rescale)"


def test_change_before_and_after_differ_in_one_op() -> None:
    run = _culprit(Rescale()).run
    changed = [
        (old.op, new.op)
        for old, new in zip(run.before.nodes, run.after.nodes, strict=True)
        if old.op.attributes() != new.op.attributes()
    ]
    assert [(a.attributes(), b.attributes()) for a, b in changed] == [
        ({"factor": 4.0}, {"factor": pytest.approx(4.004)})
    ]


def test_errors_that_only_together_exceed_the_budget_are_told_as_such() -> None:
    culprit = _culprit(Rescale(error=4e-6, from_factor=2.0))
    assert culprit.change == "the changes up to 3 of 4 (chain/%d: rescale)"
    assert culprit.run.before == parse(CHAIN)


def test_pass_that_asks_for_nothing_is_named_as_a_whole() -> None:
    culprit = _culprit(Rescale(asks=False))
    assert (culprit.change, culprit.remark) == ("as a whole: it counts none", None)
    assert culprit.run.before == parse(CHAIN)


def test_pass_that_cannot_be_stopped_half_way_is_an_error() -> None:
    @dataclass(frozen=True)
    class Pair(Pass):
        """Two changes that need each other."""

        def run(self, graph: Graph, ctx: PassContext) -> Graph:
            changes = [ctx.allows(Remark(self.name, "chain/%a", "half")) for _ in range(3)]
            if not changes[0]:
                return graph
            if not changes[1]:
                raise NemocError("half is missing")
            nodes = graph.nodes[:-1]
            return dataclasses.replace(graph, nodes=nodes, outputs=(nodes[-1].results[0],))

    with pytest.raises(PassError, match=r"^pass 1 of 1 \(pair\): half is missing; reproduce"):
        run_pipeline(parse(CHAIN), (Pair(),), PassContext(), check=Bisect())


def test_pipeline_that_keeps_its_word_goes_through() -> None:
    graph = parse(CHAIN)
    found = run_pipeline(graph, (Rescale(error=0.0), Dce()), PassContext(), check=Bisect())
    assert found != graph


def test_refused_change_is_noted_and_not_counted() -> None:
    ctx = PassContext(limit=1)
    assert ctx.allows(Remark("p", "g/%a", "done", launches=2))
    ctx.refuses(Remark("p", "g/%b", "too wide"))
    assert not ctx.allows(Remark("p", "g/%c", "done"))
    assert [(r.site, r.refused) for r in ctx.remarks] == [("g/%a", False), ("g/%b", True)]
    assert ctx.changes == [ctx.remarks[0]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "reproducer"
    _culprit(Dce(), Rescale()).reproducer.save(found)
    return found


def test_reproducer_replays_without_the_pass(folder: Path) -> None:
    found = read_reproducer(folder)
    assert is_reproducer(folder)
    assert set(found.arguments) == {"x", "w"}
    assert found.pipeline == "dce,rescale"
    assert str(replay(found)) == found.verdict
    assert found.verdict.startswith("output 0 (%e) by 0.001, expected at most 1e-05; ")


def test_reproducer_of_a_mended_graph_passes(folder: Path) -> None:
    _replace(folder, "after.ir", (folder / "before.ir").read_bytes())
    assert replay(read_reproducer(folder)) is None


def _replace(folder: Path, name: str, content: bytes) -> None:
    """Replace a file and its digest, as who forges one does."""
    (folder / name).write_bytes(content)
    _set(folder, lambda facts: facts["files"].update({name: hashlib.sha256(content).hexdigest()}))


def _set(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    facts = json.loads((folder / FACTS).read_text())
    change(facts)
    (folder / FACTS).write_text(json.dumps(facts))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no graph": (lambda f: (f / "after.ir").unlink(), "after.ir: cannot be read: No such file"),
    "another graph": (
        lambda f: (f / "after.ir").write_text("graph @g {"),
        "after.ir: was altered: its SHA-256 is ",
    ),
    "no arguments": (lambda f: (f / "arguments.safetensors").unlink(), "cannot be read"),
    "half a graph": (lambda f: _replace(f, "before.ir", b"graph @g {"), "before.ir:1: "),
    "a graph that is no text": (
        lambda f: _replace(f, "before.ir", b"\xff\xfe"),
        "before.ir: is no text in UTF-8",
    ),
    "arguments that are no tensors": (
        lambda f: _replace(f, "arguments.safetensors", b"\x80\x04K\x01."),
        "arguments.safetensors: is no safetensors file: ",
    ),
    "facts that are no JSON": (lambda f: (f / FACTS).write_text("{"), "check.json: is not JSON"),
    "another format": (
        lambda f: _set(f, lambda d: d.update(format="x")),
        "check.json: field format is 'x', expected 'nemoc reproducer'",
    ),
    "a later version": (
        lambda f: _set(f, lambda d: d.update(version=2)),
        "check.json: field version is 2, expected 1",
    ),
    "no budget": (
        lambda f: _set(f, lambda d: d.pop("budget")),
        "check.json: field budget is missing, expected float",
    ),
    "a budget of another type": (
        lambda f: _set(f, lambda d: d.update(budget="1")),
        "check.json: field budget is '1', expected float",
    ),
    "a budget that allows anything": (
        lambda f: _set(f, lambda d: d.update(budget=float("inf"))),
        "check.json: field budget is inf, expected a number from 0 on",
    ),
    "no digest": (
        lambda f: _set(f, lambda d: d["files"].pop("after.ir")),
        "check.json: field files.after.ir is missing, expected str",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_reproducer_is_refused_in_one_line(folder: Path, damage: str) -> None:
    spoil, message = DAMAGE[damage]
    spoil(folder)
    with pytest.raises(NemocError) as caught:
        read_reproducer(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_index_beyond_its_table_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "reproducer"
    _culprit(Rescale()).reproducer.save(folder)
    text = (
        "graph @g {\n  input %x: i64[B] < 4\n  param %w: f32[4]\n\n"
        "  %y = take_rows(%w, %x) : f32[B]\n  return %y\n}\n"
    )
    for name in ("before.ir", "after.ir"):
        _replace(folder, name, text.encode())
    graph = parse(text)
    arguments = sample_arguments(graph)
    arguments["x"] = arguments["x"].fill_(9).to(DType.I64.torch)
    _replace(folder, "arguments.safetensors", safetensors.torch.save(arguments))
    with pytest.raises(NemocError, match="cannot be run on the arguments: IndexError"):
        replay(read_reproducer(folder))
