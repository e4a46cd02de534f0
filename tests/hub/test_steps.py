"""The steps of the pipeline with the Hub at both ends: they start from repositories, and push what they have trained."""

import json
import shlex

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from prefopt import cli
from prefopt.errors import UserError
from prefopt.hub.push import push_folder
from prefopt.inference.jsonl import write_jsonl
from prefopt.models.checkpoints import load_reward_model
from prefopt.recipes import dpo, ppo_ptx, reward, sft
from tests.hub.models import DEMONSTRATIONS, ROWS, dpo_trainer, reward_trainer

pytestmark = [pytest.mark.allow_hosts(["127.0.0.1"]), pytest.mark.slow]
SHORT = [
    "--max_steps",
    "1",
    "--per_device_train_batch_size",
    "2",
    "--report_to",
    "none",
    "--use_cpu",
    "--bf16",
    "false",
]
LORA = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj", "--learning_rate", "0.05"]
PPO = ["--max_completion_length", "4", "--ptx_coef", "0"]
QUIET = ["--disable_tqdm", "true"]


@pytest.fixture
def files(tmp_path):
    write_jsonl(tmp_path / "rankings.jsonl", ROWS)
    write_jsonl(tmp_path / "demonstrations.jsonl", DEMONSTRATIONS)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in ROWS])
    return tmp_path


def run(recipe, model, rows, output, *options, save="no"):
    argv = ["--model_name_or_path", model, "--dataset_name", str(rows), "--output_dir", str(output)]
    recipe.main([*argv, "--save_strategy", save, *SHORT, *QUIET, *map(str, options)])


def to_hub(name):
    return ["--push_to_hub", "true", "--hub_model_id", f"me/{name}"]


def test_every_step_starts_from_the_adapter_that_the_step_before_has_published(hub, base, files):
    run(sft, base, files / "demonstrations.jsonl", files / "sft", *LORA, *to_hub("sft"))
    run(reward, "me/sft", files / "rankings.jsonl", files / "rm", *to_hub("rm"),
        "--center_on", files / "demonstrations.jsonl")  # fmt: skip
    run(dpo, "me/sft", files / "rankings.jsonl", files / "dpo", *to_hub("dpo"))
    run(ppo_ptx, "me/sft", files / "prompts.jsonl", files / "ppo", *PPO, *to_hub("ppo"),
        "--reward_model_name_or_path", "me/rm")  # fmt: skip
    ids = torch.tensor([[5, 6, 7]])
    logits = {
        name: AutoModelForCausalLM.from_pretrained(f"me/{name}")(ids).logits for name in ("base", "sft", "dpo", "ppo")
    }
    for name, before in (("sft", "base"), ("dpo", "sft"), ("ppo", "sft")):
        assert not torch.allclose(logits[name], logits[before], atol=1e-6)
    for name in ("sft", "rm", "dpo", "ppo"):
        card = hub.files(f"me/{name}")["README.md"]
        assert b"base_model: me/base" in card
        assert (b"| started from | me/sft |" in card) == (name != "sft")
        assert (b"| demonstrations that score 0 on average | demonstrations.jsonl |" in card) == (name == "rm")
        assert not {"training_args.bin", "optimizer.pt", "value_function.safetensors"} & set(hub.files(f"me/{name}"))
    # Published once, and centered: not what had been saved before centering.
    assert hub.repositories["me/rm"].messages == ["End of training"]
    published = load_reward_model("me/rm").get_base_model().config.reward_bias
    assert published == json.loads((files / "rm" / "config.json").read_text())["reward_bias"] != 0


def test_a_failed_push_is_no_failed_training(hub, base, files):
    hub.fail("POST /api/models/me/rm/commit", 500)
    argv = [*LORA, *to_hub("rm"), "--hub_private_repo", "true"]
    with pytest.raises(UserError) as stop:
        run(reward, base, files / "rankings.jsonl", files / "rm", *argv)
    message = str(stop.value)  # SystemExit with a message: exit code 1
    assert message.startswith("training is done and saved, but ")
    assert "\n" not in message
    saved = (files / "rm" / "adapter_model.safetensors").read_bytes()
    assert (files / "rm" / "trainer_state.json").is_file()
    hub.faults.clear()
    cli.main(shlex.split(message.split("try again: ")[1])[1:])
    assert hub.files("me/rm")["adapter_model.safetensors"] == saved
    assert hub.repositories["me/rm"].private
    assert b"rankings.jsonl" in hub.files("me/rm")["README.md"]  # the card of the training run


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--hub_model_id", "you/rm"], "the token may not write there"),
        (["--hub_model_id", "a/b/c"], "a/b/c"),
        (["--hub_token", "writer"], "hub_token: Trainer would publish it"),
    ],
)
def test_what_would_fail_at_the_end_fails_before_anything_is_loaded(options, said, hub, files, monkeypatch):
    if "you/rm" in options:
        monkeypatch.setenv("HF_TOKEN", "reader")
    with pytest.raises(UserError, match=said):
        run(
            reward,
            "no-such/model",
            files / "rankings.jsonl",
            files / "rm",
            "--push_to_hub",
            "true",
            *options,
        )
    assert not (files / "rm").exists()


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "end"])
def test_pushing_while_training_is_trainers(strategy, hub, base, tokenizer, tmp_path):
    trainer = reward_trainer(
        base, tokenizer, tmp_path / "rm", push_to_hub=True, hub_model_id="me/rm", hub_strategy=strategy,
        hub_always_push=True, save_strategy="steps", save_steps=2,
    )  # fmt: skip
    trainer.train()
    files = hub.files("me/rm")
    if strategy == "end":
        assert files == {}
    else:
        assert (
            files["adapter_model.safetensors"]
            == (tmp_path / "rm" / "checkpoint-2" / "adapter_model.safetensors").read_bytes()
        )
        assert {"config.json", "tokenizer.json", "model_card.json"} <= set(files)
        card = ModelCard(files["README.md"].decode())
        assert (card.data["library_name"], card.data.pipeline_tag) == ("peft", "text-classification")
        assert 'PeftModel.from_pretrained(base, "me/rm")' in card.text
    assert ("last-checkpoint/optimizer.pt" in files) == (strategy == "checkpoint")
    trainer.push_to_hub()
    assert json.loads(hub.files("me/rm")["model_card.json"])["data"]["optimizer steps"] == 2


def test_a_hub_that_breaks_while_training_stops_no_training(hub, base, tokenizer, tmp_path):
    trainer = reward_trainer(
        base,
        tokenizer,
        tmp_path / "rm",
        push_to_hub=True,
        hub_model_id="me/rm",
        save_strategy="steps",
        save_steps=1,
    )
    hub.fail("commit|preupload", 500)
    trainer.train()
    assert trainer.state.global_step == 2
    hub.faults.clear()
    trainer.push_to_hub()
    assert (
        hub.files("me/rm")["adapter_model.safetensors"] == (tmp_path / "rm" / "adapter_model.safetensors").read_bytes()
    )


def test_a_push_in_the_background(hub, base, tokenizer, tmp_path):
    class Told(TrainerCallback):
        pushes = 0

        def on_push_begin(self, *args, **kwargs):
            self.pushes += 1

    trainer = dpo_trainer(base, tokenizer, tmp_path / "dpo")
    told = Told()
    trainer.add_callback(told)
    commit = trainer.push_to_hub("In the background", blocking=False, private=True).result()
    assert commit.commit_message == "In the background"
    assert hub.repositories["me/dpo"].private  # the name of the folder, in the namespace of the token
    assert told.pushes == 1


def test_a_revision_is_where_a_step_starts(hub, base, tokenizer, files):
    trainer = dpo_trainer(base, tokenizer, files / "first")
    trainer.train()
    trainer.save_model()
    push_folder(files / "first", "me/policy", revision="trial")
    with pytest.raises(UserError, match="cannot load a tokenizer from 'me/policy'"):
        run(dpo, "me/policy", files / "rankings.jsonl", files / "dpo")
    for recipe, output in ((dpo, "dpo"), (reward, "rm")):
        run(recipe, "me/policy", files / "rankings.jsonl", files / output, "--model_revision", "trial",
            "--learning_rate", 0)  # fmt: skip
        start = load_file(files / "first" / "adapter_model.safetensors")
        after = load_file(files / output / "adapter_model.safetensors")
        assert set(after) - set(start) == ({"base_model.model.score.weight"} if recipe is reward else set())
        for name, weight in start.items():
            assert torch.equal(after[name], weight), name
