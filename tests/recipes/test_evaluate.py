"""`prefopt eval all` on tiny models, as a user runs it: one YAML file, one report; what breaks costs itself alone."""

import copy
import json

import pytest
import torch
import yaml

from prefopt.errors import UserError
from prefopt.evaluation.results import find
from prefopt.inference.jsonl import write_jsonl
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
    ("argv", "told"),
    [
        ([], "expected a stage"),
        (["everything"], "got 'everything'"),
        (["all", "--promts", "x"], "did you mean 'prompts'"),
        (["all", "--output_dir", "x"], "models is required"),
        (["report", "--output_dir", "x", "--models", "{sft"], "models: expected JSON"),
    ],
)
def test_mistakes_are_told_in_one_line(argv, told):
    with pytest.raises(UserError, match=told):
        evaluate.main(argv)
