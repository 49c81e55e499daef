"""What passes did and refused, as lines of text: what `nemoc ir SOURCE --remarks` prints.

    fuse-epilogues: 9 changes, 2 refused
           9 x linear of linear, add
               each saves 8192*B*L bytes, 0 flops, 1 launch; at B=1 L=256 T=0: saves 2.10 MB, 1 launch
           2 x refused: add stays outside of linear: its add depends on %_, which depends on the region
      in all saves 73728*B*L bytes, 0 flops, 9 launches; at B=1 L=256 T=0: saves 18.9 MB, 9 launches

Savings are those of one step. What a change makes dearer is said to cost.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import sympy

from nemoc.ir.dims import B, C, Dim, L, T, dim, format_dim, symbols_of
from nemoc.passes import Remark
from nemoc.terminal import short


@dataclass(frozen=True)
class Shape:
    """The step for which savings are given in numbers; its cache holds what is cached and what is new.

    Attributes:
        batch: B, rows.
        tokens: L, new tokens of each row.
        cached: T, tokens that each row has cached.
    """

    batch: int = 1
    tokens: int = 256
    cached: int = 0

    @property
    def sizes(self) -> dict[sympy.Symbol, int]:
        """The value of each symbol."""
        return {B: self.batch, L: self.tokens, T: self.cached, C: self.cached + self.tokens}

    def __str__(self) -> str:
        return f"B={self.batch} L={self.tokens} T={self.cached}"


@dataclass(frozen=True)
class Saving:
    """What changes save per step, in closed form; what is negative is a cost."""

    bytes: Dim = 0
    flops: Dim = 0
    launches: Dim = 0

    @staticmethod
    def of(remark: Remark) -> "Saving":
        """What the change of a remark saves, or would have saved."""
        return Saving(dim(remark.saved.bytes), dim(remark.saved.flops), dim(remark.launches))

    def __add__(self, other: "Saving") -> "Saving":
        return Saving(
            dim(self.bytes + other.bytes),
            dim(self.flops + other.flops),
            dim(self.launches + other.launches),
        )

    def at(self, shape: Shape) -> "Saving":
        """The numbers at a shape, rounded: a closed form may have powers such as (63/64)**(6*B*L)."""
        return Saving(*(_number(q, shape) for q in (self.bytes, self.flops, self.launches)))

    @property
    def unknowns(self) -> list[str]:
        """Names of symbols for which no shape has a value; a graph read from text may have any."""
        names = {name for q in (self.bytes, self.flops, self.launches) for name in symbols_of(q)}
        return sorted(names - {symbol.name for symbol in Shape().sizes})


def _number(value: Dim, shape: Shape) -> int:
    # floating point from the start: exact powers at a long context have millions of digits
    return int(sympy.sympify(value).evalf(subs=shape.sizes).round())


_NOTHING = Saving()


def render_remarks(
    passes: Iterable[str], said: Sequence[Remark], shape: Shape, by_site: bool = False
) -> Iterator[str]:
    """Lines that say, pass by pass, what was done and refused, and what that saves.

    Args:
        passes: the pipeline's, in order; passes of one name share a paragraph, since remarks do not tell them apart.
        said: the remarks of all of them.
        shape: what the numbers hold for.
        by_site: name every site, instead of putting equal remarks together.
    """
    names = [*passes]
    # a plugin's pass may sign with another name than its own: what it says is shown all the same
    for name in dict.fromkeys([*names, *(remark.pass_name for remark in said)]):
        own = [remark for remark in said if remark.pass_name == name]
        changes = [remark for remark in own if not remark.refused]
        refused = [remark for remark in own if remark.refused]
        yield _header(name, names.count(name), len(changes), len(refused))
        lines = _sites if by_site else _groups
        yield from lines(changes, shape)
        yield from lines(refused, shape)
        yield from _total(changes, shape)


def _header(name: str, runs: int, changes: int, refused: int) -> str:
    times = f" ({runs} runs)" if runs > 1 else ""
    tail = f", {refused} refused" if refused else ""
    return f"{name}{times}: {_counted(changes, 'change')}{tail}"


def _groups(remarks: Iterable[Remark], shape: Shape) -> Iterator[str]:
    """Remarks that agree in what they say and what is saved, the most frequent first."""
    groups: dict[tuple[str, Saving], list[Remark]] = {}
    for remark in remarks:
        groups.setdefault((_kind(remark.message), Saving.of(remark)), []).append(remark)
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    for (message, saving), members in ordered:
        refused = members[0].refused
        yield f"  {len(members):6} x {_mark(refused)}{message}"
        if saving != _NOTHING:
            each = "each " if len(members) > 1 else ""
            yield f"{'':11}{each}{describe_saving(saving, shape, refused)}"


def _sites(remarks: Iterable[Remark], shape: Shape) -> Iterator[str]:
    """Remarks one by one, in the order in which they were made."""
    for remark in remarks:
        yield f"  {remark.site}: {_mark(remark.refused)}{remark.message}"
        saving = Saving.of(remark)
        if saving != _NOTHING:
            yield f"      {describe_saving(saving, shape, remark.refused)}"


def _total(changes: Sequence[Remark], shape: Shape) -> Iterator[str]:
    savings = [Saving.of(remark) for remark in changes]
    if any(saving != _NOTHING for saving in savings):
        yield f"  in all {describe_saving(sum(savings, _NOTHING), shape)}"


def _mark(refused: bool) -> str:
    return "refused: " if refused else ""


def _kind(message: str) -> str:
    """A remark without the names of values, so that equal ones are counted together."""
    return re.sub(r"%[\w.]+", "%_", message)


def describe_saving(saving: Saving, shape: Shape, refused: bool = False) -> str:
    """`saves 96*B*L bytes, 0 flops, 1 launch; at B=1 L=256 T=0: saves 24.6 kB, 1 launch`.

    Args:
        saving: closed forms; one with terms of both signs is worded as a saving.
        shape: what the numbers hold for; they leave out what is 0 at any shape.
        refused: it would have been saved.
    """
    verbs = ("would save", "would cost") if refused else ("saves", "costs")
    closed = _phrase(
        [
            (_sign(saving.bytes), _counted(_magnitude(saving.bytes), "byte")),
            (_sign(saving.flops), _counted(_magnitude(saving.flops), "flop")),
            (_sign(saving.launches), _counted(_magnitude(saving.launches), "launch", "launches")),
        ],
        verbs,
    )
    if saving == _NOTHING:
        return closed
    return f"{closed}; at {shape}: {_numbers(saving, shape, verbs)}"


def _numbers(saving: Saving, shape: Shape, verbs: tuple[str, str]) -> str:
    """The saving at a shape, without what is 0 at any shape."""
    if saving.unknowns:
        return f"depends on {', '.join(saving.unknowns)}"
    found = saving.at(shape)
    parts = [
        (saving.bytes, found.bytes, short(abs(found.bytes), "B")),
        (saving.flops, found.flops, short(abs(found.flops), "FLOP")),
        (saving.launches, found.launches, _counted(abs(found.launches), "launch", "launches")),
    ]
    return _phrase([(_sign(number), text) for form, number, text in parts if form != 0], verbs)


def _phrase(parts: Sequence[tuple[int, str]], verbs: tuple[str, str]) -> str:
    """Amounts, each with its sign, behind `saves` and `costs`; zeros go with whatever else there is."""
    lost = [text for sign, text in parts if sign < 0]
    if lost and all(sign <= 0 for sign, _ in parts):
        return f"{verbs[1]} {', '.join(text for _, text in parts)}"
    kept = [text for sign, text in parts if sign >= 0]
    saves = f"{verbs[0]} {', '.join(kept)}"
    return f"{saves}, {verbs[1]} {', '.join(lost)}" if lost else saves


def _sign(value: Dim) -> int:
    """-1 when all terms are negative, 0 for nothing, else 1."""
    if value == 0:
        return 0
    terms = sympy.Add.make_args(sympy.sympify(value))
    return -1 if all(term.could_extract_minus_sign() for term in terms) else 1


def _magnitude(value: Dim) -> Dim:
    return dim(-value) if _sign(value) < 0 else value


def _counted(amount: Dim, one: str, many: str | None = None) -> str:
    """`1 change`, `2 changes`, `4*B changes`."""
    return f"{format_dim(amount)} {one if amount == 1 else many or one + 's'}"
