"""What tests of the benchmarks on GPUs share: small models, a device that interprets kernels, clocks that count."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.gpu_region import (
    Code,
    DeviceRegion,
    Kernels,
    LoweredPart,
)
from benchmarks.gpu_results import Journal, Machine
from benchmarks.gpu_session import Session
from benchmarks.gpu_stages import Case, PartStage
from benchmarks.gpu_values import Sizes, Values

from nemoc.autotune.gpu_clock import nothing
from nemoc.autotune.measure import Roofs
from nemoc.codegen.plan import Kernel, StepFunction
from nemoc.codegen.triton.interpret import Interpreter
from nemoc.codegen.triton.writer import GpuKernel, pointer_types
from nemoc.models import Model, RandomSource, preset
from nemoc.models.source import Generation
from nemoc.runtime.launches import Binary, LaunchRecord
from support.fake_cuda import FakeDevice, FakeKernel, FakeLaunch, FakeLibrary, tensor_at

TARGET = "cuda:sm_90"
CUBIN = b"\x7fELF a kernel"
MACHINE = Machine("Fake GPU", "12.4", {"torch": "2"})
ROOFS = Roofs(1e12, 1e14)

MINI = replace(
    preset("nano"),
    vocab_size=96,
    hidden_size=48,
    layers=("mamba", "moe", "attention", "mamba"),
    mamba_num_heads=4,
    mamba_head_dim=16,
    n_groups=2,
    ssm_state_size=16,
    chunk_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    moe_shared_expert_intermediate_size=40,
)
"""Nano made small; the states of a group fit on-chip memory, so that its norm is in the recurrence's region."""

QUANTIZED = replace(MINI, moe_intermediate_size=32, moe_shared_expert_intermediate_size=48)
"""The same with experts that fit blocks of NVFP4."""

WIDE = replace(MINI, mamba_head_dim=32, n_groups=1, ssm_state_size=512)
"""The same with states that do not fit, as Nano's."""


def model_of(config: Any) -> Model:
    return Model("mini", config, RandomSource(config), Generation((), None, None))


def interpreted(functions: Iterable[StepFunction]) -> tuple[LaunchRecord, FakeLibrary]:
    """How kernels are launched, and a driver that interprets them."""
    functions = list(functions)
    kernels = {n.kernel.name: n.kernel for f in functions for n in f.launches}
    interpreter = Interpreter(kernels.values())

    def run(launch: FakeLaunch) -> None:
        types = pointer_types(kernels[launch.symbol])
        pairs = zip(launch.pointers, types, strict=True)
        # As many bytes of each, since a tensor may come as elements and as words.
        pointers = [tensor_at(at, dtype.torch, [8 // dtype.bytes]) for at, dtype in pairs]
        interpreter.launch(launch.symbol, pointers, dict(zip("BLC", launch.sizes, strict=True)))

    binaries = {name: binary_of(kernel) for name, kernel in kernels.items()}
    fakes = {n: FakeKernel(b.pointers, run) for n, b in binaries.items()}
    return LaunchRecord.of(TARGET, 0, binaries, functions), FakeLibrary(fakes)


def binary_of(kernel: Kernel) -> Binary:
    assert isinstance(kernel, GpuKernel)
    count = len(kernel.pointers)
    return Binary(f"{kernel.name}.cubin", kernel.name, 32 * kernel.warps, 0, count + 5, count)


def images_of(record: LaunchRecord) -> dict[str, bytes]:
    return {binary.file: CUBIN for binary in record.binaries}


def code_of(parts: Iterable[LoweredPart]) -> tuple[Code, FakeLibrary]:
    record, library = interpreted(f for one in parts for f in one.program.functions)
    return Code(record, images_of(record)), library


def region_of(lowered: LoweredPart, sizes: Sizes, values: Values) -> DeviceRegion:
    code, library = code_of([lowered])
    return DeviceRegion(lowered, sizes, Kernels(code, FakeDevice(library)), values)


@dataclass
class CountingClock:
    """Every run takes as many seconds as its number."""

    ran: list[Callable[[], object]] = field(default_factory=list)

    def seconds(self, run: Callable[[], object], before: Callable[[], object] = nothing) -> float:
        run()
        self.ran.append(run)
        return float(len(self.ran))


class SecondsClock:
    """Runs nothing, and says that it took a second."""

    def seconds(self, run: Callable[[], object], before: Callable[[], object] = nothing) -> float:
        return 1.0


def session_on(
    library: FakeLibrary, journal: Journal, model: Model | None = None, **options: Any
) -> Session:
    return Session(
        MACHINE,
        TARGET,
        lambda: FakeDevice(library, 1 << 32),
        SecondsClock(),
        ROOFS,
        journal,
        model or model_of(MINI),
        **options,
    )


def quiet(text: str) -> None:
    """Progress that nobody reads."""


def small(stage: PartStage, *cases: Case) -> PartStage:
    """A stage with other cases, and the parts that they are of."""
    wanted = {case.part for case in cases}
    parts = {name: make for name, make in stage.parts.items() if name in wanted}
    return replace(stage, cases=cases, parts=parts)
