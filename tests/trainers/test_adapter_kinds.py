"""Adapters of every kind: the reference is the SFT adapter, and a role on the policy's base is the model alone.

PEFT names their weights in different ways: `lora_A.default.weight`, `lora_embedding_A.default`, `ia3_l.default`,
`trainable_tokens_delta.default`, `modules_to_save.default.weight`.
"""

import json

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

from prefopt import PPOPtxConfig, PPOPtxTrainer, RankedDPOConfig, RankedDPOTrainer
from prefopt.models.checkpoints import load_reward_model, reward_model_from_adapter, save_reward_model
from prefopt.models.reward import keep_head_fp32, sequence_scores, token_scores, value_model_from
from prefopt.models.roles import AdapterScorer, load_scorer, trainable_copy, why_not_shared
from tests.conftest import tiny_config
from tests.trainers.conftest import settings

pytestmark = pytest.mark.slow

# "a", "the" and " cat".
TOKENS = [68, 297, 291]
KINDS = {
    "linear": lambda **options: LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options),
    "dora": lambda **options: LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, **options),
    "embeddings": lambda **options: LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], **options),
    "tokens": lambda **options: LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": TOKENS}, **options
    ),
    "ia3": lambda **options: IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **options
    ),
    "modules": lambda modules_to_save=(), **options: LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head", *modules_to_save], **options
    ),
}
PROMPTS = Dataset.from_dict({"prompt": ["the cat", "a dog ran to the", "question: what is this?", "red"] * 2})
ROWS = Dataset.from_list(
    [{"prompt": "the cat", "completions": [" sat on the mat", " ran", " and the dog"], "ranks": [1, 2, 3]}] * 4
)
IDS = torch.tensor([[68, 5, 291, 297, 9, 1], [7, 68, 8, 297, 291, 11], [12, 291, 13, 14, 15, 16]])
MASK = torch.ones_like(IDS)


@pytest.fixture(params=["linear", "dora", "embeddings", "tokens", "ia3", "modules", "tied embeddings", "tied tokens"])
def kind(request, tmp_path):
    """A key of `KINDS`; with "tied", the base has one matrix for embeddings and LM head."""
    tied, _, kind = request.param.rpartition(" ")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(tie_word_embeddings=bool(tied))).save_pretrained(tmp_path / "base")
    return kind


@pytest.fixture
def base(kind, tmp_path):
    return str(tmp_path / "base")


def skip_modules(kind):
    if kind == "modules":
        pytest.skip("whole modules are never shared")


def moved(model, seed=3):
    """The model, its trainable weights away from where they start, as after training."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def policy_on(base, kind):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return moved(get_peft_model(model, KINDS[kind](task_type="CAUSAL_LM")))


def reward_adapter(base, kind, folder, seed=4):
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    model = moved(get_peft_model(model, KINDS[kind](task_type="SEQ_CLS", modules_to_save=["score"])), seed)
    keep_head_fp32(model)
    save_reward_model(model, folder)
    return str(folder)


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_reference_of_dpo_is_the_adapter_that_was_given(kind, base, tokenizer, tmp_path):
    precompute = kind == "tokens"
    policy = policy_on(base, kind)
    trained = trainable(policy)
    trainer = RankedDPOTrainer(
        policy,
        args=RankedDPOConfig(
            **settings(tmp_path / "dpo", max_steps=2, learning_rate=1e-2, precompute_ref_log_probs=precompute)
        ),
        train_dataset=ROWS,
        processing_class=tokenizer,
    )
    assert trainable(trainer.model) == trained
    texts = [row["prompt"] for row in ROWS for _ in row["ranks"]], [c for row in ROWS for c in row["completions"]]
    assert set(trainer.score(*texts)) == {0.0}
    batch = trainer.data_collator(list(trainer.train_dataset))
    before = trainer.compute_ref_log_probs(trainer.model, batch)
    trainer.train()
    # The policy has moved, the reference has not.
    assert torch.equal(trainer.compute_ref_log_probs(trainer.model, batch), before)
    assert max(map(abs, trainer.score(*texts))) > 1e-3


def test_the_reference_of_ppo_is_the_adapter_that_was_given(kind, base, tokenizer, tmp_path):
    policy = policy_on(base, kind)
    trained = trainable(policy)
    args = PPOPtxConfig(
        **settings(tmp_path / "ppo", max_steps=2, logging_steps=1, learning_rate=1e-2, warmup_steps=0),
        per_device_train_batch_size=4,
        max_completion_length=6,
        ptx_coef=0.0,
        kl_estimator="full",
    )
    trainer = PPOPtxTrainer(
        policy,
        lambda completions, **_: [float(len(c)) for c in completions],
        args,
        PROMPTS,
        processing_class=tokenizer,
    )
    assert trainable(trainer.model) == trained
    trainer.train()
    kl = [log["objective/kl"] for log in trainer.state.log_history if "objective/kl" in log]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[1] > 1e-4
    assert trainable(trainer.model) == trained


def test_roles_on_the_base_of_the_policy_are_the_models_alone(kind, base, tmp_path):
    """Scores, values, the gradient of every weight of the value function, and what is saved."""
    skip_modules(kind)
    path = reward_adapter(base, kind, tmp_path / "rm")
    policy = policy_on(base, kind).eval()
    before, trained = policy(IDS).logits, trainable(policy)
    assert why_not_shared(policy, path) is None
    reward = load_scorer(policy, path)
    alone = load_reward_model(path)
    torch.testing.assert_close(
        sequence_scores(reward, IDS, MASK), sequence_scores(alone, IDS, MASK), rtol=0, atol=1e-5
    )
    value, value_alone = trainable_copy(reward), value_model_from(alone).eval()
    assert torch.equal(policy(IDS).logits, before)
    assert trainable(policy) == trained
    with value.active():
        assert trainable(policy) == set(value.adapter_parameters())
        token_scores(value, IDS, MASK).square().mean().backward()
    token_scores(value_alone, IDS, MASK).square().mean().backward()
    expected = {n: p.grad for n, p in value_alone.named_parameters() if p.requires_grad and "score" not in n}
    ours = {n.replace(".value", ".default"): p.grad for n, p in value.adapter_parameters().items()}
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
        assert gradient.abs().max() > 0, name
    with torch.no_grad():
        for parameter in [*value.adapter_parameters().values(), *value.parameters()]:
            parameter -= 0.1 * parameter.grad.sign()
    values = sequence_scores(value, IDS, MASK)
    assert (values - sequence_scores(reward, IDS, MASK)).abs().max() > 1e-2
    value.save_pretrained(tmp_path / "value")
    torch.testing.assert_close(
        sequence_scores(load_reward_model(tmp_path / "value"), IDS, MASK), values, rtol=0, atol=1e-5
    )


def test_the_value_function_of_ppo_trains_saves_and_reads_all_of_its_adapter(kind, base, tokenizer, tmp_path):
    skip_modules(kind)
    path = reward_adapter(base, kind, tmp_path / "rm")

    def make(folder):
        args = PPOPtxConfig(
            **settings(tmp_path / folder, max_steps=1, learning_rate=1e-2, warmup_steps=0),
            value_learning_rate=1e-2,
            per_device_train_batch_size=4,
            max_completion_length=6,
            ptx_coef=0.0,
        )
        return PPOPtxTrainer(policy_on(base, kind), path, args, PROMPTS, processing_class=tokenizer)

    trainer = make("ppo")
    assert isinstance(trainer.value_function.module, AdapterScorer)
    before = {name: p.detach().clone() for name, p in trainer.value_function.named_parameters.items()}
    model = load_reward_model(path)
    assert len(before) == len(trainable(value_model_from(model)))
    trainer.train()
    moved_weights = {n for n, p in trainer.value_function.named_parameters.items() if not torch.equal(p, before[n])}
    assert moved_weights == before.keys()
    trainer.save_model()
    again = make("again")
    again.value_function.load(str(tmp_path / "ppo"))
    for name, weight in again.value_function.named_parameters.items():
        assert torch.equal(weight, trainer.value_function.named_parameters[name]), name
    loaded = load_reward_model(tmp_path / "ppo" / "value")
    values = sequence_scores(trainer.value_function.module, IDS, MASK)
    torch.testing.assert_close(sequence_scores(loaded, IDS, MASK), values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["tokens"], indirect=True)
def test_a_reward_model_from_an_adapter_with_trained_tokens_shares_the_policys_base(base, tmp_path):
    policy_on(base, "tokens").save_pretrained(tmp_path / "sft")
    model = reward_model_from_adapter(tmp_path / "sft", dtype=torch.float32)
    save_reward_model(model, tmp_path / "rm")
    policy = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "sft", is_trainable=True
    )
    assert why_not_shared(policy, tmp_path / "rm") is None
    alone = load_reward_model(tmp_path / "rm")
    torch.testing.assert_close(
        sequence_scores(load_scorer(policy, tmp_path / "rm"), IDS, MASK),
        sequence_scores(alone, IDS, MASK),
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize("kind", ["linear"], indirect=True)
def test_another_base_is_not_shared(base, tmp_path):
    path = reward_adapter(base, "linear", tmp_path / "rm")
    assert why_not_shared(policy_on(base, "tokens"), path) == "the policy has token embeddings of its own"
    tokens = reward_adapter(base, "tokens", tmp_path / "tokens")
    assert why_not_shared(policy_on(base, "linear"), tokens) == "it has token embeddings of its own"
    assert "it is a LORA adapter" in why_not_shared(policy_on(base, "ia3"), path)
    half = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), KINDS["linear"](task_type="CAUSAL_LM")
    )
    assert why_not_shared(half, path) == "its base is float32, the policy's bfloat16"
    policy = policy_on(base, "embeddings")
    embeddings = reward_adapter(base, "embeddings", tmp_path / "embeddings")
    assert why_not_shared(policy, embeddings) is None
    with torch.no_grad():
        policy.get_base_model().get_input_embeddings().weight[5] += 1
    assert why_not_shared(policy, embeddings) == "the token embeddings of its base are not the policy's"
    file = tmp_path / "rm" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "revision": "v2"}))
    expected = "it was trained on revision v2 of its base, the policy on main"
    assert why_not_shared(policy_on(base, "linear"), path) == expected
