"""What is in an HTML page, by the standard library's parser."""

import base64
import hashlib
import re
from html.parser import HTMLParser

VOID = {"br", "meta", "img"}


class Page(HTMLParser):
    """Notes what is in a page, and fails at an end tag that does not fit."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.cells: list[list[str]] = []
        self.styles = ""
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        elif tag in ("td", "th"):
            self.cells[-1].append("")
        elif tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            self.styles += data
        elif "script" in self.open:
            self.scripts[-1] += data
        elif data.strip():
            self.texts.append(data.strip())
        if {"td", "th"} & set(self.open):
            self.cells[-1][-1] += data

    @property
    def text(self) -> str:
        """All that a reader reads."""
        return " ".join(self.texts)

    def values(self, name: str) -> list[str]:
        """All values of an attribute."""
        return [value for attribute, value in self.attributes if attribute == name]


def require_self_contained(page: Page) -> None:
    """Fail unless the page needs nothing but itself, and its policy lets no other script run than its own."""
    assert not page.tags & {"link", "iframe", "object", "embed", "image", "base", "form"}
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name == "src":
            assert re.fullmatch(r"data:(image/png|audio/mpeg);base64,[A-Za-z0-9+/]+=*", value)
        elif not name.startswith("xmlns"):
            assert "//" not in value
            assert not re.search(r"url\((?!#)", value)
        if name in ("href", "xlink:href"):
            assert value.startswith("#")
    ids = page.values("id")
    assert len(set(ids)) == len(ids)
    used = {value[1:] for name in ("href", "xlink:href") for value in page.values(name)}
    used |= {found for _, value in page.attributes for found in re.findall(r"url\(#([^)]*)\)", value)}
    assert used <= set(ids)
    assert "url(" not in page.styles
    assert "@import" not in page.styles
    (policy,) = (value for value in page.values("content") if "default-src" in value)
    assert policy.startswith("default-src 'none'; ")
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts]
    assert re.findall("sha256-([^']*)'", policy) == hashes
    assert "http" not in "".join(page.scripts)
