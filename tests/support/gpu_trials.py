"""Compiled kernels on paper, for tests of tuning for GPUs."""

from collections.abc import Callable, Sequence

from nemoc.codegen.triton.binary import Binary, Occupancy, Report, Scratch
from nemoc.codegen.triton.build import Variant
from nemoc.ir import NemocError


def paper_binary(
    warps: int = 4,
    spilled: int = 0,
    programs: int = 2,
    matrix: tuple[str, ...] = ("wgmma.mma_async.bf16",),
) -> Binary:
    """A kernel without code, of which a multiprocessor holds so many programs."""
    return Binary(
        code=b"",
        symbol="kernel",
        parameters=(),
        warps=warps,
        threads=32 * warps,
        shared=0,
        tensor_memory=0,
        global_scratch=Scratch(),
        profile_scratch=Scratch(),
        waits=False,
        report=Report(
            registers=100,
            spilled=spilled,
            occupancy=Occupancy(programs, programs * warps, "registers"),
            matrix=tuple((kind, 1) for kind in matrix),
        ),
    )


class PaperCompiler:
    """Answers at once what `answer` makes of each kernel; by default one that spills nothing.

    Attributes:
        asked: the kernels that it was asked for.
    """

    def __init__(self, answer: Callable[[Variant], Binary | NemocError] | None = None) -> None:
        self.asked: list[Variant] = []
        self._answer = answer or (lambda v: paper_binary(v.kernel.warps))

    def __call__(
        self, variants: Sequence[Variant], **others: object
    ) -> dict[Variant, Binary | NemocError]:
        self.asked.extend(variants)
        return {variant: self._answer(variant) for variant in variants}
