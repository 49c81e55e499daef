"""From module text to a shared library: TVMScript, TIR passes, LLVM, linker."""

import dataclasses
import functools
import hashlib
import inspect
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import tvm
from tvm import tirx
from tvm.support import cc

from nemoc.codegen.object_store import ObjectStore
from nemoc.codegen.tvm.claim import claim_source
from nemoc.codegen.tvm.clock import mark_source
from nemoc.codegen.tvm.reader import read_module
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.ir.errors import NemocError

_FUNCTION = re.compile(r"^(?=    @T\.prim_func)", re.MULTILINE)
"""Where a function of a module's text begins."""

Compiler = Callable[[str, CpuTarget], tvm.runtime.Module]
"""What turns a text into a compiled module."""


def lower_module(source: str, target: CpuTarget) -> tvm.IRModule:
    """Read module text and lower it to what LLVM code generation takes.

    Only passes that this dialect needs run. Kernels skip `LowerTVMBuiltin`, so that their local buffers stay on the
    stack; the step functions need it for argument checks. Kernels then get symbols, by which step functions that are
    compiled apart from them call them.
    """
    passes = tirx.transform
    pipeline = tvm.ir.transform.Sequential(
        [
            passes.BindTarget(target.llvm),
            passes.FlattenBuffer(),
            passes.VectorizeLoop(True),
            passes.UnrollLoop(),
            passes.RemoveNoOp(),
            passes.MakePackedAPI(),
            passes.LowerIntrin(),
        ]
    )
    module = pipeline(read_module(source))
    kernels = {v: f for v, f in module.functions.items() if "global_symbol" not in f.attrs}
    steps = {v: f for v, f in module.functions.items() if v not in kernels}
    for variable, function in passes.LowerTVMBuiltin()(tvm.IRModule(steps)).functions.items():
        module.update_func(module.get_global_var(variable.name_hint), function)
    for variable, function in kernels.items():
        module.update_func(variable, function.with_attr("global_symbol", variable.name_hint))
    return module


def compile_module(source: str, target: CpuTarget) -> tvm.runtime.Module:
    """The compiled module; `inspect_source("asm")` of it gives the assembly."""
    return tvm.get_global_func("target.build.llvm")(lower_module(source, target), target.llvm)


def compile_llvm(source: str, target: CpuTarget) -> tvm.runtime.Module:
    """A compiled text of LLVM's, for any CPU of the platform that it names, with the platform's own data layout."""
    with tempfile.TemporaryDirectory(prefix="nemoc-") as folder:
        path = Path(folder) / "module.ll"
        path.write_text(source)
        return tvm.get_global_func("ffi.Module.load_from_file.ll")(str(path), "ll")


def build_library(
    source: str, target: CpuTarget, path: Path, store: ObjectStore | None = None
) -> None:
    """Compile module text into a shared library that tvm_ffi loads without the compiler.

    Every function is compiled by itself: so LLVM holds one of them at a time, does not copy small kernels to wherever a
    step function calls them, of which there are some for each layer, and what another library has too need not be
    compiled again.

    Args:
        source: the module's text.
        target: what to compile for.
        path: where to write the library.
        store: where compiled functions are looked for, and put.

    Raises:
        NemocError: there is no linker, or the target is of another platform than this machine.
    """
    if not target.host:
        raise NemocError(
            f"a library for {target.mcpu} ({target.triple}) cannot be linked on this platform, "
            f"expected to be built on its own"
        )
    linker = find_linker()
    with tempfile.TemporaryDirectory(prefix="nemoc-") as folder:
        objects = []
        for number, (part, compiler) in enumerate(_parts(source, target)):
            objects.append(str(Path(folder) / f"{number}.o"))
            _write_object(part, compiler, target, Path(objects[-1]), store)
        if store is not None:
            store.prune()
        cc.create_shared(str(path), objects, cc=linker)


def _write_object(
    source: str, compiler: Compiler, target: CpuTarget, path: Path, store: ObjectStore | None
) -> None:
    """Write a compiled module, from the store if that has it."""
    key = _key(source, target)
    stored = store.get(key) if store is not None else None
    if stored is not None:
        path.write_bytes(stored)
        return
    compiler(source, target).write_to_file(str(path))
    if store is not None:
        store.put(key, path.read_bytes())


def _key(source: str, target: CpuTarget) -> str:
    """A hash of everything that an object depends on."""
    parts = (_compiler(), dataclasses.astuple(target), source)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@functools.cache
def _compiler() -> tuple[str, ...]:
    """What compiles text: TVM, LLVM, and the sources that stand before them."""
    own = (Path(__file__), Path(inspect.getfile(read_module)))
    return (
        tvm.__version__,
        str(tvm.get_global_func("target.llvm_version_major")()),
        *(hashlib.sha256(file.read_bytes()).hexdigest() for file in own),
    )


def _parts(source: str, target: CpuTarget) -> Iterator[tuple[str, Compiler]]:
    """Texts of one function each, and what compiles them: those of a module, and those that all its steps call."""
    head, *functions = _FUNCTION.split(source)
    for text in functions:
        yield f"{head}{text.rstrip()}\n", compile_module
    for text in (claim_source(target), mark_source(target)):
        yield text, compile_llvm


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
