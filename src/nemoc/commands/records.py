"""`nemoc records`: what tuning found, as a table, and files of it for other machines."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from nemoc.autotune.records import Record, Records, read_records
from nemoc.ir import NemocError
from nemoc.runtime.machine import processor_model
from nemoc.schedules import known_records, own_records, write_records
from nemoc.terminal import heading, print_table, report, stages
from nemoc.tuning import add_records


def list_(file: Path | None) -> None:
    """Print the records of a file, or those that compilation knows."""
    found = read_records(file) if file is not None else known_records()
    if not found:
        report().print(f"{file or own_records()}: no records", soft_wrap=True)
        return
    console = report()
    for device, origin in sorted({(r.device, r.origin) for r in found}):
        heading(console, f"{device}; {origin} time relative to the default")
        ordered = sorted(
            (r for r in found if (r.device, r.origin) == (device, origin)),
            key=lambda r: (r.kernel, r.when),
        )
        columns = ("kernel", "B, L, C", "time (95 %)", "bits", "date")
        print_table(console, columns, [_cells(record) for record in ordered], wrap="kernel")


def export(output: Path, device: str | None) -> None:
    """Write the user's records, of one device or all, to a file."""
    known = _own()
    found = Records(r for r in known if device is None or r.device == device)
    if not found:
        devices = ", ".join(repr(d) for d in sorted({r.device for r in known}))
        raise NemocError(
            f"--device {device}: no record is for it, expected one of {devices or 'none'}"
            if device is not None
            else f"{own_records()}: no records, expected some from `nemoc tune`"
        )
    write_records(found, output)
    report().print(f"{output}: {len(found)} records", soft_wrap=True)


def import_(file: Path) -> None:
    """Add the records of a file to the user's."""
    found, before = read_records(file), len(_own())
    add_records(found, own_records())
    new = len(_own()) - before
    report().print(
        f"{own_records()}: {len(found)} records from {file}, {new} of them new", soft_wrap=True
    )


def merge(files: Sequence[Path], output: Path) -> None:
    """Write the records of several files to one; of two for the same the later one."""
    found = Records()
    for file in files:
        found.add(read_records(file))
    write_records(found, output)
    report().print(f"{output}: {len(found)} records", soft_wrap=True)


def prune(older_than: float | None, not_this_machine: bool) -> None:
    """Remove some of the user's records."""
    gone: list[Callable[[Record], bool]] = []
    if older_than is not None:
        try:
            oldest = datetime.now(UTC) - timedelta(days=older_than)
        except (ValueError, OverflowError):
            raise NemocError(f"--older-than: found {older_than:g}, expected days") from None
        gone.append(lambda record: record.when < oldest)
    if not_this_machine:
        here = processor_model()
        gone.append(lambda record: record.machine != here)
    if not gone:
        raise NemocError("prune: nothing to go by, expected --older-than or --not-this-machine")
    known = _own()
    kept = Records(r for r in known if not any(is_gone(r) for is_gone in gone))
    if len(kept) < len(known):
        write_records(kept, own_records())
    report().print(
        f"{own_records()}: {len(known) - len(kept)} of {len(known)} records removed",
        soft_wrap=True,
    )


def _own() -> Records:
    path = own_records()
    return read_records(path) if path.exists() else Records()


def _cells(record: Record) -> tuple[str, ...]:
    return (
        stages(record.kernel),
        ", ".join(str(record.sizes[name]) for name in "BLC" if name in record.sizes),
        f"{record.ratio:.2f} ({record.low:.2f} to {record.high:.2f})"
        if record.schedule
        else "no gain",
        record.numerics,
        record.when.date().isoformat(),
    )
