"""The journal of trials: what is kept when processes die, share it, or the disk does not play along."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemoc.autotune import journal as journal_module
from nemoc.autotune.journal import Journal, Study
from nemoc.ir.errors import NemocError
from support.paper_kernels import CHAINS, TILE, UNROLL

TUNABLES = (TILE, UNROLL, CHAINS)


def study(place: Path | str, name: str = "kernel") -> Study:
    return Journal(place).study(name, TUNABLES, {"structure": "linear"})


def finish(found: Study, schedule: dict[str, int], ratio: float = 0.9) -> int:
    number = found.begin(schedule)
    assert number is not None
    found.finish(number, f"k{sorted(schedule.items())}", "ok", ratio=ratio, seconds=(1e-3, 2e-3))
    return number


def begun_elsewhere(place: Path, schedule: dict[str, int]) -> None:
    """Open a trial in a process that ends at once."""
    script = (
        "import sys, json, os\n"
        "from nemoc.autotune.journal import Journal\n"
        "from support.paper_kernels import CHAINS, TILE, UNROLL\n"
        "study = Journal(sys.argv[1]).study('kernel', (TILE, UNROLL, CHAINS), {})\n"
        "assert study.begin(json.loads(sys.argv[2])) is not None\n"
        "os._exit(9)\n"
    )
    tests = str(Path(__file__).resolve().parents[1])
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([os.environ["PYTHONPATH"], tests]))
    command = [sys.executable, "-c", script, str(place), json.dumps(schedule)]
    assert subprocess.run(command, env=environment, check=False).returncode == 9


def test_trials_are_there_when_the_journal_is_opened_again(tmp_path: Path) -> None:
    place = tmp_path / "journal.log"
    finish(study(place), {"tile": 4}, 0.8)
    number = study(place).begin({"tile": 8})
    assert number is not None
    study(place).finish(number, "k8", "crash", message="ended with SIGSEGV")
    good, bad = study(place).trials()
    assert (good.schedule["tile"], good.ratio, good.outcome) == (4, 0.8, "ok")
    assert good.schedule["unroll"] == UNROLL.default
    assert (bad.outcome, bad.ratio, bad.message) == ("crash", None, "ended with SIGSEGV")


def test_trial_of_a_dead_process_is_lost_and_can_be_tried_again(tmp_path: Path) -> None:
    place = tmp_path / "journal.log"
    begun_elsewhere(place, {"tile": 4})
    found = study(place)
    assert found.open() == []
    assert found.recover() == 1
    assert found.trials() == []
    finish(found, {"tile": 4})
    assert [t.schedule["tile"] for t in found.trials()] == [4]
    assert found.recover() == 0


def test_candidate_is_opened_by_one_process_only(tmp_path: Path) -> None:
    place = tmp_path / "journal.log"
    first, second = study(place), study(place)
    assert first.begin({"tile": 4}) is not None
    assert second.begin({"tile": 4}) is None
    assert second.begin({"tile": 8}) is not None


def test_finished_candidate_is_not_opened_again(tmp_path: Path) -> None:
    place = tmp_path / "journal.log"
    finish(study(place), {"tile": 4})
    assert study(place).begin({"tile": 4}) is None


def test_line_cut_off_at_the_end_is_all_that_is_lost(tmp_path: Path) -> None:
    place = tmp_path / "journal.log"
    found = study(place)
    finish(found, {"tile": 4})
    finish(found, {"tile": 8})
    whole = place.read_bytes()
    place.write_bytes(whole + b'{"op_code": 5, "trial_')
    again = study(place)
    assert [t.schedule["tile"] for t in again.trials()] == [4, 8]
    assert place.read_bytes().startswith(whole + b'{"op_code"')
    assert all(map(json.loads, place.read_bytes().splitlines()))
    finish(again, {"tile": 1})
    assert len(study(place).trials()) == 3


def test_damage_in_the_middle_is_named_with_its_line(tmp_path: Path) -> None:
    place = tmp_path / "journal.log"
    finish(study(place), {"tile": 4})
    lines = place.read_bytes().splitlines(keepends=True)
    lines[2] = b"\x00\x01 not json\n"
    place.write_bytes(b"".join(lines))
    with pytest.raises(NemocError, match=r"journal.log: line 3: found .*, expected an entry of"):
        study(place)
    assert place.read_bytes() == b"".join(lines)


@pytest.mark.parametrize(
    "content",
    [
        b"my only copy",
        b"my only copy\n",
        b'{"op_code"\n{"op_code":0}\n',
        b'{"x":1}\n',
        b"[" * 100_000 + b"\n",
        b'{"op_code":99,"worker_id":"x"}\n',
        b'{"op_code":0,"worker_id":"x","study_name":5,"directions":"x"}\n',
    ],
    ids=["text", "line", "torn", "object", "deep", "unknown", "directions"],
)
def test_what_is_no_journal_is_refused_and_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    place = tmp_path / "notes.txt"
    place.write_bytes(content)
    with pytest.raises(NemocError, match=r"notes.txt: (line 1: found|the tuning journal: )") as no:
        study(place)
    assert len(str(no.value).splitlines()) == 1
    assert place.read_bytes() == content


def test_full_disk_is_one_line_and_what_was_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "journal.log"
    found = study(place)
    finish(found, {"tile": 4})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(NemocError, match=r"journal.log: .* written: No space left on device"):
            found.begin({"tile": 8})
    assert [t.schedule["tile"] for t in study(place).trials()] == [4]


def test_locked_journal_is_waited_for_and_then_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "journal.log"
    study(place)
    monkeypatch.setattr(journal_module, "_LOCKED", 0.1)
    with (tmp_path / "journal.log.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(NemocError, match=r"journal.log.lock: another process has held it"):
            study(place)
    finish(study(place), {"tile": 4})


def test_url_of_a_storage_is_taken(tmp_path: Path) -> None:
    place = f"sqlite:///{tmp_path}/trials.db"
    finish(study(place), {"tile": 4}, 0.7)
    assert [t.ratio for t in study(place).trials()] == [0.7]


def test_storage_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(NemocError, match=r"sqlite:////no/such/folder"):
        study("sqlite:////no/such/folder/trials.db")


def test_time_that_runs_spend_together_counts_once(tmp_path: Path) -> None:
    log = Journal(tmp_path / "journal.log")
    first = log.spent("model")
    first._study.set_user_attr("run a", [100.0, 160.0])
    first._study.set_user_attr("run b", [130.0, 170.0])
    first._study.set_user_attr("run c", [200.0, 210.0])
    assert first.earlier() == 80.0
    first.update()
    assert first.earlier() == 80.0
    assert log.spent("model").earlier() >= 80.0
