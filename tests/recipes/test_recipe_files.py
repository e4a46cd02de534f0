"""Every YAML file that ships is what its step takes, and the steps of recipes/instructgpt-qlora/ run one after the other on
tiny models and rows, with 4-bit weights and all other settings as they are."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from prefopt.errors import UserError
from prefopt.inference.jsonl import read_jsonl, write_jsonl
from prefopt.models.checkpoints import load_reward_model
from prefopt.models.reward import get_reward_bias
from prefopt.recipes import best_of_n, dpo, evaluate, frontier, iterate, pipeline, ppo_ptx, reward, sample, sft, sweep
from prefopt.recipes.common import training
from prefopt.recipes.recipes import copy
from tests.conftest import tiny_config

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
QLORA = RECIPES / "instructgpt-qlora"
STEPS = {
    "pretrain": sft,
    "sft": sft,
    "ppo_start": sft,
    "sft_on_rated": sft,
    "sample": sample,
    "reward": reward,
    "ppo": ppo_ptx,
    "ppo_ptx": ppo_ptx,
    "dpo": dpo,
    "best_of_n": best_of_n,
    "evaluate": evaluate,
    "pipeline": pipeline,
    "dpo_ptx": dpo,
    "sweep": sweep,
    "sweep_dpo": sweep,
    "frontier": frontier,
    "iterate": iterate,
}


class Parsed(Exception):
    """The arguments a step was given; it goes no further."""


def arguments_of(step, argv, monkeypatch):
    """What the step makes of its arguments, by attribute, whichever dataclass has it."""
    place = step if hasattr(step, "parse") else training
    parse = place.parse

    def parse_and_stop(*args, **kwargs):
        raise Parsed(parse(*args, **kwargs))

    monkeypatch.setattr(place, "parse", parse_and_stop)
    with pytest.raises(Parsed) as parsed:
        step.main(argv)
    return {name: value for part in parsed.value.args[0] for name, value in vars(part).items()}


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_file_is_what_its_step_takes(path, monkeypatch, tmp_path):
    keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.parent.name == "accelerate":
        loaded = load_config_from_file(str(path))
        assert loaded.num_processes == keys["num_processes"]
        return
    step = STEPS[path.stem]
    argv = ["--config", str(path)]
    if "output_dir" not in keys and step not in (sample, best_of_n):
        argv += ["--output_dir", str(tmp_path)]
    given = arguments_of(step, ["all", *argv] if step is evaluate else argv, monkeypatch)
    read_otherwise = {
        "lr_scheduler_type",
        "lora_target_modules",
        "chat_template_path",
        "report_to",
    }  # an enum, ...
    for key, value in keys.items():
        assert key in read_otherwise or given[key] == value, key


def test_an_unknown_key_of_a_file_stops(tmp_path):
    (tmp_path / "sft.yaml").write_text((QLORA / "sft.yaml").read_text() + "\nnum_epochs: 3\n")
    with pytest.raises(UserError, match=r"unknown key in .*sft.yaml: 'num_epochs'"):
        sft.main(["--config", str(tmp_path / "sft.yaml")])


@pytest.mark.parametrize("extra", [[], ["--chat_template_path=other.jinja"]])
def test_the_template_lies_beside_a_copied_file(extra, tmp_path, monkeypatch):
    copy("instructgpt-qlora", tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    given = arguments_of(sft, ["--config", "mine/sft.yaml", *extra], monkeypatch)
    assert given["chat_template_path"] == ("other.jinja" if extra else "mine/chatml.jinja")


def test_the_qlora_steps_fit_together():
    """What one file writes is what the next one reads, and the two PPO files differ in the pretraining text alone."""
    keys = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in QLORA.glob("*.yaml")}
    written = {name: of.get("output_dir", of.get("output")) for name, of in keys.items()}
    assert keys["reward"]["model_name_or_path"] == written["sft"]
    for name in ("ppo", "ppo_ptx", "dpo", "best_of_n"):
        assert keys[name]["model_name_or_path"] == written["ppo_start"]
    for name in ("ppo", "ppo_ptx", "best_of_n"):
        assert keys[name]["reward_model_name_or_path"] == written["reward"]
    models = keys["evaluate"]["models"]
    steps = {"sft": "ppo_start", "best_of_16": "best_of_n"}
    assert {name: written[steps.get(name, name)] for name in models if name != "base"} == {
        name: folder for name, folder in models.items() if name != "base"
    }
    own = {"output_dir", "ptx_coef", "ptx_batch_ratio", "ptx_max_length", "ptx_per_device_batch_size"}
    pretraining = {name for name in keys["ppo_ptx"] if name.startswith("pretrain_")}
    shared = {name: value for name, value in keys["ppo_ptx"].items() if name not in own | pretraining}
    assert shared == {name: value for name, value in keys["ppo"].items() if name not in own}
    models = {
        name: {k: v for k, v in of.items() if k.startswith(("lora_", "load_in", "use_"))} for name, of in keys.items()
    }
    assert models["sft"] == models["ppo_start"] == models["sft_on_rated"]


# ---- the chain ----
def say(*turns):
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_source):
    """A base model without a chat template that ends texts with <eos>, and rows as the data sets have them."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("qlora")
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(hidden_size=64, intermediate_size=128))
    model.save_pretrained(folder / "base")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer_source, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(folder / "base")

    users = ["what is this?", "the cat", "a dog", "red house", "the mat", "question"]
    conversations = [say(f"user: {u}", "assistant: a dog", "user: and the cat?", "assistant: sat") for u in users]
    # As in no_robots: the first user turn besides, and some conversations of one turn.
    demonstrations = [
        {"prompt": u, "messages": c if i % 2 else c[:2], "category": "Chat"}
        for i, (u, c) in enumerate(zip(users, conversations, strict=True))
    ]
    write_jsonl(folder / "demonstrations.jsonl", demonstrations * 3)
    # As `prefopt data convert` writes them: a chat prompt, text completions.
    ranked = {
        "completions": [" sat", " ran to the house", " mat"],
        "ranks": [1, 2, 3],
        "ratings": [5.0, 2.5, 1.0],
    }
    write_jsonl(folder / "rankings.jsonl", [{"prompt": c[:3], **ranked} for c in conversations])
    write_jsonl(folder / "prompts.jsonl", [{"prompt": c[:3], "use_case": "Chat"} for c in conversations])
    write_jsonl(folder / "text.jsonl", [{"text": "the cat sat on the mat and the dog ran"}] * 40)
    return folder


def run(step, folder, name, **keys):
    """A step with its file, with what is tiny, local or of a CPU put in place of what the file names."""
    shipped = yaml.safe_load((QLORA / f"{name}.yaml").read_text(encoding="utf-8"))
    tiny = {
        "dtype": "float32",
        "output_dir": folder / name,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "resume_from_checkpoint": "false",
        "max_length": 128,
        "learning_rate": 0.01,
        "use_cpu": "true",
        "lora_r": 4,
    }
    if step is best_of_n:
        tiny = {"dtype": "float32", "output": folder / "best.jsonl", "max_new_tokens": 4}
    if step is ppo_ptx:
        tiny |= {"generation_batch_size": 4, "max_completion_length": 4, "value_learning_rate": 0.01}
        tiny.pop("max_length")
        if name == "ppo_ptx":
            tiny |= {"ptx_max_length": 8}
    if "lora_r" not in shipped:
        tiny.pop("lora_r", None)
    if "chat_template_path" in shipped:
        tiny["chat_template_path"] = QLORA / "chatml.jinja"
    if "eval_dataset_name" in shipped:  # which is refused without evaluation
        tiny |= {"eval_strategy": "steps", "eval_steps": 2}
    local = {key: value for key, value in keys.items() if value is not None}
    argv = ["--config", str(QLORA / f"{name}.yaml")]
    for key, value in {**tiny, **local}.items():
        argv += [f"--{key}", str(value)]
    step.main(argv)


def test_the_qlora_steps_run_one_after_the_other(folder):
    demonstrations, rankings = folder / "demonstrations.jsonl", folder / "rankings.jsonl"
    prompts, text = folder / "prompts.jsonl", folder / "text.jsonl"
    base = {"model_name_or_path": folder / "base", "dataset_name": demonstrations}
    run(sft, folder, "sft", **base)
    run(sft, folder, "ppo_start", **base, pretrain_dataset_name=text, **streaming("ppo_start"))
    run(sft, folder, "sft_on_rated", **base, rated_dataset_name=rankings)
    run(reward, folder, "reward", model_name_or_path=folder / "sft", dataset_name=rankings,
        eval_dataset_name=rankings, center_on=demonstrations)  # fmt: skip
    policy = {"model_name_or_path": folder / "ppo_start", "dataset_name": prompts}
    judge = {"reward_model_name_or_path": folder / "reward"}
    run(ppo_ptx, folder, "ppo_ptx", **policy, **judge, pretrain_dataset_name=text, **streaming("ppo_ptx"))
    run(ppo_ptx, folder, "ppo", **policy, **judge)
    run(dpo, folder, "dpo", model_name_or_path=folder / "ppo_start", dataset_name=rankings)
    run(best_of_n, folder, "best_of_n", **policy, **judge)

    # Every policy is an adapter with the template and the end of turn of step 1, and has moved.
    ids = torch.tensor([[5, 6, 7]])
    logits = {}
    for name in ("sft", "ppo_start", "sft_on_rated", "ppo_ptx", "ppo", "dpo"):
        assert json.loads((folder / name / "adapter_config.json").read_text())["r"] == 4
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        assert tokenizer.eos_token == "<|im_end|>"
        rendered = tokenizer.apply_chat_template(say("user: a", "assistant: b"), tokenize=False)
        assert rendered == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        logits[name] = AutoModelForCausalLM.from_pretrained(folder / name)(ids).logits
    for name in ("ppo_ptx", "ppo", "dpo"):
        assert not torch.allclose(logits[name], logits["ppo_start"], atol=1e-6), name
    assert not torch.allclose(logits["ppo_ptx"], logits["ppo"], atol=1e-6)
    assert get_reward_bias(load_reward_model(folder / "reward")) != 0
    evaluated(folder)
    best = read_jsonl(folder / "best.jsonl")
    assert [row["prompt"] for row in best] == [row["prompt"] for row in read_jsonl(prompts)]
    assert all(row["score"] >= row["mean_score"] for row in best)


def evaluated(folder):
    """The stages of evaluate.yaml that ask no language model and fetch no benchmark."""
    sources = {"sft": "ppo_start", "best_of_16": "best.jsonl", "ppo_ptx": "ppo_ptx"}
    keys = {
        "output_dir": folder / "evaluation",
        "models": json.dumps({name: str(folder / source) for name, source in sources.items()}),
        "base": "sft",
        "dtype": "float32",
        "prompts": folder / "prompts.jsonl",
        "max_new_tokens": 4,
        "samples_per_prompt": 2,
        "reward_judge": folder / "reward",
        "reward_models": json.dumps({"reward": str(folder / "reward")}),
        "rankings": json.dumps({"gpt4": str(folder / "rankings.jsonl")}),
        "implicit_rewards": json.dumps({"ppo_ptx": 0.1}),
    }
    argv = [str(word) for key, value in keys.items() for word in (f"--{key}", value)]
    config = yaml.safe_load((QLORA / "evaluate.yaml").read_text(encoding="utf-8"))
    (folder / "evaluate.yaml").write_text(yaml.safe_dump({k: v for k, v in config.items() if k != "lm_judge"}))
    for stage in ("generate", "judge", "reward-model", "report"):
        evaluate.main([stage, "--config", str(folder / "evaluate.yaml"), *argv])
    measures = json.loads((folder / "evaluation" / "results.json").read_text(encoding="utf-8"))["measures"]
    accuracy = [row for row in measures if row["name"] == "rm.accuracy.gpt4" and row["model"] == "reward"]
    assert accuracy[0]["n"] == 18  # 3 pairs of 6 prompts


def streaming(name):
    """Local text is not streamed."""
    shipped = yaml.safe_load((QLORA / f"{name}.yaml").read_text(encoding="utf-8"))
    return {key: "false" for key in shipped if key == "pretrain_streaming"}
