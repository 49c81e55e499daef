"""Attention over the cache, vectorised over query rows.

The query heads that share a kv head, times a block of tokens, are the rows of a tile; they fill the lanes. So keys and
values are read in their natural layout, one broadcast element at a time, each used for all rows; maxima and sums run
along lanes and nothing is reduced across them. Softmax is online (Milakov and Gimelshein, arXiv 1805.02867):

    queries into a tile [D, rows];  m ← −1e30, l ← 0, o[D, rows] ← 0
    for each block of keys (cached rows), widened to f32 into a tile [keys, D], zeros behind the last one that is seen:
        s[key, rows] = Σ k[key, d] · q[d, rows], or −1e30 where the row does not see the key
        m' = max(m, max s);  p = exp(s − m');  l ← l · exp(m − m') + Σ p
        o ← o · exp(m − m') + Σ v[key, d] · p[key, rows];  m ← m'
    y = o / l

Prefill has a task for each kv head and some tiles of query rows, and takes a block of keys into all of these that see
any of it: so keys and values are read, and widened, once for hundreds of rows. Decode (L = 1) splits the cached rows
instead: a task takes up to 1 / splits of them with all their heads, which makes one stream through memory, and leaves
(o, m, l) in scratch; a second launch merges the parts. Where few query heads share a kv head, which would leave lanes
idle, decode has another form (`nemoc.codegen.tvm.attention_step`).
"""

import sympy

from nemoc.codegen.plan import Arg, Plan, Site, Stage, View
from nemoc.codegen.tunables import Tunable
from nemoc.codegen.tvm.attention_step import emit_attention_step, takes
from nemoc.codegen.tvm.flash import MASKED, Flash
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.codegen.tvm.vmath import VectorMath
from nemoc.codegen.tvm.writer import KernelWriter, size_text
from nemoc.ir.dims import ceil_div, dim, product
from nemoc.ir.dtypes import DType
from nemoc.ir.ops.attention import Attention
from nemoc.ir.types import TensorType

SPLITS = Tunable("splits", 16, (8, 16, 32), keeps_bits=False)
"""Parts of the cached rows in decode, at most."""

KEYS_PER_SPLIT = Tunable("keys_per_split", 64, (32, 64, 128, 256), keeps_bits=False)
"""Cached rows that a decode task takes, at least; a multiple of those of a block."""

_VECTORS = Tunable("vectors", 2, (1, 2, 4), keeps_bits=False)
"""Vectors of query rows in a tile of a prefill task."""

_TILES = Tunable("tiles", 16, (4, 8, 16, 32), keeps_bits=False)
"""Tiles of a prefill task at most: cached rows are read once for all of them."""

_TILES_BYTES = 512 << 10
"""Bytes of the queries and sums of a task's tiles at most, if it has several: they lie on the stack."""

_LEAST_TASKS = 16
"""Tasks at least of a prefill step, where it has so many tiles."""

_Y = Arg("result", 0)
_SUMS = Arg("scratch", 0)
_SOFTMAX = Arg("scratch", 1)


def emit_attention(site: Site, target: CpuTarget) -> Plan:
    """The plan of an `Attention`."""
    assert isinstance(site.op, Attention)
    if site.view(_Y).shape[1] == 1:
        return _decode(site, target)
    return Plan((_prefill(site, target),))


def _prefill(site: Site, target: CpuTarget) -> Stage:
    w = KernelWriter("attention", site.choices)
    batch, length, _, width = site.view(_Y).shape
    vectors = w.pick(_VECTORS)
    room = _TILES_BYTES // (8 * int(width) * target.lanes * vectors)
    flash = Flash(w, site, target, target.lanes, vectors, tiles=max(1, min(w.pick(_TILES), room)))
    tiles = ceil_div(dim(length * flash.shared), flash.rows)
    most, least = ceil_div(tiles, flash.tiles), -(-_LEAST_TASKS // flash.kv_heads)
    blocks = dim(sympy.Max(most, sympy.Min(tiles, least)))
    number = w.let("number", f"task % {size_text(blocks)}")
    # Later rows see more keys: blocks are taken from both ends in turn, so that each thread's range has its share.
    far = f"{size_text(blocks)} - 1 - {number} // 2"
    block = w.let("block", f"T.if_then_else({number} % 2 == 0, {number} // 2, {far})")
    rest = w.let("rest", f"task // {size_text(blocks)}")
    # In memory: where it sees how these are made, TVM takes seven times as long to simplify what follows.
    ends = w.local("ends", 2, dtype="int32")
    count, among = size_text(tiles), size_text(blocks)
    for at, part in enumerate((block, f"({block} + 1)")):
        even = f"{part} * ({count} // {among})"
        w.line(f"{ends}[{at}] = {even} + T.min({part}, {count} % {among})")
    flash.begin(
        f"{rest} // {flash.kv_heads}",
        f"{rest} % {flash.kv_heads}",
        f"{ends}[0] * {flash.rows}",
        f"{ends}[1] - {ends}[0]",
    )
    flash.load_queries()
    flash.attend("0", flash.reach)
    flash.store_result(_Y)
    return w.finish(product((batch, flash.kv_heads, blocks)))


def _decode(site: Site, target: CpuTarget) -> Plan:
    splits = int(site.choices.pick(SPLITS))
    if takes(site, target):
        least = int(site.choices.pick(KEYS_PER_SPLIT))
        return emit_attention_step(site, target, splits, least)
    batch, _, heads, width = site.view(_Y).shape
    kv_heads = site.view(site.arg("k")).shape[2]
    shared = int(heads) // int(kv_heads)
    lanes = next(n for n in (4, 8, 16) if n >= min(shared, target.lanes))
    vectors = -(-shared // lanes)
    lead = (batch, splits, kv_heads)
    sums = View.dense(TensorType.of(DType.F32, (*lead, width * vectors * lanes)))
    softmax = View.dense(TensorType.of(DType.F32, (*lead, 2, vectors * lanes)))
    split, merge = (
        Flash(
            KernelWriter(f"attention_{stem}", site.choices),
            site,
            target,
            lanes,
            vectors,
            heads=int(kv_heads),
        )
        for stem in ("split", "merge")
    )
    stages = (_split(split, sums, softmax), _merge(merge, sums, softmax))
    return Plan(stages, scratch=(sums, softmax))


def _split(flash: Flash, sums: View, softmax: View) -> Stage:
    """o, m and l over one part of the cached rows; nothing for a part without rows."""
    w = flash.writer
    splits = w.pick(SPLITS)
    split = w.let("split", f"task % {splits}")
    flash.begin(f"task // {splits}", "0", "0")
    size = _part(flash)
    first = w.let("start", f"{split} * {size}")
    with w.block(f"if {first} >= {flash.reach}:"):
        w.line("return 0")
    flash.load_queries()
    flash.attend(first, w.let("end", f"T.min({first} + {size}, {flash.reach})"))
    lead = f"{flash.batch}, {split}"
    flash.store_state(w.buffer("sums", _SUMS, sums), w.buffer("softmax", _SOFTMAX, softmax), lead)
    return w.finish(product((sums.shape[0], splits)))


def _merge(flash: Flash, sums: View, softmax: View) -> Stage:
    """y from the parts: their o scaled to a common maximum, summed, and divided by the sum of their l."""
    w, lanes = flash.writer, flash.lanes
    math = VectorMath(w, lanes)
    flash.begin(f"task // {flash.kv_heads}", f"task % {flash.kv_heads}", "0")
    size = _part(flash)
    count = w.let("count", f"({flash.reach} + {size} - 1) // {size}")
    o, state = w.buffer("sums", _SUMS, sums), w.buffer("softmax", _SOFTMAX, softmax)
    y = w.buffer("y", _Y, flash.site.view(_Y))

    def part(name: str, s: str, index: str) -> str:
        return w.load(name, f"{flash.batch}, {s}, {flash.head}, {index}", lanes)

    weights, row = w.local("weights", w.pick(SPLITS), lanes), w.local("row", lanes)
    for first in range(0, flash.rows, lanes):
        top = w.value("top", math.const(MASKED), lanes)
        with w.loop("s", count) as s:
            w.line(f"{top} = T.max({top}, {part(state, s, f'0, {first}')})")
        total = w.value("total", math.const(0.0), lanes)
        with w.loop("s", count) as s:
            rest = w.value("rest", f"{part(state, s, f'0, {first}')} - {top}", lanes)
            w.line(f"{weights}[{s}] = {math.exp(rest)}")
            w.line(f"{total} = {total} + {weights}[{s}] * {part(state, s, f'1, {first}')}")
        with w.loop("d", flash.width) as d:
            acc = w.value("acc", math.const(0.0), lanes)
            with w.loop("s", count) as s:
                piece = part(o, s, f"{d} * {flash.rows} + {first}")
                w.line(f"{acc} = {acc} + {weights}[{s}] * {piece}")
            w.line(f"{row}[T.Ramp(0, 1, {lanes})] = {acc} / {total}")
            with w.loop("g", min(lanes, flash.shared - first)) as g:
                head = f"{flash.head} * {flash.shared} + {first} + {g}"
                w.line(f"{y}[{flash.batch}, 0, {head}, {d}] = {row}[{g}]")
    return w.finish(product((sums.shape[0], flash.kv_heads)))


def _part(flash: Flash) -> str:
    """Cached rows in each part: as equal as whole blocks of keys allow."""
    writer, keys = flash.writer, flash.keys
    together = writer.pick(SPLITS) * keys
    blocks = f"({flash.reach} + {together - 1}) // {together}"
    return writer.let("size", f"T.max({writer.pick(KEYS_PER_SPLIT)}, {blocks} * {keys})")
