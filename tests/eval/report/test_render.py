"""What both templates owe their readers: every section in either, and texts from elsewhere that do nothing."""

import re
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt
from markupsafe import escape

from prefopt.evaluation.report.page import SECTIONS, report_page
from prefopt.evaluation.report.render import plain, to_html, to_markdown
from prefopt.evaluation.report.tables import Fold, Table
from tests.eval.report.conftest import whole_results

pytestmark = pytest.mark.slow

HOSTILE = (
    "</td></table></pre></main><script>alert(1)</script><img src=x onerror=alert(2)> \" ' & | a | b | `code` ``` "
    "**bold** [link](javascript:alert(3)) ![image](http://example.org/x.png) <!-- --> {{ 7 * 7 }} {% raw %} $x_1$ "
    "\u202eright to left\u2066 \x00 \x1b[31m \ud800 \r"
)
SEEN = "⟨U+202E⟩right to left⟨U+2066⟩ ⟨U+0000⟩ ⟨U+001B⟩"


@pytest.fixture(scope="module")
def hostile():
    """A hostile name, prompt, completion, label and reason of failure, in every stage."""
    models = ("sft", f"ppo {HOSTILE}", f"dpo {HOSTILE}")
    text = f"{HOSTILE}\n```\n# heading\n| a | b |\n"
    return report_page(whole_results(models, prompt=text, text=text, label=HOSTILE, reason=HOSTILE))


class Tags(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.words, self.open = set(), [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        self.open += [] if tag == "meta" else [tag]

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def tables(blocks):
    """Those that stand open, which are all that Markdown has."""
    return [block for block in blocks if isinstance(block, Table)]


def folded(blocks):
    """(title, table) of those that open on a click."""
    return [(b.title, t) for b in blocks if isinstance(b, Fold) for t in tables(b.blocks)]


def test_every_section_of_the_html_is_in_the_markdown(whole):
    page = report_page(whole)
    html, text = to_html(page), to_markdown(page)
    titles = re.findall("<h2>(.*?)</h2>", html)
    assert titles == [chapter.title for chapter in SECTIONS]
    assert re.findall("^## (.*)$", text, re.M) == titles
    assert "Skipped" not in html + text
    assert "Failed" not in html + text
    parts = dict(zip(titles, re.split("^## .*$", text, flags=re.M)[1:], strict=True))
    for section in page.sections:
        said = parts[section.title]
        for block in section.blocks:
            if isinstance(block, str):
                assert plain(block) in said
        for table in tables(section.blocks):
            for row in table.rows:
                for cell in (row.head, *row.cells):
                    assert plain(cell.text) in said
                    assert all(plain(part) in said for part in cell.small.split("\n"))
        for title, table in folded(section.blocks):
            assert f"### {plain(title)}\n\nIn report.html" in said
            assert all(f"<span>{escape(row.head.text)}</span>" in html for row in table.rows)
        figures = html.partition(f"<h2>{section.title}</h2>")[2].partition("</section>")[0].count("<figure>")
        assert said.count("Figure: ") == figures
    for name in ("What is this?", "an answer"):
        assert name in parts["The worst samples, side by side"]


def test_markdown_has_a_few_samples_and_says_where_the_others_are():
    results = whole_results()
    one = results["samples"][0]
    results["samples"] = [{**one, "prompt": f"Question {i}?"} for i in range(8)]
    page = report_page(results)
    text, html = to_markdown(page), to_html(page)
    assert [i for i in range(8) if f"Question {i}?" in text] == [0, 1, 2, 3, 4]
    assert "3 more in report\\.html" in text or "3 more in report.html" in text
    assert all(f"Question {i}?" in html for i in range(8))
    assert len(text.splitlines()) < 500


def test_tables_of_the_markdown_are_tables(whole):
    """One heading, one rule and as many cells in every row, except in headings over rows."""
    page = report_page(whole)
    tokens = MarkdownIt("commonmark").enable("table").parse(to_markdown(page))
    made = [t for section in page.sections for t in tables(section.blocks)]
    assert sum(token.type == "table_open" for token in tokens) == len(made)
    assert sum(token.type == "tr_open" for token in tokens) == sum(1 + len(t.rows) for t in made)


def test_hostile_texts_are_inert_in_html(hostile):
    html = to_html(hostile)
    page = Tags(html)
    assert page.open == []
    assert not {"script", "img", "a", "iframe", "object"} & page.tags
    for name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "href")
        assert name != "xlink:href" or value.startswith("#")
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", html)
    assert "Failed: Type" not in html
    words = "".join(page.words)
    for section in hostile.sections:
        part = Tags(html.partition(f'<section id="{section.id}">')[2].partition("</section>")[0])
        # The curves alone: no names, or in their legend, cut short.
        if section.id not in ("sft-epoch", "rl"):
            assert SEEN in "".join(part.words), section.title
    assert "{{ 7 * 7 }} {% raw %}" in words
    assert "<script>alert(1)</script>" in words


def test_hostile_texts_are_inert_in_markdown(hostile):
    text = to_markdown(hostile)
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    inline = [child for token in tokens for child in token.children or []]
    assert not {"html_block", "code_block", "hr", "blockquote_open"} & {token.type for token in tokens}
    assert not {"html_inline", "link_open", "image", "code_inline", "em_open"} & {t.type for t in inline}
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert "heading" not in headings
    assert [h for h in headings if h in {c.title for c in SECTIONS}] == [c.title for c in SECTIONS]
    made = [t for section in hostile.sections for t in tables(section.blocks)]
    assert sum(token.type == "tr_open" for token in tokens) == sum(1 + len(t.rows) for t in made)
    fences = [token.content for token in tokens if token.type == "fence"]
    assert len(fences) == 1 + 3  # a prompt and what three models answered
    assert all("```\n# heading\n| a | b |\n" in content for content in fences)
    shown = "".join(child.content for child in inline)
    assert "<script>alert(1)</script>" in shown
    assert SEEN in shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- x", r"\- x"),
        ("+ x", r"\+ x"),
        ("1. x", r"1\. x"),
        ("12) x", r"12\) x"),
        ("---", r"\---"),
        ("==", r"\=="),
        ("-0.5", "-0.5"),
        ("+0.500", "+0.500"),
        ("0.500", "0.500"),
        ("# x", r"\# x"),
        ("a\n\n    b", "a b"),
        ("&lt;", r"\&lt;"),
    ],
)
def test_text_that_would_be_markdown_at_the_start_of_a_line(text, expected):
    assert plain(text) == expected
