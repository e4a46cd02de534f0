"""Agreement of several labelers about rankings: Kendall's W and Krippendorff's alpha."""

from collections.abc import Sequence

import krippendorff
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from prefopt.statistics.intervals import Estimate, bootstrap_over_prompts

ALPHA_RESAMPLES = 500  # each is a call of the library, tens of milliseconds with thousands of completions


def kendall_w(ranks: ArrayLike) -> float:
    """Concordance of m labelers about n completions, corrected for ties (Kendall and Gibbons 1990, chapter 6).

        W = (12 sum_i (R_i - mean R)^2) / (m^2 (n^3 - n) - m sum_j T_j),  T_j = sum over tied groups of (t^3 - t)

    R_i is the sum of mid-ranks of completion i, from ranks `[m, n]`, 1 = best, equal = tie. W is 1 where all give the same
    ranking, 0 where rank sums are equal, NaN where every labeler ties everything.

    >>> kendall_w([[1, 2, 3], [1, 2, 3]]), kendall_w([[1, 2, 3], [3, 2, 1]])
    (1.0, 0.0)
    """
    mid = np.array([rankdata(row) for row in np.asarray(ranks, dtype=float)])
    m, n = mid.shape
    ties = sum((t**3 - t) for row in mid for t in np.unique(row, return_counts=True)[1].astype(float))
    total = m**2 * (n**3 - n) - m * ties
    sums = mid.sum(axis=0)
    return float(12 * ((sums - sums.mean()) ** 2).sum() / total) if total else float("nan")


def alpha(prompts: Sequence[Sequence[Sequence[float]]], *, n_resamples: int = ALPHA_RESAMPLES) -> Estimate:
    """Krippendorff's alpha at the ordinal level (Krippendorff 2018, Content Analysis, chapter 12).

        alpha = 1 - observed / expected disagreement: 1 is perfect, 0 is chance, below 0 is worse than chance

    Per prompt, a list of K numbers from each of its labelers; a unit is one completion. The interval resamples prompts,
    and n and n_clusters count them.

    >>> alpha([[[1, 2, 3], [1, 2, 3]], [[3, 1, 2], [3, 1, 2]]]).value
    1.0
    """
    domain = sorted({float(value) for labelers in prompts for values in labelers for value in values})
    if len(domain) < 2:
        return Estimate(np.nan, np.nan, np.nan, 0, 0)
    at = {value: i for i, value in enumerate(domain)}
    counts = []  # per prompt [K, V]: how many labelers gave completion k the value v
    for labelers in prompts:
        table = np.zeros((len(labelers[0]), len(domain)))
        for values in labelers:
            for k, value in enumerate(values):
                table[k, at[float(value)]] += 1
        counts.append(table)

    def of(chosen: NDArray) -> float:
        table = np.concatenate([counts[int(i)] for i in chosen])
        if (table.sum(axis=0) > 0).sum() < 2:  # all said the same of everything: nothing was to be disagreed on
            return float("nan")
        return float(krippendorff.alpha(value_counts=table, value_domain=domain, level_of_measurement="ordinal"))

    def statistic(numbers: NDArray, axis: int) -> NDArray:
        return np.apply_along_axis(of, axis, numbers)

    return bootstrap_over_prompts(statistic, np.arange(len(prompts)), n_resamples=n_resamples)
