import math

import numpy as np
import pytest
import sacrebleu
from datasets import Dataset

from prefopt.evaluation.benchmarks import Score
from prefopt.evaluation.benchmarks.scorers import ScorerError, judge_answers
from prefopt.evaluation.benchmarks.scores import (
    crows_pairs_results,
    difference,
    estimate,
    pair_entropy,
    quac_docs,
    quac_results,
    rouge_results,
    squad_results,
    truthfulqa_results,
    winogender_docs,
    word_f1,
)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("The red house.", "a red HOUSE", 1.0),
        ("red house on the hill", "the red car", 2 * (1 / 4) * (1 / 2) / (1 / 4 + 1 / 2)),
        ("red red", "red", 2 * (1 / 2) * 1 / (1 / 2 + 1)),  # a word counts as often as it is in both
        ("blue", "red", 0.0),
        ("", "red", 0.0),
        ("the", "", 1.0),  # nothing is left of an article
    ],
)
def test_word_f1_is_the_harmonic_mean_of_precision_and_recall(prediction, reference, expected):
    assert word_f1(prediction, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "references", "f1", "exact"),
    [
        (" The red house", ["red house", "house"], 1.0, 1.0),
        (" a red house", ["the house"], 2 * (1 / 2) * 1 / (1 / 2 + 1), 0.0),
        (" Not in background.", ["red house"], 0.0, 0.0),
        (" Not in background.", [], 1.0, 1.0),
        (" unanswerable", [], 1.0, 1.0),
        (" red house", [], 0.0, 0.0),
    ],
)
def test_squad_scores(answer, references, f1, exact):
    assert squad_results({"answers": {"text": references}}, [answer]) == pytest.approx({"f1": f1, "exact": exact})


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("red house", ["a red house"], 1.0),
        # Against all but one: without "red house" the best is "blue house" (1/2), without the other it is 1.
        ("red house", ["red house", "blue house"], (0.5 + 1.0) / 2),
        ("I don't know.", ["CANNOTANSWER"], 1.0),
        ("I don't know.", ["CANNOTANSWER", "red house"], 1.0),  # half of them: no answer it is
        ("red house", ["CANNOTANSWER", "red house", "red house"], 1.0),
        ("I don't know.", ["CANNOTANSWER", "red house", "red house"], 0.0),
    ],
)
def test_quac_f1_leaves_one_reference_out(answer, references, expected):
    assert quac_results({"references": references}, [answer])["f1"] == pytest.approx(expected)


def test_quac_rows_carry_the_turns_before_them():
    rows = quac_docs(
        Dataset.from_list(
            [
                {
                    "dialogue_id": "d",
                    "wikipedia_page_title": "Ada",
                    "section_title": "Life",
                    "context": "Ada wrote. CANNOTANSWER",
                    "questions": ["Who wrote?", "When?"],
                    "answers": {"texts": [["Ada", "Ada wrote"], ["CANNOTANSWER"]]},
                    "orig_answers": {"texts": ["Ada", "CANNOTANSWER"]},
                }
            ]
        )
    )
    assert rows["history"] == ["", "Q: Who wrote?\n\nA: Ada\n\n"]
    assert rows["answer"] == ["Ada", "I don't know."]
    assert rows["references"] == [["Ada", "Ada wrote"], ["CANNOTANSWER"]]
    assert rows["paragraph"] == ["Ada wrote."] * 2


@pytest.mark.parametrize("difference", [0.0, 0.3, -0.3, 2.0, 30.0, 800.0, -2000.0])
def test_entropy_of_a_pair_from_its_definition(difference):
    p = 1 / (1 + math.exp(min(700.0, difference)))
    expected = -sum(x * math.log2(x) for x in (p, 1 - p) if 0 < x < 1)
    assert pair_entropy(-5000.0, -5000.0 + difference) == pytest.approx(expected, abs=1e-9)


def test_crows_pairs_scores():
    assert crows_pairs_results({}, [(-3.0, False), (-4.0, False)])["stereotyped"] == 1.0
    assert crows_pairs_results({}, [(-4.0, False), (-3.0, False)])["stereotyped"] == 0.0
    assert crows_pairs_results({}, [(-3.0, False), (-3.0, True)]) == {"entropy_bits": 1.0, "stereotyped": 0.5}


def test_winogender_pairs_differ_in_gender_and_have_no_neutral_one():
    rows = [
        {
            "sentid": f"{job}.patient.{n}.{gender}.txt",
            "sentence": f"{job}{n}{gender}",
            "gender": gender,
            "occupation": job,
        }
        for job in ("nurse", "cook")
        for n in (0, 1)
        for gender in ("female", "neutral", "male")
    ]
    pairs = winogender_docs(Dataset.from_list(rows))
    assert pairs["sentences"][1] == ["nurse1male", "nurse1female"]
    assert pairs["occupation"] == ["nurse", "nurse", "cook", "cook"]
    with pytest.raises(ValueError, match=r"cook\.patient\.1\.txt has only the genders"):
        winogender_docs(Dataset.from_list(rows[:-1]))


def test_truthfulqa_without_a_judge():
    doc = {"correct_answers": ["The moon is rock"], "incorrect_answers": ["The moon is cheese", ""]}
    assert truthfulqa_results(doc, ["The moon is rock"]) == {"bleu_acc": 1.0, "no_comment": 0.0}
    assert truthfulqa_results(doc, ["The moon is cheese"]) == {"bleu_acc": 0.0, "no_comment": 0.0}
    assert truthfulqa_results(doc, [" I have no comment."]) == {"bleu_acc": 1.0, "no_comment": 1.0}


def test_verdicts_need_half_a_probability_and_both_for_both():
    rows = [{"answer": a} for a in "abcd"]
    given = [(1, 1), (1, 0), (0, 1), (0.5, 0.51)]
    found = judge_answers(lambda rows: [{"true": t, "informative": i} for t, i in given], rows)
    assert [v["true"] for v in found] == [1, 1, 0, 1]
    assert [v["true_and_informative"] for v in found] == [1, 0, 0, 1]
    for wrong in ([{}] * 4, [{"true": 2, "informative": 0}] * 4, [{"true": 1, "informative": 1}], [None] * 4):
        with pytest.raises(ScorerError, match="judge of truthfulness gave"):
            judge_answers(lambda rows, wrong=wrong: wrong, rows)


def test_rouge_counts_words_in_order():
    scores = rouge_results({"highlights": "dog runs home"}, ["home runs dogs"])
    assert scores["rouge1"] == pytest.approx(1.0)  # stems
    assert scores["rougeL"] == pytest.approx(1 / 3)


def records(values, clusters=None, key="f1"):
    clusters = clusters or range(len(values))
    return [
        {"id": i, "hash": str(i), "cluster": str(c), "values": {key: v}}
        for i, (v, c) in enumerate(zip(values, clusters, strict=True))
    ]


def test_means_resample_clusters():
    values, clusters = [1, 0, 1, 1, 0.5, 0], [0, 0, 0, 1, 1, 2]
    found = estimate(Score("f1", "", scale=100), records(values, clusters))
    assert found.value == pytest.approx(100 * 3.5 / 6)
    assert (found.n, found.n_clusters) == (6, 3)
    wide = estimate(Score("f1", ""), records([1, 1, 0, 0] * 10, [0] * 10 + [1] * 10 + [2] * 10 + [3] * 10))
    copies = estimate(Score("f1", ""), records([1] * 10 + [0] * 10, [0] * 10 + [1] * 10))
    alone = estimate(Score("f1", ""), records([1] * 10 + [0] * 10))
    assert copies.ci_high - copies.ci_low > 2 * (alone.ci_high - alone.ci_low)  # ten copies are one row
    assert wide.value == 0.5


def test_perplexity_of_log_likelihoods():
    lls = [-1.0, -2.5, -0.3]
    score = Score("perplexity", "", False, statistic="perplexity")
    assert estimate(score, records(lls, key="perplexity")).value == pytest.approx(math.exp(3.8 / 3))
    twice = records([2 * ll for ll in lls], key="perplexity")
    paired = difference(score, twice, records(lls, key="perplexity"))
    assert paired.value == pytest.approx(math.exp(7.6 / 3) - math.exp(3.8 / 3))


ANSWERS = ["the cat sat on the mat", "a dog ran to the old house", "good day to you all", "she reads a book here"]
REFERENCES = ["the cat is on the mat", "the dog ran to the red house", "good day to you", "she reads the book there"]


def translations(answers):
    return [
        {"id": i, "hash": str(i), "cluster": str(i), "values": {}, "responses": [a], "target": r}
        for i, (a, r) in enumerate(zip(answers, REFERENCES, strict=True))
    ]


def test_bleu_is_sacrebleus_of_the_corpus_and_not_a_mean_over_sentences():
    score = Score("bleu", "", statistic="bleu")
    found = estimate(score, translations(ANSWERS))
    assert found.value == pytest.approx(sacrebleu.corpus_bleu(ANSWERS, [REFERENCES]).score)
    assert found.ci_low < found.value < found.ci_high
    worse = ["the cat", "", "x", "she reads a book here"]
    paired = difference(score, translations(worse), translations(ANSWERS))
    expected = sacrebleu.corpus_bleu(worse, [REFERENCES]).score - sacrebleu.corpus_bleu(ANSWERS, [REFERENCES]).score
    assert paired.value == pytest.approx(expected)
    assert paired.value < 0


def test_differences_are_paired_and_have_a_sign():
    rng = np.random.default_rng(0)
    base = rng.random(200)
    stage = np.clip(base - 0.05, 0, 1)
    score = Score("f1", "")
    paired = difference(score, records(stage), records(base))
    assert paired.value == pytest.approx(float((stage - base).mean()))
    assert paired.ci_high < 0  # far narrower than the intervals of either
    alone = estimate(score, records(base))
    assert paired.ci_high - paired.ci_low < 0.1 * (alone.ci_high - alone.ci_low)
    with pytest.raises(ValueError, match="same rows"):
        difference(score, records(stage), records(base)[::-1])
    with pytest.raises(ValueError, match="same rows"):
        difference(score, records(stage[:-1]), records(base))
