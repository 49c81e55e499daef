"""`nemoc passes`: the registered passes, the pipelines of the targets, or one pass in full."""

import difflib
import inspect

from rich.console import Console

from nemoc.compiler import plugin_classes
from nemoc.ir import NemocError
from nemoc.passes import Pass, passes_by_name, print_pipeline
from nemoc.passes.options import option_types
from nemoc.passes.presets import DECODE, PREFILL
from nemoc.passes.registry import GROUPS
from nemoc.terminal import heading, print_table, report


def run(name: str | None, plugins: tuple[str, ...]) -> None:
    """List all passes, or print what one does."""
    extra = plugin_classes(plugins)
    if name is None:
        _list(extra)
    else:
        _explain(name, passes_by_name(extra))


def _list(extra: tuple[type[Pass], ...]) -> None:
    console = report()
    groups = [(group.title, group.passes) for group in GROUPS]
    if extra:
        groups.append(("of your own", extra))
    for title, classes in groups:
        heading(console, title)
        print_table(
            console,
            ("pass", "effect", "what it does"),
            [(cls.name, cls.effect.value, cls.summary()) for cls in classes],
            wrap="what it does",
        )
    for phase, table in (("prefill", PREFILL), ("decode", DECODE)):
        heading(console, f"pipelines for {phase}")
        rows = [(kind, print_pipeline(passes).replace(",", ", ")) for kind, passes in table.items()]
        print_table(console, ("target", "passes"), rows, wrap="passes")


def _explain(name: str, known: dict[str, type[Pass]]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f", did you mean {near[0]}?" if near else f", expected one of {', '.join(known)}"
        raise NemocError(f"unknown pass {name!r}{hint}")
    cls = known[name]
    console = report()
    console.print(f"{cls.name} ({cls.effect.value})", style="bold")
    console.print(inspect.cleandoc(cls.__doc__ or ""), soft_wrap=True)
    _print_options(console, cls)


def _print_options(console: Console, cls: type[Pass]) -> None:
    kinds = option_types(cls)
    if not kinds:
        return
    heading(console, "options")
    default = cls()
    rows = [
        (option, _type_name(kind), str(getattr(default, option.replace("-", "_"))))
        for option, kind in kinds.items()
    ]
    print_table(console, ("option", "type", "default"), rows)


def _type_name(kind: object) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)
