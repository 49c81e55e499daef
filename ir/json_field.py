"""Reading JSON that somebody else wrote: a field has the type and range that is expected, or is refused in one line."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nemoc.ir.dims import Dim, parse_dim, symbols_of
from nemoc.ir.errors import IRError, NemocError

_SHOWN = 60
"""Characters of a wrong value that a message shows."""


@dataclass(frozen=True)
class JsonField:
    """A value within a JSON file.

    Attributes:
        source: the file.
        place: where in it, such as `binaries[3].threads`; empty for the whole.
        value: what is there.
    """

    source: str
    place: str
    value: Any

    def wrong(self, expected: str) -> NemocError:
        """The refusal of the value."""
        shown = repr(self.value)
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
        return NemocError(f"{self.source}: {self.place or 'it'} is {shown}, expected {expected}")

    def fields(self, names: Iterable[str]) -> dict[str, "JsonField"]:
        """The fields of an object that has exactly these.

        Raises:
            NemocError: it is no object, or has others.
        """
        expected = tuple(names)
        found = self.entries()
        for name in expected:
            if name not in found:
                raise NemocError(f"{self.source}: the field {self._inner(name)} is missing")
        for name in found:
            if name not in expected:
                where = f" in {self.place}" if self.place else ""
                raise NemocError(f"{self.source}: there is no use for a field {name!r}{where}")
        return found

    def entries(self) -> dict[str, "JsonField"]:
        """The fields of an object, whatever their names.

        Raises:
            NemocError: it is none.
        """
        if type(self.value) is not dict:
            raise self.wrong("an object")
        return {
            name: JsonField(self.source, self._inner(name), value)
            for name, value in self.value.items()
        }

    def items(self) -> list["JsonField"]:
        """The elements of a list.

        Raises:
            NemocError: it is none.
        """
        if type(self.value) is not list:
            raise self.wrong("a list")
        return [
            JsonField(self.source, f"{self.place}[{i}]", value)
            for i, value in enumerate(self.value)
        ]

    def integer(self, least: int, most: int) -> int:
        """An integer of a range; JSON's true is none.

        Raises:
            NemocError: it is something else.
        """
        if type(self.value) is not int or not least <= self.value <= most:
            raise self.wrong(f"an integer from {least} to {most}")
        return self.value

    def flag(self) -> bool:
        """JSON's true or false.

        Raises:
            NemocError: it is something else.
        """
        if type(self.value) is not bool:
            raise self.wrong("true or false")
        return self.value

    def number(self) -> float:
        """A positive finite number.

        Raises:
            NemocError: it is something else.
        """
        try:
            if type(self.value) in (int, float) and 0.0 < float(self.value) < math.inf:
                return float(self.value)
        except OverflowError:  # an integer that no float is near
            pass
        raise self.wrong("a positive number")

    def one_of(self, *texts: str) -> str:
        """One of some texts.

        Raises:
            NemocError: it is something else.
        """
        if self.value not in texts or type(self.value) is not str:
            raise self.wrong(" or ".join(texts))
        return self.value

    def text(self) -> str:
        """Text that is not empty.

        Raises:
            NemocError: it is something else.
        """
        if type(self.value) is not str or not self.value:
            raise self.wrong("text")
        return self.value

    def dim(self, symbols: frozenset[str]) -> Dim:
        """A dimension in some symbols, from its text.

        Raises:
            NemocError: it is something else.
        """
        try:
            found = parse_dim(self.text())
        except IRError as error:
            raise NemocError(f"{self.source}: {self.place}: {error}") from None
        if others := sorted(symbols_of(found) - symbols):
            raise NemocError(f"{self.source}: {self.place} has the unknown size {others[0]!r}")
        return found

    def _inner(self, name: str) -> str:
        plain = name if name.isidentifier() else repr(name[:_SHOWN])
        return f"{self.place}.{plain}" if self.place else plain
