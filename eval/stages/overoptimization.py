"""Stage `overopt`: does more of the reward model's score stop being better? After Gao et al. 2022 (arXiv:2210.10760).

The proxy is the reward model of `reward_judge`, the gold reward that of `gold_judge` (or a larger reward model). Three
views: best of n samples of the baseline, the rollouts of every RL run, and the finished models.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.evaluation.results import FAILED, find, measure
from prefopt.evaluation.run import EvaluationArguments, EvaluationRun, check_baseline, parsed_mapping
from prefopt.evaluation.stages.judge import JudgeArguments, gold_scores, load_callable
from prefopt.evaluation.stages.samples import measured_samples
from prefopt.evaluation.training_run import read_run
from prefopt.inference.generate import Completion
from prefopt.inference.journal import fingerprint_of, function_state, kept_rows, source_state
from prefopt.inference.scoring import score_samples
from prefopt.models.loading import known_tokenizer, load_classifier
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

logger = logging.getLogger(__name__)
Progress = Callable[[str], None]
Rewards = tuple[
    dict[int, list[float]], dict[int, list[float]]
]  # proxy, gold: of every sample of every prompt

NO_PROXY = "no reward model: give `reward_judge`"
NO_GOLD = "no gold reward: give `gold_judge`, a function, or `gold_reward_model`, a larger reward model"
ONE_SAMPLE = "one sample per prompt: set samples_per_prompt to several (16) and run `prefopt eval generate`"


@dataclass
class OveroptArguments:
    """Where the gold reward and the logs of training are, where not with the judges and the models."""

    gold_reward_model: str | None = field(
        default=None,
        metadata={
            "help": "Reward model that stands for the gold reward (Gao et al.); default: `gold_judge`."
        },
    )
    training_runs: dict[str, str] | str | None = field(
        default=None,
        metadata={"help": "Folder of the RL run of a model, with trainer_state.json; default: the model's."},
    )

    def __post_init__(self) -> None:
        self.training_runs = parsed_mapping("training_runs", self.training_runs)


def run(
    run: EvaluationRun,
    args: EvaluationArguments,
    own: OveroptArguments,
    judges: JudgeArguments,
    *,
    progress: Progress = logger.info,
) -> None:
    """Score all samples with proxy and gold reward, fit Gao's forms; write `stages/overopt.json`.

    Scores are kept in `overopt/<model>.jsonl`. The finished models' distances are those of stage `drift`.
    """
    drift = run.stage("drift") or {"measures": [], "data": {}}
    check_baseline({"drift": drift["data"]}, args)
    measures: list[dict[str, Any]] = []
    data: dict[str, Any] = {"baseline": args.baseline, "best_of_n": None, "rollouts": {}, "models": {}}
    missing = _missing(own, judges)
    rewards: dict[str, Rewards] = {}
    reasons: dict[str, str] = {}
    loaded: dict[str, Any] = {}
    for model in args.models:
        if missing is not None:
            reasons[model] = missing
            continue
        try:
            rewards[model] = _rewards(run, args, own, judges, model, loaded, progress)
        except Exception as error:  # any trouble of one model is that model's
            logger.exception("overopt: %s failed", model)
            why = (
                str(error)
                if isinstance(error, FileNotFoundError)
                else f"{FAILED}{type(error).__name__}: {error}"
            )
            reasons[model] = why
    add, data["best_of_n"] = best_of_n_measures(args.baseline, rewards, reasons)
    measures += add
    for model, source in args.models.items():
        folder = own.training_runs.get(model, source)
        if model != args.baseline and (
            model in own.training_runs or Path(folder, "trainer_state.json").is_file()
        ):
            add, data["rollouts"][model] = _rollout_measures(model, folder)
            measures += add
    data["models"] = model_points(rewards, args.baseline, drift["measures"])
    run.write_stage("overopt", measures, data)


def best_of_n_measures(
    model: str, rewards: Mapping[str, Rewards], reasons: Mapping[str, str] | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Gains of best-of-n from the samples of one model (gain 0: one sample), Gao's fit, and the points to draw.

    Gains are in standard deviations of all samples of the model under proxy and gold reward each. The n are the powers
    of two up to the samples per prompt, and these.
    """
    names = ("overopt.best_of_n_gold", "overopt.best_of_n_proxy", "overopt.best_of_n_fit")
    reason = (reasons or {}).get(model) or (
        None if model in rewards else f"no model called {model!r} in models"
    )
    samples = min((len(scores) for scores in rewards[model][0].values()), default=0) if reason is None else 0
    if reason is None and samples < 2:
        reason = ONE_SAMPLE
    if reason is not None:
        return [measure(name, model, None, reason=reason) for name in names], None
    prompts = sorted(rewards[model][0])
    proxy, gold = (np.array([of[p][:samples] for p in prompts]) for of in rewards[model])
    ns = sorted({2**i for i in range(samples.bit_length())} | {samples})
    measures, points = [], [{"n": n, "distance": float(best_of_n_distance(n))} for n in ns]
    data: dict[str, Any] = {"points": points, "fits": {}, "samples": samples, "prompts": len(prompts)}
    for name, values in (("gold", gold), ("proxy", proxy)):
        unit = values.std(ddof=1)
        if not unit > 0:
            reason = f"{FAILED}all samples have the same {name} reward"
            measures.append(measure(f"overopt.best_of_n_{name}", model, None, reason=reason))
            continue
        curves = best_of_n(proxy, values, ns) / unit
        gains = curves - curves[:, :1]
        for point, gain in zip(points, gains.T, strict=True):
            estimate = mean_estimate(gain)
            point |= _ends(name, estimate)
            if point["n"] > 1:
                measures.append(measure(f"overopt.best_of_n_{name}.{point['n']}", model, estimate))
        fit = fit_best_of_n(gains, ns)
        if fit is None:
            reason = "two samples per prompt give one point, and the fit needs two"
            measures.append(measure(f"overopt.best_of_n_fit.{name}", model, None, reason=reason))
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


def _rollout_measures(model: str, folder: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Gao's fit over the rollouts in the log of one RL run, and the points to draw."""
    data: dict[str, Any] = {"points": [], "fits": {}}
    try:
        training = read_run(folder)
        if training.kind not in ("ppo", "ppo_ptx"):
            return [], data
        points = rollout_gains(training.log, training.settings.get("episodes_per_rollout", math.nan))
        data["points"] = points
        measures = []
        for name in ("gold", "proxy"):
            fit = fit_rl(points, name)
            if fit is None:
                reason = (
                    "its log has no three rollouts with objective/kl, rewards/reward_model and rewards/gold"
                )
                measures.append(measure(f"overopt.rl_fit.{name}", model, None, reason=reason))
            else:
                measures += _fit_measures("rl", name, model, fit)
                data["fits"][name] = _fit_data(fit, rl_design)
        return measures, data
    except Exception as error:
        logger.exception("overopt: the log of %s failed", model)
        return [
            measure("overopt.rl_fit", model, None, reason=f"{FAILED}{type(error).__name__}: {error}")
        ], data


def _fit_measures(kind: str, name: str, model: str, fit: tuple[Estimate, Estimate]) -> list[dict[str, Any]]:
    return [
        measure(f"overopt.{kind}_fit.{name}.{coefficient}", model, estimate)
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


def _missing(own: OveroptArguments, judges: JudgeArguments) -> str | None:
    if judges.reward_judge is None:
        return NO_PROXY
    return NO_GOLD if judges.gold_judge is None and own.gold_reward_model is None else None


def _rewards(
    run: EvaluationRun,
    args: EvaluationArguments,
    own: OveroptArguments,
    judges: JudgeArguments,
    model: str,
    loaded: dict[str, Any],
    progress: Progress,
) -> Rewards:
    """Proxy and gold reward of every sample, by prompt."""
    rows = measured_samples(run, args, model)

    def compute() -> list[dict[str, Any]]:
        progress(f"overopt: scoring {len(rows)} samples of {model}")
        proxy = _scores(args, judges.reward_judge, model, rows, loaded)
        if own.gold_reward_model is not None:
            gold = _scores(args, own.gold_reward_model, model, rows, loaded)
        else:
            judge = judges.gold_judge
            function = load_callable(judge) if isinstance(judge, str) else judge
            gold = [row["score"] for row in gold_scores(function)(model, rows)]
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
    return (
        function_state(judge)
        if isinstance(judge, str)
        else getattr(judge, "__qualname__", type(judge).__name__)
    )


def _scores(
    args: EvaluationArguments,
    source: str,
    model: str,
    rows: Sequence[Mapping[str, Any]],
    loaded: dict[str, Any],
) -> list[float]:
    if source not in loaded:
        loaded[source] = load_classifier(source, load_in_4bit=args.load_in_4bit)
    reward_model, tokenizer = loaded[source]
    prompts = [row["prompt"] for row in rows]
    drawn = [Completion(row["completion"], row["ids"], row["truncated"]) for row in rows]
    policy = known_tokenizer(args.models[model])
    return score_samples(reward_model, tokenizer, policy, prompts, drawn, args.batch_size)
