"""How long work tells what it is doing; imports nothing, so that every part may use it."""

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called as `progress(stage, done, total)`.

`stage` is a short phrase; one that differs from the last call's ends the stage before. `done` of `total` units of
work are complete; a total of 0 means that it is not known.
"""
