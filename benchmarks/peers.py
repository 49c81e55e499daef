"""What is compared: each engine loads a checkpoint and answers `prefill` and `decode`."""

from pathlib import Path
from typing import Any, Protocol

import torch
import transformers

import nemoc


class Engine(Protocol):
    """A loaded model with a batch of one."""

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """Forget everything, take ids int64 [1, L], return the last token's logits float32 [1, V]."""
        ...

    def decode(self, token: torch.Tensor) -> torch.Tensor:
        """Take one more token, int64 [1], return its logits float32 [1, V]."""
        ...


class Nemoc:
    """nemoc's executable for the CPU."""

    def __init__(self, checkpoint: Path, threads: int, capacity: int) -> None:
        self.executable = nemoc.compile(
            str(checkpoint), target="cpu", max_context=capacity, threads=threads
        )
        self._state = self.executable.new_state()

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        self._state.reset()
        return self.executable.prefill(ids, self._state)

    def decode(self, token: torch.Tensor) -> torch.Tensor:
        return self.executable.decode(token, self._state)


class Transformers:
    """transformers' own class in float32, as it stands or under torch.compile."""

    def __init__(self, checkpoint: Path, threads: int, compiled: bool = False) -> None:
        torch.set_num_threads(threads)
        model: Any = transformers.NemotronHForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32
        ).eval()
        for layer in model.model.layers:
            # Its own decode step has no lower limit on the step size: see docs/architecture.md.
            if hasattr(layer.mixer, "time_step_limit"):
                layer.mixer.time_step_limit = (0.0, float("inf"))
        self._config = model.config
        self._model: Any = torch.compile(model) if compiled else model
        self._forget()

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        self._forget()
        return self._step(ids)

    def decode(self, token: torch.Tensor) -> torch.Tensor:
        return self._step(token.unsqueeze(1))

    def _forget(self) -> None:
        library: Any = transformers  # its classes carry no annotations
        self._cache = library.DynamicCache(config=self._config)

    @torch.inference_mode()
    def _step(self, ids: torch.Tensor) -> torch.Tensor:
        out = self._model(
            input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        logits: torch.Tensor = out.logits[:, -1].float()
        return logits
