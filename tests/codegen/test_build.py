"""Libraries are linked from functions that are compiled one by one, and kept."""

import dataclasses
import re
from pathlib import Path

import pytest
import tvm_ffi

from nemoc.codegen.object_store import ObjectStore
from nemoc.codegen.plan import Address, Arg, Launch, Stage, StepFunction, View
from nemoc.codegen.tvm import build as building
from nemoc.codegen.tvm.build import build_library, lower_module
from nemoc.codegen.tvm.step import module_source
from nemoc.codegen.tvm.target import CpuTarget, cpu_target
from nemoc.codegen.tvm.writer import KernelWriter
from nemoc.ir.dims import B
from nemoc.ir.dtypes import DType

WIDTH = 40
BYTES_PER_LAUNCH = 350
"""More machine code than a launch takes that calls its kernel, and less than one that holds a copy of it."""


def kernel(stem: str) -> Stage:
    """Task i of B: y[i] = x[i] squared thirty times, small enough that LLVM would copy it to its callers."""
    writer = KernelWriter(stem)
    view = View(DType.F32, (B, WIDTH), (WIDTH, 1))
    x = writer.buffer("x", Arg("operand", 0), view)
    y = writer.buffer("y", Arg("result", 0), view)
    with writer.loop("j", WIDTH) as j:
        value = writer.value("v", writer.load(x, f"task, {j}"))
        for _ in range(30):
            writer.line(f"{value} = {value} * {value}")
        writer.store(y, f"task, {j}", value)
    return writer.finish(B)


def step(name: str, launches: int) -> StepFunction:
    """A step that launches two kernels in turn, with a barrier after each."""
    kernels = kernel("one").kernel, kernel("other").kernel
    places = Address("arena"), Address("arena", 4096)
    phases = tuple(
        (Launch(kernels[i % 2], (places[i % 2], places[(i + 1) % 2])),) for i in range(launches)
    )
    return StepFunction(name, ("arena",), phases)


@pytest.fixture(scope="module")
def target() -> CpuTarget:
    return cpu_target()


def test_code_of_a_step_does_not_repeat_its_kernels(target: CpuTarget, tmp_path: Path) -> None:
    """So what a layer adds is the same little for every kernel, to the library and to LLVM's memory."""
    few, many = 20, 220
    sizes = []
    for launches in (few, many):
        path = tmp_path / f"{launches}.so"
        build_library(module_source([step("step", launches)]), target, path)
        sizes.append(path.stat().st_size)
    assert sizes[1] - sizes[0] < (many - few) * BYTES_PER_LAUNCH


def test_every_step_function_is_exported(target: CpuTarget, tmp_path: Path) -> None:
    path = tmp_path / "steps.so"
    build_library(module_source([step("first", 2), step("second", 3)]), target, path)
    module = tvm_ffi.load_module(str(path))
    assert callable(module["first"]) and callable(module["second"])


def test_a_kernel_that_is_elsewhere_is_called_by_its_name(target: CpuTarget) -> None:
    source = module_source([step("step", 2)])
    head, *functions = re.split(r"^(?=    @T\.prim_func)", source, flags=re.MULTILINE)
    module = lower_module(head + functions[-1], target)
    text = module["step"].script()
    name = kernel("one").kernel.name
    assert f'call_extern("int32", "{name}"' in text
    assert name not in {variable.name_hint for variable in module.get_global_vars()}


@pytest.fixture
def stored(target: CpuTarget, tmp_path: Path) -> ObjectStore:
    """What a step of two launches was compiled into."""
    store = ObjectStore(tmp_path / "objects")
    build_library(module_source([step("first", 2)]), target, tmp_path / "first.so", store)
    return store


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The text of what is compiled from now on."""
    seen: list[str] = []
    compile_module = building.compile_module

    def note(source: str, target: CpuTarget) -> object:
        seen.append(source)
        return compile_module(source, target)

    monkeypatch.setattr(building, "compile_module", note)
    return seen


def test_only_new_functions_are_compiled(
    stored: ObjectStore, compiled: list[str], target: CpuTarget, tmp_path: Path
) -> None:
    path = tmp_path / "steps.so"
    build_library(module_source([step("first", 2), step("second", 3)]), target, path, stored)
    assert ["def second(" in text for text in compiled] == [True]
    module = tvm_ffi.load_module(str(path))
    assert callable(module["first"]) and callable(module["second"])


def test_functions_are_compiled_again_for_another_cpu(
    stored: ObjectStore, compiled: list[str], target: CpuTarget, tmp_path: Path
) -> None:
    other = dataclasses.replace(target, registers=target.registers + 1)
    build_library(module_source([step("first", 2)]), other, tmp_path / "other.so", stored)
    assert len(compiled) == 3
