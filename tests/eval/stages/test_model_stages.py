"""Stages reward-model, drift, diversity and overopt on tiny models: numbers against loops, resuming, trouble, sections."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from prefopt.errors import UserError
from prefopt.evaluation.report.tables import Missing, Results
from prefopt.evaluation.results import find
from prefopt.evaluation.run import EvaluationArguments, EvaluationRun
from prefopt.evaluation.stages import diversity, drift, reward_model
from prefopt.evaluation.stages import overoptimization as overopt
from prefopt.evaluation.stages.judge import JudgeArguments
from prefopt.inference.generate import generate
from prefopt.inference.jsonl import write_jsonl
from prefopt.inference.likelihood import token_divergence
from prefopt.inference.scoring import score_rows
from prefopt.rankings.tokens import build_ids
from prefopt.statistics.intervals import Estimate
from tests.eval.report.conftest import html_of

pytestmark = pytest.mark.slow

PROMPTS = ["the cat", "question: what is this? answer:", "the dog ran", "a red"]
RANKINGS = [
    {"prompt": "the cat", "completions": [" sat", " ran to the red house", " a"], "ranks": [2, 1, 2]},
    {"prompt": "the cat", "completions": [" sat", " ran to the red house", " a"], "ranks": [1, 2, 3]},
    {"prompt": "question: what is this? answer:", "completions": [" a dog", " a mat"], "ranks": [1, 2]},
]
ALICE = "alice <b>"  # a labeler's name is text, also in HTML


@pytest.fixture
def world(tmp_path, causal_lm, reward_model, tokenizer):
    """Two policies and a reward model on disk, three samples of each of four prompts, rankings of two groups."""
    torch.manual_seed(7)
    other = LlamaForCausalLM(causal_lm.config)
    models = {"sft": causal_lm, "ppo": other}
    for name, model in (*models.items(), ("reward", reward_model)):
        model.eval().save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    run = EvaluationRun(tmp_path / "out")
    for seed, (name, model) in enumerate(models.items()):
        drawn = generate(model, tokenizer, PROMPTS, max_new_tokens=6, num_return=3, seed=seed)
        rows = [
            {"id": i, "prompt": p, "use_case": "odd" if i == 3 else "plain", "decoding": "sampled", "sample": k}
            | {"completion": c.text, "ids": c.ids, "truncated": c.truncated}
            for i, (p, of) in enumerate(zip(PROMPTS, drawn, strict=True))
            for k, c in enumerate(of)
        ]
        write_jsonl(run.completions_path(name), rows)
    write_jsonl(tmp_path / "train.jsonl", [{**RANKINGS[0], "labeler": ALICE}, RANKINGS[2]])
    write_jsonl(tmp_path / "heldout.jsonl", [{**RANKINGS[1], "labeler": "bob"}])
    write_jsonl(tmp_path / "demonstrations.jsonl", [{"prompt": "the cat", "completion": " sat"}])
    args = EvaluationArguments(
        output_dir=str(run.folder),
        models={name: str(tmp_path / name) for name in models},
        heldout_use_case="odd",
        batch_size=4,
    )
    return SimpleNamespace(
        run=run, args=args, models=models, folder=tmp_path, tokenizer=tokenizer, reward=reward_model
    )


def length(prompt, completion):
    """A gold reward."""
    return float(len(completion))


def results_of(run: EvaluationRun, *stages: str) -> Results:
    found = {name: run.stage(name) for name in stages}
    return Results({"measures": [m for s in found.values() for m in s["measures"]], "stages": found})


# ---- drift -----------------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_token_divergence_equals_a_loop_over_the_vocabulary(world):
    policy, reference = world.models["ppo"], world.models["sft"]
    ids = [row["ids"] for row in world.run.completions("ppo")[:5]]
    prompts = [row["prompt"] for row in world.run.completions("ppo")[:5]]
    for batch_size in (1, 4):
        found = token_divergence(policy, reference, world.tokenizer, prompts, ids, batch_size)
        for prompt, completion, one in zip(prompts, ids, found, strict=True):
            start = world.tokenizer(prompt)["input_ids"]
            assert len(one.kl) == len(completion)
            for t, token in enumerate(completion):
                row = torch.tensor([start + completion[:t]])
                p = policy(row).logits[0, -1].double().log_softmax(-1)
                q = reference(row).logits[0, -1].double().log_softmax(-1)
                assert one.kl[t] == pytest.approx(sum((p.exp() * (p - q)).tolist()), rel=1e-4)
                assert one.k1[t] == pytest.approx((p[token] - q[token]).item(), rel=1e-4, abs=1e-5)
                assert one.entropy[t] == pytest.approx(-sum((p.exp() * p).tolist()), rel=1e-4)


def test_drift_stage(world):
    drift.measure(world.run, world.args, drift.DriftArguments())
    found = world.run.stage("drift")
    rows = [row for row in world.run.completions("ppo") if row["use_case"] != "odd"]
    one = token_divergence(
        world.models["ppo"],
        world.models["sft"],
        world.tokenizer,
        [r["prompt"] for r in rows],
        [r["ids"] for r in rows],
    )
    tokens = sum(len(r["ids"]) for r in rows)
    expected = {
        "kl_to_sft": sum(d.kl.sum() for d in one) / 9,
        "k1_to_sft": sum(d.k1.sum() for d in one) / 9,
        "kl_to_sft_per_token": sum(d.kl.sum() for d in one) / tokens,
        "token_entropy": sum(d.entropy.sum() for d in one) / tokens,
    }
    for name, value in expected.items():
        assert find(found["measures"], name, "ppo")["value"] == pytest.approx(value, rel=1e-5), name
    assert find(found["measures"], "kl_to_sft", "ppo")["n_clusters"] == 3  # prompts, the held-out use case apart
    assert find(found["measures"], "kl_to_sft", "sft")["value"] == 0
    change = find(found["measures"], "token_entropy", "ppo", "sft")["value"]
    assert change == pytest.approx(
        find(found["measures"], "token_entropy", "ppo")["value"]
        - find(found["measures"], "token_entropy", "sft")["value"]
    )
    first = found["data"]["by_position"]["ppo"][0]
    assert first["kl"] == pytest.approx(np.mean([d.kl[0] for d in one]), rel=1e-5)
    assert "<svg" in html_of(drift.section(results_of(world.run, "drift")))


def test_drift_is_not_measured_again_and_a_broken_model_costs_its_own_numbers(world, monkeypatch):
    drift.measure(world.run, world.args, drift.DriftArguments())
    before = world.run.stage("drift")
    monkeypatch.setattr(drift, "load_language_model", lambda *a, **k: pytest.fail("loaded again"))
    drift.measure(world.run, world.args, drift.DriftArguments())
    assert world.run.stage("drift") == before
    monkeypatch.undo()
    world.args.models["gone"] = str(world.folder / "nowhere")
    write_jsonl(world.run.completions_path("gone"), world.run.completions("ppo"))
    world.args.models["mute"] = world.args.models["ppo"]
    drift.measure(world.run, world.args, drift.DriftArguments())
    found = world.run.stage("drift")["measures"]
    assert find(found, "kl_to_sft", "gone")["status"] == "failed"
    assert find(found, "kl_to_sft", "mute")["status"] == "skipped"
    assert "prefopt eval generate" in find(found, "kl_to_sft", "mute")["reason"]
    assert find(found, "kl_to_sft", "ppo")["status"] == "ok"


def test_intervals_of_drift_cover():
    """Exponential per-token KL with a part that the samples of a prompt share: whole prompts must be resampled."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        rows = []
        for prompt in range(100):
            shared = rng.exponential(0.2)
            for sample in range(3):
                kl = (shared + rng.exponential(0.1, size=10)).tolist()
                rows.append({"id": prompt, "sample": sample, "kl": kl, "k1": kl, "entropy": kl})
        estimate = drift.drift_estimates(drift.drift_sums(rows))["kl_to_sft_per_token"]
        assert estimate.n_clusters == 100
        hits += estimate.ci_low <= 0.3 <= estimate.ci_high
    assert 0.92 <= hits / 200 <= 0.98


# ---- diversity -------------------------------------------------------------------------------------------------------
def test_diversity_stage(world):
    own = diversity.DiversityArguments(self_bleu_group=2)
    diversity.measure(world.run, world.args, own)
    found = world.run.stage("diversity")["measures"]
    rows = [row for row in world.run.completions("ppo") if row["use_case"] != "odd"]
    words = [diversity_words(row["completion"]) for row in rows if row["sample"] == 0]
    flat = [w for of in words for w in of]
    across = find(found, "diversity.distinct_1.across_prompts", "ppo")
    assert across["value"] == pytest.approx(len(set(flat)) / len(flat))
    per_prompt = []
    for i in range(3):
        texts = [" ".join(diversity_words(r["completion"])) for r in rows if r["id"] == i]
        per_prompt.append(len(set(texts)) / 3)
    unique = find(found, "diversity.unique.per_prompt", "ppo")
    assert (unique["value"], unique["n"]) == (pytest.approx(np.mean(per_prompt)), 3)
    for name in ("diversity.self_bleu.per_prompt", "diversity.distinct_1.per_prompt"):
        values = [find(found, name, m)["value"] for m in ("ppo", "sft")]
        assert find(found, name, "ppo", "sft")["value"] == pytest.approx(values[0] - values[1])
    assert "self-BLEU" in html_of(diversity.section(results_of(world.run, "diversity")))


def diversity_words(text: str) -> list[str]:
    import re

    return re.findall(r"\w+|[^\w\s]", text.lower())


def test_diversity_of_a_collapsed_model_is_lower(world):
    rows = world.run.completions("ppo")
    write_jsonl(world.run.completions_path("ppo"), [row | {"completion": "the same answer for all"} for row in rows])
    write_jsonl(
        world.run.completions_path("sft"),
        [row | {"completion": f"{row['id']} a{row['sample']} b c d"} for row in rows],
    )
    diversity.measure(world.run, world.args, diversity.DiversityArguments(self_bleu_group=2))
    found = world.run.stage("diversity")["measures"]
    for scope in ("across_prompts", "per_prompt"):
        assert find(found, f"diversity.unique.{scope}", "ppo")["value"] == pytest.approx(1 / 3)
        assert find(found, f"diversity.unique.{scope}", "ppo", "sft")["value"] == pytest.approx(1 / 3 - 1)
        assert find(found, f"diversity.self_bleu.{scope}", "ppo")["value"] == pytest.approx(100)
        assert find(found, f"diversity.self_bleu.{scope}", "ppo", "sft")["value"] > 0
        assert find(found, f"diversity.distinct_2.{scope}", "ppo", "sft")["value"] < 0


def test_one_sample_per_prompt_and_no_sacrebleu_are_told(world, monkeypatch):
    def absent():
        raise ImportError

    monkeypatch.setattr(diversity, "sentence_bleu", absent)
    for name in world.args.models:
        write_jsonl(world.run.completions_path(name), [r for r in world.run.completions(name) if r["sample"] == 0])
    diversity.measure(world.run, world.args, diversity.DiversityArguments())
    found = world.run.stage("diversity")["measures"]
    missing = find(found, "diversity.unique.per_prompt", "ppo")
    assert (missing["status"], missing["value"]) == ("skipped", None)
    assert "samples_per_prompt" in missing["reason"]
    assert "sacrebleu" in find(found, "diversity.self_bleu.across_prompts", "ppo")["reason"]
    assert find(found, "diversity.unique.across_prompts", "ppo")["status"] == "ok"


# ---- reward models ---------------------------------------------------------------------------------------------------
def own_reward(world, **keys) -> reward_model.RewardModelArguments:
    files = {g: str(world.folder / f"{g}.jsonl") for g in ("train", "heldout")}
    return reward_model.RewardModelArguments(
        reward_models={"reward_model": str(world.folder / "reward")},
        implicit_rewards={"ppo": 0.5},
        rankings=files,
        reward_demonstrations=str(world.folder / "demonstrations.jsonl"),
        **keys,
    )


@torch.no_grad()
def test_implicit_rewards_equal_a_loop(world):
    policy, reference = world.models["ppo"], world.models["sft"]
    found = reward_model.implicit_rewards(policy, reference, world.tokenizer, RANKINGS, beta=0.5, batch_size=2)
    for row, rewards in zip(RANKINGS, found, strict=True):
        for completion, reward in zip(row["completions"], rewards, strict=True):
            x, y = build_ids(world.tokenizer, row["prompt"], completion)
            logps = [m(torch.tensor([x + y])).logits[0].double().log_softmax(-1) for m in (policy, reference)]
            ratio = sum((logps[0][t, i] - logps[1][t, i]).item() for t, i in enumerate(y, start=len(x) - 1))
            assert reward == pytest.approx(0.5 * ratio, rel=1e-4, abs=1e-5)


def test_reward_model_stage(world, monkeypatch):
    reward_model.measure(world.run, world.args, own_reward(world), JudgeArguments(gold_judge=length))
    found = world.run.stage("reward_model")["measures"]
    a, b, c = score_rows(world.reward, world.tokenizer, [RANKINGS[0]])[0]
    d, e = score_rows(world.reward, world.tokenizer, [RANKINGS[2]])[0]
    accuracy = (float(b > a) + float(b > c) + float(d > e)) / 3
    assert find(found, "rm.accuracy.train", "reward_model")["value"] == pytest.approx(accuracy)
    assert find(found, f"rm.accuracy_labeler.train.{ALICE}", "reward_model")["value"] == pytest.approx(
        (float(b > a) + float(b > c)) / 2
    )
    assert find(found, "rm.margin_tied.train", "reward_model")["value"] == pytest.approx(abs(a - c), abs=1e-5)
    assert find(found, "rm.margin_tied.heldout", "reward_model")["status"] == "skipped"  # no tie there
    (x, y, z), (v, w) = reward_model.implicit_rewards(
        world.models["ppo"], world.models["sft"], world.tokenizer, [RANKINGS[0], RANKINGS[2]], 0.5
    )
    implicit = (float(y > x) + float(y > z) + float(v > w)) / 3
    assert find(found, "rm.accuracy.train", "ppo")["value"] == pytest.approx(implicit)
    assert find(found, "rm.accuracy.train", "ppo", "reward_model")["value"] == pytest.approx(implicit - accuracy)
    longest = find(found, "rm.accuracy.train", "longer_wins")
    assert (longest["value"], longest["n"]) == (pytest.approx((1 + 1 + 0.5) / 3), 3)
    # gold: " ran to the red house" is longest; " a dog" and " a mat" are equally long
    assert find(found, "rm.gold_accuracy.train", "gold")["value"] == pytest.approx((1 + 1 + 0.5) / 3)
    # A and B are ordered oppositely, B > C alike, A and C tied by one of them
    agree = find(found, "rm.agreement_between.train.heldout", "labelers")
    assert (agree["value"], agree["n"]) == (0.5, 2)
    assert find(found, "rm.demonstration_score", "reward_model")["value"] == pytest.approx(a, abs=1e-5)
    html = html_of(reward_model.section(results_of(world.run, "reward_model")))
    assert "<svg" in html
    assert "alice &lt;b&gt;" in html
    assert ALICE not in html
    monkeypatch.setattr(reward_model, "score_rows", lambda *a: pytest.fail("scored again"))
    reward_model.measure(world.run, world.args, own_reward(world), JudgeArguments(gold_judge=length))
    assert world.run.stage("reward_model")["measures"] == found


def test_a_killed_scoring_goes_on_where_it_was(world, monkeypatch):
    """Part by part; the scores are those of one pass, and an error tells the rows of its part."""
    rows = [{**RANKINGS[0], "labeler": "a"}, {**RANKINGS[2], "labeler": "b"}, {**RANKINGS[1], "labeler": "c"}]
    write_jsonl(world.folder / "train.jsonl", rows)
    reward_model.measure(world.run, world.args, own_reward(world), JudgeArguments())
    path = world.run.folder / "reward_model" / "reward_model.train.jsonl"
    expected = [json.loads(line)["scores"] for line in path.open()]
    path.unlink()
    scored = []

    def killed(model, tokenizer, part, batch_size, numbers):
        scored.append(list(part))
        if len(scored) == 2:
            raise UserError(f"row {numbers[0]}, completion 0: gone")
        return score_rows(model, tokenizer, part, batch_size, numbers)

    monkeypatch.setattr(reward_model, "AT_ONCE", 1)
    monkeypatch.setattr(reward_model, "score_rows", killed)
    own = own_reward(world)
    own.rankings, own.implicit_rewards = {"train": own.rankings["train"]}, {}
    reward_model.measure(world.run, world.args, own, JudgeArguments())
    failed = find(world.run.stage("reward_model")["measures"], "rm.accuracy.train", "reward_model")
    assert failed["reason"] == "row 1, completion 0: gone"
    reward_model.measure(world.run, world.args, own, JudgeArguments())
    assert [part[0]["labeler"] for part in scored] == ["a", "b", "b", "c"]
    found = [json.loads(line)["scores"] for line in path.open()]
    assert np.allclose(np.concatenate(found), np.concatenate(expected), rtol=0, atol=1e-5)


def test_implicit_rewards_name_the_row_that_is_too_long(world):
    policy, reference = world.models["ppo"], world.models["sft"]
    rows = [RANKINGS[0], {**RANKINGS[0], "completions": [" mat", " dog" * 300]}]
    with pytest.raises(UserError, match=r"row 8, completion 1: \d+ tokens, .* the model has 256 positions"):
        reward_model.implicit_rewards(policy, reference, world.tokenizer, rows, 0.5, numbers=[7, 8])


def test_trouble_of_one_reward_model_is_told_and_wrong_rankings_stop(world):
    own = own_reward(world)
    own.reward_models["gone"] = str(world.folder / "nowhere")
    own.implicit_rewards["stranger"] = 1.0

    def fails(prompt, completion):
        raise ConnectionError("scorer is down")

    reward_model.measure(world.run, world.args, own, JudgeArguments(gold_judge=fails))
    found = world.run.stage("reward_model")["measures"]
    gold = find(found, "rm.gold_accuracy.train", "gold")
    assert (gold["status"], gold["value"], gold["reason"]) == ("failed", None, "ConnectionError: scorer is down")
    for name in ("gone", "stranger"):
        missing = find(found, "rm.accuracy.train", name)
        assert (missing["status"], missing["value"]) == ("failed", None)
    assert find(found, "rm.accuracy.train", "reward_model")["status"] == "ok"
    write_jsonl(world.folder / "train.jsonl", [{"prompt": "p", "completions": ["a", "b"], "ranks": [1, 5]}])
    with pytest.raises(ValueError, match=r"row 0.*ranks"):
        reward_model.measure(world.run, world.args, own_reward(world), JudgeArguments())
    nothing = reward_model.RewardModelArguments()
    reward_model.measure(world.run, world.args, nothing, JudgeArguments())
    with pytest.raises(Missing, match="rankings"):
        reward_model.section(results_of(world.run, "reward_model"))


# ---- over-optimization -----------------------------------------------------------------------------------------------
def test_overopt_stage(world):
    import sys

    sys.modules.setdefault("e3_gold", SimpleNamespace(length=length))
    entries = [
        {"step": i, "loss": 0.0, "objective/kl": float(i), "clip_ratio/region_mean": 0.0}
        | {f"rewards/{r}/{k}": v for r in ("reward_model", "gold") for k, v in (("mean", s * i), ("std", 1.0))}
        for i, s in ((0, 0.0), (1, 1.0), (2, 1.0), (3, 1.0))
    ]
    state = {"log_history": entries, "stateful_callbacks": {}}
    (world.folder / "ppo" / "trainer_state.json").write_text(json.dumps(state))
    drift.measure(world.run, world.args, drift.DriftArguments())
    judges = JudgeArguments(gold_judge="e3_gold:length", reward_judge=str(world.folder / "reward"))
    overopt.measure(world.run, world.args, overopt.OveroptArguments(), judges)
    found = world.run.stage("overopt")
    rows = [row for row in world.run.completions("sft") if row["use_case"] != "odd"]
    data = found["data"]
    assert [p["n"] for p in data["best_of_n"]["points"]] == [1, 2, 3]
    from prefopt.inference.generate import Completion
    from prefopt.inference.scoring import score_completions

    proxy = score_completions(
        world.reward,
        world.tokenizer,
        [r["prompt"] for r in rows],
        [Completion(r["completion"], r["ids"], r["truncated"]) for r in rows],
    )
    gold = np.array([len(r["completion"]) for r in rows], dtype=float).reshape(3, 3)
    proxy = np.array(proxy).reshape(3, 3)
    best = gold[np.arange(3), proxy.argmax(1)].mean()
    expected = (best - gold.mean()) / gold.std(ddof=1)
    assert find(found["measures"], "overopt.best_of_n_gold.3", "sft")["value"] == pytest.approx(expected)
    point, kl = data["models"]["ppo"], find(world.run.stage("drift")["measures"], "kl_to_sft", "ppo")["value"]
    assert point["distance"] == pytest.approx(math.sqrt(kl))
    theirs = [len(r["completion"]) for r in world.run.completions("ppo") if r["use_case"] != "odd"]
    assert point["gold"] == pytest.approx((np.mean(theirs) - gold.mean()) / gold.std(ddof=1))
    assert "<svg" in html_of(overopt.section(results_of(world.run, "overopt")))


def test_overopt_without_judges_or_samples_says_what_is_missing(world):
    overopt.measure(world.run, world.args, overopt.OveroptArguments(), JudgeArguments())
    found = world.run.stage("overopt")["measures"]
    assert find(found, "overopt.best_of_n_gold", "sft")["status"] == "skipped"
    assert "reward_judge" in find(found, "overopt.best_of_n_gold", "sft")["reason"]
    with pytest.raises(Missing, match="reward_judge"):
        overopt.section(results_of(world.run, "overopt"))
    judges = JudgeArguments(gold_judge="no.such:thing", reward_judge=str(world.folder / "reward"))
    overopt.measure(world.run, world.args, overopt.OveroptArguments(), judges)
    assert find(world.run.stage("overopt")["measures"], "overopt.best_of_n_gold", "sft")["status"] == "failed"


def test_best_of_n_measures_need_two_samples_and_varying_rewards():
    one = {"sft": ({0: [1.0], 1: [2.0]}, {0: [1.0], 1: [2.0]})}
    measures, data = overopt.best_of_n_measures("sft", one)
    assert data is None
    assert "samples_per_prompt" in measures[0]["reason"]
    flat = {"sft": ({0: [1.0, 2.0]}, {0: [3.0, 3.0]})}
    measures, _ = overopt.best_of_n_measures("sft", flat)
    assert find(measures, "overopt.best_of_n_gold", "sft")["status"] == "failed"
    assert find(measures, "overopt.best_of_n_proxy.2", "sft")["status"] == "ok"


@pytest.mark.parametrize("stage", [reward_model, drift, diversity, overopt], ids=lambda m: m.__name__)
def test_a_stage_that_has_not_run_is_missing(stage):
    with pytest.raises(Missing, match="prefopt eval"):
        stage.section(Results({"measures": [], "stages": {}}))


def test_estimates_of_a_fit_without_known_errors_have_no_interval():
    fit = overopt.fit_data((Estimate(1.0, math.nan, math.nan, 3, 3), Estimate(0.5, 0.1, 0.9, 3, 3)), overopt.rl_design)
    assert fit["peak"] == pytest.approx(math.e)
    assert fit["falls"]
