"""The manifest of an artifact: what it is, what it needs, and a digest of every file.

`manifest.json` is JSON in one fixed form with a digest of itself: reading it and writing it again gives the same
bytes, or it is refused. With the digests of all other files in it, a change of any byte is noticed.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemoc.codegen.storage import Layout
from nemoc.ir.dims import format_dim, parse_dim
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import NemocError
from nemoc.ir.types import TensorType
from nemoc.runtime.machine import Machine
from nemoc.runtime.program import Bounds, Generation, Program

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
FORMAT = "nemoc artifact"
VERSION = 1
"""Version of the format; raised whenever an older nemoc could misread a newer artifact."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)*")
"""Names of files: relative, plain, and never `..`."""


@dataclass(frozen=True)
class FileRecord:
    """A file of an artifact as it was written.

    Attributes:
        size: in bytes.
        sha256: of its content, in hex.
    """

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says.

    Attributes:
        target: the target that the artifact was compiled for.
        machine: what its code needs; none when it runs anywhere.
        model: the model's configuration, JSON data.
        vocab: token ids are below this.
        bounds: sizes of steps and states.
        generation: token ids for generation.
        state: names and types of the states, in order.
        graphs: for each function, the file with its graph.
        kernels: JSON data of the target's backend.
        tools: versions of nemoc and what it compiled with.
        weights_header: SHA-256 of the weight file's header.
        files: every file but the manifest itself, by name.
    """

    target: str
    machine: Machine | None
    model: Mapping[str, Any]
    vocab: int
    bounds: Bounds
    generation: Generation
    state: tuple[tuple[str, TensorType], ...]
    graphs: Mapping[str, str]
    kernels: Mapping[str, Any]
    tools: Mapping[str, str]
    weights_header: str
    files: Mapping[str, FileRecord]

    @property
    def identity(self) -> str:
        """A digest of functions, weights and state: states belong to it."""
        parts = [self.files[WEIGHTS].sha256]
        parts += [f"{name} {self.files[self.graphs[name]].sha256}" for name in sorted(self.graphs)]
        parts += [f"{name} {type_}" for name, type_ in self.state]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def program(self, name: str) -> Program:
        """The program that the artifact holds; `name` is what messages call it."""
        return Program(
            name=name,
            target=self.target,
            identity=self.identity,
            vocab=self.vocab,
            bounds=self.bounds,
            generation=self.generation,
            state=Layout.of(self.state),
            functions=frozenset(self.graphs),
            model=self.model,
        )

    def to_text(self) -> str:
        """The text of `manifest.json`."""
        return _seal(
            {
                "format": FORMAT,
                "version": VERSION,
                "target": self.target,
                "machine": None if self.machine is None else self.machine.to_json(),
                "model": dict(self.model),
                "vocab": self.vocab,
                "bounds": vars(self.bounds),
                "generation": vars(self.generation),
                "state": [
                    {"name": n, "dtype": t.dtype.value, "shape": [format_dim(d) for d in t.shape]}
                    for n, t in self.state
                ],
                "graphs": dict(self.graphs),
                "kernels": dict(self.kernels),
                "tools": dict(self.tools),
                "weights_header": self.weights_header,
                "files": {name: vars(record) for name, record in self.files.items()},
            }
        )


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact; the other files are not looked at.

    Raises:
        NemocError: there is none, it was altered, or it has another version.
    """
    path = folder / MANIFEST
    data = _read(path)
    if data.get("format") != FORMAT:
        raise NemocError(f"{path}: format is {data.get('format')!r}, expected {FORMAT!r}")
    if data.get("version") != VERSION:
        raise NemocError(
            f"{path}: format version is {data.get('version')!r}, this nemoc reads version {VERSION}; "
            "compile the model again"
        )
    try:
        manifest = _from_json(data)
    except KeyError as error:
        raise NemocError(f"{path}: the field {error} is missing") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise NemocError(f"{path}: a field cannot be read: {error}") from None
    for name in (WEIGHTS, *manifest.graphs.values()):
        if name not in manifest.files:
            raise NemocError(f"{path}: lists no file {name}")
    for name in manifest.files:
        if not is_plain(name):
            raise NemocError(f"{path}: the file name {name!r} is no plain relative path")
    if manifest.to_text() != _dump(data):
        raise NemocError(f"{path}: was altered: it does not match its digest")
    return manifest


def is_plain(name: str) -> bool:
    """Whether a name may be that of a file in an artifact: a relative path that stays inside."""
    return _NAME.fullmatch(name) is not None


def is_manifest(path: Path) -> bool:
    """Whether a file is the manifest of an artifact, of any version."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and data.get("format") == FORMAT


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes().decode("utf-8")
        data = json.loads(text)
    except FileNotFoundError:
        reason = (
            "is no artifact: it has no " + MANIFEST if path.parent.is_dir() else "no such artifact"
        )
        raise NemocError(f"{path.parent}: {reason}") from None
    except NotADirectoryError:
        raise NemocError(f"{path.parent}: is no artifact: it is not a directory") from None
    except OSError as error:
        raise NemocError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise NemocError(f"{path}: is not JSON: {error}") from None
    if not isinstance(data, dict) or _dump(data) != text:
        raise NemocError(f"{path}: was altered: it is not in the form that nemoc writes")
    return data


def _from_json(data: Mapping[str, Any]) -> Manifest:
    for name in ("target", "weights_header"):
        _expect(name, data[name], str)
    for name in ("model", "graphs", "kernels", "tools", "files"):
        _expect(name, data[name], dict)
    _expect("vocab", data["vocab"], int)
    for name, record in data["files"].items():
        _expect(f"size of {name}", record["size"], int)
    generation = data["generation"]
    return Manifest(
        target=data["target"],
        machine=None if data["machine"] is None else Machine.from_json(data["machine"]),
        model=data["model"],
        vocab=data["vocab"],
        bounds=Bounds(**data["bounds"]),
        generation=Generation(tuple(generation["eos"]), generation["bos"], generation["pad"]),
        state=tuple(
            (s["name"], TensorType.of(DType.parse(s["dtype"]), map(parse_dim, s["shape"])))
            for s in data["state"]
        ),
        graphs=data["graphs"],
        kernels=data["kernels"],
        tools=data["tools"],
        weights_header=data["weights_header"],
        files={name: FileRecord(**record) for name, record in data["files"].items()},
    )


def _expect(name: str, value: Any, kind: type) -> None:
    if type(value) is not kind:
        raise TypeError(f"{name} is {value!r}")


def _seal(data: Mapping[str, Any]) -> str:
    """The text of data with a digest of the text without it."""
    digest = hashlib.sha256(_dump(data).encode()).hexdigest()
    return _dump({**data, "digest": digest})


def _dump(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
