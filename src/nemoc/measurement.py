"""How fast an executable runs here, beside what the machine's memory could deliver."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nemoc.autotune.gpu_clock import EventClock, measure_roofs
from nemoc.autotune.measure import Roofs, interleaved, measured_roofs
from nemoc.ir import IRError, NemocError
from nemoc.ir.fusion import inline
from nemoc.ir.parser import parse
from nemoc.kernel_times import StepReport, step_report
from nemoc.models.summary import step_work
from nemoc.options import read_options
from nemoc.runtime import Executable
from nemoc.runtime.cuda_device import device_at_hand
from nemoc.runtime.machine import thread_count
from nemoc.runtime.manifest import GRAPHS
from nemoc.runtime.program import DECODE, PREFILL


@dataclass(frozen=True)
class BenchReport:
    """Medians of repeated runs of one executable, batch 1.

    Attributes:
        prefill_tokens: tokens of the prompt.
        decode_tokens: tokens decoded behind it in one run.
        prefill_tokens_per_second, decode_tokens_per_second: medians.
        prefill_spread, decode_spread: half the quartile distance relative to the median.
        decode_bytes_per_token: weights as the artifact has them, state and cache that a token must move at least, in
            bytes; None if the model has ops of a user's own.
        roofs: what the device reached in the same run.
        device: what that is, in words.
        target: what the executable was compiled for.
        steps: the prompt and a token in the middle of those decoded, kernel by kernel; empty on targets that do not
            time launches.
    """

    prefill_tokens: int
    decode_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    prefill_spread: float
    decode_spread: float
    decode_bytes_per_token: int | None
    roofs: Roofs
    device: str
    target: str
    steps: Mapping[str, StepReport]

    @property
    def one_by_one(self) -> bool:
        """Whether launches were timed with something between them: then their times are none of a whole step."""
        return not self.target.startswith("cpu")

    @property
    def bandwidth_share(self) -> float | None:
        """Part of the memory bandwidth that decoding used, counting only bytes that it must move."""
        if self.decode_bytes_per_token is None:
            return None
        return self.decode_bytes_per_token * self.decode_tokens_per_second / self.roofs.bandwidth

    def to_json(self) -> dict[str, Any]:
        """JSON data."""
        data = dataclasses.asdict(self) | {"bandwidth_share": self.bandwidth_share}
        for name, step in self.steps.items():
            for row, kernel in zip(data["steps"][name]["kernels"], step.kernels, strict=True):
                row["roofline"] = kernel.roofline
        return data


def bench(
    executable: Executable,
    prefill: int = 256,
    decode: int = 32,
    rounds: int = 5,
) -> BenchReport:
    """Measure prefill and decode of random tokens, and each of their kernels.

    Args:
        executable: what to measure.
        prefill: tokens of the prompt.
        decode: tokens decoded behind the prompt in each round.
        rounds: timed rounds; prefill and decode take turns. As many again time each launch.

    Raises:
        NemocError: the executable's context is too short for that.
    """
    context = executable.program.bounds.max_context
    if prefill < 1 or decode < 1 or rounds < 1:
        raise NemocError("bench: prefill, decode and rounds must be at least 1")
    if prefill + decode > context:
        raise NemocError(
            f"bench: {prefill} + {decode} tokens, but the executable holds at most {context}"
        )
    vocab = executable.program.vocab
    ids = torch.randint(0, vocab, (1, prefill), generator=torch.Generator().manual_seed(0))
    state = executable.new_state(capacity=prefill + decode)

    def run_prefill() -> None:
        state.reset()
        executable.prefill(ids, state)

    def run_decode() -> None:
        token = ids[:, 0]
        for _ in range(decode):
            token = executable.decode(token, state).argmax(-1)

    timings = interleaved({"prefill": run_prefill, "decode": run_decode}, rounds)
    threads = executable.threads or thread_count(read_options().threads)
    roofs, device = _roofs(executable.program.target, threads)
    steps: dict[str, StepReport] = {}
    if executable.times_launches and executable.costs is not None:
        prompts, tokens = [], []
        for _ in range(rounds):
            with executable.timed() as prompt:
                run_prefill()
            with executable.timed() as decoded:
                run_decode()
            prompts.append(prompt)
            tokens += [[step] for step in decoded]
        costs, behind = executable.costs.functions, prefill + decode // 2
        steps["prefill"] = step_report(prompts, 0, costs[PREFILL], roofs)
        steps["decode"] = step_report(tokens, behind, costs[DECODE], roofs)
    return BenchReport(
        prefill_tokens=prefill,
        decode_tokens=decode,
        prefill_tokens_per_second=prefill / timings["prefill"].median,
        decode_tokens_per_second=decode / timings["decode"].median,
        prefill_spread=timings["prefill"].spread,
        decode_spread=timings["decode"].spread,
        decode_bytes_per_token=decode_bytes(executable, prefill + decode // 2),
        roofs=roofs,
        device=device,
        target=executable.program.target,
        steps=steps,
    )


def _roofs(target: str, threads: int) -> tuple[Roofs, str]:
    """What the device reaches that a target's code runs on, and what the device is."""
    at_hand = device_at_hand(target)
    if at_hand is None:
        return measured_roofs(threads, 1 << 30), f"{threads} thread{'s' * (threads > 1)}"
    index, name = at_hand
    with torch.cuda.device(index):
        return measure_roofs(EventClock()), name


def decode_bytes(executable: Executable, cached: int) -> int | None:
    """Bytes that decoding one token of one row must move: weights as the artifact has them, state in and out, cache.

    Of experts those count that a token chooses. Codes and scales count where kernels unpack them, numbers where they
    were unpacked when the artifact was built.

    Args:
        executable: the model.
        cached: tokens before it.

    Returns:
        The bytes; None if the model has ops of a user's own, of which an artifact does not say what they read.

    Raises:
        NemocError: the artifact is gone.
    """
    path = executable.folder / GRAPHS[DECODE]
    try:
        graph = parse(path.read_text("utf-8"), str(path))
    except IRError:
        return None
    except OSError as error:
        raise NemocError(f"{path}: cannot be read: {error.strerror}") from None
    work = step_work(inline(graph, lambda node: True)).at(1, 1, cached)
    return int(work.weights + work.state)
