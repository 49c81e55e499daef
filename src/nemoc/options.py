"""Settings from the environment. No other file of nemoc reads it."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nemoc.ir.errors import NemocError

_PREFIX = "NEMOC_"


@dataclass(frozen=True)
class Options:
    """What a user may set for every command at once; each field is one variable.

    Attributes:
        threads: `NEMOC_THREADS`, the threads that executables and references run on; none: one for
            each core that the process may use.
        plugins: `NEMOC_PLUGINS`, modules with passes of the user's own, separated by commas.
        debug: `NEMOC_DEBUG`, whether errors show their traceback.
        cache: `NEMOC_CACHE`, the folder of compiled kernels and of what tuning found, which may be deleted at any time
            and is then made anew; by default `nemoc` in the user's cache folder.
    """

    threads: int | None = None
    plugins: tuple[str, ...] = ()
    debug: bool = False
    cache: Path = field(default_factory=lambda: _cache_folder({}))


def read_options(environment: Mapping[str, str] | None = None) -> Options:
    """The settings in an environment; the process's own by default.

    Raises:
        NemocError: a variable holds something else than it should, or nemoc knows no such variable.
    """
    found = os.environ if environment is None else environment
    known = {_PREFIX + field.upper() for field in Options.__dataclass_fields__}
    for name in found:
        if name.startswith(_PREFIX) and name not in known:
            raise NemocError(f"{name}: no such setting, expected one of {', '.join(sorted(known))}")
    plugins = found.get("NEMOC_PLUGINS", "")
    return Options(
        threads=_threads(found.get("NEMOC_THREADS", "")),
        plugins=tuple(name.strip() for name in plugins.split(",") if name.strip()),
        debug=_flag("NEMOC_DEBUG", found.get("NEMOC_DEBUG", "")),
        cache=_cache_folder(found),
    )


def _cache_folder(environment: Mapping[str, str]) -> Path:
    """As the XDG base directory specification has it."""
    if own := environment.get("NEMOC_CACHE"):
        return Path(own)
    general = environment.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(general) / "nemoc"


def _threads(text: str) -> int | None:
    if not text:
        return None
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < 1:
        raise NemocError(f"NEMOC_THREADS: found {text!r}, expected a number of threads, at least 1")
    return int(text)


def _flag(name: str, text: str) -> bool:
    if text not in ("", "0", "1"):
        raise NemocError(f"{name}: found {text!r}, expected 0 or 1")
    return text == "1"
