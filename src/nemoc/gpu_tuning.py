"""Tuning for a GPU: a model's kernels, and benches that measure them where it is at hand, or predict their times."""

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from nemoc.autotune.gpu_bench import Compiled, CompiledBench, PredictedBench
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
from nemoc.gpu_laboratory import Given, GpuLaboratory, MeasuredBench
from nemoc.ir import NemocError, Op
from nemoc.ir.dims import estimate
from nemoc.options import read_options
from nemoc.progress import Progress
from nemoc.runtime.weights import WeightSource
from nemoc.schedules import gpu_device
from nemoc.workload import Workload

_B = TypeVar("_B", bound=CompiledBench)


class GpuBenches:
    """Benches for the kernels of one model on a GPU.

    Args:
        target: of which GPU.
        progress: told what is being compiled.
        laboratory: where kernels are measured; none for a GPU that is not at hand, whose times are predicted.
        machine: the model of the GPU at hand.

    Attributes:
        emit: plans of sites.
        device: the GPU, as records name it.
    """

    def __init__(
        self,
        target: str,
        progress: Progress | None = None,
        laboratory: GpuLaboratory | None = None,
        machine: str = "",
    ) -> None:
        self._target, self._laboratory = gpu_target(target), laboratory
        store = KernelStore(read_options().cache / "kernels")
        self._compiled = Compiled(
            functools.partial(try_variants, target=self._target, store=store, progress=progress)
        )
        self.emit = functools.partial(emit, target=self._target)
        self.device = gpu_device(target, "" if laboratory else MODEL, machine)
        self._roofs = laboratory.roofs() if laboratory is not None else None

    def prepare(self, kernels: Sequence[Kernel]) -> None:
        """Compile the defaults of kernels together; what fails, fails again when its turn comes."""
        benches = (kernel.bench() for kernel in kernels)
        self._compiled.get(
            variant
            for bench in benches
            if isinstance(bench, CompiledBench)
            for variant in bench.variants(bench.default)
        )

    def kernels(self, found: Functions, work: Workload) -> Iterator[Kernel]:
        """The distinct kernels of a model's steps; weights are looked at only where something is measured."""
        graphs, weights = bind_weights(found.graphs)
        layout = weight_layout(weights)
        source = None
        if self._laboratory is not None:
            if found.model.parameters is None:
                raise NemocError(
                    f"{found.model.name} has no weights; random:{found.model.name} has"
                )
            source = WeightSource(found.model.parameters, weights)
        for function, graph in expanded(graphs).items():
            sizes = work.sizes(function)
            plans: dict[Site, Plan] = {}

            def record(site: Site, plans: dict[Site, Plan] = plans) -> Plan:
                plans[site] = self.emit(site)
                return plans[site]

            corners = corner_sizes(sizes["B"], sizes["B"] * sizes["L"], sizes["C"])
            program = lower_program({function: graph}, layout, corners, record)
            (lowered,) = program.graphs
            given = None
            if source is not None:
                arguments = functools.partial(work.arguments, function=function, source=source)
                given = Given(lowered, arguments)
            yield from self._kernels_of(program, plans, work, given)

    def _kernels_of(
        self, program: Program, plans: Mapping[Site, Plan], work: Workload, given: Given | None
    ) -> Iterator[Kernel]:
        (function,) = program.functions
        sizes = work.sizes(function.name)
        symbols = work.symbols(function.name)
        variants = variants_of([function])
        counts = Counter(launch.kernel.name for launch in function.launches)
        for site, plan in plans.items():
            about = (site, plan, _aligned(plan, variants), sizes, self._target, self._compiled)
            # Sites may share a launch, as that which makes rows for products that differ.
            launches = min(counts[stage.kernel.name] for stage in plan.stages)
            bench: PredictedBench | MeasuredBench = PredictedBench(*about)
            least, predicts = 0.0, None
            if self._laboratory is not None and given is not None:
                bench = MeasuredBench(*about, self._laboratory, symbols["T"], given)
                least, predicts = self._least_seconds(site.op, given, symbols), bench.seconds
            yield Kernel(
                site,
                plan,
                function.name,
                launches,
                sizes,
                functools.partial(_itself, bench),
                bench.runs,
                least,
                predicts,
                symbols["T"],
            )

    def _least_seconds(self, op: Op, given: Given, sizes: Mapping[str, int]) -> float:
        """The least time of an op on the device at hand, if caches hold results and what a step has just computed.

        Products of types below 16 bits are up to four times as fast as the bf16 that was measured.
        """
        pairs = zip(op.operands(), op.reads(), strict=True)
        moved = sum(estimate(n, sizes) for value, n in pairs if given.is_stored(value))
        assert self._roofs is not None
        return self._roofs.seconds(moved, estimate(op.flops(), sizes) / 4)


def _itself(bench: _B) -> _B:
    """A bench, which costs nothing to keep."""
    return bench


def _aligned(plan: Plan, variants: Mapping[str, Variant]) -> dict[Arg, bool]:
    """Which tensors of a plan begin at multiples of 16 bytes in all its launches."""
    found: dict[Arg, bool] = {}
    for stage in plan.stages:
        known = variants[stage.kernel.name].aligned
        for arg, aligned in zip(stage.args, known, strict=True):
            found[arg] = aligned and found.get(arg, True)
    return found
