"""What is wrong with Triton's interpreter is put right, and only while kernels run."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import FunctionRewriter, InterpreterBuilder
from triton.runtime.jit import JITFunction

from nemoc.codegen.guarded import KernelFault
from nemoc.codegen.plan import Arg, Plan, Site
from nemoc.codegen.triton.interpret import run_site
from nemoc.codegen.triton.writer import KernelWriter
from nemoc.ir.dtypes import DType
from nemoc.ir.ops import Cast
from support.kernels import value


def run(source: DType, target: DType, x: torch.Tensor, *lines: str) -> torch.Tensor:
    """What a kernel of one program makes of 16 x 16 elements, given the lines that compute `y` from `x`."""
    writer = KernelWriter("test")
    writer.line("at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]")
    writer.line(f"x = tl.load({writer.pointer(Arg('operand', 0), source)} + at)")
    for line in lines:
        writer.line(line)
    writer.line(f"tl.store({writer.pointer(Arg('result', 0), target)} + at, y)")
    site = Site.dense(Cast(value(source, 16, 16), target))
    (found,) = run_site(site, Plan((writer.finish(1),)), {}, [x])
    return found


def numbers(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_casts_to_bf16_round_to_nearest_even() -> None:
    x = numbers()
    x[0, :6] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 3e38, float("inf"), 1e-40])
    x[1, 0] = 1.9999999  # its rounding reaches the exponent
    found = run(DType.F32, DType.BF16, x, "y = x.to(tl.bfloat16)")
    assert torch.equal(found, x.bfloat16())


def test_casts_of_nan_stay_nan() -> None:
    x = torch.full((16, 16), float("nan"))
    assert run(DType.F32, DType.BF16, x, "y = x.to(tl.bfloat16)").isnan().all()


def test_every_e4m3_number_is_decoded_from_its_bits() -> None:
    x = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(16, 16)
    found = run(DType.F8E4M3, DType.F32, x, "y = from_e4m3(x)")
    assert torch.equal(found.nan_to_num(1e6), x.float().nan_to_num(1e6))


def test_every_e2m1_code_is_decoded() -> None:
    codes = torch.arange(256, dtype=torch.int32).reshape(16, 16) % 16
    found = run(DType.I32, DType.F32, codes, "y = from_e2m1(x)")
    sizes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    assert torch.equal(found, torch.cat([sizes, -sizes])[codes.long()])


def test_products_of_bf16_are_exact_and_summed_in_f32() -> None:
    x = numbers(torch.bfloat16)
    zero = "zero = tl.zeros([16, 16], tl.float32)"
    found = run(DType.BF16, DType.F32, x, zero, "y = dot(x, tl.trans(x), zero)")
    expected = x.double() @ x.double().T
    assert (found - expected).norm() / expected.norm() < 1e-7


def test_a_wide_factor_keeps_all_its_bits_beside_a_narrow_one() -> None:
    x = numbers()
    lines = ("zero = tl.zeros([16, 16], tl.float32)", "y = dot_wide(x, x.to(tl.bfloat16), zero)")
    expected = x.double() @ x.bfloat16().double()
    found = run(DType.F32, DType.F32, x, *lines)
    assert (found - expected).norm() / expected.norm() < 1e-7
    near = run(DType.F32, DType.F32, x, lines[0], lines[1].replace("wide", "near"))
    assert 1e-7 < (near - expected).norm() / expected.norm() < 1e-5


def language() -> list[dict[str, object]]:
    """What Triton's modules and types hold, and what its interpreter is made of."""
    holders = (
        tl,
        tl.core,
        tl.standard,
        tl.math,
        tl.tensor,
        tl.dtype,
        tl.core.tensor_descriptor_base,
    )
    within = (interpreter, InterpreterBuilder, interpreter.interpreter_builder, FunctionRewriter)
    return [dict(vars(one)) for one in (*holders, *within)]


def test_triton_is_as_it_was_once_kernels_have_run() -> None:
    run(DType.F32, DType.F32, numbers(), "y = x")  # what the interpreter keeps is there from now on
    before = language()
    run(DType.F32, DType.F32, numbers(), "y = x / tl.sum(x, axis=1, keep_dims=True)")
    assert isinstance(tl.sum, JITFunction) and isinstance(tl.standard.sum, JITFunction)
    assert language() == before
    assert not triton.knobs.runtime.interpret


def test_the_language_is_exchanged_once_for_all_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    exchanged = []
    own = interpreter._patch_lang
    monkeypatch.setattr(interpreter, "_patch_lang", lambda fn: exchanged.append(fn) or own(fn))
    run(DType.F32, DType.F32, numbers(), "y = tl.sum(x, axis=1, keep_dims=True)", "y = x / y")
    assert len(exchanged) == 2  # once for reading the module, once for the launch


def test_a_store_beyond_the_tensor_is_found() -> None:
    with pytest.raises(KernelFault, match="written where it must not be"):
        run(DType.F32, DType.F32, numbers(), "y = x", "at = at + 1")


def test_triton_is_as_it_was_after_a_kernel_that_fails() -> None:
    before = language()
    with pytest.raises(Exception, match="nothing"):
        run(DType.F32, DType.F32, numbers(), "y = nothing")
    assert language() == before
