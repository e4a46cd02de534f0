"""Stage `reward-model` in the report: accuracy against its ceiling, calibration, and what a score mistakes for quality."""

from collections.abc import Mapping, Sequence
from typing import Any

from prefopt.evaluation.report.paper import MARK, paper_value
from prefopt.evaluation.report.plots import Series, curves_plot
from prefopt.evaluation.report.tables import (
    Ask,
    Block,
    Cell,
    Column,
    Figure,
    Fold,
    Heading,
    Results,
    Row,
    Table,
    label,
    measured,
    number,
)

GROUPS = {"train_labelers": "training labelers", "heldout_labelers": "held-out labelers"}
DETAILS = [
    "Order",
    Ask("accuracy within a prompt, mean", "rm.accuracy_per_prompt"),
    Ask("best of a prompt found", "rm.top1"),
    Ask("Kendall's tau-b", "rm.kendall_tau"),
    "Ties",
    Ask("accuracy, ties included", "rm.tie_accuracy"),
    Ask("margin of ranked pairs", "rm.margin_untied"),
    Ask("margin of tied pairs", "rm.margin_tied"),
    "Calibration",
    Ask("slope (1: calibrated)", "rm.calibration_slope", 2),
    Ask("expected calibration error", "rm.ece"),
    Ask("Brier score (.25: knows nothing)", "rm.brier"),
    Ask("negative log likelihood", "rm.nll"),
    "Length",
    Ask("accuracy, equally long pairs", "rm.accuracy_length_matched"),
    Ask("correlation of score and length", "rm.length_correlation"),
]


def section(results: Results) -> list[Block]:
    data = results.stage("reward_model")
    groups, scorers = data["groups"], [*data["reliability"]]
    if not groups or not scorers:
        raise results.missing("rm.", "no reward model was measured on rankings")
    details: list[Block] = []
    for group in groups:
        columns = [Column(label(s), s, f".{group}") for s in (*scorers, "labelers")]
        details += [Heading(_group(group)), *results.table(DETAILS, columns)]
    return [
        Table(
            [
                "pairs ranked by",
                *map(label, scorers),
                *("longer wins", "majority", "labelers", "gold", "ratio"),
                Cell("paper", MARK, "paper"),
            ],
            [_accuracies(results, group, about, scorers) for group, about in groups.items()],
        ),
        *_differences(results, list(groups), scorers),
        "Share of strictly ranked pairs in the labelers' order. Longer wins and majority (always the first, or always "
        "the last) see no quality. Labelers: how often two of them order a pair alike, within the group where two "
        "ranked the same completions, else with those of another group; gold: the gold reward's own accuracy. Ratio: "
        "the first reward model to the labelers' agreement, or to gold where nobody's rankings overlap. A policy's "
        "reward is DPO's implicit one, beta times its log-probability ratio to the baseline.",
        *(_reliability(scorer, bins) for scorer, bins in data["reliability"].items()),
        "Reliability: pairs in ten bins of as many each, by how sure the model is of the completion it prefers; below "
        "the line it is too sure. Intervals of 95 % over prompts.",
        Fold("Order, ties, calibration, length", details),
        *_parts(results, list(groups), scorers),
    ]


def _group(group: str) -> str:
    return GROUPS.get(group, group)


def _accuracies(results: Results, group: str, about: Mapping[str, int], scorers: list[str]) -> Row:
    """Accuracy on one labeler group: reward models, baselines, ceilings, and their ratio for the first reward model."""
    ranked = [results.find(f"rm.accuracy.{group}", s) for s in (*scorers, "longer_wins", "majority")]
    agreement = results.find(f"rm.agreement.{group}", "labelers") or _between(results, group)
    gold = results.find(f"rm.gold_accuracy.{group}", "gold")
    first, ceiling = ranked[0], agreement or gold
    ratio = "–"
    if first and ceiling and first["value"] is not None and ceiling["value"]:
        ratio = number(first["value"] / ceiling["value"], 2)
    known = paper_value(f"rm.accuracy.{group}", "reward_model")
    paper = Cell(f"{known[0]}", f"± {known[1]}", "paper") if known else Cell("–", tone="paper")
    head = Cell(_group(group), f"{about['pairs']:,} pairs, {about['rows']:,} prompts")
    return Row(head, [*(measured(m, 3) for m in (*ranked, agreement, gold)), ratio, paper])


def _between(results: Results, group: str) -> Mapping[str, Any] | None:
    """How often labelers of this group and of another order a pair alike."""
    prefix = "rm.agreement_between."
    names = [name for name in results.names(prefix) if group in name.split(".")]
    return results.find(prefix + names[0], "labelers") if names else None


def _differences(results: Results, groups: list[str], scorers: list[str]) -> list[Table]:
    first, *others = scorers
    asks = [Ask(f"{label(s)} minus {label(first)}", "rm.accuracy", 3, first) for s in others]
    return [
        table
        for scorer, ask in zip(others, asks, strict=True)
        for table in results.table([ask], [Column(_group(g), scorer, f".{g}") for g in groups])
    ]


def _reliability(scorer: str, by_group: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    keys = {"x": "confidence", "y": "accuracy", "y_low": "ci_low", "y_high": "ci_high"}
    series = [
        Series(_group(group), [{to: b[key] for to, key in keys.items()} for b in bins])
        for group, bins in by_group.items()
    ]
    series.append(Series("calibrated", [{"x": 0.5, "y": 0.5}, {"x": 1.0, "y": 1.0}]))
    return curves_plot(series, f"{label(scorer)}: accuracy", "confidence, sigmoid of the score difference")


def _parts(results: Results, groups: list[str], scorers: list[str]) -> list[Fold]:
    """Accuracy by rank gap, labeler and use case."""
    folds = []
    for kind, title in (("gap", "rank gap"), ("labeler", "labeler"), ("use_case", "use case")):
        blocks: list[Block] = []
        for group in groups:
            prefix = f"rm.accuracy_{kind}.{group}."
            asks = [Ask(name, prefix + name) for name in results.names(prefix)]
            table = results.table(asks, [Column(label(s), s) for s in scorers])
            blocks += [Heading(_group(group)), *table] if table else []
        if blocks:
            folds.append(Fold(f"Accuracy by {title}", blocks))
    return folds
