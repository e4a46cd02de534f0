"""A sheet: one HTML file in which a labeler rates, flags and ranks outputs, without network or server.

The page is sheet.html with sheet.css and sheet.js inside. Its content security policy names the digests of that script
and that style, so that nothing else can run or load, whatever prompts and outputs hold; and `trusted-types 'none'`
keeps the script itself from ever making markup of text.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from prefopt.errors import UserError
from prefopt.labeling.flags import FLAG_WORDS
from prefopt.labeling.key import Key, blind, write_key

# "<" could end the data's element; the others are invisible, reorder what an editor shows, or have no UTF-8 form.
_ESCAPED = re.compile("[<>&\x7f-\x9f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\uffff\ud800-\udfff]")


@dataclass(frozen=True)
class Export:
    """What `export_sheet` wrote; `left_out` rows had one text only."""

    sheet: Path
    key: Path
    tasks: int
    screening: int
    left_out: int


def export_sheet(
    rows: Iterable[Mapping[str, Any]],
    path: str | Path,
    *,
    seed: int | None = None,
    instructions: str | None = None,
    screening: Iterable[Mapping[str, Any]] = (),
    group: str | None = None,
    source: str = "samples",
    screening_source: str = "screening",
) -> Export:
    """Write a sheet for labelers, and beside it `NAME.key.jsonl`, which undoes its blinding and stays at home.

    Args:
        rows: `prompt` and `completions` (2 to 9 different ones), and any other fields.
        path: the .html file.
        instructions: Markdown shown first; default: `default_instructions()`.
        seed, screening, group: as for `prefopt.labeling.key.blind`.

    Raises:
        UserError: a row that does not fit, by its number.
        FileExistsError: the key of another sheet is in the way.
    """
    path = Path(path)
    if path.suffix != ".html":
        raise UserError(f"{path}: expected a name ending in .html, as browsers open it by its name")
    key, left_out = blind(
        rows, seed=seed, screening=screening, group=group, source=source, screening_source=screening_source
    )
    page = sheet_page(key, default_instructions() if instructions is None else instructions)
    key_path = path.with_suffix(".key.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_key(key, key_path, [path])  # first: a sheet without its key would be labour lost
    path.write_text(page, encoding="utf-8")
    known = sum(task.is_screening for task in key.tasks.values())
    return Export(path, key_path, len(key.tasks), known, left_out)


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
    parts = {
        "policy": policy,
        "style": style,
        "script": script,
        "instructions": render_instructions(instructions),
        "sheet": _as_data(shown),
    }
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
