"""What was compiled is kept on disk: as it was, as long as there is room, and without trust in the files."""

from collections.abc import Callable
from pathlib import Path

import pytest

from nemoc.codegen.object_store import ObjectStore

CONTENT = bytes(range(256)) * 2


def test_content_is_found_by_its_key(tmp_path: Path) -> None:
    ObjectStore(tmp_path / "new").put("a", CONTENT)
    assert ObjectStore(tmp_path / "new").get("a") == CONTENT
    assert ObjectStore(tmp_path / "new").get("b") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda stored: stored[:-9] + bytes([stored[-9] ^ 1]) + stored[-8:],
        lambda stored: stored[:-1],
        lambda stored: stored[stored.index(b"\n") + 1 :],
        lambda stored: b"",
    ],
    ids=["flipped bit", "cut short", "no checksum", "empty"],
)
def test_a_damaged_entry_counts_as_absent(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    store = ObjectStore(tmp_path)
    store.put("a", CONTENT)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert store.get("a") is None
    store.put("a", CONTENT)
    assert store.get("a") == CONTENT


def test_an_entry_under_another_key_counts_as_absent(tmp_path: Path) -> None:
    store = ObjectStore(tmp_path)
    store.put("a", CONTENT)
    (path,) = tmp_path.iterdir()
    path.rename(path.with_stem("b"))
    assert store.get("b") is None


def test_what_was_used_last_is_kept(tmp_path: Path) -> None:
    store = ObjectStore(tmp_path, limit=1300)
    (tmp_path / "somebody's.txt").write_text("x" * 2000)
    for key in "abc":
        store.put(key, CONTENT)
    assert store.get("a") == CONTENT
    store.prune()
    assert [store.get(key) is not None for key in "abc"] == [True, False, True]
    assert (tmp_path / "somebody's.txt").exists()


def test_a_folder_that_cannot_be_written_to_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = ObjectStore(tmp_path / "file")
    store.put("a", CONTENT)
    store.prune()
    assert store.get("a") is None
