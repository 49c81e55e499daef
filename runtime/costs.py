"""What a program's launches are parts of, and what that has to do at least: the compiler writes it into an artifact.

`kernels/costs.json` says, for each function of a program, which kernels it launches in which phases, which op each
launch belongs to, and what the op costs in closed form. Running a program takes none of it; it is for whoever measures
how long launches take (`nemoc bench`) and wants to know how long they had to.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from nemoc.codegen.plan import Job, StepFunction
from nemoc.ir.dims import estimate_text, format_dim
from nemoc.ir.errors import IRError, NemocError
from nemoc.ir.json_field import JsonField
from nemoc.ir.json_file import parse_json
from nemoc.ir.op import Op
from nemoc.ir.ops.int8 import RoundToInt8
from nemoc.ir.region import Fused
from nemoc.runtime.manifest import Manifest
from nemoc.runtime.store import read_content

COSTS = "kernels/costs.json"
"""The record's name within an artifact."""

_SYMBOLS = ("B", "L", "C", "T")
_FORMS = ("flops", "read", "written")


@dataclass(frozen=True)
class OpCost:
    """An op as a function carries it out.

    Attributes:
        op: the op's name, or what kind of fusion it is.
        weight: the name of the largest stored weight that it reads; empty if it reads none.
        integers: whether it multiplies in integers, of which the flops then are.
        forms: flops, bytes read and bytes written, in closed form in B, L, C and T; none if there is no such form.
    """

    op: str
    weight: str
    integers: bool
    forms: tuple[str, str, str] | None

    @classmethod
    def of(cls, job: Job) -> Self:
        """What is said of a job of a step function."""
        op, cost = job.op, job.op.cost()
        name = op.kind if isinstance(op, Fused) else op.mnemonic()
        forms = (format_dim(cost.flops), format_dim(cost.read), format_dim(cost.written))
        known = all(map(_is_readable, forms))
        return cls(name, job.weight, multiplies_integers(op), forms if known else None)

    def at(self, sizes: Mapping[str, int]) -> tuple[float, float] | None:
        """Flops and bytes moved at B, L, C and T; none if there is no closed form, or none that has a value there."""
        if self.forms is None:
            return None
        try:
            flops, read, written = (estimate_text(form, sizes) for form in self.forms)
        except IRError:
            return None
        return flops, read + written


def multiplies_integers(op: Op) -> bool:
    """Whether an op rounds activations to integers, so that its products are of integers."""
    inner = [node.op for node in op.body.nodes] if isinstance(op, Fused) else [op]
    return any(isinstance(o, RoundToInt8) for o in inner)


def _is_readable(form: str) -> bool:
    """Whether a form can be evaluated; those of a user's op may have anything in them."""
    try:
        estimate_text(form, dict.fromkeys(_SYMBOLS, 1))
    except IRError:
        return False
    return True


@dataclass(frozen=True)
class LaunchCost:
    """A launch.

    Attributes:
        kernel: the kernel's name.
        op: which of the function's ops it is a part of.
    """

    kernel: str
    op: int


@dataclass(frozen=True)
class FunctionCosts:
    """What a function runs.

    Attributes:
        ops: what it carries out.
        phases: its launches, those of a phase at once.
    """

    ops: tuple[OpCost, ...]
    phases: tuple[tuple[LaunchCost, ...], ...]

    @property
    def launches(self) -> tuple[LaunchCost, ...]:
        """The launches of all phases in order."""
        return tuple(launch for phase in self.phases for launch in phase)


@dataclass(frozen=True)
class CostRecord:
    """The record.

    Attributes:
        functions: what each of the program's functions runs.
    """

    functions: Mapping[str, FunctionCosts]

    @classmethod
    def of(cls, functions: Iterable[StepFunction]) -> Self:
        """The record of step functions."""
        return cls(
            {
                function.name: FunctionCosts(
                    tuple(map(OpCost.of, function.jobs)),
                    tuple(
                        tuple(LaunchCost(launch.kernel.name, launch.job) for launch in phase)
                        for phase in function.phases
                    ),
                )
                for function in functions
            }
        )

    def to_text(self) -> str:
        """The record as JSON."""
        data = {"functions": {name: _to_json(f) for name, f in self.functions.items()}}
        return json.dumps(data, separators=(",", ":")) + "\n"

    @classmethod
    def from_json(cls, data: Any, source: str) -> Self:
        """Read a record.

        Args:
            data: JSON data from anywhere.
            source: what messages call it.

        Raises:
            NemocError: it is no record; the message names the field.
        """
        functions = JsonField(source, "", data).fields(("functions",))["functions"].entries()
        return cls({name: _function(field) for name, field in functions.items()})


def read_costs(folder: Path, manifest: Manifest) -> CostRecord | None:
    """The record of an artifact; none if its target launches nothing.

    Raises:
        NemocError: it was altered, or is not of the artifact's functions.
    """
    if COSTS not in manifest.files:
        return None
    path = folder / COSTS
    content = read_content(folder, COSTS, manifest.files[COSTS])
    record = CostRecord.from_json(parse_json(content, path), str(path))
    if record.functions.keys() != manifest.graphs.keys():
        found, expected = (", ".join(sorted(f)) for f in (record.functions, manifest.graphs))
        raise NemocError(f"{path}: functions are {found}, expected {expected}")
    return record


def _to_json(function: FunctionCosts) -> dict[str, Any]:
    return {
        "ops": [
            {
                "op": op.op,
                "weight": op.weight or None,
                "integers": op.integers,
                "cost": op.forms and dict(zip(_FORMS, op.forms, strict=True)),
            }
            for op in function.ops
        ],
        "phases": [[[n.kernel, n.op] for n in phase] for phase in function.phases],
    }


def _function(data: JsonField) -> FunctionCosts:
    found = data.fields(("ops", "phases"))
    ops = tuple(map(_op, found["ops"].items()))
    phases = tuple(_phase(phase, len(ops)) for phase in found["phases"].items())
    return FunctionCosts(ops, phases)


def _phase(data: JsonField, ops: int) -> tuple[LaunchCost, ...]:
    launches = tuple(_launch(launch, ops) for launch in data.items())
    if not launches:
        raise data.wrong("the launches of a phase")
    return launches


def _op(data: JsonField) -> OpCost:
    found = data.fields(("op", "weight", "integers", "cost"))
    weight, cost = found["weight"], found["cost"]
    forms = None
    if cost.value is not None:
        fields = cost.fields(_FORMS)
        flops, read, written = (_readable(fields[name]) for name in _FORMS)
        forms = (flops, read, written)
    return OpCost(
        found["op"].text(),
        "" if weight.value is None else weight.text(),
        found["integers"].flag(),
        forms,
    )


def _readable(data: JsonField) -> str:
    """The text of a closed form."""
    form = data.text()
    if not _is_readable(form):
        raise data.wrong(f"a closed form in {', '.join(_SYMBOLS)}")
    return form


def _launch(data: JsonField, ops: int) -> LaunchCost:
    parts = data.items()
    if len(parts) != 2:
        raise data.wrong("a kernel and the number of an op")
    return LaunchCost(parts[0].text(), parts[1].integer(0, ops - 1))
