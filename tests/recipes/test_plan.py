"""`prefopt plan`: the keys of a step, the table, the file, and mistakes."""

import json

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, Qwen3Config, T5Config
from trl import ModelConfig

from prefopt.cli import main
from prefopt.errors import UserError
from prefopt.gpu.random_models import QWEN3_8B
from prefopt.memory import STEPS
from prefopt.recipes.plan import ARGUMENTS, PlanArguments, memory, on_its_machine, settings_of

pytestmark = pytest.mark.slow


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "qwen3-8b"
    Qwen3Config(**QWEN3_8B).save_pretrained(folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    return str(folder)


def plan(tmp_path, *argv):
    out = tmp_path / "plan.json"
    main(["plan", *argv, "--out", str(out), "--overwrite", "true"])
    return json.loads(out.read_text(encoding="utf-8"))["steps"]


@pytest.mark.usefixtures("plain_activations")
def test_all_steps_of_an_8b_model_from_its_config_alone(model, tmp_path, capsys):
    keys = [
        "--load_in_4bit",
        "true",
        "--use_peft",
        "true",
        "--dtype",
        "bfloat16",
        "--lora_target_modules",
        "all-linear",
    ]
    steps = plan(tmp_path, "--model", model, "--gpu", "24GB", *keys)
    shown = " ".join(capsys.readouterr().out.split())
    assert "8.19 billion parameters" in shown
    assert tuple(steps) == STEPS
    for found in steps.values():
        assert found["fits"]
        assert (
            found["bytes"]
            == sum(found["parts"].values())
            == max(found["moments"].values()) + (found["parts"]["CUDA context"] + found["parts"]["fragmentation"])
        )
        assert f"{found['bytes'] / 2**30:.2f}" in shown
        assert found["largest_batch"] >= found["settings"]["batch"]
        # 6.95e9 weights of linear maps in 4 bit, embeddings and head (the reward model has none) in bf16
        heads = 1 if found is steps["reward"] else 2
        expected = 36 * 192_937_984 * (0.5 + 4 / 64) + 2 * heads * 151_936 * 4096
        assert found["parts"]["weights"] == pytest.approx(expected, rel=1e-3)


def test_any_decoder_is_planned(tmp_path):
    GPT2Config(n_layer=2, n_embd=64, n_head=4, n_positions=512).save_pretrained(tmp_path / "gpt2")
    keys = [
        "--gradient_checkpointing",
        "false",
        "--completion_length",
        "64",
        "--prompt_length",
        "64",
        "--k",
        "3",
    ]
    found = plan(tmp_path, "dpo", "--model", str(tmp_path / "gpt2"), "--gpu", "2GB", *keys)["dpo"]
    # 2 prompts of 64 + 3 x 64 tokens; a layer keeps at least the inputs of its maps: 3 x 64 and 4 x 64 numbers of 2 bytes.
    assert found["moments"]["training: last layer"] - found["parts"]["weights"] > 2 * 2 * 256 * 2 * (3 + 4) * 64
    assert found["fits"]


@pytest.mark.usefixtures("plain_activations")
def test_what_does_not_fit_is_told_with_what_to_change(model, tmp_path, capsys):
    steps = plan(tmp_path, "reward", "--model", model, "--gpu", "16GB", "--gradient_checkpointing", "false")
    assert not steps["reward"]["fits"]
    assert steps["reward"]["fits_changed"]
    assert steps["reward"]["bytes_changed"] <= 16 * 2**30
    shown = " ".join(capsys.readouterr().out.split())
    for key, value in steps["reward"]["changes"].items():
        assert f"{key}: {str(value).lower()}" in shown
    assert list(steps["reward"]["changes"])[:3] == ["load_in_4bit", "dtype", "use_peft"]


@pytest.mark.usefixtures("plain_activations")
def test_the_plan_is_of_the_file_that_will_be_run(model, tmp_path):
    config = tmp_path / "reward.yaml"
    keys = {"model_name_or_path": model, "per_device_train_batch_size": 3, "max_length": 600, "bf16": False}
    config.write_text(yaml.safe_dump({**keys, "prefix_sharing": False, "optim": "adamw_bnb_8bit"}))
    argv = ["--config", str(config), "--gpu", "80", "--max_tokens_per_forward", "1000"]
    found = plan(tmp_path, "reward", *argv)["reward"]["settings"]
    assert (found["batch"], found["max_tokens"], found["shares_prefixes"]) == (3, 1000, False)
    assert found["prompt"] + found["completion"] == 600  # longer rows are dropped
    assert found["precision"] == {"weights": 4, "autocast": False, "linear": 4.0}
    assert found["optimizer"] == 0.5
    # without a step's name, those that do not know a key are left out
    assert set(plan(tmp_path, *argv)) == {"reward", "dpo"}


@pytest.mark.usefixtures("plain_activations")
def test_bf16_is_what_a_gpu_has_by_default_and_a_cpu_has_not(model, tmp_path):
    on_gpu = plan(tmp_path, "sft", "--model", model, "--gpu", "80GB")["sft"]
    on_cpu = plan(tmp_path, "sft", "--model", model, "--gpu", "80GB", "--use_cpu", "true")["sft"]
    assert on_gpu["settings"]["precision"]["autocast"]
    assert not on_cpu["settings"]["precision"]["autocast"]
    assert "CUDA context" in on_gpu["parts"]
    assert "CUDA context" not in on_cpu["parts"]


@pytest.fixture
def settings_from(tmp_path):
    def settings_from(step, **options):
        args = on_its_machine(ARGUMENTS[step][1])(output_dir=str(tmp_path), report_to="none", **options)
        model_args = ModelConfig(model_name_or_path=str(tmp_path))
        return settings_of(step, Qwen3Config(**QWEN3_8B), PlanArguments(), args, model_args)

    return settings_from


def test_ppo_has_its_rollout_and_pretraining_text(settings_from):
    found = settings_from(
        "ppo-ptx",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        generation_batch_size=64,
        max_completion_length=128,
        ptx_batch_ratio=0.5,
        ptx_max_length=1024,
        ema_decay=0.992,
        kl_estimator="full",
    )
    assert (found.rollout, found.completion, found.ptx_blocks, found.ptx_length) == (64, 128, 4, 1024)
    assert found.has_average
    assert found.has_full_kl
    assert settings_from("ppo-ptx", ptx_coef=0.0).ptx_blocks == 0


def test_packed_text_has_rows_of_max_length(settings_from):
    found = settings_from("sft", packing=True, max_length=2048)
    assert (found.length, found.labels_prompt) == (2048, True)


def test_dpo_can_compute_its_reference_before(settings_from):
    assert settings_from("dpo", precompute_ref_log_probs=True).precomputes_reference


@pytest.mark.usefixtures("plain_activations")
def test_an_adapter_of_the_step_before_is_planned_as_it_is(tmp_path):
    config = Qwen3Config(**{**QWEN3_8B, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8,
                            "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2})  # fmt: skip
    base = AutoModelForCausalLM.from_config(config)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    lora = LoraConfig(r=3, target_modules=["v_proj"], task_type="CAUSAL_LM")
    get_peft_model(base, lora).save_pretrained(tmp_path / "sft")
    steps = plan(tmp_path, "--model", str(tmp_path / "sft"), "--gpu", "4GB")
    count = 2 * 3 * (32 + 16)
    assert steps["sft"]["settings"]["adapter"] == count
    assert steps["dpo"]["parts"]["adapters"] == 2 * 4 * count  # trained, and the frozen reference
    assert steps["ppo-ptx"]["parts"]["adapters"] == 4 * 4 * count


@pytest.mark.usefixtures("plain_activations")
def test_a_step_whose_model_is_not_there_yet_is_planned_after_the_first(model, tmp_path):
    first, config = tmp_path / "sft.yaml", tmp_path / "dpo.yaml"
    quantized = {"load_in_4bit": True, "use_bnb_nested_quant": True, "dtype": "bfloat16"}
    lora = {"use_peft": True, "lora_r": 2, "lora_target_modules": ["k_proj", "v_proj"], **quantized}
    first.write_text(yaml.safe_dump({"model_name_or_path": model, **lora}))
    config.write_text(yaml.safe_dump({"model_name_or_path": "runs/sft", **quantized}))
    found = plan(tmp_path, "dpo", "--config", str(config), "--after", str(first), "--gpu", "24GB")["dpo"]
    assert found["settings"]["adapter"] == 36 * 2 * 2 * (4096 + 1024)
    assert found["parts"]["adapters"] == 2 * 4 * found["settings"]["adapter"]
    assert found["settings"]["precision"]["linear"] == 0.5 + 1 / 64 + 4 / (64 * 256)
    with pytest.raises(SystemExit, match="that the SFT step will leave there: give that step's file as --after"):
        main(["plan", "sft", "--model", "runs/sft", "--gpu", "24GB"])


@pytest.mark.usefixtures("plain_activations")
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gpu", "24GB"], "plan needs --model"),
        (["--model", "{model}"], "and --gpu"),
        (["--model", "{model}", "--gpu", "large"], "gpu: expected gigabytes, such as 24GB, got 'large'"),
        (["--model", "{model}", "--gpu", "24GB", "--k", "0"], "k is 0"),
        (["--model", "{model}", "--gpu", "24GB", "--learnin_rate", "1"], "did you mean 'learning_rate'"),
        (["rewards", "--model", "{model}", "--gpu", "24GB"], "unknown step 'rewards'"),
        (["--model", "{model}", "--gpu", "24GB", "--load_in_4bit", "true"], "add use_peft"),
        (["--model", "nowhere/nothing", "--gpu", "24GB"], "cannot load the config.json of 'nowhere/nothing'"),
        (["sft", "--model", "{t5}", "--gpu", "24GB"], "is a t5 model; prefopt trains decoders"),
        (["sft", "--model", "{model}", "--gpu", "24GB", "--optim", "lomo"], "no arithmetic for optim='lomo'"),
        (["sft", "--model", "{model}", "--gpu", "24GB", "--attn_implementation", "eager"], "attn_implementation"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_a_sentence(model, tmp_path, argv, message):
    T5Config().save_pretrained(tmp_path / "t5")
    argv = [part.format(model=model, t5=tmp_path / "t5") for part in argv]
    with pytest.raises(SystemExit, match=message):
        main(["plan", *argv])


def test_memory_is_what_cards_are_sold_by():
    assert memory("24GB") == memory("24") == memory("24 GiB") == 24 * 2**30
    with pytest.raises(UserError, match="gpu"):
        memory("0GB")
