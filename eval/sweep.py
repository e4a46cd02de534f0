"""What a sweep over the coefficients of PPO-ptx or DPO shows: the findings of InstructGPT's Figs 33 and 34, by intervals
alone, and a page of findings, curves and every number."""

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
# Coefficient -> what is claimed of it; the last of a design holds the policy near SFT, the others weigh a term of the loss.
TITLES = {
    "PPO": {
        "ptx_coef": "The pretraining term recovers what PPO loses (paper, Fig. 33)",
        "kl_coef": "A larger KL coefficient does not recover it (paper, Fig. 34)",
    },
    "DPO": {
        "ptx_coef": "The pretraining term recovers what DPO loses",
        "sft_coef": "The likelihood of the best answers recovers what DPO loses",
        "beta": "A larger beta does not recover it",
    },
}


@dataclass(frozen=True)
class Point:
    """One training run of the sweep: a value of each coefficient.

    >>> Point((("ptx_coef", 27.8), ("kl_coef", 0.02))).name
    'ptx27.8_kl0.02'
    """

    coefficients: tuple[tuple[str, float], ...]

    def __getitem__(self, name: str) -> float:
        return dict(self.coefficients)[name]

    @property
    def name(self) -> str:
        return "_".join(f"{name.removesuffix('_coef')}{value:g}" for name, value in self.coefficients)

    @property
    def label(self) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in self.coefficients)


@dataclass(frozen=True)
class Design:
    """The runs of a sweep: each coefficient over its values, the others at their smallest.

    Args:
        method: whose loss is added to, "PPO" or "DPO".
        values: coefficient -> its values in ascending order; 0 is the first of each but the last one's.
    """

    method: str
    values: Mapping[str, Sequence[float]]

    @property
    def plain(self) -> Point:
        """The run that all coefficients have in common: no added term, the shortest leash."""
        return Point(tuple((name, values[0]) for name, values in self.values.items()))

    @property
    def points(self) -> list[Point]:
        return list(dict.fromkeys(point for name in self.values for point in self.along(name)))

    def along(self, name: str) -> list[Point]:
        """The runs in which one coefficient takes its values."""
        return [
            Point(tuple((other, value if other == name else start) for other, start in self.plain.coefficients))
            for value in self.values[name]
        ]

    @property
    def leash(self) -> str:
        return [*self.values][-1]

    @property
    def terms(self) -> list[str]:
        return [*self.values][:-1]

    @property
    def contrasts(self) -> list[tuple[str, str]]:
        """The paired differences that `findings` reads, besides those to SFT."""
        to_plain = [(point.name, self.plain.name) for point in self.points[1:]]
        leashed = self.along(self.leash)[1:]
        return to_plain + [(a.name, b.name) for term in self.terms for a in self.along(term)[1:] for b in leashed]

    @property
    def criterion(self) -> list[str]:
        """How the findings are judged, in words."""
        of = self.method
        return [
            f"{of} loses by a measure if the 95 % interval of {of} − SFT lies wholly on its worse side. A run recovers "
            "if each of these holds by its whole interval, and does not if one of them fails by its whole interval (else "
            f"it is open): by every measure that {of} loses by, it is better than {of} and what is left of the loss is less "
            f"than half of {of}'s; its gold reward is above SFT's. Nor does it if its gold reward is below {of}'s by the "
            f"whole interval. That a term recovers holds if some value above 0 does, that {self.leash} does not if no "
            "larger value does. No correction for the number of coefficients tried.",
            "All intervals are of 95 %, of paired differences, over prompts (gold reward), documents (bits per byte) or "
            "tasks. There is one training run per point: they hold for these runs, and say nothing of how another seed of "
            "training would fare.",
        ]


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


def findings(measures: Measures, design: Design) -> list[Finding]:
    """What is claimed of each coefficient, judged by `Design.criterion`; None where that hangs on runs that are open."""
    plain, of = design.plain, design.method
    losses = {name: gain(measures, name, plain.name, BASELINE) for name in TAX}
    lost = {name: loss for name, loss in losses.items() if loss is not None and loss.high < 0}
    against_sft = "; ".join(f"{TAX[name]} {loss}" for name, loss in losses.items() if loss is not None)
    start = f"{of} against SFT, positive is better: {against_sft or 'nothing was measured'}."
    if not lost:
        why = [start, f"{of} loses nothing here that could be recovered."]
        return [Finding(title, None, why) for title in _titles(design)]
    found, winners = [], {}
    for name, title in zip(design.values, _titles(design), strict=True):
        verdicts = {p: recovers(measures, p, plain, lost) for p in design.along(name)[1:]}
        recovered = _any(verdicts.values()) if verdicts else None
        evidence = [_about(measures, p, design, lost, name, v) for p, v in verdicts.items()]
        winners[name] = [p for p, v in verdicts.items() if v]
        if name != design.leash:
            found.append(Finding(title, recovered, [start, *evidence]))
            continue
        evidence += _why_not(measures, winners[name], design)
        for term in design.terms:
            evidence += _best_against_best(measures, design, term, winners[term], winners[name])
        found.append(Finding(title, None if recovered is None else not recovered, evidence))
    return found


def _titles(design: Design) -> list[str]:
    return [TITLES[design.method][name] for name in design.values]


def recovers(measures: Measures, point: Point, plain: Point, lost: Mapping[str, Gain]) -> bool | None:
    """Whether a run recovers what the plain one lost, as `findings` has it; `lost`: measure -> plain run against SFT."""
    over_plain, over_sft = (gain(measures, REWARD, point.name, other) for other in (plain.name, BASELINE))
    if over_plain is None or over_sft is None:
        return None
    decided = [_is_above(over_sft, 0), over_plain.high >= 0]
    for name, loss in lost.items():
        for other, level in ((plain.name, 0.0), (BASELINE, loss.value / 2)):
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
    measures: Measures, point: Point, design: Design, lost: Mapping[str, Gain], knob: str, verdict: bool | None
) -> str:
    """One run in one sentence: what of the loss is back, and at what reward."""
    parts = []
    for name in (*lost, REWARD):
        over_plain, left = (gain(measures, name, point.name, other) for other in (design.plain.name, BASELINE))
        if over_plain is None or (left is None and name in lost):
            parts.append(f"{SHOWN[name]} not measured")
        else:
            back = f" ({1 - left.value / lost[name].value:.0%} of the loss is back)" if name in lost else ""
            parts.append(f"{SHOWN[name]} {over_plain} against {design.method}{back}")
    says = {True: "recovers", False: "does not recover", None: "is open"}[verdict]
    return f"{knob} {point[knob]:g} {says}: {', '.join(parts)}."


def _why_not(measures: Measures, recovered: Sequence[Point], design: Design) -> list[str]:
    """Why a longer leash recovers here, where the numbers tell: then the plain run's own reward suffers as well."""
    plain, leash = design.plain, design.leash
    better = [p for p in recovered if gain(measures, REWARD, p.name, plain.name).low > 0]
    if not better:
        return []
    settings = ", ".join(f"{p[leash]:g}" for p in better)
    whom = "the reward model" if design.method == "PPO" else "the rankings"
    return [
        f"Why: with {leash} {plain[leash]:g} {design.method} over-optimizes {whom}, for at {leash} {settings} the gold "
        "reward is higher, not lower; up to there a larger coefficient costs nothing."
    ]


def _best_against_best(
    measures: Measures, design: Design, term: str, with_term: Sequence[Point], leashed: Sequence[Point]
) -> list[str]:
    """Of the runs that recover, the one of the highest gold reward of either coefficient, compared prompt by prompt."""
    if not with_term or not leashed:
        return []
    a, b = (
        max(points, key=lambda p: gain(measures, REWARD, p.name, BASELINE).value) for points in (with_term, leashed)
    )
    differences = [(label, gain(measures, name, a.name, b.name)) for name, label in SHOWN.items()]
    compared = "; ".join(f"{label} {difference}" for label, difference in differences if difference is not None)
    return [
        f"Of the runs that recover, those of the highest gold reward, {term} {a[term]:g} against {design.leash} "
        f"{b[design.leash]:g} (positive: {term.removesuffix('_coef')} is better): "
        f"{compared or 'not compared with one another'}."
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
    design: Design,
    measures: Measures,
    found: Sequence[Finding],
    rollouts: Mapping[str, Rollouts],
    settings: Mapping[str, Any],
) -> None:
    """Write the page.

    Args:
        design: the runs.
        measures: of every run, and its paired differences to SFT and the plain run (`evaluate`).
        found: what `findings` says of them.
        rollouts: a run's label -> its rollouts, from `rollout_gains`; DPO has none.
        settings: what is told at the end of the page.
    """
    verdict: list[str] = []
    evidence: list[Block] = []
    for i, finding in enumerate(found, 1):
        verdict.append(f"{i}. {finding.title}: {VERDICT[finding.holds]}.")
        evidence += [Heading(f"{i}. {finding.title}"), Items([("", text) for text in finding.evidence])]
    sections = [Section("evidence", "Evidence", evidence)]
    for name in design.values:
        others = ", ".join(f"{other} {value:g}" for other, value in design.plain.coefficients if other != name)
        blocks: list[Block] = _curves(measures, design.along(name), name, f"{name} ({others})")
        if design.method == "PPO":
            blocks.append(f"As Fig. {34 if name == design.leash else 33} of InstructGPT; up is better.")
        sections.append(Section(name, f"Reward and alignment tax against {name}", blocks))
    sections.append(Section("frontier", "Reward against alignment tax", _frontier(measures, design)))
    if design.method == "PPO":
        sections.append(Section("rollouts", "Over-optimization along training", _rollouts(rollouts)))
    sections.append(Section("numbers", "In numbers", _numbers(measures, design, settings)))
    title = {"PPO": "PPO-ptx", "DPO": "DPO"}[design.method]
    write_whole(path, to_html(Page(f"{title}: what the coefficients buy", verdict, sections, design.criterion)))


def _curves(measures: Measures, points: Sequence[Point], knob: str, axis: str) -> list[Figure]:
    ticks = [f"{p[knob]:g}" for p in points]
    figures = []
    for name, heading in AXES.items():
        drawn = [{"x": x, **_ends(measures, name, p, "y")} for x, p in enumerate(points)]
        figures.append(curves_plot([Series("", drawn)], heading, axis, ticks=ticks, level=0))
    return figures


def _frontier(measures: Measures, design: Design) -> list[Block]:
    figures: list[Block] = []
    for name in TAX:
        series = []
        for knob in design.values:
            drawn = [
                {**_ends(measures, name, p, "x"), **_ends(measures, REWARD, p, "y"), "label": f"{p[knob]:g}"}
                for p in design.along(knob)
            ]
            series.append(Series(knob, drawn))
        figures.append(curves_plot(series, AXES[REWARD], AXES[name], level=0))
    note = (
        f"Upper right is best: reward without tax. The lines meet at plain {design.method}. A number next to a point is "
        "its coefficient."
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


def _numbers(measures: Measures, design: Design, settings: Mapping[str, Any]) -> list[Block]:
    decimals = {name: 2 if name == REWARD else 3 for name in SHOWN}
    rows = []
    runs = [(", ".join(f"{value:g}" for _, value in p.coefficients), p.name) for p in design.points]
    for title, name in [("SFT", BASELINE), *runs]:
        values = [measured(find(measures, key, name), digits) for key, digits in decimals.items()]
        differences = [
            measured(find(measures, key, name, BASELINE), digits, difference=True) for key, digits in decimals.items()
        ]
        others = [measured(find(measures, key, name), 2) for key in ("rm_score", "kl_to_sft")]
        rows.append(Line(title, [*values, *differences, *others]))
    minus = [f"{shown} − SFT" for shown in SHOWN.values()]
    heads = [", ".join(design.values), *SHOWN.values(), *minus, "reward-model score", "KL to SFT"]
    note = (
        "▲ and ▼: the interval of the difference to SFT excludes 0. Bits per byte: less is better. `prefopt explain-run` "
        "on a run's folder tells what moved its weights. "
    )
    return [Table(heads, rows), note + ", ".join(f"{k} = {v}" for k, v in settings.items())]
