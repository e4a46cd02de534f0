"""Win rates by use case."""

from collections.abc import Mapping
from html import escape
from typing import Any

from prefopt.evaluation.report.markup import Missing, baseline_name, cell, label, model_names, scroll_table
from prefopt.evaluation.results import find


def section(results: Mapping[str, Any]) -> str:
    """HTML of the table: one row per use case, the held-out one among them."""
    measures, baseline = results.get("measures") or [], baseline_name(results)
    names = dict.fromkeys(m["name"] for m in measures if m["name"].startswith("winrate_use_case."))
    others = [m for m in model_names(results) if m != baseline]
    if not names or not others:
        raise Missing("no win rates by use case were measured; the prompts need a column `use_case`")
    rows = []
    for name in names:
        found = [find(measures, name, m, baseline) for m in others]
        count = max((m["n"] for m in found if m), default=0)
        cells = "".join(cell(m, 2, True, model) for m, model in zip(found, others, strict=True))
        rows.append(f"<tr><th>{escape(name.partition('.')[2])} <small>n = {count}</small></th>{cells}</tr>")
    head = "".join(f"<th>{escape(label(m))}</th>" for m in others)
    return scroll_table(f"<tr><th></th>{head}</tr>", "".join(rows))
