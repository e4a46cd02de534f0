"""The metric behind the interface of `evaluate`: batches, local loading, errors; the number itself by arithmetic."""

import doctest
import inspect
import math
import sys

import evaluate
import numpy as np
import pytest
import torch

from prefopt.evaluation import kwise_accuracy
from prefopt.evaluation.kwise_accuracy import KwiseAccuracy
from prefopt.statistics.rankings import pair_accuracy, ranking_metrics

# A > B = C ordered right twice; B > A ordered wrong; equal scores; a tied pair; C absent
SCORES = [[3.0, 2.0, 1.0], [5.0, 0.0], [1.0, 1.0], [2.0, 7.0], [2.0, 1.0, 9.0]]
RANKS = [[1, 2, 2], [2, 1], [1, 2], [1, 1], [1, 2, 0]]
ACCURACY = (2 + 0 + 0.5 + 1) / (2 + 1 + 1 + 1)


@pytest.fixture
def metric(tmp_path) -> KwiseAccuracy:
    return KwiseAccuracy(cache_dir=str(tmp_path))


def test_compute_returns_the_accuracy_with_its_interval(metric):
    expected = pair_accuracy(SCORES, RANKS)
    assert metric.compute(predictions=SCORES, references=RANKS) == {
        "accuracy": ACCURACY,
        "accuracy_ci_low": expected.ci_low,
        "accuracy_ci_high": expected.ci_high,
        "num_pairs": 5,
        "num_prompts": 4,
    }
    assert 0 <= expected.ci_low < ACCURACY < expected.ci_high <= 1


def test_batches_and_single_prompts_add_up(metric):
    metric.add_batch(predictions=SCORES[:2], references=RANKS[:2])
    metric.add(prediction=SCORES[2], reference=RANKS[2])
    metric.add_batch(predictions=SCORES[3:], references=RANKS[3:])
    in_parts = metric.compute()
    assert in_parts == metric.compute(predictions=SCORES, references=RANKS)
    assert metric.compute(predictions=SCORES[1:2], references=RANKS[1:2])["num_pairs"] == 1  # nothing left over


@pytest.mark.parametrize("array", [np.array, torch.tensor])
def test_takes_the_arrays_of_a_trainer(metric, array):
    scores, ranks = array([[2.0, 1.0, -100.0], [1.0, 2.0, 3.0]]), array([[1, 2, -100], [1, 2, 2]])
    result = metric.compute(predictions=scores, references=ranks)
    assert (result["accuracy"], result["num_pairs"]) == (1 / 3, 3)


def test_one_prompt_has_no_interval_and_no_pairs_no_accuracy(metric):
    one = metric.compute(predictions=[[2.0, 1.0]], references=[[1, 2]])
    assert one["accuracy"] == 1.0
    assert math.isnan(one["accuracy_ci_low"])
    assert math.isnan(one["accuracy_ci_high"])
    none = metric.compute(predictions=[[2.0, 1.0]], references=[[1, 1]])
    assert math.isnan(none["accuracy"])
    assert (none["num_pairs"], none["num_prompts"]) == (0, 0)


def test_bad_input_names_the_prompt_and_leaves_the_metric_usable(metric):
    with pytest.raises(ValueError, match="prompt 1: expected 3 scores, one for each rank"):
        metric.compute(predictions=[[1.0, 2.0], [1.0, 2.0]], references=[[1, 2], [1, 2, 3]])
    with pytest.raises(ValueError, match="prompt 0: scores of ranked completions must be finite"):
        metric.compute(predictions=[[1.0, math.nan]], references=[[1, 2]])
    assert metric.compute(predictions=SCORES, references=RANKS)["accuracy"] == ACCURACY


def test_evaluate_loads_it_from_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path / "modules")
    monkeypatch.setattr(sys, "path", [*sys.path])
    try:
        loaded = evaluate.load(inspect.getsourcefile(KwiseAccuracy), cache_dir=str(tmp_path / "cache"))
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "evaluate_modules"]:
            del sys.modules[name]
    assert isinstance(loaded, evaluate.Metric)
    assert loaded.compute(predictions=SCORES, references=RANKS)["accuracy"] == ACCURACY


def test_combines_with_other_metrics(metric, tmp_path):
    again = KwiseAccuracy(cache_dir=str(tmp_path / "again"))
    result = evaluate.combine({"a": metric, "b": again}).compute(predictions=SCORES, references=RANKS)
    assert result["a_accuracy"] == result["b_accuracy"] == ACCURACY


def test_info_says_what_it_is(metric):
    assert metric.name == "kwise_accuracy"
    assert metric.module_type == "metric"
    assert "2203.02155" in metric.citation
    assert "strictly ranked pairs" in metric.description
    assert "accuracy_ci_low" in KwiseAccuracy.__doc__


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path)
    examples = doctest.DocTestParser().get_doctest(kwise_accuracy._KWARGS_DESCRIPTION, {}, "KwiseAccuracy", None, None)
    assert doctest.DocTestRunner().run(examples) == (0, 3)


def test_a_rank_between_two_is_not_rounded(metric):
    with pytest.raises(ValueError, match="whole number"):
        metric.compute(predictions=[[2.0, 1.0]], references=[[1.5, 1.2]])


def test_its_interval_is_that_of_an_evaluation(metric):
    found, expected = (
        metric.compute(predictions=SCORES, references=RANKS),
        ranking_metrics(SCORES, RANKS)["accuracy"],
    )
    assert (found["accuracy_ci_low"], found["accuracy_ci_high"]) == (expected.ci_low, expected.ci_high)
