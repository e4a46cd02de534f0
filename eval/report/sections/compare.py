"""Stage `compare` in the report: the win rates of every judge and the strengths of all models."""

from collections.abc import Mapping
from html import escape
from typing import Any

from prefopt.evaluation.report.bars import bars_plot
from prefopt.evaluation.report.markup import (
    Missing,
    baseline_name,
    cell,
    label,
    model_names,
    number,
    scroll_table,
)
from prefopt.evaluation.report.sections.stage_tables import TableRow, figures, measure_table, note, stage_data
from prefopt.evaluation.results import find

JUDGES = {"gold": "gold reward", "human": "people", "lm": "language model", "reward": "reward model"}


def section(results: Mapping[str, Any]) -> str:
    """HTML of the section."""
    measures, data = results.get("measures") or [], stage_data(results, "compare")
    main, baseline = data["main_judge"], baseline_name(results)
    if main is None:
        why = next((m["reason"] for m in measures if m["name"] == "winrate" and m["reason"]), None)
        raise Missing(why or "nobody judged the completions")
    others = [m for m in model_names(results) if m != baseline]
    suffix = {m["name"].partition(".")[2] for m in measures if m["name"].startswith("winrate_labelers.")}
    rows: list[TableRow] = [
        f"Judge: {_judge(main)}",
        ("samples", "winrate", 3, baseline),
        ("at equal length", "winrate_length_controlled", 3, baseline),
        ("greedy", "winrate_greedy", 3, baseline),
        ("held-out use case", "winrate_heldout_use_case", 3, baseline),
        "Other judges",
        *[(_judge(j), f"winrate_judge.{j}", 3, baseline) for j in _judges(measures)],
        "Labelers",
        *[(group, f"winrate_labelers.{group}", 3, baseline) for group in sorted(suffix)],
    ]
    html = measure_table(measures, rows, [(label(m), m, "") for m in others])
    html += note(
        f"Win rates against {label(baseline)}: .5 is equal, a tie counts half. Intervals of 95 % over prompts."
    )
    return html + _strengths(measures, data, results) + _language_model(measures)


def _strengths(measures: list[Mapping[str, Any]], data: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    found = [(m, find(measures, "bradley_terry", m)) for m in model_names(results)]
    found = [(m, x) for m, x in found if x and x["value"] is not None]
    if not found:
        return ""
    plot = bars_plot([("strength (log-odds)", [(label(m), x) for m, x in found])], "strengths", percent=False)
    found.sort(key=lambda model_and_strength: -model_and_strength[1]["value"])
    models, matrix = [model for model, _ in found], data["matrix"]
    observed = {(p["model"], p["against"]): p for p in data["pairs"] if p["judge"] == data["main_judge"]}
    rows = ""
    for model, strength in found:
        cells = cell(strength, 2, False, model)
        for other in models:
            if other == model:
                cells += "<td class='none'>–</td>"
                continue
            seen = _seen(observed, model, other)
            small = f"<small>model: {number(matrix.get(model, {}).get(other), 2)}</small>"
            cells += f"<td>{number(seen, 2)}{small}</td>"
        rows += f"<tr><th>{escape(label(model))}</th>{cells}</tr>"
    head = "".join(f"<th>over {escape(label(m))}</th>" for m in models)
    table = scroll_table(f"<tr><th></th><th>strength</th>{head}</tr>", rows)
    text = (
        "Bradley-Terry strengths in log-odds from all pairs of models, the baseline's being 0; then how often the row "
        "was preferred over the column, and what the strengths say of it. Where the two differ, one number per model "
        "does not tell the whole."
    )
    return f"<h3>Strength of all models</h3>{figures([plot])}{table}{note(text)}"


def _seen(observed: Mapping[tuple[str, str], Mapping[str, Any]], model: str, other: str) -> float | None:
    if (model, other) in observed:
        return observed[model, other]["value"]
    return 1 - observed[other, model]["value"] if (other, model) in observed else None


def _language_model(measures: list[Mapping[str, Any]]) -> str:
    rows: list[TableRow] = [
        ("same verdict in both orders", "judge_consistency", 3, None),
        ("verdicts for the first answer (.5: fair)", "judge_prefers_first", 3, None),
    ]
    table = measure_table(measures, rows, [(_judge("lm"), "lm", "")])
    return f"<h3>How far to trust the language model</h3>{table}" if table else ""


def _judges(measures: list[Mapping[str, Any]]) -> list[str]:
    names = [m["name"].partition(".")[2] for m in measures if m["name"].startswith("winrate_judge.")]
    return list(dict.fromkeys(names))


def _judge(name: str) -> str:
    return JUDGES.get(name, name)
