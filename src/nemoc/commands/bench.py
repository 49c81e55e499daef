"""`nemoc bench`: how fast an artifact is here, and how fast it could be at most."""

import json
from pathlib import Path

from nemoc.compiler import load
from nemoc.measurement import bench
from nemoc.terminal import print_table, progress, report, short


def run(
    artifact: Path,
    *,
    prefill: int,
    decode: int,
    json_file: Path | None,
    threads: int | None,
    quiet: bool,
) -> None:
    """Print medians, and write them as JSON where asked to."""
    with progress(quiet) as show:
        executable = load(artifact, threads=threads, progress=show)
        found = bench(executable, prefill=prefill, decode=decode)
    if json_file is not None:
        json_file.write_text(json.dumps(found.to_json(), indent=2) + "\n", encoding="utf-8")
    console = report()
    rows = [
        (f"prefill of {found.prefill_tokens} tokens", f"{found.prefill_tokens_per_second:.1f}"),
        (f"decode of {found.decode_tokens} tokens", f"{found.decode_tokens_per_second:.1f}"),
    ]
    print_table(console, ("median of interleaved rounds", ">tokens/s"), rows)
    if found.decode_bytes_per_token is None or found.bandwidth_share is None:
        return
    console.print(
        f"\nDecoding reads {short(found.decode_bytes_per_token, 'B')} a token, "
        f"{found.bandwidth_share:.0%} of the {short(found.memory_bandwidth, 'B')}/s\n"
        f"that {found.threads} threads read from memory here."
    )
