"""Every measure against a loop over rows and against arithmetic by hand; intervals against a loop over resamples."""

import inspect
import json
import math
import time

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import brier_score_loss, log_loss

from prefopt.statistics import rankings as module
from prefopt.statistics.intervals import Estimate
from prefopt.statistics.rankings import calibration_gaps, flatten, kendall_tau, pair_accuracy, ranking_metrics, top1


def random_rows(seed: int, prompts: int = 60) -> tuple[list, list, list, list]:
    """Scores and lengths with equal ones, ranks with ties and absent completions, three labelers, one unknown."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 10, size=prompts)
    ranks = [rng.integers(-1, 6, size=k).tolist() for k in sizes]
    scores = [(rng.integers(-4, 5, size=len(r)) * 0.7 - 0.7 * np.array(r)).tolist() for r in ranks]
    lengths = [rng.integers(1, 6, size=k).tolist() for k in sizes]
    return scores, ranks, lengths, rng.choice(["ann", "bob", "cy", None], size=prompts).tolist()


# One loop for everything, straight from the definitions


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def right(a: float, b: float) -> float:
    return 1.0 if a > b else 0.5 if a == b else 0.0


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def tau_b(s: list[float], r: list[int]) -> float:
    concordant = discordant = untied_scores = untied_ranks = 0
    for i in range(len(s)):
        for j in range(i):
            concordant += (s[i] > s[j] and r[i] < r[j]) or (s[i] < s[j] and r[i] > r[j])
            discordant += (s[i] > s[j] and r[i] > r[j]) or (s[i] < s[j] and r[i] < r[j])
            untied_scores += s[i] != s[j]
            untied_ranks += r[i] != r[j]
    untied = untied_scores * untied_ranks
    return (concordant - discordant) / math.sqrt(untied) if untied else math.nan


def bin_edges(confidences: list[float]) -> list[float]:
    """The lowest confidence of each bin but the first, of ten with as many pairs each."""
    return [sorted(confidences)[len(confidences) * b // 10] for b in range(1, 10)]


def by_loops(
    scores: list, ranks: list, lengths: list, labelers: list, edges: list[float] | None = None
) -> dict[str, tuple[float, int, int]]:
    """Name -> value, n, n_clusters. `edges`: where the bins of calibration begin, if not by these rows."""
    over_pairs: dict[str, list[tuple[int, float]]] = {}
    over_prompts: dict[str, list[float]] = {"accuracy_per_prompt": [], "top1": [], "kendall_tau": []}
    predictions: list[tuple[float, float]] = []
    for prompt, (s, r, length) in enumerate(zip(scores, ranks, lengths, strict=True)):
        present = [i for i in range(len(r)) if r[i] >= 1]
        pairs = [(w, loser) for w in present for loser in present if r[w] < r[loser]]
        for w, loser in pairs:
            lead = s[w] - s[loser]
            hit = right(s[w], s[loser])
            names = {
                "accuracy": hit,
                "brier": (1 - sigmoid(lead)) ** 2,
                "nll": -math.log(sigmoid(lead)),
                f"accuracy_gap_{r[loser] - r[w]}": hit,
                "accuracy_longer_wins": right(length[w], length[loser]),
            }
            if labelers[prompt] is not None:
                names[f"accuracy_labeler_{labelers[prompt]}"] = hit
            for name, value in names.items():
                over_pairs.setdefault(name, []).append((prompt, value))
            predictions.append((hit, float(expit(abs(lead)))))
        if pairs:
            over_prompts["accuracy_per_prompt"].append(mean([right(s[w], s[loser]) for w, loser in pairs]))
            highest = [i for i in present if s[i] == max(s[j] for j in present)]
            over_prompts["top1"].append(mean([float(r[i] == min(r[j] for j in present)) for i in highest]))
            tau = tau_b([s[i] for i in present], [r[i] for i in present])
            if not math.isnan(tau):
                over_prompts["kendall_tau"].append(tau)
    found = {name: (mean(x), len(x), len(x)) for name, x in over_prompts.items() if x}
    for name, x in over_pairs.items():
        found[name] = (mean([v for _, v in x]), len(x), len({prompt for prompt, _ in x}))
    num_pairs, num_prompts = found["accuracy"][1:]
    edges = bin_edges([confidence for _, confidence in predictions]) if edges is None else edges
    bins: dict[int, list[tuple[float, float]]] = {}
    for hit, confidence in predictions:
        bins.setdefault(sum(edge <= confidence for edge in edges), []).append((hit, confidence))
    found["ece"] = (
        sum(len(b) / num_pairs * abs(mean([h for h, _ in b]) - mean([c for _, c in b])) for b in bins.values()),
        num_pairs,
        num_prompts,
    )
    return found


@pytest.mark.parametrize("seed", range(4))
def test_every_measure_equals_the_loop(seed):
    rows = random_rows(seed)
    expected = by_loops(*rows)
    found = ranking_metrics(rows[0], rows[1], lengths=rows[2], labelers=rows[3], n_resamples=50)
    assert set(found) == set(expected)
    for name, (value, n, n_clusters) in expected.items():
        assert found[name].value == pytest.approx(value, abs=1e-12), name
        assert (found[name].n, found[name].n_clusters) == (n, n_clusters), name
        assert found[name].ci_low <= found[name].ci_high, name


def test_the_probabilities_score_as_in_scikit_learn():
    scores, ranks, *_ = random_rows(9)
    rng = np.random.default_rng(0)
    outcomes, probabilities = [], []
    for s, r in zip(scores, ranks, strict=True):
        for i in range(len(s)):
            for j in range(i):
                if min(r[i], r[j]) >= 1 and r[i] != r[j]:
                    a, b = (i, j) if rng.random() < 0.5 else (j, i)  # which completion comes first does not matter
                    outcomes.append(r[a] < r[b])
                    probabilities.append(expit(s[a] - s[b]))
    found = ranking_metrics(scores, ranks, n_resamples=10)
    assert found["brier"].value == pytest.approx(brier_score_loss(outcomes, probabilities), abs=1e-12)
    assert found["nll"].value == pytest.approx(log_loss(outcomes, probabilities), abs=1e-12)


def test_accuracy_is_pair_accuracy():
    scores, ranks, *_ = random_rows(5)
    assert ranking_metrics(scores, ranks, n_resamples=2000)["accuracy"] == pair_accuracy(scores, ranks)


# By hand. Probabilities are written through their odds: a lead of log 4 is a probability of 4/5.

LOG2, LOG4, LOG9 = math.log(2), math.log(4), math.log(9)
SCORES = [[LOG4, 0.0, LOG2, 99.0], [0.0, LOG9], [1.0, 1.0], [3.0, 1.0]]
RANKS = [[1, 3, 2, 0], [1, 2], [2, 1], [1, 1]]  # leads: log 4, log 2, log 2; -log 9; 0; none


def test_measures_of_four_rows_by_hand():
    found = ranking_metrics(
        SCORES,
        RANKS,
        lengths=[[5, 5, 1, 99], [7, 3], [2, 8], [1, 2]],
        labelers=["ann", "bob", "ann", "bob"],
    )
    expected = {
        "accuracy": ((1 + 1 + 1) + 0 + 0.5) / 5,
        "accuracy_per_prompt": (1 + 0 + 0.5) / 3,
        "top1": (1 + 0 + 0.5) / 3,
        "kendall_tau": (1 - 1) / 2,  # undefined in the third row, whose scores are equal
        "brier": ((1 / 5) ** 2 + (1 / 3) ** 2 + (1 / 3) ** 2 + (9 / 10) ** 2 + (1 / 2) ** 2) / 5,
        "nll": (math.log(5 / 4) + 2 * math.log(3 / 2) + math.log(10) + math.log(2)) / 5,
        # each confidence has a bin of its own: right once at 4/5, right twice at 2/3, wrong at 9/10, undecided
        "ece": ((1 - 4 / 5) + 2 * (1 - 2 / 3) + 9 / 10 + 0) / 5,
        "accuracy_gap_1": (1 + 1 + 0 + 0.5) / 4,
        "accuracy_gap_2": 1 / 1,
        "accuracy_labeler_ann": (3 + 0.5) / 4,
        "accuracy_labeler_bob": 0 / 1,
        "accuracy_longer_wins": ((0.5 + 1 + 0) + 1 + 1) / 5,
    }
    assert {name: estimate.value for name, estimate in found.items()} == pytest.approx(expected, abs=1e-12)
    assert list(found) == list(expected)
    assert (found["accuracy"].n, found["accuracy"].n_clusters) == (5, 3)
    assert (found["kendall_tau"].n, found["top1"].n, found["ece"].n) == (2, 3, 5)


def test_negated_scores_mirror_every_measure():
    scores, ranks, *_ = random_rows(6)
    found = ranking_metrics(scores, ranks, n_resamples=10)
    mirrored = ranking_metrics([[-x for x in row] for row in scores], ranks, n_resamples=10)
    for name in ("accuracy", "accuracy_per_prompt", "accuracy_gap_1", "accuracy_gap_4"):
        assert found[name].value > 0.5
        assert mirrored[name].value == pytest.approx(1 - found[name].value, abs=1e-12)
    assert mirrored["kendall_tau"].value == pytest.approx(-found["kendall_tau"].value, abs=1e-12)
    assert mirrored["top1"].value < found["top1"].value
    for name in ("brier", "nll", "ece"):
        assert mirrored[name].value > found[name].value


def test_order_of_the_completions_does_not_matter():
    scores, ranks, lengths, labelers = random_rows(7)
    rng = np.random.default_rng(7)
    orders = [rng.permutation(len(r)) for r in ranks]
    shuffled = [
        [[row[i] for i in order] for row, order in zip(rows, orders, strict=True)] for rows in (scores, ranks, lengths)
    ]
    found = ranking_metrics(scores, ranks, lengths=lengths, labelers=labelers)
    again = ranking_metrics(shuffled[0], shuffled[1], lengths=shuffled[2], labelers=labelers)
    assert flatten(again) == pytest.approx(flatten(found), abs=1e-12)


def test_top1_shares_equal_scores_and_accepts_any_of_the_best():
    scores = np.array([[2.0, 2.0, 2.0, 1.0], [1.0, 3.0, 2.0, 0.0], [1.0, 9.0, 0.0, 0.0]])
    ranks = np.array([[1, 1, 2, 3], [1, 1, 2, 0], [1, 0, 2, -100]])  # the absent one's score is the highest
    assert top1(scores, ranks).tolist() == [2 / 3, 1.0, 1.0]


def test_kendall_tau_corrects_for_ties_in_scores_and_ranks():
    scores = np.array([[3.0, 2.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0], [1.0, 0.0, 8.0, 0.0], [1.0, 1.0, 1.0, 9.0]])
    ranks = np.array([[1, 2, 3, 3], [4, 3, 2, 1], [1, 2, 0, 0], [1, 2, 3, 0]])
    assert kendall_tau(scores, ranks)[:3].tolist() == pytest.approx([(4 - 0) / math.sqrt(5 * 5), -1.0, 1.0])
    assert math.isnan(kendall_tau(scores, ranks)[3])


def test_likelihood_stays_finite_and_exact_far_out():
    found = ranking_metrics([[800.0, 0.0], [0.0, 800.0]], [[1, 2], [1, 2]])
    assert found["nll"].value == 800 / 2
    assert found["brier"].value == found["ece"].value == 1 / 2


# Calibration


def plackett_luce(rng: np.random.Generator, prompts: int, k: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Scores and ranks whose pairs follow sigmoid(s_w - s_l) (Gumbel noise)."""
    scores = rng.normal(0, 1.5, size=(prompts, k))
    return scores, (-(scores + rng.gumbel(size=(prompts, k)))).argsort(axis=1).argsort(axis=1) + 1


def test_calibration_error_is_small_for_the_true_model_and_measures_the_distance_of_others():
    scores, ranks = plackett_luce(np.random.default_rng(10), 2000)
    true, sure, unsure = (ranking_metrics(f * scores, ranks, n_resamples=100)["ece"] for f in (1, 2, 0.5))
    assert true.value < 0.01
    for scale, found in ((2, sure), (0.5, unsure)):
        first, second = np.triu_indices(5, k=1)
        leads = np.abs(scores[:, first] - scores[:, second])
        distance = np.abs(expit(scale * leads) - expit(leads)).mean()
        assert found.value == pytest.approx(distance, abs=0.01)
        assert found.ci_low < distance < found.ci_high


def test_calibration_bins_are_ten_of_equal_mass_and_equal_confidences_stay_together():
    leads = np.random.default_rng(3).exponential(0.1, size=57)  # an unsure model: equal widths would use one bin
    bins, gaps = calibration_gaps(leads)
    sizes = np.bincount(bins)
    assert len(sizes) == 10
    assert set(sizes.tolist()) == {5, 6}
    assert (np.diff(bins[np.argsort(leads)]) >= 0).all()
    assert calibration_gaps(-leads)[0].tolist() == bins.tolist()
    assert calibration_gaps(-leads)[1] == pytest.approx(gaps - 1, abs=1e-12)
    order = np.random.default_rng(4).permutation(57)
    assert calibration_gaps(leads[order])[0].tolist() == bins[order].tolist()
    together, _ = calibration_gaps(np.array([0.1] * 7 + [2.0] * 3))
    assert together.tolist() == [6] * 7 + [9] * 3


# Intervals


def test_intervals_equal_a_loop_over_resampled_prompts():
    scores, ranks, lengths, _ = random_rows(11, prompts=16)
    ranked = [i for i, r in enumerate(ranks) if len({x for x in r if x >= 1}) > 1]
    scores, ranks, lengths = ([rows[i] for i in ranked] for rows in (scores, ranks, lengths))
    resamples = np.random.default_rng(0).integers(0, len(ranks), size=(200, len(ranks)))
    leads = [
        abs(s[i] - s[j])
        for s, r in zip(scores, ranks, strict=True)
        for i in range(len(r))
        for j in range(i)
        if min(r[i], r[j]) >= 1 and r[i] != r[j]
    ]
    edges = bin_edges(expit(leads).tolist())  # of the data: resampling moves the pairs, not the bins
    loops = [
        by_loops(*([rows[i] for i in drawn] for rows in (scores, ranks, lengths)), [None] * len(ranks), edges)
        for drawn in resamples
    ]
    found = ranking_metrics(scores, ranks, lengths=lengths, n_resamples=200)
    for name in ("accuracy", "accuracy_per_prompt", "top1", "brier", "nll", "ece", "accuracy_longer_wins"):
        low, high = np.percentile([loop[name][0] for loop in loops], [2.5, 97.5])
        assert (found[name].ci_low, found[name].ci_high) == pytest.approx((low, high), abs=1e-12), name
        assert low < found[name].value < high or name == "ece"


def test_two_thousand_prompts_of_nine_take_less_than_three_seconds():
    rng = np.random.default_rng(12)
    scores, lengths = rng.normal(size=(2000, 9)), rng.integers(1, 300, size=(2000, 9))
    ranks = np.array([rng.permutation(9) + 1 for _ in range(2000)])
    start = time.process_time()
    ranking_metrics(scores, ranks, lengths=lengths, labelers=["a", "b"] * 1000, n_resamples=1000)
    assert time.process_time() - start < 3.0


# Degenerate and bad input


def test_rows_without_a_strict_pair_change_nothing():
    scores, ranks, *_ = random_rows(13)
    more_scores = [[9.0, 8.0], *scores, [1.0, 2.0], [5.0, 4.0], []]
    more_ranks = [[1, 1], *ranks, [1, 0], [0, -100], []]
    assert ranking_metrics(more_scores, more_ranks) == ranking_metrics(scores, ranks)


def test_all_tied_is_nan_with_a_count_of_zero():
    for scores, ranks in (([[1.0, 2.0], [2.0, 1.0]], [[1, 1], [2, 2]]), ([], [])):
        found = ranking_metrics(scores, ranks, lengths=scores, labelers=["ann"] * len(ranks))
        names = ["accuracy", "accuracy_per_prompt", "top1", "kendall_tau", "brier", "nll", "ece"]
        names += ["accuracy_labeler_ann"] * bool(ranks)
        assert list(found) == [*names, "accuracy_longer_wins"]
        for estimate in found.values():
            assert math.isnan(estimate.value)
            assert (estimate.n, estimate.n_clusters) == (0, 0)
        assert flatten(found) == {}


def test_one_prompt_has_values_and_no_intervals():
    found = ranking_metrics([[3.0, 2.0, 1.0]], [[1, 2, 3]])
    assert flatten(found) == {name: estimate.value for name, estimate in found.items()}
    assert found["accuracy"].value == found["top1"].value == found["kendall_tau"].value == 1.0
    assert found["kendall_tau"].n == 1


def test_a_constant_score_is_a_coin_flip():
    found = ranking_metrics([[2.0] * 4] * 3, [[1, 2, 3, 4]] * 3)
    expected = {"accuracy": 0.5, "top1": 0.25, "brier": 0.25, "nll": math.log(2), "ece": 0.0}
    for name, value in expected.items():
        assert found[name].value == found[name].ci_low == found[name].ci_high == pytest.approx(value, abs=1e-15)
    assert math.isnan(found["kendall_tau"].value)


def test_absent_completions_may_have_any_score():
    plain = ranking_metrics([[2.0, 1.0], [1.0, 2.0]], [[1, 2], [1, 2]], lengths=[[1, 2], [1, 2]])
    padded = ranking_metrics(
        np.array([[2.0, math.nan, 1.0], [1.0, 2.0, math.inf]]),
        np.array([[1, 0, 2], [1, 2, -100]]),
        lengths=np.array([[1, math.nan, 2], [1, 2, -100]]),
    )
    assert padded == plain


def test_bad_input_is_refused_with_the_prompt():
    good = [[1.0, 2.0], [1.0, 2.0]], [[1, 2], [1, 2]]
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="prompt 1: scores of ranked completions must be finite"):
            ranking_metrics([[1.0, 2.0], [value, 1.0]], good[1])
    with pytest.raises(ValueError, match="prompt 0: lengths of ranked completions must be finite"):
        ranking_metrics(*good, lengths=[[math.nan, 1], [1, 2]])
    with pytest.raises(ValueError, match="prompt 1: expected 2 scores, one for each rank"):
        ranking_metrics([[1.0, 2.0], [1.0]], good[1])
    with pytest.raises(ValueError, match="prompt 0: expected 2 lengths"):
        ranking_metrics(*good, lengths=[[1, 2, 3], [1, 2]])
    with pytest.raises(ValueError, match="same prompts in ranks and scores, got 2 and 1"):
        ranking_metrics([[1.0, 2.0]], good[1])
    with pytest.raises(ValueError, match="prompt 1: ranks must be whole numbers"):
        ranking_metrics(good[0], [[1, 2], [1, 1.5]])
    with pytest.raises(ValueError, match="one labeler per prompt, got 1 for 2"):
        ranking_metrics(*good, labelers=["ann"])


def test_flatten_gives_plain_numbers_that_json_can_write():
    numbers = flatten(ranking_metrics(SCORES, RANKS), prefix="eval_")
    assert {type(x) for x in numbers.values()} == {float}
    assert {"eval_ece", "eval_ece_ci_low", "eval_ece_ci_high", "eval_accuracy_gap_2"} <= set(numbers)
    assert "eval_accuracy_gap_2_ci_low" not in numbers  # one prompt has such a pair: no interval
    json.dumps(numbers, allow_nan=False)
    assert flatten({"x": Estimate(math.nan, 0.0, 1.0, 0, 0)}) == {"x_ci_low": 0.0, "x_ci_high": 1.0}


def test_every_public_function_has_an_example():
    public = [
        x
        for name, x in vars(module).items()
        if getattr(x, "__module__", "") == module.__name__ and callable(x) and not name.startswith("_")
    ]
    assert ranking_metrics in public
    assert all(">>>" in inspect.getdoc(x) for x in public)


def test_a_labeler_does_not_overwrite_the_interval_of_another():
    names = ["ann", "ann", "ann_ci_low", "ann_ci_low_"]
    found = flatten(ranking_metrics([[1.0, 0.0]] * 4, [[1, 2], [1, 2], [2, 1], [2, 1]], labelers=names))
    labelers = {name: value for name, value in found.items() if name.startswith("accuracy_labeler_")}
    prefix = "accuracy_labeler_ann"
    assert labelers == {
        prefix: 1.0,
        f"{prefix}_ci_low": 1.0,
        f"{prefix}_ci_high": 1.0,
        f"{prefix}_ci_low_": 0.0,
        f"{prefix}_ci_low__": 0.0,
    }
