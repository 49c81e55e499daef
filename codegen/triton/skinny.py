"""Products of very few rows on ordinary arithmetic units, where matrix units would be given mostly nothing to do.

A program makes a few columns of the result for one to four rows. Its warps share the columns out, and the threads of a
warp the reduction, sixteen bytes of a weight's row at a time: so each byte of the weights is read once, by whoever
needs it, and decoded in registers. A thread multiplies and adds in f32, and its sums are added to those of others when
the loop is over. Nothing crosses threads within it, and the order of additions does not depend on the run.

A single row of NVFP4 weights that no kernel writes has no loop: all of them are loaded before former kernels have ended
(`held_sums`), which on an H200 took 0.91 to 0.97 of the time of the loop. Of spread codes and groups fragments take
what they can (`nemoc.codegen.triton.product_forms`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from nemoc.codegen.triton.body import Body
from nemoc.codegen.triton.operands import CODES, EIGHTHS, WHOLE, Operand, Packed
from nemoc.codegen.triton.product_forms import Schedule
from nemoc.codegen.triton.seen import Place
from nemoc.codegen.triton.writer import joined_in_pairs
from nemoc.ir.nvfp4 import BLOCK


def skinny_sums(
    body: Body,
    x: Operand,
    w: Operand,
    rows: Sequence[Place],
    weights: Place,
    depth: int,
    ahead: int,
) -> str:
    """The loop over the reduction; returns the tile of sums [rows, weights], without what operands leave out.

    Args:
        body: what is written.
        x, w: the operands, prepared.
        rows: the place of each row of x by itself.
        weights: the place of the rows of w.
        depth: how much of the reduction is taken at a time.
        ahead: how many such parts are loaded at a time.
    """
    writer, width = body.writer, w.seen.width
    by_words = isinstance(w, Packed) and w.has_words
    columns = depth // BLOCK if by_words else depth
    zeros = f"tl.zeros([{weights.rows}, {columns}], tl.float32)"
    sums = [writer.fresh("sums", zeros) for _ in rows]
    with writer.loop("k", str(width), step=depth, ahead=ahead) as k:
        across = body.span(k, depth, width, weights)
        term = _block_terms(w, across) if isinstance(w, Packed) and by_words else _terms(w, across)
        for total, row in zip(sums, rows, strict=True):
            at = replace(row, column=across.column, columns=across.columns, mask=across.mask)
            writer.line(f"{total} += {term.format(_row(x, at, by_words))}")
    return _joined(body, sums)


def _terms(w: Operand, across: Place) -> str:
    """What a part of a row of x adds, as a format: for each element its product."""
    return f"{{}} * {w.numbers(across)}"


def _block_terms(w: Packed, across: Place) -> str:
    """The same for each block of NVFP4, of which a weight's scale is taken after its products have been added."""
    writer, blocks = w.body.writer, across.columns // BLOCK
    words, scales = w.words(across)
    if w.is_spread:
        steps = writer.let("steps", f"steps_of_words({scales}, {across.rows}, {blocks})")
        codes = writer.let("codes", f"spread_numbers({words}, {steps})")
        return f"sums_of_blocks({{}}, {codes}, {across.rows}, {blocks})"
    codes = writer.let("codes", f"e2m1_eighths({words})")
    steps = writer.let("steps", f"from_e4m3({scales})")
    return f"sums_of_blocks({{}}, {codes}, {across.rows}, {blocks}) * {steps}"


def _row(x: Operand, at: Place, by_words: bool) -> str:
    """A part of a row of x in f32; 0 beyond its end, whatever became of zeros there."""
    tile = x.by_words(at) if by_words else x.numbers(at)
    if at.mask and not x.body.is_operand(x.seen.value):
        tile = x.body.writer.let("row", f"tl.where({at.mask}, {tile}, 0.0)")
    return tile


def _joined(body: Body, sums: Sequence[str]) -> str:
    """Sums of one row each, by columns of threads, as one tile of whole sums."""
    writer, count = body.writer, len(sums)
    joined, *others = (
        writer.let("total", f"tl.expand_dims(tl.sum({one}, axis=1), 0)") for one in sums
    )
    number = f"tl.arange(0, {count})[:, None]"
    for row, other in enumerate(others, 1):
        joined = writer.let("total", f"tl.where({number} == {row}, {other}, {joined})")
    return joined


def left_out(w: Operand) -> float:
    """What sums of `skinny_sums` have to be multiplied by, besides the scale of the weight."""
    by_words = isinstance(w, Packed) and w.has_words and not w.is_spread
    return EIGHTHS if by_words else w.left_out


_WARP = 32 * 32
"""Elements of the reduction that a warp takes in a step of `held_sums`: 32 in each lane."""

_MOST_HELD = 4
"""Steps of a program at most whose codes its threads hold all at once."""


def can_hold(w: Packed, warps: int, columns: int) -> bool:
    """Whether `held_sums` can make the sums of so many columns: of weights that no kernel writes, in short rows."""
    if not (w.is_direct and w.has_words and w.is_weight):
        return False
    return w.seen.width % 32 == 0 and w.seen.width <= _MOST_HELD * _WARP and columns % warps == 0


def held_sums(
    body: Body, x: Operand, w: Packed, first: str, features: int, schedule: Schedule
) -> str:
    """As `skinny_sums` for one row of x, with all codes loaded before former kernels have ended: the kernel waits here.

    Each warp has rows of weights of its own, and each of its lanes 32 elements of a step. Tiles are [warps, 32 · n], so
    that x is laid out as the weights are, and nothing crosses threads until the end.

    Args:
        body: what is written.
        x, w: the operands, of which `can_hold` holds.
        first: the number of the program's first row of weights.
        features: rows of weights.
        schedule: of the form.
    """
    writer, let, warps, width = body.writer, body.writer.let, schedule.warps, w.seen.width
    warp = let("warp", f"tl.arange(0, {warps})[:, None]")
    weights = [
        let("weight", f"tl.minimum({first} + {number} + {warp}, {features - 1})")
        for number in range(0, schedule.columns, warps)
    ]
    starts = range(0, width, _WARP)
    w.load_early()

    def place(row: str, start: int, each: int, columns: int, column: str = "") -> Place:
        column = column or f"tl.arange(0, {columns})[None, :]"
        # Columns of every warp, also where all have the same row: tiles of x are to lie as those of weights do.
        at = let("column", f"{start // each} + {column} + 0 * {warp}")
        mask = let("inside", f"{at} < {width // each}") if start + _WARP > width else ""
        return Place(row, at, warps, columns, mask)

    codes = [
        [w.words_at(place(weight, start, CODES, _WARP // CODES)) for weight in weights]
        for start in starts
    ]
    scales = [
        [w.scales_at(place(weight, start, BLOCK, _WARP // BLOCK)) for weight in weights]
        for start in starts
    ]
    writer.wait_turn()
    w.prepare_scale(WHOLE)
    x.prepare(WHOLE)
    each = let("each", "tl.arange(0, 256)[None, :]")

    def near(start: int, word: int) -> Place:
        column = let("each", f"{each} // 8 * 32 + {8 * word} + {each} % 8")
        return place("0", start, 1, 256, column)

    if body.is_operand(x.seen.value):
        for start in starts:  # the first words bring what the others need to the first-level cache
            x.tile(near(start, 0))
        writer.let_next()
    zeros = let("none", f"tl.zeros([{warps}, 32], tl.float32)")
    sums = [writer.fresh("sums", zeros) for _ in weights]
    for step, start in enumerate(starts):
        words = [writer.fresh("words", f"quarters({one}, {warps})") for one in codes[step]]
        bits = [writer.fresh("bits", f"halves({one}, {warps})") for one in scales[step]]
        rows = []
        for word in range(4):
            at = near(start, word)
            tile = x.numbers(at)
            if at.mask and not body.is_operand(x.seen.value):
                tile = let("row", f"tl.where({at.mask}, {tile}, 0.0)")
            rows.append(writer.fresh("x", f"eighths({tile}, {warps})"))
        for total, codes_of, bits_of in zip(sums, words, bits, strict=True):
            for line in _held_terms(w, rows, codes_of, bits_of):
                writer.line(line.format(total))
    totals = [let("total", f"tl.sum({one}, axis=1)") for one in sums]
    total = joined_in_pairs(totals, lambda a, b: let("total", f"one_behind_the_other({a}, {b})"))
    return let("total", f"tl.expand_dims({total}, 0)")


def _held_terms(w: Packed, rows: Sequence[str], words: str, bits: str) -> Iterator[str]:
    """Statements that add the products of four words of codes with rows of x, as formats of the sum's name."""
    for word, x in enumerate(rows):
        if w.is_spread:
            numbers = f"spread_numbers({words}[{word}], unit_steps({bits}[{word // 2}]))"
            yield f"{{0}} = plus_eight({{0}}, {x}, {numbers})"
        elif word % 2:
            terms = (
                f"sum_of_eight({rows[n]}, e2m1_eighths({words}[{n}]))" for n in (word - 1, word)
            )
            yield f"{{0}} += ({' + '.join(terms)}) * from_e4m3({bits}[{word // 2}])"
