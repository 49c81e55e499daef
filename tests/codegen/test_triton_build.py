"""GPU kernels compiled in children: which variants, what comes out, what is kept, and what happens if one fails."""

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import sympy

from nemoc.codegen.children import Children, answers
from nemoc.codegen.plan import Address, Arg, Launch, StepFunction
from nemoc.codegen.triton.binary import Binary, Occupancy
from nemoc.codegen.triton.build import (
    COMPILERS,
    Variant,
    compile_variants,
    triton_version,
    try_variants,
    variants_of,
)
from nemoc.codegen.triton.inspect_binary import inspect_output, occupancy
from nemoc.codegen.triton.kernel_store import KernelStore
from nemoc.codegen.triton.module import module_source
from nemoc.codegen.triton.target import GPUS, GpuTarget, gpu_target
from nemoc.codegen.triton.writer import GpuKernel, KernelWriter
from nemoc.ir.dims import B, C, Dim, L, ceil_div
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import NemocError

pytest.importorskip("triton")

SM_90 = gpu_target("cuda:sm_90")
ONE = dataclasses.replace(COMPILERS, jobs=1, seconds=100)
MATRIX = {
    "cuda:sm_80": "mma.sync.bf16",
    "cuda:sm_90": "wgmma.mma_async.bf16",
    "cuda:sm_100": "tcgen05.mma.kind::f16",
    "cuda:sm_120": "mma.sync.bf16",
    "hip:gfx942": "v_mfma_f32_32x32x8_bf16",
    "hip:gfx950": "v_mfma_f32_32x32x16_bf16",
}


def kernel(stem: str, statement: str = "tl.store(p1 + i, tl.load(p0 + i) * 2.0)") -> GpuKernel:
    """A kernel of p0 and p1, on 1024 elements i of each."""
    writer = KernelWriter(stem)
    writer.pointer(Arg("operand", 0), DType.F32)
    writer.pointer(Arg("result", 0), DType.F32)
    writer.line("i = tl.program_id(0) * 1024 + tl.arange(0, 1024)")
    writer.line(statement)
    return as_gpu_kernel(writer.finish(B).kernel)


def product(dtype: DType = DType.BF16) -> GpuKernel:
    """A product of two 64 by 64 matrices."""
    writer = KernelWriter("product")
    for number, pointee in enumerate((dtype, dtype, DType.F32)):
        writer.pointer(Arg("operand", number), pointee)
    writer.line("i = tl.arange(0, 64)")
    writer.line("at = i[:, None] * 64 + i[None, :]")
    writer.line("sums = tl.zeros([64, 64], tl.float32)")
    writer.line("tl.store(p2 + at, dot(tl.load(p0 + at), tl.load(p1 + at), sums))")
    return as_gpu_kernel(writer.finish(1).kernel)


def as_gpu_kernel(found: object) -> GpuKernel:
    assert isinstance(found, GpuKernel)
    return found


def variant(kernel: GpuKernel, aligned: bool = True) -> Variant:
    return Variant(kernel, (aligned,) * len(kernel.pointers))


def patched_worker(statements: str) -> Children:
    """Children in which a function that compiles kernels by `request` and `target` has these statements first."""
    body = "\n    ".join(statements.splitlines())
    script = f"""\
import os, sys, time
import triton
from nemoc.codegen.triton import worker
compile_kernel = worker.compile_kernel
def patched(request, target):
    {body}
    return compile_kernel(request, target)
worker.compile_kernel = patched
worker.main()
"""
    return dataclasses.replace(ONE, command=(sys.executable, "-P", "-c", script))


def no_process(*args: object, **kwargs: object) -> None:
    raise AssertionError("a process was started")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Variant, Binary]:
    """A folder with one compiled kernel, to be left as it is."""
    folder = tmp_path_factory.mktemp("kernels")
    wanted = variant(kernel("rows"))
    found = compile_variants([wanted], SM_90, ONE, KernelStore(folder))
    return folder, wanted, found[wanted]


@pytest.mark.parametrize(
    ("offset", "aligned"),
    [
        (0, True),
        (48, True),
        (40, False),
        (16 * B, True),
        (8 * B, False),
        (32 * B * C + 16 * L + 64, True),
        (32 * B * C + 8 * L + 64, False),
        (16 * B + 4, False),
        (64 * ceil_div(6 * B, 64), True),
        (ceil_div(6 * B, 64), False),
        (sympy.Integer(32) * B / 3, False),
    ],
)
def test_a_pointer_is_aligned_if_its_offset_is_for_all_sizes(offset: Dim, aligned: bool) -> None:
    launch = Launch(kernel("rows"), (Address("weights", offset), Address("out")))
    functions = [StepFunction("f", ("weights",), ((launch,),))]
    assert variants_of(functions)[launch.kernel.name].aligned == (aligned, True)


def test_a_kernel_knows_of_a_pointer_what_all_its_launches_do() -> None:
    one, other = kernel("one"), kernel("other")
    near, far = Address("weights", 64), Address("weights", 4)
    phases = (
        (Launch(one, (near, near)), Launch(other, (near, far))),
        (Launch(one, (near, Address("state", 16 * B))), Launch(one, (near, far))),
    )
    functions = [StepFunction(name, ("weights", "state"), phases) for name in ("first", "second")]
    assert variants_of(functions) == {
        one.name: Variant(one, (True, False)),
        other.name: Variant(other, (True, False)),
    }


@pytest.mark.parametrize("name", MATRIX)
def test_kernels_compile_for_every_gpu(name: str) -> None:
    target = gpu_target(name)
    wanted = [variant(kernel("rows")), variant(product())]
    told: list[tuple[str, int, int]] = []
    found = compile_variants(
        wanted, target, ONE, progress=lambda stage, done, total: told.append((stage, done, total))
    )
    rows, made = (found[v] for v in wanted)
    for wants, binary in zip(wanted, (rows, made), strict=True):
        assert binary.code.startswith(b"\x7fELF")
        assert binary.symbol == wants.kernel.name
        assert binary.symbol.encode() in binary.code
        pointers = len(wants.kernel.pointers)
        assert binary.parameters[: pointers + 3] == ("pointer",) * pointers + ("i32",) * 3
        assert binary.threads == 4 * target.warp
        assert 0 < binary.report.registers <= 256 and binary.report.spilled == 0
        assert binary.report.occupancy.programs > 0
        assert binary.report.plain == ()
        assert binary.waits == target.waits
    assert rows.report.matrix == () and rows.shared == 0
    assert [kind for kind, _ in made.report.matrix] == [MATRIX[name]]
    assert made.shared > 0 and (made.tensor_memory > 0) == (name == "cuda:sm_100")
    assert told == [("compiling kernels", done, 2) for done in (0, 1, 2)]


def test_nvidia_gpus_wait_from_hopper_on() -> None:
    assert {name for name, target in GPUS.items() if target.waits} == {
        name for name in GPUS if re.fullmatch(r"cuda:sm_(9|1.)\d", name)
    }


def test_every_gpu_has_a_test() -> None:
    assert set(MATRIX) == {name for name, target in GPUS.items() if not target.is_interpreter}


def test_products_without_matrix_instructions_are_named() -> None:
    target = dataclasses.replace(SM_90, products="ieee")
    wanted = variant(product(DType.F32))
    report = compile_variants([wanted], target, ONE)[wanted].report
    assert (report.matrix, report.plain) == ((), ("64x64xf32 * 64x64xf32",))


def test_alignment_is_told_to_the_compiler() -> None:
    wanted = [variant(kernel("rows"), aligned) for aligned in (True, False)]
    found = compile_variants(wanted, SM_90, ONE)
    assert found[wanted[0]].code != found[wanted[1]].code


@pytest.mark.parametrize("name", ["cuda:sm_90", "hip:gfx942"])
def test_parameters_are_those_that_the_compiler_declares(name: str, tmp_path: Path) -> None:
    target, made = gpu_target(name), kernel("rows")
    module = tmp_path / "kernel.py"
    module.write_text(module_source([made], target))
    setup = {"backend": target.backend, "arch": target.arch, "warp": target.warp}
    request = {
        "module": str(module),
        "kernel": made.name,
        "signature": {"p0": "*fp32", "p1": "*fp32", "B": "i32", "L": "i32", "C": "i32"},
        "aligned": [0, 1],
        "warps": 4,
        "stages": 3,
    }
    ((_, answer),) = answers([request], setup, ONE, tmp_path)
    declaration = ".param ." if target.backend == "cuda" else ".value_kind:"
    declared = answer["assembly"].count(declaration)
    assert len(inspect_output(answer, 2, target).parameters) == declared


def output(assembly: str, log: str = "ptxas info    : Used 40 registers") -> dict[str, Any]:
    """A worker's answer for sm_90."""
    metadata = {"name": "rows", "num_warps": 4, "shared": 0}
    return {"code": "", "assembly": assembly, "ttgir": "", "log": log, "metadata": metadata}


def entry(*types: str) -> str:
    params = ",\n".join(f"\t.param .{t} rows_param_{i}" for i, t in enumerate(types))
    return f".visible .entry rows(\n{params}\n)\n.reqntid 128\n{{ ret; }}"


def test_hidden_pointers_are_counted() -> None:
    known = ("u64 .ptr .global .align 1", "u32", "u32", "u32")
    hidden = ("global_scratch", "profile_scratch")
    for count in range(3):
        ptx = entry(*known, *["u64 .ptr .global .align 1"] * count)
        found = inspect_output(output(ptx), 1, SM_90)
        assert found.parameters == ("pointer", "i32", "i32", "i32", *hidden[:count])
    for wrong in (("u64",) * 7, known[:2], (*known, "u32"), ()):
        with pytest.raises(NemocError, match=r"expected 1 pointers, 3 sizes and at most 2"):
            inspect_output(output(entry(*wrong)), 1, SM_90)


@pytest.mark.parametrize(
    ("body", "waits"),
    [
        ("ld.param.b64 %rd1, [rows_param_0];\ngriddepcontrol.wait; // dummy %r1\nret;", True),
        ("@%p1 tcgen05.alloc.b32 [%r4], 64;\nld.shared.b32 %r1, [s];\ngriddepcontrol.wait;", True),
        ("griddepcontrol.wait;\nld.global.b32 %r1, [%rd1];\nst.global.b32 [%rd2], %r1;", True),
        ("prefetch.global.L2 [%rd1];\ngriddepcontrol.wait;", True),
        ("griddepcontrol.launch_dependents;\nret;", False),
        ("ld.global.b32 %r1, [%rd1];\ngriddepcontrol.wait;", False),
        ("@%p1 ld.global.b32 %r1, [%rd1];\ngriddepcontrol.wait;", False),
        ("ld.b32 %r1, [%rd1];\ngriddepcontrol.wait;", False),
        ("\tst.volatile.global.b32 [%rd1], %r1;\ngriddepcontrol.wait;", False),
        ("red.global.add.u32 [%rd1], 1;\ngriddepcontrol.wait;", False),
        ("cp.async.cg.shared.global [%r1], [%rd1], 16;\ngriddepcontrol.wait;", False),
        ("@%p2 bra $L__BB0_2;\ngriddepcontrol.wait;", False),
        ("@!%p2 ret;\ngriddepcontrol.wait;", False),
        ("ret;", False),
    ],
)
def test_a_kernel_waits_if_nothing_comes_before_it(body: str, waits: bool) -> None:
    ptx = entry("u64 .ptr .global .align 1", "u32", "u32", "u32").replace(
        "{ ret; }", f"{{\n{body}\n}}"
    )
    assert inspect_output(output(ptx), 1, SM_90).waits is waits


@pytest.mark.parametrize(
    ("body", "waits"),
    [
        ("ld.global.v4.b32 { %r1, %r2 }, [ %rd3 + 0 ];", True),
        ("@%p1 ld.global.b16 { %rs1 }, [ %rd3 + 64 ];", True),
        ("ld.global.b32 %r1, [%rd4];", False),  # of the other pointer
        ("add.s64 %rd5, %rd3, %rd4;\nld.global.b32 %r1, [%rd5];", False),  # of both
        ("ld.global.b32 %r1, [%rd9];", False),  # of none that is known
        ("ld.global.b64 %rd5, [%rd3];\nld.global.b32 %r1, [%rd5];", False),
        ("st.global.b32 [%rd3], %r1;", False),
        ("cp.async.cg.shared.global [%r1], [%rd3], 16;", False),
    ],
)
def test_a_kernel_may_load_what_no_kernel_writes_before_it_waits(body: str, waits: bool) -> None:
    pointer = "u64 .ptr .global .align 1"
    before = """
        ld.param.b64 %rd1, [rows_param_0];
        ld.param.b64 %rd2, [rows_param_1];
        mad.wide.s32 %rd3, %r5, 4, %rd1;
        add.s64 %rd4, %rd2, 16;
    """
    ptx = entry(pointer, pointer, "u32", "u32", "u32").replace(
        "{ ret; }", f"{{\n{before}\n{body}\ngriddepcontrol.wait;\nret;\n}}"
    )
    assert inspect_output(output(ptx), 2, SM_90, early=(0,)).waits is waits
    assert not inspect_output(output(ptx), 2, SM_90).waits


def test_fragments_that_lie_elsewhere_are_refused() -> None:
    def product(layout: str) -> str:
        return f"""
#blocked = #ttg.blocked<{{sizePerThread = [1, 4], threadsPerWarp = [2, 16], warpsPerCTA = [4, 1], order = [1, 0]}}>
#blocked1 = #ttg.blocked<{{sizePerThread = [1, 1], threadsPerWarp = [8, 4], warpsPerCTA = [4, 1], order = [1, 0]}}>
    %sums = tt.elementwise_inline_asm "mma.sync" %x : tensor<32x4xbf16, {layout}> -> tensor<32x4xf32, {layout}>
    %other = arith.addf %a, %b : tensor<32x16xf32, #blocked>
"""

    ptx = entry("u64 .ptr .global .align 1", "u32", "u32", "u32")
    assert inspect_output({**output(ptx), "ttgir": product("#blocked1")}, 1, SM_90)
    for layout in ("#blocked", "#linear"):
        with pytest.raises(NemocError, match="matrix fragments lie as #"):
            inspect_output({**output(ptx), "ttgir": product(layout)}, 1, SM_90)
    nameless = '%sums = "asm" "mma.sync" %x : tensor<32x4xf32>'
    with pytest.raises(NemocError, match="matrix fragments lie as nothing says"):
        inspect_output({**output(ptx), "ttgir": nameless}, 1, SM_90)


def test_the_assemblers_log_is_read() -> None:
    log = """\
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized in the function 'rows'
ptxas info    : Compiling entry function 'rows' for 'sm_90a'
    24 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas-blackwell info    : Used 255 registers, used 1 barriers
"""
    report = inspect_output(output(entry("u64", "u32", "u32", "u32"), log), 1, SM_90).report
    assert (report.registers, report.spilled) == (255, 40)
    assert report.warnings == (
        "(C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized",
    )
    with pytest.raises(NemocError, match="names no registers"):
        inspect_output(output(entry("u64", "u32", "u32", "u32"), ""), 1, SM_90)


@pytest.mark.parametrize(
    ("name", "warps", "registers", "shared", "expected"),
    [
        ("cuda:sm_80", 8, 32, 0, Occupancy(8, 64, "warps")),
        ("cuda:sm_80", 8, 64, 0, Occupancy(4, 32, "registers")),
        ("cuda:sm_80", 8, 65, 0, Occupancy(3, 24, "registers")),
        ("cuda:sm_80", 1, 16, 0, Occupancy(32, 32, "warps")),
        ("cuda:sm_90", 4, 168, 0, Occupancy(3, 12, "registers")),
        ("cuda:sm_90", 4, 32, 227 * 1024, Occupancy(1, 4, "shared memory")),
        ("cuda:sm_90", 4, 32, 113 * 1024, Occupancy(2, 8, "shared memory")),
        ("cuda:sm_120", 2, 16, 0, Occupancy(24, 48, "warps")),
        ("hip:gfx942", 4, 128, 0, Occupancy(4, 16, "registers")),
        ("hip:gfx942", 4, 129, 0, Occupancy(3, 12, "registers")),
        ("hip:gfx942", 4, 64, 32768, Occupancy(2, 8, "shared memory")),
    ],
)
def test_occupancy(name: str, warps: int, registers: int, shared: int, expected: Occupancy) -> None:
    assert occupancy(gpu_target(name), warps, registers, shared) == expected


def test_tensor_memory_limits_occupancy() -> None:
    found = occupancy(gpu_target("cuda:sm_100"), 4, 64, 0, tensor_memory=256)
    assert found == Occupancy(2, 8, "tensor memory")


def test_what_was_compiled_once_is_not_compiled_again(
    stored: tuple[Path, Variant, Binary], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, wanted, binary = stored
    monkeypatch.setattr(subprocess, "Popen", no_process)
    assert compile_variants([wanted], SM_90, store=KernelStore(folder)) == {wanted: binary}


@pytest.mark.parametrize(
    "other",
    [
        lambda v, t: (dataclasses.replace(v, aligned=(True, False)), t),
        lambda v, t: (Variant(dataclasses.replace(v.kernel, warps=8), v.aligned), t),
        lambda v, t: (Variant(dataclasses.replace(v.kernel, stages=2), v.aligned), t),
        lambda v, t: (v, gpu_target("cuda:sm_80")),
        lambda v, t: (v, dataclasses.replace(t, products="ieee")),
    ],
)
def test_another_kernel_is_compiled(
    stored: tuple[Path, Variant, Binary],
    other: Callable[[Variant, GpuTarget], tuple[Variant, GpuTarget]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, wanted, _ = stored
    monkeypatch.setattr(subprocess, "Popen", no_process)
    changed, target = other(wanted, SM_90)
    with pytest.raises(AssertionError, match="a process was started"):
        compile_variants([changed], target, ONE, KernelStore(folder))


def flip(content: bytes) -> bytes:
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


@pytest.mark.parametrize(
    "damage", [flip, lambda content: content[:-1], lambda content: b"", lambda content: b"\xff\n{}"]
)
def test_a_damaged_entry_counts_as_absent(
    stored: tuple[Path, Variant, Binary], damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    (source,) = stored[0].iterdir()
    (tmp_path / source.name).write_bytes(damage(source.read_bytes()))
    assert KernelStore(tmp_path).get(source.stem) is None
    (tmp_path / source.name).write_bytes(source.read_bytes())
    assert KernelStore(tmp_path).get(source.stem) == stored[2]


def test_a_damaged_entry_is_compiled_and_stored_again(
    stored: tuple[Path, Variant, Binary], tmp_path: Path
) -> None:
    (source,) = stored[0].iterdir()
    copy = tmp_path / source.name
    copy.write_bytes(flip(source.read_bytes()))
    found = compile_variants([stored[1]], SM_90, ONE, KernelStore(tmp_path))
    assert found == {stored[1]: stored[2]}
    assert copy.read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"code": "?"},
        {"symbol": 1},
        {"warps": -4},
        {"warps": True},
        {"waits": 1},
        {"parameters": ["pointer", "f32"]},
        {"parameters": "pointer"},
        {"report": []},
        {"global_scratch": {"bytes": 1.5, "alignment": 1}},
    ],
)
def test_a_record_with_a_wrong_field_is_refused(
    stored: tuple[Path, Variant, Binary], change: dict[str, Any]
) -> None:
    record = json.loads(json.dumps(stored[2].record()))
    assert Binary.from_record(record) == stored[2]
    with pytest.raises(ValueError):
        Binary.from_record(record | change)


def test_the_store_keeps_what_was_used_last(
    stored: tuple[Path, Variant, Binary], tmp_path: Path
) -> None:
    size = next(stored[0].iterdir()).stat().st_size
    store = KernelStore(tmp_path, bytes=2 * size + size // 2)
    (tmp_path / "somebody's.txt").write_text("not a kernel")
    for key in ("a" * 64, "b" * 64, "c" * 64):
        store.put(key, stored[2])
    assert store.get("a" * 64) is not None
    store.prune()
    assert [store.get(key * 64) is not None for key in "abc"] == [True, False, True]
    assert (tmp_path / "somebody's.txt").exists()


def test_a_store_that_cannot_be_written_to_is_no_error(
    stored: tuple[Path, Variant, Binary], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    store = KernelStore(tmp_path / "file")
    store.put("a" * 64, stored[2])
    store.prune()
    assert store.get("a" * 64) is None


def test_kernels_with_mistakes_are_named_and_the_others_compiled() -> None:
    good = variant(kernel("good"))
    broken = {
        variant(kernel("unknown", "tl.store(p1 + i, nowhere)")): "nowhere is not defined",
        variant(kernel("syntax", "tl.store(p1 + i, 1.0")): "SyntaxError: '(' was never closed",
        variant(kernel("shapes", "tl.store(p1 + i, tl.zeros([16], tl.float32))")): "1024",
    }
    found = try_variants([*broken, good], SM_90, ONE)
    assert isinstance(found[good], Binary)
    for wanted, message in broken.items():
        error = found[wanted]
        assert isinstance(error, NemocError)
        assert str(error).startswith(f"{wanted.kernel.name} for cuda:sm_90: ")
        assert message in str(error) and "\n" not in str(error)
    first = next(iter(broken)).kernel.name
    with pytest.raises(NemocError, match=rf"^{first} for .*\(2 more kernels failed\)$"):
        compile_variants([*broken, good], SM_90, ONE)


def test_a_compiler_that_crashes_takes_one_kernel_with_it(tmp_path: Path) -> None:
    children = patched_worker("""\
print("LLVM ERROR: it is over", flush=True)
if request["kernel"].startswith("crashing"):
    os.abort()""")
    crashing, good = variant(kernel("crashing")), variant(kernel("good"))
    found = try_variants([crashing, good], SM_90, children, KernelStore(tmp_path))
    assert str(found[crashing]) == (
        f"{crashing.kernel.name} for cuda:sm_90: "
        "the compiler ended with SIGABRT: LLVM ERROR: it is over"
    )
    assert isinstance(found[good], Binary)
    assert len(list(tmp_path.iterdir())) == 1


HANGING = """\
import json, subprocess, sys, time
with open(int(sys.argv[1]), "w", buffering=1) as answers:
    input()
    print(json.dumps({}), file=answers)
    while True:
        if json.loads(input())["kernel"].startswith("hanging"):
            assembler = subprocess.Popen(["sleep", "1000"])
            print(assembler.pid, file=open(NOTE, "w"), flush=True)
            time.sleep(1000)
        print(json.dumps({"error": "it answers"}), file=answers)
"""


def test_a_compiler_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    script = HANGING.replace("NOTE", repr(str(note)))
    children = dataclasses.replace(ONE, seconds=3, command=(sys.executable, "-c", script))
    wanted = [variant(kernel("hanging")), variant(kernel("other"))]
    found = try_variants(wanted, SM_90, children)
    assert [str(found[v]).partition(": ")[2] for v in wanted] == [
        "the compiler did not answer within 3 s",
        "it answers",
    ]
    with suppress(psutil.NoSuchProcess):
        assert psutil.Process(int(note.read_text())).status() == psutil.STATUS_ZOMBIE


def test_memory_is_limited() -> None:
    children = dataclasses.replace(patched_worker("bytearray(300 << 20)"), bytes=200 << 20)
    wanted = variant(kernel("rows"))
    found = try_variants([wanted], SM_90, children)
    assert str(found[wanted]) == (
        f"{wanted.kernel.name} for cuda:sm_90: MemoryError (the limit is 200 MiB)"
    )


def test_a_compiler_that_does_not_start_is_named_once() -> None:
    command = (sys.executable, "-c", "raise SystemExit('no such compiler')")
    children = dataclasses.replace(ONE, command=command)
    with pytest.raises(
        NemocError, match=r"does not start: it ended with status 1: no such compiler$"
    ):
        try_variants([variant(kernel("rows"))], SM_90, children)
    children = dataclasses.replace(ONE, command=("/no/such/python",))
    with pytest.raises(NemocError, match="cannot be started: No such file or directory"):
        try_variants([variant(kernel("rows"))], SM_90, children)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"shared": 1024}, r"bytes of shared memory, expected at most 1024$"),
        ({"warp": 512}, r"a program needs 2048 threads, expected at most 1024$"),
    ],
)
def test_a_program_that_does_not_fit_is_refused(
    limits: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it comes from the store."""
    wanted, target, store = variant(product()), SM_90, KernelStore(tmp_path)
    target = dataclasses.replace(SM_90, **limits)
    for _ in range(2):
        with pytest.raises(NemocError, match=rf"^{wanted.kernel.name} for cuda:sm_90: .*{message}"):
            compile_variants([wanted], target, ONE, store)
        monkeypatch.setattr(subprocess, "Popen", no_process)


def test_the_users_settings_and_gpus_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: tuple[Path, Variant, Binary]
) -> None:
    """Nothing is written to the home folder, no variable changes the code, no driver is looked for."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("DISABLE_PTXAS_OPT", "1")
    children = patched_worker("""\
def active(self):
    os.abort()
for name in ("active", "default"):
    setattr(type(triton.runtime.driver), name, property(active))""")
    assert compile_variants([stored[1]], SM_90, children) == {stored[1]: stored[2]}
    assert list(tmp_path.iterdir()) == []


def test_triton_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_version()
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(NemocError, match=r"needs the package triton; install .* extra 'gpu'$"):
        try_variants([variant(kernel("rows"))], SM_90)


def test_this_process_does_not_import_triton() -> None:
    code = """\
import sys
sys.modules["triton"] = None
import nemoc.codegen.triton.build
"""
    subprocess.run([sys.executable, "-c", code], check=True)
