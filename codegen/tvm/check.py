"""Every distinct kernel of a model against its op, on the values that reach it in the model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from nemoc.codegen.storage import Layout
from nemoc.codegen.tvm.harness import CompiledSite, KernelFault, KernelSuite
from nemoc.codegen.tvm.sites import record_sites
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.ir.graph import Graph
from nemoc.ir.op import Env
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


def check_kernels(
    graphs: Mapping[str, Graph],
    weights: Layout,
    arguments: Callable[[Graph], Mapping[str, torch.Tensor]],
    sizes: Mapping[str, int],
    target: CpuTarget,
    error: Callable[[torch.Tensor, torch.Tensor], float],
) -> Iterator[KernelCheck]:
    """Run each distinct site of a program by itself, on poisoned and guarded memory.

    Args:
        graphs: step functions; parameters are stored weights.
        weights: where the weights lie.
        arguments: inputs, states and weights of a graph at `sizes`; looked up one by one.
        sizes: B, L and C of the check.
        target: the CPU at hand.
        error: the relative error of a tensor against a reference.
    """
    suite = KernelSuite(target)
    _, sites = record_sites(graphs, weights, arguments, sizes, target)
    compiled = [suite.add(found.site, lambda *_, plan=found.plan: plan) for found in sites]
    for site, found in zip(compiled, sites, strict=True):
        yield _check(site, found.operands, sizes, error)


def _check(
    compiled: CompiledSite,
    operands: Sequence[torch.Tensor],
    sizes: Mapping[str, int],
    error: Callable[[torch.Tensor, torch.Tensor], float],
) -> KernelCheck:
    op = compiled.site.op
    plan = compiled.plan
    kernels = tuple(stage.kernel.name for stage in plan.stages)
    shapes = ", ".join(str(v.type) for v in op.operands())
    wide = [_wide(t) for t in operands]
    exact = evaluate_op(op, Env(sizes, float64=True), dict(zip(op.operands(), wide, strict=True)))
    try:
        found = compiled.run(sizes, *operands)
    except KernelFault:
        return KernelCheck(kernels, f"{op.mnemonic()}({shapes})", float("inf"))
    worst = max(error(_wide(f), _meant(e, f.dtype)) for f, e in zip(found, exact, strict=True))
    return KernelCheck(kernels, f"{op.mnemonic()}({shapes})", worst)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _meant(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a result of that type should be: only casts and moves give types below f32, and they round as they must."""
    return _wide(exact.to(dtype)) if dtype.itemsize < torch.float32.itemsize else exact
