"""Options of passes as text: `{scope=experts, min-size=4, exact=true}` to a pass's fields and back."""

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Collection, Sequence
from typing import Any

from nemoc.ir.errors import NemocError
from nemoc.ir.rewrite import Rule
from nemoc.passes.base import Pass

_WORD = re.compile(r"[A-Za-z0-9_.*/:+\-]+")
_NOTHING = "none"


def option_types(cls: type[Pass]) -> dict[str, Any]:
    """The options of a pass class, by name in text, with their types."""
    hints = typing.get_type_hints(cls)
    return {f.name.replace("_", "-"): hints[f.name] for f in dataclasses.fields(cls)}


def print_options(pass_: Pass) -> str:
    """The options that are not at their defaults, in braces; empty when there are none."""
    shown = []
    for field in dataclasses.fields(pass_):
        value = getattr(pass_, field.name)
        if value != field.default:
            shown.append(f"{field.name.replace('_', '-')}={_print_value(value)}")
    return f"{{{', '.join(shown)}}}" if shown else ""


def _print_value(value: Any) -> str:
    match value:
        case None:
            return _NOTHING
        case bool():
            return "true" if value else "false"
        case str():
            plain = _WORD.fullmatch(value) and value not in (_NOTHING, "true", "false")
            return value if plain else json.dumps(value)
        case tuple():
            return "[" + ", ".join(_print_value(v) for v in value) + "]"
    return repr(value)


def read_option(pass_name: str, name: str, kind: Any, tokens: list[str]) -> Any:
    """Take an option's value from the front of `tokens`, by its type.

    Raises:
        NemocError: the value does not fit the type.
    """
    alternatives = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if type(None) in alternatives and tokens[:1] == [_NOTHING]:
        tokens.pop(0)
        return None
    kind = next(a for a in alternatives if a is not type(None))
    if typing.get_origin(kind) is not tuple:
        return _scalar(pass_name, name, kind, tokens)
    item = typing.get_args(kind)[0]
    if tokens[:1] != ["["]:
        raise _misfit(pass_name, name, "a list in brackets", tokens)
    tokens.pop(0)
    items: list[Any] = []
    while tokens[:1] != ["]"]:
        if items:
            if tokens[:1] != [","]:
                raise _misfit(pass_name, name, "',' or ']'", tokens)
            tokens.pop(0)
        items.append(_scalar(pass_name, name, item, tokens))
    tokens.pop(0)
    return tuple(items)


def nearest(name: str, known: Collection[str]) -> str:
    """The end of an error about a name that is not known: what it may have been meant to be."""
    near = difflib.get_close_matches(name, known, n=2)
    if near:
        return f", did you mean {' or '.join(near)}?"
    return f", expected one of {', '.join(known)}" if known else ""


def rules_without(pass_name: str, rules: Sequence[Rule], without: Sequence[str]) -> list[Rule]:
    """The rules that a pass's option `without` leaves.

    Raises:
        NemocError: it names a rule that there is not.
    """
    known = [rule.name for rule in rules]
    for name in without:
        if name not in known:
            hint = nearest(name, known)
            raise NemocError(f"pass {pass_name}: option without names no rule {name!r}{hint}")
    return [rule for rule in rules if rule.name not in without]


def _scalar(pass_name: str, name: str, kind: Any, tokens: list[str]) -> Any:
    token = tokens[0] if tokens else ""
    is_text = token.startswith('"') or _WORD.fullmatch(token) is not None
    try:
        if kind is bool:
            value: Any = {"true": True, "false": False}[token]
        elif kind is str and is_text:
            value = json.loads(token) if token.startswith('"') else token
        elif kind in (int, float):
            value = kind(token)
        else:
            raise ValueError
    except (KeyError, ValueError):
        wanted = {bool: "true or false", int: "an integer", float: "a number", str: "a word"}
        raise _misfit(pass_name, name, wanted.get(kind, str(kind)), tokens) from None
    tokens.pop(0)
    return value


def _misfit(pass_name: str, name: str, wanted: str, tokens: list[str]) -> NemocError:
    found = repr(tokens[0]) if tokens else "the end"
    return NemocError(f"pass {pass_name}: option {name} is {found}, expected {wanted}")
