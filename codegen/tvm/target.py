"""CPU targets: their names, and what kernels need to know of them."""

from dataclasses import dataclass

import tvm
from tvm.target import codegen

from nemoc.ir.errors import NemocError

_FOREIGN = ("x86_64-linux-gnu", "aarch64-linux-gnu")
"""Triples tried, after the host's, to find the architecture of a CPU by its name."""

_APPLE = "arm64-apple-darwin"
"""The triple of Apple's CPUs."""


@dataclass(frozen=True)
class CpuTarget:
    """A CPU as LLVM knows it.

    Attributes:
        mcpu: LLVM's name of the CPU.
        triple: LLVM's name of the platform.
        vector_bits: width of the widest vector registers that kernels use.
        registers: how many of them there are.
        host: whether it belongs to this machine's platform, so that its libraries link here; they run here if the CPU
            at hand has its features.
        features: the instruction sets that code for it may use, in LLVM's names, sorted.
    """

    mcpu: str
    triple: str
    vector_bits: int
    registers: int
    host: bool
    features: tuple[str, ...]

    @property
    def architecture(self) -> str:
        """The first word of the triple: x86_64, aarch64."""
        return self.triple.partition("-")[0]

    @property
    def lanes(self) -> int:
        """float32 elements per vector register."""
        return self.vector_bits // 32

    @property
    def llvm(self) -> tvm.target.Target:
        """TVM's form of the target, its own host."""
        target = tvm.target.Target({"kind": "llvm", "mcpu": self.mcpu, "mtriple": self.triple})
        return target.with_host(target)


def cpu_target(name: str = "cpu") -> CpuTarget:
    """The target of a name: `cpu` for the machine at hand, or `cpu:` and LLVM's name of a CPU.

    Raises:
        NemocError: the name is no CPU target, or LLVM does not know the CPU.
    """
    if name == "cpu":
        return _describe(codegen.llvm_get_system_cpu(), codegen.llvm_get_system_triple())
    kind, _, mcpu = name.partition(":")
    if kind != "cpu" or not mcpu:
        raise NemocError(f"target {name!r} is not a cpu target, expected cpu or cpu:NAME")
    host = codegen.llvm_get_system_triple()
    for triple in (_APPLE,) if mcpu.startswith("apple-") else (host, *_FOREIGN):
        if codegen.llvm_is_valid_cpu(mcpu, triple):
            return _describe(mcpu, triple)
    known = ", ".join(_known_cpus(host))
    raise NemocError(
        f"target {name!r}: LLVM knows no CPU {mcpu!r}; for this platform it knows {known}"
    )


def _known_cpus(triple: str) -> tuple[str, ...]:
    target = tvm.target.Target({"kind": "llvm", "mtriple": triple})
    return tuple(str(cpu) for cpu in codegen.llvm_get_cpu_archlist(target))


def _describe(mcpu: str, triple: str) -> CpuTarget:
    target = tvm.target.Target({"kind": "llvm", "mcpu": mcpu, "mtriple": triple})
    features = {str(f) for f in codegen.llvm_get_cpu_features(target)}
    if "avx512f" in features:
        bits, registers = 512, 32
    elif "avx2" in features:
        bits, registers = 256, 16
    else:
        bits, registers = 128, 32 if "neon" in features else 16
    host = triple == codegen.llvm_get_system_triple()
    return CpuTarget(mcpu, triple, bits, registers, host, tuple(sorted(features)))
