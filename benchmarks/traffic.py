"""Bytes that a layer moves, counted and by its closed form: `python -m benchmarks.traffic --json FILE`.

The kernels of one layer of each kind, and of what stands around the layers, run one by one on instrumented builds
(`nemoc.codegen.tvm.instrument`), unfused and fused. For every site the distinct bytes that its launches touch stand
beside those that its op says it needs; for every layer, the sums over all launches.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.fusions import variants
from nemoc import compiler
from nemoc.codegen.plan import Site
from nemoc.codegen.storage import Weight, bind_weights, weight_layout
from nemoc.codegen.tvm.instrument import SiteTraffic, Traffic, count_traffic
from nemoc.codegen.tvm.target import cpu_target
from nemoc.ir import Graph
from nemoc.ir.cutting import cut
from nemoc.ir.graph import Node
from nemoc.ir.params import ParameterSource
from nemoc.ir.region import Fused
from nemoc.ir.sample_inputs import sample_arguments
from nemoc.models import Model, open_model
from nemoc.runtime.weights import weight_pieces

_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class Row:
    """One site, or the sum of a layer.

    Attributes:
        what: the op, or the kind of fusion, and its first result's type; of a sum, the kind of layer.
        launches: how many kernels run.
        expected: bytes read and written by the closed form.
        counted: distinct bytes of operands and results touched: by all launches of a site together; in a sum, by each.
        scratch: bytes of scratch, likewise.
    """

    what: str
    launches: int
    expected: int
    counted: int
    scratch: int

    @property
    def ratio(self) -> float:
        """Counted over expected."""
        return self.counted / self.expected if self.expected else 1.0


def layer_parts(graph: Graph, kinds: Sequence[str]) -> dict[str, Graph]:
    """One layer of each kind, the first that is neither first nor last if there is one, and all that is no layer's."""
    members: dict[int | None, list[Node]] = {}
    for node in graph.nodes:
        members.setdefault(_layer(graph, node), []).append(node)
    inner = range(1, len(kinds) - 1)
    chosen: dict[str, int] = {}
    for index in (*inner, 0, len(kinds) - 1):
        chosen.setdefault(kinds[index], index)
    parts = {kind: cut(graph, members[index], kind) for kind, index in sorted(chosen.items())}
    return {**parts, "around": cut(graph, members[None], "around")}


def _layer(graph: Graph, node: Node) -> int | None:
    """The number of a node's layer, by the names of its results and weights; none around the layers."""
    weights = (v for v in node.op.operands() if v in graph.params or v in graph.states)
    for value in (*node.results, *weights):
        if match := _LAYER.match(value.name):
            return int(match[1])
    return None


def arguments(
    graph: Graph, weights: Sequence[Weight], source: ParameterSource, sizes: Mapping[str, int]
) -> dict[str, torch.Tensor]:
    """Random activations and state, the model's weights, every row of L tokens behind T cached ones."""
    given = sample_arguments(graph, sizes, params=False)
    for name, count in (("valid", sizes["L"]), ("lengths", sizes["T"])):
        if name in given:
            given[name] = torch.full_like(given[name], count)
    pieces, by_name = weight_pieces(source), {w.name: w for w in weights}
    for param in graph.params:
        found = list(pieces(by_name[param.name]))
        given[param.name] = torch.cat(found) if found[0].dim() else found[0]
    return given


def count(
    model: Model, function: str, pipeline: str, sizes: Mapping[str, int]
) -> dict[str, list[Row]]:
    """For each part its sites, and behind them their sum."""
    found = compiler.functions(model, "cpu", pipeline, which=(function,))
    graphs, weights = bind_weights(found.graphs)
    source = model.parameters
    assert source is not None
    return {
        name: _rows(
            count_traffic(
                {name: part},
                weight_layout(weights),
                lambda graph: arguments(graph, weights, source, sizes),
                sizes,
                cpu_target(),
            )
        )
        for name, part in layer_parts(graphs[function], model.config.layers).items()
    }


def _rows(traffic: Traffic) -> list[Row]:
    sites = [_site_row(site) for site in traffic.sites]
    # A node's site differs from the one that was run in nothing that its closed form depends on.
    expected = {
        Site.dense(site.site.op).key: row.expected
        for site, row in zip(traffic.sites, sites, strict=True)
    }
    (graph,) = traffic.program.graphs
    launches = tuple(traffic.launches)
    total = Row(
        f"{graph.name} in all",
        len(launches),
        sum(expected.get(Site.dense(node.op).key, 0) for node in graph.nodes),
        sum(launch.outer.bytes for launch in launches),
        sum(launch.scratch.bytes for launch in launches),
    )
    return [*sites, total]


def _site_row(site: SiteTraffic) -> Row:
    op = site.site.op
    name = op.kind if isinstance(op, Fused) else op.mnemonic()
    return Row(
        f"{name} {op.result_types()[0]}",
        len(site.launches),
        sum(site.expected_reads) + sum(site.expected_writes),
        sum(site.reads) + sum(site.writes),
        sum(launch.scratch.bytes for launch in site.launches),
    )


@click.command()
@click.option("--source", default="random:mid", help="A model with weights.")
@click.option("--function", "names", multiple=True, default=("prefill", "decode"))
@click.option("--tokens", default=256, help="Tokens of a prefill, and before a decode.")
@click.option("--pipeline", "given", multiple=True, help="NAME=TEXT, instead of unfused and fused.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Where to write the figures.")
def main(
    source: str, names: tuple[str, ...], tokens: int, given: tuple[str, ...], out: Path | None
) -> None:
    """Print tables of sites and layers, and write them as JSON."""
    model = open_model(source)
    pipelines = dict(text.split("=", 1) for text in given) or dict(islice(variants(), 2))
    report: dict[str, Any] = {"source": source, "tokens": tokens, "pipelines": pipelines}
    for name in names:
        new, cached = (1, tokens) if name == "decode" else (tokens, 0)
        sizes = {"B": 1, "L": new, "C": cached + new, "T": cached}
        for label, text in pipelines.items():
            parts = count(model, name, text, sizes)
            report[f"{name}, {label}"] = {
                part: [asdict(row) | {"ratio": row.ratio} for row in rows]
                for part, rows in parts.items()
            }
            click.echo(f"{name} of {new} behind {cached} tokens, {label}")
            for rows in parts.values():
                _print(rows)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")


def _print(rows: Sequence[Row]) -> None:
    head = "".join(f"{title:>14}" for title in ("closed form", "counted", "ratio", "scratch"))
    click.echo(f"{'site':<44}{'launches':>10}{head}  bytes")
    for row in rows:
        click.echo(
            f"{row.what:<44}{row.launches:>10}{row.expected:>14,}{row.counted:>14,}"
            f"{row.ratio:>14.3f}{row.scratch:>14,}"
        )
    click.echo()


if __name__ == "__main__":
    main()
