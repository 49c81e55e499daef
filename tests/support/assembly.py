"""What LLVM makes of a kernel."""

import re

from nemoc.codegen.plan import Stage
from nemoc.codegen.tvm.build import compile_module
from nemoc.codegen.tvm.target import CpuTarget


def kernel_assembly(stage: Stage, target: CpuTarget) -> str:
    """The assembly of a launch's kernel, and of a step that calls it."""
    pointers = ", ".join("a" for _ in stage.args)
    step = (
        "    @T.prim_func(s_tir=True)\n"
        "    def step(a: T.handle, B: T.int32, L: T.int32, C: T.int32):\n"
        f"        T.evaluate(Module.{stage.kernel.name}(B, {pointers}, B, L, C))\n"
    )
    source = f"@I.ir_module\nclass Module:\n{stage.kernel.source}\n{step}"
    return str(compile_module(source, target).inspect_source("asm"))


def innermost_loops(assembly: str) -> list[str]:
    """The loops of x86 assembly that have no other loop in them, each from its label to the jump back."""
    lines, labels, found = assembly.splitlines(), dict[str, int](), list[str]()
    for number, line in enumerate(lines):
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = number
        elif (back := re.match(r"\s+j\w+\s+(\.LBB\w+)$", line)) and back[1] in labels:
            loop = lines[labels[back[1]] : number]
            if not any(re.match(r"\.LBB", one) for one in loop[1:]):
                found.append("\n".join(loop))
    return found
