"""Stage `overopt`: does more of the reward model's score stop being better? After Gao et al. 2022 (arXiv:2210.10760).

The proxy is the reward model of `reward_judge`, the gold reward that of `gold_judge` (or a larger reward model). Three
views: best of n samples of the baseline, the rollouts of every RL run, and the finished models.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.evaluation.judges.gold import gold_function, gold_scores
from prefopt.evaluation.judges.reward import RewardModel
from prefopt.evaluation.report.plots import Series, curves_plot
from prefopt.evaluation.report.tables import Ask, Block, Figure, Fold, Items, Results, label, number
from prefopt.evaluation.results import Definition, Failed, Measures, NoNumber, Skipped, attempt, find
from prefopt.evaluation.run import EvaluationArguments, EvaluationRun, Stage, check_baseline, parsed_mapping
from prefopt.evaluation.stages.judge import JudgeArguments
from prefopt.evaluation.training_run import read_run
from prefopt.inference.journal import fingerprint_of, function_state, kept_rows, source_state
from prefopt.statistics.intervals import Estimate, mean_estimate
from prefopt.statistics.overoptimization import (
    best_of_n,
    best_of_n_design,
    best_of_n_distance,
    fit_best_of_n,
    fit_rl,
    peak,
    rl_design,
    rollout_gains,
)

# proxy, gold: of every sample of every prompt
Rewards = tuple[dict[int, list[float]], dict[int, list[float]]]

NO_PROXY = Skipped("no reward model: give `reward_judge`")
NO_GOLD = Skipped("no gold reward: give `gold_judge`, a function, or `gold_reward_model`, a larger reward model")
ONE_SAMPLE = Skipped("one sample per prompt: set samples_per_prompt to several (16) and run `prefopt eval generate`")
ONE_POINT = Skipped("two samples per prompt give one point, and the fit needs two")
NO_ROLLOUTS = Skipped("its log has no three rollouts with objective/kl, rewards/reward_model and rewards/gold")
_GAO = "Gao et al. 2022, arXiv:2210.10760"
MEASURES = Measures(
    {
        "overopt.best_of_n_gold": Definition(
            True,
            "gold reward of the baseline's sample that the reward model likes best of n, minus that of one sample, in "
            "standard deviations of its samples; mean over all subsets of the samples of a prompt",
            _GAO,
        ),
        "overopt.best_of_n_proxy": Definition(None, "the same gain in the reward model's own score", _GAO),
        "overopt.best_of_n_fit": Definition(
            None,
            "coefficients of gain = d * (alpha - beta * d), d = sqrt(log n - (n - 1) / n), least squares over n",
            _GAO,
        ),
        "overopt.rl_fit": Definition(
            None,
            "coefficients of gain = d * (alpha - beta * log d), d = sqrt(KL), least squares over the rollouts of "
            "training; interval from the errors of the rollouts' means",
            _GAO,
        ),
    }
)


@dataclass
class OveroptArguments:
    """Where the gold reward and the logs of training are, where not with the judges and the models."""

    gold_reward_model: str | None = field(
        default=None,
        metadata={"help": "Reward model that stands for the gold reward (Gao et al.); default: `gold_judge`."},
    )
    training_runs: dict[str, str] | str | None = field(
        default=None,
        metadata={"help": "Folder of the RL run of a model, with trainer_state.json; default: the model's."},
    )

    def __post_init__(self) -> None:
        self.training_runs = parsed_mapping("training_runs", self.training_runs)


def measure(run: EvaluationRun, args: EvaluationArguments, own: OveroptArguments, judges: JudgeArguments) -> None:
    """Score all samples with proxy and gold reward, fit Gao's forms; write `stages/overopt.json`.

    Scores are kept in `overopt/<model>.jsonl`. The finished models' distances are those of stage `drift`.
    """
    drift = run.stage("drift") or {"measures": [], "data": {}}
    check_baseline({"drift": drift["data"]}, args)
    no_gold = judges.gold_judge is None and own.gold_reward_model is None
    not_given = NO_PROXY if judges.reward_judge is None else NO_GOLD if no_gold else None
    reward_model = cache(lambda source: RewardModel(source, args, run.progress))
    rewards: dict[str, Rewards] = {}
    reasons: dict[str, NoNumber] = {}
    for model in args.models:
        # First of all, so that rows that are none are told whether there is a judge for them or not.
        read = partial(run.measured_samples, model, args.heldout_use_case)
        rows = attempt(f"overopt: {model}", read, skips=FileNotFoundError)
        if isinstance(rows, NoNumber):
            found = rows if isinstance(rows, Failed) else not_given or rows
        else:
            compute = partial(_rewards, run, args, own, judges, model, rows, reward_model)
            found = not_given or attempt(f"overopt: {model}", compute)
        (reasons if isinstance(found, NoNumber) else rewards)[model] = found
    measures, best = best_of_n_measures(args.baseline, rewards, reasons)
    rollouts: dict[str, Any] = {}
    for model, source in args.models.items():
        folder = own.training_runs.get(model, source)
        if model != args.baseline and (model in own.training_runs or Path(folder, "trainer_state.json").is_file()):
            rollouts[model] = {"points": [], "fits": {}}
            add = attempt(f"overopt: the log of {model}", partial(_rollout_measures, model, folder, rollouts[model]))
            measures += [MEASURES.record("overopt.rl_fit", model, add)] if isinstance(add, NoNumber) else add
    models = model_points(rewards, args.baseline, drift["measures"])
    scored = {model: str(reasons.get(model, "ok")) for model in args.models}
    data = {"baseline": args.baseline, "best_of_n": best, "rollouts": rollouts, "models": models, "scored": scored}
    run.write_stage(STAGE, measures, data)


def best_of_n_measures(
    model: str, rewards: Mapping[str, Rewards], reasons: Mapping[str, NoNumber] | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Gains of best-of-n from the samples of one model (gain 0: one sample), Gao's fit, and the points to draw.

    Gains are in standard deviations of all samples of the model under proxy and gold reward each. The n are the powers
    of two up to the samples per prompt, and these.
    """
    none = (reasons or {}).get(model)
    if none is None and model not in rewards:
        none = Skipped(f"no model called {model!r} in models")
    samples = min((len(scores) for scores in rewards[model][0].values()), default=0) if none is None else 0
    if none is None and samples < 2:
        none = ONE_SAMPLE
    if none is not None:
        names = ("overopt.best_of_n_gold", "overopt.best_of_n_proxy", "overopt.best_of_n_fit")
        return [MEASURES.record(name, model, none) for name in names], None
    prompts = sorted(rewards[model][0])
    proxy, gold = (np.array([of[p][:samples] for p in prompts]) for of in rewards[model])
    ns = sorted({2**i for i in range(samples.bit_length())} | {samples})
    points: list[dict[str, Any]] = [{"n": n, "distance": float(best_of_n_distance(n))} for n in ns]
    measures, fits = [], {}
    for name, values in (("gold", gold), ("proxy", proxy)):
        unit = values.std(ddof=1)
        if not unit > 0:
            same = Failed(f"all samples have the same {name} reward")
            measures.append(MEASURES.record(f"overopt.best_of_n_{name}", model, same))
            continue
        curves = best_of_n(proxy, values, ns) / unit
        gains = curves - curves[:, :1]
        for point, gain in zip(points, gains.T, strict=True):
            estimate = mean_estimate(gain)
            point |= _ends(name, estimate)
            if point["n"] > 1:
                measures.append(MEASURES.record(f"overopt.best_of_n_{name}.{point['n']}", model, estimate))
        fit = fit_best_of_n(gains, ns) or ONE_POINT
        measures += _fit_measures(f"overopt.best_of_n_fit.{name}", model, fit)
        fits |= {} if fit is ONE_POINT else {name: fit_data(fit, best_of_n_design)}
    return measures, {"points": points, "fits": fits, "samples": samples, "prompts": len(prompts)}


def model_points(
    rewards: Mapping[str, Rewards], baseline: str, drift: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Every model's `distance` (None without stage `drift`) and its `gold` and `proxy` gain over the baseline.

    In standard deviations of the baseline's samples; paired over the prompts that both answered.
    """
    points: dict[str, dict[str, Any]] = {}
    for model, both in rewards.items() if baseline in rewards else ():
        kl = find(drift, "kl_to_sft", model)
        known = kl is not None and kl["value"] is not None
        points[model] = {"distance": math.sqrt(max(kl["value"], 0.0)) if known else None}
        for name, theirs, ours in zip(("proxy", "gold"), both, rewards[baseline], strict=True):
            unit = np.std([x for scores in ours.values() for x in scores], ddof=1)
            common = [p for p in theirs if p in ours]
            if common and unit > 0:
                gain = mean_estimate([(np.mean(theirs[p]) - np.mean(ours[p])) / unit for p in common])
                points[model] |= _ends(name, gain)
    return points


def _rollout_measures(model: str, folder: str, data: dict[str, Any]) -> list[dict[str, Any]]:
    """Gao's fit over the rollouts in the log of one RL run; the points to draw go into `data`."""
    training = read_run(folder)
    if not training.is_ppo:
        return []
    data["points"] = rollout_gains(training.log, training.settings.get("episodes_per_rollout", math.nan))
    measures = []
    for name in ("gold", "proxy"):
        fit = fit_rl(data["points"], name) or NO_ROLLOUTS
        measures += _fit_measures(f"overopt.rl_fit.{name}", model, fit)
        data["fits"] |= {} if fit is NO_ROLLOUTS else {name: fit_data(fit, rl_design)}
    return measures


def _fit_measures(name: str, model: str, fit: tuple[Estimate, Estimate] | NoNumber) -> list[dict[str, Any]]:
    if isinstance(fit, NoNumber):
        return [MEASURES.record(name, model, fit)]
    return [MEASURES.record(f"{name}.{c}", model, one) for c, one in zip(("alpha", "beta"), fit, strict=True)]


def _ends(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.ci_low, f"{name}_high": estimate.ci_high}


def _rewards(
    run: EvaluationRun,
    args: EvaluationArguments,
    own: OveroptArguments,
    judges: JudgeArguments,
    model: str,
    rows: Sequence[Mapping[str, Any]],
    reward_model: Callable[[str], RewardModel],
) -> Rewards:
    """Proxy and gold reward of every sample, by prompt."""

    def compute() -> list[dict[str, Any]]:
        run.progress(f"overopt: scoring {len(rows)} samples of {model}")
        proxy = reward_model(judges.reward_judge).scores(model, rows)
        if own.gold_reward_model is not None:
            gold = reward_model(own.gold_reward_model).scores(model, rows)
        else:
            gold = [row["score"] for row in gold_scores(gold_function(judges.gold_judge))(model, rows)]
        return [
            {"id": row["id"], "sample": row["sample"], "proxy": p, "gold": g}
            for row, p, g in zip(rows, proxy, gold, strict=True)
        ]

    if own.gold_reward_model is None and not isinstance(judges.gold_judge, str):
        found = compute()  # a function from Python has no name that tells whether it is still the same
    else:
        inputs = [
            source_state(judges.reward_judge),
            source_state(own.gold_reward_model) if own.gold_reward_model else function_state(judges.gold_judge),
            args.load_in_4bit,
            args.dtype,
            fingerprint_of([[row["prompt"], row["completion"], row["ids"]] for row in rows]),
        ]
        found = kept_rows(run.folder / "overopt" / f"{model}.jsonl", inputs, compute)
    proxy, gold = defaultdict(list), defaultdict(list)
    for row in found:
        proxy[row["id"]].append(row["proxy"])
        gold[row["id"]].append(row["gold"])
    return dict(proxy), dict(gold)


def fit_data(fit: tuple[Estimate, Estimate], design: Callable[..., Any]) -> dict[str, Any]:
    """What is kept of a fit: its coefficients, where it is highest, and whether it is sure to fall after that."""
    alpha, beta = fit
    highest = peak(alpha.value, beta.value, design)
    return {"alpha": alpha.value, "beta": beta.value, "peak": highest, "falls": beta.ci_low > 0}


# ---- in the report -------------------------------------------------------------------------------------------
NAMES = {"proxy": "reward model", "gold": "gold reward"}
FAR = 3  # times the distance reached: what a fit says beyond is not told
Points = Sequence[Mapping[str, Any]]
Fit = Mapping[str, Any]  # alpha, beta, peak, falls


def section(results: Results) -> list[Block]:
    """Proxy and gold reward against √KL, with Gao's fits."""
    data = results.stage("overopt")
    figures, said = [], []
    if best := data["best_of_n"]:
        fit, title = best["fits"].get("gold"), f"best of n of {label(data['baseline'])}: gain"
        figures.append(gain_plot(best["points"], title, fit, best_of_n_design))
        said.append(("Best of n:", where_it_turns(best["points"], fit, f"best of {best['samples']}")))
    for model, run in data["rollouts"].items():
        if len(run["points"]) > 1:
            fit, title = run["fits"].get("gold"), f"{label(model)}, rollouts of training: gain"
            figures.append(gain_plot(run["points"], title, fit, rl_design))
            said.append((f"{label(model)}:", where_it_turns(run["points"], fit, "the run")))
    models = [{**p, "label": label(m)} for m, p in data["models"].items() if p["distance"] is not None]
    if sum("gold" in p or "proxy" in p for p in models) > 1:
        figures.append(gain_plot(models, "the models: gain"))
    if not figures:
        raise results.missing("overopt.", "nothing was measured")
    asks: list[Ask | str] = []
    for kind, title in (("best_of_n", "Best of n, d (α − β d)"), ("rl", "RL, d (α − β log d)")):
        asks.append(title)
        for name, what in NAMES.items():
            for coefficient, sign in (("alpha", "α"), ("beta", "β")):
                asks.append(Ask(f"{sign}, {what}", f"overopt.{kind}_fit.{name}.{coefficient}"))
    coefficients = results.table(asks, list(dict.fromkeys([data["baseline"], *data["rollouts"]])))
    note = (
        "Gains over the baseline (over the first rollout) in standard deviations of its samples; intervals of 95 % over "
        "prompts (over the episodes of a rollout). After Gao et al. 2022 (arXiv:2210.10760): d = √KL, under best of n "
        "√(log n − (n − 1)/n); gold gain d (α − β d) under best of n, d (α − β log d) under RL. A reward model's score "
        "that rises while the gold reward falls is over-optimization."
    )
    items = [Items(said)] if said else []
    folds = [Fold("Coefficients of the fits", coefficients)] if coefficients else []
    return [*figures, *items, *folds, note]


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


STAGE = Stage(
    "overopt",
    "gold and proxy reward against the KL, best of n",
    OveroptArguments,
    measure,
    MEASURES,
    of_completions=True,
    reads=(JudgeArguments,),
    title="Over-optimization",
    section=section,
)
