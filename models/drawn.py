"""Random tensors made on the device that uses them: what is as large as a model's experts takes a CPU minutes."""

import zlib

import torch

_DRAWN = 1 << 24
"""Elements that are drawn at a time, in float32."""


def draw(out: torch.Tensor, scale: float, seed: str) -> None:
    """Fill a tensor [n] with normal numbers.

    Args:
        out: floating point, on any device.
        scale: the standard deviation.
        seed: equal ones give equal numbers on equal devices.
    """
    generator = torch.Generator(out.device).manual_seed(zlib.crc32(seed.encode()))
    for part in out.split(_DRAWN):
        drawn = torch.randn(part.numel(), generator=generator, device=out.device)
        part.copy_(drawn.mul_(scale))


def draw_bytes(out: torch.Tensor, seed: str, least: int = 0, most: int = 255) -> None:
    """Fill a tensor [n], uint8, with bytes from `least` to `most`, by default any; equal seeds as in `draw`."""
    generator = torch.Generator(out.device).manual_seed(zlib.crc32(seed.encode()))
    out.random_(least, most + 1, generator=generator)
