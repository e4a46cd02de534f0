"""Bradley-Terry strengths of all models from all pairwise judgements."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefopt.errors import UserError
from prefopt.statistics.intervals import Estimate
from prefopt.statistics.logistic import logistic_fit


def strengths(
    judgements: Sequence[Mapping[str, Any]], baseline: str, *, seed: int = 0, n_resamples: int = 2000
) -> dict[str, Estimate]:
    """Strength of every model on the log-odds scale, the baseline's being 0 (Bradley and Terry 1952).

        P(i preferred to j) = sigmoid(s_i - s_j),    s_baseline = 0

    Maximum likelihood over all judged pairs, a tie being half a win for each. Half a win for each side is added to
    every pair that was judged, which keeps a model that always wins finite (with two models: log((w + 1/2) /
    (l + 1/2)), Haldane 1956). Intervals resample prompts, whose judgements are correlated.

    Args:
        judgements: rows with `id` (of the prompt), `a`, `b` and `preference` (1: a, .5: tie, 0: b).

    Returns:
        Estimates by model, strongest first; n counts the model's judgements, n_clusters prompts. A model that no
        chain of judgements joins to the baseline is left out.

    Raises:
        UserError: the baseline is in no judgement.

    >>> rows = [{"id": i, "a": "ppo", "b": "sft", "preference": 1.0 if i < 30 else 0.0} for i in range(40)]
    >>> round(strengths(rows, "sft")["ppo"].value, 3) == round(float(np.log(30.5 / 10.5)), 3)
    True
    """
    names = sorted({row[side] for row in judgements for side in "ab"} - {baseline})
    if not any(baseline in (row["a"], row["b"]) for row in judgements):
        raise UserError(f"the baseline {baseline!r} is in no judgement")
    names = [baseline, *names]
    prompts = {prompt: p for p, prompt in enumerate(dict.fromkeys(row["id"] for row in judgements))}
    wins = np.zeros((len(prompts), len(names), len(names)))  # [prompt, winner, loser]
    for row in judgements:
        p, a, b = prompts[row["id"]], names.index(row["a"]), names.index(row["b"])
        wins[p, a, b] += row["preference"]
        wins[p, b, a] += 1 - row["preference"]
    judged = (wins + wins.transpose(0, 2, 1)).sum(0)
    joined = _joined_to_first(judged > 0)
    names = [name for name, is_joined in zip(names, joined, strict=True) if is_joined]
    wins, judged = wins[:, joined][:, :, joined], judged[joined][:, joined]
    pseudo = 0.5 * (judged > 0)
    value = fit(wins.sum(0) + pseudo)
    low = high = np.full(len(names), np.nan)
    if len(prompts) > 1:
        rng = np.random.default_rng(seed)
        counts = rng.multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)), size=n_resamples)
        drawn = np.tensordot(counts.astype(float), wins, axes=1)
        low, high = np.percentile(fit(drawn + pseudo), [2.5, 97.5], axis=0)
    found = {
        name: Estimate(float(value[i]), float(low[i]), float(high[i]), int(judged[i].sum()), len(prompts))
        for i, name in enumerate(names)
    }
    return dict(sorted(found.items(), key=lambda item: -item[1].value))


def fit(wins: NDArray) -> NDArray:
    """Strengths `[..., M]` at the maximum of sum_ij wins_ij * log sigmoid(s_i - s_j); the first one is 0.

    The wins `[..., M, M]` count how often the row beat the column.

    >>> fit(np.array([[0.0, 1.0], [3.0, 0.0]])).round(6).tolist() == [0.0, round(float(np.log(3)), 6)]
    True
    """
    one, other = np.triu_indices(wins.shape[-1], k=1)
    every = np.eye(wins.shape[-1])
    won = wins[..., one, other]
    strengths = logistic_fit((every[one] - every[other])[:, 1:], won, won + wins[..., other, one])
    return np.concatenate([np.zeros((*wins.shape[:-2], 1)), strengths], axis=-1)


def _joined_to_first(adjacent: NDArray) -> NDArray:
    reached = np.zeros(len(adjacent), dtype=bool)
    reached[0] = True
    for _ in adjacent:
        reached |= adjacent[reached].any(0)
    return reached
