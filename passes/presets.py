"""The pipelines that nemoc runs unless told otherwise, per kind of target and phase."""

from typing import Literal

from nemoc.ir.errors import NemocError
from nemoc.passes.base import Pass
from nemoc.passes.canonicalize import Canonicalize
from nemoc.passes.cse import Cse
from nemoc.passes.dce import Dce
from nemoc.passes.fold_constants import FoldConstants
from nemoc.passes.fuse_conv_scan import FuseConvScan
from nemoc.passes.fuse_epilogues import FuseEpilogues
from nemoc.passes.fuse_moe_dispatch import FuseMoeDispatch
from nemoc.passes.fuse_rows import FuseRows
from nemoc.passes.interleave_weights import InterleaveWeights
from nemoc.passes.move_scales import MoveScales
from nemoc.passes.specialize_decode import SpecializeDecode
from nemoc.passes.spread_nvfp4 import SpreadNvfp4

Phase = Literal["prefill", "decode"]
"""Which of the two executables of a model: many tokens per row, or one."""

_FUSIONS: tuple[Pass, ...] = (
    # why here: a region keeps every value that somebody outside reads, even if nobody needs that
    Dce(),
    # why here: before other fusions, which would take the gate and the norm for themselves
    FuseConvScan(),
    # why here: before the general ones, since rows gathered and summed belong to the experts' products
    FuseMoeDispatch(),
    # why here: all products that are left, with what is left around them
    FuseEpilogues(),
    # why here: what no heavier op has taken
    FuseRows(),
    # why here: norms that every reader computes again are needed no more
    Dce(),
)
"""Regions, once weights are as kernels read them. How many launches one takes is decided behind the passes."""

_GPU: tuple[Pass, ...] = (
    # why here: rules see through views, so that weights are recognised and later patterns are few
    Canonicalize(),
    # why here: layers repeat casts and reshapes of shared values
    Cse(),
    # why here: weights are recognised by now, and folding would decode those of FP8
    MoveScales(),
    # why here: weights are recognised by now; before folding, which takes the change of order out of the step
    SpreadNvfp4(),
    # why here: weights stay as on disk, whose rows matrix units read as they are; the artifact holds what else
    # parameters determine
    FoldConstants(),
    *_FUSIONS,
)

PREFILL: dict[str, tuple[Pass, ...]] = {
    "reference": (
        # why here: builders write ops plainly; fewer ops make everything after this faster to read and run
        Canonicalize(),
        # why here: layers repeat casts and reshapes of shared values (lengths, router inputs)
        Cse(),
        # why here: the interpreter reads weights from the artifact, so what parameters determine is computed once
        FoldConstants(),
        # why here: the passes above leave values behind that nobody reads
        Dce(),
    ),
    "cpu": (
        # why here: rules see through views, so that weights are recognised and later patterns are few
        Canonicalize(),
        # why here: before layouts are chosen, so that a weight used twice is laid out once
        Cse(),
        # why here: weights are recognised by now; laid out in blocks they are no more, and folding would decode FP8
        MoveScales(),
        # why here: after all rewrites that look at plain weights; before folding, which takes the layout change
        # out of the step
        InterleaveWeights(),
        # why here: two products may share a weight; its two layout changes are one
        Cse(),
        # why here: last change to weights; the artifact holds what this leaves outside the step
        FoldConstants(),
        *_FUSIONS,
    ),
    "cuda": _GPU,
    "hip": _GPU,
    "triton-interpret": _GPU,
}
"""By kind of target: the step over any number of tokens."""

DECODE: dict[str, tuple[Pass, ...]] = {
    # why here: first, since the general step's length is a symbol that every other pass has to carry; its reshapes and
    # constants are what canonicalize then clears away
    kind: (SpecializeDecode(), *passes)
    for kind, passes in PREFILL.items()
}
"""By kind of target: the step of one token per row."""


def preset(kind: str, phase: Phase) -> tuple[Pass, ...]:
    """The pipeline for a kind of target.

    Raises:
        NemocError: there is none for that kind.
    """
    table = PREFILL if phase == "prefill" else DECODE
    if kind not in table:
        raise NemocError(f"no preset for target {kind!r}, expected one of {', '.join(table)}")
    return table[kind]
