"""Every distinct kernel of a model against its op, on the values that reach it, in Triton's interpreter."""

import functools
from collections.abc import Callable, Iterator, Mapping

import torch

from nemoc.codegen.check import KernelCheck, check_site
from nemoc.codegen.sites import record_sites
from nemoc.codegen.storage import Layout
from nemoc.codegen.triton.emit import emit, expanded
from nemoc.codegen.triton.interpret import run_site
from nemoc.codegen.triton.target import GpuTarget
from nemoc.ir.graph import Graph


def check_kernels(
    graphs: Mapping[str, Graph],
    weights: Layout,
    arguments: Callable[[Graph], Mapping[str, torch.Tensor]],
    sizes: Mapping[str, int],
    target: GpuTarget,
    error: Callable[[torch.Tensor, torch.Tensor], float],
) -> Iterator[KernelCheck]:
    """Run each distinct site of a program by itself, on poisoned and guarded memory.

    Args:
        graphs: step functions; parameters are stored weights.
        weights: where the weights lie.
        arguments: inputs, states and weights of a graph at `sizes`; looked up one by one.
        sizes: B, L and C of the check.
        target: the GPU whose kernels are run; the interpreter stands in for it.
        error: the relative error of a tensor against a reference.
    """
    _, sites = record_sites(
        expanded(graphs), weights, arguments, sizes, functools.partial(emit, target=target)
    )
    for found in sites:
        run = functools.partial(run_site, found.site, found.plan, sizes, found.operands)
        yield check_site(found.site, found.plan, found.operands, sizes, run, error)
