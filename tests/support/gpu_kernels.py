"""GPU kernels against their ops in tests: through Triton's interpreter, on guarded and poisoned memory."""

import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import triton

from nemoc.codegen.children import answers
from nemoc.codegen.plan import Plan, Site
from nemoc.codegen.triton.build import COMPILERS, Variant
from nemoc.codegen.triton.emit import emit
from nemoc.codegen.triton.module import module_source
from nemoc.codegen.triton.target import GpuTarget, gpu_target
from nemoc.codegen.triton.writer import GpuKernel
from nemoc.ir.dtypes import DType
from nemoc.ir.op import Env
from nemoc.ir.region import evaluate_op
from support.kernels import relative_error
from support.watched import run_watched

INTERPRETER = gpu_target("triton-interpret")


def variant(site: Site, target: str) -> Variant:
    """A site's last kernel, of products the form of matrix units, on aligned memory."""
    kernel = emit(site, gpu_target(target)).stages[-1].kernel
    assert isinstance(kernel, GpuKernel)
    return Variant(kernel, (True,) * len(kernel.pointers))


def check_kernel(
    site: Site,
    sizes: Mapping[str, int],
    *operands: torch.Tensor,
    tolerance: float = 1e-6,
    plan: Plan | None = None,
    target: GpuTarget = INTERPRETER,
) -> None:
    """Run a site's kernels and compare with what its op means, evaluated in float64.

    Args:
        site: the op and its views.
        sizes: B, L and C; those left out are 1.
        operands: a tensor for each operand.
        tolerance: of the relative error of floating-point results; integers must be equal. Results of bf16 and f16 are
            compared with the float64 ones rounded to their type.
        plan: what to run; None for the backend's plan for `target`.
        target: whose schedules the kernels follow; they are interpreted all the same.

    Raises:
        AssertionError: a result is wrong.
        KernelFault: the kernels wrote where they must not.
    """
    env = Env({"B": 1, "L": 1, "C": 1} | dict(sizes), float64=True)
    op = site.op
    wide = [t.double() if t.is_floating_point() else t for t in operands]
    expected = evaluate_op(op, env, dict(zip(op.operands(), wide, strict=True)))
    found = run_watched(site, plan or emit(site, target), sizes, operands)
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        where = f"{op.mnemonic()} result {i}, {dict(sizes)}"
        assert f.shape == e.shape, where
        if f.dtype.is_floating_point:
            meant = e.to(f.dtype) if f.dtype.itemsize < 4 else e
            error = relative_error(f.double(), meant.double())
            assert error <= tolerance, f"{where}: relative error {error:.3g}"
        else:
            assert torch.equal(f, e.to(f.dtype)), where


def assembly(kernel: GpuKernel, target: GpuTarget, folder: Path) -> str:
    """The assembly of a kernel for an NVIDIA GPU, every pointer of which is a multiple of 16."""
    text: str = compiled(kernel, target, folder)["assembly"]
    return text


def compiled(kernel: GpuKernel, target: GpuTarget, folder: Path) -> dict[str, Any]:
    """The same, and all else that the compiler gives (`nemoc.codegen.triton.worker`)."""
    types = {DType.BF16: "*bf16", DType.U8: "*u8", DType.F32: "*fp32", DType.I32: "*i32"}
    pointers = {f"p{i}": types[dtype] for i, dtype in enumerate(kernel.pointers)}
    module = folder / f"{kernel.name}.py"
    module.write_text(module_source([kernel], target))
    request = {
        "module": str(module),
        "kernel": kernel.name,
        "signature": pointers | dict.fromkeys("BLC", "i32"),
        "aligned": list(range(len(pointers))),
        "warps": kernel.warps,
        "stages": kernel.stages,
    }
    setup = {"backend": target.backend, "arch": target.arch, "warp": target.warp}
    children = dataclasses.replace(COMPILERS, jobs=1, seconds=100)
    ((_, answer),) = answers([request], setup, children, folder)
    return answer


def instructions(code: bytes) -> list[str]:
    """The names of the machine instructions of a kernel for an NVIDIA GPU."""
    found = map(_INSTRUCTION.search, _disassembled(code))
    return [instruction[1] for instruction in found if instruction]


_INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)")


def _disassembled(code: bytes) -> list[str]:
    """The lines that NVIDIA's disassembler makes of a kernel."""
    disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [str(disassembler), "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return text.splitlines()


def loop_instructions(code: bytes) -> list[str]:
    """The names of the machine instructions in the longest loop of a kernel for an NVIDIA GPU."""
    names: list[str] = []
    labels: dict[str, int] = {}
    longest: list[str] = []
    for line in _disassembled(code):
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        if instruction := _INSTRUCTION.search(line):
            names.append(instruction[1])
        if (back := re.search(r"BRA `\((\.L_x_\d+)\)", line)) and back[1] in labels:
            longest = max(longest, names[labels[back[1]] :], key=len)
    return longest
