"""PPO-ptx with all roles on one base: equal to models of their own, from the first KL to the saved roles."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from prefopt.models.checkpoints import load_reward_model, save_reward_model
from prefopt.models.reward import keep_4bit_gradients, keep_head_fp32, sequence_scores, set_reward_bias
from prefopt.models.roles import AdapterScorer
from prefopt.trainers.ppo_ptx.trainer import PPOPtxTrainer
from tests.trainers.ppo_ptx.conftest import PROMPTS, TEXTS, config

pytestmark = pytest.mark.slow


def loading(bits):
    if bits == "4-bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}
    return {"dtype": torch.float32}


def adapter_on(base, model_class, task_type, bits, seed, **kwargs):
    model = model_class.from_pretrained(base, **loading(bits), **kwargs)
    keep_4bit_gradients(model)
    lora = {"modules_to_save": ["score"]} if task_type == "SEQ_CLS" else {}
    model = get_peft_model(model, LoraConfig(task_type=task_type, r=4, target_modules=["q_proj", "v_proj"], **lora))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * torch.randn(parameter.shape)
    return model


@pytest.fixture(params=["fp32", "4-bit"])
def run(request, tokenizer, tmp_path):
    """A function that trains on a LoRA policy and reward model saved in `tmp_path`."""
    bits = request.param
    torch.manual_seed(0)
    base = str(tmp_path / "base")
    settings = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=64,
            eos_token_id=1,
            initializer_range=0.1,
            **settings,
        )
    ).save_pretrained(base)
    adapter_on(base, AutoModelForCausalLM, "CAUSAL_LM", bits, seed=1).save_pretrained(tmp_path / "sft")
    reward = adapter_on(base, AutoModelForSequenceClassification, "SEQ_CLS", bits, seed=2, num_labels=1)
    keep_head_fp32(reward)
    set_reward_bias(reward, 0.5)
    save_reward_model(reward, tmp_path / "rm")

    def run(shared, **overrides):
        policy = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "sft", is_trainable=True, **loading(bits))
        args = config(
            tmp_path,
            **{
                "output_dir": str(tmp_path / ("shared" if shared else "alone")),
                "gradient_checkpointing": True,
                "steps_per_generation": 2,
                "max_steps": 3,
                "ptx_coef": 1.0,
                "max_grad_norm": 0.05,
                **overrides,
            },
        )
        rewards = str(tmp_path / "rm") if shared else load_reward_model(tmp_path / "rm")
        trainer = PPOPtxTrainer(policy, rewards, args, PROMPTS, processing_class=tokenizer, pretrain_dataset=TEXTS)
        assert isinstance(trainer.reward_models[0], AdapterScorer) == shared
        assert isinstance(trainer.value_function.module, AdapterScorer) == shared
        return trainer

    return run


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_equals_models_of_their_own(checkpointing, run):
    logs, values, policies = [], [], []
    for shared in (True, False):
        trainer = run(shared, gradient_checkpointing=checkpointing)
        torch.manual_seed(7)  # the same samples
        trainer.train()
        logs.append([log for log in trainer.state.log_history if "objective/kl" in log])
        values.append([p.detach() for p in trainer.value_function.parameters])
        policies.append({n: p for n, p in trainer.model.named_parameters() if ".default." in n})
    assert logs[0][0]["objective/kl"] == logs[1][0]["objective/kl"] == 0.0
    keys = ("reward", "loss", "objective/kl", "grad_norm", "grad_norm/value", "value/explained_variance")
    for ours, theirs in zip(*logs, strict=True):
        assert {key: ours[key] for key in keys} == pytest.approx(
            {key: theirs[key] for key in keys}, abs=1e-5, rel=1e-4
        )
    for name, weight in policies[1].items():
        torch.testing.assert_close(policies[0][name], weight, rtol=0, atol=1e-5, msg=name)
    by_shape = [sorted(v, key=lambda p: (tuple(p.shape), p.abs().sum().item())) for v in values]
    for ours, theirs in zip(*by_shape, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_every_role_of_a_finished_run_loads_alone(run, tmp_path):
    trainer = run(True)
    trainer.train()
    trainer.save_model()
    ids = torch.randint(3, 300, (2, 7))
    mask = torch.ones_like(ids)
    roles = {"reward": trainer.reward_models[0], "value": trainer.value_function.module}
    trainer.model.eval()
    for name, role in roles.items():
        loaded = load_reward_model(tmp_path / "shared" / name)
        torch.testing.assert_close(
            sequence_scores(loaded, ids, mask), sequence_scores(role, ids, mask), rtol=0, atol=1e-5
        )
    expected = sequence_scores(load_reward_model(tmp_path / "rm"), ids, mask)
    torch.testing.assert_close(sequence_scores(roles["reward"], ids, mask), expected, rtol=0, atol=1e-5)
    assert (sequence_scores(roles["value"], ids, mask) - expected).abs().max() > 1e-3  # it has learned
    policy = AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "shared", **loading("4-bit" if trainer.model.config.to_dict().get("quantization_config") else "")
    )  # fmt: skip
    keep_4bit_gradients(policy)
    torch.testing.assert_close(policy(ids).logits, trainer.model(ids).logits, rtol=0, atol=1e-4)
