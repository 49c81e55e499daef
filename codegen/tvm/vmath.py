"""Functions of a float32 vector or scalar, written out as polynomials so that they vectorise.

libm calls from LLVM are scalar; these cost ten to thirty vector instructions. The errors that tests hold them to, in
units in the last place: exp 2, log1p 3, sigmoid and silu 4, tanh 4. NaN propagates, infinities give their limits.
"""

from collections.abc import Callable
from dataclasses import dataclass

from nemoc.codegen.tvm.writer import KernelWriter, lanes_of

_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
"""(eʳ − 1 − r) / r² on |r| ≤ ln 2 / 2, highest power first (Cephes, expf)."""

_LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
"""(ln(1 + r) − r + r²/2) / r³ on √½ − 1 ≤ r ≤ √2 − 1, highest power first (Cephes, logf)."""

_TANH = (
    -5.70498872745e-3,
    2.06390887954e-2,
    -5.37397155531e-2,
    1.33314422036e-1,
    -3.33332819422e-1,
)
"""(tanh x − x) / x³ in powers of x² on |x| ≤ 0.625, highest power first (Cephes, tanhf)."""

_ERF_NEAR = (
    7.853861353153693e-5,
    -8.010193625184903e-4,
    5.188327685732524e-3,
    -2.685381193529856e-2,
    1.128358514861418e-1,
    -3.761262582423300e-1,
    1.128379165726710,
)
"""erf x / x in powers of x² on |x| ≤ 1, highest power first (Cephes, ndtrf)."""

_ERFC_MIDDLE = (
    2.326819970068386e-2,
    -1.387039388740657e-1,
    3.687424674597105e-1,
    -5.824733027278666e-1,
    6.210004621745983e-1,
    -4.944515323274145e-1,
    3.404879937665872e-1,
    -2.741127028184656e-1,
    5.638259427386472e-1,
)
"""erfc x · x · exp(x²) in powers of 1/x² on 1 ≤ x < 2, highest power first (Cephes, ndtrf)."""

_ERFC_FAR = (
    -1.047766399936249e1,
    1.297719955372516e1,
    -7.495518717768503,
    2.921019019210786,
    -1.015265279202700,
    4.218463358204948e-1,
    -2.820767439740514e-1,
    5.641895067754075e-1,
)
"""The same on 2 ≤ x."""


@dataclass(frozen=True)
class VectorMath:
    """Writes function evaluations into a kernel.

    Every method takes expressions of float32 with `lanes` lanes, writes the statements that evaluate the function and
    returns an expression of the same type.

    Attributes:
        writer: the kernel.
        lanes: lanes of every argument and result; 1 for scalars.
    """

    writer: KernelWriter
    lanes: int

    def const(self, value: float) -> str:
        """A constant with all lanes."""
        number = (
            f'T.float32("{value}")'
            if value != value or abs(value) == float("inf")
            else f"T.float32({value!r})"
        )
        return number if self.lanes == 1 else f"T.Broadcast({number}, {self.lanes})"

    def let(self, hint: str, expression: str) -> str:
        """Hold an expression in a variable."""
        return self.writer.value(hint, expression, self.lanes)

    def whole(self, hint: str, expression: str) -> str:
        """Hold an int32 expression in a variable."""
        return self.writer.value(hint, expression, self.lanes, "int32")

    def maximum(self, x: str, bound: float) -> str:
        """max(x, bound); NaN stays NaN."""
        return f"T.max({self.const(bound)}, {x})"

    def minimum(self, x: str, bound: float) -> str:
        """min(x, bound); NaN stays NaN."""
        return f"T.min({self.const(bound)}, {x})"

    def fma(self, a: str, b: str, c: str) -> str:
        """a · b + c, rounded once where the target can."""
        return f"({a} * {b} + {c})"

    def polynomial(self, x: str, coefficients: tuple[float, ...]) -> str:
        """Horner's scheme, highest power first."""
        p = self.const(coefficients[0])
        for c in coefficients[1:]:
            p = self.fma(p, x, self.const(c))
        return self.let("poly", p)

    def total(self, x: str) -> str:
        """The sum of the lanes, a scalar: halves are added until one lane is left."""
        return self._fold(x, lambda a, b: f"{a} + {b}")

    def largest(self, x: str) -> str:
        """The largest lane, a scalar, by halves."""
        return self._fold(x, lambda a, b: f"T.max({a}, {b})")

    def _fold(self, x: str, join: Callable[[str, str], str]) -> str:
        name = self.let("half", x)
        lanes = self.lanes // 2
        while lanes > 1:
            half = self.writer.local("half", 1, lanes)
            kind = lanes_of("float32", lanes)
            low, high = f'T.vectorlow("{kind}", {name})', f'T.vectorhigh("{kind}", {name})'
            self.writer.line(f"{half}[0] = {join(low, high)}")
            name, lanes = f"{half}[0]", lanes // 2
        if self.lanes == 1:
            return name
        return self.writer.value(
            "all", join(f"T.Shuffle([{name}], [0])", f"T.Shuffle([{name}], [1])")
        )

    def exp(self, x: str) -> str:
        """eˣ: 2ⁿ · eʳ with n = round(x / ln 2); the power of two in two halves, so that denormal results are right."""
        c = self.let("c", self.maximum(self.minimum(x, 89.0), -104.0))
        n = self.let(
            "n", f"T.floor({self.fma(c, self.const(1.44269504088896341), self.const(0.5))})"
        )
        r = self.let("r", self.fma(n, self.const(-0.693359375), c))
        r = self.let("r", self.fma(n, self.const(2.12194440e-4), r))
        e = self.fma(f"({r} * {r})", self.polynomial(r, _EXP), f"({r} + {self.const(1.0)})")
        i = self.whole("i", f'T.Cast("{lanes_of("int32", self.lanes)}", {n})')
        h = self.whole("h", f"T.shift_right({i}, T.int32(1))")
        return self.let("e", f"{e} * {self._power(h)} * {self._power(f'({i} - {h})')}")

    def _power(self, n: str) -> str:
        """2ⁿ for an int32 n within the normal exponents."""
        return f'T.reinterpret("{lanes_of("float32", self.lanes)}", T.shift_left({n} + T.int32(127), T.int32(23)))'

    def log1p_unit(self, u: str) -> str:
        """ln(1 + u) for 0 ≤ u ≤ 1, NaN for NaN."""
        u = self.let("u", u)
        w = self.let("w", f"{u} + {self.const(1.0)}")
        lost = self.let("lost", f"({u} - ({w} - {self.const(1.0)})) / {w}")
        big = f"{w} > {self.const(1.41421356237)}"
        r = self.let("r", f"T.Select({big}, {w} * {self.const(0.5)}, {w}) - {self.const(1.0)}")
        z = self.let("z", f"{r} * {r}")
        p = self.let("p", f"{r} * {z} * {self.polynomial(r, _LOG)} - {self.const(0.5)} * {z}")
        k = self.let("k", f"T.Select({big}, {self.const(1.0)}, {self.const(0.0)})")
        low = self.fma(k, self.const(-2.12194440e-4), f"({p} + {lost})")
        return self.let("l", self.fma(k, self.const(0.693359375), f"({r} + {low})"))

    def sigmoid(self, x: str) -> str:
        """1 / (1 + e⁻ˣ)."""
        one = self.const(1.0)
        return self.let("s", f"{one} / ({one} + {self.exp(f'({self.const(-0.0)} - {x})')})")

    def silu(self, x: str) -> str:
        """x / (1 + e⁻ˣ)."""
        return self.let(
            "s", f"{x} / ({self.const(1.0)} + {self.exp(f'({self.const(-0.0)} - {x})')})"
        )

    def softplus(self, x: str) -> str:
        """max(x, 0) + ln(1 + e⁻|ˣ|)."""
        x = self.let("x", x)
        tail = self.log1p_unit(self.exp(f"({self.const(-0.0)} - T.fabs({x}))"))
        return self.let("s", f"{self.maximum(x, 0.0)} + {tail}")

    def tanh(self, x: str) -> str:
        """sign(x) · (1 − 2 / (e²|ˣ| + 1)), and a polynomial near 0."""
        x = self.let("x", x)
        a = self.let("a", f"T.fabs({x})")
        one, two = self.const(1.0), self.const(2.0)
        far = self.let("far", f"{one} - {two} / ({self.exp(f'({a} + {a})')} + {one})")
        z = self.let("z", f"{x} * {x}")
        near = self.let("near", self.fma(f"{x} * {z}", self.polynomial(z, _TANH), x))
        signed = f"T.Select({x} < {self.const(0.0)}, {self.const(0.0)} - {far}, {far})"
        return self.let("t", f"T.Select({a} > {self.const(0.625)}, {signed}, {near})")

    def erf(self, x: str) -> str:
        """The error function."""
        x = self.let("x", x)
        a = self.let("a", f"T.fabs({x})")
        z = self.let("z", f"{x} * {x}")
        near = self.let("near", f"{x} * {self.polynomial(z, _ERF_NEAR)}")
        q = self.let("q", f"{self.const(1.0)} / {self.maximum(a, 1.0)}")
        y = self.let("y", f"{q} * {q}")
        middle, far = self.polynomial(y, _ERFC_MIDDLE), self.polynomial(y, _ERFC_FAR)
        p = f"T.Select({a} < {self.const(2.0)}, {middle}, {far})"
        rest = self.let(
            "rest", f"{self.const(1.0)} - {self.exp(f'({self.const(-0.0)} - {z})')} * {q} * {p}"
        )
        signed = f"T.Select({x} < {self.const(0.0)}, {self.const(0.0)} - {rest}, {rest})"
        return self.let("t", f"T.Select({a} > {self.const(1.0)}, {signed}, {near})")

    def gelu(self, x: str) -> str:
        """x · Φ(x) by the error function."""
        x = self.let("x", x)
        half = self.let("half", f"{x} * {self.const(0.5)}")
        return f"({half} + {half} * {self.erf(f'({x} * {self.const(0.70710678118654752)})')})"

    def gelu_tanh(self, x: str) -> str:
        """x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))."""
        x = self.let("x", x)
        cube = f"{x} * {x} * {x} * {self.const(0.044715)}"
        t = self.tanh(f"(({x} + {cube}) * {self.const(0.79788456080286536)})")
        half = self.let("half", f"{x} * {self.const(0.5)}")
        return f"({half} + {half} * {t})"
