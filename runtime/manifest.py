"""The manifest of an artifact: what it is, what it needs, and a digest of every file.

`manifest.json` is JSON in one fixed form with a digest of itself: reading it and writing it again gives the same
bytes, or it is refused. With the digests of all other files in it, a change of any byte is noticed. That is for
damage and mix-ups: who writes a manifest of his own makes its digest right, so artifacts of strangers are code of
strangers. What the graphs say, the vocabulary and the state, is not repeated here.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from nemoc.ir.errors import NemocError
from nemoc.ir.json_file import parse_json, read_json
from nemoc.runtime.machine import Machine
from nemoc.runtime.program import DECODE, FUNCTIONS, PREFILL, Bounds, Generation

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
FORMAT = "nemoc artifact"
VERSION = 3
"""Version of the format; raised whenever one nemoc could misread the artifact of another."""

GRAPHS = {name: f"graphs/{name}.ir" for name in FUNCTIONS}
"""For each function that there may be, the file with its graph."""

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
        bounds: sizes of steps and states.
        generation: token ids for generation.
        kernels: JSON data of the target's backend.
        tools: versions of nemoc and what it compiled with.
        weights_header: SHA-256 of the weight file's header.
        files: every file but the manifest itself, by name.
    """

    target: str
    machine: Machine | None
    model: Mapping[str, Any]
    bounds: Bounds
    generation: Generation
    kernels: Mapping[str, Any]
    tools: Mapping[str, str]
    weights_header: str
    files: Mapping[str, FileRecord]

    @property
    def graphs(self) -> dict[str, str]:
        """For each function, the file with its graph."""
        return {name: file for name, file in GRAPHS.items() if file in self.files}

    @property
    def identity(self) -> str:
        """A digest of functions and weights: states belong to it."""
        parts = [self.files[WEIGHTS].sha256]
        parts += [f"{name} {self.files[self.graphs[name]].sha256}" for name in sorted(self.graphs)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def to_text(self) -> str:
        """The text of `manifest.json`."""
        return _seal(
            {
                "format": FORMAT,
                "version": VERSION,
                "target": self.target,
                "machine": None if self.machine is None else vars(self.machine),
                "model": dict(self.model),
                "bounds": vars(self.bounds),
                "generation": vars(self.generation),
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
    except (TypeError, NemocError) as error:
        raise NemocError(f"{path}: a field cannot be read: {error}") from None
    for name in (WEIGHTS, GRAPHS[PREFILL], GRAPHS[DECODE]):
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
        return read_json(path).get("format") == FORMAT
    except NemocError:
        return False


def _read(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        reason = (
            "is no artifact: it has no " + MANIFEST if path.parent.is_dir() else "no such artifact"
        )
        raise NemocError(f"{path.parent}: {reason}") from None
    except NotADirectoryError:
        raise NemocError(f"{path.parent}: is no artifact: it is not a directory") from None
    except OSError as error:
        raise NemocError(f"{path}: cannot be read: {error.strerror}") from None
    data = parse_json(content, path)
    if _dump(data) != content.decode():
        raise NemocError(f"{path}: was altered: it is not in the form that nemoc writes")
    return data


def _from_json(data: dict[str, Any]) -> Manifest:
    machine = None if data["machine"] is None else _field(data, "machine", dict)
    bounds, generation = _field(data, "bounds", dict), _field(data, "generation", dict)
    tools, files = _field(data, "tools", dict), _field(data, "files", dict)
    for name in ("bos", "pad"):
        if generation[name] is not None:
            _field(generation, name, int)
    return Manifest(
        target=_field(data, "target", str),
        machine=None
        if machine is None
        else Machine(_field(machine, "architecture", str), tuple(_items(machine, "features", str))),
        model=_field(data, "model", dict),
        bounds=Bounds(*(_field(bounds, f.name, int) for f in fields(Bounds))),
        generation=Generation(
            tuple(_items(generation, "eos", int)), generation["bos"], generation["pad"]
        ),
        kernels=_field(data, "kernels", dict),
        tools={name: _field(tools, name, str) for name in tools},
        weights_header=_field(data, "weights_header", str),
        files={
            name: FileRecord(
                _field(_field(files, name, dict), "size", int, f"{name}: "),
                _field(files[name], "sha256", str, f"{name}: "),
            )
            for name in files
        },
    )


_K = TypeVar("_K")


def _field(data: dict[str, Any], name: str, kind: type[_K], where: str = "") -> _K:
    """A field of exactly one type: JSON's true is no integer."""
    value = data[name]
    if type(value) is not kind:
        raise TypeError(f"{where}{name} is {value!r}, expected {kind.__name__}")
    return value


def _items(data: dict[str, Any], name: str, kind: type[_K]) -> list[_K]:
    values = _field(data, name, list)
    if any(type(value) is not kind for value in values):
        raise TypeError(f"{name} is {values!r}, expected a list of {kind.__name__}")
    return values


def _seal(data: Mapping[str, Any]) -> str:
    """The text of data with a digest of the text without it."""
    digest = hashlib.sha256(_dump(data).encode()).hexdigest()
    return _dump({**data, "digest": digest})


def _dump(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
