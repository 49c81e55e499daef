"""Functions that generated kernels call. The text below the imports goes into every module of kernels.

`jit` and `F32_PRODUCTS` are bound by the module's head: whether functions are compiled or interpreted, and how the
target multiplies matrices of f32.
"""

import triton
import triton.language as tl

jit = triton.jit
F32_PRODUCTS = tl.constexpr("ieee")

# --- text of every module ---


@jit
def relu(x):
    """max(x, 0); NaN stays."""
    return tl.where(x < 0, 0.0, x)


@jit
def silu(x):
    """x / (1 + e⁻ˣ)."""
    return x / (1.0 + tl.exp(-x))


@jit
def sigmoid(x):
    """1 / (1 + e⁻ˣ)."""
    return 1.0 / (1.0 + tl.exp(-x))


@jit
def softplus(x):
    """ln(1 + eˣ) as max(x, 0) + log1p(e⁻|ˣ|); log1p(u) is ln(1 + u) corrected by the rounding of 1 + u."""
    u = tl.exp(-tl.abs(x))
    v = 1.0 + u
    near = tl.where(v == 1.0, u, tl.log(v) * u / tl.where(v == 1.0, 1.0, v - 1.0))
    return tl.maximum(x, 0.0) + near


@jit
def tanh(x):
    """tanh x: by its series near 0, where 1 − 2 / (e²ˣ + 1) cancels."""
    s = x * x
    series = x * (1.0 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835)))))
    size = tl.minimum(tl.abs(x), 20.0)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -far, far))


@jit
def gelu(x):
    """x · Φ(x)."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@jit
def gelu_tanh(x):
    """The tanh approximation of x · Φ(x)."""
    return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


@jit
def floor_div(x, divisor):
    """⌊x / divisor⌋ of integers, divisor positive; `//` rounds towards 0."""
    return tl.where(x < 0, -((divisor - 1 - x) // divisor), x // divisor)


@jit
def from_e4m3(bits):
    """The f32 numbers of E4M3 bits (u8): NaN, subnormals and all, on GPUs without the type too."""
    code = bits.to(tl.int32)
    exponent, mantissa = (code >> 3) & 15, code & 7
    normal = (((exponent + 120) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
    size = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.001953125, normal)
    size = tl.where((code & 127) == 127, float("nan"), size)
    return tl.where((code & 128) != 0, -size, size)


@jit
def from_e2m1(code):
    """The f32 numbers of E2M1 codes (i32, 0 to 15): 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives."""
    size = code & 7
    normal = ((((size >> 1) + 126) << 23) | ((size & 1) << 22)).to(tl.float32, bitcast=True)
    value = tl.where(size < 2, size.to(tl.float32) * 0.5, normal)
    return tl.where((code & 8) != 0, -value, value)


@jit
def dot(a, b, acc):
    """acc + a · b, summed in f32; a [M, K] and b [K, N] of one element type.

    Products of narrow types are exact. Of f32 they are as exact as f32's own, see `F32_PRODUCTS`.
    """
    if a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision=F32_PRODUCTS)
    else:
        return tl.dot(a, b, acc)


@jit
def dot_wide(a, b, acc):
    """acc + a · b for a of f32 and b of bf16: a is three bf16 numbers one behind the other, 8 bits each.

    Bits are cut off, not rounded: rounding one by one is slow, unlike shifts.
    """
    high = a.to(tl.uint32, bitcast=True) >> 16
    rest = a - (high << 16).to(tl.float32, bitcast=True)
    middle = rest.to(tl.uint32, bitcast=True) >> 16
    low = rest - (middle << 16).to(tl.float32, bitcast=True)
    acc = tl.dot(low.to(tl.bfloat16), b, acc)
    acc = tl.dot(middle.to(tl.uint16).to(tl.bfloat16, bitcast=True), b, acc)
    return tl.dot(high.to(tl.uint16).to(tl.bfloat16, bitcast=True), b, acc)


@jit
def dot_near(a, b, acc):
    """acc + a · b for a of f32 and b of bf16, a cut to 16 bits: its first 8, and the rest rounded to as many.

    The first are cut off, not rounded: rounding one by one is slow, unlike shifts and rounding in pairs.
    """
    high = a.to(tl.uint32, bitcast=True) >> 16
    rest = a - (high << 16).to(tl.float32, bitcast=True)
    acc = tl.dot(rest.to(tl.bfloat16), b, acc)
    return tl.dot(high.to(tl.uint16).to(tl.bfloat16, bitcast=True), b, acc)


@jit
def dot_near_right(a, b, acc):
    """acc + a · b for a of bf16 and b of f32, b cut as in `dot_near`."""
    high = b.to(tl.uint32, bitcast=True) >> 16
    rest = b - (high << 16).to(tl.float32, bitcast=True)
    acc = tl.dot(a, rest.to(tl.bfloat16), acc)
    return tl.dot(a, high.to(tl.uint16).to(tl.bfloat16, bitcast=True), acc)
