"""Text to token ids and back: the checkpoint's own tokenizer and chat template."""

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import tokenizers

from nemoc.ir.errors import NemocError
from nemoc.ir.json_file import read_json

_REPLACEMENT = "\ufffd"
"""What decoding gives for bytes that are no UTF-8, for instance the first half of a character."""


class Tokenizer:
    """A tokenizer of the `tokenizers` library with its configuration.

    Attributes:
        template: the chat template's text, or none.
    """

    def __init__(
        self, inner: tokenizers.Tokenizer, config: Mapping[str, Any], template: str | None
    ) -> None:
        self._inner = inner
        self._config = config
        self.template = template

    @classmethod
    def open(cls, folder: Path) -> "Tokenizer":
        """Read `tokenizer.json` and, where there are, `tokenizer_config.json` and `chat_template.jinja`.

        Raises:
            NemocError: a file cannot be read.
        """
        path = folder / "tokenizer.json"
        text = _read_text(path)
        with _refusing(f"{path}: cannot be read as a tokenizer"):
            inner = tokenizers.Tokenizer.from_str(text)
            # Left over from training; a prompt is neither cut nor filled up.
            inner.no_truncation()
            inner.no_padding()
        path = folder / "tokenizer_config.json"
        config = read_json(path) if path.exists() else {}
        return cls(inner, config, _template(folder / "chat_template.jinja", config))

    @property
    def size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._inner.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text; `special` adds what the tokenizer puts around one, such as the first token.

        Raises:
            NemocError: it is no text, or the tokenizer fails on it.
        """
        with _refusing("tokenizer.json: the text cannot be encoded"):
            return list(self._inner.encode(text, add_special_tokens=special).ids)

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """`encode` with special tokens, and how many characters of the text each token and those before it take up.

        Raises:
            NemocError: as `encode`.
        """
        with _refusing("tokenizer.json: the text cannot be encoded"):
            found = self._inner.encode(text)
        # A special token at the end is said to stand at 0.
        return list(found.ids), list(itertools.accumulate((end for _, end in found.offsets), max))

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD.

        Raises:
            NemocError: an id is no token id, or the tokenizer fails on them.
        """
        with _refusing("tokenizer.json: the tokens cannot be decoded"):
            return str(self._inner.decode(list(ids), skip_special_tokens=skip_special))

    def detokenizer(self, skip_special: bool = True) -> "Detokenizer":
        """Turns a stream of ids into a stream of text."""
        return Detokenizer(self, skip_special)

    def chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The prompt of a conversation by the checkpoint's template, up to where the model answers.

        Args:
            messages: `{"role": ..., "content": ...}` each.
            variables: further variables of the template.

        Returns:
            The prompt. It has its special tokens already: encode it with `special=False`.

        Raises:
            NemocError: there is no template, or it refuses the messages.
        """
        if self.template is None:
            raise NemocError("the model has no chat template")
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        known = {name: _token_text(self._config.get(name)) for name in names}
        try:
            given = {**known, "messages": list(messages), "add_generation_prompt": True}
            return environment.from_string(self.template).render({**given, **variables})
        except Exception as error:  # the template is the checkpoint's code and may raise anything
            reason = str(error).partition("\n")[0]
            raise NemocError(f"the chat template refuses the messages: {reason}") from None


class Detokenizer:
    """Text of one row, token by token, never a part of a character.

    How a token reads depends on its predecessors, so that the last ones are decoded again with each new one.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._ids: list[int] = []
        self._given = 0  # of the held ids, those whose text was returned

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        self._ids.append(token)
        return self._advance(final=False)

    def finish(self) -> str:
        """The rest; incomplete characters become U+FFFD."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[: self._given], self._skip_special)
        after = self._tokenizer.decode(self._ids, self._skip_special)
        if len(after) <= len(before) or (after.endswith(_REPLACEMENT) and not final):
            return ""
        self._ids = self._ids[self._given :]
        self._given = len(self._ids)
        return after[len(before) :]


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Errors of the `tokenizers` library in one line: bare exceptions, and panics, which are not even those."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise NemocError(f"{what}: {' '.join(str(error).split())}") from None


def _template(path: Path, config: Mapping[str, Any]) -> str | None:
    """The template from its own file, or the configuration: one text, or a list of named ones."""
    if path.exists():
        return _read_text(path)
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {str(t.get("name")): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise NemocError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise NemocError(f"{path}: is no text: {error}") from None


def _token_text(token: Any) -> str:
    """A special token is configured as its text or as an object with the text in `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
