"""Plots as inline SVG that follows the page: its font, its width, its light or dark colors. No external reference."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

# Stand-ins that become CSS values in the SVG, so that one plot serves the light and the dark page.
_INK, _FAINT, _SOFT = "#010203", "#040506", "#070809"
_SERIES = ["#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05", "#0a0b06"]
_CSS = {_INK: "currentColor", _FAINT: "var(--line)", _SOFT: "var(--soft)"} | {
    c: f"var(--series{i})" for i, c in enumerate(_SERIES)
}
_RC = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.titlesize": 9,
    "axes.edgecolor": _FAINT,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.5,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
}


def forest_plot(rows: Sequence[tuple[str, Mapping[str, Any]]], baseline: str) -> str:
    """Win rates with their intervals, one row each, against the line of no difference at .5.

    A row's `paper` (a value or None) is drawn beside it as a hollow diamond.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for y, (_, m) in enumerate(rows):
            low = m["value"] if m["ci_low"] is None else m["ci_low"]
            high = m["value"] if m["ci_high"] is None else m["ci_high"]
            axes.plot([low, high], [y, y], color=_SERIES[0], linewidth=2)
            axes.plot(m["value"], y, "o", color=_SERIES[0], markersize=5)
            if m.get("paper") is not None:
                axes.plot(m["paper"], y, "D", color=_SOFT, markersize=6, markerfacecolor="none")
            axes.annotate(
                f"{m['value']:.3f}",
                (1, y),
                xycoords=("axes fraction", "data"),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axes.axvline(0.5, color=_INK, linewidth=0.8, linestyle="--")
        axes.set_yticks(range(len(rows)), [_shortened(label, 30) for label, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(f"win rate against {baseline} (.5 = equal)")
        axes.grid(axis="y", visible=False)
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, 0.45), max(high, 0.55))

    return _svg(draw, "win rates with their intervals", height=0.55 + 0.25 * max(2, len(rows)))


def differences_plot(
    rows: Sequence[tuple[str, Mapping[str, Mapping[str, Any]]]], title: str, x_label: str
) -> str:
    """Differences with their intervals against the line of none: per row (label) the measures of several series (name)."""
    names = list(dict.fromkeys(name for _, measures in rows for name in measures))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, name in enumerate(names):
            color = _SERIES[i % len(_SERIES)]
            label = name
            for row, (_, measures) in enumerate(rows):
                if name not in measures:
                    continue
                m = measures[name]
                y = row + 0.7 * ((i + 0.5) / len(names) - 0.5)
                low = m["value"] if m["ci_low"] is None else m["ci_low"]
                high = m["value"] if m["ci_high"] is None else m["ci_high"]
                axes.plot([low, high], [y, y], color=color, linewidth=1.4)
                axes.plot(m["value"], y, "osD^v"[i % 5], color=color, markersize=4, label=label)
                label = None
        axes.axvline(0, color=_INK, linewidth=0.8, linestyle="--")
        axes.set_yticks(range(len(rows)), [_shortened(label, 24) for label, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_title(title, loc="left", pad=4)
        axes.set_xlabel(x_label)
        axes.grid(axis="y", visible=False)
        figure.legend(loc="outside lower center", ncols=min(len(names), 3))

    height = 0.9 + max(0.25, 0.13 * len(names)) * len(rows)
    return _svg(draw, title, height=height)


def epochs_plot(epochs: Sequence[Mapping[str, Any]], chosen: int | None = None) -> str:
    """Validation loss against reward-model score by SFT epoch: the loss overfits while the score still rises."""

    def draw(figure: Figure) -> None:
        x = [entry["epoch"] for entry in epochs]
        every = figure.subplots(len(parts), sharex=True, squeeze=False)[:, 0]
        for i, (axes, (key, label)) in enumerate(zip(every, parts, strict=True)):
            axes.plot(x, _column(epochs, key), color=_SERIES[i], marker="o", markersize=3)
            axes.set_title(label, loc="left", pad=3)
            if chosen is not None:
                axes.axvline(chosen, color=_INK, linewidth=0.9, linestyle="--")
        if chosen is not None:
            every[0].annotate(
                f"chosen: epoch {chosen}",
                (chosen, 1),
                xycoords=("data", "axes fraction"),
                xytext=(-3, -9),
                textcoords="offset points",
                ha="right" if chosen > sum(x) / len(x) else "left",
                fontsize=8,
            )
        every[-1].set_xlabel("SFT epoch")
        every[-1].xaxis.get_major_locator().set_params(integer=True)

    parts = [(key, label) for key, label in _EPOCH_SERIES if drawable(epochs, key)]
    return _svg(draw, "validation loss and reward-model score by SFT epoch", height=0.4 + 1.15 * len(parts))


_EPOCH_SERIES = (
    ("validation_loss", "validation loss"),
    ("rm_score", "reward-model score on validation prompts"),
    ("gold", "gold reward on validation prompts"),
)


def training_plot(runs: Mapping[str, Sequence[Mapping[str, Any]]], key: str, title: str) -> str:
    """One logged quantity over the steps of every RL run that has it."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, (model, log) in enumerate(runs.items()):
            if drawable(log, key):
                steps = [entry["step"] for entry in log]
                axes.plot(steps, _column(log, key), color=_SERIES[i % len(_SERIES)], label=model)
        axes.set_title(title, loc="left", pad=4)
        axes.set_xlabel("step")
        axes.legend(loc="best")

    return _svg(draw, f"{key} over training steps", height=1.9)


def log_plot(
    log: Sequence[Mapping[str, Any]],
    series: Sequence[tuple[str, str]],
    title: str,
    *,
    level: float | None = None,
    logarithmic: bool = False,
    marks: Sequence[tuple[int, str]] = (),
) -> str:
    """Quantities of one run, (key, label) each, over its steps; evaluations (`eval_` + key) as dots of their color.

    `level` is a horizontal line; `marks` are (step, name) of what is to be seen there.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, (key, label) in enumerate(series):
            color = _SERIES[i % len(_SERIES)]
            if drawable(log, key):
                axes.plot(*_points(log, key), color=color, label=label)
            if drawable(log, f"eval_{key}"):
                axes.plot(
                    *_points(log, f"eval_{key}"),
                    color=color,
                    marker="o",
                    markersize=3.5,
                    linestyle=":",
                    linewidth=1,
                    label=f"{label}, evaluation",
                )
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter("{x:g}")  # the default is mathematical markup, which _RC turns off
            axes.yaxis.set_minor_formatter("")
        if level is not None:
            axes.axhline(level, color=_INK, linewidth=0.8, linestyle="--")
        _mark(axes, marks)
        axes.set_title(title, loc="left", pad=4)
        axes.set_xlabel("step")
        if drawn > 1:
            handles, labels = axes.get_legend_handles_labels()
            labels = [_shortened(label) for label in labels]
            figure.legend(handles, labels, loc="outside lower center", ncols=columns)

    drawn = sum(drawable(log, f"{prefix}{key}") for key, _ in series for prefix in ("", "eval_"))
    columns = 1 if max(len(label) for _, label in series) > 25 else 2
    rows = -(-drawn // columns) if drawn > 1 else 0
    return _svg(draw, f"{title} over training steps", height=1.9 + 0.17 * rows)


def shares_plot(log: Sequence[Mapping[str, Any]], series: Sequence[tuple[str, str]], title: str) -> str:
    """Each quantity's share of their sum over the steps that have them all, stacked."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        entries = [entry for entry in log if all(drawable([entry], key) for key, _ in series)]
        columns = np.array([_points(entries, key)[1] for key, _ in series])
        total = columns.sum(0)
        shares = np.divide(columns, total, out=np.full_like(columns, np.nan), where=total > 0)
        steps = _points(entries, series[0][0])[0]
        bottom = np.zeros(len(steps))
        for i, ((_, label), share) in enumerate(zip(series, shares, strict=True)):
            top = bottom + share
            axes.fill_between(steps, bottom, top, color=_SERIES[i], alpha=0.55, linewidth=0, label=label)
            bottom = top
        axes.axhline(0.5, color=_INK, linewidth=0.8, linestyle="--")
        axes.set_ylim(0, 1)
        axes.margins(x=0)
        axes.set_title(title, loc="left", pad=4)
        axes.set_xlabel("step")
        figure.legend(loc="outside lower center", ncols=2)

    return _svg(draw, f"{title} over training steps", height=2.1)


def points_plot(
    series: Sequence[tuple[str, Sequence[Mapping[str, Any]]]],
    title: str,
    x_label: str,
    *,
    ticks: Sequence[str] | None = None,
    level: float | None = None,
) -> str:
    """Points with their intervals, joined per series: `x`, `y` and, where known, `x_low`, `x_high`, `y_low`, `y_high`.

    A series without any interval is drawn as a line alone. `ticks` name x = 0, 1, 2 ...; a point's `label` is written
    beside it; `level` is a horizontal line.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, (name, points) in enumerate(series):
            drawn = [p for p in points if p["x"] is not None and p["y"] is not None]
            x, y = _column(drawn, "x"), _column(drawn, "y")
            errors = {f"{axis}err": _reach(drawn, axis) for axis in "xy"}
            plain = all(error is None for error in errors.values())
            color = _SERIES[i % len(_SERIES)]
            axes.errorbar(
                x,
                y,
                **errors,
                color=color,
                label=name,
                elinewidth=0.9,
                linewidth=1.6 if plain else 0.9,
                marker="" if plain else "o",
                markersize=3.5,
            )
            for p in drawn:
                axes.annotate(
                    p.get("label", ""),
                    (p["x"], p["y"]),
                    xytext=(3, 3),
                    textcoords="offset points",
                    fontsize=7,
                )
        if ticks is not None:
            axes.set_xticks(range(len(ticks)), ticks)
        if level is not None:
            axes.axhline(level, color=_INK, linewidth=0.8, linestyle="--")
        axes.set_title(title, loc="left", pad=4)
        axes.set_xlabel(x_label)
        if len(series) > 1:
            figure.legend(loc="outside lower center", ncols=2)

    return _svg(
        draw, f"{title}; {x_label}", height=2.3 + (0.17 * -(-len(series) // 2) if len(series) > 1 else 0)
    )


def _reach(points: Sequence[Mapping[str, Any]], axis: str) -> np.ndarray | None:
    """How far the intervals reach below and above the points `[2, N]`; None if no point has one."""
    low, value, high = (_column(points, axis + end) for end in ("_low", "", "_high"))
    reach = np.stack([value - low, high - value])
    return np.nan_to_num(reach).clip(min=0) if np.isfinite(reach).any() else None


def _points(log: Sequence[Mapping[str, Any]], key: str, most: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Steps and numbers of the entries that have one; of a long log, means over neighbors."""
    column = _column(log, key)
    steps = np.array([entry.get("step", i) for i, entry in enumerate(log)], dtype=float)
    points = np.stack([steps, column])[:, np.isfinite(column)]
    parts = min(most, points.shape[1])
    return tuple(np.array([part.mean(1) for part in np.array_split(points, parts, axis=1)]).T)


def _shortened(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _mark(axes: Axes, marks: Sequence[tuple[int, str]]) -> None:
    low, high = axes.get_xlim()
    for i, (step, name) in enumerate(marks):
        axes.axvline(step, color=_INK, linewidth=0.9, linestyle="--")
        axes.annotate(
            name,
            (step, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-3 if step > (low + high) / 2 else 3, -9 - 10 * i),
            textcoords="offset points",
            ha="right" if step > (low + high) / 2 else "left",
            fontsize=8,
        )


def drawable(log: Sequence[Mapping[str, Any]], key: str) -> bool:
    """Whether any entry of a log has a number under `key`."""
    return bool(np.isfinite(_column(log, key)).any())


def _column(log: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """One number per entry; NaN, which plots as a gap, where an entry has none."""
    values = (entry.get(key) for entry in log)
    return np.array([v if isinstance(v, (int, float)) else np.nan for v in values], dtype=float)


def _svg(draw: Callable[[Figure], None], label: str, height: float, width: float = 4.2) -> str:
    with matplotlib.rc_context({**_RC, "svg.hashsalt": label}):  # ids differ between the plots of one page
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
        draw(figure)
        _ink_texts(figure.axes)
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)  # inside HTML the parser knows the namespaces
    svg = re.sub(
        r'<svg[^>]*?(viewBox="[^"]*")[^>]*>',
        lambda found: f'<svg role="img" aria-label="{escape(label, quote=True)}" {found[1]}>',
        svg,
        count=1,
    )
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would apply to the whole page
    svg = svg.replace("'DejaVu Sans'", "system-ui, sans-serif")
    for color, css in _CSS.items():
        svg = svg.replace(color, css)
    return svg


def _ink_texts(every: Sequence[Axes]) -> None:
    for axes in every:
        axes.tick_params(color=_FAINT, labelcolor=_INK)
