"""What was used last: a mapping of bounded size."""

from collections import OrderedDict
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """Keeps the entries that were used last.

    Each operation is one step of the interpreter or harmless when interrupted, so that `discard` may be the callback of
    a weak reference, whose time nobody chooses.

    Args:
        most: how many entries there may be.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._entries: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K) -> V | None:
        """The value of a key, which counts as used; none if it is unknown."""
        value = self._entries.pop(key, None)
        if value is not None:
            self._entries[key] = value
        return value

    def put(self, key: K, value: V) -> None:
        """Set a value; what was not used for longest goes when there are too many."""
        self._entries.pop(key, None)
        self._entries[key] = value
        while len(self._entries) > self._most:
            self._entries.popitem(last=False)

    def discard(self, key: K) -> None:
        """Forget a key, known or not."""
        self._entries.pop(key, None)

    def clear(self) -> None:
        """Forget all."""
        self._entries.clear()
