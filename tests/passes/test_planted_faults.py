"""Ten faults that fusions could have, each planted in a pass: the check names them, and the bisect finds the change."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from nemoc.ir import DType, Graph, Op, Value, ops
from nemoc.ir.graph import Node
from nemoc.ir.rewrite import Replacement, Rewriter, Rule, rewrite
from nemoc.models import RandomSource, build_step
from nemoc.passes import Effect, Pass, PassContext, Remark, run_pipeline
from nemoc.passes.bisect import Bisect, CulpritFound
from nemoc.passes.check import CheckError, NumericCheck
from nemoc.passes.cse import Cse
from nemoc.passes.dce import Dce
from support.models import SMALL

PRODUCTS = 23
WEIGHTS = {"random tensors": None, "random model": RandomSource(SMALL, 0, DType.BF16)}


@dataclass(frozen=True)
class Fault:
    """A change that is wrong.

    Attributes:
        root: the op that is replaced.
        value: the first result of the one where that happens.
        change: what takes its place.
        diverges: the first value that the check has to name.
    """

    root: type[Op]
    value: str
    change: Callable[[Any, Rewriter], Replacement]
    diverges: str


def _wrong_group(op: ops.SsdScan, rewriter: Rewriter) -> Replacement:
    """Head h reads group h mod G instead of h // (H / G)."""
    times = op.x.shape[2] // op.b.shape[2]
    b, c = (rewriter(ops.Concat((v,) * times, 2)) for v in (op.b, op.c))
    return rewriter.all(dataclasses.replace(op, b=b, c=c))


def _norm_before_gate(op: ops.RmsNorm, rewriter: Rewriter) -> Replacement:
    gated = rewriter.producer(op.x)
    if not isinstance(gated, ops.Mul):
        return None
    return rewriter(ops.Mul(rewriter(dataclasses.replace(op, x=gated.a)), gated.b))


def _one_token_less(valid: Value, rewriter: Rewriter) -> Value:
    one = rewriter(ops.Full(1.0, DType.I32, valid.shape))
    return rewriter(ops.Sub(valid, one))


def _state_one_token_early(op: Any, rewriter: Rewriter) -> Replacement:
    """The state forgets the last valid token; the other result is right."""
    early = dataclasses.replace(op, valid=_one_token_less(op.valid, rewriter))
    return rewriter.all(op)[0], rewriter.all(early)[1]


def _unbiased_selection(op: ops.TopK, rewriter: Rewriter) -> Replacement:
    limited = rewriter.producer(op.x)
    if not isinstance(limited, ops.GroupLimit):
        return None
    biased = rewriter.producer(limited.x)
    if not isinstance(biased, ops.Add):
        return None
    scores = rewriter(dataclasses.replace(limited, x=biased.a))
    return rewriter(dataclasses.replace(op, x=scores))


def _stale_cache(op: ops.Attention, rewriter: Rewriter) -> Replacement:
    k, v = rewriter.producer(op.k), rewriter.producer(op.v)
    if not (isinstance(k, ops.CacheWrite) and isinstance(v, ops.CacheWrite)):
        return None
    return rewriter(dataclasses.replace(op, k=k.cache, v=v.cache))


def _order_for_position(op: ops.TakeRows, rewriter: Rewriter) -> Replacement:
    grouped = rewriter.producer(op.index)
    if not isinstance(grouped, ops.GroupBy):
        return None
    order, *_ = rewriter.all(grouped)
    return rewriter(dataclasses.replace(op, index=order))


FAULTS = {
    "wrong head-to-group map": Fault(
        ops.SsdScan, "layers.3.scanned", _wrong_group, "layers.3.scanned (ssd_scan"
    ),
    "swapped gate and norm": Fault(
        ops.RmsNorm, "layers.3.mixer.norm.out", _norm_before_gate, "layers.3.mixer.norm.out (mul"
    ),
    "off-by-one conv state": Fault(
        ops.CausalConv,
        "layers.3.convolved",
        _state_one_token_early,
        "layers.3.conv.next (causal_conv",
    ),
    "dropped D": Fault(
        ops.SsdScan,
        "layers.3.scanned",
        lambda op, rewriter: rewriter.all(dataclasses.replace(op, d=None)),
        "layers.3.scanned (ssd_scan",
    ),
    "unbiased selection": Fault(
        ops.TopK, "layers.4.chosen", _unbiased_selection, "layers.4.chosen (top_k"
    ),
    "unnormalised weights": Fault(
        ops.Div,
        "layers.4.weights.normed",
        lambda op, rewriter: op.a,
        "layers.4.weights.scaled (scale",
    ),
    "lost last chunk": Fault(
        ops.SsdScan,
        "layers.3.scanned",
        _state_one_token_early,
        "layers.3.ssm.next (ssd_scan",
    ),
    "stale KV": Fault(
        ops.Attention, "layers.5.attended", _stale_cache, "layers.5.attended (attention"
    ),
    "double activation": Fault(
        ops.Silu,
        "layers.3.silu",
        lambda op, rewriter: rewriter(ops.Silu(rewriter(op))),
        "layers.3.silu (silu",
    ),
    "broken permutation": Fault(
        ops.TakeRows, "layers.4.slots", _order_for_position, "layers.4.slots (take_rows"
    ),
}
NONE = Fault(Op, "", lambda op, rewriter: None, "")


@dataclass(frozen=True)
class Planted(Pass):
    """Changes every product in a way that keeps all bits, and one op in a way that does not."""

    effect: ClassVar[Effect] = Effect.REORDERS

    fault: str = "none"

    def run(self, graph: Graph, ctx: PassContext) -> Graph:
        fault = FAULTS.get(self.fault, NONE)
        wrong = Rule("wrong", fault.root, fault.change)
        done: list[Node] = []

        def allowed(rule: Rule, node: Node) -> bool:
            value = node.results[0].name
            if rule is wrong and (done or value != fault.value):
                return False
            allows = ctx.allows(Remark(self.name, f"{graph.name}/%{value}", rule.name))
            if allows and rule is wrong:
                done.append(node)
            return allows

        return rewrite(graph, (wrong, INNOCENT), on_apply=allowed)


def _times_one(op: ops.Linear, rewriter: Rewriter) -> Replacement:
    if isinstance(rewriter.producer(op.x), ops.Scale):
        return None
    return rewriter(dataclasses.replace(op, x=rewriter(ops.Scale(op.x, 1.0))))


INNOCENT = Rule("innocent", ops.Linear, _times_one)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("fault", FAULTS)
def test_check_names_the_pass_and_the_first_value(fault: str, weights: str) -> None:
    ctx = PassContext(parameters=WEIGHTS[weights])
    with pytest.raises(CheckError) as caught:
        run_pipeline(build_step(SMALL), (Cse(), Planted(fault), Dce()), ctx, check=NumericCheck())
    message = str(caught.value)
    assert message.startswith("pass 2 of 3 (planted) declares reorders but changes ")
    assert f"the first value that diverges is %{FAULTS[fault].diverges}, error " in message
    assert "\n" not in message


@pytest.mark.parametrize("fault", FAULTS)
def test_bisect_finds_the_change_among_innocent_ones(fault: str) -> None:
    passes = (Cse(), Planted(fault), Dce())
    with pytest.raises(CulpritFound) as caught:
        run_pipeline(build_step(SMALL), passes, PassContext(), check=Bisect())
    culprit = caught.value.culprit
    site = f"step/%{FAULTS[fault].value}"
    assert culprit.remark == Remark("planted", site, "wrong")
    assert culprit.change.endswith(f" of {PRODUCTS + 1} ({site}: wrong)")
    before, after = culprit.run.before, culprit.run.after
    assert abs(len(after.nodes) - len(before.nodes)) <= 4  # one change apart
    assert FAULTS[fault].diverges in culprit.divergence.first


def test_without_a_fault_the_pass_keeps_its_word() -> None:
    ctx = PassContext()
    run_pipeline(build_step(SMALL), (Planted(),), ctx, check=Bisect())
    assert len(ctx.changes) == PRODUCTS
