"""From per-prompt scores to measures with intervals, and the samples worth reading."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from prefopt.evaluation.report.worst import main_model, pick_samples
from prefopt.evaluation.results import BASELINE, FAILED, measure
from prefopt.inference.language_model import bits_per_byte_difference
from prefopt.statistics.intervals import Estimate, mean_estimate, paired_difference, win_rate

if TYPE_CHECKING:
    from prefopt.evaluation.evaluate_models import Scores

CONTRASTS = (("ppo_ptx", "ppo"),)  # paired differences shown besides those to the baseline


def summarize(
    scores: Mapping[str, Scores],
    prompts: Sequence[Any],
    labels: Sequence[str],
    heldout_use_case: str | None = None,
    seed: int = 0,
    contrasts: Sequence[tuple[str, str]] = CONTRASTS,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measures of every model and of its differences, and the samples for the report.

    All numbers are about prompts outside `heldout_use_case` (its own numbers have it in their names).
    """
    measures: list[dict[str, Any]] = []
    use_case = np.array(labels)
    heldout = (
        use_case == heldout_use_case if heldout_use_case is not None else np.zeros(len(prompts), dtype=bool)
    )
    trained = ~heldout

    def add(
        name: str,
        model: str,
        parts: Sequence[tuple[str, str]],
        compute: Callable[[], Estimate],
        against: str | None = None,
    ) -> None:
        """`compute()` needs `parts`, pairs of a model and a field of its `Scores`; else their reason is given."""
        for owner, part in parts:
            if owner not in scores or getattr(scores[owner], part) is None:
                reasons = scores[owner].reasons if owner in scores else {}
                why = reasons.get(part) or reasons.get("") or "not measured"
                if owner != model:
                    failed = FAILED if why.startswith(FAILED) else ""
                    why = f"{failed}{owner}: {why.removeprefix(FAILED)}"
                measures.append(measure(name, model, None, against=against, reason=why))
                return
        try:
            measures.append(measure(name, model, compute(), against=against))
        except ValueError as error:  # a number that is not finite
            measures.append(measure(name, model, None, against=against, reason=f"{FAILED}{error}"))

    def mean(part: str, rows: np.ndarray) -> Callable[[], Estimate]:
        return lambda: mean_estimate(getattr(scores[model], part)[rows])

    for model, one in scores.items():
        add("gold_reward", model, [(model, "gold")], mean("gold", trained))
        add("gold_reward_greedy", model, [(model, "gold_greedy")], mean("gold_greedy", trained))
        for suffix in ("", "_greedy"):
            for part, values in getattr(one, f"components{suffix}").items():
                add(f"gold_component{suffix}.{part}", model, [], lambda v=values: mean_estimate(v[trained]))
        add("rm_score", model, [(model, "reward")], mean("reward", trained))
        add("pretraining_bits_per_byte", model, [(model, "bits")], lambda one=one: one.bits.estimate)
        add("heldout_task_accuracy", model, [(model, "tasks")], lambda one=one: mean_estimate(one.tasks))
        add("kl_to_sft", model, [(model, "kl")], lambda one=one: one.kl.over(trained).estimate)
        add("kl_to_sft_per_token", model, [(model, "kl")], lambda one=one: one.kl.over(trained).per_token)
        for name, of in (("completion_tokens", lambda c: len(c.ids)), ("truncated", lambda c: c.truncated)):
            add(
                name,
                model,
                [(model, "sampled")],
                lambda one=one, of=of: mean_estimate(np.array([float(of(c)) for c in one.sampled])[trained]),
            )
        _add_win_rates(add, scores, model, use_case, heldout)
    others = [model for model in scores if model != BASELINE]
    for model, against in [(m, BASELINE) for m in others] + [c for c in contrasts if set(c) <= set(scores)]:
        for name, part in (
            ("gold_reward", "gold"),
            ("gold_reward_greedy", "gold_greedy"),
            ("heldout_task_accuracy", "tasks"),
        ):
            rows = slice(None) if part == "tasks" else trained
            add(
                name,
                model,
                [(model, part), (against, part)],
                lambda m=model, a=against, p=part, r=rows: paired_difference(
                    getattr(scores[m], p)[r], getattr(scores[a], p)[r]
                ),
                against,
            )
        add(
            "pretraining_bits_per_byte",
            model,
            [(model, "bits"), (against, "bits")],
            lambda m=model, a=against: bits_per_byte_difference(scores[m].bits, scores[a].bits),
            against,
        )
    drawn = {
        name: [
            {
                "text": completion.text,
                "truncated": completion.truncated,
                "gold": None if one.gold is None else float(one.gold[i]),
                "reward": None if one.reward is None else float(one.reward[i]),
            }
            for i, completion in enumerate(one.sampled)
        ]
        for name, one in scores.items()
        if one.sampled is not None
    }
    main, gain = _gain(scores)
    samples = pick_samples(prompts, labels, drawn, gain, main, heldout=heldout, seed=seed)
    return measures, samples


def _gain(scores: Mapping[str, Scores]) -> tuple[str, np.ndarray | None]:
    """The main model, and by how much its samples score more than the baseline's, by the gold reward, or else by the
    reward model."""
    for part in ("gold", "reward"):
        judged = [name for name, one in scores.items() if getattr(one, part) is not None]
        main = main_model(judged, BASELINE)
        if BASELINE in judged and main is not None:
            return main, getattr(scores[main], part) - getattr(scores[BASELINE], part)
    return "", None


def _add_win_rates(
    add: Callable[..., None],
    scores: Mapping[str, Scores],
    model: str,
    use_case: np.ndarray,
    heldout: np.ndarray,
) -> None:
    def against_baseline(name: str, part: str, rows: np.ndarray) -> None:
        add(
            name,
            model,
            [(model, part), (BASELINE, part)],
            lambda: win_rate(getattr(scores[model], part)[rows], getattr(scores[BASELINE], part)[rows]),
            BASELINE,
        )

    against_baseline("winrate", "gold", ~heldout)
    against_baseline("winrate_greedy", "gold_greedy", ~heldout)
    if heldout.any():
        against_baseline("winrate_heldout_use_case", "gold", heldout)
        add(
            "gold_reward_heldout_use_case",
            model,
            [(model, "gold")],
            lambda: mean_estimate(scores[model].gold[heldout]),
        )
    for label in sorted({label for label in use_case if label}):
        against_baseline(f"winrate_use_case.{label}", "gold", use_case == label)
