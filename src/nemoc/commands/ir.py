"""`nemoc ir`: a model's graph as text, or what it costs."""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from nemoc.compiler import functions, passes_of, plugin_classes, plugin_ops
from nemoc.graph_file import read_graph
from nemoc.ir import DType, Graph, NemocError, print_graph
from nemoc.models import open_model
from nemoc.models.summary import render_summary, summarize
from nemoc.passes import Pass, PassContext, PassRun, Remark, run_pipeline
from nemoc.passes.check import NumericCheck
from nemoc.passes.pipeline import PRESET
from nemoc.remarks import Shape, render_remarks
from nemoc.targets import resolve_target, target_info

_ALL = "all"


def run(
    source: str,
    summary: bool,
    *,
    function: str,
    target: str | None,
    pipeline: str | None,
    plugins: tuple[str, ...],
    print_after: str | None,
    remarks: bool,
    sites: bool,
    batch: int,
    tokens: int,
    cached: int,
    verify_each: bool,
) -> None:
    """Print the summary, or the graph of a function after the passes asked for, or what they did."""
    if sites and not remarks:
        raise NemocError("--sites needs --remarks, which it lists site by site")
    if summary:
        _print_summary(source)
        return
    name = resolve_target(target)
    if pipeline is None:
        pipeline = PRESET if print_after or remarks or verify_each else ""
    passes = named_passes(function, name, pipeline, plugins)
    check = NumericCheck() if verify_each else None
    printer = _printer(passes, print_after)
    graph, said = rewritten(source, function, name, passes, check, printer, plugins)
    if remarks:
        shape = Shape(batch, 1 if function == "decode" else tokens, cached)
        for line in render_remarks([p.name for p in passes], said, shape, sites):
            click.echo(line)
    elif print_after is None:
        click.echo(print_graph(graph), nl=False)


def named_passes(
    function: str, target: str, pipeline: str, plugins: tuple[str, ...]
) -> tuple[Pass, ...]:
    """The passes that a pipeline's text means."""
    return passes_of(function, target, pipeline, plugin_classes(plugins))


def rewritten(
    source: str,
    function: str,
    target: str,
    passes: tuple[Pass, ...],
    check: Callable[[PassRun, PassContext], None] | None = None,
    on_pass: Callable[[PassRun], None] | None = None,
    plugins: tuple[str, ...] = (),
) -> tuple[Graph, Sequence[Remark]]:
    """The graph of a model's function, or of a file of IR text, after passes; and what they said.

    Args:
        source, target: as for `nemoc.compile`, or NAME.ir.
        function: `prefill` or `decode`.
        passes, check, on_pass: as for `run_pipeline`.
        plugins: ops of their modules may occur in a file.
    """
    if _is_text(source):
        ctx = PassContext(target_info(target, threads=1))
        stored = read_graph(Path(source), plugin_ops(plugins))
        graph = run_pipeline(stored, passes, ctx, check=check, on_pass=on_pass)
        return graph, ctx.remarks
    found = functions(
        source,
        target,
        passes,
        which=(function,),
        check=check,
        on_pass=None if on_pass is None else lambda _, run: on_pass(run),
    )
    return found.graphs[function], found.remarks


def _is_text(source: str) -> bool:
    return source.endswith(".ir")


def _printer(passes: tuple[Pass, ...], print_after: str | None) -> Callable[[PassRun], None] | None:
    """What prints the graph after the passes of that name."""
    if print_after is None:
        return None
    names = [p.name for p in passes]
    if print_after not in (*names, _ALL):
        found = ", ".join(dict.fromkeys(names)) or "none"
        raise NemocError(
            f"--print-after {print_after}: no such pass in the pipeline, found {found}"
        )

    def print_it(run: PassRun) -> None:
        if print_after in (run.pass_.name, _ALL):
            change = "" if run.after is not run.before else ", which changed nothing"
            click.echo(f"// after {run.place}{change}")
            click.echo(print_graph(run.after))

    return print_it


def _print_summary(source: str) -> None:
    if _is_text(source):
        raise NemocError(f"{source}: --summary needs a model, found a graph")
    model = open_model(source)
    found = summarize(model.config, DType.F32, model.weight_types, model.quantization.formats)
    pattern = "\n".join(textwrap.wrap(model.config.pattern, 76))
    click.echo(render_summary(found, model.name), nl=False)
    click.echo(f"\nlayers in order\n{textwrap.indent(pattern, '  ')}")
