"""Files and directories that appear under their name whole or not at all."""

import contextlib
import ctypes
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from nemoc.ir.errors import NemocError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def as_path(path: str | os.PathLike[str]) -> Path:
    """A path from a user.

    Raises:
        NemocError: it is none.
    """
    try:
        found = Path(path)
        os.fsencode(found)
    except (TypeError, UnicodeEncodeError):
        raise NemocError(f"path is {path!r}, expected text or a path") from None
    if "\0" in str(found):
        raise NemocError(f"path is {path!r}, which holds a zero byte")
    return found


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write; on success it is made durable and takes its name, replacing a former one.

    A pipe or a device of that name is written into.

    Raises:
        NemocError: it cannot be written; nothing has changed under its name.
    """
    temporary = _temporary(path)
    try:
        if _is_stream(path):
            with open(path, "wb") as file:
                yield file
            return
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def expect_writable(path: Path) -> None:
    """Refuse a file that `replacing_file` could not make, before work whose result would have no place.

    Raises:
        NemocError: it cannot be written.
    """
    temporary = _temporary(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not _is_stream(path):
            temporary.touch()
            temporary.unlink()
    except OSError as error:
        raise _unwritable(path, error) from None


@contextlib.contextmanager
def replacing_directory(path: Path, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """A directory to fill, beside its final name; on success it takes that name.

    Whoever fills it makes its files durable. What killed processes left beside the name is removed first. A process
    fills one directory of a name at a time.

    Args:
        path: the final name.
        replaceable: whether a directory of that name may be replaced.

    Raises:
        NemocError: something that may not be replaced has the name, or the directory cannot be written; nothing
            has changed under its name.
    """
    path = Path(os.path.abspath(path))
    if os.path.lexists(path) and not replaceable(path):
        raise NemocError(f"{path}: exists and is no artifact of nemoc; it is not replaced")
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        temporary.mkdir()
        yield temporary
        for folder, _, _ in os.walk(temporary):
            sync_directory(Path(folder))
        _install(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(path: Path) -> None:
    """Remove temporaries of a name whose processes are dead; put back what a killed replacement set aside."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(tmp|old)-(\d+)")
    for entry in path.parent.iterdir():
        match = pattern.fullmatch(entry.name)
        if match is None or _is_alive(int(match[2])):
            continue
        if match[1] == "old" and not os.path.lexists(path):
            entry.rename(path)
        else:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def sync_directory(path: Path) -> None:
    """Make the entries of a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_stream(path: Path) -> bool:
    """Whether something has the name that is no file with a content of its own, such as `/dev/null`."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _temporary(path: Path) -> Path:
    return path.parent / f".{path.name}.tmp-{os.getpid()}"


def _is_alive(process: int) -> bool:
    """Whether another process has this number; our own cannot have left something, only a namesake."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _install(temporary: Path, path: Path) -> None:
    """Give a directory its final name; a former one is left under the temporary's name."""
    if not os.path.lexists(path):
        os.rename(temporary, path)
    elif not _exchange(temporary, path):
        aside = path.parent / f".{path.name}.old-{os.getpid()}"
        os.rename(path, aside)
        try:
            os.rename(temporary, path)
        except OSError:
            os.rename(aside, path)
            raise
        os.rename(aside, temporary)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; false where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    done = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    if done == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number))


def _unwritable(path: Path, error: OSError) -> NemocError:
    where = f" ({error.filename})" if error.filename else ""
    return NemocError(f"{path}: cannot be written: {error.strerror or error}{where}")
