"""What a reader wants first: one sentence, and a table of lights, from the measures alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from prefopt.evaluation.report.tables import Results, better_or_worse, interval, label, number
from prefopt.evaluation.results import MODELS, no_number
from prefopt.evaluation.run import Question, Stage
from prefopt.evaluation.stages import STAGES

SIGNS = {
    "better": "▲ better",
    "worse": "▼ worse",
    "unclear": "● unclear",
    "baseline": "baseline",
    "skipped": "– skipped",
    "failed": "✕ failed",
}


@dataclass(frozen=True)
class Light:
    """The answer of one model: `better` or `worse` where the 95 % interval of the comparison excludes no difference,
    `unclear` where it does not, `baseline` for what is compared with, `skipped` or `failed` (with `reason`) else.
    """

    state: str
    value: float | None = None
    numbers: str = ""
    reason: str = ""


def lights(results: Results) -> list[tuple[str, str, dict[str, Light]]]:
    """Of every question how it reads, what the paper found, and the light of every model.

    Models are compared with the baseline, on benchmarks with the base. Of several benchmarks `numbers` tells how many are
    better and worse, and one that is worse makes the light `worse`.

    >>> lights(Results({}))[0][2]["ppo"].state
    'skipped'
    """
    base = ((results.content.get("stages") or {}).get("bench") or {}).get("base") or results.baseline
    rows = []
    for stage in STAGES:
        against = base if stage.key == "bench" else results.baseline
        for question in stage.questions:
            models = {model: _light(results, stage, question, model, against) for model in results.models}
            rows.append((question.title.format(label(against)), question.paper, models))
    return rows


def _light(results: Results, stage: Stage, question: Question, model: str, against: str) -> Light:
    is_rate = question.measure.startswith("winrate")
    of_model = [m for m in results.measures if m["model"] == model and fnmatchcase(m["name"], question.measure)]
    if model == against:
        alone = [m["value"] for m in of_model if m["against"] is None and m["value"] is not None]
        value = alone[0] if len(alone) == 1 and not is_rate else None
        return Light("baseline", value, "" if value is None else number(value, question.decimals))
    compared = [m for m in of_model if m["against"] == against]
    known = [m for m in compared if m["value"] is not None]
    if compared and not known:
        return Light(compared[0]["status"], reason=compared[0]["reason"])
    if not known:
        note = (results.content.get("notes") or {}).get(stage.key)
        why = no_number(note or f"not measured; `prefopt eval {stage.name}` gives it")
        return Light(why.status, reason=why.reason)
    words = {"good": "better", "bad": "worse", "": "unclear"}
    states = [words[better_or_worse(m)] for m in known]
    state = next(s for s in ("worse", "better", "unclear") if s in states)
    if len(known) > 1:
        tally = f"of {len(known)}: {states.count('better')} better, {states.count('worse')} worse"
        return Light(state, numbers=tally)
    value = number(known[0]["value"], question.decimals, sign=not is_rate)
    return Light(state, known[0]["value"], value + interval(known[0], question.decimals, "\n"))


def verdict(results: Results) -> str:
    """The result of the run in one sentence.

    >>> verdict(Results({}))
    'No model was compared with SFT.'
    """
    models, baseline = results.models, results.baseline
    groups: dict[str, list[str]] = {"beats": [], "loses to": [], "cannot be told from": []}
    first = [m for m in ("ppo_ptx", "ppo", "dpo") if m in models]
    for model in [*first, *(m for m in models if m not in MODELS)]:
        m = results.find("winrate", model, baseline) if model != baseline else None
        if m and m["value"] is not None:
            word = {"good": "beats", "bad": "loses to", "": "cannot be told from"}[better_or_worse(m)]
            groups[word].append(f"{label(model)} ({number(m['value'], 2)}{interval(m, 2, ', 95 % interval ')})")
    parts = [_said(word, group, label(baseline)) for word, group in groups.items() if group]
    if not parts:
        return f"No model was compared with {label(baseline)}."
    judge = results.settings.get("judge") or "the gold reward"
    sentence = f"By win rate under {judge} " + "; ".join(parts)
    tax = results.find("pretraining_bits_per_byte", "ppo_ptx", "ppo")
    if tax and tax["value"] is not None:
        sure = {"good": "less", "bad": "more", "": ""}[better_or_worse(tax)]
        amount = f"({number(tax['value'], 3, sign=True)} bits per byte{interval(tax, 3, ', ')})"
        sentence += (
            f"; PPO-ptx forgets {sure} of the pretraining text than PPO {amount}"
            if sure
            else f"; whether PPO-ptx or PPO forgets more of the pretraining text cannot be told {amount}"
        )
    return sentence + "."


def _said(word: str, models: Sequence[str], baseline: str) -> str:
    """
    >>> _said("beats", ["DPO"], "SFT"), _said("beats", ["PPO", "DPO"], "SFT")
    ('DPO beats SFT', 'PPO and DPO beat SFT')
    """
    if len(models) > 1:
        word = {"beats": "beat", "loses to": "lose to"}.get(word, word)
    return f"{' and '.join(filter(None, [', '.join(models[:-1]), models[-1]]))} {word} {baseline}"
