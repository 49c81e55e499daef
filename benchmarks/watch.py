"""Watching a process's own memory."""

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

_INTERVAL_S = 0.005


class AnonymousPeak:
    """The most anonymous memory that this process holds within a `with` block, sampled every 5 ms.

    Mapped files do not count, since the system takes their pages back when it needs them.

    Attributes:
        stage: what the process is doing; the block's body may set it.
        stages: the largest sample of each stage so far, in bytes.
    """

    def __init__(self, stage: str = "all") -> None:
        self.stage = stage
        self.stages: dict[str, int] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def bytes(self) -> int:
        """The largest sample of all stages so far."""
        return max(self.stages.values(), default=0)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        ended = False
        while not ended:
            stage = self.stage
            self.stages[stage] = max(self.stages.get(stage, 0), anonymous_bytes())
            ended = self._ended.wait(_INTERVAL_S)


def anonymous_bytes() -> int:
    """Anonymous memory of this process that is resident now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "RssAnon":
            return int(value.split()[0]) * 1024
    raise OSError("/proc/self/status has no RssAnon: this needs Linux")
