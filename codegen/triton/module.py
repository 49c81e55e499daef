"""Kernels as a Python module: the functions that all share, then each distinct kernel once."""

import hashlib
import importlib.util
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from nemoc.codegen.plan import Kernel
from nemoc.codegen.triton.target import GpuTarget

_MARK = "# --- text of every module ---\n"

_COMPILED = """\
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

jit = triton.jit
F32_PRODUCTS = tl.constexpr("{products}")
WAITS = tl.constexpr({waits})
FP8 = tl.constexpr({fp8})
PTX = tl.constexpr({ptx})
"""

_INTERPRETED = """\
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

jit = InterpretedFunction
F32_PRODUCTS = "{products}"
WAITS = {waits}
FP8 = False
PTX = False
"""


def module_source(kernels: Iterable[Kernel], target: GpuTarget) -> str:
    """The text of a module.

    Args:
        kernels: what it defines; equal names are equal kernels.
        target: what compiles or interprets it.
    """
    device = Path(__file__).with_name("device.py").read_text()
    head = _INTERPRETED if target.is_interpreter else _COMPILED
    head = head.format(
        products=target.products,
        waits=target.waits,
        fp8=target.fp8,
        ptx=target.backend == "cuda",
    )
    sources = {kernel.name: kernel.source for kernel in kernels}
    return "\n\n".join([head + device[device.index(_MARK) + len(_MARK) :], *sources.values()])


def load_module(path: Path) -> ModuleType:
    """Import a file as a module of its own; Triton reads functions' text from the file."""
    name = f"nemoc_kernels_{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def written(source: str) -> Iterator[Path]:
    """A file with that text, for as long as it takes."""
    with tempfile.TemporaryDirectory(prefix="nemoc-") as folder:
        path = Path(folder) / "kernels.py"
        path.write_text(source)
        yield path
