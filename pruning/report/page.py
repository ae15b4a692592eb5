"""A report as one page of HTML: no script, nothing loaded from elsewhere."""

from __future__ import annotations

from importlib import resources

from liveprune.pruning.report.markup import Child, Markup, el

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(title: str, *content: Child) -> bytes:
    """The whole page under its heading; equal contents give equal pages."""
    style = resources.files(__package__).joinpath("report.css").read_text("utf-8")
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        el("style", Markup(style)),
    )
    main = el("main", el("h1", title), *content)
    text = f"<!DOCTYPE html>\n{el('html', head, el('body', main), lang='en')}\n"
    # A lone surrogate in a name cannot be encoded, and is no reason to have no report.
    return text.encode("utf-8", "replace")


def section(ident: str, heading: str, *content: Child) -> Markup:
    """A part of the page that its heading names; ``ident`` is used once in the page."""
    return el(
        "section",
        el("h2", heading, id=f"{ident}-heading"),
        *content,
        id=ident,
        aria_labelledby=f"{ident}-heading",
    )
