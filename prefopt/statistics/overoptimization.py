"""Proxy and gold reward against the distance from the start, after Gao et al. 2022 (arXiv:2210.10760).

The distance is d = sqrt(KL(policy || start)), in square roots of nats; a gain is a mean reward minus that of the start.
Their forms for the gold reward, whose unknowns alpha and beta enter linearly, so that least squares solves them:

    best-of-n: gain(d) = d * (alpha - beta * d)        RL: gain(d) = d * (alpha - beta * log d)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from prefopt.errors import UserError
from prefopt.statistics.intervals import Estimate, Z, mean_estimate

KEYS = {"proxy": "rewards/reward_model", "gold": "rewards/gold"}


def best_of_n_distance(n: ArrayLike) -> NDArray:
    """sqrt(KL) of best-of-n sampling from the model sampled from: sqrt(log n - (n - 1) / n).

    (Stiennon et al. 2020, arXiv:2009.01325, appendix G.3): exact where no two samples are alike, else an upper bound
    (Beirami et al. 2024, arXiv:2401.01879).

    >>> best_of_n_distance([1, 2, 64]).round(3).tolist()
    [0.0, 0.439, 1.782]
    """
    n = np.asarray(n, dtype=float)
    return np.sqrt(np.log(n) - (n - 1) / n)


def best_of_n(proxy: ArrayLike, values: ArrayLike, ns: Sequence[int]) -> NDArray:
    """Expected value of the sample that the proxy likes best among n: the mean over all subsets of n of N samples.

        sum_i C(i - 1, n - 1) / C(N, n) * v_(i),   v_(i): value of the sample with the i-th lowest proxy
        (Nakano et al. 2021, arXiv:2112.09332, appendix I): unbiased, and of less variance than one subset

    Between equal proxies a draw decides, so each of them counts with their mean value.

    Args:
        proxy: `[P, N]` proxy scores of N samples of each of P prompts.
        values: `[P, N]`, what is wanted of the chosen sample (its gold reward, or the proxy itself).
        ns: numbers from 1 to N; the result is `[P, len(ns)]`.

    Of three samples, best of 2: the subsets {1, 2}, {1, 3}, {2, 3} choose samples 2, 3, 3.

    >>> best_of_n([[1.0, 2.0, 3.0]], [[10.0, 20.0, 60.0]], [1, 2, 3]).round(6).tolist()
    [[30.0, 46.666667, 60.0]]
    """
    proxy, values = np.asarray(proxy, dtype=float), np.asarray(values, dtype=float)
    if proxy.shape != values.shape or proxy.ndim != 2:
        raise UserError(f"expected proxy and values [prompts, samples], got {proxy.shape} and {values.shape}")
    total = proxy.shape[1]
    if not all(1 <= n <= total for n in ns):
        raise UserError(f"best of n: expected n from 1 to {total}, the samples per prompt, got {list(ns)}")
    order = np.argsort(proxy, axis=1, kind="stable")
    in_order = np.stack([_mean_of_equals(p[o], v[o]) for p, v, o in zip(proxy, values, order, strict=True)])
    # Whole numbers, divided last: binomials of 1,000 samples have no place in a float.
    weights = [[math.comb(i, n - 1) / math.comb(total, n) for i in range(total)] for n in ns]
    return in_order @ np.array(weights).T


def _mean_of_equals(proxy: NDArray, values: NDArray) -> NDArray:
    """The values, those of equal proxies replaced by their mean; the proxies are in ascending order."""
    group = rankdata(proxy, method="dense") - 1
    return (np.bincount(group, values) / np.bincount(group))[group]


def best_of_n_design(distances: ArrayLike) -> NDArray:
    """Columns that alpha and beta multiply under best-of-n: d and -d^2."""
    d = np.asarray(distances, dtype=float)
    return np.stack([d, -(d**2)], axis=1)


def rl_design(distances: ArrayLike) -> NDArray:
    """Columns that alpha and beta multiply under RL: d and -d log d, whose limit at 0 is 0."""
    d = np.asarray(distances, dtype=float)
    return np.stack([d, -d * np.log(np.where(d > 0, d, 1.0))], axis=1)


def fit_best_of_n(gains: ArrayLike, ns: Sequence[int]) -> tuple[Estimate, Estimate] | None:
    """alpha and beta of gain(d) = d * (alpha - beta * d), least squares over the n; None below two n above 1.

    The fit is linear in the gains `[P, len(ns)]` (`best_of_n` minus its value at n = 1), so that of their mean over prompts
    is the mean of the prompts' own fits, and its interval resamples prompts.

    >>> d = best_of_n_distance([1, 2, 4, 8])
    >>> alpha, beta = fit_best_of_n([d * (2 - 0.5 * d), d * (4 - 0.5 * d)], [1, 2, 4, 8])
    >>> round(alpha.value, 6), round(beta.value, 6), alpha.n
    (3.0, 0.5, 2)
    """
    if len({n for n in ns if n > 1}) < 2:
        return None
    solve = np.linalg.pinv(best_of_n_design(best_of_n_distance(ns)))
    alpha, beta = (np.asarray(gains, dtype=float) @ solve.T).T
    return mean_estimate(alpha), mean_estimate(beta)


def fit_rl(points: Sequence[Mapping[str, float]], name: str = "gold") -> tuple[Estimate, Estimate] | None:
    """alpha and beta of gain(d) = d * (alpha - beta * log d), least squares over rollouts; None below three of d > 0.

    The points are those of `rollout_gains`, the first of which is the start; `name` is `gold` or `proxy`. The intervals
    carry the errors of the rollouts' means over, that of the start, which all gains share, included; the distances count
    as known.

    >>> line = [{"distance": d, "gold": d * (2 - 0.5 * math.log(d))} for d in (0.5, 1.0, 2.0, 3.0)]
    >>> [round(coefficient.value, 6) for coefficient in fit_rl(line)]
    [2.0, 0.5]
    """
    used = [p for p in points if p["distance"] > 0]
    if len(used) < 3:
        return None
    solve = np.linalg.pinv(rl_design([p["distance"] for p in used]))
    values = solve @ np.array([p[name] for p in used])
    own = np.array([0.0 if p is points[0] else _error(p, name) for p in used])
    later = np.array([p is not points[0] for p in used])
    start = (solve * later).sum(1) * _error(points[0], name)
    halves = Z * np.sqrt((solve**2) @ own**2 + start**2)
    return tuple(
        Estimate(float(v), float(v - h), float(v + h), len(used), len(used))
        for v, h in zip(values, halves, strict=True)
    )


def _error(point: Mapping[str, float], name: str) -> float:
    """Standard error of a rollout's gain; NaN, and so the interval, where it is not known."""
    return (point.get(f"{name}_high", math.nan) - point.get(f"{name}_low", math.nan)) / 2 / Z


def peak(alpha: float, beta: float, of: Callable[[ArrayLike], NDArray]) -> float | None:
    """The distance at which the fitted gold reward is highest; None where it never falls (beta <= 0).

    >>> peak(2.0, 0.5, best_of_n_design), round(peak(2.0, 1.0, rl_design), 6) == round(math.e, 6)
    (2.0, True)
    """
    if beta <= 0:
        return None
    return alpha / (2 * beta) if of is best_of_n_design else math.exp(alpha / beta - 1)


def rollout_gains(log: Sequence[Mapping[str, Any]], episodes: float) -> list[dict[str, float]]:
    """Rewards of the rollouts of one run against their distance from the start.

        distance = sqrt(KL(policy || SFT)), gain = (mean reward of the rollout - that of the first) / sd of the first

    Args:
        log: entries with `objective/kl`, `rewards/{reward_model, gold}/{mean, std}`, the first one of the SFT model; others
            are passed over. An estimate of KL below 0 counts as 0.
        episodes: of one rollout; the standard error of a mean is sd / sqrt(episodes).

    Returns:
        `distance` and, of `proxy` and `gold`, the gain with `_low` and `_high`, the ends of its 95 % interval.

    >>> entry = {"objective/kl": 0.0} | {f"rewards/{r}/{k}": v for r in ("reward_model", "gold")
    ...                                  for k, v in (("mean", 1.0), ("std", 2.0))}
    >>> later = entry | {"objective/kl": 4.0, "rewards/gold/mean": 3.0}
    >>> point = rollout_gains([entry, later], episodes=100)[1]
    >>> point["distance"], point["gold"], point["gold_low"]
    (2.0, 1.0, 0.804)
    """
    needed = ["objective/kl", *(f"{key}/{part}" for key in KEYS.values() for part in ("mean", "std"))]
    entries = [e for e in log if all(isinstance(e.get(k), float) and math.isfinite(e[k]) for k in needed)]
    if not entries or any(entries[0][f"{key}/std"] <= 0 for key in KEYS.values()):
        return []
    points = []
    for entry in entries:
        point = {"distance": math.sqrt(max(entry["objective/kl"], 0.0))}
        for name, key in KEYS.items():
            unit = entries[0][f"{key}/std"]
            value = (entry[f"{key}/mean"] - entries[0][f"{key}/mean"]) / unit
            half = Z * entry[f"{key}/std"] / math.sqrt(episodes) / unit
            point |= {name: value, f"{name}_low": value - half, f"{name}_high": value + half}
        points.append(point)
    return points
