"""Pipelines: passes in order, their text form, and the driver that runs and checks them.

    canonicalize, cse, fuse-epilogue{max-ops=4}, dce

`print_pipeline(parse_pipeline(text))` parses back to equal passes.
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nemoc.ir.errors import NemocError
from nemoc.ir.graph import Graph
from nemoc.ir.verifier import verify as verify_graph
from nemoc.passes.base import Pass
from nemoc.passes.context import PassContext
from nemoc.passes.options import nearest, option_types, print_options, read_option
from nemoc.passes.registry import passes_by_name

_TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[A-Za-z0-9_.*/:+\-]+|[{}\[\],=])')


class PassError(NemocError):
    """A pass failed; the message names it, its position and the pipeline that reproduces it."""


@dataclass(frozen=True)
class PassRun:
    """One pass that ran.

    Attributes:
        passes: the whole pipeline.
        position: where in it the pass stands, from 0.
        before: the graph that it was given.
        after: the graph that it made; `before` itself when it changed nothing.
        seconds: how long it took, verification left out.
    """

    passes: tuple[Pass, ...]
    position: int
    before: Graph
    after: Graph
    seconds: float

    @property
    def pass_(self) -> Pass:
        """The pass."""
        return self.passes[self.position]

    @property
    def place(self) -> str:
        """`pass 3 of 7 (cse)`."""
        return _place(self.passes, self.position)

    @property
    def reproduces(self) -> str:
        """The pipeline up to and including the pass."""
        return print_pipeline(self.passes[: self.position + 1])


PRESET = "preset"
"""What stands in a pipeline's text for the passes that run where no pipeline is given."""


def parse_pipeline(
    text: str, extra: Sequence[type[Pass]] = (), usual: tuple[Pass, ...] | None = None
) -> tuple[Pass, ...]:
    """Read a pipeline.

    Args:
        text: pass names with options in braces, separated by commas.
        extra: pass classes of the user's own, beside the registered ones.
        usual: what `PRESET` stands for among the names; None where it means nothing.

    Raises:
        NemocError: an unknown pass or option, or a value that does not fit.
    """
    known = passes_by_name(extra)
    tokens = _tokens(text)
    passes: list[Pass] = []
    begun = False
    while tokens:
        if begun:
            _expect(tokens, ",")
            if not tokens:
                raise NemocError("pipeline: found the end, expected a pass")
        begun = True
        if usual is not None and tokens[:1] == [PRESET]:
            tokens.pop(0)
            passes += usual
        else:
            passes.append(_parse_pass(tokens, known))
    return tuple(passes)


def print_pipeline(passes: Sequence[Pass]) -> str:
    """The text of a pipeline."""
    return ",".join(p.name + print_options(p) for p in passes)


def run_pipeline(
    graph: Graph,
    passes: Sequence[Pass],
    ctx: PassContext,
    *,
    verify: bool = True,
    check: Callable[[PassRun, PassContext], None] | None = None,
    on_pass: Callable[[PassRun], None] | None = None,
) -> Graph:
    """Run passes one after the other.

    Args:
        graph: what to rewrite.
        passes: in order.
        ctx: handed to every pass.
        verify: verify the graph before the first pass and after each that changed it.
        check: called after each pass that changed the graph; raises when the pass broke its word (see
            `nemoc.passes.check`).
        on_pass: called after each pass that held, changed or not: timing, printing.

    Raises:
        IRError: the graph is not valid to begin with.
        PassError: a pass raised, made an invalid graph, or failed the check.
    """
    if verify:
        verify_graph(graph)
    ordered = tuple(passes)
    for position in range(len(ordered)):
        run = run_pass(graph, ordered, position, ctx, verify=verify)
        if check is not None and run.after is not graph:
            with _blaming(ordered, position):
                check(run, ctx)
        if on_pass is not None:
            on_pass(run)
        graph = run.after
    return graph


def run_pass(
    graph: Graph,
    passes: tuple[Pass, ...],
    position: int,
    ctx: PassContext,
    *,
    verify: bool = True,
) -> PassRun:
    """Run one pass of a pipeline on what those before it made.

    Raises:
        PassError: it raised, or made an invalid graph.
    """
    with _blaming(passes, position):
        started = time.perf_counter()
        after = passes[position].run(graph, ctx)
        seconds = time.perf_counter() - started
        if verify and after is not graph:
            verify_graph(after)
    return PassRun(passes, position, graph, after, seconds)


@contextlib.contextmanager
def _blaming(passes: tuple[Pass, ...], position: int) -> Iterator[None]:
    """Turn any other error into a `PassError` that names the pass."""
    try:
        yield
    except PassError:
        raise
    except (Exception, SystemExit) as error:
        raise _failure(passes, position, error) from error


def _failure(passes: tuple[Pass, ...], position: int, error: BaseException) -> PassError:
    what = str(error) if isinstance(error, NemocError) else f"{type(error).__name__}: {error}"
    line = " ".join(what.split())
    reproduces = print_pipeline(passes[: position + 1])
    return PassError(
        f"{_place(passes, position)}: {line}; reproduce with --pipeline '{reproduces}'"
    )


def _place(passes: tuple[Pass, ...], position: int) -> str:
    return f"pass {position + 1} of {len(passes)} ({passes[position].name})"


def _tokens(text: str) -> list[str]:
    found, at, end = [], 0, len(text.rstrip())
    while at < end:
        match = _TOKEN.match(text, at)
        if match is None:
            raise NemocError(f"pipeline: unexpected {text[at:].strip()[:1]!r} in {text!r}")
        found.append(match.group(1))
        at = match.end()
    return found


def _expect(tokens: list[str], sign: str) -> None:
    if tokens[:1] != [sign]:
        found = repr(tokens[0]) if tokens else "the end"
        raise NemocError(f"pipeline: found {found}, expected {sign!r}")
    tokens.pop(0)


def _parse_pass(tokens: list[str], known: dict[str, type[Pass]]) -> Pass:
    name = tokens.pop(0)
    if name not in known:
        raise NemocError(f"unknown pass {name!r}{nearest(name, known)}")
    cls = known[name]
    options: dict[str, Any] = {}
    if tokens[:1] == ["{"]:
        tokens.pop(0)
        while tokens[:1] != ["}"]:
            if options:
                _expect(tokens, ",")
            _parse_option(cls, options, tokens)
        tokens.pop(0)
    return cls(**options)


def _parse_option(cls: type[Pass], options: dict[str, Any], tokens: list[str]) -> None:
    if not tokens:
        _expect(tokens, "}")
    kinds = option_types(cls)
    name = tokens.pop(0)
    field = name.replace("-", "_")
    if name not in kinds:
        raise NemocError(f"pass {cls.name} has no option {name!r}{nearest(name, kinds)}")
    if field in options:
        raise NemocError(f"pass {cls.name}: option {name} is given twice")
    _expect(tokens, "=")
    options[field] = read_option(cls.name, name, kinds[name], tokens)
