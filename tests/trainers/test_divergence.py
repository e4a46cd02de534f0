"""A run whose gradients or weights are no longer finite stops before they are saved."""

import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prefopt.errors import UserError
from prefopt.recipes import dpo, ppo_ptx, reward, sft
from prefopt.trainers.shared.checkpoints import MARKER, superfluous

pytestmark = pytest.mark.slow

COMMON = ["--report_to", "none", "--bf16", "false", "--per_device_train_batch_size", "4", "--logging_steps", "1"]


def command(rows, *extra):
    return ["--model_name_or_path", "base", "--dataset_name", rows, "--output_dir", "out", *COMMON, *extra]


RECIPES = {
    "sft": (sft, "demos.jsonl", ()),
    "reward": (reward, "rankings.jsonl", ()),
    "dpo": (dpo, "rankings.jsonl", ()),
    "ppo-ptx": (
        ppo_ptx,
        "prompts.jsonl",
        ("--reward_model_name_or_path", "rm", "--ptx_coef", "0", "--max_completion_length", "4"),
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_first_step_of_nan_ends_the_run_and_saves_nothing(files, monkeypatch, name):
    """A gradient of the third step is NaN; the checkpoint of the second is whole, and the only one."""
    from transformers import Trainer

    step = Trainer.training_step
    calls = []

    def broken(self, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        calls.append(self.state.global_step)
        if self.state.global_step == 2:
            next(p for p in self.model.parameters() if p.grad is not None).grad[0] = math.nan
        return loss

    monkeypatch.setattr(Trainer, "training_step", broken)
    recipe, rows, extra = RECIPES[name]
    told = r"step 3: the gradients are not finite .*learning rate .*newest checkpoint before is out/checkpoint-2\."
    with pytest.raises(UserError, match=told):
        recipe.main(command(rows, "--max_steps", "5", "--save_steps", "1", "--save_total_limit", "1", *extra))
    assert max(calls) == 2
    assert sorted(path.name for path in (files / "out").glob("checkpoint-*")) == ["checkpoint-2"]
    assert not list((files / "out").glob("*.safetensors"))
    for path in (files / "out" / "checkpoint-2").glob("*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values())


@pytest.mark.parametrize(
    "of_run", [("--max_steps", "1", "--save_strategy", "no"), ("--max_steps", "2", "--save_steps", "1")]
)
def test_weights_that_a_step_has_broken_are_not_saved(files, of_run):
    """A step of 1e39 is beyond fp32; the step after which the run ends without a checkpoint, and one before its end."""
    told = r"step 1: the weights are not finite .*learning rate 1e\+39.*no checkpoint was saved before"
    with pytest.raises(UserError, match=told):
        sft.main(command("demos.jsonl", *of_run, "--learning_rate", "1e39", "--lr_scheduler_type", "constant"))
    assert not list((files / "out").rglob("*.safetensors"))


@pytest.mark.parametrize("limit", [None, 1, 2, 3])
def test_a_good_checkpoint_is_never_deleted_for_a_broken_one(tmp_path, limit):
    """The newest folder has lost its seal, and one is the best by its measure."""
    for step in (1, 2, 3, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if step != 4:
            (folder / MARKER).write_text("{}")
        os.utime(folder, (1e9 + 10 * step, 1e9 + 10 * step))
    left_out = [Path(path).name[-1] for path in superfluous(tmp_path, limit, str(tmp_path / "checkpoint-1"))]
    assert left_out == {None: [], 1: ["2"], 2: ["2"], 3: ["2"]}[limit]
    left_out = [Path(path).name[-1] for path in superfluous(tmp_path, limit)]
    assert left_out == {None: [], 1: ["1", "2"], 2: ["1", "2"], 3: ["1"]}[limit]
