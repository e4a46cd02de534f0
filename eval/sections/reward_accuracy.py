"""The reward model's accuracy against its ceiling."""

from collections.abc import Mapping
from typing import Any

from prefopt.evaluation.markup import Missing, cell, number, scroll_table
from prefopt.evaluation.paper import MARK, paper_value
from prefopt.evaluation.results import find

_GROUPS = (("train_labelers", "training labelers"), ("heldout_labelers", "held-out labelers"))


def section(results: Mapping[str, Any]) -> str:
    """HTML of the table, with the paper's values."""
    measures = results.get("measures") or []
    rows = []
    for group, title in _GROUPS:
        accuracy = find(measures, f"rm.accuracy.{group}", "reward_model")
        ceiling = find(measures, f"rm.gold_accuracy.{group}", "gold")
        if accuracy or ceiling:
            ratio = "–"
            if accuracy and ceiling and accuracy["value"] is not None and ceiling["value"]:
                ratio = number(accuracy["value"] / ceiling["value"], 2)
            value, half, _ = paper_value(f"rm.accuracy.{group}", "reward_model")
            rows.append(
                f"<tr><th>{title} <small>{(accuracy or ceiling)['n']} pairs</small></th>{cell(accuracy, 3, False, '')}"
                f"{cell(ceiling, 3, False, '')}<td>{ratio}</td><td class='paper'>{value}<small>± {half}</small></td></tr>"
            )
    if not rows:
        raise Missing("no reward model was evaluated")
    head = (
        "<tr><th>pairs ranked by</th><th>reward model</th><th>gold ceiling</th><th>ratio</th>"
        f"<th class='paper'>paper <small>{MARK}</small></th></tr>"
    )
    return scroll_table(head, "".join(rows)) + (
        "<p class='note'>Share of strictly ranked pairs put in the labelers' order. The gold ceiling is what the gold "
        f"reward itself reaches on the same pairs: labelers are noisy. <span class='paper'>Paper: {MARK}; "
        "there the accuracy on held-out labelers is .90 of how often those labelers agree with each other.</span></p>"
    )
