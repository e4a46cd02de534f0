"""Stage `compare` in the report: the win rates of every judge, use case and labeler, and the strengths of all models."""

from collections.abc import Mapping
from typing import Any

from prefopt.evaluation.report.plots import bars_plot
from prefopt.evaluation.report.tables import (
    Ask,
    Block,
    Cell,
    Column,
    Heading,
    Missing,
    Results,
    Row,
    Table,
    label,
    measured,
    number,
)

JUDGES = {"gold": "gold reward", "human": "people", "lm": "language model", "reward": "reward model"}


def section(results: Results) -> list[Block]:
    data = results.stage("compare")
    main, baseline = data["main_judge"], results.baseline
    if main is None:
        raise results.missing("winrate", "nobody judged the completions")
    judges, labelers = (results.names(f"winrate_{of}.") for of in ("judge", "labelers"))
    asks = [
        f"Judge: {JUDGES.get(main, main)}",
        Ask("samples", "winrate", 3, baseline),
        Ask("at equal length", "winrate_length_controlled", 3, baseline),
        Ask("greedy", "winrate_greedy", 3, baseline),
        Ask("held-out use case", "winrate_heldout_use_case", 3, baseline),
        "Other judges",
        *(Ask(JUDGES.get(j, j), f"winrate_judge.{j}", 3, baseline) for j in judges),
        "Labelers",
        *(Ask(group, f"winrate_labelers.{group}", 3, baseline) for group in sorted(labelers)),
    ]
    trust = [
        Ask("same verdict in both orders", "judge_consistency"),
        Ask("verdicts for the first answer (.5: fair)", "judge_prefers_first"),
    ]
    trusted = results.table(trust, [Column(JUDGES["lm"], "lm")])
    note = f"Win rates against {label(baseline)}: .5 is equal, a tie counts half. Intervals of 95 % over prompts."
    return [
        *results.table(asks, [Column(label(m), m) for m in results.others]),
        note,
        *_strengths(results, data),
        *([Heading("How far to trust the language model")] if trusted else []),
        *trusted,
    ]


def use_cases(results: Results) -> list[Block]:
    """Win rates by use case, the held-out one among them."""
    prefix = "winrate_use_case."
    asks = [Ask(name, prefix + name, 2, results.baseline, count=True) for name in results.names(prefix)]
    table = results.table(asks, [Column(label(m), m) for m in results.others])
    if not table:
        raise Missing("no win rates by use case were measured; the prompts need a column `use_case`")
    return table


def _strengths(results: Results, data: Mapping[str, Any]) -> list[Block]:
    strengths = {m: results.find("bradley_terry", m) for m in results.models}
    strengths = {m: x for m, x in strengths.items() if x and x["value"] is not None}
    if not strengths:
        return []
    bars = [(label(m), x) for m, x in strengths.items()]
    models = sorted(strengths, key=lambda m: -strengths[m]["value"])
    wins: dict[tuple[str, str], float] = {}
    for pair in data["pairs"]:
        if pair["judge"] == data["main_judge"]:
            wins[pair["model"], pair["against"]] = pair["value"]
            wins.setdefault((pair["against"], pair["model"]), 1 - pair["value"])

    def over(model: str, other: str) -> Cell:
        if other == model:
            return Cell("–", tone="none")
        expected = data["matrix"].get(model, {}).get(other)
        return Cell(number(wins.get((model, other)), 2), f"model: {number(expected, 2)}")

    rows = [Row(label(m), [measured(strengths[m], 2), *(over(m, other) for other in models)]) for m in models]
    note = (
        "Bradley-Terry strengths in log-odds from all pairs of models, the baseline's being 0; then how often the row "
        "was preferred over the column, and what the strengths say of it. Where the two differ, one number per model "
        "does not tell the whole."
    )
    return [
        Heading("Strength of all models"),
        bars_plot([("strength (log-odds)", bars)], "strengths", percent=False),
        Table(["", "strength", *(f"over {label(m)}" for m in models)], rows),
        note,
    ]
