"""`accelerate launch` with the files of recipes/accelerate: two processes give what one gives."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from accelerate.utils.launch import prepare_multi_gpu_env
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from prefopt.models.checkpoints import save_reward_model
from prefopt.models.reward import keep_head_fp32, set_reward_bias
from prefopt.trainers.ppo_ptx.config import PPOPtxConfig
from prefopt.trainers.reward.config import RankedRewardConfig
from tests.trainers.conftest import in_two_processes
from tests.trainers.scale_worker import train, train_each

# Accelerate looks for a free port.
pytestmark = [pytest.mark.slow, pytest.mark.enable_socket]

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "recipes" / "accelerate"
ROWS = [{"prompt": "the cat", "completions": [" sat", " ran to the", " a dog"], "ranks": [1, 2, 2]}] * 4


@pytest.fixture
def models(causal_lm, reward_model, tokenizer, tmp_path):
    """A folder with a policy, a reward model, and both as adapters on one base."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    causal_lm.save_pretrained(tmp_path / "policy")
    reward_model.save_pretrained(tmp_path / "reward")
    base = type(reward_model).from_pretrained(tmp_path / "policy", num_labels=1, dtype=torch.float32)
    causal_lm = type(causal_lm).from_pretrained(tmp_path / "policy", dtype=torch.float32)
    for seed, (name, model, options) in enumerate(
        (
            ("sft", causal_lm, {"task_type": "CAUSAL_LM"}),
            ("reward", base, {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}),
        )
    ):
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options))
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = 0.2 * torch.randn(parameter.shape)
        if name == "reward":
            keep_head_fp32(model)
            set_reward_bias(model, 0.5)
            save_reward_model(model, tmp_path / "reward_adapter")
        else:
            model.save_pretrained(tmp_path / "sft_adapter")
    return tmp_path


def launch_environment(config):
    """What `accelerate launch` tells each of its processes."""
    arguments = launch_command_parser().parse_args(["--config_file", str(CONFIGS / config), "script.py"])
    return prepare_multi_gpu_env(_validate_launch_command(arguments)[0])


def results(models, config, kinds):
    """What one process, and what the processes of a configuration, write for each kind of training."""
    one, two = models / "one", models / "two"
    one.mkdir(), two.mkdir()
    train_each(kinds, models, 4, one)
    in_two_processes(train_each, kinds, models, 2, two, environment=launch_environment(config))
    return [(kind, *(torch.load(folder / f"{kind}.pt") for folder in (one, two))) for kind in kinds]


def assert_equal(kind, one, two):
    assert (one["state"]["processes"], two["state"]["processes"]) == (1, 2)
    assert len(one["logs"]) == len(two["logs"]) > 2
    for expected, result in zip(one["logs"], two["logs"], strict=True):
        assert result == pytest.approx(expected, abs=1e-5, rel=1e-4), kind
    assert one["weights"].keys() == two["weights"].keys()
    for name, weight in one["weights"].items():
        difference = (two["weights"][name] - weight).abs().max().item()
        assert difference < 1e-5, (kind, name)
        if kind.endswith("-resumed"):
            assert torch.equal(two["weights"][name], two["uninterrupted"][name]), (kind, name)


def test_ddp_equals_one_process(models):
    """Reward model, DPO and PPO-ptx, whose four roles are adapters on one base, the value function's included."""
    for kind, one, two in results(models, "ddp.yaml", ["reward-lora", "dpo-full", "ppo-shared"]):
        assert two["state"]["type"] == "MULTI_CPU"
        assert_equal(kind, one, two)
        if kind == "ppo-shared":
            names = [name for name in one["weights"] if name.startswith("value.")]
            assert len(names) == 2 * 2 * 2 + 1  # factors, projections, layers; the head
            assert all(log["grad_norm/value"] > 0 for log in one["logs"] if "grad_norm/value" in log)


def test_fsdp2_equals_one_process_and_saves_whole_models(models):
    """Reward model and DPO, full and LoRA; a reward model also resumed."""
    kinds = ["reward-full-resumed", "reward-lora", "dpo-full", "dpo-lora"]
    for kind, one, two in results(models, "fsdp2.yaml", kinds):
        assert two["state"]["type"] == "FSDP"
        assert two["state"]["sharded"] == len(one["weights"])
        assert_equal(kind, one, two)
        saved, is_reward = models / "two" / kind, kind.startswith("reward")
        if "lora" in kind:
            whole = load_file(saved / "adapter_model.safetensors")
            expected = load_file(models / "one" / kind / "adapter_model.safetensors")
        else:
            model_class = LlamaForSequenceClassification if is_reward else LlamaForCausalLM
            model, loading = model_class.from_pretrained(saved, output_loading_info=True)
            assert not any(loading.values())
            whole, expected = dict(model.named_parameters()), one["weights"]
        assert whole.keys() == expected.keys()
        for name, weight in expected.items():
            assert (whole[name] - weight).abs().max().item() < 1e-5, (kind, name)


@pytest.mark.parametrize(
    "kinds",
    [
        # Four roles on one base; a policy and a value function that is a network of its own.
        ["ppo-shared-average-resumed", "ppo-full-resumed"],
        ["ppo-lora-head-drawn-exact-checkpointing", "ppo-full-head-drawn"],
    ],
)
def test_fsdp2_trains_ppo_equal_to_one_process_and_saves_every_role_whole(kinds, models, monkeypatch):
    # Processes whose completions differ in length would forward unequally often.
    monkeypatch.setattr("prefopt.trainers.ppo_ptx.episodes.KL_POSITIONS", 8)
    for kind, one, two in results(models, "fsdp2.yaml", kinds):
        assert two["state"]["type"] == "FSDP"
        assert two["state"]["sharded"] > 0
        assert max(log.get("grad_norm/value", 0.0) for log in two["logs"]) > 0.7
        assert_equal(kind, one, two)
        saved = {name: saved_weights(models / name / kind) for name in ("one", "two")}
        assert saved["two"].keys() == saved["one"].keys()
        for file, weights in saved["one"].items():
            assert saved["two"][file].keys() == weights.keys(), file
            for name, weight in weights.items():
                assert (saved["two"][file][name] - weight).abs().max() < 1e-5, (kind, file, name)


def saved_weights(folder):
    """File -> name -> weight, of all safetensors in a folder that are not in a checkpoint."""
    files = [path for path in folder.rglob("*.safetensors") if "checkpoint-" not in str(path)]
    return {path.relative_to(folder).as_posix(): load_file(path) for path in files}


def test_fsdp2_trains_adapters_in_bf16(models):
    """As on a GPU. A reference that ran first would leave FSDP2 without a dtype for the gradients of the adapter."""
    kinds = ["reward-lora-bf16", "dpo-lora-bf16"]
    for kind, one, two in results(models, "fsdp2.yaml", kinds):
        assert two["state"]["type"] == "FSDP"
        assert len(one["logs"]) == len(two["logs"]) > 2
        for expected, result in zip(one["logs"][:3], two["logs"][:3], strict=True):
            assert result["loss"] == pytest.approx(expected["loss"], abs=0.02), kind
            assert result["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.1), kind
        for name, weight in one["weights"].items():
            if "lora" in name:
                assert two["weights"][name].dtype == torch.float32
                assert (two["weights"][name] - weight).abs().max() < 0.01, (kind, name)


def test_fsdp2_trains_adapters_on_4_bit(models):
    """The packed weights are sharded; what is trained and saved is that of one process."""
    for kind, one, two in results(models, "fsdp2.yaml", ["reward-lora-4bit", "dpo-lora-4bit"]):
        assert two["state"]["type"] == "FSDP"
        assert two["state"]["sharded"] == len(one["weights"])
        # Packed ones are numbers of no meaning.
        trained = {name for name in one["weights"] if "lora_" in name or "modules_to_save" in name}
        assert len(trained) == 2 * 2 * 2 + kind.startswith("reward")
        for result in (one, two):
            result["weights"] = {name: result["weights"][name] for name in trained}
        assert_equal(kind, one, two)
        saved, expected = (load_file(models / of / kind / "adapter_model.safetensors") for of in ("two", "one"))
        assert saved.keys() == expected.keys()
        for name, weight in expected.items():
            assert (saved[name] - weight).abs().max().item() < 1e-5, (kind, name)


def test_recipes_run_under_accelerate_launch(models, tokenizer):
    """As the README says it, on CPUs."""
    with open(models / "rows.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)
    tokenizer.save_pretrained(models / "reward")
    options = {
        "model_name_or_path": models / "reward",
        "dataset_name": models / "rows.jsonl",
        "output_dir": models / "rm",
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "report_to": "none",
    }
    recipe = [
        "prefopt.recipes.reward",
        "--use_cpu",
        *(str(x) for item in options.items() for x in ("--" + item[0], item[1])),
    ]
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--config_file",
        CONFIGS / "ddp.yaml",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "-m", *recipe], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-5000:]
    assert json.loads((models / "rm" / "trainer_state.json").read_text())["global_step"] == 1
    assert (models / "rm" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("file", "kind"),
    [("ddp.yaml", "MULTI_GPU"), ("fsdp2.yaml", "FSDP"), ("deepspeed_zero3.yaml", "DEEPSPEED")],
)
def test_configs_are_read_by_accelerate(file, kind):
    """It raises for keys that it does not know."""
    config = load_config_from_file(str(CONFIGS / file))
    assert config.distributed_type == kind
    assert config.num_processes == 2


LAUNCHED = {"ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.mark.parametrize(
    ("config", "environment", "options"),
    [
        (PPOPtxConfig, {}, {"deepspeed": "zero3.json"}),
        (PPOPtxConfig, LAUNCHED, {}),
        (RankedRewardConfig, {}, {"deepspeed": "zero3.json"}),
        (RankedRewardConfig, LAUNCHED, {"bf16": True}),
        (RankedRewardConfig, LAUNCHED | {"ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"}, {}),
    ],
)
def test_what_cannot_be_sharded_is_refused_before_anything_is_loaded(
    config, environment, options, monkeypatch, tmp_path
):
    sentence = {
        PPOPtxConfig: "each backward pass.*fsdp2.yaml",
        RankedRewardConfig: "zero3_init_flag: false.*fsdp2.yaml",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=sentence[config]):
        config(str(tmp_path), use_cpu=True, **options)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    config(str(tmp_path), use_cpu=True)


# One a process: transformers shards what is loaded after the first. An operation for CPUs is compiled at the first start.
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["reward-full", "reward-lora", "dpo-full"])
def test_deepspeed_equals_one_process_in_fp32(kind, models):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed, which needs a compiler")
    one, two = models / "one", models / "two"
    one.mkdir(), two.mkdir()
    train(kind, models, 4, one)
    launch = ["accelerate.commands.launch", "--config_file", str(CONFIGS / "deepspeed_zero3.yaml")]
    worker = ["-m", "tests.trainers.scale_worker", kind, str(models), "2", str(two)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", *launch, *worker], cwd=ROOT, env=environment, check=True)
    results = [torch.load(folder / f"{kind}.pt") for folder in (one, two)]
    assert results[1]["state"]["type"] == "DEEPSPEED"
    assert results[1]["state"]["sharded"] == len(results[0]["weights"])
    assert_equal(kind, *results)


def test_deepspeed_takes_an_optimizer_step_with_each_backward_pass():
    """Accelerate's wrapper of its engine does; PPO-ptx has a backward pass each for policy, values and pretraining."""
    engine = Mock()
    wrapper = DeepSpeedEngineWrapper(engine)
    for _ in range(3):
        wrapper.backward(torch.zeros(()))
    assert engine.step.call_count == 3
