"""Which weights a user means: a word, or a pattern of names."""

import re

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
