"""A kill or a full disk while an artifact is written leaves its name as it was."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nemoc.ir import NemocError
from nemoc.runtime import Contents, build, files, load, store

HERE = Path(__file__).parent

CHILD = f"""
import dataclasses, importlib.util, os, signal, sys
from pathlib import Path
import torch
spec = importlib.util.spec_from_file_location("model", {str(HERE / "conftest.py")!r})
model = importlib.util.module_from_spec(spec)
spec.loader.exec_module(model)
from nemoc.runtime import build

torch.set_num_threads(1)  # so that there are no threads to lose in a fork
CONTENTS = model.reference_contents()
STEPS = ("write", "fsync", "rename", "mkdir", "renameat2")

def build_killed(path, version, kill_at):
    \"""Build in a process that is killed just before one of its steps; 0: never. Returns the steps made.\"""
    readable, writable = os.pipe()
    child = os.fork()
    if child:
        os.close(writable)
        died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert died == (-signal.SIGKILL if kill_at else 0), died
        return int(os.read(readable, 10) or 0)
    steps = 0
    def trace(frame, event, arg):
        nonlocal steps
        if event == "c_call" and getattr(arg, "__name__", "") in STEPS:
            steps += 1
            if steps == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    contents = dataclasses.replace(CONTENTS, model={{"version": version}})
    sys.setprofile(trace)
    build(contents, path)
    sys.setprofile(None)
    os.write(writable, str(steps).encode())
    os._exit(0)
"""
"""Source for a child process that forks and kills processes which build artifacts."""


def run_child(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD + code, str(path)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_kill_leaves_no_half_artifact(tmp_path: Path) -> None:
    code = """
from nemoc.runtime import load
path = Path(sys.argv[1])
steps = build_killed(path.with_name("trial.nemoc"), "trial", 0)
assert steps > 50, steps
renamed = False
for kill_at in [*range(1, steps, 15), steps - 2, steps - 1, steps]:
    build_killed(path, "new", kill_at)
    if path.exists():
        renamed = True
        assert load(path).program.model == {"version": "new"}
    else:
        assert not renamed
assert renamed  # the last steps make the new name durable
"""
    done = run_child(code, tmp_path / "out.nemoc")
    assert done.returncode == 0, done.stderr


def test_a_kill_keeps_the_artifact_that_was_there(tmp_path: Path) -> None:
    code = """
from nemoc.runtime import load
path = Path(sys.argv[1])
build_killed(path, "old", 0)
steps = build_killed(path, "old", 0)
for kill_at in [1, 2, steps // 2, *range(steps - 4, steps + 1)]:
    build_killed(path, f"at {kill_at}", kill_at)
    version = load(path).program.model["version"]
    assert version == "old" or kill_at > steps - 4
build_killed(path, "last", 0)
assert load(path).program.model["version"] == "last"
assert os.listdir(path.parent) == ["out.nemoc"], os.listdir(path.parent)
"""
    done = run_child(code, tmp_path / "out.nemoc")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("room", [0, 3000, 40000, 100000])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path,
    contents: Callable[..., Contents],
    monkeypatch: pytest.MonkeyPatch,
    room: int,
) -> None:
    write = store.HashingFile.write
    left = room

    def limited(self: store.HashingFile, data: bytes | memoryview) -> int:
        nonlocal left
        left -= len(data)
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, data)

    monkeypatch.setattr(store.HashingFile, "write", limited)
    with pytest.raises(NemocError, match=r"out.nemoc: cannot be written: No space left on device$"):
        build(contents(), tmp_path / "out.nemoc")
    assert os.listdir(tmp_path) == []


def test_a_limit_of_the_file_size_leaves_nothing(tmp_path: Path) -> None:
    code = """
import resource
from nemoc.ir import NemocError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000))
try:
    build(model.reference_contents(), Path(sys.argv[1]))
except NemocError as error:
    print(error)
"""
    done = run_child(code, tmp_path / "out.nemoc")
    assert done.stdout == f"{tmp_path}/out.nemoc: cannot be written: File too large\n", done.stderr
    assert os.listdir(tmp_path) == []


def test_a_failing_rename_keeps_the_old_artifact(
    tmp_path: Path, contents: Callable[..., Contents], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.nemoc"
    build(contents(model={"version": "old"}), path)
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if ".tmp-" in str(source) and str(target) == str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(NemocError, match="cannot be written: Input/output error"):
        build(contents(), path)
    assert load(path).program.model == {"version": "old"}
    monkeypatch.setattr(os, "rename", rename)
    build(contents(model={"version": "new"}), path)
    assert load(path).program.model == {"version": "new"}
    assert os.listdir(tmp_path) == ["out.nemoc"]


def test_leftovers_of_the_dead_are_removed_and_others_kept(
    tmp_path: Path, contents: Callable[..., Contents]
) -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    for name in (f".a.nemoc.tmp-{child.pid}", f".b.nemoc.tmp-{child.pid}", ".a.nemoc.tmp-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.safetensors").write_text("half")
    build(contents(), tmp_path / "b.nemoc").save(tmp_path / f".a.nemoc.old-{child.pid}")
    build(contents(model={"version": "new"}), tmp_path / "a.nemoc")
    assert sorted(os.listdir(tmp_path)) == [".a.nemoc.tmp-1", "a.nemoc", "b.nemoc"]
    assert load(tmp_path / "a.nemoc").program.model == {"version": "new"}


def test_what_a_killed_replacement_set_aside_comes_back(
    tmp_path: Path, contents: Callable[..., Contents]
) -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    build(contents(model={"version": "old"}), tmp_path / "a.nemoc")
    (tmp_path / "a.nemoc").rename(tmp_path / f".a.nemoc.old-{child.pid}")
    files.remove_leftovers(tmp_path / "a.nemoc")
    assert load(tmp_path / "a.nemoc").program.model == {"version": "old"}


def test_a_pipe_is_written_into_and_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    files.expect_writable(path)
    with files.replacing_file(path) as file:
        file.write(b"whole")
    assert os.read(reader, 10) == b"whole"
    os.close(reader)
    assert path.is_fifo()
    assert list(tmp_path.iterdir()) == [path]
