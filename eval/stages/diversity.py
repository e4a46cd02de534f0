"""Stage `diversity`: mode collapse, per prompt (several samples of each) and across prompts (one sample of each)."""

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any, ClassVar

import numpy as np

from prefopt.errors import UserError
from prefopt.evaluation.report.tables import Ask, Block, Results, label
from prefopt.evaluation.results import Definition, Measures, NoNumber, Skipped, attempt
from prefopt.evaluation.run import EvaluationArguments, EvaluationRun, Question, Stage
from prefopt.statistics.intervals import Estimate, mean_estimate
from prefopt.statistics.text_diversity import Distinct, distinct_n, jackknife, self_bleu, sentence_bleu, unique_share

Bleu = Callable[[str, list[str]], float]  # of an answer against references
ORDERS = (1, 2, 3)
STATISTICS = {f"distinct_{n}": partial(distinct_n, n=n) for n in ORDERS} | {"unique": unique_share}
NAMES = (*STATISTICS, "self_bleu")
ONE_SAMPLE = Skipped("one sample per prompt: set samples_per_prompt to several (10) and run `prefopt eval generate`")
NO_BLEU = Skipped("sacrebleu is not installed: pip install 'prefopt[eval]'")
TOO_SHORT = Skipped("no answer is long enough")
HEADINGS = {"across_prompts": "Across prompts, one sample of each", "per_prompt": "Among the samples of one prompt"}
SCOPES = {
    "across_prompts": ("over one sample of every prompt", "jackknife over prompts"),
    "per_prompt": ("among the samples of one prompt, mean over prompts", "interval over prompts"),
}
MEASURES = Measures()
for _scope, (_over, _interval) in SCOPES.items():
    for _n in ORDERS:
        MEASURES[f"diversity.distinct_{_n}.{_scope}"] = Definition(
            True,
            f"different {_n}-grams / {_n}-grams of words, {_over}; {_interval}; longer texts have less of it",
            "Li et al. 2016, arXiv:1510.03055",
        )
    MEASURES[f"diversity.unique.{_scope}"] = Definition(
        True,
        f"different answers / answers, case and spacing aside, {_over}; {_interval}",
        "Kirk et al. 2023, arXiv:2310.06452",
    )
    if _scope == "across_prompts":
        _over, _interval = "in random groups of prompts, one sample each", "interval over groups"
    MEASURES[f"diversity.self_bleu.{_scope}"] = Definition(
        False,
        f"mean BLEU of each answer with the others as its references (100: all alike), {_over}; {_interval}",
        "Zhu et al. 2018, arXiv:1802.01886",
    )


@dataclass
class DiversityArguments:
    """How self-BLEU is measured, which takes longest."""

    LEAST: ClassVar[dict[str, float]] = {"self_bleu_group": 2, "self_bleu_prompts": 1}

    self_bleu_group: int = field(
        default=10, metadata={"help": "Across prompts: answers that are compared with one another."}
    )
    self_bleu_prompts: int = field(default=1000, metadata={"help": "Prompts of which self-BLEU is taken, at most."})


@dataclass(frozen=True)
class Found:
    """One measure of one model: its estimate, and what its paired difference to another model is made of."""

    estimate: Estimate
    parts: Mapping[Any, float] | Distinct  # per prompt or group of prompts; or what is left without each prompt
    prompts: Sequence[int]


def across_prompts(
    texts: Mapping[int, str], own: DiversityArguments, bleu: Bleu | None, seed: int = 0
) -> dict[str, Found]:
    """Diversity of one answer to each prompt.

    Distinct-n and the share of unique answers are of all answers together, their intervals by the jackknife; self-BLEU
    is the mean over random groups of prompts, the same groups for every model that answers the same prompts.
    """
    prompts = sorted(texts)
    answers = [texts[i] for i in prompts]
    found: dict[str, Found] = {}
    for name, statistic in STATISTICS.items():
        of_all = statistic(answers)
        if of_all is not None:
            estimate = jackknife(of_all.value, of_all.without, len(answers))
            low, high = np.maximum(estimate.ci_low, 0.0), np.minimum(estimate.ci_high, 1.0)  # of a share
            found[name] = Found(replace(estimate, ci_low=low, ci_high=high), of_all, prompts)
    # Random groups of prompts; what does not fill the last one is left out.
    order = random.Random(f"{seed}/self-BLEU").sample(prompts, len(prompts))[: own.self_bleu_prompts]
    size = own.self_bleu_group
    groups = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
    if bleu is not None and groups:
        scores = {tuple(g): self_bleu(bleu, [texts[i] for i in g]) for g in groups}
        estimate = mean_estimate([*scores.values()])
        found["self_bleu"] = Found(replace(estimate, n=sum(map(len, groups))), scores, prompts)
    return found


def per_prompt(samples: Mapping[int, Sequence[str]], own: DiversityArguments, bleu: Bleu | None) -> dict[str, Found]:
    """Mean over prompts of the diversity of the samples of one prompt; intervals resample prompts."""
    values: dict[str, dict[int, float]] = {name: {} for name in NAMES}
    for number, (prompt, texts) in enumerate(sorted(samples.items())):
        for name, statistic in STATISTICS.items():
            of_prompt = statistic(texts)
            if of_prompt is not None:
                values[name][prompt] = of_prompt.value
        if bleu is not None and number < own.self_bleu_prompts:
            values["self_bleu"][prompt] = self_bleu(bleu, texts)
    return {
        name: Found(mean_estimate([*found.values()]), found, sorted(found)) for name, found in values.items() if found
    }


def difference(a: Found, b: Found) -> Estimate | None:
    """a - b on the same prompts, paired; None where they are not about the same prompts."""
    if isinstance(a.parts, Distinct):
        if list(a.prompts) != list(b.prompts):
            return None
        return jackknife(a.parts.value - b.parts.value, a.parts.without - b.parts.without, a.estimate.n)
    common = [key for key in a.parts if key in b.parts]
    return mean_estimate([a.parts[key] - b.parts[key] for key in common]) if common else None


def measure(run: EvaluationRun, args: EvaluationArguments, own: DiversityArguments) -> None:
    """Measure the samples of every model, and the differences to `args.baseline`; write `stages/diversity.json`."""
    if own.self_bleu_group < 2 or own.self_bleu_prompts < own.self_bleu_group:
        raise UserError(
            "self_bleu_group: expected 2 or more, and self_bleu_prompts not below it, got "
            f"{own.self_bleu_group} and {own.self_bleu_prompts}"
        )
    data: dict[str, Any] = {"baseline": args.baseline, "samples_per_prompt": {}, "group": own.self_bleu_group}
    few = Skipped(f"fewer prompts than self_bleu_group, {own.self_bleu_group}")
    try:
        bleu, no_bleu = sentence_bleu(), {"across_prompts": few}
    except ImportError:
        bleu, no_bleu = None, dict.fromkeys(SCOPES, NO_BLEU)

    def of_model(model: str) -> dict[str, dict[str, Found] | NoNumber]:
        samples: dict[int, list[str]] = defaultdict(list)
        for row in run.measured_samples(model, args.heldout_use_case):
            samples[row["id"]].append(row["completion"])
        data["samples_per_prompt"][model] = min(map(len, samples.values()))
        firsts = {prompt: texts[0] for prompt, texts in samples.items()}
        several = {prompt: texts for prompt, texts in samples.items() if len(texts) > 1}
        return {
            "across_prompts": across_prompts(firsts, own, bleu, args.seed),
            "per_prompt": per_prompt(several, own, bleu) if several else ONE_SAMPLE,
        }

    def value(model: str, name: str, scope: str) -> Found | NoNumber:
        of_scope = found[model] if isinstance(found[model], NoNumber) else found[model][scope]
        if isinstance(of_scope, NoNumber) or name in of_scope:
            return of_scope if isinstance(of_scope, NoNumber) else of_scope[name]
        return no_bleu.get(scope, TOO_SHORT) if name == "self_bleu" else TOO_SHORT

    found: dict[str, dict[str, dict[str, Found] | NoNumber] | NoNumber] = {}
    for model in args.models:
        run.progress(f"diversity: {model}")
        found[model] = attempt(f"diversity: {model}", partial(of_model, model), skips=FileNotFoundError)
    measures = []
    for model, scope, name in product(args.models, SCOPES, NAMES):
        key, one = f"diversity.{name}.{scope}", value(model, name, scope)
        measures.append(MEASURES.record(key, model, one if isinstance(one, NoNumber) else one.estimate))
        if model != args.baseline and args.baseline in found and isinstance(one, Found):
            theirs = value(args.baseline, name, scope)
            paired = difference(one, theirs) if isinstance(theirs, Found) else None
            if paired is not None:
                measures.append(MEASURES.record(key, model, paired, against=args.baseline))
    run.write_stage(STAGE, measures, data)


def section(results: Results) -> list[Block]:
    """Distinct-n, unique answers and self-BLEU, with the differences to the baseline."""
    data = results.stage("diversity")
    baseline = data["baseline"]
    if not data["samples_per_prompt"]:
        raise results.missing("diversity.", "no model was measured")
    titles = {f"distinct_{n}": f"distinct {n}-grams" for n in ORDERS}
    titles |= {"unique": "unique answers", "self_bleu": "self-BLEU (100: all alike)"}
    asks: list[Ask | str] = []
    for scope in SCOPES:
        asks.append(HEADINGS[scope])
        for name, title in titles.items():
            full, decimals = f"diversity.{name}.{scope}", 1 if name == "self_bleu" else 3
            asks += [Ask(title, full, decimals), Ask(f"minus {label(baseline)}", full, decimals, baseline)]
    counts = " or ".join(map(str, sorted(set(data["samples_per_prompt"].values()))))
    note = (
        f"Samples per prompt: {counts}. Distinct n-grams: different ones / all, which also falls as answers grow longer. "
        f"Self-BLEU across prompts: in random groups of {data['group']} prompts. ▲ more diverse and ▼ less: the 95 % "
        "interval of the paired difference excludes 0."
    )
    return [*results.table(asks), note]


STAGE = Stage(
    "diversity",
    "mode collapse: distinct n-grams, unique answers, self-BLEU",
    DiversityArguments,
    measure,
    MEASURES,
    of_completions=True,
    questions=(
        Question("Answers as varied? (unique across prompts)", "diversity.unique.across_prompts"),
        Question("… to the same prompt?", "diversity.unique.per_prompt"),
    ),
    title="Diversity",
    section=section,
)
