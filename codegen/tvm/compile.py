"""Compiling a set of step functions for a CPU: graphs -> launches -> text -> library."""

import ctypes
import functools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemoc.codegen.lower import Program, lower_program
from nemoc.codegen.object_store import ObjectStore
from nemoc.codegen.storage import Layout
from nemoc.codegen.tuned import Lookup, tuned
from nemoc.codegen.tvm.build import build_library
from nemoc.codegen.tvm.emit import emit, expanded
from nemoc.codegen.tvm.step import module_source
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.ir.graph import Graph


@dataclass(frozen=True)
class Compiled:
    """A compiled program.

    Attributes:
        program: the launches and the memory plan.
        source: the text of every kernel and step function, as compiled.
        library: the bytes of a shared library that exports the step functions.
    """

    program: Program
    source: str
    library: bytes


def compile_program(
    graphs: Mapping[str, Graph],
    weights: Layout,
    corners: Sequence[Mapping[str, int]],
    target: CpuTarget,
    lookup: Lookup = lambda kernel, site, backend: {},
    store: ObjectStore | None = None,
) -> Compiled:
    """Compile step functions into one library.

    Args:
        graphs: the graph of each function by exported name; parameters are stored weights.
        weights: where the weights lie.
        corners: sizes of B, L and C at which scratch is largest (`nemoc.codegen.lower.corner_sizes`).
        target: the CPU to compile for.
        lookup: the schedules of kernels that were tuned.
        store: where compiled functions are looked for, and put.

    Raises:
        NemocError: an op has no kernel, or the library cannot be linked here.
    """
    backend = tuned(functools.partial(emit, target=target), lookup)
    program = lower_program(expanded(graphs), weights, corners, backend)
    source = module_source(program.functions)
    with tempfile.TemporaryDirectory(prefix="nemoc-") as folder:
        path = Path(folder) / "step.so"
        build_library(source, target, path, store)
        _return_freed_memory()
        return Compiled(program, source, path.read_bytes())


def _return_freed_memory() -> None:
    """Give back to the system what the compiler has freed; glibc would keep it, beneath all that follows."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
