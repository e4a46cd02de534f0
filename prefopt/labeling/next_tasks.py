"""Which prompts and which outputs to rank next: those the reward model is least sure about, and a random share.

Uncertain-first labels teach more per label but are no fair sample: what is measured on them is biased. The random share
is drawn first, from all prompts alike and without looking at scores, so that accuracy and agreement on it speak for the
whole pool; each row says how it was chosen.
"""

import json
import random
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import entr, expit

from prefopt.errors import UserError
from prefopt.labeling.key import MAX_OUTPUTS, MIN_OUTPUTS
from prefopt.rankings.checks import row_problem
from prefopt.rankings.row import of_completions

By = Literal["margin", "disagreement"]
BY: tuple[By, ...] = ("margin", "disagreement")


def pair_uncertainty(scores: ArrayLike, by: By = "margin") -> NDArray:
    """How little is known about each pair of outputs, in bits.

        p_m = sigmoid(s_mi - s_mj): what checkpoint m gives to i before j (InstructGPT Eq. 1); P their mean
        margin:        H(P), 1 where the scores are equal on average (Lewis and Gale 1994)
        disagreement:  H(P) - mean of H(p_m), 0 where all checkpoints say the same, also where all are unsure
                       (Houlsby et al. 2011, arXiv:1112.5745, Eq. 1)

    From scores `[M, K]` of M checkpoints; `[K, K]`, symmetric; what stands on the diagonal means nothing.

    >>> pair_uncertainty([[0.0, 0.0, 50.0]]).round(3)[0].tolist()  # equal scores: 1 bit; far apart: nothing
    [1.0, 1.0, 0.0]
    >>> float(pair_uncertainty([[50.0, 0.0], [0.0, 50.0]], by="disagreement")[0, 1].round(3))
    1.0
    >>> float(pair_uncertainty([[0.0, 0.0], [0.0, 0.0]], by="disagreement")[0, 1])
    0.0
    """
    scores = np.asarray(scores, dtype=float)
    p = expit(scores[:, :, None] - scores[:, None, :])
    found = _bits(p.mean(axis=0))
    return found if by == "margin" else np.maximum(found - _bits(p).mean(axis=0), 0.0)


def choose_outputs(uncertainty: NDArray, k: int) -> tuple[list[int], float]:
    """The k outputs with (nearly) the largest mean uncertainty of their pairs, sorted, and that mean.

    The best set is a clique problem: this is the best of those that grow greedily from each output.

    >>> choose_outputs(np.array([[0, 1, 0.9, 0], [1, 0, 0.8, 0], [0.9, 0.8, 0, 0.1], [0, 0, 0.1, 0]]), 3)
    ([0, 1, 2], 0.9)
    """
    k = min(k, len(uncertainty))
    sets = []
    for first in range(len(uncertainty)):
        chosen = [first]
        while len(chosen) < k:
            gains = uncertainty[chosen].sum(axis=0)
            gains[chosen] = -np.inf
            chosen.append(int(gains.argmax()))
        sets.append(sorted(chosen))
    means = [_mean_of_pairs(uncertainty, chosen) for chosen in sets]
    best = int(np.argmax(means))
    return sets[best], means[best]


def choose_next(
    rows: Sequence[Mapping[str, Any]],
    scores: Sequence[ArrayLike],
    *,
    n: int,
    k: int,
    random_share: float,
    by: By = "margin",
    seed: int = 0,
    source: str = "samples",
) -> list[dict[str, Any]]:
    """n of the rows, each with at most k of its completions, in random order.

    round(n * random_share) rows and their outputs are drawn at random; the others are those whose `choose_outputs` are
    most uncertain. Outputs with one text are one output; rows with a single text are never chosen.

    Args:
        rows: `prompt` and `completions`.
        scores: per row `[M, K]`, the scores of M checkpoints.
        k: most outputs to show, at least 2.
        random_share: between 0 and 1.

    Returns:
        Rows with `completions` and the fields that go with them cut to those chosen, and `outputs` (their numbers in
        the row given), `chosen` ("random" or the value of `by`) and `uncertainty` (mean over the pairs shown, bits).
        `ranks` are left out: those of a subset would not be dense.

    Raises:
        UserError: "SOURCE row 12: field 'completions': expected ..., got ...; remedy", or an argument out of range.
    """
    if n < 1 or not MIN_OUTPUTS <= k <= MAX_OUTPUTS or not 0 <= random_share <= 1:
        raise UserError(
            f"n {n}, k {k}, random_share {random_share}: expected n from 1, k from {MIN_OUTPUTS} to the {MAX_OUTPUTS} that "
            "a sheet shows, a share between 0 and 1"
        )
    if by not in BY:
        raise UserError(f"by is {by!r}; expected one of {', '.join(BY)}")
    if len(scores) != len(rows):
        raise UserError(f"expected scores of {len(rows)} rows, got {len(scores)}")
    rng = random.Random(seed)
    different: dict[int, list[int]] = {}
    uncertainty: dict[int, NDArray] = {}
    for number, (row, found) in enumerate(zip(rows, scores, strict=True)):
        if problem := row_problem(row, ("prompt", "completions")):
            raise UserError(f"{source} row {number}: {problem}")
        found = np.asarray(found, dtype=float)
        if found.ndim != 2 or found.shape[1] != len(row["completions"]) or not np.isfinite(found).all():
            raise UserError(
                f"{source} row {number}: expected finite scores of {len(row['completions'])} completions from each "
                f"checkpoint, got shape {found.shape}"
            )
        if by == "disagreement" and len(found) < 2:
            raise UserError("by is 'disagreement': expected the scores of 2 checkpoints or more, got one")
        first: dict[str, int] = {}
        for i, completion in enumerate(row["completions"]):
            first.setdefault(json.dumps(completion, sort_keys=True, default=str), i)
        if len(first) > 1:
            different[number] = list(first.values())
            uncertainty[number] = pair_uncertainty(found[:, different[number]], by)
    order = list(different)
    rng.shuffle(order)  # also settles between rows that are equally uncertain
    n = min(n, len(order))
    picked: list[tuple[int, list[int], float, str]] = []
    for number in order[: round(n * random_share)]:
        places = sorted(rng.sample(range(len(different[number])), min(k, len(different[number]))))
        mean = _mean_of_pairs(uncertainty[number], places)
        picked.append((number, places, mean, "random"))
    found = [(number, *choose_outputs(uncertainty[number], k), by) for number in order[len(picked) :]]
    picked += sorted(found, key=lambda one: -one[2])[: n - len(picked)]
    rng.shuffle(picked)
    return [_cut(rows[number], [different[number][i] for i in places], mean, chosen)
            for number, places, mean, chosen in picked]  # fmt: skip


def _mean_of_pairs(uncertainty: NDArray, chosen: Sequence[int]) -> float:
    return float(np.mean([uncertainty[i, j] for i, j in combinations(chosen, 2)]))


def _cut(row: Mapping[str, Any], outputs: list[int], uncertainty: float, chosen: str) -> dict[str, Any]:
    kept = {name: value for name, value in row.items() if name != "ranks"}
    return {**of_completions(kept, outputs), "outputs": outputs, "chosen": chosen, "uncertainty": uncertainty}


def _bits(p: NDArray) -> NDArray:
    return (entr(p) + entr(1 - p)) / np.log(2)
