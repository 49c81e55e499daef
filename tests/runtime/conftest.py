"""A model of all four mixers with random weights, small enough to interpret in milliseconds."""

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from nemoc.codegen.storage import bind_weights
from nemoc.ir import Graph
from nemoc.models import ModelConfig, RandomSource, build_step
from nemoc.passes import PassContext, TargetInfo, preset, run_pipeline
from nemoc.runtime import Bounds, Contents, Executable, Generation, build, weight_pieces

VOCAB = 97
CONFIG = {
    "model_type": "nemotron_h",
    "vocab_size": VOCAB,
    "hidden_size": 40,
    "hybrid_override_pattern": "ME*M-",
    "mamba_num_heads": 6,
    "mamba_head_dim": 10,
    "n_groups": 3,
    "ssm_state_size": 12,
    "conv_kernel": 4,
    "chunk_size": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 14,
    "intermediate_size": 52,
    "n_routed_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 18,
    "moe_shared_expert_intermediate_size": 30,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
BOUNDS = Bounds(max_batch=3, max_context=200, max_tokens=192)


@cache
def functions() -> dict[str, Graph]:
    """The three functions after the passes of the reference target."""
    parsed = ModelConfig.from_dict(CONFIG)
    context = PassContext(TargetInfo())
    last, every = build_step(parsed), build_step(parsed, logits="all")
    return {
        "prefill": run_pipeline(last, preset("reference", "prefill"), context),
        "prefill_all": run_pipeline(every, preset("reference", "prefill"), context),
        "decode": run_pipeline(last, preset("reference", "decode"), context),
    }


def reference_contents(**changes: Any) -> Contents:
    """What an artifact of the model for the reference target holds."""
    bound, weights = bind_weights(functions())
    contents = Contents(
        target="reference",
        functions=bound,
        weights=weights,
        pieces=weight_pieces(RandomSource(ModelConfig.from_dict(CONFIG))),
        bounds=BOUNDS,
        generation=Generation(eos=(2,), bos=1, pad=0),
        model=CONFIG,
        files={"report.json": "{}"},
        tools={"nemoc": "0.1.0"},
    )
    return dataclasses.replace(contents, **changes)


@pytest.fixture(scope="session")
def contents() -> Callable[..., Contents]:
    """`reference_contents`."""
    return reference_contents


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved artifact; not to be changed."""
    path = tmp_path_factory.mktemp("artifact") / "model.nemoc"
    build(reference_contents(), path)
    return path


@pytest.fixture(scope="session")
def exe() -> Executable:
    """The model, built into a temporary artifact, with a tokenizer of single bytes."""
    return build(reference_contents(files=byte_tokenizer()))


def byte_tokenizer() -> dict[str, str]:
    """Tokenizer files: one token per printable ASCII character or byte, as far as the vocabulary goes."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    first = [chr(c) for c in range(33, 33 + 60)]
    rest = [c for c in alphabet if c not in first]
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for character in (*first, "Ġ", "Ã", "©", "â", "Ĥ", "¬", *rest):
        if len(vocabulary) < VOCAB and character not in vocabulary:
            vocabulary[character] = len(vocabulary)
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(["<pad>", "<s>", "</s>"])
    return {"tokenizer/tokenizer.json": inner.to_str()}
