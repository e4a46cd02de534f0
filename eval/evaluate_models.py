"""Evaluate the models of a run on the same prompts, documents and tasks: generate, score, summarize."""

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.evaluation.results import BASELINE, FAILED, GROUPS, MODELS, build_results, measure
from prefopt.evaluation.summary import CONTRASTS, summarize
from prefopt.inference.generate import Completion, generate
from prefopt.inference.jsonl import write_jsonl
from prefopt.inference.language_model import (
    KL,
    BitsPerByte,
    bits_per_byte,
    kl_to_reference,
    task_accuracy,
    validate_tasks,
)
from prefopt.inference.scoring import gold_accuracy, reward_accuracy, score_completions

logger = logging.getLogger(__name__)
Gold = Callable[[Any, str], Any]


@dataclass
class Scores:
    """Everything known of one model, per prompt, document or task; None where it was not measured, and `reasons`
    says why."""

    sampled: list[Completion] | None = None
    greedy: list[Completion] | None = None
    gold: np.ndarray | None = None  # [prompts], of `sampled`
    gold_greedy: np.ndarray | None = None
    components: dict[str, np.ndarray] = field(default_factory=dict)
    components_greedy: dict[str, np.ndarray] = field(default_factory=dict)
    reward: np.ndarray | None = None  # reward-model scores of `sampled`
    bits: BitsPerByte | None = None
    tasks: np.ndarray | None = None  # [tasks], 1 = right
    kl: KL | None = None
    reasons: dict[str, str] = field(default_factory=dict)


def evaluate(
    models: Mapping[str, tuple[Any, Any]],
    *,
    prompts: Sequence[Any],
    gold: Gold | None = None,
    use_cases: Sequence[str] | None = None,
    heldout_use_case: str | None = None,
    corpus: Sequence[str] | None = None,
    tasks: Sequence[Mapping] | None = None,
    reward_model: Any | None = None,
    reward_tokenizer: Any | None = None,
    ranked_rows: Mapping[str, Sequence[Mapping]] | None = None,
    contrasts: Sequence[tuple[str, str]] = CONTRASTS,
    max_new_tokens: int = 64,
    max_length: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    wall_seconds: Mapping[str, float] | None = None,
    curves: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Evaluate all models and return the content of results.json (`build_results`), ready for `build_report`.

    Every model draws one temperature-1 sample and one greedy completion of every prompt. Win rates compare them with
    those of the model called `sft` under the gold reward. A model that is missing or breaks costs its own numbers,
    which are then `skipped` or `failed` with the reason; wrong input stops at once.

    Args:
        models: name -> (causal language model, tokenizer); `sft` is the baseline and the KL reference.
        gold: (prompt, completion text) -> an object with `.total`; the other fields of a dataclass are its parts.
        use_cases: one label per prompt; those equal to `heldout_use_case` are reported apart and are in no other
            number.
        corpus: held-out pretraining documents.
        tasks: multiple-choice tasks as in `task_accuracy`.
        reward_model: a sequence classifier; with `ranked_rows` (`train_labelers`, `heldout_labelers` -> rows) its
            accuracy is measured.
        contrasts: pairs of models whose paired difference is reported besides those to `sft`.
        max_length: window of bits per byte; default: the model's positions.
        folder: where to keep every model's completions and their gold rewards, as `<model>.jsonl`.
        progress: called with a line of text when a part begins.

    Example:
        >>> results = evaluate({"sft": (sft, tok), "dpo": (dpo, tok)}, prompts=prompts, gold=gold)  # doctest: +SKIP
        >>> results["winrate"]["dpo"]["value"]  # doctest: +SKIP
        0.57
    """
    if not prompts:
        raise ValueError("prompts: expected at least one, got none")
    if use_cases is not None and len(use_cases) != len(prompts):
        raise ValueError(f"use_cases: expected one label per prompt ({len(prompts)}), got {len(use_cases)}")
    if tasks is not None:
        validate_tasks(tasks)
    unknown = sorted(set(ranked_rows or {}) - set(GROUPS))
    if unknown:
        raise ValueError(f"ranked_rows: expected the groups {', '.join(GROUPS)}, got {unknown[0]!r}")
    labels = list(use_cases) if use_cases is not None else [""] * len(prompts)
    tell = progress or (lambda line: None)
    settings = {
        "prompts": len(prompts),
        "heldout_use_case": heldout_use_case,
        "documents": len(corpus or []),
        "tasks": len(tasks or []),
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    scores: dict[str, Scores] = {}
    for name, (model, tokenizer) in models.items():
        tell(f"{name}: completions")
        one = scores[name] = Scores()
        # Its own random numbers: with shared ones two models' samples would be coupled, and so their win rate.
        own_seed = random.Random(f"{seed}/{name}").getrandbits(32)
        draw = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "seed": own_seed}
        one.sampled = _attempt(one.reasons, "sampled", _one_each, model, tokenizer, prompts, **draw)
        one.greedy = _attempt(
            one.reasons, "greedy", _one_each, model, tokenizer, prompts, temperature=0, **draw
        )
        sampled = (one.sampled, one.reasons.get("sampled"))
        greedy = (one.greedy, one.reasons.get("greedy"))
        judge = (gold, "no gold reward given")
        one.gold, one.components = _attempt(
            one.reasons, "gold", _judge, gold, prompts, one.sampled, needs=[judge, sampled]
        ) or (None, {})
        one.gold_greedy, one.components_greedy = _attempt(
            one.reasons, "gold_greedy", _judge, gold, prompts, one.greedy, needs=[judge, greedy]
        ) or (None, {})
        one.reward = _attempt(
            one.reasons,
            "reward",
            lambda *args: np.array(score_completions(*args)),
            reward_model,
            reward_tokenizer or tokenizer,
            prompts,
            one.sampled,
            batch_size,
            needs=[(reward_model, "no reward model given"), sampled],
        )
        tell(f"{name}: pretraining text and tasks")
        text = (corpus or None, "no held-out pretraining text given")
        one.bits = _attempt(
            one.reasons, "bits", bits_per_byte, model, tokenizer, corpus, batch_size, max_length, needs=[text]
        )
        items = (tasks or None, "no held-out tasks given")
        one.tasks = _attempt(
            one.reasons, "tasks", task_accuracy, model, tokenizer, tasks, batch_size, needs=[items]
        )
        reference = models[BASELINE][0] if BASELINE in models else None
        one.kl = _attempt(
            one.reasons,
            "kl",
            kl_to_reference,
            model,
            reference,
            tokenizer,
            prompts,
            one.sampled,
            batch_size,
            needs=[(reference, f"no model called {BASELINE!r} given"), sampled],
        )
        if folder is not None:
            write_jsonl(Path(folder) / f"{name}.jsonl", _records(one, prompts, labels))
    tell("reward model")
    if reward_tokenizer is None and models:
        reward_tokenizer = next(iter(models.values()))[1]
    measures = []
    for group in GROUPS:
        rows = {group: ranked_rows[group]} if ranked_rows and ranked_rows.get(group) else None
        given = (rows, f"no ranked rows of {group} given")
        for name, judge, model, compute in (
            (
                "rm.accuracy",
                (reward_model, "no reward model given"),
                "reward_model",
                lambda rows: reward_accuracy(reward_model, reward_tokenizer, rows, batch_size),
            ),
            (
                "rm.gold_accuracy",
                (gold, "no gold reward given"),
                "gold",
                lambda rows: gold_accuracy(gold, rows),
            ),
        ):
            reasons: dict[str, str] = {}
            found = _attempt(reasons, "", compute, rows, needs=[judge, given]) or {}
            measures.append(measure(f"{name}.{group}", model, found.get(group), reason=reasons.get("")))
    for name in MODELS:
        scores.setdefault(name, Scores(reasons={"": "no such model in this run"}))
    summary, samples = summarize(scores, prompts, labels, heldout_use_case, seed, contrasts)
    return build_results(
        measures + summary, wall_seconds=wall_seconds, settings=settings, samples=samples, curves=curves
    )


def _attempt(
    reasons: dict[str, str],
    part: str,
    compute: Callable[..., Any],
    *args: Any,
    needs: Sequence[tuple[Any, str | None]] = (),
    **kwargs: Any,
) -> Any:
    """`compute(*args, **kwargs)`, or None and an entry in `reasons`: a need is missing, or the computation failed (then
    the log has the traceback, and the other numbers go on)."""
    for given, reason in needs:
        if given is None:
            reasons[part] = reason or "not measured"
            return None
    try:
        return compute(*args, **kwargs)
    except Exception as error:
        logger.exception("evaluation: %s failed", getattr(compute, "__name__", part))
        reasons[part] = f"{FAILED}{type(error).__name__}: {error}"
        return None


def _one_each(*args: Any, **kwargs: Any) -> list[Completion]:
    return [drawn[0] for drawn in generate(*args, **kwargs)]


def _judge(
    gold: Gold, prompts: Sequence[Any], completions: Sequence[Completion]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Gold rewards of the completions, and the parts they are made of."""
    scores = [gold(prompt, completion.text) for prompt, completion in zip(prompts, completions, strict=True)]
    names = [f.name for f in fields(scores[0]) if f.name != "total"] if is_dataclass(scores[0]) else []
    parts = {name: np.array([float(getattr(score, name)) for score in scores]) for name in names}
    return np.array([float(score.total) for score in scores]), parts


def _records(one: Scores, prompts: Sequence[Any], labels: Sequence[str]) -> list[dict[str, Any]]:
    """One JSONL row per prompt: the completions of one model with their gold rewards."""

    def side(
        completions: list[Completion] | None, totals: np.ndarray | None, i: int
    ) -> dict[str, Any] | None:
        if completions is None:
            return None
        known = None if totals is None else float(totals[i])
        return {
            "text": completions[i].text,
            "ids": completions[i].ids,
            "truncated": completions[i].truncated,
            "gold": known,
        }

    return [
        {
            "prompt": prompt,
            "use_case": labels[i],
            "sampled": side(one.sampled, one.gold, i),
            "greedy": side(one.greedy, one.gold_greedy, i),
        }
        for i, prompt in enumerate(prompts)
    ]
