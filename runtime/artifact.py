"""Building an artifact from what the compiler made, and loading one: both end in an executable."""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from nemoc.codegen.storage import Weight, state_layout, weight_layout
from nemoc.ir.errors import NemocError
from nemoc.ir.graph import Graph
from nemoc.ir.op import Op
from nemoc.ir.parser import parse
from nemoc.ir.printer import print_graph
from nemoc.runtime.backend import Backend
from nemoc.runtime.cpu import LIBRARY, CpuBackend
from nemoc.runtime.executable import Executable
from nemoc.runtime.files import replacing_directory
from nemoc.runtime.machine import Machine
from nemoc.runtime.manifest import MANIFEST, WEIGHTS, FileRecord, Manifest, is_plain, read_manifest
from nemoc.runtime.program import DECODE, PREFILL, Bounds, Generation, Program
from nemoc.runtime.reference import ReferenceBackend
from nemoc.runtime.state import LENGTHS
from nemoc.runtime.store import Verify, is_artifact, new_file, open_weights, write_content
from nemoc.runtime.weights import PackedWeights, Pieces, header_digest, write_weights

Progress = Callable[[str, int, int], None]
"""Told `(stage, done, total)`, in bytes."""


@dataclass(frozen=True)
class Contents:
    """What goes into an artifact.

    Attributes:
        target: the target's name.
        functions: graphs by function name whose parameters are the weights: the result of `bind_weights`.
        weights: the weights, in the order of `weight_layout`.
        pieces: the weights' data.
        bounds: sizes of steps and states.
        machine: what the code needs; none when it runs anywhere.
        generation: token ids for generation.
        model: the model's configuration, JSON data.
        kernels: JSON data for the target's backend.
        files: further files by name: `tokenizer/...`, `kernels/...`, reports.
        tools: versions of nemoc and of what it compiled with.
    """

    target: str
    functions: Mapping[str, Graph]
    weights: Sequence[Weight]
    pieces: Pieces
    bounds: Bounds
    machine: Machine | None = None
    generation: Generation = field(default_factory=Generation)
    model: Mapping[str, Any] = field(default_factory=dict)
    kernels: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Path | bytes | str] = field(default_factory=dict)
    tools: Mapping[str, str] = field(default_factory=dict)


def build(
    contents: Contents,
    destination: Path | None = None,
    threads: int | None = None,
    extra_ops: tuple[type[Op], ...] = (),
    progress: Progress = lambda stage, done, total: None,
) -> Executable:
    """Write an artifact and load it.

    Args:
        contents: what to write.
        destination: the artifact's directory; an artifact of that name is replaced, anything else is not. None: a
            temporary one, which is removed with the executable.
        threads: of the CPU; None: all cores.
        extra_ops: op classes of the graphs beside those of the IR.
        progress: told how much of the weights is packed.

    Raises:
        NemocError: the contents do not fit together, or the artifact cannot be written: then nothing has changed under
            its name. Or it is written, but for another machine than this.
    """
    vocab = _check(contents)
    temporary = None
    if destination is None:
        temporary = tempfile.mkdtemp(prefix="nemoc-")
        destination = Path(temporary, "model.nemoc")
    try:
        with replacing_directory(destination, is_artifact) as folder:
            _write(contents, vocab, folder, progress)
        # Just written and hashed: reading all of it again would tell nothing new.
        executable = load(destination, verify="headers", threads=threads, extra_ops=extra_ops)
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if temporary is not None:
        weakref.finalize(executable, shutil.rmtree, temporary, ignore_errors=True)
    return executable


def load(
    path: str | Path,
    resident: bool = False,
    verify: Verify = "full",
    threads: int | None = None,
    extra_ops: tuple[type[Op], ...] = (),
    progress: Progress = lambda stage, done, total: None,
) -> Executable:
    """Load an artifact: nothing is traced, compiled or tuned, and weights are mapped.

    Args:
        path: the artifact's directory.
        resident: copy the weights into memory, in huge pages where the system has them.
        verify: `full` checks every byte; `headers` leaves out the data of the weights.
        threads: of the CPU; None: all cores.
        extra_ops: op classes of the graphs beside those of the IR; the `reference` target needs them.
        progress: told how much of the weights is checked.

    Raises:
        NemocError: the artifact is incomplete, altered, of another version, or for another machine.
    """
    folder = Path(path)
    if verify not in get_args(Verify):
        raise NemocError(f"verify is {verify!r}, expected one of {', '.join(get_args(Verify))}")
    manifest = read_manifest(folder)
    if manifest.machine is not None and (lack := Machine.host().lacks(manifest.machine)):
        raise NemocError(f"{folder}: was compiled for {manifest.target} and needs {lack}")
    total = manifest.files[WEIGHTS].size
    weights = open_weights(
        folder, manifest, resident, verify, lambda done: progress("check weights", done, total)
    )
    program = manifest.program(str(folder))
    backend = _backend(folder, manifest, program, weights, threads, extra_ops)
    return Executable(program, backend, folder)


def _backend(
    folder: Path,
    manifest: Manifest,
    program: Program,
    weights: PackedWeights,
    threads: int | None,
    extra_ops: tuple[type[Op], ...],
) -> Backend:
    kind = program.target.partition(":")[0]
    if kind == "reference":
        functions = {
            name: parse((folder / file).read_text("utf-8"), str(folder / file), extra_ops)
            for name, file in manifest.graphs.items()
        }
        return ReferenceBackend(functions, weights)
    if kind == "cpu":
        return CpuBackend(folder / LIBRARY, manifest.kernels, program, weights, threads)
    raise NemocError(f"{folder}: target {program.target!r} cannot be run by this nemoc")


def _check(contents: Contents) -> int:
    """Hold the parts against each other; returns the size of the vocabulary."""
    for name in (PREFILL, DECODE):
        if name not in contents.functions:
            raise NemocError(f"there is no function {name}")
    prefill = contents.functions[PREFILL]
    vocab = next((v.bound for v in prefill.inputs if v.name == "tokens"), None)
    if not isinstance(vocab, int):
        raise NemocError(f"{prefill.name}: the input %tokens has no bound that is a number")
    contents.generation.check(vocab)
    states = [(s.name, s.type) for s in prefill.states]
    if LENGTHS not in dict(states):
        raise NemocError(f"{prefill.name}: has no state %{LENGTHS}")
    for name in contents.files:
        if not is_plain(name):
            raise NemocError(f"the file name {name!r} is no plain relative path")
    stored = {w.name for w in contents.weights}
    for name, graph in contents.functions.items():
        if [(s.name, s.type) for s in graph.states] != states:
            raise NemocError(f"the states of {name} are not those of {PREFILL}")
        missing = [p.name for p in graph.params if p.name not in stored]
        if missing:
            raise NemocError(f"{name}: the parameter %{missing[0]} is not among the weights")
    return vocab


def _write(contents: Contents, vocab: int, folder: Path, progress: Progress) -> None:
    files: dict[str, FileRecord] = {}
    graphs = {name: f"graphs/{name}.ir" for name in contents.functions}
    for name, graph in contents.functions.items():
        files[graphs[name]] = write_content(folder, graphs[name], print_graph(graph))
    for name, content in contents.files.items():
        files[name] = write_content(folder, name, content)
    total = int(weight_layout(contents.weights).bytes)
    with new_file(folder, WEIGHTS) as file:
        write_weights(
            file, contents.weights, contents.pieces, lambda n: progress("pack weights", n, total)
        )
    files[WEIGHTS] = file.record
    manifest = Manifest(
        target=contents.target,
        machine=contents.machine,
        model=contents.model,
        vocab=vocab,
        bounds=contents.bounds,
        generation=contents.generation,
        state=tuple((s.name, s.type) for s in state_layout(contents.functions[PREFILL])),
        graphs=graphs,
        kernels=contents.kernels,
        tools=contents.tools,
        weights_header=header_digest(contents.weights),
        files=files,
    )
    write_content(folder, MANIFEST, manifest.to_text())
