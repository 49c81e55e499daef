"""Products of few rows with weights in NVFP4, which are decoded where matrix units have their operands.

A matrix instruction of a warp multiplies sixteen rows of weights with eight of x, and wants of each lane certain
elements of certain rows. Which elements of the reduction these are is left open by a sum, as long as both operands have
the same: so a lane loads sixteen bytes of codes of one row, decodes them, and has what it is to have. Nothing goes
through shared memory, and no thread waits for another, until sums of all warps are added, which have a part of the
reduction each.

A step is 128 elements of the reduction for each warp: 32 for each of the four lanes that have a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nemoc.codegen.triton.body import Body
from nemoc.codegen.triton.operands import CODES, Operand, Packed
from nemoc.codegen.triton.product_forms import Schedule
from nemoc.codegen.triton.seen import Place
from nemoc.codegen.triton.writer import joined_in_pairs
from nemoc.ir.nvfp4 import BLOCK

_STEP = 128
"""Elements of the reduction that a warp takes in a step."""

_HELD = 88
"""Registers of a thread that hold codes which are loaded before former kernels have ended: all of 2,688 numbers by two
warps, the width of `nano`."""

_AHEAD = 92
"""Registers for these and for what is loaded of x ahead of its use: with more, fewer programs run side by side."""

_STRAIGHT, _TOGETHER = 24, 4
"""Steps of a program without a loop at most, and of a round of the loop of others."""


@dataclass(frozen=True)
class _Loaded:
    """Codes and scales of a step: for each eight rows of weights the names of tiles."""

    codes: tuple[str, ...]
    scales: tuple[str, ...]


class Fragments:
    """Writes the sums of a program.

    Args:
        body: what is written.
        schedule: of the form.
        x, w: the operands.
        columns: the number of the program's first column.
        features: rows of weights, of each group.
        rows: the numbers of the program's first row of x, and of the last that there is.
        group: whose weights they are; empty in a dense product.
    """

    def __init__(
        self,
        body: Body,
        schedule: Schedule,
        x: Operand,
        w: Packed,
        columns: str,
        features: int,
        rows: tuple[str, str],
        group: str,
    ) -> None:
        self._body, self._writer, self._x, self._w = body, body.writer, x, w
        self._width = w.seen.width
        self._warps = schedule.warps
        self._lanes = 8 * schedule.warps
        let = self._writer.let
        lane = let("lane", f"tl.arange(0, {self._lanes})[:, None]")
        self._of_row = let("of_row", f"{lane} % 8")
        self._part = let("part", f"{lane} // 8")
        self._group = group
        of_group = let("first", f"{group} * {features}") if group else "0"
        self._matrix = Place(of_group, "0", 1, 1)

        def weight(number: str) -> str:
            found = let("weight", f"tl.minimum({columns} + {number}, {features - 1})")
            return let("weight", f"{of_group} + {found}") if group else found

        every = weight(f"tl.arange(0, {schedule.columns})[:, None]")
        self._every = Place(every, "0", schedule.columns, 1)
        eights = range(schedule.columns // 8)
        self._weights = [weight(f"{8 * n} + {self._of_row}") for n in eights]
        begin, last = rows
        starts = [f"{begin} + {8 * n}" if group else f"{8 * n}" for n in range(schedule.rows // 8)]
        self._rows = [let("row", f"tl.minimum({n} + {self._of_row}, {last})") for n in starts]

    def scaled_sums(self) -> str:
        """The tile of sums [rows, columns] times the scale of weights; a dense kernel waits for former ones here."""
        return self._w.scaled(self._sums(), self._matrix, self._w.left_out)

    def _sums(self) -> str:
        """The tile of sums without the scale."""
        steps = -(-self._width // (_STEP * self._warps))
        if steps > _STRAIGHT:
            return self._sums_of_loop(steps)
        each = 4 * len(self._weights)
        held = min(steps, _HELD // each) if self._w.is_weight or self._group else 0
        loaded = {step: self._load(step) for step in range(held)}
        self._wait(bool(held))
        first = self._first_numbers(min(steps, (_AHEAD - held * each) // 4))
        sums = self._nothing()
        for step in range(steps):
            units = self._decode(loaded.get(step) or self._load(step))
            for word, of_word in enumerate(units):
                x = first.get(step) if word == 0 else None
                self._add(of_word, x or self._numbers(step, word), sums)
        return self._joined(sums)

    def _wait(self, held: bool) -> None:
        """Wait for former kernels, with codes loaded or asked for; of a group, which these tell, that has been done."""
        if not self._group:
            if held:
                self._w.load_early()
            else:
                self._w.prefetch(self._every)
            self._writer.wait_turn()
        self._w.prepare_scale(self._matrix)
        if held and self._group:
            self._writer.let_next()

    def _first_numbers(self, steps: int) -> dict[int, list[str]]:
        """Of as many steps what is multiplied with the first word, loaded ahead of all else; of many rows nothing.

        Its lines have what is multiplied with the other words too, which then is in the first-level cache, or comes.
        """
        if self._group or len(self._rows) > 1 or not self._body.is_operand(self._x.seen.value):
            return {}
        found = {step: self._numbers(step, 0) for step in range(steps)}
        self._writer.let_next()
        return found

    def _sums_of_loop(self, steps: int) -> str:
        """The same in a loop, since codes of all steps have no room in registers."""
        self._wait(False)
        sums = self._nothing()
        with self._writer.loop("step", str(steps), step=_TOGETHER) as first:
            numbers = [f"({first} + {n})" for n in range(_TOGETHER)]
            for number, loaded in [(number, self._load(number)) for number in numbers]:
                for word, units in enumerate(self._decode(loaded)):
                    self._add(units, self._numbers(number, word), sums)
        return self._joined(sums)

    @property
    def _pairs(self) -> range:
        """Numbers of the sixteen rows of weights that an instruction takes."""
        return range(len(self._weights) // 2)

    def _is_ragged(self, step: int | str) -> bool:
        """Whether some warp may have nothing to do in a part of a step, which may be any of a loop."""
        return isinstance(step, str) or (step + 1) * _STEP * self._warps > self._width

    def _nothing(self) -> list[list[str]]:
        """Sums, yet without any product: for each pair of eight rows of weights, those with each eight rows of x."""
        zeros = self._writer.let("none", f"tl.zeros([{self._lanes}, 4], tl.float32)")
        text = f"({', '.join([zeros] * 4)})"
        return [[self._writer.fresh("sums", text) for _ in self._rows] for _ in self._pairs]

    def _place(self, row: str, step: int | str, each: int, column: str, columns: int) -> Place:
        """Elements of a step in rows of `each` for 128 of the reduction: `column` counts them."""
        let = self._writer.let
        segment = let("segment", f"{step} * {self._warps} + {self._part}")
        at = let("column", f"{segment} * {each} + {column}")
        inside = f"{at} < {self._width * each // _STEP}"
        mask = let("inside", inside) if self._is_ragged(step) else ""
        return Place(row, at, self._lanes, columns, mask)

    def _load(self, step: int | str) -> _Loaded:
        """Load what a step needs of the weights."""
        words, blocks = _STEP // CODES, _STEP // BLOCK
        codes, scales = list[str](), list[str]()
        for weight in self._weights:
            column = f"tl.arange(0, {words})[None, :]"
            codes.append(self._w.words_at(self._place(weight, step, words, column, words)))
            column = f"tl.arange(0, {blocks})[None, :]"
            scales.append(self._w.scales_at(self._place(weight, step, blocks, column, blocks)))
        return _Loaded(tuple(codes), tuple(scales))

    def _decode(self, loaded: _Loaded) -> list[list[str]]:
        """For each word of a step, of each eight rows of weights the numbers that it stands for."""
        fresh = self._writer.fresh
        words = [fresh("words", f"quarters({codes}, {self._lanes})") for codes in loaded.codes]
        halves = [fresh("bits", f"halves({scales}, {self._lanes})") for scales in loaded.scales]
        steps = [
            [fresh("steps", f"unit_steps({bits}[{half}])") for half in range(2)] for bits in halves
        ]
        decode = "spread_units" if self._w.is_spread else "word_units"
        return [
            [
                fresh("units", f"{decode}({codes}[{word}], {of_row[word // 2]})")
                for codes, of_row in zip(words, steps, strict=True)
            ]
            for word in range(4)
        ]

    def _add(
        self, units: Sequence[str], rows: Sequence[str], sums: Sequence[Sequence[str]]
    ) -> None:
        """Add the products of a word's numbers with rows of x."""
        for pair in self._pairs:
            low, high = units[2 * pair : 2 * pair + 2]
            for number, x in enumerate(rows):
                total = sums[pair][number]
                self._writer.line(f"{total} = fragment_dot({low}, {high}, {x}, {total})")

    def _numbers(self, step: int | str, word: int) -> list[str]:
        """Of each eight rows of x what is multiplied with a word of a step."""
        found = []
        each = self._writer.let("each", "tl.arange(0, 32)[None, :]")
        column = self._writer.let("each", f"{each} // 8 * 32 + {8 * word} + {each} % 8")
        for row in self._rows:
            place = self._place(row, step, _STEP, column, 32)
            tile = self._x.tile(place)
            if place.mask and not self._body.is_operand(self._x.seen.value):
                tile = self._writer.let("x", f"tl.where({place.mask}, {tile}, 0.0)")
            found.append(self._writer.fresh("x", f"eighths({tile}, {self._lanes})"))
        return found

    def _joined(self, sums: Sequence[Sequence[str]]) -> str:
        """One tile of all sums."""
        let = self._writer.let
        columns = []
        for of_pair in sums:
            tiles = [let("total", f"fragment_sums({one})") for one in of_pair]
            columns.append(joined_in_pairs(tiles, lambda a, b: let("total", f"above({a}, {b})")))
        joined = joined_in_pairs(columns, lambda a, b: let("total", f"beside({a}, {b})"))
        return let("total", f"sums_of_parts({joined}, {self._warps})")
