"""Every registered pass keeps what the interpreter computes, on random graphs."""

import pytest
from hypothesis import given

from nemoc.ir import Graph, interpret, parse, verify
from nemoc.ir.sample_inputs import sample_arguments
from nemoc.passes import PASSES, Effect, Pass, PassContext, TargetInfo, preset, run_pipeline
from nemoc.passes.check import NumericCheck, relative_error, same_bits
from nemoc.passes.interleave_weights import InterleaveWeights
from support.graphs import SIZES, graphs

CONTEXT = PassContext(TargetInfo("cpu", linear_interleave=4))
CONFIGURATIONS = [*(cls() for cls in PASSES), InterleaveWeights(block=5)]


@pytest.mark.parametrize("pass_", CONFIGURATIONS, ids=lambda p: p.name)
@given(graph=graphs())
def test_pass_keeps_the_results(pass_: Pass, graph: Graph) -> None:
    after = pass_.run(graph, CONTEXT)
    verify(after)
    assert parse(str(after)) == after
    assumed = pass_.assumes(graph)
    arguments = sample_arguments(graph, {**SIZES, **assumed.sizes})
    for name, value in assumed.inputs.items():
        arguments[name].fill_(value)
    # What reorders sums is compared in float64: random graphs may cancel, and models do not.
    exact = pass_.effect is Effect.EXACT
    old = interpret(graph, arguments, float64=not exact)
    new = interpret(after, arguments, float64=not exact)
    assert new.states.keys() == old.states.keys()
    pairs = [*zip(new.outputs, old.outputs, strict=True)]
    pairs += [(new.states[name], old.states[name]) for name in old.states]
    for a, b in pairs:
        if pass_.effect is Effect.PRECISION:  # a budget is for models, which do not cancel
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
        else:
            assert same_bits(a, b) if exact else relative_error(a, b) < 1e-9


@pytest.mark.parametrize("pass_", CONFIGURATIONS, ids=lambda p: p.name)
@given(graph=graphs())
def test_pass_comes_to_rest(pass_: Pass, graph: Graph) -> None:
    once = pass_.run(graph, CONTEXT)
    assert pass_.run(once, CONTEXT) is once
    if once == graph:
        assert once is graph


@pytest.mark.parametrize("kind", ["reference", "cpu"])
@given(graph=graphs())
def test_prefill_preset_is_exact(kind: str, graph: Graph) -> None:
    after = run_pipeline(graph, preset(kind, "prefill"), CONTEXT, check=NumericCheck(SIZES))
    assert not {v for v in after.values() if v not in after.uses} - {
        *after.inputs,
        *after.states,
        *after.results,
        *(v for node in after.nodes if len(node.results) > 1 for v in node.results),
    }
