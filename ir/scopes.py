"""Which weights a user means: a word, or a pattern of names."""

import re
from collections.abc import Iterable

from nemoc.ir.errors import NemocError

SCOPES = {
    "all": r"(?!lm_head\.|.*\.gate\.)",
    "experts": r".*\.(experts|shared_experts)\.",
}
"""Patterns by word: every projection but the head and the router; experts, routed and shared."""


def read_scope(scope: str) -> re.Pattern[str]:
    """What the names of weights have to begin with.

    Args:
        scope: one of `SCOPES`, or a regular expression.

    Raises:
        NemocError: it is neither.
    """
    try:
        return re.compile(SCOPES.get(scope, scope))
    except re.error as error:
        raise NemocError(
            f"scope '{scope}': expected {', '.join(SCOPES)} or a regular expression ({error})"
        ) from None


def scope_of(names: Iterable[str]) -> str:
    """The regular expression that means exactly these names, short where they differ in a layer's number."""
    layers: dict[tuple[str, str], list[str]] = {}
    for name in names:
        match = _LAYER.fullmatch(name)
        before, number, behind = match.groups() if match else (name, "", "")
        layers.setdefault((before, behind), []).append(number)
    return "|".join(
        re.escape(before) + _one_of(numbers) + re.escape(behind) + "$"
        for (before, behind), numbers in layers.items()
    )


_LAYER = re.compile(r"(.*?\blayers\.)(\d+)(\..*)")


def _one_of(numbers: list[str]) -> str:
    unique = list(dict.fromkeys(numbers))
    return unique[0] if len(unique) == 1 else f"({'|'.join(unique)})"
