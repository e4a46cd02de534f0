"""Every number with its definition, interval, count and status; what is missing; what the run took."""

from collections.abc import Mapping
from html import escape
from typing import Any

from prefopt.evaluation.report.markup import Missing, interval, label, number, scroll_table, seconds
from prefopt.evaluation.results import families


def section(results: Mapping[str, Any]) -> str:
    """HTML of all measures, those of one definition together."""
    measures = results.get("measures") or []
    if not measures:
        raise Missing("nothing was measured")
    rows = "".join(
        f"<tr class='group'><th colspan='6'><span>{escape(definition)} <small>{escape(source)}</small></span></th></tr>"
        + "".join(_row(m) for m in members)
        for (definition, source), members in families(measures).items()
    )
    head = (
        "<tr><th>name</th><th>model</th><th>value</th><th>95 % interval</th>"
        "<th>n <small>prompts</small></th><th>status</th></tr>"
    )
    settings = ", ".join(f"{k} = {v}" for k, v in (results.get("settings") or {}).items())
    return (
        f"<p class='note'>{escape(settings)}</p>{_missing(measures)}"
        f"<details class='every'><summary>All {len(measures)} numbers with their definitions</summary>"
        f"{scroll_table(head, rows)}</details>"
    )


def _row(m: Mapping[str, Any]) -> str:
    counts = f"{m['n']:,}" + (f"<small>{m['n_clusters']:,}</small>" if m["n_clusters"] != m["n"] else "")
    against = f" − {label(m['against'])}" if m["against"] and not m["name"].startswith("winrate") else ""
    reason = f"<small>{escape(m['reason'])}</small>" if m["reason"] else ""
    return (
        f"<tr><th>{escape(m['name'])}</th><td>{escape(label(m['model']) + against)}</td>"
        f"<td>{number(m['value'], 4)}</td><td>{interval(m, 4)}</td><td>{counts}</td>"
        f"<td class='why'>{escape(m['status'])}{reason}</td></tr>"
    )


def _missing(measures: list[Mapping[str, Any]]) -> str:
    """Why numbers are missing, one line per reason."""
    why: dict[str, list[str]] = {}
    for m in measures:
        if m["status"] != "ok":
            why.setdefault(f"{m['status']}: {m['reason']}", []).append(f"{m['name']} ({label(m['model'])})")
    if not why:
        return ""
    items = "".join(
        f"<li>{escape(reason)} — {escape(', '.join(dict.fromkeys(names)))}</li>"
        for reason, names in why.items()
    )
    return f"<details class='missing'><summary>Missing numbers and why</summary><ul>{items}</ul></details>"


def time_section(results: Mapping[str, Any]) -> str:
    """HTML of the seconds of every step."""
    steps = {k: v for k, v in (results.get("wall_seconds") or {}).items() if v is not None}
    if not steps:
        raise Missing("no wall times were given")
    longest = max([*steps.values(), 1e-9])
    rows = "".join(
        f"<tr><th>{escape(step)}</th><td>{seconds(s)}</td>"
        f"<td class='bar'><span style='width:{100 * max(s, 0) / longest:.1f}%'></span></td></tr>"
        for step, s in steps.items()
    )
    rows += f"<tr class='total'><th>sum</th><td>{seconds(sum(steps.values()))}</td><td></td></tr>"
    return f"<div class='scroll'><table class='time'><tbody>{rows}</tbody></table></div>"
