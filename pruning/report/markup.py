"""HTML and SVG as text, escaped by construction: only ``el`` makes markup."""

from __future__ import annotations

import html
from collections.abc import Sequence


class Markup(str):
    """Text that is HTML already. Any other text is escaped when it becomes part of some."""

    __slots__ = ()


Child = str | None


def el(tag: str, *children: Child, **attributes: str | float | None) -> Markup:
    """An element around its children; None is left out.

    An underscore in the name of an attribute stands for a hyphen, a last one for nothing
    (``class_``).
    """
    inner = "".join(_escape(child) for child in children if child is not None)
    named = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{_escape(attribute(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in ("meta", "br"):
        return Markup(f"<{tag}{named}>")
    return Markup(f"<{tag}{named}>{inner}</{tag}>")


def joined(*children: Child) -> Markup:
    """Children one after another, without an element around them."""
    return Markup("".join(_escape(child) for child in children if child is not None))


def attribute(value: str | float) -> str:
    """A number with at most two decimals: a hundredth of a pixel."""
    if isinstance(value, str):
        return value
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[Child]]) -> Markup:
    """A table that scrolls by itself where it is too wide; the first column names the rows."""
    columns = [el("th", cell, scope="col") for cell in head]
    body = [
        el("tr", el("th", first, scope="row"), *(el("td", cell) for cell in rest))
        for first, *rest in rows
    ]
    whole = el(
        "table",
        el("caption", caption),
        el("thead", el("tr", *columns)),
        el("tbody", *body),
    )
    return scrolling(caption, whole)


def figure(ident: str, caption: str, *pictures: Markup) -> Markup:
    """Pictures with one caption."""
    return el(
        "figure",
        *(scrolling(caption, picture) for picture in pictures),
        el("figcaption", caption),
        id=ident,
    )


def scrolling(label: str, content: Markup) -> Markup:
    """Reachable by keyboard, since that is the only way to scroll without a pointer."""
    return el("div", content, class_="scroll", role="region", aria_label=label, tabindex="0")


def svg(
    ident: str, width: float, height: float, title: str, description: str, *shapes: Child
) -> Markup:
    """A picture of ``width`` times ``height`` pixels; ``ident`` is used once in the page."""
    return el(
        "svg",
        el("title", title, id=f"{ident}-title"),
        el("desc", description, id=f"{ident}-desc"),
        *shapes,
        viewBox=f"0 0 {attribute(width)} {attribute(height)}",
        width=width,
        height=height,
        role="img",
        aria_labelledby=f"{ident}-title {ident}-desc",
    )


def label(x: float, y: float, text: str, anchor: str = "start") -> Markup:
    """Text in a picture; ``anchor`` is the end of it that lies at ``x``: start, middle, end."""
    return el("text", text, x=x, y=y, text_anchor=anchor)


def _escape(text: str) -> str:
    # Control characters have no place in HTML, not even escaped.
    if isinstance(text, Markup):
        return text
    return html.escape("".join(c if c >= " " or c in "\n\t" else "\ufffd" for c in text))
