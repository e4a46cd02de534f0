"""Measures of reward models and policies, each with a 95 % interval from a bootstrap over prompts.

Pairs and tokens of one prompt are correlated, so intervals always resample whole prompts.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import DegenerateDataWarning, bootstrap

from prefopt.errors import UserError

Z = 1.96  # half the width of a 95 % interval of a normal statistic, in its standard errors


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval.

    `n` counts what the value averages over (pairs, prompts), `n_clusters` the prompts that were resampled. The value is
    NaN when there is nothing to average, the interval when there are fewer than two prompts.

    >>> print(Estimate(0.724, 0.70, 0.75, n=2500, n_clusters=400))
    0.724 [0.700, 0.750]
    """

    value: float
    ci_low: float
    ci_high: float
    n: int
    n_clusters: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.ci_low:.3f}, {self.ci_high:.3f}]"


def bootstrap_over_prompts(
    statistic: Callable[..., ArrayLike], *per_prompt_arrays: ArrayLike, seed: int = 0, n_resamples: int = 2000
) -> Estimate:
    """A statistic of per-prompt numbers with its percentile interval (Efron and Tibshirani 1993, chapter 13).

        [ci_low, ci_high] = the 2.5 % and 97.5 % quantiles of statistic(prompts drawn with replacement)

    Percentile, not BCa: it stays finite where all prompts agree (there its width is 0).

    Args:
        statistic: called as `statistic(*arrays, axis=axis)` on arrays whose `axis` runs over prompts; reduces it.
        per_prompt_arrays: one or more sequences of N numbers, resampled together; n = n_clusters = N.

    Raises:
        UserError: the arrays are not of one length, or a number in them is not finite.

    Bits per byte is a ratio of sums: resample documents, then divide.

    >>> bits, num_bytes = [8.0, 30.0, 20.0, 2.0], [4, 10, 10, 1]
    >>> ratio = lambda bits, num_bytes, axis: bits.sum(axis) / num_bytes.sum(axis)
    >>> estimate = bootstrap_over_prompts(ratio, bits, num_bytes)
    >>> estimate.value, estimate.ci_low >= 2.0, estimate.ci_high <= 3.0
    (2.4, True, True)
    """
    arrays = [np.asarray(a, dtype=float) for a in per_prompt_arrays]
    if not arrays or any(a.ndim != 1 or a.shape != arrays[0].shape for a in arrays):
        raise UserError(f"expected sequences of one length, got shapes {[a.shape for a in arrays]}")
    for a in arrays:
        if not np.isfinite(a).all():
            at = int(np.flatnonzero(~np.isfinite(a))[0])
            raise UserError(f"prompt {at}: {a[at]} is not a finite number; leave such prompts out and count them")
    n = len(arrays[0])
    if n == 0:
        return Estimate(np.nan, np.nan, np.nan, 0, 0)
    value = float(statistic(*arrays, axis=-1))
    if n == 1:
        return Estimate(value, np.nan, np.nan, 1, 1)
    interval = bootstrap(
        arrays,
        statistic,
        n_resamples=n_resamples,
        batch=max(1, 250_000 // n),  # 2 MB per array, however many prompts: stays in the cache
        vectorized=True,
        paired=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high), n, n)


def ratio_of_sums(numerators: ArrayLike, denominators: ArrayLike, *, n_resamples: int = 2000) -> Estimate:
    """Micro average sum(numerators) / sum(denominators): every pair (or token) weighs the same, whichever prompt's it is.

    Both are N numbers, sums and counts over the pairs of each prompt; prompts without a pair are not resampled. `n` is the
    sum of the counts, `n_clusters` counts prompts that have any. Raises as `bootstrap_over_prompts`.

    >>> estimate = ratio_of_sums([1, 0, 5], [1, 0, 9])
    >>> estimate.value, estimate.n, estimate.n_clusters
    (0.6, 10, 2)
    """
    numerators, denominators = _paired(numerators, denominators)
    counted = denominators != 0
    estimate = bootstrap_over_prompts(
        lambda top, bottom, axis: top.sum(axis) / bottom.sum(axis),
        numerators[counted],
        denominators[counted],
        n_resamples=n_resamples,
    )
    return replace(estimate, n=int(denominators[counted].sum()))


class Stratum(NamedTuple):
    """Of N prompts that are resampled by themselves, a score: sum_c weights_c * sum_n tops_nc / sum_n bottoms_nc.

    Shapes: weights `[C]`, tops and bottoms `[N, C]`. A bottom of 0 leaves a prompt out of one ratio, so that ratios of
    different prompts (rows of two kinds, pairs of rows) stand in one score.

    >>> two_kinds = Stratum(np.array([0.6, 0.4]), np.array([[1.0, 0], [0, 0], [0, 1]]), np.array([[1.0, 0], [1, 0], [0, 1]]))
    >>> round(float(two_kinds.score(np.arange(3))), 9)  # .6 * 1/2 + .4 * 1/1
    0.7
    """

    weights: NDArray
    tops: NDArray
    bottoms: NDArray

    @classmethod
    def mean(cls, columns: ArrayLike, weights: ArrayLike = (1.0,)) -> "Stratum":
        """sum_c weights_c * mean over prompts of columns `[N, C]` (or `[N]`)."""
        columns = np.asarray(columns, dtype=float).reshape(len(columns), -1)
        return cls(np.asarray(weights, dtype=float), columns, np.ones_like(columns))

    def score(self, prompts: NDArray) -> NDArray:
        """Of the prompts with these numbers `[..., N]`, one score for each of the leading axes."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.tops[prompts].sum(-2) / self.bottoms[prompts].sum(-2) @ self.weights


def mean_over_strata(strata: Sequence[Stratum], *, n_resamples: int = 2000) -> Estimate:
    """Mean of the scores of several strata, each weighing the same whatever its size; prompts are resampled within each.

        value = 1/S sum_s score_s   (stratified bootstrap: Davison and Hinkley 1997, section 3.2)

    `n` and `n_clusters` count the prompts of all strata. NaN where a stratum has no score; no interval where one has
    fewer than two prompts.

    >>> easy, hard = Stratum.mean([1.0, 1.0, 1.0, 0.0]), Stratum.mean([0.0, 1.0])
    >>> mean_over_strata([easy, hard]).value, mean_over_strata([easy, hard]).n  # .75 and .5
    (0.625, 6)
    """
    numbers = [np.arange(len(stratum.tops)) for stratum in strata]
    total = sum(map(len, numbers))

    def statistic(*chosen: NDArray, axis: int = -1) -> NDArray:
        return np.mean([s.score(i.astype(int)) for s, i in zip(strata, chosen, strict=True)], axis=0)

    value = float(statistic(*numbers)) if numbers and all(map(len, numbers)) else np.nan
    if not np.isfinite(value) or min(map(len, numbers)) < 2:
        return Estimate(value, np.nan, np.nan, total, total)
    with warnings.catch_warnings():
        # A resample in which a ratio has no prompt: there is no interval then.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        interval = bootstrap(
            numbers,
            statistic,
            n_resamples=n_resamples,
            batch=max(1, 250_000 // total),
            vectorized=True,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high), total, total)


def mean_estimate(x: ArrayLike) -> Estimate:
    """Mean of one number per prompt, sum(x) / N. Raises as `bootstrap_over_prompts`.

    >>> mean_estimate([1.0, 1.0, 4.0]).value
    2.0
    """
    return bootstrap_over_prompts(np.mean, x)


def paired_difference(a: ArrayLike, b: ArrayLike) -> Estimate:
    """Mean of a - b over the same prompts; the interval is that of the difference. Raises as `bootstrap_over_prompts`.

    >>> print(paired_difference([5.0, 2.0, 9.0], [4.0, 1.0, 8.0]))  # always better by one
    1.000 [1.000, 1.000]
    """
    a, b = _paired(a, b)
    return mean_estimate(a - b)


def win_rate(a: ArrayLike, b: ArrayLike) -> Estimate:
    """Share of prompts on which a's score is higher than b's, an equal score counting one half.

        value = sum over prompts of (1 if a > b, 0.5 if a = b, 0 if a < b) / N

    Both are N scores under one judge, on the same prompts. Raises as `bootstrap_over_prompts`.

    >>> win_rate([2.0, 1.0, 0.0, 3.0], [1.0, 1.0, 1.0, 1.0]).value  # won, tied, lost, won
    0.625
    """
    a, b = _paired(a, b)
    return mean_estimate((1 + np.sign(a - b)) / 2)


def _paired(a: ArrayLike, b: ArrayLike) -> tuple[NDArray, NDArray]:
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.ndim != 1 or a.shape != b.shape:
        raise UserError(f"expected one number per prompt from both, got shapes {a.shape} and {b.shape}")
    return a, b
