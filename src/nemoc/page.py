"""Reports as pages: one HTML file each that needs no network, for people.

What is shown may have been written by others. Templates escape everything but what is marked as HTML, and a policy in
each page lets nothing run or be fetched.
"""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from nemoc.runtime.files import as_path, replacing_file

_FOLDER = Path(__file__).parent


def render(template: str, **values: Any) -> str:
    """A page.

    Args:
        template: its file beside this one.
        values: what the template names; it also has the style that all pages share.
    """
    environment = Environment(
        loader=FileSystemLoader(_FOLDER, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = Markup((_FOLDER / "page.css").read_text(encoding="utf-8"))
    return environment.get_template(template).render(style=style, **values)


def write_page(text: str, path: str | Path) -> None:
    """Write a page; a file of that name is replaced.

    Raises:
        NemocError: it cannot be written.
    """
    with replacing_file(as_path(path)) as file:
        file.write(text.encode())
