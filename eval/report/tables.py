"""What a report is made of, as data: sections of paragraphs, tables, figures and samples, and how numbers look in them.

Nothing here is HTML or Markdown: all strings are text, which the templates escape (`render`).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from prefopt.evaluation.results import BASELINE, MODELS

Measure = Mapping[str, Any]
LABELS = {
    "base": "base",
    "sft": "SFT",
    "ppo": "PPO",
    "ppo_ptx": "PPO-ptx",
    "dpo": "DPO",
    "reward_model": "reward model",
}


# Of numbers that one reason leaves missing, as many are named; all of them stand in the table of every number.
MOST_NAMES = 12

# Characters that a browser or an editor obeys instead of showing: control codes, changes of the writing direction,
# halves of characters.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


class Missing(Exception):
    """A section has nothing to show; the message says why, and how to get it."""


# ---- the parts of a page ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    `small` stands under `text`: an interval, a count. `tone` is good or bad, a state of the lights, skipped or failed
    (then `why` tells the reason), none, paper, or words (text that may wrap). `share` draws a bar, 1 being the longest.
    """

    text: str
    small: str = ""
    tone: str = ""
    why: str = ""
    share: float | None = None


@dataclass
class Line:
    """A row of a table; `kind` is group (a heading over rows), difference (indented), total or nothing."""

    head: Cell | str
    cells: Sequence[Cell | str] = ()
    kind: str = ""

    def __post_init__(self) -> None:
        self.head, *self.cells = _as_cells([self.head, *self.cells])


@dataclass
class Table:
    """Columns, that of the rows' heads first; `kind` is a CSS class."""

    columns: Sequence[Cell | str]
    rows: Sequence[Line]
    kind: str = ""

    def __post_init__(self) -> None:
        self.columns = _as_cells(self.columns)


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Gap:
    """Why something is not there; words between backticks are set as code."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list of (what stands out, text)."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Figure:
    """A drawing of `plots`, and what it shows, for readers who do not see it."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class Fold:
    """Blocks that open on a click."""

    title: str
    blocks: Sequence[Any]


@dataclass(frozen=True)
class Samples:
    """The `samples` of results.json: prompts with what every model answered, side by side."""

    samples: Sequence[Mapping[str, Any]]


# A text alone is a paragraph of explanation.
Block = str | Heading | Gap | Items | Table | Figure | Fold | Samples


def headed(title: str, blocks: Sequence[Block]) -> list[Block]:
    """The blocks under a heading, if there are any."""
    return [Heading(title), *blocks] if blocks else []


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A whole page: what a reader wants first (`verdict`), notes on it (`about`), and the sections."""

    title: str
    verdict: Sequence[str]
    sections: Sequence[Section]
    about: Sequence[str] = ()


def _as_cells(values: Sequence[Cell | str]) -> list[Cell]:
    return [value if isinstance(value, Cell) else Cell(value) for value in values]


# ---- numbers and names ------------------------------------------------------------------------------------------------
def number(x: float | None, decimals: int, sign: bool = False) -> str:
    """
    >>> number(-0.25, 1), number(0.5, 2, sign=True), number(None, 2)
    ('−0.2', '+0.50', '–')
    """
    return "–" if x is None else f"{x:{'+' if sign else ''}.{decimals}f}".replace("-", "−")


def interval(m: Measure, decimals: int, before: str = "") -> str:
    """The interval of a measure, or nothing. A bound that excludes 0 is not rounded to it.

    >>> interval({"ci_low": 0.00004, "ci_high": 0.00021}, 4), interval({"ci_low": -0.00004, "ci_high": 0.00021}, 4)
    ('0.00004 to 0.00021', '−0.0000 to 0.0002')
    """
    low, high = m.get("ci_low"), m.get("ci_high")
    if low is None or high is None:
        return ""
    near, finest = min(abs(low), abs(high)), decimals + 3
    while low * high > 0 and decimals < finest and round(near, decimals) == 0 and near > 10**-finest:
        decimals += 1
    return f"{before}{number(low, decimals)} to {number(high, decimals)}"


def label(model: str) -> str:
    return LABELS.get(model, model)


def prompt_text(prompt: Any) -> str:
    """A prompt as text; of a conversation one line per message."""
    if isinstance(prompt, list):
        return "\n".join(f"{m.get('role')}: {m.get('content')}" for m in prompt)
    return str(prompt)


def visible(text: str) -> str:
    """Text in which nothing acts: control codes and changes of the writing direction are written out.

    >>> visible("a\\u202eb")
    'a⟨U+202E⟩b'
    """
    return _OBEYED.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text.replace("\r\n", "\n"))


def better_or_worse(m: Measure) -> str:
    """`good` or `bad` if the interval excludes no difference, else nothing."""
    equal = 0.5 if m["name"].startswith("winrate") else 0.0
    if m["ci_low"] is None or m["ci_high"] is None or m["higher_is_better"] is None:
        return ""
    if m["ci_low"] > equal:
        return "good" if m["higher_is_better"] else "bad"
    if m["ci_high"] < equal:
        return "bad" if m["higher_is_better"] else "good"
    return ""


def measured(m: Measure | None, decimals: int, *, difference: bool = False) -> Cell:
    """The cell of one number; `difference` marks it when its interval excludes no difference."""
    if m is None or (difference and m["model"] == m["against"]):
        return Cell("–", tone="none")
    if m["value"] is None:
        return Cell(m["status"], tone=m["status"], why=m["reason"] or "")
    tone = better_or_worse(m) if difference else ""
    signed = difference and not m["name"].startswith("winrate")
    text = number(m["value"], decimals, sign=signed) + {"good": " ▲", "bad": " ▼", "": ""}[tone]
    return Cell(text, interval(m, decimals), tone)


def missing_numbers(
    title: str, measures: Sequence[Measure], called: Callable[[Measure], str], line: str
) -> list[Fold]:
    """Each reason why numbers are missing, once, in a `line` with the {names} that it is the {reason} of."""
    names: dict[str, dict[str, None]] = {}
    for m in measures:
        if m["status"] != "ok":
            names.setdefault(f"{m['status']}: {m['reason']}", {})[called(m)] = None
    items = []
    for reason, of in names.items():
        more = f" and {len(of) - MOST_NAMES} more" if len(of) > MOST_NAMES else ""
        items.append(("", line.format(names=", ".join([*of][:MOST_NAMES]) + more, reason=reason)))
    return [Fold(title, [Items(items)])] if items else []


# ---- what the sections ask ----------------------------------------------------------------------------------------------
class Ask(NamedTuple):
    """A row of a table of measures: how it is called, which measure, against which model or None.

    `count` adds the largest n under the title; `paper` goes into the paper's column; `indent` sets it under the row above.
    """

    title: str
    measure: str
    decimals: int = 3
    against: str | None = None
    count: bool = False
    paper: str = "–"
    indent: bool = False


class Column(NamedTuple):
    """A column of a table of measures: its heading, the model, and what is put after the names of the measures."""

    title: str
    model: str
    suffix: str = ""


class Results:
    """The content of results.json as the sections ask for it."""

    def __init__(self, content: Mapping[str, Any]):
        self.content = content
        self.measures: Sequence[Measure] = content.get("measures") or []
        self.settings = content.get("settings") or {}
        self.baseline: str = self.settings.get("baseline") or BASELINE
        compared = [m["model"] for m in self.measures if m["name"] in ("winrate", "gold_reward")]
        # Without settings the four of the paper and any other that was compared.
        self.models = list(self.settings.get("models", dict.fromkeys([*MODELS, *compared])))
        self.others = [m for m in self.models if m != self.baseline]
        self._by_name = {(m["name"], m["model"], m["against"]): m for m in reversed(self.measures)}

    def find(self, name: str, model: str, against: str | None = None) -> Measure | None:
        return self._by_name.get((name, model, against))

    def names(self, prefix: str) -> list[str]:
        """What stands after `prefix` in the names of measures, each once: use cases, labelers, judges."""
        names = [m["name"] for m in self.measures if m["name"].startswith(prefix)]
        return list(dict.fromkeys(name.removeprefix(prefix) for name in names))

    def stage(self, stage: str) -> Mapping[str, Any]:
        """What the stage kept for its plots and tables.

        Raises:
            Missing: the stage has not run.
        """
        content = (self.content.get("stages") or {}).get(stage)
        if not content:
            raise Missing(f"the stage has not run; `prefopt eval {stage.replace('_', '-')}` runs it")
        return content.get("data", content)

    def missing(self, prefixes: str | tuple[str, ...], otherwise: str) -> Missing:
        """Nothing to show, for the first reason that a measure of that name gives."""
        reasons = [m["reason"] for m in self.measures if m["name"].startswith(prefixes) and m["reason"]]
        return Missing(reasons[0] if reasons else otherwise)

    def table(
        self, asks: Sequence[Ask | str], columns: Sequence[Column | str] | None = None, paper: Cell | None = None
    ) -> list[Table]:
        """A table of measures, or none: rows and columns without any are left out, and rows of which nothing was tried.

        Args:
            asks: a text begins a group of rows, and is left out when the group is empty.
            columns: or models, for one each; default: all.
            paper: heading of the column of `Ask.paper`, which no row has without it.
        """

        def line(ask: Ask) -> list[Measure | None]:
            return [self.find(ask.measure + c.suffix, c.model, ask.against) for c in columns]

        columns = self.models if columns is None else columns
        columns = [Column(label(c), c) if isinstance(c, str) else c for c in columns]
        lines = [line(ask) for ask in asks if isinstance(ask, Ask)]
        columns = [c for i, c in enumerate(columns) if any(of_ask[i] for of_ask in lines)]
        rows, group = [], []
        for ask in asks:
            if isinstance(ask, str):
                group = [Line(ask, kind="group")]
                continue
            found = line(ask)
            if any(m and m["status"] != "skipped" for m in found):
                compared = ask.against is not None
                cells = [measured(m, ask.decimals, difference=compared) for m in found]
                cells += [] if paper is None else [Cell(ask.paper, tone="paper")]
                count = f"n = {max(m['n'] for m in found if m)}" if ask.count else ""
                indent = ask.indent or (compared and not ask.measure.startswith("winrate"))
                rows += [*group, Line(Cell(ask.title, count), cells, "difference" if indent else "")]
                group = []
        heads = ["", *(c.title for c in columns), *([paper] if paper else [])]
        return [Table(heads, rows)] if rows else []
