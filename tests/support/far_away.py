"""Where a kernel's programs reach at sizes that nobody has memory for: addresses alone, in Triton's interpreter."""

import operator
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from nemoc.codegen.plan import Arg, Plan, Site
from nemoc.codegen.triton.interpret import Interpreter
from nemoc.codegen.triton.writer import pointer_types
from nemoc.ir.dims import evaluate_dim

Numbers = np.ndarray[Any, Any]

_APART = 1 << 44
"""Bytes between the tensors of a launch."""


def assert_within_tensors(
    site: Site,
    plan: Plan,
    sizes: Mapping[str, int],
    program: Callable[[int], int],
    integers: Mapping[Arg, Callable[[Numbers], Numbers]],
) -> None:
    """Run one program of each launch that has any, and hold each address that it touches against the tensors.

    Args:
        site, plan: what runs.
        sizes: B, L and C.
        program: which one, of how many.
        integers: what elements with these numbers hold; those of other tensors are 0.

    Raises:
        AssertionError: an address lies outside, or the program has nothing to do.
    """
    sizes = {"B": 1, "L": 1, "C": 1} | dict(sizes)
    owners = {Arg("result", result): Arg("operand", operand) for result, operand in plan.updates}
    views = {"operand": site.operands, "result": site.results, "scratch": plan.scratch}
    launches = [(s, evaluate_dim(s.kernel.tasks, sizes)) for s in plan.stages]
    for stage, tasks in filter(operator.itemgetter(1), launches):
        args = [owners.get(arg, arg) for arg in stage.args]
        spans = [evaluate_dim(views[arg.kind][arg.index].span, sizes) for arg in args]
        given = [torch.empty(1, dtype=t.torch) for t in pointer_types(stage.kernel)]
        starts = {tensor.data_ptr(): _APART * (i + 1) for i, tensor in enumerate(given)}
        convert, stored = interpreter._implicit_cvt, list[int]()

        def pointer(value: Any, starts: Any = starts, convert: Any = convert) -> Any:
            made = convert(value)
            if isinstance(value, torch.Tensor):
                made.handle.data = np.array([starts[value.data_ptr()]], np.uint64)
            return made

        def touch(pointers: Any, mask: Any, args: Any = args, spans: Any = spans) -> Numbers:
            data, there = np.broadcast_arrays(
                pointers.data.astype(np.int64), mask.data.astype(bool)
            )
            number = np.round(data / _APART).astype(int) - 1
            offset = data - (number + 1) * _APART
            held = np.zeros(data.shape, interpreter._get_np_dtype(pointers.get_element_ty()))
            for i, (arg, span) in enumerate(zip(args, spans, strict=True)):
                mine = there & (number == i)
                inside = (offset >= 0) & (offset < span)
                assert (inside | ~mine).all(), f"{arg}: {offset[mine & ~inside][0]} of {span} bytes"
                if arg in integers:
                    held[mine] = integers[arg](offset[mine] // held.dtype.itemsize)
            return held

        def load(this: Any, pointers: Any, mask: Any, *_: Any, touch: Any = touch) -> Any:
            return TensorHandle(touch(pointers, mask), pointers.get_element_ty())

        def store(
            this: Any,
            pointers: Any,
            value: Any,
            mask: Any,
            *_: Any,
            touch: Any = touch,
            stored: Any = stored,
        ) -> None:
            stored.append(touch(pointers, mask).size)

        def number(this: Any, axis: int, wanted: int = program(tasks)) -> Any:
            return TensorHandle(np.array([wanted], np.int32), interpreter.tl.int32)

        launched = Interpreter([stage.kernel])
        function = launched._functions[stage.kernel.name]
        with (
            mock.patch.object(interpreter, "_implicit_cvt", pointer),
            mock.patch.object(InterpreterBuilder, "create_masked_load", load),
            mock.patch.object(InterpreterBuilder, "create_masked_store", store),
            mock.patch.object(InterpreterBuilder, "create_get_program_id", number),
            mock.patch.object(launched, "_functions", {stage.kernel.name: _Once(function)}),
        ):
            launched.launch(stage.kernel.name, given, sizes)
        assert stored, f"program {program(tasks)} of {tasks} stores nothing"


class _Once:
    """A kernel of which one program runs, whatever the grid."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._function[(1,)]
