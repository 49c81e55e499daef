"""The loop of generation: sample, note which rows end, step."""

from collections.abc import Callable, Iterator, Sequence

import torch

from nemoc.runtime.sampling import Sampler
from nemoc.runtime.tokenizer import Tokenizer


class Endings:
    """Which rows have ended, by token ids and by texts.

    Args:
        rows: rows of the batch.
        ids: token ids that end a row.
        texts: texts that end a row as soon as its new tokens contain one.
        tokenizer: needed when there are texts.
        padding: the id that rows which have ended are filled with.
    """

    def __init__(
        self,
        rows: int,
        ids: set[int],
        texts: Sequence[str],
        tokenizer: Tokenizer | None,
        padding: int,
    ) -> None:
        self._ids = ids
        self._texts = texts
        self._padding = padding
        self._ended = [False] * rows
        self._tails = [""] * rows
        self._streams = (
            [tokenizer.detokenizer(skip_special=False) for _ in range(rows)] if tokenizer else []
        )

    @property
    def all(self) -> bool:
        """Whether every row has ended."""
        return all(self._ended)

    def take(self, tokens: torch.Tensor) -> torch.Tensor:
        """The tokens with padding in rows that had ended before; then notes those that end now. int64 [B]."""
        kept = [
            self._padding if ended else token
            for token, ended in zip(tokens.tolist(), self._ended, strict=True)
        ]
        for row, token in enumerate(kept):
            if not self._ended[row]:
                self._ended[row] = token in self._ids or self._completes_text(row, token)
        return torch.tensor(kept, dtype=torch.int64, device="cpu")

    def _completes_text(self, row: int, token: int) -> bool:
        if not self._texts:
            return False
        text = self._tails[row] + self._streams[row].push(token)
        longest = max(map(len, self._texts))
        self._tails[row] = text[max(0, len(text) - longest + 1) :]
        return any(stop in text for stop in self._texts)


def generate_tokens(
    prefill: Callable[[], torch.Tensor],
    decode: Callable[[torch.Tensor], torch.Tensor],
    sampler: Sampler,
    endings: Endings,
    limit: int,
) -> Iterator[torch.Tensor]:
    """The next token of each row, int64 [B] on the CPU, until all have ended or `limit` are given.

    Rows that have ended go through the steps with padding, and what comes out of them is not looked at. Logits stay
    where they are: of a step on another device, B token ids come here and B go back.

    Args:
        prefill: takes in the prompts; gives float32 logits [B, V], on any device.
        decode: takes in a token of each row, int64 [B]; gives logits likewise.
        sampler: chooses.
        endings: knows what ends rows.
        limit: the most tokens of a row.
    """
    logits = prefill()
    for count in range(1, limit + 1):
        tokens = endings.take(sampler.sample(logits))
        yield tokens
        if endings.all or count == limit:
            return
        logits = decode(tokens)
