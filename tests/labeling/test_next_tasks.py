"""The next tasks are those that all pairs, counted one by one, say are least certain; the random share is fair."""

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from prefopt.labeling.key import blind
from prefopt.labeling.next_tasks import choose_next, choose_outputs, pair_uncertainty

RNG = np.random.default_rng(0)


def rows_of(n, k=4):
    return [{"prompt": f"p{i}", "completions": [f"p{i}-{j}" for j in range(k)]} for i in range(n)]


def bits(p):
    return -sum(q * math.log2(q) for q in (p, 1 - p) if q > 0)


def test_uncertainty_is_that_of_a_loop():
    scores = RNG.normal(size=(3, 5))
    margin, disagreement = pair_uncertainty(scores), pair_uncertainty(scores, by="disagreement")
    for i, j in combinations(range(5), 2):
        p = [1 / (1 + math.exp(s[j] - s[i])) for s in scores]
        assert margin[i, j] == pytest.approx(bits(sum(p) / 3), abs=1e-12)
        assert margin[j, i] == pytest.approx(margin[i, j], abs=1e-12)
        assert disagreement[i, j] == pytest.approx(bits(sum(p) / 3) - sum(map(bits, p)) / 3, abs=1e-12)


def test_outputs_are_at_least_nearly_the_best_set():
    for _ in range(30):
        table = pair_uncertainty(RNG.normal(size=(1, 7)) * 3)
        chosen, mean = choose_outputs(table, 4)
        means = {c: np.mean([table[p] for p in combinations(c, 2)]) for c in combinations(range(7), 4)}
        assert mean == pytest.approx(means[tuple(chosen)], abs=1e-12)
        assert mean >= 0.9 * max(means.values())
    assert choose_outputs(table, 9)[0] == list(range(7))
    pair, mean = choose_outputs(table, 2)
    assert mean == max(table[p] for p in combinations(range(7), 2)) == table[tuple(pair)]


def test_the_prompts_with_margins_near_zero_come_first():
    rows = rows_of(6, k=2)
    margins = [4.0, 0.1, -3.0, 0.0, 2.0, -0.5]
    found = choose_next(rows, [[[m, 0.0]] for m in margins], n=3, k=2, random_share=0)
    assert sorted(row["prompt"] for row in found) == ["p1", "p3", "p5"]
    assert {row["chosen"] for row in found} == {"margin"}
    by_prompt = {row["prompt"]: row["uncertainty"] for row in found}
    assert by_prompt["p3"] == pytest.approx(1.0)
    assert by_prompt["p5"] == pytest.approx(bits(1 / (1 + math.exp(0.5))))


def test_disagreement_passes_over_what_all_checkpoints_find_hard():
    rows = rows_of(3, k=2)
    scores = [[[0.0, 0.0], [0.0, 0.0]], [[3.0, 0.0], [-3.0, 0.0]], [[5.0, 0.0], [5.0, 0.0]]]
    (one,) = choose_next(rows, scores, n=1, k=2, random_share=0, by="disagreement")
    assert (one["prompt"], one["chosen"]) == ("p1", "disagreement")
    two = choose_next(rows, scores, n=2, k=2, random_share=0, by="margin")
    assert {row["prompt"] for row in two} == {"p0", "p1"}  # the mean of the checkpoints is 1/2 for both
    with pytest.raises(ValueError, match="2 checkpoints or more"):
        choose_next(rows, [s[:1] for s in scores], n=1, k=2, random_share=0, by="disagreement")


def test_the_random_share_is_uniform_over_prompts_and_outputs():
    rows = rows_of(10, k=4)
    scores = [[list(RNG.normal(size=4) * (i + 1))] for i in range(10)]
    prompts, outputs, places = Counter(), Counter(), Counter()
    for seed in range(600):
        found = choose_next(rows, scores, n=4, k=2, random_share=0.5, seed=seed)
        assert len({row["prompt"] for row in found}) == 4
        assert Counter(row["chosen"] for row in found) == {"random": 2, "margin": 2}
        for place, row in enumerate(found):
            if row["chosen"] == "random":
                prompts[row["prompt"]] += 1
                outputs[tuple(row["outputs"])] += 1
                places[place] += 1
    # Each count is binomial: five standard deviations around 1200 / 10, 1200 / 6 and 1200 / 4.
    for counts, kinds in ((prompts, 10), (outputs, 6), (places, 4)):
        assert len(counts) == kinds
        assert all(abs(c - 1200 / kinds) < 5 * math.sqrt(1200 / kinds) for c in counts.values())


def test_fields_go_with_the_outputs_and_the_rows_can_be_shown():
    row = {
        "prompt": "p",
        "completions": ["a", "b", "a", "c"],
        "truncated": [True, False, True, False],
        "ratings": [1, 2, 1, 4],
        "ranks": [4, 3, 4, 1],
        "use_case": "chat",
    }
    (found,) = choose_next([row], [[[0.0, 9.0, 0.0, 0.1]]], n=5, k=2, random_share=0)
    assert found == {
        "prompt": "p",
        "completions": ["a", "c"],  # not "a" and "a", whose margin is 0 because they are one text
        "truncated": [True, False],
        "ratings": [1, 4],
        "use_case": "chat",
        "outputs": [0, 3],
        "chosen": "margin",
        "uncertainty": pytest.approx(bits(1 / (1 + math.exp(0.1)))),
    }
    key, left_out = blind([found], seed=0)
    assert (len(key.tasks), left_out) == (1, 0)


def test_rows_with_one_text_are_never_chosen_and_a_seed_repeats():
    rows = [*rows_of(5), {"prompt": "same", "completions": ["x", "x"]}]
    scores = [[[0.0] * len(row["completions"])] for row in rows]
    found = choose_next(rows, scores, n=100, k=9, random_share=0.5, seed=1)
    assert sorted(row["prompt"] for row in found) == [f"p{i}" for i in range(5)]
    assert found == choose_next(rows, scores, n=100, k=9, random_share=0.5, seed=1)
    assert found != choose_next(rows, scores, n=100, k=9, random_share=0.5, seed=2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"k": 1}, "k from 2"),
        ({"n": 0}, "n from 1"),
        ({"random_share": 1.5}, "between 0 and 1"),
        ({"by": "luck"}, "expected one of margin, disagreement"),
        ({"scores": [[[0.0, 1.0]]]}, "expected scores of 2 rows, got 1"),
        ({"scores": [[[0.0, 1.0]], [[0.0, 1.0, 2.0]]]}, "samples row 1: expected finite scores of 2"),
        ({"scores": [[[0.0, float("nan")]], [[0.0, 1.0]]]}, "samples row 0: expected finite"),
    ],
)
def test_what_does_not_fit_is_said(change, said):
    given = {"scores": [[[0.0, 1.0]], [[0.0, 1.0]]], "n": 1, "k": 2, "random_share": 0.0, **change}
    with pytest.raises(ValueError, match=said):
        choose_next(rows_of(2, k=2), given.pop("scores"), **given)
