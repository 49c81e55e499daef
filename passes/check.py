"""Holding a pass to its word: the graph before and after, interpreted on the same arguments."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nemoc.ir.errors import NemocError
from nemoc.ir.graph import Graph, Node
from nemoc.ir.interpreter import StepResult, interpret
from nemoc.ir.params import LazyArguments
from nemoc.ir.sample_inputs import sample_arguments
from nemoc.passes.context import PassContext
from nemoc.passes.pipeline import PassError, PassRun
from nemoc.passes.reproducer import Reproducer

CHECK_SIZES = {"B": 2, "L": 7, "C": 24}
"""Small, and no multiple of any vector or block: tails are where kernels and passes go wrong."""


class CheckError(PassError):
    """A pass changed numbers that it declared it would not; the message names the pass, its position
    and the first value that diverged."""


@dataclass(frozen=True)
class Divergence:
    """Where two graphs part that should compute the same.

    Attributes:
        result: the first output or next state beyond the budget and its error, in words.
        first: the first value inside that diverges, in words.
        budget: the relative error that was allowed; 0 means equal bits.
    """

    result: str
    first: str
    budget: float

    @property
    def allowed(self) -> str:
        """The budget in words."""
        return "equal bits" if self.budget == 0 else f"at most {self.budget:g}"

    def __str__(self) -> str:
        return (
            f"{self.result}, expected {self.allowed}; the first value that diverges is {self.first}"
        )


@dataclass(frozen=True)
class NumericCheck:
    """The check that `run_pipeline` is handed: `run_pipeline(..., check=NumericCheck())`.

    Both graphs run in the interpreter on the same random inputs and states, with weights from the context's
    parameter source, read one by one, or random ones. `exact` means equal bits (any NaN equals any NaN), the other
    effects a relative error ‖after − before‖ / ‖before‖ within the pass's budget, for every output and next state.

    Attributes:
        sizes: the integer behind each dimension symbol; see `sample_arguments` for the others.
        seed: of the random tensors.
        reproducer: a folder to write to when a pass fails (`nemoc.passes.reproducer`).
    """

    sizes: Mapping[str, int] = field(default_factory=lambda: dict(CHECK_SIZES))
    seed: int = 0
    reproducer: Path | None = None

    def __call__(self, run: PassRun, ctx: PassContext) -> None:
        """Check one pass.

        Raises:
            CheckError: the pass broke its word.
        """
        found = self.divergence(run, ctx)
        if found is None:
            return
        where = "" if self.reproducer is None else f"; see {self.reproducer}"
        if self.reproducer is not None:
            self.reproduce(run, ctx, found).save(self.reproducer)
        raise CheckError(
            f"{run.place} declares {run.pass_.effect.value} but changes {found}; "
            f"reproduce with --pipeline '{run.reproduces}'{where}"
        )

    def divergence(self, run: PassRun, ctx: PassContext) -> Divergence | None:
        """How the pass broke its word; none when it kept it."""
        arguments = self._arguments(run, ctx)
        return divergence(run.before, run.after, arguments, run.pass_.error_budget())

    def error(self, run: PassRun, ctx: PassContext) -> float:
        """The largest relative error of any result; 0 when all have the same bits."""
        arguments = self._arguments(run, ctx)
        before, after = interpret(run.before, arguments), interpret(run.after, arguments)
        if len(after.outputs) != len(before.outputs) or after.states.keys() != before.states.keys():
            return math.inf
        pairs = zip(
            (*after.outputs, *(after.states[name] for name in before.states)),
            (*before.outputs, *before.states.values()),
            strict=True,
        )
        return max((0.0 if same_bits(a, b) else _distinct(a, b) for a, b in pairs), default=0.0)

    def reproduce(
        self, run: PassRun, ctx: PassContext, found: Divergence, change: str = ""
    ) -> Reproducer:
        """What shows a divergence again without the pass.

        Args:
            run, ctx, found: the pass and how it broke its word.
            change: the change that did it, in words.
        """
        return Reproducer(
            before=run.before,
            after=run.after,
            arguments=self._arguments(run, ctx),
            pipeline=run.reproduces,
            place=run.place,
            effect=run.pass_.effect.value,
            budget=run.pass_.error_budget(),
            seed=self.seed,
            change=change,
            verdict=str(found),
        )

    def _arguments(self, run: PassRun, ctx: PassContext) -> Mapping[str, torch.Tensor]:
        """What both graphs run on."""
        assumed = run.pass_.assumes(run.before)
        sizes = {**self.sizes, **assumed.sizes}
        arguments = sample_arguments(run.before, sizes, self.seed, params=ctx.parameters is None)
        for name, value in assumed.inputs.items():
            arguments[name] = torch.full_like(arguments[name], value)
        if ctx.parameters is None:
            return arguments
        return LazyArguments(run.before, ctx.parameters, arguments)


def divergence(
    before: Graph, after: Graph, arguments: Mapping[str, torch.Tensor], budget: float
) -> Divergence | None:
    """Where a graph parts from another that it should equal; none where it does not.

    Args:
        before: what is expected.
        after: what is held against it, on the same arguments or fewer.
        arguments: a tensor for each argument, by name.
        budget: the relative error allowed for each output and next state; 0 means equal bits.
    """
    old, new = interpret(before, arguments), interpret(after, arguments)
    result = _first_miss(before, old, new, budget)
    if result is None:
        return None
    return Divergence(result, _first_value(before, after, arguments, budget) or result, budget)


def replay(reproducer: Reproducer) -> Divergence | None:
    """Compare a reproducer's graphs again; none when they do not part any more.

    Raises:
        NemocError: the graphs cannot be run on its arguments.
    """
    before, after = reproducer.before, reproducer.after
    try:
        return divergence(before, after, reproducer.arguments, reproducer.budget)
    except (ArithmeticError, IndexError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        # The tensors are anybody's: an index beyond its table is found only by running.
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise NemocError(f"the graphs cannot be run on the arguments: {what}") from None


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


def _named(graph: Graph, result: StepResult) -> dict[str, torch.Tensor]:
    outputs = {
        f"output {i} (%{v.name})": t
        for i, (v, t) in enumerate(zip(graph.outputs, result.outputs, strict=True))
    }
    return outputs | {f"state %{name}": tensor for name, tensor in result.states.items()}


def _first_miss(graph: Graph, before: StepResult, after: StepResult, budget: float) -> str | None:
    """The first result beyond the budget with its error, in words."""
    if len(after.outputs) != len(before.outputs) or after.states.keys() != before.states.keys():
        return "the number of results"
    found = [*after.outputs, *(after.states[name] for name in before.states)]
    for (name, expected), tensor in zip(_named(graph, before).items(), found, strict=True):
        if _diverges(tensor, expected, budget):
            return f"{name} by {relative_error(tensor, expected):.3g}"
    return None


def _diverges(found: torch.Tensor, expected: torch.Tensor, budget: float) -> bool:
    if budget == 0:
        return not same_bits(found, expected)
    return not relative_error(found, expected) <= budget


def _first_value(
    before: Graph, after: Graph, arguments: Mapping[str, torch.Tensor], budget: float
) -> str | None:
    """The first value of the new graph that has a namesake of its type in the old one and differs from it."""
    old = {v.name: v for v in before.values()}
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

    interpret(before, arguments, observe=keep)
    interpret(after, arguments, observe=compare)
    return found[0] if found else None
