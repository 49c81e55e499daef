"""Every pass of nemoc, in one place."""

from collections.abc import Sequence
from dataclasses import dataclass

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
from nemoc.passes.move_projections import MoveProjections
from nemoc.passes.move_scales import MoveScales
from nemoc.passes.quantize_fp8 import QuantizeFp8
from nemoc.passes.quantize_nvfp4 import QuantizeNvfp4
from nemoc.passes.specialize_decode import SpecializeDecode
from nemoc.passes.spread_nvfp4 import SpreadNvfp4


@dataclass(frozen=True)
class PassGroup:
    """Passes with one purpose.

    Attributes:
        title: the purpose, one line.
        passes: the classes; what each does is the first line of its docstring.
    """

    title: str
    passes: tuple[type[Pass], ...]


GROUPS: tuple[PassGroup, ...] = (
    PassGroup("derive a variant of the step", (SpecializeDecode,)),
    PassGroup("make the graph smaller, bits unchanged", (Canonicalize, Cse, Dce)),
    PassGroup("move work to where there is less of it", (MoveProjections,)),
    PassGroup(
        "fuse ops into regions, bits unchanged",
        (FuseConvScan, FuseMoeDispatch, FuseEpilogues, FuseRows),
    ),
    PassGroup("store weights in fewer bits", (QuantizeNvfp4, QuantizeFp8)),
    PassGroup("multiply weights of fewer bits as they are stored", (MoveScales,)),
    PassGroup(
        "prepare weights when the artifact is built",
        (InterleaveWeights, SpreadNvfp4, FoldConstants),
    ),
)
"""The passes of nemoc by purpose. A user's own need no entry here (see `nemoc.passes.plugins`)."""

PASSES: tuple[type[Pass], ...] = tuple(p for group in GROUPS for p in group.passes)
"""The passes of nemoc."""


def passes_by_name(extra: Sequence[type[Pass]] = ()) -> dict[str, type[Pass]]:
    """Pass classes by their name in pipelines: the registered ones, then `extra`.

    Raises:
        NemocError: two classes have one name.
    """
    table: dict[str, type[Pass]] = {}
    for cls in (*PASSES, *extra):
        if table.setdefault(cls.name, cls) is not cls:
            raise NemocError(f"two passes are called {cls.name}")
    return table
