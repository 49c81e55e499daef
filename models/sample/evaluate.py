"""Judges a trained checkpoint: bits per byte on the held-out files, beside `xz -9e`, and a sample.

python -m nemoc.models.sample.evaluate [--directory DIR] [--prompt TEXT]
"""

import argparse
import lzma
import math
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer

from nemoc.models.config import ModelConfig
from nemoc.models.reference import Cache, NemotronH, from_disk
from nemoc.models.sample import CHECKPOINT, corpus

_WINDOW = 1024
_PROMPT = (
    '"""Read and write small files."""\n\nimport os\n\n\nclass FileReader:\n    def __init__(self'
)


def load_model(directory: Path) -> tuple[NemotronH, Tokenizer]:
    """The checkpoint's weights, as rounded on disk, in a float32 module, and its tokenizer."""
    model = NemotronH(ModelConfig.from_file(directory)).eval().requires_grad_(False)
    model.load_state_dict(from_disk(load_file(directory / "model.safetensors")))
    return model, Tokenizer.from_file(str(directory / "tokenizer.json"))


@torch.no_grad()
def bits(model: NemotronH, ids: list[int]) -> float:
    """Bits that the model spends on ids[1:], the state carried from window to window."""
    cache, total = Cache(), 0.0
    for start in range(0, len(ids) - 1, _WINDOW):
        part = torch.tensor([ids[start : start + _WINDOW + 1]])
        logits = model(part[:, :-1], cache)
        total += F.cross_entropy(logits[0], part[0, 1:], reduction="sum").item()
    return total / math.log(2)


def bits_per_byte(model: NemotronH, tokenizer: Tokenizer, text: str) -> float:
    """Mean over the bytes of `text`, after `<s>` alone."""
    return bits(model, tokenizer.encode(text).ids) / len(text.encode())


def xz_bits_per_byte(texts: Iterable[str]) -> float:
    """What `xz -9e` spends on the same bytes, concatenated."""
    data = "".join(texts).encode()
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)


@torch.no_grad()
def generate(
    model: NemotronH, tokenizer: Tokenizer, prompt: str, tokens: int, temperature: float, seed: int
) -> str:
    """Continues `prompt`; stops early at an end-of-text id."""
    random = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(prompt).ids
    cache, new = Cache(), torch.tensor([ids])
    while len(ids) < model.config.max_position_embeddings and tokens > 0:
        odds = F.softmax(model(new, cache)[0, -1] / temperature, -1)
        ids.append(int(torch.multinomial(odds, 1, generator=random)))
        new, tokens = torch.tensor([ids[-1:]]), tokens - 1
        if ids[-1] in model.config.eos_token_ids:
            break
    text: str = tokenizer.decode(ids)
    return text


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Evaluate nemoc's sample model.")
    parser.add_argument("--directory", type=Path, default=CHECKPOINT)
    parser.add_argument("--prompt", default=_PROMPT)
    parser.add_argument("--temperature", type=float, default=0.8)
    options = parser.parse_args()
    model, tokenizer = load_model(options.directory)
    held_out = corpus.load().held_out
    total, size = 0.0, 0
    for path, text in held_out.items():
        mean, length = bits_per_byte(model, tokenizer, text), len(text.encode())
        total, size = total + mean * length, size + length
        print(f"{mean:6.3f} bits per byte  {path}", flush=True)
    print(f"{total / size:6.3f} bits per byte  all held-out files")
    print(f"{xz_bits_per_byte(held_out.values()):6.3f} bits per byte  xz -9e, all concatenated")
    print(generate(model, tokenizer, options.prompt, 200, options.temperature, seed=0))


if __name__ == "__main__":
    main()
