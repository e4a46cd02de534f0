"""What is asked of a reward model beyond `prefopt.statistics.rankings`: ties, calibration, length, agreement of labelers.

Everything is about pairs of completions of one prompt; intervals resample prompts.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import spearmanr

from prefopt.statistics.intervals import Estimate, mean_estimate, ratio_of_sums
from prefopt.statistics.rankings import CALIBRATION_BINS, calibration_gaps, pairs_right, ranking_metrics

MATCHED = 0.1  # lengths that differ by at most a tenth of the longer one

Rows = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Pairs:
    """All pairs of completions of the same prompt: indices `[P]` into the flattened completions.

    `better` is the one ranked above `worse`; of a tied pair, the one that comes first in its row.
    """

    prompt: NDArray
    better: NDArray
    worse: NDArray
    tied: NDArray
    num_prompts: int

    @classmethod
    def of(cls, ranks: Sequence[Sequence[int]]) -> "Pairs":
        """The pairs in rows of ranks (1 = best, equal = tie, below 1 = absent).

        Example:
            >>> pairs = Pairs.of([[1, 2, 2], [2, 1]])
            >>> [*zip(pairs.better.tolist(), pairs.worse.tolist(), pairs.tied.tolist())]
            [(0, 1, False), (0, 2, False), (1, 2, True), (4, 3, False)]
        """
        found, start = [], 0
        for prompt, row in enumerate(ranks):
            for i, j in combinations(range(len(row)), 2):
                if min(row[i], row[j]) >= 1:
                    better, worse = (i, j) if row[i] <= row[j] else (j, i)
                    found.append((prompt, start + better, start + worse, row[i] == row[j]))
            start += len(row)
        prompt, better, worse, tied = np.array(found, dtype=int).reshape(-1, 4).T
        return cls(prompt, better, worse, tied.astype(bool), len(ranks))

    @cached_property
    def strict(self) -> NDArray:
        return ~self.tied

    def leads(self, values: Rows) -> NDArray:
        """`[P]`: value of the better completion minus that of the worse."""
        flat = np.concatenate([np.asarray(row, dtype=float) for row in values]) if len(values) else np.zeros(0)
        return flat[self.better] - flat[self.worse]

    def mean(self, values: NDArray, chosen: NDArray, n_resamples: int = 2000) -> Estimate:
        """Mean over the chosen pairs, every pair weighing the same."""
        return ratio_of_sums(
            self.per_prompt(values * chosen), self.per_prompt(chosen.astype(float)), n_resamples=n_resamples
        )

    def per_prompt(self, values: NDArray) -> NDArray:
        return np.bincount(self.prompt, values, minlength=self.num_prompts)


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

    Args:
        scores: per prompt, K scores.
        ranks: per prompt, K whole numbers, 1 = best, equal = tie.
        lengths: per prompt, K lengths in tokens.
        n_resamples: number of bootstrap resamples.

    Example:
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
    flat = np.concatenate([np.asarray(row, dtype=float) for row in lengths]) if len(lengths) else np.zeros(0)
    a, b = flat[pairs.better], flat[pairs.worse]
    return pairs.strict & (np.abs(a - b) <= MATCHED * np.maximum(a, b))


def majority_accuracy(pairs: Pairs, n_resamples: int = 2000) -> Estimate:
    """Accuracy of the better one of two rules that see no text: the first completion wins, the last one wins."""
    first = (pairs.better < pairs.worse).astype(float)
    always_first = first[pairs.strict].mean() >= 0.5 if pairs.strict.any() else True
    return pairs.mean(first if always_first else 1 - first, pairs.strict, n_resamples)


def longer_wins_accuracy(pairs: Pairs, lengths: Rows, n_resamples: int = 2000) -> Estimate:
    """Accuracy of preferring the longer completion; equal lengths count half (arXiv:2310.03716)."""
    return pairs.mean(pairs_right(pairs.leads(lengths)), pairs.strict, n_resamples)


def accuracy_difference(pairs: Pairs, a: Rows, b: Rows) -> Estimate:
    """Accuracy by the scores a minus that by the scores b, on the same pairs."""
    return pairs.mean(pairs_right(pairs.leads(a)) - pairs_right(pairs.leads(b)), pairs.strict)


def calibration_slope(pairs: Pairs, scores: Rows, n_resamples: int = 2000) -> Estimate:
    """By what the margins would have to be multiplied to be calibrated (Cox 1958, without an intercept).

        slope = argmax_k sum over strict pairs of log sigmoid(k * (s_w - s_l))

    1 is calibrated, below 1 too sure, above 1 not sure enough. Each resample takes one Newton step from the slope of all
    pairs: its interval needs no refitting. NaN where the pairs are separable (all right, or all wrong).

    Example:
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
    step = ratio_of_sums(
        np.bincount(prompt, leads * (1 - p), minlength=pairs.num_prompts),
        np.bincount(prompt, leads**2 * p * (1 - p), minlength=pairs.num_prompts),
        n_resamples=n_resamples,
    )
    return replace(
        step,
        value=slope,
        ci_low=slope + step.ci_low - step.value,
        ci_high=slope + step.ci_high - step.value,
        n=len(leads),
    )


def tie_calibrated(pairs: Pairs, scores: Rows, n_resamples: int = 2000) -> tuple[Estimate, float]:
    """Accuracy on all pairs, ties included, and the width below which the model is read as saying "tied".

        max over widths w of [tied pairs with |s_i - s_j| <= w + strict pairs with s_w - s_l > w] / pairs
        (Deutsch et al. 2023, arXiv:2305.14324, tie calibration: the width is chosen on the same pairs)

    The interval keeps the width. A width of -1 reads no pair as tied.

    Example:
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

    Example:
        >>> length_correlation([[1.0, 2.0, 3.0], [5.0, 5.0]], [[4, 6, 9], [1, 2]]).value
        1.0
    """
    varied = [(v, n) for v, n in zip(values, lengths, strict=True) if len(set(v)) > 1 and len(set(n)) > 1]
    return mean_estimate([spearmanr(v, n).statistic for v, n in varied])


def labeler_agreement(rows_by_group: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[tuple[str, str], Estimate]:
    """How often labelers agree, within each group and between two: the ceiling of a reward model's accuracy.

        pairs ordered the same way / pairs that neither of two labelers ties   (InstructGPT, section 3.4)

    Counted over every two labelers who ranked the same completions of a prompt; a pair of groups without any is left
    out. Intervals resample prompts.

    Example:
        >>> row = {"prompt": "p", "completions": ["a", "b", "c"]}
        >>> rows = {"train": [row | {"ranks": [1, 2, 3]}], "heldout": [row | {"ranks": [2, 1, 2]}]}
        >>> found = labeler_agreement(rows)
        >>> found["train", "heldout"].value, found["train", "heldout"].n, len(found)
        (0.5, 2, 1)
    """
    by_prompt: dict[str, dict[str, list[NDArray]]] = defaultdict(lambda: defaultdict(list))
    for group, rows in rows_by_group.items():
        for row in rows:
            key = json.dumps([row["prompt"], list(row["completions"])])
            ranks = np.asarray(row["ranks"])
            by_prompt[key][group].append(np.sign(ranks[None, :] - ranks[:, None]))
    groups = [*rows_by_group]
    found = {}
    for g, h in [*((g, g) for g in groups), *combinations(groups, 2)]:
        same, untied = [], []
        for orders in by_prompt.values():
            both = combinations(orders[g], 2) if g == h else product(orders[g], orders[h])
            products = [a * b for a, b in both]
            # // 2: a pair stands on both sides of the diagonal
            same.append(sum(int((p > 0).sum()) // 2 for p in products))
            untied.append(sum(int((p != 0).sum()) // 2 for p in products))
        if any(untied):
            found[g, h] = ratio_of_sums(same, untied)
    return found
