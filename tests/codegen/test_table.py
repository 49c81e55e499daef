"""Every op of the IR has kernels, or a reason to have none."""

from nemoc.codegen.tvm.emit import EMITTERS
from nemoc.ir.op import Op
from nemoc.ir.ops import (
    OPS,
    Folded,
    Fp8Scale,
    Interleave,
    Nvfp4BlockScales,
    Nvfp4GlobalScale,
    Nvfp4ToFp8,
    QuantizeFp8,
    QuantizeNvfp4,
    SpreadCodes,
    SwizzleScales,
)

_FOLDED = "applied to parameters alone, so folded when the artifact is built"

WITHOUT: dict[type[Op], str] = {
    Folded: "computed when the artifact is built",
    Interleave: _FOLDED,
    Fp8Scale: _FOLDED,
    QuantizeFp8: _FOLDED,
    Nvfp4GlobalScale: _FOLDED,
    Nvfp4BlockScales: _FOLDED,
    QuantizeNvfp4: _FOLDED,
    SpreadCodes: _FOLDED,
    SwizzleScales: _FOLDED,
    Nvfp4ToFp8: "beside activations in FP8, which no CPU kernel makes",
}


def test_every_op_has_an_emitter() -> None:
    missing = [op.mnemonic() for op in OPS if op not in EMITTERS and op not in WITHOUT]
    assert not missing, f"ops without kernels for the cpu target: {', '.join(missing)}"


def test_exceptions_are_needed() -> None:
    assert not [op.mnemonic() for op in WITHOUT if op in EMITTERS or op not in OPS]
