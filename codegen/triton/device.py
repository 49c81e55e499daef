"""Functions that generated kernels call. The text below the imports goes into every module of kernels.

The module's head binds `jit`, whether functions are compiled or interpreted; `F32_PRODUCTS`, how the target multiplies
matrices of f32; `WAITS`, whether kernels wait for former ones themselves; `FP8`, whether E4M3 is a type of the target;
and `PTX`, whether it takes NVIDIA's assembly. What is written in that, for fewer instructions, stands beside the same
in Triton, for other GPUs and the interpreter.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

jit = triton.jit
F32_PRODUCTS = tl.constexpr("ieee")
WAITS = tl.constexpr(False)
FP8 = tl.constexpr(False)
PTX = tl.constexpr(False)

# --- text of every module ---


@jit
def wait_turn():
    """Wait until former kernels have ended, then let the next one be launched: in every kernel, whatever else it does.

    Every program waits, and touches no memory before but to prefetch it, or to load weights, which no kernel writes. So
    a kernel ends only after all before it, and the next one, which waits for this one alone, may read and overwrite
    what any of them has worked on. That one may be launched once all programs have come here, with all that they need:
    none still waits for tensor memory that the next kernel holds.
    """
    wait()
    let_next()


@jit
def wait():
    """Wait until former kernels have ended."""
    if WAITS:
        gdc_wait()


@jit
def let_next():
    """Let the next kernel be launched, once all programs have come here."""
    if WAITS:
        gdc_launch_dependents()


@jit
def prefetch(at):
    """Bring what these pointers point to into the second-level cache, where kernels are launched ahead.

    Before `wait_turn` too: nothing is seen of what is there, so that it does not matter who has yet to write it.
    """
    if WAITS:
        text: tl.constexpr = tl.constexpr("prefetch.global.L2 [$1]; mov.u32 $0, 0;")
        tl.inline_asm_elementwise(
            text, "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
        )


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
    """The f32 numbers of E4M3 bits (u8): NaN, subnormals and all, on GPUs without the type too.

    Their bits are those of an f16 that is 2⁻⁸ times as large, once they stand where f16 has them.
    """
    if FP8:
        return bits.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        code = bits.to(tl.int32)
        tiny = ((code & 128) << 8) | ((code & 127) << 7)
        number = tiny.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        return tl.where((code & 127) == 127, float("nan"), number)


@jit
def to_e4m3(x):
    """The E4M3 bits (u8) of f32 numbers from 0 to 448, rounded to nearest, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 524287 + ((bits >> 20) & 1)) >> 20) - 960
    small = ((x * 512.0 + 12582912.0) - 12582912.0).to(tl.int32)
    return tl.where(x < 0.015625, small, normal).to(tl.uint8)


@jit
def signed_e4m3(x):
    """The E4M3 bits (u8) nearest to f32 numbers, ties to even, cut at ±448."""
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 128
    return (to_e4m3(tl.minimum(tl.abs(x), 448.0)).to(tl.int32) | sign).to(tl.uint8)


@jit
def e4m3_codes(x, scale):
    """The E4M3 bits (u8) nearest to x / scale, ties to even, cut at ±448; both f32, scale positive."""
    return signed_e4m3(tl.div_rn(x, tl.broadcast_to(scale, x.shape)))


@jit
def to_e2m1(x):
    """The nearest E2M1 codes (i32, 0 to 15) of f32 numbers, ties to even; 0 has no sign."""
    size = tl.abs(x)
    code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
    code += (size >= 1.75).to(tl.int32) + (size > 2.5).to(tl.int32)
    code += (size >= 3.5).to(tl.int32) + (size > 5.0).to(tl.int32)
    return tl.where(x < 0, code + 8, code)


@jit
def block_scales(x, scale, rows: tl.constexpr, blocks: tl.constexpr):
    """E4M3 bits [rows, blocks] of what makes 6 of the largest magnitude of each block of 16; x [rows, 16 blocks], f32.

    In ModelOpt's arithmetic: from 2⁻⁹ to 448, and 1 of a block of zeros; `scale` is the rows' own, f32.
    """
    largest = tl.max(tl.reshape(tl.abs(x), [rows, blocks, 16]), axis=2)
    ideal = tl.div_rn(largest, tl.broadcast_to(6.0 * scale, [rows, blocks]))
    ideal = tl.minimum(tl.maximum(ideal, 0.001953125), 448.0)
    return to_e4m3(tl.where(largest == 0.0, 1.0, ideal))


@jit
def nvfp4_codes(x, scales, scale, rows: tl.constexpr, blocks: tl.constexpr):
    """E2M1 codes by twos, u8 [rows, 8 blocks], of x [rows, 16 blocks], f32, by E4M3 bits of their blocks' scales."""
    step = tl.broadcast_to(from_e4m3(scales) * scale, [rows, blocks])
    parts = tl.reshape(x, [rows, blocks, 16])
    steps = tl.broadcast_to(tl.expand_dims(step, 2), [rows, blocks, 16])
    codes = to_e2m1(tl.where(parts == 0.0, 0.0, tl.div_rn(parts, steps)))
    even, odd = tl.split(tl.reshape(codes, [rows, blocks * 8, 2]))
    return (even | (odd << 4)).to(tl.uint8)


@jit
def from_e2m1(code):
    """The f32 numbers of E2M1 codes (i32, 0 to 15): 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives."""
    size = code & 7
    normal = ((((size >> 1) + 126) << 23) | ((size & 1) << 22)).to(tl.float32, bitcast=True)
    value = tl.where(size < 2, size.to(tl.float32) * 0.5, normal)
    return tl.where((code & 8) != 0, -value, value)


@jit
def nvfp4_numbers(codes, steps, rows: tl.constexpr, blocks: tl.constexpr):
    """code · step in f32 [rows, 16 blocks]: codes by twos, u8 [rows, 8 blocks], and f32 steps of blocks [rows, blocks].

    A code's bits are those of a number 2⁻¹²⁶ times as large, exponent and all, once they stand where f32 has them.
    """
    pairs = codes.to(tl.int32)
    bits = tl.reshape(tl.join(pairs, pairs >> 4), [rows, blocks, 16])
    tiny = ((bits & 7) << 22) | ((bits & 8) << 28)
    steps = tl.expand_dims(tl.broadcast_to(steps, [rows, blocks]), 2)
    numbers = tiny.to(tl.float32, bitcast=True) * 8.507059173023462e37 * steps
    return tl.reshape(numbers, [rows, blocks * 16])


@jit
def nvfp4_units(codes, scales, rows: tl.constexpr, blocks: tl.constexpr):
    """code · s in bf16, exact: codes by twos, u8 [rows, 8 blocks], and E4M3 bits of scales [rows, blocks]."""
    return nvfp4_numbers(codes, from_e4m3(scales), rows, blocks).to(tl.bfloat16)


@jit
def bf16_halves(bits):
    """The two bf16 numbers in each word (i32), the low one first."""
    low = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return low, (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@jit
def f16_halves(bits):
    """The two f16 numbers in each word (i32), the low one first."""
    low = bits.to(tl.int16).to(tl.float16, bitcast=True)
    return low, (bits >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@jit
def bf16_numbers(words, columns: tl.constexpr):
    """The two bf16 numbers in each word (i32) as f32, the low one first: [1, columns] of half as many words."""
    low = (words << 16).to(tl.float32, bitcast=True)
    high = (words & -0x10000).to(tl.float32, bitcast=True)
    return tl.reshape(tl.join(low, high), [1, columns])


E5M2_NUMBERS = tl.constexpr("""{
    .reg .b32 low, high; .reg .b16 n<4>;
    prmt.b32 low, $4, 0, 0x1404; mov.b32 {n0, n1}, low;
    prmt.b32 high, $4, 0, 0x3424; mov.b32 {n2, n3}, high;
    cvt.f32.f16 $0, n0; cvt.f32.f16 $1, n1; cvt.f32.f16 $2, n2; cvt.f32.f16 $3, n3;
}""")
"""f32 of the four E5M2 numbers in a word, the lowest first: they are the upper halves of f16 numbers."""

UNITS_OF_CODES = tl.constexpr("""{
    .reg .b32 low, zero, step, n<4>, m<4>;
    mov.b32 step, {$9, $9}; mov.b32 zero, 0x80008000; shl.b32 low, $8, 4;
    prmt.b32 n0, low, $8, 0x4000; shr.u32 m0, n0, 6;
    prmt.b32 n1, low, $8, 0x5010; shr.u32 m1, n1, 6;
    prmt.b32 n2, low, $8, 0x6020; shr.u32 m2, n2, 6;
    prmt.b32 n3, low, $8, 0x7030; shr.u32 m3, n3, 6;
    and.b32 n0, n0, 0x80008000; and.b32 m0, m0, 0x01C001C0; or.b32 n0, n0, m0;
    and.b32 n1, n1, 0x80008000; and.b32 m1, m1, 0x01C001C0; or.b32 n1, n1, m1;
    and.b32 n2, n2, 0x80008000; and.b32 m2, m2, 0x01C001C0; or.b32 n2, n2, m2;
    and.b32 n3, n3, 0x80008000; and.b32 m3, m3, 0x01C001C0; or.b32 n3, n3, m3;
    fma.rn.bf16x2 n0, n0, step, zero; mov.b32 {$0, $1}, n0;
    fma.rn.bf16x2 n1, n1, step, zero; mov.b32 {$2, $3}, n1;
    fma.rn.bf16x2 n2, n2, step, zero; mov.b32 {$4, $5}, n2;
    fma.rn.bf16x2 n3, n3, step, zero; mov.b32 {$6, $7}, n3;
}""")
"""bf16 numbers of the eight codes in a word, times a step: codes number 2i and 2i + 1 are moved to the upper ends of a
word's halves, where their signs are right, and the rest from there."""

PAIRS_OF_SPREAD = """{
    .reg .b32 zero, step, near, far, n<4>;
    mov.b32 step, {$9, $9}; mov.b32 zero, 0x80008000;
    and.b32 n0, $8, 0x81C081C0; fma.rn.bf16x2 n0, n0, step, zero;
    shl.b32 n1, $8, 4; and.b32 n1, n1, 0x81C081C0; fma.rn.bf16x2 n1, n1, step, zero;
    shf.l.wrap.b32 n2, $8, $8, 10; and.b32 n2, n2, 0x81C081C0; fma.rn.bf16x2 n2, n2, step, zero;
    shr.u32 near, $8, 2; shl.b32 far, $8, 6; xor.b32 n3, near, far; and.b32 n3, n3, 0x81C081C0;
    fma.rn.bf16x2 n3, n3, step, zero;
"""
"""The same of codes in the order of `nemoc.ir.nvfp4.spread`, still in pairs."""

UNITS_OF_SPREAD = tl.constexpr(
    PAIRS_OF_SPREAD
    + "mov.b32 {$0, $1}, n0; mov.b32 {$2, $3}, n1; mov.b32 {$4, $5}, n2; mov.b32 {$6, $7}, n3; }"
)
"""bf16 of these pairs."""

NUMBERS_OF_SPREAD = tl.constexpr(
    PAIRS_OF_SPREAD
    + """
    shl.b32 $0, n0, 16; and.b32 $1, n0, 0xFFFF0000; shl.b32 $2, n1, 16; and.b32 $3, n1, 0xFFFF0000;
    shl.b32 $4, n2, 16; and.b32 $5, n2, 0xFFFF0000; shl.b32 $6, n3, 16; and.b32 $7, n3, 0xFFFF0000;
}"""
)
"""f32 of these pairs."""

PRODUCT_OF_EIGHTS = tl.constexpr("""{
    .reg .b32 a<8>, b<4>;
    mov.b32 a0, {$4, $5}; mov.b32 a1, {$12, $13}; mov.b32 a2, {$6, $7}; mov.b32 a3, {$14, $15};
    mov.b32 a4, {$8, $9}; mov.b32 a5, {$16, $17}; mov.b32 a6, {$10, $11}; mov.b32 a7, {$18, $19};
    mov.b32 b0, {$20, $21}; mov.b32 b1, {$22, $23}; mov.b32 b2, {$24, $25}; mov.b32 b3, {$26, $27};
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
        {$0, $1, $2, $3}, {a0, a1, a2, a3}, {b0, b1}, {$28, $29, $30, $31};
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
        {$0, $1, $2, $3}, {a4, a5, a6, a7}, {b2, b3}, {$0, $1, $2, $3};
}""")
"""Sums of a warp's lanes, f32, to which products of eight bf16 numbers of each lane are added: see `fragment_dot`."""

FP8_OF_BLOCK = tl.constexpr("""{
    .reg .b32 step, near, far, size, more, low, s, n<4>; .reg .b16 e<4>;
    mov.b32 step, {$6, $6};
    mov.b32 n0, 0x38000000; mul.f16x2 n0, n0, step; cvt.rn.satfinite.e4m3x2.f16x2 e0, n0;
    mov.b32 n1, 0x3E003C00; mul.f16x2 n1, n1, step; cvt.rn.satfinite.e4m3x2.f16x2 e1, n1;
    mov.b32 n2, 0x42004000; mul.f16x2 n2, n2, step; cvt.rn.satfinite.e4m3x2.f16x2 e2, n2;
    mov.b32 n3, 0x46004400; mul.f16x2 n3, n3, step; cvt.rn.satfinite.e4m3x2.f16x2 e3, n3;
    mov.b32 near, {e0, e1}; mov.b32 far, {e2, e3};
    and.b32 size, $4, 0x77777777; shr.u32 more, size, 16; shl.b32 low, $4, 4;
    prmt.b32 n0, near, far, size; prmt.b32 s, low, $4, 0x5140; and.b32 s, s, 0x80808080; xor.b32 $0, n0, s;
    prmt.b32 n1, near, far, more; prmt.b32 s, low, $4, 0x7362; and.b32 s, s, 0x80808080; xor.b32 $1, n1, s;
    and.b32 size, $5, 0x77777777; shr.u32 more, size, 16; shl.b32 low, $5, 4;
    prmt.b32 n2, near, far, size; prmt.b32 s, low, $5, 0x5140; and.b32 s, s, 0x80808080; xor.b32 $2, n2, s;
    prmt.b32 n3, near, far, more; prmt.b32 s, low, $5, 0x7362; and.b32 s, s, 0x80808080; xor.b32 $3, n3, s;
}""")
"""E4M3 numbers of the sixteen codes in two words, times a step, four in each word: the eight that there are but for
their signs are computed once, and looked up byte by byte."""


@jit
def e5m2_numbers(bits):
    """Four tiles, f32, of the four E5M2 numbers in each word (i32), the lowest first."""
    if PTX:
        kinds: tl.constexpr = (tl.float32, tl.float32, tl.float32, tl.float32)
        return tl.inline_asm_elementwise(
            E5M2_NUMBERS, "=f,=f,=f,=f,r", [bits], dtype=kinds, is_pure=True, pack=1
        )
    else:
        n0, n2 = f16_halves((bits << 8) & -0x00FF0100)
        n1, n3 = f16_halves(bits & -0x00FF0100)
        return n0.to(tl.float32), n1.to(tl.float32), n2.to(tl.float32), n3.to(tl.float32)


@jit
def e2m1_eighths(words):
    """Eight tiles, f32: number j of the eight codes in each word (i32), times 2⁻¹⁴.

    Codes are E5M2 numbers 2¹⁴ times as small once their signs stand where those have them. Even codes are moved
    together, and odd ones.
    """
    even = ((words << 1) & 0x0E0E0E0E) | ((words << 4) & -0x7F7F7F80)
    odd = ((words >> 3) & 0x0E0E0E0E) | (words & -0x7F7F7F80)
    c0, c2, c4, c6 = e5m2_numbers(even)
    c1, c3, c5, c7 = e5m2_numbers(odd)
    return c0, c1, c2, c3, c4, c5, c6, c7


@jit
def in_order(c0, c1, c2, c3, c4, c5, c6, c7, rows: tl.constexpr, columns: tl.constexpr):
    """The tile [rows, columns] of which eight have every eighth element."""
    even = tl.join(tl.join(c0, c4), tl.join(c2, c6))
    odd = tl.join(tl.join(c1, c5), tl.join(c3, c7))
    return tl.reshape(tl.join(even, odd), [rows, columns])


@jit
def unit_steps(scales):
    """What `word_units` takes for E4M3 bits of scales: bf16."""
    return (from_e4m3(scales) * 6.646139978924579e35).to(tl.bfloat16)


@jit
def units_by(text: tl.constexpr, words, steps):
    """Eight tiles, bf16, that assembly makes of words (i32) and steps (bf16)."""
    pair: tl.constexpr = (tl.bfloat16, tl.bfloat16)
    kinds: tl.constexpr = pair + pair + pair + pair
    return tl.inline_asm_elementwise(
        text, "=h,=h,=h,=h,=h,=h,=h,=h,r,h", [words, steps], dtype=kinds, is_pure=True, pack=1
    )


@jit
def word_units(words, steps):
    """Eight tiles, bf16: number j of the eight codes in each word (i32) times the scale · 2⁻⁷ behind its step, exact.

    Codes are moved two at a time to where the sign (0x8000) and the rest (0x01C0) of two bf16 numbers are, which are
    2⁻¹²⁶ times as large. 2⁻⁷ keeps scales times 2¹¹⁹ finite.
    """
    if PTX:
        return units_by(UNITS_OF_CODES, words, steps)
    else:
        c0, c4 = bf16_halves(((words << 12) & -0x7FFF8000) | ((words << 6) & 0x01C001C0))
        c1, c5 = bf16_halves(((words << 8) & -0x7FFF8000) | ((words << 2) & 0x01C001C0))
        c2, c6 = bf16_halves(((words << 4) & -0x7FFF8000) | ((words >> 2) & 0x01C001C0))
        c3, c7 = bf16_halves((words & -0x7FFF8000) | ((words >> 6) & 0x01C001C0))
        c0, c1, c2, c3 = c0 * steps, c1 * steps, c2 * steps, c3 * steps
        c4, c5, c6, c7 = c4 * steps, c5 * steps, c6 * steps, c7 * steps
        return c0, c1, c2, c3, c4, c5, c6, c7


@jit
def spread_units(words, steps):
    """As `word_units` of codes in the order of `nemoc.ir.nvfp4.spread`."""
    if PTX:
        return units_by(UNITS_OF_SPREAD, words, steps)
    else:
        c0, c1 = bf16_halves(words & -0x7E3F7E40)
        c2, c3 = bf16_halves((words << 4) & -0x7E3F7E40)
        c4, c5 = bf16_halves(((words << 10) | ((words >> 22) & 0x3FF)) & -0x7E3F7E40)
        c6, c7 = bf16_halves((((words >> 2) & 0x3FFFFFFF) ^ (words << 6)) & -0x7E3F7E40)
        c0, c1, c2, c3 = c0 * steps, c1 * steps, c2 * steps, c3 * steps
        c4, c5, c6, c7 = c4 * steps, c5 * steps, c6 * steps, c7 * steps
        return c0, c1, c2, c3, c4, c5, c6, c7


@jit
def spread_numbers(words, steps):
    """The same in f32."""
    if PTX:
        pair: tl.constexpr = (tl.float32, tl.float32)
        kinds: tl.constexpr = pair + pair + pair + pair
        return tl.inline_asm_elementwise(
            NUMBERS_OF_SPREAD,
            "=f,=f,=f,=f,=f,=f,=f,=f,r,h",
            [words, steps],
            dtype=kinds,
            is_pure=True,
            pack=1,
        )
    else:
        c0, c1, c2, c3, c4, c5, c6, c7 = spread_units(words, steps)
        c0, c1, c2, c3 = c0.to(tl.float32), c1.to(tl.float32), c2.to(tl.float32), c3.to(tl.float32)
        c4, c5, c6, c7 = c4.to(tl.float32), c5.to(tl.float32), c6.to(tl.float32), c7.to(tl.float32)
        return c0, c1, c2, c3, c4, c5, c6, c7


@jit
def steps_of_words(scales, rows: tl.constexpr, blocks: tl.constexpr):
    """What `word_units` takes for the two words of each block, bf16 [rows, 2 blocks]: E4M3 bits [rows, blocks]."""
    steps = unit_steps(scales)
    return tl.reshape(tl.join(steps, steps), [rows, blocks * 2])


@jit
def nvfp4_word_units(words, scales, rows: tl.constexpr, blocks: tl.constexpr):
    """code · s · 2⁻⁷ in bf16, exact: eight codes in each word, i32 [rows, 2 blocks], and E4M3 bits [rows, blocks]."""
    c0, c1, c2, c3, c4, c5, c6, c7 = word_units(words, steps_of_words(scales, rows, blocks))
    return in_order(c0, c1, c2, c3, c4, c5, c6, c7, rows, blocks * 16)


@jit
def nvfp4_spread_units(words, scales, rows: tl.constexpr, blocks: tl.constexpr):
    """As `nvfp4_word_units` of codes in the order of `nemoc.ir.nvfp4.spread`."""
    c0, c1, c2, c3, c4, c5, c6, c7 = spread_units(words, steps_of_words(scales, rows, blocks))
    return in_order(c0, c1, c2, c3, c4, c5, c6, c7, rows, blocks * 16)


@jit
def nvfp4_word_fp8(words, scales, rows: tl.constexpr, blocks: tl.constexpr):
    """The E4M3 numbers nearest to code · s / 8, ties to even; operands as of `nvfp4_word_units`.

    All that is rounded is exact in f16.
    """
    steps = (from_e4m3(scales) * 0.125).to(tl.float16)
    if PTX:
        first, second = tl.split(tl.reshape(words, [rows, blocks, 2]))
        kinds: tl.constexpr = (tl.int32, tl.int32, tl.int32, tl.int32)
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            FP8_OF_BLOCK,
            "=&r,=&r,=&r,=&r,r,r,h",
            [first, second, steps],
            dtype=kinds,
            is_pure=True,
            pack=1,
        )
        bits = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [rows, blocks * 4])
        return bytes_of(bits, rows, blocks * 16).to(tl.float8e4nv, bitcast=True)
    else:
        steps = tl.reshape(tl.join(steps, steps), [rows, blocks * 2])
        unit = tl.full([1, 1], 16384.0, tl.float16)
        c0, c1, c2, c3, c4, c5, c6, c7 = e2m1_eighths(words)
        c0, c1 = c0.to(tl.float16) * unit * steps, c1.to(tl.float16) * unit * steps
        c2, c3 = c2.to(tl.float16) * unit * steps, c3.to(tl.float16) * unit * steps
        c4, c5 = c4.to(tl.float16) * unit * steps, c5.to(tl.float16) * unit * steps
        c6, c7 = c6.to(tl.float16) * unit * steps, c7.to(tl.float16) * unit * steps
        return in_order(c0, c1, c2, c3, c4, c5, c6, c7, rows, blocks * 16).to(tl.float8e4nv)


@jit
def bytes_of(words, rows: tl.constexpr, columns: tl.constexpr):
    """The four bytes in each word (i32), the lowest first: i8 [rows, columns] of a quarter as many words."""
    b0, b1, b2, b3 = (
        words.to(tl.int8),
        (words >> 8).to(tl.int8),
        (words >> 16).to(tl.int8),
        (words >> 24).to(tl.int8),
    )
    return tl.reshape(tl.join(tl.join(b0, b2), tl.join(b1, b3)), [rows, columns])


@jit
def sums_of_blocks(x, codes, rows: tl.constexpr, blocks: tl.constexpr):
    """Σ over each block of 16 of x · code: f32 [rows, blocks]; x f32 [1, 16 blocks], the tiles of `e2m1_eighths`."""
    x = tl.broadcast_to(x, [1, blocks * 16])
    even, odd = tl.split(tl.reshape(x, [1, blocks * 2, 4, 2]))
    x04, x26 = tl.split(tl.reshape(even, [1, blocks * 2, 2, 2]))
    x15, x37 = tl.split(tl.reshape(odd, [1, blocks * 2, 2, 2]))
    x0, x4 = tl.split(x04)
    x1, x5 = tl.split(x15)
    x2, x6 = tl.split(x26)
    x3, x7 = tl.split(x37)
    c0, c1, c2, c3, c4, c5, c6, c7 = codes
    near = x0 * c0 + x1 * c1 + x2 * c2 + x3 * c3
    halves = near + x4 * c4 + x5 * c5 + x6 * c6 + x7 * c7
    first, second = tl.split(tl.reshape(halves, [rows, blocks, 2]))
    return first + second


@jit
def dot_nvfp4(a, a_scales, b, b_scales, acc):
    """acc + a · bᵀ of codes by twos, u8 [M, K/2] and [N, K/2], times E4M3 bits of scales [M, K/16] and [N, K/16]."""
    a_scales = a_scales.to(tl.float8e4nv, bitcast=True)
    b_scales = b_scales.to(tl.float8e4nv, bitcast=True)
    kind: tl.constexpr = tl.constexpr("e2m1")  # the interpreter would leave it a plain text
    return tl.dot_scaled(a, a_scales, kind, tl.trans(b), b_scales, kind, acc)


@jit
def dot_fp8(a, b, acc, exact: tl.constexpr):
    """acc + a · b of E4M3 bits (u8), a [M, K] and b [K, N]; products are exact.

    Hopper's matrix units add them up with fewer bits than f32 has. `exact` sums go into f32 after 128 products, which
    costs a quarter of the speed where there are many rows; others stay in the units.
    """
    a = a.to(tl.float8e4nv, bitcast=True)
    b = b.to(tl.float8e4nv, bitcast=True)
    if exact and a.shape[1] >= 128:
        return tl.dot(a, b, acc, max_num_imprecise_acc=128)
    else:
        return tl.dot(a, b, acc)


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


@jit
def quarters(tile, rows: tl.constexpr):
    """Four tiles [rows, lanes] of one [rows, 4 lanes]: element 4t + j of a row is element t of tile j."""
    lanes: tl.constexpr = tile.shape[1] // 4
    even, odd = tl.split(tl.reshape(tile, [rows, lanes, 2, 2]))
    q0, q2 = tl.split(even)
    q1, q3 = tl.split(odd)
    return q0, q1, q2, q3


@jit
def halves(tile, rows: tl.constexpr):
    """Two tiles [rows, lanes] of one [rows, 2 lanes]: element 2t + j of a row is element t of tile j."""
    lanes: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.reshape(tile, [rows, lanes, 2]))


@jit
def eighths(tile, rows: tl.constexpr):
    """Eight tiles [rows, lanes] of one [rows, 8 lanes]: element 8t + j of a row is element t of tile j."""
    lanes: tl.constexpr = tile.shape[1] // 8
    even, odd = tl.split(tl.reshape(tile, [rows, lanes, 2, 2, 2]))
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x1, x5 = tl.split(x15)
    x2, x6 = tl.split(x26)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@jit
def fragment_dot(low, high, x, sums):
    """`sums` plus products of two rows of weights in each lane with a row of x.

    All are tuples of tiles [8 · parts, 4], whose element (8p + r, t) is lane 4r + t's of warp p, as matrix units have
    their operands: `low` and `high` eight bf16 numbers of rows r and r + 8 of the weights, and `x` eight of row r of x,
    all at the same eight places of the reduction, which are other ones in each t and p. The four sums, f32, are those
    of the weights' row r with rows 2t and 2t + 1 of x, and of row r + 8 with the same. (PTX ISA, "Matrix Fragments for
    mma.m16n8k16 with floating point type"; which place of the reduction is where does not matter to a sum.)
    """
    if PTX:
        kinds: tl.constexpr = (tl.float32, tl.float32, tl.float32, tl.float32)
        return tl.inline_asm_elementwise(
            PRODUCT_OF_EIGHTS,
            "=&f,=&f,=&f,=&f,h,h,h,h,h,h,h,h,h,h,h,h,h,h,h,h,h,h,h,h,h,h,h,h,f,f,f,f",
            low + high + x + sums,
            dtype=kinds,
            is_pure=True,
            pack=1,
        )
    else:
        a0, a1, a2, a3, a4, a5, a6, a7 = low
        b0, b1, b2, b3, b4, b5, b6, b7 = high
        x0, x1, x2, x3, x4, x5, x6, x7 = x
        s0, s1, s2, s3 = sums
        near = fragment_terms(a0, x0) + fragment_terms(a1, x1) + fragment_terms(a2, x2)
        near += fragment_terms(a3, x3) + fragment_terms(a4, x4) + fragment_terms(a5, x5)
        near += fragment_terms(a6, x6) + fragment_terms(a7, x7)
        far = fragment_terms(b0, x0) + fragment_terms(b1, x1) + fragment_terms(b2, x2)
        far += fragment_terms(b3, x3) + fragment_terms(b4, x4) + fragment_terms(b5, x5)
        far += fragment_terms(b6, x6) + fragment_terms(b7, x7)
        d0, d1 = fragment_columns(near)
        d2, d3 = fragment_columns(far)
        return s0 + d0, s1 + d1, s2 + d2, s3 + d3


@jit
def fragment_terms(a, x):
    """What eight lanes' numbers of four t make with those of eight others: f32 [parts, 8 of a, 8 of x, 4]."""
    parts: tl.constexpr = a.shape[0] // 8
    wide = tl.reshape(a.to(tl.float32), [parts, 8, 1, 4])
    return wide * tl.reshape(x.to(tl.float32), [parts, 1, 8, 4])


@jit
def fragment_columns(terms):
    """Sums over t of what `fragment_terms` makes, where lanes have them: those of even rows of x, and of odd ones."""
    parts: tl.constexpr = terms.shape[0]
    sums = tl.reshape(tl.sum(terms, axis=3), [parts, 8, 4, 2])
    even, odd = tl.split(sums)
    return tl.reshape(even, [parts * 8, 4]), tl.reshape(odd, [parts * 8, 4])


@jit
def fragment_sums(sums):
    """The tile f32 [8 rows of x, 16 of the weights · parts] of four sums of each lane of each warp (`fragment_dot`)."""
    s0, s1, s2, s3 = sums
    parts: tl.constexpr = s0.shape[0] // 8
    near = tl.join(tl.reshape(s0, [parts, 8, 4]), tl.reshape(s1, [parts, 8, 4]))
    far = tl.join(tl.reshape(s2, [parts, 8, 4]), tl.reshape(s3, [parts, 8, 4]))
    return tl.reshape(tl.permute(tl.join(near, far), [2, 3, 4, 1, 0]), [8, 16 * parts])


@jit
def sums_of_parts(tile, parts: tl.constexpr):
    """Σ over each `parts` elements of a row, 1, 2, 4 or 8, which come to one thread for it in one exchange."""
    if parts > 4:
        tile = sums_of_pairs(tile)
    if parts > 2:
        tile = sums_of_pairs(tile)
    if parts > 1:
        tile = sums_of_pairs(tile)
    return tile


@jit
def sums_of_pairs(tile):
    """The sum of each two elements of a row."""
    rows: tl.constexpr = tile.shape[0]
    columns: tl.constexpr = tile.shape[1] // 2
    even, odd = tl.split(tl.reshape(tile, [rows, columns, 2]))
    return even + odd


@jit
def beside(left, right):
    """Two tiles of one size as one that is twice as wide."""
    rows: tl.constexpr = left.shape[0]
    columns: tl.constexpr = left.shape[1]
    return tl.reshape(tl.permute(tl.join(left, right), [0, 2, 1]), [rows, 2 * columns])


@jit
def above(upper, lower):
    """Two tiles of one size as one that is twice as high."""
    rows: tl.constexpr = upper.shape[0]
    columns: tl.constexpr = upper.shape[1]
    return tl.reshape(tl.permute(tl.join(upper, lower), [2, 0, 1]), [2 * rows, columns])


@jit
def sum_of_eight(x, codes):
    """Σ x · code of eight tiles each, f32."""
    x0, x1, x2, x3, x4, x5, x6, x7 = x
    c0, c1, c2, c3, c4, c5, c6, c7 = codes
    near = x0 * c0 + x1 * c1 + x2 * c2 + x3 * c3
    return near + x4 * c4 + x5 * c5 + x6 * c6 + x7 * c7


@jit
def plus_eight(total, x, codes):
    """total + Σ x · code of eight tiles each, f32."""
    x0, x1, x2, x3, x4, x5, x6, x7 = x
    c0, c1, c2, c3, c4, c5, c6, c7 = codes
    near = total + x0 * c0 + x1 * c1 + x2 * c2 + x3 * c3
    return near + x4 * c4 + x5 * c5 + x6 * c6 + x7 * c7


@jit
def one_behind_the_other(first, second):
    """Two vectors of one size as one that is twice as long."""
    count: tl.constexpr = first.shape[0]
    return tl.reshape(tl.permute(tl.join(first, second), [1, 0]), [2 * count])
