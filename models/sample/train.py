"""Trains the sample model; about an hour on two CPU cores.

    OMP_WAIT_POLICY=PASSIVE python -m nemoc.models.sample.train --work-dir DIR [--minutes 65]

A run ends after `--tokens` or after `--minutes` of training, whichever is nearer, and the learning
rate follows the nearer one too: on a slower machine the schedule gets shorter, not late. Minutes
are those of the processor, by thread: other work on the machine makes a run take longer and leaves
what comes out of it alone. Every three minutes the whole state goes to DIR, and the same command
goes on from there. The order of the data depends on the seed alone. The passive wait policy matters
on a machine that does other work: spinning threads made a step seven times slower there.
"""

import argparse
import ctypes
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from nemoc.models.config import ModelConfig
from nemoc.models.mixers import Router
from nemoc.models.reference import NemotronH
from nemoc.models.sample import CHECKPOINT, corpus
from nemoc.models.sample.export import export
from nemoc.models.sample.optimizer import optimizers
from nemoc.models.sample.tokenizer import BOS, EOS, PAD, VOCAB_SIZE, train_tokenizer

# Every width that a matrix product sums over is a multiple of 256.
CONFIG = ModelConfig.from_dict(
    {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 256,
        "hybrid_override_pattern": "MEM*EMM*E",
        "mamba_num_heads": 8,
        "mamba_head_dim": 64,
        "n_groups": 2,
        "ssm_state_size": 64,
        "conv_kernel": 4,
        "chunk_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "moe_shared_expert_intermediate_size": 256,
        "routed_scaling_factor": 2.5,
        "max_position_embeddings": 4096,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    },
    source="sample",
)
SEED = 2026
WINDOW = 1024
ROWS, MICRO_ROWS = 8, 4
LIBRARY_REPEATS = 6
BIAS_RATE = 4e-3
SAVE_EVERY = 180.0


@dataclass
class Progress:
    """How far a run has come, kept across restarts; seconds of the processor, by thread."""

    step: int = 0
    seconds: float = 0.0

    def fraction(self, tokens: int, minutes: float) -> float:
        """Part of the run that is done, by tokens or by time, whichever is further."""
        return max(self.step * ROWS * WINDOW / tokens, self.seconds / (minutes * 60))


def learning_rate(fraction: float) -> float:
    """Part of the peak rate: short warm-up, plateau, then straight down to zero."""
    return min(1.0, fraction / 0.01, (1.0 - fraction) / 0.7)


@dataclass(frozen=True)
class TokenFiles:
    """Each file as int64 tokens between `<s>` and `</s>`."""

    library: list[Tensor]
    side: list[Tensor]


def epoch_rows(data: TokenFiles, epoch: int) -> Tensor:
    """One pass over the corpus in an order fixed by the seed, int64 [rows, WINDOW + 1]."""
    random = torch.Generator().manual_seed(SEED + epoch)
    files = data.library * LIBRARY_REPEATS + data.side
    order = torch.randperm(len(files), generator=random).tolist()
    stream = torch.cat([files[i] for i in order])
    count = (len(stream) - 1) // WINDOW
    rows = stream[: count * WINDOW + 1].unfold(0, WINDOW + 1, WINDOW)
    return rows[torch.randperm(count, generator=random)]


def tokenize(tokenizer: Tokenizer, texts: corpus.Corpus) -> TokenFiles:
    """Encodes the training files."""
    library, side = (
        [
            torch.tensor([*encoding.ids, EOS])
            for encoding in tokenizer.encode_batch(list(part.values()))
        ]
        for part in (texts.library, texts.side)
    )
    return TokenFiles(library, side)


class Balance:
    """Keeps experts evenly used without a loss term, by nudging the router's correction bias.

    After each step the bias of an expert that got more than its share falls by `BIAS_RATE`, the
    others' rises (Wang et al., 2024).
    """

    def __init__(self, model: NemotronH) -> None:
        self._routers = [module for module in model.modules() if isinstance(module, Router)]
        self.counts = [torch.zeros_like(router.e_score_correction_bias) for router in self._routers]
        for router, count in zip(self._routers, self.counts, strict=True):
            router.register_forward_hook(_counting(count))

    def update(self) -> float:
        """Adjusts the biases; returns the busiest expert's tokens over the mean."""
        worst = 0.0
        for router, count in zip(self._routers, self.counts, strict=True):
            router.e_score_correction_bias += BIAS_RATE * torch.sign(count.mean() - count)
            worst = max(worst, float(count.max() / count.mean()))
            count.zero_()
        return worst


def _counting(count: Tensor) -> Callable[[nn.Module, object, tuple[Tensor, Tensor]], None]:
    def hook(_module: nn.Module, _args: object, output: tuple[Tensor, Tensor]) -> None:
        count.add_(output[0].flatten().bincount(minlength=len(count)))

    return hook


def loss(model: NemotronH, rows: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats per token; rows int64 [B, L + 1]."""
    logits = model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


class Run:
    """A model in training with all that a restart needs."""

    def __init__(self, config: ModelConfig) -> None:
        self.model = NemotronH(config)
        self.model.reset_parameters(SEED)
        self.balance = Balance(self.model)
        self.optimizers = optimizers(self.model)
        self.progress = Progress()

    def step(self, rows: Tensor, fraction: float) -> float:
        """One update from int64 [B, L + 1], in micro-batches that fit the cache; returns the loss."""
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * learning_rate(fraction)
        total = 0.0
        for part in rows.split(MICRO_ROWS):
            with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bf16()):
                nats = loss(self.model, part) * (len(part) / len(rows))
            nats.backward()
            total += nats.item()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        return total

    def save(self, path: Path) -> None:
        """Writes everything beside `path`, then renames it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": vars(self.progress),
        }
        torch.save(state, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)

    def restore(self, path: Path) -> None:
        """Takes up what `save` wrote."""
        state = torch.load(path)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(**state["progress"])


def train(work_dir: Path, tokens: int, minutes: float, compiled: bool) -> None:
    """Trains, or goes on training, and exports to the package's checkpoint folder at the end."""
    texts = corpus.load()
    tokenizer = train_tokenizer([*texts.library.values(), *texts.side.values()])
    data = tokenize(tokenizer, texts)
    run, state_file = Run(CONFIG), work_dir / "state.pt"
    if state_file.exists():
        run.restore(state_file)
    if compiled:
        compile_layers(run.model)

    progress, saved_at, epoch, rows = run.progress, time.monotonic(), -1, torch.empty(0)
    while (fraction := progress.fraction(tokens, minutes)) < 1.0:
        started, worked = time.monotonic(), time.process_time()
        wanted, position = position_of(progress.step, data)
        if wanted != epoch:
            epoch, rows = wanted, epoch_rows(data, wanted)
        nats = run.step(rows[position : position + ROWS], fraction)
        busiest = run.balance.update()
        seconds = time.monotonic() - started
        progress.seconds += (time.process_time() - worked) / torch.get_num_threads()
        if progress.step % 20 == 0:
            print(
                f"step {progress.step} {100 * fraction:.1f} % loss {nats:.3f} "
                f"busiest expert {busiest:.2f} {ROWS * WINDOW / seconds:.0f} tokens/s",
                flush=True,
            )
        if time.monotonic() - saved_at > SAVE_EVERY:
            run.save(state_file)
            saved_at = time.monotonic()
    run.save(state_file)
    export(run.model, tokenizer, CHECKPOINT)


def position_of(step: int, data: TokenFiles) -> tuple[int, int]:
    """Epoch and first row of a step; the rows left over at an epoch's end are skipped."""
    library, side = (sum(map(len, part)) for part in (data.library, data.side))
    steps = ((library * LIBRARY_REPEATS + side - 1) // WINDOW) // ROWS
    return step // steps, step % steps * ROWS


def compile_layers(model: NemotronH) -> None:
    """Compiles what has static shapes, which doubles the speed on CPUs; needs a C++ compiler."""
    for kind, layer in zip(CONFIG.layers, model.backbone.layers, strict=True):
        part = layer.get_submodule("norm") if kind == "moe" else layer
        part.compile(dynamic=False)


@functools.cache
def multiplies_bf16() -> bool:
    """Whether the processor has instructions for products of bf16; without, they take hundreds of times as long."""
    found: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return found


def keep_freed_memory() -> None:
    """Stops glibc from handing large freed blocks back: page faults cost a third of the time."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, top_pad, mmap_max = -1, -2, -4
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 2**28)
        libc.mallopt(mmap_max, 0)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train nemoc's sample model.")
    parser.add_argument("--work-dir", type=Path, required=True, help="where the state is kept")
    parser.add_argument("--tokens", type=int, default=40_000_000, help="tokens at most")
    parser.add_argument("--minutes", type=float, default=65.0, help="processor time by thread")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true", help="do not use torch.compile")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    train(options.work_dir, options.tokens, options.minutes, not options.no_compile)


if __name__ == "__main__":
    main()
