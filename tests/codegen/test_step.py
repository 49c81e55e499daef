"""Step functions: phases in order, any number of tasks and threads, no compiler at run time."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import sympy

from nemoc.codegen.plan import Address, Arg, Launch, Stage, StepFunction, View
from nemoc.codegen.tvm import build
from nemoc.codegen.tvm.build import build_library, find_linker
from nemoc.codegen.tvm.step import module_source, step_source
from nemoc.codegen.tvm.target import cpu_target
from nemoc.codegen.tvm.writer import KernelWriter, offset_text, size_text
from nemoc.ir.dims import B, C, Dim, L, ceil_div
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import NemocError

WIDTH = 40


def ring_kernel(strided: bool, tasks: Dim = B) -> Stage:
    """Task i of B: y[i] = x[i] + x[i + 1 mod B] on rows of integers, which reads what another task wrote."""
    writer = KernelWriter("ring")
    view = View(DType.I32, (B, WIDTH), (WIDTH, 1))
    x = writer.buffer("x", Arg("operand", 0), view)
    y = writer.buffer("y", Arg("result", 0), view)
    with writer.loop("j", WIDTH) as j:
        here, there = writer.load(x, f"task, {j}"), writer.load(x, f"(task + 1) % B, {j}")
        writer.store(y, f"task, {j}", f"{here} + {there}")
    return writer.finish(tasks, strided)


def ring_step(name: str, phases: int, strided: bool) -> StepFunction:
    kernel = ring_kernel(strided).kernel
    places = (Address("a"), Address("b", 16 * C))
    launches = tuple(Launch(kernel, (places[i % 2], places[(i + 1) % 2])) for i in range(phases))
    return StepFunction(name, ("a", "b"), launches)


RUN = """
import ctypes, os, sys
from importlib.util import find_spec
from pathlib import Path

library, threads = sys.argv[1], sys.argv[2]
os.environ["TVM_NUM_THREADS"] = threads
import numpy as np
import tvm_ffi

runtime = Path(find_spec("tvm").origin).parent / "lib" / "libtvm_runtime.so"
ctypes.CDLL(str(runtime), ctypes.RTLD_GLOBAL)
module = tvm_ffi.load_module(library)
for name in ("ring", "strided"):
    for rows in (1, 2, 3, 7, 50):
        x = np.arange(rows * {width}, dtype=np.int32).reshape(rows, {width})
        a, b = x.copy(), np.full(rows * {width} + 16, -1, dtype=np.int32)
        module[name](ctypes.c_void_p(a.ctypes.data), ctypes.c_void_p(b.ctypes.data), rows, 1, 4)
        for _ in range({phases}):
            x = x + np.roll(x, -1, axis=0)
        assert np.array_equal(a, x), (name, rows)
assert "tvm" not in sys.modules
compiler = [line for line in open("/proc/self/maps") if "libtvm_compiler" in line]
assert not compiler
print("ok")
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("library") / "ring.so"
    steps = [ring_step("ring", 6, strided=False), ring_step("strided", 6, strided=True)]
    build_library(module_source(steps), cpu_target(), path)
    return path


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_phases_see_each_others_writes_without_the_compiler(library: Path, threads: int) -> None:
    """In a process of its own: the compiler is never loaded, and there may be more threads than tasks or cores."""
    script = textwrap.dedent(RUN).replace("{width}", str(WIDTH)).replace("{phases}", "6")
    done = subprocess.run(
        [sys.executable, "-c", script, str(library), str(threads)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "ok", done.stderr


def test_source_of_a_step() -> None:
    step = ring_step("ring", 2, strided=False)
    name = step.launches[0].kernel.name
    second = 'T.handle_add_byte_offset(b, (T.int64(16) * T.Cast("int64", C)))'
    head = "@T.prim_func(s_tir=True)\ndef ring(a: T.handle, b: T.handle, "
    wanted = f"""\
{head}B: T.int32, L: T.int32, C: T.int32):
    with T.attr(0, "pragma_parallel_launch_point", 1):
        with T.attr(0, "pragma_parallel_barrier_when_finish", 1):
            for task in T.parallel(B):
                T.evaluate(Module.{name}(task, a, {second}, B, L, C))
        with T.attr(0, "pragma_parallel_barrier_when_finish", 1):
            for task in T.parallel(B):
                T.evaluate(Module.{name}(task, {second}, a, B, L, C))
"""
    assert step_source(step) == textwrap.indent(wanted, "    ")


def test_a_kernel_appears_once_however_often_it_is_launched() -> None:
    source = module_source([ring_step("ring", 6, strided=False), ring_step("again", 3, False)])
    assert source.count("def ring_") == 1


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (7, "7"),
        (B * L, "(B * L)"),
        (ceil_div(B * L, 32), "((31 + (B * L)) // 32)"),
        (3 * C + 1, "(1 + (3 * C))"),
    ],
)
def test_sizes_as_text(size: Dim, text: str) -> None:
    assert size_text(size) == text


def test_offsets_are_64_bit() -> None:
    assert offset_text(2 * C) == '(T.int64(2) * T.Cast("int64", C))'


def test_a_size_that_no_kernel_can_compute_is_named() -> None:
    with pytest.raises(NemocError, match=r"dimension sqrt\(B\)"):
        size_text(sympy.sqrt(B))


def test_kernels_are_named_by_what_they_do() -> None:
    assert ring_kernel(False).kernel.name == ring_kernel(False).kernel.name
    assert ring_kernel(False).kernel.name != ring_kernel(True).kernel.name
    assert ring_kernel(False).kernel.name != ring_kernel(False, 2 * B).kernel.name


def test_a_missing_linker_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(NemocError, match="no linker found: the cpu target needs cc, gcc or clang"):
        find_linker()


def test_another_platforms_library_is_not_linked_here(tmp_path: Path) -> None:
    target = cpu_target("cpu:apple-m1")
    if target.host:
        pytest.skip("this machine is of that platform")
    with pytest.raises(NemocError, match="library for apple-m1"):
        build_library(module_source([ring_step("ring", 1, False)]), target, tmp_path / "x.so")


@pytest.mark.parametrize("name", ["cpu:nonsense", "cuda:sm_90", "cpu:"])
def test_unknown_targets_are_named(name: str) -> None:
    with pytest.raises(NemocError, match=f"target '{name}'"):
        cpu_target(name)


def test_targets_know_their_vectors() -> None:
    assert cpu_target("cpu:x86-64-v3").lanes == 8
    assert cpu_target("cpu:x86-64-v4").lanes == 16
    assert cpu_target("cpu:x86-64").lanes == 4
    assert cpu_target("cpu:znver3").architecture == "x86_64"
    assert cpu_target("cpu:apple-m1").triple == "arm64-apple-darwin"
    assert cpu_target("cpu:neoverse-n1").architecture == "aarch64"


def test_importing_codegen_does_not_load_tvm() -> None:
    script = (
        "import sys, nemoc.codegen.lower, nemoc.codegen.memory; assert 'tvm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
