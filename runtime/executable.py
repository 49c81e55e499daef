"""The executable: what users run."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import NoReturn, cast

import torch

from nemoc.ir.errors import NemocError
from nemoc.runtime import inputs
from nemoc.runtime.backend import Backend, TimedBackend
from nemoc.runtime.costs import CostRecord, read_costs
from nemoc.runtime.files import as_path
from nemoc.runtime.generation import Endings, generate_tokens
from nemoc.runtime.manifest import FileRecord, Manifest
from nemoc.runtime.program import DECODE, PREFILL, PREFILL_ALL, Program
from nemoc.runtime.sampling import Sampler
from nemoc.runtime.scalars import as_integer, check_count, check_integer
from nemoc.runtime.state import State
from nemoc.runtime.step_times import StepTimes
from nemoc.runtime.store import check_unreplaced, copy_artifact, share_weights
from nemoc.runtime.tokenizer import Tokenizer

Stop = int | str | Sequence[int | str] | None
"""What ends a row besides its eos ids: token ids, and texts where there is a tokenizer."""


class Executable:
    """A compiled model. Steps run one at a time; states are independent of each other.

    Tensors that go in and come out are on the CPU. Every method raises `NemocError` on bad input, before anything is
    computed: a state changes only in a step whose input is accepted. After the first step of the cpu target, and once
    a cuda target is loaded, a process that is forked cannot run steps; one that is started anew can.

    Attributes:
        program: sizes, token ids and the state's layout.
        folder: the directory of the artifact behind it.
    """

    def __init__(
        self, program: Program, backend: Backend, folder: Path, manifest: Manifest
    ) -> None:
        self.program = program
        self.folder = folder
        self._backend = backend
        self._manifest = manifest

    def __repr__(self) -> str:
        return f"Executable({self.program.name!r}, target={self.program.target!r})"

    def __reduce__(self) -> NoReturn:
        raise NemocError(
            f"{self!r} cannot be pickled: pass on the folder of its artifact, {self.folder}, and load it there"
        )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer.

        Raises:
            NemocError: it came without one, or another artifact has replaced this one.
        """
        check_unreplaced(self.folder, self._manifest)
        if "tokenizer/tokenizer.json" not in self._manifest.files:
            raise NemocError(f"{self.program.name}: the model came without a tokenizer")
        return Tokenizer.open(self.folder / "tokenizer")

    @property
    def threads(self) -> int | None:
        """How many threads of the CPU steps run on; none where that is not nemoc's to say."""
        found = getattr(self._backend, "threads", None)
        return found if isinstance(found, int) else None

    def new_state(self, batch: int = 1, capacity: int | None = None) -> State:
        """An empty state for `batch` rows of at most `capacity` tokens (None: the largest context)."""
        bounds = self.program.bounds
        capacity = bounds.max_context if capacity is None else capacity
        batch, capacity = check_integer("batch", batch), check_integer("capacity", capacity)
        if not 1 <= batch <= bounds.max_batch:
            raise NemocError(f"batch is {batch}, expected 1 to {bounds.max_batch} (max_batch)")
        if not 1 <= capacity <= bounds.max_context:
            raise NemocError(
                f"capacity is {capacity} tokens, expected 1 to {bounds.max_context} (max_context)"
            )
        size = self.program.state.at({"B": batch, "C": capacity}).bytes
        arena = self._backend.allocate(int(size))
        return State(self.program.state, self.program.identity, batch, capacity, arena)

    def load_state(self, path: str | os.PathLike[str]) -> State:
        """A state that `State.save` wrote, of this model."""
        return State.load(path, self.program, self._backend.allocate)

    def prefill(
        self,
        ids: torch.Tensor,
        state: State,
        lengths: torch.Tensor | None = None,
        all_logits: bool = False,
    ) -> torch.Tensor:
        """Take in tokens; they continue what the state has seen.

        Args:
            ids: int64 [B, L], padded on the right where rows differ in length; what the padding holds does not matter.
            state: changed in place.
            lengths: int64 [B], tokens of each row that count, 1 to L; None: all.
            all_logits: return the logits of every token instead of each row's last.

        Returns:
            float32 [B, V]; or float32 [B, L, V], 0 where there is padding.
        """
        inputs.check_state(self.program, state)
        inputs.check_ids("ids", ids, 2, state.batch)
        lengths = inputs.check_lengths(ids, lengths)
        inputs.check_vocabulary(self.program, ids, lengths)
        inputs.check_capacity(state, lengths)
        function = PREFILL_ALL if all_logits else PREFILL
        if function not in self.program.functions:
            raise NemocError(f"{self.program.name}: was compiled without {function}")
        rows, width = ids.shape
        counts = torch.arange(width, device="cpu") < lengths.unsqueeze(1)
        ids = torch.where(counts, ids, 0)
        shape = (rows, width, self.program.vocab)
        every = torch.zeros(shape, device="cpu") if all_logits else None
        chunk = self.program.bounds.chunk(rows)
        for start in range(0, int(lengths.max()), chunk):
            tokens = ids[:, start : min(start + chunk, int(lengths.max()))].contiguous()
            valid = (lengths - start).clamp(0, tokens.shape[1])
            found = self._backend.run(function, tokens, valid.int(), state).cpu()
            if every is not None:
                part = slice(start, start + tokens.shape[1])
                every[:, part] = found.masked_fill(~counts[:, part, None], 0.0)
            elif start == 0 or bool((valid > 0).all()):
                last = found
            else:  # a row whose tokens ended in an earlier chunk keeps its logits
                last = torch.where((valid > 0).unsqueeze(1), found, last)
        return last if every is None else every

    def decode(self, next_ids: torch.Tensor, state: State) -> torch.Tensor:
        """Take in one token of each row: int64 [B] -> float32 [B, V]."""
        inputs.check_state(self.program, state)
        inputs.check_ids("next_ids", next_ids, 1, state.batch)
        return self._decode(state, next_ids).cpu()

    def _decode(self, state: State, next_ids: torch.Tensor) -> torch.Tensor:
        """`decode` with logits that stay on the backend's device."""
        inputs.check_next(self.program, state, next_ids)
        valid = torch.ones(state.batch, dtype=torch.int32, device="cpu")
        return self._backend.run(DECODE, next_ids.unsqueeze(1).contiguous(), valid, state)

    def generate(
        self,
        ids: torch.Tensor,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | Sequence[int] | None = None,
        stop: Stop = None,
        lengths: torch.Tensor | None = None,
        state: State | None = None,
    ) -> torch.Tensor:
        """Continue each row until it ends or has `max_new_tokens` more.

        Args:
            ids: int64 [B, L], the prompts, as for `prefill`.
            max_new_tokens: at least 1.
            temperature: 0 takes the likeliest token.
            top_p: draw among the likeliest tokens that together have this probability.
            seed: row b draws from seed + b, or from the b-th of several; None: from a fresh one.
            stop: token ids and texts that end a row besides the model's eos ids.
            lengths: int64 [B], tokens of each prompt; None: all.
            state: continue from this one; the last token of each row is not in it afterwards. None: from a new one.

        Returns:
            int64 [B, n], n the most tokens of a row. What ended a row is its last token; the padding id follows.
        """
        steps = self.stream(
            ids, max_new_tokens, temperature, top_p, seed, stop, lengths=lengths, state=state
        )
        return torch.stack(list(steps), dim=1)

    def stream(
        self,
        ids: torch.Tensor,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | Sequence[int] | None = None,
        stop: Stop = None,
        lengths: torch.Tensor | None = None,
        state: State | None = None,
    ) -> Iterator[torch.Tensor]:
        """`generate`, step by step: yields each row's next token, int64 [B], as soon as it is known."""
        if state is not None:
            inputs.check_state(self.program, state)
        inputs.check_ids("ids", ids, 2, None if state is None else state.batch)
        counted = inputs.check_lengths(ids, lengths)
        inputs.check_vocabulary(self.program, ids, counted)
        max_new_tokens = check_count("max_new_tokens", max_new_tokens)
        sampler = Sampler(ids.shape[0], temperature, top_p, seed)
        endings = self._endings(ids.shape[0], stop)
        if state is None:
            needed = int(counted.max()) + max_new_tokens - 1
            if needed > self.program.bounds.max_context:
                raise NemocError(
                    f"a prompt of {int(counted.max())} tokens and {max_new_tokens} new ones exceed "
                    f"the context of {self.program.bounds.max_context} tokens"
                )
            state = self.new_state(ids.shape[0], needed)
        inputs.check_capacity(state, counted + max_new_tokens - 1)
        prefill = partial(self.prefill, ids, state, counted)
        decode = partial(self._decode, state)
        return generate_tokens(prefill, decode, sampler, endings, max_new_tokens)

    @cached_property
    def costs(self) -> CostRecord | None:
        """What the launches of each function are parts of; none where the target launches nothing.

        Raises:
            NemocError: another artifact has replaced this one, or the record is damaged.
        """
        check_unreplaced(self.folder, self._manifest)
        return read_costs(self.folder, self._manifest)

    @property
    def times_launches(self) -> bool:
        """Whether `timed` can be used."""
        return isinstance(self._backend, TimedBackend) and self.costs is not None

    @contextmanager
    def timed(self) -> Iterator[list[StepTimes]]:
        """Let steps of any thread note how long each of their launches takes: it is there when the context has ended.

            with executable.timed() as steps:
                executable.prefill(ids, state)
            steps[0].launches  # seconds, in the order of executable.costs.functions["prefill"].launches

        Raises:
            NemocError: launches are not timed on this target, or they are being timed already.
        """
        costs = self.costs
        if costs is None or not isinstance(self._backend, TimedBackend):
            raise NemocError(
                f"{self.program.name}: launches are not timed on {self.program.target}"
            )
        phases = {name: [len(p) for p in f.phases] for name, f in costs.functions.items()}
        with self._backend.timed(phases) as steps:
            yield steps

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the artifact under a name; an artifact of that name is replaced, anything else is not.

        Raises:
            NemocError: it cannot be written, or another artifact has replaced this one.
        """
        copy_artifact(self.folder, self._manifest, as_path(path))

    def share_weights(self, header: str, folder: Path) -> FileRecord:
        """Put the artifact's weights into another artifact's folder (`nemoc.runtime.store.share_weights`)."""
        return share_weights(self.folder, self._manifest, header, folder)

    def _endings(self, rows: int, stop: Stop) -> Endings:
        texts, ids = _stops(stop)
        if "" in texts:
            raise NemocError("stop: an empty text would end every row at once")
        for id_ in ids:
            if not 0 <= id_ < self.program.vocab:
                raise NemocError(f"stop: token id {id_}, expected 0 to {self.program.vocab - 1}")
        tokenizer = self.tokenizer if texts else None
        generation = self.program.generation
        return Endings(rows, {*generation.eos, *ids}, texts, tokenizer, generation.padding)


def _stops(stop: Stop) -> tuple[list[str], list[int]]:
    """The texts and the token ids that end a row."""
    if stop is None:
        return [], []
    try:
        single = isinstance(stop, str) or as_integer(stop) is not None
        given = [stop] if single else list(cast(Sequence[int | str], stop))
    except TypeError:
        raise NemocError(f"stop is {stop!r}, expected token ids and texts") from None
    texts = [s for s in given if isinstance(s, str)]
    return texts, [check_integer("stop", s) for s in given if not isinstance(s, str)]
