"""Stage `overopt` in the report: proxy and gold reward against sqrt(KL), with Gao's fits."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from prefopt.evaluation.report import plots
from prefopt.evaluation.report.markup import Missing, label, number
from prefopt.evaluation.report.sections.stage_tables import figures, measure_table, note, stage_data
from prefopt.statistics.overoptimization import best_of_n_design, rl_design

NAMES = {"proxy": "reward model", "gold": "gold reward"}
X = "√KL, √nats"
FAR = 3  # times the distance reached: what a fit says beyond is not told


def section(results: Mapping[str, Any]) -> str:
    """HTML of the section."""
    measures, data = results.get("measures") or [], stage_data(results, "overopt")
    drawn, said = [], []
    if data["best_of_n"]:
        found = data["best_of_n"]
        drawn.append(_curves(found, best_of_n_design, f"best of n of {label(data['baseline'])}: gain"))
        far = f"best of {found['samples']}"
        said.append(f"Best of n: {_told(found, far)}")
    for model, found in data["rollouts"].items():
        if len(found["points"]) > 1:
            drawn.append(_curves(found, rl_design, f"{label(model)}, rollouts of training: gain"))
            said.append(f"{label(model)}: {_told(found, 'the run')}")
    models = _models(data["models"])
    if models:
        drawn.append(models)
    if not drawn:
        reasons = [m["reason"] for m in measures if m["name"].startswith("overopt.") and m["reason"]]
        raise Missing(reasons[0] if reasons else "nothing was measured")
    items = "".join(f"<li>{escape(text)}</li>" for text in said)
    return (
        figures(drawn)
        + (f"<ul>{items}</ul>" if items else "")
        + _coefficients(measures, data)
        + note(
            "Gains over the baseline (over the first rollout) in standard deviations of its samples; intervals of 95 % over "
            "prompts (over the episodes of a rollout). After Gao et al. 2022 (arXiv:2210.10760): d = √KL, under "
            "best of n √(log n − (n − 1)/n); gold gain d (α − β d) under best of n, d (α − β log d) under RL. A reward model's "
            "score that rises while the gold reward falls is over-optimization."
        )
    )


def _curves(found: Mapping[str, Any], design: Any, title: str) -> str:
    points = sorted(found["points"], key=lambda p: p["distance"])
    series = [
        (title, [_point(p, name) for p in points if p.get(name) is not None]) for name, title in NAMES.items()
    ]
    series = [(title, drawn) for title, drawn in series if drawn]
    fit = found["fits"].get("gold")
    if fit is not None:
        line = [points[-1]["distance"] * i / 60 for i in range(61)]
        values = design(line) @ [fit["alpha"], fit["beta"]]
        series.append(("fit of gold", [{"x": d, "y": y} for d, y in zip(line, values.tolist(), strict=True)]))
    return plots.points_plot(series, f"{title}, sd", X, level=0)


def _point(point: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {
        "x": point["distance"],
        "y": point[name],
        "y_low": point.get(f"{name}_low"),
        "y_high": point.get(f"{name}_high"),
    }


def _models(points: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The finished models, gold and proxy gain against their distance; None where no distance is known."""
    known = {m: p for m, p in points.items() if p["distance"] is not None}
    series: list[tuple[str, Sequence[Mapping[str, Any]]]] = []
    for name, title in NAMES.items():
        drawn = sorted(
            (
                # one label serves both points of a model, which stand above one another
                {**_point(p, name), "label": label(m) if name == "proxy" else ""}
                for m, p in known.items()
                if p.get(name) is not None
            ),
            key=lambda p: p["x"],
        )
        if len(drawn) > 1:
            series.append((title, drawn))
    return plots.points_plot(series, "the models: gain, sd", X, level=0) if series else None


def _told(found: Mapping[str, Any], far: str) -> str:
    """Where the fitted gold reward turns, and whether the data went there."""
    fit = found["fits"].get("gold")
    reached = max(p["distance"] for p in found["points"])
    if fit is None:
        return f"{far} reached √KL = {number(reached, 1)}; too few points for a fit."
    if fit["peak"] is None or fit["peak"] > FAR * reached:
        return f"{far} reached √KL = {number(reached, 1)}; up to there the fitted gold reward does not turn."
    sure = "" if fit["falls"] else ", though the interval of β holds 0"
    where = "beyond it" if fit["peak"] > reached else "before it"
    return (
        f"{far} reached √KL = {number(reached, 1)}; the fitted gold reward is highest {where}, at "
        f"{number(fit['peak'], 1)}{sure}."
    )


def _coefficients(measures: Sequence[Mapping[str, Any]], data: Mapping[str, Any]) -> str:
    rows: list[Any] = []
    for kind, title in (("best_of_n", "Best of n, d (α − β d)"), ("rl", "RL, d (α − β log d)")):
        rows.append(title)
        for name, what in NAMES.items():
            for coefficient, sign in (("alpha", "α"), ("beta", "β")):
                rows.append((f"{sign}, {what}", f"overopt.{kind}_fit.{name}.{coefficient}", 3, None))
    models = [data["baseline"], *(m for m in data["rollouts"] if m != data["baseline"])]
    table = measure_table(measures, rows, [(label(m), m, "") for m in models])
    return f"<details><summary>Coefficients of the fits</summary>{table}</details>" if table else ""
