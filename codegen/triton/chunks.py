"""What a program computes of one chunk of tokens of a state-space recurrence, as matrix products.

With g the running sum of dt·a from the chunk's start on, S the state at its start and T its last token (Dao and Gu,
arXiv 2405.21060, section 6):

    y[t] = Σ over s ≤ t of (c[t]·b[s]) e^(g[t] − g[s]) dt[s] x[s]  +  e^g[t] S·c[t]  +  d x[t]
    S'   = e^g[T] S + Σ over s of e^(g[T] − g[s]) dt[s] x[s] ⊗ b[s]

The products c[t]·b[s] are those of a group, the rest is a head's. dt is 0 for tokens that are not valid, so that they
leave the state alone. Where s > t exponents may be large, and are cut: zeros are to be multiplied with something
finite.
"""

from dataclasses import dataclass

from nemoc.codegen.mixer import Mixer
from nemoc.codegen.plan import Arg
from nemoc.codegen.triton.scan_parts import Factor, Recurrence, padded
from nemoc.codegen.triton.seen import Place
from nemoc.codegen.triton.tokens import Tokens
from nemoc.codegen.triton.writer import size_text
from nemoc.ir.dtypes import DType

_LARGEST = 88.0
"""The largest exponent whose exponential is finite in f32, nearly."""


class Steps:
    """dt and g of tokens, in scratch: for each chunk of each head, a slot of so many of both.

    They go through memory, since tiles of products want them along rows and along columns, each thread its own, and
    compilers compute a small tile anew for each of these layouts. A program reads what it wrote itself behind a
    barrier, or what an earlier launch wrote.

    Args:
        kernel: what reads the recurrence's operands.
        mixer: the region taken apart.
        arg: the tensor of scratch, [slots, 2, tokens of a chunk] of f32.
        size: tokens of a chunk.
    """

    def __init__(self, kernel: Recurrence, mixer: Mixer, arg: Arg, size: int) -> None:
        self._kernel, self._mixer, self._size = kernel, mixer, size
        self._base = kernel.writer.pointer(arg, DType.F32)

    def write(self, n: str, start: str, head: str, slot: str, live: str, exists: str = "") -> None:
        """Compute those of some chunks, or some heads, of a sequence: a line of a tile for each.

        Args:
            n: the sequence.
            start: each chunk's first token, a number or [lines, 1].
            head: each line's head, alike.
            slot: each line's slot, alike.
            live: how many of the sequence's tokens are valid.
            exists: which lines do, [lines, 1]; empty for all.
        """
        kernel, writer = self._kernel, self._kernel.writer
        length = size_text(self._mixer.length)
        inner = writer.let("inner", f"tl.arange(0, {self._size})[None, :]")
        t = writer.let("t", f"{start} + {inner}")
        row = writer.let("row", f"{n} * {length} + tl.minimum({t}, {length} - 1)")
        place = Place(row, head, 1, 1)
        dt = writer.let("dt", f"tl.where({t} < {live}, {kernel.dt(place)}, 0.0)")
        sums = writer.let("sums", f"tl.cumsum({dt} * {kernel.rate(place)}, axis=1)")
        at = writer.let("at", self._at(slot, inner))
        mask = f", mask={exists}" if exists else ""
        writer.line(f"tl.store({at}, {dt}{mask})")
        writer.line(f"tl.store({at} + {self._size}, {sums}{mask})")

    def wait(self) -> None:
        """Until all threads of the program have written theirs."""
        self._kernel.writer.barrier()

    def dt(self, slot: str, start: int, count: int, across: bool) -> str:
        """dt of some tokens of a slot: [1, tokens] or [tokens, 1]."""
        return self._load("dt", slot, self._inner(start, count, across))

    def sums(self, slot: str, start: int, count: int, across: bool) -> str:
        """g of some tokens of a slot: [1, tokens] or [tokens, 1]."""
        return self._load("sums", slot, self._inner(self._size + start, count, across))

    def total(self, slot: str, mask: str = "") -> str:
        """g of the last token of a slot, a number; 0 where a mask says so."""
        return self._load("total", slot, str(2 * self._size - 1), mask)

    def _inner(self, start: int, count: int, across: bool) -> str:
        axes = "None, :" if across else ":, None"
        inner = self._kernel.writer.let("inner", f"tl.arange(0, {count})[{axes}]")
        return f"({inner} + {start})"

    def _load(self, prefix: str, slot: str, inner: str, mask: str = "") -> str:
        given = f", mask={mask}, other=0.0" if mask else ""
        return self._kernel.writer.fresh(prefix, f"tl.load({self._at(slot, inner)}{given})")

    def _at(self, slot: str, inner: str) -> str:
        return f"{self._base} + (tl.cast({slot}, tl.int64) * {2 * self._size} + {inner})"


@dataclass(frozen=True)
class Head:
    """What a program has of one head for the tokens of a chunk.

    Attributes:
        head: its number.
        slot: its slot for this chunk.
        x: [tokens, P] for each part of the chunk.
    """

    head: str
    slot: str
    x: list[Factor]


@dataclass(frozen=True)
class Shared:
    """What a program has of a group for the tokens of a chunk.

    Attributes:
        b: [tokens, columns] for each part and block.
        c: [tokens, columns] for each block.
        scores: c[t]·b[s] for s ≤ t, else 0, for each part.
        carried: S·c[t] for each of the states that were given, [tokens, P].
    """

    b: list[list[Factor]]
    c: list[Factor]
    scores: list[str]
    carried: list[str]


class Chunk:
    """Writes the products of a chunk.

    Tiles of s are parts of the chunk and tiles of N are blocks of columns, for whole ones would not fit into registers
    where several are needed at a time; tiles of t are the whole chunk.

    Args:
        kernel: what reads the recurrence's operands.
        mixer: the region taken apart.
        tokens: the chunk.
        part: tokens of a part.
        depth: columns of a block.
        steps: where dt and g are.
    """

    def __init__(
        self,
        kernel: Recurrence,
        mixer: Mixer,
        tokens: Tokens,
        part: int,
        depth: int,
        steps: Steps,
    ) -> None:
        self._kernel, self._mixer, self._steps = kernel, mixer, steps
        self._tokens, self._part, self._depth = tokens, min(part, tokens.rows), depth
        self._starts = range(0, tokens.rows, self._part)
        self._parts = [tokens]
        if self._part < tokens.rows:
            first = [kernel.writer.let("part", f"{tokens.first} + {s}") for s in self._starts]
            make = (Tokens.block(kernel.writer, tokens.n, at, part, mixer.length) for at in first)
            self._parts = list(make)

    def head(self, head: str, slot: str) -> Head:
        """What it has of a head."""
        kernel, width = self._kernel, self._mixer.width
        first = kernel.writer.let("first", f"{head} * {width}")
        x = []
        for tokens in self._parts:
            kernel.take(tokens)
            x.append(kernel.factor("x", kernel.across(tokens.place, first, width)))
        return Head(head, slot, x)

    def shared(self, group: str, states: list[list[str]]) -> "Shared":
        """What it has of a group.

        Args:
            group: its number.
            states: states of heads of the group, [P, columns] for each block: they are multiplied with a block of c as
            soon
                as it is there, so that no other is needed at the time.
        """
        writer, size, width = self._kernel.writer, self._tokens.rows, padded(self._mixer.width)
        scores = [f"tl.zeros([{size}, {self._part}], tl.float32)" for _ in self._parts]
        carried = [f"tl.zeros([{size}, {width}], tl.float32)" for _ in states]
        b: list[list[Factor]] = [[] for _ in self._parts]
        c: list[Factor] = []
        for block, start in enumerate(range(0, self._mixer.columns, self._depth)):
            c.append(self._block("c", group, start, self._tokens))
            for i, tokens in enumerate(self._parts):
                b[i].append(self._block("b", group, start, tokens))
                made = c[-1].times(b[i][-1].turned, scores[i])
                scores[i] = writer.fresh("scores", made)
            for i, state in enumerate(states):
                made = c[-1].times(Factor(state[block]).turned, carried[i])
                carried[i] = writer.fresh("carried", made)
        masked = []
        for start, sums in zip(self._starts, scores, strict=True):
            t, s = self._both(start)
            masked.append(writer.fresh("scores", f"tl.where({t} >= {s}, {sums}, 0.0)"))
        return Shared(b, c, masked, carried)

    def b(self, group: str) -> list[list[Factor]]:
        """b of a group, for each part and block."""
        starts = range(0, self._mixer.columns, self._depth)
        return [[self._block("b", group, at, tokens) for at in starts] for tokens in self._parts]

    def added(self, head: Head, b: list[list[Factor]], sums: list[str]) -> list[str]:
        """sums + what the chunk adds to a state, [P, columns] for each block."""
        writer, steps = self._kernel.writer, self._steps
        total = steps.total(head.slot)
        for start, x, blocks in zip(self._starts, head.x, b, strict=True):
            dt, g = (
                load(head.slot, start, self._part, across=False) for load in (steps.dt, steps.sums)
            )
            weight = writer.fresh("weight", f"{dt} * tl.exp({total} - {g})")
            wide = f"{x.tile}.to(tl.float32)" if x.narrow else x.tile
            driven = Factor(writer.fresh("driven", f"{wide} * {weight}")).turned
            sums = [
                writer.fresh("added", driven.times(right, before))
                for right, before in zip(blocks, sums, strict=True)
            ]
        return sums

    def carried(self, c: list[Factor], state: list[str]) -> str:
        """S·c[t], [tokens, P]; `state` is S, [P, columns] for each block."""
        sums = f"tl.zeros([{self._tokens.rows}, {padded(self._mixer.width)}], tl.float32)"
        for left, right in zip(c, state, strict=True):
            made = left.times(Factor(right).turned, sums)
            sums = self._kernel.writer.fresh("carried", made)
        return sums

    def store_results(self, head: Head, scores: list[str], carried: str) -> None:
        """Write what results need of y.

        d · x joins the sum over s as a term of its diagonal.

        Args:
            head: of which head.
            scores, carried: what the methods of these names give.
        """
        kernel, writer, steps = self._kernel, self._kernel.writer, self._steps
        size, width = self._tokens.rows, self._mixer.width
        down = steps.sums(head.slot, 0, size, across=False)
        sums = writer.fresh("sums", f"{carried} * tl.exp({down})")
        skip = kernel.skip(Place("0", head.head, 1, 1))
        for start, x, score in zip(self._starts, head.x, scores, strict=True):
            dt, across = (
                load(head.slot, start, self._part, across=True) for load in (steps.dt, steps.sums)
            )
            between = f"tl.minimum({down} - {across}, {_LARGEST})"
            weights = writer.fresh("weights", f"{score} * tl.exp({between}) * {dt}")
            if skip:
                t, s = self._both(start)
                weights = writer.fresh("weights", f"{weights} + tl.where({t} == {s}, {skip}, 0.0)")
            sums = writer.fresh("y", Factor(weights).times(x, sums))
        first = writer.let("first", f"{head.head} * {width}")
        kernel.store(sums, kernel.across(self._tokens.place, first, width))

    def _block(self, name: str, group: str, start: int, tokens: Tokens) -> Factor:
        """Columns of b or c from one on."""
        kernel, columns = self._kernel, self._mixer.columns
        kernel.take(tokens)
        first = kernel.writer.let("first", f"{group} * {columns} + {start}")
        count = min(self._depth, columns - start)
        return kernel.factor(name, kernel.across(tokens.place, first, count))

    def _both(self, start: int) -> tuple[str, str]:
        """t and s of a part, numbered within the chunk."""
        t, s = f"tl.arange(0, {self._tokens.rows})[:, None]", f"tl.arange(0, {self._part})[None, :]"
        return t, f"{s} + {start}" if start else s
