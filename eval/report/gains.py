"""Gain in reward over the distance from the model it began with: best of n, rollouts of training, finished models."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prefopt.evaluation.report.plots import Series, curves_plot
from prefopt.evaluation.report.tables import Figure, number
from prefopt.statistics.intervals import Estimate
from prefopt.statistics.overoptimization import peak

NAMES = {"proxy": "reward model", "gold": "gold reward"}
FAR = 3  # times the distance reached: what a fit says beyond is not told
Points = Sequence[Mapping[str, Any]]
Fit = Mapping[str, Any]  # alpha, beta, peak, falls


def fit_data(fit: tuple[Estimate, Estimate], design: Callable[..., Any]) -> dict[str, Any]:
    """What is kept of a fit: its coefficients, where it is highest, and whether it is sure to fall after that."""
    alpha, beta = fit
    highest = peak(alpha.value, beta.value, design)
    return {"alpha": alpha.value, "beta": beta.value, "peak": highest, "falls": beta.ci_low > 0}


def gain_plot(points: Points, title: str, fit: Fit | None = None, design: Callable[..., Any] | None = None) -> Figure:
    """Proxy and gold gain with their intervals over √KL, and the fit of gold: `design` times its alpha and beta."""
    points = sorted(points, key=lambda p: p["distance"])
    series = [Series(NAMES[key], [_at(p, key) for p in points if p.get(key) is not None]) for key in NAMES]
    if fit is not None:
        line = [points[-1]["distance"] * i / 60 for i in range(61)]
        gold = (design(line) @ [fit["alpha"], fit["beta"]]).tolist()
        series.append(Series("fit of gold", [{"x": x, "y": y} for x, y in zip(line, gold, strict=True)]))
    return curves_plot([s for s in series if s.points], f"{title}, sd", "√KL, √nats", level=0)


def where_it_turns(points: Points, fit: Fit | None, far: str) -> str:
    """How far the data went, and where the fitted gold reward turns."""
    reached = max(p["distance"] for p in points)
    went = f"{far} reached √KL = {number(reached, 1)}; "
    if fit is None:
        return went + "too few points for a fit."
    if fit["peak"] is None or fit["peak"] > FAR * reached:
        return went + "up to there the fitted gold reward does not turn."
    where = "beyond it" if fit["peak"] > reached else "before it"
    sure = "" if fit["falls"] else ", though the interval of β holds 0"
    return went + f"the fitted gold reward is highest {where}, at {number(fit['peak'], 1)}{sure}."


def _at(point: Mapping[str, Any], key: str) -> dict[str, Any]:
    # One label serves both points of a model, which stand above one another.
    name = {"label": point["label"]} if "label" in point and key == "proxy" else {}
    ends = {"y_low": point.get(f"{key}_low"), "y_high": point.get(f"{key}_high")}
    return {"x": point["distance"], "y": point[key], **ends, **name}
