"""Distinct-n, unique answers and self-BLEU against loops; the jackknife by how often it covers."""

import numpy as np
import pytest

from prefopt.statistics.text_diversity import (
    distinct,
    distinct_n,
    jackknife,
    ngrams,
    self_bleu,
    sentence_bleu,
    unique_share,
    words,
)

pytestmark = pytest.mark.slow

TEXTS = ["The cat sat on the mat.", "the dog sat on the mat .", "A cat!", "The cat sat on the mat.", ""]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_distinct_n_and_what_it_is_without_each_text_equal_the_loop(n):
    def loop(texts: list[str]) -> float:
        found = []
        for text in texts:
            tokens = words(text)
            found += [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        return len(set(found)) / len(found)

    found = distinct_n(TEXTS, n)
    assert found.value == pytest.approx(loop(TEXTS))
    without = [loop(TEXTS[:i] + TEXTS[i + 1 :]) for i in range(len(TEXTS))]
    assert found.without.tolist() == pytest.approx(without)


def test_words_and_marks_count_and_case_and_spacing_do_not():
    assert unique_share(TEXTS).value == 4 / 5
    assert unique_share(["a b", "A  b", "a b."]).value == 2 / 3
    assert ngrams("a", 2) == []
    assert distinct_n(["a", "b"], 2) is None


def test_self_bleu_of_equal_texts_is_100_and_of_different_words_0():
    bleu = sentence_bleu()
    assert self_bleu(bleu, ["the cat sat on the mat"] * 3) == pytest.approx(100)
    apart = ["a b c d e", "f g h i j", "k l m n o"]
    assert self_bleu(bleu, apart) < 10
    assert self_bleu(bleu, [*apart, apart[0]]) > self_bleu(bleu, apart)
    assert self_bleu(bleu, ["", " ", "a b c d"]) == pytest.approx((100 + 100 + 0) / 3, abs=1)
    assert self_bleu(bleu, ["yes", "yes"]) == pytest.approx(100)  # one word: the higher orders are left out


def test_jackknife_of_a_mean_is_the_standard_error():
    x = np.random.default_rng(0).normal(size=30)
    without = (x.sum() - x) / 29
    found = jackknife(x.mean(), without, 30)
    assert found.ci_high - found.value == pytest.approx(1.96 * x.std(ddof=1) / np.sqrt(30))


def test_intervals_cover_the_expected_value():
    """Texts of a random number of words that follow Zipf's law: what 100 of them have on average is covered."""
    rng = np.random.default_rng(1)
    p = 1 / np.arange(1, 301)
    p /= p.sum()

    def draw() -> list[np.ndarray]:
        ends = rng.integers(3, 12, size=100).cumsum()
        return np.split(rng.choice(300, size=ends[-1], p=p), ends[:-1])

    def share(texts: list[np.ndarray]) -> float:
        words = np.concatenate(texts)
        return len(np.unique(words)) / len(words)

    truth = np.mean([share(draw()) for _ in range(2000)])
    found = [distinct([text.tolist() for text in draw()]) for _ in range(200)]
    intervals = [jackknife(f.value, f.without, 100) for f in found]
    covered = np.mean([e.ci_low <= truth <= e.ci_high for e in intervals])
    assert 0.92 <= covered <= 0.98
