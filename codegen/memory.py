"""The memory plan of scratch: where each buffer of a step lies in one arena, so that no step allocates any."""

from collections.abc import Sequence
from dataclasses import dataclass

from nemoc.codegen.storage import ALIGNMENT


@dataclass(frozen=True)
class Lifetime:
    """A buffer of `bytes` bytes that phases `first` to `last` (inclusive) use."""

    bytes: int
    first: int
    last: int

    def meets(self, other: "Lifetime") -> bool:
        """Whether both are in use in some phase."""
        return self.first <= other.last and other.first <= self.last


def plan_memory(buffers: Sequence[Lifetime]) -> tuple[tuple[int, ...], int]:
    """Offsets such that no two buffers that are in use in one phase overlap.

    Large buffers are placed first, each into the smallest gap that holds it between buffers that live at the same time.

    Returns:
        The offset of each buffer, a multiple of `ALIGNMENT`, and the size of the arena, both in bytes.
    """
    order = sorted(range(len(buffers)), key=lambda i: (-buffers[i].bytes, buffers[i].first, i))
    placed: dict[int, int] = {}
    for i in order:
        taken = sorted(
            (placed[j], placed[j] + _aligned(buffers[j].bytes))
            for j in placed
            if buffers[i].meets(buffers[j])
        )
        placed[i] = _best_gap(taken, _aligned(buffers[i].bytes))
    total = max((placed[i] + _aligned(b.bytes) for i, b in enumerate(buffers)), default=0)
    return tuple(placed[i] for i in range(len(buffers))), total


def _best_gap(taken: list[tuple[int, int]], size: int) -> int:
    """Where to put `size` bytes among sorted taken ranges: the tightest gap, else behind all."""
    best, slack, end = None, None, 0
    for start, stop in taken:
        gap = start - end
        if gap >= size and (slack is None or gap - size < slack):
            best, slack = end, gap - size
        end = max(end, stop)
    return end if best is None else best


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
