"""What a report is made of, as data: sections of paragraphs, tables, figures and samples, and how numbers look in them.

Nothing here is HTML or Markdown: all strings are text, which the templates escape (`render`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from markupsafe import Markup

from prefopt.evaluation.results import BASELINE, MODELS

Results = Mapping[str, Any]
Measures = Sequence[Mapping[str, Any]]
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
class Row:
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
    rows: Sequence[Row]
    kind: str = ""

    def __post_init__(self) -> None:
        self.columns = _as_cells(self.columns)


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Paragraph:
    """Text; `kind` is a CSS class: note, skipped or paper. Words between backticks are set as code."""

    text: str
    kind: str = "note"


@dataclass(frozen=True)
class Items:
    """A list of texts, or of (what stands out, text)."""

    items: Sequence[str | tuple[str, str]]


@dataclass(frozen=True)
class Figure:
    """A drawing of `plots`, and what it shows, for readers who do not see it."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class Figures:
    figures: Sequence[Figure]


@dataclass(frozen=True)
class Fold:
    """Blocks that open on a click."""

    title: str
    blocks: Sequence[Any]


class Answer(NamedTuple):
    model: str
    note: str
    text: str


class Sample(NamedTuple):
    """A prompt and what every model answered, side by side."""

    about: str
    prompt: str
    answers: Sequence[Answer]


@dataclass(frozen=True)
class Samples:
    samples: Sequence[Sample]


Block = Heading | Paragraph | Items | Table | Figures | Fold | Samples


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
    about: Sequence[str] = field(default=())


def _as_cells(values: Sequence[Cell | str]) -> list[Cell]:
    return [value if isinstance(value, Cell) else Cell(value) for value in values]


# ---- numbers and names ------------------------------------------------------------------------------------------------
def number(x: float | None, decimals: int, sign: bool = False) -> str:
    """
    >>> number(-0.25, 1), number(0.5, 2, sign=True), number(None, 2)
    ('−0.2', '+0.50', '–')
    """
    return "–" if x is None else f"{x:{'+' if sign else ''}.{decimals}f}".replace("-", "−")


def interval(m: Mapping[str, Any], decimals: int, before: str = "") -> str:
    """The interval of a measure, or nothing."""
    if m.get("ci_low") is None or m.get("ci_high") is None:
        return ""
    return f"{before}{number(m['ci_low'], decimals)} to {number(m['ci_high'], decimals)}"


def seconds(s: float) -> str:
    return f"{s:.1f} s" if s < 120 else f"{s / 60:.1f} min"


def label(model: str) -> str:
    return LABELS.get(model, model)


def model_names(results: Results) -> list[str]:
    """The models of the evaluation (`settings.models`), else the four of the paper and any other that was compared."""
    if named := (results.get("settings") or {}).get("models"):
        return list(named)
    compared = [m["model"] for m in results.get("measures") or [] if m["name"] in ("winrate", "gold_reward")]
    return list(dict.fromkeys([*MODELS, *compared]))


def baseline_name(results: Results) -> str:
    """The model that the others are compared with."""
    return (results.get("settings") or {}).get("baseline") or BASELINE


def better_or_worse(m: Mapping[str, Any]) -> str:
    """`good` or `bad` if the interval excludes no difference, else nothing."""
    equal = 0.5 if m["name"].startswith("winrate") else 0.0
    if m["ci_low"] is None or m["ci_high"] is None or m["higher_is_better"] is None:
        return ""
    if m["ci_low"] > equal:
        return "good" if m["higher_is_better"] else "bad"
    if m["ci_high"] < equal:
        return "bad" if m["higher_is_better"] else "good"
    return ""


# ---- tables of measures -----------------------------------------------------------------------------------------------
def measured(
    m: Mapping[str, Any] | None, decimals: int, *, difference: bool = False, model: str = ""
) -> Cell:
    """The cell of one number; `difference` marks it when its interval excludes no difference."""
    if m is None or (difference and model == m["against"]):
        return Cell("–", tone="none")
    if m["value"] is None:
        return Cell(m["status"], tone=m["status"], why=m["reason"] or "")
    tone = better_or_worse(m) if difference else ""
    signed = difference and not m["name"].startswith("winrate")
    text = number(m["value"], decimals, sign=signed) + {"good": " ▲", "bad": " ▼", "": ""}[tone]
    return Cell(text, interval(m, decimals), tone)


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


def by_model(models: Sequence[str]) -> list[tuple[str, str, str]]:
    """The columns of `measure_table`, one per model."""
    return [(label(m), m, "") for m in models]


def measure_table(
    measures: Measures,
    asks: Sequence[Ask | str],
    columns: Sequence[tuple[str, str, str]],
    paper: Cell | None = None,
    kind: str = "",
) -> list[Table]:
    """A table of measures, or none: rows and columns without any are left out.

    Args:
        asks: a text begins a group of rows, and is left out when the group is empty.
        columns: (heading, model, what is put after the names of the measures).
        paper: heading of the column of `Ask.paper`, which no row has without it.
    """
    known = {(m["name"], m["model"], m["against"]): m for m in reversed(measures)}

    def of(ask: Ask, column: tuple[str, str, str]) -> Mapping[str, Any] | None:
        return known.get((ask.measure + column[2], column[1], ask.against))

    questions = [ask for ask in asks if isinstance(ask, Ask)]
    columns = [column for column in columns if any(of(ask, column) for ask in questions)]
    rows, group = [], None
    for ask in asks:
        if isinstance(ask, str):
            group = Row(Cell(ask), kind="group")
            continue
        line = [of(ask, column) for column in columns]
        if not any(line):
            continue
        compared = ask.against is not None
        cells = [
            measured(m, ask.decimals, difference=compared, model=column[1])
            for m, column in zip(line, columns, strict=True)
        ]
        if paper is not None:
            cells.append(Cell(ask.paper, tone="paper"))
        head = Cell(ask.title, f"n = {max(m['n'] for m in line if m)}" if ask.count else "")
        indent = ask.indent or (compared and not ask.measure.startswith("winrate"))
        rows += [group] if group else []
        rows.append(Row(head, cells, "difference" if indent else ""))
        group = None
    heads = ["", *(title for title, _, _ in columns), *([paper] if paper else [])]
    return [Table(heads, rows, kind)] if rows else []


def names_after(measures: Measures, prefix: str) -> list[str]:
    """What stands after `prefix` in the names of measures, each once: use cases, labelers, judges."""
    return list(
        dict.fromkeys(m["name"].removeprefix(prefix) for m in measures if m["name"].startswith(prefix))
    )


def stage_data(results: Results, stage: str) -> Mapping[str, Any]:
    """What the stage kept for its plots and tables.

    Raises:
        Missing: the stage has not run.
    """
    content = (results.get("stages") or {}).get(stage)
    if not content:
        raise Missing(f"the stage has not run; `prefopt eval {stage.replace('_', '-')}` runs it")
    return content.get("data", content)


def missing(measures: Measures, prefix: str, otherwise: str) -> Missing:
    """Nothing to show, for the first reason that a measure of that name gives."""
    reasons = [m["reason"] for m in measures if m["name"].startswith(prefix) and m["reason"]]
    return Missing(reasons[0] if reasons else otherwise)
