"""What Triton's interpreter does not show: a watch over every address that kernels touch.

The interpreter carries out one program after the other, and each as a single thread. On a GPU programs run at once, as
do the threads of a program, and addresses outside a tensor are another's or nobody's. So a watch complains of

- an address outside the tensors that a launch is given, masked lanes aside;
- an element read that nothing has written;
- an element that one program writes and another one of the launch reads or writes;
- an element that a program writes and reads, in either order, or writes twice, with no barrier in between: it is not
  known which thread has it either time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder

from nemoc.codegen.guarded import Buffer, run_guarded
from nemoc.codegen.plan import Arg, Plan, Site
from nemoc.codegen.triton.interpret import Interpreter
from nemoc.codegen.triton.writer import pointer_types

_NOBODY, _SEVERAL = -1, -2

Touch = Callable[[int, Any, Any, int], None]


class Tensor:
    """Memory that launches work on.

    Args:
        name: what complaints call it.
        start: the address of its first element.
        known: for each element from there on, whether it has a value; of the size of the whole tensor.
        width: bytes of an element.
    """

    def __init__(self, name: str, start: int, known: np.ndarray[Any, Any], width: int) -> None:
        self.name, self.start, self.known, self.width = name, start, known, width
        self.stop = start + known.size * width
        self.begin_launch()

    def begin_launch(self) -> None:
        """Forget who has touched what."""
        size = self.known.size
        self._writer = np.full(size, _NOBODY, np.int64)
        self._reader = np.full(size, _NOBODY, np.int64)
        self._written, self._read = np.full(size, -1, np.int64), np.full(size, -1, np.int64)

    def load(self, at: np.ndarray[Any, Any], program: int, epoch: int) -> Iterator[str]:
        """Elements are read; gives what is wrong with that."""
        if not self.known[at].all():
            yield "reads what nothing has written"
        writer, reader = self._writer[at], self._reader[at]
        if ((writer != _NOBODY) & (writer != program)).any():
            yield "reads what another program writes"
        if (self._written[at] == epoch).any():
            yield "reads what it wrote, without a barrier"
        self._reader[at] = np.where((reader == _NOBODY) | (reader == program), program, _SEVERAL)
        self._read[at] = epoch

    def store(self, at: np.ndarray[Any, Any], program: int, epoch: int) -> Iterator[str]:
        """Elements are written; gives what is wrong with that."""
        for what, who in (("writes", self._writer[at]), ("reads", self._reader[at])):
            if ((who != _NOBODY) & (who != program)).any():
                yield f"writes what another program {what}"
        if (self._read[at] == epoch).any():
            yield "writes what it read, without a barrier"
        if (self._written[at] == epoch).any() or np.unique(at).size != at.size:
            yield "writes an element twice, without a barrier"
        self._writer[at], self._written[at], self.known[at] = program, epoch, True


class Watch:
    """Watches launches while it is `on`.

    Attributes:
        complaints: what was wrong, each once.
    """

    def __init__(self) -> None:
        self.complaints: dict[str, None] = {}
        self._kernel = ""
        self._tensors: list[Tensor] = []
        self._program = 0
        self._epoch = 0

    def begin_launch(self, kernel: str, tensors: Sequence[Tensor]) -> None:
        """Launches from now on are of this kernel, on these tensors."""
        self._kernel, self._tensors = kernel, list({id(t): t for t in tensors}.values())
        for tensor in self._tensors:
            tensor.begin_launch()

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
            self._touch(pointers, mask, Tensor.load)
            return own["create_masked_load"](this, pointers, mask, *rest)

        def store(this: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._touch(pointers, mask, Tensor.store)
            return own["create_masked_store"](this, pointers, value, mask, *rest)

        def barrier(this: Any) -> Any:
            self._epoch += 1
            return own["create_barrier"](this)

        def program(this: Any, x: int, y: int, z: int) -> Any:
            assert y == z == 0
            self._program = x
            self._epoch += 1
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
        left = addresses.size
        for tensor in self._tensors:
            mine = addresses[(addresses >= tensor.start) & (addresses < tensor.stop)]
            left -= mine.size
            if mine.size:
                at, odd = np.divmod(mine - tensor.start, tensor.width)
                assert not odd.any()
                for wrong in how(tensor, at, self._program, self._epoch):
                    self._complain(f"{wrong}: {tensor.name}")
        if left:
            self._complain(f"{how.__name__} outside its tensors")

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
        made: dict[int, Tensor] = {}
        for arg, buffer in buffers.items():
            made.setdefault(id(buffer), _tensor(str(arg), buffer, arg.kind == "operand"))
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


def _tensor(name: str, buffer: Buffer, known: bool) -> Tensor:
    tensor = buffer.tensor
    span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    elements = np.zeros(span, bool)
    if known:
        torch.from_numpy(elements).as_strided(tensor.shape, tensor.stride()).fill_(True)
    return Tensor(name, tensor.data_ptr(), elements, tensor.element_size())
