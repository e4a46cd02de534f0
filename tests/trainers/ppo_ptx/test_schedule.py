"""The warm-up, the average of the weights, the inner epochs, and when a checkpoint counts as complete."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
)

from prefopt.trainers.ppo_ptx.config import PPOPtxConfig
from prefopt.trainers.ppo_ptx.trainer import PPOPtxTrainer
from prefopt.trainers.shared.averaging import WeightAverage
from prefopt.trainers.shared.checkpoints import MARKER, newest_complete_checkpoint, seal, what_is_missing
from tests.trainers.conftest import in_two_processes
from tests.trainers.ppo_ptx.conftest import PROMPTS, config, lora

pytestmark = pytest.mark.slow


@pytest.fixture
def make(make):
    """Six steps of two episodes, and an evaluation."""
    defaults = {
        "eval_dataset": PROMPTS,
        "logging_steps": 500,
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 0.01,
        "value_learning_rate": 0.02,
    }

    def make_with_defaults(*args, **options):
        return make(*args, **{**defaults, **options})

    return make_with_defaults


class EachStep(TrainerCallback):
    """Keeps what `look(trainer)` returns before and after every optimizer step."""

    def __init__(self, look):
        self.look, self.before, self.after = look, [], []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.before.append(self.look())

    def on_step_end(self, args, state, control, **kwargs):
        self.after.append(self.look())


# ---- the learning rates -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("schedule", ["constant_with_warmup", "linear"])
def test_warm_up_from_one_tenth_of_the_peak_for_both_groups(schedule, make):
    seen = EachStep(lambda: {group["lr"] for group in trainer.optimizer.param_groups})
    trainer = make(warmup_steps=4, lr_scheduler_type=schedule, callbacks=[seen])
    trainer.train()
    after = {"constant_with_warmup": [1, 1], "linear": [1, 0.5]}[schedule]
    for rates, factor in zip(seen.before, [0.1, 0.325, 0.55, 0.775, *after], strict=True):
        assert sorted(rates) == pytest.approx([0.01 * factor, 0.02 * factor], rel=1e-12)


def test_warm_up_lasts_the_first_ten_rollouts(tmp_path):
    paper = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 8, "generation_batch_size": 512}
    assert config(tmp_path, **paper, warmup_steps=None).warmup_steps == 10 * 512 / 64
    assert config(tmp_path, **paper, num_iterations=2, warmup_steps=None).warmup_steps == 10 * 2 * 512 / 64
    assert config(tmp_path, **paper, warmup_steps=0).warmup_steps == 0
    assert PPOPtxConfig(str(tmp_path)).warmup_steps == 10


@pytest.mark.parametrize("options", [{"ema_decay": 1.1}, {"ema_decay": -0.1}, {"warmup_start_ratio": 2.0}])
def test_shares_are_from_0_to_1(options, tmp_path):
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.*from 0 to 1"):
        config(tmp_path, **options)


# ---- the average of the weights -----------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_average_equals_a_loop(kind, make, causal_lm, tmp_path):
    def weights():
        return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}

    seen, base = EachStep(weights), copy.deepcopy(causal_lm)
    trainer = make(lora(causal_lm) if kind == "adapter" else causal_lm, ema_decay=0.75, callbacks=[seen])
    trainer.train()
    expected = {name: tensor.double() for name, tensor in seen.before[0].items()}
    for step in seen.after:
        expected = {name: 0.75 * mean + 0.25 * step[name].double() for name, mean in expected.items()}
    averages = trainer.weight_average.averages
    assert averages.keys() == expected.keys()
    assert all("lora_" in name for name in averages) == (kind == "adapter")
    for name, mean in expected.items():
        torch.testing.assert_close(averages[name].double(), mean, atol=1e-7, rtol=1e-6)

    last = seen.after[-1]
    assert any(not torch.equal(last[name], averages[name]) for name in last)
    with trainer.averaged_weights():
        assert all(torch.equal(weights()[name], averages[name]) for name in averages)
        averaged = trainer.evaluate()["eval_loss"]
    assert averaged == averaged  # it ran
    assert all(torch.equal(weights()[name], last[name]) for name in last)

    trainer.save_model(str(tmp_path / "saved"))
    for folder, tensors in ((tmp_path / "saved", last), (tmp_path / "saved" / "ema", averages)):
        if kind == "adapter":
            loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder)
        else:
            loaded = AutoModelForCausalLM.from_pretrained(folder)
        loaded = dict(loaded.named_parameters())
        assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_average_is_kept_in_fp32():
    """Steps that 16 bit rounds away: 1 + 0.008 * 2^-7 is 1 in bf16."""
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    average, expected = WeightAverage({"weight": weight}, 0.992), 1.0
    weight.data += 2**-7
    for _ in range(100):
        average.update()
        expected = 0.992 * expected + 0.008 * (1 + 2**-7)
    assert average.averages["weight"].item() == pytest.approx(expected, abs=1e-6)
    with average.swapped_in():
        assert weight.dtype == torch.bfloat16


def test_training_starts_the_average_at_its_first_weights(make):
    trainer = make(ema_decay=1.0, max_steps=1)
    with torch.no_grad():
        next(trainer.model.parameters()).add_(1)
    first = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert all(torch.equal(mean, first[name]) for name, mean in trainer.weight_average.averages.items())


def test_average_of_a_best_model_is_the_best_one(make):
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make(
        ema_decay=0.5, max_steps=3, load_best_model_at_end=True, metric_for_best_model="eval_reward", **best
    )
    trainer.train()
    folder = trainer.state.best_model_checkpoint
    saved = load_file(os.path.join(folder, "weight_average.safetensors"))
    assert all(torch.equal(mean, saved[name]) for name, mean in trainer.weight_average.averages.items())
    # it is named by where it came to lie, not by where it was written
    assert os.path.dirname(folder) == trainer.args.output_dir
    for checkpoint in Path(trainer.args.output_dir).glob("checkpoint-*"):
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        assert os.path.isdir(state["best_model_checkpoint"])


def test_averages_must_match(make, tmp_path):
    one, other = (WeightAverage({name: nn.Parameter(torch.zeros(1))}, 0.9) for name in ("one", "other"))
    with pytest.raises(ValueError, match="without ema_decay"):
        one.load(str(tmp_path))
    one.save(str(tmp_path))
    with pytest.raises(ValueError, match=r"differ in .*one"):
        other.load(str(tmp_path))
    with pytest.raises(ValueError, match="set ema_decay"):
        make().averaged_weights()


# ---- inner epochs -------------------------------------------------------------------------------------------------
def test_inner_epochs_divide_the_rollout_anew(make):
    def rows_of(batch):
        names = ("prompt_ids", "completion_ids", "old_values", "returns", "advantages")
        return [tuple(str(batch[name][i].tolist()) for name in names) for i in range(2)]

    micro_batches = []

    class Watched(PPOPtxTrainer):
        def _compute_loss(self, model, inputs):
            micro_batches.append((rows_of(inputs), inputs["loss_mask"].sum().item(), inputs["num_tokens"].item()))
            return super()._compute_loss(model, inputs)

    trainer = make(steps_per_generation=4, gradient_accumulation_steps=2, num_iterations=3, max_steps=6)
    trainer.__class__ = Watched
    trainer.train()
    epochs = [micro_batches[start : start + 4] for start in (0, 4, 8)]
    rows = [[row for batch, _, _ in epoch for row in batch] for epoch in epochs]
    assert len(set(rows[0])) == 8
    assert sorted(rows[0]) == sorted(rows[1]) == sorted(rows[2])
    minibatches = [{frozenset(rows[e][0:4]), frozenset(rows[e][4:8])} for e in range(3)]
    assert minibatches[0] != minibatches[1] or minibatches[1] != minibatches[2]
    for (_, one, total), (_, other, same) in zip(micro_batches[::2], micro_batches[1::2], strict=True):
        assert total == same == one + other


# ---- checkpoints --------------------------------------------------------------------------------------------------
def test_a_checkpoint_is_complete_with_every_file_whole(tmp_path):
    PartialState()  # for the warnings
    for step in (1, 2, 10):
        (tmp_path / f"checkpoint-{step}" / "inner").mkdir(parents=True)
        (tmp_path / f"checkpoint-{step}" / "inner" / "weights").write_bytes(b"12345")
    checkpoint = tmp_path / "checkpoint-10"
    assert newest_complete_checkpoint(tmp_path) is None
    seal(tmp_path / "checkpoint-2")
    assert newest_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    seal(checkpoint)
    assert newest_complete_checkpoint(tmp_path) == str(checkpoint)
    (checkpoint / "more").write_text("files are no harm")
    assert what_is_missing(checkpoint) is None
    (checkpoint / "inner" / "weights").write_bytes(b"12435")
    assert what_is_missing(checkpoint) == "inner/weights is damaged: it has changed since it was saved"
    assert newest_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    (checkpoint / "inner" / "weights").write_bytes(b"123")
    assert what_is_missing(checkpoint) == "inner/weights has 3 of 5 bytes"
    (checkpoint / "inner" / "weights").unlink()
    assert what_is_missing(checkpoint) == "inner/weights is missing"
    for content in ("", "[]", '{"files": 1}', '{"files": [1]}', '{"files": {"more": null}}'):
        (checkpoint / MARKER).write_text(content)
        assert what_is_missing(checkpoint) == f"{MARKER} is damaged"
    assert newest_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_push_and_rotation_see_the_complete_checkpoint(make, monkeypatch):
    pushed = []

    def push(self, folder):
        others = [what_is_missing(path) for path in Path(folder).parent.glob("checkpoint-*")]
        pushed.append((os.path.basename(folder), others))

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    trainer = make(save_strategy="steps", save_steps=1, save_total_limit=1, max_steps=2)
    trainer.args.push_to_hub = True
    trainer.train()
    assert pushed == [("checkpoint-1", [None]), ("checkpoint-2", [None, None])]
    assert [path.name for path in Path(trainer.args.output_dir).glob("*checkpoint-*")] == ["checkpoint-2"]


def test_saving_twice_at_one_step_keeps_the_first(make, monkeypatch):
    trainer = make(save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train()
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-2"
    written = (checkpoint / MARKER).stat().st_mtime_ns
    trainer._save_checkpoint(trainer.model, None)
    assert (checkpoint / MARKER).stat().st_mtime_ns == written
    trainer.train(resume_from_checkpoint="latest")  # a finished run is left as it is
    assert trainer.state.global_step == 2


def test_what_cannot_be_resumed_is_refused(make, caplog):
    trainer = make(save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train(resume_from_checkpoint="true")
    assert "training starts anew" in caplog.text
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-2"
    (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"incomplete: optimizer\.pt is missing"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(ValueError, match="save_only_model"):
        make(save_only_model=True).train(resume_from_checkpoint=True)


def train_and_resume(folder):
    texts = PROMPTS["prompt"][:]

    def train(steps, resume=None):
        args = PPOPtxConfig(
            f"{folder}/run",
            use_cpu=True,
            report_to="none",
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            steps_per_generation=4,
            num_iterations=2,
            max_steps=steps,
            max_completion_length=5,
            save_strategy="steps",
            save_steps=3,
            learning_rate=0.01,
            ema_decay=0.9,
            ptx_max_length=8,
            ptx_batch_ratio=0.5,
            normalize_scores=True,
            kl_target=0.5,
            kl_horizon=50,
            logging_steps=1,
        )
        trainer = PPOPtxTrainer(
            AutoModelForCausalLM.from_pretrained(f"{folder}/policy"),
            AutoModelForSequenceClassification.from_pretrained(f"{folder}/reward"),
            args,
            Dataset.from_dict({"prompt": texts}),
            processing_class=AutoTokenizer.from_pretrained(f"{folder}/policy"),
            pretrain_dataset=Dataset.from_dict({"text": texts}),
        )
        trainer.train(resume_from_checkpoint=resume)
        weights = {**dict(trainer.model.named_parameters()), **trainer.weight_average.averages}
        values = trainer.value_function.parameters
        return [x.detach().clone() for x in (*weights.values(), *values)], torch.get_rng_state()

    first, random = train(5)
    again, random_again = train(5, resume=f"{folder}/run/checkpoint-3")  # in the middle of the first rollout
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert torch.equal(random, random_again)


def test_two_processes_resume_inside_a_rollout(causal_lm, reward_model, tokenizer, tmp_path):
    for name, model in (("policy", causal_lm), ("reward", reward_model)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    in_two_processes(train_and_resume, tmp_path)
    kept = {path.name for path in (tmp_path / "run" / "checkpoint-3").iterdir()}
    assert {"rollout_0.pt", "rollout_1.pt", "rng_state_0.pth", "rng_state_1.pth"} <= kept
