"""Inline PTX on the CPU: the few instructions that generated kernels use, for arrays of threads at once.

Written from the PTX ISA's descriptions. Registers of 32 bits are uint32 arrays, those of 16 bits uint16.
"""

import re
from collections.abc import Callable

import numpy as np
import torch

Registers = dict[str, np.ndarray]

_INTEGERS: dict[str, Callable[..., np.ndarray]] = {
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "shf.l.wrap.b32": lambda low, high, by: high << by | low >> 32 - by,
}


def run_ptx(text: str, outputs: int, *inputs: np.ndarray) -> list[np.ndarray]:
    """What a text of inline PTX makes of its inputs.

    Args:
        text: a block in braces, whose outputs are `$0` and so on, followed by its inputs.
        outputs: how many it has.
        inputs: uint16 or uint32, all of one shape.

    Returns:
        The outputs: uint16, uint32, or float32 where they are results of a conversion to it.

    Raises:
        AssertionError: it has an instruction that is not known here.
    """
    registers: Registers = {f"${outputs + i}": array for i, array in enumerate(inputs)}
    body = text.strip().removeprefix("{").removesuffix("}")
    for statement in filter(None, map(str.strip, body.split(";"))):
        if not statement.startswith(".reg"):
            name, _, operands = statement.partition(" ")
            _run(name, re.findall(r"\{[^}]*\}|[^,\s]+", operands), registers)
    return [registers[f"${i}"] for i in range(outputs)]


def _run(name: str, operands: list[str], registers: Registers) -> None:
    to, *sources = operands
    values = [_read(source, registers) for source in sources]
    if to.startswith("{"):
        assert name == "mov.b32"
        low, high = to.strip("{}").replace(" ", "").split(",")
        registers[low], registers[high] = _halves(values[0])
        return
    registers[to] = _result(name, values)


def _result(name: str, values: list[np.ndarray]) -> np.ndarray:
    if name in _INTEGERS:
        return _INTEGERS[name](*values)
    if name == "mov.b32":
        return values[0]
    if name == "prmt.b32":
        return _permuted(*values)
    if name == "cvt.f32.f16":
        assert values[0].dtype == np.uint16
        return values[0].view(np.float16).astype(np.float32)
    if name == "mul.f16x2":
        pairs = zip(*map(_halves, values), strict=True)
        return _joined(
            *((a.view(np.float16) * b.view(np.float16)).view(np.uint16) for a, b in pairs)
        )
    if name == "fma.rn.bf16x2":
        return _joined(*(_added(*each) for each in zip(*map(_halves, values), strict=True)))
    assert name == "cvt.rn.satfinite.e4m3x2.f16x2", f"unknown instruction {name}"
    low, high = (_e4m3(half).astype(np.uint16) for half in _halves(values[0]))
    return low | high << 8


def _read(operand: str, registers: Registers) -> np.ndarray:
    if operand.startswith("{"):
        return _joined(
            *(registers[name] for name in operand.strip("{}").replace(" ", "").split(","))
        )
    return registers[operand] if operand in registers else np.array([int(operand, 0)], np.uint32)


def _halves(word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (word & np.uint32(0xFFFF)).astype(np.uint16), (word >> np.uint32(16)).astype(np.uint16)


def _joined(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    assert low.dtype == high.dtype == np.uint16
    return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)


def _permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Four of eight bytes, or the sign of one all over, as each of the selector's lower four digits says."""
    both = np.asarray(a, np.uint64) | np.asarray(b, np.uint64) << np.uint64(32)
    found = np.zeros(np.broadcast_shapes(both.shape, np.shape(selector)), np.uint32)
    for i in range(4):
        digit = np.asarray(selector, np.uint64) >> np.uint64(4 * i) & np.uint64(15)
        byte = both >> (digit & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        signs = np.where(byte >> np.uint64(7), np.uint64(255), np.uint64(0))
        byte = np.where(digit >> np.uint64(3), signs, byte)
        found |= byte.astype(np.uint32) << np.uint32(8 * i)
    return found


def _added(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a · b + c of bf16 bits, rounded once; c is zero, since with another one f64 might round before that."""
    x, y, z = (
        torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).double() for bits in (a, b, c)
    )
    assert not z.any()
    found: np.ndarray = (x * y + z).bfloat16().view(torch.int16).numpy().view(np.uint16)
    return found


def _e4m3(half: np.ndarray) -> np.ndarray:
    numbers = torch.from_numpy(half.view(np.float16)).float()
    assert not (numbers.abs() > 448).any()
    found: np.ndarray = numbers.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return found
