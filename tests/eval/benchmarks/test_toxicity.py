import numpy as np
import pytest

from prefopt.evaluation.benchmarks.scorers import HOSTILE, ScorerError, load_scorer, over_samples, toxicity_scores
from prefopt.evaluation.judges.gold import load_callable

TEXTS = ["the cat sat", "you idiot", "a red house"]


def by_words(texts):
    return [0.9 if "idiot" in text else 0.1 for text in texts]


def test_scores_are_the_scorers_own_in_order_whatever_the_batches():
    for batch_size in (1, 2, 100):
        np.testing.assert_array_equal(toxicity_scores(by_words, TEXTS, batch_size), [0.1, 0.9, 0.1])


def test_harmless_texts_may_all_score_the_same_with_a_scorer_that_is_alive():
    assert "idiot" in HOSTILE
    np.testing.assert_array_equal(toxicity_scores(by_words, ["a", "b"]), [0.1, 0.1])


def refuses(texts):
    raise ConnectionError("403 Forbidden")


@pytest.mark.parametrize(
    ("scorer", "reason"),
    [
        (refuses, "ConnectionError: 403 Forbidden"),
        (lambda texts: [0.0] * len(texts), "it looks dead"),
        (lambda texts: [0.3] * len(texts), "it looks dead"),
        (lambda texts: [None] * len(texts), "gave nan to text 0"),
        (lambda texts: [0.5, float("nan"), 0.5], "gave nan to text 1"),
        (lambda texts: [0.1, 0.2, 7.0], "gave 7.0 to text 2"),
        (lambda texts: [0.1], "1 scores for 3 texts"),
        (lambda texts: None, "no list of numbers"),
        (lambda texts: ["high"] * 3, "no list of numbers"),
    ],
)
def test_a_dead_scorer_is_an_error_and_never_a_zero(scorer, reason):
    with pytest.raises(ScorerError, match=reason):
        toxicity_scores(scorer, TEXTS)


def test_lm_eval_gives_zero_where_its_scorer_is_dead(monkeypatch):
    """What the own task is for; the day that this fails, the bundled one may do."""
    from lm_eval.tasks.realtoxicityprompts.metric import toxicity_perspective_api

    class Broken:
        def mount(self, *args):
            pass

        def post(self, *args, **kwargs):
            raise ConnectionError("no such host")

    monkeypatch.setenv("PERSPECTIVE_API_KEY", "none")
    monkeypatch.setattr("requests.Session", Broken)
    assert toxicity_perspective_api({}, ["you idiot"]) == {"score": 0, "perspective_api_toxicity_score": 0}


def test_expected_maximum_and_probability_against_a_loop():
    scores = np.random.default_rng(0).random((40, 7)) ** 4
    highest, toxic = over_samples(scores)
    for row, high, is_toxic in zip(scores, highest, toxic, strict=True):
        expected = 0.0
        for score in row:
            expected = score if score > expected else expected
        assert high == expected
        assert is_toxic == (1.0 if any(score >= 0.5 for score in row) else 0.0)
    assert 0 < toxic.mean() < 1


@pytest.mark.parametrize("name", ["math", "math:", ":sqrt", "math:nothing", "no_such_module:f", "math:pi"])
def test_names_of_functions_that_are_none(name):
    with pytest.raises(ValueError, match=r"math|module"):
        load_callable(name)


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory, tokenizer_source):
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("classifier")
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        max_position_embeddings=64,
        initializer_range=0.5,
        id2label={0: "harmless", 1: "toxic"},
        label2id={"harmless": 0, "toxic": 1},
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_source, pad_token="<pad>", eos_token="<eos>", model_max_length=64
    )
    tokenizer.save_pretrained(folder)
    return folder


def test_a_classifier_scores_with_the_probability_of_its_label(classifier_folder):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    scores = toxicity_scores(load_scorer(str(classifier_folder)), TEXTS)
    model = AutoModelForSequenceClassification.from_pretrained(classifier_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(classifier_folder)
    for text, score in zip(TEXTS, scores, strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        assert score == pytest.approx(logits.softmax(-1)[1].item(), abs=1e-5)
    assert len(set(scores)) == 3


def test_a_classifier_without_the_label_or_that_is_not_there(classifier_folder, tmp_path):
    with pytest.raises(ValueError, match=r"no label 'rude'.*harmless.*toxic"):
        load_scorer(str(classifier_folder), "rude")
    with pytest.raises(ValueError, match="cannot load the toxicity classifier"):
        load_scorer(str(tmp_path / "nothing"))
