"""What a machine must offer to run a library: its architecture and instruction-set extensions."""

import contextlib
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nemoc.codegen.threads import usable_processors
from nemoc.runtime.scalars import check_count

_EXTENSIONS = re.compile(
    r"s?sse[0-9a-z_.]*|avx[0-9a-z_]*|fma|f16c|bmi[12]?|lzcnt|abm|popcnt|movbe|amx[_\-][a-z0-9]*"
    r"|pni|sve2?|sme|neon|asimd|asimd[dh]p|bf16|i8mm|dotprod|fullfp16"
)
"""Names of vector and bit extensions that generated code may use, as LLVM or Linux spell them."""

_LINUX = {
    "sse3": "pni",
    "lzcnt": "abm",
    "bmi": "bmi1",
    "amx-bf16": "amx_bf16",
    "amx-int8": "amx_int8",
    "amx-tile": "amx_tile",
    "neon": "asimd",
    "dotprod": "asimddp",
    "fullfp16": "asimdhp",
    "avx512bf16": "avx512_bf16",
    "avx512bitalg": "avx512_bitalg",
    "avx512fp16": "avx512_fp16",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vnni": "avx512_vnni",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avx512vp2intersect": "avx512_vp2intersect",
    "avxvnni": "avx_vnni",
}
"""LLVM's names of extensions that Linux calls otherwise."""


@dataclass(frozen=True)
class Machine:
    """An architecture and extensions, by the names that Linux gives in /proc/cpuinfo.

    Attributes:
        architecture: as `platform.machine()` says it.
        features: extensions, sorted.
    """

    architecture: str
    features: tuple[str, ...]

    @classmethod
    def host(cls) -> "Machine":
        """The machine at hand."""
        return cls.of(platform.machine(), _cpuinfo())

    @classmethod
    def of(cls, architecture: str, features: Iterable[str]) -> "Machine":
        """A machine by LLVM's or Linux' names; names that are no extensions are left out."""
        known = (f.replace("sse4.", "sse4_") for f in features if _EXTENSIONS.fullmatch(f))
        return cls(architecture, tuple(sorted({_LINUX.get(f, f) for f in known})))

    def lacks(self, required: "Machine") -> str:
        """What keeps this machine from running code for another, in words; empty if nothing."""
        if self.architecture != required.architecture:
            return f"an {required.architecture} processor, this is {self.architecture}"
        if not self.features:  # a system that does not say
            return ""
        missing = [f for f in required.features if f not in self.features]
        return f"a processor with {', '.join(missing)}" if missing else ""


def _cpuinfo() -> list[str]:
    """The first processor's feature flags; none on systems without /proc."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return match[1].split() if match else []


def processor_model() -> str:
    """The name of the processor, as its maker calls it where the system says so."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def core_count() -> int:
    """How many cores this process may use; threads that share a core count once."""
    cores = set()
    for processor in usable_processors():
        siblings = Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text())
        except OSError:
            cores.add(str(processor))
    return len(cores)


def thread_count(threads: int | None) -> int:
    """How many threads to run on; None: one for each core that the process may use.

    Raises:
        NemocError: it is no integer from 1.
    """
    return core_count() if threads is None else check_count("threads", threads)
