"""Pairs that two labelers both ranked, against loops over all pairs of texts; who is compared with whom."""

import random
from itertools import combinations

from prefopt.labeling.agreement import agreement
from prefopt.statistics.intervals import ratio_of_sums
from prefopt.statistics.shared_pairs import agreement_of, labeler_agreement, shared_pairs


def campaign(seed, labelers=("ann", "bob", "cy"), prompts=15):
    """Rankings whose sets of completions overlap, often only in part, as where people are shown what is drawn for them."""
    rng = random.Random(seed)
    rows = []
    for prompt in range(prompts):
        texts = [f"{prompt}-{i}" for i in range(7)]
        for labeler in labelers:
            shown = rng.sample(texts, rng.randint(2, 7))
            raw = [rng.randint(1, 4) for _ in shown]
            dense = {r: i for i, r in enumerate(sorted(set(raw)), start=1)}
            ranks = [dense[r] for r in raw]
            rows.append({"prompt": f"{prompt}", "completions": shown, "ranks": ranks, "labeler": labeler})
    return rows


def counted(rows, one, other):
    """(same, untied, untied where the sets are equal), found by looking at each pair of texts."""
    same = untied = in_one_set = 0
    for a in rows:
        for b in rows:
            if (a["labeler"], b["labeler"]) == (one, other) and a["prompt"] == b["prompt"]:
                mine, theirs = (dict(zip(r["completions"], r["ranks"], strict=True)) for r in (a, b))
                for x, y in combinations(sorted(set(mine) & set(theirs)), 2):
                    if mine[x] != mine[y] and theirs[x] != theirs[y]:
                        untied += 1
                        same += (mine[x] < mine[y]) == (theirs[x] < theirs[y])
                        in_one_set += set(mine) == set(theirs)
    return same, untied, in_one_set


def shuffled(rows, seed=0):
    """The same rankings, the completions of each row in another order."""
    rng = random.Random(seed)
    for row in rows:
        order = rng.sample(range(len(row["ranks"])), len(row["ranks"]))
        yield {**row, "completions": [row["completions"][i] for i in order], "ranks": [row["ranks"][i] for i in order]}


def test_what_two_labelers_both_ranked_is_compared_whatever_else_they_ranked():
    rows = campaign(0)
    found = agreement(rows, n_resamples=10)
    counts = {f"{one} & {other}": counted(rows, one, other) for one, other in combinations(("ann", "bob", "cy"), 2)}
    for names, (same, untied, _) in counts.items():
        assert (found.by_labelers[names].value, found.by_labelers[names].n) == (same / untied, untied)
    same, untied, in_one_set = (sum(numbers) for numbers in zip(*counts.values(), strict=True))
    assert (found.all_pairs.value, found.all_pairs.n) == (same / untied, untied)
    assert 0 < found.pairs_of_other_sets == untied - in_one_set
    said = "\n".join(found.lines())
    assert f"{in_one_set} of these pairs are of labelers who ranked the same completions" in said
    assert f"{untied - in_one_set} of labelers whose completions are the same in part" in said


def test_ranks_of_two_rows_are_not_compared():
    """a before b by one row and c before d by another say nothing of a and c, whatever the ranks in them."""
    rows = [
        ("ann", {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2]}),
        ("ann", {"prompt": "p", "completions": ["c", "d"], "ranks": [1, 2]}),
        ("bob", {"prompt": "p", "completions": ["d", "c", "b", "a"], "ranks": [1, 2, 3, 4]}),
        ("cy", {"prompt": "q", "completions": ["a", "b"], "ranks": [1, 2]}),
    ]
    found = shared_pairs(rows)
    assert found == {("ann", "bob"): {0: (0, 2, 0)}}
    assert agreement_of(found.values()).value == 0


def test_the_evaluation_and_the_command_count_alike_in_any_order():
    rows = campaign(1, prompts=30)
    expected = agreement(rows).all_pairs
    assert labeler_agreement({"g": rows}) == {("g", "g"): expected}
    assert labeler_agreement({"g": list(shuffled(rows))}) == {("g", "g"): expected}
    assert agreement(list(shuffled(rows))).all_pairs == expected


def test_nobody_agrees_with_himself():
    row = {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [1, 2, 3]}
    ann, bob = row | {"labeler": "ann"}, row | {"labeler": "bob"}
    assert labeler_agreement({"g": [ann, ann]}) == {}
    assert labeler_agreement({"g": [ann], "h": [ann]}) == {}
    # Who has no name may be anyone.
    assert labeler_agreement({"g": [row, row], "h": [row]}) == {}
    assert labeler_agreement({"g": [ann], "h": [bob, ann]})["g", "h"].n == 3


def test_agreement_is_of_untied_pairs_and_leaves_out_groups_without_common_rows():
    first, second = [[1, 2, 3], [1, 2, 2]], [[2, 1, 2], [1, 3, 2]]
    rows = [
        [{"prompt": f"p{i}", "completions": ["a", "b", "c"], "ranks": r, "labeler": name} for i, r in enumerate(ranks)]
        for name, ranks in (("ann", first), ("bob", second))
    ]
    other = [{"prompt": "q", "completions": ["a", "b"], "ranks": [1, 2], "labeler": "cy"}]
    found = labeler_agreement({"train": rows[0], "heldout": rows[1], "other": other})
    assert [*found] == [("train", "heldout")]
    # Prompt 1: A over B is contradicted, B over C shared, A over C tied by one; prompt 2: two shared, B and C tied.
    assert found["train", "heldout"] == ratio_of_sums([1, 2], [2, 2])
    within = labeler_agreement({"train": rows[0] + rows[1]})["train", "train"]
    assert (within.value, within.n, within.n_clusters) == (3 / 4, 4, 2)
