"""Reward models on a 4-bit base: gradients, saving, reloading in plain peft, merging, and the recipe."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaForCausalLM,
)

from prefopt.errors import UserError
from prefopt.inference.scoring import score_texts
from prefopt.models.checkpoints import load_reward_model, merge_reward_model, save_reward_model
from prefopt.models.reward import get_reward_bias, keep_4bit_gradients, sequence_scores, value_model_from
from prefopt.recipes.reward import main
from prefopt.trainers.reward.config import RankedRewardConfig
from prefopt.trainers.reward.trainer import RankedRewardTrainer
from tests.conftest import tiny_config
from tests.trainers.conftest import settings

pytestmark = pytest.mark.slow

pytest.importorskip("bitsandbytes", reason="4-bit models need bitsandbytes")

ROWS = [
    {"prompt": prompt, "completions": [f" {a} dog", f" {a} cat", f" {a} mat"], "ranks": [1, 2, 3]}
    for prompt in ("the", "what is this?", "question:")
    for a in ("red", "the", "a")
]
DEMONSTRATIONS = [{"prompt": row["prompt"], "completion": row["completions"][0]} for row in ROWS]
IDS = torch.tensor([[5, 6, 7, 8, 9, 1], [10, 11, 12, 13, 14, 15]])
MASK = torch.ones_like(IDS)


def four_bit(**overrides):
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, **overrides
    )


@pytest.fixture
def base_path(tmp_path):
    torch.manual_seed(0)
    config = tiny_config(hidden_size=64, intermediate_size=128)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def load_4bit(base_path, **kwargs):
    kwargs = {"dtype": torch.float32, "quantization_config": four_bit(), **kwargs}
    return AutoModelForSequenceClassification.from_pretrained(base_path, num_labels=1, **kwargs)


def trainer_on(model, tokenizer, out, peft=True, quantization_config=None, **overrides):
    defaults = {"learning_rate": 1e-2, "per_device_train_batch_size": 3, "num_train_epochs": 2}
    return RankedRewardTrainer(
        model=model,
        args=RankedRewardConfig(**settings(out, **{**defaults, **overrides})),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        quantization_config=quantization_config,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"]) if peft else None,
    )


@pytest.fixture
def trained(base_path, tokenizer, tmp_path):
    """A 4-bit LoRA reward model, trained, centered and saved in tmp_path / 'rm'."""
    trainer = trainer_on(base_path, tokenizer, tmp_path / "rm", quantization_config=four_bit())
    trainer.train()
    trainer.center_on(DEMONSTRATIONS)
    trainer.save_model()
    return trainer


def prefopt_scores(trainer):
    return trainer.score([row["prompt"] for row in DEMONSTRATIONS], [row["completion"] for row in DEMONSTRATIONS])


def head_of(model):
    head = model.get_base_model().score.modules_to_save.default if isinstance(model, PeftModel) else model.score
    return head.weight


# ---- the AVX512-BF16 bug ----


def linear4bit():
    import bitsandbytes as bnb

    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(nn.Linear(64, 64, bias=False).state_dict())
    return layer.to("cpu")


def repacks():
    return bool(linear4bit().support_avx512bf16_for_cpu)


needs_repacking = pytest.mark.skipif(
    not repacks(), reason="bitsandbytes repacks 4-bit weights only on CPUs with AVX512-BF16"
)


def input_gradient(layer, x):
    x = x.clone().requires_grad_()
    layer.train()(x).square().sum().backward()
    return x.grad


@needs_repacking
def test_evaluating_a_4bit_layer_costs_its_gradient_without_the_guard():
    layer, x = linear4bit(), torch.randn(3, 64)
    assert input_gradient(layer, x) is not None
    layer.eval()(x)
    assert input_gradient(layer, x) is None  # if this fails, bitsandbytes has mended it and the guard can go


@needs_repacking
def test_a_repacked_layer_gets_its_gradient_back(caplog):
    layer, x = linear4bit(), torch.randn(3, 64)
    expected = input_gradient(layer, x)
    layer.eval()(x)
    keep_4bit_gradients(layer)
    assert "1 4-bit layers had been used for evaluation" in caplog.text
    torch.testing.assert_close(input_gradient(layer, x), expected, rtol=0.02, atol=0.02)  # bf16 scales
    layer.eval()(x)
    assert input_gradient(layer, x) is not None


def test_guarded_layers_keep_gradient_and_output(base_path):
    layer, x = linear4bit(), torch.randn(3, 64)
    expected = input_gradient(layer, x)
    output = layer(x)
    keep_4bit_gradients(layer)
    assert torch.equal(layer.eval()(x), output)
    assert torch.equal(input_gradient(layer, x), expected)


def gradients(trainer):
    trainer.model.zero_grad()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch).backward()
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("given", ["path", "model"])
def test_evaluation_between_training_steps_changes_no_gradient(given, base_path, tokenizer, tmp_path):
    model = base_path if given == "path" else load_4bit(base_path)
    quantization = four_bit() if given == "path" else None
    trainer = trainer_on(model, tokenizer, tmp_path, quantization_config=quantization)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    before = gradients(trainer)
    trainer.score(["the"], [" dog"])
    after = gradients(trainer)
    for name, gradient in before.items():
        assert gradient.abs().max() > 1e-6, name
        assert torch.equal(after[name], gradient), name


def test_loaded_and_cloned_models_are_guarded(trained, tmp_path):
    model = load_reward_model(tmp_path / "rm")
    sequence_scores(model, IDS, MASK)
    value_model = value_model_from(model)
    sequence_scores(value_model, IDS, MASK).sum().backward()
    first = next(p for n, p in value_model.named_parameters() if "layers.0" in n and "lora_A" in n)
    assert first.grad.abs().max() > 0
    for module in (*model.modules(), *value_model.modules()):
        assert not getattr(module, "support_avx512bf16_for_cpu", False)


# ---- saving, reloading, merging ----


def test_trainable_weights_are_fp32(trained):
    trainable = {n: p.dtype for n, p in trained.model.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in trainable)
    assert set(trainable.values()) == {torch.float32}
    assert trained.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.dtype == torch.uint8


def test_reloaded_scores_are_bit_for_bit_the_trained_ones(trained, tokenizer, tmp_path):
    """huggingface/trl#578 on a 4-bit base."""
    expected = prefopt_scores(trained)
    loaded = load_reward_model(tmp_path / "rm")
    assert loaded.get_base_model().is_loaded_in_4bit  # as in training, without being told
    assert torch.equal(head_of(loaded), head_of(trained.model))
    assert get_reward_bias(loaded) == get_reward_bias(trained.model) != 0.0
    prompts, completions = zip(*((row["prompt"], row["completion"]) for row in DEMONSTRATIONS), strict=True)
    batch = trained.args.eval_batch_size
    assert score_texts(loaded, tokenizer, prompts, completions, batch_size=batch) == pytest.approx(expected, abs=1e-6)
    assert torch.equal(sequence_scores(loaded, IDS, MASK), sequence_scores(trained.model.eval(), IDS, MASK))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_peft_minus_bias_is_prefopts_score(dtype, trained, base_path, tmp_path):
    config = json.loads((tmp_path / "rm" / "config.json").read_text())
    base = load_4bit(base_path, dtype=dtype)
    keep_4bit_gradients(base)  # or a CPU with AVX512-BF16 computes in another dtype
    base.score.float().register_forward_pre_hook(lambda module, args: (args[0].float(),))
    plain = PeftModel.from_pretrained(base, tmp_path / "rm").eval()
    logits = plain(input_ids=IDS, attention_mask=MASK).logits[:, 0]
    ours = sequence_scores(load_reward_model(tmp_path / "rm", dtype=dtype), IDS, MASK)
    assert base.model.embed_tokens.weight.dtype == dtype
    torch.testing.assert_close(logits - config["reward_bias"], ours, rtol=0, atol=1e-6)
    assert config["reward_bias"] != 0.0


def test_a_trained_adapter_goes_on_unrounded(trained, tokenizer, tmp_path):
    """TRL casts what is trained on a quantized base to bf16, which would move the scores of a given model."""
    base = load_4bit(str(tmp_path / "base"))
    model = PeftModel.from_pretrained(base, tmp_path / "rm", is_trainable=True)
    again = trainer_on(model, tokenizer, tmp_path / "again", peft=False)
    weights = dict(again.model.named_parameters())
    for name, parameter in trained.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(weights[name], parameter), name
            assert weights[name].dtype == torch.float32


def test_dense_base_on_request(trained, tmp_path):
    dense = load_reward_model(tmp_path / "rm", quantization_config=None)
    assert not getattr(dense.get_base_model(), "is_loaded_in_4bit", False)
    difference = sequence_scores(dense, IDS, MASK) - sequence_scores(trained.model.eval(), IDS, MASK)
    assert difference.abs().max() > 1e-4  # the adapter was trained on the quantized weights


def test_merged_scores_are_those_of_the_dequantized_base_plus_adapter(trained, base_path, tmp_path):
    dequantized = load_4bit(base_path).dequantize(dtype=torch.float32)
    with_adapter = PeftModel.from_pretrained(dequantized, tmp_path / "rm").eval()
    expected = with_adapter(input_ids=IDS, attention_mask=MASK).logits[:, 0] - get_reward_bias(trained.model)
    merged = merge_reward_model(tmp_path / "rm")
    assert not any("lora" in name or "4bit" in type(module).__name__ for name, module in merged.named_modules())
    layer = with_adapter.get_base_model().model.layers[1].mlp.up_proj
    delta = layer.lora_B.default.weight @ layer.lora_A.default.weight * layer.scaling["default"]
    weight = merged.model.layers[1].mlp.up_proj.weight
    assert delta.abs().max() > 1e-3
    torch.testing.assert_close(weight, layer.base_layer.weight + delta, rtol=0, atol=1e-7)
    torch.testing.assert_close(sequence_scores(merged, IDS, MASK), expected, rtol=2e-6, atol=1e-6)
    on_4bit = sequence_scores(load_reward_model(tmp_path / "rm"), IDS, MASK)
    torch.testing.assert_close(sequence_scores(merged, IDS, MASK), on_4bit, rtol=0, atol=1e-5)
    # What PEFT does on the 4-bit base: it quantizes the sum again.
    requantized = load_reward_model(tmp_path / "rm").merge_and_unload()
    keep_4bit_gradients(requantized)
    assert (sequence_scores(requantized, IDS, MASK) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_and_bias_survive_merging_and_saving_bit_for_bit(dtype, trained, tmp_path):
    merged = merge_reward_model(tmp_path / "rm", dtype=dtype)
    assert merged.model.layers[0].self_attn.q_proj.weight.dtype == dtype
    save_reward_model(merged, tmp_path / "merged")
    loaded = load_reward_model(tmp_path / "merged", dtype=dtype)
    assert not getattr(loaded, "is_quantized", False)
    for model in (merged, loaded):
        assert head_of(model).dtype == torch.float32
        assert torch.equal(head_of(model), head_of(trained.model))
        assert get_reward_bias(model) == get_reward_bias(trained.model)
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(sequence_scores(loaded, IDS, MASK), sequence_scores(merged, IDS, MASK))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    if dtype == torch.float32:
        logits = plain(input_ids=IDS, attention_mask=MASK).logits[:, 0]
        scores = sequence_scores(merged, IDS, MASK)
        torch.testing.assert_close(logits - plain.config.reward_bias, scores, rtol=0, atol=1e-6)


def test_a_full_checkpoint_on_a_4bit_base(trained, tmp_path):
    save_reward_model(merge_reward_model(tmp_path / "rm"), tmp_path / "merged")
    loaded = load_reward_model(tmp_path / "merged", dtype=torch.bfloat16, quantization_config=four_bit())
    assert loaded.is_loaded_in_4bit
    assert torch.equal(head_of(loaded), head_of(trained.model))


@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
def test_unquantized_models_merge_and_keep_their_head(peft, base_path, tokenizer, tmp_path):
    trainer = trainer_on(base_path, tokenizer, tmp_path / "rm", peft=peft)
    trainer.train()
    trainer.center_on(DEMONSTRATIONS)
    trainer.save_model()
    expected = sequence_scores(trainer.model.eval(), IDS, MASK)
    assert torch.equal(sequence_scores(load_reward_model(tmp_path / "rm"), IDS, MASK), expected)
    if not peft:
        with pytest.raises(ValueError, match="is no adapter: there is nothing to merge"):
            merge_reward_model(tmp_path / "rm")
        return
    merged = merge_reward_model(tmp_path / "rm")
    assert torch.equal(head_of(merged), head_of(trainer.model))
    assert get_reward_bias(merged) == get_reward_bias(trainer.model) != 0.0
    torch.testing.assert_close(sequence_scores(merged, IDS, MASK), expected, rtol=0, atol=1e-5)


# ---- the recipe ----


@pytest.fixture
def recipe(base_path, tokenizer, tmp_path):
    tokenizer.save_pretrained(base_path)
    rows, demonstrations = tmp_path / "rows.jsonl", tmp_path / "demonstrations.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    demonstrations.write_text("".join(json.dumps(row) + "\n" for row in DEMONSTRATIONS))
    return {
        "model_name_or_path": base_path,
        "dataset_name": rows,
        "center_on": demonstrations,
        "output_dir": tmp_path / "rm",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "num_train_epochs": 2,
        "learning_rate": 0.01,
        "lora_target_modules": "all-linear",
    }


def run(recipe, *flags, **overrides):
    arguments = {**recipe, **overrides}
    main([*(part for key, value in arguments.items() for part in (f"--{key}", str(value))), *flags])


def test_prefopt_reward_on_a_4bit_base(recipe, tokenizer, tmp_path):
    run(recipe, "--load_in_4bit", "--use_peft", reward_token="<|reward|>", gradient_checkpointing=True)
    loaded = load_reward_model(tmp_path / "rm")
    assert loaded.get_base_model().is_loaded_in_4bit
    assert head_of(loaded).dtype == torch.float32
    assert loaded.config.reward_token_id == len(tokenizer)
    prompts, completions = zip(*((row["prompt"], row["completion"]) for row in DEMONSTRATIONS), strict=True)
    scores = score_texts(loaded, tokenizer, prompts, completions)
    assert sum(scores) == pytest.approx(0.0, abs=1e-5)  # centered on the demonstrations
    assert max(scores) - min(scores) > 1e-3
    assert "<|reward|>" in AutoTokenizer.from_pretrained(tmp_path / "rm").get_vocab()
    merged = merge_reward_model(tmp_path / "rm")
    assert score_texts(merged, tokenizer, prompts, completions) == pytest.approx(scores, abs=1e-5)


def test_options_that_cannot_work_stop_early(recipe):
    with pytest.raises(UserError, match="lora_r=0: expected a whole number from 1"):
        run(recipe, "--load_in_4bit", "--use_peft", lora_r=0)
    with pytest.raises(UserError, match="quantized weights cannot be trained: add use_peft"):
        run(recipe, "--load_in_4bit")
