"""`nemoc ir`: a model's graph as text, or what it costs."""

import textwrap
from collections.abc import Callable
from pathlib import Path

import click
from rich.console import Console

from nemoc.compiler import functions, passes_of, plugin_classes
from nemoc.ir import Graph, NemocError, parse, print_graph
from nemoc.ir.cost import Cost
from nemoc.ir.dims import dim, format_dim, substitute_dim
from nemoc.models import open_model
from nemoc.passes import Pass, PassContext, PassRun, run_pipeline
from nemoc.summary import Summary, per_token, summarize
from nemoc.targets import resolve_target, target_info
from nemoc.terminal import count, heading, print_table, report, short

_PRESET = "preset"
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
) -> None:
    """Print the summary, or the graph of a function after the passes asked for."""
    if summary:
        _print_summary(source)
        return
    name = resolve_target(target)
    if pipeline is None:
        pipeline = _PRESET if print_after else ""
    passes = passes_of(
        function, name, None if pipeline == _PRESET else pipeline, plugin_classes(plugins)
    )
    graph = _rewritten(source, function, name, passes, _printer(passes, print_after))
    if print_after is None:
        click.echo(print_graph(graph), nl=False)


def _rewritten(
    source: str,
    function: str,
    target: str,
    passes: tuple[Pass, ...],
    on_pass: Callable[[PassRun], None] | None,
) -> Graph:
    if _is_text(source):
        ctx = PassContext(target_info(target, threads=1))
        return run_pipeline(_parsed(source), passes, ctx, on_pass=on_pass)
    found = functions(
        source,
        target,
        passes,
        which=(function,),
        on_pass=None if on_pass is None else lambda _, run: on_pass(run),
    )
    return found.graphs[function]


def _is_text(source: str) -> bool:
    return source.endswith(".ir")


def _parsed(path: str) -> Graph:
    try:
        return parse(Path(path).read_text(encoding="utf-8"), path)
    except OSError as error:
        raise NemocError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise NemocError(f"{path}: is no text, expected a graph") from None


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
        graph = _parsed(source)
        name, layers = graph.name, ""
        kinds: tuple[str, ...] = ()
    else:
        model = open_model(source)
        graph, kinds = model.build_step(), tuple(model.config.layers)
        name, layers = model.name, f"{len(kinds)} layers {model.config.pattern}"
    found = summarize(graph, kinds)
    console = report()
    console.print(f"{name}: {layers}".rstrip(": "), style="bold", soft_wrap=True)
    _print_totals(console, found)
    _print_parts(console, found)
    _print_forms(console, found)


def _print_totals(console: Console, found: Summary) -> None:
    fixed = int(substitute_dim(found.state_bytes, {"B": 1, "C": 0}))
    longer = int(substitute_dim(found.state_bytes, {"B": 1, "C": 1})) - fixed
    console.print(f"  parameters          {count(found.total.parameters)}")
    console.print(f"  active per token    {count(found.total.active)}")
    console.print(
        f"  state of a row      {count(fixed)} bytes + {count(longer)} per token of context"
    )


def _print_parts(console: Console, found: Summary) -> None:
    heading(console, "Decoding one token")
    rows = []
    for part in (*found.parts, found.total):
        cost = _without_context(per_token(part.cost))
        rows.append(
            (
                part.name,
                str(part.layers or ""),
                short(part.parameters),
                short(part.active),
                short(cost.flops),
                short(cost.bytes, "B"),
            )
        )
    columns = ("part", ">layers", ">parameters", ">active", ">flops", ">bytes moved")
    print_table(console, columns, rows)
    whole, short_context = (
        per_token(found.total.cost),
        _without_context(per_token(found.total.cost)),
    )
    flops, moved = (
        format_dim(dim(a - b))
        for a, b in ((whole.flops, short_context.flops), (whole.bytes, short_context.bytes))
    )
    console.print(f"and {flops} flops, {moved} bytes for T tokens of context before it")


def _without_context(cost: Cost) -> Cost:
    """The part of a cost that does not depend on the tokens cached."""
    none = {"T": 0}
    return Cost(*(substitute_dim(c, none) for c in (cost.flops, cost.read, cost.written)))


def _print_forms(console: Console, found: Summary) -> None:
    heading(console, "A step over B rows of L new tokens, with T cached ones and capacity C")
    cost = found.total.cost
    for name, form in (
        ("flops", cost.flops),
        ("bytes read", cost.read),
        ("bytes written", cost.written),
        ("bytes of state", found.state_bytes),
    ):
        text = f"{name} = {format_dim(form)}"
        console.print(textwrap.fill(text, 80, initial_indent="  ", subsequent_indent="      "))
