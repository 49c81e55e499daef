"""What a model's quality is measured on, and by: windows of text, and how far two predictions lie apart."""

import itertools
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from nemoc.ir import NemocError
from nemoc.models import Model
from nemoc.models.sample import CHECKPOINT
from nemoc.models.sample.corpus import files_here
from nemoc.runtime import Tokenizer

CONTEXT = 1024
"""Tokens of a window: what the last of them is predicted from, at most."""

_CALIBRATION_FILES = 16
_LOGITS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of a text, looked at by themselves.

    Attributes:
        ids: int64 [n + 1], n ≥ 1. Each but the first is predicted from those before it.
        bytes: of the text that the predicted tokens stand for, in UTF-8.
    """

    ids: torch.Tensor
    bytes: int

    @property
    def tokens(self) -> int:
        """How many are predicted."""
        return self.ids.numel() - 1


def read_windows(
    tokenizer: Tokenizer,
    files: Sequence[str | Path],
    context: int = CONTEXT,
    max_tokens: int | None = None,
) -> list[Window]:
    """Texts cut into windows: first the beginning of each file, then what follows in each, and so on.

    Every token of a file is predicted once, but for the first.

    Args:
        tokenizer: the model's; what it puts in front of a text counts as seen.
        files: in UTF-8.
        context: tokens of a window that are predicted; the last of a file has fewer.
        max_tokens: take no more predicted tokens than that, of all files together.

    Raises:
        NemocError: a file cannot be read, or is too short to predict anything.
    """
    if not files:
        raise NemocError("text: found no files, expected at least one")
    if context < 1 or (max_tokens is not None and max_tokens < 1):
        raise NemocError(
            f"text: context is {context} and max_tokens {max_tokens}, expected at least 1"
        )
    context = context if max_tokens is None else min(context, max_tokens)
    by_file = [_cut(tokenizer, Path(file), context) for file in files]
    found: list[Window] = []
    left = math.inf if max_tokens is None else max_tokens
    for window in itertools.chain.from_iterable(itertools.zip_longest(*by_file)):
        if window is not None and window.tokens <= left:
            found.append(window)
            left -= window.tokens
    return found


def divergence(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """The Kullback-Leibler divergence of next-token distributions, in nats: logits [n, V] twice -> float64 [n].

    It is Σ p log(p / q), p of what is expected: the information that is lost on average where q takes p's place.
    """
    rows = max(1, _LOGITS_AT_ONCE // expected.shape[-1])
    parts = []
    for p, q in zip(expected.split(rows), found.split(rows), strict=True):
        log_p, log_q = F.log_softmax(p, -1), F.log_softmax(q, -1)
        terms = (log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64)
        parts.append(terms.clamp(min=0))  # rounding may give less
    return torch.cat(parts)


def model_tokenizer(model: Model) -> Tokenizer:
    """The tokenizer of an opened model.

    Raises:
        NemocError: it came without one.
    """
    files = model.tokenizer_files()
    if "tokenizer.json" not in files:
        raise NemocError(f"{model.name}: the model came without a tokenizer")
    if model.tokenizer_dir is not None:
        return Tokenizer.open(model.tokenizer_dir)
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(str(text), encoding="utf-8")
        return Tokenizer.open(Path(folder))


def own_text(model: Model) -> list[Path]:
    """Text that comes with a model and that it was not trained on: for the sample model alone there is some."""
    return files_here("held_out") if model.directory == CHECKPOINT else []


def own_calibration(model: Model) -> list[Path]:
    """Text to calibrate a model with, none of it in `own_text`; for the sample model alone there is some."""
    if model.directory != CHECKPOINT:
        return []
    files = files_here("library")
    return files[:: max(1, len(files) // _CALIBRATION_FILES)]


def _cut(tokenizer: Tokenizer, file: Path, context: int) -> list[Window]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise NemocError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise NemocError(f"{file}: is no text in UTF-8: {error}") from None
    ids, ends = tokenizer.encode_with_ends(text)
    if len(ids) < 2:
        raise NemocError(f"{file}: found {len(ids)} tokens, expected at least 2")
    windows = []
    for start in range(0, len(ids) - 1, context):
        part = ids[start : start + context + 1]
        said = text[ends[start] : ends[start + len(part) - 1]]
        windows.append(Window(torch.tensor(part), len(said.encode())))
    return windows
