"""One self-contained page about a sweep over ptx_coef and kl_coef: findings, curves and every number."""

import os
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from prefopt.evaluation.report import plots
from prefopt.evaluation.report.markup import cell, page, scroll_table
from prefopt.evaluation.results import BASELINE, find
from prefopt.evaluation.sweep import REWARD, SHOWN, TAX, Finding, Point, last_third, plain_ppo
from prefopt.inference.jsonl import write_whole
from prefopt.statistics.intervals import Estimate
from prefopt.statistics.overoptimization import fit_rl, peak, rl_design

VERDICT = {True: "holds here", False: "does not hold here", None: "cannot be told from these runs"}


def build_sweep_page(
    path: str | os.PathLike,
    *,
    ptx: Sequence[Point],
    kl: Sequence[Point],
    measures: Sequence[Mapping[str, Any]],
    found: Sequence[Finding],
    rollouts: Mapping[str, Sequence[Mapping[str, float]]],
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
    base = plain_ppo(ptx)
    sections = [
        _verdict(found),
        _section(
            "Reward and alignment tax against ptx_coef",
            _curves(measures, ptx, [f"{p.ptx_coef:g}" for p in ptx], f"ptx_coef (kl_coef {base.kl_coef:g})")
            + "<p class='note'>As Fig. 33 of InstructGPT; up is better.</p>",
        ),
        _section(
            "Reward and alignment tax against kl_coef",
            _curves(measures, kl, [f"{p.kl_coef:g}" for p in kl], "kl_coef (ptx_coef 0)")
            + "<p class='note'>As Fig. 34 of InstructGPT; up is better.</p>",
        ),
        _section("Reward against alignment tax", _frontier(measures, ptx, kl)),
        _section("Over-optimization along training", _rollouts(rollouts)),
        _section("In numbers", _table(measures, list(dict.fromkeys([*ptx, *kl])), settings)),
    ]
    write_whole(path, page("PPO-ptx: what the coefficients buy", "\n".join(sections)))


def _verdict(found: Sequence[Finding]) -> str:
    said = "".join(
        f"<p><b>{i}. {escape(f.title)}: {VERDICT[f.holds]}.</b></p>" for i, f in enumerate(found, 1)
    )
    reasons = "".join(
        f"<h3>{i}. {escape(f.title)}</h3><ul>{''.join(f'<li>{escape(e)}</li>' for e in f.evidence)}</ul>"
        for i, f in enumerate(found, 1)
    )
    criterion = (
        "<p class='note'>PPO loses by a measure if the 95 % interval of PPO − SFT lies wholly on its worse side. A run "
        "recovers if each of these holds by its whole interval, and does not if one of them fails by its whole interval "
        "(else it is open): by every measure that PPO loses by, it is better than PPO and what is left of the loss is "
        "less than half of PPO's; its gold reward is above SFT's. Nor does it if its gold reward is below PPO's by the "
        "whole interval. Finding 1 holds if some ptx_coef above 0 recovers, finding 2 if no larger kl_coef does. No "
        "correction for the number of coefficients tried.</p><p class='note'>All intervals are of 95 %, of paired differences, "
        "over prompts (gold reward), documents (bits per byte) or tasks. There is one training run per point: they hold "
        "for these runs, and say nothing of how another seed of training would fare.</p>"
    )
    return f"<div class='verdict'>{said}</div>{criterion}{_section('Evidence', reasons)}"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _curves(
    measures: Sequence[Mapping[str, Any]], points: Sequence[Point], ticks: Sequence[str], label: str
) -> str:
    figures = []
    for name, title in SHOWN.items():
        drawn = [
            {"x": x, **_ends(find(measures, name, p.name, BASELINE), "y", name)} for x, p in enumerate(points)
        ]
        figures.append(plots.points_plot([(title, drawn)], _heading(name), label, ticks=ticks, level=0))
    return _figures(figures)


def _frontier(measures: Sequence[Mapping[str, Any]], ptx: Sequence[Point], kl: Sequence[Point]) -> str:
    figures = []
    for name in TAX:
        series = []
        for label, points, knob in (("ptx_coef", ptx, "ptx_coef"), ("kl_coef", kl, "kl_coef")):
            drawn = [
                {
                    **_ends(find(measures, name, p.name, BASELINE), "x", name),
                    **_ends(find(measures, REWARD, p.name, BASELINE), "y", REWARD),
                    "label": f"{getattr(p, knob):g}",
                }
                for p in points
            ]
            series.append((label, drawn))
        figures.append(plots.points_plot(series, _heading(REWARD), _heading(name), level=0))
    return _figures(figures) + (
        "<p class='note'>Upper right is best: reward without tax. The two lines meet at plain PPO. A number beside a "
        "point is its coefficient.</p>"
    )


def _rollouts(rollouts: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    figures, said = [], []
    for run, points in rollouts.items():
        if len(points) < 2:
            continue
        series = [
            (
                label,
                [
                    {"x": p["distance"], "y": p[key], "y_low": p[f"{key}_low"], "y_high": p[f"{key}_high"]}
                    for p in sorted(points, key=lambda p: p["distance"])
                ],
            )
            for key, label in (("proxy", "reward model"), ("gold", "gold reward"))
        ]
        fit = fit_rl(points)
        if fit is not None:
            far = max(p["distance"] for p in points)
            line = [far * i / 60 for i in range(1, 61)]
            gold = rl_design(line) @ [coefficient.value for coefficient in fit]
            series.append(("fit of gold", [{"x": d, "y": y} for d, y in zip(line, gold, strict=True)]))
        figures.append(
            plots.points_plot(series, f"{run}: gain, sd of SFT's samples", "√KL from SFT, √nats", level=0)
        )
        said.append(f"<li>{escape(run)}: {_told(points, fit)}</li>")
    if not figures:
        return "<p class='skipped'>Skipped: no run has two rollouts with KL, reward and gold reward in its log.</p>"
    return (
        f"{_figures(figures)}<ul>{''.join(said)}</ul>"
        "<p class='note'>After Gao et al. 2022 (arXiv:2210.10760): each point is one rollout on training prompts, or the "
        "mean over one log entry; gains over the first rollout in standard deviations of its samples; intervals of 95 % "
        "over the episodes of a rollout; the fit is their form for RL, d (α − β log d), d = √KL.</p>"
    )


def _told(points: Sequence[Mapping[str, float]], fit: tuple[Estimate, Estimate] | None) -> str:
    proxy, gold = last_third(points, "proxy"), last_third(points, "gold")
    if proxy is None or gold is None:
        return "too few rollouts to say."
    over = proxy.low > 0 and gold.high < 0
    told = f"from the second to the last third of the run the reward model gives {proxy}, the gold reward {gold}: "
    told += "over-optimization" if over else "no over-optimization by these intervals"
    highest = None if fit is None else peak(fit[0].value, fit[1].value, rl_design)
    if highest is not None:
        far = max(p["distance"] for p in points)
        told += f"; the fit peaks at √KL = {highest:.1f}, the run reached {far:.1f}"
    return told + "."


def _table(
    measures: Sequence[Mapping[str, Any]], points: Sequence[Point], settings: Mapping[str, Any]
) -> str:
    columns = [(name, label, 2 if name == REWARD else 3) for name, label in SHOWN.items()]
    head = (
        "<tr><th>ptx_coef, kl_coef</th>"
        + "".join(f"<th>{escape(label)}</th>" for _, label, _ in columns)
        + "".join(f"<th class='difference'>{escape(label)} − SFT</th>" for _, label, _ in columns)
        + "<th>reward-model score</th><th>KL to SFT</th></tr>"
    )
    body = []
    for label, name in [("SFT", BASELINE)] + [(f"{p.ptx_coef:g}, {p.kl_coef:g}", p.name) for p in points]:
        cells = [cell(find(measures, key, name), decimals, False, name) for key, _, decimals in columns]
        cells += [
            cell(find(measures, key, name, BASELINE), decimals, True, name) for key, _, decimals in columns
        ]
        cells += [cell(find(measures, key, name), 2, False, name) for key in ("rm_score", "kl_to_sft")]
        body.append(f"<tr><th>{escape(label)}</th>{''.join(cells)}</tr>")
    told = ", ".join(f"{key} = {value}" for key, value in settings.items())
    note = (
        "▲ and ▼: the interval of the difference to SFT excludes 0. Bits per byte: less is better. "
        "`prefopt explain-run` on a run's folder tells what moved its weights."
    )
    return scroll_table(head, "".join(body)) + f"<p class='note'>{escape(note)} {escape(told)}</p>"


def _heading(name: str) -> str:
    """Of an axis on which more is better."""
    return f"{SHOWN[name]}, {'SFT − run' if _reversed(name) else 'run − SFT'}"


def _reversed(name: str) -> bool:
    return name == "pretraining_bits_per_byte"


def _ends(m: Mapping[str, Any] | None, axis: str, name: str) -> dict[str, float | None]:
    """A measure as a point's value and interval on one axis, turned round where less is better."""
    if m is None or m["value"] is None:
        return {axis: None}
    low, high = m["ci_low"], m["ci_high"]
    if not _reversed(name):
        return {axis: m["value"], f"{axis}_low": low, f"{axis}_high": high}
    low, high = (None if end is None else -end for end in (high, low))
    return {axis: -m["value"], f"{axis}_low": low, f"{axis}_high": high}


def _figures(svgs: Sequence[str]) -> str:
    return f"<div class='figures'>{''.join(f'<figure>{svg}</figure>' for svg in svgs)}</div>"
