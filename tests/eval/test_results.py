import json
import math

import numpy as np
import pytest

from prefopt.evaluation.results import MODELS, Failed, Measures, Skipped, build_results, write_results
from prefopt.statistics.intervals import Estimate
from tests.eval.measures import measure

HALF = Estimate(0.6, 0.55, 0.65, 300, 300)


def test_all_scalar_keys_are_there_even_without_measures():
    results = build_results([])
    assert results["rm"] == {"accuracy": dict.fromkeys(("train_labelers", "heldout_labelers", "gold_ceiling"))}
    for name in ("pretraining_bits_per_byte", "heldout_task_accuracy", "kl_to_sft", "gold_reward"):
        assert results[name] == dict.fromkeys(MODELS)
    nothing = {"value": None, "ci_low": None, "ci_high": None, "n": 0}
    assert results["winrate"] == dict.fromkeys(MODELS, nothing)
    assert results["wall_seconds"] == {}


def test_scalars_come_from_the_measures():
    measures = [
        measure("winrate", "dpo", HALF, against="sft"),
        measure("winrate", "other", HALF, against="sft"),
        measure("kl_to_sft", "dpo", Estimate(1.25, 1.0, 1.5, 300, 300)),
        measure("kl_to_sft", "ppo", Skipped("no such model")),
        measure("rm.accuracy.heldout_labelers", "reward_model", Estimate(0.7, 0.68, 0.72, 900, 100)),
        measure("rm.gold_accuracy.heldout_labelers", "gold", Estimate(0.8, 0.78, 0.82, 900, 100)),
    ]
    results = build_results(measures, wall_seconds={"sft": 2.0})
    assert results["winrate"]["dpo"] == {"value": 0.6, "ci_low": 0.55, "ci_high": 0.65, "n": 300}
    assert results["winrate"]["other"]["value"] == 0.6
    assert results["kl_to_sft"]["dpo"] == 1.25
    assert results["kl_to_sft"]["ppo"] is None
    assert results["rm"]["accuracy"] == {"train_labelers": None, "heldout_labelers": 0.7, "gold_ceiling": 0.8}
    assert results["wall_seconds"] == {"sft": 2.0}


def test_a_measure_has_every_field():
    m = measure("pretraining_bits_per_byte", "ppo_ptx", Estimate(-0.1, -0.2, -0.05, 50, 50), against="ppo")
    assert set(m) == {
        *("name", "model", "against", "value", "ci_low", "ci_high", "n", "n_clusters"),
        *("higher_is_better", "status", "reason", "definition", "source"),
    }
    assert (m["status"], m["reason"], m["higher_is_better"]) == ("ok", None, False)
    assert m["definition"].startswith("paired difference ppo_ptx - ppo of: sum of nats")


def test_not_a_number_is_failed_and_a_measure_needs_a_definition():
    m = measure("gold_reward", "ppo", Estimate(math.nan, math.nan, math.nan, 3, 3))
    assert (m["value"], m["status"], m["reason"]) == (None, "failed", "the value is nan")
    assert measure("gold_reward", "ppo", Failed("boom"))["status"] == "failed"
    assert measure("gold_reward", "ppo", Skipped("no gold"))["status"] == "skipped"
    one = measure("gold_reward", "ppo", Estimate(2.0, math.nan, math.nan, 1, 1))  # one prompt has no interval
    assert (one["value"], one["ci_low"], one["status"]) == (2.0, None, "ok")
    with pytest.raises(KeyError, match="gold_reward"):
        Measures().record("gold_reward", "ppo", Skipped("no stage that defines it"))


def test_written_json_is_valid_whatever_the_numbers(tmp_path):
    results = {"a": math.nan, "b": [np.float32(1.5), np.array([1.0, math.inf])], "c": {"d": np.int64(3)}}
    write_results(results, tmp_path / "results.json")
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text) == {"a": None, "b": [1.5, [1.0, None]], "c": {"d": 3}}
