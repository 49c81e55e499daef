"""Holding a pass to its word: the graph before and after, interpreted on the same arguments."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch

from nemoc.ir.graph import Graph, Node
from nemoc.ir.interpreter import StepResult, interpret
from nemoc.ir.params import LazyArguments
from nemoc.ir.sample_inputs import sample_arguments
from nemoc.passes.context import PassContext
from nemoc.passes.pipeline import PassError, PassRun


class CheckError(PassError):
    """A pass changed numbers that it declared it would not; the message names the pass, its position
    and the first value that diverged."""


@dataclass(frozen=True)
class NumericCheck:
    """The check that `run_pipeline` is handed: `run_pipeline(..., check=NumericCheck())`.

    Both graphs run in the interpreter on the same random inputs and states, with weights from the context's
    parameter source or random ones. `exact` means equal bits (any NaN equals any NaN), the other effects a relative
    error ‖after − before‖ / ‖before‖ within the pass's budget, for every output and next state.

    Attributes:
        sizes: the integer behind each dimension symbol; see `sample_arguments` for the others.
        seed: of the random tensors.
        reproducer: a folder to write to when a pass fails: both graphs, pipeline, arguments.
    """

    sizes: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0
    reproducer: Path | None = None

    def __call__(self, run: PassRun, ctx: PassContext) -> None:
        """Check one pass.

        Raises:
            CheckError: the pass broke its word.
        """
        arguments, before, after = self._run(run, ctx)
        missed = _first_miss(run, before, after)
        if missed is None:
            return
        budget = run.pass_.error_budget()
        first = _first_divergence(run, arguments, ctx, budget) or missed
        allowed = "equal bits" if budget == 0 else f"at most {budget:g}"
        where = "" if self.reproducer is None else f"; see {self.reproducer}"
        if self.reproducer is not None:
            self._write_reproducer(self.reproducer, run, ctx, arguments)
        raise CheckError(
            f"{run.place} declares {run.pass_.effect.value} but changes {missed}, expected {allowed}; "
            f"the first value that diverges is {first}; "
            f"reproduce with --pipeline '{run.reproduces}'{where}"
        )

    def error(self, run: PassRun, ctx: PassContext) -> float:
        """The largest relative error of any result; 0 when all have the same bits."""
        _, before, after = self._run(run, ctx)
        if len(after.outputs) != len(before.outputs) or after.states.keys() != before.states.keys():
            return math.inf
        pairs = zip(
            (*after.outputs, *(after.states[name] for name in before.states)),
            (*before.outputs, *before.states.values()),
            strict=True,
        )
        return max((0.0 if same_bits(a, b) else _distinct(a, b) for a, b in pairs), default=0.0)

    def _run(
        self, run: PassRun, ctx: PassContext
    ) -> tuple[dict[str, torch.Tensor], StepResult, StepResult]:
        """The arguments, and what the graphs before and after make of them."""
        arguments = self._arguments(run, ctx)
        before = interpret(run.before, _complete(run.before, arguments, ctx))
        after = interpret(run.after, _complete(run.after, arguments, ctx))
        return arguments, before, after

    def _arguments(self, run: PassRun, ctx: PassContext) -> dict[str, torch.Tensor]:
        """What both graphs run on, the parameters only when the context has none."""
        assumed = run.pass_.assumes(run.before)
        sizes = {**self.sizes, **assumed.sizes}
        arguments = sample_arguments(run.before, sizes, self.seed, params=ctx.parameters is None)
        for name, value in assumed.inputs.items():
            arguments[name] = torch.full_like(arguments[name], value)
        return arguments

    def _write_reproducer(
        self, folder: Path, run: PassRun, ctx: PassContext, arguments: dict[str, torch.Tensor]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "before.ir").write_text(str(run.before))
        (folder / "after.ir").write_text(str(run.after))
        (folder / "pipeline.txt").write_text(f"{run.reproduces}\n")
        dense = {name: tensor.contiguous() for name, tensor in arguments.items()}
        safetensors.torch.save_file(dense, folder / "arguments.safetensors")
        facts = {
            "pass": run.pass_.name,
            "position": run.position,
            "effect": run.pass_.effect.value,
            "seed": self.seed,
            "parameters": "arguments.safetensors" if ctx.parameters is None else "the checkpoint's",
        }
        (folder / "check.json").write_text(json.dumps(facts, indent=2) + "\n")


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in float64; infinite where infinities or NaN do not coincide.

    Integers and booleans have error 0 when equal and infinite otherwise.
    """
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return math.inf
    if not found.is_floating_point():
        return 0.0 if torch.equal(found, expected) else math.inf
    a, b = found.double(), expected.double()
    finite = b.isfinite()
    special = torch.where(finite, 0.0, b)
    if not torch.allclose(torch.where(finite, 0.0, a), special, 0.0, 0.0, equal_nan=True):
        return math.inf
    error = torch.linalg.vector_norm((a - b)[finite])
    norm = torch.linalg.vector_norm(b[finite])
    if error == 0:
        return 0.0
    return float(error / norm) if norm > 0 and error.isfinite() else math.inf


def _distinct(a: torch.Tensor, b: torch.Tensor) -> float:
    """The relative error of tensors whose bits differ, which is above 0 even between -0 and 0."""
    return max(relative_error(a, b), 5e-324)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether type, shape and every bit agree; any NaN equals any NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    equal = a.contiguous().view(bits) == b.contiguous().view(bits)
    return bool((equal | (a.isnan() & b.isnan())).all())


def _complete(
    graph: Graph, arguments: dict[str, torch.Tensor], ctx: PassContext
) -> Mapping[str, torch.Tensor]:
    return arguments if ctx.parameters is None else LazyArguments(graph, ctx.parameters, arguments)


def _named(graph: Graph, result: StepResult) -> dict[str, torch.Tensor]:
    outputs = {
        f"output {i} (%{v.name})": t
        for i, (v, t) in enumerate(zip(graph.outputs, result.outputs, strict=True))
    }
    return outputs | {f"state %{name}": tensor for name, tensor in result.states.items()}


def _first_miss(run: PassRun, before: StepResult, after: StepResult) -> str | None:
    """The first result beyond the budget with its error, in words."""
    if len(after.outputs) != len(before.outputs) or after.states.keys() != before.states.keys():
        return "the number of results"
    found = [*after.outputs, *(after.states[name] for name in before.states)]
    budget = run.pass_.error_budget()
    for (name, expected), tensor in zip(_named(run.before, before).items(), found, strict=True):
        if _diverges(tensor, expected, budget):
            return f"{name} by {relative_error(tensor, expected):.3g}"
    return None


def _diverges(found: torch.Tensor, expected: torch.Tensor, budget: float) -> bool:
    if budget == 0:
        return not same_bits(found, expected)
    return relative_error(found, expected) > budget


def _first_divergence(
    run: PassRun, arguments: dict[str, torch.Tensor], ctx: PassContext, budget: float
) -> str | None:
    """The first value of the new graph that has a namesake of its type in the old one and differs from it."""
    old = {v.name: v for v in run.before.values()}
    wanted: dict[str, torch.Tensor] = {}
    found: list[str] = []

    def keep(node: Node, results: tuple[torch.Tensor, ...]) -> None:
        wanted.update(zip((v.name for v in node.results), results, strict=True))

    def compare(node: Node, results: tuple[torch.Tensor, ...]) -> None:
        for value, tensor in zip(node.results, results, strict=True):
            expected = wanted.get(value.name)
            if expected is None or old[value.name].dtype is not value.dtype:
                continue
            if tensor.shape == expected.shape and _diverges(tensor, expected, budget):
                error = relative_error(tensor, expected)
                found.append(f"%{value.name} ({node.op.mnemonic()}, error {error:.3g})")

    interpret(run.before, _complete(run.before, arguments, ctx), observe=keep)
    interpret(run.after, _complete(run.after, arguments, ctx), observe=compare)
    return found[0] if found else None
