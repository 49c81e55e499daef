"""Reading JSON files that nobody vouches for."""

import json
from pathlib import Path
from typing import Any

from nemoc.ir.errors import NemocError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        NemocError: the file cannot be read or holds no JSON object.
    """
    try:
        return parse_json(path.read_bytes(), path)
    except OSError as error:
        raise NemocError(f"{path}: cannot be read: {error.strerror}") from None


def parse_json(content: bytes, source: Path) -> dict[str, Any]:
    """The object in the content of a JSON file; `source` is what errors call it.

    Raises:
        NemocError: it is no JSON object in UTF-8.
    """
    try:
        data = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise NemocError(f"{source}: is not JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(data, dict):
        kind = "null" if data is None else type(data).__name__
        raise NemocError(f"{source}: found a JSON {kind}, expected an object")
    return data
