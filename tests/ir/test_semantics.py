"""What ops mean, against independent statements of it: naive recurrences in float64, torch's own attention."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from nemoc.ir import interpret, parse
from nemoc.ir.sample_inputs import sample_arguments
from nemoc.passes.check import relative_error
from support.op_samples import OP_SAMPLES, sample_graph

VALID = ([5, 5], [1, 4], [3, 0], [2, 5])


def _arguments(text: str, sizes: dict[str, int], valid: list[int]) -> dict[str, torch.Tensor]:
    arguments = sample_arguments(parse(text), sizes)
    arguments["valid"] = torch.tensor(valid, dtype=torch.int32)
    return arguments


def _recurrence(
    arguments: dict[str, torch.Tensor], d: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition in `SsdScan`, token by token, head by head, in float64."""
    x, b, c, state = (arguments[n].double() for n in ("x", "b", "c", "s"))
    dt = F.softplus(arguments["dt"].double())
    a = -arguments["a"].double().exp()
    state, y = state.clone(), torch.zeros_like(x)
    rows, length, heads, _ = x.shape
    for row, t, h in itertools.product(range(rows), range(length), range(heads)):
        group = h // (heads // b.shape[2])
        if t < arguments["valid"][row]:
            decay = (dt[row, t, h] * a[h]).exp()
            driven = torch.outer(dt[row, t, h] * x[row, t, h], b[row, t, group])
            state[row, h] = decay * state[row, h] + driven
        y[row, t, h] = state[row, h] @ c[row, t, group]
        if d is not None:
            y[row, t, h] += d[h].double() * x[row, t, h]
    return y, state


@pytest.mark.parametrize("valid", VALID)
@pytest.mark.parametrize("sample", [0, 1])
def test_scan_is_the_recurrence(sample: int, valid: list[int]) -> None:
    text = sample_graph(OP_SAMPLES["ssd_scan"].valid[sample])
    arguments = _arguments(text, {"B": 2, "L": 5}, valid)
    y, state = _recurrence(arguments, arguments["d"] if sample == 0 else None)
    got = interpret(parse(text), arguments, float64=True).outputs
    torch.testing.assert_close(got[0], y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[1], state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [64, 65, 130])
def test_scan_does_not_depend_on_its_chunks(length: int) -> None:
    text = sample_graph(OP_SAMPLES["ssd_scan"].valid[0])
    arguments = _arguments(text, {"B": 2, "L": length}, [length, length - 3])
    y, state = _recurrence(arguments, arguments["d"])
    got = interpret(parse(text), arguments).outputs
    assert relative_error(got[0].double(), y) < 1e-5
    assert relative_error(got[1].double(), state) < 1e-5


def test_scan_with_strong_decay_stays_finite() -> None:
    text = sample_graph(OP_SAMPLES["ssd_scan"].valid[0])
    arguments = _arguments(text, {"B": 2, "L": 100}, [100, 50])
    arguments["a"] += 6.0  # exp(a) in the hundreds: products of decays underflow
    y, state = _recurrence(arguments, arguments["d"])
    got = interpret(parse(text), arguments).outputs
    assert relative_error(got[0].double(), y) < 1e-5
    assert relative_error(got[1].double(), state) < 1e-5


def test_update_is_the_scan_of_one_token() -> None:
    scan = sample_graph(OP_SAMPLES["ssd_scan"].valid[0])
    update = sample_graph(OP_SAMPLES["ssd_update"].valid[0])
    arguments = _arguments(scan, {"B": 2, "L": 1}, [1, 1])
    y, state = interpret(parse(scan), arguments, float64=True).outputs
    one = {n: t[:, 0] if n in ("x", "dt", "b", "c") else t for n, t in arguments.items()}
    got = interpret(parse(update), one, float64=True).outputs
    torch.testing.assert_close(got[0], y[:, 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[1], state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("valid", VALID)
@pytest.mark.parametrize("sample", [0, 1])
def test_convolution_is_its_formula(sample: int, valid: list[int]) -> None:
    text = sample_graph(OP_SAMPLES["causal_conv"].valid[sample])
    arguments = _arguments(text, {"B": 2, "L": 5}, valid)
    x, w, state = (arguments[n].double() for n in ("x", "w", "s"))
    joined = torch.cat([state, x], 1)
    y = torch.zeros_like(x)
    for t, j in itertools.product(range(5), range(4)):
        y[:, t] += w[:, j] * joined[:, t + j]
    if sample == 0:
        y += arguments["bias"].double()
    following = torch.stack([joined[b, n : n + 3] for b, n in enumerate(valid)])
    got = interpret(parse(text), arguments, float64=True).outputs
    torch.testing.assert_close(got[0], y, rtol=1e-12, atol=1e-12)
    assert torch.equal(got[1], following)


@pytest.mark.parametrize("lengths", [[0, 0], [3, 7], [11, 0]])
def test_attention_is_that_of_torch(lengths: list[int]) -> None:
    text = sample_graph(OP_SAMPLES["attention"].valid[0])
    arguments = sample_arguments(parse(text), {"B": 2, "L": 5, "C": 16})
    arguments["lengths"] = torch.tensor(lengths, dtype=torch.int32)
    q, k, v = (arguments[n].double() for n in ("q", "k", "v"))
    last = torch.tensor(lengths)[:, None] + torch.arange(5)
    mask = torch.arange(16) <= last[..., None]
    expected = F.scaled_dot_product_attention(
        *(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)),
        attn_mask=mask[:, None],
        scale=0.5,
        enable_gqa=True,
    ).transpose(1, 2)
    for row, length in enumerate(lengths):  # whatever unwritten rows hold has no influence
        arguments["k"][row, length + 5 :] = float("nan")
        arguments["v"][row, length + 5 :] = float("inf")
    (got,) = interpret(parse(text), arguments, float64=True).outputs
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_cache_write_puts_rows_behind_each_length_and_drops_the_rest() -> None:
    text = sample_graph(OP_SAMPLES["cache_write"].valid[0])
    arguments = sample_arguments(parse(text), {"B": 2, "L": 5, "C": 8})
    arguments["lengths"] = torch.tensor([1, 6], dtype=torch.int32)
    (got,) = interpret(parse(text), arguments).outputs
    rows, cache = arguments["rows"], arguments["cache"]
    assert torch.equal(got[0], torch.cat([cache[0, :1], rows[0], cache[0, 6:]]))
    assert torch.equal(got[1], torch.cat([cache[1, :6], rows[1, :2]]))


def _run(text: str, **arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return interpret(parse(sample_graph(text)), arguments).outputs


def test_top_k_takes_the_lower_index_of_equals() -> None:
    x = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    (got,) = _run("input %x: f32[B, 5]\n%y = top_k(%x) {k=3} : i32[B, 3]", x=x)
    assert got.tolist() == [[1, 2, 4], [0, 1, 2]]


def test_top_k_orders_by_value() -> None:
    x = torch.tensor([[0.5, -1.0, float("inf"), 0.75, float("-inf")]])
    (got,) = _run("input %x: f32[B, 5]\n%y = top_k(%x) {k=5} : i32[B, 5]", x=x)
    assert got.tolist() == [[2, 3, 0, 1, 4]]


def test_group_limit_keeps_the_groups_with_the_best_two() -> None:
    x = torch.tensor(
        [
            [9.0, 0.0, 0.0, 5.0, 5.0, 0.0, 1.0, 1.0, 1.0],  # merits 9, 10, 2
            [1.0, 2.0, 0.0, 3.0, 0.0, 0.0, 2.0, 1.0, 0.0],  # merits 3, 3, 3: the lower indices
        ]
    )
    line = "%y = group_limit(%x) {groups=3, keep=2, fill=-1.0} : f32[B, 9]"
    (got,) = _run(f"input %x: f32[B, 9]\n{line}", x=x)
    assert got.tolist() == [
        [9.0, 0.0, 0.0, 5.0, 5.0, 0.0, -1.0, -1.0, -1.0],
        [1.0, 2.0, 0.0, 3.0, 0.0, 0.0, -1.0, -1.0, -1.0],
    ]


def test_group_by_is_a_stable_counting_sort() -> None:
    line = "%o, %p, %s = group_by(%i) {groups=5} : i32[2*B], i32[2*B], i32[6]"
    index = torch.tensor([[3, 0], [3, 1], [0, 3]], dtype=torch.int32)
    order, position, offsets = _run(f"input %i: i32[B, 2] < 5\n{line}", i=index)
    assert order.tolist() == [1, 4, 3, 0, 2, 5]
    assert position.tolist() == [3, 0, 4, 2, 1, 5]
    assert offsets.tolist() == [0, 2, 3, 3, 6, 6]


def test_grouped_linear_is_one_product_per_row() -> None:
    text = sample_graph(OP_SAMPLES["grouped_linear"].valid[0])
    arguments = sample_arguments(parse(text), {"B": 4})
    (got,) = interpret(parse(text), arguments, float64=True).outputs
    experts = arguments["index"].flatten().sort(stable=True).values
    expected = [
        arguments["w"][e].double() @ x.double()
        for e, x in zip(experts, arguments["x"], strict=True)
    ]
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("features", [1, 4, 5, 8])
def test_interleaved_product_has_the_same_bits(features: int) -> None:
    text = f"""
        input %x: f32[B, 6]
        param %w: bf16[{features}, 6]
        %i = interleave(%w) {{block=4}} : bf16[{-(-features // 4)}, 6, 4]
        %y = linear(%x, %i) {{interleave=4, features={features}}} : f32[B, {features}]
    """
    plain = f"""
        input %x: f32[B, 6]
        param %w: bf16[{features}, 6]
        %y = linear(%x, %w) : f32[B, {features}]
    """
    arguments = sample_arguments(parse(sample_graph(text)), {"B": 3})
    (a,), (b,) = _run(text, **arguments), _run(plain, **arguments)
    assert torch.equal(a, b)


def test_interleave_puts_zeros_behind_the_last_row() -> None:
    w = torch.arange(1.0, 11.0).reshape(5, 2)
    (got,) = _run("param %w: f32[5, 2]\n%y = interleave(%w) {block=4} : f32[2, 2, 4]", w=w)
    assert got[1].tolist() == [[9.0, 0.0, 0.0, 0.0], [10.0, 0.0, 0.0, 0.0]]
    assert got[0, 1].tolist() == [2.0, 4.0, 6.0, 8.0]


@pytest.mark.parametrize("x", [-80.0, -20.0, -1.0, 0.0, 1.0, 19.0, 21.0, 100.0])
def test_softplus_neither_overflows_nor_truncates(x: float) -> None:
    (got,) = _run("input %x: f32[B]\n%y = softplus(%x) : f32[B]", x=torch.tensor([x]))
    exact = torch.tensor([x], dtype=torch.float64).exp().log1p()
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=0)


def test_rms_norm_is_its_formula_per_group() -> None:
    text = sample_graph(OP_SAMPLES["rms_norm"].valid[1])
    arguments = sample_arguments(parse(text), {"B": 2})
    (got,) = interpret(parse(text), arguments).outputs
    x = arguments["x"].reshape(2, 3, 2)
    expected = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt()
    torch.testing.assert_close(got, expected.reshape(2, 6) * arguments["w"])
