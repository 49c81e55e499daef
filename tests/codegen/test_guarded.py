"""Guarded memory: where tensors begin, with or without a promise of alignment, and that no write beside them passes."""

from collections.abc import Mapping

import pytest
import torch

from nemoc.codegen.guarded import Buffer, KernelFault, Views, run_views
from nemoc.codegen.plan import Arg, View
from nemoc.ir.dims import L
from nemoc.ir.dtypes import DType
from support.fake_cuda import tensor_at

SIZES = {"L": 3}
POISON = 0xFF
"""What memory holds at first; written over a guard, it is seen too."""

X, Y, SCRATCH = Arg("operand", 0), Arg("result", 0), Arg("scratch", 0)

either_way = pytest.mark.parametrize("aligned", [False, True])
every_width = pytest.mark.parametrize("dtype", [DType.U8, DType.BF16, DType.F32, DType.I64])


def address(buffer: Buffer) -> int:
    found = buffer.pointer.value
    assert found is not None
    return found


def run(dtype: DType, aligned: bool, beside: tuple[Arg, int] | None = None) -> dict[Arg, int]:
    """Copy an operand to a result, and return how far from the start of their memory tensors begin.

    Args:
        dtype: of all tensors, which have three elements.
        aligned: whether an alignment was promised.
        beside: a tensor and the place of a byte that is written too, counted from its first.
    """
    view = View(dtype, (L,), (1,))
    views = Views((view,), (view,), (view,), (), aligned)
    offsets: dict[Arg, int] = {}

    def call(buffers: Mapping[Arg, Buffer]) -> None:
        for arg, buffer in buffers.items():
            start = address(buffer)
            assert (start % 16 == 0) is aligned
            offsets[arg] = start - buffer.memory.data_ptr()
        buffers[Y].tensor.copy_(buffers[X].tensor)
        if beside is not None:
            arg, place = beside
            tensor_at(address(buffers[arg]) + place, torch.uint8, [1]).fill_(POISON)

    values = torch.tensor([1, 2, 3]).to(dtype.torch)
    (found,) = run_views(views, SIZES, [values], call)
    assert torch.equal(found, values)
    return offsets


@every_width
def test_buffers_begin_where_kernels_were_promised(dtype: DType) -> None:
    offsets = run(dtype, aligned=True)
    assert set(offsets) == {X, Y, SCRATCH}
    assert all(offset % 256 == 0 for offset in offsets.values())


@every_width
def test_without_a_promise_only_elements_are_aligned(dtype: DType) -> None:
    offsets = run(dtype, aligned=False)
    assert set(offsets) == {X, Y, SCRATCH}
    assert all(offset % dtype.bytes == 0 and offset % 16 != 0 for offset in offsets.values())


@either_way
@every_width
@pytest.mark.parametrize("arg", [X, Y, SCRATCH], ids=str)
def test_a_byte_written_before_or_behind_a_tensor_is_a_fault(
    arg: Arg, dtype: DType, aligned: bool
) -> None:
    for place in (-1, 3 * dtype.bytes):
        with pytest.raises(KernelFault, match=f"{arg}: written where it must not be"):
            run(dtype, aligned, (arg, place))


@either_way
def test_an_operand_that_is_written_is_a_fault(aligned: bool) -> None:
    with pytest.raises(KernelFault, match="operand0: written where it must not be"):
        run(DType.F32, aligned, (X, 3))
    run(DType.F32, aligned, (SCRATCH, 3))
