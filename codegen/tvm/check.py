"""How kernels are checked on the CPU at hand: compiled together, and run one by one."""

import functools
from collections.abc import Mapping, Sequence

from nemoc.codegen.check import CheckedBackend, Run
from nemoc.codegen.sites import RecordedSite
from nemoc.codegen.tvm.emit import emit, expanded
from nemoc.codegen.tvm.harness import KernelSuite
from nemoc.codegen.tvm.target import CpuTarget


def checked_backend(target: CpuTarget) -> CheckedBackend:
    """This backend for `nemoc.codegen.check.check_kernels`."""

    def prepare(sites: Sequence[RecordedSite], sizes: Mapping[str, int]) -> list[Run]:
        suite = KernelSuite(target)
        compiled = [suite.add(found.site, lambda *_, plan=found.plan: plan) for found in sites]
        return [
            functools.partial(site.run, sizes, *found.operands)
            for site, found in zip(compiled, sites, strict=True)
        ]

    return CheckedBackend(expanded, functools.partial(emit, target=target), prepare)
