"""Win rates and strengths against known truth: arithmetic, slow loops, and synthetic judgements."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize

from prefopt.evaluation.results import find
from prefopt.evaluation.run import EvaluationArguments, EvaluationRun
from prefopt.evaluation.stages import compare, judge
from prefopt.evaluation.stages.compare import (
    CompareArguments,
    length_controlled_win_rate,
    preferences_by_prompt,
    win_rate,
)
from prefopt.evaluation.stages.judge import judgements_path, scores_path
from prefopt.inference.jsonl import read_jsonl, write_jsonl
from prefopt.statistics import bradley_terry

pytestmark = pytest.mark.slow


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def judgement(prompt, a, b, preference, **more):
    return {"id": prompt, "a": a, "b": b, "preference": preference, "decoding": "sampled", **more}


def test_preferences_turn_with_the_order_of_the_models():
    rows = [judgement(0, "ppo", "sft", 1.0), judgement(1, "sft", "ppo", 1.0), judgement(2, "sft", "dpo", 1.0)]
    assert preferences_by_prompt(rows, "ppo", "sft") == {0: [1.0], 1: [0.0]}
    assert preferences_by_prompt(rows, "sft", "ppo") == {0: [0.0], 1: [1.0]}


def test_win_rate_averages_labelers_of_a_prompt_first():
    estimate = win_rate({0: [1.0, 1.0, 1.0], 1: [0.0], 2: [0.5]})
    assert estimate.value == (1 + 0 + 0.5) / 3
    assert (estimate.n, estimate.n_clusters) == (5, 3)


def test_two_models_have_haldanes_log_odds():
    rows = [judgement(i, "ppo", "sft", 1.0 if i < 7 else 0.5 if i < 9 else 0.0) for i in range(12)]
    found = bradley_terry.strengths(rows, "sft")
    wins, losses = 7 + 2 / 2, 3 + 2 / 2
    assert found["ppo"].value == pytest.approx(math.log((wins + 0.5) / (losses + 0.5)), abs=1e-9)
    assert found["sft"].value == found["sft"].ci_low == found["sft"].ci_high == 0.0
    assert list(found) == ["ppo", "sft"]
    assert bradley_terry.strengths(rows, "ppo")["sft"].value == pytest.approx(-found["ppo"].value, abs=1e-9)


def test_strengths_maximise_the_likelihood():
    """Against scipy's general optimizer on a likelihood written as a loop over judgements."""
    rng = random.Random(3)
    models = ["sft", "ppo", "dpo", "base"]
    rows = [judgement(i, *rng.sample(models, 2), rng.choice([0.0, 0.5, 1.0, 1.0])) for i in range(60)]
    pairs = {frozenset((r["a"], r["b"])) for r in rows}

    def loss(free):
        s = dict(zip(models, [0.0, *free], strict=True))
        total = 0.0
        for r in rows:
            p = sigmoid(s[r["a"]] - s[r["b"]])
            total -= r["preference"] * math.log(p) + (1 - r["preference"]) * math.log(1 - p)
        for a, b in map(sorted, pairs):
            p = sigmoid(s[a] - s[b])
            total -= 0.5 * math.log(p) + 0.5 * math.log(1 - p)
        return total

    expected = minimize(loss, np.zeros(3), method="BFGS", options={"gtol": 1e-8}).x
    found = bradley_terry.strengths(rows, "sft")
    assert [found[m].value for m in models] == pytest.approx([0.0, *expected], abs=1e-5)


def test_a_model_that_always_wins_is_finite_and_an_unrelated_one_is_left_out():
    rows = [judgement(i, "ppo", "sft", 1.0) for i in range(20)] + [judgement(0, "x", "y", 1.0)]
    found = bradley_terry.strengths(rows, "sft")
    assert set(found) == {"ppo", "sft"}
    assert found["ppo"].value == pytest.approx(math.log(20.5 / 0.5))
    with pytest.raises(ValueError, match="baseline 'base'"):
        bradley_terry.strengths(rows, "base")


def test_intervals_of_win_rates_cover_the_truth():
    """200 sets of 120 prompts, two labelers each, who share the prompt's leaning."""
    covered = 0
    for trial in range(200):
        rng = np.random.default_rng(trial)
        leaning = rng.beta(2.4, 1.6, size=120)  # mean .6: the true win rate
        rows = {p: [float(rng.random() < leaning[p]) for _ in range(2)] for p in range(120)}
        estimate = win_rate(rows)
        covered += estimate.ci_low <= 0.6 <= estimate.ci_high
    assert 184 <= covered <= 196  # 92-98 %


def test_intervals_of_strengths_cover_the_truth():
    """200 sets of 120 prompts, every pair of four models judged on each; latent qualities shared by a prompt's pairs."""
    truth = {"sft": 0.0, "ppo": 0.9, "dpo": 0.4, "base": -0.7}
    names = list(truth)
    covered = 0
    for trial in range(200):
        rng = np.random.default_rng(1000 + trial)
        # Gumbel noise on every quality makes P(a > b) = sigmoid(s_a - s_b) and the pairs of a prompt dependent.
        quality = np.array(list(truth.values())) + rng.gumbel(size=(120, 4))
        rows = [
            judgement(p, names[i], names[j], float(quality[p, i] > quality[p, j]))
            for p in range(120)
            for i in range(4)
            for j in range(i)
        ]
        found = bradley_terry.strengths(rows, "sft", seed=trial, n_resamples=400)
        covered += sum(found[name].ci_low <= truth[name] <= found[name].ci_high for name in names[1:])
    assert 0.92 <= covered / (200 * 3) <= 0.98


def test_length_controlled_win_rate_recovers_theta():
    """Longer answers win (phi = 1.5) and the model's are longer; at equal length it wins sigmoid(.4) = .599."""
    theta, phi, covered, plain, controlled = 0.4, 1.5, 0, [], []
    for trial in range(200):
        rng = np.random.default_rng(trial)
        difference = rng.normal(30, 40, size=150)
        p = sigmoid(theta + phi * np.tanh(difference / difference.std()))
        preferences = (rng.random(150) < p).astype(float)
        estimate = length_controlled_win_rate(preferences, difference, n_resamples=400)
        covered += estimate.ci_low <= sigmoid(theta) <= estimate.ci_high
        plain.append(preferences.mean())
        controlled.append(estimate.value)
    assert 184 <= covered <= 196, covered
    assert np.mean(controlled) == pytest.approx(sigmoid(theta), abs=0.01)
    assert np.mean(plain) > 0.7  # what length alone adds


def test_length_controlled_win_rate_is_the_fit_of_a_general_optimizer():
    rng = np.random.default_rng(0)
    y, difference = rng.choice([0.0, 0.5, 1.0], size=60), rng.normal(5, 20, size=60)
    x = np.tanh(difference / difference.std())

    def loss(theta_phi):
        theta, phi = theta_phi
        p = sigmoid(theta + phi * x)
        likelihood = y @ np.log(p) + (1 - y) @ np.log(1 - p)
        middle = sigmoid(theta)
        return -likelihood - 0.5 * math.log(middle) - 0.5 * math.log(1 - middle) + phi**2 / 200

    theta, _ = minimize(loss, [0.0, 0.0], method="BFGS", options={"gtol": 1e-9}).x
    assert length_controlled_win_rate(y, difference).value == pytest.approx(sigmoid(theta), abs=1e-6)
    same_length = length_controlled_win_rate(y, [3.0] * 60)
    assert same_length.value == pytest.approx((y.sum() + 0.5) / 61, abs=1e-9)  # nothing to control for


# ---- the stage ------------------------------------------------------------------------------------------------------
@pytest.fixture
def evaluation(tmp_path: Path) -> EvaluationRun:
    """Three models, six prompts, of which the last is of the held-out use case; a gold judge and people."""
    run = EvaluationRun(tmp_path)
    answers = {"sft": "ab", "ppo": "abcd", "ppo_ptx": "abc"}
    for model, answer in answers.items():
        rows = [
            {"id": i, "prompt": f"p{i}", "use_case": "brainstorming" if i == 5 else "chat" if i % 2 else "rewrite",
             "decoding": decoding, "sample": 0, "completion": answer, "ids": [1], "truncated": False}
            for i in range(6) for decoding in ("sampled", "greedy")
        ]  # fmt: skip
        write_jsonl(run.completions_path(model), rows)
    gold = {"sft": [1, 1, 1, 1, 1, 1], "ppo": [2, 2, 2, 1, 0, 0], "ppo_ptx": [2, 0, 2, 2, 2, 2]}
    judged = []
    for a, b in (("sft", "ppo"), ("sft", "ppo_ptx"), ("ppo", "ppo_ptx")):
        for i in range(6):
            preference = 0.5 * (1 + (gold[a][i] > gold[b][i]) - (gold[a][i] < gold[b][i]))
            judged.append(judgement(i, a, b, preference))
            judged.append({**judgement(i, a, b, 0.5), "decoding": "greedy"})
    write_jsonl(judgements_path(run, "gold"), judged)
    for model, scores in gold.items():
        parts = [{"follow": s / 2} for s in scores]
        write_jsonl(
            scores_path(run, "gold", model),
            [
                {"id": i, "decoding": "sampled", "score": float(s), "parts": p}
                for i, (s, p) in enumerate(zip(scores, parts, strict=True))
            ],
        )
    people = [judgement(i, "ppo", "sft", 1.0, labeler="ann") for i in range(4)]
    people += [judgement(i, "ppo", "sft", 0.0, labeler="bob") for i in range(4)]
    write_jsonl(judgements_path(run, "human"), people)
    run.write_stage(
        judge.STAGE, [], {"judges": {"gold": "ok", "human": "ok", "lm": "failed: RuntimeError: no memory"}}
    )
    return run


ARGUMENTS = {"models": {"sft": "a", "ppo": "b", "ppo_ptx": "c"}, "heldout_use_case": "brainstorming"}


def test_a_model_of_completions_alone_has_nothing_greedy_to_judge(evaluation: EvaluationRun):
    path = judgements_path(evaluation, "gold")
    kept = [r for r in read_jsonl(path) if r.get("decoding") != "greedy" or "ppo" not in (r["a"], r["b"])]
    write_jsonl(path, kept, replace=True)
    compare.measure(
        evaluation, EvaluationArguments(output_dir=str(evaluation.folder), **ARGUMENTS), CompareArguments()
    )
    greedy = {
        m["model"]: (m["value"], m["reason"])
        for m in evaluation.stage("compare")["measures"]
        if m["name"] == "winrate_greedy"
    }
    assert greedy == {"ppo": (None, "judge gold was given no greedy completions of ppo"), "ppo_ptx": (0.5, None)}


def test_the_stage_reports_every_number(evaluation: EvaluationRun):
    args = EvaluationArguments(output_dir=str(evaluation.folder), **ARGUMENTS)
    compare.measure(evaluation, args, CompareArguments(labeler_groups={"train": ["ann"], "heldout": ["bob"]}))
    stage = evaluation.stage("compare")
    measures = stage["measures"]

    def value(name, model="ppo", against="sft", judge="gold"):
        return next(
            m["value"] for m in measures
            if (m["name"], m["model"], m["against"], m["judge"]) == (name, model, against, judge)
        )  # fmt: skip

    assert stage["data"]["main_judge"] == "gold"
    assert value("winrate") == (1 + 1 + 1 + 0.5 + 0) / 5
    assert value("winrate", "ppo_ptx") == (1 + 0 + 1 + 1 + 1) / 5
    assert value("winrate_greedy") == 0.5
    assert value("winrate_heldout_use_case") == 0.0
    assert value("winrate_heldout_use_case", "ppo_ptx") == 1.0
    assert value("winrate_use_case.chat") == (1 + 0.5) / 2
    assert value("winrate_use_case.rewrite") == (1 + 1 + 0) / 3
    assert value("winrate_judge.human", judge="human") == 0.5
    assert value("winrate_labelers.train", judge="human") == 1.0
    assert value("winrate_labelers.heldout", judge="human") == 0.0
    assert value("gold_reward", against=None) == (2 + 2 + 2 + 1 + 0) / 5
    assert value("gold_reward") == (1 + 1 + 1 + 0 - 1) / 5
    assert value("gold_reward", "ppo_ptx", "ppo") == (0 - 2 + 0 + 1 + 2) / 5
    assert value("gold_reward_heldout_use_case", "ppo_ptx", None) == 2
    assert value("gold_component.follow", "sft", None) == 0.5
    # Every answer of PPO is two characters longer: no difference in length to control for.
    assert value("winrate_length_controlled") == pytest.approx((3.5 + 0.5) / (5 + 1))
    assert value("bradley_terry", "sft", None) == 0.0
    wins = np.array([[0, 1.5, 1], [3.5, 0, 2], [4, 3, 0]])  # sft, ppo, ppo_ptx; rows beat columns
    expected = bradley_terry.fit(wins + 0.5 * (1 - np.eye(3)))
    assert value("bradley_terry", "ppo", None) == pytest.approx(expected[1], abs=1e-6)
    assert value("bradley_terry", "ppo_ptx", None) == pytest.approx(expected[2], abs=1e-6)
    assert stage["data"]["matrix"]["ppo"]["sft"] == pytest.approx(sigmoid(expected[1]))
    pair = next(
        p for p in stage["data"]["pairs"] if (p["judge"], p["model"], p["against"]) == ("gold", "ppo", "ppo_ptx")
    )
    assert pair["value"] == 2 / 5
    baseline = find(measures, "winrate", "sft", "sft")
    assert (baseline["value"], baseline["ci_low"], baseline["n"]) == (0.5, 0.5, 5)
    broken = find(measures, "winrate_judge.lm", "ppo", "sft")
    assert (broken["status"], broken["reason"]) == ("failed", "RuntimeError: no memory")
    assert "gold" in find(measures, "winrate", "ppo", "sft")["definition"]
    json.dumps(stage, allow_nan=False)


def test_another_main_judge(evaluation: EvaluationRun):
    args = EvaluationArguments(output_dir=str(evaluation.folder), **ARGUMENTS)
    compare.measure(evaluation, args, CompareArguments(main_judge="human"))
    measures = evaluation.stage("compare")["measures"]
    assert find(measures, "winrate", "ppo", "sft")["value"] == 0.5
    assert "gold reward" not in find(measures, "winrate", "ppo", "sft")["definition"]
    assert find(measures, "winrate", "ppo_ptx", "sft")["status"] == "skipped"
    assert find(measures, "bradley_terry", "ppo_ptx")["status"] == "skipped"
    with pytest.raises(ValueError, match="main_judge 'reward'"):
        compare.measure(evaluation, args, CompareArguments(main_judge="reward"))


def test_a_broken_main_judge_is_no_reason_for_another_headline(evaluation: EvaluationRun):
    evaluation.write_stage(judge.STAGE, [], {"judges": {"gold": "failed: OSError: gone", "human": "ok"}})
    judgements_path(evaluation, "gold").unlink()
    args = EvaluationArguments(output_dir=str(evaluation.folder), **ARGUMENTS)
    compare.measure(evaluation, args, CompareArguments())
    found = find(evaluation.stage("compare")["measures"], "winrate", "ppo", "sft")
    assert (found["status"], found["reason"], found["judge"]) == ("failed", "OSError: gone", "gold")


@pytest.mark.parametrize(
    ("use_cases", "reason"),
    [
        (False, "the prompts have no `use_case`"),
        (True, "no use case was kept out of training; name it in `heldout_use_case`"),
    ],
)
def test_why_there_is_no_use_case_of_its_own(evaluation: EvaluationRun, use_cases: bool, reason: str):
    for model in ARGUMENTS["models"]:
        rows = read_jsonl(evaluation.completions_path(model))
        drawn = rows if use_cases else [{**row, "use_case": None} for row in rows]
        write_jsonl(evaluation.completions_path(model), drawn)
    args = EvaluationArguments(output_dir=str(evaluation.folder), models=ARGUMENTS["models"])
    evaluation.forget_stage("judge")
    compare.measure(evaluation, args, CompareArguments())
    measures = evaluation.stage("compare")["measures"]
    assert find(measures, "winrate", "ppo", "sft")["value"] is not None
    for model in ("ppo", "ppo_ptx"):
        found = find(measures, "winrate_heldout_use_case", model, "sft")
        assert (found["status"], found["reason"]) == ("skipped", reason)


def test_the_definition_names_the_model_that_judged(evaluation: EvaluationRun):
    called = {"gold": "the gold reward", "human": "people"}
    evaluation.write_stage(judge.STAGE, [], {"judges": dict.fromkeys(called, "ok"), "called": called})
    args = EvaluationArguments(output_dir=str(evaluation.folder), **ARGUMENTS)
    compare.measure(evaluation, args, CompareArguments(main_judge="human"))
    found = find(evaluation.stage("compare")["measures"], "winrate", "ppo", "sft")
    assert "1 if people prefers" not in found["definition"]
    assert "by people" in found["definition"]


def test_no_judge_is_skipped_with_a_remedy(tmp_path: Path):
    args = EvaluationArguments(output_dir=str(tmp_path), models={"sft": "a", "ppo": "b"})
    compare.measure(EvaluationRun(tmp_path), args, CompareArguments())
    found = find(EvaluationRun(tmp_path).stage("compare")["measures"], "winrate", "ppo", "sft")
    assert found["status"] == "skipped"
    assert "gold_judge" in found["reason"]
