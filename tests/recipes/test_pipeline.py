"""The whole pipeline on a few prompts: every step runs, is kept, and ends in the promised results."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from prefopt.recipes import pipeline

pytestmark = pytest.mark.slow

TINY = Path(pipeline.__file__).parent / "tiny"
MODELS = ("sft", "ppo", "ppo_ptx", "dpo")
SHORTER = {
    "pretrain": {"max_steps": 20},
    "sft": {"num_train_epochs": 2},
    "ppo_start": {"num_train_epochs": 1},
    "reward": {"max_steps": 3},
    "ppo": {"max_steps": 2, "generation_batch_size": 16, "per_device_train_batch_size": 16},
    "ppo_ptx": {"max_steps": 2, "generation_batch_size": 16, "per_device_train_batch_size": 16},
    "dpo": {"max_steps": 3},
}
SIZES = {
    "corpus_documents": 400,
    "heldout_documents": 20,
    "sft_prompts": 64,
    "rm_prompts": 40,
    "rl_prompts": 64,
    "tuning_prompts": 20,
    "test_prompts": 40,
    "max_new_tokens": 12,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    shutil.copytree(TINY, folder / "configs")
    for name, settings in SHORTER.items():
        path = folder / "configs" / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **settings}))
    argv = ["--config_dir", str(folder / "configs"), "--output_dir", str(folder / "run")]
    for key, value in SIZES.items():
        argv += [f"--{key}", str(value)]
    pipeline.main(argv)
    return folder / "run", argv


@pytest.mark.timeout(600)
def test_results_hold_every_promised_scalar(run):
    results = json.loads((run[0] / "results.json").read_text())
    for group in ("train_labelers", "heldout_labelers", "gold_ceiling"):
        assert 0 <= results["rm"]["accuracy"][group] <= 1
    for model in MODELS:
        assert results["pretraining_bits_per_byte"][model] > 0
        assert 0 <= results["heldout_task_accuracy"][model] <= 1
        assert 0 <= results["gold_reward"][model] <= 6
        assert results["kl_to_sft"][model] >= 0
        low, value, high = (results["winrate"][model][key] for key in ("ci_low", "value", "ci_high"))
        assert low <= value <= high
        assert results["winrate"][model]["n"] > 0
    assert results["winrate"]["sft"]["value"] == 0.5
    assert results["kl_to_sft"]["sft"] == pytest.approx(0, abs=1e-6)
    assert results["kl_to_sft"]["ppo"] > 0
    steps = [
        "data",
        "pretrain",
        "sft",
        "sample",
        "label",
        "reward",
        "select",
        "ppo_start",
        "ppo",
        "ppo_ptx",
        "dpo",
        "evaluate",
    ]
    assert list(results["wall_seconds"]) == steps
    assert all(seconds > 0 for seconds in results["wall_seconds"].values())


def test_the_report_shows_every_model_and_loads_nothing(run):
    html = (run[0] / "report.html").read_text()
    for name in ("SFT", "PPO", "PPO-ptx", "DPO"):
        assert name in html
    assert "<svg" in html
    assert "src=" not in html.replace("src='data:", "")
    assert "<script" not in html


def test_the_epoch_with_the_best_reward_score_is_chosen(run):
    selection = json.loads((run[0] / "sft_selection.json").read_text())
    assert len(selection["epochs"]) == 2
    assert selection["chosen"]["rm_score"] == max(epoch["rm_score"] for epoch in selection["epochs"])


def test_splits_written_to_disk_share_no_prompt(run):
    seen = {}
    for split in ("sft", "rm", "rl", "tuning", "test"):
        rows = (run[0] / "data" / f"prompts_{split}.jsonl").read_text().splitlines()
        for prompt in {json.loads(row)["prompt"] for row in rows}:
            assert seen.setdefault(prompt, split) == split


def test_a_second_run_repeats_no_step(run, capsys):
    before = {path: path.stat().st_mtime_ns for path in run[0].rglob("*.safetensors")}
    pipeline.main(run[1])
    assert capsys.readouterr().out.count("done before") == 12
    assert {path: path.stat().st_mtime_ns for path in run[0].rglob("*.safetensors")} == before


@pytest.mark.parametrize("path", sorted(TINY.glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_file_opens_with_what_it_is_and_needs(path):
    assert path.read_text().startswith("# ")
