"""What Triton's interpreter does not show: a watch over every address that kernels touch.

The interpreter carries out one program after the other, and each as a single thread. On a GPU programs run at once, as
do the threads of a program, and addresses outside a tensor are another's or nobody's. So a watch complains of

- an address outside the memory that a launch is given, masked lanes aside;
- an element read that nothing has written;
- an element that one program writes and another one of the launch reads or writes;
- an element that a program writes and reads, in either order, or writes twice, with no barrier in between: it is not
  known which thread has it either time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder

from nemoc.codegen.guarded import Buffer, run_guarded
from nemoc.codegen.plan import Arg, Plan, Site
from nemoc.codegen.triton.interpret import Interpreter
from nemoc.codegen.triton.writer import pointer_types

Bools = np.ndarray[Any, np.dtype[np.bool_]]
Numbers = np.ndarray[Any, np.dtype[np.int64]]


class Memory:
    """Memory that launches work on, and who has touched it.

    Programs have numbers that grow from launch to launch, as have the stretches between barriers, so that what former
    launches left behind is told by its numbers.

    Args:
        name: what complaints call it.
        start: the address of its first element.
        known: for each element from there on, whether it has a value.
        width: bytes of an element.
    """

    def __init__(self, name: str, start: int, known: Bools, width: int) -> None:
        self.name, self.start, self.known, self.width = name, start, known, width
        self.stop = start + known.size * width
        self._writer, self._reader, self._written, self._read = np.zeros((4, known.size), np.int64)

    def load(self, at: Numbers, now: "Now") -> Iterator[str]:
        """Elements are read; gives what is wrong with that."""
        if not self.known[at].all():
            yield "reads what nothing has written"
        writer, reader = self._writer[at], self._reader[at]
        if ((writer >= now.launch) & (writer != now.program)).any():
            yield "reads what another program writes"
        if (self._written[at] == now.stretch).any():
            yield "reads what it wrote, without a barrier"
        alone = (reader < now.launch) | (reader == now.program)
        self._reader[at] = np.where(alone, now.program, now.launch)
        self._read[at] = now.stretch

    def store(self, at: Numbers, now: "Now") -> Iterator[str]:
        """Elements are written; gives what is wrong with that."""
        for what, who in (("writes", self._writer[at]), ("reads", self._reader[at])):
            if ((who >= now.launch) & (who != now.program)).any():
                yield f"writes what another program {what}"
        if (self._read[at] == now.stretch).any():
            yield "writes what it read, without a barrier"
        if (self._written[at] == now.stretch).any() or np.unique(at).size != at.size:
            yield "writes an element twice, without a barrier"
        self._writer[at], self._written[at], self.known[at] = now.program, now.stretch, True


@dataclass
class Now:
    """Where a run is.

    Attributes:
        launch: the number of the launch; those of its programs are larger. As a reader's number it means several.
        program: the number of the program.
        stretch: the number of what lies between two barriers of a program.
    """

    launch: int = 1
    program: int = 1
    stretch: int = 1


class Watch:
    """Watches launches while it is `on`.

    Attributes:
        complaints: what was wrong, each once.
    """

    def __init__(self) -> None:
        self.complaints: dict[str, None] = {}
        self._kernel = ""
        self._memories: list[Memory] = []
        self._now = Now()

    def begin_launch(self, kernel: str, memories: Sequence[Memory]) -> None:
        """What follows is a launch of a kernel on this memory."""
        self._kernel, self._memories = kernel, list(dict.fromkeys(memories))
        self._now.launch = self._now.program = self._now.program + 1

    @contextmanager
    def on(self) -> Iterator[None]:
        """Let the interpreter tell what it does."""
        builder = InterpreterBuilder
        own = {
            name: getattr(builder, name)
            for name in (
                "create_masked_load",
                "create_masked_store",
                "create_barrier",
                "set_grid_idx",
            )
        }

        def load(this: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            self._touch(pointers, mask, Memory.load)
            return own["create_masked_load"](this, pointers, mask, *rest)

        def store(this: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._touch(pointers, mask, Memory.store)
            return own["create_masked_store"](this, pointers, value, mask, *rest)

        def barrier(this: Any) -> Any:
            self._now.stretch += 1
            return own["create_barrier"](this)

        def program(this: Any, x: int, y: int, z: int) -> Any:
            assert y == z == 0
            self._now.program += 1
            self._now.stretch += 1
            return own["set_grid_idx"](this, x, y, z)

        with mock.patch.multiple(
            builder,
            create_masked_load=load,
            create_masked_store=store,
            create_barrier=barrier,
            set_grid_idx=program,
        ):
            yield

    def _touch(self, pointers: Any, mask: Any, how: Callable[..., Iterator[str]]) -> None:
        data, there = np.broadcast_arrays(pointers.data, mask.data)
        addresses = data[there.astype(bool)].astype(np.int64)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        left = addresses.size
        for memory in self._memories:
            mine = addresses[(addresses >= memory.start) & (addresses + size <= memory.stop)]
            left -= mine.size
            if mine.size:
                at, odd = np.divmod(mine - memory.start, memory.width)
                assert not odd.any()
                at = (at[:, None] + np.arange(size // memory.width)).ravel()
                for wrong in how(memory, at, self._now):
                    self._complain(f"{wrong}: {memory.name}")
        if left:
            self._complain(f"{how.__name__}s what is not its own")

    def _complain(self, what: str) -> None:
        self.complaints[f"{self._kernel} {what}"] = None


def run_watched(
    site: Site, plan: Plan, sizes: Mapping[str, int], operands: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """The results of a plan, as `nemoc.codegen.triton.interpret.run_site` gives them.

    Raises:
        AssertionError: the watch complains.
        KernelFault: the kernels wrote where they must not.
    """
    interpreter = Interpreter(stage.kernel for stage in plan.stages)
    sizes = {"B": 1, "L": 1, "C": 1} | dict(sizes)
    watch = Watch()

    def call(buffers: Mapping[Arg, Buffer]) -> None:
        made: dict[int, Memory] = {}
        for arg, buffer in buffers.items():
            made.setdefault(id(buffer), _memory(str(arg), buffer, arg.kind == "operand"))
        for stage in plan.stages:
            given = [buffers[arg] for arg in stage.args]
            types = pointer_types(stage.kernel)
            pointers = [b.start.view(t.torch) for b, t in zip(given, types, strict=True)]
            watch.begin_launch(stage.kernel.name, [made[id(b)] for b in given])
            with watch.on():
                interpreter.launch(stage.kernel.name, pointers, sizes)

    found = run_guarded(site, plan, sizes, operands, call)
    assert not watch.complaints, "\n".join(watch.complaints)
    return found


def _memory(name: str, buffer: Buffer, known: bool) -> Memory:
    tensor = buffer.tensor
    span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    elements = np.zeros(span, bool)
    if known:
        torch.from_numpy(elements).as_strided(tensor.shape, tensor.stride()).fill_(True)
    return Memory(name, tensor.data_ptr(), elements, tensor.element_size())


@contextmanager
def watched_launches(**unknown: torch.Tensor) -> Iterator[None]:
    """Watch whatever is launched, each on the whole memory that its tensors are parts of.

    Args:
        unknown: memory that has no values yet, by a name for complaints; all else has.

    Raises:
        AssertionError: the watch complains; at the end.
    """
    watch, memories = Watch(), dict[int, Memory]()
    launch = Interpreter.launch

    def memory_of(tensor: torch.Tensor, name: str = "memory", known: bool = True) -> Memory:
        storage = tensor.untyped_storage()
        start, size = storage.data_ptr(), storage.nbytes()
        if start not in memories or memories[start].known.size != size:
            memories[start] = Memory(name, start, np.full(size, known), 1)
        return memories[start]

    def watched(this: Interpreter, name: str, pointers: Any, sizes: Any) -> None:
        watch.begin_launch(name, [memory_of(pointer) for pointer in pointers])
        with watch.on():
            launch(this, name, pointers, sizes)

    for name, tensor in unknown.items():
        memory_of(tensor, name, known=False)
    with mock.patch.object(Interpreter, "launch", watched):
        yield
    assert not watch.complaints, "\n".join(watch.complaints)
