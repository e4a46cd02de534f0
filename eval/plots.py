"""Plots as inline SVG that follows the page: its font, its width, its light or dark colours. No external reference."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Stand-ins that become CSS values in the SVG, so that one plot serves the light and the dark page.
_INK, _FAINT = "#010203", "#040506"
_SERIES = ["#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05", "#0a0b06"]
_CSS = {_INK: "currentColor", _FAINT: "var(--line)"} | {c: f"var(--series{i})" for i, c in enumerate(_SERIES)}
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
    """Win rates with their intervals, one row each, against the line of no difference at .5."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for y, (_, m) in enumerate(rows):
            low = m["value"] if m["ci_low"] is None else m["ci_low"]
            high = m["value"] if m["ci_high"] is None else m["ci_high"]
            axes.plot([low, high], [y, y], color=_SERIES[0], linewidth=2)
            axes.plot(m["value"], y, "o", color=_SERIES[0], markersize=5)
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
        axes.set_yticks(range(len(rows)), [label for label, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(f"win rate against {baseline} (.5 = equal)")
        axes.grid(axis="y", visible=False)
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, 0.45), max(high, 0.55))

    return _svg(draw, "win rates with their intervals", height=0.55 + 0.3 * max(2, len(rows)))


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


def drawable(log: Sequence[Mapping[str, Any]], key: str) -> bool:
    """Whether any entry of a log has a number under `key`."""
    return bool(np.isfinite(_column(log, key)).any())


def _column(log: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """One number per entry; NaN, which plots as a gap, where an entry has none."""
    return np.array([np.nan if entry.get(key) is None else entry[key] for entry in log], dtype=float)


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
        r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg role="img" aria-label="{label}" \1>', svg, count=1
    )
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would apply to the whole page
    svg = svg.replace("'DejaVu Sans'", "system-ui, sans-serif")
    for colour, css in _CSS.items():
        svg = svg.replace(colour, css)
    return svg


def _ink_texts(every: Sequence[Axes]) -> None:
    for axes in every:
        axes.tick_params(color=_FAINT, labelcolor=_INK)
