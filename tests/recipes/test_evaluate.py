"""`prefopt eval all` on tiny models, as a user runs it: one YAML file, one report; what breaks costs itself alone."""

import copy
import json

import numpy as np
import pytest
import torch
import yaml

from prefopt.errors import UserError
from prefopt.evaluation.results import find
from prefopt.inference.jsonl import write_jsonl
from prefopt.inference.scoring import score_rows
from prefopt.models.checkpoints import load_classifier
from prefopt.recipes import evaluate

pytestmark = pytest.mark.slow

PROMPTS = [{"prompt": f"question: what is {i}? answer:", "use_case": "chat" if i % 4 else "held"} for i in range(8)]
RANKED = [
    {**row, "completions": [" a dog", " a cat", " the red mat"], "ranks": [1, 2, 2], "labeler": "ann"}
    for row in PROMPTS
]


def length(prompt, completion):
    return float(len(completion))


@pytest.fixture
def folder(tmp_path, causal_lm, reward_model, tokenizer):
    def moved(seed):
        model = copy.deepcopy(causal_lm)
        torch.manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.05 * torch.randn_like(weight)
        return model

    for name, model in {"sft": causal_lm, "ppo": moved(1), "dpo": moved(2), "rm": reward_model}.items():
        model.eval().save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    write_jsonl(tmp_path / "prompts.jsonl", PROMPTS)
    write_jsonl(tmp_path / "ranked.jsonl", RANKED)
    write_jsonl(tmp_path / "text.jsonl", [{"text": "the cat sat on the mat"}, {"text": "a dog and a cat"}])
    return tmp_path


def config(folder, **keys):
    settings = {
        "output_dir": str(folder / "run"),
        "models": {name: str(folder / name) for name in ("sft", "ppo", "dpo")},
        "dtype": "float32",
        "prompts": str(folder / "prompts.jsonl"),
        "heldout_use_case": "held",
        "max_new_tokens": 6,
        "samples_per_prompt": 2,
        "gold_judge": f"{__name__}:length",
        "reward_judge": str(folder / "rm"),
        "reward_models": {"reward_model": str(folder / "rm")},
        "implicit_rewards": {"dpo": 0.1},
        "rankings": {"train_labelers": str(folder / "ranked.jsonl")},
        "pretraining_text": str(folder / "text.jsonl"),
        **keys,
    }
    path = folder / "evaluation.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


@pytest.mark.timeout(600)
def test_all(folder, capsys):
    evaluate.main(["all", "--config", config(folder)], gold=length)
    results = json.loads((folder / "run" / "results.json").read_text(encoding="utf-8"))
    assert [m for m in results["measures"] if m["status"] == "failed"] == []
    for model in ("ppo", "dpo"):
        assert 0 <= results["winrate"][model]["value"] <= 1
        assert results["pretraining_bits_per_byte"][model] > 0
        assert results["kl_to_sft"][model] > 0
        rows = [json.loads(line) for line in (folder / "run/completions" / f"{model}.jsonl").read_text().splitlines()]
        rows = [r for r in rows if (r["decoding"], r["sample"]) == ("sampled", 0) and r["use_case"] != "held"]
        assert results["gold_reward"][model] == pytest.approx(sum(len(r["completion"]) for r in rows) / len(rows))
    assert 0 <= results["rm"]["accuracy"]["train_labelers"] <= 1
    assert results["winrate"]["sft"]["value"] == 0.5
    assert find(results["measures"], "heldout_task_accuracy", "ppo")["status"] == "skipped"
    assert list(results["notes"]) == ["bench"]
    assert set(results["wall_seconds"]) == {stage.name for stage in evaluate.STAGES} - {"bench"}
    html = (folder / "run" / "report.html").read_text(encoding="utf-8")
    assert "Failed: " not in html
    assert "bench_data_files" in html
    assert html.count("<svg") > 4
    assert "## Every number" in (folder / "run" / "report.md").read_text(encoding="utf-8")
    capsys.readouterr()

    # A second run draws and scores nothing anew, whichever stage broke in between; the report alone is quick.
    kept = {p: p.stat().st_mtime_ns for p in (folder / "run" / "completions").glob("*.jsonl")}
    keys = {"rankings": {"train_labelers": "nowhere.jsonl"}}
    with pytest.raises(UserError, match=r"stages that failed: reward-model: .*nowhere\.jsonl"):
        evaluate.main(["all", "--config", config(folder, **keys)], gold=length)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    html = (folder / "run" / "report.html").read_text(encoding="utf-8")
    assert html.count("Failed: ") == 1
    again = json.loads((folder / "run" / "results.json").read_text(encoding="utf-8"))
    assert again["winrate"] == results["winrate"]
    assert again["rm"]["accuracy"]["train_labelers"] is None


@pytest.mark.parametrize(
    ("stage", "keys", "told"),
    [
        ("generate", {"models": {"sft": "sft", "ppo": "no-such"}}, "generate: ppo failed: .*no-such"),
        ("judge", {"reward_judge": "no-such"}, "judge: reward failed: .*no-such"),
        ("tax", {"pretraining_text": "nowhere.jsonl"}, "nowhere.jsonl"),
        ("reward-model", {"reward_models": {"rm": "no-such"}}, r"reward-model: .* failed: .*no-such"),
        ("diversity", {}, None),
    ],
)
def test_a_stage_by_itself_ends_with_an_error_if_a_part_of_it_failed(folder, monkeypatch, stage, keys, told):
    monkeypatch.chdir(folder)
    evaluate.main(["generate", "--config", config(folder)])
    if told is None:
        evaluate.main([stage, "--config", config(folder, **keys)], gold=length)
        return
    with pytest.raises(UserError, match=told):
        evaluate.main([stage, "--config", config(folder, **keys)], gold=length)
    if stage in ("generate", "judge"):
        kept = "completions/sft.jsonl" if stage == "generate" else "judgements/gold.jsonl"
        assert (folder / "run" / kept).is_file()


@pytest.mark.parametrize(
    "row",
    [
        '{"prompt": "p", "id"',
        "[]",
        '{"prompt": "p", "id": 0, "decoding": "sampled", "sample": 0, "completion": "a", "ids": [5]}',
        '{"prompt": "p", "id": "0", "decoding": "sampled", "sample": 0, "completion": "a", "ids": [5], "truncated": false}',
    ],
)
@pytest.mark.parametrize("keys", [{}, {"reward_judge": "rm", "gold_judge": f"{__name__}:length"}])
def test_overopt_tells_completions_that_are_none_whether_there_is_a_judge_or_not(folder, monkeypatch, row, keys):
    monkeypatch.chdir(folder)
    samples = [{"prompt": p["prompt"], "id": i, "decoding": "sampled", "sample": 0, "completion": "a", "ids": [5], "truncated": False} for i, p in enumerate(PROMPTS)]  # fmt: skip
    for name in ("sft", "ppo", "dpo"):
        write_jsonl(folder / "run" / "completions" / f"{name}.jsonl", samples)
    (folder / "run" / "completions" / "ppo.jsonl").write_text(row + "\n")
    argv = [part for key, value in keys.items() for part in (f"--{key}", value)]
    models = json.dumps({name: name for name in ("sft", "ppo", "dpo")})
    with pytest.raises(UserError, match=r"overopt: ppo failed: .*ppo\.jsonl "):
        evaluate.main(["overopt", "--output_dir", "run", "--models", models, *argv])


def test_a_reward_model_is_measured_without_a_policy_and_told(folder, capsys):
    path = config(folder, models={}, implicit_rewards={}, dtype="bfloat16")
    evaluate.main(["reward-model", "--config", path])
    stage = folder / "run" / "stages" / "reward_model.json"
    measures = json.loads(stage.read_text())["measures"]
    known = find(measures, "rm.accuracy.train_labelers", "reward_model")
    said = capsys.readouterr().out
    interval = f"[{known['ci_low']:.4g}, {known['ci_high']:.4g}]"
    assert f"rm.accuracy.train_labelers of reward_model: {known['value']:.4g} {interval} (n = {known['n']} in " in said
    assert f"written: {stage}" in said
    # One person's rankings agree with nobody's.
    agreement = find(measures, "rm.agreement.train_labelers", "labelers")
    assert (
        agreement["reason"] == "no two labelers (by the rows' `labeler`) ranked the same two completions of a prompt"
    )

    # Scored in the type that was asked for.
    rows = [row for row in RANKED if row["use_case"] != "held"]
    scored = [json.loads(line) for line in (folder / "run/reward_model/reward_model.train_labelers.jsonl").open()]
    for dtype, is_equal in (("bfloat16", True), ("float32", False)):
        expected = score_rows(*load_classifier(folder / "rm", dtype=dtype), rows, 64)
        found = [row["scores"] for row in scored if "scores" in row]
        assert np.allclose(found, expected, rtol=0, atol=1e-6) == is_equal

    evaluate.main(["report", "--config", path])
    text = (folder / "run" / "report.md").read_text()
    assert "pairs ranked by" in text
    assert "PPO-ptx" not in text.partition("## Win rates by use case")[0].partition("paper")[0]
    with pytest.raises(UserError, match="models is required"):
        evaluate.main(["reward-model", "--config", config(folder, models={})])


def test_the_time_of_an_evaluation_that_goes_on_is_the_whole(folder):
    path = config(folder)
    evaluate.main(["generate", "--config", path])
    state = folder / "run" / "stages" / "all.json"
    content = json.loads(state.read_text())
    assert content["data"]["seconds"].keys() == {"generate"}
    content["data"]["seconds"] = {"generate": 1000.0, "bench": 5.0}
    state.write_text(json.dumps(content))
    evaluate.main(["all", "--config", path], gold=length)
    seconds = json.loads((folder / "run" / "results.json").read_text())["wall_seconds"]
    assert 1000 < seconds["generate"] < 1100
    assert 0 < seconds["judge"] < 100
    assert "bench" not in seconds  # whose results are not in this report


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([], "expected a stage"),
        (["everything"], "got 'everything'"),
        (["all", "--promts", "x"], "did you mean 'prompts'"),
        (["all", "--output_dir", "x"], "models is required"),
        (["report", "--output_dir", "x", "--models", "{sft"], "models: expected JSON"),
        (["report", "--output_dir", "x", "--models", '{"a": "b", "a": "c"}'], r"models: .*the key 'a' stands twice"),
    ],
)
def test_mistakes_are_told_in_one_line(argv, told):
    with pytest.raises(UserError, match=told):
        evaluate.main(argv)
