"""Scores of single rows become estimates: means, perplexities and corpus BLEU, and paired differences of two models."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefopt.evaluation.benchmarks.benchmark import Score
from prefopt.statistics.intervals import Estimate, bootstrap_over_prompts

Records = Sequence[Mapping[str, Any]]


def estimate(score: Score, records: Records) -> Estimate:
    """A score of one model with its interval; rows of one cluster are resampled together.

    Raises:
        KeyError: a record lacks the score.
        ValueError: a score is not finite.

    Example:
        >>> score = Score("acc", "acc", "share of right answers")
        >>> records = [{"id": i, "cluster": str(i), "values": {"acc": acc}} for i, acc in enumerate([1.0, 0.0])]
        >>> estimate(score, records).value
        0.5
    """
    statistic, columns = _columns(score, records)
    return _counted(bootstrap_over_prompts(statistic, *columns), records)


def difference(score: Score, records: Records, base: Records) -> Estimate:
    """The score of one model minus that of another on the same rows, which are resampled together (paired).

    Raises:
        ValueError: the two have not answered the same rows.
    """
    if [(r["id"], r["hash"]) for r in records] != [(r["id"], r["hash"]) for r in base]:
        raise ValueError("the two models have not answered the same rows")
    statistic, columns = _columns(score, records)
    _, base_columns = _columns(score, base)
    half = len(columns)

    def paired(*arrays: NDArray, axis: int) -> NDArray:
        return statistic(*arrays[:half], axis=axis) - statistic(*arrays[half:], axis=axis)

    return _counted(bootstrap_over_prompts(paired, *columns, *base_columns), records)


def _counted(found: Estimate, records: Records) -> Estimate:
    return replace(found, n=len(records))


def _columns(score: Score, records: Records) -> tuple[Callable[..., NDArray], list[NDArray]]:
    """A statistic, and the sums over each cluster that it takes."""
    if score.statistic == "bleu":
        per_row = np.array([_bleu_counts(r["responses"][0], r["target"]) for r in records])
        statistic = _bleu
    else:
        values = [r["values"][score.key] for r in records]
        per_row = np.array([[value, 1.0] for value in values])
        statistic = _perplexity if score.statistic == "perplexity" else _mean(score.scale)
    clusters = np.unique([r["cluster"] for r in records], return_inverse=True)[1]
    sums = np.zeros((clusters.max() + 1, per_row.shape[1]))
    np.add.at(sums, clusters, per_row)
    return statistic, list(sums.T)


def _mean(scale: float) -> Callable[..., NDArray]:
    return lambda total, count, axis: scale * total.sum(axis) / count.sum(axis)


def _perplexity(total: NDArray, count: NDArray, axis: int) -> NDArray:
    return np.exp(-total.sum(axis) / count.sum(axis))


def _bleu_counts(answer: str, reference: str) -> list[float]:
    """n-grams found and written for n = 1 .. 4, and both lengths: what corpus BLEU is a function of."""
    import sacrebleu

    score = sacrebleu.corpus_bleu([answer], [[reference]])
    return [*score.counts, *score.totals, score.sys_len, score.ref_len]


def _bleu(*columns: NDArray, axis: int) -> NDArray:
    """Corpus BLEU (Papineni et al. 2002) of the summed counts, by sacrebleu."""
    from sacrebleu import BLEU

    sums = np.stack([column.sum(axis) for column in columns], axis=-1)
    scores = [
        BLEU.compute_bleu(
            correct=[int(c) for c in row[:4]],
            total=[int(t) for t in row[4:8]],
            sys_len=int(row[8]),
            ref_len=int(row[9]),
            smooth_method="exp",
        ).score
        for row in sums.reshape(-1, 10)
    ]
    return np.array(scores).reshape(sums.shape[:-1])
