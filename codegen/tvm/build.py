"""From module text to a shared library: TVMScript, TIR passes, LLVM, linker."""

import shutil
from pathlib import Path

import tvm
from tvm import tirx

from nemoc.codegen.tvm.reader import read_module
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.ir.errors import NemocError


def lower_module(source: str, target: CpuTarget) -> tvm.IRModule:
    """Read module text and lower it to what LLVM code generation takes.

    Only passes that this dialect needs run. Kernels skip `LowerTVMBuiltin`, so that their local buffers stay on the
    stack; the step functions need it for argument checks.
    """
    passes = tirx.transform
    pipeline = tvm.ir.transform.Sequential(
        [
            passes.BindTarget(target.llvm),
            passes.FlattenBuffer(),
            passes.VectorizeLoop(True),
            passes.UnrollLoop(),
            passes.RemoveNoOp(),
            passes.AnnotateEntryFunc(),
            passes.MakePackedAPI(),
            passes.LowerIntrin(),
        ]
    )
    module = pipeline(read_module(source))
    exported = {
        name: function
        for name, function in module.functions.items()
        if function.attrs and "global_symbol" in function.attrs
    }
    for name, function in passes.LowerTVMBuiltin()(tvm.IRModule(exported)).functions.items():
        module.update_func(module.get_global_var(name.name_hint), function)
    return module


def compile_module(source: str, target: CpuTarget) -> tvm.runtime.Module:
    """The compiled module; `inspect_source("asm")` of it gives the assembly."""
    return tvm.get_global_func("target.build.llvm")(lower_module(source, target), target.llvm)


def build_library(source: str, target: CpuTarget, path: Path) -> None:
    """Compile module text into a shared library that tvm_ffi loads without the compiler.

    Raises:
        NemocError: there is no linker, or the target is of another platform than this machine.
    """
    if not target.host:
        raise NemocError(
            f"a library for {target.mcpu} ({target.triple}) cannot be linked on this platform, "
            f"expected to be built on its own"
        )
    linker = find_linker()
    compile_module(source, target).export_library(str(path), cc=linker)


def find_linker() -> str:
    """The C compiler that links libraries.

    Raises:
        NemocError: none is installed.
    """
    for name in ("cc", "gcc", "clang"):
        found = shutil.which(name)
        if found:
            return found
    raise NemocError(
        "no linker found: the cpu target needs cc, gcc or clang on PATH (package gcc or clang)"
    )
