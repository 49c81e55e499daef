"""Regions around a state-space recurrence for tests, and operands for them."""

from collections.abc import Sequence

import torch

from nemoc.codegen.plan import Site
from nemoc.ir import Builder, DType, Env, Op
from nemoc.ir.dims import B, L
from nemoc.ir.fusion import fuse
from nemoc.ir.ops import (
    Add,
    CausalConv,
    Fused,
    Mul,
    Reshape,
    RmsNorm,
    Silu,
    Slice,
    Softplus,
    SsdScan,
    SsdUpdate,
)

F32 = DType.F32


def mixer_region(
    heads: int,
    width: int,
    groups: int,
    size: int,
    taps: int = 4,
    *,
    decode: bool = False,
    activation: type[Op] | None = Silu,
    bias: bool = True,
    skip: bool = True,
    gate: bool = True,
    norms: int = 0,
) -> Fused:
    """The region of a Mamba-2 layer between its projections.

    Args:
        heads, width, groups, size: H, P, G and N.
        taps: K.
        decode: whether it is the step of one token.
        activation: the op behind the convolution.
        bias, skip, gate: whether the convolution has a bias, the recurrence a d, and y a gate.
        norms: groups of the norm behind the gate; 0 for no norm.
    """
    b = Builder("layer")
    length, inner, shared = 1 if decode else L, heads * width, groups * size
    channels = inner + 2 * shared
    xbc, z, dt = (
        b.input(n, F32, (B, length, w)) for n, w in (("xbc", channels), ("z", inner), ("dt", heads))
    )
    w, shift, history = (
        b.input("w", F32, (channels, taps)),
        b.input("bias", F32, (channels,)) if bias else None,
        b.input("history", F32, (B, taps - 1, channels)),
    )
    valid = b.input("valid", DType.I32, (B,))
    dt_bias, a = b.input("dt_bias", F32, (heads,)), b.input("a", F32, (heads,))
    d = b.input("d", F32, (heads,)) if skip else None
    state = b.input("state", F32, (B, heads, width, size))
    mixed, _ = conv = b.all(CausalConv(xbc, w, shift, history, valid))
    mixed = b(activation(mixed)) if activation else mixed  # type: ignore[call-arg]
    lead = (B,) if decode else (B, L)
    cuts = ((0, inner), (inner, inner + shared), (inner + shared, channels))
    x, into, out = (
        b(Reshape(b(Slice(mixed, 2, start, stop)), (*lead, count, each)))
        for (start, stop), count, each in zip(
            cuts, (heads, groups, groups), (width, size, size), strict=True
        )
    )
    step = b(Softplus(b(Add(dt, dt_bias))))
    if decode:
        step = b(Reshape(step, (B, heads)))
        y, following = b.all(SsdUpdate(x, step, a, into, out, d, state))
    else:
        y, following = b.all(SsdScan(x, step, a, into, out, d, state, valid))
    y = b(Reshape(y, (B, length, inner)))
    if gate:
        y = b(Mul(y, b(Silu(z))))
    if norms:
        y = b(RmsNorm(y, b.input("weight", F32, (inner,)), 1e-5, norms))
    graph = b.finish((y, conv[1], following))
    (node,) = fuse(graph, graph.nodes, "conv-scan").nodes
    assert isinstance(node.op, Fused)
    return node.op


def mixer_operands(
    site: Site, sizes: dict[str, int], valid: Sequence[int], seed: int
) -> list[torch.Tensor]:
    """Random operands of a region: the recurrence's a is negative, integers are `valid`."""
    assert isinstance(site.op, Fused)
    generator = torch.Generator().manual_seed(seed)
    env = Env({"B": 1, "L": 1, "C": 1} | sizes)
    rates = {n.op.a for n in site.op.body.nodes if isinstance(n.op, SsdScan | SsdUpdate)}
    found = []
    for value in site.op.body.inputs:
        if value.dtype == DType.I32:
            found.append(torch.tensor(valid, dtype=torch.int32))
            continue
        values = torch.randn(env.shape(value.shape), generator=generator)
        found.append(-values.exp() if value in rates else values)
    return found
