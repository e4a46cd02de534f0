"""What a sweep over ptx_coef and kl_coef shows: the two findings of InstructGPT's Figs 33 and 34, by intervals alone, and
a page of findings, curves and every number."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefopt.evaluation.report.plots import Series, curves_plot
from prefopt.evaluation.report.render import to_html
from prefopt.evaluation.report.tables import Block, Figure, Gap, Heading, Items, Line, Page, Section, Table, measured
from prefopt.evaluation.results import BASELINE, find
from prefopt.evaluation.stages.overoptimization import fit_data, gain_plot, where_it_turns
from prefopt.evaluation.training_run import thirds
from prefopt.inference.jsonl import write_whole
from prefopt.statistics.intervals import Z
from prefopt.statistics.overoptimization import fit_rl, rl_design

REWARD = "gold_reward"
TAX = {"pretraining_bits_per_byte": "bits per byte", "heldout_task_accuracy": "task accuracy"}
SHOWN = {REWARD: "gold reward", **TAX}
Measures = Sequence[Mapping[str, Any]]
Rollouts = Sequence[Mapping[str, float]]
VERDICT = {True: "holds here", False: "does not hold here", None: "cannot be told from these runs"}
# Of an axis on which more is better.
AXES = {
    REWARD: "gold reward, run − SFT",
    "pretraining_bits_per_byte": "bits per byte, SFT − run",
    "heldout_task_accuracy": "task accuracy, run − SFT",
}
CRITERION = (
    "PPO loses by a measure if the 95 % interval of PPO − SFT lies wholly on its worse side. A run recovers if each of "
    "these holds by its whole interval, and does not if one of them fails by its whole interval (else it is open): by "
    "every measure that PPO loses by, it is better than PPO and what is left of the loss is less than half of PPO's; its "
    "gold reward is above SFT's. Nor does it if its gold reward is below PPO's by the whole interval. Finding 1 holds if "
    "some ptx_coef above 0 recovers, finding 2 if no larger kl_coef does. No correction for the number of coefficients "
    "tried.",
    "All intervals are of 95 %, of paired differences, over prompts (gold reward), documents (bits per byte) or tasks. "
    "There is one training run per point: they hold for these runs, and say nothing of how another seed of training "
    "would fare.",
)


@dataclass(frozen=True)
class Point:
    """One training run of the sweep."""

    ptx_coef: float
    kl_coef: float

    @property
    def name(self) -> str:
        return f"ptx{self.ptx_coef:g}_kl{self.kl_coef:g}"

    @property
    def label(self) -> str:
        return f"ptx_coef {self.ptx_coef:g}, kl_coef {self.kl_coef:g}"


@dataclass(frozen=True)
class Gain:
    """A paired difference with its 95 % interval; positive is better, whatever is measured."""

    low: float
    value: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]".replace("-", "−")


@dataclass(frozen=True)
class Finding:
    """Whether a finding of the paper holds here (None: these runs cannot tell), and the numbers that say so."""

    title: str
    holds: bool | None
    evidence: list[str]


def gain(measures: Measures, name: str, model: str, against: str) -> Gain | None:
    """How much better `model` is than `against` by one measure; None where that was not measured."""
    m = find(measures, name, model, against)
    if m is None or m["value"] is None or m["ci_low"] is None or m["ci_high"] is None:
        return None
    if m["higher_is_better"]:
        return Gain(m["ci_low"], m["value"], m["ci_high"])
    return Gain(-m["ci_high"], -m["value"], -m["ci_low"])


def contrasts(ptx: Sequence[Point], kl: Sequence[Point]) -> list[tuple[str, str]]:
    """The paired differences that `findings` reads, besides those to SFT."""
    ppo = plain_ppo(ptx)
    others = [p for p in dict.fromkeys([*ptx, *kl]) if p != ppo]
    to_ppo = [(p.name, ppo.name) for p in others]
    return to_ppo + [(a.name, b.name) for a in ptx if a != ppo for b in kl if b != ppo]


def plain_ppo(ptx: Sequence[Point]) -> Point:
    """The run that both sweeps have in common: no pretraining term, the smallest KL coefficient."""
    return next(p for p in ptx if p.ptx_coef == 0)


def findings(measures: Measures, ptx: Sequence[Point], kl: Sequence[Point]) -> list[Finding]:
    """The paper's two findings, both judged by `CRITERION`; None where it hangs on runs that are open or not measured."""
    ppo = plain_ppo(ptx)
    titles = (
        "The pretraining term recovers what PPO loses (paper, Fig. 33)",
        "A larger KL coefficient does not recover it (paper, Fig. 34)",
    )
    losses = {name: gain(measures, name, ppo.name, BASELINE) for name in TAX}
    lost = {name: loss for name, loss in losses.items() if loss is not None and loss.high < 0}
    against_sft = "; ".join(f"{TAX[name]} {loss}" for name, loss in losses.items() if loss is not None)
    start = f"PPO against SFT, positive is better: {against_sft or 'nothing was measured'}."
    if not lost:
        return [Finding(t, None, [start, "PPO loses nothing here that could be recovered."]) for t in titles]
    tried = [[p for p in points if p != ppo] for points in (ptx, kl)]
    verdicts = [{p: recovers(measures, p, ppo, lost) for p in points} for points in tried]
    some = [_any(v.values()) if v else None for v in verdicts]
    said = [
        [_about(measures, p, ppo, lost, knob, v) for p, v in verdict.items()]
        for verdict, knob in zip(verdicts, ("ptx_coef", "kl_coef"), strict=True)
    ]
    winners = [[p for p, v in verdict.items() if v] for verdict in verdicts]
    why = [*_why_not(measures, winners[1], ppo), *_best_against_best(measures, *winners)]
    return [
        Finding(titles[0], some[0], [start, *said[0]]),
        Finding(titles[1], None if some[1] is None else not some[1], [*said[1], *why]),
    ]


def recovers(measures: Measures, point: Point, ppo: Point, lost: Mapping[str, Gain]) -> bool | None:
    """Whether a run recovers what PPO lost, in the sense of `findings`; `lost`: measure -> PPO against SFT."""
    over_ppo, over_sft = (gain(measures, REWARD, point.name, other) for other in (ppo.name, BASELINE))
    if over_ppo is None or over_sft is None:
        return None
    decided = [_is_above(over_sft, 0), over_ppo.high >= 0]
    for name, loss in lost.items():
        for other, level in ((ppo.name, 0.0), (BASELINE, loss.value / 2)):
            decided.append(_is_above(gain(measures, name, point.name, other), level))
    return False if False in decided else None if None in decided else True


def _is_above(found: Gain | None, level: float) -> bool | None:
    """Whether a gain is above a level by its whole interval; False if it is below by all of it, None between."""
    if found is None or found.low <= level < found.high:
        return None
    return found.low > level


def _any(verdicts: Iterable[bool | None]) -> bool | None:
    """`any` where None is unknown."""
    known = list(verdicts)
    return True if True in known else None if None in known else False


def _about(
    measures: Measures, point: Point, ppo: Point, lost: Mapping[str, Gain], knob: str, verdict: bool | None
) -> str:
    """One run in one sentence: what of the loss is back, and at what reward."""
    parts = []
    for name in (*lost, REWARD):
        over_ppo, left = (gain(measures, name, point.name, other) for other in (ppo.name, BASELINE))
        if over_ppo is None or (left is None and name in lost):
            parts.append(f"{SHOWN[name]} not measured")
        else:
            back = f" ({1 - left.value / lost[name].value:.0%} of the loss is back)" if name in lost else ""
            parts.append(f"{SHOWN[name]} {over_ppo} against PPO{back}")
    says = {True: "recovers", False: "does not recover", None: "is open"}[verdict]
    return f"{knob} {getattr(point, knob):g} {says}: {', '.join(parts)}."


def _why_not(measures: Measures, recovered: Sequence[Point], ppo: Point) -> list[str]:
    """Why a larger KL coefficient recovers here, where the numbers tell: then PPO's own reward suffers as well."""
    better = [p for p in recovered if gain(measures, REWARD, p.name, ppo.name).low > 0]
    if not better:
        return []
    settings = ", ".join(f"{p.kl_coef:g}" for p in better)
    return [
        f"Why: with kl_coef {ppo.kl_coef:g} PPO over-optimizes the reward model, for at kl_coef {settings} the gold "
        "reward is higher, not lower; up to there a larger coefficient costs nothing."
    ]


def _best_against_best(measures: Measures, ptx: Sequence[Point], kl: Sequence[Point]) -> list[str]:
    """Of the runs that recover, the one of the highest gold reward of either sweep, compared prompt by prompt."""
    if not ptx or not kl:
        return []
    a, b = (max(points, key=lambda p: gain(measures, REWARD, p.name, BASELINE).value) for points in (ptx, kl))
    found = [(label, gain(measures, name, a.name, b.name)) for name, label in SHOWN.items()]
    told = "; ".join(f"{label} {difference}" for label, difference in found if difference is not None)
    return [
        f"Of the runs that recover, those of the highest gold reward, ptx_coef {a.ptx_coef:g} against kl_coef "
        f"{b.kl_coef:g} (positive: ptx is better): {told or 'not compared with one another'}."
    ]


def last_third(points: Sequence[Mapping[str, float]], name: str) -> Gain | None:
    """Mean gain of the last third of the rollouts minus that of the second third; the interval is over episodes."""
    parts = thirds(list(points))
    if len(parts) < 3:
        return None
    value, variance = 0.0, 0.0
    for sign, part in ((-1, parts[1]), (1, parts[2])):
        value += sign * sum(p[name] for p in part) / len(part)
        errors = [(p[f"{name}_high"] - p[f"{name}_low"]) / 2 / Z for p in part]
        variance += sum(e * e for e in errors) / len(part) ** 2
    half = Z * math.sqrt(variance)
    return Gain(value - half, value, value + half)


# ---- the page ------------------------------------------------------------------------------------------------
def build_sweep_page(
    path: str | os.PathLike,
    *,
    ptx: Sequence[Point],
    kl: Sequence[Point],
    measures: Measures,
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


def _curves(measures: Measures, points: Sequence[Point], knob: str, axis: str) -> list[Figure]:
    ticks = [f"{getattr(p, knob):g}" for p in points]
    figures = []
    for name, heading in AXES.items():
        drawn = [{"x": x, **_ends(measures, name, p, "y")} for x, p in enumerate(points)]
        figures.append(curves_plot([Series("", drawn)], heading, axis, ticks=ticks, level=0))
    return figures


def _frontier(measures: Measures, ptx: Sequence[Point], kl: Sequence[Point]) -> list[Block]:
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


def _ends(measures: Measures, name: str, point: Point, axis: str) -> dict[str, float]:
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


def _numbers(measures: Measures, points: Sequence[Point], settings: Mapping[str, Any]) -> list[Block]:
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
