"""The file that labelers get: self-contained, blind, and harmless whatever the data hold."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from prefopt.labeling.flags import FLAG_WORDS
from prefopt.labeling.key import Key, blind, read_key, shown, write_with_key
from prefopt.labeling.sheet import default_instructions, render_instructions, sheet_page

HOSTILE = "</script><!--<script>\u2028\u202e\ufeff&amp;{{script}}]]>"
ROWS = [
    {"prompt": f"p{i} {HOSTILE}", "completions": [f"a{i}", f"b{i}", HOSTILE], "model": "secret-model",
     "truncated": [True, False, False]}
    for i in range(20)
]  # fmt: skip


class Elements(HTMLParser):
    """Start tags, and the text of script and style."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.raw = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.raw.append([tag, dict(attrs), ""])

    def handle_data(self, data):
        if self.cdata_elem:
            self.raw[-1][2] += data


@pytest.fixture(scope="module")
def page():
    return sheet_page(blind(ROWS, seed=11)[0], "# Rules")


def test_data_come_back_as_they_were_and_hide_no_markup(page):
    key, _ = blind(ROWS, seed=11)
    (data,) = [text for tag, attrs, text in Elements(page).raw if attrs.get("type") == "application/json"]
    assert not set("<>&\u2028\u202e\ufeff") & set(data)
    value = json.loads(data)
    assert value == {
        "sheet": key.sheet,
        "flags": [list(flag) for flag in FLAG_WORDS.items()],
        "tasks": [[task.id, task.prompt, task.outputs] for task in key.tasks.values()],
    }
    assert page.encode("utf-8")


def test_the_key_is_not_in_the_labelers_file(page):
    key, _ = blind(ROWS, seed=11)
    for secret in ("secret-model", "truncated", "shows", "expected", "seed", "screening"):
        assert secret not in page.partition('id="sheet">')[2].partition("</script>")[0]
    orders = {task.shows for task in key.tasks.values()}
    assert len(orders) > 3  # blind: the first is not always the first sample


def test_nothing_is_fetched_and_only_our_script_and_style_count(page):
    elements = Elements(page)
    for tag, attrs in elements.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "video", "audio"), tag
        assert not {"src", "srcset", "data", "action", "style"} & set(attrs), (tag, attrs)
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
        assert tag != "a" or attrs["href"].startswith("#")
    (policy,) = [a["content"] for t, a in elements.tags if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    digest = {
        tag: "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
        for tag, attrs, text in elements.raw
        if attrs.get("type") != "application/json"
    }
    assert rules == {
        "default-src": "'none'",
        "script-src": digest["script"],
        "style-src": digest["style"],
        "base-uri": "'none'",
        "form-action": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    (script,) = [t for tag, attrs, t in elements.raw if tag == "script" and "type" not in attrs]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(|XMLHttp|https?:", script)


def test_every_control_has_a_name(page):
    elements = Elements(page)
    labeled = {attrs.get("for") for tag, attrs in elements.tags if tag == "label"}
    for tag, attrs in elements.tags:
        if tag in ("input", "textarea", "select") and attrs.get("type") not in (
            "file",
            "checkbox",
        ):  # those are inside
            assert attrs["id"] in labeled, attrs
        if tag in ("dialog", "progress"):
            assert "aria-labelledby" in attrs or "aria-label" in attrs
        for name in ("aria-labelledby", "aria-describedby", "for"):
            if name in attrs:
                assert any(other.get("id") == attrs[name] for _, other in elements.tags), attrs


def test_instructions_render_a_safe_subset():
    text = "# T\n\n- **b** `c`\n\n|a|b|\n|-|-|\n|1|2|\n\n<b onclick=x>raw</b> [x](javascript:alert(1)) [y](https://e.org) ![z](https://e.org/i.png)"
    found = render_instructions(text)
    for part in (
        "<h1>T</h1>",
        "<strong>b</strong>",
        "<code>c</code>",
        "<td>1</td>",
        "&lt;b onclick=x&gt;",
        'href="https://e.org"',
    ):
        assert part in found
    for part in ("<b ", 'javascript:alert(1)"', "<img"):
        assert part not in found


def test_default_instructions_speak_of_the_three_dimensions():
    text = default_instructions()
    for word in ("**Helpful.**", "**Truthful.**", "**Harmless.**", "pull apart", "tie", "**Skip**"):
        assert word in text


def test_messages_are_shown_by_role_and_parts_as_text():
    prompt = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Look:"}, {"type": "image", "image": "cat.png"}],
        },
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]},
    ]
    (system, user, assistant) = shown(prompt)
    assert system == ["system", "Be brief."]
    assert user[0] == "user"
    assert user[1].startswith("Look:\n{")
    assert "cat.png" in user[1]
    assert json.loads(assistant[1]) == {"name": "f"}


def test_the_key_is_written_next_to_the_sheet(tmp_path):
    key, left_out = blind(ROWS)
    path = write_with_key(key, {tmp_path / "new" / "sheet.html": sheet_page(key, default_instructions())})
    assert path == tmp_path / "new" / "sheet.key.jsonl"
    assert read_key(path) == Key(key.sheet, key.tasks, key.seed)
    assert (len(key.tasks), sum(task.is_screening for task in key.tasks.values()), left_out) == (20, 0, 0)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["sheet.html", "sheet.key.jsonl"]
