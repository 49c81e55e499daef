"""Covering a fixed number of elements by vectors, and fetching ahead: helpers of the streaming kernels."""

from collections.abc import Iterator

from nemoc.codegen.tvm.writer import KernelWriter


def vector_pieces(size: int, lanes: int) -> Iterator[tuple[int, int, int]]:
    """Cover `size` elements by vectors: (lanes, how many, first element), the rest by shorter ones and scalars."""
    first = 0
    while first < size:
        count = (size - first) // lanes
        if count:
            yield lanes, count, first
            first += count * lanes
        lanes = lanes // 2 if lanes > 4 else 1


def prefetch(writer: KernelWriter, buffer: str, index: str) -> None:
    """Ask for the cache line of an element, into the second level; the element need not exist."""
    arguments = f"T.address_of({buffer}[{index}]), T.int32(0), T.int32(2), T.int32(1)"
    writer.line(f'T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch.p0", {arguments}))')
