"""At a glance: the lights and the forest plot of the win rates."""

from prefopt.evaluation.report.paper import MARK, paper_value
from prefopt.evaluation.report.plots import intervals_plot
from prefopt.evaluation.report.tables import Block, Cell, Gap, Missing, Results, Row, Table, label
from prefopt.evaluation.report.verdict import SIGNS, lights

# Drawn in the forest plot, in this order, as far as measured: (measure, what is added to the model's name).
WIN_RATES = (
    ("winrate", ""),
    ("winrate_length_controlled", ", equal length"),
    ("winrate_greedy", ", greedy"),
    ("winrate_heldout_use_case", ", held-out use case"),
)


def section(results: Results) -> list[Block]:
    if not results.measures:
        raise Missing("nothing was measured; `prefopt eval all` measures what the data allow")
    rows = []
    for question, paper, models in lights(results):
        cells = [Cell(SIGNS[x.state], x.numbers, x.state, x.reason) for x in models.values()]
        rows.append(Row(question, [*cells, Cell(paper or "–", tone="paper")]))
    note = (
        f"Compared with {label(results.baseline)} on the same prompts, documents or tasks. ▲ better and ▼ worse: the 95 % "
        "interval excludes no difference; ● unclear: it does not. Why a number is missing is told where it is pointed at, "
        "and under “Every number”."
    )
    heads = ["", *map(label, results.models), Cell("paper", MARK, "paper")]
    return [Table(heads, rows, "lights"), note, *_forest(results)]


def _forest(results: Results) -> list[Block]:
    rows = []
    for model in results.others:
        for name, suffix in WIN_RATES:
            m = results.find(name, model, results.baseline)
            if m and m["value"] is not None:
                paper = paper_value(name, model)
                rows.append((label(model) + suffix, {"win rate": {**m, "paper": paper and paper[0]}}))
    if not rows:
        return [Gap("Skipped: no win rates were measured; `prefopt eval compare` does.")]
    axis = f"win rate against {label(results.baseline)} (.5 = equal)"
    return [
        intervals_plot(rows, "win rates with their intervals", axis, level=0.5),
        "Win rates with intervals of 95 % over prompts. "
        f"◇ paper, {MARK}: labelers' preference over the 175B SFT model (Fig. 3, held-out labelers).",
    ]
