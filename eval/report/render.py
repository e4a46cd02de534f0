"""A page as HTML or Markdown, from one template each; whatever the templates print is text, and is escaped.

HTML is escaped by Jinja2's autoescape, Markdown by `plain`, which the environment applies to every value printed.
"""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from prefopt.evaluation.report.tables import Page, label, number, prompt_text, visible

# The others, and tables that are folded in HTML, are for the page alone: Markdown cannot fold them.
MARKDOWN_SAMPLES = 5


def to_html(page: Page) -> str:
    """One self-contained page without scripts or external references."""
    return _render("page.html.jinja", page)


def to_markdown(page: Page) -> str:
    """The same as text that a repository or a chat shows, in a length that is read; of figures what they show in words."""
    return _render("page.md.jinja", page)


def plain(text: str) -> str:
    """One line in which nothing is Markdown or HTML.

    >>> print(plain("- *a* | <b>"))
    \\- \\*a\\* \\| \\<b\\>
    """
    line = re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", " ".join(text.split()))
    return re.sub(r"^(\d*)([-+=.)])(?=\2*(\s|$))", r"\1\\\2", line)  # would begin a list, or underline a heading


def fenced(text: str) -> Markup:
    """A block of text as it is, between fences longer than any inside it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}text\n{text}\n{fence}")


def coded(text: str) -> Markup:
    """Text whose `words` are set as code."""
    return Markup(re.sub("`([^`]*)`", r"<code>\1</code>", str(Markup.escape(text))))


def shortened(text: str, most: int = 2000) -> str:
    """At most so many characters, and how many more there were.

    >>> shortened("abcdef", 4)
    'abcd … and 2 more characters'
    """
    return text if len(text) <= most else f"{text[:most]} … and {len(text) - most:,} more characters"


def about(sample: Mapping[str, Any]) -> str:
    """Why a sample is shown."""
    return " · ".join(str(x) for x in (sample.get("use_case"), sample.get("why")) if x)


def scores(completion: Mapping[str, Any]) -> str:
    """What is known of a model's answer."""
    known = [f"{k} {number(completion[k], 2)}" for k in ("gold", "reward") if completion.get(k) is not None]
    return ", ".join([*known, *(["cut at the length limit"] if completion.get("truncated") else [])])


def _render(template: str, page: Page) -> str:
    return visible(_environment(template.endswith(".md.jinja")).get_template(template).render(page=page))


@cache
def _environment(is_markdown: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("prefopt.evaluation", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_plain_unless_ours if is_markdown else None,
    )
    environment.filters |= {f.__name__: f for f in (about, coded, fenced, label, scores, shortened)}
    environment.globals["most_samples"] = MARKDOWN_SAMPLES
    environment.filters["prompt"] = lambda prompt: shortened(prompt_text(prompt))
    environment.tests |= {"a": lambda block, name: type(block).__name__ == name}
    return environment


def _plain_unless_ours(value: Any) -> Any:
    """What `Environment.finalize` calls on every value printed; macros and `fenced` give Markup."""
    return value if isinstance(value, Markup) else Markup(plain(str(value)))
