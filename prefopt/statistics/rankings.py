"""Measures of scores against rankings, each with a 95 % interval from a bootstrap over prompts.

A strict pair (w, l) is two completions of one prompt of which the labeler ranked w above l. Its lead is s_w - s_l, the
score of the better minus that of the worse, and a reward model gives it the probability sigmoid(lead) (Bradley-Terry).
All pairs are found once; every measure is a sum over them or a number per prompt.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, log_expit

from prefopt.errors import UserError
from prefopt.statistics.intervals import Estimate, bootstrap_over_prompts, ratio_of_sums

CALIBRATION_BINS = 10


def ranking_metrics(
    scores: Sequence[ArrayLike],
    ranks: Sequence[ArrayLike],
    *,
    lengths: Sequence[ArrayLike] | None = None,
    labelers: Sequence[str | None] | None = None,
    n_resamples: int = 2000,
) -> dict[str, Estimate]:
    """How well scores follow rankings: order, calibration, and where they fail.

    | name | over | definition |
    |---|---|---|
    | `accuracy` | pairs | `pairs_right`, every pair weighing the same (InstructGPT, appendix C.2 and E.2) |
    | `accuracy_per_prompt` | prompts | mean of `pairs_right` within the prompt, as the loss weighs them (Eq. 1) |
    | `top1` | prompts | `top1` |
    | `kendall_tau` | prompts | `kendall_tau`, where it is defined |
    | `brier` | pairs | `brier_scores` |
    | `nll` | pairs | `negative_log_likelihoods` |
    | `ece` | pairs | sum over bins of abs(sum of `calibration_gaps`) / pairs |
    | `accuracy_gap_G` | pairs | accuracy where the ranks differ by G (Llama 2, arXiv:2307.09288, Table 8) |
    | `accuracy_labeler_NAME` | pairs | accuracy on the prompts of one labeler group (InstructGPT, appendix E.2) |
    | `accuracy_longer_wins` | pairs | accuracy of preferring the longer completion (arXiv:2310.03716) |

    `n` of an estimate counts what the table says, `n_clusters` prompts; those without a strict pair count in none.

    Args:
        scores: per prompt, K scores (K may differ from prompt to prompt).
        ranks: per prompt, K whole numbers, 1 = best, equal = tie, below 1 = absent.
        lengths: per prompt, K lengths; adds `accuracy_longer_wins`.
        labelers: per prompt, the labeler (or the group); adds `accuracy_labeler_NAME`. None belongs to no group.

    Raises:
        UserError: lengths differ, the score or length of a ranked completion is not finite, or a rank is not a whole
            number; the message names the prompt.

    >>> scores, ranks = [[3.0, 2.0, 1.0], [0.0, 5.0]], [[1, 2, 2], [1, 2]]
    >>> found = ranking_metrics(scores, ranks, lengths=[[9, 9, 4], [2, 7]], labelers=["ann", "bob"])
    >>> {name: round(estimate.value, 3) for name, estimate in found.items() if name.startswith("accuracy")}
    ... # doctest: +NORMALIZE_WHITESPACE
    {'accuracy': 0.667, 'accuracy_per_prompt': 0.5, 'accuracy_gap_1': 0.667, 'accuracy_labeler_ann': 1.0,
     'accuracy_labeler_bob': 0.0, 'accuracy_longer_wins': 0.5}
    >>> found["accuracy"].n, found["accuracy"].n_clusters, found["top1"].value
    (3, 2, 0.5)
    """
    pairs = Pairs.of(ranks)
    ranks, scores = pairs.ranks, pairs.table(scores, "scores")
    strict, prompt, leads = pairs.strict, pairs.prompt[pairs.strict], pairs.differences(scores)
    right = pairs_right(leads)
    num_pairs = pairs.per_prompt(strict)
    ranked = num_pairs > 0

    def over_pairs(values: NDArray, chosen: NDArray = strict) -> Estimate:
        return pairs.mean(values, chosen, n_resamples)

    def over_prompts(values: NDArray) -> Estimate:
        return bootstrap_over_prompts(np.mean, values, n_resamples=n_resamples)

    tau = kendall_tau(scores[ranked], ranks[ranked])
    bins, gaps = calibration_gaps(leads[strict])
    gap_sums = [np.bincount(prompt, gaps * (bins == b), minlength=len(ranks))[ranked] for b in np.unique(bins)]
    ece = bootstrap_over_prompts(_expected_calibration_error, num_pairs[ranked], *gap_sums, n_resamples=n_resamples)

    estimates = {
        "accuracy": over_pairs(right),
        "accuracy_per_prompt": over_prompts(pairs.per_prompt(right * strict)[ranked] / num_pairs[ranked]),
        "top1": over_prompts(top1(scores[ranked], ranks[ranked])),
        "kendall_tau": over_prompts(tau[~np.isnan(tau)]),
        "brier": over_pairs(brier_scores(leads)),
        "nll": over_pairs(negative_log_likelihoods(leads)),
        "ece": replace(ece, n=len(prompt)),
    }
    rank_gaps = -pairs.differences(ranks)
    for gap in np.unique(rank_gaps[strict]):
        estimates[f"accuracy_gap_{gap}"] = over_pairs(right, rank_gaps == gap)
    for name, members in _groups(labelers, len(ranks)).items():
        estimates[f"accuracy_labeler_{name}"] = over_pairs(right, strict & np.isin(pairs.prompt, members))
    if lengths is not None:
        estimates["accuracy_longer_wins"] = over_pairs(pairs_right(pairs.leads(lengths, "lengths")))
    return estimates


@dataclass(frozen=True)
class Pairs:
    """All pairs of completions of the same prompt: the prompt and the places in its row, `[P]` each.

    `better` is the one ranked above `worse`; of a tied pair, the one that comes first in its row. `ranks` is `[N, K]`,
    below 1 = absent.

    >>> pairs = Pairs.of([[1, 2, 2], [2, 1]])
    >>> [*zip(pairs.prompt.tolist(), pairs.better.tolist(), pairs.worse.tolist(), pairs.tied.tolist())]
    [(0, 0, 1, False), (0, 0, 2, False), (0, 1, 2, True), (1, 1, 0, False)]
    """

    ranks: NDArray
    widths: Sequence[int]
    prompt: NDArray
    better: NDArray
    worse: NDArray

    @classmethod
    def of(cls, ranks: Sequence[ArrayLike]) -> "Pairs":
        """The pairs in rows of ranks (1 = best, equal = tie, below 1 = absent)."""
        widths = [len(row) for row in ranks]
        table = _whole(_padded(ranks, widths, "ranks"))
        first, second = np.triu_indices(table.shape[1], k=1)
        a, b = table[:, first], table[:, second]
        prompt, pair = np.nonzero((a >= 1) & (b >= 1))
        first, second, in_order = first[pair], second[pair], (a <= b)[prompt, pair]
        return cls(table, widths, prompt, np.where(in_order, first, second), np.where(in_order, second, first))

    @cached_property
    def tied(self) -> NDArray:
        return self.differences(self.ranks) == 0

    @cached_property
    def strict(self) -> NDArray:
        return ~self.tied

    def table(self, rows: Sequence[ArrayLike], name: str) -> NDArray:
        """`[N, K]` from a value for each completion, 0 at absent ones, whose own may be anything."""
        values = np.where(self.ranks >= 1, _padded(rows, self.widths, name), 0.0)
        for prompt in np.flatnonzero(~np.isfinite(values).all(axis=1)):
            got = values[prompt].tolist()
            raise UserError(f"prompt {prompt}: {name} of ranked completions must be finite, got {got}")
        return values

    def differences(self, table: NDArray) -> NDArray:
        """`[P]`: value of the better completion minus that of the worse."""
        return table[self.prompt, self.better] - table[self.prompt, self.worse]

    def leads(self, values: Sequence[ArrayLike], name: str = "values") -> NDArray:
        """The `differences` of rows of values."""
        return self.differences(self.table(values, name))

    def per_prompt(self, values: NDArray) -> NDArray:
        return np.bincount(self.prompt, values, minlength=len(self.ranks))

    def mean(self, values: NDArray, chosen: NDArray, n_resamples: int = 2000) -> Estimate:
        """Mean over the chosen pairs, every pair weighing the same."""
        return ratio_of_sums(self.per_prompt(values * chosen), self.per_prompt(chosen), n_resamples=n_resamples)


def pair_accuracy(scores: Sequence[ArrayLike], ranks: Sequence[ArrayLike]) -> Estimate:
    """Share of the strictly ranked pairs that the scores order as the labeler did (InstructGPT section 3.5, C.2).

        value = sum over prompts and strict pairs (w, l) of (1 if s_w > s_l, 0.5 if equal, 0 otherwise) / n

    The `accuracy` of `ranking_metrics`: n counts pairs (each weighs the same), n_clusters prompts that have one.

    >>> estimate = pair_accuracy([[3.0, 2.0, 1.0], [0.0, 5.0]], [[1, 2, 2], [1, 2]])
    >>> estimate.value == (2 + 0) / (2 + 1), estimate.n, estimate.n_clusters
    (True, 3, 2)
    """
    pairs = Pairs.of(ranks)
    return pairs.mean(pairs_right(pairs.leads(scores, "scores")), pairs.strict)


def flatten(estimates: Mapping[str, Estimate], prefix: str = "") -> dict[str, float]:
    """Plain numbers for a log: NAME, NAME_ci_low and NAME_ci_high, those that are NaN left out.

    >>> flatten({"top1": Estimate(0.5, 0.25, 0.75, n=4, n_clusters=4)}, prefix="eval_")
    {'eval_top1': 0.5, 'eval_top1_ci_low': 0.25, 'eval_top1_ci_high': 0.75}
    >>> flatten({"top1": Estimate(0.5, np.nan, np.nan, n=1, n_clusters=1)})
    {'top1': 0.5}
    """
    numbers = {}
    for name, estimate in estimates.items():
        numbers[f"{prefix}{name}"] = estimate.value
        numbers[f"{prefix}{name}_ci_low"] = estimate.ci_low
        numbers[f"{prefix}{name}_ci_high"] = estimate.ci_high
    return {name: number for name, number in numbers.items() if not np.isnan(number)}


def pairs_right(leads: NDArray) -> NDArray:
    """Whether each pair is ordered as the labeler did; equal scores count one half (InstructGPT, section 3.5).

        1 if s_w > s_l, 0.5 if s_w = s_l, 0 otherwise

    >>> pairs_right(np.array([2.0, 0.0, -1.0])).tolist()
    [1.0, 0.5, 0.0]
    """
    return (1 + np.sign(leads)) / 2


def brier_scores(leads: NDArray) -> NDArray:
    """Squared error of the probability that the better completion wins (Brier 1950, for one of two outcomes).

        (1 - sigmoid(s_w - s_l))^2, 0.25 for a model that knows nothing, whichever completion comes first

    >>> brier_scores(np.array([0.0, np.log(4)])).round(6).tolist()  # probabilities 1/2 and 4/5
    [0.25, 0.04]
    """
    return expit(-leads) ** 2


def negative_log_likelihoods(leads: NDArray) -> NDArray:
    """Minus log likelihood of each pair in nats (InstructGPT Eq. 1; Bradley and Terry 1952).

        -log sigmoid(s_w - s_l), log 2 for a model that knows nothing

    >>> negative_log_likelihoods(np.array([0.0, -800.0])).round(6).tolist()
    [0.693147, 800.0]
    """
    return -log_expit(leads)


def calibration_gaps(leads: NDArray) -> tuple[NDArray, NDArray]:
    """Bin and right - confidence of each pair, from which the expected calibration error is summed.

        ECE = sum over bins b of n_b / n * |accuracy_b - confidence_b| = sum_b |sum over pairs in b of gap| / n
        (Guo et al. 2017, arXiv:1706.04599, Eq. 3), confidence = sigmoid(|s_w - s_l|)

    The prediction of a pair is the completion with the higher score, so its confidence lies in [1/2, 1]: ten bins of
    equal mass, as of equal width most pairs of an unsure model would fall into the first one, whose mean hides their
    errors. Oriented by the labels instead, every doubt would be an error; by the order in the row, chance.

    With finite data the ECE of a perfectly calibrated model is above 0, and resampling adds to that: its interval holds
    the truth in 95 of 100 cases where the error is clear, and lies too high where it is close to 0.

    Returns:
        bins: `[P]` in 0..9.  gaps: `[P]`, 1 - confidence if right, -confidence if wrong, 0 for equal scores.

    >>> bins, gaps = calibration_gaps(np.log([4.0, 0.25, 1.0]))  # sure by 4 to 1, rightly and wrongly; undecided
    >>> bins.tolist(), gaps.round(6).tolist()
    ([9, 9, 3], [0.2, -0.8, 0.0])
    """
    confidences = expit(np.abs(leads))
    if not len(confidences):
        return np.zeros(0, dtype=int), confidences
    first_of_bins = len(confidences) * np.arange(1, CALIBRATION_BINS) // CALIBRATION_BINS
    bins = np.searchsorted(np.sort(confidences)[first_of_bins], confidences, side="right")
    return bins, pairs_right(leads) - confidences


def _expected_calibration_error(num_pairs: NDArray, *gap_sums: NDArray, axis: int) -> NDArray:
    return sum(np.abs(g.sum(axis)) for g in gap_sums) / num_pairs.sum(axis)


def top1(scores: NDArray, ranks: NDArray) -> NDArray:
    """Whether the completion with the highest score is among those ranked best: what best-of-K sampling needs.

        |argmax s and best ranked| / |argmax s|: a draw between equal scores (cf. RewardBench 2, arXiv:2506.01937)

    `[N]` from scores `[N, K]` and ranks `[N, K]`, below 1 = absent; every prompt has a completion.

    >>> top1(np.array([[2.0, 2.0, 1.0]]), np.array([[1, 2, 3]])).tolist()
    [0.5]
    """
    present = ranks >= 1
    scores = np.where(present, scores, -np.inf)
    highest = present & (scores == scores.max(axis=1, keepdims=True))
    best = ranks == np.where(present, ranks, np.iinfo(ranks.dtype).max).min(axis=1, keepdims=True)
    return (highest & best).sum(axis=1) / highest.sum(axis=1)


def kendall_tau(scores: NDArray, ranks: NDArray) -> NDArray:
    """Rank correlation tau-b of each prompt (Kendall 1945, Biometrika 33, 239-251).

        tau_b = (concordant - discordant pairs) / sqrt(pairs untied in scores * pairs untied in ranks)

    `[N]` in [-1, 1] from scores `[N, K]` and ranks `[N, K]`, below 1 = absent; NaN where all scores or all ranks are equal.

    >>> kendall_tau(np.array([[3.0, 2.0, 1.0], [1.0, 1.0, 1.0]]), np.array([[1, 3, 2], [1, 2, 3]])).round(6)
    array([0.333333,      nan])
    """
    first, second = np.triu_indices(ranks.shape[1], k=1)
    both = (ranks[:, first] >= 1) & (ranks[:, second] >= 1)
    by_scores = np.sign(np.subtract(scores[:, first], scores[:, second], where=both, out=np.zeros(both.shape)))
    by_ranks = np.where(both, np.sign(ranks[:, second] - ranks[:, first]), 0)
    with np.errstate(invalid="ignore"):
        tau = (
            (by_scores * by_ranks).sum(axis=1)
            / np.sqrt(abs(by_scores).sum(axis=1))
            / np.sqrt(abs(by_ranks).sum(axis=1))
        )
    return tau.clip(-1.0, 1.0)


def _groups(labelers: Sequence[str | None] | None, num_prompts: int) -> dict[str, list[int]]:
    if labelers is None:
        return {}
    if len(labelers) != num_prompts:
        raise UserError(f"expected one labeler per prompt, got {len(labelers)} for {num_prompts} prompts")
    groups = defaultdict(list)
    for prompt, name in enumerate(labelers):
        if name is not None:
            # "ann_ci_low" would overwrite the interval of "ann"
            reserved = str(name).rstrip("_").endswith(("_ci_low", "_ci_high"))
            groups[f"{name}_" if reserved else str(name)].append(prompt)
    return dict(sorted(groups.items()))


def _padded(rows: Sequence[ArrayLike], widths: Sequence[int], name: str) -> NDArray:
    """`[N, K]` with K >= 1, filled up with 0, from rows of the given widths."""
    if len(rows) != len(widths):
        raise UserError(f"expected the same prompts in ranks and {name}, got {len(widths)} and {len(rows)}")
    table = np.zeros((len(widths), max([1, *widths])))
    for prompt, (row, width) in enumerate(zip(rows, widths, strict=True)):
        row = np.asarray(row, dtype=float)
        if row.shape != (width,):
            raise UserError(f"prompt {prompt}: expected {width} {name}, one for each rank, got shape {row.shape}")
        table[prompt, :width] = row
    return table


def _whole(ranks: NDArray) -> NDArray:
    for prompt in np.flatnonzero(~(np.isfinite(ranks) & (ranks == np.round(ranks))).all(axis=1)):
        raise UserError(f"prompt {prompt}: ranks must be whole numbers, got {ranks[prompt].tolist()}")
    return ranks.astype(np.int64)
