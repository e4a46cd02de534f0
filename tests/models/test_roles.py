"""Reward model and value function on the policy's base, against models with a base of their own."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from prefopt.models.checkpoints import load_reward_model, save_reward_model
from prefopt.models.reward import (
    get_reward_bias,
    keep_4bit_gradients,
    keep_head_fp32,
    sequence_scores,
    set_reward_bias,
    token_scores,
    value_model_from,
)
from prefopt.models.roles import load_scorer, trainable_copy, why_not_shared

pytestmark = pytest.mark.slow

IDS = torch.randint(3, 300, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 6:] = 0


def tiny_llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            pad_token_id=0,
            initializer_range=0.2,
        )
    )


def loading(bits):
    if bits == "4-bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}
    return {"dtype": torch.float32}


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "base"
    tiny_llama().save_pretrained(path)
    return str(path)


def reward_adapter(base, path, bits="fp32", **lora):
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, **loading(bits))
    keep_4bit_gradients(model)
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "modules_to_save": ["score"]}
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **{**settings, **lora}))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * torch.randn(parameter.shape)
    keep_head_fp32(model)
    set_reward_bias(model, 0.7)
    save_reward_model(model, path)
    return str(path)


def policy_on(base, bits="fp32"):
    model = AutoModelForCausalLM.from_pretrained(base, **loading(bits))
    keep_4bit_gradients(model)
    torch.manual_seed(2)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "o_proj"])
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def trainable(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("bits", ["fp32", "4-bit"])
def test_scores_are_those_of_the_model_alone(bits, base, tmp_path):
    path = reward_adapter(base, tmp_path / "rm", bits)
    policy = policy_on(base, bits)
    before, weights = policy(IDS).logits, trainable(policy)
    assert why_not_shared(policy, path) is None
    scorer = load_scorer(policy, path)
    alone = load_reward_model(path)
    torch.testing.assert_close(
        sequence_scores(scorer, IDS, MASK), sequence_scores(alone, IDS, MASK), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        token_scores(scorer, IDS, MASK)[MASK > 0],
        token_scores(alone, IDS, MASK)[MASK > 0],
        rtol=0,
        atol=1e-6,
    )
    assert get_reward_bias(scorer) == 0.7
    # and the policy is what it was
    assert torch.equal(policy(IDS).logits, before)
    assert policy.active_adapter == "default"
    assert trainable(policy) == weights
    assert not any(parameter.requires_grad for parameter in scorer.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bits", ["fp32", "4-bit"])
def test_gradients_are_those_of_separate_models(bits, checkpointing, base, tmp_path):
    path = reward_adapter(base, tmp_path / "rm", bits)
    policy, policy_alone = policy_on(base, bits), policy_on(base, bits)
    value = trainable_copy(load_scorer(policy, path))
    value_alone = value_model_from(load_reward_model(path))
    for model in (policy, policy_alone, value_alone):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()

    with value.active():  # the order of a PPO step: value, then policy
        token_scores(value, IDS, MASK).square().mean().backward()
    policy(IDS, labels=IDS).loss.backward()
    token_scores(value_alone, IDS, MASK).square().mean().backward()
    policy_alone(IDS, labels=IDS).loss.backward()

    ours = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    expected = {name: p.grad for name, p in policy_alone.named_parameters() if p.grad is not None}
    expected |= {
        name.replace(".default.", ".value."): p.grad
        for name, p in value_alone.named_parameters()
        if p.grad is not None and "lora" in name
    }
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    assert max(gradient.abs().max() for name, gradient in expected.items() if ".value." in name) > 1e-3
    head = value_alone.get_base_model().score.modules_to_save.default.weight.grad
    torch.testing.assert_close(value.score.weight.grad, head, rtol=1e-5, atol=1e-6)


def test_a_trained_role_is_saved_and_loads_alone(base, tmp_path):
    policy = policy_on(base)
    reward = load_scorer(policy, reward_adapter(base, tmp_path / "rm"))
    value = trainable_copy(reward)
    assert torch.equal(token_scores(value, IDS, MASK), token_scores(reward, IDS, MASK))  # C.4: bias and all
    with value.active(), torch.no_grad():
        for parameter in [*value.adapter_parameters().values(), *value.parameters()]:
            parameter.add_(0.1 * torch.randn_like(parameter))
    expected = sequence_scores(value, IDS, MASK)
    assert (expected - sequence_scores(reward, IDS, MASK)).abs().max() > 1e-2
    value.save_pretrained(tmp_path / "value")
    torch.testing.assert_close(
        sequence_scores(load_reward_model(tmp_path / "value"), IDS, MASK), expected, rtol=0, atol=1e-6
    )
    again = load_scorer(policy_on(base), tmp_path / "value")
    torch.testing.assert_close(sequence_scores(again, IDS, MASK), expected, rtol=0, atol=1e-6)


def test_dropout_of_the_adapters_does_not_touch_scores(base, tmp_path):
    policy = policy_on(base).train()
    scorer = load_scorer(policy, reward_adapter(base, tmp_path / "rm", lora_dropout=0.5))
    first, second = (sequence_scores(scorer, IDS, MASK) for _ in range(2))
    assert torch.equal(first, second)


def test_another_base_is_not_shared(base, tmp_path):
    path = reward_adapter(base, tmp_path / "rm")
    assert why_not_shared(tiny_llama(), path) == "the policy is a full model"
    assert why_not_shared(policy_on(base, "4-bit"), path) == "its base is not quantized, the policy's 4-bit nf4"
    torch.manual_seed(5)
    tiny_llama().save_pretrained(tmp_path / "other")
    other = policy_on(str(tmp_path / "other"))
    assert "it was trained on" in why_not_shared(other, path)
    with pytest.raises(ValueError, match="needs a base of its own"):
        load_scorer(other, path)
    wide = reward_adapter(base, tmp_path / "wide", modules_to_save=["score", "embed_tokens"])
    assert why_not_shared(policy_on(base), wide) == "it has weights of its own for embed_tokens"
    config = json.loads((tmp_path / "rm" / "config.json").read_text())
    (tmp_path / "rm" / "config.json").write_text(json.dumps({**config, "vocab_size": 999}))
    assert why_not_shared(policy_on(base), path) == "its vocabulary is larger than the policy's"


def test_an_adapter_without_a_head_is_no_reward_model(base, tmp_path):
    policy_on(base).save_pretrained(tmp_path / "sft")
    with pytest.raises(ValueError, match="no trained head"):
        load_scorer(policy_on(base), tmp_path / "sft")


def test_only_the_active_role_takes_gradients(base, tmp_path):
    policy = policy_on(base)
    own = trainable(policy)
    scorer = load_scorer(policy, reward_adapter(base, tmp_path / "rm"))
    assert trainable(policy) == own
    value = trainable_copy(scorer)
    assert trainable(policy) == own
    with value.active():
        assert set(trainable(policy)) == set(value.adapter_parameters())
    assert trainable(policy) == own


@pytest.mark.parametrize(("rename", "expected"), [(None, "1 weights missing"), ("q_proj", "too many")])
def test_an_adapter_with_other_weights_is_refused(rename, expected, base, tmp_path):
    policy, path = policy_on(base), reward_adapter(base, tmp_path / "rm")
    file = tmp_path / "rm" / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "q_proj" in name)
    weight = weights.pop(name)
    if rename is not None:
        weights[name] = weight
        weights[name.replace(rename, "gate_proj")] = weight.clone()
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=expected):
        load_scorer(policy, path)
