"""Stage `bench` in the report: public NLP benchmarks with the alignment tax, truthfulness, toxicity and bias."""

from collections.abc import Mapping, Sequence
from typing import Any

from prefopt.evaluation.benchmarks import BENCHMARKS, PROMPTED, Score, paper_condition
from prefopt.evaluation.report.paper import MARK, table_14
from prefopt.evaluation.report.paper import MODELS as OF_THE_PAPER
from prefopt.evaluation.report.plots import intervals_plot
from prefopt.evaluation.report.tables import (
    Ask,
    Block,
    Cell,
    Column,
    Figure,
    Fold,
    Heading,
    Items,
    Measure,
    Results,
    Row,
    Table,
    label,
    number,
)


def section(results: Results) -> list[Block]:
    data = results.stage("bench")
    measures = [m for m in results.measures if m["name"].startswith("bench.")]
    asked = {name: about for name, about in data["benchmarks"].items() if name in BENCHMARKS}
    measured = {m["name"].split(".")[1] for m in measures if m["value"] is not None}
    if not measured:
        raise results.missing("bench.", "no benchmark was asked for")
    shown = [name for name in asked if name in measured]
    nlp = [name for name in shown if BENCHMARKS[name].conditions is None]
    groups = {
        "Public NLP": nlp,
        "Truthfulness, toxicity, bias, summaries": [name for name in shown if name not in nlp],
    }
    blocks: list[Block] = [*_tax(nlp, asked, results, data)]
    for title, names in groups.items():
        blocks += [Heading(title), *_table(names, asked, results, data)] if names else []
    return [*blocks, _note(data), *_missing(measures), _sources(asked)]


def _tax(names: Sequence[str], asked: Mapping[str, Any], results: Results, data: Mapping[str, Any]) -> list[Figure]:
    """One plot per condition: model - base, in points of 100."""
    base, drawings = data["base"], []
    for condition in dict.fromkeys(c for name in names for c in asked[name]["conditions"]) if base else ():
        rows = []
        for name in names:
            score = BENCHMARKS[name].scores[0]
            scale = 1 if _out_of_100(score) else 100
            differences = {}
            for model in data["models"]:
                m = results.find(f"bench.{name}.{score.name}.{condition}", model, base)
                if m is not None and m["value"] is not None:
                    keys = ("value", "ci_low", "ci_high")
                    differences[_label(model)] = {k: None if m[k] is None else scale * m[k] for k in keys}
            if differences:
                rows.append((BENCHMARKS[name].title, differences))
        if rows:
            title, axis = f"Alignment tax, {condition}", f"minus {label(base)}, points of 100"
            drawings.append(intervals_plot(rows, title, axis, title=title))
    return drawings


def _label(model: str) -> str:
    name = label(model.removesuffix(PROMPTED))
    return f"{name}, prompted" if model.endswith(PROMPTED) else name


def _out_of_100(score: Score) -> bool:
    return score.scale == 100 or score.statistic == "bleu"


def _table(names: Sequence[str], asked: Mapping[str, Any], results: Results, data: Mapping[str, Any]) -> list[Table]:
    """Scores, under each the difference to the base, and what the paper has."""
    base, asks = data["base"], []
    for name in names:
        asks.append(BENCHMARKS[name].title)
        for score in BENCHMARKS[name].scores:
            decimals = 1 if _out_of_100(score) or score.statistic == "perplexity" else 3
            for condition in asked[name]["conditions"]:
                full = f"bench.{name}.{score.name}.{condition}"
                title = f"{score.name.replace('_', ' ')}, {condition}"
                asks.append(Ask(title, full, decimals, count=True, paper=_paper(score, condition)))
                if base is not None:
                    asks.append(Ask(f"minus {label(base)}", full, decimals, base, paper=""))
    columns = [Column(_label(m), m) for m in data["models"]]
    return results.table(asks, columns, Cell("GPT-3 / SFT / PPO / PPO-ptx", MARK, "paper"))


def _paper(score: Score, condition: str) -> str:
    for theirs in paper_condition(condition) if score.paper else ():
        values = [table_14(score.paper, theirs, model) for model in OF_THE_PAPER]
        if any(value is not None for value in values):
            return " / ".join(number(value, 1 if _out_of_100(score) else 3) for value in values)
    return "–"


def _note(data: Mapping[str, Any]) -> str:
    text = "Intervals of 95 % over rows, or groups of rows about the same text"
    if data["base"] is not None:
        text += f"; differences to {label(data['base'])} are paired: both answered the same rows"
    text += ". "
    if data["limit"] is not None:
        text += f"Only the first {data['limit']} rows of each were asked. "
    if data["toxicity_scorer"]:
        text += f"Toxicity by {data['toxicity_scorer']}; the paper's scorer was Perspective. "
    if data["truthfulness_judge"]:
        text += f"Truth of answers by {data['truthfulness_judge']}; the paper's judge was a fine-tuned GPT-3. "
    if data["too_long"]:
        cut = ", ".join(f"{key} ({count})" for key, count in sorted(data["too_long"].items())[:12])
        more = f" and {len(data['too_long']) - 12} more" if len(data["too_long"]) > 12 else ""
        text += f"Rows longer than the model, which lost their beginning: {cut}{more}."
    return text


def _missing(measures: Sequence[Measure]) -> list[Fold]:
    """Each reason once, with what it is the reason of."""
    reasons: dict[str, dict[str, None]] = {}
    for m in measures:
        if m["value"] is None:
            title = BENCHMARKS[m["name"].split(".")[1]].title
            reasons.setdefault(f"{m['status']}: {m['reason']}", {})[title] = None
    items = [("", f"{', '.join(titles)}: {reason}") for reason, titles in reasons.items()]
    return [Fold("Not measured, and why", [Items(items)])] if items else []


def _sources(asked: Mapping[str, Any]) -> Fold:
    """Where rows and tasks come from."""
    rows = []
    for name, about in asked.items():
        origin = about["rows"] if isinstance(about["rows"], str) else ", ".join(about["rows"].values())
        if about["from_hub"] and not about["hub_verified"]:
            origin += " (this id is unverified)"
        task = f"lm-eval's {about['lm_eval']}" if about["lm_eval"] else "own, through lm-eval"
        rows.append(Row(about["title"], [origin, task, BENCHMARKS[name].source]))
    return Fold("Where the benchmarks come from", [Table(["", "rows", "task", "source"], rows)])
