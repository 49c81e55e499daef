"""Reading JSON files that nobody vouches for."""

import json
import re
from pathlib import Path
from typing import Any

from nemoc.ir.errors import NemocError

_LONGEST = 256 << 20
"""Bytes of a file: a configuration, or the index of a checkpoint."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        NemocError: the file cannot be read or holds no JSON object.
    """
    try:
        if path.exists() and not path.is_file():
            raise NemocError(f"{path}: cannot be read: it is no regular file")
        if (size := path.stat().st_size) > _LONGEST:
            raise NemocError(f"{path}: found {size} bytes, expected at most {_LONGEST}")
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
        if _SURROGATE.search(content):  # which are characters in pairs alone
            json.dumps(data, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise NemocError(f"{source}: is not JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(data, dict):
        kind = "null" if data is None else type(data).__name__
        raise NemocError(f"{source}: found a JSON {kind}, expected an object")
    return data
