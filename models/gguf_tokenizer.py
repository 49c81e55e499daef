"""Tokenizers in GGUF files, from and to `tokenizer.json`, where both can say the same.

That is byte-level byte-pair encoding (`gpt2` there): tokens by id, merges in order, a type for each token. How text is
split before that is a name in these files and a regular expression in `tokenizer.json`; the names here are those whose
expression is known exactly. Whatever is not of this kind is not translated, since it would split text otherwise.

Facts are from llama.cpp (`src/llama-vocab.cpp`), whose expressions are adapted from those that stand beside them there.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers

from nemoc.ir.errors import NemocError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_FIRST = r"[^\r\n\p{L}\p{N}]?"


@dataclass(frozen=True)
class _Split:
    """How text is split into what is encoded by itself.

    Attributes:
        expression: of the pieces; None for that of GPT-2, which `tokenizer.json` has no text for.
        ignores_merges: a piece that is a token is taken as one, whatever the merges.
        adds_bos: whether encoding starts with the first token where a file does not say.
    """

    expression: str | None
    ignores_merges: bool = False
    adds_bos: bool = False


_SPLITS = {
    "gpt-2": _Split(None),
    "llama-bpe": _Split(
        rf"{_CONTRACTIONS}|{_FIRST}\p{{L}}+|\p{{N}}{{1,3}}|{_OTHERS}|{_TAIL}", True, True
    ),
    "tekken": _Split(
        rf"{_FIRST}{_UPPER}*{_LOWER}+|{_FIRST}{_UPPER}+{_LOWER}*|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}",
        True,
        True,
    ),
    "qwen2": _Split(rf"{_CONTRACTIONS}|{_FIRST}\p{{L}}+|\p{{N}}|{_OTHERS}|{_TAIL}"),
    "gpt-4o": _Split(
        rf"{_FIRST}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_FIRST}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
    ),
}
"""By name."""

_SAME = {"pixtral": "llama-bpe", "llama3": "llama-bpe", "llama-v3": "llama-bpe"}
"""Other names of the same."""

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
"""Types of tokens."""

_AROUND = ("single_word", "lstrip", "rstrip")
"""What tokens in `tokenizer.json` may ask for besides themselves."""


def tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The texts of `tokenizer.json` and `tokenizer_config.json` that a file's metadata stand for.

    Raises:
        NemocError: they stand for none, or for one that cannot be translated; why, in a few words.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise NemocError(f"model {model!r} is not byte-pair encoding of bytes")
    name = metadata.get("tokenizer.ggml.pre", "")
    split = _SPLITS.get(_SAME.get(name, name)) if isinstance(name, str) else None
    if split is None:
        raise NemocError(f"how '{name}' splits text is not known")
    tokens = _texts(metadata, "tokens")
    added = _added(tokens, _types(metadata, len(tokens)))
    special = _special(metadata, tokens)
    text = json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": _pre_tokenizer(split),
            "post_processor": _post_processor(metadata, split, special.get("bos_token")),
            "decoder": _byte_level(True),
            "model": _model(tokens, _texts(metadata, "merges"), split),
        }
    )
    try:
        tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # whatever the library makes of it
        raise NemocError(str(error).partition("\n")[0]) from None
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    names = {kind: token for kind, (_, token) in special.items()}
    return {"tokenizer.json": text, "tokenizer_config.json": json.dumps(settings | names)}


def _texts(metadata: Mapping[str, Any], name: str) -> list[str]:
    found = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise NemocError(f"tokenizer.ggml.{name} is no list of texts")
    if name == "tokens" and len(set(found)) < len(found):
        raise NemocError("a token is there twice")
    return found


def _types(metadata: Mapping[str, Any], count: int) -> list[int]:
    found = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * count)
    known = (_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED)
    if not isinstance(found, list) or len(found) != count or not set(found) <= {*known}:
        raise NemocError("types of tokens are missing or of another kind")
    return found


def _added(tokens: list[str], types: list[int]) -> list[dict[str, Any]]:
    """Tokens that are found in text before it is split."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": id_, "content": token, **flags, "special": kind == _CONTROL}
        for id_, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]


def _special(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, tuple[int, str]]:
    """Ids and texts of special tokens by what `tokenizer_config.json` calls them."""
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    found = {}
    for name, kind in names.items():
        id_ = metadata.get(f"tokenizer.ggml.{kind}_token_id")
        if type(id_) is int and 0 <= id_ < len(tokens):
            found[name] = id_, tokens[id_]
    return found


def _model(tokens: list[str], merges: list[str], split: _Split) -> dict[str, Any]:
    pairs = [merge.split(" ") for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise NemocError("a merge is not of two tokens")
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": split.ignores_merges,
        "vocab": {token: id_ for id_, token in enumerate(tokens)},
        "merges": pairs,
    }


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _pre_tokenizer(split: _Split) -> dict[str, Any]:
    if split.expression is None:
        return _byte_level(True)
    pieces = {
        "type": "Split",
        "pattern": {"Regex": split.expression},
        "behavior": "Isolated",
        "invert": False,
    }
    return {"type": "Sequence", "pretokenizers": [pieces, _byte_level(False)]}


def _post_processor(
    metadata: Mapping[str, Any], split: _Split, bos: tuple[int, str] | None
) -> dict[str, Any] | None:
    """What is put before a text."""
    if metadata.get("tokenizer.ggml.add_eos_token"):
        raise NemocError("it adds a token behind each text")
    if bos is None or not metadata.get("tokenizer.ggml.add_bos_token", split.adds_bos):
        return None
    id_, token = bos
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B")]
    return {
        "type": "TemplateProcessing",
        "single": [first, texts[0]],
        "pair": [first, *texts],
        "special_tokens": {token: {"id": token, "ids": [id_], "tokens": [token]}},
    }


def tokenizer_metadata(data: Mapping[str, Any], size: int) -> dict[str, Any]:
    """A `tokenizer.json` as metadata, without the ids of special tokens.

    Args:
        data: the object in the file.
        size: of the model's vocabulary; ids without a token get one that no text has.

    Raises:
        NemocError: it cannot be said in such a file; why, in a few words.
    """
    try:
        return _metadata(data, size)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise NemocError("it is not as the library writes it") from None


def _metadata(data: Mapping[str, Any], size: int) -> dict[str, Any]:
    model = data["model"]
    kinds = model["type"], data["decoder"] and data["decoder"]["type"]
    if kinds != ("BPE", "ByteLevel") or model.get("byte_fallback"):
        raise NemocError("it is not byte-pair encoding of bytes")
    if data.get("normalizer") is not None:
        raise NemocError("it changes text before it splits it")
    name = _split_name(data.get("pre_tokenizer"), bool(model.get("ignore_merges")))
    added = {entry["id"]: entry for entry in data.get("added_tokens", ())}
    if any(entry.get(flag) for entry in added.values() for flag in _AROUND):
        raise NemocError("a special token takes what is around it along")
    by_id = {id_: token for token, id_ in model["vocab"].items()}
    by_id |= {id_: entry["content"] for id_, entry in added.items()}
    if max(by_id) >= size:
        raise NemocError(f"it has a token {max(by_id)}, the model {size} tokens")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": [by_id.get(id_, f"[PAD{id_}]") for id_ in range(size)],
        "tokenizer.ggml.token_type": [_type(id_, by_id, added) for id_ in range(size)],
        "tokenizer.ggml.merges": [
            merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]
        ],
        "tokenizer.ggml.add_bos_token": _adds_bos(data.get("post_processor")),
    }


def _type(id_: int, by_id: Mapping[int, str], added: Mapping[int, Mapping[str, Any]]) -> int:
    if id_ not in by_id:
        return _UNUSED
    if id_ not in added:
        return _NORMAL
    return _CONTROL if added[id_].get("special") else _USER_DEFINED


def _split_name(pre_tokenizer: Any, ignores_merges: bool) -> str:
    """The name of a way to split.

    Raises:
        NemocError: it has none.
    """
    for name, split in _SPLITS.items():
        if split.ignores_merges == ignores_merges and _is_split(pre_tokenizer, split):
            return name
    raise NemocError("its way to split text has no name there")


def _is_split(found: Any, split: _Split) -> bool:
    """Whether a pre-tokenizer splits in this way; what only concerns offsets does not count."""
    steps = [found]
    if isinstance(found, dict) and found.get("type") == "Sequence":
        steps = found.get("pretokenizers", [])
    expected = [_pre_tokenizer(split)]
    if split.expression is not None:
        expected = expected[0]["pretokenizers"]
    return [_essence(step) for step in steps] == [_essence(step) for step in expected]


def _essence(step: Any) -> Any:
    if not isinstance(step, dict):
        return step
    defaults = {"use_regex": True, "invert": False}
    return defaults | {key: value for key, value in step.items() if key != "trim_offsets"}


def _adds_bos(processor: Any) -> bool:
    """Whether a token is put before a text.

    Raises:
        NemocError: something else is done to it.
    """
    steps = [processor] if processor is not None else []
    if isinstance(processor, dict) and processor.get("type") == "Sequence":
        steps = processor.get("processors", [])
    templates = [step for step in steps if step.get("type") != "ByteLevel"]
    if not templates:
        return False
    kinds = [next(iter(piece)) for piece in templates[0].get("single", ())]
    if len(templates) > 1 or kinds not in (["Sequence"], ["SpecialToken", "Sequence"]):
        raise NemocError("it adds other tokens than a first one to a text")
    return len(kinds) == 2
