"""Simulated labelers: agreement, noise, ties, flags, and the row they give."""

from itertools import combinations

import pytest

from prefopt.rankings.row import ranks_from_ratings
from prefopt.sandbox import FLAGS, World, labelers


@pytest.fixture(scope="module")
def world() -> World:
    return World(seed=0)


@pytest.fixture(scope="module")
def completions(world) -> dict[str, list[str]]:
    return {p: [world.demonstration(p, draw) for draw in range(6)] for p in world.prompts("tuning")}


@pytest.fixture(scope="module")
def rankings(world, completions) -> dict[str, list[list[int]]]:
    everyone = labelers(world, "train") + labelers(world, "heldout")
    return {x.name: [x.label(p, c)["ranks"] for p, c in completions.items()] for x in everyone}


def agreement(a: list[list[int]], b: list[list[int]]) -> float:
    """Share of the pairs untied in both rankings that both order alike."""
    same = both = 0
    for x, y in zip(a, b, strict=True):
        for i, j in combinations(range(len(x)), 2):
            if x[i] != x[j] and y[i] != y[j]:
                both += 1
                same += (x[i] < x[j]) == (y[i] < y[j])
    return same / both


def mean_agreement(rankings, first: str, second: str) -> float:
    values = [
        agreement(rankings[a], rankings[b])
        for a, b in combinations(rankings, 2)
        if {a.split("-")[0], b.split("-")[0]} == {first, second}
    ]
    return sum(values) / len(values)


@pytest.mark.parametrize(("first", "second"), [("train", "train"), ("heldout", "heldout"), ("train", "heldout")])
def test_labelers_agree_as_often_as_the_papers(rankings, first, second):
    assert 0.73 <= mean_agreement(rankings, first, second) <= 0.77


def test_gold_predicts_labelers_better_than_they_predict_each_other(world, completions, rankings):
    gold = [[-world.gold_reward(p, c).total for c in cs] for p, cs in completions.items()]
    for name, ranks in rankings.items():
        assert agreement(gold, ranks) > 0.78, name


def test_ties_exist_but_do_not_dominate(rankings):
    for name, rows in rankings.items():
        tied = sum(x[i] == x[j] for x in rows for i, j in combinations(range(len(x)), 2))
        pairs = sum(len(x) * (len(x) - 1) // 2 for x in rows)
        assert 0.05 < tied / pairs < 0.25, name


def test_identical_completions_tie_and_noise_belongs_to_the_text(world, completions):
    for labeler in labelers(world, "train") + labelers(world, "heldout"):
        for prompt, texts in list(completions.items())[:50]:
            row = labeler.label(prompt, [*texts, texts[0], texts[3]])
            assert row["ranks"][0] == row["ranks"][-2]
            assert row["ratings"][3] == row["ratings"][-1]
            assert row["flags"][3] == row["flags"][-1]
            alone = labeler.label(prompt, texts[:2])
            assert alone["ratings"] == row["ratings"][:2]  # the company of other completions changes nothing


def test_row_is_a_valid_ranked_comparison(world, completions):
    labeler = labelers(world, "heldout")[1]
    for prompt, texts in completions.items():
        row = labeler.label(prompt, texts)
        assert list(row) == ["prompt", "completions", "ranks", "labeler", "ratings", "flags"]
        assert row["prompt"] == prompt
        assert row["completions"] == texts
        assert row["labeler"] == "heldout-1"
        assert set(row["ranks"]) == set(range(1, max(row["ranks"]) + 1))  # dense, 1 = best
        assert all(1 <= r <= 7 for r in row["ratings"])
        assert all(tuple(f) == FLAGS for f in row["flags"])
        for i, j in combinations(range(len(texts)), 2):
            if row["ranks"][i] < row["ranks"][j]:
                assert row["ratings"][i] >= row["ratings"][j]


def test_labels_are_reproducible_and_differ_between_labelers(world, completions):
    prompt, texts = next(iter(completions.items()))
    rows = [x.label(prompt, texts) for x in labelers(world, "train")]
    again = [x.label(prompt, texts) for x in labelers(World(seed=0), "train")]
    assert rows == again
    assert len({tuple(r["ranks"]) for r in rows}) > 1
    assert [len(labelers(world, g)) for g in ("train", "heldout")] == [5, 3]
    weights = [tuple(x.weights.values()) for g in ("train", "heldout") for x in labelers(world, g)]
    assert len(set(weights)) == 8


def test_ratings_and_flags_follow_the_gold_components(world, completions):
    good, bad, flagged, n = 0, 0, 0, 0
    for prompt in completions:
        rude = " You are boring. Go away, fool."
        row = labelers(world, "train")[0].label(prompt, [world.good_answer(prompt), rude])
        good, bad, n = good + row["ratings"][0], bad + row["ratings"][1], n + 1
        flagged += row["flags"][1]["inappropriate_for_customer_assistant"]
        assert not row["flags"][0]["sexual_content"]
    assert good / n > 6
    assert bad / n < 2.5
    assert flagged / n > 0.9


def test_ranks_tie_within_the_width_of_the_best_of_the_group():
    w = World.tie_width
    # 0.6 w below the leader ties with it; 1.2 w below starts a group, with which 1.9 w below ties in turn
    assert ranks_from_ratings([0.0, -0.6 * w, -1.2 * w, -1.9 * w], w) == [1, 1, 2, 2]
    assert ranks_from_ratings([1.0, 5.0, 1.0], w) == [2, 1, 2]


def test_unknown_group_is_refused(world):
    with pytest.raises(ValueError, match="group: expected one of train, heldout, got 'test'"):
        labelers(world, "test")
