"""Tuning for a GPU that is not at hand: a model's kernels, and benches that predict their times."""

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from nemoc.autotune.gpu_bench import Compiled, PredictedBench
from nemoc.autotune.gpu_model import MODEL
from nemoc.autotune.tuner import Kernel
from nemoc.codegen.lower import Program, corner_sizes, lower_program
from nemoc.codegen.plan import Arg, Plan, Site
from nemoc.codegen.storage import bind_weights, weight_layout
from nemoc.codegen.triton.build import Variant, try_variants, variants_of
from nemoc.codegen.triton.emit import emit, expanded
from nemoc.codegen.triton.kernel_store import KernelStore
from nemoc.codegen.triton.target import gpu_target
from nemoc.compiler import Functions
from nemoc.options import read_options
from nemoc.progress import Progress
from nemoc.schedules import gpu_device

if TYPE_CHECKING:
    from nemoc.tuning import Workload


class GpuBenches:
    """Benches for the kernels of one model on a GPU that need not be there.

    Args:
        target: of which GPU.
        progress: told what is being compiled.

    Attributes:
        emit: plans of sites.
        device: the GPU, as records name it.
    """

    def __init__(self, target: str, progress: Progress | None = None) -> None:
        self._target = gpu_target(target)
        store = KernelStore(read_options().cache / "kernels")
        self._compiled = Compiled(
            functools.partial(try_variants, target=self._target, store=store, progress=progress)
        )
        self.emit = functools.partial(emit, target=self._target)
        self.device = gpu_device(target, predicted_by=MODEL)

    def prepare(self, kernels: Sequence[Kernel]) -> None:
        """Compile the defaults of kernels together; what fails, fails again when its turn comes."""
        benches = (kernel.bench() for kernel in kernels)
        self._compiled.get(
            variant
            for bench in benches
            if isinstance(bench, PredictedBench)
            for variant in bench.variants(bench.default)
        )

    def kernels(self, found: Functions, work: "Workload") -> Iterator[Kernel]:
        """The distinct kernels of a model's steps; weights are not looked at."""
        graphs, weights = bind_weights(found.graphs)
        layout = weight_layout(weights)
        for function, graph in expanded(graphs).items():
            sizes = work.sizes(function)
            plans: dict[Site, Plan] = {}

            def record(site: Site, plans: dict[Site, Plan] = plans) -> Plan:
                plans[site] = self.emit(site)
                return plans[site]

            corners = corner_sizes(sizes["B"], sizes["B"] * sizes["L"], sizes["C"])
            program = lower_program({function: graph}, layout, corners, record)
            yield from self._kernels_of(program, plans, sizes)

    def _kernels_of(
        self, program: Program, plans: Mapping[Site, Plan], sizes: Mapping[str, int]
    ) -> Iterator[Kernel]:
        (function,) = program.functions
        variants = variants_of([function])
        counts = Counter(launch.kernel.name for launch in function.launches)
        for site, plan in plans.items():
            aligned = _aligned(plan, variants)
            bench = PredictedBench(site, plan, aligned, sizes, self._target, self._compiled)
            launches = counts[plan.stages[0].kernel.name]
            yield _kernel(bench, function.name, launches)


def _kernel(bench: PredictedBench, function: str, launches: int) -> Kernel:
    """A kernel with its bench, which costs nothing to keep."""
    return Kernel(
        bench.site, bench.default, function, launches, bench.sizes, lambda: bench, bench.runs
    )


def _aligned(plan: Plan, variants: Mapping[str, Variant]) -> dict[Arg, bool]:
    """Which tensors of a plan begin at multiples of 16 bytes in all its launches."""
    found: dict[Arg, bool] = {}
    for stage in plan.stages:
        known = variants[stage.kernel.name].aligned
        for arg, aligned in zip(stage.args, known, strict=True):
            found[arg] = aligned and found.get(arg, True)
    return found
