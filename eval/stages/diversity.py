"""Stage `diversity`: mode collapse, per prompt (several samples of each) and across prompts (one sample of each)."""

import logging
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from prefopt.evaluation.results import FAILED, measure
from prefopt.evaluation.run import EvaluationArguments, EvaluationRun
from prefopt.evaluation.stages.samples import measured_samples
from prefopt.statistics.intervals import Estimate, mean_estimate
from prefopt.statistics.text_diversity import (
    Distinct,
    distinct_n,
    jackknife,
    self_bleu,
    sentence_bleu,
    unique_share,
)

logger = logging.getLogger(__name__)
Progress = Callable[[str], None]

ORDERS = (1, 2, 3)
NAMES = (*(f"distinct_{n}" for n in ORDERS), "unique", "self_bleu")
ONE_SAMPLE = "one sample per prompt: set samples_per_prompt to several (10) and run `prefopt eval generate`"


@dataclass
class DiversityArguments:
    """How self-BLEU is measured, which takes longest."""

    self_bleu_group: int = field(
        default=10, metadata={"help": "Across prompts: answers that are compared with one another."}
    )
    self_bleu_prompts: int = field(
        default=1000, metadata={"help": "Prompts of which self-BLEU is taken, at most."}
    )


@dataclass(frozen=True)
class Found:
    """One measure of one model: its estimate, and what its paired difference to another model is made of."""

    estimate: Estimate
    parts: (
        Mapping[Any, float] | Distinct
    )  # per prompt or group of prompts; or what is left without each prompt
    prompts: Sequence[int]


def across_prompts(
    texts: Mapping[int, str],
    own: DiversityArguments,
    bleu: Callable[[str, list[str]], float] | None,
    seed: int = 0,
) -> dict[str, Found]:
    """Diversity of one answer to each prompt.

    Distinct-n and the share of unique answers are of all answers together, their intervals by the jackknife; self-BLEU
    is the mean over random groups of prompts, the same groups for every model that answers the same prompts.
    """
    prompts = sorted(texts)
    answers = [texts[i] for i in prompts]
    found: dict[str, Found] = {}
    for name, statistic in _statistics().items():
        of_all = statistic(answers)
        if of_all is not None:
            estimate = jackknife(of_all.value, of_all.without, len(answers))
            estimate = replace(  # of a share
                estimate, ci_low=np.maximum(estimate.ci_low, 0.0), ci_high=np.minimum(estimate.ci_high, 1.0)
            )
            found[name] = Found(estimate, of_all, prompts)
    groups = _groups(prompts, own, seed)
    if bleu is not None and groups:
        scores = {tuple(g): self_bleu(bleu, [texts[i] for i in g]) for g in groups}
        estimate = mean_estimate([*scores.values()])
        found["self_bleu"] = Found(replace(estimate, n=sum(map(len, groups))), scores, prompts)
    return found


def per_prompt(
    samples: Mapping[int, Sequence[str]],
    own: DiversityArguments,
    bleu: Callable[[str, list[str]], float] | None,
) -> dict[str, Found]:
    """Mean over prompts of the diversity of the samples of one prompt; intervals resample prompts."""
    values: dict[str, dict[int, float]] = {name: {} for name in NAMES}
    for number, (prompt, texts) in enumerate(sorted(samples.items())):
        for name, statistic in _statistics().items():
            of_prompt = statistic(texts)
            if of_prompt is not None:
                values[name][prompt] = of_prompt.value
        if bleu is not None and number < own.self_bleu_prompts:
            values["self_bleu"][prompt] = self_bleu(bleu, texts)
    return {
        name: Found(mean_estimate([*found.values()]), found, sorted(found))
        for name, found in values.items()
        if found
    }


def difference(a: Found, b: Found) -> Estimate | None:
    """a - b on the same prompts, paired; None where they are not about the same prompts."""
    if isinstance(a.parts, Distinct):
        if list(a.prompts) != list(b.prompts):
            return None
        return jackknife(a.parts.value - b.parts.value, a.parts.without - b.parts.without, a.estimate.n)
    common = [key for key in a.parts if key in b.parts]
    if not common:
        return None
    return mean_estimate([a.parts[key] - b.parts[key] for key in common])


def _statistics() -> dict[str, Callable[[Sequence[str]], Distinct | None]]:
    orders = {f"distinct_{n}": lambda texts, n=n: distinct_n(texts, n) for n in ORDERS}
    return {**orders, "unique": unique_share}


def _groups(prompts: Sequence[int], own: DiversityArguments, seed: int) -> list[list[int]]:
    """Random groups of prompts; what does not fill the last one is left out."""
    order = random.Random(f"{seed}/self-BLEU").sample(list(prompts), len(prompts))[: own.self_bleu_prompts]
    size = own.self_bleu_group
    return [order[i : i + size] for i in range(0, len(order) - size + 1, size)]


def run(
    run: EvaluationRun,
    args: EvaluationArguments,
    own: DiversityArguments,
    *,
    progress: Progress = logger.info,
) -> None:
    """Measure the samples of every model, and the differences to `args.baseline`; write `stages/diversity.json`."""
    if own.self_bleu_group < 2 or own.self_bleu_prompts < own.self_bleu_group:
        raise ValueError(
            "self_bleu_group: expected 2 or more, and self_bleu_prompts not below it, got "
            f"{own.self_bleu_group} and {own.self_bleu_prompts}"
        )
    bleu, no_bleu = _bleu()
    found: dict[tuple[str, str], dict[str, Found]] = {}
    reasons: dict[tuple[str, str], str] = {}
    data: dict[str, Any] = {"baseline": args.baseline, "samples_per_prompt": {}, "group": own.self_bleu_group}
    for model in args.models:
        progress(f"diversity: {model}")
        try:
            samples: dict[int, list[str]] = defaultdict(list)
            for row in measured_samples(run, args, model):
                samples[row["id"]].append(row["completion"])
            data["samples_per_prompt"][model] = min(map(len, samples.values()))
            found[model, "across_prompts"] = across_prompts(
                {prompt: texts[0] for prompt, texts in samples.items()}, own, bleu, args.seed
            )
            several = {prompt: texts for prompt, texts in samples.items() if len(texts) > 1}
            found[model, "per_prompt"] = per_prompt(several, own, bleu)
            if not several:
                reasons[model, "per_prompt"] = ONE_SAMPLE
        except Exception as error:  # any trouble of one model is that model's
            logger.exception("diversity: %s failed", model)
            why = (
                str(error)
                if isinstance(error, FileNotFoundError)
                else f"{FAILED}{type(error).__name__}: {error}"
            )
            reasons[model, "across_prompts"] = reasons[model, "per_prompt"] = why
    measures = []
    for model in args.models:
        for scope in ("across_prompts", "per_prompt"):
            for name in NAMES:
                one = found.get((model, scope), {}).get(name)
                reason = None
                if one is None:
                    reason = reasons.get((model, scope)) or (no_bleu if name == "self_bleu" else None)
                    if scope == "across_prompts" and name == "self_bleu":
                        reason = reason or f"fewer prompts than self_bleu_group, {own.self_bleu_group}"
                    reason = reason or "no answer is long enough"
                key = f"diversity.{name}.{scope}"
                estimate = None if one is None else one.estimate
                measures.append(measure(key, model, estimate, reason=reason))
                other = found.get((args.baseline, scope), {}).get(name)
                if one is not None and other is not None and model != args.baseline:
                    paired = difference(one, other)
                    if paired is not None:
                        measures.append(measure(key, model, paired, against=args.baseline))
    run.write_stage("diversity", measures, data)


def _bleu() -> tuple[Callable[[str, list[str]], float] | None, str | None]:
    try:
        return sentence_bleu(), None
    except ImportError:
        return None, "sacrebleu is not installed: pip install 'prefopt[eval]'"
