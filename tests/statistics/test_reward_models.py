"""Reward models of known accuracy and calibration are recovered, by value and by how often the intervals cover."""

import math

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import spearmanr

from prefopt.statistics.rankings import pair_accuracy, ranking_metrics
from prefopt.statistics.reward_models import (
    Pairs,
    accuracy_difference,
    calibration_slope,
    length_correlation,
    length_matched,
    longer_wins_accuracy,
    majority_accuracy,
    reliability,
    reward_measures,
    tie_calibrated,
)

pytestmark = pytest.mark.slow

SETS = 200


def random_rows(seed: int, prompts: int = 30) -> tuple[list, list, list]:
    """Scores with equal ones, ranks with ties, lengths."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 7, size=prompts)
    ranks = [rng.integers(1, 5, size=k).tolist() for k in sizes]
    scores = [(rng.integers(-4, 5, size=len(r)) * 0.7 - 0.5 * np.array(r)).tolist() for r in ranks]
    return scores, ranks, [rng.integers(8, 13, size=k).tolist() for k in sizes]


def mean(values: list) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("seed", range(3))
def test_every_measure_equals_the_loop(seed):
    scores, ranks, lengths = random_rows(seed)
    untied, tied, matched, longer, rho = [], [], [], [], []
    for s, r, n in zip(scores, ranks, lengths, strict=True):
        for i in range(len(r)):
            for j in range(len(r)):
                if r[i] < r[j]:
                    hit = 1.0 if s[i] > s[j] else 0.5 if s[i] == s[j] else 0.0
                    untied.append(abs(s[i] - s[j]))
                    longer.append(1.0 if n[i] > n[j] else 0.5 if n[i] == n[j] else 0.0)
                    if abs(n[i] - n[j]) <= 0.1 * max(n[i], n[j]):
                        matched.append(hit)
                elif i < j and r[i] == r[j]:
                    tied.append(abs(s[i] - s[j]))
        if len(set(s)) > 1 and len(set(n)) > 1:
            rho.append(spearmanr(s, n).statistic)
    found = reward_measures(scores, ranks, lengths, n_resamples=20)
    expected = {
        "margin_untied": (mean(untied), len(untied)),
        "margin_tied": (mean(tied), len(tied)),
        "accuracy_length_matched": (mean(matched), len(matched)),
        "length_correlation": (mean(rho), len(rho)),
    }
    for name, (value, n) in expected.items():
        assert found[name].value == pytest.approx(value, abs=1e-12), name
        assert found[name].n == n, name
    pairs = Pairs.of(ranks)
    assert longer_wins_accuracy(pairs, lengths).value == pytest.approx(mean(longer), abs=1e-12)
    assert (
        longer_wins_accuracy(pairs, lengths) == ranking_metrics(scores, ranks, lengths=lengths)["accuracy_longer_wins"]
    )
    assert found["accuracy"] == ranking_metrics(scores, ranks, n_resamples=20)["accuracy"]


@pytest.mark.parametrize("seed", range(3))
def test_tie_calibration_equals_trying_every_width(seed):
    scores, ranks, _ = random_rows(seed)
    pairs = [
        (s[i] - s[j], r[i] == r[j])
        for s, r in zip(scores, ranks, strict=True)
        for i in range(len(r))
        for j in range(len(r))
        if r[i] < r[j] or (r[i] == r[j] and i < j)
    ]
    tried = {
        w: mean([abs(lead) <= w if tied else lead > w for lead, tied in pairs])
        for w in [-1.0, *sorted({abs(lead) for lead, _ in pairs})]
    }
    # a width of -1 must not count a reversed pair as right
    tried[-1.0] = mean([not tied and lead > 0 for lead, tied in pairs])
    estimate, width = tie_calibrated(Pairs.of(ranks), scores)
    assert estimate.value == pytest.approx(max(tried.values()), abs=1e-12)
    assert tried[width] == pytest.approx(max(tried.values()), abs=1e-12)
    assert estimate.n == len(pairs)


def test_majority_takes_the_better_constant_rule():
    assert majority_accuracy(Pairs.of([[1, 2], [1, 2], [2, 1]])).value == pytest.approx(2 / 3)
    assert majority_accuracy(Pairs.of([[2, 1], [3, 2, 1], [1, 1]])).value == 1.0


def test_matched_lengths_include_the_tenth():
    pairs = Pairs.of([[1, 2], [1, 2], [1, 1]])
    assert length_matched(pairs, [[10, 9], [10, 8], [5, 5]]).tolist() == [True, False, False]


def test_slope_equals_a_search_and_is_nan_where_pairs_are_separable():
    scores, ranks, _ = random_rows(4)
    pairs = Pairs.of(ranks)
    leads = pairs.leads(scores)[pairs.strict]
    tried = np.linspace(-1, 3, 40_001)
    likelihood = [np.log(expit(k * leads)).sum() for k in tried[::40]]
    coarse = tried[::40][int(np.argmax(likelihood))]
    found = calibration_slope(pairs, scores)
    assert found.value == pytest.approx(coarse, abs=0.004)
    assert found.ci_low < found.value < found.ci_high
    assert math.isnan(calibration_slope(Pairs.of([[1, 2]]), [[2.0, 1.0]]).value)
    assert calibration_slope(pairs, [[-x for x in row] for row in scores]).value == pytest.approx(-found.value)


# ---- synthetic reward models: labels follow Bradley-Terry on the true reward, the model sees it with noise -----------
def labeled(rng: np.random.Generator, prompts: int, k: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """True rewards and ranks; every pair of a prompt follows sigmoid(r_i - r_j) (Plackett-Luce)."""
    true = rng.normal(0, 1.5, size=(prompts, k))
    return true, (-(true + rng.gumbel(size=true.shape))).argsort(1).argsort(1) + 1


def model_scores(rng: np.random.Generator, true: np.ndarray) -> np.ndarray:
    return 0.5 * true + rng.normal(0, 0.5, size=true.shape)


@pytest.fixture(scope="module")
def truth() -> dict[str, float]:
    """The measures on so many prompts that their error does not matter."""
    rng = np.random.default_rng(100)
    true, ranks = labeled(rng, 20_000)
    scores = model_scores(rng, true)
    pairs = Pairs.of(ranks.tolist())
    other = true + rng.normal(0, 3.0, size=true.shape)
    return {
        "accuracy": pair_accuracy(scores.tolist(), ranks.tolist()).value,
        "slope": calibration_slope(pairs, scores.tolist(), n_resamples=2).value,
        "difference": accuracy_difference(pairs, scores.tolist(), other.tolist()).value,
    }


def test_known_calibration_is_recovered():
    rng = np.random.default_rng(1)
    true, ranks = labeled(rng, 4000)
    pairs = Pairs.of(ranks.tolist())
    for scale in (0.5, 1.0, 2.0):
        scores = (scale * true).tolist()
        assert calibration_slope(pairs, scores, n_resamples=200).value == pytest.approx(1 / scale, rel=0.05)
        gaps = [b["accuracy"] - b["confidence"] for b in reliability(pairs, scores, n_resamples=50)]
        wanted = {0.5: lambda g: max(g) > 0.05 and min(g) > -0.03, 1.0: lambda g: max(map(abs, g)) < 0.04}
        assert wanted.get(scale, lambda g: min(g) < -0.05 and max(g) < 0.03)(gaps), (scale, gaps)
    bins = reliability(pairs, true.tolist(), n_resamples=50)
    assert len(bins) == 10
    assert sum(b["n"] for b in bins) == 4000 * 6
    assert max(b["n"] for b in bins) - min(b["n"] for b in bins) <= 1


def test_intervals_cover_the_truth(truth):
    rng = np.random.default_rng(5)  # over six other seeds: .948 on average, .915 to .97 each
    found = {name: [] for name in truth}
    for _ in range(SETS):
        true, ranks = labeled(rng, 120)
        scores, other = model_scores(rng, true), true + rng.normal(0, 3.0, size=true.shape)
        pairs = Pairs.of(ranks.tolist())
        found["accuracy"].append(ranking_metrics(scores, ranks, n_resamples=500)["accuracy"])
        found["slope"].append(calibration_slope(pairs, scores.tolist(), n_resamples=500))
        found["difference"].append(accuracy_difference(pairs, scores.tolist(), other.tolist()))
    shares = {
        name: mean([e.ci_low <= truth[name] <= e.ci_high for e in estimates]) for name, estimates in found.items()
    }
    assert all(0.92 <= share <= 0.98 for share in shares.values()), shares


def test_length_correlation_of_constant_rows_is_left_out():
    assert length_correlation([[1.0, 1.0]], [[1, 2]]).n == 0
