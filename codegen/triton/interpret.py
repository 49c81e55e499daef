"""Kernels in Triton's interpreter: on the CPU, a program after the other. What is wrong with it is put right here.

- Functions of Triton's own library are compiled or interpreted by an environment variable that is read when Triton is
  imported. They are exchanged while kernels run, so that one process can do both.
- Loops over numbers that a kernel is given or computes fail with Triton 3.6 and a current numpy.
- Casts to bf16 cut bits off instead of rounding, and products of bf16 and FP8 are wrong. All are done by torch.
- Products of scaled blocks are not there, or take every scale for a power of two. Those of NVFP4 are done by torch.
- Every function of a module is parsed, changed and compiled before one runs. Modules begin with the same functions, so
  what they become is kept.
- Every call of a function looks through all of Triton's language for what to exchange. It is done once.
- Sums of integers are made once more in 64 bits, for an assertion that is left out unless Triton debugs. They are not.
- The table of numpy's types is made anew each time that one is looked up. They are kept.
"""

import functools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton._C.libtriton.ir import ScaleDotElemTypeTY
from triton.runtime import interpreter
from triton.runtime.interpreter import (
    FunctionRewriter,
    InterpretedFunction,
    InterpreterBuilder,
    InterpreterOptions,
    TensorHandle,
    _LangPatchScope,
)
from triton.runtime.jit import JITFunction

from nemoc.codegen.guarded import Buffer, run_guarded
from nemoc.codegen.plan import Arg, Kernel, Plan, Site, StepFunction
from nemoc.codegen.triton.module import load_module, module_source, written
from nemoc.codegen.triton.target import INTERPRETER, gpu_target
from nemoc.codegen.triton.writer import pointer_types
from nemoc.ir.dims import evaluate_dim
from nemoc.ir.dtypes import DType
from nemoc.ir.nvfp4 import BLOCK, DIALECTS, decode


class Interpreter:
    """Runs kernels by name.

    Args:
        kernels: all of them.
    """

    def __init__(self, kernels: Iterable[Kernel]) -> None:
        self._kernels = {kernel.name: kernel for kernel in kernels}
        source = module_source(self._kernels.values(), gpu_target(INTERPRETER))
        with written(source) as path, _interpreting():
            module = load_module(path)
            self._functions = {name: getattr(module, name) for name in self._kernels}
            for value in list(vars(module).values()):
                if isinstance(value, InterpretedFunction):
                    value.rewrite()  # reads the file, which is about to go

    def launch(self, name: str, pointers: Sequence[torch.Tensor], sizes: Mapping[str, int]) -> None:
        """One launch.

        Args:
            name: of the kernel.
            pointers: for each pointer parameter, a tensor of its element type that starts there.
            sizes: B, L and C.
        """
        tasks = evaluate_dim(self._kernels[name].tasks, sizes)
        if not tasks:
            return
        arguments = (*pointers, sizes["B"], sizes["L"], sizes["C"])
        # What a GPU computes without a word: infinities that are chosen away, casts of what is masked.
        with _interpreting(), np.errstate(all="ignore"):
            self._functions[name][(tasks,)](*arguments)


def run_site(
    site: Site,
    plan: Plan,
    sizes: Mapping[str, int],
    operands: Sequence[torch.Tensor],
    in_place: bool = False,
) -> tuple[torch.Tensor, ...]:
    """The results of a plan on guarded memory (`nemoc.codegen.guarded`).

    Raises:
        KernelFault: the kernels wrote where they must not.
    """
    interpreter = Interpreter(stage.kernel for stage in plan.stages)
    sizes = {"B": 1, "L": 1, "C": 1} | dict(sizes)

    def call(buffers: Mapping[Arg, Buffer]) -> None:
        for stage in plan.stages:
            pointers = [
                buffers[arg].start.view(dtype.torch)
                for arg, dtype in zip(stage.args, pointer_types(stage.kernel), strict=True)
            ]
            interpreter.launch(stage.kernel.name, pointers, sizes)

    return run_guarded(site, plan, sizes, operands, call, in_place)


_BITS = {tl.bfloat16: (np.int16, torch.bfloat16), tl.float8e4nv: (np.uint8, torch.float8_e4m3fn)}
"""Types that numpy lacks: what the interpreter holds their bits in, and torch's name."""

_NUMPY = {
    tl.float16: np.float16,
    tl.float32: np.float32,
    tl.float64: np.float64,
}


def _patch_tensor(tensor: Any, scope: Any) -> None:
    """Let the interpreter's numbers be what loops count to."""
    _OWN_PATCH(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _tensor(handle: Any) -> torch.Tensor:
    """What a handle of the interpreter holds."""
    data = np.ascontiguousarray(handle.data)
    if handle.dtype.scalar in _BITS:
        bits, dtype = _BITS[handle.dtype.scalar]
        return torch.from_numpy(data.view(bits)).view(dtype)
    return torch.from_numpy(data)


def _cast(self: Any, source: Any, target: Any, *_: Any) -> Any:
    """A cast to or from a narrow type, rounded to nearest even; the interpreter's own of others."""
    kind = target.scalar
    if kind in _BITS:
        return _rounded(_tensor(source), kind)
    if source.dtype.scalar in _BITS:
        return TensorHandle(_tensor(source).float().numpy().astype(_NUMPY[kind]), kind)
    return _OWN_CAST(self, source, target)


def _mul(self: Any, a: Any, b: Any) -> Any:
    """A product of bf16, rounded; the interpreter's own of other types."""
    if a.dtype.scalar != tl.bfloat16:
        return _OWN_MUL(self, a, b)
    return _rounded(_tensor(a) * _tensor(b), tl.bfloat16)


def _rounded(tensor: torch.Tensor, kind: Any) -> Any:
    """A handle of one of the `_BITS` types."""
    bits, dtype = _BITS[kind]
    rounded = tensor.to(dtype).view(torch.int16 if bits is np.int16 else torch.uint8)
    return TensorHandle(rounded.numpy().view(np.dtype(f"u{kind.primitive_bitwidth // 8}")), kind)


def _dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
    """a · b + d in the type of d."""
    wide = torch.from_numpy(np.ascontiguousarray(d.data))
    product = _tensor(a).to(wide.dtype) @ _tensor(b).to(wide.dtype)
    return TensorHandle((product + wide).numpy(), d.dtype.scalar)


def _dot_scaled(
    self: Any,
    a: Any,
    a_scales: Any,
    a_format: Any,
    b: Any,
    b_scales: Any,
    b_format: Any,
    fast: Any,
    a_packed: Any,
    b_packed: Any,
    d: Any,
) -> Any:
    """a · b + d of E2M1 codes by twos along the reduction, every 16 of them times a scale in E4M3."""
    assert a_format == b_format == ScaleDotElemTypeTY.E2M1 and a_packed and b_packed
    wide = torch.from_numpy(np.ascontiguousarray(d.data))

    def decoded(codes: Any, scales: Any) -> torch.Tensor:
        numbers = decode(_tensor(codes).view(torch.uint8), DIALECTS["torchao"], wide.dtype)
        blocks: torch.Tensor = numbers.unflatten(-1, (-1, BLOCK))
        return (blocks * _tensor(scales).to(wide.dtype).unsqueeze(-1)).flatten(-2)

    turned = TensorHandle(np.ascontiguousarray(b.data.T), b.dtype)
    product = decoded(a, a_scales) @ decoded(turned, b_scales).mT
    return TensorHandle((product + wide).numpy(), d.dtype.scalar)


def _numpy_type(kind: Any) -> Any:
    """What numpy holds elements of a type in."""
    return np.dtype(np.uint64) if kind.scalar.is_ptr() else _element_type(kind.scalar)


_element_type = functools.cache(interpreter._get_np_dtype)


def _rewrite(rewriter: Any) -> FunctionType:
    """What the interpreter runs in a function's place, with globals and defaults of its own."""
    fn: FunctionType = rewriter.fn
    code = fn.__code__
    # Lines and columns tell apart what compiles to the same and is not rewritten to the same.
    key = (code, code.co_linetable, repr(fn.__annotations__), tuple(rewriter.kwargs.items()))
    if key not in _rewritten:
        made: FunctionType = _OWN_REWRITE(rewriter)
        _rewritten[key] = made.__code__, made.__annotations__
        return made
    code, annotations = _rewritten[key]
    for name, value in vars(interpreter).items():
        fn.__globals__.setdefault(name, value)  # which the new code calls
    made = FunctionType(code, fn.__globals__, fn.__name__, fn.__defaults__)
    made.__annotations__ = dict(annotations)
    return made


_rewritten: dict[tuple[object, ...], tuple[CodeType, dict[str, Any]]] = {}

_OWN_REWRITE = FunctionRewriter.rewrite_ast
_OWN_PATCH = interpreter._patch_lang_tensor
_OWN_CAST = InterpreterBuilder.cast_impl
_OWN_MUL = InterpreterBuilder.create_fmul
_REPAIRED = (
    (InterpreterBuilder, "cast_impl", _cast),
    (InterpreterBuilder, "create_fp_to_fp", _cast),
    (InterpreterBuilder, "create_fmul", _mul),
    (InterpreterBuilder, "create_dot", _dot),
    (InterpreterBuilder, "create_dot_scaled", _dot_scaled),
    (interpreter, "_patch_lang_tensor", _patch_tensor),
    (interpreter, "_get_np_dtype", _numpy_type),
    (interpreter.interpreter_builder, "options", InterpreterOptions(sanitize_overflow=False)),
    (FunctionRewriter, "rewrite_ast", _rewrite),
)

_lock = threading.RLock()
_library: dict[int, Any] = {}
_LANGUAGE = FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})
"""A function that names the modules that kernels and Triton's own functions do."""


def _done(_: Any) -> _LangPatchScope:
    """In place of what exchanges the language, when that has been done."""
    return _LangPatchScope()


@contextmanager
def _interpreting() -> Iterator[None]:
    """Let Triton's own functions be interpreted ones, and its language the interpreter's."""
    with _lock, ExitStack() as restored:
        if interpreter._patch_lang is _done:  # by whoever is around this
            yield
            return
        scope = _LangPatchScope()
        restored.callback(scope.restore)
        scope.set_attr(triton.knobs.runtime, "interpret", True)
        for owner, name, function in _REPAIRED:
            scope.set_attr(owner, name, function)
        for module in (tl.standard, tl):
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    made = _library.get(id(value)) or InterpretedFunction(value.fn)
                    _library[id(value)] = made
                    scope.set_attr(module, name, made)
        restored.callback(interpreter._patch_lang(_LANGUAGE).restore)
        scope.set_attr(interpreter, "_patch_lang", _done)
        yield


class InterpretedProgram:
    """Step functions whose kernels are interpreted.

    Args:
        functions: the step functions.
    """

    def __init__(self, functions: Iterable[StepFunction]) -> None:
        self._functions = {function.name: function for function in functions}
        launches = (n for f in self._functions.values() for n in f.launches)
        self._interpreter = Interpreter(n.kernel for n in launches)

    def run(self, name: str, arenas: Sequence[torch.Tensor], sizes: Mapping[str, int]) -> None:
        """One step.

        Args:
            name: of the function.
            arenas: for each of the function's arenas its memory, contiguous, on the CPU.
            sizes: B, L and C.
        """
        function = self._functions[name]
        memory = {
            arena: tensor.reshape(-1).view(torch.uint8)
            for arena, tensor in zip(function.arenas, arenas, strict=True)
        }
        with _interpreting():
            for launch in function.launches:
                pointers = [
                    _elements(memory[a.arena], evaluate_dim(a.offset, sizes), dtype)
                    for a, dtype in zip(launch.buffers, pointer_types(launch.kernel), strict=True)
                ]
                self._interpreter.launch(launch.kernel.name, pointers, sizes)


def _elements(memory: torch.Tensor, offset: int, dtype: DType) -> torch.Tensor:
    """Memory from a byte on, as elements."""
    end = memory.numel() - (memory.numel() - offset) % dtype.bytes
    return memory[offset:end].view(dtype.torch)
