"""Step functions: phases in order, any number of tasks and threads, no compiler at run time."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import sympy

from nemoc.codegen.plan import Address, Arg, Launch, Stage, StepFunction, View
from nemoc.codegen.tvm import build
from nemoc.codegen.tvm.build import build_library, find_linker
from nemoc.codegen.tvm.claim import CLAIM, claim_source
from nemoc.codegen.tvm.clock import mark_source
from nemoc.codegen.tvm.step import module_source, step_source
from nemoc.codegen.tvm.target import cpu_target
from nemoc.codegen.tvm.writer import KernelWriter, offset_text, size_text
from nemoc.ir.dims import B, C, Dim, L, ceil_div
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import NemocError

WIDTH = 40


def ring_kernel(tasks: Dim = B) -> Stage:
    """Task i of B: y[i] = x[i] + x[i + 1 mod B] on rows of integers, which reads what another task wrote."""
    writer = KernelWriter("ring")
    view = View(DType.I32, (B, WIDTH), (WIDTH, 1))
    x = writer.buffer("x", Arg("operand", 0), view)
    y = writer.buffer("y", Arg("result", 0), view)
    with writer.loop("j", WIDTH) as j:
        here, there = writer.load(x, f"task, {j}"), writer.load(x, f"(task + 1) % B, {j}")
        writer.store(y, f"task, {j}", f"{here} + {there}")
    return writer.finish(tasks)


def ring_step(name: str, phases: int) -> StepFunction:
    """Back and forth between two arenas."""
    kernel = ring_kernel().kernel
    places = (Address("a"), Address("b", 16 * C))
    launches = [Launch(kernel, (places[i % 2], places[(i + 1) % 2])) for i in range(phases)]
    return StepFunction(name, ("a", "b"), tuple((launch,) for launch in launches))


def braid_step(name: str, phases: int) -> StepFunction:
    """Two rings side by side, each on what the other one wrote in the phase before."""
    kernel = ring_kernel().kernel
    a, b, c, d = map(Address, "abcd")
    there = (Launch(kernel, (a, b)), Launch(kernel, (d, c)))
    back = (Launch(kernel, (c, a)), Launch(kernel, (b, d)))
    return StepFunction(name, ("a", "b", "c", "d"), (there, back) * (phases // 2))


def uneven_step(name: str) -> StepFunction:
    """One launch and two in turn: a ring between a and b, and one between c and d, three times each."""
    kernel = ring_kernel().kernel
    a, b, c, d = map(Address, "abcd")
    ab, ba, cd, dc = (Launch(kernel, pair) for pair in ((a, b), (b, a), (c, d), (d, c)))
    phases = ((ab,), (ba, cd), (dc,), (ab, cd))
    return StepFunction(name, ("a", "b", "c", "d"), phases)


def waiting_step(name: str) -> StepFunction:
    """Eight tasks; the first waits until all others have run, or some seconds. They count themselves in x[0]."""
    writer = KernelWriter("waiting")
    x = writer.buffer("x", Arg("operand", 0), View(DType.I32, (9,), (1,)))

    def claim(tasks: int) -> str:
        places = f"T.address_of({x}[0]), T.address_of({x}[1 + task])"
        return f'T.evaluate(T.call_extern("int32", "{CLAIM}", {places}, {tasks}, 0, 1))'

    with writer.block("if task > 0:"):
        writer.line(claim(8))
    with writer.block("if task == 0:"):
        rounds = writer.value("rounds", "0", dtype="int32")
        with writer.block(f"while {writer.load(x, '0')} < 7 and {rounds} < 1000000000:"):
            writer.line(claim(0))  # so that it is loaded again
            writer.line(f"{rounds} = {rounds} + 1")
        writer.store(x, "1", writer.load(x, "0"))
    launch = Launch(writer.finish(8).kernel, (Address("a"),))
    return StepFunction(name, ("a",), ((launch,),))


START = """
import ctypes, os, sys
from importlib.util import find_spec
from pathlib import Path

library, pool, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
os.environ["TVM_NUM_THREADS"] = pool
import numpy as np
import tvm_ffi

runtime = Path(find_spec("tvm").origin).parent / "lib" / "libtvm_runtime.so"
ctypes.CDLL(str(runtime), ctypes.RTLD_GLOBAL)
module = tvm_ffi.load_module(library)
"""

RUN = """
for rows in (0, 1, 2, 3, 7, 50):
    x = np.arange(rows * {width}, dtype=np.int32).reshape(rows, {width})
    a, b = x.copy(), np.full(rows * {width} + 16, -1, dtype=np.int32)
    module["ring"](ctypes.c_void_p(a.ctypes.data), ctypes.c_void_p(b.ctypes.data), rows, 1, 4, threads, None)
    for _ in range({phases}):
        x = x + np.roll(x, -1, axis=0)
    assert np.array_equal(a, x), ("ring", rows)
for rows in (0, 1, 2, 3, 7, 50):
    x = np.arange(2 * rows * {width}, dtype=np.int32).reshape(2, rows, {width})
    a, b, c, d = x[0].copy(), np.full_like(x[0], -1), np.full_like(x[0], -1), x[1].copy()
    pointers = (ctypes.c_void_p(array.ctypes.data) for array in (a, b, c, d))
    module["braid"](*pointers, rows, 1, 4, threads, None)
    for _ in range({phases}):
        x = x + np.roll(x, -1, axis=1)
    swapped = {phases} // 2 % 2
    assert np.array_equal(a, x[swapped]) and np.array_equal(d, x[1 - swapped]), ("braid", rows)
for rows in (0, 1, 2, 3, 7, 50):
    x = np.arange(2 * rows * {width}, dtype=np.int32).reshape(2, rows, {width})
    a, b, c, d = x[0].copy(), np.full_like(x[0], -1), x[1].copy(), np.full_like(x[0], -1)
    pointers = (ctypes.c_void_p(array.ctypes.data) for array in (a, b, c, d))
    module["uneven"](*pointers, rows, 1, 4, threads, None)
    for _ in range(3):
        x = x + np.roll(x, -1, axis=1)
    assert np.array_equal(b, x[0]) and np.array_equal(d, x[1]), ("uneven", rows)
assert "tvm" not in sys.modules
compiler = [line for line in open("/proc/self/maps") if "libtvm_compiler" in line]
assert not compiler
print("ok")
"""

WAIT = """
for _ in range(20):
    a = np.array([0, *[-1] * 8], dtype=np.int32)
    module["waiting"](ctypes.c_void_p(a.ctypes.data), 1, 1, 1, threads, None)
    assert a[:2].tolist() == [7, 7] and sorted(a[2:]) == list(range(7)), a
print("ok")
"""


MARKS = """
import time

marks = np.full((threads, 10), -1, dtype=np.int64)
x = np.zeros((4, 50 * {width}), dtype=np.int32)
pointers = [ctypes.c_void_p(array.ctypes.data) for array in x]
before = time.monotonic_ns()
module["uneven"](*pointers, 50, 1, 4, threads, ctypes.c_void_p(marks.ctypes.data))
after = time.monotonic_ns()
assert (before <= marks).all() and (marks <= after).all(), marks
assert (np.diff(marks, axis=1) >= 0).all(), marks
begins, ends = marks[:, [2, 5, 7]], marks[:, [1, 4, 6]]  # of phases of 1, 2, 1 and 2 launches
assert (ends.max(0) <= begins.min(0)).all(), marks
print("ok")
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("library") / "ring.so"
    steps = [ring_step("ring", 6), braid_step("braid", 6), uneven_step("uneven")]
    steps.append(waiting_step("waiting"))
    build_library(module_source(steps), cpu_target(), path)
    return path


def run(library: Path, script: str, pool: int, threads: int) -> None:
    """Run a script in a process of its own, whose pool has some threads, with steps for some threads."""
    done = subprocess.run(
        [sys.executable, "-c", START + script, str(library), str(pool), str(threads)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "ok", done.stderr


@pytest.mark.parametrize(
    ("pool", "threads"), [(1, 1), (2, 2), (5, 5), (1, 3), (2, 3), (5, 2)], ids=str
)
def test_phases_see_each_others_writes_without_the_compiler(
    library: Path, pool: int, threads: int
) -> None:
    """The compiler is never loaded; there may be more threads than tasks or cores, or a pool of another size."""
    run(library, RUN.replace("{width}", str(WIDTH)).replace("{phases}", "6"), pool, threads)


def test_a_thread_takes_tasks_that_another_does_not_get_to(library: Path) -> None:
    run(library, WAIT, 2, 2)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_note_when_phases_begin_and_launches_end(library: Path, threads: int) -> None:
    run(library, MARKS.replace("{width}", str(WIDTH)), 2, threads)


@pytest.mark.parametrize("name", ["cpu:x86-64-v3", "cpu:apple-m1", "cpu:neoverse-n1"])
def test_what_all_steps_call_compiles_for_other_cpus(name: str, tmp_path: Path) -> None:
    target = cpu_target(name)
    for number, source in enumerate((claim_source(target), mark_source(target))):
        path = tmp_path / f"{number}.o"
        build.compile_llvm(source, target).write_to_file(str(path))
        assert path.stat().st_size > 0


def test_source_of_a_step() -> None:
    step = ring_step("ring", 2)
    name = step.launches[0].kernel.name
    second = 'T.handle_add_byte_offset(b, (T.int64(16) * T.Cast("int64", C)))'
    mine = "memory[(2 * threads + thread) * 32]"

    def mark(number: int) -> str:
        return f"""\
                    T.evaluate(T.call_extern("int32", "nemoc_mark", times, thread * 4 + {number}))
"""

    def loop(row: int, x: str, y: str) -> str:
        claims = f"T.address_of(memory[({row} * threads + 0) * 32]), T.address_of({mine})"
        claim = f'T.call_extern("int32", "nemoc_claim", {claims}, B, thread, threads)'
        return f"""\
                    while {claim} != 0:
                        T.evaluate(Module.{name}({mine}, {x}, {y}, B, L, C))
"""

    head = "@T.prim_func(s_tir=True)\ndef ring(a: T.handle, b: T.handle, "
    wanted = f"""\
{head}B: T.int32, L: T.int32, C: T.int32, threads: T.int32, times: T.handle):
    with T.attr(0, "device_type", 1), T.attr(0, "device_id", 0):
        memory = T.alloc_buffer((3 * threads * 32,), "int32")
        for line in range(1 * threads):
            memory[line * 32] = 0
        with T.attr(0, "pragma_parallel_launch_point", 1):
            with T.attr(0, "pragma_parallel_barrier_when_finish", 1):
                for thread in T.parallel(threads):
{mark(0)}\
                    memory[(1 * threads + thread) * 32] = 0
{loop(0, "a", second)}{mark(1)}\
            with T.attr(0, "pragma_parallel_barrier_when_finish", 1):
                for thread in T.parallel(threads):
{mark(2)}{loop(1, second, "a")}{mark(3)}"""
    assert step_source(step) == textwrap.indent(wanted, "    ")


def test_launches_side_by_side_have_one_barrier_behind_them() -> None:
    """And claims of their own, in rows that phases use in turn."""
    text = step_source(braid_step("braid", 4))
    _, *phases = text.split('T.attr(0, "pragma_parallel_barrier_when_finish", 1)')
    rows = [re.findall(r"address_of\(memory\[\((\d) \* threads \+ 0\)", p) for p in phases]
    assert rows == [["0", "1"], ["2", "3"]] * 2
    cleared = [re.findall(r"memory\[\((\d) \* threads \+ thread\) \* 32\] = 0", p) for p in phases]
    assert cleared == [["2", "3"], ["0", "1"], ["2", "3"], []]


def test_launches_of_all_phases_in_order() -> None:
    step = braid_step("braid", 4)
    assert step.launches == (*step.phases[0], *step.phases[1]) * 2


def test_a_kernel_appears_once_however_often_it_is_launched() -> None:
    source = module_source([ring_step("ring", 6), ring_step("again", 3)])
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
    assert ring_kernel().kernel.name == ring_kernel().kernel.name
    assert ring_kernel().kernel.name != ring_kernel(2 * B).kernel.name


def test_a_missing_linker_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(NemocError, match="no linker found: the cpu target needs cc, gcc or clang"):
        find_linker()


def test_another_platforms_library_is_not_linked_here(tmp_path: Path) -> None:
    target = cpu_target("cpu:apple-m1")
    if target.host:
        pytest.skip("this machine is of that platform")
    with pytest.raises(NemocError, match="library for apple-m1"):
        build_library(module_source([ring_step("ring", 1)]), target, tmp_path / "x.so")


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
