"""`nemoc targets`: what can be compiled for, here and now."""

from rich.text import Text

from nemoc.ir import NemocError
from nemoc.targets import TARGETS, default_target, resolve_target
from nemoc.terminal import heading, print_table, report, verdict


def run() -> None:
    """Print the targets, and why one does not work on this machine."""
    console = report()
    rows: list[tuple[str | Text, ...]] = []
    for target in TARGETS:
        problem = _problem(target.name)
        rows.append((target.name, verdict(not problem, "yes", "no"), problem or target.description))
    heading(console, "Targets of this version")
    print_table(console, ("target", "compiles here", "what it is"), rows, wrap="what it is")
    console.print(f"\nDefault on this machine: {default_target()}")
    console.print("Code for GPUs is compiled on any machine; cuda targets run where such a GPU is.")


def _problem(name: str) -> str:
    try:
        resolve_target(name)
    except NemocError as error:
        return str(error)
    return ""
