"""Tokenizers of GGUF files: there and back, and what has no words in them."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers

from nemoc.ir import NemocError
from nemoc.models import open_model
from nemoc.models.gguf_tokenizer import tokenizer_files, tokenizer_metadata
from nemoc.models.sample import CHECKPOINT
from support.gguf_files import Source, write_file

pytestmark = pytest.mark.usefixtures("one_thread")


_TEXTS = (
    "def main():\n    return x[1] + 12345\n",
    "it's they'll I'M ½ ²³ é日本語 🙂\u200d x\u00a0y",
    "\t\tif x:\r\n  return",
    "<s> and </s>",
    "",
)


def _sample() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((CHECKPOINT / "tokenizer.json").read_text())
    return data


_IDS = {
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 0,
}


def test_a_tokenizer_there_and_back_encodes_alike() -> None:
    metadata = tokenizer_metadata(_sample(), 4096)
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert metadata["tokenizer.ggml.tokens"][:3] == ["<pad>", "<s>", "</s>"]
    assert metadata["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    files = tokenizer_files(metadata | _IDS)
    found = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
    expected = tokenizers.Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    for text in _TEXTS:
        ids = expected.encode(text).ids
        assert found.encode(text).ids == ids
        assert found.decode(ids) == expected.decode(ids)
    config = json.loads(files["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == (
        "<s>",
        "</s>",
        "<pad>",
    )
    assert tokenizer_metadata(json.loads(files["tokenizer.json"]), 4096) == metadata


def _split(expression: str) -> dict[str, Any]:
    pieces = {
        "type": "Split",
        "pattern": {"Regex": expression},
        "behavior": "Isolated",
        "invert": False,
    }
    flags = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    bytes_ = {"type": "ByteLevel", **flags}
    return {"type": "Sequence", "pretokenizers": [pieces, bytes_]}


_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("expression", "ignore_merges", "name"),
    [(_TEKKEN, True, "tekken"), (_LLAMA_3, True, "llama-bpe")],
)
def test_ways_to_split_have_names(expression: str, ignore_merges: bool, name: str) -> None:
    data = _sample()
    data["pre_tokenizer"] = _split(expression)
    data["model"]["ignore_merges"] = ignore_merges
    metadata = tokenizer_metadata(data, 5000)
    assert metadata["tokenizer.ggml.pre"] == name
    assert metadata["tokenizer.ggml.tokens"][-1] == "[PAD4999]"
    assert metadata["tokenizer.ggml.token_type"][-1] == 5
    files = tokenizer_files(metadata | _IDS)
    found = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
    expected = tokenizers.Tokenizer.from_str(json.dumps(data))
    for text in _TEXTS:
        assert found.encode(text).ids == expected.encode(text).ids


_UNSAYABLE: list[tuple[str, dict[str, Any], str]] = [
    ("another model", {"model": {"type": "Unigram"}}, "it is not byte-pair encoding of bytes"),
    ("no model", {"model": None}, "it is not as the library writes it"),
    ("no bytes", {"decoder": {"type": "Metaspace"}}, "it is not byte-pair encoding of bytes"),
    ("normalizer", {"normalizer": {"type": "NFC"}}, "it changes text before it splits it"),
    ("split", {"pre_tokenizer": _split("a+")}, "its way to split text has no name there"),
    ("merges", {"pre_tokenizer": _split(_TEKKEN)}, "its way to split text has no name there"),
    (
        "prefix",
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        "its way to split text has no name there",
    ),
    (
        "suffix",
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"Sequence": {}}, {"SpecialToken": {}}],
            }
        },
        "it adds other tokens than a first one to a text",
    ),
    (
        "stripping",
        {"added_tokens": [{"id": 0, "content": "<pad>", "lstrip": True}]},
        "a special token takes what is around it along",
    ),
    (
        "too many",
        {"added_tokens": [{"id": 4096, "content": "<more>"}]},
        "it has a token 4096, the model 4096 tokens",
    ),
]


@pytest.mark.parametrize(
    ("changes", "why"), [u[1:] for u in _UNSAYABLE], ids=[u[0] for u in _UNSAYABLE]
)
def test_tokenizers_that_files_have_no_words_for(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(NemocError) as caught:
        tokenizer_metadata(_sample() | changes, 4096)
    assert str(caught.value) == why


_UNREADABLE: list[tuple[str, dict[str, Any], str]] = [
    ("model", {"tokenizer.ggml.model": "llama"}, "model 'llama' is not byte-pair encoding"),
    ("split", {"tokenizer.ggml.pre": "falcon"}, "how 'falcon' splits text is not known"),
    ("a list", {"tokenizer.ggml.pre": ["default"]}, "how '['default']' splits text is not known"),
    ("no tokens", {"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is no list of texts"),
    ("twice", {"tokenizer.ggml.tokens": ["a", "a"]}, "a token is there twice"),
    ("no merges", {"tokenizer.ggml.merges": [1]}, "tokenizer.ggml.merges is no list of texts"),
    ("a merge", {"tokenizer.ggml.merges": ["abc"]}, "a merge is not of two tokens"),
    ("bytes", {"tokenizer.ggml.token_type": [6] * 4096}, "types of tokens are missing or"),
    ("end", {"tokenizer.ggml.add_eos_token": True}, "it adds a token behind each text"),
    ("unknown merge", {"tokenizer.ggml.merges": ["ÿ ÿÿÿ"]}, ""),
]


@pytest.mark.parametrize(
    ("changes", "why"), [u[1:] for u in _UNREADABLE], ids=[u[0] for u in _UNREADABLE]
)
def test_tokenizers_that_are_not_translated(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(NemocError) as caught:
        tokenizer_files(tokenizer_metadata(_sample(), 4096) | _IDS | changes)
    assert str(caught.value).startswith(why)
    assert "\n" not in str(caught.value)


def test_a_model_opens_without_a_tokenizer_that_is_not_translated(
    gguf_sources: dict[str, Source], path: Path
) -> None:
    config, tensors = gguf_sources["dense"]

    def metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("falcon")

    write_file(path, tensors, config, metadata=metadata)
    model = open_model(path)
    assert model.tokenizer_files() == {}
    assert model.notes == ("the tokenizer is ignored: how 'falcon' splits text is not known",)
