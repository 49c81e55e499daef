"""Graphs in files of IR text."""

from pathlib import Path

from nemoc.ir import Graph, NemocError, Op, parse


def read_graph(path: Path, extra_ops: tuple[type[Op], ...] = ()) -> Graph:
    """The graph in a file.

    Args:
        path: of the file.
        extra_ops: op classes that may be in it beside those of the IR.

    Raises:
        NemocError: it cannot be read or holds no graph.
    """
    try:
        return parse(path.read_text(encoding="utf-8"), str(path), extra_ops)
    except OSError as error:
        raise NemocError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise NemocError(f"{path}: is no text, expected a graph") from None
