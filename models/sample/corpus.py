"""The text that the sample model is trained and judged on: CPython 3.11.7's own library.

`corpus.json` lists every file with its SHA-256, so that a training run anywhere reads the same
bytes, whatever else lies in that library. `python -m nemoc.models.sample.corpus` writes it anew.
"""

import hashlib
import json
import platform
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nemoc.ir.errors import NemocError

PYTHON_VERSION = "3.11.7"
LISTING = Path(__file__).with_name("corpus.json")

# Ordinary modules of varied kinds, about 0.6 MB, never seen in training.
HELD_OUT = (
    "asyncio/queues.py",
    "calendar.py",
    "concurrent/futures/thread.py",
    "configparser.py",
    "csv.py",
    "dataclasses.py",
    "email/message.py",
    "ftplib.py",
    "heapq.py",
    "http/client.py",
    "json/decoder.py",
    "pathlib.py",
    "shutil.py",
    "statistics.py",
    "textwrap.py",
    "zipfile.py",
)

# Not of the library, made by the build, tables of character codes, or broken on purpose.
_EXCLUDED = re.compile(
    r"site-packages/|(^|/)__pycache__/|^config-|^_sysconfigdata|^lib2to3/tests/data/|/badsyntax"
    r"|^encodings/(cp|mac_|iso8859|koi8|gb|big5|euc|hz|shift|iso2022|johab|tis|kz1048|hp_|ptcp)"
    r"|^html/entities\.py"
)
# Less like the held-out modules than library modules are, and so read less often in training.
_SIDE = re.compile(r"(^|/)(test|tests|idle_test|pydoc_data|lib2to3|turtledemo|encodings)/")
_LARGEST_SIDE_FILE = 200_000


@dataclass(frozen=True)
class Corpus:
    """The files of one split, by path relative to the library, as text."""

    library: dict[str, str]
    side: dict[str, str]
    held_out: dict[str, str]


def load() -> Corpus:
    """Reads the library of the running interpreter.

    Raises:
        NemocError: The interpreter is not CPython 3.11.7, or a file differs from the listing.
    """
    if platform.python_version() != PYTHON_VERSION:
        raise NemocError(
            f"{LISTING.name}: found Python {platform.python_version()}, expected {PYTHON_VERSION}: "
            "run this with the interpreter whose library the sample model was trained on"
        )
    root = Path(sysconfig.get_paths()["stdlib"])
    splits: dict[str, dict[str, str]] = {}
    for split, files in json.loads(LISTING.read_text(encoding="utf-8"))["files"].items():
        splits[split] = {path: _read(root, path, digest) for path, digest in files.items()}
    return Corpus(**splits)


def files_here(split: str) -> list[Path]:
    """The files of a split as far as the running interpreter's library has them, whatever its version.

    Args:
        split: "held_out" for what the model has never seen; "library" for what it was trained on first of all.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    listed = json.loads(LISTING.read_text(encoding="utf-8"))["files"][split]
    return [root / path for path in listed if (root / path).is_file()]


def _read(root: Path, path: str, digest: str) -> str:
    try:
        data = (root / path).read_bytes()
    except OSError as error:
        raise NemocError(f"{root / path}: cannot be read: {error.strerror}") from None
    if (found := hashlib.sha256(data).hexdigest()) != digest:
        raise NemocError(f"{root / path}: found SHA-256 {found}, expected {digest}")
    return data.decode("utf-8")


def listing_digest(files: dict[str, dict[str, str]]) -> str:
    """SHA-256 over all paths and file digests of a listing, in its order."""
    lines = [
        f"{split} {path} {sha}\n" for split, part in files.items() for path, sha in part.items()
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _eligible(root: Path) -> Iterator[tuple[str, bytes]]:
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).as_posix()
        data = file.read_bytes()
        too_large = _SIDE.search(path) and len(data) > _LARGEST_SIDE_FILE
        if not data or _EXCLUDED.search(path) or (too_large and "pydoc_data" not in path):
            continue
        try:
            data.decode("utf-8")
        except UnicodeDecodeError:
            continue
        yield path, data


def write_listing() -> None:
    """Writes `corpus.json` from the library of the running interpreter."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files: dict[str, dict[str, str]] = {"library": {}, "side": {}, "held_out": {}}
    for path, data in _eligible(root):
        split = "held_out" if path in HELD_OUT else "side" if _SIDE.search(path) else "library"
        files[split][path] = hashlib.sha256(data).hexdigest()
    listing = {"python": PYTHON_VERSION, "sha256": listing_digest(files), "files": files}
    LISTING.write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_listing()
