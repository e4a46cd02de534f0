"""Bars with intervals in panels, in the manner of InstructGPT's Fig. 4."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from prefopt.evaluation.report.plots import _INK, _SERIES, _shortened, _svg

Bars = Sequence[tuple[str, Mapping[str, Any]]]


def bars_plot(panels: Sequence[tuple[str, Bars]], name: str, *, percent: bool = True) -> str:
    """One panel per quantity, one bar per model, two panels side by side.

    Args:
        panels: (title, [(model's name, a measure: `value`, `ci_low`, `ci_high`)]); a measure without a value is a gap.
        name: of the whole figure, for readers who do not see it.
        percent: the values are shares and the axis counts per cent.
    """

    def draw(figure: Figure) -> None:
        every = figure.subplots(rows, min(2, len(panels)), squeeze=False).flat
        for axes, (title, bars) in zip(every, panels, strict=False):
            for x, (_, m) in enumerate(bars):
                if m["value"] is None:
                    axes.annotate(
                        "–", (x, 0), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=8
                    )
                    continue
                value = scale * m["value"]
                axes.bar(x, value, width=0.7, color=_SERIES[x % len(_SERIES)])
                if m["ci_low"] is not None and m["ci_high"] is not None:
                    axes.plot([x, x], [scale * m["ci_low"], scale * m["ci_high"]], color=_INK, linewidth=1)
            axes.set_xticks(
                range(len(bars)),
                [_shortened(label, 14) for label, _ in bars],
                rotation=0 if len(bars) < 4 else 30,
                ha="center" if len(bars) < 4 else "right",
                fontsize=8,
            )
            axes.set_title(textwrap.fill(title, 26), loc="left", pad=4)
            axes.axhline(0, color=_INK, linewidth=0.8)
            axes.grid(axis="x", visible=False)
            axes.set_axisbelow(True)
            if percent:
                axes.set_ylabel("%")
        for axes in list(every):
            axes.set_visible(False)

    scale = 100 if percent else 1
    rows = -(-len(panels) // 2)
    return _svg(draw, name, height=0.2 + 1.75 * rows)
