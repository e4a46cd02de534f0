"""kill -9 at any moment, the same command again: the run ends bit for bit as one that was never killed.

The command runs in a fork, which kills itself at the n-th of a kind of event: before a file is written, inside the
write of one, before a rename or a removal, before a rollout or a micro-batch, after an optimizer step.
"""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import prefopt.cli
from prefopt.models.checkpoints import save_reward_model
from tests.conftest import run_in_fork

pytestmark = pytest.mark.slow

OPTIONS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 1,
    "logging_steps": 2,
    "learning_rate": 0.01,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "resume_from_checkpoint": True,
}
PPO_OPTIONS = OPTIONS | {
    "max_steps": 14,
    "generation_batch_size": 8,  # two minibatches
    "num_iterations": 2,  # so a rollout lasts 4 steps, and most checkpoints lie inside one; an epoch lasts 8
    "max_completion_length": 5,
    "value_learning_rate": 0.01,
    "kl_target": 0.5,
    "kl_horizon": 50,
    "normalize_scores": True,
    "ema_decay": 0.9,
    "ptx_coef": 1.0,
    "ptx_batch_ratio": 0.5,
    "ptx_max_length": 8,
}

# The event that kills, the how manieth of its process, and the newest complete checkpoint afterwards.
KILLS = [
    ("rollout", 1, None),
    ("micro-batch", 2, None),
    ("micro-batch", 6, None),
    ("write ppo_ptx_state.json", 1, None),  # inside the first save
    ("write rollout_0.pt", 1, None),
    ("write complete.json", 1, None),
    ("rename checkpoint-3", 1, None),
    ("micro-batch", 7, 3),
    ("micro-batch", 2, 3),  # from here on in resumed processes
    ("optimizer step", 3, 3),
    ("write model.safetensors", 1, 3),  # inside the second save
    ("write optimizer.pt", 1, 3),
    ("write rng_state.pth", 1, 3),
    ("write trainer_state.json", 2, 3),
    ("rename checkpoint-6", 1, 3),
    ("remove from checkpoint-3", 1, 6),  # the rotation: out of sight, and whole
    ("rollout", 1, 6),
    ("write value_function.safetensors", 1, 6),
    ("remove from checkpoint-6", 7, 9),  # deleted in part
    ("optimizer step", 2, 9),
    ("move out checkpoint-9", 1, 12),  # still in its place
    ("write scheduler.pt", 1, 12),
    ("rmdir checkpoint-9", 1, 14),  # of which the empty folder is left
    ("rmdir _unfinished", 1, 14),
    ("write model.safetensors", 1, 14),  # behind the last checkpoint, where the trained model is saved
]


# ---- the process that is killed -----------------------------------------------------------------------------------
def die_at(event, number):
    """Raise SIGKILL at the `number`-th event."""
    import transformers.modeling_utils

    from prefopt.models import sharding
    from prefopt.trainers.ppo_ptx import trainer as ppo_ptx_trainer

    seen = 0

    def happens(name):
        nonlocal seen
        seen += name == event
        return name == event and seen == number

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def audit(name, args):
        if name == "open" and args[1] and set(str(args[1])) & set("wxa"):
            found = f"write {os.path.basename(str(args[0]))}"
        elif name == "os.rename":
            kind = "move out" if os.path.basename(os.path.dirname(args[1])) == "_unfinished" else "rename"
            found = f"{kind} {os.path.basename(args[0])}"
        elif name == "shutil.rmtree":
            # Of the folder of what is unfinished: the checkpoint that is in it.
            inner = [path.name for path in Path(args[0]).glob("checkpoint-*")]
            audit.folder, found = " ".join(inner) or os.path.basename(args[0]), None
        elif name == "os.remove":
            found = f"remove from {audit.folder}"
        elif name == "os.rmdir":
            found = f"rmdir {os.path.basename(args[0])}"
        else:
            return
        if happens(found):
            die()

    def writing_half(function, path_of):
        """Files that no audit event tells of; they are left half-written."""

        def write(*args, **kwargs):
            result = function(*args, **kwargs)
            path = str(path_of(*args, **kwargs))
            if happens(f"write {os.path.basename(path)}"):
                os.truncate(path, os.path.getsize(path) // 2)
                die()
            return result

        return write

    def before(name, function):
        def act(*args, **kwargs):
            if happens(name):
                die()
            return function(*args, **kwargs)

        return act

    audit.folder = None
    sys.addaudithook(audit)
    torch.save = writing_half(torch.save, lambda data, path, *args, **kwargs: path)
    for module, name in [
        (transformers.modeling_utils, "safe_save_file"),
        (sharding, "save_file"),
    ]:
        function = getattr(module, name)
        setattr(module, name, writing_half(function, lambda data, path, *args, **kwargs: path))
    trainer = ppo_ptx_trainer.PPOPtxTrainer
    trainer._generate = before("rollout", trainer._generate)
    trainer.training_step = before("micro-batch", trainer.training_step)
    step = torch.optim.AdamW.step

    def step_and_die(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        if happens("optimizer step"):
            die()
        return result

    torch.optim.AdamW.step = step_and_die


# ---- the tests ----------------------------------------------------------------------------------------------------
@pytest.fixture
def files(tmp_path, causal_lm, reward_model, tokenizer):
    for name, model in (("base", causal_lm), ("reward", reward_model)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    get_peft_model(base, adapter).save_pretrained(tmp_path / "sft")
    tokenizer.save_pretrained(tmp_path / "sft")
    scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    adapter = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj"], modules_to_save=["score"])
    save_reward_model(get_peft_model(scorer, adapter), tmp_path / "reward-adapter")
    tokenizer.save_pretrained(tmp_path / "reward-adapter")
    words = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "ran", "to", "the", "red", "house"]
    prompts = [" ".join(words[i % 7 : i % 7 + 1 + i % 4]) for i in range(16)]
    rows = {
        "prompts": [{"prompt": p} for p in prompts],
        "text": [{"text": " ".join(words[i % 5 :])} for i in range(9)],
        "demonstrations": [{"prompt": p, "completion": f" {p}"} for p in prompts],
        "rankings": [{"prompt": p, "completions": [" sat", " ran", f" {p}"], "ranks": [1, 2, 3]} for p in prompts],
    }
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def run(recipe, files, output, options, kill=("nothing", 1)):
    """The exit status of the command; negative: the signal that ended it."""
    argv = [recipe, "--config", str(files / f"{recipe}.yaml"), "--output_dir", str(files / output)]
    (files / f"{recipe}.yaml").write_text(json.dumps(options))  # JSON is YAML

    def killed():
        die_at(*kill)
        return prefopt.cli.main(argv)

    return run_in_fork(killed, files / f"{output}.log")


def steps_of(output):
    """The steps of the complete checkpoints, told here by their own files and not by the code under test."""
    steps = []
    for folder in output.glob("checkpoint-*"):
        marker = folder / "complete.json"
        sizes = json.loads(marker.read_text())["files"] if marker.is_file() else {"missing": 0}
        if all((folder / n).is_file() and (folder / n).stat().st_size == s for n, s in sizes.items()):
            assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= sizes.keys()
            steps.append(int(folder.name.removeprefix("checkpoint-")))
    return steps


def newest_step(output):
    return max(steps_of(output), default=None)


def assert_all_in_place_are_complete(output):
    assert len(steps_of(output)) == len(list(output.glob("checkpoint-*")))


def end_of(output):
    """Every tensor that a run leaves behind, in its final models and in its last checkpoint."""
    tensors = {}
    last = output / f"checkpoint-{newest_step(output)}"
    for path in [
        *output.glob("*.safetensors"),
        *output.glob("ema/*.safetensors"),
        *last.rglob("*.safetensors"),
    ]:
        for name, tensor in load_file(path).items():
            tensors[f"{path.relative_to(output)} {name}"] = tensor
    optimizer = torch.load(last / "optimizer.pt", weights_only=True)
    for number, state in optimizer["state"].items():
        tensors |= {f"optimizer {number} {name}": tensor for name, tensor in state.items()}
    random = torch.load(last / "rng_state.pth", weights_only=False)
    tensors["rng torch"] = random["cpu"]
    tensors["rng numpy"] = torch.from_numpy(random["numpy"][1].astype("int64"))
    tensors["rng python"] = torch.tensor(random["python"][1])
    return tensors


def assert_same_end(killed, whole):
    left, right = end_of(killed), end_of(whole)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert (
        json.loads((killed / "trainer_state.json").read_text())["global_step"]
        == json.loads((whole / "trainer_state.json").read_text())["global_step"]
    )


def ppo_options(files, policy, **more):
    return PPO_OPTIONS | {
        "model_name_or_path": str(files / policy),
        "dataset_name": str(files / "prompts.jsonl"),
        "reward_model_name_or_path": str(files / "reward"),
        "pretrain_dataset_name": str(files / "text.jsonl"),
        **more,
    }


def logs_of(output):
    """The log but for times."""
    unlike = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [{k: v for k, v in entry.items() if k not in unlike} for entry in history if "grad_norm" in entry]


def test_killed_over_and_over_ends_as_if_never_killed(files):
    options = ppo_options(files, "base")
    assert run("ppo-ptx", files, "whole", options) == 0
    for number, (event, count, newest) in enumerate(KILLS):
        status = run("ppo-ptx", files, "killed", options, kill=(event, count))
        assert status == -signal.SIGKILL, (number, event, (files / "killed.log").read_text()[-3000:])
        assert newest_step(files / "killed") == newest, (number, event)
        assert_all_in_place_are_complete(files / "killed")
    assert run("ppo-ptx", files, "killed", options) == 0
    assert_same_end(files / "killed", files / "whole")
    assert logs_of(files / "killed") == logs_of(files / "whole")
    assert [path.name for path in (files / "killed").glob("checkpoint-*")] == ["checkpoint-14"]
    assert not (files / "killed" / "_unfinished").exists()
    log = (files / "killed.log").read_text()
    for step in (3, 6, 9, 14):
        assert f"_unfinished/checkpoint-{step} was left unfinished" in log


@pytest.mark.parametrize(("newer", "reward"), [("half-deleted", "reward"), ("half-written", "reward-adapter")])
def test_incomplete_checkpoint_is_named_and_passed_over(newer, reward, files):
    """With a LoRA policy; the reward model of its own, or, as the value function, an adapter on the policy's base."""
    options = ppo_options(files, "sft", save_total_limit=5, max_steps=8)
    options["reward_model_name_or_path"] = str(files / reward)
    assert run("ppo-ptx", files, "run", options) == 0
    whole = end_of(files / "run")
    assert any("lora" in name for name in whole)
    newest = files / "run" / "checkpoint-8"
    if newer == "half-deleted":
        (newest / "optimizer.pt").unlink()
        missing = "optimizer.pt is missing"
    else:
        (newest / "complete.json").unlink()
        missing = "no complete.json"
    (files / "run" / "trainer_state.json").unlink()  # as if killed before the end, which is told by this file
    assert run("ppo-ptx", files, "run", options) == 0
    assert f"checkpoint-8 is incomplete ({missing})" in (files / "run.log").read_text()
    again = end_of(files / "run")
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []


@pytest.mark.parametrize(("recipe", "rows"), [("sft", "demonstrations"), ("reward", "rankings"), ("dpo", "rankings")])
def test_other_recipes_resume_from_complete_checkpoints_alone(recipe, rows, files):
    options = OPTIONS | {
        "max_steps": 7,
        "model_name_or_path": str(files / "base"),
        "dataset_name": str(files / f"{rows}.jsonl"),
    }
    assert run(recipe, files, "whole", options) == 0
    for event, count, newest in [
        ("optimizer step", 2, None),
        ("write optimizer.pt", 2, 3),
        ("write complete.json", 1, 3),
        ("remove from checkpoint-3", 4, 6),
        ("move out checkpoint-6", 1, 7),
    ]:
        status = run(recipe, files, "killed", options, kill=(event, count))
        assert status == -signal.SIGKILL, (event, (files / "killed.log").read_text()[-3000:])
        assert newest_step(files / "killed") == newest
        assert_all_in_place_are_complete(files / "killed")
    assert run(recipe, files, "killed", options) == 0
    assert_same_end(files / "killed", files / "whole")
    # Checkpoints at 3 and 6, so every window that a resumed run logs first has begun before it.
    assert logs_of(files / "killed") == logs_of(files / "whole")
    assert [entry["step"] for entry in logs_of(files / "whole")] == [2, 4, 6]
    assert [path.name for path in (files / "killed").glob("checkpoint-*")] == ["checkpoint-7"]
    assert not (files / "killed" / "_unfinished").exists()
