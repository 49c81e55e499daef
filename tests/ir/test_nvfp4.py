"""NVFP4: cases computed by hand, properties, and other libraries' bits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemoc.ir import Builder, DType, Env, Graph, IRError, NemocError, TensorType, Value, ops
from nemoc.ir.folding import stream
from nemoc.ir.interpreter import interpret
from nemoc.ir.nvfp4 import DIALECTS, decode, gathered, spread
from nemoc.ir.ops.fp8 import dequantized_fp8, nvfp4_in_fp8
from nemoc.ir.ops.nvfp4 import quantized
from nemoc.ir.params import InMemory
from nemoc.passes import PassContext
from nemoc.passes.check import same_bits
from nemoc.passes.fold_constants import FoldConstants
from support.nvfp4_peers import PEERS, Written

GOLDEN = Path(__file__).parent.parent / "golden" / "nvfp4" / "libraries.json"
CODES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
CUTS = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
F32, E4M3 = torch.float32, torch.float8_e4m3fn
ENV = Env({})

every_dialect = pytest.mark.parametrize("dialect", list(DIALECTS))


def _value(tensor: torch.Tensor) -> Value:
    return Value("x", TensorType.of(DType.of(tensor), tuple(tensor.shape)))


def _scale_of(w: torch.Tensor, dialect: str, four_over_six: bool = False) -> torch.Tensor:
    return ops.Nvfp4GlobalScale(_value(w), dialect, four_over_six).evaluate(ENV, w)


def _scales_of(
    w: torch.Tensor, g: torch.Tensor, dialect: str, four_over_six: bool = False
) -> torch.Tensor:
    op = ops.Nvfp4BlockScales(_value(w), _value(g), dialect, four_over_six)
    assert op.infer().dtype is DType.F8E4M3
    return op.evaluate(ENV, w, g)


def _packed(w: torch.Tensor, s: torch.Tensor, g: torch.Tensor, dialect: str) -> torch.Tensor:
    op = ops.QuantizeNvfp4(_value(w), _value(s), _value(g), dialect)
    assert op.infer().dtype is DType.U8
    return op.evaluate(ENV, w, s, g)


def _dequantized(
    packed: torch.Tensor, s: torch.Tensor, g: torch.Tensor, dialect: str
) -> torch.Tensor:
    op = ops.DequantizeNvfp4(_value(packed), _value(s), _value(g), dialect)
    assert op.infer().dtype is DType.F32
    return op.evaluate(ENV, packed, s, g)


def _round_trip(w: torch.Tensor, dialect: str, four_over_six: bool = False) -> Written:
    g = _scale_of(w, dialect, four_over_six)
    s = _scales_of(w, g, dialect, four_over_six)
    packed = _packed(w, s, g, dialect)
    return Written(packed, s, g, _dequantized(packed, s, g, dialect))


def _codes(packed: torch.Tensor) -> list[int]:
    """The codes of one row."""
    return [code for byte in packed.flatten().tolist() for code in (byte & 15, byte >> 4)]


def _row(*elements: float) -> torch.Tensor:
    """A row of whole blocks, zeros at its end."""
    return torch.tensor([[*elements, *([0.0] * (-len(elements) % 16))]])


def _e4m3(*scales: float) -> torch.Tensor:
    return torch.tensor([scales]).to(E4M3)


ONE = torch.tensor(1.0)


# -- by hand --


@every_dialect
def test_every_code_stands_for_itself(dialect: str) -> None:
    w = 448 * _row(*CODES, *(-x for x in CODES[1:]))
    packed = _packed(w, _e4m3(448.0), ONE, dialect)
    assert _codes(packed) == [*range(8), *range(9, 16), 0]
    assert _scales_of(w, ONE, dialect).tolist() == [[448.0]]
    assert torch.equal(_dequantized(packed, _e4m3(448.0), ONE, dialect), w)


def test_the_even_element_is_in_the_low_half() -> None:
    assert _packed(_row(0.5, 6.0), _e4m3(1.0), ONE, "modelopt").tolist()[0][:2] == [0x71, 0]


@every_dialect
@pytest.mark.parametrize("sign", [0, 8])
def test_ties_go_to_the_even_mantissa(dialect: str, sign: int) -> None:
    ties = torch.tensor([CUTS])
    above, below = (
        torch.nextafter(ties, torch.tensor(9.0)),
        torch.nextafter(ties, torch.tensor(0.0)),
    )
    direction = -1 if sign else 1
    for x, expected in (
        (ties, [0, 2, 2, 4, 4, 6, 6]),
        (above, [1, 2, 3, 4, 5, 6, 7]),
        (below, [0, 1, 2, 3, 4, 5, 6]),
    ):
        w = direction * _row(*x[0].tolist())
        got = _codes(_packed(w, _e4m3(1.0), ONE, dialect))
        assert got[:7] == [code | sign for code in expected]


@every_dialect
def test_beyond_the_largest_code_is_the_largest_code(dialect: str) -> None:
    w = _row(6.5, -7.0, 1e30)
    assert _codes(_packed(w, _e4m3(1.0), ONE, dialect))[:3] == [7, 15, 7]


def test_the_worked_example() -> None:
    """Of a tensor with largest magnitude 1, a block with largest magnitude 0.7."""
    w = torch.cat([_row(1.0), _row(0.7, -0.1)], 1)
    got = _round_trip(w, "modelopt")
    assert got.global_scale.item() == pytest.approx(3.7202e-4, rel=1e-4)
    assert got.scales.tolist() == [[448.0, 320.0]]
    assert _codes(got.packed)[16:18] == [7, 10]
    assert got.dequantized[0, 16:18].tolist() == pytest.approx([0.714286, -0.119048], rel=1e-5)


@pytest.mark.parametrize(
    ("dialect", "expected"), [("modelopt", 1.0), ("torchao", 2**-6), ("compressed-tensors", 0.125)]
)
def test_blocks_and_tensors_of_zeros(dialect: str, expected: float) -> None:
    w = torch.cat([_row(3.0), _row(0.0)], 1)
    got = _round_trip(w, dialect)
    assert got.scales.tolist()[0][1] == expected
    assert not got.packed[0, 8:].any() and not got.dequantized[0, 16:].any()
    nothing = torch.zeros(2, 3, 32)
    got = _round_trip(nothing, dialect)
    assert got.global_scale.tolist() == [1.0 if dialect == "compressed-tensors" else 0.0] * 2
    assert set(got.scales.flatten().tolist()) == {expected}
    assert not got.packed.any() and torch.equal(got.dequantized, nothing)


@pytest.mark.parametrize(
    ("dialect", "expected"),
    [
        ("modelopt", [3 * 2**-9, 2**-9, 2**-9]),
        ("torchao", [2**-6, 2**-6, 2**-6]),
        ("compressed-tensors", [3 * 2**-9, 2**-9, 0.125]),
    ],
)
def test_block_scales_below_the_normal_range(dialect: str, expected: list[float]) -> None:
    """Ideal scales of 3 · 2⁻⁹, 1.4 · 2⁻⁹, and 2⁻¹⁰: halfway between the smallest E4M3 number and 0."""
    w = torch.cat([_row(18 * 2**-9), _row(6 * 1.4 * 2**-9), _row(6 * 2**-10)], 1)
    assert _scales_of(w, ONE, dialect).tolist() == [expected]


@every_dialect
def test_one_huge_outlier(dialect: str) -> None:
    w = torch.ones(2, 32)
    w[1, 17] = -1e30
    got = _round_trip(w, dialect)
    expected = torch.zeros(2, 32)
    expected[1, 17] = -1e30
    torch.testing.assert_close(got.dequantized, expected, rtol=1e-6, atol=0)


@every_dialect
def test_denormal_elements(dialect: str) -> None:
    w = _row(1e-45, -1e-40, 1.0, 6.0)
    got = _round_trip(w, dialect)
    torch.testing.assert_close(got.dequantized, _row(0.0, 0.0, 1.0, 6.0))


@pytest.mark.parametrize(
    ("dialect", "smallest"),
    [("modelopt", 1e-39), ("torchao", 1e-33), ("compressed-tensors", 1e-35)],
)
def test_tensors_of_tiny_elements(dialect: str, smallest: float) -> None:
    w = smallest * _row(*CODES)
    torch.testing.assert_close(_round_trip(w, dialect).dequantized, w, rtol=0.01, atol=0)


@pytest.mark.parametrize("dialect", ["modelopt", "torchao"])
def test_steps_that_vanish_are_refused(dialect: str) -> None:
    with pytest.raises(NemocError, match="nvfp4_global_scale: a tensor scale is out of range"):
        _scale_of(1e-41 * _row(*CODES), dialect)


def test_tensor_scale_of_compressed_tensors_divides() -> None:
    w = _row(1.0, -6.0)
    factor, divisor = _scale_of(w, "torchao"), _scale_of(w, "compressed-tensors")
    assert factor.item() == pytest.approx(6 / 2688) and divisor.item() == pytest.approx(2688 / 6)
    s, third = _e4m3(2.0), torch.tensor(3.0)
    packed = _packed(_row(1.0), _e4m3(1.0), ONE, "modelopt")
    assert _dequantized(packed, s, third, "modelopt")[0, 0].item() == 6.0
    assert _dequantized(packed, s, third, "torchao")[0, 0].item() == 6.0
    assert (
        _dequantized(packed, s, third, "compressed-tensors")[0, 0].item()
        == torch.tensor(2 / 3).item()
    )


@pytest.mark.parametrize(
    ("dialect", "code", "signbit"),
    [("modelopt", 0, False), ("torchao", 8, True), ("compressed-tensors", 0, True)],
)
def test_negative_zero(dialect: str, code: int, signbit: bool) -> None:
    w = _row(-0.0, 1.0)
    assert _codes(_packed(w, _e4m3(1.0), ONE, dialect))[:2] == [code, 2]
    eight = torch.full((1, 8), 0x88, dtype=torch.uint8)
    got = _dequantized(eight, _e4m3(1.0), ONE, dialect)
    assert not got.any() and bool(got.signbit().all()) is signbit
    below = _row(-0.2, 1.0)  # what is rounded to zero keeps its sign in all of them
    assert _codes(_packed(below, _e4m3(1.0), ONE, dialect))[:2] == [8, 2]


@every_dialect
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_codes_are_numbers_where_they_are(dialect: str, dtype: torch.dtype) -> None:
    """Whatever device torch makes new tensors on."""
    every = torch.arange(256, dtype=torch.uint8)
    with torch.device("meta"):
        found = decode(every, DIALECTS[dialect], dtype)
    values = [*CODES, *(-c for c in CODES)]
    assert found.tolist() == [values[code] for code in _codes(every)]
    assert same_bits(found, decode(every, DIALECTS[dialect], dtype))


@every_dialect
def test_each_stacked_matrix_has_a_tensor_scale(dialect: str) -> None:
    w = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(1))
    w = w * torch.tensor([1.0, 1e-3, 50.0])[:, None, None]
    stacked = vars(_round_trip(w, dialect))
    single = [vars(_round_trip(m, dialect)) for m in w]
    for name, tensor in stacked.items():
        assert same_bits(tensor, torch.stack([s[name] for s in single])), name


@every_dialect
def test_one_tensor_scale_serves_a_stack(dialect: str) -> None:
    w = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(1))
    g = _scale_of(w.flatten(0, 1), dialect)
    s = _scales_of(w, g, dialect)
    packed = _packed(w, s, g, dialect)
    flat = _round_trip(w.flatten(0, 1), dialect)
    assert same_bits(s.flatten(0, 1), flat.scales)
    assert torch.equal(packed.flatten(0, 1), flat.packed)
    assert torch.equal(_dequantized(packed, s, g, dialect).flatten(0, 1), flat.dequantized)


# -- four over six --


@every_dialect
def test_four_over_six_takes_the_better_scale(dialect: str) -> None:
    """10, 20, 30, 40 are codes 1, 2, 3, 4 of scale 10 and no codes of 6.5; 10, 20, 60 are codes 1, 2, 6 of scale 10."""
    w = torch.cat([_row(1536.0), _row(10, 20, 30, 40), _row(10, 20, 60), _row(0.0)], 1)
    scales = _scales_of(w, ONE, dialect, four_over_six=True)
    zeros = {"modelopt": 1.0, "torchao": 2**-6, "compressed-tensors": 0.125}[dialect]
    assert scales.tolist()[0][1:] == [10.0, 10.0, zeros]
    packed = _packed(w, scales, ONE, dialect)
    assert _codes(packed)[16:20] == [2, 4, 5, 6] and _codes(packed)[32:35] == [2, 4, 7]
    assert _scales_of(w, ONE, dialect).tolist()[0][1:3] == [6.5, 10.0]


@every_dialect
def test_four_over_six_leaves_room_in_the_tensor_scale(dialect: str) -> None:
    w = _row(3.0)
    g = _scale_of(w, dialect, four_over_six=True).item()
    assert g == pytest.approx(512 if dialect == "compressed-tensors" else 1 / 512)


# -- layouts --


@every_dialect
@pytest.mark.parametrize("lead", [(), (3,)])
def test_blocks_of_rows_are_unpacked_where_they_are(lead: tuple[int, ...], dialect: str) -> None:
    w = torch.randn(*lead, 21, 48, generator=torch.Generator().manual_seed(1))
    written = _round_trip(w, dialect)
    g = written.global_scale

    def interleaved(tensor: torch.Tensor) -> torch.Tensor:
        return ops.Interleave(_value(tensor), 8).evaluate(ENV, tensor)

    scales = interleaved(written.scales.view(torch.uint8)).view(torch.float8_e4m3fn)
    blocks = interleaved(written.packed), scales
    op = ops.DequantizeNvfp4(*map(_value, (*blocks, g)), dialect, interleave=8)
    assert op.infer().shape == (*lead, 3, 48, 8)
    assert torch.equal(op.evaluate(ENV, *blocks, g), interleaved(written.dequantized))


def test_spread_codes_are_pairs_of_bf16_numbers_behind_a_shift_and_a_mask() -> None:
    generator = torch.Generator().manual_seed(40)
    packed = torch.randint(0, 256, (1000, 4), generator=generator).to(torch.uint8)
    for row, w in zip(packed, spread(packed).view(torch.int32)[:, 0].tolist(), strict=True):
        w %= 1 << 32
        pairs = w, w << 4, w << 10 | w >> 22, w >> 2 ^ w << 6
        halves = [pair >> shift & 0x81C0 for pair in pairs for shift in (0, 16)]
        bits = torch.tensor([half - (half >> 15 << 16) for half in halves], dtype=torch.int16)
        numbers = bits.view(torch.bfloat16).double() * 2.0**126
        assert numbers.tolist() == decode(row, DIALECTS["torchao"], torch.float64).tolist()


@pytest.mark.parametrize("lead", [(), (3,)])
def test_spread_codes_stand_for_the_same_weights(lead: tuple[int, ...]) -> None:
    written = _round_trip(
        torch.randn(*lead, 5, 48, generator=torch.Generator().manual_seed(41)), "torchao"
    )
    ordered = ops.SpreadCodes(_value(written.packed)).evaluate(ENV, written.packed)
    assert not torch.equal(ordered, written.packed) and torch.equal(
        gathered(ordered), written.packed
    )
    parts = ordered, written.scales, written.global_scale
    op = ops.DequantizeNvfp4(*map(_value, parts), "torchao", spread=True)
    assert torch.equal(op.evaluate(ENV, *parts), written.dequantized)


def test_spread_codes_are_not_laid_out_in_blocks() -> None:
    written = _round_trip(torch.ones(16, 32), "modelopt")
    parts = map(_value, (written.packed, written.scales, written.global_scale))
    with pytest.raises(IRError, match="interleave is 8, expected 1 of spread codes"):
        ops.DequantizeNvfp4(*parts, interleave=8, spread=True).infer()


# -- refusals --


def test_blocks_of_other_heights_are_refused() -> None:
    tensors = torch.zeros(2, 8, 4, dtype=torch.uint8), torch.ones(2, 1, 4), torch.tensor(1.0)
    codes, s, g = tensors[0], tensors[1].to(torch.float8_e4m3fn), tensors[2]
    with pytest.raises(IRError, match=r"packed is u8\[2, 8, 4\].* in blocks of 8 rows"):
        ops.DequantizeNvfp4(_value(codes), _value(s), _value(g), interleave=8).infer()


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16])
def test_nan_and_infinity_are_refused(special: float, dtype: torch.dtype) -> None:
    w = torch.ones(2, 32, dtype=dtype)
    s, g = torch.ones(2, 2).to(E4M3), ONE
    w[1, 20] = special
    with pytest.raises(NemocError, match=r"^nvfp4_global_scale: w has NaN or infinite elements$"):
        _scale_of(w, "modelopt")
    with pytest.raises(NemocError, match=r"^nvfp4_block_scales: w has NaN or infinite elements$"):
        _scales_of(w, g, "torchao")
    with pytest.raises(NemocError, match=r"^quantize_nvfp4: w has NaN or infinite elements$"):
        _packed(w, s, g, "compressed-tensors")


def test_scales_that_are_no_numbers_are_refused() -> None:
    w, packed = torch.ones(1, 16), torch.zeros(1, 8, dtype=torch.uint8)
    nan, one = _e4m3(float("nan")), _e4m3(1.0)
    with pytest.raises(NemocError, match="dequantize_nvfp4: scales has NaN"):
        _dequantized(packed, nan, ONE, "modelopt")
    for bad in (nan, _e4m3(0.0), _e4m3(-1.0)):
        with pytest.raises(NemocError, match="quantize_nvfp4: scales are NaN, zero or negative"):
            _packed(w, bad, ONE, "modelopt")
    for dialect in DIALECTS:
        for bad in (float("nan"), float("inf")):
            with pytest.raises(NemocError, match="dequantize_nvfp4: global_scale"):
                _dequantized(packed, one, torch.tensor(bad), dialect)
        for bad in (float("nan"), float("inf"), 0.0, -1.0):
            with pytest.raises(NemocError, match="nvfp4_block_scales: a tensor scale is out of"):
                _scales_of(w, torch.tensor(bad), dialect)
            with pytest.raises(NemocError, match="quantize_nvfp4: a tensor scale is out of"):
                _packed(w, one, torch.tensor(bad), dialect)
    with pytest.raises(NemocError, match="or a divisor of 0"):
        _dequantized(packed, one, torch.tensor(0.0), "compressed-tensors")


@pytest.mark.parametrize("width", [1, 8, 15, 17, 24, 1000])
def test_widths_that_are_no_whole_blocks_are_refused(width: int) -> None:
    w = Value("w", TensorType.of(DType.F32, (4, width)))
    with pytest.raises(IRError, match="expected whole blocks of 16 columns"):
        ops.Nvfp4GlobalScale(w).infer()


def test_what_a_parameter_holds_is_refused_by_its_name() -> None:
    b = Builder("weights")
    packed, _, _ = quantized(b, b.param("layers.3.up_proj.weight", DType.F32, (4, 32)))
    (node,) = FoldConstants().run(b.finish([packed]), PassContext()).nodes
    assert isinstance(node.op, ops.Folded)
    source = InMemory({"layers.3.up_proj.weight": torch.full((4, 32), float("nan"))})
    with pytest.raises(IRError, match=r"^layers\.3\.up_proj\.weight: nvfp4_global_scale: w has"):
        list(stream(node.op, source, 1))


# -- properties --


@st.composite
def weights(draw: st.DrawFn, within_range: bool = False) -> torch.Tensor:
    """Weights of several kinds; `within_range`: with ideal block scales of 2⁻⁶ and more."""
    rows, blocks = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    w = torch.randn(rows, blocks, 16, generator=generator)
    w = w.clamp(-4, 4) + 0.01 * w.sign()
    spread = draw(st.sampled_from([0, 3, 10] if within_range else [0, 3, 10, 25, 60]))
    exponents = torch.randint(-spread, 1, (rows, blocks, 1), generator=generator)
    w = w * torch.exp2(exponents + draw(st.integers(-20, 20)))
    kind = draw(st.sampled_from([F32, torch.bfloat16]))
    w = w.to(kind).to(F32).flatten(1)
    if not within_range:
        zeros = torch.rand(w.shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 0.99]))
        return torch.where(zeros, 0.0, w)
    return w


@every_dialect
@pytest.mark.parametrize("four_over_six", [False, True])
@given(w=weights())
def test_codes_are_the_nearest(dialect: str, four_over_six: bool, w: torch.Tensor) -> None:
    got = _round_trip(w, dialect, four_over_six)
    step = DIALECTS[dialect].step(got.scales.double(), got.global_scale.double())[..., None, None]
    x = w.double().unflatten(-1, (-1, 16))[..., None]
    candidates = torch.tensor([*CODES, *(-c for c in CODES)]).double() * step
    nearest = (candidates - x).abs().amin(-1)
    error = (got.dequantized.double() - w.double()).abs().unflatten(-1, (-1, 16))
    assert (error <= nearest + 1e-6 * (x.abs()[..., 0] + step[..., 0])).all()


@every_dialect
@given(w=weights(within_range=True))
def test_error_is_within_its_bound(dialect: str, w: torch.Tensor) -> None:
    """A step is at most 17/16 of amax/6, and an element beyond code 6 exceeds it by at most amax/16."""
    error = (_round_trip(w, dialect).dequantized - w).abs().unflatten(-1, (-1, 16))
    amax = w.abs().unflatten(-1, (-1, 16)).amax(-1, keepdim=True)
    assert (error <= 17 / 96 * (1 + 1e-5) * amax).all()


@every_dialect
@given(data=st.data())
def test_what_the_format_holds_is_kept(dialect: str, data: st.DataObject) -> None:
    """Codes with a 6 in each block, scales with a 448: x = code · s · 2ᵏ is exact, and comes back."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    rows, blocks = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    codes = torch.randint(0, 16, (rows, blocks, 16), generator=generator)
    codes[codes == 8] = 0
    codes[..., 5] = 7
    scales = torch.randint(8, 127, (rows, blocks), generator=generator).to(torch.uint8).view(E4M3)
    scales.view(torch.uint8)[0, 0] = 126
    values = torch.tensor([*CODES, *(-c for c in CODES)])[codes]
    w = (values * scales.float()[..., None] * 2.0 ** data.draw(st.integers(-60, 60))).flatten(1)
    got = _round_trip(w, dialect)
    assert same_bits(got.scales, scales)
    flat = codes.flatten(1).to(torch.uint8)
    assert torch.equal(got.packed, flat[:, 0::2] | flat[:, 1::2] << 4)
    torch.testing.assert_close(got.dequantized, w, rtol=2e-7, atol=0)
    if dialect != "compressed-tensors":  # its divisor is rounded twice
        assert torch.equal(got.dequantized, w)


@every_dialect
@given(w=weights())
def test_four_over_six_is_never_worse(dialect: str, w: torch.Tensor) -> None:
    g = _scale_of(w, dialect, four_over_six=True)

    def error(four_over_six: bool) -> torch.Tensor:
        s = _scales_of(w, g, dialect, four_over_six)
        found = _dequantized(_packed(w, s, g, dialect), s, g, dialect)
        return (found.double() - w.double()).square().unflatten(-1, (-1, 16)).sum(-1)

    assert (error(True) <= error(False) * (1 + 1e-12)).all()


@given(w=weights(within_range=True))
def test_dialects_differ_next_to_ties_only(w: torch.Tensor) -> None:
    """Where ideal block scales are 2⁻⁶ or more."""
    first = _round_trip(w, "modelopt")
    scaled = (w.double().unflatten(-1, (-1, 16)).abs()) / (
        first.scales.double() * first.global_scale.double()
    )[..., None]
    cuts = torch.tensor(CUTS).double()
    at_tie = ((scaled[..., None] - cuts).abs() <= 1e-6 * cuts).any(-1).flatten(1)
    for dialect in ("torchao", "compressed-tensors"):
        other = _round_trip(w, dialect)
        ideal = w.double().abs().unflatten(-1, (-1, 16)).amax(-1) / w.double().abs().amax() * 448
        steps = torch.arange(8, 127).to(torch.uint8).view(E4M3).double()
        between = (steps[1:] + steps[:-1]) / 2
        scale_tie = ((ideal[..., None] - between).abs() <= 1e-6 * between).any(-1)
        same = first.scales.view(torch.uint8) == other.scales.view(torch.uint8)
        assert (same | scale_tie).all()
        differs = torch.tensor([_codes(r) for r in first.packed]) != torch.tensor(
            [_codes(r) for r in other.packed]
        )
        assert (at_tie | ~differs | ~same.repeat_interleave(16, 1)).all()


@given(
    experts=st.integers(0, 3),
    rows=st.integers(1, 300),
    blocks=st.integers(1, 6),
    dtype=st.sampled_from([DType.F32, DType.BF16]),
    dialect=st.sampled_from(list(DIALECTS)),
    four_over_six=st.booleans(),
    budget=st.sampled_from([1, 2000, 100_000]),
)
def test_slices_have_the_bits_of_the_whole(
    experts: int,
    rows: int,
    blocks: int,
    dtype: DType,
    dialect: str,
    four_over_six: bool,
    budget: int,
) -> None:
    rows = rows if budget > 1 else min(rows, 5)
    b = Builder("weights")
    w = b.param("w", dtype, (*([experts] if experts else []), rows, blocks * 16))
    packed, s, g = quantized(b, w, dialect, four_over_six)
    again = b(ops.DequantizeNvfp4(packed, s, g, dialect))
    graph = b.finish([packed, s, g, again, b(ops.SwizzleScales(s)), b(ops.SpreadCodes(packed))])
    generator = torch.Generator().manual_seed(rows)
    tensor = torch.randn([int(d) for d in w.shape], generator=generator).to(dtype.torch)
    _check_slices(graph, tensor, budget)


def _check_slices(graph: Graph, w: torch.Tensor, budget: int) -> None:
    wholes = interpret(graph, {"w": w}).outputs
    regions = {v: n.op for n in FoldConstants().run(graph, PassContext()).nodes for v in n.results}
    for value, whole in zip(graph.outputs, wholes, strict=True):
        (region,) = [op for v, op in regions.items() if v.name == value.name]
        assert isinstance(region, ops.Folded)
        parts = list(stream(region, InMemory({"w": w}), budget))
        assert same_bits(torch.cat(parts) if value.type.rank else parts[0], whole)
        if budget == 1 and value.type.rank and value.dtype is DType.U8:
            assert len(parts) == value.shape[0]


def test_float64_evaluation_gives_the_same_codes() -> None:
    b = Builder("weights")
    w = b.param("w", DType.BF16, (5, 64))
    packed, s, g = quantized(b, w, "torchao")
    graph = b.finish([packed, s, g, b(ops.DequantizeNvfp4(packed, s, g, "torchao"))])
    tensor = torch.randn(5, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    native = interpret(graph, {"w": tensor}).outputs
    wide = interpret(graph, {"w": tensor}, float64=True).outputs
    assert wide[0].dtype is torch.uint8 and torch.equal(native[0], wide[0])
    for a, b_ in zip(native[1:3], wide[1:3], strict=True):
        assert b_.dtype is torch.float64 and torch.equal(a.double(), b_)
    exact = native[1].double().repeat_interleave(16, 1) * native[2].double()
    codes = torch.tensor([_codes(row) for row in native[0]])
    assert torch.equal(wide[3], torch.tensor([*CODES, *(-c for c in CODES)])[codes] * exact)


def test_fp8_numbers_are_the_nearest_to_every_code_times_every_scale() -> None:
    every = torch.arange(1, 127, dtype=torch.uint8).view(E4M3)  # positive and finite
    packed = torch.arange(0, 256, dtype=torch.uint8).reshape(32, 8)
    s = every.repeat_interleave(32)[:, None]
    q = packed.repeat(126, 1)
    found = ops.Nvfp4ToFp8(_value(q), _value(s)).evaluate(ENV, q, s)
    exact = decode(q, DIALECTS["modelopt"], torch.float64) * s.double() / 8
    numbers = torch.arange(0, 256, dtype=torch.uint8).view(E4M3).double()
    numbers = numbers[numbers.isfinite()]
    distance = (exact.flatten()[:, None] - numbers).abs()
    assert found.dtype is E4M3
    assert torch.equal((exact - found.double()).abs().flatten(), distance.amin(1))
    tied = (distance == distance.amin(1, keepdim=True)).double() @ (numbers != 0).double() > 1
    even = found.view(torch.uint8).flatten() % 2 == 0
    assert bool(tied.any()) and bool(even[tied].all())


@every_dialect
def test_fp8_of_normally_distributed_weights_adds_little_to_what_nvfp4_costs(dialect: str) -> None:
    w = torch.randn(3, 64, 256, generator=torch.Generator().manual_seed(5))
    b = Builder("g")
    parts = quantized(b, b.param("w", DType.F32, tuple(w.shape)), dialect)
    stored = ops.DequantizeNvfp4(*parts, dialect)
    graph = b.finish([b(stored), dequantized_fp8(b, *nvfp4_in_fp8(b, stored))])
    decoded, found = interpret(graph, {"w": w}).outputs

    def error(x: torch.Tensor, expected: torch.Tensor) -> float:
        return float((x - expected).norm() / expected.norm())

    assert error(found, decoded) == pytest.approx(0.021, rel=0.03)
    assert error(decoded, w) == pytest.approx(0.095, rel=0.02)
    assert error(found, w) == pytest.approx(0.097, rel=0.02)


@every_dialect
@pytest.mark.parametrize(
    ("shape", "scales"),
    [
        ((70, 64), ()),
        ((5, 30, 64), (5,)),
        ((5, 30, 64), ()),
        ((1, 90, 64), (1,)),
        ((90, 1, 64), (90,)),
    ],
)
def test_matrices_in_parts_have_the_bits_of_the_whole(
    dialect: str, shape: tuple[int, ...], scales: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    random = torch.Generator().manual_seed(7)
    w = torch.randn(*shape, generator=random).bfloat16()
    g = torch.rand(scales, generator=random) * 1e-3 + 1e-3

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        s = _scales_of(w, g, dialect, four_over_six=True)
        return s.view(torch.uint8), _packed(w, s, g, dialect)

    whole = both()
    monkeypatch.setattr("nemoc.ir.ops.nvfp4._PART", 8 * 64)
    assert all(map(torch.equal, both(), whole))


def test_scales_that_are_no_numbers_make_no_fp8() -> None:
    q, s = torch.zeros(2, 8, dtype=torch.uint8), torch.tensor([[1.0], [torch.nan]]).to(E4M3)
    with pytest.raises(NemocError, match="nvfp4_to_fp8: scales has NaN elements"):
        ops.Nvfp4ToFp8(_value(q), _value(s)).evaluate(ENV, q, s)


def test_rounding_of_block_scales_is_exact_wherever_they_stand() -> None:
    """The conversion to E4M3, vectorised or not, at every value, every tie and their neighbours."""
    values = torch.arange(1, 127, dtype=torch.uint8).view(E4M3).float()
    ties = (values[1:] + values[:-1]) / 2
    even = torch.arange(1, 126) % 2 == 0
    down, up = values[:-1], values[1:]
    for x, expected in (
        (values, values),
        (ties, torch.where(even, down, up)),
        (torch.nextafter(ties, torch.tensor(0.0)), down),
        (torch.nextafter(ties, torch.tensor(999.0)), up),
    ):
        assert torch.equal(x.to(E4M3).float(), expected)
        alone = torch.stack([one.to(E4M3).float() for one in x])
        assert torch.equal(alone, expected)


# -- swizzled scales --


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (130, 9), (2, 33, 5), (2, 1, 260, 3)])
def test_swizzled_scales_are_where_tensor_cores_read_them(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.randint(1, 127, shape, generator=generator).to(torch.uint8)
    op = ops.SwizzleScales(_value(scales.view(E4M3)))
    got = op.evaluate(ENV, scales.view(E4M3))
    assert got.is_contiguous() and tuple(got.shape) == op.infer().shape
    *lead, rows, columns = shape
    m, k = torch.arange(rows)[:, None], torch.arange(columns)[None]
    k_tiles = -(-columns // 4)
    offset = (m // 128) * k_tiles * 512 + (k // 4) * 512
    offset = offset + (m % 32) * 16 + (m % 128) // 32 * 4 + k % 4
    flat = got.view(torch.uint8).reshape(*lead, -1)
    assert torch.equal(flat[..., offset], scales)
    assert int(flat.count_nonzero()) == scales.numel()  # the rest is padding


# -- other libraries --


def _golden() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(GOLDEN.read_text())
    return content


def _hex(tensor: torch.Tensor) -> str:
    return bytes(tensor.contiguous().view(torch.uint8).flatten().tolist()).hex()


def _golden_weight(case: dict[str, Any]) -> torch.Tensor:
    data = torch.tensor(list(bytes.fromhex(case["w"])), dtype=torch.uint8)
    return data.view(F32).reshape(case["shape"])


@every_dialect
def test_bits_that_the_library_wrote(dialect: str, bless: bool) -> None:
    golden = _golden()
    for case in golden["cases"]:
        w = _golden_weight(case)
        if bless:
            written = PEERS[dialect](w).tensors()
            case[dialect] = {name: _hex(tensor.reshape(-1)) for name, tensor in written.items()}
        found = {n: _hex(t.reshape(-1)) for n, t in _round_trip(w, dialect).tensors().items()}
        assert found == case[dialect], case["name"]
    if bless:
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


def test_golden_tensors_tell_the_dialects_apart() -> None:
    ties, edges = _golden()["cases"]
    assert len({ties[d]["packed"] for d in DIALECTS}) == 3
    assert len({ties[d]["scales"] for d in DIALECTS}) == 1
    assert len({edges[d]["scales"] for d in DIALECTS}) == 3


@every_dialect
@given(w=weights())
def test_bits_are_those_of_the_library(dialect: str, w: torch.Tensor) -> None:
    if not w.any():
        w[0, 0] = 1.0
    expected, found = PEERS[dialect](w).tensors(), _round_trip(w, dialect).tensors()
    for name, tensor in expected.items():
        assert same_bits(tensor.reshape(-1), found[name].reshape(-1)), name


@pytest.mark.parametrize("dialect", ["modelopt", "torchao"])
def test_bf16_weights_give_the_bits_of_the_library(dialect: str) -> None:
    w = torch.randn(8, 128, generator=torch.Generator().manual_seed(5)).bfloat16()
    expected, found = PEERS[dialect](w).tensors(), _round_trip(w, dialect).tensors()
    for name, tensor in expected.items():
        assert same_bits(tensor.reshape(-1), found[name].reshape(-1)), name
