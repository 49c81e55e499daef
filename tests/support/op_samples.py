"""Samples of every op, as IR text: some that hold, some that type inference refuses.

A new op needs an entry here and nothing else to be tested for inference, verification, both directions of
the text form, evaluation in both precisions and cost.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Samples:
    """Samples of one op; `sample_graph` makes a graph of each.

    Attributes:
        valid: arguments and nodes; the last node is the op.
        invalid: the same, with a part of the reason why they are refused.
    """

    valid: tuple[str, ...]
    invalid: tuple[tuple[str, str], ...]


def sample_graph(lines: str) -> str:
    """The text of a graph that returns what a sample's last node gives; states stay as they are.

    Lines may stand in any order that is right within arguments and within nodes.
    """
    stripped = [line.strip() for line in lines.strip().splitlines()]
    arguments = [line for line in stripped if re.match(r"(input|param|state) ", line)]
    nodes = [line for line in stripped if line not in arguments]
    results = nodes[-1].partition(" = ")[0]
    states = re.findall(r"^state (%[\w.]+)", "\n".join(arguments), re.MULTILINE)
    updates = [f"update {s} = {s}" for s in states]
    content = [*arguments, *nodes, f"return {results}", *updates]
    return "\n".join(["graph @sample {", *content, "}", ""])


def _unary(name: str, attributes: str = "") -> Samples:
    return Samples(
        (
            f"input %x: f32[B, 5]\n%y = {name}(%x){attributes} : f32[B, 5]",
            f"input %x: f64[3]\n%y = {name}(%x){attributes} : f64[3]",
        ),
        (
            (
                f"input %x: bf16[B, 5]\n%y = {name}(%x){attributes} : bf16[B, 5]",
                f"{name}: x is bf16, expected f32 or f64",
            ),
        ),
    )


def _binary(name: str) -> Samples:
    return Samples(
        (
            f"input %a: f32[B, 5]\ninput %b: f32[5]\n%y = {name}(%a, %b) : f32[B, 5]",
            f"input %a: f64[1, 4]\ninput %b: f64[B, 1]\n%y = {name}(%a, %b) : f64[B, 4]",
        ),
        (
            (
                f"input %a: f32[B]\ninput %b: f64[B]\n%y = {name}(%a, %b) : f32[B]",
                f"{name}: a is f32 but b is f64",
            ),
            (
                f"input %a: f32[3]\ninput %b: f32[4]\n%y = {name}(%a, %b) : f32[3]",
                f"{name}: shapes [3] and [4] do not broadcast",
            ),
            (
                f"input %a: bf16[3]\n%y = {name}(%a, %a) : bf16[3]",
                f"{name}: operands are bf16, expected f32",
            ),
        ),
    )


def _integer_binary(name: str) -> Samples:
    floats = _binary(name)
    whole = f"input %a: i32[B] < 9\ninput %b: i32[1] < 9\n%y = {name}(%a, %b) : i32[B]"
    return Samples((*floats.valid, whole), floats.invalid)


_CONV = """
    input %x: f32[B, L, 6]
    param %w: f32[6, 4]
    param %bias: f32[6]
    input %valid: i32[B] < L + 1
    state %s: f32[B, 3, 6]
"""
_SCAN = """
    input %x: f32[B, L, 4, 3]
    input %dt: f32[B, L, 4]
    input %b: f32[B, L, 2, 5]
    input %c: f32[B, L, 2, 5]
    param %a: f32[4]
    param %d: f32[4]
    input %valid: i32[B] < L + 1
    state %s: f32[B, 4, 3, 5]
    %step = softplus(%dt) : f32[B, L, 4]
    %exp = exp(%a) : f32[4]
    %decay = scale(%exp) {factor=-1.0} : f32[4]
"""
_UPDATE = """
    input %x: f32[B, 4, 3]
    input %dt: f32[B, 4]
    input %b: f32[B, 2, 5]
    input %c: f32[B, 2, 5]
    param %a: f32[4]
    param %d: f32[4]
    state %s: f32[B, 4, 3, 5]
    %step = softplus(%dt) : f32[B, 4]
    %exp = exp(%a) : f32[4]
    %decay = scale(%exp) {factor=-1.0} : f32[4]
"""
_CACHE = """
    input %rows: f32[B, L, 2, 4]
    state %cache: f32[B, C, 2, 4]
    state %lengths: i32[B] < C - L + 1
"""
_ATTENTION = """
    input %q: f32[B, L, 6, 4]
    input %k: f32[B, C, 2, 4]
    input %v: f32[B, C, 2, 4]
    input %lengths: i32[B] < C - L + 1
"""
_GROUPS = """
    input %index: i32[B, 2] < 3
    input %x: f32[2*B, 6]
    %order, %position, %offsets = group_by(%index) {groups=3} : i32[2*B], i32[2*B], i32[4]
"""
_SCALED = """
    param %w: f32[3, 32]
    %g = nvfp4_global_scale(%w) : f32[]
    %s = nvfp4_block_scales(%w, %g) : f8e4m3[3, 2]
"""
_SCALED_STACK = """
    param %w: bf16[2, 3, 48]
    %g = nvfp4_global_scale(%w) {dialect="compressed-tensors", four_over_six=true} : f32[2]
    %s = nvfp4_block_scales(%w, %g) {dialect="compressed-tensors", four_over_six=true} : f8e4m3[2, 3, 3]
"""

OP_SAMPLES: dict[str, Samples] = {
    "cast": Samples(
        (
            "input %x: f32[B, 5]\n%y = cast(%x) {dtype=bf16} : bf16[B, 5]",
            "input %x: i32[B] < 7\n%y = cast(%x) {dtype=f32} : f32[B]",
            "input %x: f8e4m3[4]\n%y = cast(%x) {dtype=f16} : f16[4]",
        ),
        (
            ("input %x: f32[5]\n%y = cast(%x) {dtype=f31} : f32[5]", "unknown element type"),
            ("input %x: f32[5]\n%y = cast(%x) : f32[5]", "lacks the attributes dtype"),
            ("input %x: f32[5]\n%y = cast(%x) {dtype=f16} : f32[5]", "gives f16[5], but the text"),
        ),
    ),
    "exp": _unary("exp"),
    "relu": _unary("relu"),
    "square": _unary("square"),
    "sigmoid": _unary("sigmoid"),
    "silu": _unary("silu"),
    "tanh": _unary("tanh"),
    "gelu": _unary("gelu", " {tanh=true}"),
    "softplus": _unary("softplus"),
    "scale": _unary("scale", " {factor=-2.5}"),
    "shift": _unary("shift", " {amount=1e-05}"),
    "add": _integer_binary("add"),
    "sub": _integer_binary("sub"),
    "mul": _integer_binary("mul"),
    "div": _binary("div"),
    "floor_div": Samples(
        ("input %x: i32[B] < 100\n%y = floor_div(%x) {divisor=7} : i32[B]",),
        (
            ("input %x: f32[B]\n%y = floor_div(%x) {divisor=7} : f32[B]", "x is f32"),
            ("input %x: i32[B]\n%y = floor_div(%x) {divisor=0} : i32[B]", "divisor is 0"),
        ),
    ),
    "full": Samples(
        (
            "input %x: f32[B]\n%y = full() {value=-inf, dtype=f32, shape=[B, 2]} : f32[B, 2]",
            "%y = full() {value=3.0, dtype=i64} : i64[]",
        ),
        (("%y = full() {value=3.0, dtype=i64, shape=[2]} : i64[3]", "gives i64[2]"),),
    ),
    "reshape": Samples(
        (
            "input %x: f32[B, L, 6]\n%y = reshape(%x) {shape=[B*L, 2, 3]} : f32[B*L, 2, 3]",
            "input %x: f32[1, 1]\n%y = reshape(%x) {shape=[]} : f32[]",
        ),
        (("input %x: f32[B, 6]\n%y = reshape(%x) {shape=[B, 7]} : f32[B, 7]", "has 6*B elements"),),
    ),
    "permute": Samples(
        ("input %x: i64[B, 3, L]\n%y = permute(%x) {axes=[2, 0, 1]} : i64[L, B, 3]",),
        (("input %x: f32[3, 4]\n%y = permute(%x) {axes=[0, 0]} : f32[3, 3]", "do not permute"),),
    ),
    "slice": Samples(
        ("input %x: bf16[B, 7]\n%y = slice(%x) {axis=1, start=2, stop=5} : bf16[B, 3]",),
        (
            ("input %x: f32[7]\n%y = slice(%x) {axis=1, start=2, stop=5} : f32[3]", "axis 1"),
            ("input %x: f32[7]\n%y = slice(%x) {axis=0, start=2, stop=8} : f32[6]", "2:8"),
            ("input %x: f32[7]\n%y = slice(%x) {axis=0, start=2, stop=2} : f32[0]", "2:2"),
        ),
    ),
    "concat": Samples(
        (
            "input %a: f32[B, 2]\ninput %b: f32[L, 2]\n"
            "%y = concat([%a, %b]) {axis=0} : f32[B + L, 2]",
            "input %a: i32[3] < 4\n%y = concat([%a, %a]) {axis=0} : i32[6]",
        ),
        (
            ("%y = concat([]) {axis=0} : f32[6]", "no operands"),
            (
                "input %a: f32[3, 2]\ninput %b: f32[3, 4]\n"
                "%y = concat([%a, %b]) {axis=0} : f32[6, 2]",
                "does not fit",
            ),
        ),
    ),
    "sum": Samples(
        ("input %x: f32[B, L, 3]\n%y = sum(%x) {axis=1} : f32[B, 3]",),
        (
            ("input %x: i32[B, 3]\n%y = sum(%x) {axis=1} : i32[B]", "x is i32"),
            ("input %x: f32[B, 3]\n%y = sum(%x) {axis=2} : f32[B]", "axis 2"),
        ),
    ),
    "take_rows": Samples(
        (
            "param %t: bf16[9, 4]\ninput %i: i64[B, L] < 9\n%y = take_rows(%t, %i) : bf16[B, L, 4]",
            "param %t: f32[9]\ninput %i: i32[B] < 9\n%y = take_rows(%t, %i) : f32[B]",
        ),
        (
            (
                "param %t: f32[9, 4]\ninput %i: f32[B]\n%y = take_rows(%t, %i) : f32[B, 4]",
                "index is f32",
            ),
        ),
    ),
    "take_along": Samples(
        ("input %x: f32[B, 9]\ninput %i: i32[B, 2] < 9\n%y = take_along(%x, %i) : f32[B, 2]",),
        (
            (
                "input %x: f32[B, 9]\ninput %i: i32[L, 2] < 9\n%y = take_along(%x, %i) : f32[L, 2]",
                "does not index the last axis",
            ),
        ),
    ),
    "take_last": Samples(
        (
            "input %x: f32[B, L, 3]\ninput %valid: i32[B] < L + 1\n"
            "%y = take_last(%x, %valid) : f32[B, 3]",
        ),
        (
            (
                "input %x: f32[B, L, 3]\ninput %valid: i64[B] < L + 1\n"
                "%y = take_last(%x, %valid) : f32[B, 3]",
                "valid is i64[B], expected i32[B]",
            ),
        ),
    ),
    "linear": Samples(
        (
            "input %x: f32[B, L, 6]\nparam %w: bf16[5, 6]\n%y = linear(%x, %w) : f32[B, L, 5]",
            "input %x: bf16[B, 6]\nparam %w: bf16[5, 6]\n%y = linear(%x, %w) : f32[B, 5]",
            "input %x: bf16[B, 6]\nparam %w: f32[5, 6]\n%y = linear(%x, %w) : f32[B, 5]",
            "input %x: f64[B, 6]\nparam %w: f32[3, 6, 2]\n"
            "%y = linear(%x, %w) {acc=f64, interleave=2, features=5} : f64[B, 5]",
        ),
        (
            (
                "input %x: f32[B, 6]\nparam %w: f32[5, 7]\n%y = linear(%x, %w) : f32[B, 5]",
                "x has 6 columns but w reduces 7",
            ),
            (
                "input %x: f32[B, 6]\nparam %w: f32[3, 6, 2]\n"
                "%y = linear(%x, %w) {interleave=2, features=7} : f32[B, 7]",
                "does not hold 7 rows interleaved by 2",
            ),
            (
                "input %x: f32[B, 6]\nparam %w: f32[5, 6]\n"
                "%y = linear(%x, %w) {acc=i32} : i32[B, 5]",
                "acc is i32",
            ),
        ),
    ),
    "grouped_linear": Samples(
        (
            f"{_GROUPS}\nparam %w: f32[3, 5, 6]\n"
            "%y = grouped_linear(%x, %w, %offsets) : f32[2*B, 5]",
            f"{_GROUPS}\nparam %w: bf16[3, 2, 6, 4]\n"
            "%y = grouped_linear(%x, %w, %offsets) {interleave=4, features=5} : f32[2*B, 5]",
        ),
        (
            (
                f"{_GROUPS}\nparam %w: f32[4, 5, 6]\n"
                "%y = grouped_linear(%x, %w, %offsets) : f32[2*B, 5]",
                "offsets is i32[4], expected i32[5]",
            ),
            (
                f"{_GROUPS}\nparam %w: f32[5, 6]\n"
                "%y = grouped_linear(%x, %w, %offsets) : f32[2*B, 5]",
                "expected rank 3",
            ),
        ),
    ),
    "interleave": Samples(
        (
            "param %w: bf16[5, 3]\n%y = interleave(%w) {block=4} : bf16[2, 3, 4]",
            "param %w: f32[2, 8, 3]\n%y = interleave(%w) {block=4} : f32[2, 2, 3, 4]",
        ),
        (
            ("param %w: f32[5]\n%y = interleave(%w) {block=4} : f32[2, 4]", "expected rank ≥ 2"),
            ("param %w: f32[5, 3]\n%y = interleave(%w) {block=1} : f32[5, 3, 1]", "block is 1"),
        ),
    ),
    "nvfp4_global_scale": Samples(
        (
            "param %w: bf16[5, 32]\n%g = nvfp4_global_scale(%w) : f32[]",
            "input %w: f32[B, 5, 16]\n"
            '%g = nvfp4_global_scale(%w) {dialect="torchao", four_over_six=true} : f32[B]',
        ),
        (
            ("param %w: f64[5, 32]\n%g = nvfp4_global_scale(%w) : f32[]", "w is f64[5, 32]"),
            ("param %w: f32[32]\n%g = nvfp4_global_scale(%w) : f32[]", "of rank ≥ 2"),
            (
                "param %w: f32[5, 24]\n%g = nvfp4_global_scale(%w) : f32[]",
                "w is f32[5, 24], expected whole blocks of 16 columns",
            ),
            ("param %w: f32[5, B]\n%g = nvfp4_global_scale(%w) : f32[]", "whole blocks of 16"),
            ("param %w: f32[0, 16]\n%g = nvfp4_global_scale(%w) : f32[]", "whole blocks of 16"),
            (
                'param %w: f32[5, 32]\n%g = nvfp4_global_scale(%w) {dialect="mx"} : f32[]',
                "dialect is 'mx', expected one of modelopt, torchao, compressed-tensors",
            ),
        ),
    ),
    "nvfp4_block_scales": Samples(
        (
            _SCALED,
            _SCALED_STACK,
            "input %w: f32[B, 5, 32]\nparam %r: f32[5, 16]\n%g = nvfp4_global_scale(%r) : f32[]\n"
            "%s = nvfp4_block_scales(%w, %g) : f8e4m3[B, 5, 2]",
        ),
        (
            (
                "param %w: f32[5, 40]\nparam %g: f32[]\n"
                "%s = nvfp4_block_scales(%w, %g) : f8e4m3[5, 2]",
                "whole blocks of 16 columns",
            ),
            (
                "param %w: f32[2, 5, 32]\nparam %g: f32[5]\n"
                "%s = nvfp4_block_scales(%w, %g) : f8e4m3[2, 5, 2]",
                "global_scale is f32[5], expected f32[2]",
            ),
        ),
    ),
    "quantize_nvfp4": Samples(
        (
            f"{_SCALED}\n%q = quantize_nvfp4(%w, %s, %g) : u8[3, 16]",
            f"{_SCALED_STACK}\n%q = quantize_nvfp4(%w, %s, %g) "
            '{dialect="compressed-tensors"} : u8[2, 3, 24]',
        ),
        (
            (
                f"{_SCALED}\n%q = quantize_nvfp4(%w, %w, %g) : u8[3, 16]",
                "scales is f32[3, 32], expected f8e4m3[3, 2]",
            ),
            (
                f"{_SCALED}\n%q = quantize_nvfp4(%w, %s, %s) : u8[3, 16]",
                "global_scale is f8e4m3[3, 2], expected f32[]",
            ),
        ),
    ),
    "dequantize_nvfp4": Samples(
        (
            "param %q: u8[5, 16] < 256\nparam %s: f8e4m3[5, 2]\nparam %g: f32[]\n"
            "%y = dequantize_nvfp4(%q, %s, %g) : f32[5, 32]",
            "input %q: u8[B, 5, 8] < 256\ninput %s: f8e4m3[B, 5, 1]\ninput %g: f32[B]\n"
            '%y = dequantize_nvfp4(%q, %s, %g) {dialect="compressed-tensors"} : f32[B, 5, 16]',
        ),
        (
            (
                "param %q: u8[5, 12]\nparam %s: f8e4m3[5, 1]\nparam %g: f32[]\n"
                "%y = dequantize_nvfp4(%q, %s, %g) : f32[5, 24]",
                "packed is u8[5, 12], expected whole blocks of 8 columns",
            ),
            (
                "param %q: i8[5, 8]\nparam %s: f8e4m3[5, 1]\nparam %g: f32[]\n"
                "%y = dequantize_nvfp4(%q, %s, %g) : f32[5, 16]",
                "packed is i8[5, 8], expected u8",
            ),
            (
                "param %q: u8[5, 8]\nparam %s: f8e4m3[5, 2]\nparam %g: f32[]\n"
                "%y = dequantize_nvfp4(%q, %s, %g) : f32[5, 16]",
                "scales is f8e4m3[5, 2], expected f8e4m3[5, 1]",
            ),
            (
                "param %q: u8[5, 8]\nparam %s: f8e4m3[5, 1]\nparam %g: f32[]\n"
                '%y = dequantize_nvfp4(%q, %s, %g) {dialect="gguf"} : f32[5, 16]',
                "dialect is 'gguf'",
            ),
        ),
    ),
    "nvfp4_to_fp8": Samples(
        (
            "param %q: u8[5, 16] < 256\nparam %s: f8e4m3[5, 2]\n"
            "%y = nvfp4_to_fp8(%q, %s) : f8e4m3[5, 32]",
            "param %q: u8[2, 5, 8] < 256\nparam %s: f8e4m3[2, 5, 1]\n"
            "%y = nvfp4_to_fp8(%q, %s) : f8e4m3[2, 5, 16]",
        ),
        (
            (
                "param %q: u8[8]\nparam %s: f8e4m3[1]\n%y = nvfp4_to_fp8(%q, %s) : f8e4m3[16]",
                "packed is u8[8], expected u8 of rank ≥ 2",
            ),
            (
                "param %q: u8[5, 8]\nparam %s: f8e4m3[5, 2]\n"
                "%y = nvfp4_to_fp8(%q, %s) : f8e4m3[5, 16]",
                "scales is f8e4m3[5, 2], expected f8e4m3[5, 1]",
            ),
        ),
    ),
    "spread_codes": Samples(
        (
            "param %q: u8[5, 16] < 256\n%y = spread_codes(%q) : u8[5, 16]",
            "param %q: u8[2, 3, 8] < 256\n%y = spread_codes(%q) : u8[2, 3, 8]",
        ),
        (
            (
                "param %q: u8[8]\n%y = spread_codes(%q) : u8[8]",
                "packed is u8[8], expected u8 of rank",
            ),
            (
                "param %q: u8[2, 12]\n%y = spread_codes(%q) : u8[2, 12]",
                "expected whole blocks of 8",
            ),
        ),
    ),
    "swizzle_scales": Samples(
        (
            "param %s: f8e4m3[130, 6]\n%y = swizzle_scales(%s) : f8e4m3[2, 2, 32, 4, 4]",
            "param %s: f8e4m3[2, 7, 4]\n%y = swizzle_scales(%s) : f8e4m3[2, 1, 1, 32, 4, 4]",
        ),
        (
            ("param %s: u8[8, 4]\n%y = swizzle_scales(%s) : u8[1, 1, 32, 4, 4]", "expected f8e4m3"),
            ("param %s: f8e4m3[8]\n%y = swizzle_scales(%s) : f8e4m3[8]", "of rank ≥ 2"),
        ),
    ),
    "fp8_scale": Samples(
        (
            "param %w: bf16[5, 12]\n%g = fp8_scale(%w) : f32[]",
            "param %w: f32[2, 5, 12]\n%g = fp8_scale(%w) : f32[2]",
        ),
        (
            ("param %w: f32[5]\n%g = fp8_scale(%w) : f32[]", "w is f32[5], expected f32, bf16"),
            ("param %w: i32[5, 4]\n%g = fp8_scale(%w) : f32[]", "w is i32[5, 4], expected f32"),
            ("param %w: f32[0, 16]\n%g = fp8_scale(%w) : f32[]", "not empty"),
        ),
    ),
    "quantize_fp8": Samples(
        (
            "param %w: f32[5, 12]\n%g = fp8_scale(%w) : f32[]\n"
            "%q = quantize_fp8(%w, %g) : f8e4m3[5, 12]",
            "param %w: bf16[2, 5, 12]\n%g = fp8_scale(%w) : f32[2]\n"
            "%q = quantize_fp8(%w, %g) : f8e4m3[2, 5, 12]",
            "param %w: f32[2, 5, 12]\n%g = full() {value=0.01, dtype=f32} : f32[]\n"
            "%q = quantize_fp8(%w, %g) : f8e4m3[2, 5, 12]",
        ),
        (
            (
                "param %w: f32[2, 5, 12]\nparam %g: f32[5]\n"
                "%q = quantize_fp8(%w, %g) : f8e4m3[2, 5, 12]",
                "scale is f32[5], expected f32[2] or f32[]",
            ),
        ),
    ),
    "rms_norm": Samples(
        (
            "input %x: f32[B, L, 6]\nparam %w: f32[6]\n"
            "%y = rms_norm(%x, %w) {eps=1e-05} : f32[B, L, 6]",
            "input %x: f64[B, 6]\nparam %w: f64[6]\n"
            "%y = rms_norm(%x, %w) {eps=0.1, groups=3} : f64[B, 6]",
        ),
        (
            (
                "input %x: f32[B, 6]\nparam %w: f32[6]\n"
                "%y = rms_norm(%x, %w) {eps=0.1, groups=4} : f32[B, 6]",
                "6 columns do not divide into 4 groups",
            ),
            (
                "input %x: f32[B, 6]\nparam %w: f32[5]\n"
                "%y = rms_norm(%x, %w) {eps=0.1} : f32[B, 6]",
                "weight is f32[5], expected f32[6]",
            ),
            ("input %x: f32[]\nparam %w: f32[6]\n%y = rms_norm(%x, %w) {eps=0.1} : f32[]", "rank"),
        ),
    ),
    "round_to_int8": Samples(
        (
            "input %x: f32[B, L, 32]\n%y = round_to_int8(%x) : f32[B, L, 32]",
            "param %x: f32[3, 6]\n%y = round_to_int8(%x) {block=3} : f32[3, 6]",
        ),
        (
            (
                "input %x: f32[B, 24]\n%y = round_to_int8(%x) : f32[B, 24]",
                "x is f32[B, 24], expected whole blocks of 16 columns",
            ),
            (
                "input %x: f32[B, L]\n%y = round_to_int8(%x) {block=1} : f32[B, L]",
                "expected whole blocks of 1 columns",
            ),
            (
                "input %x: bf16[B, 16]\n%y = round_to_int8(%x) : bf16[B, 16]",
                "x is bf16, expected f32",
            ),
        ),
    ),
    "group_limit": Samples(
        ("input %x: f32[B, 8]\n%y = group_limit(%x) {groups=4, keep=2, fill=-inf} : f32[B, 8]",),
        (
            (
                "input %x: f32[B, 8]\n%y = group_limit(%x) {groups=8, keep=2} : f32[B, 8]",
                "8 experts do not divide into 8 groups of 2 or more",
            ),
            (
                "input %x: f32[B, 8]\n%y = group_limit(%x) {groups=4, keep=5} : f32[B, 8]",
                "cannot keep 5 of 4 groups",
            ),
        ),
    ),
    "top_k": Samples(
        ("input %x: f32[B, 8]\n%y = top_k(%x) {k=3} : i32[B, 3]",),
        (("input %x: f32[B, 8]\n%y = top_k(%x) {k=9} : i32[B, 9]", "k is 9 of 8 columns"),),
    ),
    "group_by": Samples(
        (
            "input %i: i32[B, 2] < 5\n"
            "%order, %position, %offsets = group_by(%i) {groups=5} : i32[2*B], i32[2*B], i32[6]",
        ),
        (
            (
                "input %i: i32[B] < 5\n"
                "%order, %position, %offsets = group_by(%i) {groups=5} : i32[B], i32[B], i32[6]",
                "expected i32 of rank 2",
            ),
            (
                "input %i: i32[B, 2] < 5\n%order = group_by(%i) {groups=5} : i32[2*B]",
                "the text says 1 values",
            ),
        ),
    ),
    "causal_conv": Samples(
        (
            f"{_CONV}\n%y, %t = causal_conv(%x, %w, %bias, %s, %valid) : f32[B, L, 6], f32[B, 3, 6]",
            f"{_CONV}\n%y, %t = causal_conv(%x, %w, _, %s, %valid) : f32[B, L, 6], f32[B, 3, 6]",
        ),
        (
            (
                f"{_CONV}\n%y, %t = causal_conv(%x, %w, %w, %s, %valid) : "
                "f32[B, L, 6], f32[B, 3, 6]",
                "bias is f32[6, 4], expected f32[6]",
            ),
        ),
    ),
    "ssd_scan": Samples(
        (
            f"{_SCAN}\n%y, %t = ssd_scan(%x, %step, %decay, %b, %c, %d, %s, %valid) : "
            "f32[B, L, 4, 3], f32[B, 4, 3, 5]",
            f"{_SCAN}\n%y, %t = ssd_scan(%x, %step, %decay, %b, %c, _, %s, %valid) : "
            "f32[B, L, 4, 3], f32[B, 4, 3, 5]",
        ),
        (
            (
                f"{_SCAN}\n%y, %t = ssd_scan(%x, %step, %b, %b, %c, %d, %s, %valid) : "
                "f32[B, L, 4, 3], f32[B, 4, 3, 5]",
                "a is f32[B, L, 2, 5], expected f32[4]",
            ),
        ),
    ),
    "ssd_update": Samples(
        (
            f"{_UPDATE}\n%y, %t = ssd_update(%x, %step, %decay, %b, %c, %d, %s) : "
            "f32[B, 4, 3], f32[B, 4, 3, 5]",
            f"{_UPDATE}\n%y, %t = ssd_update(%x, %step, %decay, %b, %c, _, %s) : "
            "f32[B, 4, 3], f32[B, 4, 3, 5]",
        ),
        (
            (
                f"{_UPDATE}\n%y, %t = ssd_update(%x, %step, %decay, %b, %c, %d, %x) : "
                "f32[B, 4, 3], f32[B, 4, 3, 5]",
                "state is f32[B, 4, 3], expected f32[B, 4, 3, 5]",
            ),
        ),
    ),
    "cache_write": Samples(
        (f"{_CACHE}\n%y = cache_write(%cache, %rows, %lengths) : f32[B, C, 2, 4]",),
        (
            (
                f"{_CACHE}\n%y = cache_write(%cache, %lengths, %lengths) : f32[B, C, 2, 4]",
                "rows is i32[B], expected rank 4",
            ),
        ),
    ),
    "attention": Samples(
        (f"{_ATTENTION}\n%y = attention(%q, %k, %v, %lengths) {{scale=0.5}} : f32[B, L, 6, 4]",),
        (
            (
                f"{_ATTENTION}\n%y = attention(%q, %k, %q, %lengths) {{scale=0.5}} : "
                "f32[B, L, 6, 4]",
                "v is f32[B, L, 6, 4], expected f32[B, C, 2, 4]",
            ),
        ),
    ),
    "fused": Samples(
        (
            "input %x: f32[B, 5]\n"
            '%y, %z = fused([%x]) {kind="rows"} : f32[B, 5], f32[B, 5] { input %x: f32[B, 5]'
            " %a = silu(%x) : f32[B, 5] %b = square(%a) : f32[B, 5] return %a, %b }",
        ),
        (
            (
                "input %x: f32[B, 5]\n"
                "%y = fused([%x]) : f32[B, 4] { input %x: f32[B, 4] return %x }",
                "do not fit the body's inputs",
            ),
        ),
    ),
    "folded": Samples(
        (
            "param %w: bf16[4, 3]\n"
            "%y = folded([%w]) : f32[4, 3] { input %p: bf16[4, 3]"
            " %a = cast(%p) {dtype=f32} : f32[4, 3] return %a }",
        ),
        (
            (
                "param %w: bf16[4, 3]\n"
                "%y = folded([%w]) : f32[4, 3] { input %p: f32[4, 3] return %p }",
                "do not fit the body's inputs",
            ),
            (
                "param %w: bf16[4, 3]\n"
                "%y = folded([%w]) : bf16[4, 3] { input %p: bf16[4, 3] param %q: f32[3] return %p }",
                "parameters or states of its own",
            ),
        ),
    ),
}
"""By the op's name in text."""
