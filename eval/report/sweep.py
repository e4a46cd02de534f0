"""One self-contained page about a sweep over ptx_coef and kl_coef: findings, curves and every number."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from prefopt.evaluation.report.gains import fit_data, gain_plot, where_it_turns
from prefopt.evaluation.report.plots import Series, curves_plot
from prefopt.evaluation.report.render import to_html
from prefopt.evaluation.report.tables import (
    Block,
    Figure,
    Gap,
    Heading,
    Items,
    Line,
    Measure,
    Page,
    Section,
    Table,
    measured,
)
from prefopt.evaluation.results import BASELINE, find
from prefopt.evaluation.sweep import CRITERION, REWARD, SHOWN, TAX, Finding, Point, gain, last_third, plain_ppo
from prefopt.inference.jsonl import write_whole
from prefopt.statistics.overoptimization import fit_rl, rl_design

VERDICT = {True: "holds here", False: "does not hold here", None: "cannot be told from these runs"}
Rollouts = Sequence[Mapping[str, float]]

# Of an axis on which more is better.
AXES = {
    REWARD: "gold reward, run − SFT",
    "pretraining_bits_per_byte": "bits per byte, SFT − run",
    "heldout_task_accuracy": "task accuracy, run − SFT",
}


def build_sweep_page(
    path: str | os.PathLike,
    *,
    ptx: Sequence[Point],
    kl: Sequence[Point],
    measures: Sequence[Measure],
    found: Sequence[Finding],
    rollouts: Mapping[str, Rollouts],
    settings: Mapping[str, Any],
) -> None:
    """Write the page.

    Args:
        ptx, kl: the runs of either sweep, in the order of their coefficient; plain PPO is in both.
        measures: of every run, and its paired differences to SFT and plain PPO (`evaluate`).
        found: what `findings` says of them.
        rollouts: a run's label -> its rollouts, from `rollout_gains`.
        settings: what is told at the end of the page.
    """
    verdict: list[str] = []
    evidence: list[Block] = []
    for i, finding in enumerate(found, 1):
        verdict.append(f"{i}. {finding.title}: {VERDICT[finding.holds]}.")
        evidence += [Heading(f"{i}. {finding.title}"), Items([("", text) for text in finding.evidence])]
    ptx_axis, kl_axis = f"ptx_coef (kl_coef {plain_ppo(ptx).kl_coef:g})", "kl_coef (ptx_coef 0)"
    against_ptx = [*_curves(measures, ptx, "ptx_coef", ptx_axis), "As Fig. 33 of InstructGPT; up is better."]
    against_kl = [*_curves(measures, kl, "kl_coef", kl_axis), "As Fig. 34 of InstructGPT; up is better."]
    sections = [
        Section("evidence", "Evidence", evidence),
        Section("ptx", "Reward and alignment tax against ptx_coef", against_ptx),
        Section("kl", "Reward and alignment tax against kl_coef", against_kl),
        Section("frontier", "Reward against alignment tax", _frontier(measures, ptx, kl)),
        Section("rollouts", "Over-optimization along training", _rollouts(rollouts)),
        Section("numbers", "In numbers", _numbers(measures, list(dict.fromkeys([*ptx, *kl])), settings)),
    ]
    write_whole(path, to_html(Page("PPO-ptx: what the coefficients buy", verdict, sections, CRITERION)))


def _curves(measures: Sequence[Measure], points: Sequence[Point], knob: str, axis: str) -> list[Figure]:
    ticks = [f"{getattr(p, knob):g}" for p in points]
    figures = []
    for name, heading in AXES.items():
        drawn = [{"x": x, **_ends(measures, name, p, "y")} for x, p in enumerate(points)]
        figures.append(curves_plot([Series("", drawn)], heading, axis, ticks=ticks, level=0))
    return figures


def _frontier(measures: Sequence[Measure], ptx: Sequence[Point], kl: Sequence[Point]) -> list[Block]:
    figures = []
    for name in TAX:
        series = []
        for knob, points in (("ptx_coef", ptx), ("kl_coef", kl)):
            drawn = [
                {**_ends(measures, name, p, "x"), **_ends(measures, REWARD, p, "y"), "label": f"{getattr(p, knob):g}"}
                for p in points
            ]
            series.append(Series(knob, drawn))
        figures.append(curves_plot(series, AXES[REWARD], AXES[name], level=0))
    note = (
        "Upper right is best: reward without tax. The two lines meet at plain PPO. A number next to a point is its "
        "coefficient."
    )
    return [*figures, note]


def _ends(measures: Sequence[Measure], name: str, point: Point, axis: str) -> dict[str, float]:
    """A run's gain over SFT as the value and interval of a point on one axis; nothing where it was not measured."""
    over = gain(measures, name, point.name, BASELINE)
    return {} if over is None else {axis: over.value, f"{axis}_low": over.low, f"{axis}_high": over.high}


def _rollouts(rollouts: Mapping[str, Rollouts]) -> list[Block]:
    figures, items = [], []
    for run, points in rollouts.items():
        if len(points) < 2:
            continue
        estimates = fit_rl(points)
        fit = None if estimates is None else fit_data(estimates, rl_design)
        figures.append(gain_plot(points, f"{run}: gain", fit, rl_design))
        items.append((f"{run}:", f"{where_it_turns(points, fit, 'the run')} {_last_third(points)}"))
    if not figures:
        return [Gap("Skipped: no run has two rollouts with KL, reward and gold reward in its log.")]
    note = (
        "After Gao et al. 2022 (arXiv:2210.10760): each point is one rollout on training prompts, or the mean over one log "
        "entry; gains over the first rollout in standard deviations of its samples; intervals of 95 % over the episodes "
        "of a rollout; the fit is their form for RL, d (α − β log d), d = √KL."
    )
    return [*figures, Items(items), note]


def _last_third(points: Rollouts) -> str:
    proxy, gold = last_third(points, "proxy"), last_third(points, "gold")
    if proxy is None or gold is None:
        return "Too few rollouts to tell over-optimization."
    is_over = proxy.low > 0 and gold.high < 0
    verdict = "over-optimization" if is_over else "no over-optimization by these intervals"
    return f"From the second to the last third of the run the reward model gives {proxy}, the gold reward {gold}: {verdict}."


def _numbers(measures: Sequence[Measure], points: Sequence[Point], settings: Mapping[str, Any]) -> list[Block]:
    decimals = {name: 2 if name == REWARD else 3 for name in SHOWN}
    rows = []
    for title, name in [("SFT", BASELINE), *((f"{p.ptx_coef:g}, {p.kl_coef:g}", p.name) for p in points)]:
        values = [measured(find(measures, key, name), digits) for key, digits in decimals.items()]
        differences = [
            measured(find(measures, key, name, BASELINE), digits, difference=True) for key, digits in decimals.items()
        ]
        others = [measured(find(measures, key, name), 2) for key in ("rm_score", "kl_to_sft")]
        rows.append(Line(title, [*values, *differences, *others]))
    minus = [f"{shown} − SFT" for shown in SHOWN.values()]
    heads = ["ptx_coef, kl_coef", *SHOWN.values(), *minus, "reward-model score", "KL to SFT"]
    note = (
        "▲ and ▼: the interval of the difference to SFT excludes 0. Bits per byte: less is better. `prefopt explain-run` "
        "on a run's folder tells what moved its weights. "
    )
    return [Table(heads, rows), note + ", ".join(f"{k} = {v}" for k, v in settings.items())]
