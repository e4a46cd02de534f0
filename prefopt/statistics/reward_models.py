"""What is asked of a reward model beyond `prefopt.statistics.rankings`: ties, calibration, length.

Everything is about pairs of completions of one prompt; intervals resample prompts.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import spearmanr

from prefopt.statistics.intervals import Estimate, mean_estimate, ratio_of_sums
from prefopt.statistics.rankings import CALIBRATION_BINS, Pairs, calibration_gaps, pairs_right, ranking_metrics

MATCHED = 0.1  # lengths that differ by at most a tenth of the longer one

Rows = Sequence[Sequence[float]]


def reward_measures(
    scores: Rows, ranks: Sequence[Sequence[int]], lengths: Rows, *, n_resamples: int = 2000
) -> dict[str, Estimate]:
    """The measures of `ranking_metrics` (of `accuracy_gap_G` also), and

    | name | over | definition |
    |---|---|---|
    | `calibration_slope` | pairs | `calibration_slope` |
    | `tie_accuracy` | pairs | `tie_calibrated` |
    | `margin_untied`, `margin_tied` | pairs | mean difference of the scores, its sign dropped |
    | `accuracy_length_matched` | pairs | accuracy where the lengths differ by at most a tenth of the longer one |
    | `length_correlation` | prompts | `length_correlation` of the scores |

    Per prompt there are K scores, K ranks (1 = best, equal = tie) and K lengths in tokens.

    >>> found = reward_measures([[3.0, 1.0, 0.5], [1.0, 2.0]], [[1, 2, 2], [1, 2]], [[5, 5, 9], [4, 4]])
    >>> found["accuracy_length_matched"].value, found["accuracy_length_matched"].n  # right, wrong
    (0.5, 2)
    >>> found["margin_tied"].value, round(found["margin_untied"].value, 6)
    (0.5, 1.833333)
    """
    found = ranking_metrics(scores, ranks, n_resamples=n_resamples)
    pairs = Pairs.of(ranks)
    leads, right = pairs.leads(scores), pairs_right(pairs.leads(scores))
    matched = length_matched(pairs, lengths)
    return found | {
        "calibration_slope": calibration_slope(pairs, scores, n_resamples=n_resamples),
        "tie_accuracy": tie_calibrated(pairs, scores, n_resamples=n_resamples)[0],
        "margin_untied": pairs.mean(np.abs(leads), pairs.strict, n_resamples),
        "margin_tied": pairs.mean(np.abs(leads), pairs.tied, n_resamples),
        "accuracy_length_matched": pairs.mean(right, matched, n_resamples),
        "length_correlation": length_correlation(scores, lengths),
    }


def length_matched(pairs: Pairs, lengths: Rows) -> NDArray:
    """Strict pairs `[P]` whose lengths differ by at most a tenth of the longer one."""
    table = pairs.table(lengths, "lengths")
    a, b = table[pairs.prompt, pairs.better], table[pairs.prompt, pairs.worse]
    return pairs.strict & (np.abs(a - b) <= MATCHED * np.maximum(a, b))


def majority_accuracy(pairs: Pairs) -> Estimate:
    """Accuracy of the better one of two rules that see no text: the first completion wins, the last one wins."""
    first = (pairs.better < pairs.worse).astype(float)
    always_first = first[pairs.strict].mean() >= 0.5 if pairs.strict.any() else True
    return pairs.mean(first if always_first else 1 - first, pairs.strict)


def longer_wins_accuracy(pairs: Pairs, lengths: Rows) -> Estimate:
    """Accuracy of preferring the longer completion; equal lengths count half (arXiv:2310.03716)."""
    return pairs.mean(pairs_right(pairs.leads(lengths)), pairs.strict)


def accuracy_difference(pairs: Pairs, a: Rows, b: Rows) -> Estimate:
    """Accuracy by the scores a minus that by the scores b, on the same pairs."""
    return pairs.mean(pairs_right(pairs.leads(a)) - pairs_right(pairs.leads(b)), pairs.strict)


def calibration_slope(pairs: Pairs, scores: Rows, n_resamples: int = 2000) -> Estimate:
    """By what the margins would have to be multiplied to be calibrated (Cox 1958, without an intercept).

        slope = argmax_k sum over strict pairs of log sigmoid(k * (s_w - s_l))

    1 is calibrated, below 1 too sure, above 1 not sure enough. Each resample takes one Newton step from the slope of all
    pairs: its interval needs no refitting. NaN where the pairs are separable (all right, or all wrong).

    A model whose margins are all log 4 (4 : 1 for the better), right in 2 of 3 pairs (2 : 1): half of its margins.

    >>> scores, ranks = [[np.log(4), 0.0]] * 3, [[1, 2], [1, 2], [2, 1]]
    >>> round(calibration_slope(Pairs.of(ranks), scores).value, 6)
    0.5
    """
    leads = pairs.leads(scores)[pairs.strict]
    prompt = pairs.prompt[pairs.strict]
    if not (leads > 0).any() or not (leads < 0).any():
        return Estimate(np.nan, np.nan, np.nan, len(leads), len(np.unique(prompt)))

    def gradient(slope: float) -> float:
        return float(leads @ expit(-slope * leads))

    reach = 1 / np.abs(leads).max()
    while gradient(-reach) * gradient(reach) > 0:
        reach *= 2
    slope = brentq(gradient, -reach, reach, xtol=1e-12)
    p = expit(slope * leads)
    parts = (leads * (1 - p), leads**2 * p * (1 - p))
    sums = (np.bincount(prompt, part, minlength=len(pairs.ranks)) for part in parts)
    step = ratio_of_sums(*sums, n_resamples=n_resamples)
    low, high = (slope + end - step.value for end in (step.ci_low, step.ci_high))
    return replace(step, value=slope, ci_low=low, ci_high=high, n=len(leads))


def tie_calibrated(pairs: Pairs, scores: Rows, n_resamples: int = 2000) -> tuple[Estimate, float]:
    """Accuracy on all pairs, ties included, and the width below which the model is read as saying "tied".

        max over widths w of [tied pairs with |s_i - s_j| <= w + strict pairs with s_w - s_l > w] / pairs
        (Deutsch et al. 2023, arXiv:2305.14324, tie calibration: the width is chosen on the same pairs)

    The interval keeps the width. A width of -1 reads no pair as tied.

    >>> estimate, width = tie_calibrated(Pairs.of([[1, 2, 2], [1, 2]]), [[3.0, 1.0, 0.5], [2.0, 1.0]])
    >>> estimate.value, width  # the tied pair differs by 0.5, the strict ones by 2, 2.5 and 1
    (1.0, 0.5)
    """
    leads = pairs.leads(scores)
    if not len(leads):
        return Estimate(np.nan, np.nan, np.nan, 0, 0), -1.0
    order = np.argsort(np.abs(leads), kind="stable")
    widths = np.abs(leads)[order]
    right = (pairs.strict & (leads > 0))[order]
    hits = np.append(right.sum(), np.cumsum(pairs.tied[order]) + right.sum() - np.cumsum(right))
    last_of_equals = np.append(True, np.append(widths[1:] > widths[:-1], True))
    best = int(np.argmax(np.where(last_of_equals, hits, -1)))
    width = -1.0 if best == 0 else float(widths[best - 1])
    said_tied = np.abs(leads) <= width
    hit = np.where(pairs.tied, said_tied, ~said_tied & (leads > 0)).astype(float)
    return pairs.mean(hit, np.ones(len(leads), dtype=bool), n_resamples), width


def reliability(pairs: Pairs, scores: Rows, n_resamples: int = 2000) -> list[dict[str, float]]:
    """Bins of the reliability diagram: mean confidence, accuracy with its interval, number of pairs.

    The bins are those of the expected calibration error (`prefopt.statistics.rankings.calibration_gaps`).
    """
    leads = pairs.leads(scores)
    bins = np.full(len(leads), -1)
    bins[pairs.strict], _ = calibration_gaps(leads[pairs.strict])
    found = []
    for b in range(CALIBRATION_BINS):
        chosen = bins == b
        if chosen.any():
            accuracy = pairs.mean(pairs_right(leads), chosen, n_resamples)
            found.append(
                {
                    "confidence": float(expit(np.abs(leads[chosen])).mean()),
                    "accuracy": accuracy.value,
                    "ci_low": accuracy.ci_low,
                    "ci_high": accuracy.ci_high,
                    "n": accuracy.n,
                }
            )
    return found


def length_correlation(values: Rows, lengths: Rows) -> Estimate:
    """Mean over prompts of Spearman's correlation of values and lengths among the completions of the prompt.

    Prompts where either does not vary have none and are left out.

    >>> length_correlation([[1.0, 2.0, 3.0], [5.0, 5.0]], [[4, 6, 9], [1, 2]]).value
    1.0
    """
    varied = [(v, n) for v, n in zip(values, lengths, strict=True) if len(set(v)) > 1 and len(set(n)) > 1]
    return mean_estimate([spearmanr(v, n).statistic for v, n in varied])
