"""Building an artifact from what the compiler made, and loading one: both end in an executable."""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, get_args

from nemoc.codegen.storage import Layout, Weight, weight_layout
from nemoc.ir.dims import B, L
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import NemocError
from nemoc.ir.graph import Graph
from nemoc.ir.op import Op
from nemoc.ir.parser import Signature, parse_signature
from nemoc.ir.printer import print_graph
from nemoc.ir.types import TensorType
from nemoc.runtime.backend import Backend, BackendFactory, DeferredBackend, Opened
from nemoc.runtime.cpu import open_cpu
from nemoc.runtime.cuda import defer_cuda, open_cuda
from nemoc.runtime.executable import Executable
from nemoc.runtime.files import as_path, replacing_directory
from nemoc.runtime.machine import Machine, thread_count
from nemoc.runtime.manifest import (
    GRAPHS,
    MANIFEST,
    WEIGHTS,
    FileRecord,
    Manifest,
    is_plain,
    read_manifest,
)
from nemoc.runtime.program import PREFILL, PREFILL_ALL, Bounds, Generation, Program, check_functions
from nemoc.runtime.reference import open_reference
from nemoc.runtime.store import Verify, is_artifact, new_file, open_weights, write_content
from nemoc.runtime.weights import Pieces, header_digest, write_weights

Progress = Callable[[str, int, int], None]
"""Told `(stage, done, total)`, in bytes."""

_NO_BACKENDS: Mapping[str, BackendFactory] = MappingProxyType({})


def _open_hip(opened: Opened) -> NoReturn:
    raise NemocError(
        f"{opened.folder}: is for {opened.program.target}; this version runs cuda targets only"
    )


def _defer_hip(opened: Opened) -> Backend:
    return DeferredBackend(partial(_open_hip, opened))


_BACKENDS: Mapping[str, BackendFactory] = {
    "reference": open_reference,
    "cpu": open_cpu,
    "cuda": open_cuda,
    "hip": _open_hip,
}
"""How each kind of target is run: what comes before the colon."""

_BUILT_BACKENDS: Mapping[str, BackendFactory] = {"cuda": defer_cuda, "hip": _defer_hip}
"""For artifacts that were just built: GPUs that code is compiled for may be elsewhere, and memory of one at hand is not
taken before there is something to run."""


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
        packed: an executable whose artifact has these weights already: its file is taken, and no data are read.
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
    packed: Executable | None = None


def build(
    contents: Contents,
    destination: str | Path | None = None,
    threads: int | None = None,
    extra_ops: tuple[type[Op], ...] = (),
    progress: Progress = lambda stage, done, total: None,
    backends: Mapping[str, BackendFactory] = _NO_BACKENDS,
) -> Executable:
    """Write an artifact and load it.

    An artifact for a GPU is loaded when it is first used; if this machine has none of that kind, that is when it
    is refused.

    Args:
        contents: what to write.
        destination: the artifact's directory; an artifact of that name is replaced, anything else is not. None: a
            temporary one, which is removed with the executable.
        threads: of the CPU; None: all cores.
        extra_ops: op classes of the graphs beside those of the IR.
        progress: told how much of the weights is packed.
        backends: as for `load`.

    Raises:
        NemocError: the contents do not fit together, or the artifact cannot be written: then nothing has changed under
            its name. Or it is written, but for another machine than this.
    """
    _check(contents)
    threads = thread_count(threads)
    place = None if destination is None else as_path(destination)
    temporary = None
    if place is None:
        temporary = tempfile.mkdtemp(prefix="nemoc-")
        place = Path(temporary, "model.nemoc")
    try:
        with replacing_directory(place, is_artifact) as folder:
            _write(contents, folder, progress)
        # Just written and hashed: reading all of it again would tell nothing new.
        executable = load(
            place,
            verify="headers",
            threads=threads,
            extra_ops=extra_ops,
            backends={**_BUILT_BACKENDS, **backends},
        )
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
    backends: Mapping[str, BackendFactory] = _NO_BACKENDS,
) -> Executable:
    """Load an artifact: nothing is traced, compiled or tuned, and weights are mapped.

    Args:
        path: the artifact's directory.
        resident: copy the weights into memory, in huge pages where the system has them.
        verify: `full` checks every byte; `headers` leaves out the data of the weights.
        threads: of the CPU; None: all cores.
        extra_ops: op classes of the graphs beside those of the IR; the `reference` target needs them.
        progress: told how much of the weights is checked.
        backends: what runs further kinds of targets, or known ones otherwise, by what comes before the colon.

    Raises:
        NemocError: the artifact is incomplete, altered, of another version, or for another machine or GPU.
    """
    folder = as_path(path)
    threads = thread_count(threads)
    if verify not in get_args(Verify):
        raise NemocError(f"verify is {verify!r}, expected one of {', '.join(get_args(Verify))}")
    manifest = read_manifest(folder)
    if manifest.machine is not None and (lack := Machine.host().lacks(manifest.machine)):
        raise NemocError(f"{folder}: was compiled for {manifest.target} and needs {lack}")
    total = manifest.files[WEIGHTS].size
    weights = open_weights(
        folder, manifest, resident, verify, lambda done: progress("check weights", done, total)
    )
    texts = {name: _read_text(folder / file) for name, file in manifest.graphs.items()}
    signatures = {
        name: parse_signature(text, str(folder / manifest.graphs[name]))
        for name, text in texts.items()
    }
    program = _program(folder, manifest, signatures)
    factory = {**_BACKENDS, **backends}.get(program.target.partition(":")[0])
    if factory is None:
        raise NemocError(f"{folder}: target {program.target!r} cannot be run by this nemoc")
    backend = factory(
        Opened(folder, manifest, program, texts, signatures, weights, threads, extra_ops)
    )
    return Executable(program, backend, folder, manifest)


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise NemocError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise NemocError(f"{path}: is no text, expected a graph") from None


def _program(folder: Path, manifest: Manifest, signatures: Mapping[str, Signature]) -> Program:
    """What manifest and graphs say of the model; `folder` is what messages call it."""
    try:
        vocab = check_functions(signatures)
        manifest.generation.check(vocab)
    except NemocError as error:
        raise NemocError(f"{folder}: {error}") from None
    return Program(
        name=str(folder),
        target=manifest.target,
        identity=manifest.identity,
        vocab=vocab,
        bounds=manifest.bounds,
        generation=manifest.generation,
        state=Layout.of((s.name, s.type) for s in signatures[PREFILL].states),
        functions=frozenset(signatures),
        model=manifest.model,
    )


def _check(contents: Contents) -> None:
    """Hold the parts against each other."""
    vocab = check_functions(
        {n: Signature(g.inputs, g.params, g.states) for n, g in contents.functions.items()}
    )
    contents.generation.check(vocab)
    for name in contents.files:
        if not is_plain(name):
            raise NemocError(f"the file name {name!r} is no plain relative path")
    stored = {w.name for w in contents.weights}
    for name, graph in contents.functions.items():
        missing = [p.name for p in graph.params if p.name not in stored]
        if missing:
            raise NemocError(f"{name}: the parameter %{missing[0]} is not among the weights")
        shape = (B, L, vocab) if name == PREFILL_ALL else (B, vocab)
        expected = TensorType.of(DType.F32, shape)
        if [v.type for v in graph.outputs] != [expected]:
            found = ", ".join(str(v.type) for v in graph.outputs)
            raise NemocError(f"{name}: gives {found}, expected {expected}")


def _write(contents: Contents, folder: Path, progress: Progress) -> None:
    files: dict[str, FileRecord] = {}
    for name, graph in contents.functions.items():
        files[GRAPHS[name]] = write_content(folder, GRAPHS[name], print_graph(graph))
    for name, content in contents.files.items():
        files[name] = write_content(folder, name, content)
    files[WEIGHTS] = _write_weights(contents, folder, progress)
    manifest = Manifest(
        target=contents.target,
        machine=contents.machine,
        model=contents.model,
        bounds=contents.bounds,
        generation=contents.generation,
        kernels=contents.kernels,
        tools=contents.tools,
        weights_header=header_digest(contents.weights),
        files=files,
    )
    write_content(folder, MANIFEST, manifest.to_text())


def _write_weights(contents: Contents, folder: Path, progress: Progress) -> FileRecord:
    """Pack the weights, or take those of another artifact."""
    if contents.packed is not None:
        return contents.packed.share_weights(header_digest(contents.weights), folder)
    total = int(weight_layout(contents.weights).bytes)
    with new_file(folder, WEIGHTS) as file:
        write_weights(
            file, contents.weights, contents.pieces, lambda n: progress("pack weights", n, total)
        )
    return file.record
