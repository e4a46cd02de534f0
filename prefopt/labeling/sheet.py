"""A sheet: one HTML file in which a labeler rates, flags and ranks outputs, without network or server.

The page is sheet.html with sheet.css and sheet.js inside. Its content security policy names the digests of that script
and that style, so that nothing else can run or load, whatever prompts and outputs hold; and `trusted-types 'none'`
keeps the script itself from ever making markup of text.
"""

import base64
import hashlib
import json
import re
from importlib.resources import files
from typing import Any

from markdown_it import MarkdownIt

from prefopt.labeling.flags import FLAG_WORDS
from prefopt.labeling.key import Key

# "<" could end the data's element; the others are invisible, reorder what an editor shows, or have no UTF-8 form.
_ESCAPED = re.compile("[<>&\x7f-\x9f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\uffff\ud800-\udfff]")


def default_instructions() -> str:
    """The instructions for labelers that come with prefopt, as Markdown to start one's own from."""
    return _part("instructions.md")


def sheet_page(key: Key, instructions: str) -> str:
    """The HTML of a sheet: of the key, only the texts in the order shown."""
    style, script = _part("sheet.css"), _part("sheet.js")
    shown = {
        "sheet": key.sheet,
        "flags": list(FLAG_WORDS.items()),
        "tasks": [[task.id, task.prompt, task.outputs] for task in key.tasks.values()],
    }
    policy = (
        f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    parts = {"policy": policy, "style": style, "script": script, "sheet": _as_data(shown)}
    parts["instructions"] = render_instructions(instructions)
    # In one pass: what is put in is not looked at again.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _part("sheet.html"))


def render_instructions(markdown: str) -> str:
    """CommonMark with tables as HTML; HTML in it is shown as text, links go to the web alone, pictures are left out.

    >>> render_instructions("Rank **all** <b>outputs</b>.")
    '<p>Rank <strong>all</strong> &lt;b&gt;outputs&lt;/b&gt;.</p>\\n'
    """
    return MarkdownIt("commonmark", {"html": False}).enable("table").disable("image").render(markdown)


def _as_data(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _part(name: str) -> str:
    return files("prefopt.labeling").joinpath(name).read_text(encoding="utf-8").replace("\r\n", "\n")
