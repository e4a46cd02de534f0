"""Controlled sentiment: the gold reward, what is degenerate, sentences in splits, and labelers of this world."""

from itertools import combinations

import pytest

from prefopt.errors import UserError
from prefopt.sandbox import SentimentWorld, labelers
from prefopt.sandbox.sentiment import CHARGED, REPEATED, sentiment

pytest.importorskip("vaderSentiment", reason="the gold reward needs vaderSentiment")

NAMES = ("Anna", "Bertha", "Clara", "Dora", "Emma", "Flora", "Greta", "Hanna")
VERBS = ("walked", "looked", "turned", "came", "spoke", "went", "sat", "wrote")
ENDS = ("with great joy.", "in a terrible rage.", "and said no more about it.", "to buy bread.")
TEXT = " ".join(f"{n} {v} down to the old house by the river {e}" for n in NAMES for v in VERBS for e in ENDS)


@pytest.fixture(scope="module")
def world():
    return SentimentWorld([TEXT], [TEXT[:900]] * 5, [TEXT[-900:]] * 4, seed=1)


def test_a_sentence_has_the_lexicons_own_number():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    text = " to the garden, where a lovely surprise was waiting for her sister."
    score = sentiment(text)
    assert score.total == score.sentiment == SentimentIntensityAnalyzer().polarity_scores(text)["compound"] > 0.5
    assert score.fluency == 0


@pytest.mark.parametrize(
    ("text", "degenerate"),
    [
        ("", 1.0),
        (" ... !!", 1.0),
        # Of six long words five stand there already.
        (" table table table table table table", (5 / 6 - REPEATED) / (1 - REPEATED)),
        # All five words are in the lexicon.
        (" wonderful lovely happy great delighted", (1 - CHARGED) / (1 - CHARGED)),
        # Three of six parts are no words; half of the sentence may have a fifth of them.
        (" bread 1 2 3 and butter", (3 / 6 - 0.2) / 0.8),
    ],
)
def test_what_is_degenerate_costs(text, degenerate):
    score = sentiment(text)
    assert score.fluency == pytest.approx(-degenerate, abs=1e-12)
    assert score.total == pytest.approx(score.sentiment + score.fluency, abs=1e-12)
    assert -1 <= score.total <= 1


def test_splits_share_no_prompt_and_end_as_the_author_did(world):
    seen = set()
    for split in ("sft", "rm", "rl", "tuning", "test"):
        rows = world.demonstrations(split, 2)
        prompts = {row["prompt"] for row in rows}
        assert len(prompts) == 2
        assert not prompts & seen
        seen |= prompts
        assert all(row["prompt"] + row["completion"] in TEXT for row in rows)
        assert all(4 <= len(row["prompt"].split()) <= 6 and row["completion"].startswith(" ") for row in rows)
        assert world.prompts(split, 2) == [row["prompt"] for row in rows]


def test_too_many_prompts_are_refused_with_the_number_that_there_are(world):
    with pytest.raises(UserError, match=r"rl_prompts is 100000, but the text has \d+ prompts for it"):
        world.prompts("rl", 100_000)


def test_documents_are_cut_between_words():
    long, short = "word " * 500, "x" * 100
    world = SentimentWorld([TEXT], [long, short], [long], seed=0)
    assert world.corpus("train", 10) == ["word " * 239 + "word"]
    assert world.corpus("test", 10) == world.corpus("train", 10)


def test_labelers_follow_the_gold_reward_with_noise_and_ties(world):
    prompt = world.prompts("rm", 1)[0]
    completions = [" she was so happy and glad.", " it was a table.", " it was a horrible murder.", " 1 2 3 4"]
    rows = [person.label(prompt, completions) for group in ("train", "heldout") for person in labelers(world, group)]
    gold = [world.gold_reward(prompt, text).total for text in completions]
    for row in rows:
        assert all(1 <= rating <= 7 for rating in row["ratings"])
        assert not any(any(flags.values()) for flags in row["flags"])
    right = [
        row["ranks"][i] < row["ranks"][j]
        for row in rows
        for i, j in combinations(range(4), 2)
        if gold[i] > gold[j] + 3 * world.labeler_noise
    ]
    assert sum(right) / len(right) > 0.9
    assert len({tuple(row["ranks"]) for row in rows}) > 1
