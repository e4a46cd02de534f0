import copy
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from prefopt.evaluation.evaluate_models import evaluate
from prefopt.evaluation.report.page import build_report
from prefopt.evaluation.results import find, write_results
from prefopt.inference.jsonl import read_jsonl
from prefopt.statistics.intervals import win_rate

PROMPTS = [f"question: what is {i}? answer:" for i in range(12)]
USE_CASES = ["open_qa"] * 6 + ["chat"] * 3 + ["extract"] * 3
CORPUS = ["the cat sat on the mat", "the dog ran to the red house", "a dog and a cat"]
TASKS = [
    {"context": "the cat sat on the", "choices": [" mat", " dog"], "answer": " mat"},
    {"context": "the dog ran to the", "choices": [" red house", " cat"], "answer": " red house"},
]
RANKED = [
    {"prompt": p, "completions": [" a dog", " a cat", " the mat"], "ranks": [1, 2, 2]} for p in PROMPTS[:4]
]


@dataclass(frozen=True)
class Gold:
    total: float
    vowels: float
    short: float


def gold(prompt, completion):
    vowels = float(sum(letter in "aeiou" for letter in completion))
    return Gold(vowels + float(len(completion) < 9), vowels, float(len(completion) < 9))


@pytest.fixture
def models(causal_lm, tokenizer):
    def moved(seed):
        model = LlamaForCausalLM(copy.deepcopy(causal_lm.config))
        torch.manual_seed(seed)
        model.load_state_dict({k: v + 0.05 * torch.randn_like(v) for k, v in causal_lm.state_dict().items()})
        return model, tokenizer

    return {"sft": (causal_lm, tokenizer), "ppo": moved(1), "ppo_ptx": moved(2), "dpo": moved(3)}


@pytest.fixture
def settings(reward_model):
    return {
        "prompts": PROMPTS,
        "gold": gold,
        "use_cases": USE_CASES,
        "heldout_use_case": "extract",
        "corpus": CORPUS,
        "tasks": TASKS,
        "reward_model": reward_model,
        "ranked_rows": {"train_labelers": RANKED, "heldout_labelers": RANKED[:2]},
        "max_new_tokens": 6,
        "seed": 4,
    }


def test_everything_is_measured(models, settings, tmp_path):
    results = evaluate(models, **settings, wall_seconds={"sft": 1.5}, folder=tmp_path / "completions")
    assert [m for m in results["measures"] if m["status"] != "ok"] == []
    trained = np.array([use_case != "extract" for use_case in USE_CASES])
    drawn = {name: read_jsonl(tmp_path / "completions" / f"{name}.jsonl") for name in models}
    for name, rows in drawn.items():
        assert [row["prompt"] for row in rows] == PROMPTS
        totals = np.array([gold(r["prompt"], r["sampled"]["text"]).total for r in rows])
        base = np.array([r["sampled"]["gold"] for r in drawn["sft"]])
        assert results["gold_reward"][name] == pytest.approx(totals[trained].mean())
        expected = win_rate(totals[trained], base[trained])
        assert results["winrate"][name] == {
            "value": expected.value,
            "ci_low": expected.ci_low,
            "ci_high": expected.ci_high,
            "n": 9,
        }
        heldout = find(results["measures"], "winrate_heldout_use_case", name, "sft")
        assert (heldout["value"], heldout["n"]) == (win_rate(totals[~trained], base[~trained]).value, 3)
        greedy = find(results["measures"], "gold_reward_greedy", name)
        assert greedy["value"] == pytest.approx(np.mean([r["greedy"]["gold"] for r in rows[:9]]))
        vowels = find(results["measures"], "gold_component.vowels", name)["value"]
        short = find(results["measures"], "gold_component.short", name)["value"]
        assert vowels + short == pytest.approx(results["gold_reward"][name])
        assert 0 <= results["heldout_task_accuracy"][name] <= 1
    assert results["winrate"]["sft"]["value"] == 0.5
    assert results["kl_to_sft"]["sft"] == 0.0
    assert all(results["kl_to_sft"][name] > 0 for name in ("ppo", "ppo_ptx", "dpo"))
    bits = results["pretraining_bits_per_byte"]
    contrast = find(results["measures"], "pretraining_bits_per_byte", "ppo_ptx", "ppo")
    assert contrast["value"] == pytest.approx(bits["ppo_ptx"] - bits["ppo"])
    assert contrast["ci_low"] <= contrast["value"] <= contrast["ci_high"]
    assert set(results["rm"]["accuracy"]) == {"train_labelers", "heldout_labelers", "gold_ceiling"}
    assert results["rm"]["accuracy"]["gold_ceiling"] == pytest.approx(
        np.mean(
            [gold(p, " a dog").total > gold(p, y).total for p in PROMPTS[:2] for y in (" a cat", " the mat")]
        )
        + 0.5
        * np.mean(
            [gold(p, " a dog").total == gold(p, y).total for p in PROMPTS[:2] for y in (" a cat", " the mat")]
        )
    )
    assert results["wall_seconds"] == {"sft": 1.5}
    gains = [
        s["completions"]["ppo_ptx"]["gold"] - s["completions"]["sft"]["gold"] for s in results["samples"]
    ]
    assert len(gains) == len(PROMPTS) < 20
    assert gains == sorted(gains)  # the worst first
    assert results["samples"][0]["why"] == f"1. worst for PPO-ptx against SFT ({gains[0]:+.2f})"
    write_results(results, tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text())["winrate"] == results["winrate"]
    build_report(results, tmp_path / "report.html")
    assert "Failed" not in (tmp_path / "report.html").read_text()


def test_same_seed_same_results(models, settings):
    pair = {name: models[name] for name in ("sft", "dpo")}
    assert evaluate(pair, **settings) == evaluate(pair, **settings)


def test_samples_of_two_models_are_independent(models, settings, tmp_path):
    twins = {"sft": models["sft"], "dpo": models["sft"]}
    evaluate(twins, **settings, folder=tmp_path)
    sft, dpo = (read_jsonl(tmp_path / f"{name}.jsonl") for name in twins)
    assert [row["greedy"] for row in sft] == [row["greedy"] for row in dpo]
    assert sum(a["sampled"] == b["sampled"] for a, b in zip(sft, dpo, strict=True)) < len(sft) / 2


def test_what_is_not_given_is_skipped_with_its_reason(models, tmp_path):
    results = evaluate({"ppo": models["ppo"]}, prompts=PROMPTS, max_new_tokens=4)
    reasons = {(m["name"], m["model"]): m["reason"] for m in results["measures"] if m["status"] == "skipped"}
    assert reasons["gold_reward", "ppo"] == "no gold reward given"
    assert reasons["pretraining_bits_per_byte", "ppo"] == "no held-out pretraining text given"
    assert reasons["heldout_task_accuracy", "ppo"] == "no held-out tasks given"
    assert reasons["kl_to_sft", "ppo"] == "no model called 'sft' given"
    assert reasons["kl_to_sft", "dpo"] == "no such model in this run"
    assert reasons["rm.accuracy.train_labelers", "reward_model"] == "no reward model given"
    assert results["gold_reward"] == dict.fromkeys(("sft", "ppo", "ppo_ptx", "dpo"))
    assert results["winrate"]["ppo"] == {"value": None, "ci_low": None, "ci_high": None, "n": 0}
    build_report(results, tmp_path / "report.html")


def test_a_broken_model_costs_only_its_own_numbers(models, settings, tmp_path):
    with torch.no_grad():
        models["ppo"][0].lm_head.weight.fill_(float("nan"))
    results = evaluate(models, **settings)
    broken = [m for m in results["measures"] if "ppo" in (m["model"], m["against"])]
    assert {m["status"] for m in broken} == {"failed"}
    assert all(m["value"] is None and m["reason"] for m in broken)
    assert all(m["status"] == "ok" for m in results["measures"] if m not in broken)
    assert results["pretraining_bits_per_byte"]["ppo"] is None
    write_results(results, tmp_path / "results.json")
    build_report(results, tmp_path / "report.html")


def test_a_failing_gold_reward_is_failed_never_zero(models, settings):
    def fails(prompt, completion):
        raise ConnectionError("scorer is down")

    results = evaluate({"sft": models["sft"]}, **{**settings, "gold": fails})
    m = find(results["measures"], "gold_reward", "sft")
    assert (m["status"], m["value"], m["reason"]) == ("failed", None, "ConnectionError: scorer is down")
    assert find(results["measures"], "rm.gold_accuracy.train_labelers", "gold")["status"] == "failed"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "prompts: expected at least one"),
        ({"use_cases": ["chat"]}, "use_cases: expected one label per prompt"),
        ({"ranked_rows": {"nobody": RANKED}}, "ranked_rows: expected the groups"),
        ({"tasks": [{"context": "a"}]}, "task 0: missing field"),
    ],
)
def test_wrong_input_stops_before_anything_runs(settings, change, message):
    with pytest.raises(ValueError, match=message):
        evaluate({"sft": (None, None)}, **{**settings, **change})
