"""Writing new rows into a KV cache."""

from nemoc.codegen.plan import Plan, Site
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.codegen.tvm.vectors import vector_pieces
from nemoc.codegen.tvm.writer import KernelWriter, size_text
from nemoc.ir.dims import product
from nemoc.ir.ops.attention import CacheWrite


def emit_cache_write(site: Site, target: CpuTarget) -> Plan:
    """The plan of a `CacheWrite`: a task copies the bits of one new row; the rest of the cache stays."""
    assert isinstance(site.op, CacheWrite)
    w = KernelWriter("cache_write")
    rows, lengths, cache = (site.arg(name) for name in ("rows", "lengths", "cache"))
    source, start, sink = (w.buffer(str(a), a, site.view(a)) for a in (rows, lengths, cache))
    batch, length, heads, width = site.view(rows).shape
    capacity = size_text(site.view(cache).shape[1])
    b = w.let("b", f"task // {size_text(length)}")
    t = w.let("t", f"task % {size_text(length)}")
    to = w.let("to", f"{start}[{b}] + {t}")
    widest = target.vector_bits // 8 // site.view(cache).dtype.bytes
    contiguous = all(site.view(a).strides[-1] == 1 for a in (rows, cache))
    with w.block(f"if {to} < {capacity}:"), w.loop("h", int(heads)) as h:
        for lanes, count, first in vector_pieces(int(width), widest if contiguous else 1):
            with w.loop("v", count) as v:
                at = f"{first} + {v} * {lanes}"
                index = at if lanes == 1 else f"T.Ramp({at}, 1, {lanes})"
                w.line(f"{sink}[{b}, {to}, {h}, {index}] = {source}[{b}, {t}, {h}, {index}]")
    return Plan((w.finish(product((batch, length))),), updates=((0, cache.index),))
