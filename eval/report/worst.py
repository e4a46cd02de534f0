"""The samples that the report shows: the worst first."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from prefopt.evaluation.report.tables import label


def main_model(models: Sequence[str], baseline: str) -> str | None:
    """The model whose worst samples are looked for: PPO-ptx, or else the last that is not the baseline."""
    others = [model for model in models if model != baseline]
    return "ppo_ptx" if "ppo_ptx" in others else others[-1] if others else None


def pick_samples(
    prompts: Sequence[Any],
    labels: Sequence[str],
    drawn: Mapping[str, Sequence[Mapping[str, Any]]],
    gain: ArrayLike | None = None,
    main: str = "",
    *,
    baseline: str = "sft",
    heldout: Sequence[bool] | None = None,
    seed: int = 0,
    worst: int = 20,
    best: int = 2,
    at_random: int = 5,
) -> list[dict[str, Any]]:
    """Prompts with all models' samples side by side: where `main` loses most against the baseline, a few where it gains
    most, some drawn at random, and two of the held-out use case.

    Args:
        labels: use case of every prompt.
        drawn: model -> one {`text`, `truncated`, scores ...} per prompt.
        gain: by how much `main` is better than the baseline on every prompt; not a number counts as the worst.

    Example:
        >>> drawn = {"sft": [{"text": "a"}, {"text": "b"}], "ppo": [{"text": "c"}, {"text": "d"}]}
        >>> picked = pick_samples(["x", "y"], ["", ""], drawn, [1.0, -2.0], "ppo")
        >>> [(sample["prompt"], sample["why"]) for sample in picked]
        [('y', '1. worst for PPO against SFT (-2.00)'), ('x', '2. worst for PPO against SFT (+1.00)')]
    """
    if not drawn:
        return []
    generator = random.Random(seed)
    shuffled = generator.sample(range(len(prompts)), len(prompts))  # breaks ties between equal gains
    picked: dict[int, str] = {}

    def take(candidates: Sequence[int], count: int, why: Callable[[int, int], str]) -> None:
        for n, i in enumerate([i for i in candidates if i not in picked][:count], start=1):
            picked[i] = why(n, i)

    if gain is not None:
        by = np.asarray(gain, dtype=float)
        order = sorted(shuffled, key=lambda i: by[i] if np.isfinite(by[i]) else -np.inf)
        against = f"for {label(main)} against {label(baseline)}"
        for word, candidates, count in (
            ("worst", order, worst),
            ("best", [i for i in order[::-1] if by[i] > 0], best),
        ):
            take(candidates, count, lambda n, i, word=word: f"{n}. {word} {against} ({by[i]:+.2f})")
    apart = list(heldout) if heldout is not None else [False] * len(prompts)
    take([i for i in shuffled if not apart[i]], at_random, lambda n, i: "drawn at random")
    take([i for i in shuffled if apart[i]], 2, lambda n, i: "held-out use case, drawn at random")
    return [
        {
            "prompt": prompts[i],
            "use_case": labels[i],
            "why": why,
            "completions": {model: dict(completions[i]) for model, completions in drawn.items()},
        }
        for i, why in picked.items()
    ]
