"""Convolution and state-space kernels against the ops' evaluation."""

import dataclasses

import pytest
import torch

from nemoc.codegen.plan import Site, View
from nemoc.codegen.tvm.conv import emit_causal_conv
from nemoc.codegen.tvm.scan import emit_ssd_scan
from nemoc.codegen.tvm.target import cpu_target
from nemoc.codegen.tvm.update import emit_ssd_update
from nemoc.ir.dims import B, Dim, L
from nemoc.ir.dtypes import DType
from nemoc.ir.op import Op
from nemoc.ir.ops import CausalConv, SsdScan, SsdUpdate
from support.kernels import CompiledSite, KernelSuite, relative_error, value

F32 = DType.F32
VALID = value(DType.I32, B)
HOST = cpu_target()
NARROW = dataclasses.replace(HOST, vector_bits=min(256, HOST.vector_bits), registers=16)
SUITE, NARROW_SUITE = KernelSuite(), KernelSuite(NARROW)


def tensor(*shape: Dim) -> View:
    return View.dense(value(F32, *shape).type)


def conv(width: int, taps: int, bias: bool = True, length: Dim = L) -> CausalConv:
    return CausalConv(
        value(F32, B, length, width),
        value(F32, width, taps),
        value(F32, width) if bias else None,
        value(F32, B, taps - 1, width),
        VALID,
    )


def scan(heads: int, width: int, groups: int, size: int, skip: bool = True) -> SsdScan:
    return SsdScan(
        value(F32, B, L, heads, width),
        value(F32, B, L, heads),
        value(F32, heads),
        value(F32, B, L, groups, size),
        value(F32, B, L, groups, size),
        value(F32, heads) if skip else None,
        value(F32, B, heads, width, size),
        VALID,
    )


def update(heads: int, width: int, groups: int, size: int, skip: bool = True) -> SsdUpdate:
    return SsdUpdate(
        value(F32, B, heads, width),
        value(F32, B, heads),
        value(F32, heads),
        value(F32, B, groups, size),
        value(F32, B, groups, size),
        value(F32, heads) if skip else None,
        value(F32, B, heads, width, size),
    )


def sliced(op: Op, **rows: int) -> Site:
    """The op with operands that are columns of wider rows: strides of axes 0 and 1 by the row's width."""
    site = Site.dense(op)
    operands = list(site.operands)
    for name, width in rows.items():
        index = site.arg(name).index
        view = operands[index]
        strides = (width * view.shape[1], width, *view.strides[2:])
        operands[index] = View(view.dtype, view.shape, strides)
    return Site(op, tuple(operands), site.results)


def scattered(op: Op) -> Site:
    """The op with x and y whose last axis is not contiguous."""
    site = Site.dense(op)
    x = site.operands[0]
    view = View(x.dtype, x.shape, tuple(2 * s for s in x.strides))
    return Site(op, (view, *site.operands[1:]), (view, *site.results[1:]))


CONVS = {
    "one vector and a tail": SUITE.add(Site.dense(conv(23, 4)), emit_causal_conv),
    "several blocks, two taps": SUITE.add(Site.dense(conv(540, 2, bias=False)), emit_causal_conv),
    "columns of in_proj": SUITE.add(sliced(conv(48, 4), x=200), emit_causal_conv),
    "scattered": SUITE.add(scattered(conv(20, 7)), emit_causal_conv),
    "narrow vectors": NARROW_SUITE.add(Site.dense(conv(23, 4)), emit_causal_conv),
}
ONE_TOKEN_CONVS = {
    "tail": SUITE.add(Site.dense(conv(132, 4, length=1)), emit_causal_conv),
    "several blocks": SUITE.add(Site.dense(conv(540, 3, bias=False, length=1)), emit_causal_conv),
    "columns of in_proj": SUITE.add(sliced(conv(48, 4, length=1), x=200), emit_causal_conv),
}
SCANS = {
    "nano's head": SUITE.add(Site.dense(scan(2, 64, 1, 128)), emit_ssd_scan),
    "tails, one head a group": SUITE.add(Site.dense(scan(3, 24, 3, 23, False)), emit_ssd_scan),
    "narrower than a vector": SUITE.add(Site.dense(scan(6, 5, 2, 7)), emit_ssd_scan),
    "slices of xBC": SUITE.add(sliced(scan(4, 16, 2, 16), x=140, b=140, c=140), emit_ssd_scan),
    "scattered": SUITE.add(scattered(scan(2, 16, 1, 16)), emit_ssd_scan),
    "narrow vectors": NARROW_SUITE.add(Site.dense(scan(2, 80, 1, 12)), emit_ssd_scan),
}
UPDATES = {
    "nano's head": SUITE.add(Site.dense(update(2, 64, 1, 128)), emit_ssd_update),
    "tails, one head a group": SUITE.add(Site.dense(update(3, 5, 3, 23, False)), emit_ssd_update),
    "narrow vectors": NARROW_SUITE.add(Site.dense(update(6, 3, 2, 24)), emit_ssd_update),
}
LENGTHS = [(1, [1]), (2, [0, 2]), (70, [70, 0, 33]), (129, [128, 64])]


def operands(
    case: CompiledSite, sizes: dict[str, int], valid: list[int], seed: int
) -> list[torch.Tensor]:
    """Random operands; dt is positive and a negative."""
    generator = torch.Generator().manual_seed(seed)
    site = case.site
    special = {site.arg(n).index: n for n in ("dt", "a") if hasattr(site.op, n)}
    found = []
    for i, view in enumerate(site.operands):
        shape = [n if isinstance(n, int) else sizes[str(n)] for n in view.shape]
        values = torch.randn(shape, generator=generator)
        if view.dtype == DType.I32:
            values = torch.tensor(valid, dtype=torch.int32)
        elif i in special:
            values = values.exp() * (0.1 if special[i] == "dt" else -1.0)
        found.append(values)
    return found


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize(("length", "valid"), LENGTHS)
def test_convolution(name: str, length: int, valid: list[int]) -> None:
    sizes = {"B": len(valid), "L": length}
    CONVS[name].check(sizes, *operands(CONVS[name], sizes, valid, length), tolerance=1e-6)


@pytest.mark.parametrize("name", ONE_TOKEN_CONVS)
def test_convolution_of_one_token(name: str) -> None:
    sizes = {"B": 3}
    case = ONE_TOKEN_CONVS[name]
    case.check(sizes, *operands(case, sizes, [1, 0, 1], 5), tolerance=1e-6)


@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize(("length", "valid"), LENGTHS)
def test_scan(name: str, length: int, valid: list[int]) -> None:
    sizes = {"B": len(valid), "L": length}
    given = operands(SCANS[name], sizes, valid, length)
    SCANS[name].check(sizes, *given, tolerance=2e-6)
    SCANS[name].check(sizes, *given, tolerance=2e-6, threads=(2,), in_place=True)


@pytest.mark.parametrize("name", UPDATES)
def test_update(name: str) -> None:
    sizes = {"B": 3}
    given = operands(UPDATES[name], sizes, [], 6)
    UPDATES[name].check(sizes, *given, tolerance=1e-6)
    UPDATES[name].check(sizes, *given, tolerance=1e-6, threads=(2,), in_place=True)


def test_padding_leaves_the_state_as_it_is() -> None:
    case = SCANS["nano's head"]
    given = operands(case, {"B": 1, "L": 90}, [0], 7)
    state = given[6]
    assert torch.equal(case.run({"L": 90}, *given)[1], state)
    given[-1] = torch.tensor([40], dtype=torch.int32)
    _, padded = case.run({"L": 90}, *given)
    cut = [t[:, :40] if i in (0, 1, 3, 4) else t for i, t in enumerate(given)]
    assert torch.equal(case.run({"L": 40}, *cut)[1], padded)


@pytest.mark.parametrize("kind", ["constant", "mixed", "wide"])
def test_long_scans_keep_their_precision(kind: str) -> None:
    """2048 tokens, dt · a from −1e-4 to −20: steady decays close to 1 must not drift."""
    case = SCANS["tails, one head a group"]
    sizes = {"B": 1, "L": 2048}
    given = operands(case, sizes, [2048], 8)
    random = torch.rand(given[1].shape, generator=torch.Generator().manual_seed(9))
    decays = {
        "constant": torch.tensor([1.1e-4, 1.37e-4, 3.3e-4]).expand(1, 2048, 3),
        "mixed": torch.where(random < 0.01, 20.0, 1e-4),
        "wide": 10 ** (random * 5.3 - 4),
    }
    given[1] = decays[kind] / -given[2]
    x, dt, a, b, c, state, _ = (t.double() for t in given)
    added = torch.einsum("blhp,blhn->blhpn", x * dt[..., None], b)
    decay = (dt * a).exp()[..., None, None]
    states = []
    for t in range(2048):
        state = torch.addcmul(added[:, t], state, decay[:, t])
        states.append(state)
    y, final = case.run(sizes, *given)
    assert relative_error(y, torch.einsum("blhpn,blhn->blhp", torch.stack(states, 1), c)) < 3e-6
    assert relative_error(final, state) < 3e-6
