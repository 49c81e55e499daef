"""Products of few rows with weights in NVFP4, which are decoded where matrix units have their operands.

A matrix instruction of a warp multiplies sixteen rows of weights with eight of x, and wants of each lane certain
elements of certain rows. Which elements of the reduction these are is left open by a sum, as long as both operands have
the same: so a lane loads sixteen bytes of codes of one row, decodes them, and has what it is to have. Nothing goes
through shared memory, and no thread waits for another, until sums of all warps are added, which have a part of the
reduction each.

A step is 128 elements of the reduction for each warp: 32 for each of the four lanes that have a row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nemoc.codegen.triton.body import Body
from nemoc.codegen.triton.operands import CODES, WORD_UNITS, Operand, Packed
from nemoc.codegen.triton.product_forms import Schedule
from nemoc.codegen.triton.seen import Place
from nemoc.codegen.triton.writer import joined_in_pairs
from nemoc.ir.nvfp4 import BLOCK

_STEP = 128
"""Elements of the reduction that a warp takes in a step."""

_HELD = 80
"""Registers of a thread that hold codes which are loaded before former kernels have ended."""

_STRAIGHT, _TOGETHER = 24, 4
"""Steps of a program without a loop at most, and of a round of the loop of others."""

LEFT_OUT = WORD_UNITS
"""What sums have to be multiplied by, besides the scale of the weight."""


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
        first: the number of the program's first row of weights.
        features: rows of weights.
        last: the number of the last row of x.
    """

    def __init__(
        self,
        body: Body,
        schedule: Schedule,
        x: Operand,
        w: Packed,
        first: str,
        features: int,
        last: str,
    ) -> None:
        self._body, self._writer, self._x, self._w = body, body.writer, x, w
        self._width = w.seen.width
        self._warps = schedule.warps
        self._lanes = 8 * schedule.warps
        let = self._writer.let
        lane = let("lane", f"tl.arange(0, {self._lanes})[:, None]")
        self._of_row = let("of_row", f"{lane} % 8")
        self._part = let("part", f"{lane} // 8")
        every = f"{first} + tl.arange(0, {schedule.columns})[:, None]"
        every = let("weight", f"tl.minimum({every}, {features - 1})")
        self._every = Place(every, "0", schedule.columns, 1)
        eights = range(schedule.columns // 8)
        weights = [
            f"tl.minimum({first} + {8 * n} + {self._of_row}, {features - 1})" for n in eights
        ]
        self._weights = [let("weight", text) for text in weights]
        rows = [f"tl.minimum({8 * n} + {self._of_row}, {last})" for n in range(schedule.rows // 8)]
        self._rows = [let("row", text) for text in rows]

    def sums(self) -> str:
        """The tile of sums [rows, columns]; the kernel waits for former ones in between."""
        steps = -(-self._width // (_STEP * self._warps))
        straight = steps <= _STRAIGHT
        held = (
            min(steps, _HELD // (4 * len(self._weights))) if straight and self._w.is_weight else 0
        )
        loaded = {step: self._load(str(step), self._is_ragged(step)) for step in range(held)}
        if held:
            self._w.load_early()
        else:
            self._w.prefetch(self._every)
        self._writer.wait_turn()
        sums = [[self._zeros() for _ in self._rows] for _ in self._pairs]
        if straight:
            for step in range(steps):
                ragged = self._is_ragged(step)
                codes = loaded[step] if step in loaded else self._load(str(step), ragged)
                self._add(str(step), ragged, codes, sums)
        else:
            with self._writer.loop("step", str(steps), step=_TOGETHER) as first:
                numbers = [f"({first} + {n})" for n in range(_TOGETHER)]
                rounds = [self._load(number, True) for number in numbers]
                for number, codes in zip(numbers, rounds, strict=True):
                    self._add(number, True, codes, sums)
        return self._joined(sums)

    @property
    def _pairs(self) -> range:
        """Numbers of the sixteen rows of weights that an instruction takes."""
        return range(len(self._weights) // 2)

    def _is_ragged(self, step: int) -> bool:
        """Whether some warp has nothing to do in a part of a step."""
        return (step + 1) * _STEP * self._warps > self._width

    def _zeros(self) -> str:
        zeros = self._writer.let("none", f"tl.zeros([{self._lanes}, 4], tl.float32)")
        return self._writer.fresh("sums", f"({', '.join([zeros] * 4)})")

    def _place(
        self, row: str, step: str, each: int, column: str, columns: int, ragged: bool
    ) -> Place:
        """Elements of a step in rows of `each` for 128 of the reduction: `column` counts them."""
        let = self._writer.let
        segment = let("segment", f"{step} * {self._warps} + {self._part}")
        at = let("column", f"{segment} * {each} + {column}")
        mask = let("inside", f"{at} < {self._width * each // _STEP}") if ragged else ""
        return Place(row, at, self._lanes, columns, mask)

    def _load(self, step: str, ragged: bool) -> _Loaded:
        """Load what a step needs of the weights."""
        words, blocks = _STEP // CODES, _STEP // BLOCK
        codes, scales = list[str](), list[str]()
        for weight in self._weights:
            column = f"tl.arange(0, {words})[None, :]"
            codes.append(self._w.words_at(self._place(weight, step, words, column, words, ragged)))
            column = f"tl.arange(0, {blocks})[None, :]"
            scales.append(
                self._w.scales_at(self._place(weight, step, blocks, column, blocks, ragged))
            )
        return _Loaded(tuple(codes), tuple(scales))

    def _add(self, step: str, ragged: bool, loaded: _Loaded, sums: Sequence[Sequence[str]]) -> None:
        """Add the products of a step."""
        writer, fresh = self._writer, self._writer.fresh
        words = [fresh("words", f"quarters({codes}, {self._lanes})") for codes in loaded.codes]
        halves = [fresh("bits", f"halves({scales}, {self._lanes})") for scales in loaded.scales]
        steps = [
            [fresh("steps", f"unit_steps({bits}[{half}])") for half in range(2)] for bits in halves
        ]
        for word in range(4):
            units = [
                fresh("units", f"word_units({codes}[{word}], {of_row[word // 2]})")
                for codes, of_row in zip(words, steps, strict=True)
            ]
            rows = list(self._numbers(step, ragged, word))
            for pair in self._pairs:
                low, high = units[2 * pair : 2 * pair + 2]
                for number, x in enumerate(rows):
                    total = sums[pair][number]
                    writer.line(f"{total} = fragment_dot({low}, {high}, {x}, {total})")

    def _numbers(self, step: str, ragged: bool, word: int) -> Iterator[str]:
        """Of each eight rows of x what is multiplied with a word of a step."""
        each = self._writer.let("each", "tl.arange(0, 32)[None, :]")
        column = self._writer.let("each", f"{each} // 8 * 32 + {8 * word} + {each} % 8")
        for row in self._rows:
            place = self._place(row, step, _STEP, column, 32, ragged)
            tile = self._x.tile(place)
            if ragged and not self._body.is_operand(self._x.seen.value):
                tile = self._writer.let("x", f"tl.where({place.mask}, {tile}, 0.0)")
            yield self._writer.fresh("x", f"eighths({tile}, {self._lanes})")

    def _joined(self, sums: Sequence[Sequence[str]]) -> str:
        """One tile of all sums."""
        let = self._writer.let
        columns = []
        for of_pair in sums:
            tiles = [let("total", f"fragment_sums({one})") for one in of_pair]
            columns.append(joined_in_pairs(tiles, lambda a, b: let("total", f"above({a}, {b})")))
        return joined_in_pairs(columns, lambda a, b: let("total", f"beside({a}, {b})"))
