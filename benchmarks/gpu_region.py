"""Parts of a model's graph on a GPU by themselves: cut out, compiled as in the model, launched on memory of their own.

A part is a graph of some regions with the views before them, so that its kernels are the model's own: the same
divisions, strides and updates in place. Dimensions stay symbolic, so that a part is compiled once for all sizes.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.gpu_values import Sizes, Values
from nemoc.codegen.lower import Program, describe, lower_program
from nemoc.codegen.plan import Plan, Site
from nemoc.codegen.storage import Layout, state_layout
from nemoc.codegen.triton.emit import emit, expanded
from nemoc.codegen.triton.kernel_store import KernelStore
from nemoc.codegen.triton.target import gpu_target
from nemoc.gpu import compiled_files, gpu_source
from nemoc.ir import Graph, Value
from nemoc.ir.dims import Dim, estimate, evaluate_dim
from nemoc.ir.interpreter import interpret
from nemoc.ir.types import TensorType
from nemoc.progress import Progress
from nemoc.runtime.cuda_device import Device, LoadedKernel
from nemoc.runtime.launches import LAUNCHES, LaunchRecord

Emit = Callable[[Site], Plan]

_POISON = 0xFF
"""What memory is filled with before results are checked: NaN as floats, -1 as integers."""


@dataclass(frozen=True)
class Part:
    """Some ops of a model.

    Attributes:
        name: what stands in reports.
        graph: the ops; its parameters are stored weights.
        emit: the backend; none for the target's own.
    """

    name: str
    graph: Graph
    emit: Emit | None = None

    def bytes(self, sizes: Sizes) -> float:
        """What the ops have to read and write, by their closed forms; each region its operands and results once."""
        return sum(estimate(node.op.cost().bytes, sizes.symbols) for node in self.graph.nodes)

    def flops(self, sizes: Sizes) -> float:
        """Floating-point operations, by closed forms."""
        return sum(estimate(node.op.cost().flops, sizes.symbols) for node in self.graph.nodes)


@dataclass(frozen=True)
class LoweredPart:
    """A part and what runs it.

    Attributes:
        part: the part.
        program: its launches, in one function of its name.
    """

    part: Part
    program: Program

    def digest(self, target: str) -> str:
        """Of the kernels for a target, and how they are launched."""
        texts = (target, gpu_source(self.program, target), describe(self.program.functions))
        return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Code:
    """Compiled kernels of several parts.

    Attributes:
        record: how they are launched, a function for each part.
        images: the machine code by its file's name.
    """

    record: LaunchRecord
    images: Mapping[str, bytes]


def lower_part(part: Part, corners: Sequence[Sizes], target: str) -> LoweredPart:
    """Plan a part's launches.

    Args:
        part: what to run.
        corners: every size that it will be run at.
        target: the GPU.
    """
    graph = part.graph
    weights = Layout.of((p.name, p.type) for p in graph.params)
    own = partial(emit, target=gpu_target(target))
    program = lower_program(
        expanded({part.name: graph}), weights, [s.symbols for s in corners], part.emit or own
    )
    return LoweredPart(part, program)


def compile_parts(
    parts: Sequence[LoweredPart], target: str, store: KernelStore | None, progress: Progress | None
) -> Code:
    """Compile the kernels of parts together, so that all processes have something to do.

    Raises:
        NemocError: a kernel cannot be compiled.
    """
    functions = tuple(f for lowered in parts for f in lowered.program.functions)
    together = replace(parts[0].program, functions=functions, scratch_bytes=0)
    files = compiled_files(together, target, store, progress)
    record = LaunchRecord.from_json(json.loads(files[LAUNCHES]), LAUNCHES)
    images = {n: data for n, data in files.items() if isinstance(data, bytes)}
    return Code(record, images)


class Kernels:
    """Kernels on a device, each loaded when it is first asked for.

    Args:
        code: the kernels.
        device: where they run.
    """

    def __init__(self, code: Code, device: Device) -> None:
        self.code = code
        self.device = device
        self._loaded: dict[int, LoadedKernel] = {}

    def __getitem__(self, number: int) -> LoadedKernel:
        """A kernel by its number in the record; the device is active."""
        if number not in self._loaded:
            binary = self.code.record.binaries[number]
            image = self.code.images[binary.file]
            self._loaded[number] = self.device.load(binary, image, binary.file)
        return self._loaded[number]


class DeviceRegion:
    """A part at given sizes, with random operands.

    Args:
        lowered: the part.
        sizes: how large it is.
        kernels: its kernels, and the device.
        values: what operands hold; or another region of the part and sizes, for what its operands hold.

    Attributes:
        part, sizes: what was given.
        operands: inputs, weights and states by name, on the device. States change in each run.

    Raises:
        NemocError: the device lacks memory, or cannot load a kernel.
    """

    def __init__(
        self,
        lowered: LoweredPart,
        sizes: Sizes,
        kernels: Kernels,
        values: "Values | DeviceRegion",
    ) -> None:
        self.part, self.sizes = lowered.part, sizes
        self._device = kernels.device
        graph, symbols = lowered.part.graph, sizes.symbols
        layouts = (lowered.program.weights, state_layout(graph).at(symbols))
        with self._device.active():
            weights, state = (self._device.allocate(int(one.bytes)) for one in layouts)
            self._scratch = self._device.allocate(lowered.program.scratch_bytes)
            inputs, outputs = (
                [self._device.allocate(_bytes(v.type, symbols)) for v in some]
                for some in (graph.inputs, graph.outputs)
            )
            self.operands = {
                **{s.name: _within(weights, s.offset, s.type, {}) for s in layouts[0]},
                **{s.name: _within(state, s.offset, s.type, {}) for s in layouts[1]},
                **_whole(graph.inputs, inputs, symbols),
            }
            weight_names = {s.name for s in layouts[0]}
            for name, tensor in self.operands.items():
                if isinstance(values, DeviceRegion):
                    tensor.copy_(values.operands[name])
                else:
                    values.fill(name, tensor, sizes, name in weight_names)
            self._outputs = _whole(graph.outputs, outputs, symbols)
            self._state, self._first = state, state.clone()
            arenas = [weights, state, self._scratch, *inputs, *outputs]
            self._launches = self._placed(kernels, arenas)

    def _placed(
        self, kernels: Kernels, arenas: Sequence[torch.Tensor]
    ) -> list[tuple[LoadedKernel, int, tuple[int, ...]]]:
        """Each launch that has programs: the kernel, how many, and the values of its parameters."""
        symbols = self.sizes.symbols
        starts = [arena.data_ptr() for arena in arenas]
        found = []
        most = (1, 1)
        for launch in kernels.code.record.functions[self.part.name].launches:
            tasks = evaluate_dim(launch.tasks, symbols)
            if not tasks:
                continue
            kernel = kernels[launch.binary]
            pointers = [starts[p.arena] + evaluate_dim(p.offset, symbols) for p in launch.pointers]
            found.append((kernel, tasks, pointers))
            binary = kernel.binary
            hidden = (tasks * binary.global_scratch, tasks * binary.profile_scratch)
            most = (max(most[0], hidden[0]), max(most[1], hidden[1]))
        self._hidden = [self._device.allocate(size) for size in most]
        ends = (self._hidden[0].data_ptr(), self._hidden[1].data_ptr())
        numbers = (symbols["B"], symbols["L"], symbols["C"])
        return [
            (kernel, tasks, kernel.binary.arguments(pointers, numbers, ends))
            for kernel, tasks, pointers in found
        ]

    @property
    def launches(self) -> int:
        """How many kernels one run launches."""
        return len(self._launches)

    @property
    def bytes(self) -> float:
        """What has to be read and written."""
        return self.part.bytes(self.sizes)

    @property
    def flops(self) -> float:
        """Floating-point operations."""
        return self.part.flops(self.sizes)

    def run(self) -> None:
        """Launch everything in torch's current stream."""
        with self._device.active():
            for kernel, tasks, arguments in self._launches:
                self._device.launch(kernel, tasks, arguments)

    def results(self) -> dict[str, torch.Tensor]:
        """Outputs, and states that a run changes, by name, as they are now."""
        graph = self.part.graph
        pairs = zip(graph.states, graph.next_states, strict=True)
        changed = {s.name: self.operands[s.name] for s, following in pairs if following is not s}
        return {**self._outputs, **changed}

    def reset(self) -> None:
        """Put states back to what they were at first, and poison all that a run has to write."""
        with self._device.active():
            self._state.copy_(self._first)
            for memory in (self._scratch, *self._outputs.values()):
                memory.view(torch.uint8).fill_(_POISON)

    def expected(self) -> dict[str, torch.Tensor]:
        """What outputs and states have to be after the first run, in float32, rounded where the graph rounds."""
        return evaluate(self.part.graph, self.at_first())

    def at_first(self) -> dict[str, torch.Tensor]:
        """The operands before the first run; not to be changed."""
        layout = state_layout(self.part.graph).at(self.sizes.symbols)
        states = {s.name: _within(self._first, s.offset, s.type, {}) for s in layout}
        return {**self.operands, **states}

    def expected_rows(self, row: int, start: int, stop: int) -> dict[str, torch.Tensor]:
        """As `expected`, for new tokens `start` to `stop` of one sequence alone.

        For a part whose tokens do not see each other but through what was cached with them: attention over a cache that
        has the new rows already. What all tokens together need may be larger than any memory.
        """
        given = {
            v.name: _rows(v, tensor, row, start, stop)
            for v, tensor in ((v, self.operands[v.name]) for v in self.part.graph.arguments)
        }
        return evaluate(self.part.graph, given)


def evaluate(graph: Graph, arguments: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs and next states by name, on the device that the arguments are on."""
    place = next(iter(arguments.values())).device
    # Without cudnn, whose convolutions of float32 may be rounded to TF32.
    with torch.no_grad(), torch.device(place), torch.backends.cudnn.flags(enabled=False):
        found = interpret(graph, arguments)
    outputs = {v.name: t for v, t in zip(graph.outputs, found.outputs, strict=True)}
    return {**outputs, **found.states}


def _rows(value: Value, tensor: torch.Tensor, row: int, start: int, stop: int) -> torch.Tensor:
    """What a sequence's tokens `start` to `stop` see of an argument."""
    if value.name == "lengths":
        return tensor[row : row + 1] + start
    symbols = [str(d) for d in value.shape]
    if symbols[:1] != ["B"]:
        return tensor
    mine = tensor[row : row + 1]
    return mine[:, start:stop] if symbols[1:2] == ["L"] else mine


def _bytes(type_: TensorType, symbols: Mapping[str, int]) -> int:
    return evaluate_dim(type_.bytes, symbols)


def _within(
    memory: torch.Tensor, offset: Dim, type_: TensorType, symbols: Mapping[str, int]
) -> torch.Tensor:
    """The tensor that begins at a byte of some memory."""
    begin = evaluate_dim(offset, symbols)
    shape = [evaluate_dim(d, symbols) for d in type_.shape]
    data = memory[begin : begin + _bytes(type_, symbols)]
    return data.view(type_.dtype.torch).view(shape)


def _whole(
    some: Sequence[Value], memory: Sequence[torch.Tensor], symbols: Mapping[str, int]
) -> dict[str, torch.Tensor]:
    pairs = zip(some, memory, strict=True)
    return {v.name: _within(m, 0, v.type, symbols) for v, m in pairs}
