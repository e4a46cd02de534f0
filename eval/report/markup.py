"""Pieces of the report: numbers, table cells and names as text and HTML."""

import re
from collections.abc import Mapping
from html import escape
from typing import Any

from prefopt.evaluation.report.style import CSS
from prefopt.evaluation.results import BASELINE, MODELS

# Characters that a browser or an editor obeys instead of showing: control codes, changes of the writing direction,
# halves of characters.
_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
LABELS = {
    "base": "base",
    "sft": "SFT",
    "ppo": "PPO",
    "ppo_ptx": "PPO-ptx",
    "dpo": "DPO",
    "reward_model": "reward model",
}


class Missing(Exception):
    """A section has nothing to show; the message says why, and how to get it."""


def model_names(results: Mapping[str, Any]) -> list[str]:
    """The models of the evaluation (`settings.models`), else the four of the paper and any other that was compared."""
    if named := (results.get("settings") or {}).get("models"):
        return list(named)
    found = [m["model"] for m in results.get("measures") or [] if m["name"] in ("winrate", "gold_reward")]
    return list(dict.fromkeys([*MODELS, *found]))


def baseline_name(results: Mapping[str, Any]) -> str:
    """The model that the others are compared with."""
    return (results.get("settings") or {}).get("baseline") or BASELINE


def label(model: str) -> str:
    return LABELS.get(model, model)


def visible(text: str) -> str:
    """Text in which nothing acts: control codes and changes of the writing direction are written out.

    >>> visible("a\\u202eb")
    'a⟨U+202E⟩b'
    """
    return _OBEYED.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text.replace("\r\n", "\n"))


def shortened(text: str, most: int = 2000) -> str:
    """At most so many characters, and how many more there were.

    >>> shortened("abcdef", 4)
    'abcd … and 2 more characters'
    """
    return text if len(text) <= most else f"{text[:most]} … and {len(text) - most:,} more characters"


def page(title: str, body: str) -> str:
    """A whole page without scripts or external references; `body` is HTML, `title` text."""
    return visible(_page(title, body))


def _page(title: str, body: str) -> str:
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{body}
</main>
</body>
</html>
"""


def scroll_table(head: str, body: str) -> str:
    return f"<div class='scroll'><table><thead>{head}</thead><tbody>{body}</tbody></table></div>"


def cell(m: Mapping[str, Any] | None, decimals: int, difference: bool, model: str) -> str:
    """One number of a table; `difference` marks it when its interval excludes no difference."""
    if m is None or (difference and model == m["against"]):
        return "<td class='none'>–</td>"
    if m["value"] is None:
        return f"<td class='none' title='{escape(m['reason'] or '', quote=True)}'>{escape(m['status'])}</td>"
    direction = better_or_worse(m) if difference else None
    mark = {"good": " ▲", "bad": " ▼"}.get(direction or "", "")
    signed = difference and not m["name"].startswith("winrate")
    small = interval(m, decimals)
    return (
        f"<td class='{direction or ''}'>{number(m['value'], decimals, sign=signed)}{mark}"
        f"{f'<small>{small}</small>' if small else ''}</td>"
    )


def better_or_worse(m: Mapping[str, Any]) -> str | None:
    """`good` or `bad` if the interval excludes no difference, else None."""
    equal = 0.5 if m["name"].startswith("winrate") else 0.0
    if m["ci_low"] is None or m["ci_high"] is None or m["higher_is_better"] is None:
        return None
    if m["ci_low"] > equal:
        return "good" if m["higher_is_better"] else "bad"
    if m["ci_high"] < equal:
        return "bad" if m["higher_is_better"] else "good"
    return None


def number(x: float | None, decimals: int, sign: bool = False) -> str:
    if x is None:
        return "–"
    return f"{x:{'+' if sign else ''}.{decimals}f}".replace("-", "−")


def interval(m: Mapping[str, Any], decimals: int, before: str = "") -> str:
    if m["ci_low"] is None or m["ci_high"] is None:
        return ""
    return f"{before}{number(m['ci_low'], decimals)} to {number(m['ci_high'], decimals)}"


def seconds(s: float) -> str:
    return f"{s:.1f} s" if s < 120 else f"{s / 60:.1f} min"


def listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def verb(word: str, models: list[str]) -> str:
    return word if len(models) == 1 else {"beats": "beat", "loses to": "lose to"}.get(word, word)


def prompt_text(prompt: Any) -> str:
    if isinstance(prompt, list):
        return "\n".join(f"{m.get('role')}: {m.get('content')}" for m in prompt)
    return str(prompt)
