"""Checkpoints that the benchmarks run on, written once and kept in `benchmarks/.cache/`."""

import itertools
from pathlib import Path

import torch
import transformers

CACHE = Path(__file__).parent / ".cache"
PRESETS = Path(__file__).parent.parent / "models" / "presets"


def random_checkpoint(
    preset: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0, layers: int | None = None
) -> Path:
    """The directory of a checkpoint of that preset with random weights, as transformers initialises and writes it.

    Args:
        preset: a preset's name; its weights have to fit into memory.
        dtype: what the weights are made and stored in.
        seed: of the weights.
        layers: how many, the preset's over and over; None: as many as it has.
    """
    kept = "" if layers is None else f"-{layers}-layers"
    name = f"{preset}-{str(dtype).removeprefix('torch.')}-seed{seed}{kept}"
    path = CACHE / name
    if path.exists():
        return path
    config = transformers.NemotronHConfig.from_json_file(PRESETS / f"{preset}.json")
    if layers is not None:
        kinds = itertools.cycle(config.layers_block_type)
        config.layers_block_type = list(itertools.islice(kinds, layers))
        config.num_hidden_layers = layers
    torch.manual_seed(seed)
    model = transformers.NemotronHForCausalLM._from_config(config, dtype=dtype)
    unfinished = CACHE / f".{name}.tmp"
    model.save_pretrained(unfinished)
    unfinished.rename(path)
    return path
