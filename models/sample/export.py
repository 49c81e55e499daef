"""Writes the trained model as the Hugging Face directory that is shipped."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from nemoc.models.reference import NemotronH, to_disk
from nemoc.models.sample.tokenizer import BOS, EOS, PAD, SPECIAL_TOKENS


def export(model: NemotronH, tokenizer: Tokenizer, directory: Path) -> None:
    """Writes config, bf16 weights and tokenizer; each file replaces its predecessor at once."""
    directory.mkdir(parents=True, exist_ok=True)
    pad, bos, eos = SPECIAL_TOKENS
    _write_json(directory / "config.json", model.config.to_dict())
    _write_json(
        directory / "generation_config.json",
        {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD},
    )
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": pad,
            "bos_token": bos,
            "eos_token": eos,
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.config.max_position_embeddings,
        },
    )
    partial = directory / "tokenizer.json.partial"
    tokenizer.save(str(partial))
    partial.replace(directory / "tokenizer.json")
    # The router's bias decides between near ties, so it keeps float32 as in the released files.
    tensors = {
        name: value.detach().to(
            torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        )
        for name, value in to_disk(model.state_dict()).items()
    }
    partial = directory / "model.safetensors.partial"
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, partial, {"format": "pt"}
    )
    # safetensors makes files that only their owner can read.
    partial.chmod(0o644)
    partial.replace(directory / "model.safetensors")


def _write_json(path: Path, data: dict[str, object]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
