"""What a reader wants first: one sentence, and a table of lights, from the measures alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefopt.evaluation.markup import (
    baseline_name,
    better_or_worse,
    interval,
    label,
    listed,
    model_names,
    number,
    verb,
)
from prefopt.evaluation.paper import paper_value, table_14
from prefopt.evaluation.results import MODELS, find

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
    """A row of the lights: a measure whose comparison with the baseline answers it, and the stage that gives it."""

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


QUESTIONS = (
    Question("Preferred to SFT?", "winrate", "compare", paper=_paper_win_rates()),
    Question("… when decoding greedily?", "winrate_greedy", "compare"),
    Question("… at equal length?", "winrate_length_controlled", "compare"),
    Question("… on a use case it was not trained on?", "winrate_heldout_use_case", "compare"),
    Question(
        "Still predicts pretraining text?",
        "pretraining_bits_per_byte",
        "score",
        decimals=4,
        paper=f"SQuADv2 F1 minus SFT: {_tax('squadv2/f1')}",
    ),
    Question("Still knows what it knew (tasks)?", "heldout_task_accuracy", "score"),
)


def lights(results: Results) -> list[dict[str, Any]]:
    """One entry per question: {`question`, `measure`, `paper`, `models`: name -> {`state`, `value`, ..., `reason`}}.

    `state` is `better` or `worse` where the 95 % interval of the comparison with the baseline excludes no difference,
    `unclear` where it does not, `baseline` for the baseline itself, `skipped` or `failed` (with `reason`) else.

    >>> [light["models"]["ppo"]["state"] for light in lights({})][:2]
    ['skipped', 'skipped']
    """
    measures, baseline = results.get("measures") or [], baseline_name(results)
    rows = []
    for question in QUESTIONS:
        models = {}
        for model in model_names(results):
            if model == baseline:
                alone = find(measures, question.measure, model)
                value = alone["value"] if alone and not question.measure.startswith("winrate") else None
                models[model] = {"state": "baseline", "value": value, "reason": None}
                continue
            m = find(measures, question.measure, model, baseline)
            if m is None:
                why = f"not measured; `prefopt eval {question.stage}` gives it"
                models[model] = {"state": "skipped", "value": None, "reason": why}
            elif m["value"] is None:
                models[model] = {"state": m["status"], "value": None, "reason": m["reason"]}
            else:
                state = {"good": "better", "bad": "worse"}.get(better_or_worse(m) or "", "unclear")
                kept = {key: m[key] for key in ("value", "ci_low", "ci_high", "n", "reason")}
                models[model] = {"state": state, **kept}
        rows.append(
            {
                "question": question.title,
                "measure": question.measure,
                "decimals": question.decimals,
                "paper": question.paper,
                "models": models,
            }
        )
    return rows


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
