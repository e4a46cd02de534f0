"""Stage `bench` in the report: public NLP benchmarks with the alignment tax, truthfulness, toxicity and bias."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from prefopt.evaluation.benchmarks.benchmark import Score, paper_condition
from prefopt.evaluation.benchmarks.tasks import BENCHMARKS
from prefopt.evaluation.report import plots
from prefopt.evaluation.report.markup import Missing, cell, label, number, scroll_table
from prefopt.evaluation.report.paper import MARK, table_14
from prefopt.evaluation.report.paper import MODELS as OF_THE_PAPER
from prefopt.evaluation.report.sections.stage_tables import figures, note, stage_data
from prefopt.evaluation.results import find
from prefopt.evaluation.stages.benchmarks import PROMPTED

Measures = Sequence[Mapping[str, Any]]


def section(results: Mapping[str, Any]) -> str:
    """HTML of the section."""
    data = stage_data(results, "bench")
    measures = [m for m in results.get("measures") or [] if m["name"].startswith("bench.")]
    asked = {name: found for name, found in data["benchmarks"].items() if name in BENCHMARKS}
    measured = {m["name"].split(".")[1] for m in measures if m["value"] is not None}
    if not measured:
        reasons = list(dict.fromkeys(m["reason"] for m in measures if m["reason"]))
        raise Missing(reasons[0] if reasons else "no benchmark was asked for")
    nlp = [name for name in asked if name in measured and BENCHMARKS[name].conditions is None]
    others = [name for name in asked if name in measured and name not in nlp]
    return (
        figures(_tax(nlp, asked, measures, data))
        + (f"<h3>Public NLP</h3>{_table(nlp, asked, measures, data)}" if nlp else "")
        + (
            f"<h3>Truthfulness, toxicity, bias, summaries</h3>{_table(others, asked, measures, data)}"
            if others
            else ""
        )
        + _notes(data)
        + _missing(measures)
        + _sources(asked)
    )


def _tax(
    names: Sequence[str], asked: Mapping[str, Any], measures: Measures, data: Mapping[str, Any]
) -> list[str]:
    """One plot per condition: stage - base, in points of 100."""
    drawn = []
    if data["base"] is None:
        return drawn
    for condition in dict.fromkeys(c for name in names for c in asked[name]["conditions"]):
        rows = []
        for name in names:
            score = BENCHMARKS[name].scores[0]
            found = {}
            for model in data["models"]:
                m = find(measures, f"bench.{name}.{score.name}.{condition}", model, data["base"])
                if m is not None and m["value"] is not None:
                    found[_label(model)] = _in_points(m, score)
            if found:
                rows.append((BENCHMARKS[name].title, found))
        if rows:
            title = f"Alignment tax, {condition}"
            drawn.append(plots.differences_plot(rows, title, f"minus {label(data['base'])}, points of 100"))
    return drawn


def _label(model: str) -> str:
    name = label(model.removesuffix(PROMPTED))
    return f"{name}, prompted" if model.endswith(PROMPTED) else name


def _in_points(m: Mapping[str, Any], score: Score) -> dict[str, Any]:
    factor = 1 if _out_of_100(score) else 100
    return {k: None if m[k] is None else factor * m[k] for k in ("value", "ci_low", "ci_high")}


def _out_of_100(score: Score) -> bool:
    return score.scale == 100 or score.statistic == "bleu"


def _table(
    names: Sequence[str], asked: Mapping[str, Any], measures: Measures, data: Mapping[str, Any]
) -> str:
    """Scores, under each the difference to the base, and what the paper has."""
    models, base = data["models"], data["base"]
    head = "".join(f"<th>{escape(_label(m))}</th>" for m in models)
    head += f"<th class='paper'>GPT-3 / SFT / PPO / PPO-ptx <small>{MARK}</small></th>"
    body = ""
    for name in names:
        benchmark = BENCHMARKS[name]
        body += f"<tr class='group'><th colspan='{len(models) + 2}'><span>{escape(benchmark.title)}</span></th></tr>"
        for score in benchmark.scores:
            decimals = 1 if _out_of_100(score) or score.statistic == "perplexity" else 3
            for condition in asked[name]["conditions"]:
                full = f"bench.{name}.{score.name}.{condition}"
                found = [find(measures, full, model) for model in models]
                if not any(found):
                    continue
                count = max((m["n"] for m in found if m), default=0)
                cells = "".join(cell(m, decimals, False, "") for m in found)
                title = f"{score.name.replace('_', ' ')}, {condition}"
                body += f"<tr><th>{escape(title)} <small>n = {count}</small></th>{cells}{_paper(score, condition)}</tr>"
                if base is not None and len(models) > 1:
                    found = [find(measures, full, model, base) for model in models]
                    cells = "".join(cell(m, decimals, True, "") for m in found)
                    body += (
                        f"<tr><th class='difference'>minus {escape(label(base))}</th>{cells}"
                        "<td class='paper'></td></tr>"
                    )
    return scroll_table(f"<tr><th></th>{head}</tr>", body)


def _paper(score: Score, condition: str) -> str:
    decimals = 1 if _out_of_100(score) else 3
    for theirs in paper_condition(condition):
        values = [table_14(score.paper, theirs, model) if score.paper else None for model in OF_THE_PAPER]
        if any(value is not None for value in values):
            return f"<td class='paper'>{' / '.join(number(v, decimals) for v in values)}</td>"
    return "<td class='paper'>–</td>"


def _notes(data: Mapping[str, Any]) -> str:
    text = (
        f"Intervals of 95 % over rows, or groups of rows about the same text; differences to {label(data['base'])} are paired: "
        "both answered the same rows. "
        if data["base"] is not None
        else "Intervals of 95 % over rows, or groups of rows about the same text. "
    )
    if data["limit"] is not None:
        text += f"Only the first {data['limit']} rows of each were asked. "
    if data["toxicity_scorer"]:
        text += f"Toxicity by {data['toxicity_scorer']}; the paper's scorer was Perspective. "
    if data["truthfulness_judge"]:
        text += (
            f"Truth of answers by {data['truthfulness_judge']}; the paper's judge was a fine-tuned GPT-3. "
        )
    if data["too_long"]:
        cut = ", ".join(f"{key} ({count})" for key, count in sorted(data["too_long"].items())[:12])
        text += f"Rows longer than the model, which lost their beginning: {cut}"
        text += f" and {len(data['too_long']) - 12} more." if len(data["too_long"]) > 12 else "."
    return note(text)


def _missing(measures: Measures) -> str:
    """Each reason once, with what it is the reason of."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for m in measures:
        if m["value"] is None:
            names = reasons.setdefault((m["status"], m["reason"]), [])
            title = BENCHMARKS[m["name"].split(".")[1]].title
            if title not in names:
                names.append(title)
    if not reasons:
        return ""
    items = "".join(
        f"<li>{escape(', '.join(names))}: {escape(status)}: {escape(reason)}</li>"
        for (status, reason), names in reasons.items()
    )
    return f"<details><summary>Not measured, and why</summary><ul>{items}</ul></details>"


def _sources(asked: Mapping[str, Any]) -> str:
    """Where rows and tasks come from."""
    body = ""
    for name, found in asked.items():
        rows = found["rows"] if isinstance(found["rows"], str) else ", ".join(found["rows"].values())
        if found["from_hub"] and not found["hub_verified"]:
            rows += " (this id is unverified)"
        task = f"lm-eval's {found['lm_eval']}" if found["lm_eval"] else "own, through lm-eval"
        body += (
            f"<tr><th>{escape(found['title'])}</th><td>{escape(rows)}</td><td>{escape(task)}</td>"
            f"<td>{escape(BENCHMARKS[name].source)}</td></tr>"
        )
    table = scroll_table("<tr><th></th><th>rows</th><th>task</th><th>source</th></tr>", body)
    return f"<details><summary>Where the benchmarks come from</summary>{table}</details>"
