"""Stage `metadata` in the report: ratings and flags by people, as in Fig. 4 of the paper."""

from collections.abc import Mapping
from typing import Any

from prefopt.evaluation.report.paper import FIG_4, FIG_5, MARK
from prefopt.evaluation.report.plots import bars_plot
from prefopt.evaluation.report.tables import Ask, Block, Cell, Column, Fold, Results, Row, Table, label, number

# What Fig. 4 shows: flag -> title, the paper's bar, and whether both are the opposite of the flag.
FIG4 = {
    "fails_to_follow_instruction": ("attempts the correct instruction", "attempts_correct_instruction", True),
    "satisfies_constraint": ("follows the explicit constraint", "follows_explicit_constraints", False),
    "hallucination": ("hallucinates (closed-domain prompts)", "hallucination", False),
    "inappropriate_for_customer_assistant": (
        "fit for a customer assistant",
        "appropriate_for_customer_assistant",
        True,
    ),
}


def section(results: Results) -> list[Block]:
    data = results.stage("metadata")
    of_labels = ("rating", "flag.")
    known = {m["model"] for m in results.measures if m["name"].startswith(of_labels) and m["value"] is not None}
    if not known:
        raise results.missing(of_labels, "nobody labeled completions")
    models = [m for m in results.models if m in known]
    panels = []
    for flag, (title, _, is_opposite) in FIG4.items():
        bars = [(label(m), results.find(f"flag.{flag}", m)) for m in models]
        bars = [(name, _opposite(m) if is_opposite else m) for name, m in bars if m is not None]
        if any(m["value"] is not None for _, m in bars):
            panels.append((title, bars))
    asks = [Ask("mean rating, 1 to 7", "rating", 2, count=True, paper=_paper("rating"))]
    asks += [Ask(words, f"flag.{flag}", count=True, paper=_paper(flag)) for flag, words in data["flags"].items()]
    note = "Shares of labels with Wilson's 95 % interval; a model's mean rating with its interval over prompts."
    if data.get("stale"):
        note += f" {data['stale']} labels of other completions than the generated ones were left out."
    return [
        *([bars_plot(panels, "shares of completions by label")] if panels else []),
        *results.table(asks, [Column(label(m), m) for m in models], Cell("SFT / PPO / PPO-ptx", MARK, "paper")),
        *_distribution(data["ratings"], models),
        note,
    ]


def _paper(name: str) -> str:
    models = ("sft", "ppo", "ppo_ptx")
    if name == "rating":
        return " / ".join(number(FIG_5.get(m), 2) for m in models)
    if name not in FIG4:
        return "–"
    _, bar, is_opposite = FIG4[name]
    shares = [FIG_4[bar][m][0] for m in models]
    return " / ".join(number(1 - share if is_opposite else share, 3) for share in shares)


def _distribution(ratings: Mapping[str, Mapping[str, int]], models: list[str]) -> list[Block]:
    counts = {m: {int(float(r)): n for r, n in ratings.get(m, {}).items()} for m in models}
    given = sorted({rating for of_model in counts.values() for rating in of_model})
    if not given:
        return []
    rows = []
    for model, of_model in counts.items():
        total = sum(of_model.values())
        rows.append(Row(label(model), [f"{100 * of_model.get(r, 0) / total:.0f} %" if total else "" for r in given]))
    return [Fold("How often each rating was given", [Table(["rating", *map(str, given)], rows)])]


def _opposite(m: Mapping[str, Any]) -> dict[str, Any]:
    """The share of those without a flag, from the share of those with it."""
    ends = (("value", "value"), ("ci_low", "ci_high"), ("ci_high", "ci_low"))
    return {**m, **{to: None if m[end] is None else 1 - m[end] for to, end in ends}}
