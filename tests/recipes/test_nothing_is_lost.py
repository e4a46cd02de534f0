"""What a command writes goes neither over what it reads nor over what somebody else wrote, unless --overwrite says so."""

import json
import os
import shutil
from pathlib import Path

import pytest

from prefopt import cli
from prefopt.inference.jsonl import write_jsonl
from prefopt.recipes import pipeline

ROWS = [
    {"prompt": f"question {i}", "completions": ["a cat", "a dog"], "ranks": [1, 2], "labeler": name}
    for i in range(4)
    for name in ("ann", "bob")
]
OTHERS = "somebody's work\n"


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl("rows.jsonl", ROWS)
    write_jsonl("pairs.jsonl", [{"prompt": "p", "chosen": "good", "rejected": "bad"}])
    Path("run").mkdir()
    log = [{"step": s, "loss": 0.7, "rewards/accuracies": 0.5, "rewards/margins": 0.1} for s in (10, 20)]
    Path("run/trainer_state.json").write_text(json.dumps({"global_step": 20, "log_history": log}))
    return tmp_path


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Command without its output, the key of the output, what it reads, and the files it writes for the name "out".
COMMANDS = {
    "data convert": ("data convert pairs.jsonl", "--out", "pairs.jsonl", ["out"]),
    "data stats": ("data stats rows.jsonl", "--out", "rows.jsonl", ["out"]),
    "data split": ("data split rows.jsonl --validation 0.3 --test 0", "--out", None, ["out/train.jsonl"]),
    "label agreement": ("label agreement rows.jsonl", "--out", "rows.jsonl", ["out"]),
    "explain-run": ("explain-run run", "--output", "run/trainer_state.json", ["out"]),
}


def run(command, *extra):
    try:
        return cli.main([*command.split(), *extra])
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_there_stays_until_it_may_be_replaced(files, name):
    command, key, _, (written,) = COMMANDS[name]
    path = files / written
    path.parent.mkdir(exist_ok=True)
    path.write_text(OTHERS)
    before = snapshot(files)
    told = run(command, key, "out")
    assert written in told
    assert "--overwrite" in told
    assert snapshot(files) == before
    assert run(command, key, "out", "--overwrite") in (0, None)
    assert path.read_text() != OTHERS


@pytest.mark.parametrize("name", COMMANDS)
def test_the_same_command_again_is_no_loss(files, name):
    command, key, _, (written,) = COMMANDS[name]
    assert run(command, key, "out") in (0, None)
    first = (files / written).read_bytes()
    assert run(command, key, "out") in (0, None)
    assert (files / written).read_bytes() == first


@pytest.mark.parametrize("link", [None, os.symlink, os.link], ids=["itself", "symlink", "hard link"])
@pytest.mark.parametrize("name", [name for name, (_, _, read, _) in COMMANDS.items() if read])
def test_what_is_read_is_never_written_over(files, name, link):
    command, key, read, _ = COMMANDS[name]
    out = read
    if link is not None:
        out = "link"
        link(files / read, files / out)
    before = snapshot(files)
    told = run(command, key, out)
    assert "is also read" in told or "--overwrite" in told
    assert snapshot(files) == before
    if name != "explain-run":
        run(command, key, out, "--overwrite")
        assert snapshot(files) == before


# ---- the pipeline ---------------------------------------------------------------------------------------------------
def test_the_pipeline_leaves_a_folder_of_others_alone(files):
    Path("mine/base").mkdir(parents=True)
    Path("mine/base/model.safetensors").write_text(OTHERS)
    Path("mine/data").mkdir()
    Path("mine/data/prompts_rl.jsonl").write_text(OTHERS)
    before = snapshot(files)
    told = run("pipeline", "--output_dir", "mine")
    assert "output_dir: mine is of no earlier run of this command and holds base and 1 more" in told
    assert snapshot(files) == before
    shutil.rmtree("mine")
    Path("mine").write_text(OTHERS)
    assert "mine is a file" in run("pipeline", "--output_dir", "mine")


def test_a_mistake_in_the_file_of_a_later_step_ends_the_pipeline_before_the_first(files):
    shutil.copytree(Path(pipeline.__file__).parent / "tiny", "tiny")
    with open("tiny/dpo.yaml", "a") as config:
        config.write("beta: 0.1\nbeta: 0.2\n")
    for name, line in {"reward": "learning_rate: .nan", "ppo": "sead: 3", "evaluate": "temperature: -1"}.items():
        path = Path("tiny", f"{name}.yaml")
        kept = [text for text in path.read_text().splitlines() if not text.startswith(line.split(":")[0])]
        path.write_text("\n".join([*kept, line, ""]))
    told = run("pipeline", "--config_dir", "tiny", "--output_dir", "new").splitlines()
    assert len(told) == 4, told
    assert "tiny/reward.yaml: learning_rate=nan: expected a finite number" in told[0]
    assert "unknown key in tiny/ppo.yaml: 'sead' (did you mean 'seed'?)" in told[1]
    assert "tiny/dpo.yaml" in told[2]
    assert "stands twice" in told[2]
    assert "tiny/evaluate.yaml: temperature is -1" in told[3]
    assert not Path("new").exists()


def test_sizes_that_no_pipeline_has_are_all_named(files):
    told = run("pipeline", "--output_dir", "new", "--rl_prompts", "100000000000", "--sft_prompts", "0", "--seed", "-1")
    for name in ("rl_prompts=100000000000", "sft_prompts=0", "seed=-1"):
        assert f"{name}: expected a whole number" in told
    assert not Path("new").exists()
