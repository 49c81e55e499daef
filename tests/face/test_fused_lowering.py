"""The regions that presets make are carried out whole, in as few launches as they should be, whatever ops they hold."""

import functools
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from nemoc import compiler
from nemoc.codegen.lower import corner_sizes, lower_program
from nemoc.codegen.plan import Plan, RegionError, Site, StepFunction
from nemoc.codegen.storage import bind_weights, weight_layout
from nemoc.codegen.tvm.emit import emit, expanded
from nemoc.codegen.tvm.target import cpu_target
from nemoc.ir import Builder, Env, Graph, Op, Value, ops
from nemoc.ir.ops.elementwise import Unary
from nemoc.ir.region import Fused
from nemoc.ir.rewrite import Replacement, Rewriter, Rule, rewrite
from nemoc.models import Model
from nemoc.passes import Effect, Pass, PassContext, preset
from support.models import shortened

TARGET = cpu_target("cpu:x86-64-v3")
FUNCTIONS = ("prefill", "decode")
PUBLISHED = ("nano", "super", "nemotron-h-8b")


def lowered(
    name: str | Model, quantize: str | None = None
) -> tuple[dict[str, Graph], dict[str, StepFunction], list[str]]:
    """A model's graphs and step functions by name, and the regions that no kernel takes as a whole."""
    refused: list[str] = []

    def note(site: Site) -> Plan:
        try:
            return emit(site, TARGET)
        except RegionError as error:
            kind = site.op.kind if isinstance(site.op, Fused) else site.op.mnemonic()
            refused.append(f"{kind}: {error}")
            raise

    graphs, weights = bind_weights(
        compiler.functions(name, "cpu", quantize=quantize, which=FUNCTIONS).graphs
    )
    corners = corner_sizes(1, 512, 4096)
    program = lower_program(expanded(graphs), weight_layout(weights), corners, note)
    return dict(graphs), {f.name: f for f in program.functions}, refused


@pytest.mark.parametrize(
    "source",
    [
        "sample",
        *(shortened(name) for name in PUBLISHED),
        *(pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED),
    ],
    ids=["sample", *(f"{name}, shortened" for name in PUBLISHED), *PUBLISHED],
)
def test_no_region_of_a_model_falls_back_to_its_ops(source: str | Model) -> None:
    _, _, refused = lowered(source)
    assert not refused


@pytest.mark.parametrize("quantize", ["fp8", "nvfp4"])
def test_a_quantized_model_takes_no_more_launches(quantize: str) -> None:
    _, plain, _ = lowered("sample")
    _, steps, refused = lowered("sample", quantize)
    assert not refused
    assert {n: len(s.launches) for n, s in steps.items()} == {
        n: len(s.launches) for n, s in plain.items()
    }


def test_a_mamba_layer_is_three_launches_and_an_expert_layer_four_phases() -> None:
    graphs, steps, _ = lowered("mid")
    kinds = Counter(n.op.kind for n in graphs["decode"].nodes if isinstance(n.op, Fused))
    assert kinds["conv-scan"] == kinds["router"] == kinds["experts"] == kinds["combine"] == 7
    # Embedding and head, 7 Mamba layers of 3, 7 expert layers of 3 and 2 attention layers of 4 phases.
    assert len(steps["decode"].phases) == 2 + 7 * 3 + 7 * 3 + 2 * 4
    # Sorting all tokens' choices is a launch of its own; attention is one launch where there are many tokens.
    assert len(steps["prefill"].phases) == 2 + 7 * 3 + 7 * 4 + 2 * 3


@dataclass(frozen=True)
class Bend(Unary):
    """x · tanh(0.7306 · x), an activation of this file alone."""

    def evaluate(self, env: Env, x: torch.Tensor) -> torch.Tensor:
        return x * torch.tanh(0.7306 * x)

    def expand(self, build: Builder) -> Value:
        return build(ops.Mul(self.x, build(ops.Tanh(build(ops.Scale(self.x, 0.7306))))))


@dataclass(frozen=True)
class BendIt(Pass):
    """Put the invented activation into the place of every silu and square."""

    effect: ClassVar[Effect] = Effect.PRECISION

    def run(self, graph: Graph, ctx: PassContext) -> Graph:
        def bend(op: Op, rewriter: Rewriter) -> Replacement:
            assert isinstance(op, ops.Silu | ops.Square)
            return rewriter(Bend(op.x))

        return rewrite(graph, (Rule("bend", (ops.Silu, ops.Square), bend),))


def test_an_invented_op_is_fused_into_every_kernel_that_it_stands_in() -> None:
    plain = preset("cpu", "prefill")
    found = []
    for passes in (plain, (BendIt(), *plain)):
        graphs, weights = bind_weights(
            compiler.functions("sample", "cpu", passes, which=("prefill",)).graphs
        )
        emit_here = functools.partial(emit, target=TARGET)
        corners = corner_sizes(1, 512, 4096)
        program = lower_program(expanded(graphs), weight_layout(weights), corners, emit_here)
        (step,) = program.functions
        with_op = {
            n.kernel.name.rpartition("_")[0] for n in step.launches if "0.7306" in n.kernel.source
        }
        found.append((len(step.launches), len(step.phases), with_op))
    (launches, phases, without), (launches_now, phases_now, stems) = found
    assert (launches_now, phases_now) == (launches, phases)
    assert not without
    assert stems == {"conv_scan", "fused_linear"}
