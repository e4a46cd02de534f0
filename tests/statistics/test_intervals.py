"""Point estimates against loops; intervals by their coverage, not by their code."""

import dataclasses
import inspect
import math
import time

import numpy as np
import pytest

from prefopt.statistics import intervals as metrics
from prefopt.statistics.intervals import Estimate, bootstrap_over_prompts, mean_estimate, paired_difference, win_rate
from prefopt.statistics.rankings import pair_accuracy


def random_prompts(rng: np.random.Generator, prompts: int = 40) -> tuple[list, list]:
    """Scores with equal ones, and a ranking with ties and absent completions, of two to nine completions."""
    sizes = rng.integers(2, 10, size=prompts)
    scores = [rng.integers(-3, 4, size=k).astype(float).tolist() for k in sizes]
    return scores, [rng.integers(0, 6, size=k).tolist() for k in sizes]


def correlated_prompts(rng: np.random.Generator, prompts: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores `[N, 5]` that follow the ranks 1..5 on some prompts and defy them on others."""
    ranks = np.tile(np.arange(1, 6), (prompts, 1))
    slope = rng.normal(0.5, 1.0, size=(prompts, 1))
    return rng.normal(size=(prompts, 5)) - slope * ranks, ranks


# Point estimates


def test_pair_accuracy_equals_the_loop():
    scores, ranks = random_prompts(np.random.default_rng(0))
    right, pairs, prompts = 0.0, 0, set()
    for prompt, (s, r) in enumerate(zip(scores, ranks, strict=True)):
        for w in range(len(s)):
            for loser in range(len(s)):
                if 0 < r[w] < r[loser]:
                    right += 1.0 if s[w] > s[loser] else 0.5 if s[w] == s[loser] else 0.0
                    pairs += 1
                    prompts.add(prompt)
    estimate = pair_accuracy(scores, ranks)
    assert estimate.value == pytest.approx(right / pairs, abs=1e-12)
    assert (estimate.n, estimate.n_clusters) == (pairs, len(prompts))
    assert estimate.ci_low < estimate.value < estimate.ci_high


def test_pair_accuracy_is_micro_over_pairs_and_an_equal_score_counts_half():
    scores = [[4.0, 3.0, 2.0, 1.0], [1.0, 2.0], [5.0, 5.0], [1.0, 2.0]]
    ranks = [[1, 2, 3, 4], [1, 2], [2, 1], [1, 1]]  # six right, one wrong, one equal, one tied pair left out
    estimate = pair_accuracy(scores, ranks)
    assert estimate.value == (6 + 0 + 0.5) / (6 + 1 + 1)
    assert (estimate.n, estimate.n_clusters) == (8, 3)


def test_pair_accuracy_ignores_the_score_of_an_absent_completion():
    assert pair_accuracy([[2.0, math.nan, 1.0]], [[1, 0, 2]]).value == 1.0


def test_win_rate_counts_wins_ties_and_losses():
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 4, size=(2, 50))
    expected = sum(1 if x > y else 0.5 if x == y else 0 for x, y in zip(a, b, strict=True)) / 50
    estimate = win_rate(a, b)
    assert estimate.value == pytest.approx(expected, abs=1e-12)
    assert (estimate.n, estimate.n_clusters) == (50, 50)
    assert win_rate(b, a).value == pytest.approx(1 - expected, abs=1e-12)
    assert win_rate(a, a).value == 0.5


def test_paired_difference_is_tighter_than_two_intervals_apart():
    rng = np.random.default_rng(4)
    prompt = rng.normal(0, 5, size=200)  # what both models share
    a, b = prompt + rng.normal(0.3, 0.2, size=200), prompt
    estimate = paired_difference(a, b)
    assert estimate.value == pytest.approx(a.mean() - b.mean(), abs=1e-12)
    assert estimate.ci_low > 0
    assert mean_estimate(a).ci_low < mean_estimate(b).ci_high  # unpaired, nothing would be seen


# Intervals


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of n independent pairs, which those of one prompt are not."""
    z = 1.96
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def test_bootstrap_over_prompts_covers_the_truth_where_pairs_are_correlated():
    rng = np.random.default_rng(5)
    scores, ranks = correlated_prompts(rng, 20_000)
    truth = pair_accuracy(scores, ranks).value
    repeats, covered, covered_by_wilson = 200, 0, 0
    for _ in range(repeats):
        estimate = pair_accuracy(*correlated_prompts(rng, 80))
        covered += estimate.ci_low <= truth <= estimate.ci_high
        low, high = wilson(estimate.value, estimate.n)
        covered_by_wilson += low <= truth <= high
    assert 0.90 <= covered / repeats <= 0.99  # 0.95 within three standard errors of 200 repeats
    assert covered_by_wilson / repeats < 0.80  # the same check fails where pairs count as independent


def test_interval_of_a_mean_is_the_normal_one_on_many_prompts():
    x = np.random.default_rng(6).normal(2.0, 3.0, size=2000)
    estimate = bootstrap_over_prompts(np.mean, x, n_resamples=10_000)
    half = 1.96 * x.std() / math.sqrt(2000)
    assert estimate.ci_low == pytest.approx(x.mean() - half, abs=0.04 * half)
    assert estimate.ci_high == pytest.approx(x.mean() + half, abs=0.04 * half)


def test_arrays_are_resampled_together():
    x = np.random.default_rng(7).uniform(1, 9, size=30)
    estimate = bootstrap_over_prompts(lambda a, b, axis: a.sum(axis) / b.sum(axis), 3 * x, x)
    assert (estimate.value, estimate.ci_low, estimate.ci_high) == pytest.approx((3.0, 3.0, 3.0), abs=1e-12)


def test_interval_depends_on_the_seed_alone():
    x = np.random.default_rng(8).normal(size=40)
    estimate = bootstrap_over_prompts(np.mean, x, seed=1)
    assert bootstrap_over_prompts(np.mean, x, seed=1) == estimate
    assert bootstrap_over_prompts(np.mean, x, seed=2).ci_low != estimate.ci_low


def test_four_hundred_prompts_take_less_than_a_second():
    rng = np.random.default_rng(9)
    scores, ranks = rng.normal(size=(400, 9)), rng.integers(1, 8, size=(400, 9))
    start = time.process_time()
    pair_accuracy(scores, ranks)
    assert time.process_time() - start < 1.0


# Degenerate and bad input


def test_prompts_that_all_agree_have_an_interval_of_no_width():
    for estimate in (
        mean_estimate([0.3] * 5),
        win_rate([1.0] * 5, [0.0] * 5),
        pair_accuracy([[2.0, 1.0]] * 5, [[1, 2]] * 5),
    ):
        assert estimate.ci_low == pytest.approx(estimate.value, abs=1e-12)
        assert estimate.ci_high == pytest.approx(estimate.value, abs=1e-12)


def test_one_prompt_has_a_value_and_no_interval():
    for estimate in (mean_estimate([0.75]), win_rate([1], [0]), pair_accuracy([[3, 2, 1]], [[1, 2, 3]])):
        assert math.isfinite(estimate.value)
        assert math.isnan(estimate.ci_low)
        assert math.isnan(estimate.ci_high)
        assert estimate.n_clusters == 1


def test_nothing_to_average_is_nan_with_a_count_of_zero():
    for estimate in (
        mean_estimate([]),
        win_rate([], []),
        pair_accuracy([], []),
        pair_accuracy([[1.0, 2.0]], [[1, 1]]),
    ):
        assert all(math.isnan(x) for x in (estimate.value, estimate.ci_low, estimate.ci_high))
        assert (estimate.n, estimate.n_clusters) == (0, 0)


def test_bad_input_is_refused_with_the_prompt():
    with pytest.raises(ValueError, match="prompt 1: nan is not a finite number"):
        mean_estimate([0.0, math.nan])
    with pytest.raises(ValueError, match="prompt 0: inf"):
        bootstrap_over_prompts(lambda a, b, axis: a.mean(axis), [1.0, 2.0], [math.inf, 1.0])
    with pytest.raises(ValueError, match="one number per prompt"):
        win_rate([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="prompt 1: nan"):
        win_rate([1.0, math.nan], [1.0, 2.0])
    with pytest.raises(ValueError, match="one number per prompt"):
        paired_difference([[1.0]], [[1.0]])
    with pytest.raises(ValueError, match="one length"):
        bootstrap_over_prompts(np.mean, [1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="prompt 1: scores of ranked completions must be finite"):
        pair_accuracy([[1.0, 2.0], [math.nan, 1.0]], [[1, 2], [1, 2]])
    with pytest.raises(ValueError, match="prompt 1: expected 2 scores"):
        pair_accuracy([[1.0, 2.0], [1.0]], [[1, 2], [1, 2]])
    with pytest.raises(ValueError, match="same prompts"):
        pair_accuracy([[1, 2]], [])


def test_estimates_are_plain_numbers_that_json_can_write():
    for value in dataclasses.asdict(pair_accuracy([[1.0, 2.0], [2.0, 1.0]], [[1, 2], [1, 2]])).values():
        assert type(value) in (int, float)
    assert str(Estimate(0.5, 0.25, 0.75, 4, 4)) == "0.500 [0.250, 0.750]"


def test_every_public_function_has_an_example():
    public = [
        x
        for name, x in vars(metrics).items()
        if getattr(x, "__module__", "") == metrics.__name__ and callable(x) and not name.startswith("_")
    ]
    assert win_rate in public
    assert all(">>>" in inspect.getdoc(x) for x in public)


# Strata


def test_a_single_stratum_is_the_mean_and_its_bootstrap():
    x = np.random.default_rng(0).normal(size=50)
    assert metrics.mean_over_strata([metrics.Stratum.mean(x)]) == mean_estimate(x)


def test_strata_weigh_alike_and_are_resampled_by_themselves():
    rng = np.random.default_rng(1)
    x, constant = rng.normal(size=40), np.full(400, 3.0)
    one = metrics.mean_over_strata([metrics.Stratum.mean(x)])
    both = metrics.mean_over_strata([metrics.Stratum.mean(x), metrics.Stratum.mean(constant)])
    assert both.value == pytest.approx((x.mean() + 3) / 2, abs=1e-12)
    # What never varies halves the mean and the width, and moves neither.
    assert both.ci_high - both.ci_low == pytest.approx((one.ci_high - one.ci_low) / 2, rel=0.1)
    assert (both.n, both.n_clusters) == (440, 440)


def test_ratios_of_different_prompts_in_one_score():
    tops, bottoms = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 3.0]]), np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 4.0]])
    estimate = metrics.mean_over_strata([metrics.Stratum(np.array([0.6, 0.4]), tops, bottoms)])
    assert estimate.value == pytest.approx(0.6 * 1 / 2 + 0.4 * 3 / 4, abs=1e-12)


def test_strata_without_prompts_or_with_one():
    few = metrics.mean_over_strata([metrics.Stratum.mean([1.0, 0.0]), metrics.Stratum.mean([1.0])])
    assert few.value == 0.75
    assert math.isnan(few.ci_low)
    assert math.isnan(metrics.mean_over_strata([]).value)
