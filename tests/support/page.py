"""Pages, parsed."""

from html.parser import HTMLParser

BAD = "<script>alert('1')</script> & \"<img src=x onerror=alert(2)>\" $\\frac{1}{2}$"
"""What no name in a page may do."""

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """A parsed page; an element that is not closed in its turn is an error.

    Attributes:
        attributes: of every element, by tag.
        cells: the texts of the cells of each table, row by row, by the table's id.
        text: all text.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.cells: dict[str, list[list[str]]] = {}
        self.text = ""
        self._open: list[str] = []
        self._table = ""
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs)
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self._table = dict(attrs).get("id") or ""
        elif tag == "tr":
            self.cells.setdefault(self._table, []).append([])
        elif tag in ("td", "th"):
            self.cells[self._table][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self._open[-3:]):
            self.cells[self._table][-1][-1] += data
