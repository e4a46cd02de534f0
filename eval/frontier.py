"""What the frontier shows: gold reward against KL and against the alignment tax of every method, and the findings."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefopt.evaluation.report.plots import Series, curves_plot
from prefopt.evaluation.report.render import to_html
from prefopt.evaluation.report.tables import Block, Cell, Heading, Items, Line, Page, Section, Table
from prefopt.evaluation.stages.tax import bits_difference
from prefopt.evaluation.sweep import VERDICT, Finding
from prefopt.inference.jsonl import write_whole
from prefopt.inference.likelihood import BitsPerByte
from prefopt.statistics.intervals import Estimate, mean_estimate, paired_difference, win_rate
from prefopt.statistics.overoptimization import best_of_n, best_of_n_distance

METHODS = {
    "ppo": "PPO",
    "ppo_ptx": "PPO-ptx",
    "dpo": "DPO, all pairs",
    "dpo_plackett_luce": "DPO, Plackett-Luce",
    "dpo_best_worst": "DPO, best against worst",
    "dpo_ptx": "DPO with ptx",
    "best_of_n": "best of n",
}
KNOBS = {"ppo": "kl_coef", "ppo_ptx": "kl_coef", "best_of_n": "n"}
CRITERION = (
    "Intervals are of 95 %, over the prompts (gold reward, KL) or the documents (bits per byte) of all seeds, paired with the "
    "SFT model of the same seed or with the other run. A finding holds, or does not, if the whole interval says so; else "
    "these runs cannot tell. No correction for the number of values of a knob."
)


@dataclass(frozen=True)
class Measured:
    """One run of one seed: of every prompt `[P]` gold reward, proxy and KL to SFT, and held-out text by document."""

    gold: NDArray
    proxy: NDArray
    kl: NDArray
    text: BitsPerByte

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> "Measured":
        """From the rows that `prefopt frontier` keeps."""
        prompts = [row for row in rows if "gold" in row]
        documents = [row for row in rows if "nats" in row]
        gold, proxy, kl = (np.array([row.get(key, 0.0) for row in prompts]) for key in ("gold", "proxy", "kl"))
        nats, sizes = (np.array([row[key] for row in documents]) for key in ("nats", "bytes"))
        return cls(gold, proxy, kl, BitsPerByte(nats, sizes))

    def best_of(self, n: int, sft: "Measured") -> "Measured":
        """Of N samples per prompt the expected best of n; KL by the formula, and the text is SFT's own.

        >>> sft = Measured(np.zeros(1), np.zeros(1), np.zeros(1), BitsPerByte(np.ones(1), np.ones(1)))
        >>> drawn = Measured(np.array([[1.0, 5.0]]), np.array([[0.1, 0.2]]), np.zeros(1), sft.text)
        >>> drawn.best_of(2, sft).gold.tolist()
        [5.0]
        """
        gold, proxy = (best_of_n(self.proxy, values, [n])[:, 0] for values in (self.gold, self.proxy))
        return Measured(gold, proxy, np.full(len(gold), float(best_of_n_distance(n)) ** 2), sft.text)


Runs = Mapping[tuple[str, float], Sequence[Measured]]


def gold_difference(a: Sequence[Measured], b: Sequence[Measured]) -> Estimate:
    """Gold reward of run a minus that of run b on the same prompts, over all seeds."""
    return paired_difference(np.concatenate([m.gold for m in a]), np.concatenate([m.gold for m in b]))


def tax_difference(a: Sequence[Measured], b: Sequence[Measured]) -> Estimate:
    """Bits per byte of held-out text of run a minus those of run b on the same documents, over all seeds."""
    return bits_difference(*(_joined(runs) for runs in (a, b)))


def _joined(runs: Sequence[Measured]) -> BitsPerByte:
    return BitsPerByte(*(np.concatenate([getattr(m.text, name) for m in runs]) for name in ("nats", "bytes")))


def results_of(runs: Runs, seeds: Sequence[int]) -> dict[str, Any]:
    """Of every run and of each of its seeds: gain over SFT, win rate, KL and tax, each with its interval."""
    sfts = runs["sft", 0.0]
    points = []
    for (method, knob), of_seeds in runs.items():
        if method == "sft":
            continue
        points.append({"method": method, "knob": knob, **_numbers(of_seeds, sfts)})
        points[-1]["seeds"] = {
            str(seed): _numbers([mine], [sft]) for seed, mine, sft in zip(seeds, of_seeds, sfts, strict=True)
        }
    start = [{"seed": s, "gold": _json(mean_estimate(m.gold))} for s, m in zip(seeds, sfts, strict=True)]
    return {"sft": start, "points": points}


def _numbers(mine: Sequence[Measured], sfts: Sequence[Measured]) -> dict[str, Any]:
    golds = [np.concatenate([m.gold for m in runs]) for runs in (mine, sfts)]
    return {
        "gold_gain": _json(paired_difference(*golds)),
        "win_rate": _json(win_rate(*golds)),
        "kl": _json(mean_estimate(np.concatenate([m.kl for m in mine]))),
        "proxy_gain": _json(paired_difference(*(np.concatenate([m.proxy for m in runs]) for runs in (mine, sfts)))),
        "tax": _json(tax_difference(mine, sfts)),
    }


def _json(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.value, "ci_low": estimate.ci_low, "ci_high": estimate.ci_high, "n": estimate.n}


# ---- what of the papers holds ---------------------------------------------------------------------------------------
def findings(runs: Runs) -> list[Finding]:
    """What InstructGPT and DPO say of these methods, each held against the intervals."""
    of = {method: {knob: r for (m, knob), r in runs.items() if m == method} for method in ("sft", *METHODS)}
    sft = of["sft"][0.0]
    found = []
    for method in ("ppo_ptx", "dpo"):
        if of[method]:
            found.append(_beats_sft(method, of[method], sft))
    if of["ppo"] and of["ppo_ptx"]:
        found.append(_ptx_keeps("ppo", of["ppo"], of["ppo_ptx"], sft))
        # One value is no larger than another.
        if len(of["ppo"]) > 1:
            found.append(_kl_is_no_substitute(of["ppo"], of["ppo_ptx"], sft))
    if of["dpo"] and of["dpo_ptx"]:
        found.append(_ptx_keeps("dpo", of["dpo"], of["dpo_ptx"], sft))
    if of["dpo"]:
        found += [
            _better(f"{METHODS['dpo']}, beats {METHODS[other]}", of["dpo"], of[other])
            for other in ("dpo_best_worst", "dpo_plackett_luce")
            if of[other]
        ]
    return found


def _beats_sft(method: str, points: Mapping[float, Sequence[Measured]], sft: Sequence[Measured]) -> Finding:
    """Every seed's win rate against SFT lies above .5 by its whole interval, at some value of the knob."""
    evidence, verdicts = [], []
    for knob, mine in points.items():
        rates = [win_rate(m.gold, s.gold) for m, s in zip(mine, sft, strict=True)]
        evidence.append(f"{_knob(method, knob)}: win rate by seed {'; '.join(map(str, rates))}.")
        verdicts.append(
            True if all(r.ci_low > 0.5 for r in rates) else False if any(r.ci_high < 0.5 for r in rates) else None
        )
    holds = True if True in verdicts else None if None in verdicts else False
    return Finding(f"SFT is beaten on gold reward with every seed by {METHODS[method]}", holds, evidence)


def _ptx_keeps(
    method: str,
    plain: Mapping[float, Sequence[Measured]],
    ptx: Mapping[float, Sequence[Measured]],
    sft: Sequence[Measured],
) -> Finding:
    """At one knob: the method pays a tax, with ptx less of it, and its gold reward is not lower by the whole interval."""
    name = method.upper()
    title = f"ptx keeps what {name} loses at equal reward" + (" (InstructGPT, Fig. 33)" if method == "ppo" else "")
    evidence, verdicts = [], []
    for knob in sorted(plain.keys() & ptx.keys()):
        paid, less, gold = (
            tax_difference(plain[knob], sft),
            tax_difference(ptx[knob], plain[knob]),
            gold_difference(ptx[knob], plain[knob]),
        )
        evidence.append(
            f"{_knob(method, knob)}: tax of {name} {paid}; with ptx minus without: tax {less}, gold reward {gold}."
        )
        if paid.ci_low > 0:
            verdicts.append(
                True if less.ci_high < 0 <= gold.ci_high else False if less.ci_low > 0 or gold.ci_high < 0 else None
            )
    if not verdicts:
        return Finding(title, None, [*evidence, f"{name} pays no tax here that could be kept."])
    return Finding(title, True if True in verdicts else None if None in verdicts else False, evidence)


def _kl_is_no_substitute(
    ppo: Mapping[float, Sequence[Measured]], ptx: Mapping[float, Sequence[Measured]], sft: Sequence[Measured]
) -> Finding:
    """No PPO run has both as little tax and as much gold reward as the PPO-ptx run of the highest gold reward."""
    title = "A larger KL coefficient is no substitute for ptx (InstructGPT, Fig. 34)"
    best = max(ptx, key=lambda knob: gold_difference(ptx[knob], sft).value)
    evidence, verdicts = [f"PPO-ptx of the highest gold reward: kl_coef {best:g}."], []
    for knob, mine in sorted(ppo.items()):
        tax, gold = tax_difference(mine, ptx[best]), gold_difference(mine, ptx[best])
        evidence.append(f"PPO, kl_coef {knob:g}, minus that run: tax {tax}, gold reward {gold}.")
        falls_short = tax.ci_low > 0 or gold.ci_high < 0
        verdicts.append(True if falls_short else False if tax.ci_high <= 0 and gold.ci_low >= 0 else None)
    return Finding(title, False if False in verdicts else None if None in verdicts else True, evidence)


def _better(title: str, a: Mapping[float, Sequence[Measured]], b: Mapping[float, Sequence[Measured]]) -> Finding:
    """At the values of the knob that both have, the gold reward of a is above b's by the whole interval."""
    differences = {knob: gold_difference(a[knob], b[knob]) for knob in sorted(a.keys() & b.keys())}
    evidence = [f"beta {knob:g}: gold reward {estimate}." for knob, estimate in differences.items()]
    above = [e.ci_low > 0 for e in differences.values()]
    below = [e.ci_high < 0 for e in differences.values()]
    holds = None if any(above) == any(below) else any(above)
    return Finding(title, holds, evidence)


def _knob(method: str, knob: float) -> str:
    return f"{KNOBS.get(method, 'beta')} {knob:g}"


# ---- the page ------------------------------------------------------------------------------------------------------
def build_frontier_page(path: str | os.PathLike, results: Mapping[str, Any], found: Sequence[Finding]) -> None:
    """Write the page: findings, the two plots, and every number."""
    verdict = [f"{finding.title}: {VERDICT[finding.holds]}." for finding in found]
    evidence: list[Block] = []
    for finding in found:
        evidence += [Heading(finding.title), Items([("", text) for text in finding.evidence])]
    points = results["points"]
    plots: list[Block] = [
        curves_plot(_series(points, "kl"), "gold reward, run − SFT", "KL to SFT, nats per completion", level=0),
        curves_plot(
            _series(points, "tax"), "gold reward, run − SFT", "alignment tax, bits per byte, run − SFT", level=0
        ),
        "After Fig. 2 of the DPO paper (arXiv:2305.18290). A number beside a point is its kl_coef, beta or n. Best-of-n has "
        "SFT's own text, hence no tax; its KL is log n − (n − 1) / n.",
    ]
    sections = [
        Section("frontier", "The frontier", plots),
        Section("evidence", "Evidence", evidence),
        Section("numbers", "In numbers", _numbers_table(points, results)),
    ]
    write_whole(
        path, to_html(Page("Reward against KL: what each method gains and costs", verdict, sections, [CRITERION]))
    )


def _series(points: Sequence[Mapping[str, Any]], axis: str) -> list[Series]:
    series = []
    for method, name in METHODS.items():
        drawn = [
            {**_ends(p[axis], "x"), **_ends(p["gold_gain"], "y"), "label": f"{p['knob']:g}"}
            for p in points
            if p["method"] == method
        ]
        if drawn:
            series.append(Series(name, sorted(drawn, key=lambda point: point["x"])))
    return series


def _ends(m: Mapping[str, float], axis: str) -> dict[str, float]:
    return {axis: m["value"], f"{axis}_low": m["ci_low"], f"{axis}_high": m["ci_high"]}


def _numbers_table(points: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> list[Block]:
    keys = {"gold_gain": 3, "win_rate": 3, "kl": 2, "proxy_gain": 2, "tax": 4}
    rows = []
    for point in points:
        rows.append(Line(f"{METHODS[point['method']]}, {_knob(point['method'], point['knob'])}", _cells(point, keys)))
        rows += [Line(f"seed {seed}", _cells(of, keys), "difference") for seed, of in point["seeds"].items()]
    heads = ["", "gold reward − SFT", "win rate", "KL", "proxy − SFT", "bits per byte − SFT"]
    settings = ", ".join(f"{key} = {value}" for key, value in results["settings"].items())
    return [Table(heads, rows), settings]


def _cells(numbers: Mapping[str, Any], keys: Mapping[str, int]) -> list[Cell]:
    return [
        Cell(f"{m['value']:.{digits}f}", f"{m['ci_low']:.{digits}f} to {m['ci_high']:.{digits}f}")
        for m, digits in ((numbers[key], digits) for key, digits in keys.items())
    ]
