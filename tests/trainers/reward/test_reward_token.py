"""Reading the score at a dedicated token: appended wherever prefopt scores, trained alone, saved, never sampled."""

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification
from trl import ModelConfig

from prefopt.inference.generate import generate
from prefopt.inference.scoring import score_texts
from prefopt.models.checkpoints import (
    load_reward_model,
    merge_reward_model,
    reward_model_from_adapter,
    save_reward_model,
)
from prefopt.models.loading import load_language_model
from prefopt.models.reward import append_reward_token, sequence_scores
from prefopt.recipes.common.models import load_policy
from prefopt.trainers.ppo_ptx.config import PPOPtxConfig
from prefopt.trainers.ppo_ptx.roles import check_same_tokenizer
from prefopt.trainers.ppo_ptx.trainer import PPOPtxTrainer
from prefopt.trainers.reward.config import RankedRewardConfig
from prefopt.trainers.reward.trainer import RankedRewardTrainer
from tests.trainers.conftest import settings

pytestmark = pytest.mark.slow

TOKEN = "<|reward|>"
ROWS = [
    {"prompt": prompt, "completions": [f" {a} dog", f" {a} cat", f" {a} mat"], "ranks": [1, 2, 3]}
    for prompt in ("the", "what is this?", "question:")
    for a in ("red", "the", "a")
]
TEXTS = [(row["prompt"], completion) for row in ROWS for completion in row["completions"]]
PROMPTS, COMPLETIONS = zip(*TEXTS, strict=True)


def trainer_on(model, tokenizer, out, peft=True, rows=ROWS, **overrides):
    defaults = {
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 3,
        "num_train_epochs": 2,
        "reward_token": TOKEN,
    }
    return RankedRewardTrainer(
        model=model,
        args=RankedRewardConfig(**settings(out, **{**defaults, **overrides})),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if peft else None,
    )


def embeddings(model):
    """The embedding matrix that the model's forward uses, trained row included."""
    layer = model.get_input_embeddings()
    return layer(torch.arange(model.config.vocab_size)).detach().clone()


# ---- appending ----


def test_the_token_comes_after_the_last_real_token(reward_model):
    reward_model.config.reward_token_id = 9
    ids = torch.tensor([[1, 2, 3], [1, 2, 0], [0, 0, 5], [0, 5, 9], [0, 0, 0], [9, 4, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 1], [0, 1, 1], [0, 0, 0], [1, 1, 0]])
    new_ids, new_mask = append_reward_token(reward_model, ids, mask)
    for i in range(len(ids)):  # the loop twin
        row = ids[i][mask[i].bool()].tolist()
        expected = [*row, 9] if row and row[-1] != 9 else row
        assert new_ids[i][new_mask[i].bool()].tolist() == expected
    again = append_reward_token(reward_model, new_ids, new_mask)
    assert torch.equal(again[0], new_ids)
    assert torch.equal(again[1], new_mask)
    packed = append_reward_token(reward_model, ids.view(2, 3, 3), mask.view(2, 3, 3))
    assert torch.equal(packed[0].flatten(0, 1), new_ids)
    assert torch.equal(packed[1].flatten(0, 1), new_mask)
    roomy = append_reward_token(reward_model, ids[1:2], mask[1:2])
    assert roomy[0].tolist() == [[1, 2, 9]]  # no wider than needed


def test_models_without_a_reward_token_are_left_alone(reward_model):
    ids = torch.tensor([[1, 2]])
    assert append_reward_token(reward_model, ids, ids)[0] is ids


@pytest.mark.parametrize("side", ["left", "right"])
def test_score_is_read_at_the_token(side, reward_model):
    rows = [[5, 6, 7], [10, 11, 12, 13, 1]]
    width = max(map(len, rows))
    pads = [[0] * (width - len(row)) for row in rows]
    ones = [[1] * len(row) for row in rows]
    order = (lambda pad, row: pad + row) if side == "left" else (lambda pad, row: row + pad)
    ids = torch.tensor([order(pad, row) for pad, row in zip(pads, rows, strict=True)])
    mask = torch.tensor([order(pad, one) for pad, one in zip(pads, ones, strict=True)])
    plain = sequence_scores(reward_model, ids, mask)
    reward_model.config.reward_token_id = 300
    scores = sequence_scores(reward_model, ids, mask)
    for i, row in enumerate(rows):
        expected = reward_model(input_ids=torch.tensor([[*row, 300]])).logits[0, 0]
        torch.testing.assert_close(scores[i], expected, rtol=0, atol=1e-6)
        assert abs(scores[i] - plain[i]) > 1e-3


# ---- training ----


@pytest.mark.parametrize("rows", ["spare", "grown"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_trained_saved_reloaded(kind, rows, base_path, tokenizer, tmp_path):
    if rows == "grown":  # the tokenizer has a token for each of the model's 320 rows
        tokenizer.add_tokens([f"<extra_{i}>" for i in range(320 - len(tokenizer))])
    is_lora = kind == "lora"  # all weights at its learning rate make activations whose rounding shows in the scores
    rate = 1e-2 if is_lora else 1e-3
    trainer = trainer_on(base_path, tokenizer, tmp_path / "rm", peft=is_lora, learning_rate=rate)
    token_id = trainer.model.config.reward_token_id
    assert token_id == trainer.processing_class.convert_tokens_to_ids(TOKEN) == len(tokenizer)
    assert TOKEN not in tokenizer.get_vocab()  # the caller's tokenizer is left alone
    assert trainer.model.config.vocab_size == (321 if rows == "grown" else 320)
    before = embeddings(trainer.model)
    trainer.train()
    trainer.center_on([{"prompt": "the", "completion": " dog"}, {"prompt": "a", "completion": " cat"}])
    trainer.save_model()
    moved = (embeddings(trainer.model) != before).any(1)
    assert moved[token_id]
    if kind == "lora":
        assert moved.sum() == 1
        trainable = [n for n, p in trainer.model.named_parameters() if p.requires_grad and "embed" in n]
        assert len(trainable) == 1

    expected = trainer.score(PROMPTS, COMPLETIONS)
    assert max(expected) - min(expected) > 1e-2
    loaded = load_reward_model(tmp_path / "rm")
    assert loaded.config.reward_token_id == token_id
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(embeddings(loaded), embeddings(trainer.model))
    scores = score_texts(loaded, tokenizer, PROMPTS, COMPLETIONS)  # the policy's tokenizer, without the token
    assert scores == score_texts(trainer.model.eval(), tokenizer, PROMPTS, COMPLETIONS)
    assert scores == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert AutoTokenizer.from_pretrained(tmp_path / "rm").convert_tokens_to_ids(TOKEN) == token_id
    if kind == "lora":
        plain = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "rm", num_labels=1)
        ids = torch.tensor([[5, 6, 7, token_id]])
        bias = loaded.config.reward_bias
        ours = sequence_scores(loaded, ids[:, :-1], torch.ones(1, 3))
        torch.testing.assert_close(plain(input_ids=ids).logits[:, 0] - bias, ours, rtol=0, atol=1e-6)
        merged = merge_reward_model(tmp_path / "rm")
        assert score_texts(merged, tokenizer, PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)
        save_reward_model(merged, tmp_path / "merged")
        merged = load_reward_model(tmp_path / "merged")
        assert score_texts(merged, tokenizer, PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)


def test_a_token_that_the_tokenizer_has_is_used(base_path, tokenizer, tmp_path):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<reserved>"]})
    trainer = trainer_on(base_path, tokenizer, tmp_path, reward_token="<reserved>")
    assert trainer.model.config.reward_token_id == tokenizer.convert_tokens_to_ids("<reserved>")
    assert len(trainer.processing_class) == len(tokenizer)


def test_given_model_and_gradient_of_the_row(reward_model, tokenizer, tmp_path):
    trainer = trainer_on(reward_model, tokenizer, tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    trainer.compute_loss(trainer.model, batch).backward()
    gradient = next(p.grad for n, p in trainer.model.named_parameters() if "trainable_tokens_delta" in n)
    assert gradient.abs().max() > 1e-5


def test_continuing_keeps_the_token(base_path, tokenizer, tmp_path):
    first = trainer_on(base_path, tokenizer, tmp_path / "rm")
    first.train()
    first.save_model()
    expected = first.score(PROMPTS, COMPLETIONS)
    model = reward_model_from_adapter(tmp_path / "rm")
    again = trainer_on(model, tokenizer, tmp_path / "again", peft=False)
    assert again.score(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-6)
    assert any("trainable_tokens_delta" in n for n, p in again.model.named_parameters() if p.requires_grad)


def test_sft_adapter_gets_head_and_token(causal_lm, base_path, tokenizer, tmp_path):
    policy = get_peft_model(causal_lm, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    policy.peft_config["default"].base_model_name_or_path = base_path
    policy.save_pretrained(tmp_path / "sft")
    model = reward_model_from_adapter(tmp_path / "sft", tokenizer, TOKEN)
    trainer = trainer_on(model, tokenizer, tmp_path / "rm", peft=False)
    trainer.train()
    trainer.save_model()
    expected = trainer.score(PROMPTS, COMPLETIONS)
    loaded = load_reward_model(tmp_path / "rm")
    assert score_texts(loaded, tokenizer, PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-6)
    without = reward_model_from_adapter(tmp_path / "sft")
    with pytest.raises(ValueError, match="the given adapter does not train the token's embedding"):
        trainer_on(without, tokenizer, tmp_path / "no", peft=False)


def test_a_new_reward_model_reads_at_the_last_token_unless_told(base_path, causal_lm, tokenizer, tmp_path):
    causal_lm.config.reward_token_id = 7  # a policy that was trained against a reward model with one
    causal_lm.save_pretrained(tmp_path / "policy")
    trainer = trainer_on(str(tmp_path / "policy"), tokenizer, tmp_path, reward_token=None)
    assert trainer.model.config.reward_token_id is None


@pytest.mark.parametrize(
    ("token", "match"),
    [
        ("<eos>", "has a role in the text already"),
        ("<pad>", "has a role in the text already"),
        ("a", "is an ordinary token of the text"),
        ("", "take a token of its own"),
    ],
)
def test_tokens_of_the_text_are_refused(token, match, base_path, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=match):
        trainer_on(base_path, tokenizer, tmp_path, reward_token=token)


def test_text_with_the_token_is_refused(base_path, tokenizer, tmp_path):
    rows = [ROWS[0], {"prompt": "the", "completions": [f" cat {TOKEN}", " dog"], "ranks": [1, 2]}]
    with pytest.raises(ValueError, match=r"train row 1: its text contains the reward token '<\|reward\|>'"):
        trainer_on(base_path, tokenizer, tmp_path, rows=rows)


def test_max_length_leaves_room_for_the_token(base_path, tokenizer, tmp_path):
    longest = max(map(len, trainer_on(base_path, tokenizer, tmp_path).train_dataset[0]["completion_ids"]))
    prompt = len(trainer_on(base_path, tokenizer, tmp_path).train_dataset[0]["prompt_ids"])
    rows = ROWS[:1]
    exact = trainer_on(base_path, tokenizer, tmp_path, rows=rows, max_length=prompt + longest + 1)
    assert len(exact.train_dataset[0]["completion_ids"]) == 3
    short = {"rows": rows, "max_length": prompt + longest}
    plain = trainer_on(base_path, tokenizer, tmp_path, reward_token=None, **short)
    assert len(plain.train_dataset[0]["completion_ids"]) == 3
    with pytest.raises(ValueError, match="train"):
        trainer_on(base_path, tokenizer, tmp_path, **short)  # every completion is one token too long


@pytest.mark.parametrize("given", ["path", "model", "adapter"])
def test_a_model_with_a_token_is_checked_without_the_option(given, base_path, tokenizer, tmp_path):
    first = trainer_on(base_path, tokenizer, tmp_path / "rm", peft=given == "adapter")
    first.save_model()
    model = str(tmp_path / "rm")
    if given == "model":
        model = LlamaForSequenceClassification.from_pretrained(model)
    elif given == "adapter":
        model = reward_model_from_adapter(model)
    saved = AutoTokenizer.from_pretrained(tmp_path / "rm")
    settings = {"peft": False, "reward_token": None}
    rows = [ROWS[0], {"prompt": "the", "completions": [f" cat {TOKEN}", " dog"], "ranks": [1, 2]}]
    with pytest.raises(ValueError, match=r"train row 1: its text contains the reward token '<\|reward\|>'"):
        trainer_on(model, saved, tmp_path / "again", rows=rows, **settings)
    row = first.train_dataset[0]
    longest = len(row["prompt_ids"]) + max(map(len, row["completion_ids"]))
    exact = trainer_on(model, saved, tmp_path, rows=ROWS[:1], max_length=longest + 1, **settings)
    assert len(exact.train_dataset[0]["completion_ids"]) == 3
    with pytest.raises(ValueError, match="train"):
        trainer_on(model, saved, tmp_path, rows=ROWS[:1], max_length=longest, **settings)


# ---- a policy on the same base ----


def test_never_sampled_and_scored_alike(causal_lm, tokenizer, tmp_path):
    token_id = 310
    torch.manual_seed(1)
    config = causal_lm.config.from_dict({**causal_lm.config.to_dict(), "num_labels": 1, "reward_token_id": token_id})
    reward_model = LlamaForSequenceClassification(config)
    lm_head = nn.Linear(16, 320)  # the token has by far the largest logit everywhere
    lm_head.weight.data.copy_(causal_lm.lm_head.weight.data)
    lm_head.bias.data.zero_()
    lm_head.bias.data[token_id] = 50.0
    causal_lm.lm_head = lm_head
    drawn = generate(causal_lm, tokenizer, ["the cat"], max_new_tokens=8, num_return=4)[0]
    assert all(token_id in completion.ids for completion in drawn)

    args = PPOPtxConfig(
        output_dir=str(tmp_path),
        report_to="none",
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=4,
        max_completion_length=8,
        max_steps=1,
        ptx_coef=0,
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    trainer = PPOPtxTrainer(
        causal_lm,
        reward_model,
        args,
        train_dataset=Dataset.from_list([{"prompt": text} for text in ("the cat", "a dog", "the", "what is")]),
        processing_class=tokenizer,
    )
    seen = []
    score = trainer._score
    trainer._score = lambda model, ids: (
        seen.append((list(trainer._sampled.prompt_ids), ids, score(model, ids))) or seen[-1][2]
    )
    trainer.train()
    prompt_ids, completion_ids, scores = seen[0]
    assert sum(map(len, completion_ids)) > 4
    for prompt, completion, got in zip(prompt_ids, completion_ids, scores, strict=True):
        assert token_id not in completion
        expected = reward_model(input_ids=torch.tensor([[*prompt, *completion, token_id]])).logits[0, 0]
        assert got == pytest.approx(expected.item(), abs=1e-5)
    drawn = generate(trainer.model, tokenizer, ["the cat"], max_new_tokens=8, num_return=4)[0]
    assert not any(token_id in completion.ids for completion in drawn)
    out = trainer.model.generate(torch.tensor([[5, 6]]), max_new_tokens=8, do_sample=False)
    assert token_id not in out  # transformers' own generate, from the generation config that is saved with the policy


def test_ppo_accepts_a_reward_model_whose_tokenizer_has_one_token_more(base_path, causal_lm, tokenizer, tmp_path):
    trainer_on(base_path, tokenizer, tmp_path / "rm").save_model()
    reward_model = load_reward_model(tmp_path / "rm")
    reward_model.config._name_or_path = str(tmp_path / "rm")
    check_same_tokenizer(reward_model, causal_lm, tokenizer, "reward model")
    tokenizer.add_tokens(["other"])
    with pytest.raises(ValueError, match="has another tokenizer"):
        check_same_tokenizer(reward_model, causal_lm, tokenizer, "reward model")


def test_an_adapter_policy_remembers_the_token(causal_lm, tokenizer, tmp_path):
    """It has no weights of the token, so nothing but the note beside it keeps `generate` from sampling it."""
    token_id = 310
    causal_lm.lm_head = nn.Linear(16, 320)
    causal_lm.lm_head.bias.data[token_id] = 50.0
    causal_lm.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.lm_head = causal_lm.lm_head
    reward_model = LlamaForSequenceClassification(
        causal_lm.config.from_dict({**causal_lm.config.to_dict(), "num_labels": 1, "reward_token_id": token_id})
    )
    args = PPOPtxConfig(
        str(tmp_path / "policy"), report_to="none", use_cpu=True, bf16=False, per_device_train_batch_size=2, max_steps=1,
        max_completion_length=4, ptx_coef=0, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "the cat"}, {"prompt": "a dog"}])
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = PPOPtxTrainer(base, reward_model, args, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
    trainer.save_model()
    for load in (
        lambda path: load_language_model(path)[0],
        lambda path: load_policy(ModelConfig(path), {}, is_trainable=False),
    ):
        policy = load(str(tmp_path / "policy"))
        policy.get_base_model().lm_head = causal_lm.lm_head
        drawn = generate(policy, tokenizer, ["the cat"], max_new_tokens=8, num_return=4)[0]
        assert not any(token_id in completion.ids for completion in drawn)
        policy.config.reward_token_id = None
        drawn = generate(policy, tokenizer, ["the cat"], max_new_tokens=8, num_return=4)[0]
        assert all(token_id in completion.ids for completion in drawn)
