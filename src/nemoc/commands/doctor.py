"""`nemoc doctor`: what nemoc needs of a machine, what this one has, and what to do about the difference."""

import importlib.metadata
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import torch

from nemoc import __version__
from nemoc.codegen.threads import usable_processors
from nemoc.codegen.triton.target import GPUS
from nemoc.ir import NemocError
from nemoc.options import read_options
from nemoc.terminal import print_table, report, short, verdict

_LINKERS = ("cc", "gcc", "clang")
_ENOUGH_MEMORY = 2e9
_ENOUGH_DISK = 1e9


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        what: its name.
        found: what there is.
        advice: what to do; empty when all is well.
    """

    what: str
    found: str
    advice: str = ""


def run() -> int:
    """Print the findings; 1 when one of them needs something done."""
    findings = tuple(_examine())
    rows = [(f.what, f.found, verdict(not f.advice, no="look")) for f in findings]
    console = report()
    print_table(console, ("what", "found", ""), rows, wrap="found")
    troubles = [f for f in findings if f.advice]
    console.print()
    for finding in troubles:
        console.print(f"{finding.what}: {finding.advice}")
    if not troubles:
        console.print("All is well.")
    return 1 if troubles else 0


def _examine() -> Iterator[Finding]:
    yield Finding("nemoc", __version__)
    yield _python()
    yield _package("torch", (2, 11), (2, 14))
    yield _package(
        "apache-tvm", (0, 27), (0, 28), "pip install 'nemoc[cpu]'; the cpu target needs it"
    )
    yield _package("triton", (3, 6), (3, 10), "pip install 'nemoc[gpu]'; GPU targets need it")
    yield _linker()
    yield _processor()
    yield _gpu()
    yield _environment()
    yield _memory()
    yield _disk()


def _python() -> Finding:
    fits = (3, 11) <= sys.version_info < (3, 13)
    advice = "" if fits else "nemoc is made for Python 3.11 and 3.12"
    return Finding("python", f"{platform.python_version()} on {platform.machine()}", advice)


def _package(
    name: str, least: tuple[int, int], below: tuple[int, int], install: str = ""
) -> Finding:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "not installed", install)
    release = tuple(int(part) for part in version.split(".")[:2])
    if least <= release < below:
        return Finding(name, version)
    first, last = (".".join(map(str, bound)) for bound in (least, below))
    return Finding(name, version, f"nemoc is made for versions from {first} and below {last}")


def _linker() -> Finding:
    for name in _LINKERS:
        if path := shutil.which(name):
            return Finding("linker", path)
    return Finding("linker", "none", "install gcc or clang; the cpu target links with it")


def _processor() -> Finding:
    features = torch.backends.cpu.get_cpu_capability()
    cores = len(usable_processors())
    slow = features in ("DEFAULT", "NO AVX")
    advice = (
        "kernels will use narrow vectors: neither AVX2, AVX-512 nor NEON was found" if slow else ""
    )
    return Finding("processor", f"{cores} cores for this process, {features}", advice)


def _gpu() -> Finding:
    if not torch.cuda.is_available():
        return Finding("gpu", "none (code for GPUs compiles all the same)")
    major, minor = torch.cuda.get_device_capability(0)
    target = f"cuda:sm_{major}{minor}"
    name = torch.cuda.get_device_name(0)
    known = "" if target in GPUS else f"no target for it; {', '.join(GPUS)} are known"
    return Finding("gpu", f"{name}, {target}", known)


def _environment() -> Finding:
    try:
        options = read_options()
    except NemocError as error:
        return Finding("settings", "not understood", str(error))
    threads = options.threads if options.threads is not None else "one per core"
    return Finding(
        "settings", f"threads: {threads}, plugins: {', '.join(options.plugins) or 'none'}"
    )


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    found = f"{short(memory.available, 'B')} free of {short(memory.total, 'B')}"
    enough = memory.available >= _ENOUGH_MEMORY
    return Finding("memory", found, "" if enough else "PyTorch and LLVM alone need about 2 GB")


def _disk() -> Finding:
    place = tempfile.gettempdir()
    free = shutil.disk_usage(place).free
    advice = (
        "" if free >= _ENOUGH_DISK else "executables are built there; TMPDIR names another place"
    )
    return Finding("disk", f"{short(free, 'B')} free in {place}", advice)
