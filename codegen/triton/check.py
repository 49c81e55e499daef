"""How kernels for a GPU are checked: Triton's interpreter stands in for it."""

import functools
from collections.abc import Mapping, Sequence

from nemoc.codegen.check import CheckedBackend, Run
from nemoc.codegen.sites import RecordedSite
from nemoc.codegen.triton.emit import emit, expanded
from nemoc.codegen.triton.interpret import run_site
from nemoc.codegen.triton.target import GpuTarget


def checked_backend(target: GpuTarget) -> CheckedBackend:
    """This backend for `nemoc.codegen.check.check_kernels`."""

    def prepare(sites: Sequence[RecordedSite], sizes: Mapping[str, int]) -> list[Run]:
        return [functools.partial(run_site, s.site, s.plan, sizes, s.operands) for s in sites]

    return CheckedBackend(expanded, functools.partial(emit, target=target), prepare)
