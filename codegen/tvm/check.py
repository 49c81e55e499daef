"""Every distinct kernel of a model against its op, on the values that reach it in the model."""

import functools
from collections.abc import Callable, Iterator, Mapping

import torch

from nemoc.codegen.check import KernelCheck, check_site
from nemoc.codegen.sites import record_sites
from nemoc.codegen.storage import Layout
from nemoc.codegen.tvm.emit import emit, expanded
from nemoc.codegen.tvm.harness import KernelSuite
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.ir.graph import Graph


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
    _, sites = record_sites(
        expanded(graphs), weights, arguments, sizes, functools.partial(emit, target=target)
    )
    compiled = [suite.add(found.site, lambda *_, plan=found.plan: plan) for found in sites]
    for site, found in zip(compiled, sites, strict=True):
        yield check_site(
            site.site,
            site.plan,
            found.operands,
            sizes,
            functools.partial(site.run, sizes, *found.operands),
            error,
        )
