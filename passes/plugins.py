"""Passes of a user's own, found by module name or by entry point."""

import importlib
import importlib.metadata
from typing import Any

from nemoc.ir.errors import NemocError
from nemoc.passes.base import Pass

ENTRY_POINTS = "nemoc.passes"
"""The entry-point group in which installed packages announce pass classes."""


def load_plugin(module_name: str) -> tuple[type[Pass], ...]:
    """The pass classes in a module's `NEMOC_PASSES`.

    Raises:
        NemocError: there is no such module, it fails to import, or it lists something else.
    """
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise NemocError(f"plugin {module_name}: {type(error).__name__}: {error}") from error
    listed = getattr(module, "NEMOC_PASSES", None)
    if not isinstance(listed, list | tuple):
        raise NemocError(f"plugin {module_name} has no list NEMOC_PASSES of pass classes")
    return tuple(_pass_class(item, f"plugin {module_name}") for item in listed)


def load_entry_points() -> tuple[type[Pass], ...]:
    """The pass classes that installed packages announce.

    Raises:
        NemocError: one fails to import, or is something else.
    """
    found = []
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            loaded = entry.load()
        except (Exception, SystemExit) as error:
            what = f"{type(error).__name__}: {error}"
            raise NemocError(f"entry point {entry.name} ({entry.value}): {what}") from error
        found.append(_pass_class(loaded, f"entry point {entry.name}"))
    return tuple(found)


def _pass_class(item: Any, origin: str) -> type[Pass]:
    if not (isinstance(item, type) and issubclass(item, Pass)):
        raise NemocError(f"{origin}: {item!r} is no pass class")
    return item
