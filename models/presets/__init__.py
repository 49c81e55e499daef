"""The family's published shapes, each a `config.json` in this folder, for building without weights.

`mid` is a small cousin with the same proportions, for benchmarks. Where a release's own file was
not at hand (`ultra`'s context limit, the chunk size of `nano-9b-v2` and `nemotron-h-8b`), the value
is the family's usual one; none of these changes a tensor's shape or an exact result.
"""

from pathlib import Path

from nemoc.ir.errors import NemocError
from nemoc.models.config import ModelConfig

PRESETS = (
    "nano",
    "lightning",
    "super",
    "ultra",
    "nano-9b-v2",
    "nano-4b",
    "nemotron-h-8b",
    "mid",
)


def preset(name: str) -> ModelConfig:
    """The configuration of a published model.

    Raises:
        NemocError: There is no preset of that name; the message lists those there are.
    """
    if name not in PRESETS:
        raise NemocError(f"preset: found '{name}', expected one of {', '.join(PRESETS)}")
    return ModelConfig.from_file(Path(__file__).with_name(f"{name}.json"))
