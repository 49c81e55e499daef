"""Kernels against their ops, on the values that reach them in a model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from nemoc.codegen.guarded import KernelFault
from nemoc.codegen.lower import Emit
from nemoc.codegen.plan import Plan, Site
from nemoc.codegen.sites import RecordedSite, record_sites
from nemoc.codegen.storage import Layout
from nemoc.ir.graph import Graph
from nemoc.ir.op import Env, Op
from nemoc.ir.ops import Cast, Fused, QuantizeFp8, QuantizeNvfp4
from nemoc.ir.region import evaluate_op


@dataclass(frozen=True)
class KernelCheck:
    """The outcome for one site.

    Attributes:
        kernels: the names of the kernels that carry out the op.
        op: the op's mnemonic, and the types of its operands.
        error: the largest relative error of a result against float64; infinite or NaN when something was
            left unwritten, or written where it must not be.
    """

    kernels: tuple[str, ...]
    op: str
    error: float


Run = Callable[[], tuple[torch.Tensor, ...]]
"""Runs the launches of a site on guarded memory, and gives its results."""


@dataclass(frozen=True)
class CheckedBackend:
    """What a backend does for the check of its kernels, for one target.

    Attributes:
        expanded: graphs in terms of what it knows.
        emit: its plans.
        prepare: what runs each site, at given sizes.
    """

    expanded: Callable[[Mapping[str, Graph]], Mapping[str, Graph]]
    emit: Emit
    prepare: Callable[[Sequence[RecordedSite], Mapping[str, int]], Sequence[Run]]


def check_kernels(
    graphs: Mapping[str, Graph],
    weights: Layout,
    arguments: Callable[[Graph], Mapping[str, torch.Tensor]],
    sizes: Mapping[str, int],
    backend: CheckedBackend,
    error: Callable[[torch.Tensor, torch.Tensor], float],
) -> Iterator[KernelCheck]:
    """Run each distinct site of a program by itself, on poisoned and guarded memory.

    Args:
        graphs: step functions; parameters are stored weights.
        weights: where the weights lie.
        arguments: inputs, states and weights of a graph at `sizes`; looked up one by one.
        sizes: B, L and C of the check.
        backend: whose kernels are run.
        error: the relative error of a tensor against a reference.
    """
    _, sites = record_sites(backend.expanded(graphs), weights, arguments, sizes, backend.emit)
    for found, run in zip(sites, backend.prepare(sites, sizes), strict=True):
        yield check_site(found.site, found.plan, found.operands, sizes, run, error)


def check_site(
    site: Site,
    plan: Plan,
    operands: Sequence[torch.Tensor],
    sizes: Mapping[str, int],
    run: Run,
    error: Callable[[torch.Tensor, torch.Tensor], float],
) -> KernelCheck:
    """Run a plan and compare its results with what the op means, evaluated in float64.

    What quantizes numbers that it has rounded is evaluated with that rounding.

    Args:
        site: the op and its views.
        plan: what carries it out.
        operands: a tensor for each operand.
        sizes: B, L and C.
        run: the plan's results for these operands, on guarded memory.
        error: the relative error of a tensor against a reference.
    """
    op = site.op
    kernels = tuple(stage.kernel.name for stage in plan.stages)
    shapes = ", ".join(str(v.type) for v in op.operands())
    exact = exact_results(op, operands, sizes)
    try:
        found = run()
    except KernelFault:
        return KernelCheck(kernels, f"{op.mnemonic()}({shapes})", float("inf"))
    worst = max(error(_wide(f), e) for f, e in zip(found, exact, strict=True))
    return KernelCheck(kernels, f"{op.mnemonic()}({shapes})", worst)


def exact_results(
    op: Op, operands: Sequence[torch.Tensor], sizes: Mapping[str, int]
) -> tuple[torch.Tensor, ...]:
    """What an op's results should be: floats in float64, those of types below f32 as these round them.

    Args:
        op: the op.
        operands: a tensor for each operand.
        sizes: B, L and C.
    """
    float64 = not _quantizes_rounded(op)
    given = [_wide(t) for t in operands] if float64 else operands
    exact = evaluate_op(op, Env(sizes, float64), dict(zip(op.operands(), given, strict=True)))
    types = (result.dtype.torch for result in op.result_types())
    return tuple(_wide(_meant(e, dtype)) for e, dtype in zip(exact, types, strict=True))


def _quantizes_rounded(op: Op) -> bool:
    """Whether a region quantizes what it has rounded: evaluation in float64 would quantize other numbers."""
    ops = [node.op for node in op.body.nodes] if isinstance(op, Fused) else []
    rounds = any(isinstance(o, Cast) and o.dtype.bytes < o.x.dtype.bytes for o in ops)
    return rounds and any(isinstance(o, QuantizeNvfp4 | QuantizeFp8) for o in ops)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _meant(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a result of that type should be: only casts and moves give types below f32, and they round as they must."""
    return _wide(exact.to(dtype)) if dtype.itemsize < torch.float32.itemsize else exact
