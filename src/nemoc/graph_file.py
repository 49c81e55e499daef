"""Graphs in files of IR text."""

from pathlib import Path

from nemoc.ir import Graph, NemocError, parse


def read_graph(path: Path) -> Graph:
    """The graph in a file.

    Raises:
        NemocError: it cannot be read or holds no graph.
    """
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise NemocError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise NemocError(f"{path}: is no text, expected a graph") from None
