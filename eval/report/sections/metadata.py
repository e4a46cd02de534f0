"""Stage `metadata` in the report: ratings and flags by people, as in Fig. 4 of the paper."""

from collections.abc import Mapping
from html import escape
from typing import Any

from prefopt.evaluation.report.bars import bars_plot
from prefopt.evaluation.report.markup import Missing, cell, label, model_names, number, scroll_table
from prefopt.evaluation.report.paper import FIG_4, FIG_5, MARK
from prefopt.evaluation.report.sections.stage_tables import figures, note, stage_data
from prefopt.evaluation.results import find

# What Fig. 4 shows: (title, flag, whether its opposite is shown).
FIG4 = (
    ("attempts the correct instruction", "fails_to_follow_instruction", True),
    ("follows the explicit constraint", "satisfies_constraint", False),
    ("hallucinates (closed-domain prompts)", "hallucination", False),
    ("fit for a customer assistant", "inappropriate_for_customer_assistant", True),
)


def section(results: Mapping[str, Any]) -> str:
    """HTML of the section."""
    measures, data = results.get("measures") or [], stage_data(results, "metadata")
    measured = [m for m in measures if m["name"] == "rating" or m["name"].startswith("flag.")]
    if all(m["value"] is None for m in measured):
        why = next((m["reason"] for m in measured if m["reason"]), None)
        raise Missing(why or "nobody labeled completions")
    models = [
        m for m in model_names(results) if any(x["model"] == m and x["value"] is not None for x in measured)
    ]
    panels = []
    for title, flag, opposite in FIG4:
        bars = [(label(m), find(measures, f"flag.{flag}", m)) for m in models]
        bars = [(name, _opposite(m) if opposite else m) for name, m in bars if m is not None]
        if any(m["value"] is not None for _, m in bars):
            panels.append((title, bars))
    html = figures([bars_plot(panels, "shares of completions by label")]) if panels else ""
    head = "".join(f"<th>{escape(label(m))}</th>" for m in models)
    rows = [_row("mean rating, 1 to 7", "rating", 2, measures, models)]
    rows += [_row(words, f"flag.{flag}", 3, measures, models) for flag, words in data["flags"].items()]
    head += f"<th class='paper'>SFT / PPO / PPO-ptx <small>{MARK}</small></th>"
    html += scroll_table(f"<tr><th></th>{head}</tr>", "".join(rows)) + _distribution(data["ratings"], models)
    text = (
        "Shares of labels with Wilson's 95 % interval; a model's mean rating with its interval over prompts."
    )
    if data.get("stale"):
        text += f" {data['stale']} labels of other completions than the generated ones were left out."
    return html + note(text)


def _row(title: str, name: str, decimals: int, measures: list[Mapping[str, Any]], models: list[str]) -> str:
    found = [find(measures, name, m) for m in models]
    count = max((m["n"] for m in found if m), default=0)
    cells = "".join(cell(m, decimals, False, model) for m, model in zip(found, models, strict=True))
    return f"<tr><th>{escape(title)} <small>n = {count}</small></th>{cells}{_paper(name)}</tr>"


# Flag: the bar of the paper's Fig. 4, and whether that is its opposite.
_PAPER = {
    "flag.fails_to_follow_instruction": ("attempts_correct_instruction", True),
    "flag.satisfies_constraint": ("follows_explicit_constraints", False),
    "flag.hallucination": ("hallucination", False),
    "flag.inappropriate_for_customer_assistant": ("appropriate_for_customer_assistant", True),
}


def _paper(name: str) -> str:
    models = ("sft", "ppo", "ppo_ptx")
    if name == "rating":
        values, decimals = [FIG_5.get(m) for m in models], 2
    elif name in _PAPER:
        bar, opposite = _PAPER[name]
        shares = [FIG_4[bar][m][0] for m in models]
        values, decimals = [1 - x if opposite else x for x in shares], 3
    else:
        return "<td class='paper'>–</td>"
    return f"<td class='paper'>{' / '.join(number(value, decimals) for value in values)}</td>"


def _distribution(ratings: Mapping[str, Mapping[str, int]], models: list[str]) -> str:
    given = sorted({int(float(r)) for m in models for r in ratings.get(m, {})})
    if not given:
        return ""
    rows = ""
    for model in models:
        counts = {int(float(r)): n for r, n in ratings.get(model, {}).items()}
        total = sum(counts.values())
        cells = "".join(
            f"<td>{100 * counts.get(r, 0) / total:.0f} %</td>" if total else "<td></td>" for r in given
        )
        rows += f"<tr><th>{escape(label(model))}</th>{cells}</tr>"
    head = "".join(f"<th>{r}</th>" for r in given)
    table = scroll_table(f"<tr><th>rating</th>{head}</tr>", rows)
    return f"<details><summary>How often each rating was given</summary>{table}</details>"


def _opposite(m: Mapping[str, Any]) -> dict[str, Any]:
    def less(x: float | None) -> float | None:
        return None if x is None else 1 - x

    return {**m, "value": less(m["value"]), "ci_low": less(m["ci_high"]), "ci_high": less(m["ci_low"])}
