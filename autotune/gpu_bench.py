"""Candidates for a GPU: compiled in child processes, and their times predicted where it is not at hand.

What does not fit the GPU is out, and so is what spills more registers than the default.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from nemoc.autotune.gpu_model import plan_seconds
from nemoc.codegen.bench import Finding
from nemoc.codegen.plan import Arg, Plan, Site, Stage
from nemoc.codegen.triton.binary import Binary
from nemoc.codegen.triton.build import Variant
from nemoc.codegen.triton.target import GpuTarget
from nemoc.codegen.triton.writer import GpuKernel
from nemoc.ir.dims import evaluate_dim
from nemoc.ir.errors import NemocError

Compile = Callable[[Sequence[Variant]], Mapping[Variant, Binary | NemocError]]
"""Compiles kernels, several at once; what is wrong with one takes its place."""


class Compiled:
    """Kernels that were compiled, so that none is twice.

    Args:
        compile: what compiles them.
    """

    def __init__(self, compile: Compile) -> None:
        self._compile = compile
        self._known: dict[Variant, Binary | NemocError] = {}

    def get(self, variants: Iterable[Variant]) -> list[Binary | NemocError]:
        """The code of each, or what is wrong with it."""
        wanted = tuple(variants)
        if missing := [v for v in dict.fromkeys(wanted) if v not in self._known]:
            self._known.update(self._compile(missing))
        return [self._known[v] for v in wanted]


@dataclass(frozen=True)
class CompiledBench:
    """What benches for one kernel of a GPU have in common: candidates are compiled, here or wherever Triton is.

    Attributes:
        site: the op and its views.
        default: its plan where nothing is tuned.
        aligned: tensors that begin at multiples of 16 bytes in the model; scratch does.
        sizes: B, L and C.
        target: the GPU.
        compiled: where code is taken from.
    """

    site: Site
    default: Plan
    aligned: Mapping[Arg, bool]
    sizes: Mapping[str, int]
    target: GpuTarget
    compiled: Compiled

    def variants(self, plan: Plan) -> list[Variant]:
        """A plan's kernels as the model would launch them."""
        return [_variant(stage, self.aligned) for stage in plan.stages]

    def compile(self, plans: Sequence[Plan]) -> dict[str, Finding]:
        """Compile plans; what is wrong with those that fail, by name."""
        self.compiled.get(v for plan in (self.default, *plans) for v in self.variants(plan))
        most = sum(b.report.spilled for b in self.binaries(self.default))
        found = {plan.name: self._fault(plan, most) for plan in plans}
        return {name: Finding("compile", message=fault) for name, fault in found.items() if fault}

    def seconds(self, plan: Plan) -> float:
        """Predicted seconds of a plan that compiles."""
        return plan_seconds(self.site, plan, self.binaries(plan), self.target, self.sizes)

    def runs(self, plan: Plan) -> tuple[str, ...]:
        """The kernels of a plan that have programs at these sizes: of several forms there may be, one does."""
        kernels = (stage.kernel for stage in plan.stages)
        return tuple(k.name for k in kernels if evaluate_dim(k.tasks, self.sizes))

    def binaries(self, plan: Plan) -> list[Binary]:
        """The code of a plan's stages, as far as they compile."""
        return [b for b in self.compiled.get(self.variants(plan)) if isinstance(b, Binary)]

    def _fault(self, plan: Plan, most: int) -> str:
        """What is wrong with a plan, one line; empty if nothing is."""
        outcomes = self.compiled.get(self.variants(plan))
        for outcome in outcomes:
            if isinstance(outcome, NemocError):
                return str(outcome)
        spilled = sum(b.report.spilled for b in outcomes if isinstance(b, Binary))
        if spilled > most:
            return f"spills {spilled} bytes of a thread, expected at most the default's {most}"
        return ""


class PredictedBench(CompiledBench):
    """A `Bench` for one kernel of an absent GPU: nothing runs."""

    def check(self, plan: Plan) -> Finding:
        """Nothing: that it has the default's bits is for its lowering to say."""
        return Finding("ok", equal=True)

    def time(self, plans: Sequence[Plan], rounds: int, seed: int) -> list[list[float]] | Finding:
        """Predicted seconds, the same in each round."""
        return [[self.seconds(plan)] * rounds for plan in plans]


def _variant(stage: Stage, aligned: Mapping[Arg, bool]) -> Variant:
    kernel = stage.kernel
    assert isinstance(kernel, GpuKernel)
    return Variant(kernel, tuple(aligned.get(a, a.kind == "scratch") for a in stage.args))
