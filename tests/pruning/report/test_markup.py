from __future__ import annotations

import pytest

from liveprune.pruning.report.markup import Markup, attribute, el, joined, svg, table
from liveprune.pruning.report.page import page, section
from tests.pruning.search.report_page import read_page


def test_text_is_escaped_and_markup_is_not() -> None:
    found = el("p", 'a < b & "c"', el("b", "d"), None, title="'<e>'", class_="f", aria_label="g")
    assert found == (
        '<p title="&#x27;&lt;e&gt;&#x27;" class="f" aria-label="g">'
        "a &lt; b &amp; &quot;c&quot;<b>d</b></p>"
    )
    assert joined("<", None, found) == "&lt;" + found
    assert isinstance(joined("<"), Markup)


def test_control_characters_are_replaced() -> None:
    assert el("p", "a\x00b\x1bc\td\n") == "<p>a\ufffdb\ufffdc\td\n</p>"


def test_elements_without_content_are_not_closed() -> None:
    assert el("br") == "<br>"
    assert el("meta", charset="utf-8") == '<meta charset="utf-8">'
    assert el("td") == "<td></td>"


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.0, "1"), (0.126, "0.13"), (-0.001, "0"), (-2.5, "-2.5"), (100, "100"), ("1.000", "1.000")],
)
def test_numbers_in_attributes(value: str | float, text: str) -> None:
    assert attribute(value) == text


def test_a_page_is_well_formed_and_says_what_it_was_given() -> None:
    bad = "<script>1</script>\ud800"
    rows = [["first", "1"], [bad, None]]
    picture = svg("p", 20, 10, bad, "described", el("circle", cx=3, cy=3, r=2))
    source = page(bad, section("s", "Heading", table("caption", ["name", bad], rows), picture))
    read = read_page(source.decode("utf-8"))
    shown = "<script>1</script>?"
    assert "script" not in read.tags
    assert read.headings == [(1, shown), (2, "Heading")]
    (found,) = read.tables
    assert (found.caption, found.head) == ("caption", ["name", shown])
    assert found.rows == [["first", "1"], [shown, ""]]
    assert read.svgs[0].words == [shown, "described"]
    assert set(read.references) <= set(read.ids)
