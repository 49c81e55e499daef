"""NVIDIA's assembly within kernels, evaluated on the CPU, against what the same functions mean."""

import numpy as np
import torch

from nemoc.codegen.triton import device
from nemoc.ir.nvfp4 import DIALECTS, decode, spread
from support.ptx import run_ptx


def words(count: int) -> np.ndarray:
    """Random words of eight codes."""
    return np.random.default_rng(count).integers(0, 2**32, count, dtype=np.uint32)


def codes(words: np.ndarray) -> torch.Tensor:
    """What the codes of words stand for, f64 [words, 8]."""
    packed = torch.from_numpy(words.view(np.uint8).reshape(-1, 4).copy())
    return decode(packed, DIALECTS["modelopt"], torch.float64)


def scales() -> torch.Tensor:
    """All scales of blocks but NaN, f32."""
    bits = torch.arange(256).to(torch.uint8)
    return bits[bits % 128 != 127].view(torch.float8_e4m3fn).float()


def bits(numbers: torch.Tensor) -> np.ndarray:
    """Bits of numbers of 16 bits."""
    found: np.ndarray = numbers.view(torch.int16).numpy().view(np.uint16)
    return found


def test_numbers_of_e5m2_are_the_upper_halves_of_f16() -> None:
    each = torch.arange(256).to(torch.uint8)
    expected = each.view(torch.float8_e5m2).float()
    for place in range(4):
        word = each.numpy().astype(np.uint32) << np.uint32(8 * place) ^ words(256) & ~np.uint32(
            255 << 8 * place
        )
        found = torch.from_numpy(run_ptx(device.E5M2_NUMBERS.value, 4, word)[place])
        assert torch.equal(found.nan_to_num(1e6), expected.nan_to_num(1e6))


def test_units_of_codes_are_codes_times_a_step() -> None:
    word, scale = words(5000), scales()
    scale = scale[torch.arange(5000) % len(scale)]
    step = (scale.double() * 2.0**119).bfloat16()
    found = run_ptx(device.UNITS_OF_CODES.value, 8, word, bits(step))
    expected = (codes(word) * scale.double()[:, None] * 2.0**-7).bfloat16()
    for j in range(8):
        units = torch.from_numpy(found[j].view(np.int16)).view(torch.bfloat16)
        assert torch.equal(units, expected[:, j])


def test_units_and_numbers_of_spread_codes_are_those_of_the_codes() -> None:
    word, scale = words(5000), scales()
    scale = scale[torch.arange(5000) % len(scale)]
    step = bits((scale.double() * 2.0**119).bfloat16())
    packed = torch.from_numpy(word.view(np.uint8).reshape(-1, 4).copy())
    ordered = spread(packed).numpy().view(np.uint32)[:, 0]
    expected = (codes(word) * scale.double()[:, None] * 2.0**-7).bfloat16()
    units = run_ptx(device.UNITS_OF_SPREAD.value, 8, ordered, step)
    numbers = run_ptx(device.NUMBERS_OF_SPREAD.value, 8, ordered, step)
    for j in range(8):
        unit = torch.from_numpy(units[j].view(np.int16)).view(torch.bfloat16)
        assert torch.equal(unit, expected[:, j])
        number = torch.from_numpy(numbers[j].view(np.float32))
        assert torch.equal(number, expected[:, j].float())


def test_fp8_of_a_block_is_what_is_nearest_to_codes_times_a_step() -> None:
    first, second, scale = words(6000), words(6001)[1:], scales()
    step = (scale[torch.arange(6000) % len(scale)] / 8).half()
    found = run_ptx(device.FP8_OF_BLOCK.value, 4, first, second, bits(step))
    exact = torch.cat([codes(first), codes(second)], 1) * step.double()[:, None]
    expected = exact.float().to(torch.float8_e4m3fn).float()
    for j, word in enumerate(found):
        fours = torch.from_numpy(word.view(np.uint8).reshape(-1, 4)).view(torch.float8_e4m3fn)
        assert torch.equal(fours.float(), expected[:, 4 * j : 4 * j + 4])
