"""nemoc's executables, for `benchmarks.serving`."""

import torch

import nemoc
from benchmarks.serving import serve
from nemoc.measurement import decode_bytes


class NemocEngine:
    """An artifact with one row of state."""

    def open(self, artifact: str, threads: int) -> None:
        """Load an artifact."""
        torch.set_num_threads(threads)
        self._executable = nemoc.load(artifact, threads=threads)
        self._state = self._executable.new_state()

    def bytes_per_token(self, cached: int) -> int | None:
        """`nemoc.measurement.decode_bytes`."""
        return decode_bytes(self._executable, cached)

    def prefill(self, ids: list[int]) -> None:
        """Forget everything and take in a text."""
        self._state.reset()
        self._next = self._executable.prefill(torch.tensor([ids]), self._state).argmax(-1)

    def decode(self, steps: int) -> list[int]:
        """Take in the likeliest token so many times; these tokens."""
        taken = []
        for _ in range(steps):
            taken.append(int(self._next))
            self._next = self._executable.decode(self._next, self._state).argmax(-1)
        return taken

    def logits(self, ids: list[int], out: str) -> None:
        """Write the logits behind each token of a text: float32 [L, V], nothing but data."""
        self._state.reset()
        found = self._executable.prefill(torch.tensor([ids]), self._state, all_logits=True)
        found.numpy().tofile(out)


if __name__ == "__main__":
    serve(NemocEngine)
