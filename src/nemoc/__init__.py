"""nemoc: a compiler for Nemotron-3-style hybrid language models.

`compile` turns a checkpoint into an `Executable`, `load` opens one that was saved. Names are imported when they
are first used, so that `import nemoc` loads neither torch nor a code generator.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemoc.compiler import compile, load
    from nemoc.ir.errors import NemocError
    from nemoc.runtime import Executable, State

__version__ = "0.1.0"

__all__ = ["Executable", "NemocError", "State", "__version__", "compile", "load"]

_HOMES = {
    "Executable": "nemoc.runtime",
    "NemocError": "nemoc.ir.errors",
    "State": "nemoc.runtime",
    "compile": "nemoc.compiler",
    "load": "nemoc.compiler",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'nemoc' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
