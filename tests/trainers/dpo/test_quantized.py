"""RankedDPOTrainer with adapters in other dtypes and on a 4-bit base: reference, precision and gradients."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from prefopt.trainers.dpo.config import RankedDPOConfig
from prefopt.trainers.dpo.trainer import RankedDPOTrainer
from tests.conftest import tiny_config
from tests.trainers.conftest import lora, settings

pytestmark = pytest.mark.slow

ROWS = [
    {"prompt": "the cat", "completions": [" sat", " ran to the mat", " and the dog"], "ranks": [2, 1, 3]},
    {"prompt": "what is this?", "completions": [" a dog", " a cat"], "ranks": [2, 1]},
]
OTHER = [{"prompt": "a red house", "completions": [" is this", " ran"], "ranks": [1, 2]}]
LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"]}


def quantization():
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture
def base_path(tmp_path):
    torch.manual_seed(0)
    config = tiny_config(hidden_size=64, intermediate_size=128, initializer_range=0.1)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def sft_path(base_path, tmp_path):
    """A trained adapter on the base, as an SFT run leaves it."""
    model = lora(AutoModelForCausalLM.from_pretrained(base_path), "CAUSAL_LM", 0.1, LORA["target_modules"])
    model.save_pretrained(tmp_path / "sft")
    return tmp_path / "sft"


def load_sft(base_path, sft_path, is_trainable=True):
    base = AutoModelForCausalLM.from_pretrained(base_path, quantization_config=quantization())
    return PeftModel.from_pretrained(base, sft_path, is_trainable=is_trainable)


def trainer_on(model, tokenizer, tmp_path, peft_config=None, quantization_config=None, **overrides):
    defaults = {
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "max_steps": 2,
    }
    return RankedDPOTrainer(
        model=model,
        args=RankedDPOConfig(**settings(tmp_path / "dpo", **{**defaults, **overrides})),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        peft_config=peft_config,
        quantization_config=quantization_config,
    )


def adapter(model, name="default"):
    return {n: p.detach().clone() for n, p in model.named_parameters() if f".{name}." in n}


def scores_of(trainer):
    # As they come, so that the batch is that of the precomputed reference, bit for bit.
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, batch, return_outputs=True)[1]["scores"]


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("kind", ["trained_adapter", "new_adapter"])
def test_first_scores_are_exactly_zero(
    kind, precompute, gradient_checkpointing, base_path, sft_path, tokenizer, tmp_path
):
    options = {"precompute_ref_log_probs": precompute, "gradient_checkpointing": gradient_checkpointing}
    if kind == "trained_adapter":
        trainer = trainer_on(load_sft(base_path, sft_path), tokenizer, tmp_path, **options)
    else:
        options |= {"peft_config": LoraConfig(**LORA), "quantization_config": quantization()}
        trainer = trainer_on(str(base_path), tokenizer, tmp_path, **options)
    assert torch.equal(scores_of(trainer), torch.zeros(2, 3))
    weights = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert weights
    assert {parameter.dtype for parameter in weights.values()} == {torch.float32}
    trainer.train()
    assert scores_of(trainer).abs().max() > 1e-3


def test_a_bf16_adapter_on_an_unquantized_base_has_a_bf16_reference(base_path, sft_path, tokenizer, tmp_path):
    """PEFT makes the copy in fp32."""
    base = AutoModelForCausalLM.from_pretrained(base_path)
    model = PeftModel.from_pretrained(base, sft_path, is_trainable=True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    trainer = trainer_on(model, tokenizer, tmp_path)
    for name in ("default", "ref"):
        assert {weight.dtype for weight in adapter(trainer.model, name).values()} == {torch.bfloat16}
    assert torch.equal(scores_of(trainer), torch.zeros(2, 3))


def test_policy_and_reference_are_the_adapter_that_was_given(base_path, sft_path, tokenizer, tmp_path):
    """Not its bf16 rounding: the SFT model is one model wherever it is used."""
    given = adapter(load_sft(base_path, sft_path))
    trainer = trainer_on(load_sft(base_path, sft_path), tokenizer, tmp_path)
    policy, reference = adapter(trainer.model), adapter(trainer.model, "ref")
    assert given.keys() == policy.keys()
    for name, weight in given.items():
        assert torch.equal(policy[name], weight), name
        assert torch.equal(reference[name.replace(".default.", ".ref.")], weight), name
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in given.values())


@pytest.mark.parametrize("precompute", [False, True])
def test_scores_are_those_of_the_saved_adapter(precompute, base_path, sft_path, tokenizer, tmp_path):
    trainer = trainer_on(load_sft(base_path, sft_path), tokenizer, tmp_path, precompute_ref_log_probs=precompute)
    trainer.train()
    trainer.save_model()
    prompts = ["the cat", "the cat", "what is this?"]
    completions = [" sat", " ran to the mat", " a dog"]
    scores = trainer.score(prompts, completions)
    assert max(map(abs, scores)) > 1e-3
    reloaded = trainer_on(load_sft(base_path, tmp_path / "dpo"), tokenizer, tmp_path)
    # The new reference is the saved policy, so the distance to the first reference is what was learned.
    for name, parameter in reloaded.model.named_parameters():
        if ".ref." in name:
            parameter.data.copy_(trainer.model.get_parameter(name))
    assert reloaded.score(prompts, completions) == pytest.approx(scores, abs=1e-6)


def test_a_new_evaluation_set_leaves_the_policy_as_it_is(base_path, sft_path, tokenizer, tmp_path):
    trainer = trainer_on(load_sft(base_path, sft_path), tokenizer, tmp_path, precompute_ref_log_probs=True)
    trainer.train()
    before = copy.deepcopy(adapter(trainer.model))
    metrics = trainer.evaluate(Dataset.from_list(OTHER))
    assert metrics["eval_rewards/margins"] != 0
    for name, weight in adapter(trainer.model).items():
        assert torch.equal(weight, before[name]), name


def test_gradients_survive_the_precomputed_reference(base_path, sft_path, tokenizer, tmp_path):
    """The forward in evaluation mode must not repack the 4-bit layers (see `keep_4bit_gradients`)."""
    gradients = []
    for precompute in (False, True):
        trainer = trainer_on(load_sft(base_path, sft_path), tokenizer, tmp_path, precompute_ref_log_probs=precompute)
        batch = trainer.data_collator(list(trainer.train_dataset))
        trainer.compute_loss(trainer.model.train(), batch).backward()
        gradients.append({n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
