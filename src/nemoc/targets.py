"""Targets: what a user may name, and what works today."""

import difflib
import importlib.util
import shutil
from dataclasses import dataclass

from nemoc.codegen.triton.target import GPUS
from nemoc.ir import DType
from nemoc.ir.errors import NemocError
from nemoc.passes import TargetInfo

CPU_INTERLEAVE = 32
"""Weight rows per block on CPUs: two vectors of 16 float32, or four of 8, per step of the reduction."""


@dataclass(frozen=True)
class Target:
    """One family of targets.

    Attributes:
        name: how it is written.
        works: whether this version generates code for it.
        description: one line.
    """

    name: str
    works: bool
    description: str


TARGETS = (
    Target("reference", True, "the interpreter in eager PyTorch; the oracle of all other targets"),
    Target("cpu", True, "the CPU at hand, through TVM and LLVM"),
    Target("cpu:NAME", True, "another CPU by LLVM's name (cpu:znver3); builds where it runs"),
    *(Target(gpu.name, not gpu.is_interpreter, gpu.description) for gpu in GPUS.values()),
)
"""What this version compiles for."""


def default_target() -> str:
    """`cpu` where its compiler and a linker are installed, else `reference`."""
    linker = any(shutil.which(name) for name in ("cc", "gcc", "clang"))
    return "cpu" if linker and importlib.util.find_spec("tvm") is not None else "reference"


def resolve_target(name: str | None) -> str:
    """The target of a name; the best of this machine when there is none.

    Raises:
        NemocError: nothing is called that, or what it needs is not installed.
    """
    if name is None:
        return default_target()
    if not isinstance(name, str):
        raise NemocError(f"target is {name!r}, expected text")
    kind, _, variant = name.partition(":")
    if kind == "reference" and not variant:
        return name
    if kind == "cpu" and (variant or name == "cpu"):
        return _with_package(name, "tvm", "apache-tvm", "cpu")
    if name in GPUS:
        return _with_package(name, "triton", "triton", "gpu")
    known = [t.name for t in TARGETS]
    near = difflib.get_close_matches(name, ["reference", "cpu", *GPUS], n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise NemocError(f"unknown target {name!r}{hint}, expected one of {', '.join(known)}")


def _with_package(target: str, module: str, package: str, extra: str) -> str:
    if importlib.util.find_spec(module) is None:
        raise NemocError(
            f"target {target!r} needs the package {package}; install nemoc with its extra {extra!r}"
        )
    return target


def compute_type(target: str, stored: str) -> DType:
    """The type of activations that keeps a checkpoint's precision best for its price.

    Args:
        target: a resolved target.
        stored: the checkpoint's type as its configuration calls it.
    """
    gpu = target.partition(":")[0] in ("cuda", "hip")
    return DType.BF16 if gpu and stored == "bfloat16" else DType.F32


def multiplies_fp8(target: str) -> bool:
    """Whether a resolved target has matrix units that multiply FP8 by FP8."""
    return target in GPUS and GPUS[target].fp8


def target_info(name: str, threads: int) -> TargetInfo:
    """What passes may know of a resolved target."""
    if name.partition(":")[0] == "cpu":
        return TargetInfo(
            name=name, linear_interleave=CPU_INTERLEAVE, packed_weights=True, threads=threads
        )
    if name in GPUS:
        gpu = GPUS[name]
        return TargetInfo(
            name=name,
            packed_weights=True,
            spread_nvfp4=True,
            memory_bandwidth=gpu.bandwidth,
            on_chip_memory=min(gpu.shared, 1 << 20),
            threads=gpu.multiprocessors,
        )
    return TargetInfo(name=name, threads=threads)
