"""Stage `overopt`: does more of the reward model's score stop being better? After Gao et al. 2022 (arXiv:2210.10760).

The proxy is the reward model of `reward_judge`, the gold reward that of `gold_judge` (or a larger reward model). Three
views: best of n samples of the baseline, the rollouts of every RL run, and the finished models.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.evaluation.judges.gold import gold_function, gold_scores
from prefopt.evaluation.judges.reward import RewardModel
from prefopt.evaluation.report.sections import overopt as overopt_section
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
    measures: list[dict[str, Any]] = []
    data: dict[str, Any] = {"baseline": args.baseline, "best_of_n": None, "rollouts": {}, "models": {}}
    not_given = _not_given(own, judges)
    rewards: dict[str, Rewards] = {}
    reasons: dict[str, NoNumber] = {}
    loaded: dict[str, RewardModel] = {}
    for model in args.models:
        found = not_given or attempt(
            f"overopt: {model}", lambda m=model: _rewards(run, args, own, judges, m, loaded), skips=FileNotFoundError
        )
        if isinstance(found, NoNumber):
            reasons[model] = found
        else:
            rewards[model] = found
    add, data["best_of_n"] = best_of_n_measures(args.baseline, rewards, reasons)
    measures += add
    for model, source in args.models.items():
        folder = own.training_runs.get(model, source)
        if model != args.baseline and (model in own.training_runs or Path(folder, "trainer_state.json").is_file()):
            data["rollouts"][model] = {"points": [], "fits": {}}
            add = attempt(
                f"overopt: the log of {model}", lambda m=model, f=folder: _rollout_measures(m, f, data["rollouts"][m])
            )
            measures += [MEASURES.record("overopt.rl_fit", model, add)] if isinstance(add, NoNumber) else add
    data["models"] = model_points(rewards, args.baseline, drift["measures"])
    run.write_stage(STAGE, measures, data)


def best_of_n_measures(
    model: str, rewards: Mapping[str, Rewards], reasons: Mapping[str, NoNumber] | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Gains of best-of-n from the samples of one model (gain 0: one sample), Gao's fit, and the points to draw.

    Gains are in standard deviations of all samples of the model under proxy and gold reward each. The n are the powers
    of two up to the samples per prompt, and these.
    """
    names = ("overopt.best_of_n_gold", "overopt.best_of_n_proxy", "overopt.best_of_n_fit")
    none = (reasons or {}).get(model)
    if none is None and model not in rewards:
        none = Skipped(f"no model called {model!r} in models")
    samples = min((len(scores) for scores in rewards[model][0].values()), default=0) if none is None else 0
    if none is None and samples < 2:
        none = ONE_SAMPLE
    if none is not None:
        return [MEASURES.record(name, model, none) for name in names], None
    prompts = sorted(rewards[model][0])
    proxy, gold = (np.array([of[p][:samples] for p in prompts]) for of in rewards[model])
    ns = sorted({2**i for i in range(samples.bit_length())} | {samples})
    measures, points = [], [{"n": n, "distance": float(best_of_n_distance(n))} for n in ns]
    data: dict[str, Any] = {"points": points, "fits": {}, "samples": samples, "prompts": len(prompts)}
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
        fit = fit_best_of_n(gains, ns)
        if fit is None:
            measures.append(MEASURES.record(f"overopt.best_of_n_fit.{name}", model, ONE_POINT))
        else:
            measures += _fit_measures("best_of_n", name, model, fit)
            data["fits"][name] = _fit_data(fit, best_of_n_design)
    return measures, data


def model_points(
    rewards: Mapping[str, Rewards], baseline: str, drift: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Every model's `distance` (None without stage `drift`) and its `gold` and `proxy` gain over the baseline.

    In standard deviations of the baseline's samples; paired over the prompts that both answered.
    """
    points: dict[str, dict[str, Any]] = {}
    if baseline not in rewards:
        return points
    for model, both in rewards.items():
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
    if training.kind not in ("ppo", "ppo_ptx"):
        return []
    points = rollout_gains(training.log, training.settings.get("episodes_per_rollout", math.nan))
    data["points"] = points
    measures = []
    for name in ("gold", "proxy"):
        fit = fit_rl(points, name)
        if fit is None:
            measures.append(MEASURES.record(f"overopt.rl_fit.{name}", model, NO_ROLLOUTS))
        else:
            measures += _fit_measures("rl", name, model, fit)
            data["fits"][name] = _fit_data(fit, rl_design)
    return measures


def _fit_measures(kind: str, name: str, model: str, fit: tuple[Estimate, Estimate]) -> list[dict[str, Any]]:
    return [
        MEASURES.record(f"overopt.{kind}_fit.{name}.{coefficient}", model, estimate)
        for coefficient, estimate in zip(("alpha", "beta"), fit, strict=True)
    ]


def _fit_data(fit: tuple[Estimate, Estimate], design: Callable[..., Any]) -> dict[str, Any]:
    alpha, beta = fit
    return {
        "alpha": alpha.value,
        "beta": beta.value,
        "peak": peak(alpha.value, beta.value, design),
        "falls": beta.ci_low > 0,
    }


def _ends(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.ci_low, f"{name}_high": estimate.ci_high}


def _not_given(own: OveroptArguments, judges: JudgeArguments) -> Skipped | None:
    if judges.reward_judge is None:
        return NO_PROXY
    return NO_GOLD if judges.gold_judge is None and own.gold_reward_model is None else None


def _rewards(
    run: EvaluationRun,
    args: EvaluationArguments,
    own: OveroptArguments,
    judges: JudgeArguments,
    model: str,
    loaded: dict[str, RewardModel],
) -> Rewards:
    """Proxy and gold reward of every sample, by prompt."""
    rows = run.measured_samples(model, args.heldout_use_case)

    def scores(source: str) -> list[float]:
        if source not in loaded:
            loaded[source] = RewardModel(source, args, run.progress)
        return loaded[source].scores(model, rows)

    def compute() -> list[dict[str, Any]]:
        run.progress(f"overopt: scoring {len(rows)} samples of {model}")
        proxy = scores(judges.reward_judge)
        if own.gold_reward_model is not None:
            gold = scores(own.gold_reward_model)
        else:
            gold = [row["score"] for row in gold_scores(gold_function(judges.gold_judge))(model, rows)]
        return [
            {"id": row["id"], "sample": row["sample"], "proxy": p, "gold": g}
            for row, p, g in zip(rows, proxy, gold, strict=True)
        ]

    gold_state = source_state(own.gold_reward_model) if own.gold_reward_model else _state(judges.gold_judge)
    inputs = [
        source_state(judges.reward_judge),
        gold_state,
        args.load_in_4bit,
        fingerprint_of([[row["prompt"], row["completion"], row["ids"]] for row in rows]),
    ]
    if not isinstance(judges.gold_judge, str) and own.gold_reward_model is None:
        found = compute()  # a function from Python has no name that tells whether it is still the same
    else:
        found = kept_rows(run.folder / "overopt" / f"{model}.jsonl", inputs, compute)
    proxy, gold = defaultdict(list), defaultdict(list)
    for row in found:
        proxy[row["id"]].append(row["proxy"])
        gold[row["id"]].append(row["gold"])
    return dict(proxy), dict(gold)


def _state(judge: Any) -> Any:
    return function_state(judge) if isinstance(judge, str) else getattr(judge, "__qualname__", type(judge).__name__)


STAGE = Stage(
    "overopt",
    "gold and proxy reward against the KL, best of n",
    OveroptArguments,
    measure,
    MEASURES,
    of_completions=True,
    reads=(JudgeArguments,),
    title="Over-optimization",
    section=overopt_section.section,
)
