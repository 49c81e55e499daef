"""Single ops and regions alike: what kernels carry out is the body of a region."""

from dataclasses import replace

from nemoc.codegen.plan import Site
from nemoc.ir.builder import Builder
from nemoc.ir.graph import Graph
from nemoc.ir.region import Fused, Region


def body_of(site: Site) -> Graph:
    """The body of a region."""
    assert isinstance(site.op, Region)
    return site.op.body


def alone(site: Site) -> Site:
    """The site of an op as that of a region of this op alone, with one operand for each of the op's."""
    builder = Builder("body")
    values = site.op.operands()
    inputs = iter([builder.input(f"x{i}", v.dtype, v.shape, v.bound) for i, v in enumerate(values)])
    results = builder.all(site.op.map_operands(lambda _: next(inputs)))
    return replace(site, op=Fused(values, builder.finish(results)))


def as_region(site: Site) -> Site:
    """The site itself if it is a region's, else that of the op alone."""
    return site if isinstance(site.op, Region) else alone(site)
