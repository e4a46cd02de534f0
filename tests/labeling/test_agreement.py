"""Agreement against counting by hand, against loops over all pairs, and against the published numbers."""

import math
import random
from dataclasses import asdict
from itertools import combinations

import numpy as np
import pytest

from prefopt.labeling.agreement import agreement
from prefopt.statistics.agreement import alpha, kendall_w


def row(labeler, ranks, *, prompt="p", completions=None, **fields):
    completions = completions or [chr(ord("a") + i) for i in range(len(ranks))]
    return {"prompt": prompt, "completions": completions, "ranks": ranks, "labeler": labeler, **fields}


def random_rows(seed, labelers=("ann", "bob", "cy"), prompts=12):
    rng = random.Random(seed)
    rows = []
    for prompt in range(prompts):
        k = rng.randint(2, 6)
        texts = [f"{prompt}-{i}" for i in range(k)]
        for labeler in labelers:
            if rng.random() < 0.8:
                raw = [rng.randint(1, k) for _ in range(k)]
                dense = {r: i for i, r in enumerate(sorted(set(raw)), start=1)}
                ranks = dict(zip(texts, [dense[r] for r in raw], strict=True))
                rng.shuffle(texts)
                rows.append(row(labeler, [ranks[t] for t in texts], prompt=f"{prompt}", completions=list(texts)))
    return rows


def counted(rows, chosen):
    """(same, untied) over all pairs of labelers in `chosen`, found by comparing texts."""
    said = {}
    for r in rows:
        said.setdefault(r["prompt"], {})[r["labeler"]] = dict(zip(r["completions"], r["ranks"], strict=True))
    same = untied = 0
    for by_labeler in said.values():
        for one, two in combinations(sorted(by_labeler), 2):
            if chosen(one, two):
                a, b = by_labeler[one], by_labeler[two]
                for x, y in combinations(sorted(a), 2):
                    if a[x] != a[y] and b[x] != b[y]:
                        untied += 1
                        same += (a[x] < a[y]) == (b[x] < b[y])
    return same, untied


@pytest.mark.parametrize("seed", range(5))
def test_pairs_are_those_found_by_looking_at_the_texts(seed):
    rows = random_rows(seed)
    found = agreement(rows, n_resamples=50)
    same, untied = counted(rows, lambda a, b: True)
    assert (found.all_pairs.value, found.all_pairs.n) == (same / untied, untied)
    assert set(found.by_labelers) == {"ann & bob", "ann & cy", "bob & cy"}
    for name, estimate in found.by_labelers.items():
        same, untied = counted(rows, lambda a, b, name=name: f"{a} & {b}" == name)
        assert (estimate.value, estimate.n) == (same / untied, untied)
    for name, one in found.labelers.items():
        same, untied = counted(rows, lambda a, b, name=name: name in (a, b))
        assert (one.agreement.value, one.agreement.n) == (same / untied, untied)
        own = [r["ranks"] for r in rows if r["labeler"] == name]
        ties = sum(x == y for ranks in own for x, y in combinations(ranks, 2))
        assert one.tied_pairs.value == ties / sum(math.comb(len(ranks), 2) for ranks in own)
        assert one.tasks == len(own)


def test_two_labelers_agree_as_the_metric_says():
    rows = random_rows(7, labelers=("ann", "bob"), prompts=30)
    of_prompts = [
        counted([r for r in rows if r["prompt"] == prompt], lambda a, b: True)
        for prompt in {r["prompt"] for r in rows}
    ]
    same, untied = (sum(numbers) for numbers in zip(*of_prompts, strict=True))
    found = agreement(rows).all_pairs
    clusters = sum(n > 0 for _, n in of_prompts)
    assert (found.value, found.n, found.n_clusters) == (same / untied, untied, clusters)
    assert found.ci_low < found.value < found.ci_high


def test_groups_are_compared_within_and_between():
    ranks = {"ann": [1, 2, 3], "bob": [1, 3, 2], "hal": [3, 2, 1], "hue": [3, 2, 1]}
    group = {"ann": "train", "bob": "train", "hal": "heldout", "hue": "heldout"}
    found = agreement([row(name, r, group=group[name]) for name, r in ranks.items()], n_resamples=10)
    assert {name: e.value for name, e in found.by_groups.items()} == {
        "within train": 2 / 3,
        "within heldout": 1.0,
        "heldout & train": (0 + 0 + 1 + 1) / (4 * 3),
    }
    assert found.labelers["ann"].group == "train"
    # Without groups there is nothing to compare them by.
    assert agreement([row(name, r) for name, r in ranks.items()], n_resamples=10).by_groups == {}


def test_only_rankings_of_the_same_completions_are_compared():
    rows = [
        row("ann", [1, 2], completions=["x", "y"]),
        row("bob", [1, 2], completions=["x", "z"]),
        row("cy", [1, 2], completions=["x", "y"], prompt="other"),
    ]
    found = agreement(rows)
    assert (found.items, found.shared_items, found.all_pairs.n) == (3, 0, 0)
    assert math.isnan(found.all_pairs.value)
    assert math.isnan(found.kendall_w.value)
    assert math.isnan(found.alpha_ranks.value)
    assert "nothing to compare" in "\n".join(found.lines())


def test_equal_texts_count_once_and_the_last_row_of_a_labeler_counts():
    rows = [
        row("ann", [3, 1, 1, 2], completions=["x", "y", "y", "z"]),
        row("ann", [1, 2, 2, 3], completions=["x", "y", "y", "z"]),
        row("bob", [2, 1, 2, 3], completions=["y", "x", "y", "z"]),
    ]
    found = agreement(rows, n_resamples=10)
    assert (found.repeated, found.items, found.all_pairs.value, found.all_pairs.n) == (1, 1, 1.0, 3)
    assert found.labelers["ann"].tasks == 1
    assert found.labelers["ann"].tied_pairs.value == 0.0


def test_kendall_w_with_ties_is_that_of_the_textbook_formula():
    # Without ties W = 1 - (1 - mean Spearman) (m - 1) / m; with ties that holds for correlations of mid-ranks if
    # the tie corrections of all labelers are alike.
    rng = np.random.default_rng(0)
    for _ in range(20):
        ranks = np.array([rng.permutation(5) for _ in range(4)])
        rho = np.mean([np.corrcoef(ranks[a], ranks[b])[0, 1] for a, b in combinations(range(4), 2)])
        assert kendall_w(ranks) == pytest.approx((1 + 3 * rho) / 4, abs=1e-12)
        tied = np.array([rng.permutation([1, 2, 2, 3, 4]) for _ in range(4)])
        mid = np.where(tied == 1, 1, np.where(tied == 2, 2.5, tied + 1))
        rho = np.mean([np.corrcoef(mid[a], mid[b])[0, 1] for a, b in combinations(range(4), 2)])
        assert kendall_w(tied) == pytest.approx((1 + 3 * rho) / 4, abs=1e-12)
    assert kendall_w([[1, 2, 2], [1, 2, 2]]) == 1.0  # agreed ties are agreement: without the correction 0.75
    assert math.isnan(kendall_w([[1, 1], [1, 1]]))


def test_alpha_is_that_of_the_published_example():
    # Krippendorff (2011), Computing Krippendorff's alpha-reliability, data of section C without its gaps.
    coders = [[1, 2, 3, 3, 2, 4, 1, 2], [1, 2, 3, 3, 2, 4, 1, 2], [2, 3, 3, 3, 2, 4, 2, 2]]
    n_v = {v: sum(c.count(v) for c in coders) for v in range(1, 5)}

    def distance(c, k):  # squared: sum of marginals from c to k, less half of both ends
        low, high = sorted((c, k))
        return (sum(n_v[g] for g in range(low, high + 1)) - (n_v[low] + n_v[high]) / 2) ** 2

    units = list(zip(*coders, strict=True))
    n = sum(map(len, units))
    observed = sum(distance(x, y) / (3 - 1) for unit in units for i, x in enumerate(unit)
                   for j, y in enumerate(unit) if i != j) / n  # fmt: skip
    values = [v for unit in units for v in unit]
    expected = sum(distance(x, y) for i, x in enumerate(values) for j, y in enumerate(values) if i != j)
    expected /= n * (n - 1)
    whole = alpha([coders], n_resamples=10)
    assert whole.value == pytest.approx(1 - observed / expected, abs=1e-9)
    halves = alpha([[c[:4] for c in coders], [c[4:] for c in coders]], n_resamples=200)
    assert halves.value == pytest.approx(whole.value, abs=1e-9)
    assert halves.n_clusters == 2
    assert halves.ci_low <= halves.value <= halves.ci_high
    assert alpha([[[1, 2], [2, 1]]], n_resamples=10).value < 0
    assert math.isnan(alpha([[[1, 1], [1, 1]]], n_resamples=10).value)


def test_alpha_of_ratings_uses_those_who_rated():
    rows = [
        row("ann", [1, 2, 3], ratings=[7, 4, 1]),
        row("bob", [1, 2, 3], ratings=[7, 4, 1]),
        row("cy", [3, 2, 1]),
    ]
    found = agreement(rows, n_resamples=10)
    assert found.alpha_ratings.value == 1.0
    assert found.alpha_ranks.value < 0.5


def test_statistics_of_each_labeler():
    rows = [
        row("ann", [1, 2, 2], prompt="1", seconds=10.0),
        row("ann", [1, 1], prompt="2", seconds=30.0),
        row("bob", [1, 2, 3], prompt="1", seconds=None),
    ]
    screening = [
        row("ann", [1, 2, 3], prompt="s", expected_ranks=[1, 2, 2]),  # right on 2, the pair tied in the key is free
        row("ann", [1, 1], prompt="t", expected_ranks=[1, 2]),  # a tie where one was better
        row("dot", [2, 1], prompt="t", expected_ranks=[1, 2]),
    ]
    found = agreement(rows, screening=screening, skipped={"bob": 4, "eve": 1}, n_resamples=10)
    ann, bob, dot, eve = (found.labelers[name] for name in ("ann", "bob", "dot", "eve"))
    assert (ann.tasks, ann.seconds, ann.skipped, ann.screening_tasks) == (2, 20.0, 0, 2)
    assert (ann.tied_pairs.value, ann.screening.value) == ((1 + 1) / (3 + 1), 2 / 3)
    assert (bob.tasks, bob.seconds, bob.skipped, bob.agreement.value) == (1, None, 4, 1.0)
    assert (dot.tasks, dot.screening.value) == (0, 0.0)
    assert (eve.tasks, eve.skipped) == (0, 1)
    said = "\n".join(found.lines())
    for words in (
        "ann: 2 tasks; median 20 s",
        "2 screening tasks, right on 0.667",
        "bob: 1 tasks; 4 skipped",
    ):
        assert words in said
    assert asdict(found)["labelers"]["ann"]["tied_pairs"]["n"] == 4


@pytest.mark.parametrize(
    ("rows", "screening", "said"),
    [
        ([row("ann", [1, 3])], [], r"rankings row 0: field 'ranks': expected dense"),
        ([row(None, [1, 2])], [], r"rankings row 0: field 'labeler': expected a name, got None"),
        ([row("ann", [1, 2])], [row("ann", [1, 2])], r"screening row 0: field 'expected_ranks'"),
        ([row("ann", [1, 2])], [row("", [1, 2])], r"screening row 0: field 'labeler'"),
    ],
)
def test_a_row_that_does_not_fit_is_named(rows, screening, said):
    with pytest.raises(ValueError, match=said):
        agreement(rows, screening=screening)
