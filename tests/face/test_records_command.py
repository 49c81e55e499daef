"""`nemoc records`, on files that others wrote and on the user's own."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemoc.__main__ import main
from nemoc.autotune.records import SHIPPED, Record, Records, read_records, records_text
from nemoc.codegen.tunables import Tunable
from nemoc.runtime.machine import processor_model
from nemoc.schedules import own_records
from support.made_up_records import DEVICE, record

ROWS = Tunable("rows", 8, (4, 8, 16))


def one(size: int, speed: float = 0.9, **fields: Any) -> Record:
    return record(
        (size, 32),
        lambda shape, s: speed if s["rows"] == 16 else 1.0,
        [ROWS],
        [{"rows": 16}],
        **fields,
    )


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder without records."""
    monkeypatch.setenv("NEMOC_CACHE", str(tmp_path / "cache"))
    yield own_records()


def write(path: Path, *records: Record) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(records_text(Records(records)))
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["records", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_list_says_what_was_found_where(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    file = write(tmp_path / "r.json", one(64), one(128, 1.5, numerics="any", origin="predicted"))
    code, out, _ = run(capsys, "list", file)
    assert code == 0
    first, second = sorted(line for line in out.splitlines() if line.startswith("product_"))
    assert second.split("  ")[0] == "product_64x32"
    for origin, line in (("measured", second), ("predicted", first)):
        title = f"\n{DEVICE}; {origin} time relative to the default\n"
        assert 0 <= out.index(title) < out.index(line)
    for text in ("1, 256, 257", "0.90 (0.89 to 0.91)", "same", "2026-11-01"):
        assert text in second
    for text in ("product_128x32", "no gain", "any"):
        assert text in first


def test_list_fits_a_terminal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    names = ("fused_columns_bbe1c93112", "conv_scan_52d94216b1+chunk_states_6284c93b5c")
    records = (dataclasses.replace(one(64), kernel=name) for name in names)
    _, out, _ = run(capsys, "list", write(tmp_path / "r.json", *records))
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    whole = next(line for line in lines if line.startswith("fused"))
    assert " ".join(whole.split()) == f"{names[0]} 1, 256, 257 0.90 (0.89 to 0.91) same 2026-11-01"
    broken = next(i for i, line in enumerate(lines) if line.startswith("conv_scan"))
    assert lines[broken].startswith("conv_scan_52d94216b1 + ")
    assert lines[broken + 1].strip() == "chunk_states_6284c93b5c"


def test_list_shows_the_records_that_come_along_and_the_users_own_by_default(
    capsys: pytest.CaptureFixture[str], own: Path
) -> None:
    before = run(capsys, "list")[1]
    for device in {r.device for r in read_records(SHIPPED)}:
        assert f"\n{device}; " in before
    write(own, one(64))
    after = run(capsys, "list")[1].replace("\n", "")
    assert "product_64x32" in after and "product_64x32" not in before.replace("\n", "")


def test_a_file_without_records_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = write(tmp_path / "r.json")
    assert run(capsys, "list", file)[1] == f"{file}: no records\n"


def test_exported_records_are_imported_elsewhere(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    own: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = [one(64), one(128)]
    write(own, *here, one(256, device="cpu:other, 1 thread"))
    file = tmp_path / "out.json"
    assert run(capsys, "export", "-o", file, "--device", DEVICE)[:2] == (0, f"{file}: 2 records\n")
    monkeypatch.setenv("NEMOC_CACHE", str(tmp_path / "elsewhere"))
    there = own_records()
    write(there, one(64))
    code, out, _ = run(capsys, "import", file)
    assert (code, out) == (0, f"{there}: 2 records from {file}, 1 of them new\n")
    assert {r.key for r in read_records(there)} == {r.key for r in here}


def test_import_keeps_what_is_later(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, own: Path
) -> None:
    late, early = (one(64, date=f"2026-{m}-01T00:00:00+00:00") for m in (12, 10))
    write(own, late)
    assert run(capsys, "import", write(tmp_path / "r.json", early))[0] == 0
    assert list(read_records(own)) == [late]


def test_merge_takes_the_later_of_two(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    late, early = (one(64, date=f"2026-{m}-01T00:00:00+00:00") for m in (12, 10))
    files = [write(tmp_path / "a.json", late), write(tmp_path / "b.json", early, one(128))]
    out = tmp_path / "both.json"
    assert run(capsys, "merge", *files, "-o", out)[:2] == (0, f"{out}: 2 records\n")
    assert {r.key for r in read_records(out)} == {late.key, one(128).key}
    assert late in list(read_records(out))


def test_prune_removes_old_ones_and_those_of_other_machines(
    capsys: pytest.CaptureFixture[str], own: Path
) -> None:
    old = one(64, date="2001-01-01T00:00:00")
    new = one(128, machine=processor_model(), date="2999-01-01T00:00:00+01:00")
    foreign = one(256, date="2999-01-01T00:00:00+00:00")
    write(own, old, new, foreign)
    assert run(capsys, "prune", "--older-than", "30")[1] == f"{own}: 1 of 3 records removed\n"
    assert {r.key for r in read_records(own)} == {new.key, foreign.key}
    assert run(capsys, "prune", "--not-this-machine")[1] == f"{own}: 1 of 2 records removed\n"
    assert list(read_records(own)) == [new]
    assert run(capsys, "prune", "--not-this-machine")[1] == f"{own}: 0 of 1 records removed\n"


def test_what_cannot_be_done_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, own: Path
) -> None:
    bad = tmp_path / "bad.json"
    entry = one(64).to_json() | {"date": "yesterday"}
    bad.write_text(json.dumps({"format": 1, "records": [entry]}))
    cases: dict[str, tuple[object, ...]] = {
        f"{bad}: records[0].date is 'yesterday', expected a date": ("import", bad),
        f"{tmp_path / 'none.json'}: cannot be read": ("list", tmp_path / "none.json"),
        f"{own}: no records, expected some from": ("export", "-o", tmp_path / "x"),
        "--device cpu:x: no record is for it": (
            "export",
            "-o",
            tmp_path / "x",
            "--device",
            "cpu:x",
        ),
        "nothing to go by, expected --older-than": ("prune",),
        "--older-than: found nan, expected days": ("prune", "--older-than", "nan"),
        "Missing argument 'FILES...'": ("merge", "-o", tmp_path / "x"),
    }
    for message, arguments in cases.items():
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1
    assert not own.exists()
    assert not (tmp_path / "x").exists()


def test_file_that_cannot_be_written_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, own: Path
) -> None:
    write(own, one(64))
    (tmp_path / "file").write_text("")
    code, _, err = run(capsys, "export", "-o", tmp_path / "file" / "records.json")
    assert code == 2
    assert err.startswith(f"nemoc: error: {tmp_path / 'file' / 'records.json'}: cannot be written")
