"""GPU targets: from graphs to the files of an artifact, and what runs those whose kernels are interpreted."""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nemoc.codegen.lower import Emit, Program, corner_sizes, lower_program
from nemoc.codegen.storage import Layout
from nemoc.codegen.triton import binary as code
from nemoc.codegen.triton.build import compile_variants, variants_of
from nemoc.codegen.triton.emit import emit, expanded
from nemoc.codegen.triton.kernel_store import KernelStore
from nemoc.codegen.triton.module import module_source
from nemoc.codegen.triton.target import INTERPRETER, gpu_target
from nemoc.codegen.tuned import Lookup, tuned
from nemoc.ir import Graph, NemocError, Op
from nemoc.progress import Progress
from nemoc.runtime import Executable, load
from nemoc.runtime.backend import BackendFactory, Opened
from nemoc.runtime.launches import LAUNCHES, Binary, LaunchRecord
from nemoc.runtime.program import PREFILL_ALL
from nemoc.runtime.state import State

REPORT = "kernels/report.json"
"""What compiling says of each kernel, within an artifact."""

_SUFFIXES = {"cuda": "cubin", "hip": "hsaco"}


def lower_gpu(
    graphs: Mapping[str, Graph],
    layout: Layout,
    corners: Sequence[Mapping[str, int]],
    target: str,
    lookup: Lookup | None = None,
) -> Program:
    """The launches and the memory of step functions.

    Args:
        graphs, layout, corners: as for `lower_program`.
        target: of which GPU.
        lookup: schedules of kernels; none for the defaults.
    """
    emitter: Emit = functools.partial(emit, target=gpu_target(target))
    if lookup is not None:
        emitter = tuned(emitter, lookup)
    return lower_program(expanded(graphs), layout, corners, emitter)


def gpu_source(program: Program, target: str) -> str:
    """The text of every kernel of a program, for people."""
    return module_source(program.kernels, gpu_target(target))


def compiled_files(
    program: Program, target: str, store: KernelStore | None, progress: Progress | None
) -> dict[str, bytes | str]:
    """The files of an artifact that hold a program's machine code, how it is launched, and what compiling says of it.

    Raises:
        NemocError: a kernel cannot be compiled, or does not fit the target.
    """
    variants = variants_of(program.functions)
    compiled = compile_variants(
        variants.values(), gpu_target(target), store=store, progress=progress
    )
    binaries = {name: compiled[variant] for name, variant in variants.items()}
    suffix = _SUFFIXES[target.partition(":")[0]]
    files = {name: f"kernels/{name}.{suffix}" for name in binaries}
    launches = {name: launched(files[name], binary) for name, binary in binaries.items()}
    record = LaunchRecord.of(target, program.scratch_bytes, launches, program.functions)
    report = [_summary(binary) for binary in binaries.values()]
    return {
        LAUNCHES: record.to_text(),
        REPORT: json.dumps(report, indent=1) + "\n",
        **{files[name]: binary.code for name, binary in binaries.items()},
    }


def _summary(binary: code.Binary) -> dict[str, Any]:
    """Everything about a kernel but its code."""
    return {name: value for name, value in binary.record().items() if name != "code"}


def launched(file: str, binary: code.Binary) -> Binary:
    """How a compiled kernel is launched, as whoever launches it sees it.

    Args:
        file: its name.
        binary: its code.
    """
    return Binary(
        file=file,
        symbol=binary.symbol,
        threads=binary.threads,
        shared=binary.shared,
        parameters=len(binary.parameters),
        pointers=binary.parameters.count("pointer"),
        global_scratch=binary.global_scratch.bytes,
        global_scratch_align=binary.global_scratch.alignment,
        profile_scratch=binary.profile_scratch.bytes,
        profile_scratch_align=binary.profile_scratch.alignment,
        waits=binary.waits,
    )


class InterpretedBackend:
    """Runs a program's GPU kernels in Triton's interpreter, those of whatever GPU it was compiled for.

    They are generated anew from the artifact's graphs.

    Args:
        opened: the artifact.
    """

    def __init__(self, opened: Opened) -> None:
        from nemoc.codegen.triton.interpret import InterpretedProgram  # noqa: PLC0415  (loads triton)

        graphs = opened.graphs()
        bounds = opened.program.bounds
        corners = corner_sizes(bounds.max_batch, bounds.max_tokens, bounds.max_context)
        program = lower_gpu(graphs, opened.weights.layout, corners, opened.program.target)
        self._inputs = {name: [v.name for v in graph.inputs] for name, graph in graphs.items()}
        self._program = InterpretedProgram(program.functions)
        self._weights = opened.weights.data
        self._scratch = torch.empty(program.scratch_bytes, dtype=torch.uint8, device="cpu")
        self._vocab = opened.program.vocab

    def allocate(self, size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.uint8, device="cpu")

    def run(
        self, function: str, tokens: torch.Tensor, valid: torch.Tensor, state: State
    ) -> torch.Tensor:
        batch, length = tokens.shape
        shape = (batch, length) if function == PREFILL_ALL else (batch,)
        logits = torch.empty((*shape, self._vocab), dtype=torch.float32, device="cpu")
        given = {"tokens": tokens, "valid": valid}
        inputs = [given[name] for name in self._inputs[function]]
        arenas = [self._weights, state.arena, self._scratch, *inputs, logits]
        sizes = {"B": batch, "L": length, "C": state.capacity}
        with torch.device("cpu"):  # whatever the user's default is
            self._program.run(function, arenas, sizes)
        return logits


BACKENDS: Mapping[str, BackendFactory] = {INTERPRETER: InterpretedBackend}
"""Backends that the runtime has not, since they need a compiler's parts."""


def runnable(executable: Executable, own: tuple[type[Op], ...] = ()) -> Executable:
    """The same executable where its GPU is at hand or it needs none; else one whose kernels are interpreted.

    Args:
        executable: as it was compiled.
        own: ops of a user's own that are in its graphs.
    """
    kind = executable.program.target.partition(":")[0]
    if kind not in _SUFFIXES:
        return executable
    try:
        executable.new_state()
    except NemocError:
        return load(
            executable.folder,
            verify="headers",
            extra_ops=own,
            backends={kind: InterpretedBackend},
        )
    return executable
