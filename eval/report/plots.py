"""Plots as inline SVG that follows the page: its font, its width, its light or dark colors. No external reference."""

import io
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator, MaxNLocator

from prefopt.evaluation.report.tables import Figure, visible

Points = Sequence[Mapping[str, Any]]

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
    "axes.titlelocation": "left",
    "axes.titlepad": 4,
    "axes.edgecolor": _FAINT,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.5,
    "xtick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.color": _FAINT,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
}
_LEVEL = {"color": _INK, "linewidth": 0.8, "linestyle": "--"}


@dataclass(frozen=True)
class Series:
    """Points with `x`, `y` and, where known, `x_low`, `x_high`, `y_low`, `y_high` and a `label` beside them.

    A series without any interval is a line; `dotted` marks its points and dots the line. No `name`: not in the legend.
    """

    name: str
    points: Points
    color: int | None = None
    dotted: bool = False


def intervals_plot(
    rows: Sequence[tuple[str, Mapping[str, Mapping[str, Any]]]],
    caption: str,
    x_label: str,
    *,
    title: str = "",
    level: float = 0.0,
) -> Figure:
    """Values with their intervals against a line of no difference: per row (label) the measures of several series (name).

    A measure's `paper` (a value or None) is drawn beside it as a hollow diamond. Values are written out where a row has
    one alone.
    """
    names = list(dict.fromkeys(name for _, measures in rows for name in measures))

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for i, name in enumerate(names):
            color = _SERIES[i % len(_SERIES)]
            axes.plot([], [], "osD^v"[i % 5], color=color, markersize=4, label=_text(name))
            for row, (_, measures) in enumerate(rows):
                if name not in measures:
                    continue
                m = measures[name]
                y = row + 0.7 * ((i + 0.5) / len(names) - 0.5)
                ends = [m["value"] if m[end] is None else m[end] for end in ("ci_low", "ci_high")]
                axes.plot(ends, [y, y], color=color, linewidth=1.4)
                axes.plot(m["value"], y, "osD^v"[i % 5], color=color, markersize=4)
                if m.get("paper") is not None:
                    axes.plot(m["paper"], y, "D", color=_SOFT, markersize=6, markerfacecolor="none")
                if len(names) == 1:
                    _write(axes, f"{m['value']:.3f}", (1, y), (4, 0), ("axes fraction", "data"), va="center")
        axes.axvline(level, **_LEVEL)
        axes.set_yticks(range(len(rows)), [_text(label, 30) for label, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, level - 0.05), max(high, level + 0.05))
        axes.set_title(_text(title))
        axes.set_xlabel(_text(x_label))
        axes.grid(axis="y", visible=False)
        if len(names) > 1:
            canvas.legend(loc="outside lower center", ncols=min(len(names), 3))

    return _figure(draw, caption, 0.9 + max(0.25, 0.13 * len(names)) * max(2, len(rows)))


def bars_plot(
    panels: Sequence[tuple[str, Sequence[tuple[str, Mapping[str, Any]]]]], caption: str, *, percent: bool = True
) -> Figure:
    """Bars with intervals in the manner of InstructGPT's Fig. 4: one panel per quantity, one bar per model.

    Args:
        panels: (title, [(model's name, a measure: `value`, `ci_low`, `ci_high`)]); a measure without a value is a gap.
        percent: the values are shares and the axis counts per cent.
    """
    scale = 100 if percent else 1
    lines = -(-len(panels) // 2)

    def draw(canvas: Canvas) -> None:
        every = canvas.subplots(lines, min(2, len(panels)), squeeze=False).flat
        for axes, (title, bars) in zip(every, panels, strict=False):
            for x, (_, m) in enumerate(bars):
                if m["value"] is None:
                    _write(axes, "–", (x, 0), (0, 2), ha="center")
                    continue
                axes.bar(x, scale * m["value"], width=0.7, color=_SERIES[x % len(_SERIES)])
                if m["ci_low"] is not None and m["ci_high"] is not None:
                    axes.plot([x, x], [scale * m["ci_low"], scale * m["ci_high"]], color=_INK, linewidth=1)
            few = len(bars) < 4
            ticks = {"rotation": 0 if few else 30, "ha": "center" if few else "right", "fontsize": 8}
            axes.set_xticks(range(len(bars)), [_text(name, 14) for name, _ in bars], **ticks)
            axes.set_title(textwrap.fill(_text(title), 26))
            axes.axhline(0, color=_INK, linewidth=0.8)
            axes.grid(axis="x", visible=False)
            axes.set_ylabel("%" if percent else "")
        for axes in list(every):
            axes.set_visible(False)

    return _figure(draw, caption, 0.2 + 1.75 * lines)


def curves_plot(
    series: Sequence[Series],
    title: str,
    x_label: str,
    *,
    ticks: Sequence[str] | None = None,
    level: float | None = None,
    logarithmic: bool = False,
    marks: Sequence[tuple[float, str]] = (),
) -> Figure:
    """Curves, or points with their intervals joined per series.

    `ticks` name x = 0, 1, 2 ...; `level` is a horizontal line; `marks` are (x, name) of what is to be seen there.
    """
    known = [[p for p in s.points if _finite(p.get("x")) and _finite(p.get("y"))] for s in series]
    legend = [s.name for s in series if s.name]
    columns = 1 if max(map(len, legend), default=0) > 25 else 2

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for i, (s, points) in enumerate(zip(series, known, strict=True)):
            errors = {f"{axis}err": _reach(points, axis) for axis in "xy"}
            is_plain = all(error is None for error in errors.values())
            axes.errorbar(
                [p["x"] for p in points],
                [p["y"] for p in points],
                **errors,
                color=_SERIES[(i if s.color is None else s.color) % len(_SERIES)],
                label=_text(s.name) or None,
                elinewidth=0.9,
                linewidth=1.6 if is_plain and not s.dotted else 0.9,
                linestyle=":" if s.dotted else "-",
                marker="" if is_plain and not s.dotted else "o",
                markersize=3.5,
            )
            for p in points:
                if p.get("label"):
                    _write(axes, p["label"], (p["x"], p["y"]), (3, 3), fontsize=7)
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter("{x:g}")  # the default is mathematical markup, which _RC turns off
            axes.yaxis.set_minor_formatter("")
        if ticks is not None:
            axes.set_xticks(range(len(ticks)), ticks)
        elif all(float(p["x"]).is_integer() for points in known for p in points):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if level is not None:
            axes.axhline(level, **_LEVEL)
        middle = sum(axes.get_xlim()) / 2
        for i, (x, name) in enumerate(marks):
            axes.axvline(x, **_LEVEL)
            side, sign = ("right", -1) if x > middle else ("left", 1)
            _write(axes, name, (x, 1), (3 * sign, -9 - 10 * i), ("data", "axes fraction"), ha=side)
        axes.set_title(_text(title))
        axes.set_xlabel(_text(x_label))
        if legend:
            canvas.legend(loc="outside lower center", ncols=columns)

    return _figure(draw, f"{title}; {x_label}", 2.3 + 0.17 * -(-len(legend) // columns))


def log_plot(log: Points, keys: Mapping[str, str], title: str, **options: Any) -> Figure:
    """Quantities of one run, key -> name, over its steps; evaluations (`eval_` + key) as dots of their color."""
    series = []
    for i, (key, name) in enumerate(keys.items()):
        for found, called in ((key, name), (f"eval_{key}", f"{name}, evaluation")):
            if drawable(log, found):
                series.append(Series(called, of_log(log, found), color=i, dotted=found != key))
    if len(series) == 1:
        series = [Series("", series[0].points, dotted=series[0].dotted)]
    return curves_plot(series, title, "step", **options)


def shares_plot(log: Points, keys: Mapping[str, str], title: str) -> Figure:
    """Each quantity's share of their sum over the steps that have them all, stacked."""
    entries = [entry for entry in log if all(drawable([entry], key) for key in keys)]

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        points = [of_log(entries, key) for key in keys]
        steps = [p["x"] for p in points[0]]
        columns = np.array([[p["y"] for p in of_key] for of_key in points])
        total = columns.sum(0)
        shares = np.divide(columns, total, out=np.full_like(columns, np.nan), where=total > 0)
        axes.stackplot(steps, shares, colors=_SERIES, alpha=0.55, linewidth=0, labels=keys.values())
        axes.axhline(0.5, **_LEVEL)
        axes.set_ylim(0, 1)
        axes.margins(x=0)
        axes.set_title(_text(title))
        axes.set_xlabel("step")
        canvas.legend(loc="outside lower center", ncols=2)

    return _figure(draw, f"{title}; step", 2.1)


def of_log(log: Points, key: str, most: int = 400) -> list[dict[str, float]]:
    """The entries of a log that have a number under `key` as points over steps; of a long log, means over neighbors."""
    pairs = np.array([(e.get("step", i), e[key]) for i, e in enumerate(log) if _finite(e.get(key))], dtype=float)
    parts = np.array_split(pairs, min(most, len(pairs))) if len(pairs) else []
    return [{"x": float(x), "y": float(y)} for x, y in (part.mean(0) for part in parts)]


def drawable(log: Points, key: str) -> bool:
    """Whether any entry of a log has a number under `key`."""
    return any(_finite(entry.get(key)) for entry in log)


def _finite(x: Any) -> bool:
    return isinstance(x, (int, float)) and bool(np.isfinite(x))


def _reach(points: Points, axis: str) -> np.ndarray | None:
    """How far the intervals reach below and above the points `[2, N]`; None if no point has one."""
    columns = [[p.get(axis + end) for p in points] for end in ("_low", "", "_high")]
    low, value, high = np.array(columns, dtype=float)
    reach = np.stack([value - low, high - value])
    return np.nan_to_num(reach).clip(min=0) if np.isfinite(reach).any() else None


def _write(
    axes: Axes, text: str, at: tuple[float, float], shift: tuple[float, float], coords: Any = "data", **how: Any
):
    options = {"fontsize": 8, "xycoords": coords, "xytext": shift, "textcoords": "offset points", **how}
    axes.annotate(_text(text), at, **options)


def _text(text: str, most: int = 60) -> str:
    """A label that matplotlib can draw: no halves of characters, and no end beyond the plot."""
    text = visible(text)
    return text if len(text) <= most else text[: most - 1] + "…"


def _figure(draw: Callable[[Canvas], None], caption: str, height: float, width: float = 4.2) -> Figure:
    caption = visible(caption)
    with matplotlib.rc_context({**_RC, "svg.hashsalt": caption}):  # ids differ between the plots of one page
        canvas = Canvas(figsize=(width, height), layout="constrained", facecolor="none")
        draw(canvas)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        canvas.savefig(buffer, format="svg", metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Inside HTML the parser knows the namespaces, and a style would apply to the whole page.
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|\sxmlns(:\w+)?=\"[^\"]*\"", "", svg, flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]*"', svg)[0]
    svg = f'<svg role="img" aria-label="{escape(caption)}" {view}>' + svg[svg.index(">") + 1 :]
    svg = svg.replace("'DejaVu Sans'", "system-ui, sans-serif")
    for color, css in _CSS.items():
        svg = svg.replace(color, css)
    return Figure(Markup(svg), caption)
