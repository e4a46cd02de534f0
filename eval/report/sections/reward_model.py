"""Stage `reward-model` in the report: accuracy against its ceiling, calibration, and what a score mistakes for quality."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from prefopt.evaluation.report import plots
from prefopt.evaluation.report.markup import Missing, cell, label, number, scroll_table
from prefopt.evaluation.report.paper import MARK, paper_value
from prefopt.evaluation.report.sections.stage_tables import figures, measure_table, note, stage_data
from prefopt.evaluation.results import find

GROUPS = {"train_labelers": "training labelers", "heldout_labelers": "held-out labelers"}
ROWS = [
    "Order",
    ("accuracy within a prompt, mean", "rm.accuracy_per_prompt", 3, None),
    ("best of a prompt found", "rm.top1", 3, None),
    ("Kendall's tau-b", "rm.kendall_tau", 3, None),
    "Ties",
    ("accuracy, ties included", "rm.tie_accuracy", 3, None),
    ("margin of ranked pairs", "rm.margin_untied", 3, None),
    ("margin of tied pairs", "rm.margin_tied", 3, None),
    "Calibration",
    ("slope (1: calibrated)", "rm.calibration_slope", 2, None),
    ("expected calibration error", "rm.ece", 3, None),
    ("Brier score (.25: knows nothing)", "rm.brier", 3, None),
    ("negative log likelihood", "rm.nll", 3, None),
    "Length",
    ("accuracy, equally long pairs", "rm.accuracy_length_matched", 3, None),
    ("correlation of score and length", "rm.length_correlation", 3, None),
]


def section(results: Mapping[str, Any]) -> str:
    """HTML of the section."""
    measures, data = results.get("measures") or [], stage_data(results, "reward_model")
    groups, scorers = [*data["groups"]], [*data["reliability"]]
    if not groups or not scorers:
        why = next((m["reason"] for m in measures if m["name"].startswith("rm.") and m["reason"]), None)
        raise Missing(why or "no reward model was measured on rankings")
    html = _accuracies(measures, data, groups, scorers)
    html += figures([_reliability(name, bins) for name, bins in data["reliability"].items()])
    html += note(
        "Reliability: pairs in ten bins of as many each, by how sure the model is of the completion it prefers; below the "
        "line it is too sure. Intervals of 95 % over prompts."
    )
    tables = "".join(
        f"<h4>{escape(_group(g))}</h4>"
        + measure_table(measures, ROWS, [(label(s), s, f".{g}") for s in (*scorers, "labelers")])
        for g in groups
    )
    html += f"<details><summary>Order, ties, calibration, length</summary>{tables}</details>"
    return html + _parts(measures, groups, scorers)


def _group(group: str) -> str:
    return GROUPS.get(group, group)


def _accuracies(
    measures: Sequence[Mapping[str, Any]], data: Mapping[str, Any], groups: list[str], scorers: list[str]
) -> str:
    """Accuracy by labeler group: reward models, baselines, ceilings, and their ratio for the first reward model."""
    head = "".join(f"<th>{escape(label(s))}</th>" for s in scorers)
    head += "<th>longer wins</th><th>majority</th><th>labelers</th><th>gold</th><th>ratio</th>"
    head += f"<th class='paper'>paper <small>{MARK}</small></th>"
    body = []
    for group in groups:
        found = [find(measures, f"rm.accuracy.{group}", s) for s in (*scorers, "longer_wins", "majority")]
        agreement = find(measures, f"rm.agreement.{group}", "labelers") or _between(measures, group)
        gold = find(measures, f"rm.gold_accuracy.{group}", "gold")
        ceiling = agreement or gold
        first = found[0]
        ratio = "–"
        if first and ceiling and first["value"] is not None and ceiling["value"]:
            ratio = number(first["value"] / ceiling["value"], 2)
        about = data["groups"][group]
        title = f"{escape(_group(group))} <small>{about['pairs']:,} pairs, {about['rows']:,} prompts</small>"
        cells = "".join(cell(m, 3, False, "") for m in (*found, agreement, gold))
        known = paper_value(f"rm.accuracy.{group}", "reward_model")
        paper = f"{known[0]}<small>± {known[1]}</small>" if known else "–"
        body.append(f"<tr><th>{title}</th>{cells}<td>{ratio}</td><td class='paper'>{paper}</td></tr>")
    rows = [(f"{label(s)} minus {label(scorers[0])}", "rm.accuracy", 3, scorers[0]) for s in scorers[1:]]
    differences = "".join(
        measure_table(measures, [row], [(_group(g), s, f".{g}") for g in groups])
        for s, row in zip(scorers[1:], rows, strict=True)
    )
    return (
        scroll_table(f"<tr><th>pairs ranked by</th>{head}</tr>", "".join(body))
        + differences
        + note(
            "Share of strictly ranked pairs in the labelers' order. Longer wins and majority (always the first, or always "
            "the last) see no quality. Labelers: how often two of them order a pair alike, within the group where two "
            "ranked the same completions, else with those of another group; gold: the gold reward's own accuracy. Ratio: "
            "the first reward model to the labelers' agreement, or to gold where nobody's rankings overlap. A policy's reward is DPO's "
            "implicit one, beta times its log-probability ratio to the baseline."
        )
    )


def _between(measures: Sequence[Mapping[str, Any]], group: str) -> Mapping[str, Any] | None:
    names = [m["name"] for m in measures if m["name"].startswith("rm.agreement_between.")]
    found = [name for name in names if group in name.split(".")[2:]]
    return find(measures, found[0], "labelers") if found else None


def _reliability(scorer: str, by_group: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    series = [
        (
            _group(group),
            [
                {"x": b["confidence"], "y": b["accuracy"], "y_low": b["ci_low"], "y_high": b["ci_high"]}
                for b in bins
            ],
        )
        for group, bins in by_group.items()
    ]
    series.append(("calibrated", [{"x": 0.5, "y": 0.5}, {"x": 1.0, "y": 1.0}]))
    return plots.points_plot(
        series, f"{label(scorer)}: accuracy", "confidence, sigmoid of the score difference"
    )


def _parts(measures: Sequence[Mapping[str, Any]], groups: list[str], scorers: list[str]) -> str:
    """Accuracy by rank gap, labeler and use case."""
    html = ""
    for kind, title in (("gap", "rank gap"), ("labeler", "labeler"), ("use_case", "use case")):
        tables = ""
        for group in groups:
            prefix = f"rm.accuracy_{kind}.{group}."
            names = dict.fromkeys(m["name"] for m in measures if m["name"].startswith(prefix))
            rows = [(name.removeprefix(prefix), name, 3, None) for name in names]
            table = measure_table(measures, rows, [(label(s), s, "") for s in scorers])
            tables += f"<h4>{escape(_group(group))}</h4>{table}" if table else ""
        if tables:
            html += f"<details><summary>Accuracy by {title}</summary>{tables}</details>"
    return html
