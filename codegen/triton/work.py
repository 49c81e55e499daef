"""What a launch makes of its GPU, as its lowering says it: for predictions of how long it takes."""

from dataclasses import dataclass

from nemoc.ir.dims import Dim


@dataclass(frozen=True)
class Work:
    """What one program of a launch does; dimensions are in B, L and C.

    Attributes:
        flops: matrix arithmetic, that of padding included.
        loaded: bytes that it asks for, whether they come from memory or from a cache.
        steps: how many times, one after the other, it waits for what it loads.
        tile: rows and columns of a product's result that it adds to at a time; (0, 0) where there is none.
        run: bytes that lie one behind the other wherever it loads; 0 for more than any access takes.
        programs: how many programs have something to do; none for all.
    """

    flops: Dim = 0
    loaded: Dim = 0
    steps: Dim = 1
    tile: tuple[int, int] = (0, 0)
    run: int = 0
    programs: Dim | None = None
