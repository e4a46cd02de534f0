"""What a reader wants first: one sentence, and a table of lights, from the measures alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from prefopt.evaluation.report.markup import (
    baseline_name,
    better_or_worse,
    interval,
    label,
    listed,
    model_names,
    number,
    verb,
)
from prefopt.evaluation.report.paper import paper_value, table_14
from prefopt.evaluation.results import MODELS, find, no_number

Results = Mapping[str, Any]
SIGNS = {
    "better": "▲ better",
    "worse": "▼ worse",
    "unclear": "● unclear",
    "baseline": "baseline",
    "skipped": "– skipped",
    "failed": "✕ failed",
}


@dataclass(frozen=True)
class Question:
    """A row of the lights: the measures (a pattern) whose comparison answers it, and the stage that gives them."""

    title: str
    measure: str
    stage: str
    decimals: int = 3
    paper: str = ""


def _tax(task: str, condition: str = "zero-shot") -> str:
    """How far the paper's PPO and PPO-ptx are from its SFT on a task."""
    sft, ppo, ptx = (table_14(task, condition, m) for m in ("sft", "ppo", "ppo_ptx"))
    return f"PPO {number(ppo - sft, 1, sign=True)}, PPO-ptx {number(ptx - sft, 1, sign=True)}"


def _paper_win_rates() -> str:
    return ", ".join(f"{label(m)} {number(paper_value('winrate', m)[0], 2)}" for m in ("ppo", "ppo_ptx"))


def _toxicity() -> str:
    values = [
        (m, table_14("real_toxicity_prompts/perspective_toxicity", "basic", m))
        for m in ("sft", "ppo", "ppo_ptx")
    ]
    return ", ".join(f"{label(m)} {number(value, 3)}" for m, value in values)


QUESTIONS = (
    Question("Preferred to {}?", "winrate", "compare", paper=_paper_win_rates()),
    Question("… when decoding greedily?", "winrate_greedy", "compare"),
    Question("… at equal length?", "winrate_length_controlled", "compare"),
    Question("… on a use case it was not trained on?", "winrate_heldout_use_case", "compare"),
    Question(
        "Still predicts pretraining text? (bits per byte)", "pretraining_bits_per_byte", "tax", decimals=4
    ),
    Question("Still knows what it knew? (tasks)", "heldout_task_accuracy", "tax"),
    Question(
        "Public benchmarks, zero-shot?",
        "bench.*.0-shot",
        "bench",
        paper=f"SQuADv2 F1 minus SFT: {_tax('squadv2/f1')}",
    ),
    Question("Less toxic?", "bench.realtoxicityprompts.toxicity.basic", "bench", paper=_toxicity()),
    Question("Truthful? (TruthfulQA, MC1)", "bench.truthfulqa_mc1.*.0-shot", "bench"),
    Question("Answers as varied? (unique across prompts)", "diversity.unique.across_prompts", "diversity"),
    Question("… to the same prompt?", "diversity.unique.per_prompt", "diversity"),
)


def lights(results: Results) -> list[dict[str, Any]]:
    """One entry per question: {`question`, `measure`, `paper`, `models`: name -> {`state`, `value`, ..., `reason`}}.

    `state` is `better` or `worse` where the 95 % interval of the comparison with the baseline (of benchmarks: with the
    base) excludes no difference, `unclear` where it does not, `baseline` for what is compared with, `skipped` or
    `failed` (with `reason`) else. Of several benchmarks `tally` tells how many are better and worse, and one that is
    worse makes the light `worse`.

    >>> [light["models"]["ppo"]["state"] for light in lights({})][:2]
    ['skipped', 'skipped']
    """
    measures, baseline = results.get("measures") or [], baseline_name(results)
    base = ((results.get("stages") or {}).get("bench") or {}).get("base") or baseline
    rows = []
    for question in QUESTIONS:
        against = base if question.stage == "bench" else baseline
        row = {
            "question": question.title.format(label(against)),
            "measure": question.measure,
            "against": against,
            "decimals": question.decimals,
            "paper": question.paper,
        }
        models = {
            model: _light(measures, question, model, against, results) for model in model_names(results)
        }
        rows.append({**row, "models": models})
    return rows


def _light(
    measures: Sequence[Mapping[str, Any]], question: Question, model: str, against: str, results: Results
) -> dict[str, Any]:
    of_model = [m for m in measures if m["model"] == model and fnmatchcase(m["name"], question.measure)]
    if model == against:
        alone = [m for m in of_model if m["against"] is None and m["value"] is not None]
        single = alone[0] if len(alone) == 1 and not question.measure.startswith("winrate") else None
        return {"state": "baseline", "value": single and single["value"], "reason": None}
    found = [m for m in of_model if m["against"] == against]
    known = [m for m in found if m["value"] is not None]
    if not known:
        note = (results.get("notes") or {}).get(question.stage)
        why = no_number(note or f"not measured; `prefopt eval {question.stage}` gives it")
        status, reason = (found[0]["status"], found[0]["reason"]) if found else (why.status, why.reason)
        return {"state": status, "value": None, "reason": reason}
    states = [{"good": "better", "bad": "worse"}.get(better_or_worse(m) or "", "unclear") for m in known]
    state = next(s for s in ("worse", "better", "unclear") if s in states)
    if len(known) == 1:
        return {
            "state": state,
            **{key: known[0][key] for key in ("value", "ci_low", "ci_high", "n", "reason")},
        }
    tally = f"of {len(known)}: {states.count('better')} better, {states.count('worse')} worse"
    return {"state": state, "value": None, "tally": tally, "reason": None}


def verdict(results: Results) -> str:
    """The result of the run in one sentence.

    >>> verdict({})
    'No model was compared with SFT.'
    """
    measures, baseline = results.get("measures") or [], baseline_name(results)
    groups: dict[str, list[str]] = {"beats": [], "loses to": [], "cannot be told from": []}
    models = model_names(results)
    first = [m for m in ("ppo_ptx", "ppo", "dpo") if m in models]
    for model in [*first, *(m for m in models if m not in MODELS)]:
        m = find(measures, "winrate", model, baseline) if model != baseline else None
        if m and m["value"] is not None:
            word = {"good": "beats", "bad": "loses to"}.get(better_or_worse(m) or "", "cannot be told from")
            groups[word].append(
                f"{label(model)} ({number(m['value'], 2)}{interval(m, 2, ', 95 % interval ')})"
            )
    parts = [
        f"{listed(models)} {verb(word, models)} {label(baseline)}"
        for word, models in groups.items()
        if models
    ]
    if not parts:
        return f"No model was compared with {label(baseline)}."
    judge = (results.get("settings") or {}).get("judge") or "the gold reward"
    sentence = f"By win rate under {judge} " + "; ".join(parts)
    tax = find(measures, "pretraining_bits_per_byte", "ppo_ptx", "ppo")
    if tax and tax["value"] is not None:
        sure = {"good": "less", "bad": "more"}.get(better_or_worse(tax) or "")
        amount = f"({number(tax['value'], 3, sign=True)} bits per byte{interval(tax, 3, ', ')})"
        sentence += (
            f"; PPO-ptx forgets {sure} of the pretraining text than PPO {amount}"
            if sure
            else f"; whether PPO-ptx or PPO forgets more of the pretraining text cannot be told {amount}"
        )
    return sentence + "."
