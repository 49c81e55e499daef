"""From what the compiler says of a kernel to what a launch needs and a report on its speed.

Registers and spills of NVIDIA's assembler are in its log, which Triton asks for anyway; those of AMD's are in the
metadata at the end of its text. The hidden pointers of a kernel differ between versions of Triton, so they are counted
where the kernel declares its parameters.
"""

import base64
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from nemoc.codegen.triton.binary import Binary, Occupancy, Parameter, Report, Scratch
from nemoc.codegen.triton.target import GpuTarget
from nemoc.ir.errors import NemocError

_THREADS = 1024
"""Threads that a program can have, on every GPU."""

_TENSOR_MEMORY = 512
"""Columns of tensor memory of a multiprocessor that has any."""

_PARTITIONS = 4
"""Parts of a multiprocessor with registers of their own; a warp lives in one."""

_SHARED_RESERVED = 1024
"""Bytes of shared memory that NVIDIA's driver takes for each program."""


def inspect_output(
    output: Mapping[str, Any], pointers: int, target: GpuTarget, early: Collection[int] = ()
) -> Binary:
    """The binary that a worker made (`nemoc.codegen.triton.worker`).

    Args:
        output: the answer to a request.
        pointers: how many tensors the kernel has.
        target: the GPU that it was compiled for.
        early: numbers of pointers to what no kernel writes.

    Raises:
        NemocError: the compiler's text or log is not in the known form, or it lays tiles out as they must not lie; the
            message lacks the kernel's name.
    """
    check_fragments(output["ttgir"])
    metadata, assembly = output["metadata"], output["assembly"]
    nvidia = target.backend == "cuda"
    sizes = _ptx_parameters(assembly) if nvidia else _amd_parameters(assembly)
    warps, shared = metadata["num_warps"], metadata["shared"]
    tensor_memory = metadata.get("tmem_size") or 0
    registers, spilled = _ptxas_use(output["log"]) if nvidia else _amd_use(assembly)
    return Binary(
        code=base64.b64decode(output["code"]),
        symbol=metadata["name"],
        parameters=_parameters(sizes, pointers),
        warps=warps,
        threads=warps * target.warp,
        shared=shared,
        tensor_memory=tensor_memory,
        global_scratch=_scratch(metadata, "global"),
        profile_scratch=_scratch(metadata, "profile"),
        waits=nvidia and _waits_first(assembly, early),
        report=Report(
            registers=registers,
            spilled=spilled,
            occupancy=occupancy(target, warps, registers, shared, tensor_memory),
            matrix=_matrix_instructions(assembly),
            plain=_plain_products(output["ttgir"]),
            warnings=_warnings(output["log"]),
        ),
    )


def check_fits(binary: Binary, target: GpuTarget) -> None:
    """Refuse a kernel that the target cannot launch.

    Raises:
        NemocError: a program needs more than a multiprocessor has; the message lacks the kernel's name.
    """
    for found, most, what in (
        (binary.shared, target.shared, "bytes of shared memory"),
        (binary.threads, _THREADS, "threads"),
        (binary.tensor_memory, _TENSOR_MEMORY, "columns of tensor memory"),
    ):
        if found > most:
            raise NemocError(f"a program needs {found} {what}, expected at most {most}")


def occupancy(
    target: GpuTarget, warps: int, registers: int, shared: int, tensor_memory: int = 0
) -> Occupancy:
    """How many programs a multiprocessor holds.

    Registers are given to warps 256 at a time on NVIDIA, 8 for each of 64 threads on AMD. Shared memory comes in pieces
    of 128 bytes on NVIDIA; on AMD, in 128ths of what there is. NVIDIA's hold half as many programs as warps at most.

    Args:
        target: the GPU.
        warps: of a program.
        registers: of a thread.
        shared: bytes of a program.
        tensor_memory: columns of a program.
    """
    nvidia = target.backend == "cuda"
    of_warp = _round_up(max(registers, 1) * target.warp, 256 if nvidia else 512)
    held = _PARTITIONS * (target.registers // _PARTITIONS // of_warp)
    most = {
        "warps": min(target.warps // warps, target.warps // 2 if nvidia else target.warps),
        "registers": held // warps,
    }
    if nvidia:
        most["shared memory"] = target.shared_total // (_round_up(shared, 128) + _SHARED_RESERVED)
    elif shared:
        most["shared memory"] = target.shared_total // _round_up(shared, target.shared_total // 128)
    if tensor_memory:
        most["tensor memory"] = _TENSOR_MEMORY // tensor_memory
    limit = min(most, key=most.__getitem__)
    return Occupancy(most[limit], most[limit] * warps, limit)


def _round_up(size: int, granule: int) -> int:
    return -(-size // granule) * granule


def _ptx_parameters(ptx: str) -> list[int]:
    """The size of each parameter in bytes."""
    entry = re.search(r"\.visible \.entry \w+\((.*?)\)", ptx, re.DOTALL)
    declared = re.findall(r"\.param\s+\.[a-z](\d+)", entry[1]) if entry else []
    return [int(bits) // 8 for bits in declared]


def _amd_parameters(text: str) -> list[int]:
    """The size of each parameter in bytes; what the driver fills in by itself is none."""
    declared = re.findall(
        r"\.size:\s+(\d+)\n(?:\s+\.type_name:.*\n)?\s+\.value_kind:\s+(\w+)", text
    )
    return [int(size) for size, kind in declared if not kind.startswith("hidden_")]


def _parameters(sizes: Sequence[int], pointers: int) -> tuple[Parameter, ...]:
    known: list[Parameter] = ["pointer"] * pointers
    known += ["i32", "i32", "i32"]
    hidden: list[Parameter] = ["global_scratch", "profile_scratch"]
    found = (*known, *hidden[: max(0, len(sizes) - len(known))])
    if list(sizes) != [4 if parameter == "i32" else 8 for parameter in found]:
        raise NemocError(
            f"parameters of {list(sizes)} bytes, expected {pointers} pointers, 3 sizes and at most 2 pointers"
        )
    return found


def _scratch(metadata: Mapping[str, Any], kind: str) -> Scratch:
    size = metadata.get(f"{kind}_scratch_size") or 0
    return Scratch(size, metadata.get(f"{kind}_scratch_align") or 1)


def _ptxas_use(log: str) -> tuple[int, int]:
    """Registers of a thread, and bytes that it spills."""
    used = re.search(r"Used (\d+) registers", log)
    if used is None:
        raise NemocError(
            "the assembler's log names no registers, expected a line `Used N registers`"
        )
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    return int(used[1]), sum(map(int, spills))


_NOT_BEFORE = re.compile(
    r"^\s*(?:@\S+\s+)?(?:(?:ld|st|atom|red|cp)\b(?!\.(?:param|shared))|(?:bra|ret|exit|call)\b)",
    re.M,
)
"""Instructions that touch memory which others see, or after which others may be left out."""


def _waits_first(ptx: str, early: Collection[int]) -> bool:
    """Whether every thread of a kernel waits for former kernels, and does so before it touches their memory.

    Programs allocate tensor memory before that, by way of shared memory: both are their own. They may load what no
    kernel writes, at addresses that are computed from the pointers of the numbers `early` and no others.
    """
    before, wait, _ = ptx.partition(".entry")[2].partition("griddepcontrol.wait")
    pointers: dict[str, frozenset[int]] = {}  # those that the number in a register is computed from
    for line in before.splitlines():
        if parameter := _PARAMETER.search(line):
            pointers[parameter[1]] = frozenset({int(parameter[2])})
        elif load := _LOAD.search(line):
            known = pointers.get(load[1], frozenset())
            if not known or not known <= frozenset(early):
                return False
        elif _NOT_BEFORE.search(line):
            return False
        elif registers := re.findall(r"%rd\d+", line):
            result, *operands = registers
            pointers[result] = frozenset[int]().union(*(pointers.get(r, ()) for r in operands))
    return bool(wait)


_PARAMETER = re.compile(r"^\s*ld\.param\.[bu]64\s+(%rd\d+), \[\w+_param_(\d+)\];")
_LOAD = re.compile(
    r"^\s*(?:@\S+\s+)?ld\.global\.[\w.]+\s+(?:\{[^}]*\}|%\w+), \[\s*(%rd\d+)[^\]]*\];"
)


def _amd_use(text: str) -> tuple[int, int]:
    """Registers of a thread, and bytes that it spills; scalars spill into vector registers."""
    found = dict(re.findall(r"^\s+\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text, re.MULTILINE))
    if len(found) < 2:
        raise NemocError("the assembler's metadata names no registers, expected .vgpr_count")
    return int(found["vgpr_count"]), 4 * int(found["vgpr_spill_count"])


_NVIDIA_MATRIX = re.compile(
    r"^\s*(?:@\S+\s+)?((wgmma\.mma_async|mma\.sync|tcgen05\.mma)\.\S+)", re.M
)
_AMD_MATRIX = re.compile(r"^\s*(v_s?mfmac?_\w+)", re.M)
_OPERAND_TYPES = re.compile(r"\.(f16|bf16|tf32|f32|f64|e4m3|e5m2|e2m1|e3m2|e2m3|[su][48])(?=\.|$)")


def _matrix_instructions(text: str) -> tuple[tuple[str, int], ...]:
    """Kinds of matrix instructions with their numbers: NVIDIA's with the operands' kind or type, AMD's as they are."""
    kinds = Counter(_AMD_MATRIX.findall(text))
    for whole, family in _NVIDIA_MATRIX.findall(text):
        kind = re.search(r"kind::\w+", whole)
        types = _OPERAND_TYPES.findall(whole)  # the result's, then the operands'
        kinds[f"{family}.{kind[0] if kind else types[1]}"] += 1
    return tuple(sorted(kinds.items()))


def _plain_products(ttgir: str) -> tuple[str, ...]:
    """Products whose results lie in registers like anything else's; matrix instructions have layouts of their own."""
    tensor = r"tensor<(\w+), #.*?>"
    found = re.findall(rf"= tt\.dot .* : {tensor} \* {tensor} -> tensor<\w+, #blocked\d*>", ttgir)
    return tuple(f"{left} * {right}" for left, right in found)


def check_fragments(ttgir: str) -> None:
    """Refuse a kernel whose tiles do not lie where `fragment_dot` of `nemoc.codegen.triton.device` has them.

    Triton chooses where elements lie, and may do so otherwise in another version. Then results would be wrong.

    Args:
        ttgir: the kernel in Triton's representation with layouts.

    Raises:
        NemocError: the layout that was found; the message lacks the kernel's name.
    """
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", ttgir, re.M))
    lines = [line for line in ttgir.splitlines() if "mma.sync" in line]
    found = sorted({n for line in lines for n in re.findall(r"tensor<\w+, (#\w+)>", line)})
    if lines and not found:
        raise NemocError("matrix fragments lie as nothing says, expected a layout beside mma.sync")
    for name in found:
        layout = layouts.get(name, name)
        if not re.fullmatch(_FRAGMENTS, layout):
            raise NemocError(
                f"matrix fragments lie as {layout}, expected rows of 4 in 8 by 4 lanes"
            )


_FRAGMENTS = (
    r"#ttg\.blocked<\{sizePerThread = \[1, 1\], threadsPerWarp = \[8, 4\], "
    r"warpsPerCTA = \[\d+, 1\], order = \[1, 0\]\}>"
)


def _warnings(log: str) -> tuple[str, ...]:
    """What the assembler complains of, without the kernel's name."""
    found = re.findall(
        r"^ptxas\S*\s+(?:warning|info)\s*:\s*(.*Potential Performance Loss.*)$", log, re.M
    )
    return tuple(dict.fromkeys(re.sub(r" in (?:the )?function '.*?'", "", line) for line in found))
