"""What rounds of `prefopt iterate` show: a curve per judge, when to stop, and which policy is the best one."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prefopt.evaluation.report.plots import Series, curves_plot
from prefopt.evaluation.report.render import to_html
from prefopt.evaluation.report.tables import Block, Cell, Line, Page, Section, Table, number
from prefopt.evaluation.results import BASELINE
from prefopt.inference.jsonl import write_whole
from prefopt.statistics.intervals import Estimate, mean_estimate

Row = Mapping[str, Any]
RULE = (
    "Each round's policy is compared, on the held-out prompts, with the best one before it (that of the highest held-out win "
    "rate over the start). The loop stops when the ranker prefers the new one and the held-out judge the old one, each with "
    "its whole 95 % interval over prompts: the ranker is being exploited."
)


@dataclass(frozen=True)
class Round:
    """Win rates of a round's policy over the start, and over the best policy before it (`against`), by the ranker and by
    the held-out judge; `score` is the mean score that the ranker gave to what the round learned from."""

    number: int
    model: str
    ranker: Estimate
    held_out: Estimate
    against: str
    ranker_against: Estimate
    held_out_against: Estimate
    score: float

    @classmethod
    def of(cls, numbers: Mapping[str, Any]) -> "Round":
        """From `asdict` as JSON has it, where what is no number is null."""

        def value(of: Any) -> Any:
            if isinstance(of, dict):
                return Estimate(**{name: value(one) for name, one in of.items()})
            return math.nan if of is None else of

        return cls(**{name: value(of) for name, of in numbers.items()})

    @property
    def is_exploiting(self) -> bool:
        """`RULE`.

        >>> better, worse = Estimate(0.6, 0.55, 0.65, 100, 100), Estimate(0.4, 0.35, 0.45, 100, 100)
        >>> Round(1, "round_1", better, worse, "sft", better, worse, 0.0).is_exploiting
        True
        >>> Round(1, "round_1", better, worse, "sft", better, better, 0.0).is_exploiting
        False
        """
        return self.ranker_against.ci_low > 0.5 and self.held_out_against.ci_high < 0.5


def best_of(rounds: Sequence[Round]) -> str:
    """The model of the highest held-out win rate over the start; the start itself where none is above one half."""
    values = {BASELINE: 0.5, **{one.model: one.held_out.value for one in rounds}}
    return max(values, key=values.__getitem__)


def ranker_win_rate(
    rankings: Sequence[Row], samples: Mapping[str, Sequence[Row]], model: str, against: str
) -> Estimate:
    """Win rate of a model over another by rankings of what both (and others) answered; the same answer is a tie.

    `samples` has for each model its rows of `id` and `completion`, `rankings` rows of `id`, `completions` and `ranks`; answers
    that were not ranked (empty ones) are in no number.

    >>> samples = {"a": [{"id": 0, "completion": "x"}, {"id": 1, "completion": "x"}],
    ...            "b": [{"id": 0, "completion": "y"}, {"id": 1, "completion": "x"}]}
    >>> ranker_win_rate([{"id": 0, "completions": ["y", "x"], "ranks": [2, 1]}], samples, "a", "b").value
    0.75
    """
    ranks = {row["id"]: dict(zip(map(str, row["completions"]), row["ranks"], strict=True)) for row in rankings}
    others = {row["id"]: row["completion"] for row in samples[against]}
    preferences = []
    for row in samples[model]:
        ours, theirs = row["completion"], others.get(row["id"])
        of_row = ranks.get(row["id"], {})
        if ours == theirs:
            preferences.append(0.5)
        elif ours in of_row and theirs in of_row:
            preferences.append(0.5 * (1 + (of_row[ours] < of_row[theirs]) - (of_row[ours] > of_row[theirs])))
    return mean_estimate(preferences)


def judged_win_rate(pairs: Sequence[Row], judge: str, model: str, against: str) -> Estimate:
    """The same by a judge of an evaluation, from the `pairs` of its stage `compare`.

    >>> pair = {"judge": "gold", "model": "sft", "against": "dpo", "value": 0.25, "ci_low": 0.125, "ci_high": 0.5}
    >>> judged_win_rate([{**pair, "n": 8, "n_clusters": 8}], "gold", "dpo", "sft")
    Estimate(value=0.75, ci_low=0.5, ci_high=0.875, n=8, n_clusters=8)
    """
    pair = next(p for p in pairs if p["judge"] == judge and {p["model"], p["against"]} == {model, against})
    value, low, high = (math.nan if pair[key] is None else pair[key] for key in ("value", "ci_low", "ci_high"))
    if pair["model"] != model:
        value, low, high = 1 - value, 1 - high, 1 - low
    return Estimate(value, low, high, pair["n"], pair["n_clusters"])


def results_of(rounds: Sequence[Round], judge: str, ranker: str) -> dict[str, Any]:
    """The content of iterate.json."""
    return {
        "rounds": [asdict(one) for one in rounds],
        "best": best_of(rounds),
        "stopped": bool(rounds) and rounds[-1].is_exploiting,
        "judge": judge,
        "ranker": ranker,
        "rule": RULE,
    }


def verdict(results: Row) -> list[str]:
    """What came of it, in sentences."""
    rounds = [Round.of(one) for one in results["rounds"]]
    last = rounds[-1]
    lines = [
        f"{len(rounds)} rounds; the best policy by {results['judge']}: {results['best']}. Win rate of the last one over the "
        f"start: {last.held_out} by {results['judge']}, {last.ranker} by the ranker."
    ]
    if results["stopped"]:
        lines.append(
            f"Stopped after round {last.number}: over {last.against} the ranker gives {last.ranker_against}, "
            f"{results['judge']} {last.held_out_against}."
        )
    return lines


def build_iterate_page(path: str | os.PathLike, results: Row, settings: Row) -> None:
    """Write the page: a curve per judge over the rounds, the numbers, and the rule."""
    rounds = [Round.of(one) for one in results["rounds"]]
    start = {"x": 0, "y": 0.5}
    series = [
        Series(name, [start, *({"x": one.number, **_ends(getattr(one, key))} for one in rounds)])
        for name, key in (("ranker", "ranker"), (results["judge"], "held_out"))
    ]
    ticks = ["start", *(str(one.number) for one in rounds)]
    curve = curves_plot(series, "win rate over the start", "round", ticks=ticks, level=0.5)
    heads = [
        "round",
        "score of its samples",
        "over the start, ranker",
        f"over the start, {results['judge']}",
        "against",
    ]
    heads += ["ranker", results["judge"]]
    lines = []
    for one in rounds:
        rates = [_cell(of) for of in (one.ranker, one.held_out)]
        of_best = [_cell(of) for of in (one.ranker_against, one.held_out_against)]
        lines.append(Line(str(one.number), [number(one.score, 3), *rates, one.against, *of_best]))
    told = ", ".join(f"{key} = {value}" for key, value in settings.items())
    blocks: list[Block] = [curve, "Intervals of 95 % over the held-out prompts.", Table(heads, lines)]
    note = f"The ranker is {results['ranker']}. report.html has every number of every policy. {told}"
    sections = [Section("rounds", "Round by round", [*blocks, note]), Section("rule", "When the loop stops", [RULE])]
    write_whole(path, to_html(Page("Sample, rank, learn, again", verdict(results), sections)))


def _ends(of: Estimate) -> dict[str, float]:
    return {"y": of.value, "y_low": of.ci_low, "y_high": of.ci_high}


def _cell(of: Estimate) -> Cell:
    return Cell(number(of.value, 3), f"{number(of.ci_low, 3)} to {number(of.ci_high, 3)}")
