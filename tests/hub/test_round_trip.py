"""Train, push, load with plain transformers and peft: the same numbers, by the code in the model card itself."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.hub.push import push_folder, save_merged
from prefopt.models.checkpoints import load_reward_model, merge_reward_model
from prefopt.models.reward import sequence_scores
from tests.hub.models import (
    ANSWER,
    DEMONSTRATIONS,
    QUESTION,
    ROWS,
    chat,
    dpo_trainer,
    ppo_trainer,
    reward_trainer,
    run_card,
)

pytestmark = [pytest.mark.allow_hosts(["127.0.0.1"]), pytest.mark.slow]
IDS = torch.tensor([[5, 6, 7, 8, 9, 1], [10, 11, 12, 13, 14, 15]])
MASK = torch.ones_like(IDS)


@pytest.fixture(autouse=True)
def four_bit_without_repacking(monkeypatch):
    """On a CPU with AVX512-BF16, plain bitsandbytes rounds activations to bf16, and cards run plain libraries."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@pytest.mark.parametrize("kind", ["full", "lora", "4-bit lora"])
def test_a_reward_model_scores_the_same_after_the_hub(kind, hub, base, tokenizer, tmp_path):
    lora, four_bit = kind != "full", kind == "4-bit lora"
    trainer = reward_trainer(base, tokenizer, tmp_path / "rm", lora=lora, four_bit=four_bit)
    trainer.train()
    bias = trainer.center_on(DEMONSTRATIONS)
    expected = trainer.score([QUESTION], [ANSWER])[0]
    scores = sequence_scores(trainer.model.eval(), IDS, MASK)
    trainer.push_to_hub(dataset_name="me/rankings")
    assert abs(bias) > 1e-3

    card = run_card(hub.files("me/rm")["README.md"].decode())
    assert card["score"] == pytest.approx(expected, abs=1e-5)
    plain = card["model"](input_ids=IDS, attention_mask=MASK).logits[:, 0]
    torch.testing.assert_close(plain - bias, scores, atol=1e-5, rtol=0)
    assert bool(getattr(card.get("base"), "is_loaded_in_4bit", False)) == four_bit
    assert torch.equal(sequence_scores(load_reward_model("me/rm"), IDS, MASK), scores)
    assert AutoTokenizer.from_pretrained("me/rm").get_vocab() == tokenizer.get_vocab()


def test_a_merged_reward_model_scores_as_its_4bit_adapter(hub, base, tokenizer, tmp_path):
    trainer = reward_trainer(base, tokenizer, tmp_path / "rm", four_bit=True)
    trainer.train()
    trainer.center_on(DEMONSTRATIONS)
    trainer.save_model()
    trainer.create_model_card()
    save_merged(tmp_path / "rm", tmp_path / "merged")
    push_folder(tmp_path / "merged", "me/whole")
    card = run_card(hub.files("me/whole")["README.md"].decode())
    assert not isinstance(card["model"], PeftModel)
    assert card["score"] == pytest.approx(trainer.score([QUESTION], [ANSWER])[0], abs=1e-4)
    merged = merge_reward_model(tmp_path / "rm")
    assert torch.equal(sequence_scores(load_reward_model("me/whole"), IDS, MASK), sequence_scores(merged, IDS, MASK))


@pytest.mark.parametrize("lora", [True, False])
def test_a_reward_token_travels_along(lora, hub, base, tokenizer, tmp_path):
    trainer = reward_trainer(base, tokenizer, tmp_path / "rm", lora=lora, reward_token="<|reward|>")
    trainer.train()
    trainer.push_to_hub()
    text = hub.files("me/rm")["README.md"].decode()
    assert f"ids += [{len(tokenizer)}]" in text
    assert "reward_bias" not in text  # it was never centered
    assert run_card(text)["score"] == pytest.approx(trainer.score([QUESTION], [ANSWER])[0], abs=1e-5)


@pytest.mark.parametrize("lora", [True, False])
def test_where_eos_is_the_pad_token_the_card_reads_the_score_behind_eos(lora, hub, base, tokenizer, tmp_path):
    tokenizer.pad_token = tokenizer.eos_token
    trainer = reward_trainer(base, tokenizer, tmp_path / "rm", lora=lora)
    trainer.push_to_hub()
    card = run_card(hub.files("me/rm")["README.md"].decode())
    assert card["ids"][-1] == tokenizer.pad_token_id
    assert card["score"] == pytest.approx(trainer.score([QUESTION], [ANSWER])[0], abs=1e-5)


@pytest.mark.parametrize("closing", ["token", "text"])
def test_the_card_closes_a_conversation_as_training_does(closing, hub, base, chat_tokenizer, tmp_path):
    if closing == "text":  # the template ends an answer with no token of its own
        chat_tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        chat_tokenizer.chat_template += "{% if add_generation_prompt %}assistant: {% endif %}"
    rows = [chat(row) for row in ROWS]
    trainer = reward_trainer(base, chat_tokenizer, tmp_path / "rm", rows=rows)
    trainer.train()
    trainer.push_to_hub()
    messages = [{"role": "user", "content": QUESTION}], [{"role": "assistant", "content": ANSWER.strip()}]
    expected = trainer.score([messages[0]], [messages[1]])[0]
    assert run_card(hub.files("me/rm")["README.md"].decode())["score"] == pytest.approx(expected, abs=1e-5)
    assert AutoTokenizer.from_pretrained("me/rm").chat_template == chat_tokenizer.chat_template


def test_of_ppo_ptx_the_policy_adapter_alone_is_published(hub, base, tokenizer, tmp_path):
    sft = dpo_trainer(base, tokenizer, tmp_path / "sft")
    sft.train()
    sft.save_model()
    reward = reward_trainer(base, tokenizer, tmp_path / "rm")
    reward.train()
    reward.save_model()
    trainer = ppo_trainer(str(tmp_path / "sft"), tokenizer, tmp_path / "ppo", str(tmp_path / "rm"), ema_decay=0.9)
    trainer.train()
    logits = trainer.model.eval()(input_ids=IDS, attention_mask=MASK).logits
    trainer.save_model()
    trainer.push_to_hub()
    kept = {path.name for path in (tmp_path / "ppo").iterdir()}
    assert {"value_function.safetensors", "ref", "reward", "value", "ema"} <= kept
    files = hub.files("me/ppo")
    assert sorted(files) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "generation_config.json",
        "model_card.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    card = run_card(files["README.md"].decode())
    torch.testing.assert_close(card["model"](input_ids=IDS, attention_mask=MASK).logits, logits, atol=1e-5, rtol=0)
    assert card["output"].shape[1] > card["prompt"].input_ids.shape[1]
    plain = AutoModelForCausalLM.from_pretrained("me/ppo")
    torch.testing.assert_close(plain(input_ids=IDS).logits, logits, atol=1e-5, rtol=0)
    on_peft = AutoPeftModelForCausalLM.from_pretrained("me/ppo")
    torch.testing.assert_close(on_peft(input_ids=IDS).logits, logits, atol=1e-5, rtol=0)
    # The averaged policy is a model of its own, from the same run.
    push_folder(tmp_path / "ppo" / "ema", "me/average")
    assert sorted(hub.files("me/average")) == sorted(files)
    text = hub.files("me/average")["README.md"].decode()
    assert "Trained with PPO-ptx" in text
    averaged = run_card(text)["model"](input_ids=IDS).logits
    with trainer.averaged_weights():
        expected = trainer.model(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(averaged, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(averaged, logits, atol=1e-5)


def test_a_policy_never_samples_the_reward_token_after_the_hub(hub, base, tokenizer, tmp_path):
    reward = reward_trainer(base, tokenizer, tmp_path / "rm", lora=False, reward_token="<|im_start|>")
    reward.train()
    reward.save_model()
    token = reward.model.config.reward_token_id
    sft = dpo_trainer(base, tokenizer, tmp_path / "sft")
    sft.save_model()
    trainer = ppo_trainer(str(tmp_path / "sft"), tokenizer, tmp_path / "ppo", str(tmp_path / "rm"))
    trainer.push_to_hub()
    files = hub.files("me/ppo")
    assert json.loads(files["generation_config.json"])["suppress_tokens"] == [token]
    assert json.loads(files["config.json"])["reward_token_id"] == token
    card = run_card(files["README.md"].decode())
    assert card["model"].generation_config.suppress_tokens == [token]


def test_a_full_policy_comes_back_whole(hub, base, tokenizer, tmp_path):
    reward = reward_trainer(base, tokenizer, tmp_path / "rm", lora=False)
    reward.save_model()
    policy = AutoModelForCausalLM.from_pretrained(base)
    trainer = ppo_trainer(policy, tokenizer, tmp_path / "ppo", str(tmp_path / "rm"))
    trainer.train()
    trainer.push_to_hub()
    assert "value_function.safetensors" not in hub.files("me/ppo")
    card = run_card(hub.files("me/ppo")["README.md"].decode())
    weights = trainer.model.state_dict()
    for name, weight in card["model"].state_dict().items():
        assert torch.equal(weight, weights[name]), name
