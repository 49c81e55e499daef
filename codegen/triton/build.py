"""From kernels to machine code: each distinct kernel of a program is compiled once, in child processes.

This process never imports Triton. Compiled kernels may be kept on disk (`nemoc.codegen.triton.kernel_store`).
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy

from nemoc.codegen.children import Children, answers
from nemoc.codegen.plan import StepFunction
from nemoc.codegen.triton.binary import Binary
from nemoc.codegen.triton.inspect_binary import check_fits, inspect_output
from nemoc.codegen.triton.kernel_store import KernelStore
from nemoc.codegen.triton.module import module_source
from nemoc.codegen.triton.target import GpuTarget
from nemoc.codegen.triton.writer import GpuKernel
from nemoc.ir.dims import Dim, dim
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import NemocError

ALIGNMENT = 16
"""Bytes of the widest access to memory, which the compiler uses where it knows that a pointer is a multiple of it.

That every arena starts at a multiple, inputs and outputs too, is taken for granted.
"""

COMPILERS = Children(
    command=(sys.executable, "-P", str(Path(__file__).with_name("worker.py"))),
    variables=(
        ("TRITON_HOME", "{folder}"),
        ("TRITON_CACHE_DIR", "{folder}/triton"),
        ("TRITON_DISABLE_LINE_INFO", "1"),  # or binaries would name the folder
        ("TRITON_DUMP_PTXAS_LOG", "1"),
    ),
)
"""Processes in which Triton compiles."""

_FORMAT = 2
"""Raised whenever stored kernels would be inspected differently."""

_POINTER_TYPES = {
    DType.F64: "*fp64",
    DType.F32: "*fp32",
    DType.BF16: "*bf16",
    DType.F16: "*fp16",
    DType.F8E4M3: "*fp8e4nv",
    DType.I64: "*i64",
    DType.I32: "*i32",
    DType.I8: "*i8",
    DType.U8: "*u8",
    DType.BOOL: "*i1",
}
"""Pointers to elements, as a kernel's signature spells them."""


@dataclass(frozen=True)
class Variant:
    """A kernel under what is known of its pointers.

    Attributes:
        kernel: the kernel.
        aligned: for each pointer, whether it is a multiple of 16 bytes whatever the sizes.
    """

    kernel: GpuKernel
    aligned: tuple[bool, ...]


def variants_of(functions: Iterable[StepFunction]) -> dict[str, Variant]:
    """The variant of each distinct kernel of a program by its name, in order of first use.

    A kernel is compiled once: it may know of a pointer what all its launches do.
    """
    found: dict[str, Variant] = {}
    for launch in (launch for function in functions for launch in function.launches):
        kernel = launch.kernel
        assert isinstance(kernel, GpuKernel)
        aligned = tuple(_is_aligned(address.offset) for address in launch.buffers)
        if kernel.name in found:
            known = found[kernel.name].aligned
            aligned = tuple(a and b for a, b in zip(aligned, known, strict=True))
        found[kernel.name] = Variant(kernel, aligned)
    return found


@functools.lru_cache(maxsize=4096)
def _is_aligned(offset: Dim) -> bool:
    """Whether an offset is a multiple for all sizes: each of its terms is a multiple times an integer."""
    offset = dim(offset)
    if isinstance(offset, int):
        return offset % ALIGNMENT == 0
    for term in sympy.Add.make_args(offset):
        factor, rest = term.as_coeff_Mul()
        if not (factor.is_Integer and factor % ALIGNMENT == 0 and rest.is_integer):
            return False
    return True


def compile_variants(
    variants: Iterable[Variant],
    target: GpuTarget,
    children: Children = COMPILERS,
    store: KernelStore | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[Variant, Binary]:
    """Compile kernels for a GPU, which need not be there.

    Args:
        variants: what to compile.
        target: the GPU.
        children: how many processes compile, and their limits.
        store: where kernels are kept and looked up.
        progress: called as `progress(stage, done, total)`.

    Raises:
        NemocError: Triton is not installed, or a kernel cannot be compiled, or not within the limits, or does not fit
            the target. The others are compiled, and stored, all the same.
    """
    found = try_variants(variants, target, children, store, progress)
    failures = [outcome for outcome in found.values() if isinstance(outcome, NemocError)]
    if failures:
        others = f" ({len(failures) - 1} more kernels failed)" if len(failures) > 1 else ""
        raise NemocError(f"{failures[0]}{others}")
    return {variant: out for variant, out in found.items() if isinstance(out, Binary)}


def try_variants(
    variants: Iterable[Variant],
    target: GpuTarget,
    children: Children = COMPILERS,
    store: KernelStore | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[Variant, Binary | NemocError]:
    """As `compile_variants`, but the error of a kernel takes its place.

    Raises:
        NemocError: Triton is not installed, or does not start.
    """
    assert not target.is_interpreter
    wanted = tuple(dict.fromkeys(variants))
    jobs = {v: _Job(v, target, triton_version()) for v in wanted}
    stored = {v: store.get(jobs[v].key) if store is not None else None for v in wanted}
    found: dict[Variant, Binary | NemocError] = {v: b for v, b in stored.items() if b is not None}
    missing = [v for v in wanted if v not in found]
    # The longest first, so that no process ends long after the others.
    missing.sort(key=lambda v: len(v.kernel.source), reverse=True)
    _tell(progress, len(found), len(wanted))
    with contextlib.closing(_compiled([jobs[v] for v in missing], target, children)) as made:
        for variant, outcome in made:
            found[variant] = outcome
            if store is not None and isinstance(outcome, Binary):
                store.put(jobs[variant].key, outcome)
            _tell(progress, len(found), len(wanted))
    if store is not None and missing:
        store.prune()
    return {v: _fitting(v, found[v], target) for v in wanted}


def _tell(progress: Callable[[str, int, int], None] | None, done: int, total: int) -> None:
    if progress is not None:
        progress("compiling kernels", done, total)


def triton_version() -> str:
    """The version of Triton that kernels are compiled with, read without importing it.

    Raises:
        NemocError: it is not installed.
    """
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise NemocError(
            "compiling for GPUs needs the package triton; install nemoc with its extra 'gpu'"
        )
    # Not its metadata: builds for some GPUs are distributed under other names.
    version = re.search(r"^__version__ = ['\"](.+)['\"]", Path(spec.origin).read_text(), re.M)
    if version is None:
        raise NemocError(f"{spec.origin}: no version found, expected a line `__version__ = ...`")
    return version[1]


@dataclass(frozen=True)
class _Job:
    """A variant to be compiled with a version of Triton for a target."""

    variant: Variant
    target: GpuTarget
    triton: str

    @functools.cached_property
    def module(self) -> str:
        """The text of a module with this kernel alone: a mistake in one is none in others."""
        return module_source([self.variant.kernel], self.target)

    @functools.cached_property
    def request(self) -> dict[str, Any]:
        """What a worker is told, besides where the module is."""
        kernel = self.variant.kernel
        pointers = {f"p{i}": _POINTER_TYPES[dtype] for i, dtype in enumerate(kernel.pointers)}
        return {
            "kernel": kernel.name,
            "signature": pointers | {"B": "i32", "L": "i32", "C": "i32"},
            "aligned": [i for i, known in enumerate(self.variant.aligned) if known],
            "warps": kernel.warps,
            "stages": kernel.stages,
            "early": list(kernel.early),
        }

    @functools.cached_property
    def key(self) -> str:
        """A hash of everything that the binary and its report depend on."""
        parts = (_FORMAT, self.triton, dataclasses.astuple(self.target), self.request, self.module)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _compiled(
    jobs: Sequence[_Job], target: GpuTarget, children: Children
) -> Generator[tuple[Variant, Binary | NemocError]]:
    """Compile variants; gives each as it is done. Nothing is started where there are none."""
    if not jobs:
        return
    setup = {"backend": target.backend, "arch": target.arch, "warp": target.warp}
    with tempfile.TemporaryDirectory(prefix="nemoc-") as name:
        folder = Path(name)
        requests = []
        for number, job in enumerate(jobs):
            module = folder / f"kernel_{number}.py"
            module.write_text(job.module)
            requests.append({**job.request, "module": str(module)})
        for number, answer in answers(requests, setup, children, folder):
            yield jobs[number].variant, _outcome(jobs[number].variant, answer, target)


def _outcome(variant: Variant, answer: dict[str, Any], target: GpuTarget) -> Binary | NemocError:
    if "error" in answer:
        return _failure(variant, target, answer["error"])
    try:
        kernel = variant.kernel
        return inspect_output(answer, len(kernel.pointers), target, kernel.early)
    except NemocError as error:
        return _failure(variant, target, str(error))


def _fitting(
    variant: Variant, outcome: Binary | NemocError, target: GpuTarget
) -> Binary | NemocError:
    """The outcome, unless the target cannot launch it."""
    if isinstance(outcome, Binary):
        try:
            check_fits(outcome, target)
        except NemocError as error:
            return _failure(variant, target, str(error))
    return outcome


def _failure(variant: Variant, target: GpuTarget, why: str) -> NemocError:
    return NemocError(f"{variant.kernel.name} for {target.name}: {why}")
