"""Every number with its definition, interval, count and status; what is missing; what the run took; and the samples."""

from collections.abc import Sequence

from prefopt.evaluation.report.tables import (
    Block,
    Cell,
    Fold,
    Items,
    Measure,
    Missing,
    Results,
    Row,
    Samples,
    Table,
    interval,
    label,
    number,
)
from prefopt.evaluation.results import families


def section(results: Results) -> list[Block]:
    """All measures, those of one definition together."""
    measures = results.measures
    if not measures:
        raise Missing("nothing was measured")
    rows = []
    for (definition, source), members in families(measures).items():
        rows += [Row(Cell(definition, source), kind="group"), *map(_row, members)]
    heads = ["name", "model", "value", "95 % interval", Cell("n", "prompts"), "status"]
    settings = ", ".join(f"{k} = {v}" for k, v in results.settings.items())
    title = f"All {len(measures)} numbers with their definitions"
    return [settings, *_missing(measures), Fold(title, [Table(heads, rows, "every")])]


def _row(m: Measure) -> Row:
    against = f" − {label(m['against'])}" if m["against"] and not m["name"].startswith("winrate") else ""
    count = Cell(f"{m['n']:,}", f"{m['n_clusters']:,}" if m["n_clusters"] != m["n"] else "")
    status = Cell(m["status"], m["reason"] or "", "words")
    return Row(m["name"], [label(m["model"]) + against, number(m["value"], 4), interval(m, 4) or "–", count, status])


def _missing(measures: Sequence[Measure]) -> list[Fold]:
    """Why numbers are missing, one line per reason."""
    why: dict[str, dict[str, None]] = {}
    for m in measures:
        if m["status"] != "ok":
            name = f"{m['name']} ({label(m['model'])})"
            why.setdefault(f"{m['status']}: {m['reason']}", {})[name] = None
    items = [("", f"{reason} — {', '.join(names)}") for reason, names in why.items()]
    return [Fold("Missing numbers and why", [Items(items)])] if items else []


def time(results: Results) -> list[Block]:
    """The seconds of every step."""
    steps = {k: v for k, v in (results.content.get("wall_seconds") or {}).items() if v is not None}
    if not steps:
        raise Missing("no wall times were given")
    longest = max([*steps.values(), 1e-9])
    rows = [Row(step, [_seconds(s), Cell("", share=max(s, 0) / longest)]) for step, s in steps.items()]
    return [Table(["step", "time", ""], [*rows, Row("sum", [_seconds(sum(steps.values())), ""], "total")], "time")]


def samples(results: Results) -> list[Block]:
    """Samples side by side: the worst first."""
    if not results.content.get("samples"):
        raise Missing("no samples were given; `prefopt eval generate` draws them")
    return ["One sample each at temperature 1, on the same prompts.", Samples(results.content["samples"])]


def _seconds(s: float) -> str:
    return f"{s:.1f} s" if s < 120 else f"{s / 60:.1f} min"
