"""A divergence kept on disk: two graphs that should compute the same, and the arguments on which they do not.

    before.ir, after.ir        the graphs
    pipeline.txt               the passes that made the second, up to the guilty one
    arguments.safetensors      inputs, states and parameters
    check.json                 what was promised and found, and a SHA-256 of each other file

It is complete: replaying it takes neither the model nor a run of the pass, but the classes of ops of its own if it has
such. The digests are against damage, not against forgery, and reading the folder executes nothing that it holds.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch

from nemoc.ir.errors import NemocError
from nemoc.ir.graph import Graph
from nemoc.ir.json_file import parse_json
from nemoc.ir.op import Op
from nemoc.ir.parser import parse

FACTS = "check.json"
_BEFORE, _AFTER, _PIPELINE = "before.ir", "after.ir", "pipeline.txt"
_ARGUMENTS = "arguments.safetensors"
_FORMAT = "nemoc reproducer"
_VERSION = 1
_K = TypeVar("_K")


@dataclass(frozen=True)
class Reproducer:
    """Two graphs, and how they part.

    Attributes:
        before: what is expected.
        after: what a pass made of it.
        arguments: a tensor for each argument of either graph, by name.
        pipeline: text of the passes up to the guilty one.
        place: which pass it is: `pass 3 of 7 (cse)`.
        effect: what the pass declares.
        budget: the relative error that this allows; 0 means equal bits.
        seed: of the random arguments.
        change: the change that did it, in words; empty where only the pass is known.
        verdict: how they parted when this was written, in words.
    """

    before: Graph
    after: Graph
    arguments: Mapping[str, torch.Tensor]
    pipeline: str
    place: str
    effect: str
    budget: float
    seed: int
    change: str
    verdict: str

    def save(self, folder: Path) -> None:
        """Write the files into a folder, which is made if need be. All arguments are in memory meanwhile.

        Raises:
            NemocError: it cannot be written.
        """
        names = dict.fromkeys(v.name for g in (self.before, self.after) for v in g.arguments)
        dense = {
            name: self.arguments[name].clone(memory_format=torch.contiguous_format)
            for name in names
        }
        files = {
            _BEFORE: str(self.before).encode(),
            _AFTER: str(self.after).encode(),
            _PIPELINE: f"{self.pipeline}\n".encode(),
            _ARGUMENTS: safetensors.torch.save(dense),
        }
        facts = {
            "format": _FORMAT,
            "version": _VERSION,
            "place": self.place,
            "effect": self.effect,
            "budget": self.budget,
            "seed": self.seed,
            "change": self.change,
            "verdict": self.verdict,
            "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        }
        files[FACTS] = (json.dumps(facts, indent=2) + "\n").encode()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, data in files.items():
                (folder / name).write_bytes(data)
        except OSError as error:
            raise NemocError(f"{folder}: cannot be written: {error.strerror}") from None


def is_reproducer(folder: Path) -> bool:
    """Whether a path is the folder of a reproducer, sound or not."""
    try:
        return parse_json((folder / FACTS).read_bytes(), folder).get("format") == _FORMAT
    except (OSError, NemocError):
        return False


def read_reproducer(folder: Path, extra_ops: tuple[type[Op], ...] = ()) -> Reproducer:
    """Read what `Reproducer.save` wrote.

    Args:
        folder: where it is.
        extra_ops: op classes of the graphs beside those of the IR.

    Raises:
        NemocError: a file is missing, altered or malformed.
    """
    path = folder / FACTS
    facts = parse_json(_read(path), path)
    for name, expected in (("format", _FORMAT), ("version", _VERSION)):
        if (found := _field(path, facts, name, type(expected))) != expected:
            raise NemocError(f"{path}: field {name} is {found!r}, expected {expected!r}")
    budget = _field(path, facts, "budget", float)
    if not (budget >= 0 and math.isfinite(budget)):
        raise NemocError(f"{path}: field budget is {budget!r}, expected a number from 0 on")
    digests = _field(path, facts, "files", dict)
    content = {
        name: _checked(folder / name, _field(path, digests, name, str, "files."))
        for name in (_BEFORE, _AFTER, _PIPELINE, _ARGUMENTS)
    }
    return Reproducer(
        before=_graph(folder / _BEFORE, content[_BEFORE], extra_ops),
        after=_graph(folder / _AFTER, content[_AFTER], extra_ops),
        arguments=_tensors(folder / _ARGUMENTS, content[_ARGUMENTS]),
        pipeline=_text(folder / _PIPELINE, content[_PIPELINE]).strip(),
        place=_field(path, facts, "place", str),
        effect=_field(path, facts, "effect", str),
        budget=budget,
        seed=_field(path, facts, "seed", int),
        change=_field(path, facts, "change", str),
        verdict=_field(path, facts, "verdict", str),
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise NemocError(f"{path}: cannot be read: {error.strerror}") from None


def _checked(path: Path, expected: str) -> bytes:
    content = _read(path)
    if (found := hashlib.sha256(content).hexdigest()) != expected:
        raise NemocError(f"{path}: was altered: its SHA-256 is {found}, expected {expected}")
    return content


def _field(path: Path, data: dict[str, Any], name: str, kind: type[_K], prefix: str = "") -> _K:
    """A field of exactly one type: JSON's true is no integer."""
    if name not in data:
        raise NemocError(f"{path}: field {prefix}{name} is missing, expected {kind.__name__}")
    value = data[name]
    if type(value) is not kind:
        raise NemocError(f"{path}: field {prefix}{name} is {value!r:.60}, expected {kind.__name__}")
    return value


def _text(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise NemocError(f"{path}: is no text in UTF-8") from None


def _graph(path: Path, content: bytes, extra_ops: tuple[type[Op], ...]) -> Graph:
    return parse(_text(path, content), str(path), extra_ops)


def _tensors(path: Path, content: bytes) -> dict[str, torch.Tensor]:
    try:
        tensors: dict[str, torch.Tensor] = safetensors.torch.load(content)
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        line = " ".join(str(error).split())
        raise NemocError(f"{path}: is no safetensors file: {line}") from None
    return tensors
