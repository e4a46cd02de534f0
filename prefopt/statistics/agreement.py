"""Agreement of several labelers about rankings: pairs that they order alike, Kendall's W, Krippendorff's alpha."""

import json
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from prefopt.statistics.intervals import Estimate, bootstrap_over_prompts, ratio_of_sums

ALPHA_RESAMPLES = 500  # each is a call of the library, tens of milliseconds with thousands of completions


# ---- pairs that two labelers order alike ------------------------------------------------------------------------------
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


# ---- more than two labelers about the same completions ------------------------------------------------------------------


def kendall_w(ranks: ArrayLike) -> float:
    """Concordance of m labelers about n completions, corrected for ties (Kendall and Gibbons 1990, chapter 6).

        W = (12 sum_i (R_i - mean R)^2) / (m^2 (n^3 - n) - m sum_j T_j),  T_j = sum over tied groups of (t^3 - t)

    R_i is the sum of mid-ranks of completion i, from ranks `[m, n]`, 1 = best, equal = tie. W is 1 where all give the same
    ranking, 0 where rank sums are equal, NaN where every labeler ties everything.

    >>> kendall_w([[1, 2, 3], [1, 2, 3]]), kendall_w([[1, 2, 3], [3, 2, 1]])
    (1.0, 0.0)
    """
    mid = np.array([rankdata(row) for row in np.asarray(ranks, dtype=float)])
    m, n = mid.shape
    ties = sum((t**3 - t) for row in mid for t in np.unique(row, return_counts=True)[1].astype(float))
    total = m**2 * (n**3 - n) - m * ties
    sums = mid.sum(axis=0)
    return float(12 * ((sums - sums.mean()) ** 2).sum() / total) if total else float("nan")


def alpha(prompts: Sequence[Sequence[Sequence[float]]], *, n_resamples: int = ALPHA_RESAMPLES) -> Estimate:
    """Krippendorff's alpha at the ordinal level (Krippendorff 2018, Content Analysis, chapter 12).

        alpha = 1 - observed / expected disagreement: 1 is perfect, 0 is chance, below 0 is worse than chance

    Per prompt, a list of K numbers from each of its labelers; a unit is one completion. The interval resamples prompts,
    and n and n_clusters count them.

    >>> alpha([[[1, 2, 3], [1, 2, 3]], [[3, 1, 2], [3, 1, 2]]]).value
    1.0
    """
    # An optional package, which only this needs.
    import krippendorff

    domain = sorted({float(value) for labelers in prompts for values in labelers for value in values})
    if len(domain) < 2:
        return Estimate(np.nan, np.nan, np.nan, 0, 0)
    at = {value: i for i, value in enumerate(domain)}
    counts = []  # per prompt [K, V]: how many labelers gave completion k the value v
    for labelers in prompts:
        table = np.zeros((len(labelers[0]), len(domain)))
        for values in labelers:
            for k, value in enumerate(values):
                table[k, at[float(value)]] += 1
        counts.append(table)

    def of(chosen: NDArray) -> float:
        table = np.concatenate([counts[int(i)] for i in chosen])
        if (table.sum(axis=0) > 0).sum() < 2:  # all said the same of everything: nothing was to be disagreed on
            return float("nan")
        return float(krippendorff.alpha(value_counts=table, value_domain=domain, level_of_measurement="ordinal"))

    def statistic(numbers: NDArray, axis: int) -> NDArray:
        return np.apply_along_axis(of, axis, numbers)

    return bootstrap_over_prompts(statistic, np.arange(len(prompts)), n_resamples=n_resamples)
