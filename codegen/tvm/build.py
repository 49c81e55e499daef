"""From module text to a shared library: TVMScript, TIR passes, LLVM, linker."""

import shutil
import types
from pathlib import Path

import tvm
from tvm import tirx
from tvm.script import from_source
from tvm.script import ir as I
from tvm.script import tirx as T

from nemoc.codegen.tvm.target import CpuTarget
from nemoc.ir.errors import NemocError


class _PrimFunc:
    """`T.prim_func` as the parser needs it: the real one looks at the whole Python stack at each call."""

    dispatch_token = "tirx"

    def __call__(self, **options: bool) -> "_PrimFunc":
        return self


def parse_module(source: str) -> tvm.IRModule:
    """The module that TVMScript text describes."""
    names = types.ModuleType("T")
    names.__dict__.update(vars(T), prim_func=_PrimFunc())
    return from_source(source, extra_vars={"I": I, "T": names})


def lower_module(source: str, target: CpuTarget) -> tvm.IRModule:
    """Parse module text and lower it to what LLVM code generation takes.

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
    module = pipeline(parse_module(source))
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
        NemocError: there is no linker, or the target is not the CPU at hand.
    """
    if not target.host:
        raise NemocError(
            f"a library for {target.mcpu} cannot be linked here, which is another machine; build on one"
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
