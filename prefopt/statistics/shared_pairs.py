"""Agreement of two labelers: the pairs of completions that both ranked, and how many of them both order the same way."""

import json
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefopt.statistics.intervals import Estimate, ratio_of_sums


class Shared(NamedTuple):
    """Of two labelers and one prompt: pairs of completions that both ranked."""

    same: int  # ordered the same way
    untied: int  # tied by neither
    untied_in_one_set: int  # of these, where both ranked the very same completions


def shared_pairs(rows: Iterable[tuple[Hashable, Mapping[str, Any]]]) -> dict[tuple[Any, Any], dict[int, Shared]]:
    """What every two labelers both ranked, whether or not the others of their completions are the same.

        {(one, other): {number of the prompt: Shared}}, one before the other in the order of their first rows

    Rows are (labeler, {`prompt`, `completions`, `ranks`}). Completions are known by their text, so their order in a row
    says nothing. A rank compares with those of its own row alone; of several orders that one labeler gave a pair the
    last counts.

    >>> rows = [("ann", {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [1, 2, 3]}),
    ...         ("bob", {"prompt": "p", "completions": ["d", "c", "b"], "ranks": [1, 1, 2]})]
    >>> shared_pairs(rows)  # both ranked b and c
    {('ann', 'bob'): {0: Shared(same=0, untied=1, untied_in_one_set=0)}}
    """
    prompts: dict[str, dict[Hashable, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    order: dict[Hashable, int] = {}
    for labeler, row in rows:
        order.setdefault(labeler, len(order))
        prompts[json.dumps(row["prompt"], sort_keys=True)][labeler].append(row)
    found: dict[tuple[Any, Any], dict[int, Shared]] = defaultdict(dict)
    for number, by_labeler in enumerate(prompts.values()):
        said = {labeler: _ordered(of) for labeler, of in by_labeler.items()} if len(by_labeler) > 1 else {}
        for one, other in combinations(sorted(said, key=order.__getitem__), 2):
            both = [(said[one][pair], said[other][pair]) for pair in said[one] if pair in said[other]]
            untied = [(a, b) for a, b in both if a[0] and b[0]]
            if both:
                found[one, other][number] = Shared(
                    sum(a[0] == b[0] for a, b in untied), len(untied), sum(a[1] == b[1] for a, b in untied)
                )
    return dict(found)


def _ordered(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], tuple[int, tuple[str, ...]]]:
    """Of one labeler and prompt: (sign of rank - rank, all completions ranked with it) of each pair of texts."""
    found = {}
    for row in rows:
        ranks: dict[str, int] = {}
        for completion, rank in zip(row["completions"], row["ranks"], strict=True):
            # A text that stands there twice counts once: it agrees with itself whatever is said.
            ranks.setdefault(json.dumps(completion, sort_keys=True), rank)
        texts = tuple(sorted(ranks))
        for a, b in combinations(texts, 2):
            found[a, b] = ((ranks[a] > ranks[b]) - (ranks[a] < ranks[b]), texts)
    return found


def agreement_of(shared: Iterable[Mapping[int, Shared]], n_resamples: int = 2000) -> Estimate:
    """Pairs ordered the same way / pairs that neither of two labelers ties (InstructGPT, section 3.4); over prompts."""
    sums: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for by_prompt in shared:
        for number, pairs in by_prompt.items():
            sums[number][0] += pairs.same
            sums[number][1] += pairs.untied
    same, untied = np.array([*sums.values()], dtype=float).reshape(-1, 2).T
    return ratio_of_sums(same, untied, n_resamples=n_resamples)


def labeler_agreement(rows_by_group: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[tuple[str, str], Estimate]:
    """How often labelers agree, within each group and between two: the ceiling of a reward model's accuracy.

    Labelers are told apart by their name, `labeler`: rows without one are in no number, and nobody agrees with himself.
    What is compared is what `shared_pairs` says; two groups without any are left out.

    >>> row = {"prompt": "p", "completions": ["a", "b", "c"]}
    >>> rows = {"train": [row | {"ranks": [1, 2, 3], "labeler": "ann"}],
    ...         "heldout": [row | {"ranks": [2, 1, 2], "labeler": "bob"}]}
    >>> found = labeler_agreement(rows)
    >>> found["train", "heldout"].value, found["train", "heldout"].n, len(found)
    (0.5, 2, 1)
    """
    named = [((g, row["labeler"]), row) for g, rows in rows_by_group.items() for row in rows if row.get("labeler")]
    by_groups: dict[tuple[str, str], list[dict[int, Shared]]] = defaultdict(list)
    for ((g, one), (h, other)), shared in shared_pairs(named).items():
        if one != other:
            by_groups[g, h].append(shared)
    groups = [*((g, g) for g in rows_by_group), *combinations(rows_by_group, 2)]
    found = {names: agreement_of(by_groups[names]) for names in groups if names in by_groups}
    return {names: estimate for names, estimate in found.items() if estimate.n}


def same_and_untied(a: Sequence[int], b: Sequence[int]) -> NDArray:
    """Pairs that two rankings order the same way, and pairs that neither ties.

    >>> same_and_untied([1, 2, 3], [2, 1, 2]).tolist()  # a against b differs, b > c agrees, a against c is tied
    [1, 2]
    """
    a, b = np.asarray(a), np.asarray(b)
    products = (np.sign(a[:, None] - a) * np.sign(b[:, None] - b))[np.triu_indices(len(a), 1)]
    return np.array([(products > 0).sum(), (products != 0).sum()])
