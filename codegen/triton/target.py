"""GPUs that kernels are compiled for: what the compiler is told of them, and what fits on them."""

from dataclasses import dataclass

from nemoc.ir.errors import NemocError


@dataclass(frozen=True)
class GpuTarget:
    """A GPU, or the interpreter that stands in for one.

    Attributes:
        name: as users write it, such as `cuda:sm_90`.
        description: one line.
        backend: Triton's: "cuda" or "hip"; empty for the interpreter.
        arch: Triton's name of the architecture: 90, or "gfx942".
        warp: threads of a warp.
        shared: bytes of shared memory that one program can have.
        shared_total: bytes of shared memory of a multiprocessor.
        registers: 32-bit registers of a multiprocessor.
        warps: warps that a multiprocessor holds.
        multiprocessors: of the usual device of that architecture.
        products: Triton's `input_precision` for products of f32.
        bandwidth: bytes per second from memory, nominal, of that device.
        clock: cycles per second, nominal, of that device.
        fp8: whether its matrix units multiply E4M3.
        nvfp4_rows: the fewest rows of a tile of NVFP4 that its matrix units multiply as it is; 0 where they do not.
        waits: whether kernels can wait themselves for the end of those launched before them, so that they may be
            launched while those still run.
    """

    name: str
    description: str
    backend: str = ""
    arch: int | str = ""
    warp: int = 32
    shared: int = 1 << 30
    shared_total: int = 1 << 30
    registers: int = 65536
    warps: int = 64
    multiprocessors: int = 1
    products: str = "ieee"
    bandwidth: float = 20e9
    clock: float = 1e9
    fp8: bool = False
    nvfp4_rows: int = 0
    waits: bool = False

    @property
    def is_interpreter(self) -> bool:
        """Whether kernels are interpreted on the CPU."""
        return not self.backend

    @property
    def instructions_per_byte(self) -> float:
        """Instructions of single threads while a byte is read: 128 a cycle and multiprocessor, or 64 double ones."""
        return self.multiprocessors * 128 * self.clock / self.bandwidth


INTERPRETER = "triton-interpret"
"""The target whose kernels are interpreted on the CPU."""

_KIB = 1024

GPUS = {
    gpu.name: gpu
    for gpu in (
        GpuTarget(
            INTERPRETER, "GPU kernels in Triton's interpreter, on the CPU; for tests", fp8=True
        ),
        GpuTarget(
            "cuda:sm_80",
            "NVIDIA Ampere (A100)",
            "cuda",
            80,
            32,
            163 * _KIB,
            164 * _KIB,
            65536,
            64,
            108,
            "tf32x3",
            2.0e12,
            1.41e9,
        ),
        GpuTarget(
            "cuda:sm_90",
            "NVIDIA Hopper (H100, H200)",
            "cuda",
            90,
            32,
            227 * _KIB,
            228 * _KIB,
            65536,
            64,
            132,
            "tf32x3",
            4.8e12,
            1.83e9,
            fp8=True,
            waits=True,
        ),
        GpuTarget(
            "cuda:sm_100",
            "NVIDIA Blackwell (B200)",
            "cuda",
            100,
            32,
            227 * _KIB,
            228 * _KIB,
            65536,
            64,
            148,
            "tf32x3",
            8.0e12,
            1.85e9,
            fp8=True,
            nvfp4_rows=128,
            waits=True,
        ),
        GpuTarget(
            "cuda:sm_120",
            "NVIDIA Blackwell (RTX 50, RTX PRO 6000)",
            "cuda",
            120,
            32,
            99 * _KIB,
            100 * _KIB,
            65536,
            48,
            170,
            "tf32x3",
            1.8e12,
            2.4e9,
            fp8=True,
            nvfp4_rows=16,
            waits=True,
        ),
        GpuTarget(
            "hip:gfx942",
            "AMD CDNA 3 (MI300X)",
            "hip",
            "gfx942",
            64,
            64 * _KIB,
            64 * _KIB,
            131072,
            32,
            304,
            "ieee",
            5.3e12,
            2.1e9,
        ),
        GpuTarget(
            "hip:gfx950",
            "AMD CDNA 4 (MI355X)",
            "hip",
            "gfx950",
            64,
            160 * _KIB,
            160 * _KIB,
            131072,
            32,
            256,
            "ieee",
            8.0e12,
            2.4e9,
            fp8=True,
        ),
    )
}
"""Every GPU target by name, with the figures of its usual device, and the interpreter."""


def gpu_target(name: str) -> GpuTarget:
    """The target of a name.

    Raises:
        NemocError: nothing is called that.
    """
    if name not in GPUS:
        raise NemocError(f"unknown GPU target {name!r}, expected one of {', '.join(GPUS)}")
    return GPUS[name]
