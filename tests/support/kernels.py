"""Kernels against their ops in tests, on the guarded and poisoned memory of `nemoc.codegen.tvm.harness`.

suite = KernelSuite()
norm = suite.add(Site.dense(RmsNorm(x, w, 1e-5)), emit_rms_norm)      # at the top of a test file
...
norm.check({"B": 2, "L": 7}, x_tensor, w_tensor, tolerance=1e-6)      # in a test, against op.evaluate
"""

from collections.abc import Mapping, Sequence

import torch

from nemoc.codegen.plan import Site
from nemoc.codegen.tvm import harness
from nemoc.codegen.tvm.harness import Emitter
from nemoc.codegen.tvm.target import cpu_target
from nemoc.ir.dims import Dim
from nemoc.ir.dtypes import DType
from nemoc.ir.op import Env
from nemoc.ir.region import evaluate_op
from nemoc.ir.types import TensorType, Value


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in float64 over the finite elements; infinite where the others differ."""
    finite = expected.isfinite()
    if not torch.equal(found[~finite].double(), expected[~finite].double()):
        return float("inf")
    wanted = expected[finite].double()
    error = (found[finite].double() - wanted).norm() / wanted.norm().clamp(min=1e-300)
    return float(error) if bool(error.isfinite()) else float("inf")


def older_cpus() -> list[str]:
    """LLVM's names of CPUs with fewer instructions than the one at hand, which runs code for them."""
    levels = {"avx512f": "x86-64-v3", "ssse3": "x86-64-v2", "sse2": "x86-64"}
    return [cpu for feature, cpu in levels.items() if feature in cpu_target().features]


def value(dtype: DType, *shape: Dim) -> Value:
    """An operand for an op."""
    return Value("x", TensorType.of(dtype, shape))


class KernelSuite(harness.KernelSuite):
    """A suite whose sites check themselves."""

    def add(self, site: Site, emit: Emitter) -> "CompiledSite":
        """Emit a site's plan and put it into the module."""
        compiled = super().add(site, emit)
        return CompiledSite(compiled.suite, compiled.name, compiled.site, compiled.plan)


class CompiledSite(harness.CompiledSite):
    """One site of a suite; `run` and `check` execute it."""

    def check(
        self,
        sizes: Mapping[str, int],
        *operands: torch.Tensor,
        tolerance: float = 0.0,
        threads: Sequence[int] = (1, 2),
        in_place: bool = False,
    ) -> None:
        """Run with each number of threads and compare with `op.evaluate`.

        Floating-point results are held to a relative error against float64; with tolerance 0, and for
        integers always, the bits must be those of plain evaluation.

        Raises:
            AssertionError: a result is wrong, or the kernels wrote where they must not.
        """
        env = Env({"B": 1, "L": 1, "C": 1} | dict(sizes), float64=tolerance > 0)
        op = self.site.op
        typed = [t.to(env.torch(v.dtype)) for v, t in zip(op.operands(), operands, strict=True)]
        expected = evaluate_op(op, env, dict(zip(op.operands(), typed, strict=True)))
        for count in threads:
            found = self.run(sizes, *operands, threads=count, in_place=in_place)
            for i, (f, e) in enumerate(zip(found, expected, strict=True)):
                where = f"{op.mnemonic()} result {i}, {dict(sizes)}, {count} threads"
                assert f.shape == e.shape, where
                if tolerance > 0 and f.dtype.is_floating_point:
                    error = relative_error(f, e)
                    assert error <= tolerance, f"{where}: relative error {error:.3g}"
                else:
                    assert f.dtype == e.dtype and torch.equal(_bits(f), _bits(e)), where


_RAW = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(_RAW[tensor.element_size()])
