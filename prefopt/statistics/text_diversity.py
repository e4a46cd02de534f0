"""How different texts are from one another: distinct-n, self-BLEU, share of unique answers (Kirk et al. 2023)."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from prefopt.statistics.intervals import Estimate, Z


def words(text: str) -> list[str]:
    """Words and punctuation marks, in lower case.

    >>> words("The cat, the mat.")
    ['the', 'cat', ',', 'the', 'mat', '.']
    """
    return re.findall(r"\w+|[^\w\s]", text.lower())


def normalized(text: str) -> str:
    """The text by which answers count as the same: words and marks alone.

    >>> normalized(" Yes.") == normalized("yes .")
    True
    """
    return " ".join(words(text))


@dataclass(frozen=True)
class Distinct:
    """Share of different items among all items of some documents, and what it is without each document `[N]`."""

    value: float
    without: NDArray


def distinct(documents: Sequence[Sequence[object]]) -> Distinct | None:
    """Different items / items over all documents; None where there is none, NaN without a document that has them all.

    >>> found = distinct([["a", "b"], ["b"], ["c"]])
    >>> found.value, found.without.tolist()  # 3 of 4; without a document: 2 of 2, 3 of 3, 2 of 3
    (0.75, [1.0, 1.0, 0.6666666666666666])
    """
    counts = [Counter(document) for document in documents]
    total = Counter(chain.from_iterable(documents))
    size = total.total()
    if not size:
        return None
    lost = np.array([sum(n == total[item] for item, n in own.items()) for own in counts], dtype=float)
    left = size - np.array([own.total() for own in counts], dtype=float)
    without = np.divide(len(total) - lost, left, out=np.full(len(left), np.nan), where=left > 0)
    return Distinct(len(total) / size, without)


def jackknife(value: float, without: NDArray, n: int) -> Estimate:
    """A statistic of N prompts and its interval from its N values without one of them (Efron and Stein 1981).

        se^2 = (N - 1) / N * sum over prompts of (value without it - their mean)^2, on average not too small

    Resampling with replacement would repeat prompts, and so count fewer different n-grams than any real set has.
    """
    clusters = len(without)
    if clusters < 2 or not np.isfinite(without).all():
        return Estimate(value, np.nan, np.nan, n, clusters)
    half = Z * float(np.sqrt((clusters - 1) / clusters * ((without - without.mean()) ** 2).sum()))
    return Estimate(value, value - half, value + half, n, clusters)


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """
    >>> ngrams("a b c", 2)
    [('a', 'b'), ('b', 'c')]
    """
    found = words(text)
    return [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]


def distinct_n(texts: Sequence[str], n: int) -> Distinct | None:
    """Different n-grams / n-grams over all texts (Li et al. 2016, arXiv:1510.03055); texts shorter than n count none."""
    return distinct([ngrams(text, n) for text in texts])


def unique_share(texts: Sequence[str]) -> Distinct | None:
    """Different answers / answers, case, spacing and nothing else being overlooked.

    >>> unique_share(["Yes.", " yes .", "No."]).value == 2 / 3
    True
    """
    return distinct([[normalized(text)] for text in texts])


def self_bleu(bleu: Callable[[str, list[str]], float], texts: Sequence[str]) -> float:
    """Mean BLEU of each text with the others as its references (Zhu et al. 2018, arXiv:1802.01886): 100 = all alike.

    A text without words is like another without words (100), and unlike any other (0). `bleu` gives a hypothesis and its
    references a score in [0, 100], as that of `sentence_bleu` does.

    >>> self_bleu(lambda text, others: 100.0 * (text in others), ["a", "a", "b"])
    66.66666666666667
    """
    found = []
    for i, text in enumerate(texts):
        others = [*texts[:i], *texts[i + 1 :]]
        if words(text):
            found.append(bleu(text, others))
        else:
            found.append(100.0 if any(not words(other) for other in others) else 0.0)
    return float(np.mean(found))


def sentence_bleu() -> Callable[[str, list[str]], float]:
    """sacrebleu's sentence BLEU over up to four n-gram orders, those that a short text lacks left out."""
    from sacrebleu.metrics import BLEU

    bleu = BLEU(effective_order=True)
    return lambda text, references: bleu.sentence_score(text, references).score
